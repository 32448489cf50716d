"""A stage at work (ranks 1..S): rows come in, pass the layers, go on; prunes are heard between forwards and between layers."""

from __future__ import annotations

import logging
import math
import re
import resource
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from flowspec.comm.base import Message, Transport
from flowspec.core.cost import Emulate, Meter
from flowspec.core.messages import Started
from flowspec.core.request import Sampling
from flowspec.core.stage import Accepted
from flowspec.models.device import on_host
from flowspec.models.stage import ALWAYS, Head, Needed, Sequence, StageModel, Tapped
from flowspec.runtime import wire
from flowspec.runtime.tracing import Log
from flowspec.sampling import NoiseRows, noise_for, pick

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
    meter: Meter = field(default_factory=Meter)
    busy: float = 0.0
    rows: int = 0
    segments: int = 0
    overhead: float = 0.0
    """CPU seconds of this thread for segments, beside the following"""
    picking: float = 0.0
    """CPU seconds in lm_head and sampling"""

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
    first_layer: int = 0
    """of the model, as the target counts"""

    def __post_init__(self) -> None:
        self._is_first = self.transport.rank == 1
        self._is_last = self.transport.rank == self.transport.world_size - 1
        self._live: dict[int, _Live] = {}
        self._over: set[int] = set()  # ended before they began here

    def run(self) -> None:
        """Serve until rank 0 says stop."""
        while True:
            _, message = self.transport.inbox.get()
            if message.kind == "stop":
                return
            getattr(self, "_on_" + message.kind)(message)

    # ---- round the ring ----------------------------------------------------------------------------
    def _on_start(self, message: Message) -> None:
        request = message.meta["request"]
        if request in self._over:
            self._over.discard(request)
        else:
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
        rows = message.tensors[0]
        self._arrived(live, message, time.monotonic(), None)
        begun = time.monotonic()
        out = live.sequence.prefill(rows)
        self._pretend(begun, len(rows), ALWAYS)
        self._account(live, len(rows), begun)
        self.transport.send_control(0, wire.prefilled(message.meta["request"]))
        self._hand_over(message, live, live.sequence.prefilled())
        if not self._is_last:
            self.transport.send_next(wire.prefill(message.meta["request"], out))
        elif live.features:
            self.transport.send_next(wire.prompt_features(message.meta["request"], out))

    def _on_segment(self, message: Message) -> None:
        taken, begun = time.monotonic(), time.thread_time()
        self._hear_control()
        live = self._live.get(message.meta["request"])
        if live is None:
            return
        ids, parents = wire.read_nodes(message)
        apart = live.apart
        self._arrived(live, message, taken, ids)
        self._verify(live, message, ids, parents, taken)
        live.overhead += time.thread_time() - begun - (live.apart - apart)

    def _verify(self, live: _Live, message: Message, ids: list[int], parents: list[int], taken: float) -> None:
        request, number = message.meta["request"], message.meta["number"]
        worth = live.sequence.state.worth(ids, parents) if live.drop_dead else range(len(ids))
        if self._is_first:
            self._announce(live, message, len(worth), taken - self.transport.inbox.since)
        if not worth:
            return
        begun = time.monotonic()
        needed = self._needed(request, live, ids)
        kept, positions, out = live.sequence.verify(ids, parents, message.tensors[1], live.drop_dead, needed)
        live.rows, live.segments = live.rows + len(kept), live.segments + 1
        whole = out is not None and self._pretend(begun, len(kept), needed)
        self._account(live, len(kept), begun, whole, segment=number, ids=[ids[k] for k in kept])
        if out is None or not whole:
            if self._is_first:
                self.transport.send_control(0, wire.idle(request))
            return
        tokens = wire.read_tokens(message) if live.features else []
        columns = [[column[k] for k in kept] for column in (ids, parents, tokens) if column]
        self._hear_control()
        state = live.sequence.state
        alive = state.alive(columns[0]) if live.drop_dead else list(range(len(kept)))
        if request in self._live and alive:
            some = slice(None) if len(alive) == len(kept) else alive
            nodes = [[column[k] for k in alive] for column in columns]
            self._pass_on(live, request, number, nodes, torch.from_numpy(positions)[some], out[some])

    def _pass_on(self, live: _Live, request: int, number: int, nodes: list[list[int]], positions: Tensor, out: Tensor) -> None:
        """`nodes`: ids and parents, and the tokens if rank 0 wants features."""
        if not self._is_last:
            ids, parents, *tokens = nodes
            self.transport.send_next(wire.rows_of(request, number, ids, parents, out, *tokens))
        elif self.head is None:
            self.transport.send_next(wire.features(request, number, nodes[0], positions, out))
        else:
            begun = time.thread_time()
            logits = on_host(self.head(out))
            picks = [pick(row, live.sampling, live.noise, p + 1) for row, p in zip(logits, positions.tolist(), strict=True)]
            live.picking += time.thread_time() - begun
            choices, gaps = [p.token for p in picks], [p.gap for p in picks]
            accepted = self._accepted(live, nodes, choices, out) if live.features else None
            self.transport.send_next(wire.choices(request, number, nodes[0], choices, gaps, accepted))

    def _accepted(self, live: _Live, nodes: list[list[int]], choices: list[int], out: Tensor) -> tuple[list[int], Tensor]:
        """Ids and rows of the nodes that became text with these choices."""
        ids, parents, tokens = nodes
        found = live.accepted.among(ids, parents, tokens, choices)
        return [ids[k] for k in found], out[found]

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

    def _needed(self, request: int, live: _Live, ids: list[int]) -> Needed:
        """Whether to go on with a forward over these nodes: not when the request is over, nor when all of them are dead."""

        def needed() -> bool:
            going = self._hear_control() and request in self._live
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
        points, row = live.meter.forward.points(), live.meter.row
        return wire.Report(live.busy, live.rows, live.segments, live.overhead, points, row, peak_memory(), live.log.spans)

    def _on_ping(self, message: Message) -> None:
        self.transport.send_control(0, wire.pong(message))

    # ---- time --------------------------------------------------------------------------------------
    def _announce(self, live: _Live, message: Message, rows: int, waited: float) -> None:
        """Tell rank 0 when this stage will be free, so that the next segment can arrive just then."""
        expected = live.meter.forward.predict(rows, live.sequence.state.length) if rows else 0.0
        started = Started(message.meta["number"], rows, expected, waited)
        self.transport.send_control(0, wire.started(message.meta["request"], started))

    def _arrived(self, live: _Live, message: Message, taken: float, ids: list[int] | None) -> None:
        rank, at = self.transport.rank, self.transport.inbox.since
        if ids:
            live.meter.hop(len(ids), at - message.meta["sent"])
        live.log.arrived(message, rank - 1, rank, at, taken, ids)

    def _pretend(self, begun: float, rows: int, needed: Needed) -> bool:
        """Take the emulated time of a forward over `rows` rows that began at `begun`; False if it was abandoned on the way, at the
        end of the next of its layers."""
        seconds = self.emulate.stage_seconds(self.transport.rank, rows)
        while (left := begun + seconds - time.monotonic()) > 0:
            if self._hear_control(left) and needed():
                continue
            layer = seconds / self.emulate.LAYERS
            spent = time.monotonic() - begun
            time.sleep(max(0.0, min(seconds, math.ceil(spent / layer) * layer) - spent))
            return False
        return True

    def _account(self, live: _Live, rows: int, begun: float, whole: bool = True, **about) -> None:
        """A forward over `rows` rows that began at `begun` is over."""
        spent = time.monotonic() - begun
        context = live.sequence.state.length - rows
        if whole and live.meter.forward_over(rows, spent, context):
            self.transport.send_control(0, wire.cost(live.request, live.meter.cost(self.transport.rank, context)))
        live.log.add(self.transport.rank, "compute", "prefill", begun, begun + spent, **about)
        log.debug("%d rows in %.2f ms", rows, spent * 1000)
        live.busy += spent
