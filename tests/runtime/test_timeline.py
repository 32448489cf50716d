"""Timelines: the fates of nodes, the file, the figures made of spans, and how they are shown."""

import json
import struct
import sys

import pytest

from flowspec import UserError
from flowspec.bench import timeline
from flowspec.bench.timeline import draw, in_words, sketch, summary
from flowspec.commands.trace import main
from flowspec.trace import Fates, Span, read, write

FACTS = {"method": "flowspec", "stages": 2}
NODES = {1: (0,), 2: (1, 2, 3, 4), 3: (5, 6)}
"""segment -> its nodes; 0 and 1 become text"""


def seconds(tick: float) -> float:
    return 10 + tick / 10


def fates() -> Fates:
    """A root, four guesses, two below them; 1 is right, and what the target picks after it was not guessed."""
    fates = Fates()
    fates.sent(NODES[1], [-1])
    fates.sent(NODES[2], [0, 0, 1, 2])
    fates.sent(NODES[3], [3, 4])
    fates.decided([0], 1, seconds(6))
    fates.decided([1], 7, seconds(13))
    return fates


def span(rank: int, row: str, begin: float, end: float, segment: int, **facts) -> Span:
    ids = NODES[segment]
    facts = {"request": 7, "segment": segment, "ids": ids, **facts}
    return fates().judge(Span(rank, row, "", seconds(begin), seconds(end), facts))


def other(rank: int, row: str, name: str, begin: float, end: float) -> Span:
    return Span(rank, row, name, seconds(begin), seconds(end), {"request": 7})


def example() -> list[Span]:
    """Two stages; a tick is 0.1 s; decoding is ticks 4 to 14."""
    return [
        other(1, "compute", "prefill", 0, 1),
        span(0, "send", 1, 2, 1, bytes=100),
        span(1, "compute", 2, 3, 1),
        span(1, "send", 3, 4, 1, bytes=1000),
        span(2, "compute", 4, 5, 1),
        span(2, "send", 5, 6, 1, bytes=10),
        other(0, "draft", "draft", 6, 7),
        span(0, "send", 6.5, 8, 2, bytes=400),
        span(1, "compute", 8, 10, 2),
        span(0, "send", 8, 9, 3, bytes=200),
        span(1, "receive", 9, 10, 3),
        span(1, "compute", 10, 11, 3),
        span(1, "send", 10, 11, 2, bytes=4000),
        span(2, "compute", 11, 12, 2),
        span(1, "send", 11, 13, 3, bytes=2000),
        span(2, "send", 12, 13, 2, bytes=40),
        span(2, "compute", 13, 14, 3),
        other(0, "compute", "schedule", 13, 13.1),
    ]


# ---- fates -----------------------------------------------------------------------------------------
def test_fates_know_what_was_accepted_refused_later_and_dead_before():
    assert fates().of(NODES[1], seconds(2)) == ("accepted", 1, 0)
    assert fates().of(NODES[2], seconds(8)) == (
        "accepted",
        1,
        2,
    )  # 2, and 4 below it, died with the choice of 1 at tick 6
    assert fates().of([3], seconds(8)) == ("pruned", 0, 0)
    assert fates().of([3], seconds(13)) == ("stale", 0, 1)
    assert fates().of([3, 4], seconds(8)) == ("pruned", 0, 1)


def test_a_judged_span_counts_its_nodes_and_any_other_stays_as_it_is():
    judged = span(1, "compute", 10, 11, 3)
    assert (judged.name, judged.facts) == (
        "pruned",
        {"request": 7, "segment": 3, "rows": 2, "accepted": 0, "dead": 1},
    )
    draft = other(0, "draft", "draft", 6, 7)
    assert fates().judge(draft) is draft


# ---- the file --------------------------------------------------------------------------------------
def test_a_trace_comes_back_with_its_begin_at_zero(tmp_path):
    write(tmp_path / "t.json", reversed(example()), FACTS)
    spans, facts = read(tmp_path / "t.json")
    made = sorted(example(), key=lambda s: s[:3])
    assert facts == FACTS
    assert [s.begin for s in spans] == sorted(s.begin for s in spans)
    spans.sort(key=lambda s: s[:3])
    assert [(*s[:3], s.facts) for s in spans] == [(*s[:3], s.facts) for s in made]
    assert [t for s in spans for t in s[3:5]] == pytest.approx(
        [t - 10 for s in made for t in s[3:5]]
    )
    assert [p.name for p in tmp_path.iterdir()] == ["t.json"]


