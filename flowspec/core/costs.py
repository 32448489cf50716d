"""Costs hold what a run has measured of its ring, for the simulator.

They are kept in the run's results and read again from a file's objects. This module is pure (no
torch, clock or I/O).
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flowspec.core.cost import Point, RowCost
from flowspec.core.curve import Curve
from flowspec.errors import need

FORMAT = 1
"""This is the version of the format of `Costs.to_json`."""
NEAR = 256
"""Contexts in the same block of this many tokens share a curve."""


@dataclass(frozen=True)
class Costs:
    """These are the measured costs of a ring; all times are in seconds."""

    stages: tuple[tuple[Point, ...], ...]
    """Each stage has the points of its forwards."""
    own: tuple[float, ...]
    """Each stage spends this on a segment beside its forward."""
    rows: tuple[float, ...]
    """A row adds this to the hop to each stage."""
    hop: float
    """One hop takes this long."""
    draft: tuple[Point, ...] = ()
    """These are the drafter's forwards; `rows` are nodes. It is empty if nothing was drafted."""
    read: float = 0.0
    """The drafter reads a token of the prompt in this time."""
    coordinator: float = 0.0
    """Rank 0 spends this on a segment, beside verifying and waiting."""
    _curves: dict[tuple[int, int], Curve] = field(default_factory=dict, compare=False, repr=False)

    def seconds(self, stage: int, rows: int, context: int) -> float:
        """Return the seconds of stage `stage` (from 1) over `rows` rows behind `context` tokens.

        What it does beside its forward is included. A ring with more stages than were measured
        begins again with the first one's costs."""
        at = (stage - 1) % len(self.stages)
        return self._curve(at, self.stages[at], context).at(rows, context) + self.own[at]

    def draft_seconds(self, nodes: int) -> float:
        """Return the seconds of a drafter's forward over `nodes` nodes; 0 if none was measured."""
        return self._curve(-1, self.draft, 0).at(nodes) if self.draft else 0.0

    def _curve(self, key: int, points: Sequence[Point], context: int) -> Curve:
        """Return the (cached) curve of the points, which rests above all on those near `context`.

        They are observed last, and a RowCost estimates by the latest forwards."""
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
        """Return the seconds that a row adds to the slowest hop."""
        return max(self.rows, default=0.0)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object in milliseconds, from which `read` restores the costs."""
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
    """Return [rows, context, milliseconds, number of forwards] for each point."""
    return [[round(p.rows, 2), round(p.context), _ms(p.seconds), p.times] for p in points]


def merged(all: Sequence[Costs]) -> Costs:
    """Return the costs of several runs over the same ring: all points, the medians of the rest.

    UserError is raised if the numbers of stages differ."""
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
    """Return the costs of an object that `Costs.to_json` made.

    If it is none, UserError is raised and names `where` the object is from."""
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
    """Return the points of what `_listed` made."""
    return tuple(
        Point(float(rows), float(context), ms / 1000, int(count))
        for rows, context, ms, count in rows
    )
