"""Keyed noise and filters: the distribution is softmax's, the filters are transformers', the key is a key."""

import math

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from flowspec.core.request import Sampling
from flowspec.errors import UserError
from flowspec.sampling import NoiseRows, filtered, gumbel, pick

FILTERS = [
    dict(temperature=1.0),
    dict(temperature=0.8, top_p=0.9),
    dict(temperature=1.3, top_k=7),
    dict(temperature=0.7, min_p=0.05),
    dict(temperature=1.0, top_k=20, top_p=0.8, min_p=0.02),
]


def chi_square(counts: torch.Tensor, p: torch.Tensor) -> tuple[float, float]:
    """(statistic, its limit at five standard deviations), cells of expectation below 5 pooled."""
    expected = p * counts.sum()
    small = expected < 5
    counts = torch.cat([counts[~small], counts[small].sum()[None]])
    expected = torch.cat([expected[~small], expected[small].sum()[None]])
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(counts) - 1
    return float(((counts - expected) ** 2 / expected).sum()), freedom + 5 * math.sqrt(2 * freedom)


@pytest.fixture(scope="module")
def noise():
    """Of 20,000 positions, [positions, 50]."""
    rows = NoiseRows(11, 50)
    return torch.stack([rows(position) for position in range(20_000)])


@pytest.mark.parametrize("settings", FILTERS)
def test_picks_follow_the_filtered_softmax(noise, settings):
    sampling = Sampling(**settings)
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    logp = filtered(logits, sampling)
    counts = torch.bincount((logp + noise).argmax(-1), minlength=50).double()
    assert counts[logp.isinf()].sum() == 0
    statistic, limit = chi_square(counts, logp.exp())
    assert statistic < limit, f"seed 11: chi-square {statistic:.1f} over {limit:.1f}"


def test_chi_square_can_fail():
    counts = torch.full((50,), 400.0, dtype=torch.float64)
    statistic, limit = chi_square(counts, torch.softmax(torch.randn(50, dtype=torch.float64), -1))
    assert statistic > limit


@pytest.mark.parametrize("settings", FILTERS)
@pytest.mark.parametrize("seed", range(5))
def test_filters_are_those_of_transformers(settings, seed):
    sampling = Sampling(**settings)
    logits = (
        torch.randn(1, 200, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    )
    warpers = [TemperatureLogitsWarper(sampling.temperature)]
    warpers += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    warpers += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    warpers += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    want = logits
    for warper in warpers:
        want = warper(None, want)
    torch.testing.assert_close(filtered(logits[0], sampling), torch.log_softmax(want[0], -1))


def test_pick_is_the_argmax_when_greedy_and_tells_its_lead():
    logits = torch.tensor([0.0, 3.0, 2.5, -1.0])
    assert pick(logits, Sampling(), None, 0) == (1, 0.5)


@pytest.mark.parametrize(
    "settings",
    [
        *FILTERS,
        dict(temperature=2.0, top_k=1),
        dict(temperature=1.5, top_p=0.05),
        dict(temperature=1.0, min_p=1.0),
    ],
)
def test_pick_is_the_argmax_of_the_filtered_distribution(settings):
    """The quick look-up against the slow, obvious one."""
    sampling, noise = Sampling(**settings), NoiseRows(21, 300)
    draw = torch.Generator().manual_seed(2)
    for position in range(300):
        logits = torch.randn(300, generator=draw) * float(torch.rand(1, generator=draw) * 4)
        scores = filtered(logits, sampling) + noise(position)
        values, tokens = scores.topk(2)
        token, gap = pick(logits, sampling, noise, position)
        assert token == int(tokens[0]), f"seed 2, position {position}"
        assert gap == pytest.approx(float(values[0] - values[1]))


@pytest.mark.parametrize(
    "settings",
    [*FILTERS, dict(temperature=3.0, top_p=0.99), dict(temperature=0.01), dict(temperature=50.0)],
)
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_tokens_that_are_left_out_unseen_could_not_have_won(settings, spread):
    """A large vocabulary, where few get exact noise: winner and lead are those of all."""
    sampling, noise = Sampling(**settings), NoiseRows(8, 20_000)
    for position in range(12):
        logits = spread * torch.randn(20_000, generator=torch.Generator().manual_seed(position))
        values, tokens = (filtered(logits, sampling) + noise(position)).topk(2)
        token, gap = pick(logits, sampling, noise, position)
        assert token == int(tokens[0]) and gap == pytest.approx(float(values[0] - values[1])), (
            f"position {position}"
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_lowest_id_wins_a_tie(dtype):
    draw = torch.Generator().manual_seed(6)
    for size in (3, 64, 1000, 32_000):
        logits = torch.randn(size, generator=draw).clamp(max=0.5).to(dtype)
        ties = (logits == logits.max()).nonzero().flatten()
        token, gap = pick(logits, Sampling(), None, 0)
        assert token == ties[0] and (gap == 0) == (len(ties) > 1)


def test_a_pick_changes_none_of_the_logits():
    logits = torch.randn(3000, dtype=torch.float64)
    before = logits.clone()
    for settings in FILTERS:
        pick(logits, Sampling(**settings), NoiseRows(1, 3000), 5)
    assert torch.equal(logits, before)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_damaged_row_is_picked_from_all_the_same():
    for bad in (math.nan, math.inf):
        logits = torch.full((3000,), bad)
        for settings in ({}, *FILTERS):
            sampling = Sampling(**settings)
            assert (
                0
                <= pick(logits, sampling, NoiseRows(1, 3000) if settings else None, 5).token
                < 3000
            )


def test_noise_is_the_same_for_a_row_a_subset_and_a_batch():
    row = NoiseRows(5, 1000)(77)
    some = torch.tensor([3, 999, 3, 0])
    assert torch.equal(gumbel(5, 77, some), row[some])
    assert torch.equal(gumbel(5, 77, some.view(2, 2)), row[some].view(2, 2))


def test_noise_depends_on_seed_and_position_and_their_order():
    tokens = torch.arange(100)
    rows = [gumbel(s, p, tokens) for s, p in [(5, 3), (3, 5), (0, 0), (1 << 40, 0), (5, 4)]]
    assert all(not torch.equal(a, b) for i, a in enumerate(rows) for b in rows[:i])
    assert gumbel(0, 0, tokens).isfinite().all()


def test_noise_has_the_moments_of_gumbel():
    noise = torch.stack([gumbel(9, p, torch.arange(2000)) for p in range(100)])
    assert abs(noise.mean() - 0.5772) < 0.01
    assert abs(noise.var() - math.pi**2 / 6) < 0.03
    assert abs(torch.corrcoef(noise[:, :2].T)[0, 1]) < 0.4
    assert (
        abs(torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1]) < 0.01
    )


@pytest.mark.parametrize(
    "bad",
    [
        dict(temperature=-1),
        dict(top_p=0),
        dict(top_p=1.5),
        dict(min_p=2),
        dict(top_k=-1),
        dict(max_new_tokens=0),
        dict(seed=-1),
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(UserError, match=f"sampling.{next(iter(bad))} is"):
        Sampling(**bad)
