"""What the ranks note of a request, on one clock; and what it costs nobody who did not ask."""

import itertools
import json

import pytest

from flowspec import Engine, UserError
from flowspec.bench.timeline import summary
from flowspec.cli import main
from flowspec.core.policies import METHODS
from flowspec.runtime.tracing import merged
from flowspec.trace import Fates, Span, read

PROMPT = "def add(a, b):\n"


@pytest.mark.parametrize(
    "stages,verify_on,drafter", [(1, "last", "lm"), (3, "coordinator", "lm"), (3, "last", "eagle")]
)
def test_every_rank_is_on_the_timeline_and_every_accepted_row_on_every_stage(
    pair, tmp_path, stages, verify_on, drafter
):
    path = tmp_path / "t.json"
    with Engine.from_config(
        pair.config(stages, None, drafter), [f"trace={path}", f"verify_on={verify_on}"]
    ) as engine:
        for number, method in enumerate(METHODS, 1):
            generation = engine.generate(PROMPT, method=method, max_new_tokens=20)
            tokens = list(generation)
            check(generation.spans, number, stages, len(tokens))
    spans, facts = read(path)
    assert facts == {"method": "flowspec", "stages": stages, "emulated": False}
    assert {s.facts["request"] for s in spans} == set(range(1, len(METHODS) + 1))
    assert len(summary(spans).utilisation) == stages


def check(spans: list[Span], request: int, stages: int, tokens: int) -> None:
    assert {(s.rank, s.row) for s in spans} >= {
        (rank, row) for rank in range(stages + 1) for row in ("compute", "send", "receive")
    }
    assert all(s.facts["request"] == request and s.begin <= s.end for s in spans)
    for stage in range(1, stages + 1):
        own = [s for s in spans if (s.rank, s.row) == (stage, "compute") and s.name != "prefill"]
        assert (
            sum(s.facts["accepted"] for s in own) == tokens
        )  # each token was picked at a row of its own
        assert all((s.name == "accepted") == (s.facts["accepted"] > 0) for s in own)
        assert all(0 <= s.facts["dead"] <= s.facts["rows"] - s.facts["accepted"] for s in own)
    for rank in range(stages + 1):  # one thing at a time on each row
        for row in ("compute", "send", "receive"):
            times = [(s.begin, s.end) for s in spans if (s.rank, s.row) == (rank, row)]
            assert all(a[1] <= b[0] + 1e-9 for a, b in itertools.pairwise(times))


def test_without_trace_nothing_is_noted(pair):
    with Engine.from_config(pair.config(2)) as engine:
        generation = engine.generate(PROMPT, max_new_tokens=5)
        list(generation)
        assert generation.spans == []


def test_clocks_are_aligned():
    fates = Fates()
    fates.sent([0], [-1])
    fates.decided([0], 1, 9.0)
    about = {"segment": 1, "ids": [0]}
    notes = {
        0: [Span(0, "draft", "draft", 1.0, 2.0, {})],
        1: [
            Span(0, "send", "", 2.0, 103.0, about),
            Span(1, "compute", "", 103.0, 104.0, about),
        ],  # 100 s ahead of rank 0
        2: [Span(1, "send", "", 104.0, 0.0, about)],  # 5 s behind
    }
    spans = merged(notes, {0: 0.0, 1: 100.0, 2: -5.0}, fates)
    assert [(s.rank, s.row, s.name, s.begin, s.end) for s in spans] == [
        (0, "draft", "draft", 1.0, 2.0),
        (0, "send", "accepted", 2.0, 3.0),
        (1, "compute", "accepted", 3.0, 4.0),
        (1, "send", "accepted", 4.0, 5.0),
    ]


def test_a_trace_that_cannot_be_written_is_an_error_in_one_line(pair, tmp_path, capsys):
    assert (
        main(["run", str(pair.config(1)), "--prompt", "x", f"trace={tmp_path / 'no' / 't.json'}"])
        == 2
    )
    said = capsys.readouterr().err
    assert said.startswith("flowspec: trace: cannot write") and said.count("\n") == 1
    with Engine.from_config(pair.config(1), [f"trace={tmp_path / 'gone' / 't.json'}"]) as engine:
        list(engine.generate(PROMPT, max_new_tokens=3))
        with pytest.raises(UserError, match=r"cannot write .*t\.json"):
            engine.close()


def test_the_trace_command_reads_what_a_run_wrote(pair, tmp_path, capsys):
    path = tmp_path / "t.json"
    with Engine.from_config(pair.config(2), [f"trace={path}"]) as engine:
        list(engine.generate(PROMPT, max_new_tokens=10))
    assert main(["trace", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert json.loads(path.read_text())["traceEvents"]
    assert main(["trace", str(tmp_path / "none.json")]) == 2
