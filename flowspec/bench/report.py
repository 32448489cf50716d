"""A report shows a comparison of methods, and keeps the file of its records.

It shows tables for the terminal, Markdown, and a bar chart (PNG). Its functions are pure functions
over records, one for each measured generation. A speed-up is always a median of PAIRED ratios, of
the same prompt in the same repeat, so that what slows the machine for a while slows both sides."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import mean, median
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowspec.bench.timeline import MISSING, can_draw
from flowspec.core.policies import METHODS
from flowspec.errors import need
from flowspec.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 140
"""The table of summaries needs this many columns, and has them where there is no terminal."""
FULL = "flowspec"
RIVALS = ("transformers", "assisted")
"""Other programs (bench/unsplit.py) go by these names."""
BASES = ("pipedec", "naive", "ar", *RIVALS, FULL)
"""Others are compared with these methods; with the last, only its own variants and rivals are."""
Key = TypeVar("Key")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record is one measured generation, and a line of JSON.

    Of a generation that no ring wrote (`bench compare --against`), the lists are empty, and what
    else can only be known of a ring is None."""

    method: str
    temperature: float
    prompt: int
    """Prompts count from 1."""
    repeat: int
    """Repeats count from 1."""
    new_tokens: int
    tokens_per_second: float | None
    """It is None if the text has one token, and so no rate."""
    prefill_seconds: float
    accepted_per_segment: float | None = None
    """A returned segment brought so many new tokens, in the mean."""
    utilisation: list[float] = field(default_factory=list)
    """Each stage 1..S computed for this share of the decode phase."""
    bubbles: float | None = None
    """This is 1 - mean utilisation."""
    wasted: float | None = None
    """This share of the stages' forwards was spent on rows that never became text."""
    dead_rows: float | None = None
    """This share of the computed rows had been refused before their forward began."""
    bytes_per_token: list[float] = field(default_factory=list)
    """Each sender 0..S sent so many bytes for each new token to the next rank of the ring."""
    bookkeeping_ms: float | None = None
    stage_overhead_ms: list[float] = field(default_factory=list)
    drafted_tokens: int | None = None
    forwarded_tokens: int | None = None
    accepted_runs: list[int] = field(default_factory=list)
    """So many tokens the draft had on its way before each one that the target added by itself; the
    last number is of the run that the text's end cut off."""
    simulated: float | None = None
    """The simulation predicts these tokens/s for this prompt; None if it was not simulated."""
    tokens_sha: str
    """This is the hash of the token ids; it is equal for all methods at one prompt and
    temperature."""
    costs: dict[str, Any] | None = None
    """This was measured of stages, links and drafter (core/costs.py); `simulate --costs` reads
    it."""


