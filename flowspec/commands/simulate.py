"""`flowspec simulate CONFIG` predicts tokens/s and draws the picture of one run.

It does so for any number of stages, link and method."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flowspec import trace
from flowspec.bench import timeline
from flowspec.bench.forecast import (
    PAPER,
    SIMULATED,
    Forecaster,
    Models,
    check_simulable,
    is_taped,
    made_up,
    usual,
)
from flowspec.bench.simulate import Cell, load_costs, record, run
from flowspec.commands.options import (
    add_shared,
    benchmark_prompts,
    configuration,
    methods,
    numbers,
    split_demo,
    temperatures_of,
)
from flowspec.config import Config, load_config
from flowspec.core.costs import Costs
from flowspec.core.policies import check_method
from flowspec.core.topology import Topology
from flowspec.errors import need
from flowspec.files import replacing
from flowspec.output import Parser
from flowspec.preflight import check_writable
from flowspec.sim.world import Outcome

ABOUT = """The text and the drafts are the model pair's own, made by a real run without emulation
the first time and kept in --drafts FILE (with it, later simulations need no model); or made up with
--synthetic. Every figure printed here is simulated. `flowspec simulate dsi` is about speculative
inference (SI) against distributed SI (DSI), without a model or a ring: see its --help."""


def _parser() -> Parser:
    parser = Parser(prog="flowspec simulate", description=ABOUT)
    add_shared(parser)
    parser.add_argument(
        "--prompts", default="4", metavar="N", help="use the first N prompts (default 4)"
    )
    parser.add_argument(
        "--stages",
        metavar="N,N",
        help="numbers of stages to simulate (default: as the model is split)",
    )
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="T",
        help="ranks of each stage (default: as the model is split)",
    )
    parser.add_argument("--temperatures", metavar="X,X", help="temperatures to simulate")
    parser.add_argument(
        "--methods",
        metavar="M,M",
        help=f"methods: {' '.join(SIMULATED)} ({PAPER}: lock step as published)",
    )
    parser.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=A,B",
        help="values of a key, such as emulate.link_mbps=125,1000",
    )
    parser.add_argument(
        "--costs",
        metavar="FILE",
        help="measured costs instead of emulate: what run --json or bench compare wrote",
    )
    parser.add_argument(
        "--drafts",
        metavar="FILE",
        help="recorded drafts: made if absent, completed where it lacks some",
    )
    parser.add_argument("--offline", action="store_true", help="use --drafts alone: load no model")
    parser.add_argument(
        "--synthetic",
        metavar="P,P",
        help="no models: the target's token is the draft's k-th choice with this probability",
    )
    parser.add_argument("--json", metavar="FILE", help="write a line a cell, method and prompt")
    parser.add_argument("--png", metavar="FILE", help="draw the last run of the last cell")
    parser.add_argument(
        "--trace", dest="trace_file", metavar="FILE", help="keep it as a Chrome trace"
    )
    return parser


def main(argv: Sequence[str]) -> int:
    if list(argv[:1]) == ["dsi"]:
        from flowspec.commands import simulate_dsi

        return simulate_dsi.main(argv[1:])
    options = _parser().parse_intermixed_args(argv)
    path, config = configuration(options)
    split_demo(config)
    for name in ("json", "png", "trace_file"):
        check_writable(getattr(options, name), "--" + name.replace("_file", ""))
    temperatures = temperatures_of(options, config)
    if config.sampling.seed is None:
        config = dataclasses.replace(config, sampling=dataclasses.replace(config.sampling, seed=1))
    costs = load_costs(Path(options.costs)) if options.costs else None
    cells = list(_cells(options, path, config, temperatures))
    for cell in cells:
        _check(cell, config, options.costs, costs)
    forecaster = _forecaster(options, config, temperatures)
    chosen = (
        methods(options.methods, SIMULATED)
        if options.methods
        else [config.method]
        if len(cells) == 1
        else usual(cells[0].topology)
    )
    for method in chosen:
        check_method(method, cells[0].topology.members)
    results = run(forecaster, cells, chosen, costs)
    if options.drafts:
        forecaster.save(Path(options.drafts))
        if not (options.synthetic or is_taped(config)):
            about = (
                f"{config.drafter_kinds} is asked live, in each run; {options.drafts} holds "
                "the target's texts alone"
            )
            print(f"note: {about}", file=sys.stderr)
    _show(options, cells, chosen, results)
    if forecaster.lacked:
        print(
            f"note: {forecaster.lacked} drafts are not in {options.drafts} and were left out; "
            "run it where the models are",
            file=sys.stderr,
        )
    return 0


# ---- what is simulated ---------------------------------------------------------------------------
def _cells(
    options: argparse.Namespace, path: Path, config: Config, temperatures: list[float]
) -> Iterator[Cell]:
    stages = (
        numbers(options.stages, int, "--stages")
        if options.stages
        else [_split_stages(config, options)]
    )
    for n in stages:
        need(n >= 1, f"--stages: {n} is no number of stages")
    members = _members(config, options)
    choices = [_choices(text) for text in options.vary]
    overrides = [word for word in options.words if "=" in word]
    for varied in itertools.product(*choices):
        base = load_config(path, [*overrides, *varied]) if varied else config
        for count, temperature in itertools.product(stages, temperatures):
            yield Cell(Topology(count, members, base.dsi.servers), temperature, varied, base)


def _members(config: Config, options: argparse.Namespace) -> int:
    """Return of how many ranks a stage is simulated."""
    from flowspec.models.manifest import Manifest

    if options.tensor_parallel is not None:
        need(
            options.tensor_parallel >= 1,
            f"--tensor-parallel: {options.tensor_parallel} is no number of ranks",
        )
        return options.tensor_parallel
    if options.synthetic or not config.stages_path.exists():
        return 1
    return Manifest.load(config.stages_path).topology.members


def _split_stages(config: Config, options: argparse.Namespace) -> int:
    from flowspec.models.manifest import Manifest

    need(
        config.stages_path.exists() or not options.synthetic,
        "--synthetic without a split model: say how many --stages",
    )
    return Manifest.load(config.stages_path).topology.stages


def _choices(text: str) -> list[str]:
    key, sign, values = text.partition("=")
    need(
        bool(sign and key and values),
        f"--vary {text!r}: it is written KEY=A,B, such as emulate.link_mbps=125,1000",
    )
    return [f"{key}={value}" for value in values.split(",")]


def _check(cell: Cell, config: Config, path: str | None, costs: dict[str, Costs] | None) -> None:
    emulate, ring = cell.config.emulate, cell.topology
    stages = map(ring.stage, ring.stage_ranks)
    need(
        cell.config.drafter == config.drafter,
        "--vary: one drafter a simulation; run another one for another",
    )
    same = cell.config.policy.coupled == config.policy.coupled or not is_taped(config)
    need(
        same,
        "--vary: drafts are remembered with the target's noise or without; run another "
        "simulation for policy.coupled",
    )
    need(
        costs is not None or all(emulate.stage_seconds(stage, 1) > 0 for stage in stages),
        "simulate needs the devices' times: give emulate.stage_ms, as configs/devices/ do, above "
        "0 for each stage, or --costs FILE",
    )
    for found in costs.values() if costs else ():
        need(
            cell.topology.stages == len(found.stages),
            f"{path} was measured over {len(found.stages)} stages, not {cell.topology.stages}",
        )


def _forecaster(
    options: argparse.Namespace, config: Config, temperatures: list[float]
) -> Forecaster:
    if options.synthetic:
        return made_up(
            config,
            numbers(options.synthetic, float, "--synthetic"),
            int(numbers(options.prompts, int, "--prompts")[0]),
        )
    check_simulable(config)
    need(
        not options.offline or is_taped(config),
        f"--offline: {config.drafter_kinds} is asked live, so its drafts are in no file",
    )
    forecaster = Forecaster(config, Models.of(config))
    forecaster.offline = options.offline
    if options.drafts and os.path.exists(options.drafts):
        forecaster.load(Path(options.drafts))
    need(
        not options.offline or bool(forecaster.tapes),
        "--offline needs --drafts FILE, an existing file",
    )
    if not options.offline:
        wanted = [dataclasses.replace(config.sampling, temperature=t) for t in temperatures]
        record(forecaster, config, benchmark_prompts(options), wanted)
    return forecaster


# ---- what is shown -------------------------------------------------------------------------------
def _show(
    options: argparse.Namespace,
    cells: list[Cell],
    chosen: list[str],
    results: dict[tuple[int, str], list[Outcome]],
) -> None:
    from rich.table import Table

    from flowspec.bench.report import console

    table = Table(title="simulated tokens/s (median of prompts, min .. max)")
    for name in ("S", "T", *(c.partition("=")[0] for c in cells[0].varied)):
        table.add_column(name, justify="right")
    for method in chosen:
        table.add_column(method, justify="right")
    for k, cell in enumerate(cells):
        about = [
            str(cell.topology.stages),
            f"{cell.temperature:g}",
            *(v.partition("=")[2] for v in cell.varied),
        ]
        table.add_row(*about, *(_rates(results[k, method]) for method in chosen))
    console().print(table)
    if options.json:
        _write(options.json, cells, results)
    outcome = results[len(cells) - 1, chosen[-1]][-1]
    facts = {"method": chosen[-1], "stages": cells[-1].topology.stages, "simulated": True}
    if len(results) == 1 or options.png or options.trace_file:
        print("\n".join(timeline.sketch(outcome.spans, each=cells[-1].topology.stages)))
        print(timeline.in_words(outcome.spans, facts))
    if options.trace_file:
        trace.write(options.trace_file, outcome.spans, facts)
    if options.png:
        timeline.draw(outcome.spans, options.png, facts)


def _rates(outcomes: list[Outcome]) -> str:
    rates = [o.tokens_per_second for o in outcomes if o.tokens_per_second is not None]
    return f"{statistics.median(rates):.1f} ({min(rates):.0f}..{max(rates):.0f})" if rates else "-"


def _write(path: str, cells: list[Cell], results: dict[tuple[int, str], list[Outcome]]) -> None:
    with replacing(path) as beside, open(beside, "w") as file:
        for (k, method), outcomes in results.items():
            about = {
                "stages": cells[k].topology.stages,
                "temperature": cells[k].temperature,
                "varied": list(cells[k].varied),
                "method": method,
            }
            for prompt, o in enumerate(outcomes, 1):
                figures = {
                    "prompt": prompt,
                    "tokens_per_second": o.tokens_per_second,
                    "new_tokens": len(o.tokens),
                    "simulated": True,
                }
                file.write(json.dumps(about | figures) + "\n")
