"""What the controller makes of measured costs and rates."""

import random

import numpy as np
import pytest

from flowspec.core.control import Controller, Findings, Stretch
from flowspec.core.curve import Curve
from flowspec.core.messages import Cost, Started
from flowspec.core.ring import Ring
from flowspec.core.topology import Topology


def ring(*costs, row=0.0, hop=0.0, rows=None):
    """A controller over stages of these (base, slope) or curves, all measured."""
    ring = Ring()
    for stage, cost in enumerate(costs, 1):
        ring.measured(Cost(stage, cost if isinstance(cost, Curve) else Curve.line(*cost), row))
    ring.hop, ring.news = hop, 9
    return Controller(ring, Topology(len(costs)), rows, Findings())


def worth(control, reaches, due=0, roots=1):
    return control._ring.prices.worth(np.array(reaches, float), due, roots)


JUMP = Curve(((1.0, 0.05), (2.0, 0.08), (8.0, 0.082), (128.0, 0.9)))
"""two rows take 1.6 times one, eight hardly more"""


def test_the_marginal_rule_takes_the_dearest_row_of_stages_and_links():
    assert ring((0.05, 0.0005), (0.05, 0.001)).theta == pytest.approx(0.001 / 0.051)
    assert ring((0.05, 0.0005), (0.05, 0.0005), row=0.0005).theta == pytest.approx(0.001 / 0.051)
    assert ring((0.05, 0.05)).theta == pytest.approx(0.5), (
        "a row that costs a slot must be as likely as not"
    )
    assert ring((1.0, 0.0)).theta == 0.002
    assert ring(JUMP).theta == pytest.approx(0.032 / 7 / 0.05), "a row among eight"


def test_a_segment_has_no_more_rows_than_costs_are_known_of():
    control = ring((0.05, 0.0), rows=128)
    assert control.rows == 96 and worth(control, [0.9] * control.rows) == 96


def test_a_segment_takes_as_many_rows_as_gain_most():
    line = ring((0.05, 0.005))
    assert worth(line, [0.5, 0.3, 0.2, 0.09, 0.02], due=1) == 3, "0.005 of 0.055: while P >= 0.091"
    jump = ring(JUMP)
    assert worth(jump, [0.5], due=1) == 0, "a second row costs 0.6 of a forward"
    assert worth(jump, [0.5, 0.1, 0.05], due=1) == 3, "and two more next to nothing"
    assert worth(jump, [0.3, 0.1, 0.05], due=1) == 0
    assert worth(jump, [], due=1) == 0 and worth(jump, [0.1]) == 1


def test_with_other_requests_waiting_a_row_has_to_save_the_time_of_a_token_of_a_whole_batch():
    """Eight roots take 0.09 s together, 0.01125 s each: a row of 0.005 s must be needed with P >= 0.44, not 0.09."""
    line = ring((0.05, 0.005))
    assert worth(line, [0.5, 0.45, 0.43, 0.2], due=8, roots=8) == 2
    assert worth(line, [0.5, 0.45, 0.43, 0.2], due=1) == 4
    alone, line._ring.requests = line.theta, 8
    assert line.theta == pytest.approx(0.005 / (0.09 / 8)) and line.theta > 4 * alone


def test_a_shared_ring_measures_nothing_and_a_rest_comes_to_its_end_there():
    control = ring(*[(0.05, 0.0)] * 2)
    control._ring.requests = 2
    for k in range(50):
        control.decided(1, 9.9 * k, 100 - k, 0.01)
    assert control.speculates and control._ring.plain is None
    control = Controller(control._ring, Topology(2), None, Findings(resting=5))
    for k in range(5):
        assert not control.speculates
        control.decided(1, 0.1 * k, 100 - k, None)
    assert control.speculates and control._findings.resting == 0


def test_the_first_segments_are_short():
    empty, seen = Ring(), []
    control = Controller(empty, Topology(2), None, Findings())
    for _ in range(6):
        seen.append(control.rows)
        empty.measured(Cost(2, Curve.line(0.05, 0.001), 0.0))  # says nothing of the first stage
        empty.measured(Cost(1, Curve.line(0.05, 0.001), 0.0))
    assert seen == [2, 4, 8, 16, 32, 64] and control.rows == 96
    assert ring((0.05, 0.2), (0.05, 0.2), rows=7).rows == 7


def test_as_many_segments_as_keep_the_slowest_stage_busy():
    assert ring(*[(0.05, 0.0005)] * 4).credits == 4
    assert ring(*[(0.05, 0.0005)] * 4, hop=0.025).credits == 6, "and as many as the links hold"
    assert ring((0.01, 0.0), (0.01, 0.0), (0.1, 0.0)).credits == 1
    assert ring((0.06, 0.0), (0.1, 0.0)).credits == 2


