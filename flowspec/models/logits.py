"""The logits of a tree's rows are computed when they are asked for.

A walk down the tree asks for few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor


class TreeLogits(Mapping[int, Tensor]):
    """These map a node to the logits [vocabulary] after it.

    They are computed together with those of the first nodes below it. The time of lm_head is that
    of reading its weights: one row at a time reads them for every token of the text, several rows
    at once read them once. So the walk's next nodes are guessed, in the nodes' own order, in which
    the likeliest come first."""

    ROWS = 6
    """At most this many rows are multiplied with lm_head's weights at once: so many cost hardly
    more than one (models/kernels.py)."""

    def __init__(
        self,
        multiply: Callable[[Tensor], Tensor],
        ids: Sequence[int],
        parents: Sequence[int],
        rows: Tensor,
        first: Tensor | None = None,
    ):
        """`ids` are n nodes and `parents` their parents, with parents before children.

        `multiply` makes features [n, hidden], of which `rows` are those of the nodes, into logits
        [n, vocabulary]. `first` are the logits of the first node, where they are at hand."""
        self._multiply, self._ids, self._parents, self._rows = multiply, ids, parents, rows
        self.index = {id: k for k, id in enumerate(ids)}
        """It maps a node to its row."""
        self._made: dict[int, Tensor] = {} if first is None else {0: first}

    def __getitem__(self, id: int) -> Tensor:
        """Return the logits after node `id`; KeyError if there is no such node."""
        k = self.index[id]
        if k not in self._made:
            some = self._below(k)
            made = self._multiply(self._rows[torch.tensor(some)])
            self._made.update(zip(some, made, strict=True))
        return self._made[k]

    def all(self) -> Tensor:
        """Return the logits [n, vocabulary] after all nodes, in their order."""
        return self._multiply(self._rows)

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
