"""Figures, a in_words of three lines, a sketch and a picture (PNG) are made of a timeline here.

The sketch is for the terminal. This works on the spans of a run and of a simulation alike
(flowspec/trace.py). Times are in seconds unless a name says otherwise; a `window` is a pair of
seconds since the first span, as in the trace's file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from flowspec.errors import need
from flowspec.files import replacing
from flowspec.trace import VERDICTS, Span

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Interval = tuple[float, float]
SHOWN = 1.5
"""A picture shows so many seconds of decoding unless it is given a window."""
MISSING = (
    "drawing needs matplotlib: install it with .venv/bin/pip install -r requirements_plots.txt"
)


# ---- intervals: lists are sorted and disjoint ----------------------------------------------------
def _union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def _both(a: list[Interval], b: list[Interval]) -> list[Interval]:
    common, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        begin, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if begin < end:
            common.append((begin, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return common


def _outside(a: list[Interval]) -> list[Interval]:
    edges = [-math.inf, *(edge for interval in a for edge in interval), math.inf]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _length(a: list[Interval]) -> float:
    return sum(end - begin for begin, end in a)


def _times(spans: Iterable[Span]) -> list[Interval]:
    return _union((s.begin, s.end) for s in spans)


# ---- figures -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Summary:
    """These are the figures of the decode phase.

    The decode phase of each request lasts from the last stage's first forward of a segment to the
    end of the request's last span."""

    seconds: float
    """The decode phase lasts this long; where several requests overlap, the time counts once."""
    utilisation: tuple[float, ...]
    """Each stage 1..S spent this share of the decode phase in forwards of segments."""
    bubbles: float
    """This is 1 - mean utilisation."""
    wire: float
    """In this share of the decode phase, no stage computes and something is on its way between
    ranks."""
    draft: float
    """In this share of the decode phase, no stage computes, nothing is on its way, and the drafter
    drafts."""
    fruitless: float
    """This share of the stages' time was spent on segments of which no row became text."""
    wasted: float
    """This share of the seconds of the stages' forwards was spent on rows that never became text;
    the seconds of a segment are divided evenly among its rows."""
    accepted_rows: float
    """This share of the computed rows, over all stages, became text."""
    dead_rows: float
    """This share of the computed rows, over all stages, had been refused before their forward
    began."""
    bytes_per_link: tuple[int, ...]
    """Each sender 0..S sent so many bytes of segments to the next rank of the ring."""


def summary(spans: Sequence[Span], each: int = 0) -> Summary:
    """Return the figures of spans; raise UserError if no last stage computed a segment.

    Each target server has so many stages; they count one after the other. 0 stands for all: there
    is one server."""
    window = _decoding(spans, each)
    seconds = _length(window)
    stages = range(1, max(s.rank for s in spans) + 1)
    work = [s for s in spans if _is_work(s)]
    utilisation = tuple(
        _length(_both(window, _times(s for s in work if s.rank == stage))) / seconds
        for stage in stages
    )
    idle = _both(window, _outside(_times(s for s in spans if s.rank and s.row == "compute")))
    sending = _times(s for s in spans if s.row == "send")
    still = _both(idle, _outside(sending))
    spent = sum(s.end - s.begin for s in work)
    rows = sum(s.facts["rows"] for s in work)
    return Summary(
        seconds=seconds,
        utilisation=utilisation,
        bubbles=1 - sum(utilisation) / len(stages),
        wire=_length(_both(idle, sending)) / seconds,
        draft=_length(_both(still, _times(s for s in spans if s.row == "draft"))) / seconds,
        fruitless=sum(s.end - s.begin for s in work if s.name != "accepted")
        / (seconds * len(stages)),
        wasted=sum((s.end - s.begin) * (1 - s.facts["accepted"] / s.facts["rows"]) for s in work)
        / spent,
        accepted_rows=sum(s.facts["accepted"] for s in work) / rows,
        dead_rows=sum(s.facts["dead"] for s in work) / rows,
        bytes_per_link=tuple(_bytes_from(rank, spans) for rank in (0, *stages)),
    )


def _is_work(span: Span) -> bool:
    """Return whether a span is a stage's forward of a segment."""
    return (
        span.rank > 0 and span.row == "compute" and span.name in VERDICTS and span.end > span.begin
    )


