"""The rejection rule leaves the target's distribution, and a rule with a fault in it does not."""

import itertools
import os

import pytest
import torch

from flowspec import rejection
from flowspec.core.messages import DraftNode
from flowspec.core.request import Request, Sampling
from flowspec.host.decoding import Ask, Text
from flowspec.host.rules import Keyed, Rejection, distinct, shared
from flowspec.host.trees import Branches, Likeliest
from flowspec.rejection import Kept, draw, reject
from flowspec.sampling import filtered

DRAWS = 200_000
TEXTS = int(os.environ.get("FLOWSPEC_TEXTS", "1500"))
VOCABULARY = 6
CRITICAL = {1: 23.9, 2: 27.6, 3: 30.7, 4: 33.4, 5: 35.9}  # chi-square at p = 1e-6, by freedom
FILTERS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.6, top_k=4),
    Sampling(temperature=1.5, top_p=0.9, top_k=5),
]


def logits(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What target and draft model say after each token."""
    random = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, VOCABULARY, VOCABULARY, generator=random)).unbind(0)


def tables(seed: int, sampling: Sampling) -> list[torch.Tensor]:
    return [torch.stack([filtered(row, sampling).exp() for row in made]) for made in logits(seed)]


def texts(rule, seed: int, shape, sampling, drawing=draw):
    """Texts behind token 0, walked down trees with so many children at each level.

    They are tokens [DRAWS, len(shape) + 1]; what is behind a token that was not drafted is -1."""
    target, draft = tables(seed, sampling)
    random = torch.Generator().manual_seed(seed + 1)
    last, alive = torch.zeros(DRAWS, dtype=torch.long), torch.ones(DRAWS, dtype=torch.bool)
    out = []
    for n in (*shape, 0):
        p, q = target[last], draft[last]
        kept = rule(p, q, drawing(q, n, random), random)
        out.append(torch.where(alive, kept.token, -1))
        last, alive = kept.token, alive & (kept.which < n)
    return torch.stack(out, 1), target


def worst(found: torch.Tensor, target: torch.Tensor) -> float:
    """The largest chi-square of the tokens behind any token, over its critical value."""
    before, most = torch.zeros(len(found), dtype=torch.long), 0.0
    for place in found.unbind(1):
        for token in range(VOCABULARY):
            drawn = place[(place >= 0) & (before == token)]
            if len(drawn) < 300:
                continue
            counts = torch.bincount(drawn, minlength=VOCABULARY).double()
            want = len(drawn) * target[token]
            if (counts[want == 0] > 0).any():
                return float("inf")
            some = want > 0
            if some.sum() > 1:
                chi = ((counts - want)[some] ** 2 / want[some]).sum()
                most = max(most, float(chi) / CRITICAL[int(some.sum()) - 1])
        before = place.clamp(min=0)
    return most


SHAPES = [(1,), (1, 1, 1, 1), (3,), (2, 3), (4, 2, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sampling", FILTERS, ids=str)
def test_texts_are_distributed_as_the_targets(shape, sampling):
    for seed in range(2):
        assert worst(*texts(reject, seed, shape, sampling)) < 1, f"seed {seed}"


def sure_of_itself(p, q, drafted, generator):
    """q is taken to be 1 where a guess is judged."""
    return reject(p, torch.ones_like(q), drafted, generator)


def resampled_from_p(p, q, drafted, generator):
    """In the place of rejected guesses, the target draws from all of p."""
    kept = reject(p, q, drafted, generator)
    again = torch.multinomial(p, 1, generator=generator)[:, 0]
    return Kept(kept.which, torch.where(kept.which == drafted.shape[1], again, kept.token))


def bonus_of_the_draft(p, q, drafted, generator):
    """Behind a draft that was accepted whole comes one more of the draft model's."""
    return reject(p if drafted.shape[1] else q, q, drafted, generator)


def one_more(p, q, drafted, generator):
    """The first guess is kept in any case."""
    kept = reject(p, q, drafted, generator)
    if not drafted.shape[1]:
        return kept
    lost = kept.which == drafted.shape[1]
    return Kept(torch.where(lost, 0, kept.which), torch.where(lost, drafted[:, 0], kept.token))


FAULTS = [sure_of_itself, resampled_from_p, bonus_of_the_draft, one_more]


@pytest.mark.parametrize("shape", [(1, 1), (2, 2)])
@pytest.mark.parametrize("rule", FAULTS)
def test_a_rule_with_a_fault_is_found_out(rule, shape):
    assert worst(*texts(rule, 1, shape, FILTERS[0])) > 1


def not_renormalised(p, q):
    left = (p - q).clamp(min=0)
    return torch.where(left.sum(1, keepdim=True) > 0, left, p)


def still_there(q, x):
    return q


@pytest.mark.parametrize("name,fault", [("_rest", not_renormalised), ("_without", still_there)])
def test_a_round_with_a_fault_is_found_out(name, fault, monkeypatch):
    monkeypatch.setattr(rejection, name, fault)
    assert max(worst(*texts(reject, seed, (3,), FILTERS[0])) for seed in range(3)) > 1


def test_draws_that_come_back_are_found_out():
    def again(q, n, generator):
        return (
            torch.multinomial(q, n, replacement=True, generator=generator) if n else q[:, :0].long()
        )

    assert max(worst(*texts(reject, seed, (3,), FILTERS[0], again)) for seed in range(3)) > 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_draft_that_is_the_target_is_never_rejected(n):
    target, _ = tables(4, FILTERS[0])
    p = target[torch.zeros(DRAWS, dtype=torch.long)]
    assert (reject(p, p, draw(p, n)).which == 0).all()


def test_as_many_are_accepted_as_the_distributions_share():
    """A guess is kept with the probability sum of min(p, q) (Leviathan et al., corollary 3.6)."""
    p, q = (table[0].repeat(DRAWS, 1) for table in tables(2, FILTERS[0]))
    share = float(torch.minimum(p[0], q[0]).sum())
    kept = float((reject(p, q, draw(q, 1)).which == 0).double().mean())
    assert kept == pytest.approx(share, abs=0.006)


def test_branches_are_shared_out():
    q = torch.tensor([0.7, 0.2, 0.1, 0.0])
    assert [distinct(q, n) for n in (1, 2, 8, 1000)] == [1, 1, 2, 3]
    for n in range(3, 40):
        shares = shared(q[:3], n)
        assert sum(shares) == n and min(shares) >= 1 and shares == sorted(shares, reverse=True)


# ---- whole texts of a model that looks at one token ----------------------------------------------
class Books:
    """A session without a model."""

    def commit(self, commit):
        self.anchor = commit.path[-1]


class Said(dict):
    """The logits after some nodes."""

    def all(self):
        return torch.stack([*self.values()])


def written(rule, grower, seed, n, eos=()):
    """Blocks of a text behind token 0."""
    models = dict(zip(("target", "draft"), logits(seed), strict=True))
    request = Request(id=1, prompt=(0,), sampling=Sampling(max_new_tokens=n), eos=frozenset(eos))
    text, blocks = Text(request, rule, grower, Books(), Books()), []
    while text.left:
        step, said = text.step(), None
        try:
            while True:
                ask: Ask = step.send(said)
                said = Said({node.id: models[ask.model][node.token] for node in ask.rows.nodes})
        except StopIteration as ended:
            blocks.append(ended.value)
    return blocks


RULES = {
    "rejection": lambda sampling: Rejection(sampling),
    "keyed": lambda sampling: Keyed(sampling, VOCABULARY),
}


@pytest.mark.slow
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("grower", [Branches(1, 3), Branches(4, 2), Likeliest(6, 2, 3)], ids=str)
def test_whole_texts_are_distributed_as_the_targets(rule, grower):
    """Texts of five tokens, each with a seed of its own; FLOWSPEC_TEXTS=40000 takes ten minutes."""
    if isinstance(grower, Likeliest) and rule == "rejection":
        pytest.skip("what was not drawn cannot be kept by rejection")
    sampling, found = Sampling(temperature=0.9, top_k=5), []
    target, _ = tables(3, sampling)
    for seed in range(TEXTS):
        made = RULES[rule](Sampling(temperature=0.9, top_k=5, seed=seed))
        found.append([w.token for block, _ in written(made, grower, 3, 5) for w in block])
    assert worst(torch.tensor(found), target) < 1


def test_tokens_an_iteration_are_the_closed_form():
    """With acceptance a and n guesses they are (1 - a^(n + 1)) / (1 - a) (Leviathan et al., eq. 1).

    Target and draft model say the same after every token, so a is the same everywhere."""
    same = [torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(k)) for k in (1, 2)]
    models = [row.repeat(VOCABULARY, 1) for row in same]
    sampling = Sampling(temperature=1.0, seed=1)
    p, q = (filtered(row, sampling).exp() for row in same)
    a, n = float(torch.minimum(p, q).sum()), 4

    def once(rule):
        text = Text(
            Request(id=1, prompt=(0,), sampling=Sampling(max_new_tokens=9)),
            rule,
            Branches(1, n),
            Books(),
            Books(),
        )
        step, said = text.step(), None
        try:
            while True:
                ask = step.send(said)
                table = models[ask.model == "draft"]
                said = Said({node.id: table[node.token] for node in ask.rows.nodes})
        except StopIteration as ended:
            return len(ended.value[0])

    rule = Rejection(sampling)
    mean = sum(once(rule) for _ in range(2000)) / 2000
    assert mean == pytest.approx((1 - a ** (n + 1)) / (1 - a), rel=0.07)


