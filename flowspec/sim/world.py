"""One request over a ring whose stages and links only take time: a discrete-event simulation.

Rank 0 is the real `Scheduler` with a real policy, a stage the real `StageMachine`; drafts are real or made up. What a stage
would compute is not needed: the text is known, and only the target's choices on the path of the text are ever looked up.
Features for a drafter that reads them are bytes on the last hop, and the prompt's are what its first draft waits for.
What takes no time here: rank 0's own work, the drafter's commits, everything between a message's arrival and its
first look. So a prediction is a little above what a real ring does with the same costs.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from flowspec.core.cost import Emulate
from flowspec.core.costs import Costs
from flowspec.core.learnt import Learnt
from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    Pass,
    StageEvent,
    StageMachine,
    Tell,
)
from flowspec.core.messages import (
    FRAME_BYTES,
    PREFILL_ROWS,
    Action,
    Commit,
    Draft,
    Drafted,
    DraftNode,
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
from flowspec.core.topology import Topology
from flowspec.trace import Fates, Span, untangled


class Guesser(Protocol):
    """What the simulator needs of a drafter (draft/base.py): begun already, and with the features it reads at hand."""

    features: bool
    """the ring carries the target's features for it"""

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted: ...

    def commit(self, commit: Commit) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RingSpec:
    """What is simulated: stages and links that take the times of `emulate`."""

    stages: int
    emulate: Emulate
    hidden: int
    """elements of a feature row, before emulate.hidden_scale"""
    verify_last: bool = True
    """the last stage picks the tokens; else feature rows return to rank 0"""
    features: bool = False
    """rank 0's drafter reads the target's features of the prompt and of what becomes text"""
    costs: Costs | None = None
    """measured ones, instead of those of `emulate`"""

    @property
    def topology(self) -> Topology:
        return Topology(self.stages)

    def seconds(self, stage: int, rows: int, context: int) -> float:
        """A forward of stage 1.. over so many rows behind so many others."""
        return (
            self.emulate.stage_seconds(stage, rows)
            if self.costs is None
            else self.costs.seconds(stage, rows, context)
        )

    def draft_seconds(self, nodes: int) -> float:
        """A forward of the drafter."""
        return (
            self.emulate.draft_ms / 1000 if self.costs is None else self.costs.draft_seconds(nodes)
        )

    @property
    def latency(self) -> float:
        """Seconds of a hop, beside what its bytes take."""
        return self.emulate.link_ms / 1000 if self.costs is None else self.costs.hop

    def reading(self, prompt: int) -> float:
        """Seconds in which the drafter reads a prompt."""
        return self.emulate.draft_ms / 1000 if self.costs is None else self.costs.read * prompt

    def link(self, sender: int) -> Link:
        """From rank `sender` to the next. What rank 0 does before a segment leaves counts as part of its way."""
        if self.costs is None:
            return Link(self.latency, self.emulate.wire_seconds(1))
        row = (
            self.costs.rows[sender % len(self.costs.rows)] / max(1.0, self.hop_bytes(sender, 1))
            if sender < self.stages
            else 0.0
        )
        return Link(self.latency + (self.costs.coordinator if sender == 0 else 0.0), row)

    def hop_bytes(self, sender: int, rows: int, nodes: bool = True, accepted: int = 0) -> float:
        """Bytes that count of a message of `rows` rows from rank `sender` to the next (runtime/wire.py, comm/shaped.py).

        `nodes`: a segment's (with ids, parents and tokens, answered at the end), else a chunk of the prompt's. `accepted`: how many of
        its rows became text, as a last stage that verifies finds."""
        row = self.hidden * 2 * self.emulate.hidden_scale
        if sender == 0:
            return FRAME_BYTES + rows * (12 if nodes else 4)  # id, parent, token
        if not nodes:
            return FRAME_BYTES + rows * row
        if sender < self.stages:
            return FRAME_BYTES + rows * (12 + row)  # id, parent, token, row
        if self.verify_last:
            return FRAME_BYTES + accepted * (
                16 + (row if self.features else 0)
            )  # id, token, gap, row
        return FRAME_BYTES + rows * (12 + row)  # id, position, row


class Link:
    """One direction between two ranks: carries one message at a time, delivers it `latency` after its last byte. Seconds."""

    def __init__(self, latency: float, byte: float):
        self._latency, self._byte, self._free_at = latency, byte, 0.0

    def arrival(self, size: float, now: float) -> float:
        self._free_at = max(self._free_at, now) + self._byte * size
        return self._free_at + self._latency


class _Forward(NamedTuple):
    """On its way in a stage."""

    what: Compute
    begin: float
    end: float
    whole: bool = True
    """False: it is abandoned at its end"""


