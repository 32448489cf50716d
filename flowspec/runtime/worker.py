"""A worker is a stage at work, one of the ranks 1 to S.

It performs with a model what its machine decides (core/machine.py) and tells the machine what
happened. Rows come in, pass the layers and go on. What is decided arrives beside the ring; the
worker takes it in between forwards and between layers."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from flowspec.comm.base import Message, Transport
from flowspec.core.cost import Emulate, Group
from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    End,
    Move,
    Part,
    Pass,
    Settled,
    StageAction,
    StageMachine,
    Tell,
)
from flowspec.core.past import Past
from flowspec.core.request import Sampling
from flowspec.models.parallel import Way
from flowspec.models.stage import Cached, Head, Share, StageModel, Tapped, forward_together
from flowspec.runtime import wire
from flowspec.runtime.group import SHARING, Crew
from flowspec.runtime.memory import peak_memory
from flowspec.runtime.picking import Picked, Picks
from flowspec.runtime.tracing import SpanLog
from flowspec.sampling import NoiseRows, noise_for

log = logging.getLogger(__name__)


@dataclass
class _Spent:
    """This is what a stage has spent in the run so far."""

    busy: float = 0.0
    """Forwards took so many seconds."""
    segments: int = 0
    """There were so many forwards over tree rows."""
    overhead: float = 0.0
    """The stage's thread spent so many CPU seconds on these beside the model's forward, lm_head and
    sampling."""
    apart: float = 0.0
    """The model, lm_head and sampling took so many CPU seconds."""


@dataclass
class _Live:
    """This is what the worker holds of a request."""

    request: int
    rows: Cached
    sampling: Sampling
    noise: NoiseRows | None
    past: Past | None
    log: SpanLog
    layers: list[int]
    """Rank 0's drafter reads what enters these layers of the stage at tokens of the text."""
    features: bool
    """Rank 0's drafter reads the features of the prompt and of what becomes text."""
    before: _Spent
    """The stage had spent this when the request began."""
    computed: int = 0
    """The stage has computed so many tree rows of the request."""


