"""The measured cost of a forward."""

import random

import pytest

from flowspec.core.cost import Line, LinearCost


def test_a_straight_line_is_found():
    cost = LinearCost()
    for rows in (6, 1, 35, 20, 1, 30, 64, 2, 17) * 4:
        cost.observe(rows, 0.05 + 0.0005 * rows)
    assert (cost.base, cost.slope) == pytest.approx((0.05, 0.0005), rel=0.02)
    assert cost.predict(40) == pytest.approx(0.07, rel=0.02)


@pytest.mark.parametrize("seconds", [0.001, 5.0])
def test_the_first_forward_says_how_fast_it_is_and_no_row_is_free_yet(seconds):
    cost = LinearCost()
    cost.observe(6, seconds)
    assert cost.predict(6) == pytest.approx(seconds, rel=0.01)
    assert 0.005 < cost.slope / cost.base < 0.05


def test_what_may_be_chance_is_not_charged_to_rows():
    """Delays of a busy machine, the same for any number of rows."""
    line, rng = Line(), random.Random(3)
    for _ in range(200):
        line.observe(rng.randint(1, 6), 0.001 + rng.expovariate(1 / 0.004))
        assert line.slope < 0.001
    for _ in range(200):
        n = rng.randint(1, 30)
        line.observe(n, 0.004 + 0.0005 * n + rng.gauss(0, 0.0005))
    assert line.slope == pytest.approx(0.0005, rel=0.15), "what is no chance is found"


def test_one_slow_forward_of_two_rows_does_not_make_rows_dear():
    """Else segments stay at one row, and nothing would ever show that it was chance."""
    cost = LinearCost()
    cost.observe(10, 0.006)
    for rows in (1, 2, *[1] * 12):
        cost.observe(rows, 0.009 if rows == 2 else 0.004)
    assert cost.slope < 0.0005 and cost.base == pytest.approx(0.004, rel=0.2)
