"""The measured cost of a forward."""

import pytest

from flowspec.core.cost import LinearCost


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
