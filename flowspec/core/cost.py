"""Measured costs: a stage's forward as a curve over rows, and what a row adds to a hop. Pure. What follows: core/control.py."""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from flowspec.core.curve import SHAPE, Curve
from flowspec.core.messages import PREFILL_ROWS, Cost
from flowspec.errors import need


class Line:
    """Weighted least squares over the recent past: seconds as a linear function of rows."""

    DOUBT = 2.0
    """standard errors that are taken off the slope: what may be chance is not charged"""

    def __init__(self, forget: float = 0.95) -> None:
        self._forget = forget
        self._sums = np.zeros(6)  # of weight * [1, n, t, n n, n t, t t]

    def observe(self, rows: float, seconds: float) -> None:
        self._sums = self._forget * self._sums + _moments(rows, seconds)

    @property
    def slope(self) -> float:
        """Seconds a row; never below zero, 0 until rows of different number were seen."""
        slope, doubt = _line(self._sums)
        return max(0.0, slope - self.DOUBT * doubt)

    @property
    def spread(self) -> float:
        """The standard deviation of the rows seen."""
        w, n, _, nn, *_ = self._sums.tolist()
        return math.sqrt(max(0.0, nn / w - (n / w) ** 2)) if w else 0.0


def _line(sums: np.ndarray) -> tuple[float, float]:
    """Of the sums of weight * [1, n, t, n n, n t, t t]: the slope of t over n, and its standard error."""
    w, n, t, nn, nt, tt = sums.tolist()
    spread = nn - n * n / w if w else 0.0
    if spread < 1e-9:
        return 0.0, 0.0
    common = nt - n * t / w
    scatter = max(0.0, tt - t * t / w - common * common / spread) / max(w - 2, 0.5)
    return common / spread, math.sqrt(scatter / spread)


def _moments(rows: float, seconds: float) -> np.ndarray:
    return np.array([1.0, rows, seconds, rows * rows, rows * seconds, seconds * seconds])


class Point(NamedTuple):
    """Forwards of about so many rows at about this context."""

    rows: float
    context: float
    seconds: float
    """the median"""
    times: int
    """how often"""