def test_the_file_is_what_chrome_and_perfetto_read(tmp_path):
    write(
        tmp_path / "t.json",
        [span(1, "compute", 8, 10, 2), span(0, "send", 7, 8, 2, bytes=400)],
        FACTS,
    )
    trace = json.loads((tmp_path / "t.json").read_text())
    names = {
        (e["pid"], e.get("tid"), e["name"]): e["args"]
        for e in trace["traceEvents"]
        if e["ph"] == "M"
    }
    assert names[1, None, "process_name"] == {"name": "rank 1, stage 1"}
    assert names[0, 1, "thread_name"] == {"name": "send"}
    slices = [e for e in trace["traceEvents"] if e["ph"] == "X"]
    assert [(e["pid"], e["tid"], e["name"], e["ts"], e["dur"]) for e in slices] == [
        (0, 1, "accepted", 0, 1e5),
        (1, 0, "accepted", 1e5, 2e5),
    ]
    assert slices[0]["args"] == {
        "request": 7,
        "segment": 2,
        "bytes": 400,
        "rows": 4,
        "accepted": 1,
        "dead": 2,
    }


@pytest.mark.parametrize(
    "text,complaint",
    [
        (None, "cannot read the trace {}: No such file"),
        ("hello", "{} is not JSON"),
        ("[]", "{} is no trace of flowspec's"),
        ('{"prompt": "x"}', "{} is no trace of flowspec's"),
        ('{"traceEvents": [{"ph": "X", "name": "a"}]}', "{} is no trace of flowspec's"),
        ('{"traceEvents": []}', "{} holds no spans"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path, text, complaint):
    path = tmp_path / "t.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(complaint.format(path))


# ---- figures ---------------------------------------------------------------------------------------
def test_the_figures_of_an_example_worked_by_hand():
    figures = summary(example())
    assert figures.seconds == pytest.approx(1.0)
    assert figures.utilisation == pytest.approx((3 / 10, 3 / 10))
    assert figures.bubbles == pytest.approx(7 / 10)
    assert figures.wire == pytest.approx(3.5 / 10)
    assert figures.draft == pytest.approx(0.5 / 10)
    assert figures.fruitless == pytest.approx(2 / 20)
    assert figures.wasted == pytest.approx((3 * 0.75 + 2) / 7)
    assert figures.accepted_rows == pytest.approx(4 / 14)
    assert figures.dead_rows == pytest.approx((2 + 2 + 1 + 2) / 14)
    assert figures.bytes_per_link == (700, 7000, 50)


def test_what_happens_before_between_and_after_requests_does_not_count():
    later = [
        s._replace(begin=s.begin + 5, end=s.end + 5, facts={**s.facts, "request": 8})
        for s in example()
    ]
    one, two = summary(example()), summary([*example(), *later])
    assert two.seconds == pytest.approx(2 * one.seconds)
    assert two.utilisation == pytest.approx(one.utilisation)
    assert (two.wire, two.draft, two.wasted) == pytest.approx((one.wire, one.draft, one.wasted))


def test_a_timeline_without_decoding_has_no_figures():
    with pytest.raises(UserError, match="the last stage computed no segment"):
        summary([other(1, "compute", "prefill", 0, 1)])


def test_decoding_begins_on_a_last_stage_of_any_server():
    spans = [s for s in example() if (s.rank, s.row) != (2, "compute")]
    assert max(s.rank for s in spans) == 2, "it sent"
    for stages in (0, 2):  # one server of two stages
        with pytest.raises(UserError, match="the last stage computed no segment"):
            summary(spans, stages)
    with pytest.raises(UserError, match="the last stage computed no segment"):
        in_words(spans, FACTS | {"stages": 2})
    assert (
        summary(spans, 1).utilisation[1] == 0
    )  # two servers, the second of which had nothing to do
    assert in_words(spans, FACTS | {"stages": 1}).startswith("stages computed")


# ---- in_words ---------------------------------------------------------------------------------------
def test_the_verdict_says_where_the_time_went_what_became_of_the_rows_and_what_to_try():
    assert in_words(example(), FACTS).splitlines() == [
        "stages computed 30% of the time, 70% were bubbles (35% waiting for the wire, 5% for the draft)",
        "of what they computed, 29% of the rows became text, 21% were refused later, 50% were dead before they began",
        "the largest loss: waiting for the wire, 35% of the stages' time; "
        "try a faster link, verify_on: last, or smaller segments (tree.segment)",
    ]


@pytest.mark.parametrize(
    "key,mark", [("emulated", " (emulated times)"), ("simulated", " (simulated)")]
)
def test_the_verdict_says_when_the_clock_was_not_the_machine_s(key, mark):
    assert (
        in_words(example(), FACTS | {key: True}).splitlines()[0].endswith("for the draft)" + mark)
    )
    assert mark not in in_words(example(), FACTS | {key: False})


def forward(begin: float, end: float, segment: int) -> Span:
    return span(1, "compute", begin, end, segment)


@pytest.mark.parametrize(
    "method,spans,words",
    [
        (
            "flowspec",
            [forward(0, 1, 1), other(0, "draft", "draft", 1, 5)],
            "waiting for the draft, 80% of the stages' time; try a faster",
        ),
        (
            "flowspec",
            [forward(0, 1, 1), forward(1, 5, 3)],
            "segments of which nothing became text, 80% of the stages' time; try a smaller",
        ),
        (
            "flowspec",
            [forward(0, 1, 1), forward(4, 5, 2)],
            "stages that had no segment to compute, 60% of the stages' time; try a deeper",
        ),
        (
            "serial",
            [forward(0, 1, 1), forward(4, 5, 2)],
            "to compute, 60% of the stages' time; try method: flowspec",
        ),
    ],
)
def test_the_largest_loss_is_named_with_what_to_try(method, spans, words):
    assert words in in_words(spans, {"method": method}).splitlines()[2]


# ---- sketch ----------------------------------------------------------------------------------------
def test_the_sketch_of_the_whole_example():
    assert sketch(example(), width=9 + 28, window=(0, 1.4)) == [
        "rank 0   ............dd..............",
        "stage 1  ==..##..........#2##xx......",
        "stage 2  ........##............##..!!",
        "ms       |0        |500      |1000",
        "# became text  x refused later  ! dead before it began  = prefill  d draft  . idle  (numbers: segments)",
    ]


def test_a_sketch_begins_with_decoding_and_shows_a_second_and_a_half():
    late = [*example(), span(1, "compute", 20, 30, 2)]
    stage_1 = sketch(late, width=9 + 30)[1]
    assert stage_1 == "stage 1  " + "........#2##xx".ljust(30, ".")
    assert sketch(late, width=9 + 30, window=(2, 3))[1] == "stage 1  #2" + 28 * "#"


@pytest.mark.parametrize("window", [(1.4, 2), (0.5, 0.5), (-1, 1), (float("nan"), 1)])
def test_a_window_without_anything_in_it_is_refused(window):
    with pytest.raises(UserError, match=r"nothing to show: the timeline is 1\.400 s long"):
        sketch(example(), window=window)


# ---- picture ---------------------------------------------------------------------------------------
@pytest.fixture
def matplotlib():
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib (requirements_plots.txt)")


def size_of(path) -> tuple[int, int]:
    """Pixels of a PNG."""
    head = path.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", head[16:])


@pytest.mark.parametrize("window", [None, (0.0, 0.5)])
def test_the_picture_is_a_png_under_its_own_name(matplotlib, tmp_path, window):
    draw(example(), tmp_path / "t.png", FACTS | {"emulated": True}, window)
    assert size_of(tmp_path / "t.png") == (1400, 600)
    assert [p.name for p in tmp_path.iterdir()] == ["t.png"]


def test_a_picture_that_cannot_be_written_is_said_in_one_line(matplotlib, tmp_path):
    with pytest.raises(UserError, match=r"cannot write .*t\.png: No such file"):
        draw(example(), tmp_path / "no" / "t.png", FACTS)


# ---- the command -----------------------------------------------------------------------------------
@pytest.fixture
def file(tmp_path):
    write(tmp_path / "t.json", example(), FACTS)
    return tmp_path / "t.json"


def test_the_command_prints_the_verdict_and_draws_beside_the_file(matplotlib, file, capsys):
    assert main([str(file)]) == 0
    assert capsys.readouterr() == (
        in_words(example(), FACTS) + "\n",
        f"drawn: {file.with_suffix('.png')}\n",
    )
    assert size_of(file.with_suffix(".png")) == (1400, 600)


def test_the_command_draws_where_and_what_it_is_told(matplotlib, file, capsys):
    out = file.with_name("other.png")
    assert main([str(file), "--png", str(out), "--from", "0.1", "--to", "0.4"]) == 0
    assert out.exists() and not file.with_suffix(".png").exists()
    with pytest.raises(UserError, match="nothing to show"):
        main([str(file), "--from", "5"])


def test_without_matplotlib_the_verdict_is_all_unless_a_picture_was_asked_for(
    monkeypatch, file, capsys
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(file)]) == 0
    assert capsys.readouterr() == (
        in_words(example(), FACTS) + "\n",
        f"no picture: {timeline.MISSING}\n",
    )
    with pytest.raises(UserError, match=r"pip install -r requirements_plots\.txt"):
        main([str(file), "--png", "x.png"])


@pytest.mark.parametrize(
    "argv,complaint",
    [([], "FILE"), (["t.json", "--from", "x"], "--from"), (["nowhere.json"], "nowhere.json")],
)
def test_bad_words_are_answered_in_one_line(argv, complaint):
    with pytest.raises(UserError, match=complaint) as error:
        main(argv)
    assert "\n" not in str(error.value)
