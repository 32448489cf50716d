"""The simulator's and the comparison's commands, on the tiny pair."""

import json
from types import SimpleNamespace

import pytest

from flowspec import Engine, UserError
from flowspec.bench import report
from flowspec.bench.compare import compare, completed
from flowspec.bench.forecast import PAPER, SIMULATED, Forecaster, Models
from flowspec.cli import _parser, main
from flowspec.config import load_config
from flowspec.core.cost import Emulate
from flowspec.core.policy import METHODS

BOARD = "emulate={stage_ms: 20, token_ms: 0.2, draft_ms: 3, link_ms: 1, link_mbps: 50}"
SMALL = ["--prompt", "def add(a, b):", "--max-new-tokens", "16"]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("drafter", ["lm", "ngram", "none"])
def test_a_sweep_says_a_rate_for_every_cell_and_needs_no_model_the_second_time(pair, tmp_path, capsys, drafter):
    drafts, first, second = (tmp_path / name for name in ("d.npz", "a.jsonl", "b.jsonl"))
    methods = ",".join(m for m in SIMULATED if m != PAPER or drafter != "none")
    words = [str(pair.config(2, None, drafter)), BOARD, "--stages", "1,3", "--temperatures", "0,0.9", "--methods", methods, *SMALL]
    words += ["--vary", "emulate.link_mbps=10,1000", "--drafts", str(drafts)]
    assert main(["simulate", *words, "--json", str(first)]) == 0
    assert main(["simulate", *words, "--json", str(second), *(["--offline"] if drafter == "lm" else [])]) == 0
    said = capsys.readouterr()
    assert "simulated tokens/s" in said.out and "not in" not in said.err
    rows = lines(first)
    assert rows == lines(second)
    assert len(rows) == 2 * 2 * 2 * len(methods.split(",")) and all(r["tokens_per_second"] > 0 and r["simulated"] for r in rows)
    rate = {
        (r["stages"], r["method"]): r["tokens_per_second"]
        for r in rows
        if (r["temperature"], r["varied"]) == (0, ["emulate.link_mbps=1000"])
    }
    assert rate[1, "ar"] > rate[3, "ar"]


def test_one_cell_shows_the_picture_and_keeps_the_trace(pair, tmp_path, capsys):
    trace = tmp_path / "t.json"
    assert main(["simulate", str(pair.config(2)), BOARD, "--methods", "flowspec", "--trace", str(trace), *SMALL]) == 0
    said = capsys.readouterr().out
    assert "stage 2  " in said and "(simulated)" in said and trace.exists()


def test_a_made_up_drafter_needs_no_model(tmp_path, capsys):
    config = tmp_path / "c.yaml"
    config.write_text(f"stages: nowhere\nsampling: {{max_new_tokens: 30}}\n{BOARD.replace('=', ': ', 1)}\n")
    assert (
        main(["simulate", str(config), "--synthetic", "0.7,0.1", "--stages", "2,5", "--prompts", "2", "--json", str(tmp_path / "s")]) == 0
    )
    assert len(lines(tmp_path / "s")) == 2 * 2 * len(SIMULATED)


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
        (["--synthetic", "0.9,0.3"], "--synthetic"),
        (["--prompts", "0"], "--prompts"),
        (["--json", "/nowhere/x"], "--json: cannot write"),
    ],
)
def test_bad_words_are_answered_in_one_line(pair, capsys, words, said):
    assert main(["simulate", str(pair.config(2)), BOARD, *SMALL, *words]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flowspec: ") and said in error


def test_drafts_of_another_pair_are_refused(pair, tmp_path, capsys):
    drafts = str(tmp_path / "d.npz")
    assert main(["simulate", str(pair.config(2)), BOARD, *SMALL, "--drafts", drafts]) == 0
    assert main(["simulate", str(pair.config(2)), BOARD, *SMALL, "--drafts", drafts, "policy.coupled=false"]) == 2
    assert "recorded with" in capsys.readouterr().err


# ---- bench compare ---------------------------------------------------------------------------------
def test_a_comparison_writes_its_records_table_and_chart(pair, tmp_path, capsys):
    options = _parser("bench").parse_intermixed_args(
        ["c", *SMALL, "--repeats", "2", "--temperatures", "0,0.9", "--sweep", "--output", str(tmp_path / "out")]
    )
    options.given = ["compare", "c"]
    with Engine.from_config(pair.config(2), [BOARD, "emulate.stage_ms=5", "sampling.max_new_tokens=8"]) as engine:
        assert compare(engine, ["def add(a, b):", "for i"], options)
    said = capsys.readouterr().out
    assert "every method wrote the same tokens" in said and "tree.segment=16" in said
    records = [report.Record(**line) for line in lines(tmp_path / "out" / "records.jsonl")]
    assert len(records) == 2 * 2 * 2 * len(METHODS)
    assert {r.method for r in records} == set(METHODS)
    assert all(r.simulated and r.tokens_per_second and len(r.bytes_per_token) == 3 for r in records)
    assert (tmp_path / "out" / "table.md").read_text().startswith("#")


def test_a_drafter_that_reads_features_is_measured_and_not_predicted(pair, tmp_path, capsys):
    config = pair.config(2, None, "eagle")
    assert main(["simulate", str(config), BOARD, *SMALL]) == 2
    assert "drafter.kind eagle cannot be simulated yet" in capsys.readouterr().err
    options = _parser("bench").parse_intermixed_args(["c", "--repeats", "1", "--output", str(tmp_path)])
    options.given = []
    with Engine.from_config(config, ["sampling.max_new_tokens=8"]) as engine:
        assert compare(engine, ["def add(a, b):"], options)
        options.sweep = True
        with pytest.raises(UserError, match="cannot be simulated"):
            compare(engine, ["x"], options)
    assert {line["simulated"] for line in lines(tmp_path / "records.jsonl")} == {None}


def test_different_tokens_are_reported(pair, tmp_path, capsys, monkeypatch):
    options = _parser("bench").parse_intermixed_args(["c", "--methods", "ar,flowspec", "--repeats", "1", "--output", str(tmp_path)])
    options.given = []
    monkeypatch.setattr(report, "identical", lambda records: ["prompt 1: differs"])
    with Engine.from_config(pair.config(1), ["sampling.max_new_tokens=4"]) as engine:
        assert not compare(engine, ["x"], options)
    assert "prompt 1: differs" in capsys.readouterr().out


def test_what_is_not_emulated_is_predicted_from_what_was_measured():
    result = SimpleNamespace(stage_cost_ms=[(10.0, 1.0), (20.0, 2.0)])
    run = SimpleNamespace(result=result, draft_ms=7.0)
    assert completed(Emulate(link_ms=3), [run]) == Emulate(link_ms=3, stage_ms=(10.0, 20.0), token_ms=(1.0, 2.0), draft_ms=7.0)
    assert completed(Emulate(stage_ms=50, draft_ms=8), [run]) == Emulate(stage_ms=50, draft_ms=8)


def test_a_forecast_is_of_the_configured_pair(pair):
    config = load_config(pair.config(2))
    assert Models.of(config).hidden == 48 and "lm" in Forecaster(config, Models.of(config))._source
