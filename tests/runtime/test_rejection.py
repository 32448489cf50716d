"""The rejection rule leaves the target's distribution, and a rule with a fault in it does not."""

import pytest
import torch

from flowspec.rejection import Kept, reject

DRAWS = 200_000
VOCABULARY = 5


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What target and draft model say after each token; some tokens are never drawn by one of them."""
    random = torch.Generator().manual_seed(seed)
    made = torch.rand(2, VOCABULARY, VOCABULARY, generator=random, dtype=torch.float64) ** 3
    made[0, :, 1] = made[1, :, 3] = 0
    return (made / made.sum(-1, keepdim=True)).unbind(0)


def texts(rule, seed: int, n: int):
    """Texts behind token 0: (tokens [DRAWS, n + 1], how many of them are known); the rest is -1."""
    target, draft = tables(seed)
    random = torch.Generator().manual_seed(seed + 1)
    context = torch.zeros(DRAWS, 1, dtype=torch.long)
    for _ in range(n):
        drawn = torch.multinomial(draft[context[:, -1]], 1, generator=random)
        context = torch.cat([context, drawn], 1)
    drafted = context[:, 1:]
    kept = rule(target[context], draft[context[:, :-1]], drafted, random)
    out = torch.full((DRAWS, n + 1), -1)
    places = torch.arange(n + 1)
    drafted = torch.cat([drafted, drafted[:, :1]], 1)
    out = torch.where(places < kept.accepted[:, None], drafted, out)
    return torch.where(places == kept.accepted[:, None], kept.token[:, None], out), target


def worst(rule, seed: int, n: int) -> float:
    """The largest chi-square of any token behind any other, over its critical value at 1e-6."""
    found, target = texts(rule, seed, n)
    before, most = torch.zeros(DRAWS, dtype=torch.long), 0.0
    for place in found.unbind(1):
        known = place >= 0
        for token in before[known].unique().tolist():
            drawn = place[known & (before == token)]
            if len(drawn) < 500:
                continue
            counts = torch.bincount(drawn, minlength=VOCABULARY).double()
            want = len(drawn) * target[token]
            if (counts[want == 0] > 0).any():
                return float("inf")
            some = want > 0
            chi = ((counts - want)[some] ** 2 / want[some]).sum()
            most = max(most, float(chi) / 33.38)  # 4 degrees of freedom, p = 1e-6
        before = place.clamp(min=0)
    return most


@pytest.mark.parametrize("n", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_texts_are_distributed_as_the_targets(seed, n):
    assert worst(reject, seed, n) < 1


def sure_of_itself(p, q, drafted, generator):
    """q is taken to be 1 where a guess is judged."""
    return reject(p, torch.ones_like(q), drafted, generator)


def resampled_from_p(p, q, drafted, generator):
    """In the place of a rejected guess, the target draws from all of p."""
    kept = reject(p, q, drafted, generator)
    again = torch.multinomial(p[torch.arange(len(p)), kept.accepted], 1, generator=generator)[:, 0]
    return Kept(kept.accepted, again)


def bonus_of_the_draft(p, q, drafted, generator):
    """Behind a draft that was accepted whole comes one more of the draft model's."""
    kept = reject(p, q, drafted, generator)
    more = torch.multinomial(q[:, -1], 1, generator=generator)[:, 0]
    return Kept(kept.accepted, torch.where(kept.accepted == drafted.shape[1], more, kept.token))


def one_more(p, q, drafted, generator):
    """The first rejected guess is kept."""
    kept = reject(p, q, drafted, generator)
    return Kept((kept.accepted + 1).clamp(max=drafted.shape[1]), kept.token)


@pytest.mark.parametrize("rule", [sure_of_itself, resampled_from_p, bonus_of_the_draft, one_more])
def test_a_rule_with_a_fault_is_found_out(rule):
    assert worst(rule, 1, 2) > 1


def test_a_draft_that_is_the_target_is_never_rejected():
    target, _ = tables(4)
    p = target[torch.zeros(DRAWS, 3, dtype=torch.long)]
    drafted = torch.multinomial(p[:, 0], 2, replacement=True)
    assert (reject(p, p[:, :2], drafted).accepted == 2).all()


def test_as_many_are_accepted_as_the_distributions_share():
    """The mean of n guesses with acceptance a is (a - a^(n + 1)) / (1 - a), Leviathan et al., eq. 1."""
    p, q = (table[0].repeat(DRAWS, 5, 1) for table in tables(2))
    a, n = float(torch.minimum(p[0, 0], q[0, 0]).sum()), 4
    random = torch.Generator().manual_seed(7)
    drafted = torch.multinomial(q[0, 0], DRAWS * n, True, generator=random).view(DRAWS, n)
    mean = float(reject(p, q[:, :n], drafted, random).accepted.double().mean())
    assert mean == pytest.approx((a - a ** (n + 1)) / (1 - a), abs=0.02)