def test_the_slowest_stage_sets_the_pace():
    ring = Ring()
    ring.measured(Cost(1, Curve.line(0.1, 0.0), 0.0))
    ring.measured(Cost(2, Curve.line(0.3, 0.01), 0.0))
    ring.sent(1, 5.0)
    ring.started(Started(1, 10, 0.1, 0.0), 5.0)
    assert ring.free_at == pytest.approx(5.4), "the second stage needs 0.4 s for ten rows"
    ring.idle(5.2)
    assert ring.free_at == 5.2
    ring.sent(2, 5.2)
    ring.started(Started(2, 0, 0.0, 0.0), 5.25)
    assert ring.free_at == 5.25, "all of it was dead"


def rates(control, *pieces, now=0.0, total=1000):
    """Feed (tokens, tokens/s); whether it speculated after each."""
    control.decided(1, now, total, 0.25)
    seen = []
    for tokens, rate in pieces:
        for _ in range(tokens):
            now, total = now + 1 / rate, total - 1
            control.decided(1, now, total, 0.25)
        seen.append(control.speculates)
    return seen


def test_what_is_much_faster_than_promised_needs_no_trial():
    control = ring(*[(0.05, 0.0)] * 2)  # 10 tok/s without speculation
    assert rates(control, (200, 16.0)) == [True] and control._findings.trials == 0


def test_doubt_is_resolved_by_trial():
    """Costs promise 10 tok/s, measured while drafts took a share of the cores; plain decoding has 14."""
    control = ring(*[(0.05, 0.0)] * 2)
    assert rates(control, (8, 12.0), (3, 14.0), (8, 14.0)) == [False, False, True], (
        "a trial, and a rest of eight tokens"
    )
    assert 1 / control.plain == pytest.approx(14)
    control = ring(*[(0.05, 0.0)] * 2)
    assert rates(control, (8, 12.0), (3, 10.0), (20, 12.0)) == [False, True, True], (
        "speculation has won"
    )


def test_what_a_disturbed_trial_found_is_not_believed_for_ever():
    """A token is believed to take 0.15 s; in truth 0.1 without speculation, 0.118 with it."""
    known, findings, turned_off = Ring(), Findings(trials=9), 0
    known.measured(Cost(1, Curve.line(0.1, 0.0), 0.0))
    known.plain = 0.15, 0
    for _ in range(30):
        control, now, left = Controller(known, Topology(1), None, findings), 0.0, 100
        control.decided(1, now, left, 0.25)
        while left:
            now, left = now + (0.118 if control.speculates else 0.1), left - 1
            control.decided(1, now, left, 0.25)
            turned_off += not control.speculates
    assert known.plain[0] == pytest.approx(0.1) and findings.rests >= 1 and turned_off > 1000


def test_what_was_faster_after_all_is_taken_up_again():
    """Plain decoding looked fast for a moment: 20 tok/s, and is 8 since; speculation brought 10, and has used up what it may lose."""
    control = ring(*[(0.05, 0.0)] * 2)
    control._lost = 100.0
    assert rates(control, (8, 10.0), (3, 20.0), (40, 8.0)) == [False, False, True]
    control = ring(*[(0.05, 0.0)] * 2)
    control._findings.rests = 4
    seen = rates(control, (8, 12.0), (3, 20.0), *[(1, 8.0)] * 60)
    assert not any(seen[:10]) and any(seen[10:]), "a rest of 128 tokens is cut short"


def test_a_rest_goes_on_in_the_next_request():
    known, findings = Ring(), Findings()
    known.measured(Cost(1, Curve.line(0.1, 0.0), 0.0))

    def text(token, promise, tokens=64):
        """Seconds of a text, a token of which takes so long with speculation and 0.1 without it."""
        control, now, left = Controller(known, Topology(1), None, findings), 0.0, tokens
        control.decided(1, now, left, promise)
        while left:
            now, left = now + (token if control.speculates else 0.1), left - 1
            control.decided(1, now, left, promise)
        return now

    useless = [text(0.15, 0.05) for _ in range(20)]
    assert useless[0] < 6.4 / 0.96 and sum(useless) < 20 * 6.4 / 0.99, "tried seldom in the end"
    good = [text(0.04, 0.8) for _ in range(4)]
    assert good[-1] < 3.0 and findings.rests == 0, (
        "and yet another drafter, or another text, is found out"
    )


def test_what_speculation_sent_does_not_count_for_plain_decoding():
    control = ring(*[(0.05, 0.0)] * 2)
    control.decided(1, 0.0, 100, 0.25)
    for k in range(1, 9):
        control.decided(1, 0.1 * k, 100 - k, 0.25, in_flight=1)
    assert not control.speculates, "no faster than plain decoding: a trial"
    control.decided(8, 0.8, 84, 0.25)  # of a segment that was on its way
    assert control._attempt.tokens == 16 and control._attempt.each == pytest.approx(0.05)
    for k in range(4):
        control.decided(1, 0.85 + 0.1 * k, 83 - k, 0.25)
    assert control.speculates and control.plain == pytest.approx(0.1, rel=0.1)


def test_a_trial_may_cost_only_a_share_of_what_is_left():
    control = ring(*[(0.05, 0.0)] * 2)
    assert rates(control, (30, 14.0), total=40) == [True], (
        "three tokens at 10 instead of 14 tok/s cost 3 % of 40"
    )