class Spread(NamedTuple):
    median: float
    least: float
    most: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row sums up the records of one method at one temperature.

    A value is None if there is nothing to make it of."""

    temperature: float
    method: str
    rates: dict[int, float]
    """This maps a prompt to its tokens/s, the median over repeats."""
    ratios: dict[int, float]
    """This maps a prompt to its speed-up over ar, the median over repeats."""
    rate: Spread | None
    """This is the spread of `rates` in tokens/s."""
    noise: float | None
    """This is the largest (most - least) / median of tokens/s over the repeats of one prompt; None
    if no prompt has two."""
    over: dict[str, Spread | None]
    """This maps a method to the speed-up over it, over prompts and repeats."""
    accepted_per_segment: float | None
    """A returned segment brought so many new tokens. This value and all below but the last two are
    medians over the records."""
    utilisation: float | None
    """This is the mean utilisation of the stages."""
    bubbles: float | None
    wasted: float | None
    dead_rows: float | None
    bytes_per_token: list[float]
    """Each sender 0..S sent so many bytes for each new token."""
    simulated: float | None
    """This is the median over prompts, in tokens/s."""
    off: float | None
    """This is measured / simulated - 1, the median over prompts."""


# ---- summaries -----------------------------------------------------------------------------------
def summarise(records: Sequence[Record]) -> list[Row]:
    """Return a row for each temperature and method.

    Temperatures stand as they first appear, methods in the order of METHODS and then as they
    appear."""
    need(
        len({len(r.bytes_per_token) for r in records if r.bytes_per_token}) < 2,
        "the records are of rings of different sizes: summarise each size by itself",
    )
    rows = []
    for same in _grouped(records, lambda r: r.temperature).values():
        methods = _grouped(same, lambda r: r.method)
        rows += [_row(methods[method], methods) for method in ordered(methods)]
    return rows


def _grouped(records: Iterable[Record], key: Callable[[Record], Key]) -> dict[Key, list[Record]]:
    groups: dict[Key, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return groups


def ordered(methods: Iterable[str]) -> list[str]:
    """Return each method once, in the order of METHODS, others after them."""
    return sorted(
        dict.fromkeys(methods),
        key=lambda method: METHODS.index(method) if method in METHODS else len(METHODS),
    )


def _row(own: list[Record], methods: dict[str, list[Record]]) -> Row:
    """Return the row of a method's own records.

    `methods` holds the records of each method at the same temperature."""
    measured = _by_prompt(own, lambda r: r.tokens_per_second)
    rates = {prompt: median(values) for prompt, values in measured.items()}
    expected = {
        prompt: median(values) for prompt, values in _by_prompt(own, lambda r: r.simulated).items()
    }
    over = {
        base: _paired(own, methods.get(base, []))
        for base in BASES
        if base != FULL or own[0].method not in METHODS
    }
    return Row(
        temperature=own[0].temperature,
        method=own[0].method,
        rates=rates,
        ratios={prompt: median(values) for prompt, values in over["ar"].items()},
        rate=spread(rates.values()),
        noise=max(
            ((max(v) - min(v)) / median(v) for v in measured.values() if len(v) > 1), default=None
        ),
        over={
            base: spread(ratio for values in found.values() for ratio in values)
            for base, found in over.items()
        },
        accepted_per_segment=_median(r.accepted_per_segment for r in own),
        utilisation=_median(mean(r.utilisation) for r in own if r.utilisation),
        bubbles=_median(r.bubbles for r in own),
        wasted=_median(r.wasted for r in own),
        dead_rows=_median(r.dead_rows for r in own),
        bytes_per_token=[
            median(link) for link in zip(*(r.bytes_per_token for r in own), strict=True)
        ],
        simulated=_median(expected.values()),
        off=_median(rates[prompt] / expected[prompt] - 1 for prompt in rates if prompt in expected),
    )


def _by_prompt(
    records: list[Record], value: Callable[[Record], float | None]
) -> dict[int, list[float]]:
    """Return a map of a prompt to the values of its repeats; None is left out."""
    values: dict[int, list[float]] = {}
    for record in records:
        if (one := value(record)) is not None:
            values.setdefault(record.prompt, []).append(one)
    return values


def _paired(own: list[Record], base: list[Record]) -> dict[int, list[float]]:
    """Return a map of a prompt to the speed-up over `base` in each repeat in which both have a
    rate."""
    slow = {(r.prompt, r.repeat): r.tokens_per_second for r in base}

    def ratio(record: Record) -> float | None:
        rate, other = record.tokens_per_second, slow.get((record.prompt, record.repeat))
        return None if rate is None or other is None else rate / other

    return _by_prompt(own, ratio)


def _median(values: Iterable[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return median(found) if found else None


def spread(values: Iterable[float]) -> Spread | None:
    found = list(values)
    return Spread(median(found), min(found), max(found)) if found else None


def identical(records: Sequence[Record]) -> list[str]:
    """Return a line for each prompt and temperature at which some method wrote other tokens.

    The list is empty if every method wrote the same tokens everywhere."""
    lines = []
    for (temperature, prompt), same in _grouped(
        records, lambda r: (r.temperature, r.prompt)
    ).items():
        methods = _grouped(same, lambda r: r.method)
        base = min(methods[ordered(methods)[0]], key=lambda r: r.repeat)
        wrong = [name for method in ordered(methods) if (name := _unlike(methods[method], base))]
        if wrong:
            who = (
                f"{', '.join(wrong)} wrote other tokens than {base.method} in repeat {base.repeat}"
            )
            lines.append(f"prompt {prompt} at temperature {temperature:g}: {who}")
    return lines


def _unlike(own: list[Record], base: Record) -> str | None:
    """Return the method's name if it wrote other tokens than `base`."""
    same = [r.tokens_sha == base.tokens_sha for r in own]
    if all(same):
        return None
    return f"{own[0].method} (in some repeats)" if any(same) else own[0].method


