"""Layers in order are given to places in order, at the least cost; a place may get none.

This is dynamic programming over how many layers the first places hold: exact for any layers and
places. This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

import math

import numpy as np

Costs = np.ndarray
"""[places, layers + 1, layers + 1]: the cost of layers [start, stop) at a place. It is infinite
where they do not fit, and for stop < start."""


def least_sum(costs: Costs, cap: float = math.inf) -> tuple[int, ...] | None:
    """Return how many layers each place gets so that the sum of costs is least; None if none fit.

    What costs more than `cap` at a place is not given to it."""
    return _best(np.where(costs <= cap, costs, np.inf), np.add)[1]


def least_worst(costs: Costs) -> float:
    """Return the least that the cost at the worst place can be; infinite if no split fits."""
    return _best(costs, np.maximum)[0]


def _best(costs: Costs, join: np.ufunc) -> tuple[float, tuple[int, ...] | None]:
    """Return the least total cost, and the layers of each place unless it is infinite."""
    layers = costs.shape[1] - 1
    total = np.full(layers + 1, np.inf)  # of the first places, by how many layers they hold
    total[0] = 0.0
    starts = []  # for each place, where its layers start by where they stop
    for each in costs:
        joined = join(total[:, None], each)
        starts.append(joined.argmin(0))
        total = joined.min(0)
    if not math.isfinite(total[layers]):
        return math.inf, None
    counts, stop = [], layers
    for start in reversed(starts):
        counts.append(stop - int(start[stop]))
        stop = int(start[stop])
    return float(total[layers]), tuple(reversed(counts))
