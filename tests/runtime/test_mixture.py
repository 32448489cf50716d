"""Several drafters as one: the union of what they propose, who is told what, and that no text changes."""

import math

import numpy as np
import pytest
import torch

from flowspec import Engine, UserError
from flowspec.config import load_config
from flowspec.core.messages import Commit, Drafted, DraftNode, Proposal
from flowspec.core.policies import METHODS
from flowspec.core.request import Request, Sampling
from flowspec.core.score import Scorer
from flowspec.core.tree import TokenTree
from flowspec.draft.base import Drafter
from flowspec.draft.mixture import MixtureDrafter, united
from flowspec.preflight import check_run
from tests.alone import Alone


def answer(coupled=False, coverage=0.97, **lists):
    """Of nodes n<id>={token: z}."""
    made = [
        Proposal(np.array([*one]), np.array([*one.values()], float), coverage, coupled)
        for one in lists.values()
    ]
    return Drafted.pack([int(name[1:]) for name in lists], made)


def candidates(drafted, node):
    """token -> z by each drafter, in the order of the list."""
    proposal = drafted.proposal(node)
    return {
        token: pytest.approx(z)
        for token, z in zip(proposal.tokens.tolist(), proposal.z.tolist(), strict=True)
    }


# ---- what is proposed ------------------------------------------------------------------------------
def test_all_candidates_of_all_drafters_best_first_and_each_once():
    both = united(
        [3], [answer(n3={7: -0.5, 8: -2.0}), answer(n3={9: -0.1, 8: -0.4, 7: -5.0}, coverage=0.5)]
    )
    cut = -2.0 - math.log(2)
    assert candidates(both, 3) == {8: [-2.0, -0.4], 9: [cut, -0.1], 7: [-0.5, -5.0]}
    assert (
        list(candidates(both, 3)) == [8, 9, 7]
        and both.coverage.tolist() == [0.97]
        and not both.coupled
    )
    assert both.z.shape == (1, 3, 2), "no column for a token that was there already"


def test_a_drafter_that_cannot_go_on_from_a_node_says_nothing_of_it():
    first = answer(n3={7: -0.5, 8: -2.0}, n6={1: -0.3}, coupled=True)
    look_up = answer(n5={4: 0.0}, n6={2: 0.0}, coverage=0.25)
    both = united([5, 3, 4, 6], [first, look_up])
    assert both.nodes == (5, 3, 6) and both.coverage.tolist() == [0.25, 0.97, 0.97] and both.coupled
    assert candidates(both, 3) == {7: [-0.5, 0.0], 8: [-2.0, 0.0]} and candidates(both, 5) == {
        4: [0.0, 0.0]
    }
    half = math.log(2)
    assert candidates(both, 6) == {1: [-0.3, -half], 2: [-0.3 - half, 0.0]}, (
        "a list of one is for its token"
    )
    assert both.proposal(4) is None
    nobody = united([1, 2], [answer(), answer()])
    assert nobody.nodes == () and nobody.tokens.size == 0


class Noting(Drafter):
    def __init__(self, features=False, layers=()):
        self.features, self.layers, self.heard = features, layers, []

    def begin(self, request, noise, features=None):
        self.heard.append((noise, features))
        return self

    def propose(self, asks):
        return [answer(**{f"n{n.id}": {5: -1.0} for n in nodes}) for _, nodes in asks]

    def commit(self, commit, features=None):
        self.heard.append(features)

    def learn(self, features):
        self.heard.append(features)


def test_only_members_that_read_features_get_them():
    reads, others = Noting(True), Noting(False)
    drafter = Alone(MixtureDrafter([others, reads]))
    rows = torch.zeros(2, 4)
    drafter.begin(Request(id=1, prompt=(1, 2, 3), sampling=Sampling()), "noise", rows)
    drafter.commit(Commit((0,), (5,), (False,), 1), rows)
    assert drafter.drafter.features and not MixtureDrafter([others]).features
    assert others.heard == [("noise", None), None]
    assert reads.heard[0] == ("noise", rows) and reads.heard[1] is rows
    assert drafter.propose([DraftNode(0, -1, 3)]).z.tolist() == [[[-1.0, -1.0]]]


def test_features_that_arrive_late_go_to_members_that_read_layers():
    reads, others = Noting(layers=(2, 4, 5)), Noting()
    drafter = Alone(MixtureDrafter([others, reads]))
    assert not drafter.drafter.features and drafter.drafter.layers == (2, 4, 5)
    rows, more = torch.zeros(2, 12), torch.zeros(1, 12)
    drafter.begin(Request(id=1, prompt=(1, 2, 3), sampling=Sampling()), None, rows)
    drafter.commit(Commit((0,), (5,), (False,), 1))
    drafter.learn(more)
    assert others.heard == [(None, None), None]
    assert reads.heard[0][1] is rows and reads.heard[1] is None and reads.heard[2] is more


# ---- how it is scored ------------------------------------------------------------------------------
def scorer():
    made, tree = Scorer(calibrate=True, ngrams=False), TokenTree(3, 2)
    made.attach(tree, (1, 2, 3), {})
    return made, tree