# ---- cells ---------------------------------------------------------------------------------------
class _Column(NamedTuple):
    head: str
    text: Callable[[Row], str]


_NONE = "-"
PROMPTS = "tokens/s of each prompt (and over ar)"
LEGEND = (
    "Each run knows nothing of those before it. tokens/s: median of the prompts' medians "
    "(least..most). "
    "noise: the largest spread over the repeats of a prompt. "
    "vs: paired speed-ups, median (least..most) over prompts and repeats. sim.: simulated "
    "tokens/s; off: measured against that. "
    "accepted: tokens per segment. busy: the stages' mean. wasted: share of the forwards whose "
    "rows never became text. "
    "dead: rows refused before their forward began. kB/token: sent by rank 0, 1, ..."
)


def ranged(spread: Spread | None, digits: str, unit: str = "") -> str:
    """Return a text like `1.50x (1.20..1.90)`, without the range where it says nothing."""
    if spread is None:
        return _NONE
    middle, least, most = (format(value, digits) for value in spread)
    return f"{middle}{unit}" if least == most else f"{middle}{unit} ({least}..{most})"


def maybe(value: float | None, digits: str) -> str:
    return _NONE if value is None else format(value, digits)


def _over(base: str, row: Row) -> str:
    return ranged(row.over.get(base), ".2f", "x")


_KEYS = (
    _Column("temp", lambda row: f"{row.temperature:g}"),
    _Column("method", lambda row: row.method),
)
_SPEED = (
    _Column("tokens/s", lambda row: ranged(row.rate, ".1f")),
    _Column("noise", lambda row: maybe(row.noise, ".0%")),
    *(_Column(f"vs {base}", functools.partial(_over, base)) for base in BASES),
    _Column("sim.", lambda row: maybe(row.simulated, ".1f")),
    _Column("off", lambda row: maybe(row.off, "+.0%")),
)
_WORK = (
    _Column("accepted", lambda row: maybe(row.accepted_per_segment, ".2f")),
    _Column("busy", lambda row: maybe(row.utilisation, ".0%")),
    _Column("bubbles", lambda row: maybe(row.bubbles, ".0%")),
    _Column("wasted", lambda row: maybe(row.wasted, ".0%")),
    _Column("dead", lambda row: maybe(row.dead_rows, ".1%")),
    _Column(
        "kB/token",
        lambda row: " ".join(f"{link / 1e3:.1f}" for link in row.bytes_per_token) or _NONE,
    ),
)
_ALL = _KEYS + _SPEED + _WORK
_Grid = tuple[list[str], list[list[str]]]
"""These are the heads, and the cells of each line."""


def _summaries(rows: Sequence[Row], columns: Sequence[_Column] = _ALL) -> _Grid:
    """Return a line for each row; a column in which no row has anything is left out."""
    columns = [c for c in columns if any(c.text(row) != _NONE for row in rows)]
    return [c.head for c in columns], [[c.text(row) for c in columns] for row in rows]


