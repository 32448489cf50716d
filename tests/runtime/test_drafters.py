"""Drafters: what they propose does not depend on how they got there."""

import random

import numpy as np
import pytest
import torch

from flowspec.core.messages import KEPT, Commit, DraftNode
from flowspec.core.request import Request, Sampling
from flowspec.draft.lm import PREFILL_ROWS, LmDrafter
from flowspec.draft.ngram import NgramDrafter, NgramSession
from flowspec.models.stage import CachedText, load_whole
from flowspec.sampling import NoiseRows
from tests.alone import Alone

PROMPT = (5, 6, 7, 8)


def request(**sampling):
    return Request(id=1, prompt=PROMPT, sampling=Sampling(**sampling))


@pytest.fixture(scope="module")
def whole(pair):
    return load_whole(pair.draft, torch.float32, "cpu")


def from_scratch(whole, tokens):
    """The drafter's log-probabilities after these tokens, computed without any cache."""
    model, head = whole
    return torch.log_softmax(
        head(CachedText(model).prefill(torch.tensor(tokens)))[-1, :320].float(), -1
    )


@pytest.mark.parametrize("seed", range(6))
def test_an_incremental_tree_proposes_what_a_fresh_forward_would(whole, seed):
    """Random growth and commits: deep hits, misses, several commits without a draft in between."""
    print(f"seed {seed}")
    r, drafter = random.Random(seed), Alone(LmDrafter(*whole, 320))
    drafter.begin(request(), None)
    text, root, next_id = list(PROMPT), 0, 1
    anchor, path_of, children = -1, {0: []}, {}

    def node_of(id, path):
        """The node at the end of a path [(id, token), ...] below the root; the root's path is empty."""
        if not path:
            return DraftNode(id, anchor, text[-1])
        return DraftNode(id, path[-2][0] if len(path) > 1 else root, path[-1][1])

    for _ in range(25):
        if r.random() < 0.6:
            open_nodes = [i for i in path_of if i not in children]
            batch = r.sample(open_nodes, min(len(open_nodes), r.randint(1, 4)))
            nodes = [node_of(i, path_of[i]) for i in batch]
            answer = drafter.propose(nodes)
            for node in nodes:
                proposal = answer.proposal(node.id)
                want = from_scratch(whole, text + [t for _, t in path_of[node.id]])
                np.testing.assert_allclose(
                    proposal.z[:, 0], want[proposal.tokens].double().numpy(), atol=2e-4
                )
                assert proposal.tokens[0] == int(want.argmax()) and len(proposal.tokens) == KEPT
                children[node.id] = []
                for token in proposal.tokens[: r.randint(1, 3)].tolist():
                    path_of[next_id] = [*path_of[node.id], (next_id, token)]
                    children[node.id].append(next_id)
                    next_id += 1
        else:
            goal = r.choice(list(path_of))
            steps, hit = path_of[goal], r.random() < 0.6
            path, tokens = [root, *(i for i, _ in steps)], [t for _, t in steps]
            if hit and len(path) > 1:
                new_root, path = path[-1], path[:-1]
            else:
                new_root, next_id = next_id, next_id + 1
                tokens.append(r.randrange(300))
            drafter.commit(Commit(tuple(path), tuple(tokens), (False,) * len(tokens), new_root))
            text, anchor, root = text + tokens, path[-1], new_root
            kept = {
                i: p
                for i, p in path_of.items()
                if hit and len(steps) and any(n == new_root for n, _ in p)
            }
            cut = len(steps)
            path_of = {i: p[cut:] for i, p in kept.items()} or {root: []}
            children = {i: c for i, c in children.items() if i in path_of}


def test_noise_reranks_the_candidates(whole):
    noise = NoiseRows(3, 320)
    plain, coupled = Alone(LmDrafter(*whole, 320)), Alone(LmDrafter(*whole, 320))
    plain.begin(request(temperature=1.0, seed=3), None)
    coupled.begin(request(temperature=1.0, seed=3), noise)
    a, b = (d.propose([DraftNode(0, -1, PROMPT[-1])]).proposal(0) for d in (plain, coupled))
    logq = from_scratch(whole, list(PROMPT)).double()
    assert b.tokens.tolist() == (logq + noise(len(PROMPT))).topk(20).indices.tolist()
    assert a.tokens.tolist() != b.tokens.tolist() and (a.coupled, b.coupled) == (False, True)
    np.testing.assert_allclose(b.z[:, 0], (logq + noise(len(PROMPT)))[b.tokens].numpy(), atol=2e-4)