def test_what_loses_is_stopped_and_rests_twice_as_long_each_time():
    control = ring(*[(0.05, 0.0)] * 2)
    seen = rates(control, *[(1, 10.0), *[(1, 5.0), (1, 10.0)] * 300], total=2000)
    assert not seen[8] and control._findings.rests >= 2
    assert control._lost <= control.SHARE * 2000 + control.LOSS[1], (
        "in all it may lose a share of the text"
    )


def test_in_a_short_text_speculation_that_loses_is_not_tried_often():
    control = ring(*[(0.05, 0.0)] * 2)
    now, left = 0.0, 64
    control.decided(1, now, left, 0.25)
    while left:
        now, left = now + (0.2 if control.speculates else 0.1), left - 1
        control.decided(1, now, left, 0.25)
    assert now < 64 * 0.1 / 0.96


@pytest.mark.parametrize("seed", range(10))
def test_a_good_drafter_is_not_stopped_by_the_delays_of_a_busy_machine(seed):
    rng, control, now, left = random.Random(seed), ring(*[(0.05, 0.0)] * 2), 0.0, 300
    control.decided(1, now, left, 0.25)
    while left > 0:
        tokens = rng.choice([1, 2, 3, 4]) if control.speculates else 1
        now, left = (
            now + (0.11 + rng.expovariate(50)) * (4 if rng.random() < 0.03 else 1),
            left - tokens,
        )
        control.decided(tokens, now, max(0, left), 0.25)
    assert control._findings.rests == 0, f"seed {seed}"


def test_a_growing_context_is_in_what_plain_decoding_is_believed_to_take():
    deep = Curve(((1.0, 0.05), (128.0, 0.06)), (1e-5, 0.0))
    control = ring(deep, deep)
    rates(control, (4, 12.0), (8, 10.0))
    assert control.plain == pytest.approx(0.1) and control._tried
    control._ring.deepened(10000)
    assert control.plain == pytest.approx(0.3) and not control._tried


def test_it_says_what_it_chose():
    text = "\n".join(ring((0.05, 0.0005), (0.06, 0.001), row=0.0004, hop=0.001).explain())
    for part in (
        "1: 50.5 51.0 52.0",
        "2: 61.0 62.0",
        "1.00 ms a hop, 0.400 ms a row",
        "P >= 0.023",
        "96 rows",
        "2 segments",
        "on",
    ):
        assert part in text, text


def opening(control, probe=0.1, promise=0.02, later=0.8, left=64, drafted=0.2):
    """A text of so many tokens, 0.1 s each without speculation, `drafted` with it. Its first guesses are
    wrong, those after a rest are as right as `later` says. (now, tokens left) when speculation
    goes on, or after 20 tokens."""
    now, end = 0.0, left - 20
    control.decided(1, now, left, promise)
    while left > end and not (control.speculates and control._findings.rests):
        was, probes = control.speculates, control.probes
        now, left = now + (drafted if was else probe if probes else 0.1), left - 1
        control.decided(1, now, left, promise if was else later if probes else None)
    return now, left


def test_what_was_stopped_for_wrong_guesses_goes_on_once_probes_are_right():
    """The first attempt lost all that speculation may lose in so short a text."""
    control = ring(*[(0.05, 0.0)] * 2)
    opening(control)
    assert control.speculates and control._allowed < control.LOSS[0] and control._lent
    hopeless = ring(*[(0.05, 0.0)] * 2)
    opening(hopeless, later=0.1)
    assert not hopeless.speculates and hopeless._findings.rests == 2, "and rests twice as long"


def test_a_text_that_could_afford_an_attempt_makes_none_while_probes_are_wrong():
    for later, speculates in ((0.05, False), (0.2, True)):
        control = ring(*[(0.05, 0.0)] * 2)
        opening(control, later=later, left=2000)
        assert control._allowed > control.LOSS[0] and control.speculates == speculates


def test_guesses_that_were_right_before_are_no_reason_to_go_on():
    for promise, speculates in ((0.45, True), (0.7, False)):
        control = ring(*[(0.05, 0.0)] * 2)
        opening(control, promise=promise, drafted=0.13)
        assert control.speculates == speculates, "at 0.7 it did not pay for another reason"


def test_nothing_is_probed_where_probes_slow_plain_decoding():
    control = ring(*[(0.05, 0.0)] * 2)
    now, left = opening(control, probe=0.14, later=0.05)
    assert not control._findings.probing
    while left:
        now, left = now + 0.1, left - 1
        control.decided(1, now, left, None)
        assert not control.probes


def test_a_delay_counts_up_to_a_multiple_of_the_usual_time_and_a_stall_not_at_all():
    stretch = Stretch(0.0, clip=3.0)
    for k in range(1, 6):
        assert stretch.decided(2, 0.1 * k, usual=0.08) == pytest.approx(0.1)
    assert stretch.decided(1, 1.0, usual=0.08) == pytest.approx(0.3), "a delay of 5 times"
    assert stretch.decided(1, 4.0, usual=0.08) == pytest.approx(0.1), "a link stood still for 3 s"
    assert stretch.decided(2, 4.1, usual=0.08) == pytest.approx(0.1), "and is itself again"
