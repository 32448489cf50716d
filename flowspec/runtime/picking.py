"""The target's tokens after a segment's rows are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from flowspec.core.request import Sampling
from flowspec.models.device import on_host
from flowspec.models.logits import TreeLogits
from flowspec.models.stage import Head
from flowspec.sampling import NoiseRows, Pick, pick


class Picks(Mapping[int, Pick]):
    """Picks map a node of one segment to the target's pick after it.

    Filters and noise are applied to the node alone."""

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
        """`ids`, `parents`, `rows` and `first` are as for TreeLogits.

        `positions` are absolute, int [n]; `rows` are the last stage's features [n, hidden]. `noise`
        is None for a greedy request."""
        multiply = head if noise is not None else head.two_best
        self._logits = TreeLogits(multiply, ids, parents, rows, first)
        self._sampling, self._noise, self._positions = sampling, noise, positions

    def __getitem__(self, id: int) -> Pick:
        """Return the pick after node `id`; KeyError if the segment has no such node."""
        logits = on_host(self._logits[id])
        position = int(self._positions[self._logits.index[id]]) + 1
        return pick(logits, self._sampling, self._noise, position)

    def __len__(self) -> int:
        return len(self._logits)

    def __iter__(self) -> Iterator[int]:
        return iter(self._logits)
