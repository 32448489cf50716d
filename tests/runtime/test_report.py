"""Reports: the figures made of records by hand, their tables and Markdown, the file, the picture, and sweeps."""

import json
import re
import struct
import sys
from io import StringIO

import pytest
from rich.console import Console

from flowspec import UserError
from flowspec.bench import report
from flowspec.bench.report import (
    Record,
    Spread,
    best,
    chart,
    identical,
    markdown,
    save,
    show,
    summarise,
    sweep_table,
    table,
)
from flowspec.core.policies import METHODS
from flowspec.core.policy import SWITCHES

RATES = {  # method -> prompt -> tokens/s of each repeat; hand-made so that medians are exact in binary
    "flowspec": {1: [20.0, 22.0, 24.0], 2: [40.0, 30.0, 32.0]},
    "ar": {1: [10.0, 11.0, 8.0], 2: [20.0, 20.0, 16.0]},
    "naive": {1: [16.0, 16.0, 16.0], 2: [20.0, 24.0, 25.0]},
}


def record(
    method: str, prompt: int, repeat: int, rate: float | None, temperature: float = 0.0, **changes
) -> Record:
    fields = dict(
        method=method,
        temperature=temperature,
        prompt=prompt,
        repeat=repeat,
        new_tokens=1 if rate is None else 64,
        tokens_per_second=rate,
        prefill_seconds=0.25,
        accepted_per_segment=1.5,
        utilisation=[0.75, 0.25],
        bubbles=0.5,
        wasted=0.625,
        dead_rows=0.03125,
        bytes_per_token=[250.0, 4000.0, 1500.0],
        bookkeeping_ms=0.5,
        stage_overhead_ms=[0.125, 0.25],
        drafted_tokens=100,
        forwarded_tokens=80,
        simulated=None,
        tokens_sha=f"{prompt}@{temperature}",
    )
    return Record(**(fields | changes))


def example(**changes) -> list[Record]:
    """Three methods, two prompts, three repeats, one temperature."""
    return [
        record(method, prompt, repeat, rate, **changes)
        for method, prompts in RATES.items()
        for prompt, rates in prompts.items()
        for repeat, rate in enumerate(rates, 1)
    ]


def rows_of(records) -> dict[str, report.Row]:
    return {row.method: row for row in summarise(records)}


# ---- summaries -------------------------------------------------------------------------------------
def test_rates_are_medians_of_the_prompts_medians():
    rows = rows_of(example())
    assert rows["ar"].rates == {1: 10.0, 2: 20.0}
    assert rows["ar"].rate == Spread(15.0, 10.0, 20.0)  # an even number of prompts: between the two
    assert rows["flowspec"].rates == {1: 22.0, 2: 32.0}
    assert rows["flowspec"].rate == Spread(27.0, 22.0, 32.0)
    third = [*example(), record("ar", 3, 1, 12.0), record("ar", 3, 2, 13.0)]
    assert rows_of(third)["ar"].rates[3] == 12.5  # an even number of repeats
    assert rows_of(third)["ar"].rate == Spread(
        12.5, 10.0, 20.0
    )  # an odd number of prompts: the middle one


def test_noise_is_the_largest_relative_spread_over_the_repeats_of_one_prompt():
    rows = rows_of(example())
    assert rows["ar"].noise == pytest.approx(
        0.3
    )  # prompt 1: (11 - 8) / 10; prompt 2: (20 - 16) / 20
    assert rows["flowspec"].noise == pytest.approx(10 / 32)
    assert rows["naive"].noise == pytest.approx(5 / 24)
    assert rows_of([r for r in example() if r.repeat == 2])["ar"].noise is None


def test_speed_ups_are_of_the_same_prompt_and_repeat():
    rows = rows_of(example())
    # over ar: 2, 2, 3 and 2, 1.5, 2; over naive: 1.25, 1.375, 1.5 and 2, 1.25, 1.28
    assert rows["flowspec"].over["ar"] == Spread(2.0, 1.5, 3.0)
    assert rows["flowspec"].ratios == {1: 2.0, 2: 2.0}
    assert rows["flowspec"].over["naive"] == Spread((1.28 + 1.375) / 2, 1.25, 2.0)
    assert rows["ar"].over["ar"] == rows["naive"].over["naive"] == Spread(1.0, 1.0, 1.0)
    # a ratio of medians would say 27 / 15 = 1.8


