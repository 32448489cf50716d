"""`flowspec eval`: questions, the folder of a run that is gone on with, and a report worked out by hand."""

import csv
import dataclasses
import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flowspec.bench import answers as kept
from flowspec.bench import standing, sweep
from flowspec.bench.answers import Answer, Answers, Place, Run, Skipped, asked, noted, read_runs
from flowspec.bench.evaluate import Plan, evaluate, prompt_of, sampling_of, too_long
from flowspec.bench.questions import DATA, DATASETS, chosen
from flowspec.commands import sweep as sweeps
from flowspec.commands.eval import EVAL, main, report
from flowspec.config import load_config
from flowspec.core.topology import Topology
from flowspec.engine import Engine
from flowspec.errors import UserError
from flowspec.files import BUILD
from flowspec.lossless import first_difference
from flowspec.models.manifest import Manifest
from flowspec.text import Text
from scripts import fetch_datasets
from tests.cluster.conftest import LONG
from tests.dist.conftest import Command

ROOT = Path(__file__).resolve().parent.parent.parent
METHODS = ["ar", "flowspec"]
SAME = ("dataset", "temperature", "method", "questions", "turns", "skipped", "tokens", "verdict")
"""Of a row of the report, what a run that was broken off does not change."""


# ---- questions -----------------------------------------------------------------------------------
def write(folder: Path, dataset: str, *turns: list[str]) -> None:
    lines = [{"question_id": k, "category": "x", "turns": t} for k, t in enumerate(turns, 80)]
    (folder / f"{dataset}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_shipped_questions_are_enough_and_fit_the_demo_model():
    text = Text(ROOT / "demo" / "target")
    for dataset in DATASETS:
        questions = chosen(DATA, [dataset], ":")
        assert len(questions) == 50 and len({q.turns for q in questions}) == len(questions)
        assert {len(q.turns) for q in questions} == {2 if dataset == "mt_bench" else 1}
        said = [[{"role": "user", "content": turn} for turn in q.turns] for q in questions]
        # each with 128 new tokens a turn
        assert max(len(text.encode_chat(turns)) for turns in said) + 2 * 128 < 1024


@pytest.mark.parametrize(
    ("span", "places"), [(":", [0, 1, 2]), ("2", [0, 1]), ("1:", [1, 2]), ("1:2", [1])]
)
def test_a_span_selects_questions(tmp_path, span, places):
    write(tmp_path, "nq", ["a"], ["b"], ["c"])
    assert [question.place for question in chosen(tmp_path, ["nq"], span)] == places


@pytest.mark.parametrize(
    ("text", "span", "said"),
    [
        ('{"question_id": 1, "turns": ["a"]}', "30:50", "selects none of the 1 questions"),
        ('{"question_id": 1, "turns": ["a"]}', "x", "--questions x: it is written A:B"),
        ('{"question_id": 1, "turns": []}', ":", "line 1: expected an object with question_id"),
        ('{"question_id": 1, "turns": ["a"]}\n3', ":", "line 2: expected an object"),
        ('{"question_id": 1, "turns": ["a"]}\n' * 2, ":", "has question_id 1 twice"),
        ("\n", ":", "holds no question"),
        (None, ":", r"cannot read .*nq.jsonl: No such file .*fetch_datasets"),
    ],
)
def test_bad_questions_are_one_line(tmp_path, text, span, said):
    if text is not None:
        (tmp_path / "nq.jsonl").write_text(text)
    with pytest.raises(UserError, match=said):
        chosen(tmp_path, ["nq"], span)


def test_fetched_files_are_split_by_category_and_without_a_network_it_is_one_line(
    tmp_path, monkeypatch, capsys
):
    lines = [
        {"question_id": k, "category": category, "turns": ["x"], "more": 1}
        for k, category in enumerate(
            ("math", "coding", "math_reasoning", "summarization", "qa", "rag")
        )
    ]
    monkeypatch.setattr(
        fetch_datasets, "download", lambda url: "\n".join(json.dumps(line) for line in lines)
    )
    assert fetch_datasets.main([str(tmp_path)]) == 0
    found = {d: [q.category for q in chosen(tmp_path, [d], ":")] for d in DATASETS}
    assert found["mt_bench"] == ["math", "coding"] and found["nq"] == ["qa"]
    assert len(found["alpaca"]) == 6 and found["cnn_dm"] == ["summarization"]
    monkeypatch.undo()

    def refused(*about, **more):
        raise OSError("no network")

    monkeypatch.setattr(fetch_datasets.urllib.request, "urlopen", refused)
    assert fetch_datasets.main([str(tmp_path)]) == 2
    assert "no network. Without a network, copy a folder" in capsys.readouterr().err


# ---- a run ---------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def engine(pair):
    with Engine.from_config(pair.config(2), ["sampling.max_new_tokens=6"]) as engine:
        yield engine


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Of the second question, the second turn does not fit into 160 positions with its answer."""
    folder = tmp_path_factory.mktemp("data")
    write(folder, "mt_bench", ["def f", "import os"], ["a b", "x y z " * 30])
    write(folder, "nq", ["return a"], ["print(i)"])
    return folder


@pytest.fixture(scope="module")
def plan(data):
    questions = chosen(data, ["mt_bench"], ":") + chosen(data, ["nq"], "1")
    return Plan(questions=questions, methods=METHODS, temperatures=[0.0, 0.8])


@pytest.fixture(scope="module")
def whole(engine, plan, tmp_path_factory):
    """The folder of an undisturbed run, and what it says."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, ask(engine, plan, folder)


def begin(engine, plan: Plan, folder: Path) -> Answers:
    what = plan.methods, plan.temperatures, plan.questions, plan.length
    return Answers(folder, asked(engine.config, engine.manifest, *what), noted(["x.yaml"]))


def ask(engine, plan: Plan, folder: Path) -> dict:
    """What a whole run says of texts, without times."""
    with begin(engine, plan, folder) as answers:
        evaluate(engine, plan, answers)
    [run] = read_runs([folder])
    texts = {(a.place, a.method): (a.token_ids, a.text, a.prompt_tokens) for a in run.answers}
    assert len(texts) == len(run.answers)
    rows = standing.table(run, first_difference)
    return {
        "texts": texts,
        "skipped": set(run.skipped),
        "rows": [[getattr(row, name) for name in SAME] for row in rows],
    }


def test_every_turn_is_asked_of_every_method_and_later_ones_read_the_reference_s_answer(
    engine, plan, whole
):
    _, found = whole
    places = {place for place, _ in found["texts"]}
    assert len(places) == 2 * 4 and len(found["texts"]) == 2 * len(places)
    assert {s.place for s in found["skipped"]} == {
        Place("mt_bench", "81", 2, temperature) for temperature in (0.0, 0.8)
    }
    assert all("6 new ones; the model takes 160" in s.why for s in found["skipped"])
    for place, method in found["texts"]:
        tokens, _, prompt = found["texts"][place, method]
        assert tokens == found["texts"][place, "ar"][0] and len(tokens) <= 6
        if place.turn == 2:
            question = next(q for q in plan.questions if (q.dataset, q.id) == place[:2])
            told = found["texts"][place._replace(turn=1), "ar"][1]
            roles, words = ("user", "assistant", "user"), [*question.turns]
            words.insert(1, told)
            said = [{"role": r, "content": w} for r, w in zip(roles, words, strict=True)]
            assert prompt == len(engine.text.encode_chat(said))
    means = [row for row in found["rows"] if row[0] == "mean"]
    assert [row[1:6] for row in means[:2]] == [[0.0, m, 3, 4, 1] for m in METHODS]
    assert {row[-1] for row in found["rows"]} == {"reference", "identical"}


def test_a_prompt_must_leave_room_for_the_whole_answer(engine):
    assert too_long(engine, [1] * 154) is None
    assert "155 tokens of prompt and 6 new ones" in too_long(engine, [1] * 155)


def test_who_begins_rotates_and_each_question_has_noise_of_its_own(whole, plan, engine):
    folder, _ = whole
    firsts: dict[Place, str] = {}
    for line in kept.read_lines(folder):
        if isinstance(line, Answer):
            firsts.setdefault(line.place, line.method)
    assert {*firsts.values()} == set(METHODS)
    seeds = [sampling_of(engine.config.sampling, q, 0.8).seed for q in plan.questions[:2]]
    assert seeds == [0, 1]


def test_a_run_that_breaks_at_random_goes_on_to_the_same_report(
    engine, plan, whole, tmp_path, monkeypatch
):
    """It breaks three times, once in the middle of a line."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    add = kept.add_json

    for half in (draw.random() < 0.5, True, False):
        left = [draw.randrange(1, 5)]

        def breaks(file, value, flag, left=left, half=half):
            left[0] -= 1
            if left[0] == 0:
                file.write(json.dumps(value).encode()[:20] if half else b"")
                file.flush()
                raise KeyboardInterrupt
            add(file, value, flag)

        monkeypatch.setattr(kept, "add_json", breaks)
        with pytest.raises(KeyboardInterrupt):
            ask(engine, plan, tmp_path / "broken")
    monkeypatch.setattr(kept, "add_json", add)
    before = len(kept.read_lines(tmp_path / "broken"))
    assert before < len(whole[1]["texts"])
    assert ask(engine, plan, tmp_path / "broken") == whole[1]


def test_another_run_s_folder_is_refused_by_what_differs(engine, plan, whole):
    folder, _ = whole
    before = (folder / "answers.jsonl").read_bytes()
    sampling = dataclasses.replace(engine.config.sampling, seed=3)
    other = SimpleNamespace(
        manifest=engine.manifest, config=dataclasses.replace(engine.config, sampling=sampling)
    )
    with pytest.raises(UserError, match=r"something else: config.sampling.seed was None and is 3:"):
        begin(other, plan, folder)
    fewer = dataclasses.replace(plan, questions=plan.questions[1:])
    with pytest.raises(UserError, match=r"questions was .*2 questions.* and is .*1 questions"):
        begin(engine, fewer, folder)
    with begin(engine, plan, folder), pytest.raises(UserError, match="another run is writing it"):
        begin(engine, plan, folder)
    assert (folder / "answers.jsonl").read_bytes() == before


def test_a_prompt_of_a_length_begins_with_the_question(engine, plan):
    long = dataclasses.replace(plan, length=50)
    prompts = [prompt_of(engine.text, long, question, []) for question in plan.questions]
    assert {len(prompt) for prompt in prompts} == {50} and len({*prompts}) == len(prompts)
    assert engine.text.decode(prompts[2]).startswith("return a\ndef f\nimport os\na b\n")


# ---- the report ----------------------------------------------------------------------------------
def answer(method, dataset, question, tokens, seconds, **changes) -> Answer:
    """An answer by hand; its first token is not counted."""
    fields = dict(
        method=method,
        temperature=0.0,
        prompt=1,
        repeat=1,
        new_tokens=tokens + 1,
        tokens_per_second=tokens / seconds,
        prefill_seconds=0.25,
        accepted_per_segment=1.5,
        utilisation=[0.75, 0.25],
        bookkeeping_ms=0.5,
        accepted_runs=[2, 0, 1],
        tokens_sha="",
        dataset=dataset,
        question=question,
        category=dataset,
        turn=1,
        prompt_tokens=3,
        token_ids=[*range(tokens + 1)],
        text="",
        finish_reason="length",
        decode_seconds=seconds,
        emulated=True,
    )
    return Answer(**(fields | changes))


BY_HAND = [
    answer("ar", "nq", "1", 10, 5.0),
    answer("ar", "nq", "2", 30, 15.0),
    answer("naive", "nq", "1", 10, 2.5),
    answer("naive", "nq", "2", 30, 7.5, token_ids=[*range(20), 99]),
    answer("flowspec", "nq", "1", 10, 1.0),
    answer("flowspec", "nq", "2", 30, 4.0),
    answer("ar", "gsm8k", "1", 20, 10.0),
    answer("flowspec", "gsm8k", "1", 20, 2.5),
]
SAID = {"command": "x", "ring": "2 stages", "machine": "here", "versions": {}, "date": "today"}


def by_hand(**changes) -> Run:
    skipped = [Skipped(Place("nq", "3", 1, 0.0), "too long")]
    return dataclasses.replace(Run("run", SAID, BY_HAND, skipped), **changes)


def test_the_report_s_figures_are_those_worked_out_by_hand():
    rows = {(r.dataset, r.method): r for r in standing.table(by_hand(), first_difference)}
    nq, mean = rows["nq", "flowspec"], rows["mean", "flowspec"]
    # 40 tokens in 5 s, and in 20 s and 10 s
    assert (nq.speed.value, nq.over["ar"].value, nq.over["naive"].value) == (8.0, 4.0, 2.0)
    # drawn are the questions 1 and 1 (10 and 5 times ar), 1 and 2, or 2 and 2 (7.5 and 3.75 times)
    assert nq.speed[1:] == (7.5, 10.0) and nq.over["ar"][1:] == (3.75, 5.0)
    # with the first tokens: 42 in 5.5 s
    assert nq.whole.value == 42 / 5.5
    # what both sides share is no doubt: naive is twice as fast as ar at each question
    assert rows["nq", "naive"].over["ar"] == (2.0, 2.0, 2.0)
    assert (nq.questions, nq.turns, nq.skipped, nq.tokens) == (2, 2, 1, 42)
    assert (nq.prefill_seconds, nq.accepted, nq.utilisation) == (0.25, 1.5, 0.5)
    # gsm8k: 20 tokens in 2.5 s against 10 s
    assert (mean.speed.value, mean.over["ar"].value, mean.over["naive"]) == (8.0, 4.0, None)
    assert ("mean", "naive") not in rows
    assert rows["nq", "naive"].verdict == "differs at 20 (nq 2, turn 1), 1 of 2 texts"
    assert (nq.verdict, rows["nq", "ar"].verdict) == ("identical", "reference")


def test_acceptance_by_position_does_not_count_what_the_end_cut_off():
    # tried at the first position: 3 runs, of which 2 went on; the last run ends with the text
    assert standing.acceptance([[2, 0, 1]]) == [2 / 3, 1 / 1, 0 / 1]
    assert standing.acceptance([[0, 0], [1, 0]]) == [1 / 2, 0.0]


def test_an_interval_holds_its_value():
    draws = standing.Draws(2.0, np.array([2.0 + 1e-12, 3.0]))
    assert draws.interval.low == 2.0 and draws.interval.high > 2.9


def test_the_files_of_a_report(tmp_path):
    standing.write(tmp_path, [by_hand()], first_difference)
    text = (tmp_path / "report.md").read_text()
    assert "| run (emulated) | 0 | nq | flowspec | 2 (1 skipped) | 8.0 (7.5..10.0) | 2.00 (" in text
    lines = list(csv.DictReader((tmp_path / "report.csv").open()))
    assert float(lines[0]["tokens_per_second"]) == 2.0 and {r["emulated"] for r in lines} == {
        "True"
    }
    for name in ("datasets.png", "acceptance.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def save(folder: Path, found: list[Answer], **said) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SAID | said))
    lines = [json.dumps(dataclasses.asdict(each)) + "\n" for each in found]
    (folder / "answers.jsonl").write_text("".join(lines))
    return folder


def test_runs_of_one_configuration_are_put_together_and_others_compared(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(standing, "can_draw", lambda: False)
    half = save(tmp_path / "a", BY_HAND[:2], methods=["ar"])
    rest = save(tmp_path / "b", BY_HAND[4:6], methods=["flowspec"])
    faster = [dataclasses.replace(a, decode_seconds=a.decode_seconds / 2) for a in BY_HAND[4:6]]
    other = save(tmp_path / "c", faster, model="another")
    assert [len(run.answers) for run in read_runs([half, rest, other])] == [4, 2]
    [change] = standing.changes(read_runs([half, rest, other]))
    assert (change.run, change.method, change.ratio) == ("c", "flowspec", (2.0, 2.0, 2.0))
    assert report([half, rest, other], tmp_path / "out") == 0
    assert "| c | 0 | nq | flowspec | 2.00 |" in capsys.readouterr().out
    assert report([save(tmp_path / "d", BY_HAND[:4])], tmp_path / "out") == 1  # another text
    with pytest.raises(UserError, match="holds no run of flowspec eval"):
        read_runs([tmp_path])


@pytest.mark.parametrize("line", ["{}\n", "3\n", '{"method": "ar"}\n', "x\n"])
def test_a_damaged_line_is_named(tmp_path, line):
    folder = save(tmp_path / "a", BY_HAND[:1])
    with open(folder / "answers.jsonl", "a") as file:
        file.write(line)
    with pytest.raises(UserError, match=r"answers.jsonl line 2 is no answer"):
        read_runs([folder])


# ---- sweeps --------------------------------------------------------------------------------------
def test_what_was_measured_of_a_sweep_stands_beside_what_is_simulated(pair, plan, tmp_path):
    """Over two stages it is measured, over three only simulated."""
    times = ["emulate={stage_ms: 4, draft_ms: 1}", "sampling.max_new_tokens=8", "threads=1"]
    few = dataclasses.replace(plan, questions=plan.questions[2:], temperatures=[0.0])
    config, manifest = load_config(pair.config(2), times), Manifest.load(pair.split(2))
    with Engine.from_config(pair.config(2), times) as engine:
        ask(engine, few, tmp_path / "two")
    [run] = read_runs([tmp_path / "two"])
    rows = standing.table(run, first_difference)
    values = [
        sweep.Value(3, config, Topology(3), few, [], []),
        sweep.Value(2, config, manifest.topology, few, rows, run.answers),
    ]
    found = sweep.points(values, sweep.simulate(values, config))
    assert [(p.value, p.method, p.measured is None) for p in found] == [
        (n, method, n == 3) for method in METHODS for n in (3, 2)
    ]
    assert all(p.simulated > 0 and p.emulated == (p.value == 2) for p in found)
    plain = {p.value: p.simulated for p in found if p.method == "ar"}
    assert plain[3] < plain[2]  # a stage more is 4 ms more for each token
    sweep.write(tmp_path, "stages", found, "x")
    assert "| 3 | 0 | ar | - | " in (tmp_path / "sweep.md").read_text()
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 5
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    sweep.draw("prompt", found, tmp_path / "prompt.png")
    assert (tmp_path / "prompt.png").stat().st_size > (tmp_path / "sweep.png").stat().st_size


@pytest.fixture
def asked_for(monkeypatch):
    """The words of the runs that a sweep would start, on a machine of two cores."""
    found: list[list[str]] = []
    starts = SimpleNamespace(parser=EVAL.parser, main=lambda words: found.append(words) or 0)
    monkeypatch.setattr(sweeps, "EVAL", starts)
    monkeypatch.setattr(sweeps, "_report", lambda *about: 0)
    monkeypatch.setattr(sweeps.os, "cpu_count", lambda: 2)
    return found


def test_more_stages_take_together_what_the_configured_ones_take(asked_for, tmp_path):
    """Four of 50 ms are two of 100; nine ranks are too many to be measured."""
    words = ["--over", "stages", "--values", "2,4,8", "--seed", "3", "--out", str(tmp_path)]
    assert sweeps.main([str(ROOT / "configs/devices/orin_nano.yaml"), *words]) == 0
    two, four = asked_for
    assert {"emulate.stage_ms=100", "emulate.token_ms=1", "sampling.seed=3"} <= {*two}
    assert f"stages={BUILD / 'demo_s2'}" in two and "emulate.stage_ms=50" in four
    assert two[-2:] == ["--out", str(tmp_path / "stages_2")]


def test_prompts_reach_what_the_model_holds(asked_for, pair, data, tmp_path):
    words = ["--over", "prompt", "--datasets", "nq", "--data", str(data), "--out", str(tmp_path)]
    assert sweeps.main([str(pair.config(2)), *words]) == 0
    lengths = [run[run.index("--prompt-tokens") + 1] for run in asked_for]
    assert lengths == ["64", "120"]  # 160 positions, 40 new tokens


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--over", "bandwidth"], "--over bandwidth is of emulated links: give emulate"),
        (["--over", "stages", "emulate.stage_ms=[1,2]"], "must be one number"),
        (["--over", "stages", "--values", "3"], "this machine can run none of --values"),
        (["--over", "budget", "--values", "0,2"], "different numbers from 1"),
        (["--over", "prompt", "--prompt-tokens", "9"], "a sweep --over prompt sets it"),
    ],
)
def test_a_sweep_that_cannot_be_is_one_line(asked_for, pair, data, tmp_path, words, said):
    given = ["--datasets", "nq", "--data", str(data), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=said):
        sweeps.main([str(pair.config(2)), *given, *words])
    assert not asked_for


# ---- the command ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "eval writes a folder: say which by --out DIR"),
        (["--out", "x", "--datasets", "nq,nq"], "names something twice"),
        (["--out", "x", "--questions", "30:50"], "--questions 30:50 selects none of the 2"),
        (["--out", "x", "--methods", "ar,best"], "'best' is not known here"),
        (["--out", "x", "--prompt", "x"], "takes no --prompt"),
        (["--out", "x", "--prompt-tokens", "150"], "150 and 40 new tokens are more than"),
    ],
)
def test_what_is_wrong_is_said_before_a_rank_starts(pair, data, words, said):
    given = ["--data", str(data), "--datasets", "nq", *words]
    with pytest.raises(UserError, match=said):
        main([str(pair.config(2)), *given])


@LONG
@pytest.mark.slow
def test_a_run_killed_three_times_at_random_gives_the_same_report(pair, data, tmp_path):
    """The ranks are killed, with their launcher: nobody can say goodbye."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    about = ["--data", data, "--datasets", "mt_bench,nq", "--methods", ",".join(METHODS)]
    about += ["--temperatures", "0,0.8", "sampling.max_new_tokens=8", "emulate={stage_ms: 20}"]

    def start(name: str) -> Command:
        words = pair.config(2), *about, "--out", tmp_path / name
        return Command(tmp_path, *words, start=("-m", "flowspec", "eval"))

    def held() -> int:
        path = tmp_path / "broken" / "answers.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    for _ in range(3):
        wanted = held() + draw.randrange(1, 5)
        with start("broken") as killed:  # all of its processes, with SIGKILL
            killed.wait_until(lambda wanted=wanted: held() >= wanted)
        killed.wait_until_gone()
    assert held() < 22  # 20 answers, and two turns that do not fit
    for name in ("broken", "whole"):
        with start(name) as undisturbed:
            assert undisturbed.end() == 0, undisturbed.err
    tables = []
    for name in ("broken", "whole"):
        with open(tmp_path / name / "report.csv") as file:
            rows = list(csv.DictReader(file))
        tables.append([[row[column] for column in SAME] for row in rows])
        texts = {(a.place, a.method): a.token_ids for a in read_runs([tmp_path / name])[0].answers}
        tables.append(texts)
    assert tables[:2] == tables[2:] and len(tables[1]) == 20
