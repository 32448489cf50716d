"""A stage by hand: the production machine and cache around a model, for one request, without a transport."""

import torch

from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    Move,
    Settled,
    StageMachine,
)
from flowspec.core.messages import Batch, Piece, Segment
from flowspec.core.topology import Topology
from flowspec.models.stage import ALWAYS, Cached

REQUEST = 1


class Hand:
    """`told`: what entered the layers `taps` at tokens that became text, as it was handed over."""

    def __init__(self, model, taps=(), to_host=False):
        self.model, self.told = model, []
        self.machine, self._cached = StageMachine(1, Topology(2)), Cached(model, to_host, taps)
        self.machine.handle(Begin(REQUEST))

    @property
    def state(self):
        return self.machine.books(REQUEST)

    @property
    def cache(self):
        return self._cached.cache

    def prefill(self, rows):
        [compute] = self.machine.handle(Chunk(REQUEST, len(rows)))
        out = self._cached.forward(rows, compute.parts[0].admitted)
        self._perform(Computed(0.01))
        entered = self._cached.entered(compute.context)
        self.told += [entered] if entered else []
        return out

    def verify(self, ids, parents, rows, drop=True, needed=ALWAYS):
        """Which of the rows were worth it, their positions, and their features; None: they were not `needed` any more."""
        self.machine._live[REQUEST].drop_dead = drop
        segment = Segment(1, tuple(ids), tuple(parents), tuple(ids))
        compute = next(
            (
                a
                for a in self.machine.handle(Arrived(Batch((Piece(REQUEST, segment),)), 0.0, 0.0))
                if isinstance(a, Compute)
            ),
            None,
        )
        if compute is None:
            return [], torch.zeros(0), rows[:0]
        [part] = compute.parts
        admitted = part.admitted
        out = self._cached.forward(rows[admitted.kept], admitted, needed, part.segment.ids)
        self._perform(Computed(0.01, out is not None))
        return admitted.kept, admitted.positions, out

    def prune(self, prune):
        self._perform(Decided(REQUEST, prune))

    def _perform(self, event):
        for action in self.machine.handle(event):
            if isinstance(action, Move):
                self.cache.gather(action.gather)
            elif isinstance(action, Settled):
                tapped = self._cached.settle(action.at, action.text, self.state.row)
                self.told += [tapped] if tapped else []
