"""Attention of a few new rows to a long cache, for the decoder layers of transformers (its `AttentionInterface`).

All rows see the committed rows of the cache, so only what lies behind them has a mask: a long context costs no mask.
Query heads that share a key/value head stand above one another as rows of one product with it (grouped-query attention,
arXiv 2305.13245), so no key or value is copied.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

SCORES = 1 << 21
"""at a time: more would leave the processor's caches (elements)"""


def attend(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * q k^T) v for n new rows over the whole cache; [n, heads, head_dim].

    query: [heads, n, head_dim]; keys, values: [kv_heads, length, head_dim]; hidden: bool [n, t], of the last t rows of the cache those
    that each must not see."""
    n = query.shape[1]
    size = max(1, SCORES // (len(query) * keys.shape[1]))
    if n <= size:
        return _attend(query, keys, values, hidden, scaling)
    parts = [slice(start, start + size) for start in range(0, n, size)]
    return torch.cat([_attend(query[:, part], keys, values, hidden[part], scaling) for part in parts])


def _attend(query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor, scaling: float) -> Tensor:
    heads, n, width = query.shape
    groups, length, _ = keys.shape
    stacked = (query * scaling).reshape(groups, heads // groups * n, width)
    scores = torch.bmm(stacked, keys.transpose(1, 2))
    masked = scores.view(heads, n, length)[:, :, length - hidden.shape[1] :]
    masked.masked_fill_(hidden, torch.finfo(scores.dtype).min)  # finite: a dead row that sees nothing stays a number
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(values.dtype)
    return torch.bmm(weights, values).view(heads, n, width).transpose(0, 1)


def _interface(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """What transformers' layers call: [1, heads, n, head_dim] in, [1, n, heads, head_dim] out; `attention_mask` is `hidden`."""
    assert attention_mask is not None, "a stage always says what is hidden"
    return attend(query[0], key[0], value[0], attention_mask, scaling)[None], None


@cache
def implementation() -> str:
    """The name by which a config asks for it; imports transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register("flowspec", _interface)
    return "flowspec"
