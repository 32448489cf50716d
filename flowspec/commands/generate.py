"""`flowspec generate` continues prompts in one process, without ranks."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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
from flowspec.commands.parts import Parts, shared_by
from flowspec.core.request import Request
from flowspec.errors import need
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
    parser.add_argument(
        "--prompts", dest="prompt_file", metavar="FILE", help="the same as --prompt-file"
    )
    parser.add_argument("--json", metavar="FILE", help="write a line a prompt")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="the same for a long list: texts are not shown, the processes of `accelerate launch` "
        "or torchrun share the prompts, and what is finished outlives a kill",
    )
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
    need(options.json is None or options.out is None, "--json and --out: leave one out")
    task = task_of(options, options.method)
    size = count(options.batch_size, "--batch-size")
    if options.out is not None:
        return _share(task, size, options)
    pair = pair_of(task, models_of(task, options.dtype, options.threads))
    console = _console()
    with kept_lines(options.json, "--json") as keep:
        for texts in _in_batches(task, range(len(task.prompts)), size):
            for found in _together(texts, pair, console, options.verbose):
                keep(json.dumps(found))
    return 0


def _share(task: Task, size: int, options: argparse.Namespace) -> int:
    """Write this process's share of the prompts to a file that all share."""
    rank, processes = shared_by()
    said = ("target", "draft", "method", "rule", "shape", "coupled", "sampling")
    asked = {name: str(getattr(task, name)) for name in said} | {"dtype": options.dtype}
    asked["prompts"] = hashlib.sha256(repr(task.prompts).encode()).hexdigest()
    parts = Parts(options.out, asked, len(task.prompts), rank, processes)
    if mine := parts.mine():
        pair, done = pair_of(task, models_of(task, options.dtype, options.threads)), 0
        for texts in _in_batches(task, mine, size):
            for text, found in zip(texts, _together(texts, pair, None, False), strict=True):
                parts.keep(text.request.id, found)
                done += 1
            print(f"rank {rank}: {done} of {len(mine)} prompts", file=sys.stderr, flush=True)
    parts.settle()
    return 0


def _in_batches(task: Task, numbers: Sequence[int], size: int) -> Iterator[list[_Text]]:
    """Yield the texts of these prompts, so many at a time."""
    for at in range(0, len(numbers), size):
        some = numbers[at : at + size]
        yield [_Text(task, request_of(task, task.prompts[k], k)) for k in some]


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def _together(
    texts: Sequence[_Text], pair: Pair, console: Console | None, verbose: bool
) -> list[dict[str, Any]]:
    """Write texts in step, show them on a console, and return what is known of each.

    One alone is shown as it comes, several when all are there."""
    alone = console if len(texts) == 1 else None
    if alone:
        alone.print(texts[0].shown, end="")
    drafts = texts[0].task.draft is not None
    requests = [text.request for text in texts]
    for block in pair.begin(requests, "draft" if drafts else None).blocks:
        new = texts[block.text].add(block, verbose)
        if alone:
            alone.print(new, end="")
    made = []
    for text in texts:
        rest = text.flush()
        made.append(text.found())
        if console:
            console.print(rest if alone else text.shown + rest)
        if console and verbose:
            console.print(_in_words(made[-1]), style="dim")
    return made


class _Text:
    """A text as it comes: what is shown of it, and what is known."""

    def __init__(self, task: Task, request: Request):
        from rich.text import Text as Coloured

        self.task, self.request, self._begun = task, request, time.perf_counter()
        self._stream = TextStream(task.text.tokenizer, prompt=request.prompt)
        self.shown = Coloured(task.text.decode(request.prompt))
        self._tokens, self._origins = list[int](), Counter[str]()
        self._logprobs = list[Any]()
        self._times, self._nodes, self._asked = list[float](), 0, 0

    def add(self, block: Block, verbose: bool) -> Coloured:
        """Return what is shown of a block."""
        from rich.text import Text as Coloured

        self._times.append(time.perf_counter())
        self._nodes += block.nodes
        self._asked += block.asked
        new = Coloured()
        for token, origin, logprobs in block.written:
            self._tokens.append(token)
            self._logprobs.append(logprobs)
            self._origins[origin] += 1
            new.append(self._stream.push(token), COLOURS[origin] if verbose else "")
        self.shown.append_text(new)
        return new

    def flush(self) -> Coloured:
        """Return what is left to show."""
        from rich.text import Text as Coloured

        return Coloured(self._stream.flush())

    def found(self) -> dict[str, Any]:
        tokens, request, task = self._tokens, self.request, self.task
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
            "logprobs": None if request.sampling.logprobs is None else self._logprobs,
        }


def _in_words(found: dict[str, Any]) -> str:
    rate, origins = found["tokens_per_second"], found["origins"]
    speed = "" if rate is None else f", {rate:.1f} tokens/s"
    parts = ", ".join(f"{origins.get(name, 0)} {name}" for name in COLOURS)
    return (
        f"{found['new_tokens']} tokens in {found['target_forwards']} forwards of the target: "
        f"{parts}{speed}"
    )
