"""A stage at work (ranks 1..S): rows come in, pass the layers, go on; prunes are heard between forwards and between layers."""

from __future__ import annotations

import logging
import math
import re
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flowspec.comm.base import Message, Transport
from flowspec.core.cost import Emulate, Meter
from flowspec.core.messages import Started
from flowspec.core.request import Sampling
from flowspec.core.stage import Accepted
from flowspec.models.stage import Head, Needed, Sequence, StageModel, Tapped
from flowspec.runtime import wire
from flowspec.runtime.picking import Picks
from flowspec.runtime.tracing import Log
from flowspec.sampling import NoiseRows, Pick, noise_for

log = logging.getLogger(__name__)

FLAGS = ("features", "drop_dead", "abort")
"""what a request's start says of it, as `_Live` takes them"""


def peak_memory() -> float:
    """MB (10^6 bytes) of the most resident memory this process ever had."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:  # ru_maxrss would carry over what the parent had before exec
        return int(found[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # macOS counts in bytes


Nodes = tuple[list[int], list[int], list[int]]
"""a segment's ids, parents and tokens"""
Walked = tuple[list[int], list[int], list[float], Tensor | None]


def _only(nodes: Nodes, kept: list[int]) -> Nodes:
    """The part of a segment at these indices."""
    ids, parents, tokens = ([column[k] for k in kept] for column in nodes)
    return ids, parents, tokens


