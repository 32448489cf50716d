"""A ParallelLayer is a decoder layer whose matrices are shared by the members of a stage.

Two ways of sharing have the same shards and the same cache. `Megatron` (arXiv 1909.08053) keeps
all rows on all members and adds up what they computed, twice a layer. `Galaxy` (arXiv 2405.17245)
keeps a part of the rows on each member: norms and residuals are computed of that part alone. All
rows are gathered for the matrix products, whose sums are scattered again, and each product of a
piece is computed while the next piece is on its way. Members whose part is empty take part in the
exchanges all the same, so any number of rows will do, and nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowspec.comm.base import Links
from flowspec.comm.collectives import pieces_gathered, pieces_summed, summed
from flowspec.core.topology import Shard
from flowspec.models.native import Around, Half, NativeLayer


class Sharing(Protocol):
    """A way of sharing computes halves of layers for one forward over n rows.

    Its state x is what a member holds between them; `abandon` becomes true for all members at once
    when one of them wishes so."""

    abandon: bool

    def enter(self, x: Tensor) -> Tensor:
        """Return the state for all rows [n, hidden]."""

    def half(self, x: Tensor, half: Half, around: Around, wish: bool = False) -> Tensor:
        """Return the state behind a half; `wish` says that this member wishes to abandon."""

    def rows(self, x: Tensor) -> Tensor:
        """Return all rows [n, hidden] of a state."""


class Megatron:
    """Every member holds all rows."""

    def __init__(self, links: Links, n: int):
        self._links, self.abandon = links, False

    def enter(self, x: Tensor) -> Tensor:
        return x

    def half(self, x: Tensor, half: Half, around: Around, wish: bool = False) -> Tensor:
        own = half.second(half.middle(half.first(half.norm(x)), around))
        total, self.abandon = summed(self._links, own, wish)
        return x + total

    def rows(self, x: Tensor) -> Tensor:
        return x


class Galaxy:
    """Every member holds its part of the rows."""

    def __init__(self, links: Links, n: int):
        self._links, self._n, self.abandon = links, n, False
        self._parts = [Shard(k, links.size).of(n) for k in range(links.size)]

    def enter(self, x: Tensor) -> Tensor:
        own = self._parts[self._links.index]
        return x[own.start : own.stop]

    def half(self, x: Tensor, half: Half, around: Around, wish: bool = False) -> Tensor:
        normed = half.norm(x) if len(x) else x
        entered = self._gathered(normed, half.first, wish)
        mixed = half.middle(entered, around)

        def piece(member: int) -> Tensor:
            part = self._parts[member]
            return (
                half.second(mixed[part.start : part.stop]) if part else x.new_empty(0, x.shape[1])
            )

        return x + pieces_summed(self._links, self._n, piece)

    def rows(self, x: Tensor) -> Tensor:
        return self._gathered(x, lambda rows: rows)

    def _gathered(
        self, own: Tensor, first: Callable[[Tensor], Tensor], wish: bool = False
    ) -> Tensor:
        """Return `first` of all rows, in their order."""
        made = {}
        for member, rows, abandon in pieces_gathered(self._links, own, self._n, wish):
            self.abandon = self.abandon or abandon
            if len(rows):
                made[member] = first(rows)
        return torch.cat([made[member] for member in sorted(made)])


Way = type[Megatron] | type[Galaxy]
"""This is how the members of a stage share a forward."""


class ParallelLayer(nn.Module):
    """A ParallelLayer is made of a shard of a layer, transformers' or native."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer, self.taken = layer, nn.ModuleList()
        if isinstance(layer, NativeLayer):
            self.halves = layer.halves()
        else:
            self.halves, self.taken = _taken_apart(layer)

    def forward(self, x: Tensor, sharing: Sharing, around: Around, wish: bool) -> Tensor:
        """Return the state behind the layer; it means nothing if it is abandoned on the way."""
        attention, mlp = self.halves
        x = sharing.half(x, attention, around, wish)
        return x if sharing.abandon else sharing.half(x, mlp, around)


class _Handed(nn.Module):
    """A _Handed stands for a product of transformers' attention that has been computed already."""

    value: Tensor

    def forward(self, _: Tensor) -> Tensor:
        return self.value


def _taken_apart(layer: Any) -> tuple[tuple[Half, Half], nn.ModuleList]:
    """Return the halves of one of transformers' layers, and the products its attention loses."""
    attention, mlp = layer.self_attn, layer.mlp
    names = ("q_proj", "k_proj", "v_proj")
    products, handed, out = [getattr(attention, name) for name in names], [], attention.o_proj
    for name in names:
        handed.append(_Handed())
        setattr(attention, name, handed[-1])
    attention.o_proj = nn.Identity()
    widths = [product.out_features for product in products]

    def mixed(rows: Tensor, around: Around) -> Tensor:
        for each, value in zip(handed, rows.split(widths, 1), strict=True):
            each.value = value[None]
        return attention(
            hidden_states=rows[None],
            position_embeddings=around.turns,
            position_ids=around.positions,
            attention_mask=around.seen,
            past_key_values=around.caches,
        )[0][0]

    def first(rows: Tensor) -> Tensor:
        return torch.cat([product(rows) for product in products], 1)

    feed = Half(
        layer.post_attention_layernorm,
        lambda rows: rows,
        lambda rows, _: rows,
        lambda rows: mlp(rows[None])[0],
    )
    taken = nn.ModuleList([*products, out])
    return (Half(layer.input_layernorm, first, mixed, out), feed), taken


def embedded(links: Links, weight: nn.Embedding, vocabulary: int, tokens: Tensor) -> Tensor:
    """Return the embeddings [n, hidden] of tokens (int [n]); each member holds a part of them."""
    own = Shard(links.index, links.size).of(vocabulary)
    mine = (tokens >= own.start) & (tokens < own.stop)
    rows = weight((tokens - own.start).clamp(0, len(own) - 1)) * mine[:, None]
    return summed(links, rows).total