@dataclass
class _Stage:
    machine: StageMachine
    queue: deque[tuple[float, float, Segment | None, int]] = field(default_factory=deque)
    """(when it was sent, when it arrived, the segment, its rows); no segment: a chunk of the prompt"""
    running: _Forward | None = None
    rows: int = 0
    """of trees, computed"""

    @property
    def rank(self) -> int:
        return self.machine.rank


@dataclass
class Outcome:
    """What one simulated request was; seconds of virtual time from its start."""

    tokens: list[int] = field(default_factory=list)
    first_token: float = 0.0
    last_token: float = 0.0
    returned_segments: int = 0
    drafted: int = 0
    forwarded: int = 0
    """tree rows that the first stage computed"""
    spans: list[Span] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """As in the result JSON: (new tokens - 1) / (last - first token)."""
        decode = self.last_token - self.first_token
        return (len(self.tokens) - 1) / decode if decode > 0 else None


class World:
    """Runs one request. `text`: the target's tokens for it; `guesser`: None does not draft."""

    def __init__(
        self,
        request: Request,
        text: Sequence[int],
        policy: Policy,
        guesser: Guesser | None,
        ring: RingSpec,
        switches: PolicyConfig,
        learnt: Learnt | None = None,
    ):
        self.request, self.text, self.guesser, self.ring, self.switches = (
            request,
            text,
            guesser,
            ring,
            switches,
        )
        self.scheduler = Scheduler(request, policy, learnt, drafts=guesser is not None)
        self.outcome = Outcome()
        self._topology = ring.topology
        self._stages = [
            _Stage(StageMachine(rank, self._topology)) for rank in self._topology.stage_ranks
        ]
        self._links = [ring.link(sender) for sender in self._topology.ranks]
        self._fates, self._spans = Fates(), list[Span]()
        self._events: list[tuple[float, int, Callable, tuple]] = []
        self._order = itertools.count()
        self._drafter_free = ring.reading(request.prompt_length)  # the drafter does so first
        self._awaited = (
            request.prompt_length - 1 if ring.features else 0
        )  # rows of the prompt's features
        self._held: list[Draft] = []  # until they are here
        self._wake = 0

    def run(self) -> Outcome:
        for stage in self._stages:
            stage.machine.handle(
                Begin(self.request.id, self.switches.drop_dead, self.switches.abort)
            )
        prompt = len(self.request.prompt) - 1
        for begin in range(0, prompt, PREFILL_ROWS):
            self._send(0, None, min(PREFILL_ROWS, prompt - begin), 0.0)
        self._perform(self.scheduler.start(0.0), 0.0)
        while not self.scheduler.finished:
            now, _, happen, what = heapq.heappop(self._events)
            happen(now, *what)
        out = self.outcome
        out.returned_segments, out.drafted = (
            self.scheduler.returned_segments,
            self.scheduler.tree.drafted,
        )
        out.forwarded = self._stages[0].rows
        out.spans = untangled(
            self._fates.judge(s) for s in self._spans if s.begin <= out.last_token
        )
        return out

    def _at(self, time: float, happen: Callable, *what) -> None:
        heapq.heappush(self._events, (time, next(self._order), happen, what))

    def _note(
        self, rank: int, row: str, begin: float, end: float, segment: Segment | None, **facts
    ) -> None:
        known = {"request": self.request.id} | (
            {"segment": segment.number, "ids": segment.ids} if segment else {}
        )
        self._spans.append(Span(rank, row, "prefill", begin, end, known | facts))

    # ---- rank 0 ------------------------------------------------------------------------------------
    def _perform(self, actions: list[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Segment):
                self._fates.sent(action.ids, action.parents)
                self._send(0, action, len(action.ids), now)
            elif isinstance(action, Prune):
                for stage in self._stages:
                    self._at(now + self.ring.latency, self._on_prune, stage, action)
            elif isinstance(action, Draft):
                self._draft(action, now)
            elif isinstance(action, Commit):
                self._commit(action, now)
            elif isinstance(action, Wake):
                self._at(action.at, self._on_wake, self._wake)
            else:
                assert isinstance(action, Finish)

    def _handle(self, now: float, event: Event) -> None:
        self._wake += 1
        self._perform(self.scheduler.handle(event, now), now)

    def _on_wake(self, now: float, number: int) -> None:
        if number == self._wake:  # nothing has happened since
            self._handle(now, Woke())

    def _commit(self, commit: Commit, now: float) -> None:
        out = self.outcome
        out.first_token = out.first_token if out.tokens else now
        out.tokens += commit.tokens
        out.last_token = now
        self._fates.decided(commit.path, commit.root, now)
        if self.guesser:
            self.guesser.commit(commit)

    def _draft(self, draft: Draft, now: float) -> None:
        assert self.guesser is not None
        if self._awaited:
            self._held.append(draft)
            return
        begin = max(now, self._drafter_free)
        self._drafter_free = begin + self.ring.draft_seconds(len(draft.nodes))
        self._spans.append(
            Span(
                0,
                "draft",
                "draft",
                begin,
                self._drafter_free,
                {"request": self.request.id, "nodes": len(draft.nodes)},
            )
        )
        self._at(self._drafter_free, self._handle, self.guesser.propose(draft.nodes))

    def _on_prompt_features(self, now: float, rows: int) -> None:
        """As in runtime/drafting.py: once all are here the drafter reads them, and then does what it was asked for meanwhile."""
        self._awaited -= rows
        if not self._awaited:
            self._drafter_free = now + self.ring.reading(self.request.prompt_length)
            for draft in self._held:
                self._draft(draft, now)

    def _on_returned(self, now: float, segment: Segment) -> None:
        choices = {i: choice for i in segment.ids if (choice := self._choice(i)) is not None}
        self._handle(
            now, Returned(segment.number, tuple(choices), lambda node, path: choices[node])
        )

    def _choice(self, node: int) -> int | None:
        """The target's token after a node of the text; None for what rank 0 has refused meanwhile, and behind the text's end."""
        found = self.scheduler.tree.nodes.get(node)
        at = len(self.text) if found is None else found.position + 1 - self.request.prompt_length
        return self.text[at] if at < len(self.text) else None

    # ---- links and stages --------------------------------------------------------------------------
    def _send(
        self, sender: int, segment: Segment | None, rows: int, now: float, accepted: int = 0
    ) -> None:
        """From rank `sender` to the next of the ring; no segment: a chunk of the prompt. `accepted` of the rows became text."""
        size = self.ring.hop_bytes(sender, rows, segment is not None, accepted)
        arrival = self._links[sender].arrival(size, now)
        self._note(sender, "send", now, arrival, segment, bytes=size)
        if sender != self._topology.last:
            stage = self._stages[self._topology.next(sender) - self._topology.FIRST]
            self._at(arrival, self._on_arrival, stage, (now, arrival, segment, rows))
        elif segment is not None:
            self._at(arrival, self._on_returned, segment)
        else:
            self._at(arrival, self._on_prompt_features, rows)

    def _on_arrival(
        self, now: float, stage: _Stage, what: tuple[float, float, Segment | None, int]
    ) -> None:
        stage.queue.append(what)
        self._next(now, stage)

    def _next(self, now: float, stage: _Stage) -> None:
        """Take what waits, until there is something to compute."""
        while stage.queue and not stage.running:
            sent, arrived, segment, rows = stage.queue.popleft()
            self._note(stage.rank, "receive", arrived, now, segment)
            request = self.request.id
            self._handled(
                now,
                stage,
                Arrived(request, segment, now - arrived, arrived - sent)
                if segment
                else Chunk(request, rows),
            )

    def _handled(self, now: float, stage: _Stage, event: StageEvent, accepted: int = 0) -> None:
        """Perform what a stage decides, as runtime/worker.py does; what moves in its cache takes no time here."""
        for action in stage.machine.handle(event):
            if isinstance(action, Compute):
                stage.rows += action.rows if action.segment else 0
                end = now + self.ring.seconds(stage.rank, action.rows, action.context)
                stage.running = _Forward(action, now, end)
                self._at(end, self._on_computed, stage, stage.running)
            elif isinstance(action, Tell):
                self._at(now + self.ring.latency, self._handle, action.event)
            elif isinstance(action, Pass) and (
                action.segment or stage.rank != self._topology.last or self.ring.features
            ):
                self._send(stage.rank, action.segment, len(action.rows), now, accepted)

    def _on_prune(self, now: float, stage: _Stage, prune: Prune) -> None:
        self._handled(now, stage, Decided(self.request.id, prune))
        running = stage.running
        if running and running.whole and not stage.machine.wanted():
            layer = (running.end - running.begin) / self.ring.emulate.LAYERS
            end = running.begin + math.ceil((now - running.begin) / layer) * layer if layer else now
            if end < running.end:
                stage.running = running._replace(end=end, whole=False)
                self._at(end, self._on_computed, stage, stage.running)

    def _on_computed(self, now: float, stage: _Stage, forward: _Forward) -> None:
        if stage.running is not forward:  # it was abandoned
            return
        stage.running, segment = None, forward.what.segment
        self._note(stage.rank, "compute", forward.begin, now, segment)
        accepted = (
            self._walked(stage, segment)
            if segment and forward.whole and stage.rank == self._topology.last
            else 0
        )
        self._handled(now, stage, Computed(now - forward.begin, forward.whole), accepted)
        self._next(now, stage)

    def _walked(self, stage: _Stage, segment: Segment) -> int:
        """How many of the nodes of a segment the last stage finds to be text."""
        choices = {k: self._choice(id) for k, id in enumerate(segment.ids)}
        return len(stage.machine.walk(lambda k: -1 if (choice := choices[k]) is None else choice))
