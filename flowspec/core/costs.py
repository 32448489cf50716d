"""What a run has measured of its ring, for the simulator: kept in its results, read again from a file's objects. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowspec.core.cost import Point, RowCost
from flowspec.core.curve import Curve
from flowspec.errors import need

FORMAT = 1
NEAR = 256
"""tokens of context that are as good as the same"""


@dataclass(frozen=True)
class Costs:
    """Seconds."""

    stages: tuple[tuple[Point, ...], ...]
    """of each stage its forwards"""
    own: tuple[float, ...]
    """of each stage, a segment: what it does beside its forward"""
    rows: tuple[float, ...]
    """of the hop to each stage: what a row adds"""
    hop: float
    """one hop"""
    draft: tuple[Point, ...] = ()
    """the drafter's forwards, by nodes"""
    read: float = 0.0
    """a token of the prompt that the drafter reads"""
    coordinator: float = 0.0
    """a segment: what rank 0 does for it, beside verifying and waiting"""
    _curves: dict[tuple[int, int], Curve] = field(default_factory=dict, compare=False, repr=False)

    def seconds(self, stage: int, rows: int, context: int) -> float:
        """Stage 1.. over `rows` rows behind `context` others. A ring with more stages than were measured begins again."""
        at = (stage - 1) % len(self.stages)
        return self._curve(at, self.stages[at], context).at(rows, context) + self.own[at]

    def draft_seconds(self, nodes: int) -> float:
        return self._curve(-1, self.draft, 0).at(nodes) if self.draft else 0.0

    def _curve(self, key: int, points: Sequence[Point], context: int) -> Curve:
        """By the points, those of about this context before all."""
        at = key, context // NEAR
        if at not in self._curves:
            cost = RowCost()
            for point in sorted(points, key=lambda p: -abs(p.context - context)):
                for _ in range(min(point.times, 9)):
                    cost.observe(max(1, round(point.rows)), point.seconds, point.context)
            self._curves[at] = cost.curve(context)
        return self._curves[at]

    @property
    def row(self) -> float:
        """What a row adds to the slowest hop."""
        return max(self.rows, default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Milliseconds; `read` gives it back."""
        stages = [
            {"forwards": _listed(points), "own_ms": _ms(own), "row_ms": _ms(row)}
            for points, own, row in zip(self.stages, self.own, self.rows, strict=True)
        ]
        about = {
            "hop_ms": _ms(self.hop),
            "coordinator_ms": _ms(self.coordinator),
            "read_ms": _ms(self.read),
        }
        return {"format": FORMAT, "stages": stages, "draft": _listed(self.draft), **about}


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 5)


def _listed(points: Iterable[Point]) -> list[list[float]]:
    """[rows, context, milliseconds, how often] each."""
    return [[round(p.rows, 2), round(p.context), _ms(p.seconds), p.times] for p in points]


def merged(all: Sequence[Costs]) -> Costs:
    """Of several runs over the same ring."""
    need(
        len({len(costs.stages) for costs in all}) == 1,
        "costs of rings with different numbers of stages: take one of them",
    )

    def middle(values: Iterable[float]) -> float:
        return statistics.median(values)

    return Costs(
        tuple(
            tuple(p for points in same for p in points)
            for same in zip(*(c.stages for c in all), strict=True)
        ),
        tuple(map(middle, zip(*(c.own for c in all), strict=True))),
        tuple(map(middle, zip(*(c.rows for c in all), strict=True))),
        middle(c.hop for c in all),
        tuple(p for c in all for p in c.draft),
        middle(c.read for c in all),
        middle(c.coordinator for c in all),
    )


def read(found: Mapping[str, Any] | None, where: str) -> Costs:
    """The costs of an object that `to_json` made; UserError names `where` it is from."""
    wrong = f"{where} holds no measured costs: give a file that run --json or bench compare wrote"
    need(isinstance(found, Mapping), wrong)
    assert found is not None
    try:
        newer = found["format"] > FORMAT
        need(
            not newer,
            f"{where} holds costs of format {found['format']}, this version reads up to {FORMAT}",
        )
        stages = found["stages"]
        costs = Costs(
            tuple(_points(stage["forwards"]) for stage in stages),
            tuple(stage["own_ms"] / 1000 for stage in stages),
            tuple(stage["row_ms"] / 1000 for stage in stages),
            found["hop_ms"] / 1000,
            _points(found["draft"]),
            found["read_ms"] / 1000,
            found["coordinator_ms"] / 1000,
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        need(False, wrong)
    times = [costs.hop, costs.read, costs.coordinator, *costs.own, *costs.rows]
    sane = all(0 <= t < 1e6 for t in times) and all(
        p.rows >= 1 and p.context >= 0 and 0 < p.seconds < 1e6 and p.times >= 1
        for points in (*costs.stages, costs.draft)
        for p in points
    )
    need(sane and len(costs.stages) > 0 and all(costs.stages), wrong)
    return costs


def _points(rows: Iterable[Sequence[float]]) -> tuple[Point, ...]:
    return tuple(
        Point(float(rows), float(context), ms / 1000, int(count))
        for rows, context, ms, count in rows
    )
