"""bench compare --against: rivals write the same greedy texts, in drawn orders, and their figures stand beside ours.

Never how fast."""

import json

import pytest
from transformers import AutoModelForCausalLM

from flowspec import RankLost, UserError
from flowspec.bench.compare import Beside, Plan, Rivals, Run, compare, partings
from flowspec.bench.report import RIVALS
from flowspec.bench.rivals import Rival
from flowspec.bench.unsplit import answers, sampling
from flowspec.commands.bench import COMMANDS
from flowspec.engine import Engine
from flowspec.lossless import first_difference

TEXTS = ["def add(a, b):\n    return", "for i in"]


def test_where_two_texts_differ_first():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2


@pytest.mark.slow
def test_rivals_run_on_the_same_prompts_and_write_the_same_text(pair, tmp_path, capsys):
    draft = AutoModelForCausalLM.from_pretrained(pair.draft).eval()
    with Engine.from_config(pair.config(2)) as engine:
        answer = answers(pair.model, draft)
        rivals = Rivals(RIVALS, answer, engine.manifest.max_positions)
        plan = Plan(
            methods=["ar", "flowspec"], temperatures=[0.0, 0.8], repeats=2, rivals=rivals,
            output=tmp_path,
        )  # fmt: skip
        assert compare(engine, TEXTS, plan)
    said = capsys.readouterr().out
    for name in RIVALS:
        assert f"{name}, greedy: 4 of 4 identical" in said
    records = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 2 * 2 * 4
    theirs = [r for r in records if r["method"] in RIVALS]
    assert len(theirs) == 16 and all(r["bubbles"] is None for r in theirs)
    assert all(r["tokens_per_second"] > 0 and r["new_tokens"] == 40 for r in theirs)
    greedy = [r for r in records if r["temperature"] == 0]
    assert len({(r["prompt"], r["tokens_sha"]) for r in greedy}) == len(TEXTS)
    assert "vs assisted" in (tmp_path / "table.md").read_text()


def test_assisted_generation_takes_fewer_forwards_of_the_target(pair):
    answer = answers(pair.model, AutoModelForCausalLM.from_pretrained(pair.draft).eval())
    asked = {"tokens": [1, 2, 3], "new_tokens": 24, "temperature": 0.0, "seed": 0}
    plain, assisted = (answer({**asked, "side": side}) for side in RIVALS)
    assert plain["token_ids"] == assisted["token_ids"] == pair.greedy([1, 2, 3], 24)
    assert assisted["facts"]["target_forwards"] < plain["facts"]["target_forwards"] == 24


def test_filters_reach_the_rival():
    asked = {"temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.0}
    assert sampling(asked) == {
        "do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": None,
    }  # fmt: skip
    assert sampling({**asked, "temperature": 0}) == {"do_sample": False}


def test_no_text_is_longer_than_the_model_has_positions(pair):
    asked: list[dict] = []

    def answer(what: dict) -> dict:
        asked.append(what)
        return {"token_ids": [1], "prefill_seconds": 1.0, "decode_seconds": 0.0}

    rivals = Rivals(RIVALS, answer, room=160)
    with Engine.from_config(pair.config(1)) as engine:
        for length in (150, 3):
            found = rivals.run("assisted", 1, 1, [1] * length, engine.config.sampling)
    assert [what["new_tokens"] for what in asked] == [10, 40]
    assert found.record().tokens_per_second is None


@pytest.mark.parametrize(
    ("gap", "other", "said"),
    [
        (0.5, [1, 2, 3], "1 of 1 identical, 0 parted at a numeric tie, 0 at a bug"),
        (1e-6, [1, 9, 3], "0 of 1 identical, 1 parted at a numeric tie, 0 at a bug"),
        (0.5, [1, 9, 3], "0 of 1 identical, 0 parted at a numeric tie, 1 at a bug"),
        (1e-6, [1, 2], "0 of 1 identical, 0 parted at a numeric tie, 1 at a bug"),
        (1e-6, [1, 2, 3, 4], "0 of 1 identical, 0 parted at a numeric tie, 1 at a bug"),
    ],
)
def test_a_parting_is_found_and_told_a_tie_from_a_bug(monkeypatch, gap, other, said):
    monkeypatch.setattr(Run, "token_ids", [1, 2, 3])
    result = type("Result", (), {"temperature": 0.0})
    own = Run(None, 1, 1, None, result, None, None, [1.0, gap, 1.0], [])
    hot = Beside("transformers", 0.9, 1, 1, [7], 1.0, 1.0)
    found = partings([own], [Beside("transformers", 0.0, 1, 1, other, 1.0, 1.0), hot], 1e-3)
    assert {name: str(count) for name, count in found.items()} == {"transformers": said}


def test_a_rival_that_ends_is_named():
    with pytest.raises(RankLost, match=r"process of nobody ended \(exit code 3\)"):
        with Rival("nobody", ["-c", "import sys; sys.exit(3)"], 1) as rival:
            rival.ready()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "vllm", "--reference", "x"], "--against is vllm"),
        (["--against", "transformers"], "go together"),
        (["--reference", "x"], "go together"),
        (["--against", "transformers", "--reference", "/no"], "--reference /no: no such folder"),
        (["--against", "transformers", "--reference", "x", "emulate.stage_ms=5"], "emulated"),
    ],
)
def test_bad_input_is_one_line(pair, words, said):
    with pytest.raises(UserError, match=said):
        COMMANDS["compare"].main([str(pair.config(2)), *words])
