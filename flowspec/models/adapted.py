"""Some of transformers' layers are adapted here so that they can be stages' layers.

Bloom's attention asks for no attention of ours (transformers' `AttentionInterface`), GPT-2's
matrices are stored the other way round than those of `nn.Linear`, and DeepSeek's attention expands
what it holds in one cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowspec.models.attention import Form, Seen, attend
from flowspec.models.cache import Caches


class Turned(nn.Linear):
    """A Turned is a linear layer whose matrix is stored as [in, out], the transpose of its own."""


def as_held(module: nn.Module, leaf: str, stored: Tensor) -> Tensor:
    """Return what a module holds under this name, made of what a checkpoint stores."""
    return stored.T.contiguous() if isinstance(module, Turned) and leaf == "weight" else stored


class AlibiLayer(nn.Module):
    """An AlibiLayer is Bloom's decoder layer, called as the others are.

    Heads prefer near tokens by a bias of the score, linear in the distance (ALiBi, arXiv
    2108.12409)."""

    slopes: Tensor

    def __init__(self, layer: Any):
        super().__init__()
        self.input_layernorm, self.self_attention, self.post_attention_layernorm, self.mlp = (
            layer.input_layernorm,
            layer.self_attention,
            layer.post_attention_layernorm,
            layer.mlp,
        )
        self._normed_residual = layer.apply_residual_connection_post_layernorm
        self.register_buffer("slopes", slopes(self.self_attention.num_heads), persistent=False)

    def forward(
        self, x: Tensor, attention_mask: Sequence[Seen], past_key_values: Caches, **_
    ) -> Tensor:
        attention = self.self_attention
        normed = self.input_layernorm(x)
        query, key, value = attention._reshape(attention.query_key_value(normed))
        keys, values = past_key_values.update(key, value, attention.layer_idx)
        form = Form(slopes=self.slopes)
        mixed = attend(
            query[0], keys, values, attention_mask, attention.inv_norm_factor, form
        ).flatten(1)
        middle = attention.dense(mixed[None]) + (normed if self._normed_residual else x)
        normed = self.post_attention_layernorm(middle)
        return self.mlp(normed, normed if self._normed_residual else middle)


def slopes(heads: int) -> Tensor:
    """Return the heads' slopes, float32 [heads]: 2^(-8 k / n) of the next power of two n below.

    The heads beyond n have every other slope of 2 n heads."""
    below = 1 << (heads.bit_length() - 1)
    own = [2 ** (-8 * k / below) for k in range(1, below + 1)]
    more = [2 ** (-4 * k / below) for k in range(1, 2 * (heads - below) + 1, 2)]
    return torch.tensor([*own, *more])


def adapted(layer: nn.Module) -> nn.Module:
    """Return a decoder layer of transformers, on the meta device, as a stage's layer."""
    for name, module in [*layer.named_modules()]:
        if type(module).__name__ == "Conv1D":
            inputs, outputs = module.weight.shape
            layer.set_submodule(name, Turned(inputs, outputs, device="meta"))
        elif hasattr(module, "expand_kv"):
            module.expand_kv = _each(module.expand_kv)  # type: ignore[assignment,arg-type]
    return AlibiLayer(layer) if type(layer).__name__ == "BloomBlock" else layer


Expand = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _each(expand: Expand) -> Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Any, ...]]:
    """Return what makes keys and values of the latents that `Caches.update` gives, of each part.

    This is multi-head latent attention (arXiv 2405.04434)."""
    return lambda latents, turned: tuple(zip(*map(expand, latents, turned), strict=True))
