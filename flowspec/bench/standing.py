"""How methods stand against each other in runs of `flowspec eval`: figures, tables, pictures.

The speed of a method, xi, is the tokens of all its answers but the first of each, over the seconds
these took: prefill is told apart. A speed-up is the ratio of two such speeds over the turns that
both answered. Intervals (95 %) are percentiles of a bootstrap: questions are drawn with replacement
within each dataset, the same ones for both sides of a ratio, so what makes a question hard for all
does not count as doubt. A mean is that of the datasets' values."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from flowspec.bench.answers import REFERENCE, Answer, Place, Run, reference
from flowspec.bench.report import COLOURS, OTHER, maybe, ordered, pipes
from flowspec.bench.timeline import MISSING, can_draw
from flowspec.errors import need
from flowspec.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASES = ("naive", REFERENCE)
MEAN = "mean"
DRAWS, SEED, LEVEL = 2000, 0, 95
DEEPEST, TRIES = 16, 10
"""Acceptance is drawn up to this position, and where it was tried so often."""
Difference = Callable[[Sequence[int], Sequence[int]], "int | None"]
"""This returns where two texts differ first (lossless.first_difference)."""


class Interval(NamedTuple):
    """A value with its interval of confidence."""

    value: float
    low: float
    high: float


class Draws(NamedTuple):
    """A value, and what it is when other questions are drawn, float64 [DRAWS]."""

    value: float
    samples: np.ndarray

    @property
    def interval(self) -> Interval:
        low, high = np.percentile(self.samples, [50 - LEVEL / 2, 50 + LEVEL / 2])
        # rounding, or few questions, may leave the value itself outside
        return Interval(self.value, min(float(low), self.value), max(float(high), self.value))


Spent = Mapping[str, "tuple[float, float]"]
"""This maps a question to the tokens and the seconds of a method's turns of it."""


# ---- figures -------------------------------------------------------------------------------------
def over(spent: Spent, base: Spent | None, seed: int = SEED) -> Draws | None:
    """Return the speed-up over `base`, of the same questions, or without it the tokens/s.

    None if there is nothing to make it of."""
    sides = [spent] if base is None else [spent, base]
    both = [np.array([*side.values()], float).reshape(-1, 2) for side in sides]
    if any(part.sum(0).min() <= 0 for part in both):
        return None
    count = len(both[0])
    picks = np.random.default_rng(seed).integers(0, count, (DRAWS, count))
    values, samples = zip(
        *((_rate(part[None])[0], _rate(part[picks])) for part in both), strict=True
    )
    if base is None:
        return Draws(float(values[0]), samples[0])
    return Draws(float(values[0] / values[1]), samples[0] / samples[1])


def _rate(parts: np.ndarray) -> np.ndarray:
    """Return tokens per second, [n], of tokens and seconds [n, questions, 2]."""
    tokens, seconds = parts.sum(1).T
    return tokens / np.maximum(seconds, 1e-9)


def averaged(each: Sequence[Draws | None]) -> Draws | None:
    """Return the mean over datasets, which were drawn from by different seeds.

    None if one of them has none."""
    found = [draws for draws in each if draws is not None]
    if not found or len(found) < len(each):
        return None
    samples = np.mean([draws.samples for draws in found], 0)
    return Draws(mean(draws.value for draws in found), samples)


