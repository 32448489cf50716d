"""Measured costs: a stage's forward over n rows takes base + slope * n seconds. Pure. What follows from them: core/control.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from flowspec.core.messages import Cost
from flowspec.core.request import need


class Line:
    """Weighted least squares over the recent past: seconds as a linear function of rows."""

    FORGET = 0.95
    DOUBT = 2.0
    """standard errors that are taken off the slope: what may be chance is not charged"""

    def __init__(self) -> None:
        self._sums = np.zeros(6)  # of weight * [1, n, t, n n, n t, t t]

    def observe(self, rows: int, seconds: float) -> None:
        self._sums = self.FORGET * self._sums + _moments(rows, seconds)

    def _known(self) -> np.ndarray:
        """What the line is fitted to."""
        return self._sums

    def fit(self) -> tuple[float, float]:
        """(seconds at no row, seconds a row) of the line; the latter never below zero, 0 until rows of different number were seen."""
        w, n, t, slope, _ = _line(self._known())
        slope = max(0.0, slope - self.DOUBT * _line(self._sums)[4])
        return (t - slope * n) / w if w else 0.0, slope

    @property
    def slope(self) -> float:
        """Seconds a row."""
        return self.fit()[1]


def _line(sums: np.ndarray) -> tuple[float, float, float, float, float]:
    """Of the sums of weight * [1, n, t, n n, n t, t t]: the first three, the slope of t over n, and its standard error."""
    w, n, t, nn, nt, tt = sums.tolist()
    spread = nn - n * n / w if w else 0.0
    if spread < 1e-9:
        return w, n, t, 0.0, 0.0
    common = nt - n * t / w
    scatter = max(0.0, tt - t * t / w - common * common / spread) / max(w - 2, 0.5)
    return w, n, t, common / spread, math.sqrt(scatter / spread)


def _moments(rows: float, seconds: float) -> np.ndarray:
    return np.array([1.0, rows, seconds, rows * rows, rows * seconds, seconds * seconds])


class LinearCost(Line):
    """A forward's, started from a guess that soon fades.

    The guess is one of shape, a row for a fiftieth of a forward: the first observation says how fast it all is."""

    GUESS = (0.02, 0.0004)
    ROWS = (1.0, 32.0)
    """of a forward over which the guess says something"""
    FADE = 0.6
    """of the guess, with each observation"""
    STAYS = 0.004
    """of the guess: nothing where rows vary, but where all forwards are of one or two rows it says more than a chance delay"""

    def __init__(self) -> None:
        super().__init__()
        self._least = math.inf  # the quickest forward
        self._guess = 0.5 * np.sum([_moments(rows, self.GUESS[0] + self.GUESS[1] * rows) for rows in self.ROWS], axis=0)

    def observe(self, rows: int, seconds: float) -> None:
        if math.isinf(self._least):
            scale = seconds / (self.GUESS[0] + self.GUESS[1] * rows)
            self._guess *= np.array([1, 1, scale, 1, scale, scale * scale])
        self._least = min(self._least, seconds)
        self._guess *= max(self.FADE, self.STAYS / self._guess[0])
        super().observe(rows, seconds)

    def _known(self) -> np.ndarray:
        return self._sums + self._guess

    def fit(self) -> tuple[float, float]:
        """As of any line, with at least a tenth of the quickest forward at no row."""
        base, slope = super().fit()
        return max(base, 0.0 if math.isinf(self._least) else 0.1 * self._least), slope

    @property
    def base(self) -> float:
        """Seconds of a forward over no row."""
        return self.fit()[0]

    def predict(self, rows: int) -> float:
        base, slope = self.fit()
        return base + slope * rows


class Meter:
    """What a stage measures of itself and of the hop to it, and when rank 0 should hear of it again."""

    OFTEN = 6
    EVERY = 8
    """news after each of the first forwards, and then after every so many"""

    def __init__(self) -> None:
        self.forward, self._hop = LinearCost(), Line()
        self._forwards = 0
        self._first: float | None = None  # of the hops' seconds

    def hop(self, rows: int, seconds: float) -> None:
        """A message of so many rows took so long, by two clocks: only differences count."""
        self._first = seconds if self._first is None else self._first
        self._hop.observe(rows, seconds - self._first)

    def forward_over(self, rows: int, seconds: float) -> bool:
        """A forward took so long; True: tell rank 0."""
        self.forward.observe(rows, seconds)
        self._forwards += 1
        return self._forwards <= self.OFTEN or self._forwards % self.EVERY == 0

    def cost(self, stage: int) -> Cost:
        return Cost(stage, *self.forward.fit(), self._hop.slope)


@dataclass(frozen=True, kw_only=True)
class Emulate:
    """Times that one machine pretends to, so that it can stand for a cluster; null switches one off.

    A stage's forward over n rows takes at least stage_ms + token_ms * n, a drafter's forward at least draft_ms. A hop
    delivers a message link_ms + bytes / link_mbps after it was sent; links carry one message at a time."""

    LAYERS: ClassVar = 8
    """of an emulated stage: points at which a forward can be abandoned"""
    stage_ms: float | tuple[float, ...] = 0.0
    """One number, or one a stage."""
    token_ms: float | tuple[float, ...] = 0.0
    """Likewise."""
    draft_ms: float = 0.0
    link_ms: float = 0.0
    link_mbps: float | None = None
    hidden_scale: float = 1.0
    """Hidden rows are counted as 2-byte elements times this, so that a small model's rows weigh like a large one's."""

    def __post_init__(self) -> None:
        for name in ("stage_ms", "token_ms", "draft_ms", "link_ms", "hidden_scale"):
            value = getattr(self, name)
            need(all(x >= 0 for x in _each(value)), f"emulate.{name} is {value}: it must not be negative")
        need(self.link_mbps is None or self.link_mbps > 0, f"emulate.link_mbps is {self.link_mbps}: it must be above 0")

    @property
    def active(self) -> bool:
        return self != Emulate()

    @property
    def shapes_links(self) -> bool:
        return self.link_ms > 0 or self.link_mbps is not None

    def check_stages(self, stages: int) -> None:
        for name in ("stage_ms", "token_ms"):
            n = len(_each(getattr(self, name)))
            need(n in (1, stages), f"emulate.{name} lists {n} stages, the model is split into {stages}")

    def stage_seconds(self, stage: int, rows: int) -> float:
        """Least time of stage 1.. over `rows` rows. A list that is too short (a simulation of more stages) begins again."""
        base, slope = (values[(stage - 1) % len(values)] for values in (_each(self.stage_ms), _each(self.token_ms)))
        return (base + slope * rows) / 1000

    def wire_seconds(self, size: float) -> float:
        """Time a message of `size` bytes keeps its link busy."""
        return 0.0 if self.link_mbps is None else size * 8 / (self.link_mbps * 1e6)


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