def test_a_speed_up_needs_a_partner():
    alone = rows_of([r for r in example() if r.method == "flowspec"])["flowspec"]
    assert (alone.over["ar"], alone.over["naive"], alone.ratios) == (None, None, {})
    apart = rows_of(
        [record("ar", 1, 1, 10.0), record("flowspec", 1, 2, 20.0), record("flowspec", 2, 1, 20.0)]
    )
    assert apart["flowspec"].over["ar"] is None
    hot = rows_of([record("ar", 1, 1, 10.0), record("flowspec", 1, 1, 20.0, temperature=0.7)])
    assert hot["flowspec"].over["ar"] is None


def test_texts_of_one_token_have_no_part_in_the_rates():
    records = [
        *example(),
        record("ar", 3, 1, None),
        record("flowspec", 3, 1, 99.0),
        record("flowspec", 1, 4, 90.0),
        record("ar", 1, 4, None),
    ]
    rows = rows_of(records)
    assert rows["ar"].rates == {1: 10.0, 2: 20.0}
    assert rows["flowspec"].rates == {1: 23.0, 2: 32.0, 3: 99.0}
    assert rows["flowspec"].over["ar"] == Spread(2.0, 1.5, 3.0)
    none = rows_of([record("ar", 1, 1, None, simulated=5.0)])["ar"]
    assert (none.rate, none.noise, none.over["ar"], none.rates, none.simulated, none.off) == (
        None,
        None,
        None,
        {},
        5.0,
        None,
    )


def test_the_other_figures_are_medians_over_records():
    records = [
        record(
            "ar",
            1,
            1,
            8.0,
            utilisation=[0.5, 0.25],
            bytes_per_token=[1.0, 20.0, 300.0],
            accepted_per_segment=1.0,
            bubbles=0.1,
        ),
        record(
            "ar",
            2,
            1,
            8.0,
            utilisation=[1.0, 0.5],
            bytes_per_token=[3.0, 10.0, 100.0],
            accepted_per_segment=2.0,
            bubbles=0.4,
        ),
        record(
            "ar",
            3,
            1,
            8.0,
            utilisation=[0.0, 0.25],
            bytes_per_token=[2.0, 30.0, 200.0],
            accepted_per_segment=4.0,
            bubbles=0.3,
        ),
    ]
    row = rows_of(records)["ar"]
    assert (row.utilisation, row.bytes_per_token, row.accepted_per_segment, row.bubbles) == (
        0.375,
        [2.0, 20.0, 200.0],
        2.0,
        0.3,
    )
    assert (row.wasted, row.dead_rows) == (0.625, 0.03125)


def test_off_compares_each_prompt_with_its_own_prediction():
    predicted = [
        record("ar", prompt, 1, 10.0, simulated=value)
        for prompt, value in [(1, 8.0), (2, 12.5), (3, 10.0), (4, None)]
    ]
    row = rows_of([*predicted, record("ar", 1, 2, 14.0, simulated=8.0)])["ar"]
    assert row.simulated == 10.0
    assert row.off == pytest.approx(0.0)  # +0.5, -0.2, 0
    assert rows_of(predicted[:2])["ar"].off == pytest.approx((0.25 - 0.2) / 2)


def test_temperatures_stand_as_they_came_and_methods_in_their_order():
    names = ["mine", "flowspec", "other", "pruned", "ar", "naive"]
    records = [record(name, 1, 1, 8.0, temperature) for temperature in (0.7, 0.0) for name in names]
    ordered = ["ar", "naive", "pruned", "flowspec", "mine", "other"]
    assert [(row.temperature, row.method) for row in summarise(records)] == [
        (t, name) for t in (0.7, 0.0) for name in ordered
    ]
    assert summarise([]) == []