class _Bin:
    """The latest forwards over rows between two powers of two."""

    LATEST = 9
    KEPT = 33
    SPAN = 512
    """tokens of context that a point for the report spans"""

    def __init__(self) -> None:
        self.latest: deque[tuple[int, float, float]] = deque(
            maxlen=self.LATEST
        )  # (rows, context, seconds)
        self.by_context = Line(forget=1.0)
        self.all: dict[int, deque[tuple[int, float, float]]] = {}

    def add(self, rows: int, context: float, seconds: float) -> None:
        self.latest.append((rows, context, seconds))
        self.all.setdefault(int(context) // self.SPAN, deque(maxlen=self.KEPT)).append(
            (rows, context, seconds)
        )

    @property
    def rows(self) -> float:
        return sum(rows for rows, _, _ in self.latest) / len(self.latest)

    def typical(self, slope: float, context: float, deep: tuple[float, float]) -> float:
        """Seconds over `rows` rows at `context`: a low quantile (the least of three, the fourth of nine), since a delay only adds."""
        middle = self.rows
        moved = sorted(
            t + slope * (middle - n) + (context - at) * (deep[0] + deep[1] * n)
            for n, at, t in self.latest
        )
        return max(moved[2 * (len(moved) - 1) // 5], 0.1 * min(t for _, _, t in self.latest))


class RowCost:
    """What forwards of a stage have shown so far: a curve over rows and context, robust to a busy machine.

    A delay only makes a forward longer, and rows never make one shorter. So what is believed of a number of rows is a low quantile of
    its latest forwards, no more than any larger number took, and as long as few were seen it is drawn to what its neighbours say.
    Where nothing was measured, a row is guessed to add a fiftieth of a forward."""

    SPREAD = 100.0
    """tokens: the least standard deviation of the contexts that say what context costs"""
    SHARED = 8.0
    """rows whose arithmetic over the context costs what reading it does, until both were told apart"""

    def __init__(self) -> None:
        self._bins: dict[int, _Bin] = {}  # ceil(log2(rows)) -> what was seen
        self._curve: Curve | None = None  # until there is more to know

    def observe(self, rows: int, seconds: float, context: float = 0.0) -> bool:
        """Take in a forward; True: one of the first of about so many rows."""
        bin = self._bins.setdefault(min(7, max(0, rows - 1).bit_length()), _Bin())
        bin.add(rows, context, seconds)
        self._curve = None
        if rows <= 32 or rows == PREFILL_ROWS:
            bin.by_context.observe(context, seconds)
        return len(bin.latest) <= 3

    def curve(self, context: float = 0.0) -> Curve:
        """What is believed now, with its knots about this context."""
        self._curve = self._curve or self._fitted(context)
        return self._curve

    def _fitted(self, context: float) -> Curve:
        bins = [self._bins[k] for k in sorted(self._bins)]
        if not bins:
            return Curve.line(0.02, 0.02 / SHAPE)
        deep = self._deep(bins)
        seen = [(b.rows, b.typical(0.0, context, deep)) for b in bins]
        for _ in range(
            3
        ):  # rows of a bin differ: the slope between its neighbours says what that makes
            seen = [(b.rows, b.typical(_chord(seen, k), context, deep)) for k, b in enumerate(bins)]
        knots: list[tuple[float, float]] = []
        for k, bin in enumerate(bins):
            above = (
                (seen[k + 1][0], min(seconds for _, seconds in seen[k + 1 :]))
                if k + 1 < len(bins)
                else None
            )
            knots.append(
                (
                    seen[k][0],
                    _believed(knots[-1] if knots else None, seen[k], above, len(bin.latest)),
                )
            )
        first, last = knots[0], knots[-1]
        if first[0] > 1:
            knots.insert(0, (1.0, _guess(first, 1.0)))
        if last[0] < PREFILL_ROWS:
            knots.append((float(PREFILL_ROWS), _guess(last, PREFILL_ROWS)))
        return Curve(tuple(knots), deep, context)

    def _deep(self, bins: list[_Bin]) -> tuple[float, float]:
        """Seconds of a token of context: of a forward, and of each row."""
        known = [(b.rows, b.by_context.slope) for b in bins if b.by_context.spread >= self.SPREAD]
        if not known:
            return 0.0, 0.0
        (n0, c0), (n1, c1) = known[0], known[-1]
        if n1 == n0:
            return self.SHARED * c0 / (self.SHARED + n0), c0 / (self.SHARED + n0)
        row = min(max(0.0, (c1 - c0) / (n1 - n0)), c1 / n1)
        return max(0.0, c0 - row * n0), row

    def predict(self, rows: int, context: float = 0.0) -> float:
        return self.curve(context).at(rows, context)

    def points(self) -> list[Point]:
        """All that was seen, for people and for the simulator."""
        found = []
        for bin in list(self._bins.values()):  # a drafter's thread may still be at it
            for some in list(bin.all.values()):
                rows, contexts, seconds = zip(*list(some), strict=True)
                found.append(
                    Point(
                        statistics.mean(rows),
                        statistics.mean(contexts),
                        statistics.median(seconds),
                        len(some),
                    )
                )
        return sorted(found)


def _guess(known: tuple[float, float], rows: float) -> float:
    """Seconds over `rows` rows, by what is known of another number."""
    n, seconds = known
    return seconds * (SHAPE + rows) / (SHAPE + n)


def _believed(
    below: tuple[float, float] | None,
    seen: tuple[float, float],
    above: tuple[float, float] | None,
    count: int,
) -> float:
    """Seconds of a point (rows, seconds) that was seen so often, by what is believed below it and the least that was seen above it."""
    rows, seconds = seen
    if below is None:
        return min(seconds, above[1]) if above else seconds
    guess = _guess(below, rows)
    if above:
        guess = below[1] + (max(below[1], above[1]) - below[1]) * (rows - below[0]) / (
            above[0] - below[0]
        )
        seconds = min(seconds, above[1])
    if seconds <= guess:
        return max(seconds, below[1])
    doubt = (
        2 if above else 2 * below[0] / rows
    ) / count**2  # a guess from below says little of many times the rows
    return guess + (seconds - guess) / (1 + doubt)


def _chord(points: list[tuple[float, float]], k: int) -> float:
    """The slope between the neighbours of points[k]; never below zero."""
    (n0, t0), (n1, t1) = points[max(0, k - 1)], points[min(len(points) - 1, k + 1)]
    return max(0.0, (t1 - t0) / (n1 - n0)) if n1 > n0 else 0.0


class Meter:
    """What a stage measures of itself and of the hop to it, and when rank 0 should hear of it again."""

    OFTEN = 6
    EVERY = 8
    """news after each of the first forwards, of the first of about so many rows, and after every so many"""

    def __init__(self) -> None:
        self.forward, self._hop = RowCost(), Line()
        self._forwards = 0
        self._first: float | None = None  # of the hops' seconds

    def hop(self, rows: int, seconds: float) -> None:
        """A message of so many rows took so long, by two clocks: only differences count."""
        self._first = seconds if self._first is None else self._first
        self._hop.observe(rows, seconds - self._first)

    def forward_over(self, rows: int, seconds: float, context: float = 0.0) -> bool:
        """A forward behind this context took so long; True: tell rank 0."""
        new = self.forward.observe(rows, seconds, context)
        self._forwards += 1
        return new or self._forwards <= self.OFTEN or self._forwards % self.EVERY == 0

    def cost(self, stage: int, context: float = 0.0) -> Cost:
        return Cost(stage, self.forward.curve(context), self.row)

    @property
    def row(self) -> float:
        """Seconds that a row adds to the hop."""
        return self._hop.slope


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
            need(
                all(x >= 0 for x in _each(value)),
                f"emulate.{name} is {value}: it must not be negative",
            )
        need(
            self.link_mbps is None or self.link_mbps > 0,
            f"emulate.link_mbps is {self.link_mbps}: it must be above 0",
        )

    @property
    def active(self) -> bool:
        return self != Emulate()

    @property
    def shapes_links(self) -> bool:
        return self.link_ms > 0 or self.link_mbps is not None

    def check_stages(self, stages: int) -> None:
        for name in ("stage_ms", "token_ms"):
            n = len(_each(getattr(self, name)))
            need(
                n in (1, stages),
                f"emulate.{name} lists {n} stages, the model is split into {stages}",
            )

    def stage_seconds(self, stage: int, rows: int) -> float:
        """Least time of stage 1.. over `rows` rows. A list that is too short (a simulation of more stages) begins again."""
        base, slope = (
            values[(stage - 1) % len(values)]
            for values in (_each(self.stage_ms), _each(self.token_ms))
        )
        return (base + slope * rows) / 1000

    def wire_seconds(self, size: float) -> float:
        """Time a message of `size` bytes keeps its link busy."""
        return 0.0 if self.link_mbps is None else size * 8 / (self.link_mbps * 1e6)


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
