"""Scores: the formula by hand, what is learnt from a drafter of known quality, the hint of repeated text."""

import numpy as np
import pytest

from flowspec.core.messages import Drafted, Proposal
from flowspec.core.score import LENGTHS, Ngrams, Scorer, Weights
from flowspec.core.tree import TokenTree


def scorer(prompt=(1, 2, 3), calibrate=False, ngrams=False):
    made, tree = Scorer(calibrate, ngrams), TokenTree(prompt[-1], len(prompt) - 1)
    made.attach(tree, prompt, {})
    return made, tree


def proposal(**chances):
    return Proposal(np.array([int(name[1:]) for name in chances]), np.log(list(chances.values())))


def probabilities(scored):
    return [
        dict(zip(tokens, np.exp(scores).round(6).tolist(), strict=True))
        for _, tokens, scores in scored
    ]


def test_candidates_share_the_coverage_by_draft_probability_times_noise():
    made, tree = scorer()
    noisy = Proposal(np.array([4, 3]), np.log([0.1, 0.2]) + np.array([2.0, 1.0]), coupled=True)
    [p] = probabilities(made.scored([tree.root], Drafted.pack([0], [noisy]), 16))
    assert sum(p.values()) == pytest.approx(0.97, abs=1e-5) and p[4] / p[3] == pytest.approx(
        0.5 * np.e, rel=1e-4
    )


def test_each_list_stands_by_itself_below_its_node():
    made, tree = scorer()
    child = tree.add(tree.root, 7, np.log(0.5))
    both = Drafted.pack([0, child.id], [proposal(t1=0.6, t2=0.2), proposal(t5=0.3)])
    one, two = probabilities(made.scored([tree.root, child], both, 16))
    assert one == pytest.approx(
        {1: 0.97 * 0.75, 2: 0.97 * 0.25}, abs=1e-5
    ) and two == pytest.approx({5: 0.97 * 0.5}, abs=1e-5)
    [(_, tokens, _)] = made.scored([tree.root], Drafted.pack([0], [proposal(t1=0.6, t2=0.2)]), 1)
    assert tokens == [1]


def test_the_longest_match_predicts_and_is_listed_even_if_the_drafter_did_not():
    text = (1, 2, 3, 4, 9, 8, 3, 4, 7, 1, 2, 3)
    assert Ngrams(text).after([]) == (4, LENGTHS.index(3)) and Ngrams(text).after([4]) == (
        9,
        LENGTHS.index(4),
    )
    assert Ngrams(text).after([5]) is None
    made, tree = scorer(text, ngrams=True)
    made.weights.values[1:] = 3.0
    [p] = probabilities(made.scored([tree.root], Drafted.pack([0], [proposal(t5=0.6, t6=0.2)]), 16))
    assert list(p) == [4, 5, 6], (
        "as likely by the drafter as its last candidate, and e^3 times that by the match"
    )
    noisy = Proposal(np.array([5, 6]), np.log([0.6, 0.2]), coupled=True)
    [p] = probabilities(made.scored([tree.root], Drafted.pack([0], [noisy]), 16))
    assert list(p) == [5, 6], "with noise the place of an unlisted token is unknown"


@pytest.mark.parametrize("sharpness", [0.5, 1.0, 3.0])
def test_the_weight_of_a_drafter_is_found(sharpness):
    """The target's choice is drawn from softmax(sharpness * z): that is what w converges to."""
    random = np.random.default_rng(5)
    weights = Weights()
    for _ in range(600):
        z = np.sort(random.normal(size=12) * 1.5)[::-1]
        p = np.exp(sharpness * z)
        x = np.zeros((12, 4))
        x[:, 0] = z
        weights.learn(x, 0.97, int(random.choice(12, p=p / p.sum())))
    assert weights.values[0] == pytest.approx(sharpness, rel=0.3)
    assert weights.values[1:].tolist() == [0, 0, 0]


def test_claims_of_coverage_are_checked_and_a_fixed_scorer_learns_nothing():
    weights, fixed = Weights(), Weights(learns=False)
    for chosen in [None] * 20:
        weights.learn(np.ones((3, 4)), 0.5, chosen)
        fixed.learn(np.ones((3, 4)), 0.5, chosen)
    assert (weights.trust, fixed.trust) == (pytest.approx(2 / 13), 1)
    made, tree = scorer()
    made.weights = weights
    [p] = probabilities(made.scored([tree.root], Drafted.pack([0], [proposal(t1=0.6, t2=0.2)]), 16))
    assert sum(p.values()) == pytest.approx(0.97 * 2 / 13, abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_a_mended_list_is_the_formula(seed):
    """Against softmax(w * z + v * hint) worked out at once, hints listed, joining and unknown."""
    random = np.random.default_rng(seed)
    made, tree = scorer(
        (1, 2, 3, 4, 9, 2, 3), ngrams=True, calibrate=True
    )  # 4 is what followed (2, 3)
    made.weights.values[:] = [1.7, 0.9, -0.4, 2.5]
    for tokens in ([4, 5, 6], [7, 5, 4], [5, 6, 7]):
        for noisy in (False, True):
            z = np.sort(random.normal(size=3))[::-1]
            [(_, got, scores)] = made.scored(
                [tree.root], Drafted.pack([0], [Proposal(np.array(tokens), z, coupled=noisy)]), 16
            )
            listed, x = made._lists[0].features()
            u = np.exp(x @ made.weights.values)
            want = dict(zip(listed, 0.97 * made.weights.trust * u / u.sum(), strict=True))
            assert dict(zip(got, np.exp(scores), strict=True)) == pytest.approx(want)
            assert scores == sorted(scores, reverse=True) and (4 in got) == (
                4 in tokens or not noisy
            )


def test_only_what_was_drafted_is_learnt_from_and_the_text_grows():
    made, tree = scorer((1, 2, 3), calibrate=True, ngrams=True)
    made.scored([tree.root], Drafted.pack([0], [proposal(t5=0.5, t6=0.4)]), 16)
    before = made.weights.values.copy()
    made.decided([5], [6])  # a node that was never proposed for
    assert (made.weights.values == before).all()
    made.decided([0], [6])
    assert made.weights.values[0] < before[0], "the drafter's favourite was wrong: believe it less"
    assert made._ngrams.after([]) is None and Ngrams((1, 2, 3, 6, 6, 3, 6)).after([]) == (
        6,
        LENGTHS.index(2),
    )