def test_rings_of_different_sizes_are_not_mixed():
    with pytest.raises(UserError, match="rings of different sizes"):
        summarise([*example(), record("ar", 1, 1, 8.0, bytes_per_token=[1.0, 2.0])])


# ---- the same tokens -------------------------------------------------------------------------------
def test_equal_tokens_are_not_worth_a_line():
    assert identical([*example(), *example(temperature=0.7)]) == []
    assert identical([]) == []


def test_other_tokens_are_named_with_who_wrote_them():
    def wrong(method: str, prompt: int, repeat: int, temperature: float = 0.0) -> Record:
        return record(method, prompt, repeat, 8.0, temperature, tokens_sha="other")

    records = [
        *example(),
        wrong("flowspec", 2, 4),
        wrong("naive", 2, 4),
        wrong("pipedec", 2, 1),
        wrong("ar", 1, 4),
    ]
    hot = [record("naive", 1, 2, 8.0, 0.7), wrong("flowspec", 1, 1, 0.7)]
    assert identical([*records, *hot]) == [
        "prompt 1 at temperature 0: ar (in some repeats) wrote other tokens than ar in repeat 1",
        "prompt 2 at temperature 0: naive (in some repeats), pipedec, flowspec (in some repeats) wrote other tokens than ar in repeat 1",
        "prompt 1 at temperature 0.7: flowspec wrote other tokens than naive in repeat 2",
    ]


# ---- terminal --------------------------------------------------------------------------------------
def printed(what, width: int) -> list[str]:
    """Lines that a terminal so wide shows, without what trails."""
    console = Console(width=width, file=StringIO(), color_system=None)
    what(console)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


WORK = ["accepted", "busy", "bubbles", "wasted", "dead", "kB/token"]


def test_the_table_of_summaries():
    worked = ["1.50", "50%", "50%", "62%", "3.1%", "0.2 4.0 1.5"]
    lines = printed(
        lambda console: console.print(table(summarise(example()), "three [methods]")), 160
    )
    assert lines[0].strip() == "three [methods]"
    assert [re.split(" {2,}", line.strip()) for line in (lines[1], *lines[3:6])] == [
        ["temp", "method", "tokens/s", "noise", "vs naive", "vs ar", *WORK],
        ["0", "ar", "15.0 (10.0..20.0)", "30%", "0.66x (0.50..1.00)", "1.00x", *worked],
        ["0", "naive", "20.0 (16.0..24.0)", "21%", "1.00x", "1.51x (1.00..2.00)", *worked],
        [
            "0",
            "flowspec",
            "27.0 (22.0..32.0)",
            "31%",
            "1.33x (1.25..2.00)",
            "2.00x (1.50..3.00)",
            *worked,
        ],
    ]


def test_columns_that_nobody_has_a_figure_for_are_left_out():
    def heads(records) -> list[str]:
        return report._summaries(summarise(records))[0]

    assert heads([record("flowspec", 1, 1, 8.0)]) == ["temp", "method", "tokens/s", *WORK]
    both = [record("ar", 1, 1, 8.0, simulated=8.0), record("flowspec", 1, 1, 8.0)]
    assert heads(both) == ["temp", "method", "tokens/s", "vs ar", "sim.", "off", *WORK]
    assert report._summaries(summarise(both))[1][1][4:6] == ["-", "-"]


def test_show_prints_summaries_and_prompts():
    records = [*example(), record("ar", 3, 1, 8.0), record("naive", 1, 1, 12.0, 0.7)]
    lines = printed(lambda console: show(records, "all", console), 140)
    assert sum(" method " in line for line in lines) == 1
    start = next(k for k, line in enumerate(lines) if report.PROMPTS in line)
    assert [line.strip() for line in lines[start + 1 :]] == [
        "temp  prompt    ar         naive      flowspec",
        "─" * 48,
        "0          1  10.0  16.0 (1.60x)  22.0 (2.00x)",
        "0          2  20.0  24.0 (1.20x)  32.0 (2.00x)",
        "0          3   8.0             -             -",
        "",
        "0.7        1     -          12.0             -",
    ]


