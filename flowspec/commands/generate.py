"""`flowspec generate` continues prompts in one process, without ranks."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowspec.commands.pair import Task, add_pair, load, request_of, task_of
from flowspec.core.request import Request
from flowspec.files import kept_lines
from flowspec.output import Parser
from flowspec.preflight import check_writable
from flowspec.text import TextStream

if TYPE_CHECKING:
    from flowspec.host.speculative import Pair

METHODS = {
    "ar": "a token a forward",
    "speculative": "a draft model guesses --gamma tokens, one forward of the target checks them",
}
COLOURS = {"draft": "green", "resampled": "red", "bonus": "blue", "plain": ""}


def _parser() -> Parser:
    parser = Parser(
        prog="flowspec generate", description="Continue prompts in one process, without ranks."
    )
    parser.add_argument(
        "--method",
        default="speculative",
        choices=METHODS,
        metavar="METHOD",
        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    add_pair(parser)
    parser.add_argument("--json", metavar="FILE", help="write a line a prompt")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show where tokens came from: accepted from the draft (green), drawn in the place of "
        "a rejected one (red), drawn behind a draft that was accepted whole (blue)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    check_writable(options.json)
    task = task_of(options, drafts=options.method != "ar")
    pair = load(task, options.dtype, options.threads)
    with kept_lines(options.json, "--json") as keep:
        for k, prompt in enumerate(task.prompts):
            keep(json.dumps(_one(task, request_of(task, prompt, k), pair, options)))
    return 0


def _one(task: Task, request: Request, pair: Pair, options: argparse.Namespace) -> dict[str, Any]:
    """Write one text, show it, and return what is known of it."""
    from rich.console import Console
    from rich.text import Text as Coloured

    console = Console(highlight=False, soft_wrap=True)
    console.print(task.text.decode(request.prompt), end="", markup=False)
    stream = TextStream(task.text.tokenizer, prompt=request.prompt)
    begun = time.perf_counter()
    first, tokens, origins = begun, list[int](), Counter[str]()
    made, forwards = pair.begin(request, None if task.draft is None else "draft")
    for block in made:
        first = first if tokens else time.perf_counter()
        for token, origin in block:
            tokens.append(token)
            origins[origin] += 1
            style = COLOURS[origin] if options.verbose else ""
            console.print(Coloured(stream.push(token), style), end="")
    ended = time.perf_counter()
    console.print(Coloured(stream.flush()))
    decode = ended - first
    found = {
        "method": options.method,
        "rule": None if task.draft is None else task.rule,
        "prompt_tokens": request.prompt_length,
        "new_tokens": len(tokens),
        "token_ids": tokens,
        "text": stream.text,
        "finish_reason": "stop" if tokens[-1] in request.eos else "length",
        "prefill_seconds": first - begun,
        "decode_seconds": decode,
        "tokens_per_second": (len(tokens) - 1) / decode if len(tokens) > 1 else None,
        "origins": dict(origins),
        "temperature": request.sampling.temperature,
        "seed": request.sampling.seed,
        **task.facts,
        **forwards(),
    }
    if options.verbose:
        console.print(_in_words(found), style="dim")
    return found


def _in_words(found: dict[str, Any]) -> str:
    rate, origins = found["tokens_per_second"], found["origins"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    parts = ", ".join(f"{origins.get(name, 0)} {name}" for name in COLOURS)
    return (
        f"{found['new_tokens']} tokens in {found['target_forwards']} forwards of the target: "
        f"{parts}{speed}"
    )