def _prompts(rows: Sequence[Row]) -> _Grid:
    """Return a line for each temperature and prompt, and a column for each method.

    A cell holds the tokens/s and the speed-up over ar."""
    methods = ordered(row.method for row in rows)
    known = {(row.temperature, row.method): row for row in rows}
    lines = []
    for temperature in dict.fromkeys(row.temperature for row in rows):
        of_methods = [known.get((temperature, method)) for method in methods]
        for prompt in sorted({prompt for row in of_methods if row for prompt in row.rates}):
            lines.append(
                [f"{temperature:g}", f"{prompt}", *(_measured(row, prompt) for row in of_methods)]
            )
    return ["temp", "prompt", *methods], lines


def _measured(row: Row | None, prompt: int) -> str:
    if row is None or prompt not in row.rates:
        return _NONE
    ratio = f" ({row.ratios[prompt]:.2f}x)" if prompt in row.ratios and row.method != "ar" else ""
    return f"{row.rates[prompt]:.1f}{ratio}"


# ---- terminal ------------------------------------------------------------------------------------
def table(rows: Sequence[Row], title: str) -> Table:
    return _rich(_summaries(rows), title, LEGEND)


def console() -> Console:
    """Return standard output: as wide as the terminal, or 140 columns wide where it is none."""
    return Console(width=None if sys.stdout.isatty() else WIDTH)


def show(records: Sequence[Record], title: str, on: Console | None = None) -> None:
    """Print the summaries (as two tables if one is too wide) and every prompt's tokens/s."""
    on = on or console()
    rows = summarise(records)
    if on.width < WIDTH or any(row.method in RIVALS for row in rows):
        on.print(_rich(_summaries(rows, _KEYS + _SPEED), title))
        on.print(_rich(_summaries(rows, _KEYS + _WORK), "where the work went", LEGEND))
    else:
        on.print(table(rows, title))
    on.print()
    on.print(_rich(_prompts(rows), PROMPTS))


def _rich(grid: _Grid, title: str, caption: str | None = None) -> Table:
    """Return a table with numbers at the right and a gap where the temperature changes."""
    heads, lines = grid
    shown = Table(
        title=Text(title),
        caption=caption,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
        show_edge=False,
    )
    for head in heads:
        shown.add_column(
            head,
            justify="left" if head in ("temp", "method", "setting") else "right",
            overflow="fold",
        )
    for line, after in zip(lines, [*lines, None][1:], strict=True):
        shown.add_row(
            *map(Text, line),
            end_section=after is not None and heads[0] == "temp" and after[0] != line[0],
        )
    return shown


# ---- Markdown ------------------------------------------------------------------------------------
_NAMED = {"machine", "command", "emulated", "simulated", "date", "repeats"}
"""These facts need no name beside them, or are known of the records."""


def markdown(records: Sequence[Record], title: str, facts: dict[str, Any]) -> str:
    """Return Markdown with heading, facts, summaries and prompts.

    `facts` are machine, command, emulated, simulated and date as far as known, and others by
    name."""
    rows = summarise(records)
    parts = [f"## {title}", _facts(facts, records), pipes(_summaries(rows)), LEGEND]
    return "\n\n".join([*parts, f"{PROMPTS}:", pipes(_prompts(rows))]) + "\n"


def _facts(facts: dict[str, Any], records: Sequence[Record]) -> str:
    repeats = len({r.repeat for r in records})
    command = f"`{facts['command']}`" if "command" in facts else None
    said = [
        facts.get("machine"),
        command,
        _clock(facts),
        facts.get("date"),
        f"{repeats} repeat{'s' * (repeats != 1)}",
    ]
    others = [f"{name}: {fact}" for name, fact in facts.items() if name not in _NAMED]
    return "; ".join([str(fact) for fact in said if fact is not None] + others)


def _clock(facts: dict[str, Any]) -> str | None:
    known = [name for name in ("simulated", "emulated") if facts.get(name)] or ["real"] * (
        "emulated" in facts
    )
    return f"{known[0]} times" if known else None


