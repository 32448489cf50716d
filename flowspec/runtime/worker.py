"""A stage at work (ranks 1..S): performs what its machine decides (core/machine.py) with a model, and tells it what happened.

Rows come in, pass the layers, go on; what is decided beside the ring is heard between forwards and between layers."""

from __future__ import annotations

import logging
import math
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowspec.comm.base import Message, Transport
from flowspec.core.cost import Emulate
from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    End,
    Move,
    Pass,
    Settled,
    StageAction,
    StageMachine,
    Tell,
)
from flowspec.core.messages import Segment
from flowspec.core.request import Sampling
from flowspec.models.stage import Cached, Head, StageModel, Tapped
from flowspec.runtime import wire
from flowspec.runtime.picking import Picks
from flowspec.runtime.tracing import Log
from flowspec.sampling import NoiseRows, Pick, noise_for

log = logging.getLogger(__name__)


def peak_memory() -> float:
    """MB (10^6 bytes) of the most resident memory this process ever had."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:  # ru_maxrss would carry over what the parent had before exec
        return int(found[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes


@dataclass
class _Live:
    """A request in this stage."""

    request: int
    rows: Cached
    sampling: Sampling
    noise: NoiseRows | None
    log: Log
    layers: list[int]
    """rank 0's drafter reads what enters these layers of ours at tokens of the text"""
    features: bool
    """it reads the features of the prompt and of what becomes text"""
    busy: float = 0.0
    computed: int = 0
    """tree rows"""
    segments: int = 0
    overhead: float = 0.0
    """CPU seconds of this thread for segments, beside the following"""
    picking: float = 0.0
    """CPU seconds in lm_head and sampling"""

    def picked(self, seconds: float) -> None:
        self.picking += seconds

    @property
    def apart(self) -> float:
        """CPU seconds in the model, lm_head and sampling."""
        return self.rows.model_cpu + self.picking


class _Walked(NamedTuple):
    """What a last stage that picks the tokens finds out of a segment, as wire.choices takes it."""

    text: list[int]
    """the nodes that are text"""
    tokens: list[int]
    """the target's token after each"""
    gaps: list[float]
    """how clear it was"""
    rows: Tensor | None
    """their features, if they are wanted"""


