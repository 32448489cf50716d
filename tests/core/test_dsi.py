"""The offline simulators of SI and DSI: by hand, by closed form, against the same rules written one text at a time."""

import random

import numpy as np
import pytest

from flowspec.sim.dsi import (
    Setting,
    alone,
    best_lookahead,
    dsi_token,
    estimate,
    expected_tokens,
    servers_needed,
    si_token,
    simulate_dsi,
    simulate_si,
)

SEED = 20
SIMULATORS = {"si": simulate_si, "dsi": simulate_dsi}


def grid(ndim: int) -> Setting:
    """The valid settings of the paper's grid, for 7 servers, one after the other."""
    line = np.linspace(0, 1, ndim + 1)
    axes = np.maximum(line, 0.01), np.clip(line, 0.01, 0.99), np.arange(1, ndim + 1)
    c, a, k = (axis.ravel() for axis in np.meshgrid(*axes, indexing="ij"))
    valid = servers_needed(Setting(c, a, k)) <= 7
    return Setting(c[valid], a[valid], k[valid])


def one(method: str, *numbers, repeats: int = 3, **more) -> list[float]:
    return SIMULATORS[method](
        Setting(*numbers, **more), repeats, np.random.default_rng(SEED)
    ).tolist()


# ---- the oracle: coin by coin, as the authors' offline simulators count --------------------------
def si_text(c: float, a: float, k: int, tokens: int, coin: random.Random) -> float:
    cost, written = 0.0, 0
    while written < tokens:
        drafts = min(k, tokens - written - 1)
        accepted = 0
        while accepted < drafts and coin.random() < a:
            accepted += 1
        cost += drafts * c + 1
        written += accepted + 1
    return cost


def dsi_text(c: float, a: float, k: int, tokens: int, coin: random.Random) -> float:
    cost, written = 0.0, 0
    while written < tokens:
        run, spent = 0, 0.0
        while True:  # a block of drafts after the other, until a draft is rejected or the text ends
            drafts = min(k, tokens - 1 - written - run)
            accepted = 0
            while accepted < drafts and coin.random() < a:
                accepted += 1
            run += accepted
            spent += drafts * c
            if drafts == 0 or accepted < drafts:
                break
        run += 1
        cost += min(spent + 1, run)
        written += run
    return cost