@dataclass
class Worker:
    """The worker of rank `transport.rank`.

    `head` is given to a last stage that picks the tokens itself (verify_on: last)."""

    transport: Transport
    model: StageModel
    head: Head | None = None
    emulate: Emulate = field(default_factory=Emulate)
    LOOK: ClassVar = 1.0
    """An emulated forward shows that it goes on at least once in so many seconds."""
    first_layer: int = 0
    """The model's first layer is this layer of the target."""

    def __post_init__(self) -> None:
        rank, topology = self.transport.rank, self.transport.topology
        self._number, self._is_last = topology.number(rank), topology.is_last(rank)
        self._before = 0 if topology.is_first(rank) else self._number - 1
        self._clock = self.transport.inbox.clock
        self._pulse = self.transport.pulses[rank]
        self.machine = StageMachine(rank, topology)
        self.crew = Crew(self.transport)
        self._live: dict[int, _Live] = {}
        self._spent, self._followers_peak = _Spent(), 0.0

    def run(self) -> None:
        """Serve until rank 0 says stop."""
        while True:
            self._pulse.at()
            _, message = self.transport.inbox.get()
            if message.kind == "stop":
                return self.crew.stop()
            self._pulse.at(f"at work on a {message.kind} message")
            self.take(message)

    def take(self, message: Message) -> None:
        """Do what a message asks for; raise KeyError if no stage is ever sent its kind."""
        _TAKEN[message.kind](self, message)

    # ---- round the ring --------------------------------------------------------------------------
    def _start(self, message: Message) -> None:
        request, about = message.meta["request"], message.meta
        if about["fresh"]:
            self.machine.forget()
        self.machine.handle(Begin(request, about["drop_dead"], about["abort"]))
        if self.machine.books(request):
            sampling = wire.read_sampling(message)
            noise = noise_for(sampling, self.head.vocabulary) if self.head else None
            notes = SpanLog(about["trace"], request, self.emulate.hidden_scale)
            layers = [
                k for k in about["layers"] if 0 <= k - self.first_layer < len(self.model.layers)
            ]
            rows = Cached(
                self.model,
                to_host=True,
                taps=[k - self.first_layer for k in layers],
                sharing=SHARING[about["spread"]],
            )
            self.crew.begin(request, layers, about["spread"])
            before = dataclasses.replace(self._spent)
            self._live[request] = _Live(
                request,
                rows,
                sampling,
                noise,
                wire.read_past(message),
                notes,
                layers,
                about["features"],
                before,
            )
        if not self._is_last:
            self.transport.send_next(message)

    def _prompt(self, message: Message) -> None:
        """Compute a chunk of a prompt."""
        taken, since = self._clock.now(), self.transport.inbox.since
        self._hear_control()
        live, rows = self._live.get(message.meta["request"]), message.tensors[0]
        if live is not None:
            live.log.arrived(message, self._before, self._number, since, taken, None)
            self._handle(Chunk(live.request, len(rows)), rows)

    def _batch(self, message: Message) -> None:
        """Compute segments of some requests."""
        taken, begun, since = self._clock.now(), time.thread_time(), self.transport.inbox.since
        self._hear_control()
        batch, apart = wire.read_batch(message), self._spent.apart
        for request, segment in batch.pieces:
            if live := self._live.get(request):
                live.log.arrived(message, self._before, self._number, since, taken, segment)
        arrived = Arrived(batch, taken - since, since - message.meta["sent"])
        self._handle(arrived, message.tensors[-1])
        self._spent.overhead += time.thread_time() - begun - (self._spent.apart - apart)

    def _handle(self, event: Chunk | Arrived, rows: Tensor) -> None:
        for action in self.machine.handle(event):
            if isinstance(action, Compute):
                self._compute(action, rows)
            else:
                self._perform(action)

    def _compute(self, forward: Compute, rows: Tensor) -> None:
        """Compute those of the rows that were admitted, and perform what follows."""
        begun = self._clock.now()
        lives = [self._live[part.request] for part in forward.parts]
        admitted = [row for part in forward.parts for row in part.rows]
        out = self._forward(forward, lives, rows if len(admitted) == len(rows) else rows[admitted])
        walked = self._walk(forward, lives, out) if out is not None and self.head else {}
        whole = out is not None and self._pretend(begun, forward.rows, lives[0].rows.sharing)
        # where this stage verifies, lm_head and picks are part of it
        self._account(forward, lives, begun, spent := self._clock.now() - begun)
        if whole:
            self._hear_control()  # the latest moment at which a dead row can still be dropped
        for action in self.machine.handle(Computed(spent, whole)):
            if isinstance(action, Pass):
                assert out is not None
                self._pass(action, forward, out, walked)
            else:
                self._perform(action)

    def _forward(self, forward: Compute, lives: list[_Live], rows: Tensor) -> Tensor | None:
        before = sum(live.rows.model_cpu for live in lives)
        shares = [
            Share(live.rows, part.admitted, part.segment and part.segment.ids)
            for live, part in zip(lives, forward.parts, strict=True)
        ]
        self.crew.compute([part.request for part in forward.parts], shares, rows)
        out = forward_together(rows, shares, self._needed)
        self._spent.apart += sum(live.rows.model_cpu for live in lives) - before
        return out

    def _pass(
        self, action: Pass, forward: Compute, out: Tensor, walked: dict[int, wire.Answer]
    ) -> None:
        batch, rows = action.batch, action.rows
        if not batch.pieces:
            (part,) = forward.parts
            self._pass_prompt(self._live[part.request], part, out)
        elif self.head:
            self.transport.send_next(wire.choices([walked[request] for request, _ in batch.pieces]))
        elif self._is_last:
            self.transport.send_next(wire.features(self._features(action, forward, out)))
        else:
            self.transport.send_next(wire.batch(batch, out if len(rows) == len(out) else out[rows]))

    def _features(self, action: Pass, forward: Compute, out: Tensor) -> list[wire.Answer]:
        """Return what rank 0 verifies: features and positions of the nodes that are alive."""
        positions = np.concatenate([part.admitted.positions for part in forward.parts])
        return [
            wire.Answer(
                request,
                segment.number,
                [*segment.ids],
                [],
                [],
                torch.from_numpy(positions[rows]),
                out[rows],
            )
            for request, segment, rows in action.parts
            if segment
        ]

    def _walk(self, forward: Compute, lives: list[_Live], out: Tensor) -> dict[int, wire.Answer]:
        """Return an answer for each request that has tree rows in the forward.

        It holds the nodes that became text and the target's tokens after them."""
        if not forward.segments:
            return {}
        begun = time.thread_time()
        first = [*itertools.accumulate((len(p.rows) for p in forward.parts), initial=0)]
        assert self.head is not None
        # several requests' first nodes, which are mostly asked for, are one product with lm_head
        two = all(live.sampling.highest for live in lives)
        multiply = self.head.two_best if two else self.head
        heads = multiply(out[first[:-1]]) if len(lives) > 1 else [None]
        walked = {}
        for part, live, at, logits in zip(forward.parts, lives, first, heads, strict=False):
            walked[part.request] = self._walk_part(
                part, live, out[at : at + len(part.rows)], logits
            )
        self._spent.apart += time.thread_time() - begun
        return walked

    def _walk_part(
        self, part: Part, live: _Live, out: Tensor, logits: Tensor | None
    ) -> wire.Answer:
        segment = part.segment
        assert self.head is not None and segment is not None
        picks = Picks(
            self.head,
            live.sampling,
            live.noise,
            segment.ids,
            segment.parents,
            torch.from_numpy(part.admitted.positions),
            out,
            logits,
            live.past,
            segment.tokens,
        )
        found: list[Picked] = []

        def choose(k: int) -> int:
            found.append(picks[segment.ids[k]])
            return found[-1].token

        text = self.machine.walk(part, choose)
        return wire.Answer(
            live.request,
            segment.number,
            [segment.ids[k] for k in text],
            [pick.token for pick in found],
            [pick.gap for pick in found],
            None,
            out[text] if live.features else None,
            [pick.logprobs for pick in found if pick.logprobs],
        )

    def _pass_prompt(self, live: _Live, part: Part, out: Tensor) -> None:
        self.transport.send_control(0, wire.prefilled(live.request))
        self._hand_over(live, live.rows.entered(int(part.admitted.positions[0])))
        if not self._is_last:
            self.transport.send_next(wire.prefill(live.request, out))
        elif live.features:
            self.transport.send_next(wire.prompt_features(live.request, out))

    # ---- beside the ring -------------------------------------------------------------------------
    def _hear_control(self, wait: float = 0.0) -> bool:
        """Take in what has been decided, or the first news that comes within `wait` seconds.

        Return False if the run is over."""
        while (item := self.transport.inbox.get_urgent(wait)) is not None:
            message, wait = item[1], 0.0
            if message.kind == "stop":  # for `run` to see
                self.transport.inbox.put(item, urgent=True)
                return False
            self.take(message)
        return True

    def _needed(self) -> bool:
        """Return whether to go on with the next layer; a layer of the forward under way is done."""
        self._pulse.move()
        return self._hear_control() and self.machine.wanted()

    def _perform(self, action: StageAction) -> None:
        if isinstance(action, Tell):
            self.transport.send_control(0, wire.news(action.event))
        elif isinstance(action, Move):
            self.crew.move(action.request, action.gather)
            self._live[action.request].rows.cache.gather(action.gather)
        else:
            assert isinstance(action, Settled)
            live, books = self._live[action.request], self.machine.books(action.request)
            assert books is not None
            self._hand_over(live, live.rows.settle(action.at, action.text, books.row))

    def _hand_over(self, live: _Live, tapped: Tapped | None) -> None:
        """Send rank 0's drafter what entered its layers here at tokens that are text now."""
        if tapped is not None:
            self.transport.send_control(0, wire.text_features(live.request, live.layers, *tapped))

    def _prunes(self, message: Message) -> None:
        for request, prune in wire.read_prunes(message):
            for action in self.machine.handle(Decided(request, prune)):
                self._perform(action)

    def _end(self, message: Message) -> None:
        request = message.meta["request"]
        self.machine.handle(End(request))
        self.crew.end(request)
        self.transport.send_control(
            0, wire.report(request, self._report(self._live.pop(request, None)))
        )

    def _report(self, live: _Live | None) -> wire.Report:
        if live is None:
            return wire.Report(0.0, 0, 0, 0.0, [], 0.0, self._peak(), [])
        spent, before, meter = self._spent, live.before, self.machine.meter
        return wire.Report(
            spent.busy - before.busy,
            live.computed,
            spent.segments - before.segments,
            spent.overhead - before.overhead,
            meter.forward.points(),
            meter.row,
            self._peak(),
            live.log.spans,
        )

    def _peak(self) -> float:
        """Return the most memory, in MB, that a member of the stage has held, as last told."""
        return max(peak_memory(), self._followers_peak)

    def _followers(self, message: Message) -> None:
        self._followers_peak = max(self._followers_peak, message.meta["megabytes"])

    def _ping(self, message: Message) -> None:
        self.transport.send_control(0, wire.pong(message))

    # ---- time ------------------------------------------------------------------------------------
    def _pretend(self, begun: float, rows: int, sharing: Way) -> bool:
        """Take the emulated time of a forward over `rows` rows that began at `begun`.

        Return False if it was abandoned on the way, at the end of the next of its layers."""
        group = Group(self.transport.topology.members, sharing is SHARING[True])
        row_bytes = self.emulate.row_bytes(self.model.config.hidden_size)
        seconds = self.emulate.group_seconds(self._number, rows, group, row_bytes)
        while (left := begun + seconds - self._clock.now()) > 0:
            if self._hear_control(min(left, self.LOOK)) and self._needed():
                continue
            layer = seconds / (self.emulate.LAYERS * group.members)
            spent = self._clock.now() - begun
            self._clock.sleep(min(seconds, math.ceil(spent / layer) * layer) - spent)
            return False
        return True

    def _account(self, forward: Compute, lives: list[_Live], begun: float, spent: float) -> None:
        for part, live in zip(forward.parts, lives, strict=True):
            segment = part.segment
            about = {"segment": segment.number, "ids": segment.ids} if segment else {}
            live.log.add(self._number, "compute", "prefill", begun, begun + spent, **about)
            live.computed += len(part.rows) if segment else 0
        log.debug("%d rows in %.2f ms", forward.rows, spent * 1000)
        self._spent.busy += spent
        self._spent.segments += bool(forward.segments)


_TAKEN: dict[str, Callable[[Worker, Message], None]] = {
    "start": Worker._start,
    "prefill": Worker._prompt,
    "batch": Worker._batch,
    "prunes": Worker._prunes,
    "end": Worker._end,
    "ping": Worker._ping,
    "peak": Worker._followers,
}
"""This maps the kind of a message to what is done with it."""
