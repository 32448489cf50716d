"""scripts/compare_transformers.py: four sides, one text; what the report says of made-up runs, and of real processes. Never how fast."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from flowspec.engine import Engine

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "compare_transformers.py"
spec = importlib.util.spec_from_file_location("compare_transformers", SCRIPT)
compare = sys.modules["compare_transformers"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(compare)

TEXTS = ["def add(a, b):\n    return", "for i in"]
RATES = {"decode_rate", "total_rate"}


def run(
    side: str,
    prompt: int,
    repeat: int,
    tokens: list[int],
    seconds: float,
    gaps: list[float] | None = None,
) -> compare.Run:
    return compare.Run(prompt, repeat, 0, side, tokens, gaps, seconds / 4, seconds * 3 / 4, {})


def test_all_sides_write_the_same_tokens_in_every_drawn_order(pair):
    draft = AutoModelForCausalLM.from_pretrained(pair.draft).eval()
    with Engine.from_config(pair.config(2)) as engine:
        ring, alone = compare.ring(engine), compare.alone(pair.model, draft)
        plan = compare.Plan([engine.text.encode(text) for text in TEXTS], 160, 24, 3, 0.0, 5)
        runs = compare.measure(
            plan,
            {side: ring if side in compare.RING else alone for side in compare.SIDES},
            lambda line: None,
        )
    found = compare.report(plan, TEXTS, runs)
    assert len(runs) == 2 * 3 * 4 and compare.verdict(found) == (0, 0)
    for number, (tokens, each) in enumerate(zip(plan.prompts, found["prompts"], strict=True)):
        want = pair.greedy(tokens, 24)
        assert each["token_ids"] == want and each["partings"] == []
        assert all(r.token_ids == want for r in runs if r.prompt == number)
    orders = {tuple(r.side for r in runs[i : i + 4]) for i in range(0, len(runs), 4)}
    assert len(orders) > 1 and all(sorted(order) == sorted(compare.SIDES) for order in orders)
    forwards = {r.side: r.facts["target_forwards"] for r in runs if r.side in compare.ALONE}
    assert forwards["assisted"] < forwards["transformers"] == 24


def test_above_zero_the_ring_draws_one_text_a_repeat(pair):
    with Engine.from_config(pair.config(1)) as engine:
        plan = compare.Plan([engine.text.encode(TEXTS[0])], 160, 16, 2, 0.9, 5)
        ring = compare.ring(engine)
        runs = compare.measure(plan, dict.fromkeys(compare.RING, ring), lambda line: None)
    assert compare.partings(runs, 0.9) == []
    assert len({tuple(r.token_ids) for r in runs}) == 2


def test_no_text_is_longer_than_the_model_has_positions():
    plan = compare.Plan([(1,) * 150, (1,) * 3], 160, 40, 1, 0.0, 0)
    assert [plan.asked("ar", number, 0)["new_tokens"] for number in (0, 1)] == [10, 40]


def test_ratios_are_of_runs_of_the_same_prompt_and_repeat():
    ids = list(range(5))
    fast, slow = (
        [run("flowspec", 0, r, ids, 1.0 + r) for r in (0, 1)],
        [run("ar", 0, r, ids, s) for r, s in ((0, 2.0), (1, 8.0))],
    )
    found = compare.rates([*fast, *slow])
    assert found["ar"]["flowspec_over_total_rate"] == {
        "median": 3.0,
        "min": 2.0,
        "max": 4.0,
        "count": 2,
    }
    assert found["ar"]["total_rate"] == {
        "median": (5 / 2 + 5 / 8) / 2,
        "min": 5 / 8,
        "max": 5 / 2,
        "count": 2,
    }
    assert found["flowspec"]["decode_rate"]["max"] == pytest.approx(4 / 0.75)
    assert found["assisted"]["total_rate"] is None


@pytest.mark.parametrize(("gap", "tie"), [(1e-6, True), (0.5, False)])
def test_a_parting_is_found_and_told_a_tie_from_a_bug(gap, tie):
    plain = run("ar", 0, 0, [1, 2, 3], 1.0, [1.0, gap, 1.0])
    sides = [
        plain,
        run("flowspec", 0, 0, [1, 2, 3], 1.0),
        run("transformers", 0, 0, [1, 9, 3], 1.0),
    ]
    expected = {
        "side": "transformers",
        "prompt": 0,
        "repeat": 0,
        "new_token": 1,
        "gap": gap,
        "tie": tie,
    }
    assert compare.partings(sides, 0.0) == [expected]
    assert compare.partings(sides, 0.9) == []


def test_a_text_that_ends_early_is_a_bug():
    sides = [run("ar", 0, 0, [1, 2], 1.0, [1.0, 1.0]), run("assisted", 0, 0, [1, 2, 3], 1.0)]
    [found] = compare.partings(sides, 0.0)
    assert (found["new_token"], found["gap"], found["tie"]) == (2, None, False)


def test_bad_input_is_one_line(pair, tmp_path, capsys):
    folders = ["--model", str(pair.target), "--draft", str(pair.draft)]
    for more in (
        ["--repeats=0"],
        ["--stages=7"],
        ["--prompts=none.jsonl"],
        [f"--json={tmp_path}"],
        [f"--draft={tmp_path / 'none'}"],
    ):
        assert compare.main([*folders, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("flowspec: ") and error.count("\n") == 1, error


@pytest.mark.slow  # starts four processes that import torch
def test_the_whole_comparison_over_processes(pair, tmp_path, capsys):
    prompts, out, trace = tmp_path / "prompts.jsonl", tmp_path / "out.json", tmp_path / "trace.json"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*TEXTS, "unused"]))
    words = [
        "--model",
        pair.target,
        "--draft",
        pair.draft,
        "--prompts",
        prompts,
        "--json",
        out,
        "--trace",
        trace,
    ]
    assert (
        compare.main([*map(str, words), "--prompts-used=2", "--new-tokens=12", "--repeats=2"]) == 0
    )
    found = json.loads(out.read_text())
    assert [each["prompt"] for each in found["prompts"]] == TEXTS
    assert len(found["runs"]) == 2 * 2 * 4 and compare.verdict(found) == (0, 0)
    assert set(found["sides"]) == set(compare.SIDES)
    for side in found["sides"].values():
        assert set(side) == {*RATES, *(f"flowspec_over_{rate}" for rate in RATES)}
        assert all(
            value["count"] == 4 and value["min"] <= value["median"] <= value["max"]
            for value in side.values()
        )
    assert found["processes"]["ring"] == {"threads": 1, "dtype": "float32"}
    assert found["processes"]["transformers"]["threads"] == 2
    assert found["processes"]["transformers"]["assistant"]["num_assistant_tokens"] == 20
    assert set(found["idle_cpu"]) == {"ring", "transformers"}
    assert found["strangers_cores"]["count"] == 16 and found["strangers_cores"]["min"] >= 0
    assert json.loads(trace.read_text())
    shown = capsys.readouterr().out
    assert "16 of 16 runs identical to ar" in shown and all(repr(text) in shown for text in TEXTS)
