"""Rank 0 at work: performs what the scheduler decides and tells it what happened."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from flowspec.comm.base import Message, Transport
from flowspec.core.messages import Action, Commit, Draft, Event, Finish, Prune, Returned, Segment, Wake, Woke
from flowspec.core.policy import Policy
from flowspec.core.request import Request
from flowspec.core.scheduler import Scheduler
from flowspec.errors import RankLost
from flowspec.models.stage import Head
from flowspec.runtime import wire
from flowspec.runtime.drafting import DraftThread, Local
from flowspec.sampling import NoiseRows, Pick, noise_for, pick

log = logging.getLogger(__name__)

STALL = 600.0
"""seconds without any message after which a request is given up: a bug, since dead and hung ranks show earlier"""
PREFILL_ROWS = 128


class Committed(NamedTuple):
    """A token of the text."""

    id: int
    accepted: bool
    """drafted and sent before the target picked it"""
    gap: float
    """the lead over the runner-up in (perturbed) log-probability; the logit at temperature 0"""
    final: bool = False
    """the last one"""


@dataclass
class Stats:
    """What one request took; seconds of a monotonic clock."""

    begun: float = 0.0
    first_token: float = 0.0
    last_token: float = 0.0
    ended: float = 0.0
    finish_reason: str = "cancelled"
    drafted: int = 0
    returned_segments: int = 0
    reports: dict[int, wire.Report] = field(default_factory=dict)


class _Choices(Mapping):
    """Node id -> the target's token, looked up on the walk only; remembers the picks for their gaps."""

    def __init__(self, picks: Mapping[int, Pick]):
        self._picks = picks
        self.looked_up: dict[int, Pick] = {}

    def __getitem__(self, id: int) -> int:
        found = self.looked_up[id] = self._picks[id]
        return found.token

    def __len__(self) -> int:
        return len(self._picks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._picks)


class _Verifier(Mapping):
    """Picks from feature rows when asked: lm_head over the segment at the first look, one pick a node."""

    def __init__(self, head: Head, request: Request, noise: NoiseRows | None, message: Message):
        ids, self._positions, self._rows = message.tensors
        self._index = {id: k for k, id in enumerate(ids.tolist())}
        self._head, self._sampling, self._noise = head, request.sampling, noise
        self._logits: torch.Tensor | None = None

    def __getitem__(self, id: int) -> Pick:
        if self._logits is None:
            self._logits = self._head(self._rows).cpu()
        k = self._index[id]
        return pick(self._logits[k], self._sampling, self._noise, int(self._positions[k]) + 1)

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[int]:
        return iter(self._index)


