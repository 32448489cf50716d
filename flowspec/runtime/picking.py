"""The target's tokens after a segment's rows are computed when they are asked for.

A walk down the tree asks for few of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from flowspec.core.request import Sampling
from flowspec.models.device import on_host
from flowspec.models.stage import Head
from flowspec.sampling import NoiseRows, Pick, pick


class Picks(Mapping[int, Pick]):
    """Picks map a node of one segment to the target's pick after it.

    A node's logits are computed together with those of the first nodes below it; filters and noise
    are applied to the node alone. The time of lm_head is that of reading its weights: one row at a
    time reads them for every token of the text, several rows at once read them once. So the walk's
    next nodes are guessed, in the segment's own order, in which the likeliest come first."""

    ROWS = 6
    """At most this many rows are multiplied with lm_head's weights at once: so many cost hardly
    more than one (models/kernels.py)."""

    def __init__(
        self,
        head: Head,
        sampling: Sampling,
        noise: NoiseRows | None,
        ids: Sequence[int],
        parents: Sequence[int],
        positions: Tensor,
        rows: Tensor,
        first: Tensor | None = None,
    ):
        """`ids` are the n nodes and `parents` their parents, with parents before children.

        `positions` are absolute, int [n]; `rows` are the last stage's features [n, hidden]. `noise`
        is None for a greedy request. `first` are the logits [vocabulary] of the first node, where
        they are at hand."""
        self._head, self._sampling, self._noise = head, sampling, noise
        self._ids, self._parents, self._positions, self._rows = ids, parents, positions, rows
        self._index = {id: k for k, id in enumerate(ids)}
        self._logits: dict[int, Tensor] = {} if first is None else {0: first}

    def __getitem__(self, id: int) -> Pick:
        """Return the pick after node `id`; KeyError if the segment has no such node."""
        k = self._index[id]
        if k not in self._logits:
            some = self._below(k)
            multiply = self._head if self._noise is not None else self._head.two_best
            self._logits.update(zip(some, multiply(self._rows[torch.tensor(some)]), strict=True))
        position = int(self._positions[k]) + 1
        return pick(on_host(self._logits[k]), self._sampling, self._noise, position)

    def _below(self, k: int) -> list[int]:
        """Return index k and those of the first nodes below it, in all at most ROWS."""
        found, inside = [k], {self._ids[k]}
        for j in range(k + 1, len(self._ids)):
            if len(found) == self.ROWS:
                break
            if self._parents[j] in inside:
                inside.add(self._ids[j])
                found.append(j)
        return found

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[int]:
        return iter(self._ids)