def acceptance(runs: Iterable[Sequence[int]], least: int = 1) -> list[float]:
    """Return how often the draft is right at its 1st, 2nd ... token behind one of the target's.

    Each of `runs` is as in Record.accepted_runs: what the text's end cut off says nothing of the
    token that would have come next. The list ends where less than `least` were tried."""
    tried, right = [0] * DEEPEST, [0] * DEEPEST
    for run in runs:
        for k, length in enumerate(run):
            cut = k == len(run) - 1
            for position in range(min(length + (not cut), DEEPEST)):
                tried[position] += 1
                right[position] += position < length
    return [r / t for r, t in zip(right, tried, strict=True) if t >= least]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row is what one method did with one dataset at one temperature, or in the mean of all."""

    run: str
    emulated: bool
    temperature: float
    dataset: str
    method: str
    questions: int
    turns: int
    skipped: int
    """So many questions do not fit the model, in whole or in a later turn."""
    tokens: int
    speed: Interval | None
    """In tokens/s."""
    whole: Interval | None
    """In tokens/s, of all tokens over all seconds from the request on."""
    over: dict[str, Interval | None]
    """This maps a method of BASES to the speed-up over it."""
    prefill_seconds: float
    """This is the mean over turns."""
    accepted: float | None
    """A returned segment brought so many new tokens, the mean over turns."""
    utilisation: float | None
    """The stages computed for this share of the decode phase, the mean over stages and turns."""
    verdict: str


Texts = Mapping[Place, Answer]


def table(run: Run, difference: Difference) -> list[Row]:
    """Return the rows of a run: temperatures and datasets as they come, then the mean of these."""
    texts = _by_method(run.answers)
    rows = []
    for temperature in dict.fromkeys(answer.temperature for answer in run.answers):
        datasets = dict.fromkeys(a.dataset for a in run.answers if a.temperature == temperature)
        parts = [((temperature, name), _part(texts, temperature, name)) for name in datasets]
        for (_, name), part in parts:
            rows += [_row(run, temperature, [name], [part], m, difference) for m in part]
        if len(parts) > 1:
            rows += [
                _row(run, temperature, [*datasets], [part for _, part in parts], m, difference)
                for m in ordered(m for m in texts if all(m in part for _, part in parts))
            ]
    return rows


def _by_method(answers: Iterable[Answer]) -> dict[str, Texts]:
    """Return the texts of each method; of a place that two folders have, the later one's."""
    texts: dict[str, dict[Place, Answer]] = {}
    for answer in answers:
        texts.setdefault(answer.method, {})[answer.place] = answer
    return {method: texts[method] for method in ordered(texts)}


def _part(texts: Mapping[str, Texts], temperature: float, dataset: str) -> dict[str, Texts]:
    """Return the methods' texts of one dataset at one temperature."""
    parts = {
        method: {
            p: a for p, a in of.items() if (p.temperature, p.dataset) == (temperature, dataset)
        }
        for method, of in texts.items()
    }
    return {method: part for method, part in parts.items() if part}


def _row(
    run: Run,
    temperature: float,
    datasets: Sequence[str],
    parts: Sequence[Mapping[str, Texts]],
    method: str,
    difference: Difference,
) -> Row:
    """Return the row of a method over the parts of these datasets."""
    answers = [answer for part in parts for answer in part[method].values()]
    skipped = {
        each.place[:2]
        for each in run.skipped
        if each.place.temperature == temperature and each.place.dataset in datasets
    }
    busy = [mean(answer.utilisation) for answer in answers if answer.utilisation]
    segments = [a.accepted_per_segment for a in answers if a.accepted_per_segment is not None]
    return Row(
        run=run.name,
        emulated=run.emulated,
        temperature=temperature,
        dataset=datasets[0] if len(parts) == 1 else MEAN,
        method=method,
        questions=len({(answer.dataset, answer.question) for answer in answers}),
        turns=len(answers),
        skipped=len(skipped),
        tokens=sum(answer.new_tokens for answer in answers),
        speed=_compared(parts, method, None),
        whole=_compared(parts, method, None, whole=True),
        over={base: _compared(parts, method, base) for base in BASES},
        prefill_seconds=mean(answer.prefill_seconds for answer in answers),
        accepted=mean(segments) if segments else None,
        utilisation=mean(busy) if busy else None,
        verdict=_verdict(parts, method, difference),
    )


def _spent(texts: Texts, others: Texts, whole: bool = False) -> dict[str, tuple[float, float]]:
    """Return what each question's turns took that are in `others` too, if `whole` with prefill."""
    spent: dict[str, tuple[float, float]] = {}
    for place in sorted(texts.keys() & others.keys()):
        tokens, seconds = spent.get(place.question, (0.0, 0.0))
        answer = texts[place]
        before = (1, answer.prefill_seconds) if whole else (0, 0.0)
        tokens += answer.new_tokens - 1 + before[0]
        spent[place.question] = tokens, seconds + answer.decode_seconds + before[1]
    return spent


def _compared(
    parts: Sequence[Mapping[str, Texts]], method: str, base: str | None, whole: bool = False
) -> Interval | None:
    """Return the speed-up of a method over another one, or without one the tokens/s."""
    each = []
    for seed, part in enumerate(parts, SEED):
        own, other = part[method], part.get(base or method, {})
        old = None if base is None else _spent(other, own, whole)
        each.append(over(_spent(own, other, whole), old, seed))
    found = averaged(each)
    return found and found.interval


