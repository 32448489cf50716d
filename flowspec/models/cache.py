"""A cache holds the key/value rows of a stage's layers.

Rows are appended at the end and gathered when dead rows have piled up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.core.stage import Admitted, Gather
from flowspec.models.device import placed


class RowCache:
    """A RowCache holds rows [0, length) of every layer.

    core/stage.py knows which row holds which token. A forward over n rows begins with `extend(n)`,
    which makes room in every layer at once and counts the rows. In layers that an abandoned forward
    never came to, these rows are there, unwritten, and seen by nobody. `update` has the signature
    that transformers' attention layers call."""

    STEP = 256
    """The buffers have room for at least so many rows more than are needed when they grow."""
    SHARE = 0.5
    """They also have room for at least this share of the needed rows more."""

    def __init__(self) -> None:
        self.length = self.capacity = 0
        self._keys: dict[int, Tensor] = {}  # layer -> [1, kv_heads, capacity, head_dim]
        self._values: dict[int, Tensor] = {}

    @classmethod
    def room(cls, length: int) -> int:
        """Return how many rows the buffers have when they grow for `length` rows."""
        return length + max(cls.STEP, int(cls.SHARE * length))

    def extend(self, rows: int) -> None:
        """Add so many rows at the end of every layer.

        Only here does a cache become longer, and only here do its buffers grow."""
        held, self.length = self.length, self.length + rows
        if self.length > self.capacity:
            self.capacity = self.room(self.length)
            for buffers in (self._keys, self._values):
                for layer, buffer in buffers.items():
                    buffers[layer] = _zeros(buffer, self.capacity)
                    buffers[layer][:, :, :held] = buffer[:, :, :held]

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """Write the n newest rows of a layer ([1, kv_heads, n, head_dim]).

        Return all its keys and all its values up to them."""
        for buffers, new in ((self._keys, keys), (self._values, values)):
            if layer not in buffers:
                buffers[layer] = _zeros(new, self.capacity)
            buffers[layer][:, :, self.length - new.shape[2] : self.length] = new
        return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

    @torch.inference_mode()
    def gather(self, gather: Gather) -> None:
        """Make rows [base, base + k) the k listed rows, and end the cache there."""
        end = gather.base + len(gather.rows)
        if buffers := [*self._keys.values(), *self._values.values()]:
            index = placed(torch.tensor(gather.rows, dtype=torch.long), buffers[0].device)
            for buffer in buffers:  # layers may be on several devices
                buffer[:, :, gather.base : end] = buffer[:, :, index.to(buffer.device)]
        self.length = end


class Part(NamedTuple):
    """A part is the consecutive rows of a forward that belong to one request, and their cache."""

    admitted: Admitted
    cache: RowCache

    @property
    def rows(self) -> int:
        """Return how many rows the part has."""
        return len(self.admitted.kept)


class Caches:
    """Caches are those of a forward's parts, all different; to its layers they are one cache."""

    def __init__(self, parts: Sequence[Part]):
        """Make each part's cache longer by the part's rows."""
        self._caches, self._counts = [part.cache for part in parts], [part.rows for part in parts]
        for cache, count in zip(self._caches, self._counts, strict=True):
            cache.extend(count)

    def update(
        self, keys: Tensor, values: Tensor, layer: int, *_: object
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Write a layer's n new rows ([1, kv_heads, n, head_dim]).

        Return all keys and all values of each part."""
        if len(self._caches) == 1:
            keys, values = self._caches[0].update(keys, values, layer)
            return [keys], [values]
        parts = zip(
            self._caches, keys.split(self._counts, 2), values.split(self._counts, 2), strict=True
        )
        held = [cache.update(key, value, layer) for cache, key, value in parts]
        return [keys for keys, _ in held], [values for _, values in held]


def split(rows: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """Return the rows of each part, as views; those of an only part are returned as they are."""
    return (rows,) if len(counts) == 1 else rows.split(list(counts))


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts' rows in one tensor, which is a copy if there are several parts."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _zeros(like: Tensor, rows: int) -> Tensor:
    """Return zeros [1, kv_heads, rows, head_dim].

    Rows that are left unwritten are masked, and must be finite for that."""
    return like.new_zeros(1, like.shape[1], rows, like.shape[3])
