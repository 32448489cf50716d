"""lm_head and picks on the walk alone: what is computed, and that it is what all rows together give."""

import random

import pytest
import torch

from flowspec.core.request import Sampling
from flowspec.core.stage import Accepted
from flowspec.engine import Engine
from flowspec.models.logits import TreeLogits
from flowspec.models.stage import Head
from flowspec.runtime import picking, worker
from flowspec.runtime.picking import Picks
from flowspec.sampling import noise_for, pick

VOCABULARY, HIDDEN = 60, 16


class Counting(Head):
    """Notes how many rows each product takes."""

    def __init__(self, weight):
        super().__init__(weight)
        self.rows = []

    def __call__(self, features):
        self.rows.append(len(features))
        return super().__call__(features)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_p=0.9, seed=3)])
@pytest.mark.parametrize("seed", range(8))
def test_a_walk_sees_what_all_rows_together_give(sampling, seed):
    r, draw = random.Random(seed), torch.Generator().manual_seed(seed)
    head = Counting(torch.randn(VOCABULARY, HIDDEN, generator=draw))
    noise, n = noise_for(sampling, VOCABULARY), 60
    rows = torch.randn(n, HIDDEN, generator=draw)
    parents, positions = [-1], [4]
    for _ in range(n - 1):
        parents.append(r.randrange(max(0, len(parents) - 10), len(parents)))
        positions.append(positions[parents[-1]] + 1)
    whole = [
        pick(row, sampling, noise, p + 1) for row, p in zip(head(rows), positions, strict=True)
    ]
    # the first child carries its parent's choice; the others' tokens are none of the vocabulary's
    tokens, taken = [], set()
    for k, p in enumerate(parents):
        fits = p >= 0 and p not in taken
        taken |= {p} if fits else set()
        tokens.append(whole[p].token if fits else VOCABULARY + k)
    head.rows, accepted, looked, begin = [], Accepted(), {}, 0
    while begin < n:
        end = min(n, begin + r.randint(1, 30))
        part, before = slice(begin, end), len(head.rows)
        ids = list(range(begin, end))
        picks = Picks(
            head,
            sampling,
            noise,
            ids,
            parents[part],
            torch.tensor(positions[part]),
            rows[part],
        )

        def choose(k, picks=picks, ids=ids):
            looked[ids[k]] = picks[ids[k]]
            return looked[ids[k]].token

        found = accepted.walk(ids, parents[part], tokens[part], choose)
        assert len(head.rows) - before <= len(found), f"seed {seed}"
        assert found or len(head.rows) == before, "a product for nobody"
        begin = end
    assert max(head.rows) <= TreeLogits.ROWS and len(looked) > 2, f"seed {seed}"
    for k, got in looked.items():
        assert got.token == whole[k].token and got.gap == pytest.approx(whole[k].gap, abs=1e-4), (
            f"seed {seed}"
        )


@pytest.mark.parametrize("verify_on", ["last", "coordinator"])
@pytest.mark.parametrize("method", ["serial", "pruned", "pipedec", "flowspec"])
def test_only_tokens_of_the_text_are_picked(pair, monkeypatch, verify_on, method):
    picked, plain = [], picking.pick

    def noted(logits, sampling, noise, position):
        found = plain(logits, sampling, noise, position)
        picked.append((position, found.token))
        return found

    monkeypatch.setattr(picking, "pick", noted)
    prompt, settings = [7, 8, 9], dict(max_new_tokens=30, temperature=0.8, top_p=0.95, seed=2)
    with Engine.from_config(pair.config(2), [f"verify_on={verify_on}"]) as engine:
        text = [t.id for t in engine.generate(prompt, method=method, **settings)]
    inside = sorted(
        (p, t) for p, t in picked if p < len(prompt) + 30
    )  # a last stage may walk on while rank 0 stops
    assert inside == list(enumerate(text, len(prompt))), (
        "each position once, and nothing that was refused"
    )


def test_lm_head_and_picks_are_part_of_a_last_stages_measured_time(pair, monkeypatch):
    """By a clock that only a pick moves on."""
    now, seen = [0.0], []
    monkeypatch.setattr(worker.time, "monotonic", lambda: now[0])
    plain, account = picking.pick, worker.Worker._account

    def slow(*given):
        now[0] += 5.0
        return plain(*given)

    def noted(self, forward, lives, begun, spent):
        if self.head is not None and forward.segments:
            seen.append(spent)
        account(self, forward, lives, begun, spent)

    monkeypatch.setattr(picking, "pick", slow)
    monkeypatch.setattr(worker.Worker, "_account", noted)
    with Engine.from_config(pair.config(1), ["verify_on=last"]) as engine:
        assert len(list(engine.generate([7, 8, 9], method="ar", max_new_tokens=4))) == 4
    assert seen[:4] == [5.0] * 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_heads_compute_in_float32(monkeypatch, dtype):
    monkeypatch.setattr(Head, "PIECE", 7 * HIDDEN)
    weight, rows = torch.randn(VOCABULARY, HIDDEN).to(dtype), torch.randn(3, HIDDEN).to(dtype)
    for n in (1, 3):
        logits = Head(weight)(rows[:n])
        assert logits.dtype == torch.float32
        torch.testing.assert_close(
            logits.double(), rows[:n].double() @ weight.double().T, rtol=1e-5, atol=1e-5
        )
