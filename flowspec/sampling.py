"""Sampling is keyed: the token is a pure function of (seed, absolute position, logits).

By Gumbel-max (Gumbel 1954; Maddison et al. 2014), the argmax of log p(t) + g(t) with independent
Gumbel noise g is a draw from p. Here g is counter-based, a hash of (seed, position, token), so it
is the same on every rank, device and batch shape. So whatever was drafted and by whichever method
the text was made, it is the same text.

A pick costs about one pass over the logits: the filters sort few of them, and only tokens that can
still win get exact noise. All that decides is computed in float64 from the logits as they are
(float32 or wider). Of exact equals the lowest id wins.

Biases and penalties change logits before that. A penalty counts tokens of the text before the
token, in a tree those of the node's path, so the pick is a pure function still, of the path too.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowspec.core.past import Past, adjust
from flowspec.core.request import Sampling

_M32 = (1 << 32) - 1


# ---- noise ---------------------------------------------------------------------------------------
def _mix(x: int) -> int:
    """Return a 32-bit integer with its bits mixed (two multiply-xorshift rounds)."""
    x &= _M32
    x ^= x >> 16
    x = x * 0x7FEB352D & _M32
    x ^= x >> 15
    x = x * 0x846CA68B & _M32
    return x ^ x >> 16


def _mix_all(x: np.ndarray) -> np.ndarray:
    """Mix each of these uint32 as `_mix` does, in place (products wrap), and return them."""
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


def _bits(seed: int, position: int, tokens: np.ndarray) -> np.ndarray:
    """Return the hash of (seed, position, token) for these tokens (ints of any shape).

    It is uint32 of the same shape; b stands for a uniform number of (b + 1/2) / 2^32."""
    low, high = seed & _M32, seed >> 32
    key = np.uint32(_mix(_mix(_mix(low) + high + 0x9E3779B9) + position))
    x = tokens.astype(np.uint32)
    x += key
    x = _mix_all(x)
    x ^= key
    x = _mix_all(x)
    x ^= np.uint32(1 << 31)
    return x


def _gumbel(bits: np.ndarray) -> np.ndarray:
    """Return the standard Gumbel noise, float64, of uniform bits."""
    # it is in (0, 1); torch's logarithm is the same for one number and for many
    uniform = torch.from_numpy((bits + 0.5) * 2.0**-32)
    return (-torch.log(-torch.log(uniform))).numpy()


def gumbel(seed: int, position: int, tokens: Tensor) -> Tensor:
    """Return the standard Gumbel noise of these tokens at an absolute position.

    The tokens are ints of any shape; the noise is float64 of the same shape."""
    return torch.from_numpy(_gumbel(_bits(seed, position, tokens.numpy())))


class NoiseRows:
    """NoiseRows are the noise of a whole vocabulary by position.

    The rows of the last few positions are kept, since siblings share theirs."""

    def __init__(self, seed: int, vocabulary: int, keep: int = 64):
        self.seed, self._keep = seed, keep
        self._tokens = torch.arange(vocabulary)
        self._rows: OrderedDict[int, Tensor] = OrderedDict()

    def __call__(self, position: int) -> Tensor:
        """Return the noise at this position, float64 [vocabulary]."""
        row = self._rows.get(position)
        if row is None:
            row = self._rows[position] = gumbel(self.seed, position, self._tokens)
            if len(self._rows) > self._keep:
                self._rows.popitem(last=False)
        return row


def settled(sampling: Sampling, room: int, later: int = 0) -> Sampling:
    """Return how a request is sampled: with a seed, and at most `room` new tokens.

    The seed is drawn if none is asked for, else it is so much later than the asked one."""
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed + later
    most = min(sampling.max_new_tokens, room)
    return dataclasses.replace(sampling, seed=seed, max_new_tokens=most)


def noise_for(sampling: Sampling, vocabulary: int) -> NoiseRows | None:
    """Return the noise of a request; None when the request is greedy."""
    if sampling.temperature == 0:
        return None
    assert sampling.seed is not None, "a sampled request has a seed by now"
    return NoiseRows(sampling.seed, vocabulary)


# ---- biases and penalties ------------------------------------------------------------------------
def adjusted(logits: Tensor, sampling: Sampling, past: Past | None) -> Tensor:
    """Return the logits [vocabulary] after biases and penalties, float64.

    They are as they were if there are none. The logits are on the host."""
    return torch.from_numpy(adjust(logits.numpy(), sampling, past)) if sampling.adjusts else logits


def logprobs_of(logits: Tensor, token: int, top: int) -> Logprobs:
    """Return the log-probabilities of a token and of so many of the likeliest tokens.

    They are of these logits [vocabulary] on the host, of any floating-point type."""
    found = torch.log_softmax(logits.double(), -1)
    values, tokens = found.topk(min(top, len(found)))
    likeliest = zip(tokens.tolist(), values.tolist(), strict=True)
    return Logprobs(float(found[token]), tuple(likeliest))


# ---- filters -------------------------------------------------------------------------------------
def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probabilities after temperature, top-k, top-p and min-p, float64 [vocabulary].

    They are -inf for tokens that are filtered out."""
    x = _exact(logits)
    out = torch.from_numpy(x < _least(x, sampling))
    return torch.log_softmax(
        (logits.double() / sampling.temperature).masked_fill(out, -torch.inf), -1
    )


def _exact(logits: Tensor) -> np.ndarray:
    """Return the same numbers in float32, or in float64 if they are float64."""
    return logits.numpy() if logits.dtype == torch.float64 else logits.float().numpy()


