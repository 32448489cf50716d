"""Rejection keeps of what was drafted as much as leaves the target's own distribution.

These are the rules of speculative decoding (Leviathan et al. 2023, arXiv 2211.17192, algorithm 1)
and of speculative sampling (Chen et al. 2023, arXiv 2302.01318, algorithm 2): a token x that was
drawn from q is kept with probability min(1, p(x) / q(x)); in the place of the first that is not,
one is drawn from norm(max(0, p - q)); behind a draft of which all were kept, one more is drawn
from p. The two papers differ in nothing that is drawn. Texts advance independently, a row each.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Kept(NamedTuple):
    """Kept is what becomes of the drafts of B texts."""

    accepted: Tensor
    """So many of the drafted tokens are text, int64 [B]."""
    token: Tensor
    """This token follows them, int64 [B]."""


def reject(p: Tensor, q: Tensor, drafted: Tensor, generator: torch.Generator | None = None) -> Kept:
    """Return which of the `drafted` tokens [B, n] are kept, and what follows them.

    `q` [B, n, vocabulary] are the distributions from which they were drawn, and `p`
    [B, n + 1, vocabulary] the target's at these places and at the next. All are probabilities."""
    each = torch.arange(len(drafted))
    at = drafted[..., None]
    chance = torch.rand(drafted.shape, generator=generator, dtype=p.dtype)
    kept = chance * q.gather(2, at)[..., 0] < p[:, :-1].gather(2, at)[..., 0]
    accepted = kept.long().cumprod(1).sum(1)
    # behind the last place nothing was drafted: there max(0, p - q) is p
    unmatched = torch.cat([q, torch.zeros_like(p[:, :1])], 1)[each, accepted]
    left = (p[each, accepted] - unmatched).clamp(min=0)
    # p = q but for their rounding: then nothing is left to draw from, and p is as good
    left = torch.where(left.sum(1, keepdim=True) > 0, left, p[each, accepted])
    return Kept(accepted, torch.multinomial(left, 1, generator=generator)[:, 0])
