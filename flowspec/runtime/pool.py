"""A pool is ranks that draft for rank 0; here are both ends of what they tell each other.

Rank 0 does not wait for what it says, only for what it asks. What a rank of the pool has, and which
of them is asked for what, is known on rank 0 alone (core/pool.py).
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import NamedTuple

from flowspec.comm.base import Message, Transport
from flowspec.core.messages import Commit, Drafted, DraftNode
from flowspec.core.pool import Asked, Shares
from flowspec.core.request import Request
from flowspec.draft.base import Asks, Drafter, Noise, Remote, RemoteSession, Session
from flowspec.runtime import wire
from flowspec.runtime.drafting import at_least
from flowspec.sampling import noise_for

LOST = Message("lost")
"""Rank 0 puts this among the answers when the rank that should give them is lost."""


class _Sent(NamedTuple):
    """This is what a rank was asked for."""

    asked: Asked
    rows: int
    """It computes so many rows for this."""
    since: float
    """It could begin at this time of the clock."""


_NOTHING = _Sent({}, 0, 0.0)


class PoolSession(RemoteSession):
    """A PoolSession is one request in a PoolDrafter."""

    def __init__(self, pool: PoolDrafter, request: int):
        self.pool, self.request = pool, request
        self.pool.shares.begin(request)

    def commit(self, commit: Commit, features: object = None) -> None:
        self.pool.shares.commit(self.request, commit)
        self.pool.tell(wire.text(self.request, commit))

    def saw(self, nodes: Sequence[DraftNode]) -> None:
        self.pool.shares.saw(self.request, nodes)

    def end(self) -> None:
        self.pool.shares.end(self.request)
        self.pool.tell(wire.leave(self.request))


class PoolDrafter(Remote):
    """A PoolDrafter is a draft model that some ranks hold, as rank 0's draft thread sees it."""

    features = False

    def __init__(self, transport: Transport, ranks: Sequence[int]):
        self.shares = Shares(ranks)
        self._transport, self._clock = transport, transport.inbox.clock
        self._heard: queue.SimpleQueue[tuple[int, Message, float]] = queue.SimpleQueue()

    # ---- from rank 0's other threads -------------------------------------------------------------
    def hear(self, rank: int, message: Message) -> None:
        """Take in what a rank of the pool answered, or that it is lost (LOST)."""
        self._heard.put((rank, message, self._clock.now()))

    # ---- from the draft thread -------------------------------------------------------------------
    def tell(self, message: Message) -> None:
        for rank in self.shares.costs:
            self._transport.send_control(rank, message)

    def begin(self, request: Request, noise: Noise | None, features: object = None) -> PoolSession:
        session = PoolSession(self, request.id)
        self.tell(wire.take_on(request, coupled=noise is not None))
        return session

    def propose(self, asks: Asks) -> list[Drafted]:
        return self.start(asks)()[0]

    def start(self, asks: Asks) -> Callable[[], tuple[list[Drafted], float]]:
        begun = self._clock.now()
        wanted = {session.request: nodes for session, nodes in asks}
        sent = self._send(wanted)

        def wait() -> tuple[list[Drafted], float]:
            answers, ended = self._collect(wanted, sent)
            return answers, ended - begun

        return wait

    def _send(self, wanted: dict[int, Sequence[DraftNode]]) -> dict[int, _Sent]:
        """Ask for these nodes; return what each rank was asked for."""
        sent = {}
        for rank, (asked, rows) in self.shares.divide([*wanted.items()]).items():
            self._transport.send_control(rank, wire.ask(asked))
            sent[rank] = _Sent(asked, rows, self._clock.now())
        return sent

    def _collect(
        self, wanted: dict[int, Sequence[DraftNode]], sent: dict[int, _Sent]
    ) -> tuple[list[Drafted], float]:
        """Return the answers to what was sent, and when the last of them came.

        What a lost rank was asked for, others are."""
        parts: dict[int, list[Drafted]] = {request: [] for request in wanted}
        missing: dict[int, set[DraftNode]] = {request: set() for request in wanted}
        ended = self._clock.now()
        while sent:
            rank, message, ended = self._heard.get()
            if message.kind == "drafted" and rank in sent:
                _, rows, since = sent.pop(rank)
                self.shares.observe(rank, rows, ended - since)
                for request, answer in wire.read_drafted(message).items():
                    parts[request].append(answer)
            elif message.kind == LOST.kind:
                self.shares.lost(rank)
                for request, nodes in sent.pop(rank, _NOTHING).asked.items():
                    missing[request].update(nodes)
            elif rank in sent:  # it has read a prompt: the time of the forward begins here
                sent[rank] = sent[rank]._replace(since=max(sent[rank].since, ended))
            if not sent:
                again = {r: [n for n in nodes if n in missing[r]] for r, nodes in wanted.items()}
                sent = self._send({r: nodes for r, nodes in again.items() if nodes})
                missing = {request: set() for request in wanted}
        return [_joined(parts[r], nodes) for r, nodes in wanted.items()], ended


def _joined(parts: Sequence[Drafted], wanted: Sequence[DraftNode]) -> Drafted:
    """Return the answer for the nodes that were wanted; other nodes lie on the way to them."""
    ids = {node.id for node in wanted}
    proposals = {id: part.proposal(id) for part in parts for id in part.nodes if id in ids}
    return Drafted.pack(proposals, proposals.values())


class DrafterRank:
    """A DrafterRank drafts for rank 0 until that ends the run.

    Each forward takes at least `least` seconds (emulation). `vocabulary` is the target's."""

    def __init__(self, transport: Transport, drafter: Drafter, vocabulary: int, least: float):
        self._transport, self._drafter, self._vocabulary = transport, drafter, vocabulary
        self._least, self._clock = least, transport.inbox.clock
        self._sessions: dict[int, Session] = {}

    def run(self) -> None:
        pulse = self._transport.pulses[self._transport.rank]
        while True:
            _, message = self._transport.inbox.get()
            if message.kind == wire.STOP.kind:
                return
            pulse.at("drafting")
            self._take(message)
            pulse.at()

    def _take(self, message: Message) -> None:
        if message.kind == "take_on":
            request, coupled = wire.read_take_on(message)
            noise = noise_for(request.sampling, self._vocabulary) if coupled else None
            self._sessions[request.id] = self._at_least(lambda: self._drafter.begin(request, noise))
            self._transport.send_control(0, wire.prefilled(request.id))
        elif message.kind == "ask":
            asked = wire.read_ask(message)
            asks = [(self._sessions[request], nodes) for request, nodes in asked.items()]
            answers = self._at_least(lambda: self._drafter.propose(asks))
            made = dict(zip(asked, answers, strict=True))
            self._transport.send_control(0, wire.drafted(made))
        elif message.kind == "text":
            session, commit = wire.read_text(message)
            self._sessions[session].commit(commit)
        else:
            self._sessions.pop(message.meta["request"], None)

    def _at_least(self, work: Callable):
        return at_least(self._clock, self._least, work)[0]
