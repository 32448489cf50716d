"""A NativeLayer is a decoder layer of the Llama kind on a CPU, for a few rows.

It is transformers' layer with nothing between its products but our vector code. It is made of
transformers' own layer, which stays the description of the family (norms of queries and keys,
biases) and is the oracle of its tests. For one row the layer as transformers computes it spends as
long between the products as in them, if these are small.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowspec.models import vector
from flowspec.models.attention import Form, Seen, attend
from flowspec.models.cache import Caches
from flowspec.models.families import FAMILIES
from flowspec.models.fourbit import Beside, FourBitLinear
from flowspec.models.kernels import WIDTH, PackedLinear, stacked


def suits(layer: nn.Module, config: Any) -> bool:
    """Return whether a NativeLayer can be made of this layer.

    It must be of Llama's kind, its matrices packed (or of four bits) and of whole vectors, and its
    MLP gated by silu."""
    if not FAMILIES[config.model_type].llama:
        return False
    linears = [
        getattr(getattr(layer, part, None), name, None)
        for part, names in _MATRICES.items()
        for name in names
    ]
    widths = [head_dim(config), config.hidden_size, config.intermediate_size]
    packed = [
        linear
        for linear in linears
        if isinstance(linear, PackedLinear | FourBitLinear) and linear.out_features % WIDTH == 0
    ]
    # an EAGLE-3 layer's attention reads an embedding, too
    if len(packed) < len(linears) or packed[0].in_features != config.hidden_size:
        return False
    return config.hidden_act == "silu" and all(map(vector.fits, widths))


_MATRICES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class Around(NamedTuple):
    """Around is what attention reads beside its rows."""

    seen: Sequence[Seen]
    turns: tuple[Tensor, Tensor] | None
    """The rotary positions, as the layers take them; None in a family without."""
    caches: Caches
    positions: Tensor
    """The rows' positions, int64 [1, n]."""


class Half(NamedTuple):
    """A half of a layer is attention or the MLP: norm, products, what is between, products.

    `first` and `second` treat each row [n, ..] by itself, and `second` gives this member's part of
    a sum."""

    norm: Callable[[Tensor], Tensor]
    first: Callable[[Tensor], Tensor]
    middle: Callable[[Tensor, Around], Tensor]
    second: Callable[[Tensor], Tensor]


class NativeLayer(nn.Module):
    """A NativeLayer is called as transformers' layers are, with `Seen` as the mask.

    It maps x, float32 [1, n, hidden], to the same shape."""

    def __init__(self, layer: Any, config: Any):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scaling = attention.layer_idx, attention.scaling
        self.width, self.heads, self.kv_heads = (
            head_dim(config),
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        # where layers are not of several kinds; what a family does not know means nothing
        every = config.sliding_window if hasattr(type(config), "sliding_window") else None
        self.form = Form(getattr(attention, "sliding_window", every))
        self.eps = config.rms_norm_eps
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = _beside([attention.q_proj, attention.k_proj, attention.v_proj])
        self.q_norm, self.k_norm = (
            getattr(attention, "q_norm", None),
            getattr(attention, "k_norm", None),
        )
        self.normed_heads = (
            None
            if self.q_norm is None or self.k_norm is None
            else (self.q_norm.weight, self.k_norm.weight)
        )
        self.out, self.down = attention.o_proj, mlp.down_proj
        self.gate_up = _beside([mlp.gate_proj, mlp.up_proj])
        vector.prepare(self.width)
        weights = tuple(
            None if isinstance(norm, nn.Identity) else norm.weight
            for norm in (self.before, self.between)
        )
        # in a tuple a module's attributes are found at once
        self._held = (self.qkv, self.out, self.gate_up, self.down, *weights)

    def forward(
        self,
        x: Tensor,
        attention_mask: Sequence[Seen],
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Caches,
        **_,
    ) -> Tensor:
        qkv, project, gate_up, down, before, between = self._held
        entered = x[0]
        products = qkv.products(self._normed(entered, before))
        seen = self._mixed(products, attention_mask, position_embeddings, past_key_values)
        middle = project.products(seen).add_(entered)
        products = gate_up.products(self._normed(middle, between))
        return down.products(vector.gated(*products.chunk(2, 1))).add_(middle)[None]

    def halves(self) -> tuple[Half, Half]:
        """Return the layer's attention and its MLP, for members that share it (parallel.py)."""
        qkv, project, gate_up, down, before, between = self._held
        return (
            Half(
                lambda x: self._normed(x, before),
                qkv.products,
                lambda products, around: self._mixed(products, *around[:3]),
                project.products,
            ),
            Half(
                lambda x: self._normed(x, between),
                gate_up.products,
                lambda products, _: vector.gated(*products.chunk(2, 1)),
                down.products,
            ),
        )

    def _mixed(
        self,
        products: Tensor,
        seen: Sequence[Seen],
        turns: tuple[Tensor, Tensor] | None,
        caches: Caches,
    ) -> Tensor:
        """Return what the rows see of their caches, [n, heads * width], of their queries, keys and
        values [n, (heads + 2 kv_heads) * width]."""
        n, heads, kv, width = len(products), self.heads, self.kv_heads, self.width
        rows = products.view(n, heads + 2 * kv, width)
        both = rows[:, : heads + kv]
        if self.normed_heads is not None:
            query, key = both.split((heads, kv), 1)
            both = torch.cat(
                [
                    self._normed(query, self.normed_heads[0]),
                    self._normed(key, self.normed_heads[1]),
                ],
                1,
            )
        assert turns is not None
        turned = _turned(both, *turns)
        key, value = (
            turned[:, heads:].transpose(0, 1)[None],
            rows[:, heads + kv :].transpose(0, 1)[None],
        )
        keys, values = caches.update(key, value, self.index)
        query = turned[:, :heads].transpose(0, 1)
        mixed = attend(query, keys, values, seen, self.scaling, self.form)
        return mixed.view(n, heads * width)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Return x normed over the last dimension; as it is if `weight` is None."""
        if weight is None:
            return x
        return vector.norm(x.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape)


def _beside(layers: list[Any]) -> PackedLinear | Beside:
    """Return one layer whose outputs are those of the given ones, side by side."""
    packed = all(isinstance(layer, PackedLinear) for layer in layers)
    return stacked(layers) if packed else Beside(layers)


def _turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return rows [n, heads, width] with rotary positions (arXiv 2104.09864).

    They are turned by halves as in Llama. `cos` and `sin` are [n, 1, width], with the sign of the
    first half of `sin` changed."""
    half = rows.shape[2] // 2
    return (rows * cos).add_(torch.cat((rows[..., half:], rows[..., :half]), -1).mul_(sin))


def turns(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cos and sin that `NativeLayer` takes.

    They are made of what transformers' rotary embedding gives, [1, n, width] each."""
    half = sin.shape[2] // 2
    return cos[0][:, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), 1)[:, None]
