"""Rows of several requests in one forward: for each what it is alone, and nothing of the others."""

import random

import pytest
import torch

from flowspec.core.messages import Prune
from flowspec.core.stage import StageState
from flowspec.models import jit
from flowspec.models.eagle import load_eagle
from flowspec.models.manifest import Manifest
from flowspec.models.stage import (
    ALWAYS,
    Cached,
    CachedText,
    DraftRows,
    Head,
    Share,
    forward_together,
    load_whole,
    verify_together,
)

DEAD = 10**6
"""a parent that no stage has ever held"""
KINDS = {
    **{
        f"native {str(dtype)[6:]}": (dtype, True, False)
        for dtype in (torch.float32, torch.bfloat16, torch.int8)
    },
    **{
        f"transformers {str(dtype)[6:]} alone": (dtype, False, True)
        for dtype in (torch.float32, torch.bfloat16)
    },
    "transformers float32": (torch.float32, False, False),
}


@pytest.fixture(params=KINDS)
def model(request, small, monkeypatch):
    """A whole model of two layers, and how two of its results are compared."""
    dtype, native, alone = KINDS[request.param]
    if native and not jit.available():
        pytest.skip("no llvmlite, or a processor without fused multiply-add")
    monkeypatch.setattr(jit, "available", lambda: native)
    monkeypatch.setattr(StageState, "COMPACT", 4)
    model, _ = load_whole(small, dtype, "cpu")
    if alone:
        model.compute_alone()
    assert model.native is native and model.alone is alone
    return model, same if native or alone else close


def same(a, b):
    assert torch.equal(a, b), f"{(a - b).abs().max():.1e} apart"


def close(a, b):
    torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-4)


def tokens(rng, n):
    return torch.tensor([rng.randrange(320) for _ in range(n)], dtype=torch.long)


def grown(rng, state, new, n):
    """Ids and parents of n nodes: the root if it is missing, others below any that live."""
    ids, parents = [], []
    for i in range(new, new + n):
        above = [*state.row, *ids]
        parents.append(rng.choice(above) if above else -1)
        ids.append(i if above else state.root)
    return ids, parents


def decided(rng, state, version, new):
    """Any living node becomes text; the next root is one of its children or still to come."""
    anchor = rng.choice([*state.row])
    below = [i for i, parent in state.parent.items() if parent == anchor]
    return Prune(version, anchor, rng.choice([*below, new]))


class Twice:
    """A request's books, and its rows in two caches: computed with others', and by themselves."""

    def __init__(self, rng, model, same):
        self.rng, self.same, self.state = rng, same, StageState()
        taps = rng.choice([(), (0,), (1,), (0, 1), (1, 0)])
        self.together, self.alone = Cached(model, taps=taps), Cached(model, taps=taps)
        self.new = self.version = 0

    def text(self):
        """Rows of a chunk: tokens, what is admitted, and no ids."""
        rows = tokens(self.rng, self.rng.randint(1, 70))
        return rows, self.state.extend(len(rows)), None

    def tree(self, alive=True):
        """Rows of a segment, some of them dead on arrival, or all."""
        ids, parents = grown(self.rng, self.state, self.new, self.rng.randint(1, 5))
        parents = [p if alive and self.rng.random() < 0.8 else DEAD for p in parents]
        ids = [i if alive else i + DEAD for i in ids]
        self.new += len(ids) + 1
        return tokens(self.rng, len(ids)), self.state.admit(ids, parents, drop=False), ids

    def check(self, out, rows, admitted, ids):
        """`out`: what came of the forward with others, None if it was abandoned."""
        needed = ALWAYS if out is not None else lambda: False
        expected = self.alone.forward(rows, admitted, needed, ids)
        if out is None:
            assert expected is None
        else:
            self.same(out, expected)
        self.check_tapped(self.together.entered(7), self.alone.entered(7))
        for cached in (self.together, self.alone):
            assert cached.cache.length == self.state.length <= cached.cache.capacity

    def prune(self):
        """Decide at random; rows may move."""
        self.version += 1
        prune = decided(self.rng, self.state, self.version, self.new)
        text, at = self.state.decided(prune), self.state.context
        gather = self.state.prune(prune)
        both = (self.together, self.alone)
        self.check_tapped(*(cached.settle(at, text, self.state.row) for cached in both))
        for cached in both:
            if gather:
                cached.cache.gather(gather)
        return gather is not None

    def check_tapped(self, a, b):
        assert (a is None) == (b is None)
        if a is not None:
            assert a.at == b.at
            self.same(a.rows, b.rows)


