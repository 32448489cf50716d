"""`flowspec simulate dsi` simulates SI and DSI, in time units or by waiting; `simulate dsi heatmap`
maps them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from flowspec.bench import heatmap
from flowspec.bench.timeline import MISSING, can_draw
from flowspec.commands.options import number
from flowspec.errors import UserError, need
from flowspec.estimates import RULES, load_estimates, the_acceptance, the_latency
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
one. With --online, forwards are waits of so many milliseconds, and scheduling, messages and the
processes of the target servers are real. `simulate dsi heatmap` counts over a grid (see its
--help)."""
ABOUT_MAP = """The paper's grid of drafter latencies and acceptance rates, in target latencies, with
each method's best lookahead for which the servers suffice. It writes DIR/settings.csv (a line a
setting), DIR/heatmap.csv (a line a cell) and a PNG a map. Every figure is simulated."""
LONGEST_LOOKAHEAD = 1000
"""With --lookahead auto, longer ones are not tried."""
DEFAULTS = {"target_latency": 1.0, "drafter_latency": 0.1, "acceptance": 0.9}
SHARED = {"servers": 7, "tokens": 1000, "seed": 1}
REPEATS, ONLINE_REPEATS, MAP_REPEATS = 100, 5, 5
BESIDE = 1000
"""Beside what was waited for stands the mean of so many texts that were counted."""
POLICIES = {"non-SI": "ar", "SI": "si", "DSI": "dsi"}
"""This maps a method of the table to the policy that writes with it."""
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
    for flag, what in (
        ("target-latency", "of a target forward"),
        ("drafter-latency", "of a drafter forward"),
        ("acceptance", "the probability that a draft is accepted"),
    ):
        told = f"{what} (default {DEFAULTS[flag.replace('-', '_')]:g}, without --estimates)"
        parser.add_argument(f"--{flag}", type=float, metavar="X", help=told)
    for flag in ("target", "drafter"):
        told = f"of a text's first {flag} forward, which reads the prompt (default: as later ones)"
        parser.add_argument(f"--first-{flag}-latency", type=float, metavar="X", help=told)
    parser.add_argument(
        "--lookahead",
        default="auto",
        metavar="K[,K]",
        help="drafts that are verified together, or SI's and DSI's; auto (default): the best one",
    )
    parser.add_argument(
        "--estimates",
        nargs="+",
        default=[],
        metavar="FILE",
        help="take what no flag gives from files of `flowspec estimate --json`",
    )
    parser.add_argument("--rule", choices=RULES, help="of the estimated acceptance")
    parser.add_argument(
        "--temperature", type=float, metavar="X", help="of the estimated acceptance; 0 is greedy"
    )
    parser.add_argument(
        "--online", action="store_true", help="wait for the latencies, in milliseconds"
    )
    _add_shared(parser, f"{REPEATS}, with --online {ONLINE_REPEATS}")
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
    _add_shared(parser, str(MAP_REPEATS))
    return parser


def _add_shared(parser: argparse.ArgumentParser, repeats: str) -> None:
    for flag, default, what in (
        ("servers", SHARED["servers"], "DSI has at most so many target servers"),
        ("tokens", SHARED["tokens"], "the length of a text"),
        ("repeats", repeats, "texts a setting"),
        ("seed", SHARED["seed"], "of the chance"),
    ):
        told = f"{what} (default {default})"
        parser.add_argument(f"--{flag}", type=int, metavar="N", help=told)


