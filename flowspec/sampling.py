"""Keyed sampling: which token a distribution yields is a pure function of (seed, absolute position, logits).

Gumbel-max (Gumbel 1954; Maddison et al. 2014): argmax of log p(t) + g(t) with independent Gumbel noise g is a draw
from p. Here g is counter-based, a hash of (seed, position, token): the same on every rank, device and batch
shape. So whatever was drafted and by whichever method the text was made, it is the same text.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from flowspec.core.request import Sampling

_M32 = (1 << 32) - 1


# ---- noise -----------------------------------------------------------------------------------------
def _mix(x: int) -> int:
    """Avalanche of a 32-bit integer (two multiply-xorshift rounds)."""
    x &= _M32
    x ^= x >> 16
    x = x * 0x7FEB352D & _M32
    x ^= x >> 15
    x = x * 0x846CA68B & _M32
    return x ^ x >> 16


def _mix_tensor(x: Tensor) -> Tensor:
    """`_mix` over int32 (wrapping products; the masks make the shifts logical)."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * (0x846CA68B - (1 << 32))
    return x ^ ((x >> 16) & 0xFFFF)


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise of these tokens (any int shape) at an absolute position: float64 of the same shape."""
    low, high = seed & _M32, seed >> 32
    key = _mix(_mix(_mix(low) + high + 0x9E3779B9) + position)
    key = key - (1 << 32) if key >> 31 else key  # as int32
    bits = _mix_tensor(_mix_tensor(tokens.to(torch.int32) + key) ^ key)
    uniform = (bits.double() + 2147483648.5) * 2.0**-32  # in (0, 1)
    return -torch.log(-torch.log(uniform))


class NoiseRows:
    """The noise of a whole vocabulary by position, the last few positions kept (siblings share theirs)."""

    def __init__(self, seed: int, vocabulary: int, keep: int = 64):
        self.seed, self._keep = seed, keep
        self._tokens = torch.arange(vocabulary)
        self._rows: OrderedDict[int, Tensor] = OrderedDict()

    def __call__(self, position: int) -> Tensor:
        """float64 [vocabulary]"""
        row = self._rows.get(position)
        if row is None:
            row = self._rows[position] = gumbel(self.seed, position, self._tokens)
            if len(self._rows) > self._keep:
                self._rows.popitem(last=False)
        return row


def noise_for(sampling: Sampling, vocabulary: int) -> NoiseRows | None:
    """The noise of a request; None when it is greedy."""
    if sampling.temperature == 0:
        return None
    assert sampling.seed is not None, "a sampled request has a seed by now"
    return NoiseRows(sampling.seed, vocabulary)


# ---- filters ---------------------------------------------------------------------------------------
def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Log-probabilities after temperature, top-k, top-p, min-p: float64 [vocabulary], -inf where filtered out."""
    logp = _tempered(logits, sampling)
    return torch.log_softmax(logp.masked_fill(logp < _least(logp, sampling), -torch.inf), -1)


def _tempered(logits: Tensor, sampling: Sampling) -> Tensor:
    return torch.log_softmax(logits.double() / sampling.temperature, -1)


def _least(logp: Tensor, sampling: Sampling) -> float:
    """The smallest log-probability that passes all filters: each of them keeps the likeliest tokens, ties included.

    Top-p keeps a token while the mass strictly above it, of what top-k has left, is below p."""
    least, mass = -math.inf, 1.0
    if 0 < sampling.top_k < logp.numel():
        least = logp.topk(sampling.top_k).values[-1].item()
        mass = logp[logp >= least].exp().sum().item()
    if sampling.top_p < 1:
        least = max(least, _least_of_mass(logp, sampling.top_p * mass))
    if sampling.min_p > 0:
        least = max(least, logp.max().item() + math.log(sampling.min_p))
    return least


def _least_of_mass(logp: Tensor, mass: float) -> float:
    """The last of the likeliest tokens that together first reach `mass`. Sorts a few, and the whole vocabulary only if it must."""
    for size in (64, 1024, logp.numel()):
        values = logp.topk(min(size, logp.numel())).values
        p = values.exp()
        kept = int((p.cumsum(-1) - p < mass).sum())
        if kept < len(values):
            break
    return values[kept - 1].item()


# ---- picks -----------------------------------------------------------------------------------------
class Pick(NamedTuple):
    """A chosen token and how clear the choice was: the lead over the runner-up, in (perturbed) log-probability."""

    token: int
    gap: float


def pick(logits: Tensor, sampling: Sampling, noise: NoiseRows | None, position: int) -> Pick:
    """The token at `position` for these logits [vocabulary]: argmax without noise (greedy), else Gumbel-max after the filters."""
    if noise is None:
        scores = logits
    elif not sampling.filters:  # what normalises the distribution is the same for all tokens
        scores = logits.double() / sampling.temperature + noise(position)
    else:
        logp = _tempered(logits, sampling)
        scores = (logp + noise(position)).masked_fill(logp < _least(logp, sampling), -torch.inf)
    values, tokens = scores.topk(2)
    return Pick(int(tokens[0]), float(values[0] - values[1]))
