"""A world simulates requests over a ring whose stages and links only take time, event by event.

Rank 0 is the real `Scheduler` with a real policy and a stage is the real `StageMachine`; drafts are
real or invented. What a stage would compute is not needed: the text is known, and only the target's
choices on the path of the text are ever looked up. Features for a drafter that reads them are bytes
on the last hop, and its first draft waits for those of the prompt. Some things take no time here:
rank 0's own work, the drafter's commits, and everything between a message's arrival and the first
look at it. So a prediction is a little above what a real ring does with the same costs."""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from flowspec.core.cost import ALONE, Emulate, Group
from flowspec.core.costs import Costs
from flowspec.core.decoding import Decoding
from flowspec.core.learnt import Learnt
from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    End,
    Part,
    Pass,
    StageEvent,
    StageMachine,
    Tell,
)
from flowspec.core.messages import (
    FRAME_BYTES,
    PREFILL_ROWS,
    Action,
    Answered,
    Back,
    Batch,
    Commit,
    Decision,
    Draft,
    Drafted,
    DraftNode,
    Event,
    Piece,
    Prunes,
    Read,
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
    """A guesser is what the simulator needs of a drafter (draft/base.py).

    It has begun already, and the features that it reads are at hand."""

    features: bool
    """The ring carries the target's features for it."""

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted: ...

    def commit(self, commit: Commit) -> None: ...


@dataclass(frozen=True, kw_only=True)
class RingSpec:
    """A ring specification says what is simulated: stages and links that take the times of
    `emulate`."""

    stages: int
    emulate: Emulate
    hidden: int
    """A row of features has this many elements, before emulate.hidden_scale."""
    verify_last: bool = True
    """The last stage picks the tokens; otherwise features return to rank 0."""
    features: bool = False
    """Rank 0's drafter reads the target's features of the prompt and of what becomes text."""
    costs: Costs | None = None
    """These measured costs are used instead of those of `emulate`; None means that there are
    none."""
    group: Group = ALONE
    """Each stage is so many ranks."""
    servers: int = 1
    """There are so many target servers, each with all stages."""

    @property
    def topology(self) -> Topology:
        """Return the ring of the stages, each of which counts as one rank here."""
        return Topology(self.stages, servers=self.servers)

    def seconds(self, stage: int, rows: int, context: int) -> float:
        """Return the seconds of stage `stage` (from 1) over so many rows behind `context`
        others."""
        return (
            self.emulate.group_seconds(stage, rows, self.group, self.emulate.row_bytes(self.hidden))
            if self.costs is None
            else self.costs.seconds(stage, rows, context)
        )

    def draft_seconds(self, nodes: int) -> float:
        """Return the seconds of a drafter's forward over so many nodes."""
        return (
            self.emulate.draft_ms / 1000 if self.costs is None else self.costs.draft_seconds(nodes)
        )

    @property
    def latency(self) -> float:
        """Return the seconds of a hop, beside what its bytes take."""
        return self.emulate.link_ms / 1000 if self.costs is None else self.costs.hop

    def reading(self, prompt: int) -> float:
        """Return the seconds in which the drafter reads a prompt of so many tokens."""
        return self.emulate.draft_ms / 1000 if self.costs is None else self.costs.read * prompt

    def link(self, sender: int) -> Link:
        """Return the link from rank `sender` to the next.

        What rank 0 does before a segment leaves counts as part of its way."""
        if self.costs is None:
            return Link(self.latency, self.emulate.wire_seconds(1))
        row = (
            self.costs.rows[sender % len(self.costs.rows)] / max(1.0, self.hop_bytes(sender, 1))
            if sender < self.stages
            else 0.0
        )
        return Link(self.latency + (self.costs.coordinator if sender == 0 else 0.0), row)

    def hop_bytes(self, sender: int, rows: int, nodes: bool = True, accepted: int = 0) -> float:
        """Return the bytes that count of a message of `rows` rows from rank `sender` to the next.

        They are as in runtime/wire.py and comm/shaped.py. If `nodes` is set, the rows are a
        segment's (with ids, parents and tokens, answered at the end); otherwise they are a chunk of
        the prompt's. `accepted` of them became text, as a last stage that verifies finds."""
        row = self.emulate.row_bytes(self.hidden)
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
    """A link is one direction between two ranks; its times are in seconds.

    It carries one message at a time and delivers it `latency` after its last byte."""

    def __init__(self, latency: float, byte: float):
        self._latency, self._byte, self._free_at = latency, byte, 0.0

    def arrival(self, size: float, now: float) -> float:
        self._free_at = max(self._free_at, now) + self._byte * size
        return self._free_at + self._latency


class _Forward(NamedTuple):
    """This is a forward on its way in a stage."""

    what: Compute
    begin: float
    end: float
    whole: bool = True
    """This is False if the forward is abandoned at its end."""


class Prompt(NamedTuple):
    """This is a chunk of a prompt on its way."""

    request: int
    rows: int


@dataclass
class _Stage:
    machine: StageMachine
    queue: deque[tuple[float, float, Batch | Prompt]] = field(default_factory=deque)
    """Each entry holds when it was sent, when it arrived (in seconds), and what it is."""
    running: _Forward | None = None

    @property
    def rank(self) -> int:
        return self.machine.rank


@dataclass
class Outcome:
    """An outcome is what one simulated request came to.

    Its times are seconds of virtual time from the request's arrival."""

    tokens: list[int] = field(default_factory=list)
    first_token: float = 0.0
    last_token: float = 0.0
    returned_segments: int = 0
    drafted: int = 0
    forwarded: int = 0
    """The first stage computed so many tree rows."""
    spans: list[Span] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float | None:
        """Return (new tokens - 1) / (last - first token), as in the result JSON."""
        decode = self.last_token - self.first_token
        return (len(self.tokens) - 1) / decode if decode > 0 else None


@dataclass(frozen=True)
class Job:
    """A job is a request to simulate.

    `text` are the target's tokens for it. `guesser` is None if nothing is drafted."""

    request: Request
    text: Sequence[int]
    policy: Policy
    guesser: Guesser | None
    switches: PolicyConfig
    at: float = 0.0
    """The request arrives at this time, in seconds."""


class KnownText:
    """A known text stands for what target servers compute: their choices are looked up in it."""

    def __init__(self, text: Sequence[int], servers: int):
        self._text = text
        self._after: list[dict[int, int]] = [{-1: -1} for _ in range(servers)]
        """For each server, this maps the name of a node that was sent to the index of the text's
        token after it."""

    def sent(self, server: int, segment: Segment) -> None:
        after = self._after[server]
        for name, parent in zip(segment.ids, segment.parents, strict=True):
            after[name] = after[parent] + 1

    def choice(self, server: int, name: int) -> int | None:
        """Return the target's token after a node of the text; None behind the end of the text."""
        at = self._after[server][name]
        return self._text[at] if at < len(self._text) else None

    def returned(self, scheduler: Scheduler, server: int, piece: Piece) -> Returned:
        """Return what rank 0 hears when a segment comes back from a server."""
        request, segment = piece
        nodes = scheduler.nodes(server, request, segment.number, segment.ids)
        choices = {
            node: choice
            for node, name in zip(nodes, segment.ids, strict=False)
            if (choice := self.choice(server, name)) is not None
        }
        return Returned(request, segment.number, tuple(choices), lambda node, path: choices[node])


class _Live:
    """This is what the world holds of a request."""

    def __init__(self, job: Job, learnt: Learnt, features: bool, servers: int):
        self.job, self.outcome, self.fates = job, Outcome(), Fates()
        self.decoding = Decoding(job.request, job.policy, learnt, job.guesser is not None)
        self.awaited = job.request.prompt_length - 1 if features else 0
        """So many rows of the prompt's features are still to come."""
        self.known = KnownText(job.text, servers)


class World:
    """A world runs jobs, whose requests have different ids, until all texts are complete."""

    def __init__(self, ring: RingSpec, jobs: Sequence[Job], learnt: Learnt | None = None):
        self.ring, self.jobs = ring, jobs
        self.scheduler = Scheduler(ring.topology, learnt)
        self._topology = ring.topology
        self._stages = [
            _Stage(StageMachine(rank, self._topology)) for rank in self._topology.stage_ranks
        ]
        self._links = [
            [ring.link(self._topology.stage(sender)) for _ in self._topology.next(sender)]
            for sender in self._topology.ranks
        ]
        self._live: dict[int, _Live] = {}
        self._spans = list[Span]()
        self._events: list[tuple[float, int, Callable, tuple]] = []
        self._order = itertools.count()
        self._drafter_free = 0.0
        self._wake = 0

    def run(self) -> list[Outcome]:
        """Return an outcome for each job, in their order."""
        for job in self.jobs:
            self._at(job.at, self._on_request, job)
        while not (len(self._live) == len(self.jobs) and not self.scheduler.decodings):
            now, _, happen, what = heapq.heappop(self._events)
            happen(now, *what)
        return [self._outcome(self._live[job.request.id]) for job in self.jobs]

    def _outcome(self, live: _Live) -> Outcome:
        out, request, begun = live.outcome, live.job.request.id, live.job.at
        out.returned_segments = live.decoding.returned_segments
        out.drafted = live.decoding.tree.drafted
        out.spans = untangled(
            live.fates.judge(s)
            for s in self._spans
            if s.begin <= out.last_token and s.facts["request"] == request
        )
        out.first_token, out.last_token = out.first_token - begun, out.last_token - begun
        return out

    def _at(self, time: float, happen: Callable, *what) -> None:
        heapq.heappush(self._events, (time, next(self._order), happen, what))

    def _note(
        self, rank: int, row: str, begin: float, end: float, load: Batch | Prompt, **facts
    ) -> None:
        """Note a span once for each request whose rows these are."""
        if isinstance(load, Prompt):
            abouts: list[dict[str, Any]] = [{"request": load.request}]
        else:
            abouts = [
                {"request": request, "segment": segment.number, "ids": segment.ids}
                for request, segment in load.pieces
            ]
        self._spans += [Span(rank, row, "prefill", begin, end, about | facts) for about in abouts]

    # ---- rank 0 ----------------------------------------------------------------------------------
    def _on_request(self, now: float, job: Job) -> None:
        request = job.request
        live = self._live[request.id] = _Live(
            job, self.scheduler.learnt, self.ring.features, self._topology.servers
        )
        for stage in self._stages:
            stage.machine.handle(Begin(request.id, job.switches.drop_dead, job.switches.abort))
        prompt = request.prompt_length - 1
        for server, begin in itertools.product(
            range(self._topology.servers), range(0, prompt, PREFILL_ROWS)
        ):
            rows = min(PREFILL_ROWS, prompt - begin)
            self._send(0, Prompt(request.id, rows), now, server=server)
        if not live.awaited:
            self._read(live, now)
        self._perform(self.scheduler.admit(live.decoding, now), now)

    def _perform(self, actions: list[Action], now: float) -> None:
        for action in actions:
            if isinstance(action, Batch):
                for request, segment in action.pieces:
                    named = self.scheduler.named(action.server, request, segment.number)
                    self._live[request].fates.sent(segment.ids, segment.parents, named)
                    self._live[request].known.sent(action.server, segment)
                self._send(0, action, now, server=action.server)
            elif isinstance(action, Prunes):
                for request, prune in action.prunes:
                    self._tell(self._topology.ring(action.server), Decided(request, prune), now)
            elif isinstance(action, Decision):
                self._decide(action, now)
            elif isinstance(action, Draft):
                self._draft(action, now)
            else:
                assert isinstance(action, Wake)
                self._at(action.at, self._on_wake, self._wake)

    def _handle(self, now: float, event: Event) -> None:
        self._wake += 1
        self._perform(self.scheduler.handle(event, now), now)

    def _on_wake(self, now: float, number: int) -> None:
        if number == self._wake:  # nothing has happened since
            self._handle(now, Woke())

    def _decide(self, decision: Decision, now: float) -> None:
        self._commit(self._live[decision.request], decision.commit, now)
        if decision.finish:
            self._tell(self._topology.stage_ranks, End(decision.request), now)

    def _tell(self, ranks: Sequence[int], event: Decided | End, now: float) -> None:
        """Tell stages something beside the ring."""
        for rank in ranks:
            self._at(now + self.ring.latency, self._on_decided, self._stage(rank), event)

    def _stage(self, rank: int) -> _Stage:
        return self._stages[rank - self._topology.FIRST]

    def _commit(self, live: _Live, commit: Commit, now: float) -> None:
        out = live.outcome
        out.first_token = out.first_token if out.tokens else now
        out.tokens += commit.tokens
        out.last_token = now
        live.fates.decided(commit.path, commit.root, now)
        if live.job.guesser:
            live.job.guesser.commit(commit)

    def _read(self, live: _Live, now: float) -> None:
        """Let the drafter read a prompt."""
        request = live.job.request
        self._drafter_free = max(now, self._drafter_free) + self.ring.reading(request.prompt_length)
        self._at(self._drafter_free, self._handle, Read(request.id))

    def _draft(self, draft: Draft, now: float) -> None:
        begin = max(now, self._drafter_free)
        count = sum(len(nodes) for _, nodes in draft.asks)
        self._drafter_free = begin + self.ring.draft_seconds(count)
        answers = []
        for request, nodes in draft.asks:
            guesser = self._live[request].job.guesser
            assert guesser is not None
            answers.append((request, guesser.propose(nodes)))
            facts = {"request": request, "nodes": len(nodes)}
            self._spans.append(Span(0, "draft", "draft", begin, self._drafter_free, facts))
        self._at(self._drafter_free, self._handle, Answered(tuple(answers)))

    def _on_prompt_features(self, now: float, prompt: Prompt) -> None:
        """Let the drafter read the prompt once all its features are here, as in
        runtime/drafting.py."""
        live = self._live[prompt.request]
        live.awaited -= prompt.rows
        if not live.awaited:
            self._read(live, now)

    def _on_returned(self, now: float, server: int, batch: Batch) -> None:
        back = (
            self._live[piece.request].known.returned(self.scheduler, server, piece)
            for piece in batch.pieces
        )
        self._handle(now, Back(tuple(back)))

    # ---- links and stages ------------------------------------------------------------------------
    def _send(
        self, sender: int, load: Batch | Prompt, now: float, accepted: int = 0, server: int = 0
    ) -> None:
        """Send a load from rank `sender` to the next of the ring, or of a server's.

        `accepted` of its rows became text."""
        stage = self._topology.stage(sender)
        size = self.ring.hop_bytes(stage, load.rows, isinstance(load, Batch), accepted)
        arrival = self._links[sender][server].arrival(size, now)
        self._note(sender, "send", now, arrival, load, bytes=size)
        to = self._topology.next(sender)[server]
        if to != self._topology.COORDINATOR:
            self._at(arrival, self._on_arrival, self._stage(to), (now, arrival, load))
        elif isinstance(load, Batch):
            self._at(arrival, self._on_returned, self._topology.server(sender), load)
        elif self._topology.server(sender) == 0:
            self._at(arrival, self._on_prompt_features, load)

    def _on_arrival(
        self, now: float, stage: _Stage, what: tuple[float, float, Batch | Prompt]
    ) -> None:
        stage.queue.append(what)
        self._next(now, stage)

    def _next(self, now: float, stage: _Stage) -> None:
        """Take what waits, until there is something to compute."""
        while stage.queue and not stage.running:
            sent, arrived, load = stage.queue.popleft()
            self._note(stage.rank, "receive", arrived, now, load)
            self._handled(
                now,
                stage,
                Arrived(load, now - arrived, arrived - sent)
                if isinstance(load, Batch)
                else Chunk(load.request, load.rows),
            )

    def _handled(self, now: float, stage: _Stage, event: StageEvent, accepted: int = 0) -> None:
        """Perform what a stage decides, as runtime/worker.py does.

        What moves in its cache takes no time here."""
        for action in stage.machine.handle(event):
            if isinstance(action, Compute):
                if self._topology.is_first(stage.rank):
                    for part in action.parts:
                        self._live[part.request].outcome.forwarded += (
                            len(part.rows) if part.segment else 0
                        )
                number = self._topology.number(stage.rank)
                end = now + self.ring.seconds(number, action.rows, action.context)
                stage.running = _Forward(action, now, end)
                self._at(end, self._on_computed, stage, stage.running)
            elif isinstance(action, Tell):
                self._at(now + self.ring.latency, self._handle, action.event)
            elif isinstance(action, Pass):
                self._pass(now, stage, action, accepted)

    def _pass(self, now: float, stage: _Stage, action: Pass, accepted: int) -> None:
        if action.batch.pieces:
            self._send(stage.rank, action.batch, now, accepted)
        elif not self._topology.is_last(stage.rank) or self.ring.features:
            (chunk,) = action.parts
            self._send(stage.rank, Prompt(chunk.request, len(chunk.rows)), now)

    def _on_decided(self, now: float, stage: _Stage, event: Decided | End) -> None:
        self._handled(now, stage, event)
        running = stage.running
        if running and running.whole and not stage.machine.wanted():
            layers = self.ring.emulate.LAYERS * self.ring.group.members
            layer = (running.end - running.begin) / layers
            end = running.begin + math.ceil((now - running.begin) / layer) * layer if layer else now
            if end < running.end:
                stage.running = running._replace(end=end, whole=False)
                self._at(end, self._on_computed, stage, stage.running)

    def _on_computed(self, now: float, stage: _Stage, forward: _Forward) -> None:
        if stage.running is not forward:  # it was abandoned
            return
        stage.running, accepted = None, 0
        for part in forward.what.parts:
            load = (
                Batch((Piece(part.request, part.segment),))
                if part.segment
                else Prompt(part.request, len(part.rows))
            )
            self._note(stage.rank, "compute", forward.begin, now, load)
            if part.segment and forward.whole and self._topology.is_last(stage.rank):
                accepted += self._walked(stage, part, part.segment)
        self._handled(now, stage, Computed(now - forward.begin, forward.whole), accepted)
        self._next(now, stage)

    def _walked(self, stage: _Stage, part: Part, segment: Segment) -> int:
        """Return how many nodes of a segment the last stage finds to be text."""
        server = self._topology.server(stage.rank)
        choices = [self._live[part.request].known.choice(server, name) for name in segment.ids]
        return len(
            stage.machine.walk(part, lambda k: -1 if (found := choices[k]) is None else found)
        )