def so_often(times):
    """Needed when asked for the first `times` times."""
    answers = iter([True] * times)
    return lambda: next(answers, False)


def forward(some, given, needed):
    """These requests' rows in one forward: of each, its features."""
    shares = [
        Share(each.together, admitted, ids)
        for each, (_, admitted, ids) in zip(some, given, strict=True)
    ]
    out = forward_together(torch.cat([rows for rows, *_ in given]), shares, needed)
    return [None] * len(some) if out is None else out.split([len(rows) for rows, *_ in given])


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 4))]
)
def test_a_forward_of_several_requests_is_that_of_each(model, cache_step, seed):
    """Text beside trees, other taps, moves of rows in between, forwards that nobody needs."""
    print("seed", seed)
    rng, happened = random.Random(seed), set()
    requests = [Twice(rng, *model) for _ in range(4)]
    for _ in range(60):
        some, alive = rng.sample(requests, rng.randint(1, 4)), rng.random() < 0.8
        given = [
            each.text()
            if not each.state.context or (alive and rng.random() < 0.1)
            else each.tree(alive)
            for each in some
        ]
        text = any(ids is None for *_, ids in given)
        needed = ALWAYS if alive or text else so_often(rng.randint(0, 6))
        made = forward(some, given, needed)
        happened.add("abandoned" if made[0] is None else "together" if len(some) > 1 else "one")
        for each, out, mine in zip(some, made, given, strict=True):
            each.check(out, *mine)
        for each in some:
            if each.state.row and rng.random() < 0.5:
                happened |= {"gathered"} if each.prune() else set()
    assert happened == {"abandoned", "together", "one", "gathered"}


@pytest.mark.parametrize("seed", range(3))
def test_what_several_drafts_ask_is_what_each_asks(model, seed):
    print("seed", seed)
    (model, same), rng = model, random.Random(seed)
    together, alone = ([CachedText(model) for _ in range(3)] for _ in range(2))
    new = [0] * 3
    for pair in zip(together, alone, strict=True):
        prompt = tokens(rng, rng.randint(1, 90))
        same(*(sequence.prefill(prompt) for sequence in pair))
    for version in range(1, 16):
        some, asked = rng.sample(range(3), rng.randint(1, 3)), []
        for k in some:
            state = together[k].state
            at = state.context - rng.randint(0, min(2, state.context))
            ids, parents = grown(rng, state, new[k], rng.randint(1, 4))
            new[k] += len(ids) + 1
            rows = tokens(rng, rng.randint(0, 3) + len(ids))
            asked.append((rows, at, ids, parents))
        made = verify_together(
            [DraftRows(together[k], *a) for k, a in zip(some, asked, strict=True)]
        )
        for k, ask, (positions, out) in zip(some, asked, made, strict=True):
            [(where, expected)] = verify_together([DraftRows(alone[k], *ask)])
            assert (positions == where).all()
            same(out, expected)
            prune = decided(rng, together[k].state, version, new[k])
            together[k].prune(prune)
            alone[k].prune(prune)


@pytest.mark.parametrize("kind,name", [("eagle", "head"), ("eagle3", "head3")])
def test_heads_of_eagle_serve_several_requests(deep, kind, name):
    head = Head(torch.zeros(320, 48))
    manifest = Manifest.load(deep.split(2))
    eagle = load_eagle(kind, getattr(deep, name), manifest, head, torch.float32, "cpu")
    torch.manual_seed(5)
    together, alone = ([CachedText(eagle.layer) for _ in range(2)] for _ in range(2))
    asked = []
    for k, n in enumerate((4, 30)):
        rows = eagle.rows(torch.arange(n), torch.randn(n, 48))
        for sequence in (together[k], alone[k]):
            sequence.prefill(rows[:-3])
        asked.append((rows[-3:], n - 3, [0, 1], [-1, 0]))
    made = verify_together([DraftRows(together[k], *ask) for k, ask in enumerate(asked)])
    for k, (positions, out) in enumerate(made):
        [(where, expected)] = verify_together([DraftRows(alone[k], *asked[k])])
        assert positions.tolist() == where.tolist()
        close(out, expected)


def test_the_time_of_a_forward_is_shared_by_rows(small):
    model, _ = load_whole(small, torch.float32, "cpu")
    rng = random.Random(1)
    one, three = (Twice(rng, model, same) for _ in range(2))
    given = [(tokens(rng, n), each.state.extend(n), None) for each, n in ((one, 1), (three, 3))]
    forward([one, three], given, ALWAYS)
    assert 0 < one.together.model_cpu == pytest.approx(three.together.model_cpu / 3)
