"""The driver is rank 0 at work: it performs the scheduler's actions and feeds it events."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from flowspec.comm.base import Message, Transport
from flowspec.core.learnt import Learnt
from flowspec.core.messages import (
    PREFILL_ROWS,
    Action,
    Commit,
    Draft,
    Event,
    Finish,
    Prune,
    Returned,
    Segment,
    Wake,
    Woke,
)
from flowspec.core.policy import Policy, PolicyConfig
from flowspec.core.request import Request
from flowspec.core.scheduler import Scheduler
from flowspec.models.stage import Head
from flowspec.runtime import wire
from flowspec.runtime.drafting import DraftThread, Local
from flowspec.runtime.picking import Picks
from flowspec.runtime.tracing import Log, merged
from flowspec.runtime.waiting import receive
from flowspec.sampling import Pick, noise_for
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
    segments: int = 0
    returned_segments: int = 0
    bookkeeping: float = 0.0
    """Rank 0's main thread spent this many CPU seconds on other work than verification (lm_head and
    sampling) and waiting."""
    hop: float = 0.0
    """This is the median seconds of recent hops; it is 0 if none was measured."""
    reports: dict[int, wire.Report] = field(default_factory=dict)
    """This maps the rank of a stage to its report."""
    explanation: list[str] = field(default_factory=list)
    """These lines say what the policy chose, and why."""
    spans: list[Span] = field(default_factory=list)
    """These spans say what all ranks did, on rank 0's clock; empty unless the request was traced."""