def test_a_score_weighs_each_drafter_and_ranks_anew():
    made, tree = scorer()
    both = united([0], [answer(n0={7: -0.2, 8: -3.0}), answer(n0={8: -0.1, 9: -2.0, 7: -2.5})])
    for weights in (None, [2.0, 0.3], [0.1, 1.7]):
        if weights:
            made.weights.values[:2] = weights
        [(_, tokens, scores)] = made.scored([tree.root], both, 16)
        u = {
            token: np.dot(weights or [0.5, 0.5], z.expected)
            for token, z in candidates(both, 0).items()
        }
        p = {
            token: 0.97 * made.weights.trust * math.exp(x) / sum(map(math.exp, u.values()))
            for token, x in u.items()
        }
        assert dict(zip(tokens, np.exp(scores), strict=True)) == pytest.approx(p)
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("right", [0, 1])
def test_the_drafter_that_is_right_gains_weight(right):
    made, tree = scorer()
    random = np.random.default_rng(2)
    for _ in range(60):
        chosen, wrong = random.permutation(50)[:2].tolist()
        lists = [{wrong: -0.7, 60: -1.5}, {wrong: -0.7, 61: -1.5}]
        lists[right] = {chosen: -0.7, 60: -1.5}
        made.scored([tree.root], united([0], [answer(n0=one) for one in lists]), 16)
        made.decided([0], [chosen])
    gained, other = made.weights.values[[right, 1 - right]]
    assert gained > 1 and gained > 3 * other


def test_a_drafter_that_said_nothing_is_not_judged():
    made, tree = scorer()
    for _ in range(20):
        made.scored([tree.root], united([0], [answer(n0={7: -0.2, 8: -3.0}), answer()]), 16)
        made.decided([0], [8])
    assert made.weights.values[0] == 0.05 and made.weights.values[1] == 0.5


# ---- in a run --------------------------------------------------------------------------------------
def mixture(pair, *more, head="eagle"):
    folder = pair.head if head == "eagle" else pair.head3
    members = [
        f"{{kind: {head}, path: {folder}}}",
        f"{{kind: lm, path: {pair.draft}}}",
        "{kind: ngram}",
        *more,
    ]
    return f"drafter=[{', '.join(members)}]"


SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("eagle", "last"), ("eagle", "coordinator"), ("eagle3", "last"))
]


@pytest.mark.parametrize("head,verify_on", SLOW)
def test_every_method_writes_the_targets_text(request, head, verify_on):
    pair = request.getfixturevalue("pair" if head == "eagle" else "deep")
    words = [
        mixture(pair, head=head),
        f"verify_on={verify_on}",
        "emulate={stage_ms: 5, draft_ms: 1}",
    ]
    with Engine.from_config(pair.config(2), words) as engine:

        def text(method, **settings):
            return [
                t.id
                for t in engine.generate([7, 8, 9], method=method, max_new_tokens=24, **settings)
            ]

        want = pair.greedy([7, 8, 9], 24)
        for method in METHODS:
            assert text(method) == want
            assert method != "serial" or engine._last.result.accepted_tokens > 3
        for settings in (dict(temperature=0.8, top_p=0.9, seed=1), dict(temperature=1.2, seed=4)):
            texts = [text(method, **settings) for method in METHODS]
            assert texts == texts[:1] * len(METHODS)


def test_a_list_of_one_is_that_drafter(pair):
    alone = load_config(pair.config(2), ["drafter=[{kind: ngram}]"])
    assert [d.kind for d in alone.drafters] == ["ngram"] and not alone.reads_features
    assert load_config(pair.config(2), [mixture(pair)]).reads_features


@pytest.mark.parametrize(
    "words,said",
    [
        ("[{kind: ngram}, {kind: ngrma}]", "drafter.1.kind is ngrma: did you mean ngram?"),
        ("[{kind: ngram}, {kind: lm}]", "drafter.1.path is missing: kind lm needs"),
        ("[{kind: none}, {kind: ngram}]", "drafter.0.kind is none"),
        ("[{knid: ngram}]", "unknown key drafter.0.knid: did you mean drafter.0.kind?"),
        ("[ngram]", "drafter.0 must be a mapping"),
        ("[]", "drafter is an empty list"),
        (
            "[{kind: eagle, path: x}, {kind: ngram}, {kind: eagle3, path: y}]",
            "drafter lists an eagle and an eagle3 head",
        ),
        ("[{kind: ngram}, {kind: eagle, path: nowhere}]", "drafter.1.path nowhere: no such folder"),
    ],
)
def test_what_is_wrong_with_a_member_is_said_by_its_key(pair, words, said):
    with pytest.raises(UserError) as error:
        check_run(load_config(pair.config(2), [f"drafter={words}"]))
    assert said in str(error.value)


def test_a_head_of_another_target_is_refused_by_its_key(pair, tmp_path):
    (tmp_path / "config.json").write_text(
        (pair.head / "config.json").read_text().replace('"hidden_size": 48', '"hidden_size": 64')
    )
    with pytest.raises(
        UserError, match=r"drafter\.3\.path: .*hidden_size is 64, the target's is 48"
    ):
        check_run(
            load_config(pair.config(2), [mixture(pair, f"{{kind: eagle, path: {tmp_path}}}")])
        )
