"""The driver is rank 0 at work: it performs the scheduler's actions and feeds it events.

It does so in a thread of its own. Whoever wants a text submits a request and reads its stream; how
fast the reader is, or whether it is still there, is no matter to the ring.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
import threading
import time
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from flowspec.comm.base import Message, Transport
from flowspec.core.decoding import Decoding
from flowspec.core.messages import (
    PREFILL_ROWS,
    Action,
    Back,
    Batch,
    Commit,
    Decision,
    Draft,
    Event,
    Prunes,
    Returned,
    Segment,
    Wake,
    Woke,
)
from flowspec.core.past import Past, past_of
from flowspec.core.policy import Policy, PolicyConfig
from flowspec.core.request import Request
from flowspec.core.ring import Ring
from flowspec.core.scheduler import Scheduler
from flowspec.core.sight import Sight, seen
from flowspec.core.stage import StageState
from flowspec.errors import RankLost, need
from flowspec.models.cache import RowCache
from flowspec.models.stage import Head
from flowspec.runtime import wire
from flowspec.runtime.drafting import DraftThread, Local
from flowspec.runtime.picking import Picked, Picks
from flowspec.runtime.pool import LOST, PoolDrafter
from flowspec.runtime.stream import Stream
from flowspec.runtime.tracing import SpanLog, merged
from flowspec.runtime.waiting import receive
from flowspec.sampling import Logprobs, NoiseRows, noise_for
from flowspec.trace import Fates, Span

log = logging.getLogger(__name__)

QUESTIONS = 5
"""Each stage's clock is asked this many times after a traced request."""


class Committed(NamedTuple):
    """Committed is one token of the text."""

    id: int
    accepted: bool
    """The token had been drafted and sent before the target picked it."""
    gap: float
    """This is the lead over the runner-up: in logits at temperature 0, else in log-probability
    perturbed by the sampling noise."""
    logprobs: Logprobs | None = None
    """None unless the request asks for them."""
    final: bool = False
    """This is the last token of the text."""


@dataclass
class Stats:
    """Stats hold what one request took. Times are seconds of the inbox's monotonic clock."""

    begun: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    ended: float = 0.0
    finish_reason: str = "cancelled"
    drafted: int = 0
    guesses: int = 0
    """So many drafted tokens were sent into the ring."""
    segments: int = 0
    returned_segments: int = 0
    bookkeeping: float = 0.0
    """Rank 0's thread spent this many CPU seconds on other work than verification (lm_head and
    sampling) and waiting. Requests that are in the ring at the same time share them equally."""
    hop: float = 0.0
    """This is the median seconds of recent hops; it is 0 if none was measured."""
    reports: dict[int, wire.Report] = field(default_factory=dict)
    """This maps the rank of a stage to its report."""
    explanation: list[str] = field(default_factory=list)
    """These lines say what the policy chose, and why."""
    spans: list[Span] = field(default_factory=list)
    """These spans say what all ranks did, on rank 0's clock; empty unless the request was
    traced."""


class Load(NamedTuple):
    """A load says how full the ring is."""

    running: int
    waiting: int
    """So many requests wait for room."""
    rows: int
    """The requests in the ring may need so many rows of a stage's cache."""
    room: float
    """The stage with the least room has so many; infinite if none says so."""


class _Submit(NamedTuple):
    """An item of the inbox: begin with a request."""

    live: _Live


class _Cancel(NamedTuple):
    """An item of the inbox: nobody reads the text of this request any more."""

    request: int


class _Lost(NamedTuple):
    """An item of the inbox: a rank is lost, and what became of it."""

    rank: int
    why: str


class _Forget(NamedTuple):
    """An item of the inbox: forget what was learnt."""


class _Watched(NamedTuple):
    """An item of the inbox: somebody wants to see the ring while nothing is in it."""


class _Close(NamedTuple):
    """An item of the inbox: end the thread."""


@dataclass
class Submission:
    """A submission is a request, and how it is served."""

    request: Request
    policy: Policy
    switches: PolicyConfig
    trace: bool = False
    """If it is True, all ranks note what they do."""
    spread: bool = False
    """If it is True, the members of a stage each keep a part of the rows (wire.start)."""

    @property
    def rows(self) -> int:
        """Return the rows of a stage's cache that it may need.

        They hold the text, the tree, what of it died, and room to grow."""
        text = self.request.prompt_length + self.request.sampling.max_new_tokens
        return RowCache.room(text + self.policy.budget + StageState.COMPACT + Ring.MOST)


