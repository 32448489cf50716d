"""A sweep is a run of `flowspec eval` for each value of one setting; here they are put together.

What the machine could run was measured, in a folder a value. Beside it, and for the values beyond,
stands what the simulator makes of first turns (the texts of the same value, or of the first one
that was measured), with the costs of the emulated devices."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowspec.bench.answers import Answer, Place, reference
from flowspec.bench.evaluate import Plan, prompt_of, sampling_of
from flowspec.bench.forecast import Forecaster, Models, emulated, obstacle, rate
from flowspec.bench.report import COLOURS, OTHER, maybe, pipes
from flowspec.bench.standing import (
    MEAN,
    Interval,
    Row,
    canvas,
    ranged,
    save_csv,
    save_figure,
)
from flowspec.bench.timeline import can_draw
from flowspec.config import Config
from flowspec.core.request import Request
from flowspec.core.topology import Topology
from flowspec.files import replacing
from flowspec.models.manifest import Manifest
from flowspec.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMES = {
    "bandwidth": "link, Mbps",
    "stages": "stages",
    "prompt": "prompt, tokens",
    "budget": "tree, nodes",
}
"""This maps a setting to what its values are."""
BESIDE = {"prompt": ("token_ms", "prefill_seconds"), "budget": ("bookkeeping_ms",)}
"""A picture of such a sweep shows these fields of Point, too, at the first temperature."""
Cell = tuple[int, str, float]
"""A value, a method and a temperature."""


class Value(NamedTuple):
    """What is known of one value: how it is run, and what was measured, if anything."""

    value: int
    config: Config
    topology: Topology
    plan: Plan
    rows: Sequence[Row]
    answers: Sequence[Answer]


class Point(NamedTuple):
    """A point is one value of the setting, for one method and temperature."""

    value: int
    temperature: float
    method: str
    measured: Interval | None
    """In tokens/s; None if this machine cannot run it."""
    emulated: bool
    simulated: float | None
    prefill_seconds: float | None
    bookkeeping_ms: float | None
    """Rank 0's own CPU time a segment, the median over answers."""
    accepted: float | None

    @property
    def token_ms(self) -> float | None:
        """Return what a token took."""
        return 1000 / self.measured.value if self.measured else None


def points(values: Sequence[Value], simulated: Mapping[Cell, float]) -> list[Point]:
    """Return the points of a sweep, by temperature, method and value."""
    plan = values[0].plan
    return [
        _point(value, method, temperature, simulated.get((value.value, method, temperature)))
        for temperature in plan.temperatures
        for method in plan.methods
        for value in values
    ]


def _point(value: Value, method: str, temperature: float, simulated: float | None) -> Point:
    rows = [r for r in value.rows if (r.method, r.temperature) == (method, temperature)]
    row = next((r for r in rows if r.dataset == MEAN), rows[0] if rows else None)
    own = [a for a in value.answers if (a.method, a.temperature) == (method, temperature)]
    books = [a.bookkeeping_ms for a in own if a.bookkeeping_ms is not None]
    return Point(
        value.value,
        temperature,
        method,
        row.speed if row else None,
        any(answer.emulated for answer in own),
        simulated,
        row.prefill_seconds if row else None,
        statistics.median(books) if books else None,
        row.accepted if row else None,
    )


# ---- simulated -----------------------------------------------------------------------------------
def simulate(values: Sequence[Value], config: Config) -> dict[Cell, float]:
    """Return tokens/s in virtual time.

    There are none where no stage is emulated, or where the drafts cannot be simulated. `config` is
    of a split that is there."""
    known = [value for value in values if value.answers]
    if not config.emulate.stage_ms or obstacle(config) or not known:
        return {}
    forecaster = Forecaster(config, Models.of(config))
    text = Text(Manifest.load(config.stages_path).folder(Topology.COORDINATOR))
    rates: dict[Cell, float] = {}
    for value in values:
        texts = _texts(value if value.answers else known[0], text)
        for method in value.plan.methods:
            for temperature in value.plan.temperatures:
                outcomes = [
                    forecaster.run(
                        forecaster.add(request, tokens),
                        method,
                        value.topology,
                        emulated(value.config),
                        value.config,
                    )
                    for request, tokens in texts
                    if request.sampling.temperature == temperature
                ]
                if outcomes:
                    rates[value.value, method, temperature] = rate(outcomes)
    return rates