@dataclass
class _Live:
    """A request in this stage."""

    request: int
    sequence: Sequence
    sampling: Sampling
    noise: NoiseRows | None
    log: Log
    layers: list[int]
    """rank 0's drafter reads what enters these layers of ours at tokens of the text"""
    features: bool
    """it reads the features of the prompt and of what becomes text"""
    drop_dead: bool
    abort: bool
    """the switches of the policy"""
    accepted: Accepted = field(default_factory=Accepted)
    busy: float = 0.0
    rows: int = 0
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
        return self.sequence.model_cpu + self.picking


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
        self._clock = self.transport.inbox.clock
        rank, topology = self.transport.rank, self.transport.topology
        self._is_first, self._is_last = rank == topology.FIRST, rank == topology.last
        self._pulse = self.transport.pulses[self.transport.rank]
        self._meter = Meter()
        self._live: dict[int, _Live] = {}
        self._over: set[int] = set()  # ended before they began here

    def run(self) -> None:
        """Serve until rank 0 says stop."""
        while True:
            self._pulse.at()
            _, message = self.transport.inbox.get()
            if message.kind == "stop":
                return
            self._pulse.at(f"at work on a {message.kind} message")
            getattr(self, "_on_" + message.kind)(message)

    # ---- round the ring ----------------------------------------------------------------------------
    def _on_start(self, message: Message) -> None:
        request = message.meta["request"]
        if request in self._over:
            self._over.discard(request)
        else:
            if message.meta["fresh"]:
                self._meter = Meter()
            sampling = wire.read_sampling(message)
            noise = noise_for(sampling, self.head.vocabulary) if self.head else None
            log = Log(message.meta["trace"], request, self.emulate.hidden_scale)
            layers = [k for k in message.meta["layers"] if 0 <= k - self.first_layer < len(self.model.layers)]
            sequence = Sequence(self.model, to_host=True, taps=[k - self.first_layer for k in layers])
            flags = (message.meta[name] for name in FLAGS)
            self._live[request] = _Live(request, sequence, sampling, noise, log, layers, *flags)
        if not self._is_last:
            self.transport.send_next(message)

    def _on_prefill(self, message: Message) -> None:
        live = self._live.get(message.meta["request"])
        if live is None:
            return
        rows, context = message.tensors[0], live.sequence.state.length
        self._arrived(live, message, self._clock.now(), None)
        begun = self._clock.now()
        out = live.sequence.prefill(rows, self._moves)
        self._pretend(begun, len(rows), self._moves)
        if message.meta["request"] not in self._live:
            return
        self._account(live, len(rows), context, begun)
        self.transport.send_control(0, wire.prefilled(message.meta["request"]))
        self._hand_over(message, live, live.sequence.prefilled())
        if not self._is_last:
            self.transport.send_next(wire.prefill(message.meta["request"], out))
        elif live.features:
            self.transport.send_next(wire.prompt_features(message.meta["request"], out))

    def _on_segment(self, message: Message) -> None:
        taken, begun = self._clock.now(), time.thread_time()
        self._hear_control()
        live = self._live.get(message.meta["request"])
        if live is None:
            return
        nodes = wire.read_nodes(message)
        apart = live.apart
        self._arrived(live, message, taken, nodes[0])
        self._verify(live, message, nodes, taken)
        live.overhead += time.thread_time() - begun - (live.apart - apart)

    def _verify(self, live: _Live, message: Message, nodes: Nodes, taken: float) -> None:
        request, number = message.meta["request"], message.meta["number"]
        ids, parents, _ = nodes
        worth = live.sequence.state.worth(ids, parents) if live.drop_dead else range(len(ids))
        if self._is_first:
            self._announce(live, message, len(worth), taken - self.transport.inbox.since)
        if not worth:
            return
        begun = self._clock.now()
        needed, context = self._needed(request, live, ids), live.sequence.state.length
        kept, positions, out = live.sequence.verify(ids, parents, message.tensors[1], live.drop_dead, needed)
        live.rows, live.segments = live.rows + len(kept), live.segments + 1
        nodes = _only(nodes, kept)
        walked = self._walk(live, nodes, positions, out) if out is not None and self.head else None
        whole = out is not None and self._pretend(begun, len(kept), needed)
        self._account(live, len(kept), context, begun, whole, segment=number, ids=nodes[0])
        if out is None or not whole:
            if self._is_first:
                self.transport.send_control(0, wire.idle(request))
            return
        self._hear_control()
        alive = live.sequence.state.alive(nodes[0]) if live.drop_dead else list(range(len(kept)))
        if request in self._live and alive:
            some = slice(None) if len(alive) == len(kept) else alive
            rows = _only(nodes, alive), positions[some], out[some]
            self.transport.send_next(wire.choices(request, number, *walked) if walked else self._rows(request, number, *rows))

    def _rows(self, request: int, number: int, nodes: Nodes, positions: np.ndarray, out: Tensor) -> Message:
        """For the next stage, or for rank 0 if it verifies."""
        if self._is_last:
            return wire.features(request, number, nodes[0], torch.from_numpy(positions), out)
        return wire.rows_of(request, number, *nodes, out)

    def _walk(self, live: _Live, nodes: Nodes, positions: np.ndarray, out: Tensor) -> Walked:
        """What a last stage that verifies finds out, as wire.choices takes it: of the nodes that are text their ids, the target's
        tokens after them, how clear these were, and the rows if they are wanted."""
        assert self.head is not None
        ids, parents, tokens = nodes
        picks = Picks(self.head, live.sampling, live.noise, ids, parents, torch.from_numpy(positions), out, live.picked)
        found: list[Pick] = []

        def choose(k: int) -> int:
            found.append(picks[ids[k]])
            return found[-1].token

        text = live.accepted.walk(ids, parents, tokens, choose)
        return [ids[k] for k in text], [p.token for p in found], [p.gap for p in found], out[text] if live.features else None

    # ---- beside the ring ---------------------------------------------------------------------------
    def _hear_control(self, wait: float = 0.0) -> bool:
        """Take in what is decided by now, or the first news within `wait` seconds; False: the run is over.

        The latest moment at which a dead row can still be dropped."""
        while (item := self.transport.inbox.get_urgent(wait)) is not None:
            message, wait = item[1], 0.0
            if message.kind == "stop":  # for `run` to see
                self.transport.inbox.put(item, urgent=True)
                return False
            getattr(self, "_on_" + message.kind)(message)
        return True

    def _moves(self) -> bool:
        """A layer is done; go on."""
        self._pulse.move()
        return True

    def _needed(self, request: int, live: _Live, ids: list[int]) -> Needed:
        """Whether to go on with a forward over these nodes: not when the request is over, nor when all of them are dead."""

        def needed() -> bool:
            going = self._moves() and self._hear_control() and request in self._live
            return going and not (live.abort and live.sequence.state.all_dead(ids))

        return needed

    def _on_prune(self, message: Message) -> None:
        live = self._live.get(message.meta["request"])
        if live is not None:
            self._hand_over(message, live, live.sequence.prune(wire.read_prune(message)))

    def _hand_over(self, cause: Message, live: _Live, tapped: Tapped | None) -> None:
        """Rank 0's drafter gets what entered its layers here at tokens that are text now."""
        if tapped is not None:
            self.transport.send_control(0, wire.text_features(cause.meta["request"], live.layers, *tapped))

    def _on_end(self, message: Message) -> None:
        request = message.meta["request"]
        live = self._live.pop(request, None)
        if live is None:
            self._over.add(request)
        self.transport.send_control(0, wire.report(request, self._report(live)))

    def _report(self, live: _Live | None) -> wire.Report:
        if live is None:
            return wire.Report(0.0, 0, 0, 0.0, [], 0.0, peak_memory(), [])
        points, row = self._meter.forward.points(), self._meter.row
        return wire.Report(live.busy, live.rows, live.segments, live.overhead, points, row, peak_memory(), live.log.spans)

    def _on_ping(self, message: Message) -> None:
        self.transport.send_control(0, wire.pong(message))

    # ---- time --------------------------------------------------------------------------------------
    def _announce(self, live: _Live, message: Message, rows: int, waited: float) -> None:
        """Tell rank 0 when this stage will be free, so that the next segment can arrive just then."""
        expected = self._meter.forward.predict(rows, live.sequence.state.length) if rows else 0.0
        started = Started(message.meta["number"], rows, expected, waited)
        self.transport.send_control(0, wire.started(message.meta["request"], started))

    def _arrived(self, live: _Live, message: Message, taken: float, ids: list[int] | None) -> None:
        rank, at = self.transport.rank, self.transport.inbox.since
        if ids:
            self._meter.hop(len(ids), at - message.meta["sent"])
        live.log.arrived(message, rank - 1, rank, at, taken, ids)

    def _pretend(self, begun: float, rows: int, needed: Needed) -> bool:
        """Take the emulated time of a forward over `rows` rows that began at `begun`; False if it was abandoned on the way, at the
        end of the next of its layers."""
        seconds = self.emulate.stage_seconds(self.transport.rank, rows)
        while (left := begun + seconds - self._clock.now()) > 0:
            if self._hear_control(min(left, self.LOOK)) and needed():
                continue
            layer = seconds / self.emulate.LAYERS
            spent = self._clock.now() - begun
            self._clock.sleep(min(seconds, math.ceil(spent / layer) * layer) - spent)
            return False
        return True

    def _account(self, live: _Live, rows: int, context: int, begun: float, whole: bool = True, **about) -> None:
        """A forward over `rows` rows behind `context` others, which began at `begun`, is over, and where this stage verifies, lm_head
        and picks as well. (A prune may have shortened the cache meanwhile.)"""
        spent = self._clock.now() - begun
        if whole and self._meter.forward_over(rows, spent, context):
            self.transport.send_control(0, wire.cost(live.request, self._meter.cost(self.transport.rank, context)))
        live.log.add(self.transport.rank, "compute", "prefill", begun, begun + spent, **about)
        log.debug("%d rows in %.2f ms", rows, spent * 1000)
        live.busy += spent