class Ticket:
    """A ticket is held by whoever submitted a request.

    It has `tokens` as they are committed, and `stats`, complete once they have ended."""

    def __init__(self, driver: Driver, request: int):
        self.tokens: Stream[Committed] = Stream()
        self.stats = Stats()
        self._driver, self._request = driver, request

    def cancel(self) -> None:
        """End the request if it is not over yet: its rows in the ring are freed at once."""
        self._driver._transport.inbox.put(_Cancel(self._request))

    def abandon(self) -> None:
        """Do so soon. This may be called by the garbage collector in the midst of anything."""
        self._driver._abandoned.append(self._request)


class _Live:
    """A request in the ring, from rank 0's side."""

    def __init__(self, submission: Submission, ticket: Ticket, drafts: bool, hidden_scale: float):
        self.submission, self.request = submission, submission.request
        self.tokens, self.stats = ticket.tokens, ticket.stats
        self.log, self.fates = (
            SpanLog(submission.trace, submission.request.id, hidden_scale),
            Fates(),
        )
        self.drafts = drafts
        self.decoding: Decoding
        self.noise: NoiseRows | None = None
        self.past: Past | None = None
        self.features: dict[int, tuple[torch.Tensor, int]] = {}
        """This maps a node that came back to (feature rows, index of its row there), if the drafter
        reads them."""
        self.picks: dict[int, Picked] = {}
        self.before = 0.0
        """The shared bookkeeping of the run was this when the request began."""
        self.pongs: dict[int, list[tuple[float, float]]] = {}
        """This maps a rank to (seconds of a round trip, its clock minus ours) of a traced
        request."""

    @property
    def reported(self) -> bool:
        """Whether all is known that is to be known of a request that is over."""
        asked = QUESTIONS if self.log.on else 0
        return all(len(self.pongs.get(rank, ())) >= asked for rank in self.stats.reports)


