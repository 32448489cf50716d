"""Measured costs are a stage's forward as a curve over rows, and what a row adds to a hop.

core/control.py decides what follows from them. This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from flowspec.core.curve import SHAPE, Curve
from flowspec.core.messages import FRAME_BYTES, PREFILL_ROWS, Cost
from flowspec.errors import need


class LineFit:
    """A line is a least-squares fit of seconds over rows (or context tokens).

    Older observations weigh less, by a factor `forget` for each newer one."""

    DOUBT = 2.0
    """This many standard errors are taken off the slope: what may be chance is not charged."""

    def __init__(self, forget: float = 0.95) -> None:
        self._forget = forget
        self._sums = np.zeros(6)  # of weight * [1, n, t, n n, n t, t t]

    def observe(self, rows: float, seconds: float) -> None:
        self._sums = self._forget * self._sums + _moments(rows, seconds)

    @property
    def slope(self) -> float:
        """Return the seconds per row; it is never below 0, and 0 while the rows do not differ."""
        slope, doubt = _line(self._sums)
        return max(0.0, slope - self.DOUBT * doubt)

    @property
    def spread(self) -> float:
        """Return the weighted standard deviation of the rows seen."""
        w, n, _, nn, *_ = self._sums.tolist()
        return math.sqrt(max(0.0, nn / w - (n / w) ** 2)) if w else 0.0


def _line(sums: np.ndarray) -> tuple[float, float]:
    """Return the slope of t over n and its standard error; both are 0 if n does not vary.

    `sums` are the sums of weight * [1, n, t, n n, n t, t t]."""
    w, n, t, nn, nt, tt = sums.tolist()
    spread = nn - n * n / w if w else 0.0
    if spread < 1e-9:
        return 0.0, 0.0
    common = nt - n * t / w
    scatter = max(0.0, tt - t * t / w - common * common / spread) / max(w - 2, 0.5)
    return common / spread, math.sqrt(scatter / spread)


def _moments(rows: float, seconds: float) -> np.ndarray:
    """Return [1, n, t, n n, n t, t t] of one observation: n rows, t seconds."""
    return np.array([1.0, rows, seconds, rows * rows, rows * seconds, seconds * seconds])


class Point(NamedTuple):
    """A point sums up forwards over about as many rows, behind about as many context tokens.

    `rows` and `context` are means."""

    rows: float
    context: float
    seconds: float
    """This is the median of the forwards."""
    times: int
    """This is the number of forwards."""


class _Bin:
    """A bin holds the latest forwards whose numbers of rows lie between two powers of two."""

    LATEST = 9
    """Estimates rest on this many latest forwards."""
    KEPT = 33
    """At most this many forwards are kept for each point of the report."""
    SPAN = 512
    """A point of the report spans this many tokens of context."""

    def __init__(self) -> None:
        # (rows, context, seconds)
        self.latest: deque[tuple[int, float, float]] = deque(maxlen=self.LATEST)
        self.by_context = LineFit(forget=1.0)
        self.all: dict[int, deque[tuple[int, float, float]]] = {}

    def add(self, rows: int, context: float, seconds: float) -> None:
        self.latest.append((rows, context, seconds))
        self.all.setdefault(int(context) // self.SPAN, deque(maxlen=self.KEPT)).append(
            (rows, context, seconds)
        )

    @property
    def rows(self) -> float:
        """Return the mean number of rows of the latest forwards."""
        return sum(rows for rows, _, _ in self.latest) / len(self.latest)

    def typical(self, slope: float, context: float, deep: tuple[float, float]) -> float:
        """Return the typical seconds of a forward over `self.rows` rows behind `context` tokens.

        It is a low quantile (the least of three, the fourth of nine), since a delay only adds.
        Forwards are moved there first: `slope` is the seconds per row, and `deep` what a token of
        context adds to a forward and to each of its rows."""
        middle = self.rows
        moved = sorted(
            t + slope * (middle - n) + (context - at) * (deep[0] + deep[1] * n)
            for n, at, t in self.latest
        )
        return max(moved[2 * (len(moved) - 1) // 5], 0.1 * min(t for _, _, t in self.latest))


class RowCost:
    """A row cost estimates a stage's forwards as a curve over rows and context.

    It is robust to a busy machine: a delay only makes a forward longer, and rows never make one
    shorter. So the estimate for a number of rows is a low quantile of its latest forwards and no
    more than any larger number took; while few were seen, it is drawn to what its neighbours say.
    Where nothing was measured, a row is guessed to add a fiftieth of a forward."""

    SPREAD = 100.0
    """A bin says what context costs once its contexts have this standard deviation (tokens)."""
    SHARED = 8.0
    """The arithmetic of this many rows over the context is taken to cost as much as reading it,
    until the two were told apart."""

    def __init__(self) -> None:
        self._bins: dict[int, _Bin] = {}  # ceil(log2(rows)) -> what was seen
        self._curve: Curve | None = None  # cached until the next forward

    def observe(self, rows: int, seconds: float, context: float = 0.0) -> bool:
        """Take in a forward of `seconds` over `rows` rows behind `context` tokens.

        Return True if it is one of the first three over about as many rows."""
        bin = self._bins.setdefault(min(7, max(0, rows - 1).bit_length()), _Bin())
        bin.add(rows, context, seconds)
        self._curve = None
        if rows <= 32 or rows == PREFILL_ROWS:
            bin.by_context.observe(context, seconds)
        return len(bin.latest) <= 3

    def curve(self, context: float = 0.0) -> Curve:
        """Return the present estimate.

        Its knots are made for `context`, unless the curve is cached since the last forward."""
        self._curve = self._curve or self._fitted(context)
        return self._curve

    def _fitted(self, context: float) -> Curve:
        bins = [self._bins[k] for k in sorted(self._bins)]
        if not bins:
            return Curve.line(0.02, 0.02 / SHAPE)
        deep = self._deep(bins)
        seen = [(b.rows, b.typical(0.0, context, deep)) for b in bins]
        for _ in range(3):
            # rows within a bin differ: the slope between its neighbours says what that makes
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
        """Return the seconds that a token of context adds to a forward, and to each of its rows."""
        known = [(b.rows, b.by_context.slope) for b in bins if b.by_context.spread >= self.SPREAD]
        if not known:
            return 0.0, 0.0
        (n0, c0), (n1, c1) = known[0], known[-1]
        if n1 == n0:
            return self.SHARED * c0 / (self.SHARED + n0), c0 / (self.SHARED + n0)
        row = min(max(0.0, (c1 - c0) / (n1 - n0)), c1 / n1)
        return max(0.0, c0 - row * n0), row

    def predict(self, rows: int, context: float = 0.0) -> float:
        """Return the expected seconds of a forward."""
        return self.curve(context).at(rows, context)

    def points(self) -> list[Point]:
        """Return all that was seen as sorted points, for people and for the simulator."""
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
    """Return the seconds over `rows` rows, scaled from the known point (rows, seconds)."""
    n, seconds = known
    return seconds * (SHAPE + rows) / (SHAPE + n)


def _believed(
    below: tuple[float, float] | None,
    seen: tuple[float, float],
    above: tuple[float, float] | None,
    count: int,
) -> float:
    """Return the estimated seconds of the point `seen` = (rows, seconds), seen `count` times.

    `below` is the estimate at the next smaller number of rows; `above` is the next larger number of
    rows with the least seconds seen there or further up. Either is None at the end."""
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
    # a guess from below says little of many times the rows
    doubt = (2 if above else 2 * below[0] / rows) / count**2
    return guess + (seconds - guess) / (1 + doubt)


def _chord(points: list[tuple[float, float]], k: int) -> float:
    """Return the slope between the neighbours of points[k]; it is never below 0."""
    (n0, t0), (n1, t1) = points[max(0, k - 1)], points[min(len(points) - 1, k + 1)]
    return max(0.0, (t1 - t0) / (n1 - n0)) if n1 > n0 else 0.0


class Meter:
    """A meter measures a stage's forwards and the hop to it, and says when to tell rank 0."""

    OFTEN = 6
    """Rank 0 is told after each of this many first forwards."""
    EVERY = 8
    """Later it is told after every so many forwards, and after the first three over about as many
    rows."""

    def __init__(self) -> None:
        self.forward, self._hop = RowCost(), LineFit()
        self.busy = 0.0
        """Forwards took so many seconds, with those that were abandoned."""
        self._forwards = 0
        self._first: float | None = None  # seconds of the first hop

    def hop(self, rows: int, seconds: float) -> None:
        """Record that a message of `rows` rows took `seconds` from the previous rank to this one.

        The two ranks' clocks differ, so only differences to the first message count."""
        self._first = seconds if self._first is None else self._first
        self._hop.observe(rows, seconds - self._first)

    def forward_over(self, rows: int, seconds: float, context: float = 0.0) -> bool:
        """Record a forward behind `context` tokens; return True if rank 0 should be told."""
        new = self.forward.observe(rows, seconds, context)
        self._forwards += 1
        return new or self._forwards <= self.OFTEN or self._forwards % self.EVERY == 0

    def cost(self, stage: int, context: float = 0.0) -> Cost:
        """Return what rank 0 is told of this stage."""
        return Cost(stage, self.forward.curve(context), self.row, self.busy)

    @property
    def row(self) -> float:
        """Return the seconds that a row adds to the hop."""
        return self._hop.slope