def _least(x: np.ndarray, sampling: Sampling) -> float:
    """Return the smallest logit that passes all filters.

    Each filter keeps the likeliest tokens, ties included. Top-p keeps a token while the mass
    strictly above it, of what top-k has left, is below p."""
    least, top = -math.inf, float(x.max())
    if 0 < sampling.top_k < len(x):
        least = float(_largest(x, sampling.top_k)[-1])
        x = x[~(x < least)]
    if sampling.top_p < 1:
        least = _least_of_mass(x, top, sampling.temperature, sampling.top_p)
    if sampling.min_p > 0:
        least = max(least, top + sampling.temperature * math.log(sampling.min_p))
    return least


def _mass(x: np.ndarray, top: float, temperature: float) -> np.ndarray:
    """Return the probabilities of logits, float64 of the same shape.

    All are multiplied by the number that makes the probability 1 at the logit `top`."""
    return torch.from_numpy(x.astype(np.float64)).sub_(top).div_(temperature).exp_().numpy()


BIN = 1 / 64
"""A bin has this width in log-probability."""
BINS = 64 * 64


def _least_of_mass(x: np.ndarray, top: float, temperature: float, share: float) -> float:
    """Return the last logit of the likeliest tokens that first reach this share of the mass.

    Where the 64 likeliest do not reach it, tokens are counted into bins by how far they lie below
    the top, and only the bin in which the share is reached is sorted."""
    p = _mass(x, top, temperature)
    mass, before, values = share * float(p.sum()), 0.0, _largest(x, 64)
    if _mass(values, top, temperature).sum() < mass:
        fall = np.minimum((top - x) * (1 / (BIN * temperature)), BINS - 1).astype(np.int64)
        sums = np.bincount(fall, weights=p)
        above = sums.cumsum() - sums
        border = np.flatnonzero(above < mass)[-1]
        before, values = above[border], np.sort(x[fall == border])[::-1].copy()
    p = _mass(values, top, temperature)
    kept = int((before + p.cumsum() - p < mass).sum())
    return float(values[kept - 1])


def _largest(x: np.ndarray, k: int) -> np.ndarray:
    """Return the k largest numbers, from the top (all if there are fewer).

    At least k numbers are as large as the k-th largest of the blocks' maxima, so smaller ones are
    left out before the sort."""
    width = len(x) // (4 * k)
    if width > 1:
        maxima = _blocks(x, width).max(1)
        x = x[~(x < np.partition(maxima, -k)[-k])]
    return np.sort(x)[::-1][:k].copy()


def _blocks(x: np.ndarray, width: int) -> np.ndarray:
    """Return x as blocks [n, width], without what is left over at the end."""
    n = len(x) // width
    return x[: n * width].reshape(n, width)


# ---- picks ---------------------------------------------------------------------------------------
class Logprobs(NamedTuple):
    """Logprobs are what the target makes of a token, in log-probability.

    They are of its logits as they are, before anything is done to them for a pick."""

    own: float
    """That of the token itself."""
    top: tuple[tuple[int, float], ...] = ()
    """These are the likeliest tokens and theirs, from the top."""


class Pick(NamedTuple):
    """A pick is a chosen token and how clear the choice was.

    The gap is its lead over the second best, in (perturbed) log-probability."""

    token: int
    gap: float


def pick(logits: Tensor, sampling: Sampling, noise: NoiseRows | None, position: int) -> Pick:
    """Return the token at `position` for these logits [vocabulary].

    It is the argmax without noise (greedy), else Gumbel-max after the filters. The logits are on
    the host, of any floating-point type. Of exactly equal scores the lowest token id wins."""
    x = _exact(logits)
    if noise is None:
        return _best(x)
    tokens: np.ndarray = np.arange(len(x))
    if sampling.filters:
        tokens = np.flatnonzero(~(x < _least(x, sampling)))
        x = x[tokens]
    bits = _bits(noise.seed, position, tokens)
    if len(x) > SURE:
        some = _contenders(x, sampling.temperature, bits)
        tokens, x, bits = tokens[some], x[some], bits[some]
    found = _best(_scores(x, sampling.temperature, bits))
    return found._replace(token=int(tokens[found.token]))


SURE = 256
"""The search for the winner begins with so many tokens, one of each block."""


def _scores(x: np.ndarray, temperature: float, bits: np.ndarray) -> np.ndarray:
    # what normalises the distribution is the same for all tokens
    return x.astype(np.float64) / temperature + _gumbel(bits)


def _contenders(x: np.ndarray, temperature: float, bits: np.ndarray) -> np.ndarray:
    """Return the indices, in order, of all tokens whose score can be among the two highest.

    A few others may be there too. The highest logits of SURE blocks make sure of two scores of at
    least s. A uniform number u makes a score of s or more, x / T - log(-log u) >= s, if
    -log u <= exp(x / T - s); and 1 - u <= -log u. So 1 - u, which needs no logarithm, is at most
    that. It is computed in float32, with room for its rounding."""
    width = len(x) // SURE
    blocks = _blocks(x, width)
    highest = blocks.argmax(1) + width * np.arange(len(blocks))
    s = float(np.partition(_scores(x[highest], temperature, bits[highest]), -2)[-2])
    top = x.max()
    most = np.exp(
        np.minimum(
            (x - top) / x.dtype.type(temperature) + x.dtype.type(float(top) / temperature - s), 0
        )
    )
    rest = (~bits).astype(np.float32)
    rest *= np.float32(2.0**-32)
    return np.flatnonzero(~(rest > most * x.dtype.type(1.001)))


def _best(scores: np.ndarray) -> Pick:
    """Return the index of the highest score (the first of equals) and its lead over the next."""
    k = int(scores.argmax())  # numpy takes the first of equals
    rest = max(scores[:k].max(initial=-np.inf), scores[k + 1 :].max(initial=-np.inf))
    return Pick(k, float(scores[k] - rest))