@dataclass
class Worker:
    """Rank `transport.rank`. `head` is given to a last stage that picks the tokens itself (verify_on: last)."""

    transport: Transport
    model: StageModel
    head: Head | None = None
    emulate: Emulate = field(default_factory=Emulate)
    LOOK: ClassVar = 1.0
    """seconds of an emulated forward between signs that it goes on"""
    first_layer: int = 0
    """of the model, as the target counts"""

    def __post_init__(self) -> None:
        rank, topology = self.transport.rank, self.transport.topology
        self._rank, self._is_last = rank, rank == topology.last
        self._before = topology.previous(rank)
        self._clock = self.transport.inbox.clock
        self._pulse = self.transport.pulses[rank]
        self.machine = StageMachine(rank, topology)
        self._live: dict[int, _Live] = {}

    def run(self) -> None:
        """Serve until rank 0 says stop."""
        while True:
            self._pulse.at()
            _, message = self.transport.inbox.get()
            if message.kind == "stop":
                return
            self._pulse.at(f"at work on a {message.kind} message")
            self.take(message)

    def take(self, message: Message) -> None:
        """Do what a message asks for. KeyError for a kind that no stage is sent."""
        _TAKEN[message.kind](self, message)

    # ---- round the ring ----------------------------------------------------------------------------
    def _start(self, message: Message) -> None:
        request, about = message.meta["request"], message.meta
        if about["fresh"]:
            self.machine.forget()
        self.machine.handle(Begin(request, about["drop_dead"], about["abort"]))
        if self.machine.books(request):
            sampling = wire.read_sampling(message)
            noise = noise_for(sampling, self.head.vocabulary) if self.head else None
            notes = Log(about["trace"], request, self.emulate.hidden_scale)
            layers = [
                k for k in about["layers"] if 0 <= k - self.first_layer < len(self.model.layers)
            ]
            rows = Cached(self.model, to_host=True, taps=[k - self.first_layer for k in layers])
            self._live[request] = _Live(
                request, rows, sampling, noise, notes, layers, about["features"]
            )
        if not self._is_last:
            self.transport.send_next(message)

    def _rows(self, message: Message) -> None:
        """A chunk of the prompt, or a segment."""
        taken, begun, arrived = self._clock.now(), time.thread_time(), self.transport.inbox.since
        self._hear_control()
        live = self._live.get(message.meta["request"])
        if live is None:
            return
        segment = wire.read_segment(message) if message.kind == "segment" else None
        apart, rows = live.apart, message.tensors[-1]
        live.log.arrived(message, self._before, self._rank, arrived, taken, segment and segment.ids)
        waited, hop = taken - arrived, arrived - message.meta["sent"]
        event = (
            Arrived(live.request, segment, waited, hop)
            if segment
            else Chunk(live.request, len(rows))
        )
        for action in self.machine.handle(event):
            if isinstance(action, Compute):
                self._compute(live, action, rows)
            else:
                self._perform(action)
        live.overhead += time.thread_time() - begun - (live.apart - apart) if segment else 0.0

    def _compute(self, live: _Live, forward: Compute, rows: Tensor) -> None:
        """A forward over those of the rows that were admitted, and what follows from it."""
        begun, admitted, segment = self._clock.now(), forward.admitted, forward.segment
        rows = rows if forward.rows == len(rows) else rows[admitted.kept]
        out = live.rows.forward(
            rows, admitted, self._needed, None if segment is None else segment.ids
        )
        walked = (
            self._walk(live, segment, admitted.positions, out)
            if out is not None and segment and self.head
            else None
        )
        whole = out is not None and self._pretend(begun, forward.rows)
        spent = (
            self._clock.now() - begun
        )  # where this stage verifies, lm_head and picks are part of it
        self._account(live, forward, begun, spent)
        if whole:
            self._hear_control()  # the latest moment at which a dead row can still be dropped
        for action in self.machine.handle(Computed(spent, whole)):
            if isinstance(action, Pass):
                assert out is not None
                self._pass(live, action, admitted.positions, out, walked)
            else:
                self._perform(action)

    def _pass(
        self, live: _Live, action: Pass, positions: np.ndarray, out: Tensor, walked: _Walked | None
    ) -> None:
        request, segment = live.request, action.segment
        some = slice(None) if len(action.rows) == len(out) else action.rows
        if segment is None:
            self.transport.send_control(0, wire.prefilled(request))
            self._hand_over(live, live.rows.entered(int(positions[0])))
            if not self._is_last:
                self.transport.send_next(wire.prefill(request, out))
            elif live.features:
                self.transport.send_next(wire.prompt_features(request, out))
        elif walked is not None:
            self.transport.send_next(wire.choices(request, segment.number, *walked))
        elif self._is_last:
            self.transport.send_next(
                wire.features(
                    request,
                    segment.number,
                    segment.ids,
                    torch.from_numpy(positions[some]),
                    out[some],
                )
            )
        else:
            self.transport.send_next(wire.rows_of(request, segment, out[some]))

    def _walk(self, live: _Live, segment: Segment, positions: np.ndarray, out: Tensor) -> _Walked:
        assert self.head is not None
        ids, parents = segment.ids, segment.parents
        picks = Picks(
            self.head,
            live.sampling,
            live.noise,
            ids,
            parents,
            torch.from_numpy(positions),
            out,
            live.picked,
        )
        found: list[Pick] = []

        def choose(k: int) -> int:
            found.append(picks[ids[k]])
            return found[-1].token

        text = self.machine.walk(choose)
        rows = out[text] if live.features else None
        return _Walked(
            [ids[k] for k in text], [p.token for p in found], [p.gap for p in found], rows
        )

    # ---- beside the ring ---------------------------------------------------------------------------
    def _hear_control(self, wait: float = 0.0) -> bool:
        """Take in what is decided by now, or the first news within `wait` seconds; False: the run is over."""
        while (item := self.transport.inbox.get_urgent(wait)) is not None:
            message, wait = item[1], 0.0
            if message.kind == "stop":  # for `run` to see
                self.transport.inbox.put(item, urgent=True)
                return False
            self.take(message)
        return True

    def _needed(self) -> bool:
        """A layer of the forward under way is done: whether to go on with the next."""
        self._pulse.move()
        return self._hear_control() and self.machine.wanted()

    def _perform(self, action: StageAction) -> None:
        if isinstance(action, Tell):
            self.transport.send_control(0, wire.news(action.request, action.event))
        elif isinstance(action, Move):
            self._live[action.request].rows.cache.gather(action.gather)
        else:
            assert isinstance(action, Settled)
            live, books = self._live[action.request], self.machine.books(action.request)
            assert books is not None
            self._hand_over(live, live.rows.settle(action.at, action.text, books.row))

    def _hand_over(self, live: _Live, tapped: Tapped | None) -> None:
        """Rank 0's drafter gets what entered its layers here at tokens that are text now."""
        if tapped is not None:
            self.transport.send_control(0, wire.text_features(live.request, live.layers, *tapped))

    def _prune(self, message: Message) -> None:
        for action in self.machine.handle(
            Decided(message.meta["request"], wire.read_prune(message))
        ):
            self._perform(action)

    def _end(self, message: Message) -> None:
        request = message.meta["request"]
        self.machine.handle(End(request))
        self.transport.send_control(
            0, wire.report(request, self._report(self._live.pop(request, None)))
        )

    def _report(self, live: _Live | None) -> wire.Report:
        if live is None:
            return wire.Report(0.0, 0, 0, 0.0, [], 0.0, peak_memory(), [])
        points, row = self.machine.meter.forward.points(), self.machine.meter.row
        return wire.Report(
            live.busy,
            live.computed,
            live.segments,
            live.overhead,
            points,
            row,
            peak_memory(),
            live.log.spans,
        )

    def _ping(self, message: Message) -> None:
        self.transport.send_control(0, wire.pong(message))

    # ---- time --------------------------------------------------------------------------------------
    def _pretend(self, begun: float, rows: int) -> bool:
        """Take the emulated time of a forward over `rows` rows that began at `begun`; False if it was abandoned on the way, at the
        end of the next of its layers."""
        seconds = self.emulate.stage_seconds(self._rank, rows)
        while (left := begun + seconds - self._clock.now()) > 0:
            if self._hear_control(min(left, self.LOOK)) and self._needed():
                continue
            layer = seconds / self.emulate.LAYERS
            spent = self._clock.now() - begun
            self._clock.sleep(min(seconds, math.ceil(spent / layer) * layer) - spent)
            return False
        return True

    def _account(self, live: _Live, forward: Compute, begun: float, spent: float) -> None:
        segment = forward.segment
        about = {"segment": segment.number, "ids": segment.ids} if segment else {}
        live.log.add(self._rank, "compute", "prefill", begun, begun + spent, **about)
        log.debug("%d rows in %.2f ms", forward.rows, spent * 1000)
        live.busy += spent
        live.computed, live.segments = (
            live.computed + (forward.rows if segment else 0),
            live.segments + (segment is not None),
        )


_TAKEN: dict[str, Callable[[Worker, Message], None]] = {
    "start": Worker._start,
    "prefill": Worker._rows,
    "segment": Worker._rows,
    "prune": Worker._prune,
    "end": Worker._end,
    "ping": Worker._ping,
}
"""kind of a message -> what is done with it"""