def exact(method: str, c: float, a: float, k: int, tokens: int) -> float:
    """The mean cost of a text, by what the first iteration or run leaves to be written."""
    mean = [0.0]
    for left in range(1, tokens + 1):
        cost = 0.0
        for n in range(left):  # n drafts accepted in a row: for good at the end of text or block
            most = left - 1 if method == "dsi" else min(k, left - 1)
            if n > most:
                break
            chance = a**n * (1 if n == most else 1 - a)
            drafts = min(left - 1, k * (n // k + 1)) if method == "dsi" else most
            paid = drafts * c + 1
            paid = min(paid, n + 1) if method == "dsi" else paid
            cost += chance * (paid + mean[left - n - 1])
        mean.append(cost)
    return mean[tokens]


ORACLES = {"si": si_text, "dsi": dsi_text}


@pytest.mark.parametrize("method", SIMULATORS)
def test_every_setting_of_the_grid_costs_what_the_coins_say(method):
    """1,089 settings: each within its sampling error, and all together with no lean to a side."""
    setting = grid(10)
    assert len(setting.drafter) == 1089
    many = estimate(SIMULATORS[method](setting, 60, np.random.default_rng(SEED)))
    coin, texts = random.Random(SEED), 2
    told = [
        sum(ORACLES[method](c, a, int(k), 1000, coin) for _ in range(texts)) / texts
        for c, a, k in zip(*setting.flat, strict=True)
    ]
    error = many.error * np.sqrt(60 / texts + 1)
    chancy = error > 0.4  # else runs that save anything are so rare that no error can be made out
    off = np.array(told) - many.mean
    assert abs(off[~chancy]).max(initial=0) < 2  # of 1000 target latencies
    z = off[chancy] / error[chancy]
    assert len(z) > 700
    print(f"seed {SEED}: mean z {z.mean():.3f}, greatest {abs(z).max():.2f}, spread {z.std():.2f}")
    assert abs(z).max() < 5
    assert abs(z.mean()) < 4 / np.sqrt(len(z))
    assert 0.9 < z.std() < 1.1


@pytest.mark.parametrize("method", SIMULATORS)
@pytest.mark.parametrize(
    "numbers", [(0.3, 0.8, 3), (0.1, 0.9, 5), (0.9, 0.5, 1), (0.25, 0.3, 4), (0.05, 0.95, 20)]
)
def test_the_mean_is_the_exact_one(method, numbers):
    tokens, repeats = 30, 20_000
    texts = SIMULATORS[method](
        Setting(*numbers, tokens=tokens), repeats, np.random.default_rng(SEED)
    )
    mean, error = estimate(texts)
    z = (mean - exact(method, *numbers, tokens)) / error
    print(f"seed {SEED}: {mean:.4f} +- {error:.4f}, {z:.2f} standard errors off")
    assert abs(z) < 4


# ---- by hand -------------------------------------------------------------------------------------
def test_without_acceptance_each_token_is_an_iteration():
    si = one("si", 0.2, 0.0, 3, tokens=6)  # 3, 3, 3, 2, 1 and 0 drafts
    assert si == pytest.approx([12 * 0.2 + 6] * 3)
    assert one("dsi", 0.2, 0.0, 3, tokens=6) == [6.0] * 3  # as decoding alone


def test_with_every_draft_accepted_nothing_depends_on_chance():
    si = one("si", 0.2, 1.0, 3, tokens=10)  # 4, 4 and 2 tokens, of 3, 3 and 1 drafts
    assert si == pytest.approx([7 * 0.2 + 3] * 3)
    assert one("dsi", 0.2, 1.0, 3, tokens=10) == pytest.approx([9 * 0.2 + 1] * 3)  # a single run


def test_a_text_of_one_token_has_no_draft():
    for method in SIMULATORS:
        assert one(method, 0.2, 0.5, 3, 2.0, tokens=1, first_drafter=9.0) == [2.0] * 3


def test_first_forwards_have_their_own_latencies():
    more = {"tokens": 10, "first_drafter": 0.7, "first_target": 5.0}
    late = 0.5 + 4
    assert alone(Setting(0.2, 1.0, 3, **more)) == 14
    assert one("si", 0.2, 1.0, 3, **more) == pytest.approx([7 * 0.2 + 3 + late] * 3)
    assert one("dsi", 0.2, 1.0, 3, **more) == pytest.approx([9 * 0.2 + 1 + late] * 3)
    assert one("dsi", 0.2, 0.0, 3, **more) == [14.0] * 3  # no draft helps, so none delays


def test_time_has_any_unit():
    for method in SIMULATORS:
        units = one(method, 0.3, 0.8, 2)
        assert one(method, 6.0, 0.8, 2, 20.0) == pytest.approx([20 * cost for cost in units])


def test_the_same_seed_gives_the_same_texts_and_texts_differ():
    for method in SIMULATORS:
        first = one(method, 0.3, 0.8, 2)
        assert first == one(method, 0.3, 0.8, 2) and len(set(first)) == 3


def test_settings_may_be_arrays_that_broadcast():
    setting = Setting(np.array([[0.1], [0.5]]), np.array([0.0, 0.5, 1.0]), 2, tokens=50)
    costs = simulate_dsi(setting, 4, np.random.default_rng(SEED))
    assert costs.shape == (4, 2, 3)
    assert (costs[:, :, 0] == 50).all()
    assert costs[:, :, 2] == pytest.approx(np.tile([5.9, 25.5], (4, 1)))


def test_a_single_text_has_no_standard_error():
    mean, error = estimate(np.array([[3.0, 4.0]]))
    assert mean.tolist() == [3.0, 4.0] and np.isnan(error).all()
    assert estimate(np.array([[1.0], [3.0]])).error == pytest.approx([1.0])


# ---- closed forms --------------------------------------------------------------------------------
def test_si_writes_so_many_tokens_an_iteration():
    assert expected_tokens(0.5, 4) == pytest.approx(1.875)
    assert expected_tokens(np.array([0.0, 1.0]), 4).tolist() == [1.0, 4.0]
    assert si_token(Setting(0.1, 0.5, 3)) == pytest.approx(1.3 / 1.875)
    assert si_token(Setting(2.0, 0.8, 1, 20.0)) == pytest.approx(22 / 1.8)


def test_dsi_with_a_free_rein_pays_a_draft_a_token_and_a_target_a_rejection():
    """k = 1 and a drafter fast enough that decoding alone helps only where the first draft is rejected."""
    c, a = 0.2, 0.7
    by_hand = (c / (1 - a) + 1 - c * (1 - a)) * (1 - a)  # a run of one token costs 1, not c + 1
    assert dsi_token(Setting(c, a, 1)) == pytest.approx(by_hand)


@pytest.mark.parametrize("token,method", [(si_token, "si"), (dsi_token, "dsi")])
@pytest.mark.parametrize("numbers", [(0.3, 0.8, 3), (0.9, 0.5, 1), (0.25, 0.3, 4)])
def test_expectations_are_those_of_long_texts(token, method, numbers):
    """What a text costs more if it is longer by a token, far from its ends."""
    further = exact(method, *numbers, 301) - exact(method, *numbers, 300)
    assert token(Setting(*numbers)) == pytest.approx(further, rel=1e-6)


def test_dsi_with_every_draft_accepted_is_a_single_run():
    assert dsi_token(Setting(0.2, 1.0, 3, tokens=10)) * 10 == pytest.approx(2.8)


# ---- what the paper promises ---------------------------------------------------------------------
def test_dsi_is_never_slower_than_either():
    """At each setting: in expectation exactly, in the mean of texts up to the standard errors."""
    setting = grid(20)
    assert len(setting.drafter) == 8463
    least = np.minimum(si_token(setting), 1)
    assert (dsi_token(setting) <= least * (1 + 1e-12)).all()
    rng = np.random.default_rng(SEED)
    si, dsi = (estimate(simulate(setting, 10, rng)) for simulate in SIMULATORS.values())
    assert (dsi.mean <= alone(setting) * (1 + 1e-12)).all()
    over = (dsi.mean - si.mean) / np.hypot(si.error, dsi.error)
    print(f"seed {SEED}: DSI over SI by {over.max():.2f} standard errors of the difference")
    assert over.max() < 4  # of 8,463 differences


def test_servers_follow_the_papers_rule():
    needed = servers_needed(Setting(np.array([0.1, 0.1, 0.01, 1.0]), 0.5, np.array([1, 2, 15, 1])))
    assert needed.tolist() == [10, 5, 7, 1]
    assert servers_needed(Setting(6.8, 0.5, 1, 20.6)) == 4


def test_the_best_lookahead_is_the_cheapest_that_the_servers_allow():
    setting = Setting(np.array([[0.1], [0.001]]), 0.9, np.arange(1, 21))
    assert best_lookahead(setting, dsi_token, 7).tolist() == [2, 0]
    assert best_lookahead(setting, dsi_token, 4).tolist() == [3, 0]
    assert best_lookahead(setting, dsi_token, np.inf).tolist() == [1, 1]
    free = best_lookahead(setting, si_token, np.inf)
    costs = si_token(setting)
    assert free.tolist() == [10, 20] == (costs.argmin(axis=1) + 1).tolist()
    assert best_lookahead(setting, si_token, 1).tolist() == [10, 0]
    assert best_lookahead(Setting(0.5, 0.1, np.arange(2, 9)), si_token, 7) == 2


# ---- the paper's table ---------------------------------------------------------------------------
ROWS = [  # target ms, drafter ms, acceptance, the paper's DSI / SI; SI's lookahead that gives it; our own best
    (20.6, 6.8, 0.93, 1.92, 25, 1, 4, 1.31),
    (37.7, 2.5, 0.63, 1.47, 1, 3, 6, 1.18),
    (49.6, 33.4, 0.87, 1.60, 10, 1, 2, 1.14),
]


@pytest.mark.parametrize("target,drafter,a,paper,k_si,k_dsi,servers,ours", ROWS)
def test_the_papers_speedups_hang_on_the_lookahead_of_si(
    target, drafter, a, paper, k_si, k_dsi, servers, ours
):
    setting = Setting(drafter, a, np.arange(1, 101), target)
    si, dsi = si_token(setting), dsi_token(setting)
    best = int(best_lookahead(setting, dsi_token, 7))
    assert (best, int(servers_needed(setting)[best - 1])) == (k_dsi, servers)
    assert si[k_si - 1] / dsi[best - 1] == pytest.approx(paper, rel=0.03)
    assert si.min() / dsi[best - 1] == pytest.approx(ours, abs=0.006)
