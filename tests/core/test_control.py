"""What the controller makes of measured costs and rates."""

import pytest

from flowspec.core.control import Controller
from flowspec.core.messages import Cost, Started
from flowspec.core.pipe import Pipe


def ring(*costs, row=0.0, hop=0.0, rows=None):
    """A controller over stages of these (base, slope), all measured."""
    pipe = Pipe()
    for stage, (base, slope) in enumerate(costs, 1):
        pipe.measured(Cost(stage, base, slope, row))
    pipe.hop, pipe.news = hop, 9
    return Controller(pipe, len(costs), rows)


def test_the_marginal_rule_takes_the_dearest_row_of_stages_and_links():
    assert ring((0.05, 0.0005), (0.02, 0.001)).theta == pytest.approx(0.001 / 0.051)
    assert ring((0.05, 0.0005), (0.05, 0.0005), row=0.0005).theta == pytest.approx(0.001 / 0.051)
    assert ring((0.05, 0.05)).theta == 0.5, "a row that costs a slot must be as likely as not"
    assert ring((1.0, 0.0)).theta == 0.002


def test_the_rows_of_a_segment_add_at_most_half_a_forward():
    assert ring((0.05, 0.0005), (0.05, 0.001)).rows == 25
    assert ring((0.05, 0.0005), (0.05, 0.0005), row=0.0005).rows == 25
    assert ring((0.05, 0.0), (0.05, 0.0)).rows == 96
    assert ring((0.05, 0.2), (0.05, 0.2)).rows == 1
    assert ring((0.05, 0.2)).rows == 96, "one stage: there is no other slot"
    assert ring((0.05, 0.2), (0.05, 0.2), rows=7).rows == 7


def test_the_first_segments_are_short():
    pipe, seen = Pipe(), []
    control = Controller(pipe, 2, None)
    for _ in range(6):
        seen.append(control.rows)
        pipe.measured(Cost(2, 0.05, 0.001, 0.0))  # says nothing of the first stage
        pipe.measured(Cost(1, 0.05, 0.001, 0.0))
    assert seen == [2, 4, 8, 16, 25, 25]


def test_as_many_segments_as_keep_the_slowest_stage_busy():
    assert ring(*[(0.05, 0.0005)] * 4).credits == 4
    assert ring(*[(0.05, 0.0005)] * 4, hop=0.025).credits == 6, "and as many as the links hold"
    assert ring((0.01, 0.0), (0.01, 0.0), (0.1, 0.0)).credits == 1
    assert ring((0.06, 0.0), (0.1, 0.0)).credits == 2


def test_the_slowest_stage_sets_the_pace():
    pipe = Pipe()
    pipe.measured(Cost(1, 0.1, 0.0, 0.0))
    pipe.measured(Cost(2, 0.3, 0.01, 0.0))
    pipe.sent(1, (0,), 5.0)
    pipe.started(Started(1, 10, 0.1, 0.0), 5.0)
    assert pipe.free_at == pytest.approx(5.4), "the second stage needs 0.4 s for ten rows"
    pipe.idle(5.2)
    assert pipe.free_at == 5.2
    pipe.sent(2, (1,), 5.2)
    pipe.started(Started(2, 0, 0.0, 0.0), 5.25)
    assert pipe.free_at == 5.25, "all of it was dead"


def rates(control, *pieces, now=0.0):
    """Feed (tokens, tokens/s); whether it speculated after each."""
    control.decided(1, now)
    seen = []
    for tokens, rate in pieces:
        for _ in range(tokens):
            now += 1 / rate
            control.decided(1, now)
        seen.append(control.speculates)
    return seen


def test_speculation_that_loses_is_turned_off_and_tried_again():
    control = ring(*[(0.05, 0.0)] * 2)  # 10 tok/s without speculation
    assert rates(control, (16, 40.0), (16, 8.0), (16, 10.0), (16, 9.0), (16, 10.0), (16, 10.0)) == [True, False, True, False, False, True]
    assert control.attempts == 2 and control.plain_rate == pytest.approx(10.0)


def test_speculation_that_pays_goes_on_and_what_it_is_compared_with_is_what_was_measured():
    control = ring(*[(0.05, 0.0)] * 2)
    assert rates(control, (16, 8.5), (16, 7.0), (16, 9.0), (16, 7.5)) == [False, True, True, True], "plain decoding has shown 7, not 10"


def test_it_says_what_it_chose():
    text = "\n".join(ring((0.05, 0.0005), (0.06, 0.001), row=0.0004, hop=0.001).explain())
    for part in ("1: 50.00 + 0.500 n, 2: 60.00 + 1.000 n", "1.00 ms a hop, 0.400 ms a row", "P >= 0.023", "21 rows", "2 segments", "on"):
        assert part in text, text
