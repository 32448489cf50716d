"""Rejection keeps of what was drafted as much as leaves the target's own distribution.

The rule is that of speculative decoding (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1) and
of speculative sampling (Chen et al. 2023, arXiv 2302.01318, algorithm 2), which differ in nothing
that is drawn: a token x that was drawn from q is kept with probability min(1, p(x) / q(x)); in the
place of one that is not, a token is drawn from norm(max(0, p - q)). SpecInfer (Miao et al. 2023,
arXiv 2305.09781, algorithm 2) tries several tokens in rounds: after each rejected one, p becomes
norm(max(0, p - q)). Here they are drawn without replacement, so q becomes norm(q without x) as well
(Jeon et al. 2024, arXiv 2402.14160): no round is spent on a token that was rejected before.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Kept is what becomes of the tokens that were drafted at a place, in each of B texts."""

    which: Tensor
    """This one of them is text, int64 [B]; n if none is."""
    token: Tensor
    """It is this token, or one that is drawn in their place, int64 [B]."""


def draw(q: Tensor, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Return n tokens [B, n] that are drawn from q [B, vocabulary] without replacement, in turn.

    By the exponential race (Gumbel-top-k; Kool et al. 2019, arXiv 1903.06059) those of the n
    earliest arrivals, where a token comes at rate q, are such draws in their order. Where a q has
    fewer tokens, others stand behind them, which `reject` passes over."""
    waits = torch.empty_like(q).exponential_(generator=generator)
    return (q / waits).topk(n, sorted=True).indices


def reject(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator | None = None) -> Kept:
    """Return which of the `drafted` tokens [B, n] of a place is kept, or what is drawn instead.

    `q` [B, vocabulary] is the distribution from which they were drawn (by `draw`) and `p`
    [B, vocabulary] the target's. Both are probabilities. Where n is 0 a token is drawn from p."""
    rows = torch.arange(len(drafted))
    which = torch.full((len(drafted),), drafted.shape[1])
    for k, x in enumerate(drafted.unbind(1)):
        chance = torch.rand(len(x), generator=generator, dtype=p.dtype)
        kept = (q[rows, x] > 0) & (chance * q[rows, x] < p[rows, x])
        which = torch.where(kept & (which > k), k, which)
        p, q = _rest(p, q), _without(q, x)
    instead = torch.multinomial(p, 1, generator=generator)
    return Kept(which, torch.cat([drafted, instead], 1)[rows, which])


def _rest(p: Tensor, q: Tensor) -> Tensor:
    """Return norm(max(0, p - q))."""
    left = (p - q).clamp(min=0)
    mass = left.sum(1, keepdim=True)
    # p = q but for their rounding: then nothing is left to draw from, and p is as good
    return torch.where(mass > 0, left / mass, p)


def _without(q: Tensor, x: Tensor) -> Tensor:
    """Return norm(q without x); all are 0 where q is sure of x."""
    left = q.scatter(1, x[:, None], 0.0)
    return left / left.sum(1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