class Group(NamedTuple):
    """A group is the ranks that are one stage, and how they share it."""

    members: int = 1
    spread: bool = False
    """Each of them keeps a part of the rows between products (method galaxy)."""


ALONE = Group()


@dataclass(frozen=True, kw_only=True)
class Emulate:
    """These are the times that one machine pretends to, so that it can stand for a cluster.

    A stage's forward over n rows takes at least stage_ms + token_ms * n milliseconds, a drafter's
    forward at least draft_ms. A hop delivers a message link_ms + bytes / link_mbps (megabits per
    second; None: no limit) after it was sent; a link carries one message at a time."""

    LAYERS: ClassVar = 8
    """What an emulated rank holds weighs as so many layers; a stage of T ranks has T times as many.
    A forward can be abandoned at the end of each."""
    stage_ms: float | tuple[float, ...] = 0.0
    """This is one number, or one for each stage."""
    token_ms: float | tuple[float, ...] = 0.0
    """This is one number, or one for each stage."""
    draft_ms: float = 0.0
    link_ms: float = 0.0
    link_mbps: float | None = None
    hidden_scale: float = 1.0
    """Hidden rows count as 2-byte elements times this, so that a small model's rows weigh like a
    large one's."""

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
        """Tell whether anything is emulated."""
        return self != Emulate()

    @property
    def shapes_links(self) -> bool:
        """Tell whether links are emulated."""
        return self.link_ms > 0 or self.link_mbps is not None

    def check_stages(self, stages: int, servers: int = 1) -> None:
        """Raise UserError unless each setting is one number, or one for each stage.

        Of several servers, those may be the stages of each alike, or of all, server by server."""
        for name in ("stage_ms", "token_ms"):
            n = len(_each(getattr(self, name)))
            need(
                n in (1, stages, stages * servers),
                f"emulate.{name} lists {n} stages, the model is split into {stages}",
            )

    def stage_seconds(self, stage: int, rows: int) -> float:
        """Return the least seconds of stage `stage` (from 1) over `rows` rows.

        A list that is too short (of one server's stages, or in a simulation of more stages) begins
        again."""
        base, slope = (
            values[(stage - 1) % len(values)]
            for values in (_each(self.stage_ms), _each(self.token_ms))
        )
        return (base + slope * rows) / 1000

    def group_seconds(self, stage: int, rows: int, group: Group, row_bytes: float) -> float:
        """Return the least seconds of a forward of a stage whose ranks are a group.

        `stage_ms` and `token_ms` are those of one rank's share of the weights, and a row of
        features has `row_bytes` bytes on a link. The leader sends the rows to the others. Then
        every half of a layer (attention, MLP) moves them in steps of a ring, each of which sends a
        T-th part over a link: 2 (T - 1) steps are an all-reduce. If rows are spread, the products
        of each part are computed while the next part is on its way (Galaxy, arXiv 2405.17245)."""
        compute = self.stage_seconds(stage, rows)
        if group.members == 1:
            return compute
        size, hop = rows * row_bytes, self.link_ms / 1000
        told = hop + self.wire_seconds(FRAME_BYTES + size)
        step = hop + self.wire_seconds(FRAME_BYTES + size / group.members)
        halves, steps = 2 * self.LAYERS * group.members, group.members - 1
        if not group.spread:
            return told + compute + halves * 2 * steps * step
        piece = compute / (halves * 2 * group.members)
        return told + halves * 2 * (piece + steps * max(piece, step)) + steps * step

    def row_bytes(self, hidden: int) -> float:
        """Return the bytes that count of a row of `hidden` features on a link."""
        return hidden * 2 * self.hidden_scale

    def wire_seconds(self, size: float) -> float:
        """Return the seconds for which a message of `size` bytes keeps its link busy."""
        return 0.0 if self.link_mbps is None else size * 8 / (self.link_mbps * 1e6)


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)