def test_names_of_many_variants_are_shown_whole_and_texts_of_one_token_do_no_harm():
    variants = [*METHODS, *(f"flowspec - {name}" for name in SWITCHES)]
    lines = printed(
        lambda console: show([record(name, 1, 1, 8.0) for name in variants], "all", console), 140
    )
    assert not any("…" in line for line in lines)
    assert printed(lambda console: show([record("ar", 1, 1, None)], "all", console), 140)


@pytest.mark.parametrize("width,tables", [(140, 1), (139, 2), (80, 2)])
def test_a_narrow_terminal_gets_two_tables_with_nothing_cut_off(width, tables):
    records = [
        r for temperature in (0.0, 0.7) for r in example(temperature=temperature, simulated=20.0)
    ]
    lines = printed(lambda console: show(records, "narrow", console), width)
    assert sum(" method " in line for line in lines) == tables
    assert "…" not in "".join(lines)
    assert max(map(len, lines)) <= width


def test_without_a_terminal_lines_are_140_wide(capsys):
    show(example(), "piped")
    assert sum(" method " in line for line in capsys.readouterr().out.splitlines()) == 1


# ---- Markdown --------------------------------------------------------------------------------------
def test_markdown():
    facts = {
        "machine": "8 cores",
        "command": "flowspec compare",
        "emulated": True,
        "date": "2026-01-02",
    }
    records = [
        record("ar", 1, 1, 8.0, simulated=10.0),
        record("ar", 1, 2, 8.0, simulated=10.0),
        record("flowspec", 1, 1, 20.0),
    ]
    assert markdown(records, "Demo", facts).split("\n") == [
        "## Demo",
        "",
        "8 cores; `flowspec compare`; emulated times; 2026-01-02; 2 repeats",
        "",
        "| temp | method | tokens/s | noise | vs ar | sim. | off | accepted | busy | bubbles | wasted | dead | kB/token |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| 0 | ar | 8.0 | 0% | 1.00x | 10.0 | -20% | 1.50 | 50% | 50% | 62% | 3.1% | 0.2 4.0 1.5 |",
        "| 0 | flowspec | 20.0 | - | 2.50x | - | - | 1.50 | 50% | 50% | 62% | 3.1% | 0.2 4.0 1.5 |",
        "",
        report.LEGEND,
        "",
        "tokens/s of each prompt (and over ar):",
        "",
        "| temp | prompt | ar | flowspec |",
        "| --- | --- | --- | --- |",
        "| 0 | 1 | 8.0 | 20.0 (2.50x) |",
        "",
    ]


@pytest.mark.parametrize(
    "facts,line",
    [
        ({}, "1 repeat"),
        ({"emulated": False, "date": "today"}, "real times; today; 1 repeat"),
        ({"machine": "box", "repeats": 9, "order": "shuffled"}, "box; 1 repeat; order: shuffled"),
        ({"simulated": True, "emulated": True}, "simulated times; 1 repeat"),
    ],
)
def test_facts_are_said_as_far_as_they_are_known(facts, line):
    assert markdown([record("ar", 1, 1, 8.0)], "x", facts).split("\n")[2] == line


# ---- file ------------------------------------------------------------------------------------------
def test_records_are_a_line_each(tmp_path):
    records = [*example(), record("ar", 3, 1, None, 0.7, simulated=12.5, tokens_sha="\u2028")]
    save(records, tmp_path / "r.jsonl")
    lines = (tmp_path / "r.jsonl").read_text().splitlines()
    assert [report.Record(**json.loads(line)) for line in lines] == records
    assert [p.name for p in tmp_path.iterdir()] == ["r.jsonl"]
    with pytest.raises(UserError, match=r"cannot write .*r\.jsonl: No such file"):
        save(example(), tmp_path / "no" / "r.jsonl")


# ---- picture ---------------------------------------------------------------------------------------
@pytest.fixture
def matplotlib():
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib (requirements_plots.txt)")