def _decoding(spans: Sequence[Span], each: int) -> list[Interval]:
    """Return the decode phase; raise UserError if there is none.

    Each server has so many stages, as in `summary`."""
    each = each or max(s.rank for s in spans)
    begins: dict[int, float] = {}
    ends: dict[int, float] = {}
    for s in spans:
        request = s.facts.get("request")
        if request is not None:
            ends[request] = max(s.end, ends.get(request, s.end))
            if _is_work(s) and s.rank % each == 0:
                begins[request] = min(s.begin, begins.get(request, s.begin))
    need(bool(begins), "the trace holds no decoding: the last stage computed no segment")
    return _union((begin, ends[request]) for request, begin in begins.items())


def _bytes_from(rank: int, spans: Sequence[Span]) -> int:
    return round(
        sum(
            s.facts["bytes"]
            for s in spans
            if s.rank == rank and s.row == "send" and s.name in VERDICTS
        )
    )


def stages_of(facts: dict[str, Any]) -> int:
    """Return how many stages each server has by the facts of a trace; 0 if they do not tell."""
    stages = facts.get("stages")
    return stages if type(stages) is int and stages > 0 else 0


# ---- in words ------------------------------------------------------------------------------------
_FILL = (
    "a deeper tree (tree.depth, tree.budget) or smaller segments (tree.segment), or fewer stages"
)
_FLOWSPEC = "method: flowspec, which does not wait for the end of a round"
_ROUNDS = {"ar", "serial", "naive", "pruned"}


def in_words(spans: Sequence[Span], facts: dict[str, Any]) -> str:
    """Return three lines for a person.

    They say where the time went, what became of the rows, and what the largest loss is and what to
    try."""
    figures = summary(spans, stages_of(facts))
    bubbles, accepted, dead = (
        round(100 * share) for share in (figures.bubbles, figures.accepted_rows, figures.dead_rows)
    )
    waiting = f"{figures.wire:.0%} waiting for the wire, {figures.draft:.0%} for the draft"
    return "\n".join(
        (
            f"stages computed {100 - bubbles}% of the time, {bubbles}% were bubbles "
            f"({waiting}){_mark(facts)}",
            f"of what they computed, {accepted}% of the rows became text, "
            f"{100 - accepted - dead}% were refused later, "
            f"{dead}% were dead before they began",
            _largest_loss(figures, facts),
        )
    )


def _mark(facts: dict[str, Any]) -> str:
    """Return what a reader must know of the clock."""
    return (" (emulated times)" if facts.get("emulated") else "") + (
        " (simulated)" if facts.get("simulated") else ""
    )


def _largest_loss(figures: Summary, facts: dict[str, Any]) -> str:
    losses = [
        (
            figures.wire,
            "waiting for the wire",
            "a faster link, verify_on: last, or smaller segments (tree.segment)",
        ),
        (
            figures.draft,
            "waiting for the draft",
            "a faster drafter (a smaller model, or drafter.kind: ngram)",
        ),
        (
            figures.fruitless,
            "segments of which nothing became text",
            "a smaller tree (tree.budget) or smaller segments (tree.segment), or a drafter that "
            "guesses better",
        ),
        (
            figures.bubbles - figures.wire - figures.draft,
            "stages that had no segment to compute",
            _FLOWSPEC if facts.get("method") in _ROUNDS else _FILL,
        ),
    ]
    share, what, advice = max(losses)
    return f"the largest loss: {what}, {share:.0%} of the stages' time; try {advice}"


# ---- sketch --------------------------------------------------------------------------------------
_GLYPHS = {"accepted": "#", "pruned": "x", "stale": "!", "prefill": "=", "draft": "d"}
_LEGEND = (
    "# became text  x refused later  ! dead before it began  = prefill  d draft  . idle  "
    "(numbers: segments)"
)
_MARGIN = 9


def sketch(
    spans: Sequence[Span], width: int = 100, window: Interval | None = None, each: int = 0
) -> list[str]:
    """Return lines of at most `width` characters.

    They show rank 0's drafting, each stage's forwards, the time in ms, and a legend. A character is
    an equal part of the window (default: the first 1.5 s of decoding). It shows what filled most of
    this part, or idle if more than half of it was. `each` is as in `summary`."""
    first, last = _window(spans, window, each)
    columns = width - _MARGIN
    ranks = range(max(s.rank for s in spans) + 1)
    rows = [
        [s for s in spans if s.rank == rank and s.row == ("compute" if rank else "draft")]
        for rank in ranks
    ]
    names = [f"stage {rank}" if rank else "rank 0" for rank in ranks]
    lines = [
        f"{name:<{_MARGIN}}{_filled(row, first, last, columns)}"
        for name, row in zip(names, rows, strict=True)
    ]
    zero = min(s.begin for s in spans)
    return [*lines, f"{'ms':<{_MARGIN}}{_axis(first - zero, last - zero, columns)}", _LEGEND]


