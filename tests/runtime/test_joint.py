"""Drafters asked for many requests at once: each gets what it would get alone."""

import random
from functools import partial

import numpy as np
import pytest
import torch

from flowspec.core.messages import Commit, DraftNode
from flowspec.core.request import Request, Sampling
from flowspec.draft.eagle import EagleDrafter
from flowspec.draft.lm import LmDrafter
from flowspec.draft.mixture import MixtureDrafter
from flowspec.draft.ngram import NgramDrafter
from flowspec.models import stage
from flowspec.sampling import NoiseRows
from tests.alone import Alone
from tests.runtime.test_eagle import load

HIDDEN, VOCABULARY, LIVE = 48, 320, 4
DEAD = DraftNode(99_999, 99_998, 7)


@pytest.fixture(scope="module")
def makers(deep):
    """kind -> a drafter of its own"""
    whole = stage.load_whole(deep.draft, torch.float32, "cpu")
    return {
        "lm": partial(LmDrafter, *whole, VOCABULARY),
        "eagle": partial(EagleDrafter, load(deep.head, deep)),
        "eagle3": partial(EagleDrafter, load(deep.head3, deep, "eagle3")),
        "ngram": NgramDrafter,
    }


@pytest.fixture
def make(makers):
    """A drafter of the kinds in `words`, several as one."""

    def one(words):
        made = [makers[word]() for word in words.split()]
        return made[0] if len(made) == 1 else MixtureDrafter(made)

    return one


def width_of(drafter):
    """Of the features that are told of each token; 0: none."""
    return HIDDEN * (len(drafter.layers) or drafter.features)


class Story:
    """What happens to one random request among others, and whether it would happen to it alone."""

    def __init__(self, r, id, drafter):
        self.r, self.width, self.late = r, width_of(drafter), bool(drafter.layers)
        prompt = tuple(self._token() for _ in range(r.randint(1, 12)))
        sampling = Sampling(temperature=r.choice([0.0, 0.7, 1.3]), seed=r.randrange(99))
        noise = r.choice([None, NoiseRows(sampling.seed, VOCABULARY)])
        features = self._features(len(prompt) - 1) if len(prompt) > 1 else None
        self.begun = Request(id=id, prompt=prompt, sampling=sampling), noise, features
        self.session = drafter.begin(*self.begun)
        self.past = []  # (method of a session or `propose`, its arguments, its result)
        self.coming, self.anchor, self.next_id = [], -1, 1
        self.paths = {0: [(0, prompt[-1])]}  # node -> (id, token) of the nodes from the root to it
        self.asked = set()

    def go_on(self):
        if self.coming and self.r.random() < 0.4:
            n = self.r.randint(1, len(self.coming))
            self._tell("learn", torch.stack(self.coming[:n]))
            del self.coming[:n]
        if self.r.random() < 0.4:
            self._commit()

    def batch(self):
        """Some nodes that can be gone on from, asked for or not, and perhaps one that cannot."""
        ready = [i for i, path in self.paths.items() if len(path) == 1 or path[-2][0] in self.asked]
        ids = sorted(self.r.sample(ready, self.r.randint(0, min(len(ready), 4))))
        above = [([(self.anchor, 0), *self.paths[i]])[-2][0] for i in ids]
        nodes = [
            DraftNode(i, parent, self.paths[i][-1][1]) for i, parent in zip(ids, above, strict=True)
        ]
        return [*nodes, *([DEAD] if self.r.random() < 0.2 else [])]

    def hear(self, nodes, answer):
        self.past.append(("propose", (nodes,), answer))
        assert DEAD.id not in answer.nodes
        for node in nodes:
            if node != DEAD and node.id not in self.asked:
                self.asked.add(node.id)
                proposal = answer.proposal(node.id)
                said = [] if proposal is None else proposal.tokens[:3].tolist()
                self._grow(node.id, {*said[: self.r.randint(1, 3)], self._token()})

    def replay(self, drafter):
        """The same alone, with a drafter that knows no other request."""
        alone = Alone(drafter)
        alone.begin(*self.begun)
        for name, given, answer in self.past:
            found = getattr(alone, name)(*given)
            if name == "propose":
                assert_same(answer, found)

    def _tell(self, name, *given):
        getattr(self.session, name)(*given)
        self.past.append((name, given, None))

    def _grow(self, parent, tokens):
        for token in sorted(tokens):
            self.paths[self.next_id] = [*self.paths[parent], (self.next_id, token)]
            self.next_id += 1

    def _commit(self):
        """A hit at a node below the root, or a miss behind any node."""
        *path, last = self.paths[self.r.choice(list(self.paths))]
        if path and self.r.random() < 0.6:
            root = last
        else:
            path, root = [*path, last], (self.next_id, self._token())
            self.next_id += 1
        tokens = tuple(token for _, token in [*path[1:], root])
        commit = Commit(tuple(i for i, _ in path), tokens, (False,) * len(path), root[0])
        known = self._features(len(path))
        self._tell("commit", commit, None if self.late else known)
        self.coming += known if self.late else ()
        self.anchor = path[-1][0]
        kept = {i: p[len(path) :] for i, p in self.paths.items() if root in p}
        self.paths = kept or {root[0]: [root]}

    def _token(self):
        """Of few, so that a look-up finds some."""
        return self.r.randrange(12)

    def _features(self, n):
        return torch.randn(n, self.width) if self.width else None


