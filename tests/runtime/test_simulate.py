"""The simulator's and the comparison's commands, on the tiny pair."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from flowspec import Engine, UserError
from flowspec.bench import forecast, report
from flowspec.bench.compare import Plan, compare, priced
from flowspec.bench.forecast import PAPER, Forecaster, Models, emulated, obstacle
from flowspec.bench.simulate import load_costs
from flowspec.cli import main
from flowspec.commands.options import DEMO_PROMPTS
from flowspec.config import load_config
from flowspec.core.cost import Emulate, Point
from flowspec.core.costs import Costs, merged
from flowspec.core.policies import METHODS
from flowspec.core.request import Request, Sampling
from flowspec.core.topology import Topology
from flowspec.preflight import read_prompts
from tests.conftest import features_given

BOARD = "emulate={stage_ms: 20, token_ms: 0.2, draft_ms: 3, link_ms: 1, link_mbps: 50}"
SMALL = ["--prompt", "def add(a, b):", "--max-new-tokens", "16"]

OVER_A_RING = (*METHODS, PAPER)


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "drafter",
    [
        "lm",
        "ngram",
        "none",
        *(pytest.param(d, marks=pytest.mark.slow) for d in ("eagle", "mixture", "lms")),
    ],
)
def test_a_sweep_says_a_rate_for_every_cell_and_needs_no_model_the_second_time(
    pair, tmp_path, capsys, drafter
):
    drafts, first, second = (tmp_path / name for name in ("d.npz", "a.jsonl", "b.jsonl"))
    live = drafter in ("eagle", "mixture")
    methods = ",".join(
        m
        for m in (("ar", "flowspec", PAPER) if live else OVER_A_RING)
        if m != PAPER or drafter != "none"
    )
    several = {
        "mixture": [("eagle", pair.head), ("ngram", None)],
        "lms": [("lm", pair.draft), ("lm", pair.target)],
    }.get(drafter)
    config = pair.config(2, None, "lm" if several else drafter)
    listed = (
        [f"drafter=[{', '.join(f'{{kind: {kind}, path: {path}}}' for kind, path in several)}]"]
        if several
        else []
    )
    words = [
        str(config),
        *listed,
        BOARD,
        "--stages",
        "1,3",
        "--temperatures",
        "0,0.9",
        "--methods",
        methods,
        *SMALL,
    ]
    words += ["--vary", "emulate.link_mbps=10,1000", "--drafts", str(drafts)]
    assert main(["simulate", *words, "--json", str(first)]) == 0
    assert (
        main(
            [
                "simulate",
                *words,
                "--json",
                str(second),
                *(["--offline"] if drafter in ("lm", "lms") else []),
            ]
        )
        == 0
    )
    said = capsys.readouterr()
    assert "simulated tokens/s" in said.out and "not in" not in said.err
    assert ("is asked live" in said.err) == (live or drafter == "ngram")
    rows = lines(first)
    assert rows == lines(second)
    assert len(rows) == 2 * 2 * 2 * len(methods.split(",")) and all(
        r["tokens_per_second"] > 0 and r["simulated"] for r in rows
    )
    rate = {
        (r["stages"], r["method"]): r["tokens_per_second"]
        for r in rows
        if (r["temperature"], r["varied"]) == (0, ["emulate.link_mbps=1000"])
    }
    assert rate[1, "ar"] > rate[3, "ar"]


def test_one_cell_shows_the_picture_and_keeps_the_trace(pair, tmp_path, capsys):
    trace = tmp_path / "t.json"
    assert (
        main(
            [
                "simulate",
                str(pair.config(2)),
                BOARD,
                "--methods",
                "flowspec",
                "--trace",
                str(trace),
                *SMALL,
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "stage 2  " in said and "(simulated)" in said and trace.exists()


def test_a_made_up_drafter_needs_no_model(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(
        f"stages: nowhere\nsampling: {{max_new_tokens: 30}}\n{BOARD.replace('=', ': ', 1)}\n"
    )
    assert (
        main(
            [
                "simulate",
                str(config),
                "--synthetic",
                "0.7,0.1",
                "--stages",
                "2,5",
                "--prompts",
                "2",
                "--json",
                str(tmp_path / "s"),
            ]
        )
        == 0
    )
    assert len(lines(tmp_path / "s")) == 2 * 2 * len(OVER_A_RING)


@pytest.mark.parametrize(
    "words,said",
    [
        (["--stages", "0"], "--stages: 0"),
        (["--stages", "two"], "--stages is 'two'"),
        (["--methods", "flowspce"], "--methods: 'flowspce'"),
        (["--vary", "emulate.link_mbps"], "--vary 'emulate.link_mbps'"),
        (["--vary", "emulate.speed=1,2"], "emulate.speed"),
        (["--offline"], "--offline needs --drafts"),
        (["emulate.stage_ms=0", "emulate.token_ms=0"], "emulate.stage_ms"),
        (["emulate.stage_ms=[20, 0]", "emulate.token_ms=0"], "emulate.stage_ms"),
        (["--vary", "policy.coupled=true,false"], "--vary: drafts are remembered"),
        (["--synthetic", "0.9,0.3"], "--synthetic"),
        (["--prompts", "0"], "--prompts"),
        (["--json", "/nowhere/x"], "--json: cannot write"),
        (["--vary", "drafter.kind=lm,ngram"], "--vary: one drafter"),
        (["drafter.kind=eagle", "--offline"], "--offline: eagle is asked live"),
        (["drafter.kind=eagle3"], "drafter.kind is eagle3: it cannot be simulated"),
        (
            ["drafter=[{kind: ngram}, {kind: eagle3, path: x}]"],
            "drafter.1.kind is eagle3: it cannot be simulated",
        ),
    ],
)
def test_bad_words_are_answered_in_one_line(pair, capsys, words, said):
    assert main(["simulate", str(pair.config(2)), BOARD, *SMALL, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flowspec: ") and said in error


def test_without_a_prompt_it_takes_those_of_bench(pair, tmp_path):
    words = [
        "simulate",
        str(pair.config(2)),
        BOARD,
        "--prompts",
        "2",
        "--max-new-tokens",
        "4",
        "--methods",
        "ar",
    ]
    assert main([*words, "--json", str(tmp_path / "own")]) == 0
    given = [
        word for prompt in read_prompts(str(DEMO_PROMPTS))[:2] for word in ("--prompt", prompt)
    ]
    assert main([*words, *given, "--json", str(tmp_path / "given")]) == 0
    assert (tmp_path / "own").read_text() == (tmp_path / "given").read_text()


def test_drafts_of_another_pair_are_refused(pair, tmp_path, capsys):
    drafts = str(tmp_path / "d.npz")
    assert main(["simulate", str(pair.config(2)), BOARD, *SMALL, "--drafts", drafts]) == 0
    assert (
        main(
            [
                "simulate",
                str(pair.config(2)),
                BOARD,
                *SMALL,
                "--drafts",
                drafts,
                "policy.coupled=false",
            ]
        )
        == 2
    )
    assert "recorded with" in capsys.readouterr().err


# ---- bench compare ---------------------------------------------------------------------------------
@pytest.mark.slow
def test_a_comparison_writes_its_records_table_and_chart(pair, tmp_path, capsys):
    plan = Plan(
        temperatures=[0.0, 0.9],
        repeats=1,
        sweep=True,
        output=tmp_path / "out",
        command="bench compare c",
    )
    with Engine.from_config(
        pair.config(2), [BOARD, "emulate.stage_ms=5", "sampling.max_new_tokens=8"]
    ) as engine:
        assert compare(engine, ["def add(a, b):", "for i"], plan)
    said = capsys.readouterr().out
    assert "every method wrote the same tokens" in said and "tree.segment=16" in said
    records = [report.Record(**line) for line in lines(tmp_path / "out" / "records.jsonl")]
    assert len(records) == 2 * 2 * len(METHODS)
    assert {r.method for r in records} == set(METHODS)
    assert all(r.simulated and r.tokens_per_second and len(r.bytes_per_token) == 3 for r in records)
    assert (tmp_path / "out" / "table.md").read_text().startswith("#")


@pytest.mark.parametrize("here", [True, False])
def test_a_drafter_that_reads_features_is_predicted_where_the_whole_target_is(
    pair, tmp_path, monkeypatch, here
):
    if not here:
        for module in ("forecast", "compare"):
            monkeypatch.setattr(
                f"flowspec.bench.{module}.obstacle", lambda config: "rank_02 is not on this machine"
            )
    loaded, real = [], forecast.Target
    monkeypatch.setattr(
        forecast, "Target", lambda manifest: loaded.append(manifest) or real(manifest)
    )
    plan = Plan(
        methods=["ar", "flowspec"],
        without=["refresh", "abort"],
        temperatures=[0.0],
        repeats=1,
        output=tmp_path,
    )
    with Engine.from_config(pair.config(2, None, "eagle"), ["sampling.max_new_tokens=8"]) as engine:
        assert compare(engine, ["def add(a, b):"], plan)
        assert len(loaded) == here  # once for all that is compared
        plan = dataclasses.replace(plan, sweep=True)
        if not here:
            with pytest.raises(UserError, match="rank_02 is not on this machine"):
                compare(engine, ["x"], plan)
    records = lines(tmp_path / "records.jsonl")
    assert {line["method"] for line in records} == {
        "ar",
        "flowspec",
        "flowspec - refresh",
        "flowspec - abort",
    }
    assert all(bool(line["simulated"]) == here for line in records)


def test_a_look_up_takes_no_time_of_the_draft_model(pair):
    for words, least in (
        (["drafter={kind: ngram}"], 0),
        ([], 3),
        (["drafter=[{kind: ngram}, {kind: lm, path: " + str(pair.draft) + "}]"], 3),
    ):
        assert emulated(load_config(pair.config(2), [BOARD, *words])).draft_ms == least


def test_a_simulation_says_which_file_of_the_target_it_lacks(pair, tmp_path, capsys):
    split = shutil.copytree(pair.split(2), tmp_path / "split")
    (split / "rank_02" / "model.safetensors").unlink()
    config = tmp_path / "c.yaml"
    for drafter, lacks in (
        (f"{{kind: eagle, path: {pair.head}}}", split / "rank_02" / "model.safetensors"),
        ("{kind: ngram}", None),
    ):
        config.write_text(f"stages: split\ndrafter: {drafter}\n")
        said = obstacle(load_config(config))
        assert said is None if lacks is None else f"{lacks} is not on this machine" in said


def test_the_simulated_head_reads_what_the_target_makes_of_the_text(pair, monkeypatch):
    """As in a real run: all features of prompt and text, each once and in order."""
    got = features_given(monkeypatch, "commit")
    config = load_config(pair.config(3, None, "eagle"), [BOARD])
    forecaster = Forecaster(config, Models.of(config))
    prompt = tuple(range(40, 50))
    text = pair.greedy(prompt, 16)
    tape = forecaster.add(Request(id=1, prompt=prompt, sampling=Sampling(max_new_tokens=16)), text)
    with torch.no_grad():
        want = pair.model.model(torch.tensor([[*prompt, *text[:-1]]])).last_hidden_state[0]
    for method in OVER_A_RING[1:]:
        forecaster.run(tape, method, Topology(2))
        torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-4)
    assert len(forecaster._features) == 1


def test_different_tokens_are_reported(pair, tmp_path, capsys, monkeypatch):
    plan = Plan(methods=["ar", "flowspec"], temperatures=[0.0], repeats=1, output=tmp_path)
    monkeypatch.setattr(report, "identical", lambda records: ["prompt 1: differs"])
    with Engine.from_config(pair.config(1), ["sampling.max_new_tokens=4"]) as engine:
        assert not compare(engine, ["x"], plan)
    assert "prompt 1: differs" in capsys.readouterr().out


COSTS = Costs(
    ((Point(1, 9, 0.010, 5), Point(4, 9, 0.013, 5)), (Point(1, 9, 0.020, 5),)),
    (0.0, 0.0),
    (0.0, 0.0),
    0.001,
)


def test_what_is_not_emulated_is_predicted_from_what_was_measured():
    run = SimpleNamespace(result=SimpleNamespace(costs=COSTS.to_json()), draft_ms=7.0)
    assert priced(Emulate(link_ms=3), [run]) == (Emulate(link_ms=3), COSTS)
    assert priced(Emulate(stage_ms=50, draft_ms=8), [run]) == (
        Emulate(stage_ms=50, draft_ms=8),
        None,
    )
    assert priced(Emulate(stage_ms=50), [run]) == (Emulate(stage_ms=50, draft_ms=7), None)


def test_what_a_run_measured_is_what_it_is_simulated_with(pair, tmp_path, capsys):
    """Run, write its result, simulate with its costs; no figure of time is asserted, only what it is made of."""
    result, out = tmp_path / "r.jsonl", tmp_path / "s.jsonl"
    with Engine.from_config(pair.config(2), ["sampling.max_new_tokens=16"]) as engine:
        for method in ("ar", "flowspec"):
            generation = engine.generate("def add(a, b):", method=method)
            list(generation)
            with open(result, "a") as file:
                file.write(json.dumps(dataclasses.asdict(generation.result)) + "\n")
    found = load_costs(result)
    assert set(found) == {"", "ar", "flowspec"} and len(found["ar"].stages) == 2
    assert found["flowspec"].draft and not found["ar"].draft and found["ar"].hop > 0
    assert {p.rows for p in found["ar"].stages[0]} == {
        1.0,
        float(len(engine.text.encode("def add(a, b):")) - 1),
    }
    words = [
        str(pair.config(2)),
        *SMALL,
        "--costs",
        str(result),
        "--methods",
        "ar,flowspec",
        "--json",
        str(out),
    ]
    assert main(["simulate", *words]) == 0
    plain = lines(out)[0]
    ar = found["ar"]
    lap = sum(ar.seconds(stage, 1, 20) for stage in (1, 2)) + 3 * ar.hop + ar.coordinator + ar.row
    assert plain["method"] == "ar" and 1 / plain["tokens_per_second"] == pytest.approx(lap, rel=0.3)


@pytest.mark.parametrize(
    "content,said",
    [
        (None, "cannot read"),
        ("", "is empty"),
        ("{", "is not JSON"),
        ("[1]", "line 1 of"),
        ('{"costs": {"format": 9}}', "format 9"),
        ('{"costs": {"format": 1, "stages": []}}', "holds no measured costs"),
        (json.dumps({"costs": COSTS.to_json() | {"hop_ms": -1}}), "holds no measured costs"),
        (json.dumps({"costs": COSTS.to_json() | {"draft": [[1, 2]]}}), "holds no measured costs"),
        (json.dumps({"costs": COSTS.to_json()}) + "\n{}", "line 2 of"),
        (
            json.dumps({"costs": merged([COSTS, COSTS]).to_json()}),
            "was measured over 2 stages, not 3",
        ),
    ],
)
def test_a_file_that_holds_no_costs_is_answered_in_one_line(pair, tmp_path, capsys, content, said):
    path = tmp_path / "c.json"
    if content is not None:
        path.write_text(content)
    assert (
        main(["simulate", str(pair.config(2)), *SMALL, "--stages", "3", "--costs", str(path)]) == 2
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flowspec: ") and said in error


def test_a_forecast_is_of_the_configured_pair(pair):
    config = load_config(pair.config(2))
    assert Models.of(config).hidden == 48 and "lm" in Forecaster(config, Models.of(config))._source
