"""`flowspec bench sampling` measures speculative decoding in one process."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from flowspec.commands.options import DEMO_PROMPT, count
from flowspec.commands.pair import Task, add_pair, models_of, pair_of, request_of, task_of
from flowspec.core.request import Request
from flowspec.errors import need
from flowspec.files import kept_lines
from flowspec.output import Parser
from flowspec.preflight import check_rivals, check_writable

if TYPE_CHECKING:
    from flowspec.bench.sampling import Run, Side

ABOUT = """Decoding alone against speculative decoding of the same pair of models in one process,
and the target as its own draft, of which no guess may be rejected. The first run of each does not
count; runs take turns, and texts are as long as asked."""
DEFAULTS = {"temperature": "0.6", "top_k": "25", "top_p": "0.9", "seed": "1"}
DEFAULTS |= {"max_new_tokens": "40"}


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="flowspec bench sampling", description=ABOUT)
    add_pair(parser)
    parser.add_argument("--num-runs", default="50", metavar="N", help="texts a row (default 50)")
    parser.add_argument("-N", dest="max_new_tokens", metavar="N", help="as --max-new-tokens (40)")
    add_against(parser)
    parser.add_argument("--json", metavar="FILE", help="write a line a run")
    parser.set_defaults(**DEFAULTS)
    return with_prompts(parser.parse_args(words))


def add_against(parser: argparse.ArgumentParser) -> None:
    """Add what `rivals` reads."""
    parser.add_argument(
        "--against",
        choices=["transformers"],
        help="also transformers' generate of the same pair, alone and assisted",
    )


def rivals(task: Task, options: argparse.Namespace) -> dict[str, Side]:
    """Return the sides that are asked for beside our own.

    Raise UserError, which names the flag, if nothing compares with them."""
    placed = task.placement
    need(
        not (options.against and placed and placed.emulated),
        "--against: emulated times compare with no real ones",
    )
    if not (options.against and task.draft):
        return {}
    check_rivals(task.sampling)
    from flowspec.bench.sampling import transformers

    return transformers(task.target, task.draft, options.dtype)


def with_prompts(options: argparse.Namespace) -> argparse.Namespace:
    """Return the options, with the demo's prompt if none is given."""
    if not (options.prompt or options.prompt_file):
        options.prompt = [DEMO_PROMPT]
    return options


def requests_of(task: Task, n: int) -> list[Request]:
    """Return n requests, over the prompts in turn, whose texts do not end before their length."""
    prompts = task.prompts
    requests = [request_of(task, prompts[k % len(prompts)], k, k) for k in range(n)]
    return [dataclasses.replace(request, eos=frozenset()) for request in requests]


def kept(runs: Iterable[Run], path: str | None, task: Task) -> list[Run]:
    """Return the runs, a line of each of which is written to a file as it comes."""
    found = []
    with kept_lines(path, "--json") as keep:
        for run in runs:
            found.append(run)
            keep(json.dumps(run.record() | task.facts))
    return found


def main(words: Sequence[str]) -> int:
    options = _options(words)
    check_writable(options.json)
    task = task_of(options, "speculative")
    asked = requests_of(task, count(options.num_runs, "--num-runs") + 1)
    placed, others = task.placement, rivals(task, options)
    pair = pair_of(task, models_of(task, options.dtype, options.threads))
    from rich.console import Console

    from flowspec.bench.sampling import measure, own, table

    sides = own(pair) | others
    found = kept(measure(sides, asked, exact=placed is None), options.json, task)
    sampling = task.sampling
    Console().print(
        table(
            found,
            sides,
            f"{len(asked) - 1} texts of {sampling.max_new_tokens} tokens, {task.shape['gamma']} guesses, T = "
            f"{sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}, "
            f"rule {task.rule}, {options.dtype}" + (f", {placed.words}" if placed else ""),
        )
    )
    return 0
