"""This module computes the attention of a few new rows to a long cache.

The decoder layers of transformers call it (by its `AttentionInterface`). All rows see the committed
rows of the cache, so only what lies behind them has a mask: a long context costs no mask. Query
heads that share a key/value head stand above one another as rows of one product with it
(grouped-query attention, arXiv 2305.13245), so no key or value is copied. On a CPU with float32
rows vector.py does the same without a mask at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor, nn

from flowspec.core.stage import Admitted
from flowspec.models import jit, vector
from flowspec.models.device import placed

SCORES = 1 << 21
"""So many scores (elements) at most are computed at a time; more would leave the processor's
caches."""


class Seen:
    """A Seen is what a request's n new rows see of its cache, as attention reads it.

    Layers are given a list of these, one for each request, in place of transformers' mask."""

    def __init__(self, admitted: Admitted, device: torch.device, in_order: bool = False):
        self._admitted, self._device = admitted, device
        self.base, self.rows = admitted.base, len(admitted.kept)
        self.in_order = in_order and self.rows == 1
        """Attention lays keys and values out in the order of positions."""

        self._twins: dict[torch.device, Seen] = {}

    def to(self, device: torch.device) -> Seen:
        """Return the same for layers on this device, which may be another."""
        if device == self._device:
            return self
        if device not in self._twins:
            self._twins[device] = Seen(self._admitted, device, self.in_order)
        return self._twins[device]

    @cached_property
    def unseen(self) -> Tensor:
        """Return which cache rows from base on each row must not see, bool [n, length - base]."""
        return placed(torch.from_numpy(self._admitted.unseen), self._device)

    @cached_property
    def order(self) -> Tensor:
        """Return the cache rows that the only new row sees, int64 [tokens]."""
        return placed(torch.tensor(self._admitted.sees(0)), self._device)

    @cached_property
    def slots(self) -> tuple[Tensor, Tensor]:
        """Return the cache rows from base on that each row sees, and how many of them count.

        They are int64 [n, most] and int64 [n]."""
        behind = self._admitted.behind
        counts = [len(seen) for seen in behind]
        slots = np.zeros((len(behind), max(counts, default=0)), dtype=np.int64)
        for row, seen in zip(slots, behind, strict=True):
            row[: len(seen)] = seen
        return torch.from_numpy(slots), torch.tensor(counts)


def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    seen: Sequence[Seen],
    scaling: float,
) -> Tensor:
    """Return softmax(scaling * q k^T) v, [n, heads, head_dim], of n new rows over their caches.

    `query` is [heads, n, head_dim], one request's rows after the other's. `keys` and `values` are
    [1, kv_heads, length, head_dim] for each request, as `Caches.update` gives them."""
    if len(seen) == 1:
        return _attend_one(query, keys[0][0], values[0][0], seen[0], scaling)
    queries = query.split([each.rows for each in seen], 1)
    return torch.cat(
        [
            _attend_one(query, key[0], value[0], each, scaling)
            for query, key, value, each in zip(queries, keys, values, seen, strict=True)
        ]
    )


def _attend_one(query: Tensor, keys: Tensor, values: Tensor, seen: Seen, scaling: float) -> Tensor:
    """Do what `attend` does for the rows of one request.

    `keys` and `values` are [kv_heads, length, head_dim]."""
    n, width = query.shape[1:]
    if (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and vector.fits(width)
        and jit.available()
    ):
        rows = query.transpose(0, 1)
        rows = rows if rows.stride(1) == width and rows.stride(2) == 1 else rows.contiguous()
        return vector.attend(rows, keys, values, seen.base, *seen.slots, scaling)
    if seen.in_order:
        return _attend(
            query, keys[:, seen.order], values[:, seen.order], seen.unseen[:, :0], scaling
        )
    unseen, size = seen.unseen, max(1, SCORES // (len(query) * keys.shape[1]))
    parts = [slice(start, start + size) for start in range(0, n, size)]
    return torch.cat(
        [_attend(query[:, part], keys, values, unseen[part], scaling) for part in parts]
    )


def _attend(query: Tensor, keys: Tensor, values: Tensor, unseen: Tensor, scaling: float) -> Tensor:
    """Do the same for rows on any device.

    `unseen` (bool [n, t]) tells which of the last t rows of the cache each row must not see."""
    heads, n, width = query.shape
    groups, length, _ = keys.shape
    stacked = (query * scaling).reshape(groups, heads // groups * n, width)
    scores = torch.bmm(stacked, keys.transpose(1, 2))
    masked = scores.view(heads, n, length)[:, :, length - unseen.shape[1] :]
    # the fill is finite, so that a dead row that sees nothing stays a number
    masked.masked_fill_(unseen, torch.finfo(scores.dtype).min)
    softmaxed = torch.float64 if scores.dtype == torch.float64 else torch.float32
    weights = torch.softmax(scores, -1, dtype=softmaxed).to(values.dtype)
    return torch.bmm(weights, values).view(heads, n, width).transpose(0, 1)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    attention_mask: Sequence[Seen],
    scaling: float,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the attention [1, n, heads, head_dim] of a query [1, heads, n, head_dim].

    Transformers' layers call this."""
    return attend(query[0], key, value, attention_mask, scaling)[None], None


@cache
def implementation() -> str:
    """Return the name by which a config asks for this attention; import transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register("flowspec", _interface)
    return "flowspec"
