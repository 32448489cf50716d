"""Offline simulators of decoding alone, speculative inference (SI) and distributed SI (DSI).

They count time, in any unit, and compute nothing: DSI is the one of arXiv 2405.14105, SI the one of
arXiv 2211.17192. A draft is accepted with probability a, independently of the others, so the number
of drafts that are accepted in a row is geometric. Drafts cost c each, a target forward costs t, and
a text has S tokens, the last of which needs no draft.

- Decoding alone (non-SI): S t.
- SI: an iteration drafts k tokens, then verifies them in one forward: k c + t. It yields what was
  accepted and one token more.
- DSI: drafting never waits, since a server verifies each k drafts while later ones are drafted. A
  run reaches up to the first rejection; it costs its drafts, in whole blocks of k, and one target
  latency for the rejection to be known. Servers also decode meanwhile, so a run of r tokens never
  costs more than r t. This takes ceil(t / (k c)) servers, else verifications queue up.

All functions take arrays that broadcast; numpy only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Counts = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class Setting:
    """These are the parameters of the paper, for one setting or, as arrays, for many."""

    drafter: Array | float
    """The latency of a drafter forward (c), above 0 and at most the target's."""
    acceptance: Array | float
    """The probability that a draft is accepted (a), 0 to 1."""
    lookahead: Counts | Array | int
    """The number of drafts that are verified together (k), at least 1."""
    target: float = 1.0
    """The latency of a target forward (t)."""
    tokens: int = 1000
    """The number of tokens of a text (S)."""
    first_drafter: float | None = None
    """The latency of a text's first drafter forward, which reads the prompt; None: as the later
    ones."""
    first_target: float | None = None
    """The same for the target: in DSI, each server reads the prompt while it verifies for the first
    time."""

    @property
    def shape(self) -> tuple[int, ...]:
        return np.broadcast_shapes(*map(np.shape, self._arrays))

    @property
    def flat(self) -> list[Array]:
        """Return drafter latencies, acceptance rates and lookaheads in one dimension."""
        arrays = np.broadcast_arrays(*self._arrays)
        return [np.asarray(array, np.float64).ravel() for array in arrays]

    @property
    def _arrays(self) -> tuple[Counts | Array | float, ...]:
        return self.drafter, self.acceptance, self.lookahead

    @property
    def late_drafter(self) -> Array:
        """Return by how much the first drafter forward is slower than the later ones."""
        c = np.asarray(self.drafter, np.float64)
        return np.zeros_like(c) if self.first_drafter is None else self.first_drafter - c

    @property
    def late_target(self) -> float:
        return 0.0 if self.first_target is None else self.first_target - self.target


class Estimate(NamedTuple):
    """This is a mean over texts and its standard error, in units of the latencies.

    The error is not a number where there was a single text."""

    mean: Array
    error: Array


def estimate(costs: Array) -> Estimate:
    """Return the mean and standard error over the first axis of what a simulator returns."""
    repeats = len(costs)
    apart = costs - costs[0]  # exactly 0 where chance has no part
    spread = apart.std(axis=0, ddof=1) if repeats > 1 else np.full(costs.shape[1:], np.nan)
    return Estimate(costs[0] + apart.mean(axis=0), spread / np.sqrt(repeats))


# ---- costs ---------------------------------------------------------------------------------------
def servers_needed(setting: Setting) -> Array:
    """Return ceil(t / (k c)): so many verifications overlap if none waits (the paper's equation
    1)."""
    return np.ceil(setting.target / (np.asarray(setting.lookahead) * setting.drafter))


def alone(setting: Setting) -> float:
    """Return what a text costs without speculation; it does not depend on chance."""
    return setting.tokens * setting.target + setting.late_target


def simulate_si(setting: Setting, repeats: int, rng: np.random.Generator) -> Array:
    """Return what each of `repeats` texts costs with SI; the first axis is the texts."""
    return _simulate(setting, repeats, rng, _si_drafts, capped=False)


def simulate_dsi(setting: Setting, repeats: int, rng: np.random.Generator) -> Array:
    """Return what each of `repeats` texts costs with DSI; the first axis is the texts.

    It is assumed that there are servers_needed(setting) servers or more."""
    return _simulate(setting, repeats, rng, _dsi_drafts, capped=True)