def main(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["heatmap"]:
        return _map(_map_parser().parse_args(argv[1:]))
    options = _parser().parse_args(argv)
    taken = _take(options)
    check_writable(options.json)
    _check_shared(options, ONLINE_REPEATS if options.online else REPEATS, texts=1)
    try:
        setting = _setting(options)
        lookaheads = _lookaheads(options, setting)
    except UserError as error:
        raise UserError("; ".join([str(error), *taken])) from None
    for line in taken:
        print(line)
    rows = _rows(options, setting, lookaheads)
    _show(options, rows)
    lines = _online(options, setting, rows) if options.online else [row._asdict() for row in rows]
    if options.json:
        _write(options, lines)
    return 0


# ---- what is asked for ---------------------------------------------------------------------------
def _take(options: argparse.Namespace) -> list[str]:
    """Fill in what no flag gives, from --estimates or else by default; return what is from where.

    The latencies of a model, the first and the later ones, are from one source."""
    need(
        bool(options.estimates and options.acceptance is None)
        or (options.rule is None and options.temperature is None),
        "--rule and --temperature say which acceptance to take from --estimates",
    )
    if not options.estimates:
        _fill(options, DEFAULTS)
        return []
    files, taken = [(path, load_estimates(path)) for path in options.estimates], []
    if options.acceptance is None:
        path, one = the_acceptance(files, options.rule, options.temperature)
        options.acceptance = one.acceptance
        about = f"{one.rule} {one.temperature:g}, {one.draft} for {one.target}"
        taken.append(f"from {path}: acceptance {one.acceptance:.4g} ({about})")
    for flag, model in (("target", "target"), ("drafter", "draft")):
        if getattr(options, f"{flag}_latency") is None:
            path, latency = the_latency(files)
            later, first = getattr(latency, f"{model}_ms"), getattr(latency, f"{model}_first_ms")
            _fill(options, {f"{flag}_latency": later, f"first_{flag}_latency": first})
            ms = f"{getattr(options, f'first_{flag}_latency'):.4g} ms, then {later:.4g} ms"
            taken.append(f"from {path}: {flag} latency {ms} ({getattr(latency, model)})")
    need(bool(taken), "--estimates: flags give the acceptance and both latencies")
    return taken


def _fill(options: argparse.Namespace, values: Mapping[str, float]) -> None:
    """Set those options that were not given."""
    for name, value in values.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def _check_shared(options: argparse.Namespace, repeats: int, texts: int) -> None:
    """Fill in the numbers that were not given; raise UserError for one that cannot be simulated.

    `texts` are those of one repeat."""
    _fill(options, SHARED | {"repeats": repeats})
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
def _rows(
    options: argparse.Namespace, candidates: Setting, lookaheads: tuple[int, int]
) -> list[Row]:
    rng = np.random.default_rng(options.seed)
    rows = [Row("non-SI", None, 1, alone(candidates), 0.0)]
    k_si, k_dsi = lookaheads
    for name, k, simulate in (("SI", k_si, simulate_si), ("DSI", k_dsi, simulate_dsi)):
        setting = dataclasses.replace(candidates, lookahead=k)
        mean, error = estimate(simulate(setting, _texts(options), rng))
        servers = int(servers_needed(setting)) if name == "DSI" else 1
        rows.append(Row(name, k, servers, float(mean), float(error)))
    return rows


def _texts(options: argparse.Namespace) -> int:
    """Return how many texts are counted."""
    return BESIDE if options.online else options.repeats


def _ratios(cost: float, alone: float, si: float) -> dict[str, float]:
    """Return how many times as fast a method is as the others."""
    others = {"non-SI": alone, "SI": si, "the faster of both": min(alone, si)}
    return {name: other / cost for name, other in others.items()}


def _show(options: argparse.Namespace, rows: list[Row]) -> None:
    about = f"{options.tokens} tokens, mean of {_texts(options)} texts, seed {options.seed}"
    shown = []
    for row in rows:
        ratios = _ratios(row.mean, rows[0].mean, rows[1].mean)
        error = "-" if math.isnan(row.error) else f"{row.error:.2g}"
        costs = {"time": f"{row.mean:.6g}", "standard error": error}
        over = {f"/ {name}": f"{ratio:.2f}x" for name, ratio in ratios.items()}
        shown.append(_named(row.method, row.lookahead, row.servers) | costs | over)
    _print(f"simulated: time of a text of {about}", shown)


def _named(method: str, lookahead: int | None, servers: int) -> dict[str, str]:
    k = "-" if lookahead is None else str(lookahead)
    return {"method": method, "lookahead": k, "servers": str(servers)}


def _print(title: str, rows: list[dict[str, str]]) -> None:
    """Print a table whose columns are the keys."""
    from rich.table import Table

    from flowspec.bench.report import console

    table = Table(title=title)
    for head in rows[0]:
        table.add_column(head, justify="left" if head == "method" else "right")
    for row in rows:
        table.add_row(*row.values())
    console().print(table)


def _write(options: argparse.Namespace, lines: list[dict]) -> None:
    asked = {k: v for k, v in vars(options).items() if k != "json"}
    with replacing(options.json) as beside, open(beside, "w") as file:
        for line in lines:
            figures = {k: None if v != v else v for k, v in line.items()}  # no error: not a number
            file.write(json.dumps(figures | {"asked": asked, "simulated": True}) + "\n")


# ---- by waiting ----------------------------------------------------------------------------------
def _online(options: argparse.Namespace, setting: Setting, rows: list[Row]) -> list[dict]:
    """Write the texts while forwards are waits; show and return what came of each method."""
    from flowspec.bench.online import Chance, Latencies, Way, measure

    ways = {
        row.method: Way(POLICIES[row.method], row.lookahead, servers)
        for row, servers in zip(rows, (1, 1, options.servers), strict=True)
    }
    about = sum(row.mean for row in rows) * options.repeats / 1000
    print(f"waiting for about {about:.0f} s", file=sys.stderr)
    milliseconds = (
        setting.target + setting.late_target,
        setting.target,
        float(setting.drafter + setting.late_drafter),
        float(setting.drafter),
    )
    done = measure(
        ways,
        Chance(options.tokens, options.acceptance),
        Latencies(*(ms / 1000 for ms in milliseconds)),
        options.repeats,
        options.seed,
    )
    times = {name: [1000 * one.seconds for one in written] for name, written in done.items()}
    lines = [
        {
            "method": row.method,
            "lookahead": row.lookahead,
            "servers": ways[row.method].servers,
            "times": times[row.method],
            "ratios": [
                _ratios(*paired)
                for paired in zip(times[row.method], times["non-SI"], times["SI"], strict=True)
            ],
            "forwards": [one.forwards for one in done[row.method]],
            "abandoned": [one.abandoned for one in done[row.method]],
            "drafts": [one.drafts for one in done[row.method]],
            "offline": row.mean,
        }
        for row in rows
    ]
    _show_online(options, lines)
    return lines


def _show_online(options: argparse.Namespace, lines: list[dict]) -> None:
    from flowspec.bench.report import ranged, spread

    shown = []
    for line in lines:
        off = statistics.median(line["times"]) / line["offline"] - 1
        costs = {"ms": ranged(spread(line["times"]), ".1f"), "off": f"{off:+.1%}"}
        over = {
            f"/ {name}": ranged(spread(ratios[name] for ratios in line["ratios"]), ".2f", "x")
            for name in line["ratios"][0]
        }
        shown.append(_named(line["method"], line["lookahead"], line["servers"]) | costs | over)
    about = f"{options.tokens} tokens, median (least..most) of {options.repeats} texts"
    _print(
        f"simulated by waiting, no model: a text of {about}, seed {options.seed}; off: from the "
        "time above",
        shown,
    )


# ---- heat maps -----------------------------------------------------------------------------------
def _map(options: argparse.Namespace) -> int:
    folder = Path(options.out)
    if options.draw:
        given = [f"--{name}" for name in (*SHARED, "repeats") if getattr(options, name) is not None]
        need(not given, f"--draw: nothing is simulated, so {', '.join(given)} would mean nothing")
        need(can_draw(), MISSING)
        heat = heatmap.read(options.draw)
        _make(folder)
    else:
        ndim = options.ndim
        need(1 <= ndim <= MOST_NDIM, f"--ndim is {ndim}: it must be 1 to {MOST_NDIM}")
        _check_shared(options, MAP_REPEATS, texts=ndim * (ndim + 1) ** 2)
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