def test_a_node_whose_branch_died_gets_no_proposal(whole):
    drafter = Alone(LmDrafter(*whole, 320))
    drafter.begin(request(), None)
    drafter.propose([DraftNode(0, -1, PROMPT[-1])])
    drafter.commit(Commit((0,), (9,), (False,), 5))
    assert drafter.propose([DraftNode(1, 0, 30)]).nodes == ()


def test_a_token_beyond_the_drafts_padding_does_no_harm(whole):
    drafter = Alone(LmDrafter(*whole, 400))
    drafter.begin(Request(id=1, prompt=(5, 399, 6), sampling=Sampling()), None)
    proposal = drafter.propose([DraftNode(0, -1, 350)])
    assert proposal.tokens.max() < 320


def test_after_a_pause_the_text_is_read_in_chunks(whole, monkeypatch):
    rows, begin = [], 600
    forward = type(whole[0]).forward
    monkeypatch.setattr(
        type(whole[0]),
        "forward",
        lambda self, x, *more, **named: (rows.append(len(x)), forward(self, x, *more, **named))[1],
    )
    text = [random.Random(n).randrange(300) for n in range(begin)]
    drafter = Alone(LmDrafter(*whole, 320))
    drafter.begin(request(), None)
    drafter.propose([DraftNode(0, -1, PROMPT[-1])])
    rows.clear()
    for n, token in enumerate(text):  # nobody drafts
        drafter.commit(Commit((n,), (token,), (False,), n + 1))
    answer = drafter.propose([DraftNode(begin, begin - 1, text[-1])])
    assert rows == [
        PREFILL_ROWS,
        PREFILL_ROWS,
        begin - 1 - 2 * PREFILL_ROWS + 1,
    ]  # the first root has its row, the last is the node
    want = from_scratch(whole, [*PROMPT, *text])
    np.testing.assert_allclose(
        answer.z[0, :, 0], want[answer.tokens[0]].double().numpy(), atol=2e-4
    )
    child = DraftNode(begin + 1, begin, int(answer.tokens[0, 0]))
    want = from_scratch(whole, [*PROMPT, *text, child.token])
    np.testing.assert_allclose(
        drafter.propose([child]).z[0, :, 0], want.topk(KEPT).values.double().numpy(), atol=2e-4
    )


def test_the_memory_of_a_look_up_forgets_with_the_tree():
    drafter = Alone(NgramDrafter())
    drafter.begin(request(), None)
    for n in range(0, 300, 3):
        drafter.propose([DraftNode(n, n - 3, 8), DraftNode(n + 1, n, 20), DraftNode(n + 2, n, 21)])
        drafter.commit(Commit((n,), (22,), (False,), n + 3))
    assert len(drafter.session._ending) == 1 and not drafter.session._parent
    assert drafter.propose([DraftNode(301, 298, 5)]).nodes == ()  # below a dead node
    drafter.propose(
        [
            DraftNode(300, 297, 22),
            DraftNode(302, 300, 23),
            DraftNode(303, 300, 24),
            DraftNode(304, 302, 25),
        ]
    )
    drafter.commit(Commit((300,), (23,), (True,), 302))
    assert set(drafter.session._ending) == {302, 304}


def test_look_up_proposes_what_followed_before_longest_match_first():
    drafter = Alone(NgramDrafter())
    drafter.begin(
        Request(id=1, prompt=(1, 2, 3, 9, 4, 2, 3, 8, 1, 2, 3), sampling=Sampling()), None
    )
    proposal = drafter.propose([DraftNode(0, -1, 3)]).proposal(0)
    assert proposal.tokens.tolist() == [9] and proposal.coverage == NgramSession.LENGTHS[3]
    assert drafter.propose([DraftNode(1, 0, 9)]).tokens.tolist() == [[4]]


def test_look_up_learns_from_the_output():
    drafter = Alone(NgramDrafter())
    drafter.begin(request(), None)
    assert drafter.propose([DraftNode(0, -1, 8)]).nodes == ()
    drafter.commit(Commit((0, 1, 2), (20, 21, 8), (False,) * 3, 3))
    assert drafter.propose([DraftNode(3, 2, 8)]).tokens.tolist() == [[20]]


def test_a_node_that_is_asked_again_gets_the_same_answer(whole):
    drafter = Alone(LmDrafter(*whole, 320))
    drafter.begin(request(), None)
    root, child = DraftNode(0, -1, PROMPT[-1]), DraftNode(1, 0, 20)
    first = [drafter.propose([node]) for node in (root, child)]
    again = drafter.propose([root, child])
    np.testing.assert_allclose(again.z, np.concatenate([answer.z for answer in first]), atol=1e-5)
    drafter.commit(Commit((0,), (20,), (True,), 1))
    np.testing.assert_allclose(drafter.propose([child]).z, first[1].z, atol=1e-5)