def _verdict(parts: Sequence[Mapping[str, Texts]], method: str, difference: Difference) -> str:
    """Return whether the texts are the reference's, and if not, where the first one is another."""
    if all(reference([*part]) == method for part in parts):
        return "reference"
    compared, partings = 0, list[tuple[int, Place]]()
    for part in parts:
        own, first = part[method], part[reference([*part])]
        for place in own.keys() & first.keys():
            at = difference(own[place].token_ids, first[place].token_ids)
            compared += 1
            partings += [] if at is None else [(at, place)]
    if not partings:
        return "identical" if compared else "not compared"
    at, place = min(partings)
    where = f"{at} ({place.dataset} {place.question}, turn {place.turn})"
    return f"differs at {where}, {len(partings)} of {compared} texts"


@dataclass(frozen=True)
class Change:
    """A change is the ratio of one run's speed to the first one's, over turns that both have."""

    run: str
    first: str
    temperature: float
    dataset: str
    method: str
    ratio: Interval


def changes(runs: Sequence[Run]) -> list[Change]:
    """Return how much faster each run is than the first."""
    first, *others = [_by_method(run.answers) for run in runs]
    found = []
    for run, texts in zip(runs[1:], others, strict=True):
        for method in [method for method in texts if method in first]:
            for temperature, dataset in dict.fromkeys(
                (place.temperature, place.dataset) for place in texts[method]
            ):
                own, old = (_part(each, temperature, dataset) for each in (texts, first))
                if method in old:
                    parts = {"own": own[method], "old": old[method]}
                    ratio = _compared([parts], "own", "old")
                    named = run.name, runs[0].name, temperature, dataset, method
                    found += [Change(*named, ratio)] if ratio else []
    return found


# ---- written -------------------------------------------------------------------------------------
HEADS = (
    "run", "T", "dataset", "method", "questions", "tokens/s", "over naive", "over ar",
    "with prefill", "prefill s", "accepted", "busy", "text",
)  # fmt: skip
LEGEND = (
    "tokens/s: all tokens but each answer's first, over the seconds that they took. over: the same "
    "turns, the ratio of two speeds. In brackets the 95 % interval over questions (bootstrap, "
    f"{DRAWS} draws, seed {SEED}). with prefill: tokens/s of all tokens, from the request on (what "
    "a round brings beside its first token costs no decoding: of short answers, this column says "
    "more). prefill s: from the request to the first token, the mean. accepted: new tokens a "
    "returned segment, the mean. busy: the stages' share of decoding in forwards. text: against "
    "ar, token by token, with the first position that differs. mean: of the datasets' values. (N "
    "skipped): questions that the model's context does not hold."
)


def _cells(row: Row) -> list[str]:
    skipped = f" ({row.skipped} skipped)" if row.skipped else ""
    return [
        row.run + (" (emulated)" if row.emulated else ""),
        f"{row.temperature:g}",
        row.dataset,
        row.method,
        f"{row.questions}{skipped}",
        ranged(row.speed, ".1f"),
        *(ranged(row.over[base], ".2f") for base in BASES),
        ranged(row.whole, ".1f"),
        f"{row.prefill_seconds:.2f}",
        maybe(row.accepted, ".2f"),
        maybe(row.utilisation, ".0%"),
        row.verdict,
    ]


def ranged(found: Interval | None, digits: str) -> str:
    """Return a value with its interval, where that says something."""
    if found is None:
        return "-"
    value, low, high = (format(each, digits) for each in found)
    return value if low == high else f"{value} ({low}..{high})"


def markdown(runs: Sequence[Run], rows: Sequence[Row], changed: Sequence[Change]) -> str:
    """Return the report of runs as Markdown."""
    clocks = {run.emulated for run in runs}
    mark = " (emulated times)" if clocks == {True} else ""
    parts = [f"## Evaluation{mark}", *(_about(run) for run in runs)]
    parts += [pipes(([*HEADS], [_cells(row) for row in rows])), LEGEND]
    if changed:
        lines = [
            [c.run, f"{c.temperature:g}", c.dataset, c.method, ranged(c.ratio, ".2f")]
            for c in changed
        ]
        heads = ["run", "T", "dataset", "method", f"over {changed[0].first}"]
        parts += ["### Runs compared", pipes((heads, lines))]
    return "\n\n".join(parts) + "\n"


def _about(run: Run) -> str:
    said = run.asked
    clock = "emulated times" if run.emulated else "real times"
    versions = ", ".join(f"{name} {is_}" for name, is_ in said["versions"].items() if is_)
    return (
        f"{run.name}: `{said['command']}`; {said['ring']}, {said['machine']}, {versions}; {clock}; "
        f"{said['date']}"
    )


