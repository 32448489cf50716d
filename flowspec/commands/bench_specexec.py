"""`flowspec bench specexec` measures trees of guesses by their size, in one process."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from flowspec.commands.bench_sampling import (
    add_against,
    kept,
    requests_of,
    rivals,
    with_prompts,
)
from flowspec.commands.options import count, methods, numbers
from flowspec.commands.pair import SHAPES, Task, add_pair, models_of, pair_of, task_of
from flowspec.errors import need
from flowspec.output import Parser
from flowspec.preflight import check_writable

ABOUT = """Trees of guesses of several sizes against decoding alone: tokens a tree, tokens/s, size and
height of the trees, what both models take for one. The first run of each does not count; runs take
turns, and texts are as long as asked. SpecInfer has as many branches as make a tree of at most
--max-budget nodes. --as-published adds SpecExec as published, by that name."""
WIDTH = 96
"""The table's columns, of which none can do without its end, take so many characters."""
TYPES = ("specexec", "specinfer")
DEFAULTS = {"temperature": "0.6", "seed": "1", "max_new_tokens": "64"}
DEFAULTS |= {"max_budget": "16,32,64,128,256,512,1024"}


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="flowspec bench specexec", description=ABOUT)
    add_pair(parser)
    parser.add_argument(
        "--gen-type", default=",".join(TYPES), metavar="M,M", help=f"of {', '.join(TYPES)} (both)"
    )
    parser.add_argument(
        "--zero",
        action="store_const",
        dest="offload",
        const="deepspeed",
        help="the same as --offload deepspeed",
    )
    add_against(parser)
    parser.add_argument("--num-runs", default="10", metavar="N", help="texts a row (default 10)")
    parser.add_argument("--json", metavar="FILE", help="write a line a run")
    parser.set_defaults(**DEFAULTS)
    return with_prompts(parser.parse_args(words))


def main(words: Sequence[str]) -> int:
    options = _options(words)
    check_writable(options.json)
    types = methods(options.gen_type, TYPES, "--gen-type")
    budgets = [int(budget) for budget in numbers(options.max_budget, int, "--max-budget")]
    need(min(budgets) >= 1, f"--max-budget is {options.max_budget}: each must be at least 1")
    tasks = {
        f"{name} {budget}": _sized(task, budget)
        for name, task in _tasks(options, types).items()
        for budget in budgets
    }
    some = next(iter(tasks.values()))
    asked = requests_of(some, count(options.num_runs, "--num-runs") + 1)
    others = rivals(some, options)
    models = models_of(some, options.dtype, options.threads)
    from rich.console import Console

    from flowspec.bench.sampling import measure, trees_table, written

    sides = {"ar": written(pair_of(some, models), None)}
    sides |= {name: written(pair_of(task, models), "draft") for name, task in tasks.items()}
    sides |= others
    found = kept(measure(sides, asked), options.json, some)
    sampling = some.sampling
    title = f"{len(asked) - 1} texts of {sampling.max_new_tokens} tokens, T = "
    title += f"{sampling.temperature:g}, top-k {sampling.top_k}, top-p {sampling.top_p:g}, "
    where = f", {some.placement.words}" if some.placement else ""
    console = Console()
    console.width = max(console.width, WIDTH)
    console.print(trees_table(found, sides, title + options.dtype + where))
    return 0


def _tasks(options: argparse.Namespace, types: Sequence[str]) -> dict[str, Task]:
    """Return what is asked of each method; specexec as published is one of its own."""
    published = options.as_published
    options.max_budget, options.as_published = None, False
    tasks = {method: task_of(options, method) for method in types}
    if published and "specexec" in tasks:
        tasks["published"] = tasks["specexec"]._replace(coupled=False)
    return tasks


def _sized(task: Task, budget: int) -> Task:
    """Return the task with trees of at most so many nodes."""
    if "max_budget" in SHAPES[task.method]:
        return task._replace(shape=task.shape | {"max_budget": budget})
    length = min(task.shape["max_beam_len"], budget)
    shape = {"max_n_beams": budget // length, "max_beam_len": length}
    return task._replace(shape=shape)