def _texts(value: Value, text: Text) -> list[tuple[Request, list[int]]]:
    """Return the requests of the first turns, and what the reference answered."""
    first = reference(value.plan.methods)
    known = {answer.place: answer for answer in value.answers if answer.method == first}
    found = []
    for question in value.plan.questions:
        for temperature in value.plan.temperatures:
            answer = known.get(Place(question.dataset, question.id, 1, temperature))
            if answer:
                said = [{"role": "user", "content": question.turns[0]}]
                prompt = prompt_of(text, value.plan, question, said)
                sampling = sampling_of(value.config.sampling, question, temperature)
                request = Request(id=0, prompt=prompt, sampling=sampling, eos=text.eos)
                found.append((request, answer.token_ids))
    return found


# ---- written -------------------------------------------------------------------------------------
LEGEND = (
    "measured: tokens/s of the runs in the folders beside, with the 95 % interval over questions; "
    "'-' where this machine cannot run it. simulated: the same texts in virtual time. ms a token: "
    "of what was measured. rank 0: its own CPU time a segment, beside drafting and picking."
)


def write(folder: Path, over: str, found: Sequence[Point], command: str) -> None:
    """Write sweep.md, sweep.csv and, where matplotlib is, sweep.png."""
    with replacing(folder / "sweep.md") as beside:
        beside.write_text(markdown(over, found, command))
    save_csv(folder / "sweep.csv", [_flat(point) for point in found])
    if can_draw():
        draw(over, found, folder / "sweep.png")


def markdown(over: str, found: Sequence[Point], command: str) -> str:
    """Return the table of a sweep."""
    heads = [NAMES[over], "T", "method", "measured tokens/s", "simulated", "ms a token"]
    heads += ["prefill s", "rank 0 ms", "accepted"]
    mark = " (emulated times)" if any(point.emulated for point in found) else ""
    lines = [
        [
            str(point.value),
            f"{point.temperature:g}",
            point.method,
            ranged(point.measured, ".1f"),
            maybe(point.simulated, ".1f"),
            maybe(point.token_ms, ".1f"),
            maybe(point.prefill_seconds, ".2f"),
            maybe(point.bookkeeping_ms, ".2f"),
            maybe(point.accepted, ".2f"),
        ]
        for point in found
    ]
    return "\n\n".join(
        [f"## Sweep over {over}{mark}", f"`{command}`", pipes((heads, lines)), LEGEND, ""]
    )


def _flat(point: Point) -> dict[str, object]:
    flat = {name: value for name, value in point._asdict().items() if name != "measured"}
    names = ("tokens_per_second", "tokens_per_second_low", "tokens_per_second_high")
    return flat | dict(zip(names, point.measured or ("", "", ""), strict=True))


def draw(over: str, found: Sequence[Point], path: Path) -> None:
    """Draw tokens/s against the values: measured with a line, simulated hollow and dashed."""
    temperatures = list(dict.fromkeys(point.temperature for point in found))
    beside = BESIDE.get(over, ())
    figure, axes = canvas(len(temperatures) + len(beside), 5.0)
    for on, temperature in zip(axes, temperatures, strict=False):
        for method, own in _by_method(found, temperature).items():
            _lines(on, method, own)
        mark = " (emulated)" if any(point.emulated for point in found) else ""
        on.set_title(f"temperature {temperature:g}{mark}", loc="left")
        on.set_ylabel("tokens/s")
        on.set_ylim(bottom=0)
    for on, name in zip(axes[len(temperatures) :], beside, strict=True):
        for method, own in _by_method(found, temperatures[0]).items():
            known = [p for p in own if getattr(p, name) is not None]
            heights = [getattr(p, name) for p in known]
            on.plot([p.value for p in known], heights, "o-", color=COLOURS.get(method, OTHER))
        on.set_ylabel(name.replace("_", " "))
        on.set_ylim(bottom=0)
    for on in axes:
        on.set_xlabel(NAMES[over])
    axes[0].legend(frameon=False)
    save_figure(figure, path)


def _by_method(found: Sequence[Point], temperature: float) -> dict[str, list[Point]]:
    parts: dict[str, list[Point]] = {}
    for point in found:
        if point.temperature == temperature:
            parts.setdefault(point.method, []).append(point)
    return parts


def _lines(on: Axes, method: str, own: Sequence[Point]) -> None:
    colour = COLOURS.get(method, OTHER)
    measured = [(point.value, point.measured) for point in own if point.measured]
    if measured:
        spans = [span for _, span in measured]
        reach = [[s.value - s.low for s in spans], [s.high - s.value for s in spans]]
        places = [value for value, _ in measured]
        on.errorbar(
            places, [s.value for s in spans], reach, fmt="o-", color=colour, capsize=2, label=method
        )
    virtual = [(point.value, point.simulated) for point in own if point.simulated is not None]
    if virtual:
        label = f"{method} (simulated)"
        on.plot(*zip(*virtual, strict=True), "o--", color=colour, mfc="white", label=label)