def _window(spans: Sequence[Span], window: Interval | None, each: int) -> Interval:
    """Return what to show, on the spans' clock; by default the first 1.5 s of decoding."""
    zero, end = min(s.begin for s in spans), max(s.end for s in spans)
    first, last = (
        (zero + window[0], zero + window[1]) if window else (_decoding(spans, each)[0][0], math.inf)
    )
    last = min(last, end if window else first + SHOWN, end)
    need(zero <= first < last, f"nothing to show: the timeline is {end - zero:.3f} s long")
    return first, last


class _Cell(NamedTuple):
    """This is what a character stands for."""

    glyph: str
    segment: int | None = None


def _filled(row: list[Span], first: float, last: float, columns: int) -> str:
    step = (last - first) / columns
    shares: list[dict[_Cell, float]] = [{} for _ in range(columns)]
    for s in row:
        cell = _Cell(_GLYPHS.get(s.name, "?"), s.facts.get("segment"))
        begin, end = max(s.begin - first, 0.0) / step, min(s.end - first, last - first) / step
        for k in range(int(begin), min(math.ceil(end), columns)):
            shares[k][cell] = shares[k].get(cell, 0.0) + min(end, k + 1) - max(begin, k)
    cells = [
        max(share, key=share.__getitem__) if sum(share.values()) >= 0.5 else _Cell(".")
        for share in shares
    ]
    return "".join(_numbered(cell, len(list(same))) for cell, same in groupby(cells))


def _numbered(cell: _Cell, length: int) -> str:
    """Return the glyph so many times, with the segment's number in it where there is room."""
    number = "" if cell.segment is None else str(cell.segment)
    if length < len(number) + 2:
        return cell.glyph * length
    return f"{cell.glyph}{number}".ljust(length, cell.glyph)


def _axis(first: float, last: float, columns: int) -> str:
    """Return a line with `|` under the character in which a round time begins, and the time in
    ms."""
    line = ""
    step = (last - first) * 1e3 / columns
    unit = _round_up(10 * step)
    for k in range(math.ceil(first * 1e3 / unit), math.floor(last * 1e3 / unit) + 1):
        label = f"|{k * unit:g}"
        column = int((k * unit - first * 1e3) / step + 1e-9)
        if column + len(label) <= columns:
            line = line.ljust(column) + label
    return line