def _si_drafts(run: Array | float, lookahead: Array) -> Array:
    return lookahead


def _dsi_drafts(run: Array | float, lookahead: Array) -> Array:
    """Return how many drafts are made until one is rejected: the block of it is made to its end."""
    return lookahead * (run // lookahead + 1)


def _simulate(
    setting: Setting,
    repeats: int,
    rng: np.random.Generator,
    drafts_of: Callable[[Array | float, Array], Array],
    capped: bool,
) -> Array:
    """Step through all texts at once, by an iteration of SI or a run of DSI.

    `capped` says that a step costs at most what its tokens cost alone."""
    c, a, k, late = (
        np.tile(array, repeats)
        for array in (*setting.flat, np.broadcast_to(setting.late_drafter, setting.shape).ravel())
    )
    with np.errstate(divide="ignore"):
        decay = np.abs(np.log(a))  # infinite if nothing is accepted, 0 if everything is
    left = np.full(len(c), float(setting.tokens))
    total = np.full(len(c), setting.late_target)
    alive = np.arange(len(c))
    while alive.size:
        with np.errstate(divide="ignore"):
            run = np.floor(rng.standard_exponential(len(c)) / decay)  # P(run >= n) = a^n
        run = np.minimum(run, left - 1)
        drafts = np.minimum(drafts_of(run, k), left - 1)
        tokens = np.minimum(run, drafts) + 1
        paid = drafts * c + late * (drafts > 0) + setting.target
        total[alive] += np.minimum(paid, tokens * setting.target) if capped else paid
        left, late = left - tokens, np.zeros_like(late)
        going = left > 0
        if not going.all():
            c, k, decay, left, late, alive = (
                array[going] for array in (c, k, decay, left, late, alive)
            )
    return total.reshape(repeats, *setting.shape)


# ---- expectations --------------------------------------------------------------------------------
def expected_tokens(acceptance: Array | float, most: Counts | Array | int) -> Array:
    """Return the mean tokens of an iteration that yields `most` at most: (1 - a^n) / (1 - a)."""
    a, n = np.broadcast_arrays(np.asarray(acceptance, np.float64), most)
    sure = a == 1
    return np.where(sure, n, (1 - a**n) / np.where(sure, 1, 1 - a))


def si_token(setting: Setting) -> Array:
    """Return what a token costs on average in a long text with SI.

    It is (k c + t) (1 - a) / (1 - a^(k + 1)); the ends of the text are left out."""
    k = np.asarray(setting.lookahead)
    return (k * setting.drafter + setting.target) / expected_tokens(setting.acceptance, k + 1)


def dsi_token(setting: Setting) -> Array:
    """Return what a token costs on average in a long text with DSI.

    It is the mean cost of a run over its mean tokens, for runs of up to S tokens: the sum over n of
    P(n accepted) min(k c (n // k + 1) + t, (n + 1) t), times (1 - a) / (1 - a^S)."""
    c, a, k = (array.reshape(setting.shape) for array in setting.flat)
    cost, reached = np.zeros(setting.shape), np.ones(setting.shape)  # reached: a^n
    for n in range(setting.tokens):
        last = n == setting.tokens - 1
        drafts = np.minimum(_dsi_drafts(n, k), setting.tokens - 1)
        paid = np.minimum(drafts * c + setting.target, (n + 1) * setting.target)
        cost += reached * (1 if last else 1 - a) * paid
        reached *= a
    return cost / expected_tokens(a, setting.tokens)


def best_lookahead(setting: Setting, token: Callable[[Setting], Array], servers: float) -> Counts:
    """Return which lookahead, of those along the setting's last axis, makes `token` least.

    `token` is si_token or dsi_token. Only those lookaheads count for which `servers` suffice; where
    there is none, it is 0."""
    lookaheads = np.broadcast_to(setting.lookahead, setting.shape)
    allowed = np.broadcast_to(servers_needed(setting) <= servers, setting.shape)
    best = np.where(allowed, token(setting), np.inf).argmin(axis=-1)
    chosen = np.take_along_axis(lookaheads, best[..., None], axis=-1)[..., 0]
    return np.where(allowed.any(axis=-1), chosen, 0)
