"""`flowspec generate` continues prompts in one process, without ranks."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flowspec.commands.options import count
from flowspec.commands.pair import (
    METHODS,
    Task,
    add_pair,
    models_of,
    pair_of,
    request_of,
    task_of,
)
from flowspec.core.request import Request
from flowspec.files import kept_lines
from flowspec.output import Parser
from flowspec.preflight import check_writable
from flowspec.text import TextStream

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text as Coloured

    from flowspec.host.decoding import Block, Pair

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
    parser.add_argument(
        "--batch-size", default="1", metavar="N", help="prompts that are written together (1)"
    )
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
    from rich.console import Console

    options = _parser().parse_args(argv)
    check_writable(options.json)
    task = task_of(options, options.method)
    size = count(options.batch_size, "--batch-size")
    pair = pair_of(task, models_of(task, options.dtype, options.threads))
    requests = [request_of(task, prompt, k) for k, prompt in enumerate(task.prompts)]
    console = Console(highlight=False, soft_wrap=True)
    with kept_lines(options.json, "--json") as keep:
        for at in range(0, len(requests), size):
            for found in _together(task, requests[at : at + size], pair, console, options.verbose):
                keep(json.dumps(found))
    return 0


def _together(
    task: Task, requests: Sequence[Request], pair: Pair, console: Console, verbose: bool
) -> list[dict[str, Any]]:
    """Write texts in step, show them, and return what is known of each.

    One alone is shown as it comes, several when all are there."""
    begun = time.perf_counter()
    texts = [_Text(task, request, begun) for request in requests]
    alone = texts[0].prompt if len(texts) == 1 else None
    if alone is not None:
        console.print(alone, end="")
    for block in pair.begin(requests, None if task.draft is None else "draft").blocks:
        new = texts[block.text].add(block, verbose)
        if alone is not None:
            console.print(new, end="")
    made = []
    for text in texts:
        rest = text.flush()
        console.print(rest if alone is not None else text.shown + rest)
        made.append(text.found())
        if verbose:
            console.print(_in_words(made[-1]), style="dim")
    return made


class _Text:
    """A text as it comes: what is shown of it, and what is known."""

    def __init__(self, task: Task, request: Request, begun: float):
        from rich.text import Text as Coloured

        self._task, self._request, self._begun = task, request, begun
        self._stream = TextStream(task.text.tokenizer, prompt=request.prompt)
        self.prompt = Coloured(task.text.decode(request.prompt))
        self.shown = self.prompt.copy()
        self._tokens, self._origins = list[int](), Counter[str]()
        self._times, self._nodes, self._asked = list[float](), 0, 0

    def add(self, block: Block, verbose: bool) -> Coloured:
        """Return what is shown of a block."""
        from rich.text import Text as Coloured

        self._times.append(time.perf_counter())
        self._nodes += block.nodes
        self._asked += block.asked
        new = Coloured()
        for token, origin in block.written:
            self._tokens.append(token)
            self._origins[origin] += 1
            new.append(self._stream.push(token), COLOURS[origin] if verbose else "")
        self.shown.append_text(new)
        return new

    def flush(self) -> Coloured:
        """Return what is left to show."""
        from rich.text import Text as Coloured

        return Coloured(self._stream.flush())

    def found(self) -> dict[str, Any]:
        tokens, request, task = self._tokens, self._request, self._task
        decode = self._times[-1] - self._times[0]
        return {
            "method": task.method,
            "rule": None if task.draft is None else task.rule,
            **task.shape,
            "prompt_tokens": request.prompt_length,
            "new_tokens": len(tokens),
            "token_ids": tokens,
            "text": self._stream.text,
            "finish_reason": "stop" if tokens[-1] in request.eos else "length",
            "prefill_seconds": self._times[0] - self._begun,
            "decode_seconds": decode,
            "tokens_per_second": (len(tokens) - 1) / decode if len(tokens) > 1 else None,
            "origins": dict(self._origins),
            "temperature": request.sampling.temperature,
            "seed": request.sampling.seed,
            "target_forwards": len(self._times),
            **task.facts,
            "draft_forwards": self._asked,
            "drafted": self._nodes,
        }


def _in_words(found: dict[str, Any]) -> str:
    rate, origins = found["tokens_per_second"], found["origins"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    parts = ", ".join(f"{origins.get(name, 0)} {name}" for name in COLOURS)
    return (
        f"{found['new_tokens']} tokens in {found['target_forwards']} forwards of the target: "
        f"{parts}{speed}"
    )
