"""Heat maps of SI and DSI over drafter latency and acceptance rate, all of it simulated.

The grid is that of the paper (arXiv 2405.14105): n + 1 drafter latencies from 0.01 to 1 target
latency, n + 1 acceptance rates from 0.01 to 0.99 and lookaheads from 1 to n. A cell of a map
compares the methods at their best lookaheads, which are chosen by expectation, not among the
simulated means: the least of several noisy means is too small on average.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flowspec.bench.timeline import MISSING, can_draw
from flowspec.errors import UserError, need
from flowspec.files import replacing
from flowspec.sim.dsi import (
    Array,
    Counts,
    Estimate,
    Setting,
    alone,
    best_lookahead,
    dsi_token,
    estimate,
    servers_needed,
    si_token,
    simulate_dsi,
    simulate_si,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEAST, MOST = 0.01, 0.99
"""A drafter that takes no time needs servers without end, one that is always right no target."""


class Sweep(NamedTuple):
    """This is every setting of a grid: drafter latency x acceptance rate x lookahead."""

    setting: Setting
    """Its arrays have the shapes (C, 1, 1), (1, A, 1) and (K,); the target's latency is 1."""
    servers: int
    repeats: int
    seed: int
    si: Estimate
    dsi: Estimate
    """It is not a number where the servers do not suffice."""

    @property
    def valid(self) -> Array:
        return np.broadcast_to(servers_needed(self.setting) <= self.servers, self.setting.shape)


class HeatMap(NamedTuple):
    """These are grids of drafter latency x acceptance rate; each is a column of the CSV file.

    Costs are of a text, in target latencies; what does not exist is not a number."""

    drafter_latency: Array
    acceptance: Array
    servers: Array
    tokens: Array
    repeats: Array
    seed: Array
    non_si: Array
    si_lookahead: Array
    """SI's best lookahead among those for which the servers suffice for DSI, as in the paper."""
    si: Array
    si_error: Array
    dsi_lookahead: Array
    dsi: Array
    dsi_error: Array
    free_si_lookahead: Array
    """SI's best lookahead of all: SI itself needs one server."""
    free_si: Array
    free_si_error: Array


RATIOS: dict[str, tuple[str, Callable[[HeatMap], Array]]] = {
    "si_over_non_si": ("SI / non-SI", lambda m: m.non_si / m.si),
    "dsi_over_si": ("DSI / SI", lambda m: m.si / m.dsi),
    "dsi_over_best_other": (
        "DSI / the faster of SI and non-SI",
        lambda m: np.minimum(m.si, m.non_si) / m.dsi,
    ),
    "dsi_over_non_si": ("DSI / non-SI", lambda m: m.non_si / m.dsi),
    "dsi_over_free_si": ("DSI / SI with any lookahead", lambda m: m.free_si / m.dsi),
}
"""This maps a ratio's column and picture to its title and its values: how many times as fast."""
LOOKAHEADS = {"si_lookahead": "lookahead of SI", "dsi_lookahead": "lookahead of DSI"}


# ---- the grid ------------------------------------------------------------------------------------
def sweep(ndim: int, servers: int, tokens: int, repeats: int, seed: int) -> Sweep:
    """Simulate the grid; SI with every lookahead, DSI with those for which the servers suffice."""
    line = np.linspace(0, 1, ndim + 1)
    setting = Setting(
        np.maximum(line, LEAST)[:, None, None],
        np.clip(line, LEAST, MOST)[None, :, None],
        np.arange(1, ndim + 1),
        tokens=tokens,
    )
    rng = np.random.default_rng(seed)
    valid = np.broadcast_to(servers_needed(setting) <= servers, setting.shape)
    c, a, k = (array.reshape(setting.shape)[valid] for array in setting.flat)
    si = estimate(simulate_si(setting, repeats, rng))
    some = estimate(simulate_dsi(Setting(c, a, k, tokens=tokens), repeats, rng))
    dsi = Estimate(*(np.full(setting.shape, np.nan) for _ in some))
    for grid, values in zip(dsi, some, strict=True):
        grid[valid] = values
    return Sweep(setting, servers, repeats, seed, si, dsi)


def heat_map(done: Sweep) -> HeatMap:
    """Return each cell's best lookaheads and what was simulated for them."""
    setting = done.setting
    ks = [
        best_lookahead(setting, si_token, done.servers),
        best_lookahead(setting, dsi_token, done.servers),
        best_lookahead(setting, si_token, np.inf),
    ]
    si, dsi, free = (
        (np.where(k > 0, k, np.nan), *(_at(grid, k) for grid in costs))
        for k, costs in zip(ks, (done.si, done.dsi, done.si), strict=True)
    )
    about = (done.servers, setting.tokens, done.repeats, done.seed, alone(setting))
    constant = (np.full(ks[0].shape, float(x)) for x in about)
    axes = (array.reshape(setting.shape)[..., 0] for array in setting.flat[:2])
    return HeatMap(*axes, *constant, *si, *dsi, *free)


def _at(grid: Array, lookahead: Counts) -> Array:
    """Return the cells of one lookahead each; the last axis of the grid is lookaheads from 1."""
    index = np.maximum(lookahead - 1, 0).astype(int)[..., None]
    return np.where(lookahead > 0, np.take_along_axis(grid, index, axis=-1)[..., 0], np.nan)


