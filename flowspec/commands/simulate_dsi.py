"""`flowspec simulate dsi` simulates SI and DSI in time units; `simulate dsi heatmap` maps them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowspec.bench import heatmap
from flowspec.bench.timeline import MISSING, can_draw
from flowspec.commands.options import number
from flowspec.errors import UserError, need
from flowspec.files import replacing
from flowspec.output import Parser
from flowspec.preflight import check_writable
from flowspec.sim.dsi import (
    Array,
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

ABOUT = """Speculative inference (SI) and distributed SI (DSI, arXiv 2405.14105) against decoding
alone (non-SI): how long a text takes if drafts are accepted independently. Nothing is computed and
no message has a cost; every figure printed here is simulated. Latencies have any unit, the same
one. `simulate dsi heatmap` does so over a grid (see its --help)."""
ABOUT_MAP = """The paper's grid of drafter latencies and acceptance rates, in target latencies, with
each method's best lookahead for which the servers suffice. It writes DIR/settings.csv (a line a
setting), DIR/heatmap.csv (a line a cell) and a PNG a map. Every figure is simulated."""
LONGEST_LOOKAHEAD = 1000
"""With --lookahead auto, longer ones are not tried."""
MOST_TOKENS, MOST_TEXTS, MOST_NDIM = 100_000, 5_000_000, 100
"""More would take minutes, or gigabytes."""


class Row(NamedTuple):
    """This is a method of the table."""

    method: str
    lookahead: int | None
    servers: int
    """The number of target servers that it needs."""
    mean: float
    error: float


def _parser() -> Parser:
    parser = Parser(prog="flowspec simulate dsi", description=ABOUT)
    for flag, default, what in (
        ("target-latency", 1.0, "of a target forward"),
        ("drafter-latency", 0.1, "of a drafter forward"),
        ("acceptance", 0.9, "the probability that a draft is accepted"),
    ):
        told = f"{what} (default {default:g})"
        parser.add_argument(f"--{flag}", type=float, default=default, metavar="X", help=told)
    for flag in ("target", "drafter"):
        told = f"of a text's first {flag} forward, which reads the prompt (default: as later ones)"
        parser.add_argument(f"--first-{flag}-latency", type=float, metavar="X", help=told)
    parser.add_argument(
        "--lookahead",
        default="auto",
        metavar="K[,K]",
        help="drafts that are verified together, or SI's and DSI's; auto (default): the best one",
    )
    _add_shared(parser, repeats=100)
    parser.add_argument("--json", metavar="FILE", help="write a line a method")
    return parser


def _map_parser() -> Parser:
    parser = Parser(prog="flowspec simulate dsi heatmap", description=ABOUT_MAP)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--ndim", type=int, metavar="N", help="simulate (N + 1) x (N + 1) cells, lookaheads to N"
    )
    source.add_argument("--draw", metavar="FILE", help="draw this heatmap.csv again instead")
    parser.add_argument("--out", required=True, metavar="DIR", help="the folder to write to")
    _add_shared(parser, repeats=5)
    return parser


def _add_shared(parser: argparse.ArgumentParser, repeats: int) -> None:
    for flag, default, what in (
        ("servers", 7, "DSI has at most so many target servers"),
        ("tokens", 1000, "the length of a text"),
        ("repeats", repeats, "texts a setting"),
        ("seed", 1, "of the chance"),
    ):
        told = f"{what} (default {default})"
        parser.add_argument(f"--{flag}", type=int, default=default, metavar="N", help=told)


def main(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["heatmap"]:
        return _map(_map_parser().parse_args(argv[1:]))
    options = _parser().parse_args(argv)
    check_writable(options.json)
    _check_shared(options, texts=1)
    setting = _setting(options)
    rows = _rows(options, setting)
    _show(options, rows)
    if options.json:
        _write(options, rows)
    return 0


# ---- what is asked for ---------------------------------------------------------------------------
def _check_shared(options: argparse.Namespace, texts: int) -> None:
    """Raise UserError for a number that cannot be simulated; `texts` are those of one repeat."""
    for name in ("servers", "tokens", "repeats"):
        value = getattr(options, name)
        need(value >= 1, f"--{name} is {value}: it must be at least 1")
    need(options.seed >= 0, f"--seed is {options.seed}: it must be at least 0")
    need(options.tokens <= MOST_TOKENS, f"--tokens is {options.tokens}: at most {MOST_TOKENS} fit")
    most = MOST_TEXTS // texts
    need(options.repeats <= most, f"--repeats is {options.repeats}: at most {most} fit here")


def _setting(options: argparse.Namespace) -> Setting:
    target, drafter = options.target_latency, options.drafter_latency
    need(0 < target < math.inf, f"--target-latency is {target:g}: it must be a number above 0")
    need(
        0 < drafter <= target,
        f"--drafter-latency is {drafter:g}: it must be above 0 and at most the target's {target:g}",
    )
    need(
        0 <= options.acceptance <= 1,
        f"--acceptance is {options.acceptance:g}: it must be a probability, 0 to 1",
    )
    for flag, later in (("target", target), ("drafter", drafter)):
        first = getattr(options, f"first_{flag}_latency")
        need(
            first is None or later <= first < math.inf,
            f"--first-{flag}-latency is {first}: it must be at least that of later ones, {later:g}",
        )
    return Setting(
        drafter,
        options.acceptance,
        np.arange(1, LONGEST_LOOKAHEAD + 1),
        target,
        options.tokens,
        options.first_drafter_latency,
        options.first_target_latency,
    )


def _lookaheads(options: argparse.Namespace, candidates: Setting) -> tuple[int, int]:
    """Return the lookaheads of SI and of DSI; the servers limit that of DSI alone."""
    asked = options.lookahead.split(",")
    need(len(asked) <= 2, f"--lookahead is {options.lookahead!r}: it is one, or SI's and DSI's")
    si = _lookahead(asked[0], candidates, si_token, math.inf)
    dsi = _lookahead(asked[-1], candidates, dsi_token, options.servers)
    about = (
        f"--servers: {options.servers} target servers do not suffice for drafts of "
        f"{options.drafter_latency:g}"
    )
    need(dsi > 0, f"{about} with any lookahead up to {LONGEST_LOOKAHEAD}")
    needed = servers_needed(dataclasses.replace(candidates, lookahead=dsi))
    need(
        bool(needed <= options.servers), f"{about} and a lookahead of {dsi}: it takes {needed:.0f}"
    )
    return si, dsi


def _lookahead(
    asked: str, candidates: Setting, token: Callable[[Setting], Array], servers: float
) -> int:
    """Return the number that is asked for, or else the best of the candidates, 0 if there is
    none."""
    if asked == "auto":
        return int(best_lookahead(candidates, token, servers))
    k = int(number(asked, int, "--lookahead"))
    need(k >= 1, f"--lookahead is {k}: it must be at least 1")
    return k


# ---- what is simulated and shown -----------------------------------------------------------------
def _rows(options: argparse.Namespace, candidates: Setting) -> list[Row]:
    rng = np.random.default_rng(options.seed)
    rows = [Row("non-SI", None, 1, alone(candidates), 0.0)]
    k_si, k_dsi = _lookaheads(options, candidates)
    for name, k, simulate in (("SI", k_si, simulate_si), ("DSI", k_dsi, simulate_dsi)):
        setting = dataclasses.replace(candidates, lookahead=k)
        mean, error = estimate(simulate(setting, options.repeats, rng))
        servers = int(servers_needed(setting)) if name == "DSI" else 1
        rows.append(Row(name, k, servers, float(mean), float(error)))
    return rows


def _ratios(row: Row, rows: list[Row]) -> dict[str, float]:
    """Return how many times as fast a method is as the others."""
    alone, si, _ = (other.mean for other in rows)
    others = {"non-SI": alone, "SI": si, "the faster of both": min(alone, si)}
    return {name: cost / row.mean for name, cost in others.items()}


def _show(options: argparse.Namespace, rows: list[Row]) -> None:
    from rich.table import Table

    from flowspec.bench.report import console

    about = f"{options.tokens} tokens, mean of {options.repeats} texts, seed {options.seed}"
    table = Table(title=f"simulated: time of a text of {about}")
    heads = ["method", "lookahead", "servers", "time", "standard error"]
    for head in (*heads, *(f"/ {name}" for name in _ratios(rows[0], rows))):
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        ratios = (f"{ratio:.2f}x" for ratio in _ratios(row, rows).values())
        k = "-" if row.lookahead is None else str(row.lookahead)
        error = "-" if math.isnan(row.error) else f"{row.error:.2g}"
        table.add_row(row.method, k, str(row.servers), f"{row.mean:.6g}", error, *ratios)
    console().print(table)


def _write(options: argparse.Namespace, rows: list[Row]) -> None:
    asked = {k: v for k, v in vars(options).items() if k != "json"}
    with replacing(options.json) as beside, open(beside, "w") as file:
        for row in rows:
            figures = row._asdict() | {"error": None if math.isnan(row.error) else row.error}
            file.write(json.dumps(figures | {"asked": asked, "simulated": True}) + "\n")


# ---- heat maps -----------------------------------------------------------------------------------
def _map(options: argparse.Namespace) -> int:
    folder = Path(options.out)
    if options.draw:
        need(can_draw(), MISSING)
        heat = heatmap.read(options.draw)
        _make(folder)
    else:
        ndim = options.ndim
        need(1 <= ndim <= MOST_NDIM, f"--ndim is {ndim}: it must be 1 to {MOST_NDIM}")
        _check_shared(options, texts=ndim * (ndim + 1) ** 2)
        _make(folder)
        heat = _simulate_map(options, folder)
    if not can_draw():
        print(f"no pictures: {MISSING}", file=sys.stderr)
        return 0
    for path in heatmap.draw(heat, folder):
        print(f"drawn: {path}", file=sys.stderr)
    return 0


def _make(folder: Path) -> None:
    """Make the folder unless it exists; raise UserError if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make {folder}: {error.strerror}") from None
    check_writable(str(folder / "heatmap.csv"), "--out")


def _simulate_map(options: argparse.Namespace, folder: Path) -> heatmap.HeatMap:
    done = heatmap.sweep(
        options.ndim, options.servers, options.tokens, options.repeats, options.seed
    )
    heatmap.write_settings(done, folder / "settings.csv")
    heat = heatmap.heat_map(done)
    heatmap.write(heat, folder / "heatmap.csv")
    print(
        f"simulated: {done.valid.sum()} valid settings, {options.repeats} texts each; "
        f"{folder / 'settings.csv'} and {folder / 'heatmap.csv'}"
    )
    for title, values_of in heatmap.RATIOS.values():
        values = values_of(heat)
        known = values[np.isfinite(values)]
        if known.size:
            print(f"  {title}: {known.min():.2f}x .. {known.max():.2f}x as fast")
    return heat