@pytest.fixture
def figures(matplotlib, monkeypatch) -> list:
    """Every figure that is made."""
    from matplotlib import figure

    made = []

    class Kept(figure.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    return made


def texts_of(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_picture_is_a_png_under_its_own_name(matplotlib, tmp_path):
    chart(example(), tmp_path / "c.png", "Demo")
    head = (tmp_path / "c.png").read_bytes()[:24]
    assert (head[:8], struct.unpack(">II", head[16:])) == (b"\x89PNG\r\n\x1a\n", (800, 600))
    assert [p.name for p in tmp_path.iterdir()] == ["c.png"]


def test_a_bar_a_method_and_temperature(figures, tmp_path):
    chart(
        [*example(), *example(temperature=0.7, simulated=18.0)],
        tmp_path / "c.png",
        "Demo",
        {"emulated": True},
    )
    axes = figures[0].axes[0]
    assert axes.get_title(loc="left") == "Demo (emulated times)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["ar", "naive", "flowspec"] * 2
    assert [bar.get_height() for bar in axes.patches] == [15.0, 20.0, 27.0] * 2
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx(
        [0, 1, 2, 3.6, 4.6, 5.6]
    )
    speedups = ["1.00x", "1.51x", "2.00x"] * 2
    assert texts_of(figures[0]) == [
        report._OVER_BARS,
        *speedups,
        "temperature 0",
        "temperature 0.7",
    ]
    dots = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "o"]
    assert dots == [[10.0, 20.0], [16.0, 24.0], [22.0, 32.0]] * 2
    diamonds = [list(line.get_ydata()) for line in axes.lines if line.get_marker() == "D"]
    assert diamonds == [[18.0]] * 3
    keys = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert keys == ["median over prompts", "least to most", "a prompt", "simulated"]


def test_a_picture_without_ar_and_predictions_says_nothing_of_them(figures, tmp_path):
    records = [record("mine", 1, 1, 8.0), record("naive", 1, 1, 4.0), record("serial", 1, 1, None)]
    chart(records, tmp_path / "c.png", "Demo", {"simulated": True})
    assert figures[0].axes[0].get_title(loc="left") == "Demo (simulated)"
    assert texts_of(figures[0]) == ["temperature 0"]
    assert [label.get_text() for label in figures[0].axes[0].get_xticklabels()] == ["naive", "mine"]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "median over prompts",
        "least to most",
        "a prompt",
    ]


def test_pictures_that_cannot_be_are_refused_in_one_line(matplotlib, tmp_path):
    with pytest.raises(UserError, match="nothing to draw: no record has a rate"):
        chart([record("ar", 1, 1, None)], tmp_path / "c.png", "Demo")
    with pytest.raises(UserError, match=r"cannot write .*c\.png: No such file"):
        chart(example(), tmp_path / "no" / "c.png", "Demo")


def test_without_matplotlib_a_picture_is_refused_with_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install -r requirements_plots\.txt"):
        chart(example(), tmp_path / "c.png", "Demo")


# ---- sweeps ----------------------------------------------------------------------------------------
TRIALS = [
    ("b=[40]", "flowspec", 12.0),
    ("b=[40]", "naive", 10.0),
    ("b=80", "flowspec", 12.0),
    ("b=80", "naive", 10.5),
    ("b=160", "naive", 3.0),
]


def test_the_best_setting_of_each_method_is_the_first_of_equals():
    assert list(best(TRIALS).items()) == [("naive", ("b=80", 10.5)), ("flowspec", ("b=[40]", 12.0))]
    assert best([]) == {}


def test_the_table_of_a_sweep_stars_the_best():
    lines = printed(lambda console: console.print(sweep_table(TRIALS, "budgets")), 80)
    assert [line.strip() for line in lines] == [
        "budgets",
        "setting   naive  flowspec",
        "─" * 27,
        "b=[40]     10.0    * 12.0",
        "b=80     * 10.5      12.0",
        "b=160       3.0         -",
        "*: best tokens/s",
    ]