def _flat(row: Row) -> dict[str, Any]:
    """Return a row for CSV: a number a column."""
    flat = {
        name: value for name, value in vars(row).items() if name not in ("speed", "whole", "over")
    }
    ranges = {"tokens_per_second": row.speed, "with_prefill": row.whole} | {
        f"over_{b}": row.over[b] for b in BASES
    }
    for name, found in ranges.items():
        low, high = (found.low, found.high) if found else ("", "")
        flat |= {name: found.value if found else "", f"{name}_low": low, f"{name}_high": high}
    return flat


def write(folder: Path, runs: Sequence[Run], difference: Difference) -> list[Row]:
    """Write report.md, report.csv and, where matplotlib is, the pictures; return the rows."""
    rows = [row for run in runs for row in table(run, difference)]
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "report.md") as beside:
        beside.write_text(markdown(runs, rows, changes(runs)))
    save_csv(folder / "report.csv", [_flat(row) for row in rows])
    if can_draw():
        draw_bars(rows, folder / "datasets.png")
        draw_acceptance(runs, folder / "acceptance.png")
    return rows


def save_csv(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines, of which all have the same keys, as CSV."""
    with replacing(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]) if lines else [])
        writer.writeheader()
        writer.writerows(lines)


# ---- pictures ------------------------------------------------------------------------------------
def canvas(panels: int, width: float = 6.0) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels beside each other; raise UserError without matplotlib."""
    need(can_draw(), MISSING)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, 4.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, panels, k + 1) for k in range(panels)]
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", color="#dddddd", linewidth=0.8)
        each.set_axisbelow(True)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def draw_bars(rows: Sequence[Row], path: Path) -> None:
    """Draw tokens/s of each method by dataset, with intervals: a panel a run and temperature."""
    panels = list(dict.fromkeys((row.run, row.temperature) for row in rows))
    figure, axes = canvas(len(panels), 7.0)
    for on, (run, temperature) in zip(axes, panels, strict=True):
        shown = [r for r in rows if (r.run, r.temperature) == (run, temperature)]
        datasets = list(dict.fromkeys(row.dataset for row in shown))
        methods = ordered(row.method for row in shown)
        wide = 0.8 / len(methods)
        for k, method in enumerate(methods):
            own = [r for r in shown if r.method == method and r.speed is not None]
            places = [datasets.index(r.dataset) + wide * (k - (len(methods) - 1) / 2) for r in own]
            spans = [r.speed for r in own if r.speed is not None]
            reach = [[s.value - s.low for s in spans], [s.high - s.value for s in spans]]
            colour = COLOURS.get(method, OTHER)
            on.bar(places, [s.value for s in spans], wide, color=colour, label=method)
            on.errorbar(
                places, [s.value for s in spans], reach, fmt="none", ecolor="black", capsize=2
            )
        on.set_xticks(range(len(datasets)), datasets)
        on.set_ylabel("tokens/s")
        mark = " (emulated)" if any(row.emulated for row in shown) else ""
        on.set_title(f"{run}{mark}, temperature {temperature:g}", loc="left")
    axes[-1].legend(frameon=False)
    save_figure(figure, path)


def draw_acceptance(runs: Sequence[Run], path: Path) -> None:
    """Draw by position how often the draft was right, a panel a run and temperature."""
    panels = [
        (run, t)
        for run in runs
        for t in dict.fromkeys(answer.temperature for answer in run.answers)
    ]
    figure, axes = canvas(len(panels))
    for on, (run, temperature) in zip(axes, panels, strict=True):
        for method, texts in _by_method(run.answers).items():
            own = [a.accepted_runs for p, a in texts.items() if p.temperature == temperature]
            found = acceptance(own, TRIES)
            if method != REFERENCE and found:
                colour = COLOURS.get(method, OTHER)
                on.plot(range(1, len(found) + 1), found, "o-", color=colour, label=method)
        on.set_xlabel("tokens behind the target's own")
        on.set_ylabel("the draft is right")
        on.set_ylim(0, 1.02)
        mark = " (emulated)" if run.emulated else ""
        on.set_title(f"{run.name}{mark}, temperature {temperature:g}", loc="left")
    if any(on.lines for on in axes):
        axes[-1].legend(frameon=False)
    save_figure(figure, path)
