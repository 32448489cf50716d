"""Measured costs: a stage's forward over n rows takes base + slope * n seconds. Pure. What follows from them: core/control.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from flowspec.core.messages import Cost
from flowspec.core.request import need


class Line:
    """Weighted least squares over the recent past: seconds as a linear function of rows."""

    FORGET = 0.95

    def __init__(self) -> None:
        self._n = self._t = self._nn = self._nt = self._w = 0.0

    def _add(self, rows: float, seconds: float, weight: float) -> None:
        self._w += weight
        self._n += weight * rows
        self._t += weight * seconds
        self._nn += weight * rows * rows
        self._nt += weight * rows * seconds

    def observe(self, rows: int, seconds: float) -> None:
        for name in ("_n", "_t", "_nn", "_nt", "_w"):
            setattr(self, name, getattr(self, name) * self.FORGET)
        self._add(rows, seconds, 1.0)

    @property
    def slope(self) -> float:
        """Seconds a row, never below zero; 0 until rows of different number were seen."""
        spread = self._nn - self._n * self._n / self._w if self._w else 0.0
        return max(0.0, (self._nt - self._n * self._t / self._w) / spread) if spread > 1e-9 else 0.0


class LinearCost(Line):
    """A forward's, started from a guess that a few observations outweigh.

    The guess is one of shape, a row for a fiftieth of a forward: the first observation says how fast it all is."""

    def __init__(self, base: float = 0.02, slope: float = 0.0004):
        super().__init__()
        self._least = math.inf  # the quickest forward
        for rows in (1.0, 32.0):
            self._add(rows, base + slope * rows, 0.1)

    def observe(self, rows: int, seconds: float) -> None:
        if math.isinf(self._least):
            scale = seconds / self.predict(rows)
            self._t, self._nt = self._t * scale, self._nt * scale
        self._least = min(self._least, seconds)
        super().observe(rows, seconds)

    @property
    def base(self) -> float:
        """Seconds of a forward over no row; at least a tenth of the quickest."""
        floor = 0.0 if math.isinf(self._least) else 0.1 * self._least
        return max(floor, (self._t - self.slope * self._n) / self._w)

    def predict(self, rows: int) -> float:
        return self.base + self.slope * rows


class Meter:
    """What a stage measures of itself and of the hop to it, and when rank 0 should hear of it again."""

    OFTEN = 4
    EVERY = 8
    """news after each of the first forwards, and then after every so many"""

    def __init__(self) -> None:
        self.forward, self._hop = LinearCost(), Line()
        self._forwards = 0

    def hop(self, rows: int, seconds: float) -> None:
        """A message of so many rows took so long, by two clocks: only differences count."""
        self._hop.observe(rows, seconds)

    def forward_over(self, rows: int, seconds: float) -> bool:
        """A forward took so long; True: tell rank 0."""
        self.forward.observe(rows, seconds)
        self._forwards += 1
        return self._forwards <= self.OFTEN or self._forwards % self.EVERY == 0

    def cost(self, stage: int) -> Cost:
        return Cost(stage, self.forward.base, self.forward.slope, self._hop.slope)


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
