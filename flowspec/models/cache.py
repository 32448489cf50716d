"""The key/value rows of a stage's layers: append at the end, gather when dead rows have piled up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.core.stage import Admitted, Gather
from flowspec.models.device import placed


class RowCache:
    """Rows [0, length) of every layer; which row holds which token is core/stage.py's business.

    A forward over n rows begins with `extend(n)`, which makes room in every layer at once and counts the rows: in layers that an
    abandoned forward never came to they are there, unwritten, and seen by nobody. `update` has the signature that transformers'
    attention layers call."""

    STEP = 256
    """rows by which the buffers grow at least"""
    SHARE = 0.5
    """and of the rows needed"""

    def __init__(self) -> None:
        self.length = self.capacity = 0
        self._keys: dict[int, Tensor] = {}  # layer -> [1, kv_heads, capacity, head_dim]
        self._values: dict[int, Tensor] = {}

    @classmethod
    def room(cls, length: int) -> int:
        """Rows of the buffers when they grow for so many."""
        return length + max(cls.STEP, int(cls.SHARE * length))

    def extend(self, rows: int) -> None:
        """So many rows more, at the end of every layer: the one place where a cache becomes longer, and where its buffers grow."""
        held, self.length = self.length, self.length + rows
        if self.length > self.capacity:
            self.capacity = self.room(self.length)
            for buffers in (self._keys, self._values):
                for layer, buffer in buffers.items():
                    buffers[layer] = _zeros(buffer, self.capacity)
                    buffers[layer][:, :, :held] = buffer[:, :, :held]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write the n newest rows of a layer ([1, kv_heads, n, head_dim]); all its rows up to them."""
        for buffers, new in ((self._keys, keys), (self._values, values)):
            if layer not in buffers:
                buffers[layer] = _zeros(new, self.capacity)
            buffers[layer][:, :, self.length - new.shape[2] : self.length] = new
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    @torch.inference_mode()
    def gather(self, gather: Gather) -> None:
        """Rows [base, base + k) become the k listed rows, and the cache ends there."""
        end = gather.base + len(gather.rows)
        if buffers := [*self._keys.values(), *self._values.values()]:
            index = placed(torch.tensor(gather.rows, dtype=torch.long), buffers[0].device)
            for buffer in buffers:
                buffer[:, :, gather.base : end] = buffer[:, :, index]
        self.length = end


class Part(NamedTuple):
    """What of a forward's rows belongs to one request: consecutive rows, and where they go."""

    admitted: Admitted
    cache: RowCache

    @property
    def rows(self) -> int:
        """So many they are."""
        return len(self.admitted.kept)


class Caches:
    """The caches of a forward's parts, all different, in a cache's place towards its layers."""

    def __init__(self, parts: Sequence[Part]):
        """Each becomes longer by its part's rows."""
        self._caches, self._counts = [part.cache for part in parts], [part.rows for part in parts]
        for cache, count in zip(self._caches, self._counts, strict=True):
            cache.extend(count)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Write a layer's n new rows ([1, kv_heads, n, head_dim]); of each part all that it has."""
        if len(self._caches) == 1:
            keys, values = self._caches[0].update(keys, values, layer)
            return [keys], [values]
        parts = zip(
            self._caches, keys.split(self._counts, 2), values.split(self._counts, 2), strict=True
        )
        held = [cache.update(key, value, layer) for cache, key, value in parts]
        return [keys for keys, _ in held], [values for _, values in held]


def split(rows: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """The rows of each part, as views; those of an only part as they are."""
    return (rows,) if len(counts) == 1 else rows.split(list(counts))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The parts' rows in one tensor, which is a copy if there are several."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _zeros(like: Tensor, rows: int) -> Tensor:
    """[1, kv_heads, rows, head_dim]; zeros, because rows left unwritten are masked, and must be finite for that."""
    return like.new_zeros(1, like.shape[1], rows, like.shape[3])
