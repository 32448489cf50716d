"""The measured cost of a forward, as a curve over its rows and the context behind them."""

import dataclasses
import itertools
import random

import pytest

from flowspec.core.cost import Emulate, Group, LineFit, Meter, RowCost
from flowspec.core.costs import Costs, merged, read
from flowspec.core.curve import Curve
from flowspec.errors import UserError


def seen(forwards, seconds, context=0):
    """A RowCost that has seen these numbers of rows, with times by a function of rows and context."""
    cost = RowCost()
    for rows in forwards:
        cost.observe(rows, seconds(rows, context), context)
    return cost


def jump(rows, context=0):
    """One row is a vector's product, two are a matrix's."""
    return 0.010 if rows == 1 else 0.016 + 0.0001 * rows


def test_a_straight_line_is_found():
    cost = seen((6, 1, 35, 20, 1, 30, 64, 2, 17) * 4, lambda n, _: 0.05 + 0.0005 * n)
    for rows in (1, 2, 6, 10, 20, 40):
        assert cost.predict(rows) == pytest.approx(0.05 + 0.0005 * rows, rel=0.02)


def test_a_cost_without_variety_still_predicts():
    cost = seen([1] * 300, lambda n, _: 0.01)
    assert cost.predict(1) == pytest.approx(0.01) and cost.predict(8) > 0.01, (
        "what was not seen costs something"
    )


@pytest.mark.parametrize("seconds", [0.001, 5.0])
def test_the_first_forward_says_how_fast_it_is_and_no_row_is_free_yet(seconds):
    curve = seen([6], lambda n, _: seconds).curve()
    assert curve.at(6) == pytest.approx(seconds)
    assert 0.005 < (curve.at(2) - curve.at(1)) / curve.at(1) < 0.05


def test_what_may_be_chance_is_not_charged_to_links():
    """Delays of a busy machine, the same for any number of rows."""
    line, rng = LineFit(), random.Random(3)
    for _ in range(200):
        line.observe(rng.randint(1, 6), 0.001 + rng.expovariate(1 / 0.004))
        assert line.slope < 0.001
    for _ in range(200):
        n = rng.randint(1, 30)
        line.observe(n, 0.004 + 0.0005 * n + rng.gauss(0, 0.0005))
    assert line.slope == pytest.approx(0.0005, rel=0.15), "what is no chance is found"


def test_one_slow_forward_of_two_rows_does_not_make_rows_dear():
    """Else segments stay at one row, and nothing would ever show that it was chance."""
    cost = RowCost()
    cost.observe(10, 0.006)
    for rows in (1, 2, *[1] * 12):
        cost.observe(rows, 0.009 if rows == 2 else 0.004)
    assert cost.predict(2) < 0.0055, "ten rows took less"
    alone = RowCost()
    for rows in (1, 1, 1, 2):
        alone.observe(rows, 0.009 if rows == 2 else 0.004)
    assert alone.predict(2) < 0.007, "half of it may be chance"


def test_a_jump_at_two_rows_is_learnt_and_the_rows_behind_it_are_nearly_free():
    for forwards in ((1, 1, 2, 4, 8, 2), (1, 16, 2, 2, 2)):
        curve = seen(forwards, jump).curve()
        assert curve.at(1) == pytest.approx(0.010)
        assert curve.at(2) == pytest.approx(jump(2), rel=0.1)
        assert curve.at(8) < 1.15 * curve.at(2)


@pytest.mark.parametrize("seed", range(20))
def test_rows_never_make_a_forward_shorter_and_delays_are_not_charged(seed):
    rng = random.Random(seed)
    cost = RowCost()
    for _ in range(rng.randint(1, 120)):
        rows = rng.choice([1, 1, 1, 2, 3, 5, 8, 13, 30, 90])
        cost.observe(
            rows, jump(rows) * (1 + rng.expovariate(8)) + (0.02 if rng.random() < 0.05 else 0)
        )
        seconds = [cost.predict(n) for n in range(1, 129)]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(seconds)), f"seed {seed}"
    for _ in range(40):
        for rows in (1, 2, 8):
            cost.observe(rows, jump(rows) * (1 + rng.expovariate(8)))
    for rows in (1, 2, 8):
        assert jump(rows) <= cost.predict(rows) < 1.2 * jump(rows), f"seed {seed}"


def test_context_is_learnt_from_the_prompt_and_from_a_growing_text():
    def seconds(rows, context):
        return 0.010 + 0.001 * rows + context * (2e-6 + 1e-7 * rows)

    cost = RowCost()
    for context in range(0, 4096, 128):
        cost.observe(128, seconds(128, context), context)
    for context in range(4096, 4500):
        cost.observe(1, seconds(1, context), context)
    for context in (4500, 4501, 4502):
        cost.observe(8, seconds(8, context), context)
    for rows, context in ((1, 4500), (8, 4500), (1, 8000), (8, 8000), (128, 4096)):
        assert cost.predict(rows, context) == pytest.approx(seconds(rows, context), rel=0.1), (
            rows,
            context,
        )
    assert cost.curve(4500).deep[0] == pytest.approx(2e-6, rel=0.2)


