"""Layers over places: the dynamic programme against every split there is."""

import itertools
import math

import numpy as np
import pytest

from flowspec.core.partition import least_sum, least_worst


def every_split(layers: int, places: int):
    """All ways to give out layers in order, places with none among them."""
    for ends in itertools.combinations_with_replacement(range(layers + 1), places - 1):
        yield tuple(b - a for a, b in itertools.pairwise((0, *ends, layers)))


def costs_of(random, places: int, layers: int) -> np.ndarray:
    """Places of other speeds and rooms, layers of other weights; the last one has a head behind it."""
    weights = random.integers(1, 9, layers)
    speeds, rooms = random.integers(1, 6, places), random.integers(0, layers + 4, places)
    found = np.full((places, layers + 1, layers + 1), np.inf)
    for place, start in itertools.product(range(places), range(layers + 1)):
        for stop in range(start, layers + 1):
            head = 5 if stop == layers and stop > start else 0
            if stop - start <= rooms[place]:
                found[place, start, stop] = speeds[place] * (weights[start:stop].sum() + head)
    return found


def cost_at_each(costs, counts) -> list[float]:
    ends = [0, *itertools.accumulate(counts)]
    return [costs[k, a, b] for k, (a, b) in enumerate(itertools.pairwise(ends))]


@pytest.mark.parametrize("seed", range(20))
def test_no_split_is_better_than_the_one_that_is_found(seed):
    random = np.random.default_rng(seed)
    places, layers = int(random.integers(1, 5)), int(random.integers(1, 9))
    costs = costs_of(random, places, layers)
    every = [cost_at_each(costs, counts) for counts in every_split(layers, places)]
    worst = min(map(max, every))
    assert least_worst(costs) == worst
    for cap in (worst, 1.5 * worst, math.inf):
        allowed = [sum(each) for each in every if max(each) <= cap and sum(each) < math.inf]
        found = least_sum(costs, cap)
        if not allowed:
            assert found is None
            continue
        assert sum(found) == layers
        mine = cost_at_each(costs, found)
        assert max(mine) <= cap and sum(mine) == min(allowed)


def test_nothing_is_found_where_nothing_fits():
    costs = np.full((2, 4, 4), np.inf)
    for k in range(4):
        costs[:, k, k] = 0
    assert least_sum(costs) is None and least_worst(costs) == math.inf