def pipes(grid: _Grid) -> str:
    heads, lines = grid
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))


# ---- file ----------------------------------------------------------------------------------------
def save(records: Sequence[Record], path: str | os.PathLike[str]) -> None:
    """Write JSON lines; raise UserError if they cannot be written."""
    with replacing(path) as beside:
        beside.write_text("".join(line(record) + "\n" for record in records))


def line(record: Record) -> str:
    """Return a record as a line of JSON, without its end."""
    return json.dumps(dataclasses.asdict(record))


# ---- picture -------------------------------------------------------------------------------------
COLOURS = {  # Okabe and Ito's palette, which every kind of colour vision tells apart
    "ar": "#999999",
    "serial": "#f0b64a",
    "naive": "#56b4e9",
    "pruned": "#cc79a7",
    "pipedec": "#0072b2",
    "flowspec": "#009e73",
}
OTHER = "#d55e00"
_OVER_BARS = "over each bar: the median speed-up over ar, of the same prompt and repeat"
_BAR = 0.72
"""A bar has this width, where bars stand 1 apart."""
_ASIDE = 0.25
"""This far from the middle of a bar stand its whisker at the left and its diamond at the right; the
dots stand between them."""
_GAP = 0.6
"""Between temperatures, bars stand this much further apart."""


def chart(
    records: Sequence[Record],
    path: str | os.PathLike[str],
    title: str,
    facts: dict[str, Any] | None = None,
) -> None:
    """Write a PNG 600 pixels high, with a bar for each method, grouped by temperature.

    It is written beside and renamed. Raise UserError if matplotlib is missing.

    A bar is the median tokens/s over prompts. On it are the range from the least to the most of
    them, a dot for each prompt (the first at the left) and a hollow diamond for what the simulation
    predicted; above it is the speed-up over ar. The title says what `facts` say of the clock."""
    need(can_draw(), MISSING)
    rows = [row for row in summarise(records) if row.rate]
    need(bool(rows), "nothing to draw: no record has a rate")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    places = _places(rows)
    apart = max(
        0.8, 0.085 * max(len(_short(row)) for row in rows)
    )  # inches; a character below the bars is about so wide
    figure = Figure(figsize=(max(8.0, 1.2 + apart * places[-1]), 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_title(f"{title}{_mark(facts or {})}", loc="left", fontweight="bold", pad=26)
    if any(row.over["ar"] for row in rows):
        axes.text(0, 1.025, _OVER_BARS, transform=axes.transAxes, fontsize=9.5)
    axes.set_ylabel("tokens/s")
    for x, row in zip(places, rows, strict=True):
        _bar(axes, x, row)
    _frame(axes, places, rows)
    _key(axes, rows)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def _mark(facts: dict[str, Any]) -> str:
    return (" (emulated times)" if facts.get("emulated") else "") + (
        " (simulated)" if facts.get("simulated") else ""
    )


def _short(row: Row) -> str:
    """Return the row's name below its bar."""
    return row.method.removeprefix(f"{FULL} ")


def _places(rows: list[Row]) -> list[float]:
    """Return where each bar stands: 1 apart, more where the temperature changes."""
    places = [0.0]
    for before, row in pairwise(rows):
        places.append(places[-1] + 1 + (_GAP if row.temperature != before.temperature else 0))
    return places


def _bar(axes: Axes, x: float, row: Row) -> None:
    assert row.rate is not None
    axes.bar(x, row.rate.median, _BAR, color=COLOURS.get(row.method, OTHER), zorder=2)
    below, above = row.rate.median - row.rate.least, row.rate.most - row.rate.median
    axes.errorbar(
        x - _ASIDE,
        row.rate.median,
        [[below], [above]],
        color="black",
        linewidth=1.2,
        capsize=4,
        zorder=3,
    )
    step = _ASIDE * 1.1 / max(len(row.rates), 2)
    dots = [x + step * (k - (len(row.rates) - 1) / 2) for k in range(len(row.rates))]
    axes.plot(dots, [row.rates[prompt] for prompt in sorted(row.rates)], "o", **_DOT)
    if row.simulated is not None:
        axes.plot(x + _ASIDE, row.simulated, "D", **_DIAMOND)
    if (over := row.over["ar"]) is not None:
        top = max(row.rate.most, row.simulated or 0)
        axes.annotate(f"{over.median:.2f}x", (x, top), xytext=(0, 9), fontsize=10, **_NOTE)


_DOT: dict[str, Any] = dict(
    markersize=4, color="white", markeredgecolor="black", markeredgewidth=0.7, zorder=4
)
_DIAMOND: dict[str, Any] = dict(
    markersize=8.5, color="white", markeredgecolor="black", markeredgewidth=1.5, zorder=3
)
_NOTE: dict[str, Any] = dict(textcoords="offset points", ha="center", fontweight="bold")


def _frame(axes: Axes, places: list[float], rows: list[Row]) -> None:
    """Draw names below the bars, temperatures below the names, and the grid."""
    axes.set_xticks(places, [_short(row) for row in rows])
    axes.tick_params(axis="x", length=0)
    for temperature in dict.fromkeys(row.temperature for row in rows):
        inside = [x for x, row in zip(places, rows, strict=True) if row.temperature == temperature]
        below: dict[str, Any] = dict(xycoords=axes.get_xaxis_transform(), xytext=(0, -24), va="top")
        axes.annotate(f"temperature {temperature:g}", (mean(inside), 0), **below, **_NOTE)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.06)
    margin = max(0.7, 2.2 - places[-1] / 2)
    axes.set_xlim(-margin, places[-1] + margin)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _key(axes: Axes, rows: list[Row]) -> None:
    """Draw a key of the marks that are there."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    keys: list[Any] = [
        Patch(color="#bbbbbb", label="median over prompts"),
        Line2D(
            [],
            [],
            marker="|",
            ls="",
            markersize=14,
            markeredgewidth=1.2,
            color="black",
            label="least to most",
        ),
        Line2D([], [], marker="o", ls="", label="a prompt", **_DOT),
    ]
    if any(row.simulated is not None for row in rows):
        keys.append(Line2D([], [], marker="D", ls="", label="simulated", **_DIAMOND))
    axes.figure.legend(
        handles=keys, loc="outside lower center", ncols=len(keys), frameon=False, fontsize=9
    )


# ---- sweeps --------------------------------------------------------------------------------------
Trial = tuple[str, str, float]
"""A trial is what was set, the method, and the tokens/s."""


def best(trials: Iterable[Trial]) -> dict[str, tuple[str, float]]:
    """Return a map of a method to its best setting and the tokens/s of that.

    The best setting has the most tokens/s; it is the first of equals. The methods are in the order
    of METHODS."""
    found: dict[str, tuple[str, float]] = {}
    for setting, method, rate in trials:
        if method not in found or rate > found[method][1]:
            found[method] = (setting, rate)
    return {method: found[method] for method in ordered(found)}


def sweep_table(trials: Sequence[Trial], title: str) -> Table:
    """Return a table of tokens/s, with a line for each setting and a column for each method.

    A star marks the best of each method."""
    top = best(trials)
    rates = {(setting, method): rate for setting, method, rate in trials}
    lines = []
    for setting in dict.fromkeys(setting for setting, _, _ in trials):
        cells = [_tried(rates.get((setting, method)), top[method][0] == setting) for method in top]
        lines.append([setting, *cells])
    return _rich((["setting", *top], lines), title, "*: best tokens/s")


def _tried(rate: float | None, is_best: bool) -> str:
    return f"{'* ' if is_best else ''}{maybe(rate, '.1f')}"
