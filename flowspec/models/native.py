"""A decoder layer of the Llama kind on a CPU, for a few rows: transformers' layer with nothing between its products but our vector code.

It is made of transformers' own layer, which stays the description of the family (norms of queries and keys, biases) and is the oracle
of its tests. For one row the layer as transformers computes it spends as long between the products as in them, if these are small.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowspec.models import vector
from flowspec.models.attention import Seen, attend
from flowspec.models.cache import Caches
from flowspec.models.kernels import WIDTH, PackedLinear, stacked


def suits(layer: nn.Module, config: Any) -> bool:
    """A layer whose matrices are packed, of whole vectors, with a gated MLP of silu."""
    linears = [
        getattr(getattr(layer, part, None), name, None)
        for part, names in _MATRICES.items()
        for name in names
    ]
    widths = [head_dim(config), config.hidden_size, config.intermediate_size]
    packed = [
        linear
        for linear in linears
        if isinstance(linear, PackedLinear) and linear.out_features % WIDTH == 0
    ]
    if (
        len(packed) < len(linears) or packed[0].in_features != config.hidden_size
    ):  # an EAGLE-3 layer's attention reads an embedding, too
        return False
    return config.hidden_act == "silu" and all(map(vector.fits, widths))


_MATRICES = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class NativeLayer(nn.Module):
    """Called as transformers' layers are, with `Seen` as the mask: x [1, n, hidden] float32 -> the same."""

    def __init__(self, layer: Any, config: Any):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scaling = attention.layer_idx, attention.scaling
        self.width, self.heads, self.kv_heads = (
            head_dim(config),
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.eps = config.rms_norm_eps
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = stacked([attention.q_proj, attention.k_proj, attention.v_proj])
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
        self.gate_up = stacked([mlp.gate_proj, mlp.up_proj])
        vector.prepare(self.width)
        weights = tuple(
            None if isinstance(norm, nn.Identity) else norm.weight
            for norm in (self.before, self.between)
        )
        self._held = (
            self.qkv,
            self.out,
            self.gate_up,
            self.down,
            *weights,
        )  # where a module's attributes are found at once

    def forward(
        self,
        x: Tensor,
        attention_mask: Sequence[Seen],
        position_embeddings: tuple[Tensor, Tensor],
        past_key_values: Caches,
        **_,
    ) -> Tensor:
        n, heads, kv, width = x.shape[1], self.heads, self.kv_heads, self.width
        qkv, project, gate_up, down, before, between = self._held
        entered = x[0]
        rows = qkv.products(self._normed(entered, before)).view(n, heads + 2 * kv, width)
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
        turned = _turned(both, *position_embeddings)
        key, value = (
            turned[:, heads:].transpose(0, 1)[None],
            rows[:, heads + kv :].transpose(0, 1)[None],
        )
        keys, values = past_key_values.update(key, value, self.index)
        seen = attend(turned[:, :heads].transpose(0, 1), keys, values, attention_mask, self.scaling)
        middle = project.products(seen.view(n, heads * width)).add_(entered)
        gate, up = gate_up.products(self._normed(middle, between)).chunk(2, 1)
        return down.products(vector.gated(gate, up)).add_(middle)[None]

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        """Over the last dimension; None: as it is."""
        if weight is None:
            return x
        return vector.norm(x.reshape(-1, x.shape[-1]), weight, self.eps).view(x.shape)


def _turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on rows [n, heads, width], by halves as in Llama; cos, sin: [n, 1, width], the first half of
    sin with its sign turned."""
    half = rows.shape[2] // 2
    return (rows * cos).add_(torch.cat((rows[..., half:], rows[..., :half]), -1).mul_(sin))


def turns(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """What `NativeLayer` takes, of what transformers' rotary embedding gives: [1, n, width] each."""
    half = sin.shape[2] // 2
    return cos[0][:, None], torch.cat((-sin[0, :, :half], sin[0, :, half:]), 1)[:, None]
