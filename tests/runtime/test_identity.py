"""The promise: whatever the method, the tree, the delays, the text is that of plain decoding."""

import random

import pytest

from flowspec.core.policies import METHODS as ALL_METHODS
from flowspec.engine import Engine

METHODS = [*(m for m in ALL_METHODS if m != "ar"), "ar"]
N = 24
"""tokens of a text"""
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(40, 75))]
SAMPLED = [
    dict(temperature=0.8, top_p=0.9, seed=1),
    dict(temperature=1.2, top_k=20, min_p=0.02, seed=4),
]

TIGHT = pytest.mark.parametrize("cache_step", [1], indirect=True, ids=["tight"])


def text(engine, prompt, **settings):
    return [t.id for t in engine.generate(prompt, **settings)]


def assert_same(got, want):
    if got != want:
        at = next(i for i, (a, b) in enumerate(zip(got, want, strict=True)) if a != b)
        raise AssertionError(f"differs at token {at}: {got[at]} for {want[at]}")


def slow(*values):
    """A case that the fast run leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "stages,layers,drafter",
    [
        slow(1, None, "ngram"),
        (2, "1,5", "lm"),
        slow(4, "2,1,1,2", "ngram"),
        slow(6, None, "lm"),
        slow(1, None, "lm"),
        slow(2, "1,5", "ngram"),
    ],
)
def test_every_method_writes_transformers_greedy_text(pair, stages, layers, drafter):
    with Engine.from_config(pair.config(stages, layers, drafter)) as engine:
        for prompt in PROMPTS:
            want = pair.greedy(prompt, N)
            for method in METHODS:
                assert_same(text(engine, prompt, method=method, max_new_tokens=N), want)


@pytest.mark.parametrize(
    "stages,verify_on",
    [(1, "last"), slow(1, "coordinator"), slow(3, "last"), slow(3, "coordinator")],
)
@pytest.mark.parametrize("coupled", ["true", slow("false")])
def test_every_method_writes_the_same_sampled_text(pair, stages, verify_on, coupled):
    with Engine.from_config(
        pair.config(stages), [f"verify_on={verify_on}", f"policy.coupled={coupled}"]
    ) as engine:
        for settings in SAMPLED:
            settings = settings | {"max_new_tokens": N}
            want = text(engine, PROMPTS[1], method="ar", **settings)
            for method in METHODS[:-1]:
                assert_same(text(engine, PROMPTS[1], method=method, **settings), want)


@TIGHT
@pytest.mark.parametrize("seed", [0, *map(slow, range(1, 8))])
def test_any_tree_and_segment(pair, cache_step, seed):
    r = random.Random(seed)
    tree = dict(
        budget=r.choice([1, 2, 7, 40, 200]),
        segment=r.choice([1, 2, 16, 64]),
        top_k=r.choice([1, 4, 16]),
        depth=r.choice([1, 3, 9]),
    )
    with Engine.from_config(
        pair.config(r.choice([1, 2, 4])), [f"tree.{k}={v}" for k, v in tree.items()]
    ) as engine:
        want = pair.greedy(PROMPTS[1], 40)
        for method in METHODS[:-1]:
            assert_same(text(engine, PROMPTS[1], method=method), want)


@pytest.mark.parametrize(
    "emulate",
    [
        "{stage_ms: 3, token_ms: 0.2, draft_ms: 1, link_ms: 2, link_mbps: 5, hidden_scale: 4}",
        slow("{stage_ms: [1, 6, 2], link_ms: 0}"),
        slow("{link_ms: 15}"),
        slow("{draft_ms: 10}"),
    ],
)
def test_any_delay(pair, emulate):
    with Engine.from_config(pair.config(3), [f"emulate={emulate}"]) as engine:
        for method in METHODS:
            assert_same(
                text(engine, PROMPTS[2], method=method, max_new_tokens=24),
                pair.greedy(PROMPTS[2], 24),
            )
            assert engine._last.result.emulated


@TIGHT
def test_dead_rows_left_in_place_or_gathered_at_once(pair, monkeypatch, cache_step):
    from flowspec.core.stage import StageState

    for limit in (-1, 10_000):
        monkeypatch.setattr(StageState, "COMPACT", limit)
        with Engine.from_config(pair.config(2)) as engine:
            for method in METHODS[:-1]:
                assert_same(
                    text(engine, PROMPTS[1], method=method, max_new_tokens=24),
                    pair.greedy(PROMPTS[1], 24),
                )


def test_long_prompts_are_prefilled_in_chunks(pair, monkeypatch):
    from flowspec.draft import lm
    from flowspec.runtime import driver

    monkeypatch.setattr(driver, "PREFILL_ROWS", 16)
    monkeypatch.setattr(lm, "PREFILL_ROWS", 24)
    prompt = [int(t) for t in (i * i % 290 for i in range(100))]
    with Engine.from_config(pair.config(3)) as engine:
        for method in METHODS:
            assert_same(
                text(engine, prompt, method=method, max_new_tokens=20), pair.greedy(prompt, 20)
            )


def test_the_draft_is_of_use(pair):
    """Not a promise of speed: that speculation commits more than a token a segment with a draft that agrees."""
    with Engine.from_config(pair.config(2), ["emulate.stage_ms=20"]) as engine:
        for method in ("serial", "flowspec"):
            text(engine, PROMPTS[1], method=method)
            result = engine._last.result
            assert result.accepted_tokens > 10 and result.drafted_tokens >= result.accepted_tokens
