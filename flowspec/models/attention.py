"""This module computes the attention of a few new rows to a long cache.

The decoder layers of transformers call it (by its `AttentionInterface`). All rows see the committed
rows of the cache, so only what lies behind them has a mask: a long context costs no mask. (Where a
layer has a window, rows see the end of them, and the mask reaches as far back.) Query
heads that share a key/value head stand above one another as rows of one product with it
(grouped-query attention, arXiv 2305.13245), so no key or value is copied. On a CPU with float32
rows vector.py does the same without a mask at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowspec.core.stage import Admitted
from flowspec.models import jit, vector
from flowspec.models.device import placed

SCORES = 1 << 21
"""So many scores (elements) at most are computed at a time; more would leave the processor's
caches."""


class Form(NamedTuple):
    """The form of a layer's attention is what it has beside queries, keys and values."""

    window: int | None = None
    """A row sees so many tokens at most, the last ones up to itself; None means all."""
    cap: float | None = None
    """A score s counts as cap * tanh(s / cap)."""
    sinks: Tensor | None = None
    """This score of each head [heads] takes part in the softmax, for no value."""
    slopes: Tensor | None = None
    """The score of a token at position p becomes higher by slope * p, with a slope for each head
    [heads]."""

    @property
    def plain(self) -> bool:
        """Return whether scores are products, and their weights the softmax of these."""
        return self.cap is None and self.sinks is None and self.slopes is None


PLAIN = Form()


class Span(NamedTuple):
    """A span is rows that see the cache from the same place on, in the order of positions."""

    rows: Tensor | None
    """These are the rows, int64; None means all."""
    start: int
    """They see the cache's rows from here up to `start + base`."""
    base: int
    slots: Tensor
    """Each then sees these rows, counted from `start`: int64 [rows, most]."""
    counts: Tensor
    """So many of a row's slots count: int64 [rows]."""


class Seen:
    """A Seen is what a request's n new rows see of its cache, as attention reads it.

    Layers are given a list of these, one for each request, in place of transformers' mask."""

    def __init__(self, admitted: Admitted, device: torch.device, in_order: bool = False):
        self._admitted, self._device = admitted, device
        self.base, self.rows = admitted.base, len(admitted.kept)
        self.in_order = in_order and self.rows == 1
        """Attention lays keys and values out in the order of positions."""
        self._spans: dict[int | None, list[Span]] = {}
        self._unseen: dict[int | None, tuple[int, Tensor]] = {}
        self._twins: dict[torch.device, Seen] = {}

    def to(self, device: torch.device) -> Seen:
        """Return the same for layers on this device, which may be another."""
        if device == self._device:
            return self
        if device not in self._twins:
            self._twins[device] = Seen(self._admitted, device, self.in_order)
        return self._twins[device]

    @cached_property
    def _order(self) -> Tensor:
        return placed(torch.tensor(self._admitted.sees(0)), self._device)

    def order(self, window: int | None) -> Tensor:
        """Return the cache rows that the only new row sees, int64 [tokens]."""
        return self._order[-window:] if window else self._order

    @cached_property
    def positions(self) -> Tensor:
        """Return the positions of all cache rows, int64 [length]; 0 for those that nobody sees."""
        positions = np.zeros(self._admitted.length, dtype=np.int64)
        positions[: self.base] = range(self.base)
        for seen in self._admitted.behind:
            positions[seen] = range(self.base, self.base + len(seen))
        return placed(torch.from_numpy(positions), self._device)

    def unseen(self, window: int | None) -> tuple[int, Tensor]:
        """Return a cache row before which nobody sees any, and what is not seen of those behind.

        The latter is bool [n, t]: which of the last t rows of the cache each row must not see. (All
        see what lies between.)"""
        skips = self._skipped(window)
        if window not in self._unseen:
            unseen, start = self._admitted.unseen, 0
            if max(skips, default=0):
                start = min(self.base, *skips)
                early = np.arange(start, self.base) < np.array(skips)[:, None]
                unseen = np.concatenate([early, unseen], 1)
                for row, skip, seen in zip(unseen, skips, self._admitted.behind, strict=True):
                    row[np.array(seen[: max(0, skip - self.base)], dtype=np.int64) - start] = True
            self._unseen[window] = start, placed(torch.from_numpy(unseen), self._device)
        return self._unseen[window]

    def spans(self, window: int | None) -> list[Span]:
        """Return the rows, those together that see the cache from the same place on."""
        if window not in self._spans:
            skips = self._skipped(window)
            kinds = sorted({*skips})
            self._spans[window] = [
                self._span(
                    skip,
                    None
                    if len(kinds) == 1
                    else [k for k, each in enumerate(skips) if each == skip],
                )
                for skip in kinds
            ]
        return self._spans[window]

    def _skipped(self, window: int | None) -> list[int]:
        """Return how many of the first tokens each row does not see any more."""
        counts = [self.base + len(seen) for seen in self._admitted.behind]
        return [max(0, count - window) if window else 0 for count in counts]

    def _span(self, skip: int, rows: list[int] | None) -> Span:
        start = min(skip, self.base)
        behind = self._admitted.behind
        behind = [
            seen[skip - start :] for seen in (behind if rows is None else [behind[k] for k in rows])
        ]
        counts = [len(seen) for seen in behind]
        slots = np.zeros((len(behind), max(counts, default=0)), dtype=np.int64)
        for row, seen in zip(slots, behind, strict=True):
            row[: len(seen)] = np.array(seen, dtype=np.int64) - start
        return Span(
            None if rows is None else torch.tensor(rows),
            start,
            self.base - start,
            torch.from_numpy(slots),
            torch.tensor(counts),
        )