def assert_same(got, want):
    """Up to what is left of a sum's order, which may exchange two candidates of a tie."""
    assert (got.nodes, got.coupled) == (want.nodes, want.coupled)
    np.testing.assert_array_equal(got.coverage, want.coverage)
    for node in got.nodes:
        a, b = (
            dict(zip(p.tokens.tolist(), p.z, strict=True))
            for p in (got.proposal(node), want.proposal(node))
        )
        common = [*(a.keys() & b.keys())]
        assert len(common) >= max(1, len(a) - 1) and len(a) == len(b)
        np.testing.assert_allclose([a[t] for t in common], [b[t] for t in common], atol=1e-4)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kinds", ["lm", "eagle", "eagle3", "ngram", "lm eagle", "lm ngram eagle3"])
def test_asked_together_each_request_gets_what_it_gets_alone(make, kinds, seed, monkeypatch):
    """Requests begin and end at any time; commits, features and pauses in between are their own."""
    print(f"seed {seed}")
    if seed % 2:  # the text's rows do not fit in front of the nodes
        monkeypatch.setattr("flowspec.draft.lm.PREFILL_ROWS", 2)
    r, drafter = random.Random(seed), make(kinds)
    torch.manual_seed(seed)
    stories, live, most = [], [], 0
    for _ in range(40):
        if len(live) < LIVE and r.random() < 0.4:
            stories.append(Story(r, len(stories), drafter))
            live.append(stories[-1])
        if live and r.random() < 0.1:
            live.pop(r.randrange(len(live)))
        for story in live:
            story.go_on()
        asked = r.sample(live, r.randint(0, len(live)))
        batches = [story.batch() for story in asked]
        sessions = [story.session for story in asked]
        answers = drafter.propose([*zip(sessions, batches, strict=True)])
        for story, nodes, answer in zip(asked, batches, answers, strict=True):
            story.hear(nodes, answer)
        most = max(most, sum(1 for answer in answers if answer.nodes))
    assert len(stories) > LIVE and most > 1
    for story in stories:
        story.replay(make(kinds))


@pytest.mark.parametrize("kind", ["lm", "eagle", "eagle3"])
def test_requests_share_a_forward_and_an_lm_head(make, kind, monkeypatch):
    drafter, forwards, rows = make(kind), [], []
    verify, head = stage.verify_together, stage.Head.__call__
    monkeypatch.setattr(
        stage, "verify_together", lambda asks: (forwards.append(len(asks)), verify(asks))[1]
    )
    monkeypatch.setattr(
        stage.Head, "__call__", lambda self, x: (rows.append(len(x)), head(self, x))[1]
    )
    prompts = [(5, 6, 7), (8, 9), (1, 2, 3, 4)]
    sessions = [
        drafter.begin(
            Request(id=k, prompt=prompt, sampling=Sampling()),
            None,
            torch.randn(len(prompt) - 1, width_of(drafter)),
        )
        for k, prompt in enumerate(prompts)
    ]
    roots = [[DraftNode(0, -1, prompt[-1])] for prompt in prompts]
    drafter.propose([*zip(sessions, roots, strict=True)])
    assert (forwards, rows) == ([3], [3])
    below = [[DraftNode(1, 0, 20), DraftNode(2, 0, 21)], [DEAD], [DraftNode(1, 0, 20)]]
    answers = drafter.propose([*zip(sessions, below, strict=True)])
    assert (forwards[1:], rows[1:]) == ([2], [3])
    assert [answer.nodes for answer in answers] == [(1, 2), (), (1,)]
    [nothing] = drafter.propose([(sessions[1], [DEAD])])
    assert nothing.nodes == () and drafter.propose([]) == [] and len(forwards) == len(rows) == 2


def test_a_mixture_asks_each_member_once_for_all(make, monkeypatch):
    mixture, asked = make("lm ngram"), []
    for kind in (LmDrafter, NgramDrafter):
        monkeypatch.setattr(
            kind,
            "propose",
            lambda self, asks, propose=kind.propose: (
                asked.append((type(self), len(asks))),
                propose(self, asks),
            )[1],
        )
    request = Request(id=1, prompt=(5, 6, 5), sampling=Sampling())
    asks = [(mixture.begin(request, None), [DraftNode(0, -1, 5)]) for _ in range(3)]
    mixture.propose(asks)
    assert asked == [(LmDrafter, 3), (NgramDrafter, 3)]
