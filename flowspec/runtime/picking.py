"""The target's tokens after a segment's rows are computed when they are asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from flowspec.core.past import Past
from flowspec.core.request import Sampling
from flowspec.models.device import on_host
from flowspec.models.logits import TreeLogits
from flowspec.models.stage import Head
from flowspec.sampling import Logprobs, NoiseRows, adjusted, logprobs_of, pick


class Picked(NamedTuple):
    """Picked is a token that was picked, and what the request wants to know of it."""

    token: int
    gap: float
    """This is its lead, as a Pick has it."""
    logprobs: Logprobs | None = None
    """None unless the request asks for them."""


class Picks(Mapping[int, Picked]):
    """Picks map a node of one segment to the target's pick after it.

    Filters and noise are applied to the node alone. Where a penalty counts the tokens of the node's
    path, the nodes are asked for in the order of the walk."""

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
        past: Past | None = None,
        tokens: Sequence[int] = (),
    ):
        """`ids`, `parents`, `rows` and `first` are as for TreeLogits.

        `positions` are absolute, int [n]; `rows` are the last stage's features [n, hidden]. `noise`
        is None for a greedy request. `past` is what penalties count, up to where the walk is; with
        it, `tokens` are those of the nodes."""
        multiply = head.two_best if sampling.highest else head
        self._logits = TreeLogits(multiply, ids, parents, rows, first)
        self._sampling, self._noise, self._positions = sampling, noise, positions
        self._past, self._tokens = past, tokens

    def __getitem__(self, id: int) -> Picked:
        """Return the pick after node `id`; KeyError if the segment has no such node."""
        sampling, k = self._sampling, self._logits.index[id]
        logits, position = on_host(self._logits[id]), int(self._positions[k])
        if self._past is not None:
            self._past.reach(position, self._tokens[k])
        found = pick(adjusted(logits, sampling, self._past), sampling, self._noise, position + 1)
        if sampling.logprobs is None:
            return Picked(*found)
        return Picked(*found, logprobs_of(logits, found.token, sampling.logprobs))

    def __len__(self) -> int:
        return len(self._logits)

    def __iter__(self) -> Iterator[int]:
        return iter(self._logits)
