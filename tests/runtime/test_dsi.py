"""Several target servers (DSI): whatever they are and whoever drafts, the text is that of plain decoding."""

import random

import pytest

from flowspec.bench.timeline import summary
from flowspec.core import dsi
from flowspec.engine import Engine
from flowspec.trace import read
from tests.runtime.test_identity import PROMPTS, SAMPLED, assert_same, slow, text

METHODS = ("dsi", "si", "flowspec", "ar")


def words(servers: int, **more) -> list[str]:
    return [f"dsi.servers={servers}", *(f"{key}={value}" for key, value in more.items())]


@pytest.mark.parametrize(
    "servers,stages,members,drafter,verify_on",
    [
        (2, 1, 1, "lm", "last"),
        (3, 2, 1, "eagle", "last"),
        slow(1, 1, 1, "lm", "last"),
        slow(2, 1, 2, "ngram", "last"),
        slow(7, 1, 1, "lm", "coordinator"),
        slow(2, 2, 2, "eagle", "coordinator"),
    ],
)
def test_every_method_writes_transformers_greedy_text(
    pair, servers, stages, members, drafter, verify_on, monkeypatch
):
    monkeypatch.setattr(dsi, "BEHIND", 8)  # so that servers also catch up
    settings = words(servers, verify_on=verify_on)
    with Engine.from_config(pair.config(stages, None, drafter, members), settings) as engine:
        for prompt in PROMPTS:
            want = pair.greedy(prompt, 24)
            for method in METHODS:
                assert_same(text(engine, prompt, method=method, max_new_tokens=24), want)


@pytest.mark.parametrize(
    "servers,lookahead", [(3, 5), (3, "auto"), slow(3, 1), slow(2, 2), slow(7, 16), slow(7, 1)]
)
def test_any_lookahead_writes_the_same_sampled_text(pair, servers, lookahead):
    settings = {"dsi.lookahead": lookahead, "tree.top_k": 1 if lookahead == 5 else "auto"}
    with Engine.from_config(pair.config(1), words(servers, **settings)) as engine:
        for sampling in SAMPLED:
            want = text(engine, PROMPTS[1], method="ar", **sampling)
            for method in ("dsi", "si"):
                assert_same(text(engine, PROMPTS[1], method=method, **sampling), want)


@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 5))])
def test_servers_of_different_speed_and_trees_of_any_shape_write_the_same_text(pair, seed):
    r = random.Random(seed)
    servers, stages = r.randint(2, 4), r.randint(1, 2)
    speeds = [r.choice([1, 3, 12]) for _ in range(servers * stages)]
    emulated = {"emulate.stage_ms": speeds, "emulate.draft_ms": r.choice([0.5, 2])}
    emulated |= {"emulate.link_ms": r.choice([0, 1, 4]), "policy.abort": r.random() < 0.7}
    tree = {"tree.top_k": r.randint(1, 4), "tree.depth": r.choice(["auto", 3, 9])}
    tree |= {"dsi.lookahead": r.randint(1, 16), "tree.budget": r.choice(["auto", 7, 40])}
    print(f"seed {seed}: {servers} servers of {stages} stages, {emulated}, {tree}")
    config = pair.config(stages, None, r.choice(["lm", "eagle", "ngram"]))
    with Engine.from_config(config, words(servers, **emulated, **tree)) as engine:
        for prompt in PROMPTS[:2]:
            assert_same(text(engine, prompt, method="dsi"), pair.greedy(prompt, 40))


def test_several_requests_share_the_servers(pair):
    with Engine.from_config(pair.config(1), words(3)) as engine:
        running = [
            (prompt, engine.submit(prompt, method=method))
            for prompt in PROMPTS
            for method in ("dsi", "si", "ar")
        ]
        for prompt, generation in running:
            assert_same([token.id for token in generation], pair.greedy(prompt, 40))


def test_the_drafter_never_waits_and_no_forward_is_spent_on_what_is_refused(pair):
    """A good drafter keeps several servers busy; a result tells of all of them."""
    emulated = {"emulate.stage_ms": 20, "emulate.draft_ms": 4}
    with Engine.from_config(pair.config(1), words(3, **emulated)) as engine:
        generation = engine.submit(PROMPTS[1], method="dsi")
        list(generation)
        result = generation.result
    assert result.world_size == 4 and len(result.stage_utilisation) == 3
    assert min(result.stage_utilisation) > 0, "every server had a task"
    assert result.accepted_tokens > 10


def test_every_server_is_on_the_timeline_and_every_token_was_picked_on_one(pair, tmp_path):
    path = tmp_path / "t.json"
    slow_enough = {"emulate.stage_ms": 8, "emulate.draft_ms": 2, "trace": path}
    with Engine.from_config(pair.config(2), words(3, **slow_enough)) as engine:
        tokens = list(engine.generate(PROMPTS[1], method="dsi", max_new_tokens=20))
    spans, facts = read(path)
    assert facts["servers"] == 3 and {s.rank for s in spans} == set(range(7))
    assert len(summary(spans, 2).utilisation) == 6
    work = [s for s in spans if s.row == "compute" and s.rank and s.name != "prefill"]
    for server in range(3):
        first, last = (
            sum(s.facts["accepted"] for s in work if s.rank == 2 * server + stage)
            for stage in (1, 2)
        )
        assert first >= last, "a row became text on the second stage alone"
    picked = sum(s.facts["accepted"] for s in work if s.rank % 2 == 0)
    assert picked >= len(tokens), "by some servers more than once"
