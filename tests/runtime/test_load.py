"""`bench load`: what is measured of several requests at a time, and what is noticed."""

import dataclasses
import json

import pytest

from flowspec.bench import load
from flowspec.engine import Engine
from flowspec.errors import UserError

PLAN = load.Plan(methods=["ar", "flowspec"], requests=[1, 3], temperatures=[0.0, 0.8], repeats=1)


@pytest.fixture
def engine(pair):
    with Engine.from_config(
        pair.config(2), ["emulate={stage_ms: 4, draft_ms: 1}", "sampling.max_new_tokens=8"]
    ) as engine:
        yield engine


def test_every_cell_is_measured_with_every_method_and_simulated(engine, tmp_path, capsys):
    plan = dataclasses.replace(PLAN, output=tmp_path / "runs.jsonl")
    assert load.load(engine, ["def f", "import os"], plan)
    records = [json.loads(line) for line in plan.output.read_text().splitlines()]
    found = {(r["method"], r["requests"], r["temperature"]) for r in records}
    assert len(records) == len(found) == 8
    assert all(r["new_tokens"] == 8 * r["requests"] and r["emulated"] for r in records)
    assert all(len(r["first_token_seconds"]) == r["requests"] for r in records)
    rows = [
        line for line in capsys.readouterr().out.splitlines() if "flowspec" in line and "│" in line
    ]
    assert len(rows) == 4 and not any("│ - │" in row for row in rows)


def test_a_text_that_is_another_in_company_is_noticed(engine, monkeypatch):
    run = load._run

    def wrong(engine, prompts, cell, method, repeat):
        found = run(engine, prompts, cell, method, repeat)
        if (cell.requests, method) != (3, "flowspec"):
            return found
        first = dataclasses.replace(found.results[0], token_ids=[7])
        return found._replace(results=[first, *found.results[1:]])

    monkeypatch.setattr(load, "_run", wrong)
    monkeypatch.setattr(load, "_simulated", lambda *about: {})
    assert not load.load(engine, ["def f"], PLAN)


def test_records_that_cannot_be_written_are_one_line(engine, tmp_path):
    plan = dataclasses.replace(PLAN, output=tmp_path / "nowhere" / "runs.jsonl")
    with pytest.raises(UserError, match=r"--output: cannot write .*nowhere"):
        load.load(engine, ["def f"], plan)