# ---- the likeliest tree --------------------------------------------------------------------------
def likeliest(table, budget, length, temperature):
    """All nodes of at most so many levels, by brute force: {path: score}, the likeliest."""
    logq = torch.log_softmax(table.double() / temperature, -1)
    scores = {}
    for depth in range(1, length + 1):
        for path in itertools.product(range(VOCABULARY), repeat=depth):
            before = (0, *path)
            scores[path] = sum(float(logq[a, b]) for a, b in itertools.pairwise(before))
    return sorted(scores, key=lambda path: -scores[path])[:budget]


@pytest.mark.parametrize("budget", [1, 5, 40, 200])
@pytest.mark.parametrize("width", [1, 3, 100])
def test_the_tree_is_that_of_the_likeliest_nodes(budget, width):
    table, length = logits(5)[1], 4
    rule = Keyed(Sampling(temperature=0.8, seed=1), VOCABULARY, coupled=False)
    growing = Likeliest(budget, width, length).grow(
        DraftNode(0, -1, 0), itertools.count(1), rule, 0, 100
    )
    said = None
    try:
        while True:
            nodes = growing.send(said)
            assert len(nodes) <= width
            said = table[torch.tensor([node.token for node in nodes])]
    except StopIteration as ended:
        tree = ended.value
    paths = {0: ()}
    for node in tree.nodes[1:]:
        paths[node.id] = (*paths[node.parent], node.token)
    assert {*paths.values()} - {()} == {*likeliest(table, budget, length, 0.8)}
    assert tree.height == max(map(len, paths.values()))