class Driver:
    """Serves one request after another. `head` is given when rank 0 verifies (verify_on: coordinator)."""

    def __init__(self, transport: Transport, draft: DraftThread | None, vocabulary: int, head: Head | None = None):
        self._transport, self._draft, self._head, self._vocabulary = transport, draft, head, vocabulary

    def generate(self, request: Request, policy: Policy, coupled: bool, stats: Stats) -> Generator[Committed, None, None]:
        """The text as it is committed. Closing the iterator cancels the request. `stats` is filled as it goes."""
        scheduler = Scheduler(request, policy, drafts=self._draft is not None)
        self._wake_at: float | None = None
        self._picks: dict[int, Pick] = {}
        stats.begun = time.monotonic()
        broken = True
        try:
            self._begin(request, coupled)
            actions = scheduler.start(time.monotonic())
            while not scheduler.finished:
                yield from self._perform(request, actions, stats)
                actions = scheduler.handle(self._next_event(request), time.monotonic())
            yield from self._perform(request, actions, stats)
            broken = False
        except GeneratorExit:  # the caller has enough
            broken = False
            raise
        finally:
            stats.ended = time.monotonic()
            stats.drafted, stats.returned_segments = scheduler.tree.drafted, scheduler.returned_segments
            self._end(request)
            if not broken:
                self._await_reports(request, stats)
            log.info("request %d: %d tokens, %s", request.id, len(scheduler.tokens), stats.finish_reason)

    def _begin(self, request: Request, coupled: bool) -> None:
        self._noise = noise_for(request.sampling, self._vocabulary)
        self._transport.send_next(wire.start(request))
        prompt = torch.tensor(request.prompt[:-1], dtype=torch.int32)
        for chunk in prompt.split(PREFILL_ROWS) if len(prompt) else ():
            self._transport.send_next(wire.prefill(request.id, chunk))
        if self._draft:
            self._draft.begin(request, noise_for(request.sampling, self._vocabulary) if coupled else None)

    def _perform(self, request: Request, actions: list[Action], stats: Stats) -> Iterator[Committed]:
        """Everything that leaves this rank goes before the caller sees a token."""
        self._wake_at = None
        committed: list[Committed] = []
        for action in actions:
            log.debug("%s", action)
            if isinstance(action, Segment):
                self._transport.send_next(wire.segment(request.id, action))
            elif isinstance(action, Prune):
                for rank in range(1, self._transport.world_size):
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
        yield from committed

    def _commit(self, commit: Commit, stats: Stats) -> list[Committed]:
        if self._draft:
            self._draft.commit(commit)
        stats.last_token = time.monotonic()
        stats.first_token = stats.first_token or stats.last_token
        gaps = [self._picks[node].gap for node in commit.path]
        self._picks = {}
        return [Committed(*token) for token in zip(commit.tokens, commit.accepted, gaps, strict=True)]

    # ---- what arrives ------------------------------------------------------------------------------
    def _next_event(self, request: Request) -> Event:
        """The next event of this request; what is left of earlier ones is dropped."""
        while True:
            deadline = time.monotonic() + STALL
            until = deadline if self._wake_at is None else min(deadline, self._wake_at)
            item = self._transport.inbox.get(max(0.0, until - time.monotonic()))
            if item is None:
                if until == deadline:
                    raise RankLost(f"nothing came back for {STALL:g} s although every rank is alive")
                self._wake_at = None
                return Woke()
            event = self._read(request, item)
            if event is not None:
                return event

    def _read(self, request: Request, item) -> Event | None:
        if isinstance(item, Local):
            return item.event if item.request == request.id else None
        message = item[1]
        if message.meta.get("request") != request.id:
            return None
        if message.kind == "prefilled":  # a sign of life
            return None
        return wire.read_started(message) if message.kind == "started" else self._returned(request, message)

    def _returned(self, request: Request, message: Message) -> Returned:
        if message.kind == "choices":
            table, gaps = message.tensors
            ids, tokens = table.tolist()
            picks: Mapping = dict(zip(ids, map(Pick, tokens, gaps.tolist()), strict=True))
        else:
            assert self._head is not None, f"a {message.kind} message, but this rank does not verify"
            picks = _Verifier(self._head, request, self._noise, message)
        choices = _Choices(picks)
        choices.looked_up = self._picks
        return Returned(message.meta["number"], tuple(picks), choices)

    # ---- the end -----------------------------------------------------------------------------------
    def _end(self, request: Request) -> None:
        """Stages forget the request; rows of it that are still on their way are dropped where they arrive."""
        for rank in range(1, self._transport.world_size):
            self._transport.send_control(rank, wire.end(request.id))

    def _await_reports(self, request: Request, stats: Stats) -> None:
        stages = range(1, self._transport.world_size)
        while len(stats.reports) < len(stages):
            item = self._transport.inbox.get(STALL)
            if item is None:
                raise RankLost(f"no report from rank {min(set(stages) - set(stats.reports))} for {STALL:g} s")
            if not isinstance(item, Local) and item[1].kind == "report" and item[1].meta["request"] == request.id:
                stats.reports[item[0]] = wire.read_report(item[1])
