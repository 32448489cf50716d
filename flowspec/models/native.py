"""A decoder layer of the Llama kind on a CPU, for a few rows: transformers' layer with nothing between its products but our vector code.

It is made of transformers' own layer, which stays the description of the family (norms of queries and keys, biases) and is the oracle
of its tests. For one row the layer as transformers computes it spends as long between the products as in them, if these are small.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowspec.models import vector
from flowspec.models.attention import Seen, attend
from flowspec.models.cache import RowCache
from flowspec.models.kernels import WIDTH, PackedLinear, stacked


def suits(layer: nn.Module, config: Any) -> bool:
    """A layer whose matrices are packed, of whole vectors, with a gated MLP of silu."""
    linears = [getattr(getattr(layer, part, None), name, None) for part, names in _MATRICES.items() for name in names]
    widths = [head_dim(config), config.hidden_size, config.intermediate_size]
    packed = all(isinstance(linear, PackedLinear) and linear.out_features % WIDTH == 0 for linear in linears)
    return packed and config.hidden_act == "silu" and all(map(vector.fits, widths))


_MATRICES = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


class NativeLayer(nn.Module):
    """Called as transformers' layers are, with `Seen` as the mask: x [1, n, hidden] float32 -> the same."""

    def __init__(self, layer: Any, config: Any):
        super().__init__()
        attention, mlp = layer.self_attn, layer.mlp
        self.index, self.scaling = attention.layer_idx, attention.scaling
        self.width, self.heads, self.kv_heads = head_dim(config), config.num_attention_heads, config.num_key_value_heads
        self.eps = config.rms_norm_eps
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv = stacked([attention.q_proj, attention.k_proj, attention.v_proj])
        self.q_norm, self.k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.out, self.down = attention.o_proj, mlp.down_proj
        self.gate_up = stacked([mlp.gate_proj, mlp.up_proj])

    def forward(
        self, x: Tensor, attention_mask: Seen, position_embeddings: tuple[Tensor, Tensor], past_key_values: RowCache, **_
    ) -> Tensor:
        n, heads, kv, width = x.shape[1], self.heads, self.kv_heads, self.width
        entered = x[0]
        rows = self.qkv(self._norm(self.before, entered)).view(n, heads + 2 * kv, width)
        query, key, value = rows.split((heads, kv, kv), 1)
        if self.q_norm is None or self.k_norm is None:
            turned = _turned(rows[:, : heads + kv], *position_embeddings)
        else:
            query, key = self._norm(self.q_norm, query), self._norm(self.k_norm, key)
            turned = _turned(torch.cat((query, key), 1), *position_embeddings)
        query, key = turned.split((heads, kv), 1)
        keys, values = past_key_values.update(key.transpose(0, 1)[None], value.transpose(0, 1)[None], self.index)
        seen = attend(query.transpose(0, 1), keys[0], values[0], attention_mask, self.scaling)
        middle = self.out(seen.view(n, heads * width)).add_(entered)
        gate, up = self.gate_up(self._norm(self.between, middle)).chunk(2, 1)
        return self.down(vector.gated(gate, up)).add_(middle)[None]

    def _norm(self, norm: nn.Module, x: Tensor) -> Tensor:
        """Over the last dimension."""
        if isinstance(norm, nn.Identity):
            return x
        return vector.norm(x.reshape(-1, x.shape[-1]), norm.weight, self.eps).view(x.shape)  # type: ignore[arg-type]


def _turned(rows: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on rows [n, heads, width], halves as in Llama; cos, sin: [1, n, width]."""
    first, second = rows.chunk(2, -1)
    return rows * cos[0][:, None] + torch.cat((-second, first), -1) * sin[0][:, None]