class Driver:
    """The driver serves requests, many at a time.

    `draft` is None if nothing is ever drafted. `head` is given if rank 0 verifies
    (verify_on: coordinator). `hidden_scale` is that of emulated links, for the bytes in a trace.
    `pools` are the drafters on ranks of their own, by rank."""

    def __init__(
        self,
        transport: Transport,
        draft: DraftThread | None,
        vocabulary: int,
        head: Head | None = None,
        hidden_scale: float = 1.0,
        pools: Mapping[int, PoolDrafter] = {},
    ):
        self._pools = pools
        self._gone: set[int] = set()  # drafters that are lost
        self._transport, self._draft, self._head, self._vocabulary = (
            transport,
            draft,
            head,
            vocabulary,
        )
        self._topology, self._clock = transport.topology, transport.inbox.clock
        self._hidden_scale = hidden_scale
        self._scheduler = Scheduler(self._topology)
        self._fresh = True
        self._room: dict[int, int] = {}  # rank of a stage -> rows of all requests that fit there
        self._waiting: deque[_Live] = deque()  # until there is room for them
        self._abandoned: deque[int] = deque()  # requests whose readers are gone
        self._looks: deque[tuple[Collection[int], Future[Sight]]] = deque()
        self._live: dict[int, _Live] = {}
        self._held = 0  # rows that those in the ring may need
        self._ending: dict[int, _Live] = {}  # over, but not all stages have reported
        self._wake_at: float | None = None
        self._verifying = self._bookkeeping = 0.0
        self._lock = threading.Lock()
        self._streams: list[Stream] = []  # of all requests that are not done
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    # ---- from any thread -------------------------------------------------------------------------
    def has_room(self, rank: int, rows: int) -> None:
        """Take in that a stage has memory for the keys and values of so many tokens."""
        self._room[rank] = rows

    def check(self, submission: Submission) -> None:
        """UserError if some stage can never hold what is asked for."""
        for rank, rows in sorted(self._room.items()):
            need(
                submission.rows <= rows,
                f"the request may need a cache of {submission.rows} tokens, rank {rank} has memory for "
                f"{rows}: "
                "give a shorter prompt, fewer sampling.max_new_tokens, a smaller tree.budget, or "
                "more cache_mb",
            )

    def submit(self, submission: Submission) -> Ticket:
        """Begin with a request; the ticket is filled while others do something else.

        If the run breaks, its stream raises the error that broke it."""
        ticket, drafts = (
            Ticket(self, submission.request.id),
            self._draft is not None and submission.policy.drafts,
        )
        with self._lock:
            self._streams = [stream for stream in self._streams if not stream.ended]
            self._streams.append(ticket.tokens)
            if self._error:
                ticket.tokens.end(self._error)
            self._start()
        self._transport.inbox.put(_Submit(_Live(submission, ticket, drafts, self._hidden_scale)))
        return ticket

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="driver", daemon=True)
            self._thread.start()

    def look(self, requests: Collection[int]) -> Future[Sight]:
        """Ask for what can be seen of the ring, and of these requests' trees, when rank 0 has next
        done something.

        While the ring is at work nothing is woken for it, and nobody's patience with a stage that
        stands still is lengthened. If the run breaks, the future stays without a result."""
        found: Future[Sight] = Future()
        self._looks.append((requests, found))
        if not self._live and not self._ending:
            with self._lock:
                self._start()
            self._transport.inbox.put(_Watched())
        return found

    @property
    def error(self) -> BaseException | None:
        """Return what broke the run, if something did."""
        return self._error

    @property
    def load(self) -> Load:
        """Return how full the ring is."""
        running, room = len(self._live) + len(self._ending), [*self._room.values()]
        return Load(running, len(self._waiting), self._held, min(room, default=math.inf))

    def forget(self) -> None:
        """Make the next request like the first of the run: nothing that was learnt is kept.

        No request is in the ring. Stages and the drafter are told when the next one begins."""
        self._transport.inbox.put(_Forget())

    def lost(self, rank: int, why: str) -> None:
        """Go on without the server of this rank; `why` says what became of it."""
        self._transport.inbox.put(_Lost(rank, why))

    def close(self) -> None:
        """End the thread, if it still runs.

        Nobody hears what drafters' ranks answer then, so who waits for one waits no more."""
        if self._thread is not None:
            self._transport.inbox.put(_Close())
            self._thread.join()
        for rank, pool in self._pools.items():
            pool.hear(rank, LOST)

    # ---- the thread ------------------------------------------------------------------------------
    def _run(self) -> None:
        try:
            while not isinstance(item := self._next(), _Close):
                self._take(item)
                while self._abandoned:
                    self._cancel(self._abandoned.popleft())
                while self._looks:
                    requests, found = self._looks.popleft()
                    found.set_result(seen(self._scheduler, self._topology, requests))
        except BaseException as error:
            self._broken(error)

    def _broken(self, error: BaseException) -> None:
        with self._lock:
            self._error = error
            for stream in self._streams:
                stream.end(error)

    def _next(self) -> Any:
        """Return the next item of the inbox; None once it is time to wake up."""
        if not self._live and not self._ending:
            return self._transport.inbox.get()  # for days if need be
        item = receive(self._transport, math.inf if self._wake_at is None else self._wake_at)
        if item is None:
            self._wake_at = None
        return item

    def _take(self, item: Any) -> None:
        if isinstance(item, _Watched):
            return
        if item is None:
            self._step(Woke())
        elif isinstance(item, Local):
            self._step(item.event)
        elif isinstance(item, _Submit):
            item.live.stats.begun = self._clock.now()
            self._waiting.append(item.live)
            self._admit()
        elif isinstance(item, _Cancel):
            self._cancel(item.request)
        elif isinstance(item, _Lost):
            self._go_on(item)
        elif isinstance(item, _Forget):
            self._fresh = True
            self._scheduler.forget()
        else:
            rank, message = item
            self._hear(rank, message)

    def _go_on(self, lost: _Lost) -> None:
        """Do without a lost rank, and all that its part of the run has.

        Raise RankLost if it was of the last server."""
        if self._topology.drafts(lost.rank):
            if lost.rank in self._gone:  # each link to it says so
                return
            self._gone.add(lost.rank)
            self._abandon([lost.rank], lost.why, "without it")
            self._pools[lost.rank].hear(lost.rank, LOST)
            return
        server, left = self._topology.server(lost.rank), len(self._scheduler.servers) - 1
        if server not in self._scheduler.servers:
            return
        if not left:
            raise RankLost(lost.why)
        ranks = self._topology.ring(server)
        self._abandon(ranks, lost.why, f"with {left} of {self._topology.servers} servers")
        for rank in ranks:
            self._room.pop(rank, None)
        self._perform(self._scheduler.lost(server, self._clock.now()))
        for live in [*self._ending.values()]:
            self._done(live)

    def _abandon(self, ranks: Sequence[int], why: str, how: str) -> None:
        print(f"flowspec: {why}; the run goes on {how}", file=sys.stderr, flush=True)
        self._transport.abandon(ranks)
        for rank in ranks:
            self._transport.pulses[rank].at()

    def _hear(self, rank: int, message: Message) -> None:
        """Take in a message; what concerns requests that are over is dropped."""
        if rank in self._pools:
            self._pools[rank].hear(rank, message)
            return
        live = self._live.get(message.meta.get("request", 0))
        if message.kind in ("choices", "features"):
            self._back(message, rank)
        elif message.kind in wire.NEWS:
            self._step(wire.read_news(message))
        elif message.kind == "report":
            self._reported(rank, message)
        elif message.kind == "pong":
            self._pong(rank, message)
        elif message.kind == "prompt_features" and live and self._is_read(rank):
            self._prompt_features(live, rank, message)
        elif message.kind == "text_features" and live:
            assert self._draft is not None, "features that nobody asked for"
            layers, at = message.meta["layers"], message.meta["at"]
            self._draft.layer_features(live.request.id, layers, at, message.tensors[0])

    # ---- a request -------------------------------------------------------------------------------
    def _admit(self) -> None:
        """Begin with those that wait, in their order, as far as the stages have room."""
        room = min(self._room.values(), default=math.inf)
        held = sum(live.submission.rows for live in (*self._live.values(), *self._ending.values()))
        while self._waiting and held + self._waiting[0].submission.rows <= room:
            held += self._waiting[0].submission.rows
            self._begin(self._waiting.popleft())
        self._held = held

    def _begin(self, live: _Live) -> None:
        request, draft = live.request, self._draft if live.drafts else None
        self._live[request.id] = live
        live.before = self._bookkeeping
        live.noise = noise_for(request.sampling, self._vocabulary)
        live.past = past_of(request.sampling, request.prompt, request.known)
        features, layers = draft is not None and draft.features, draft.layers if draft else ()
        start = wire.start(
            request,
            live.log.on,
            features,
            layers,
            live.submission.switches,
            self._fresh,
            live.submission.spread,
            request.sampling.counts and self._head is None,
        )
        if self._fresh and self._draft:
            self._draft.forget()
        self._fresh = False
        prompt = torch.tensor(request.prompt[:-1], dtype=torch.int32)
        for server in range(self._topology.servers):
            self._transport.send_next(start, server)
            for chunk in prompt.split(PREFILL_ROWS) if len(prompt) else ():
                self._transport.send_next(wire.prefill(request.id, chunk), server)
        if draft:
            coupled = live.submission.switches.coupled
            noise = noise_for(request.sampling, self._vocabulary) if coupled else None
            draft.begin(request, noise, live.log)
        learnt = self._scheduler.learnt
        live.decoding = Decoding(request, live.submission.policy, learnt, live.drafts)
        self._step(live.decoding)

    def _step(self, event: Event | Decoding) -> None:
        """Handle one event, or begin with a decoding, and perform what follows.

        All messages that follow are sent before a reader sees a token."""
        begun, cpu, verifying = self._clock.now(), time.thread_time(), self._verifying
        take = self._scheduler.admit if isinstance(event, Decoding) else self._scheduler.handle
        actions = take(event, begun)  # type: ignore[arg-type]
        sharing = [*self._live.values()]
        self._perform(actions)
        spent = time.thread_time() - cpu - (self._verifying - verifying)
        self._bookkeeping += spent / max(1, len(sharing))
        for live in sharing:
            live.log.add(
                0, "compute", "schedule", begun, self._clock.now(), event=type(event).__name__
            )

    def _perform(self, actions: list[Action]) -> None:
        """Perform what the scheduler has decided: prunes come first among its actions."""
        self._wake_at = None
        committed: dict[int, list[Committed]] = {}
        for action in actions:
            log.debug("%s", action)
            if isinstance(action, Prunes):
                for rank in self._topology.ring(action.server):
                    self._transport.send_control(rank, wire.prunes(action.prunes))
            elif isinstance(action, Decision):
                committed[action.request] = self._decided(self._live[action.request], action)
            elif isinstance(action, Batch):
                self._transport.send_next(wire.batch(action), action.server)
                for request, segment in action.pieces:
                    if self._live[request].log.on:
                        named = self._scheduler.named(action.server, request, segment.number)
                        self._live[request].fates.sent(segment.ids, segment.parents, named)
            elif isinstance(action, Draft) and self._draft:
                self._draft.draft(action)
            elif isinstance(action, Wake):
                self._wake_at = action.at
        for request, tokens in committed.items():
            live = self._live[request]
            live.tokens.put(*tokens)
            if live.decoding.finished:
                self._over(live)

    def _decided(self, live: _Live, decision: Decision) -> list[Committed]:
        """Return the tokens of a decision, and tell the drafter of them."""
        committed = self._commit(live, decision.commit)
        if decision.finish:
            live.stats.finish_reason = decision.finish.reason
            committed[-1] = committed[-1]._replace(final=True)
        return committed

    def _commit(self, live: _Live, commit: Commit) -> list[Committed]:
        stats = live.stats
        if live.drafts and self._draft:
            features = self._features_of(live, commit.path) if self._draft.features else None
            self._draft.commit(live.request.id, commit, features)
        stats.last_token = self._clock.now()
        if live.log.on:
            live.fates.decided(commit.path, commit.root, stats.last_token)
        stats.first_token = stats.first_token or stats.last_token
        picks = [live.picks[node] for node in commit.path]
        live.picks = {}
        return [
            Committed(token, accepted, pick.gap, pick.logprobs)
            for token, accepted, pick in zip(commit.tokens, commit.accepted, picks, strict=True)
        ]

    def _features_of(self, live: _Live, path: tuple[int, ...]) -> torch.Tensor:
        """Return the target's features [len(path), hidden] at these nodes and forget all others.

        All other nodes that came back are refused: no descendant of a new root is back by now."""
        found = torch.stack([rows[k] for rows, k in map(live.features.__getitem__, path)])
        live.features = {}
        return found

    # ---- what arrives ----------------------------------------------------------------------------
    def _is_read(self, rank: int) -> bool:
        """Return whether the drafter reads the prompt's features of this rank's server."""
        return self._topology.server(rank) == self._scheduler.servers[0]

    def _prompt_features(self, live: _Live, rank: int, message: Message) -> None:
        assert self._draft is not None, "features that nobody asked for"
        since, now = self._transport.inbox.since, self._clock.now()
        live.log.arrived(message, self._topology.number(rank), 0, since, now, None)
        self._draft.learn(live.request.id, message.tensors[0])

    def _back(self, message: Message, rank: int) -> None:
        server, known = self._topology.server(rank), list[tuple[_Live, wire.Answer]]()
        for answer in wire.read_answers(message):
            if live := self._live.get(answer.request):
                if live.log.on:
                    since, now = self._transport.inbox.since, self._clock.now()
                    came = self._scheduler.named(server, answer.request, answer.number)
                    segment = Segment(answer.number, tuple(came), (), ())
                    live.log.arrived(message, self._topology.number(rank), 0, since, now, segment)
                known.append((live, self._by_node(server, answer)))
        self._step(Back(tuple(self._returned(live, answer) for live, answer in known)))

    def _by_node(self, server: int, answer: wire.Answer) -> wire.Answer:
        """Return an answer of a server with its nodes as rank 0 calls them."""
        nodes = self._scheduler.nodes(server, answer.request, answer.number, answer.ids)
        return (
            answer._replace(ids=[*nodes])
            if nodes
            else answer._replace(ids=[], tokens=[], gaps=[], logprobs=())
        )

    def _returned(self, live: _Live, answer: wire.Answer) -> Returned:
        if answer.rows is not None and live.drafts and self._draft and self._draft.features:
            rows = answer.rows
            live.features.update((id, (rows, k)) for k, id in enumerate(answer.ids))
        picks: Mapping[int, Picked]
        if answer.positions is None:
            found = map(
                Picked, answer.tokens, answer.gaps, answer.logprobs or itertools.repeat(None)
            )
            picks = dict(zip(answer.ids, found, strict=True))
        else:
            picks = self._to_pick(live, answer)

        def choose(node: int, path: Sequence[int]) -> int:
            begun = time.thread_time()
            found = live.picks[node] = picks[node]
            self._verifying += time.thread_time() - begun
            return found.token

        return Returned(live.request.id, answer.number, tuple(picks), choose)

    def _to_pick(self, live: _Live, answer: wire.Answer) -> Picks:
        """Return the target's picks at the nodes that are alive; others are never asked for."""
        assert self._head is not None, "features came back, but this rank does not verify"
        assert answer.positions is not None and answer.rows is not None
        nodes = live.decoding.tree.nodes
        alive = [k for k, id in enumerate(answer.ids) if id in nodes]
        ids = [answer.ids[k] for k in alive]
        return Picks(
            self._head,
            live.request.sampling,
            live.noise,
            ids,
            [nodes[id].parent for id in ids],
            answer.positions[alive],
            answer.rows[alive],
            past=live.past,
            tokens=[nodes[id].token for id in ids],
        )

    # ---- the end ---------------------------------------------------------------------------------
    def _cancel(self, request: int) -> None:
        for waiting in [live for live in self._waiting if live.request.id == request]:
            self._waiting.remove(waiting)
            waiting.stats.ended = self._clock.now()
            waiting.tokens.end()
        live = self._live.get(request)
        if live is not None:
            self._over(live)
            self._perform(self._scheduler.cancel(request, self._clock.now()))

    def _over(self, live: _Live) -> None:
        """Tell the stages to forget a request; its rows on the way are dropped where they
        arrive."""
        request, decoding, stats = live.request.id, live.decoding, live.stats
        self._ending[request] = self._live.pop(request)
        if self._draft:
            self._draft.end(request)
        stats.ended = self._clock.now()
        stats.drafted, stats.segments = decoding.tree.drafted, decoding.segments
        stats.guesses = decoding.guesses
        stats.returned_segments = decoding.returned_segments
        stats.explanation = decoding.policy.explain()
        stats.hop = self._scheduler.ring.usual_hop
        stats.bookkeeping = self._bookkeeping - live.before
        for rank in self._topology.stage_ranks:
            self._transport.send_control(rank, wire.end(request))
        log.info("request %d: %d tokens, %s", request, len(decoding.tokens), stats.finish_reason)

    def _reported(self, rank: int, message: Message) -> None:
        live = self._ending[message.meta["request"]]
        live.stats.reports[rank] = wire.read_report(message)
        if live.log.on:
            self._transport.send_control(rank, wire.ping(live.request.id))
        self._done(live)

    def _pong(self, rank: int, message: Message) -> None:
        live, now = self._ending[message.meta["request"]], self._clock.now()
        sent, clock = message.meta["sent"], message.meta["clock"]
        pongs = live.pongs.setdefault(rank, [])
        pongs.append((now - sent, clock - (sent + now) / 2))
        if len(pongs) < QUESTIONS:
            self._transport.send_control(rank, wire.ping(live.request.id))
        self._done(live)

    def _done(self, live: _Live) -> None:
        """End the stream of a request that is over once every stage has said what it did for it."""
        stats = live.stats
        awaited = {rank for k in self._scheduler.servers for rank in self._topology.ring(k)}
        if not awaited <= stats.reports.keys() or not live.reported:
            return
        del self._ending[live.request.id]
        if live.log.on:
            stage = self._topology.number  # spans call a rank by the number of its stage
            notes = {stage(rank): report.spans for rank, report in stats.reports.items()}
            # the quickest of QUESTIONS round trips (Cristian 1989): off by at most half of it
            offsets = {stage(rank): min(pongs)[1] for rank, pongs in live.pongs.items()}
            spans = {0: live.log.spans} | notes
            stats.spans = merged(spans, {0: 0.0} | offsets, live.fates)
        live.tokens.end()
        self._admit()
