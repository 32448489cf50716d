"""`flowspec eval` asks several methods the questions of datasets, and reports how they stand.

`eval report` does the latter for runs that are there, `eval sweep` repeats a run over a range of
one setting."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec.bench.questions import DATA, DATASETS, Question, chosen
from flowspec.commands.options import configuration, count, methods, temperatures_of
from flowspec.commands.ring import RingCommand
from flowspec.config import Config
from flowspec.core.policies import ALL_METHODS
from flowspec.errors import need
from flowspec.models.manifest import Manifest
from flowspec.output import Parser
from flowspec.preflight import manifest_of

if TYPE_CHECKING:
    from flowspec.bench.evaluate import Plan
    from flowspec.engine import Engine

ABOUT = """eval CONFIG --out DIR: every method answers the same questions; DIR holds a JSON line an
answer, and a report with intervals of confidence. What was interrupted goes on where it stopped.
`eval report DIR ...` puts runs together or compares them, `eval sweep` varies one setting."""
REPORT = """eval report DIR ...: the report of runs of flowspec eval. Those of the same configuration
are put together, others are compared with the first."""
TURNS = "ar,naive,pipedec,flowspec"
OWN_WORDS = ("datasets", "questions", "data", "methods", "temperatures", "out", "prompt_tokens")
"""These are the options that say what is asked, and of whom."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--datasets",
        default=",".join(DATASETS),
        metavar="D,D",
        help=f"names of question files (default: {','.join(DATASETS)})",
    )
    parser.add_argument(
        "--questions",
        default=":",
        metavar="A:B",
        help="of each file those from A (counted from 0) to before B, or the first N (default all)",
    )
    parser.add_argument(
        "--data",
        default=str(DATA),
        metavar="FOLDER",
        help="has NAME.jsonl for each dataset (default: small files of our own writing)",
    )
    parser.add_argument(
        "--methods", default=TURNS, metavar="M,M", help=f"of {' '.join(ALL_METHODS)} ({TURNS})"
    )
    parser.add_argument(
        "--temperatures", metavar="X,X", help="(default: the configured temperature)"
    )
    parser.add_argument("--out", metavar="DIR", help="the run's folder: begun, or gone on with")
    parser.add_argument(
        "--prompt-tokens",
        metavar="N",
        help="make each prompt N tokens long, of the questions' texts; one turn a question",
    )


def questions_of(options: argparse.Namespace) -> list[Question]:
    names = options.datasets.split(",")
    need(len(set(names)) == len(names), f"--datasets: {options.datasets} names something twice")
    return chosen(Path(options.data), names, options.questions)


def _check(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    need(options.out is not None, "eval writes a folder: say which by --out DIR")
    need(not Path(options.out).is_file(), f"--out {options.out} is a file: name a folder")
    given = options.prompt or options.prompt_file
    need(not given, "eval asks questions (--data), and takes no --prompt or --prompt-file")
    for method in methods(options.methods, ALL_METHODS):
        config.check_method(manifest.topology.members, method)
    temperatures = temperatures_of(options, config)
    need(min(temperatures) >= 0, f"--temperatures {options.temperatures}: 0 is the least")
    questions_of(options)
    most, room = config.sampling.max_new_tokens, manifest.max_positions
    need(most > 1, "sampling.max_new_tokens is 1: a rate takes 2 tokens at least")
    length = _length(options)
    need(
        length is None or length + most <= room,
        f"--prompt-tokens {length} and {most} new tokens are more than the model's {room}",
    )


def _length(options: argparse.Namespace) -> int | None:
    return count(options.prompt_tokens, "--prompt-tokens") if options.prompt_tokens else None


def _prepare(options: argparse.Namespace) -> None:
    """Refuse another run's folder before models are loaded."""
    from flowspec.bench.answers import Answers

    config = configuration(options)[1]
    Answers(Path(options.out), *_said(options, config, manifest_of(config))).close()


def _said(
    options: argparse.Namespace, config: Config, manifest: Manifest
) -> tuple[dict[str, object], dict[str, object]]:
    """Return what is kept of the run beside its answers."""
    from flowspec.bench.answers import asked, noted

    plan = plan_of(options, config)
    said = asked(config, manifest, plan.methods, plan.temperatures, plan.questions, plan.length)
    return said, noted(options.given)


def plan_of(options: argparse.Namespace, config: Config) -> Plan:
    from flowspec.bench.evaluate import Plan

    return Plan(
        questions=questions_of(options),
        methods=methods(options.methods, ALL_METHODS),
        temperatures=temperatures_of(options, config),
        length=_length(options),
    )


def _lead(engine: Engine, options: argparse.Namespace, prompts: list[str]) -> int:
    from flowspec.bench.answers import Answers
    from flowspec.bench.evaluate import evaluate

    config, folder = configuration(options)[1], Path(options.out)
    with Answers(folder, *_said(options, config, engine.manifest)) as answers:
        evaluate(engine, plan_of(options, config), answers)
    return report([folder], folder)


def report(folders: Sequence[Path], output: Path) -> int:
    """Write the report of runs into a folder and print it; return 1 if a text is another."""
    from flowspec.bench.answers import read_runs
    from flowspec.bench.standing import write
    from flowspec.bench.timeline import MISSING, can_draw
    from flowspec.lossless import first_difference

    rows = write(output, read_runs(folders), first_difference)
    print((output / "report.md").read_text())
    print(f"written to {output}" + ("" if can_draw() else f"; no pictures: {MISSING}"))
    wrong = [row for row in rows if row.verdict.startswith("differs")]
    if wrong:
        print("flowspec: methods wrote different texts: see the last column", file=sys.stderr)
    return 1 if wrong else 0


def _report(words: Sequence[str]) -> int:
    parser = Parser(prog="flowspec eval report", description=REPORT)
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument(
        "--output", metavar="FOLDER", help="where the report goes (default: the first DIR)"
    )
    options = parser.parse_args(words)
    folders = [Path(folder) for folder in options.folders]
    output = Path(options.output or options.folders[0])
    need(not output.is_file(), f"--output {output} is a file: name a folder")
    return report(folders, output)


EVAL = RingCommand("eval", ABOUT, add_arguments, lambda options, path: [], _lead, _check, _prepare)


def main(words: Sequence[str]) -> int:
    if list(words[:1]) == ["report"]:
        return _report(words[1:])
    if list(words[:1]) == ["sweep"]:
        from flowspec.commands import sweep

        return sweep.main(words[1:])
    return EVAL.main(words)