# ---- CSV -----------------------------------------------------------------------------------------
def write_settings(done: Sweep, path: str | os.PathLike[str]) -> None:
    """Write a line a setting: mean cost and standard error of SI and, if it is valid, of DSI."""
    c, a, k = done.setting.flat
    columns = {
        "drafter_latency": c,
        "acceptance": a,
        "lookahead": k,
        "servers_needed": np.broadcast_to(servers_needed(done.setting), done.setting.shape).ravel(),
        "non_si": np.full(len(c), alone(done.setting)),
        **dict(zip(("si", "si_error"), map(np.ravel, done.si), strict=True)),
        **dict(zip(("dsi", "dsi_error"), map(np.ravel, done.dsi), strict=True)),
    }
    _write(columns, path)


def write(heat: HeatMap, path: str | os.PathLike[str]) -> None:
    """Write a line a cell: the grids and the ratios."""
    ratios = {name: values(heat) for name, (_, values) in RATIOS.items()}
    _write(heat._asdict() | ratios, path)


def _write(columns: dict[str, Array], path: str | os.PathLike[str]) -> None:
    """Write one line a cell of the columns; what is not a number is left empty."""
    lines = zip(*(values.ravel().tolist() for values in columns.values()), strict=True)
    with replacing(path) as beside, open(beside, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, "simulated"])
        writer.writerows([*map(_text, line), "true"] for line in lines)


def _text(value: float) -> str:
    return "" if np.isnan(value) else f"{int(value)}" if value == int(value) else repr(value)


def read(path: str | os.PathLike[str]) -> HeatMap:
    """Return what `write` wrote; raise UserError if it is something else."""
    try:
        with open(path, newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        told = error.strerror if isinstance(error, OSError) else "it is no CSV file"
        raise UserError(f"cannot read {path}: {told}") from None
    head, rows = (lines[0], lines[1:]) if lines else ([], [])
    lacking = [name for name in HeatMap._fields if name not in head]
    need(not lacking, f"{path} is no heat map: it has no column {', '.join(lacking)}")
    grids = [_column(path, rows, head.index(name)) for name in HeatMap._fields]
    c, a = np.unique(grids[0]), np.unique(grids[1])
    order = np.lexsort((grids[1], grids[0]))
    whole = len(rows) == len(c) * len(a) > 0 and (
        np.array_equal(grids[0][order], np.repeat(c, len(a)))
        and np.array_equal(grids[1][order], np.tile(a, len(c)))
    )
    need(whole, f"{path} is no heat map: it does not have one line a cell of a grid")
    return HeatMap(*(grid[order].reshape(len(c), len(a)) for grid in grids))


def _column(path: str | os.PathLike[str], rows: Iterable[Sequence[str]], at: int) -> Array:
    values = []
    for number, row in enumerate(rows, 2):
        try:
            values.append(float(row[at] or "nan"))
        except (IndexError, ValueError):
            raise UserError(f"{path}, line {number}: number {at + 1} is missing or none") from None
    return np.array(values)


# ---- pictures ------------------------------------------------------------------------------------
def draw(heat: HeatMap, folder: str | os.PathLike[str]) -> list[Path]:
    """Write a PNG for each ratio and for the lookaheads of SI and DSI; return their names.

    Raise UserError if matplotlib is missing."""
    need(can_draw(), MISSING)
    from matplotlib.colors import LogNorm

    about = (
        f"at most {heat.servers.flat[0]:.0f} target servers, texts of {heat.tokens.flat[0]:.0f} "
        f"tokens, means of {heat.repeats.flat[0]:.0f}; best lookaheads"
    )
    paths = []
    for name, (title, values_of) in RATIOS.items():
        values = values_of(heat)
        known = values[np.isfinite(values)]
        most = max(1.01, *known, *(1 / known))
        path = Path(folder) / f"{name}.png"
        colours = {"cmap": "PiYG", "norm": LogNorm(1 / most, most)}
        _picture(heat, values, path, (title, about, "times as fast"), colours)
        paths.append(path)
    for name, title in LOOKAHEADS.items():
        path = Path(folder) / f"{name}.png"
        _picture(heat, getattr(heat, name), path, (title, about, "drafts"), {"cmap": "viridis"})
        paths.append(path)
    return paths


def _picture(
    heat: HeatMap,
    values: Array,
    path: Path,
    words: tuple[str, str, str],
    colours: dict[str, object],
) -> None:
    """Write one map of 800 x 600 pixels; cells without a value are grey.

    `words` are the title, what stands below it, and what the colours mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    title, about, meaning = words
    figure = Figure(figsize=(8, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(facecolor="#d0d0d0")
    image = axes.imshow(values.T, origin="lower", aspect="auto", **colours)  # type: ignore[arg-type]
    bar = figure.colorbar(image, label=meaning)
    if isinstance(image.norm, LogNorm):
        ticks = (image.norm.vmax or 1) ** np.linspace(-1, 1, 9)
        bar.set_ticks(ticks.tolist(), labels=[f"{tick:.2g}" for tick in ticks])
        bar.minorticks_off()
    axes.set_title(f"{title} (simulated)", loc="left", fontweight="bold", pad=22)
    axes.text(0, 1.015, about, transform=axes.transAxes, fontsize=9.5)
    _name_axes(axes, heat)
    with replacing(path) as beside:
        figure.savefig(beside, format="png")


def _name_axes(axes: Axes, heat: HeatMap) -> None:
    for axis, values, name in (
        (axes.xaxis, heat.drafter_latency[:, 0], "drafter latency / target latency"),
        (axes.yaxis, heat.acceptance[0], "acceptance rate"),
    ):
        shown = range(0, len(values), max(1, len(values) // 10))
        axis.set_ticks(shown, [f"{values[i]:.2g}" for i in shown])
        axis.set_label_text(name)
