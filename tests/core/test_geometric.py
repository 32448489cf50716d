"""The fit of the geometric distribution: its rate and its interval on made-up runs, and what the ends of texts do."""

import math
import random
from itertools import pairwise

import pytest

from flowspec.core.geometric import Run, fit, lengths, p_value, runs, wilson

SETS = 400


def made_up(draw: random.Random, texts: int, tokens: int, rate) -> list[list[bool]]:
    """Texts of independent tokens; `rate()` is a text's probability that a token is accepted."""
    rates = [rate() for _ in range(texts)]
    return [[draw.random() < r for _ in range(tokens)] for r in rates]


def fitted(texts):
    return fit([sum(text) for text in texts], [len(text) for text in texts])


@pytest.mark.parametrize("rate", [0.5, 0.8, 0.95])
def test_the_interval_holds_the_rate_of_geometric_runs_as_often_as_it_says(rate):
    seed = 1
    print("seed", seed)
    draw = random.Random(seed)
    inside = sum(
        f.low <= rate <= f.high
        for f in (fitted(made_up(draw, 20, 50, lambda: rate)) for _ in range(SETS))
    )
    assert 0.925 <= inside / SETS <= 0.985  # 0.95, give or take three standard errors


def test_texts_that_differ_in_their_rate_get_a_wider_interval():
    """Wilson's interval for the bare number of tokens holds the rate half of the time."""
    seed = 2
    print("seed", seed)
    draw, rate = random.Random(seed), 0.8
    both = plain = 0
    for _ in range(SETS):
        found = fitted(made_up(draw, 20, 64, lambda: draw.betavariate(8, 2)))
        both += found.low <= rate <= found.high
        low, high = wilson(found.acceptance, 20 * 64)
        plain += low <= rate <= high
    assert plain / SETS < 0.7 and both / SETS > 0.9


def test_the_fit_is_the_papers_where_no_run_is_cut_off():
    texts = [[True, True, False, False, True, False], [False, True, True, True, False]]
    found = [run for text in texts for run in runs(text)]
    assert found == [Run(n, False) for n in (2, 0, 1, 0, 3)]
    mean = sum(run.length for run in found) / len(found)
    assert fitted(texts).acceptance == pytest.approx(1 - 1 / (1 + mean))


def test_the_end_of_a_text_is_no_rejection():
    """Texts of four tokens at a rate of 0.9: most runs are cut off; taken as rejections they would say 0.7."""
    seed = 3
    print("seed", seed)
    texts = made_up(random.Random(seed), 3000, 4, lambda: 0.9)
    found = [run for text in texts for run in runs(text)]
    assert fitted(texts).acceptance == pytest.approx(0.9, abs=0.01)
    naive = sum(run.length for run in found) / len(found)
    assert 1 - 1 / (1 + naive) < 0.8
    table = lengths(found, 0.9)
    assert p_value(table, 0.9) > 0.01
    assert [row.first for row in table] == [0, 1, 2] and table[-1].last is None


@pytest.mark.parametrize(
    "matches,expected",
    [
        ([], []),
        ([True] * 3, [Run(3, True)]),
        ([False], [Run(0, False)]),
        ([True, False], [Run(1, False)]),
        ([False, True], [Run(0, False), Run(1, True)]),
    ],
)
def test_runs_end_at_a_rejection_or_are_censored(matches, expected):
    assert list(runs(matches)) == expected


def test_observed_and_expected_lengths_have_the_same_sum():
    seed = 4
    print("seed", seed)
    texts = made_up(random.Random(seed), 30, 70, lambda: 0.85)
    table = lengths([run for text in texts for run in runs(text)], fitted(texts).acceptance)
    assert sum(r.observed for r in table) == pytest.approx(sum(r.expected for r in table))
    assert all(row.expected >= 5 for row in table)
    assert all(a.last + 1 == b.first for a, b in pairwise(table))


def test_the_check_finds_what_is_geometric_and_what_is_not():
    seed = 5
    print("seed", seed)
    draw = random.Random(seed)

    def share(rate) -> float:
        """How often the check says p < 0.05."""
        found = 0
        for _ in range(SETS):
            texts = made_up(draw, 20, 64, rate)
            a = fitted(texts).acceptance
            found += p_value(lengths([run for text in texts for run in runs(text)], a), a) < 0.05
        return found / SETS

    assert share(lambda: 0.8) < 0.09
    assert share(lambda: draw.choice([0.6, 0.98])) > 0.95


@pytest.mark.parametrize("accepted", [0, 40])
def test_all_or_nothing_has_an_interval_with_one_end_inside(accepted):
    found = fit([accepted / 2] * 2, [20, 20])
    assert found.acceptance == accepted / 40 and found.worth == 40
    inner = found.low if accepted else 1 - found.high
    assert inner == pytest.approx(40 / (40 + 1.959964**2), abs=1e-6)
    table = lengths(list(runs([bool(accepted)] * 20)) * 2, found.acceptance)
    assert p_value(table, found.acceptance) is None and len(table) == 1


def test_the_p_value_is_that_of_chi_squared():
    """Two classes, one degree of freedom: P(chi2 > 3.8415) = 0.05, and of 0 it is 1."""
    rows = lengths([Run(0, False)] * 60 + [Run(1, False)] * 40, 0.5)
    assert [row.expected for row in rows] == [50.0, 20.0]
    squares = (10**2 / 50 + 20**2 / 20) / 0.5
    assert p_value(rows, 0.5) == pytest.approx(math.erfc(math.sqrt(squares / 2)), abs=0.01)