def _round_up(value: float) -> float:
    """Return the next of 1, 2, 5, 10, 20 ..., of any size."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= value * (1 - 1e-9))


# ---- picture -------------------------------------------------------------------------------------
_COLOURS = {  # Okabe and Ito's palette, which every kind of colour vision tells apart
    "accepted": ("#009e73", "became text"),
    "pruned": ("#f0b64a", "refused later"),
    "stale": ("#d55e00", "dead before it began"),
    "prefill": ("#a6a6a6", "prefill"),
    "draft": ("#56b4e9", "draft"),
    "schedule": ("#4d4d4d", "schedule"),
}
_LANES = ("draft", "compute", "send", "receive")
_DIGIT = 6.0
"""A digit is this many pixels wide."""
_ACROSS = 1250
"""The time axis is about this many pixels wide."""


class _Lane(NamedTuple):
    """A lane is a row of the picture.

    It holds the spans of one row of one rank, between two heights (down is more)."""

    rank: int
    row: str
    top: float
    bottom: float

    @property
    def is_main(self) -> bool:
        return self.row == ("compute" if self.rank else "draft")


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw(
    spans: Sequence[Span],
    path: str | os.PathLike[str],
    facts: dict[str, Any],
    window: Interval | None = None,
) -> None:
    """Write a PNG of 1400 x 600 pixels, with a band for each rank and time to the right.

    It is written beside and renamed. Raise UserError if matplotlib is missing."""
    need(can_draw(), MISSING)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    first, last = _window(spans, window, stages_of(facts))
    zero = min(s.begin for s in spans)
    lanes = list(_lanes(spans))
    axes.set_xlim((first - zero) * 1e3, (last - zero) * 1e3)
    axes.set_xlabel("ms")
    stages = max(s.rank for s in spans)
    axes.set_title(
        f"{facts.get('method', 'timeline')}, {stages} stage{'s' * (stages != 1)}",
        loc="left",
        fontweight="bold",
        pad=22,
    )
    axes.text(
        0, 1.015, in_words(spans, facts).splitlines()[0], transform=axes.transAxes, fontsize=9.5
    )
    _frame(axes, lanes)
    for lane in lanes:
        inside = [
            s
            for s in spans
            if (s.rank, s.row) == (lane.rank, lane.row) and s.begin < last and s.end > first
        ]
        shown = [s._replace(begin=max(s.begin, first), end=min(s.end, last)) for s in inside]
        _fill(axes, lane, shown, zero, _ACROSS / (last - first))
    _legend(axes, spans)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def _lanes(spans: Sequence[Span]) -> Iterator[_Lane]:
    """Yield the lanes from the top: rank 0's rows, stage 1's and so on.

    The row in which a rank works is taller."""
    present = {(s.rank, s.row) for s in spans}
    top = 0.0
    for rank in range(max(s.rank for s in spans) + 1):
        for row in _LANES:
            if (rank, row) in present:
                lane = _Lane(rank, row, top, top)
                lane = lane._replace(bottom=top + (3.0 if lane.is_main else 1.0))
                yield lane
                top = lane.bottom
        top += 0.7


def _frame(axes: Axes, lanes: list[_Lane]) -> None:
    """Draw the bands, the names at the left, and the grid."""
    axes.set_ylim(max(lane.bottom for lane in lanes) + 0.3, -0.3)
    for _, of_rank in groupby(lanes, key=lambda lane: lane.rank):
        band = list(of_rank)
        axes.axhspan(
            band[0].top - 0.2, band[-1].bottom + 0.2, color="#f4f4f4", zorder=0, linewidth=0
        )
    axes.set_yticks(
        [(lane.top + lane.bottom) / 2 for lane in lanes], [_title(lane) for lane in lanes]
    )
    for label, lane in zip(axes.get_yticklabels(), lanes, strict=True):
        label.set(fontsize=10 if lane.is_main else 7, color="black" if lane.is_main else "#666666")
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#dddddd", linewidth=0.8)
    axes.set_axisbelow(True)


def _title(lane: _Lane) -> str:
    if lane.is_main:
        return f"stage {lane.rank}" if lane.rank else "rank 0 draft"
    return "schedule" if (lane.rank, lane.row) == (0, "compute") else lane.row


def _fill(axes: Axes, lane: _Lane, spans: list[Span], zero: float, pixels: float) -> None:
    """Draw the slices of a lane; a second is `pixels` pixels."""
    bars = [((s.begin - zero) * 1e3, (s.end - s.begin) * 1e3) for s in spans]
    edges = [0.8 if (s.end - s.begin) * pixels > 4 else 0.0 for s in spans]
    gap = 0.05 if lane.is_main else 0.12
    height = (lane.top + gap, lane.bottom - lane.top - 2 * gap)
    axes.broken_barh(
        bars,
        height,
        facecolors=[_colour(s.name) for s in spans],
        edgecolors="white",
        linewidths=edges,
    )
    for s, (begin, length) in zip(spans, bars, strict=True):
        number = str(s.facts.get("segment", ""))
        if lane.is_main and number and len(number) * _DIGIT + 3 < (s.end - s.begin) * pixels:
            middle = (begin + length / 2, (lane.top + lane.bottom) / 2)
            axes.text(
                *middle,
                number,
                ha="center",
                va="center",
                fontsize=8,
                color=_ink(s.name),
                clip_on=True,
            )


def _colour(name: str) -> str:
    return _COLOURS.get(name, _COLOURS["schedule"])[0]


def _ink(name: str) -> str:
    return "black" if name in ("pruned", "draft", "prefill") else "white"


def _legend(axes: Axes, spans: Sequence[Span]) -> None:
    from matplotlib.patches import Patch

    present = {s.name for s in spans}
    patches = [
        Patch(color=colour, label=label)
        for name, (colour, label) in _COLOURS.items()
        if name in present
    ]
    axes.figure.legend(
        handles=patches, loc="outside lower right", ncols=len(patches), frameon=False, fontsize=9
    )


def window(
    spans: Sequence[Span], first: float | None, last: float | None, each: int = 0
) -> Interval:
    """Return what to draw, in seconds since the first span.

    It is as given, or else SHOWN seconds from where decoding begins. `each` is as in `summary`."""
    begin = _decoding(spans, each)[0][0] - min(s.begin for s in spans) if first is None else first
    return begin, begin + SHOWN if last is None else last
