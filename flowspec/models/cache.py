"""The key/value rows of a stage's layers: append at the end, gather when dead rows have piled up."""

from __future__ import annotations

import torch
from torch import Tensor

from flowspec.core.stage import Gather
from flowspec.models.device import placed


class RowCache:
    """Rows [0, length) of every layer; which row holds which token is core/stage.py's business.

    `update` has the signature that transformers' attention layers call."""

    STEP = 256
    """rows by which the buffers grow at least"""

    def __init__(self) -> None:
        self.length = 0
        self._keys: dict[int, Tensor] = {}  # layer -> [1, kv_heads, capacity, head_dim]
        self._values: dict[int, Tensor] = {}

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write n new rows ([1, kv_heads, n, head_dim]) behind the last; all rows up to them. `advance` makes them count."""
        end = self.length + keys.shape[2]
        for buffers, new in ((self._keys, keys), (self._values, values)):
            buffers[layer] = _room(buffers.get(layer), new, self.length, end)
            buffers[layer][:, :, self.length : end] = new
        return self._keys[layer][:, :, :end], self._values[layer][:, :, :end]

    def advance(self, rows: int) -> None:
        self.length += rows

    @torch.inference_mode()
    def gather(self, gather: Gather) -> None:
        """Rows [base, base + k) become the k listed rows, and the cache ends there."""
        end = gather.base + len(gather.rows)
        if buffers := [*self._keys.values(), *self._values.values()]:
            index = placed(torch.tensor(gather.rows, dtype=torch.long), buffers[0].device)
            for buffer in buffers:
                buffer[:, :, gather.base : end] = buffer[:, :, index]
        self.length = end


def _room(buffer: Tensor | None, like: Tensor, length: int, end: int) -> Tensor:
    """A buffer of at least `end` rows that keeps the first `length`."""
    if buffer is not None and buffer.shape[2] >= end:
        return buffer
    rows = max(end + RowCache.STEP, 0 if buffer is None else buffer.shape[2] * 3 // 2)
    grown = like.new_zeros(1, like.shape[1], rows, like.shape[3])  # rows that an abandoned forward left unwritten: masked, but finite
    if buffer is not None:
        grown[:, :, :length] = buffer[:, :, :length]
    return grown