def attend(
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    seen: Sequence[Seen],
    scaling: float,
    form: Form = PLAIN,
) -> Tensor:
    """Return softmax(scaling * q k^T) v, [n, heads, value_dim], of n new rows over their caches.

    `query` is [heads, n, head_dim], one request's rows after the other's. `keys` and `values` are
    [1, kv_heads, length, ..] for each request, as `Caches.update` gives them. `form` says what
    else there is."""
    if len(seen) == 1:
        return _attend_one(query, keys[0][0], values[0][0], seen[0], scaling, form)
    queries = query.split([each.rows for each in seen], 1)
    return torch.cat(
        [
            _attend_one(query, key[0], value[0], each, scaling, form)
            for query, key, value, each in zip(queries, keys, values, seen, strict=True)
        ]
    )


def _attend_one(
    query: Tensor, keys: Tensor, values: Tensor, seen: Seen, scaling: float, form: Form
) -> Tensor:
    """Do what `attend` does for the rows of one request.

    `keys` and `values` are [kv_heads, length, ..]."""
    n, width = query.shape[1:]
    if (
        query.device.type == "cpu"
        and query.dtype == torch.float32
        and form.plain
        and values.shape[2] == width
        and vector.fits(width)
        and jit.available()
    ):
        rows = query.transpose(0, 1)
        rows = rows if rows.stride(1) == width and rows.stride(2) == 1 else rows.contiguous()
        return _by_spans(rows, keys, values, seen.spans(form.window), scaling)
    places = seen.positions if form.slopes is not None else None
    if seen.in_order:
        order = seen.order(form.window)
        places = places[order] if places is not None else None
        nothing = order.new_zeros(1, 0, dtype=torch.bool)
        return _attend(query, keys[:, order], values[:, order], nothing, scaling, form, places)
    (start, unseen), size = (
        seen.unseen(form.window),
        max(1, SCORES // (len(query) * keys.shape[1])),
    )
    places = places[start:] if places is not None else None
    keys, values = keys[:, start:], values[:, start:]
    parts = [slice(begin, begin + size) for begin in range(0, n, size)]
    return torch.cat(
        [
            _attend(query[:, part], keys, values, unseen[part], scaling, form, places)
            for part in parts
        ]
    )


def _by_spans(
    rows: Tensor, keys: Tensor, values: Tensor, spans: Sequence[Span], scaling: float
) -> Tensor:
    """Return the attention of rows [n, heads, head_dim] on a CPU.

    A row's result is the same whatever rows are in its span."""
    made = [
        vector.attend(
            rows if span.rows is None else rows[span.rows],
            keys[:, span.start :] if span.start else keys,
            values[:, span.start :] if span.start else values,
            span.base,
            span.slots,
            span.counts,
            scaling,
        )
        for span in spans
    ]
    if len(made) == 1:
        return made[0]
    out = torch.empty(rows.shape)
    for span, some in zip(spans, made, strict=True):
        out[span.rows] = some
    return out


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    unseen: Tensor,
    scaling: float,
    form: Form,
    places: Tensor | None,
) -> Tensor:
    """Do the same for rows on any device.

    `unseen` (bool [n, t]) tells which of the last t rows of the cache each row must not see.
    `places` (int64 [length]) are the positions of the cache's rows, if the form needs them."""
    heads, n, width = query.shape
    groups, length, _ = keys.shape
    stacked = (query * scaling).reshape(groups, heads // groups * n, width)
    scores = torch.bmm(stacked, keys.transpose(1, 2)).view(heads, n, length)
    if form.cap is not None:
        scores = form.cap * torch.tanh(scores / form.cap)
    if form.slopes is not None and places is not None:
        scores += (form.slopes.to(places.device)[:, None] * places)[:, None].to(scores.dtype)
    masked = scores[:, :, length - unseen.shape[1] :]
    # the fill is finite, so that a dead row that sees nothing stays a number
    masked.masked_fill_(unseen, torch.finfo(scores.dtype).min)
    softmaxed = torch.float64 if scores.dtype == torch.float64 else torch.float32
    if form.sinks is not None:
        sinks = form.sinks.to(scores.dtype)[:, None, None].expand(heads, n, 1)
        scores = torch.cat([scores, sinks], -1)
    weights = torch.softmax(scores, -1, dtype=softmaxed).to(values.dtype)[..., :length]
    weights = weights.reshape(groups, heads // groups * n, length)
    return torch.bmm(weights, values).view(heads, n, values.shape[2]).transpose(0, 1)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Sequence[Tensor],
    value: Sequence[Tensor],
    attention_mask: Sequence[Seen],
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return the attention [1, n, heads, head_dim] of a query [1, heads, n, head_dim].

    Transformers' layers call this."""
    form = Form(sliding_window, softcap, s_aux)
    return attend(query[0], key, value, attention_mask, scaling, form)[None], None


@cache
def implementation() -> str:
    """Return the name by which a config asks for this attention; import transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register("flowspec", _interface)
    return "flowspec"