class Driver:
    """The driver serves one request after another.

    `draft` is None if nothing is ever drafted. `head` is given if rank 0 verifies
    (verify_on: coordinator). `hidden_scale` is that of emulated links, for the bytes in a trace."""

    def __init__(
        self,
        transport: Transport,
        draft: DraftThread | None,
        vocabulary: int,
        head: Head | None = None,
        hidden_scale: float = 1.0,
    ):
        self._transport, self._thread, self._head, self._vocabulary = (
            transport,
            draft,
            head,
            vocabulary,
        )
        self._topology, self._clock = transport.topology, transport.inbox.clock
        self._hidden_scale = hidden_scale
        self.forget()

    def forget(self) -> None:
        """Make the next request like the first of the run: nothing that was learnt is kept.

        Stages and the drafter are told when that request begins."""
        self._learnt, self._fresh = Learnt(), True

    def generate(
        self,
        request: Request,
        policy: Policy,
        switches: PolicyConfig,
        stats: Stats,
        trace: bool = False,
    ) -> Generator[Committed, None, None]:
        """Yield the tokens of the text as they are committed.

        Closing the iterator cancels the request. `stats` is filled meanwhile, and complete once the
        iterator has ended."""
        self._draft = self._thread if policy.drafts else None
        self._reads_features = self._draft is not None and self._draft.features
        # node that came back -> (feature rows, index of its row there), if the drafter reads them
        self._features: dict[int, tuple[torch.Tensor, int]] = {}
        self._scheduler = scheduler = Scheduler(
            request, policy, self._learnt, drafts=self._draft is not None
        )
        self._wake_at: float | None = None
        self._picks: dict[int, Pick] = {}
        self._verifying = 0.0
        self._log, self._fates = Log(trace, request.id, self._hidden_scale), Fates()
        stats.begun = self._clock.now()
        broken = True
        try:
            self._begin(request, switches)
            yield from self._step(request, None, stats)
            while not scheduler.finished:
                yield from self._step(request, self._next_event(request), stats)
            broken = False
        except GeneratorExit:  # the caller has enough
            broken = False
            raise
        finally:
            stats.ended = self._clock.now()
            stats.drafted, stats.returned_segments = (
                scheduler.tree.drafted,
                scheduler.returned_segments,
            )
            stats.segments, stats.explanation, stats.hop = (
                scheduler.segments,
                policy.explain(),
                scheduler.ring.usual_hop,
            )
            self._end(request)
            if not broken:
                self._await_reports(request, stats)
            log.info(
                "request %d: %d tokens, %s", request.id, len(scheduler.tokens), stats.finish_reason
            )

    def _step(self, request: Request, event: Event | None, stats: Stats) -> list[Committed]:
        """Handle one event (None: the beginning) and return the tokens that it commits.

        All messages that follow from it are sent before the caller sees a token."""
        begun, cpu, verifying = self._clock.now(), time.thread_time(), self._verifying
        scheduler = self._scheduler
        actions = scheduler.handle(event, begun) if event else scheduler.start(begun)
        committed = self._perform(request, actions, stats)
        stats.bookkeeping += time.thread_time() - cpu - (self._verifying - verifying)
        self._log.add(
            0, "compute", "schedule", begun, self._clock.now(), event=type(event).__name__
        )
        return committed

    def _begin(self, request: Request, switches: PolicyConfig) -> None:
        self._noise = noise_for(request.sampling, self._vocabulary)
        layers = self._draft.layers if self._draft else ()
        self._transport.send_next(
            wire.start(request, self._log.on, self._reads_features, layers, switches, self._fresh)
        )
        if self._fresh and self._thread:
            self._thread.forget()
        self._fresh = False
        prompt = torch.tensor(request.prompt[:-1], dtype=torch.int32)
        for chunk in prompt.split(PREFILL_ROWS) if len(prompt) else ():
            self._transport.send_next(wire.prefill(request.id, chunk))
        if self._draft:
            self._draft.begin(
                request,
                noise_for(request.sampling, self._vocabulary) if switches.coupled else None,
                self._log,
            )

    def _perform(self, request: Request, actions: list[Action], stats: Stats) -> list[Committed]:
        self._wake_at = None
        committed: list[Committed] = []
        for action in actions:
            log.debug("%s", action)
            if isinstance(action, Segment):
                self._transport.send_next(wire.segment(request.id, action))
                if self._log.on:
                    self._fates.sent(action.ids, action.parents)
            elif isinstance(action, Prune):
                for rank in self._topology.stage_ranks:
                    self._transport.send_control(rank, wire.prune(request.id, action))
            elif isinstance(action, Draft) and self._draft:
                self._draft.draft(request, action)
            elif isinstance(action, Commit):
                committed = self._commit(action, stats)
            elif isinstance(action, Wake):
                self._wake_at = action.at
            elif isinstance(action, Finish):
                stats.finish_reason = action.reason
                committed[-1] = committed[-1]._replace(final=True)
        return committed

    def _commit(self, commit: Commit, stats: Stats) -> list[Committed]:
        if self._draft:
            self._draft.commit(
                commit, self._features_of(commit.path) if self._reads_features else None
            )
        stats.last_token = self._clock.now()
        if self._log.on:
            self._fates.decided(commit.path, commit.root, stats.last_token)
        stats.first_token = stats.first_token or stats.last_token
        gaps = [self._picks[node].gap for node in commit.path]
        self._picks = {}
        return [
            Committed(*token) for token in zip(commit.tokens, commit.accepted, gaps, strict=True)
        ]

    def _features_of(self, path: tuple[int, ...]) -> torch.Tensor:
        """Return the target's features [len(path), hidden] at these nodes and forget all others.

        All other nodes that came back are refused: no descendant of a new root is back by now."""
        found = torch.stack([rows[k] for rows, k in map(self._features.__getitem__, path)])
        self._features = {}
        return found

    # ---- what arrives ----------------------------------------------------------------------------
    def _next_event(self, request: Request) -> Event:
        """Wait for the next event of this request; messages of earlier requests are dropped."""
        while True:
            item = receive(self._transport, math.inf if self._wake_at is None else self._wake_at)
            if item is None:
                self._wake_at = None
                return Woke()
            event = self._read(request, item)
            if event is not None:
                return event

    def _read(self, request: Request, item) -> Event | None:
        """Take in an item of the inbox and return its event; None if the scheduler needs none."""
        if isinstance(item, Local):
            return item.event if item.request == request.id else None
        message = item[1]
        if message.meta.get("request") != request.id:
            return None
        if message.kind == "prefilled":  # only a sign of life
            return None
        if message.kind == "prompt_features":
            self._prompt_features(message)
            return None
        if message.kind == "text_features":
            assert self._draft is not None, "features that nobody asked for"
            self._draft.layer_features(
                message.meta["layers"], message.meta["at"], message.tensors[0]
            )
            return None
        if message.kind in wire.NEWS:
            return wire.read_news(message)
        return self._returned(request, message)

    def _took(self, seconds: float) -> None:
        self._verifying += seconds

    def _prompt_features(self, message: Message) -> None:
        assert self._draft is not None, "features that nobody asked for"
        self._log.arrived(
            message, self._topology.last, 0, self._transport.inbox.since, self._clock.now(), None
        )
        self._draft.learn(message.tensors[0])

    def _returned(self, request: Request, message: Message) -> Returned:
        if self._reads_features:
            nodes, rows = wire.read_features(message)
            self._features.update((id, (rows, k)) for k, id in enumerate(nodes))
        number, head = message.meta["number"], self._head
        if message.kind == "choices":
            (ids, tokens), gaps = message.tensors[0].tolist(), message.tensors[1].tolist()
            picks: Mapping[int, Pick] = dict(zip(ids, map(Pick, tokens, gaps), strict=True))
            came = self._scheduler.ring.out.get(number, ())
        else:
            assert head is not None, f"a {message.kind} message, but this rank does not verify"
            picks = self._to_pick(request, head, *message.tensors)
            came = tuple(message.tensors[0].tolist())

        def choose(node: int, path: Sequence[int]) -> int:
            found = self._picks[node] = picks[node]
            return found.token

        self._log.arrived(
            message, self._topology.last, 0, self._transport.inbox.since, self._clock.now(), came
        )
        return Returned(number, tuple(picks), choose)

    def _to_pick(
        self,
        request: Request,
        head: Head,
        ids: torch.Tensor,
        positions: torch.Tensor,
        rows: torch.Tensor,
    ) -> Picks:
        """Return the target's picks at the nodes that are alive; others are never asked for.

        `ids` and `positions` are int [n], `rows` are the last stage's features [n, hidden]."""
        nodes = self._scheduler.tree.nodes
        alive = [k for k, id in enumerate(ids.tolist()) if id in nodes]
        ids, positions, rows = ids[alive], positions[alive], rows[alive]
        parents = [nodes[id].parent for id in ids.tolist()]
        return Picks(
            head, request.sampling, self._noise, ids.tolist(), parents, positions, rows, self._took
        )

    # ---- the end ---------------------------------------------------------------------------------
    def _end(self, request: Request) -> None:
        """Tell the stages to forget the request; its rows on the way are dropped where they arrive."""
        for rank in self._topology.stage_ranks:
            self._transport.send_control(rank, wire.end(request.id))

    def _await_reports(self, request: Request, stats: Stats) -> None:
        """Wait for all stages' reports and, if the request was traced, merge their spans."""
        while len(stats.reports) < self._topology.stages:
            item = receive(self._transport)
            if (
                not isinstance(item, Local)
                and item[1].kind == "report"
                and item[1].meta["request"] == request.id
            ):
                stats.reports[item[0]] = wire.read_report(item[1])
        if self._log.on:
            notes = {rank: report.spans for rank, report in stats.reports.items()}
            stats.spans = merged({0: self._log.spans} | notes, self._offsets(), self._fates)

    def _offsets(self) -> dict[int, float]:
        """Return each rank's clock minus rank 0's, in seconds.

        It follows from the quickest of QUESTIONS round trips (Cristian 1989), so it is off by at
        most half of that round trip."""
        best: dict[int, tuple[float, float]] = {}
        for _ in range(QUESTIONS):
            for rank in self._topology.stage_ranks:
                self._transport.send_control(rank, wire.ping())
            answers = 0
            while answers < self._topology.stages:
                item = receive(self._transport)
                if not isinstance(item, Local) and item[1].kind == "pong":
                    sent, clock, now = (
                        item[1].meta["sent"],
                        item[1].meta["clock"],
                        self._clock.now(),
                    )
                    best[item[0]] = min(
                        best.get(item[0], (math.inf, 0.0)), (now - sent, clock - (sent + now) / 2)
                    )
                    answers += 1
        return {0: 0.0} | {rank: offset for rank, (_, offset) in best.items()}
