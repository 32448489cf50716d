"""`flowspec eval sweep`: `flowspec eval` for each value of one setting, and the simulator beside.

A value's folder is a run of its own, which is gone on with like any other."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowspec.commands.eval import EVAL, TURNS, plan_of, questions_of
from flowspec.commands.options import configuration, demo_stages, numbers, overrides_of, split_demo
from flowspec.config import Config, load_config
from flowspec.core.topology import Topology
from flowspec.errors import need
from flowspec.files import BUILD
from flowspec.models.manifest import Manifest

ABOUT = """eval sweep CONFIG --over WHAT --out DIR: a run of flowspec eval for each value, measured
where this machine can run it, and simulated where devices are emulated; both are marked."""
USUAL = {
    "bandwidth": "125,250,500,1000",
    "stages": "1,2,3,4,5,6,7,8",
    "prompt": "64,128,256,512",
    "budget": "8,16,32,64,128",
}
"""This maps what can be swept over to its usual values; `prompt` also has the longest possible."""
CROWD = 4
"""So many emulated ranks a core can wait for their times; where times are real, one can."""


def main(words: Sequence[str]) -> int:
    parser = EVAL.parser("eval sweep", ABOUT)
    parser.add_argument("--over", choices=USUAL, required=True, help="the setting that is varied")
    parser.add_argument("--values", metavar="N,N", help="(default: the usual ones of the paper)")
    parser.set_defaults(datasets="mt_bench", questions="3", methods=TURNS)
    options = parser.parse_intermixed_args(words)
    need(options.out is not None, "eval sweep writes a folder: say which by --out DIR")
    need(options.prompt_tokens is None, "--prompt-tokens: a sweep --over prompt sets it")
    path, config = configuration(options)
    split_demo(config)
    manifest = Manifest.load(config.stages_path)
    _check(options, config)
    runs = [_Run(options, path, config, manifest, n) for n in _values(options, config, manifest)]
    need(any(run.runs_here for run in runs), "this machine can run none of --values")
    for run in runs:
        if run.runs_here and (code := EVAL.main(run.words)):
            return code
    return _report(options, words, config, runs)


def _check(options: argparse.Namespace, config: Config) -> None:
    questions_of(options)
    emulate = config.emulate
    need(
        options.over != "bandwidth" or emulate.active,
        "--over bandwidth is of emulated links: give emulate.*, as configs/devices/ do",
    )
    listed = any(isinstance(each, tuple) for each in (emulate.stage_ms, emulate.token_ms))
    need(
        options.over != "stages" or not listed,
        "--over stages shares the time of all stages evenly: emulate.stage_ms and token_ms must "
        "be one number",
    )


def _values(options: argparse.Namespace, config: Config, manifest: Manifest) -> list[int]:
    longest = manifest.max_positions - config.sampling.max_new_tokens
    if options.values is None:
        found = numbers(USUAL[options.over], int, "--values")
        if options.over == "prompt":
            found = [*(n for n in found if n < longest), longest]
        return found
    found = numbers(options.values, int, "--values")
    need(min(found) >= 1 and len(set(found)) == len(found), "--values: different numbers from 1")
    return found


class _Run:
    """A value's run: how it is asked for, and whether this machine can."""

    def __init__(
        self,
        options: argparse.Namespace,
        path: Path,
        config: Config,
        manifest: Manifest,
        value: int,
    ):
        self.value, self.folder = value, Path(options.out) / f"{options.over}_{value}"
        overrides = overrides_of(options, path)
        self.topology = manifest.topology
        self.runs_here = True
        extra = list[str]()
        if options.over == "bandwidth":
            overrides += [f"emulate.link_mbps={value}"]
        elif options.over == "budget":
            overrides += [f"tree.budget={value}"]
        elif options.over == "prompt":
            extra = ["--prompt-tokens", str(value)]
        else:
            self.topology = Topology(value, self.topology.members, self.topology.servers)
            self.runs_here = _can_split(config, manifest, value)
            overrides += _shared(config, manifest.topology.stages, value)
            overrides += [f"stages={BUILD / f'demo_s{value}'}"] if demo_stages(config) else []
        self.config = load_config(path, overrides)
        self.words = [str(path), *overrides, *_given(options), *extra, "--out", str(self.folder)]
        self.options = EVAL.parser("eval", "").parse_intermixed_args(self.words)


def _given(options: argparse.Namespace) -> list[str]:
    """Return the words of `flowspec eval` that all values have in common."""
    names = ("datasets", "questions", "data", "methods", "temperatures")
    given = {name: getattr(options, name) for name in names}
    return [word for name, value in given.items() if value for word in (f"--{name}", value)]


def _can_split(config: Config, manifest: Manifest, stages: int) -> bool:
    """Return whether this machine has, or can make, a split of so many stages, and run it."""
    if stages == manifest.topology.stages:
        return True
    ranks = (os.cpu_count() or 1) * (CROWD if config.emulate.active else 1)
    return bool(demo_stages(config)) and stages <= manifest.num_layers and stages < ranks


def _shared(config: Config, before: int, stages: int) -> list[str]:
    """Return overrides by which so many stages take together what they took before."""
    emulate = config.emulate
    times = {"stage_ms": emulate.stage_ms, "token_ms": emulate.token_ms}
    return [
        f"emulate.{name}={time * before / stages:g}"
        for name, time in times.items()
        if isinstance(time, float) and time
    ]


def _report(
    options: argparse.Namespace, words: Sequence[str], config: Config, runs: Sequence[_Run]
) -> int:
    from flowspec.bench.answers import read_runs
    from flowspec.bench.standing import table
    from flowspec.bench.sweep import Value, markdown, points, simulate, write
    from flowspec.lossless import first_difference

    values = []
    for run in runs:
        held: list[Any] = read_runs([run.folder]) if run.runs_here else []
        rows = [row for each in held for row in table(each, first_difference)]
        answers = [answer for each in held for answer in each.answers]
        plan = plan_of(run.options, run.config)
        values.append(Value(run.value, run.config, run.topology, plan, rows, answers))
    found = points(values, simulate(values, config))
    folder, command = Path(options.out), " ".join(["python -m flowspec eval sweep", *words])
    write(folder, options.over, found, command)
    print(markdown(options.over, found, command))
    print(f"written to {folder}")
    return 1 if any(r.verdict.startswith("differs") for v in values for r in v.rows) else 0