def test_chunks_of_different_length_do_not_pass_for_context():
    cost = RowCost()
    for context, rows in ((0, 128), (128, 128), (256, 40)):
        cost.observe(rows, 0.001 * rows, context)
    assert cost.curve(296).deep == (0.0, 0.0)


def test_rank_0_hears_of_the_first_forwards_of_each_size_and_then_seldom():
    meter = Meter()
    told = [meter.forward_over(rows, 0.01) for rows in [1] * 20 + [2, 2, 2, 2, 9]]
    assert told == [
        *[True] * 6,
        False,
        True,
        *[False] * 7,
        True,
        *[False] * 4,
        True,
        True,
        True,
        True,
        True,
    ]
    assert meter.cost(2).stage == 2 and meter.cost(2).forward == meter.forward.curve()


def test_a_curve_goes_on_beyond_its_knots():
    curve = Curve(((1.0, 1.0), (2.0, 3.0), (4.0, 4.0)), (0.5, 0.25), 10.0)
    assert [curve.at(n) for n in (1, 1.5, 2, 3, 4, 6)] == pytest.approx([1, 2, 3, 3.5, 4, 5])
    assert curve.at(2, 12.0) == pytest.approx(3 + 2 * (0.5 + 2 * 0.25))
    assert curve.at(2, 0.0) == pytest.approx(0.3), "never below a tenth"


# ---- kept in a file --------------------------------------------------------------------------------
def test_what_a_run_measured_survives_a_file():
    stages = [seen((1, 1, 2, 8, 40), jump, context) for context in (100, 2000)]
    costs = Costs(
        tuple(tuple(s.points()) for s in stages),
        (0.001, 0.002),
        (1e-5, 0.0),
        0.0005,
        tuple(stages[0].points()),
        1e-4,
        0.0003,
    )
    back = read(costs.to_json(), "here")
    assert back.to_json() == costs.to_json()
    assert back.seconds(1, 1, 100) == pytest.approx(0.011, rel=0.01), (
        "what the stage does besides counts"
    )
    assert (
        back.draft_seconds(8) == pytest.approx(costs.draft_seconds(8), rel=1e-3)
        and back.row == 1e-5
    )
    assert merged([costs, costs]).seconds(2, 8, 2000) == pytest.approx(
        costs.seconds(2, 8, 2000), rel=0.1
    )
    with pytest.raises(UserError, match="different numbers of stages"):
        merged([costs, Costs(costs.stages[:1], (0.0,), (0.0,), 0.0)])


def test_costs_at_several_contexts_are_told_apart():
    def seconds(rows, context):
        return 0.010 * (1 + 0.1 * rows) + 5e-6 * context

    runs = [seen((1, 1, 1, 4, 4, 4), seconds, context) for context in (64, 1000, 4000)]
    costs = merged([Costs((tuple(run.points()),), (0.0,), (0.0,), 0.0) for run in runs])
    for context in (64, 1000, 4000):
        for rows in (1, 4):
            assert costs.seconds(1, rows, context) == pytest.approx(seconds(rows, context), rel=0.1)


# ---- stages that are groups ----------------------------------------------------------------------
LINKS = Emulate(
    stage_ms=80, token_ms=1, link_ms=1, link_mbps=8
)  # 1 ms a hop, and 1 ms for 1,000 bytes


def test_an_emulated_group_takes_two_all_reduces_a_layer():
    """4 rows of 500 bytes over 2 ranks: they are sent once whole, then in halves, 2 x 16 x 2 times."""
    whole, half = 1 + 2.16, 1 + 1.16
    got = LINKS.group_seconds(1, 4, Group(2), 500)
    assert got == pytest.approx((84 + whole + 2 * 16 * 2 * half) / 1000)


def test_of_spread_rows_the_longer_of_product_and_step_counts():
    """The 84 ms are 32 halves of two phases of two pieces: 0.656 ms a piece, less than the step above it."""
    whole, half, piece = 1 + 2.16, 1 + 1.16, 84 / 128
    got = LINKS.group_seconds(1, 4, Group(2, spread=True), 500)
    assert got == pytest.approx((whole + 32 * 2 * (piece + half) + half) / 1000)
    slow = dataclasses.replace(
        LINKS, stage_ms=80_000
    )  # now the products hide all steps but the last
    got = slow.group_seconds(1, 4, Group(2, spread=True), 500)
    assert got == pytest.approx((whole + 80_004 + half) / 1000)


@pytest.mark.parametrize("spread", [False, True])
def test_a_group_without_links_to_speak_of_takes_what_a_rank_takes(spread):
    board = Emulate(stage_ms=50, token_ms=0.5)
    for members in (1, 2, 4):
        seconds = board.group_seconds(1, 16, Group(members, spread), 8192)
        assert seconds == pytest.approx(board.stage_seconds(1, 16))
