"""`flowspec bench` measures methods: `compare` one request at a time, `load` several, `sampling`
and `specexec` in one process."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from flowspec.commands import bench_sampling, bench_specexec
from flowspec.commands.options import (
    benchmark_prompts,
    methods,
    number,
    numbers,
    temperatures_of,
)
from flowspec.commands.ring import RingCommand
from flowspec.config import Config
from flowspec.core.policies import ALL_METHODS, METHODS
from flowspec.core.policy import SWITCHES
from flowspec.errors import need
from flowspec.models.manifest import Manifest
from flowspec.preflight import check_reference, check_rivals, check_writable

if TYPE_CHECKING:
    from flowspec.bench.compare import Rivals
    from flowspec.engine import Engine

ABOUT = """bench compare CONFIG: all methods on the same prompts, interleaved and in shuffled order,
with what the simulator predicts beside what was measured."""


KNOWN = ALL_METHODS


def _check_methods(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    for method in methods(options.methods, KNOWN):
        config.check_method(manifest.topology.members, method)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        default=",".join(METHODS),
        metavar="M,M",
        help=f"of {' '.join(KNOWN)} (default: all that run over any ring)",
    )
    parser.add_argument(
        "--without",
        metavar="S,S",
        help="also flowspec with each of these switches of policy off alone, or `all`",
    )
    parser.add_argument(
        "--prompts", default="5", metavar="N", help="use the first N prompts (default 5)"
    )
    parser.add_argument(
        "--repeats",
        default="3",
        metavar="N",
        help="runs of each prompt with each method (default 3)",
    )
    parser.add_argument(
        "--temperatures",
        metavar="X,X",
        help="temperatures to compare at (default: the configured one)",
    )
    parser.add_argument(
        "--output",
        metavar="FOLDER",
        help="where the tables, records and chart go (default: build/bench/NAME)",
    )
    parser.add_argument(
        "--against",
        metavar="transformers",
        help="also the unsplit model by transformers' generate, alone and, where the drafter is a "
        "model (lm), with it as assistant; on rank 0's machine, with a thread a stage",
    )
    parser.add_argument("--reference", metavar="DIR", help="the unsplit model, for --against")
    parser.add_argument(
        "--sweep",
        action="store_true",
        help="also each baseline's best tree settings, by simulation",
    )


def _prompts(options: argparse.Namespace, path: Path) -> list[str]:
    return benchmark_prompts(options)


def _without(options: argparse.Namespace) -> list[str]:
    """Return the switches of `policy` that --without names."""
    if options.without == "all":
        return list(SWITCHES)
    return [] if options.without is None else methods(options.without, SWITCHES, "--without")


def _check(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    _check_methods(options, config, manifest)
    _without(options)
    need(
        number(options.repeats, int, "--repeats") >= 1,
        f"--repeats is {options.repeats}: it must be at least 1",
    )
    temperatures_of(options, config)
    need(
        config.sampling.max_new_tokens > 1,
        "sampling.max_new_tokens is 1: a rate takes 2 tokens at least",
    )
    _check_rivals(options, config, manifest)


def _check_rivals(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    asked = options.against is not None
    need(
        not asked or options.against == "transformers",
        f"--against is {options.against}: it knows transformers",
    )
    need(
        asked == (options.reference is not None),
        "--against transformers and --reference DIR (the model that was split) go together",
    )
    if asked:
        need(not config.emulate.active, "--against: emulated times compare with no real ones")
        check_rivals(config.sampling)
        check_reference(options.reference, manifest, config.dtypes)


@contextmanager
def _rivals(engine: Engine, options: argparse.Namespace) -> Iterator[Rivals | None]:
    """Yield what --against asks for, loaded and waiting."""
    if options.against is None:
        yield None
        return
    import torch

    from flowspec.bench.compare import Rivals
    from flowspec.bench.report import RIVALS
    from flowspec.bench.rivals import Rival

    config, threads = engine.config, engine.topology.stages * torch.get_num_threads()
    drafts = [d.checkpoint(config.folder) for d in config.drafters if d.kind == "lm"]
    source = check_reference(options.reference, engine.manifest, config.dtypes)
    words = [str(source.folder), str(drafts[0]) if drafts else "", str(threads), engine.dtype_name]
    words = ["-m", "flowspec.bench.unsplit", *words]
    with Rival("transformers", words, threads) as rival:
        rival.ready()
        yield Rivals(RIVALS[: 1 + bool(drafts)], rival.ask, engine.manifest.max_positions)


def _lead(engine: Engine, options: argparse.Namespace, prompts: list[str]) -> int:
    from flowspec.bench.compare import Plan, compare
    from flowspec.runtime.process import report

    with _rivals(engine, options) as rivals:
        plan = Plan(
            methods=methods(options.methods, KNOWN),
            without=_without(options),
            temperatures=temperatures_of(options, engine.config),
            repeats=int(options.repeats),
            sweep=options.sweep,
            rivals=rivals,
            output=Path(options.output) if options.output else None,
            command=" ".join(["python -m flowspec bench compare", *options.given]),
        )
        same = compare(engine, prompts, plan)
    if not same:
        report("methods wrote different tokens: see above", 1)
    return 0 if same else 1


LOAD = """bench load CONFIG: several requests at a time, with each method: tokens per second of all
together, what the simulator predicts, and how long a first token takes. Each text must be the same
in any company."""


def _add_load_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--methods",
        default="ar,flowspec",
        metavar="M,M",
        help=f"of {' '.join(KNOWN)}; the first is what others are compared with (default: "
        "ar,flowspec)",
    )
    parser.add_argument(
        "--requests",
        default="1,2,4,8",
        metavar="N,N",
        help="how many come at once (default: 1,2,4,8)",
    )
    parser.add_argument(
        "--prompts", default="5", metavar="N", help="use the first N prompts in turn (default 5)"
    )
    parser.add_argument("--repeats", default="3", metavar="N", help="runs of each (default 3)")
    parser.add_argument(
        "--temperatures", metavar="X,X", help="(default: the configured temperature)"
    )
    parser.add_argument("--output", metavar="FILE", help="write a JSON line a run to this file")


def _check_load(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    _check_methods(options, config, manifest)
    for flag in ("requests", "repeats"):
        found = numbers(getattr(options, flag), int, f"--{flag}")
        need(min(found) >= 1, f"--{flag} is {getattr(options, flag)}: it must be at least 1")
    temperatures_of(options, config)
    check_writable(options.output, "--output")


def _lead_load(engine: Engine, options: argparse.Namespace, prompts: list[str]) -> int:
    from flowspec.bench.load import Plan, load
    from flowspec.runtime.process import report

    plan = Plan(
        methods=methods(options.methods, KNOWN),
        requests=numbers(options.requests, int, "--requests"),
        temperatures=temperatures_of(options, engine.config),
        repeats=int(options.repeats),
        output=Path(options.output) if options.output else None,
    )
    same = load(engine, prompts, plan)
    if not same:
        report("a request wrote another text in other company: a bug, or a tie (verify tells)", 1)
    return 0 if same else 1


class _Command(Protocol):
    """A command is one of `bench`'s: a command of a ring, or a module."""

    def main(self, words: Sequence[str], /) -> int:
        """Run it, and return the exit code."""
        ...


COMMANDS: dict[str, _Command] = {
    "compare": RingCommand("bench compare", ABOUT, _add_arguments, _prompts, _lead, _check),
    "load": RingCommand("bench load", LOAD, _add_load_arguments, _prompts, _lead_load, _check_load),
    "sampling": bench_sampling,
    "specexec": bench_specexec,
}


def main(words: Sequence[str]) -> int:
    asks = not {"-h", "--help"}.isdisjoint(words)
    name = words[0] if words and words[0] in COMMANDS else "compare" if asks else ""
    *others, last = COMMANDS
    known = f"{', '.join(others)} and {last}"
    need(bool(name), f"bench knows {known}: flowspec bench compare CONFIG ...")
    return COMMANDS[name].main(words[1:] if list(words[:1]) == [name] else words)
