"""What the members of a tensor-parallel stage do together, over three exchanges of its links.

All members call the same functions in the same order. A member can ask for the forward under way
to be abandoned: its wish travels as one number more of what is exchanged anyway, so all members
learn of it at the same point, and no message is needed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.comm.base import Links
from flowspec.core.topology import Shard

FEW = 1 << 14
"""A sum of so few numbers is made of whole copies, which takes one exchange instead of two."""


class Summed(NamedTuple):
    """A Summed is the sum of all members' tensors."""

    total: Tensor
    abandon: bool
    """A member wishes to abandon the forward."""


def summed(links: Links, own: Tensor, abandon: bool = False) -> Summed:
    """Return the sum of every member's `own`, [n, width], which is the same, to the bit, on all.

    This is an all-reduce. Half-precision numbers are added in float32. An element is added up in
    the order of the members wherever its row lies, so a row's sum does not depend on the rows
    around it. For many numbers each member adds up a part of the columns: it sends and receives
    2 (T - 1) / T times the bytes of `own` as in a ring, in two exchanges."""
    if own.numel() <= FEW or own.shape[1] % links.size:
        parts = links.gathered(_with(own.flatten(), abandon))
        total = _added([part[:-1] for part in parts]).view(own.shape)
        return Summed(total, any(bool(part[-1]) for part in parts))
    n, columns = len(own), own.shape[1] // links.size
    blocks = own.view(n, links.size, columns).transpose(0, 1).contiguous()
    added = _added([*links.swapped(blocks)])
    parts = links.gathered(_with(added.flatten(), abandon))
    total = torch.cat([part[:-1].view(n, columns) for part in parts], 1)
    return Summed(total, any(bool(part[-1]) for part in parts))


def _with(numbers: Tensor, abandon: bool) -> Tensor:
    """Return flat numbers with the wish behind them."""
    return torch.cat([numbers, numbers.new_full((1,), float(abandon))])


def _added(parts: Sequence[Tensor]) -> Tensor:
    dtype = parts[0].dtype
    total = parts[0].to(torch.float32 if dtype.itemsize < 4 else dtype, copy=True)
    for part in parts[1:]:
        total += part
    return total.to(dtype)


class Piece(NamedTuple):
    """A piece is the rows of one member, on their way round the ring of members."""

    member: int
    rows: Tensor
    abandon: bool
    """This member wishes to abandon the forward."""


def pieces_gathered(links: Links, own: Tensor, n: int, abandon: bool = False) -> Iterator[Piece]:
    """Yield every member's rows of [n, width], its own first, while the next are on their way.

    This is a ring all-gather; member m has the m-th near equal part of the n rows, perhaps
    none."""
    held, at = _with(own.flatten(), abandon), links.index
    for step in range(links.size):
        before = (at - 1) % links.size
        rows = len(Shard(before, links.size).of(n))
        into = held.new_empty(rows * own.shape[1] + 1)
        more = step + 1 < links.size
        arrived = links.passed(held, into) if more else None
        yield Piece(at, held[:-1].view(-1, own.shape[1]), bool(held[-1]))
        if arrived:
            arrived()
            held, at = into, before


def pieces_summed(links: Links, n: int, piece: Callable[[int], Tensor]) -> Tensor:
    """Return the sum over all members of `piece(m)`, for m this member: its rows of [n, width].

    This is a ring reduce-scatter: a member computes `piece(m)` while the sum of what others have
    for m is on its way to it."""
    at = (links.index - 1) % links.size
    total = piece(at)
    for _ in range(links.size - 1):
        at = (at - 1) % links.size
        into = total.new_empty(len(Shard(at, links.size).of(n)), total.shape[1])
        arrived = links.passed(total, into)
        own = piece(at)
        arrived()
        total = into.add_(own)
    return total
