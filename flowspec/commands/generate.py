"""`flowspec generate` continues prompts in one process, without ranks."""

from __future__ import annotations

import argparse
import json
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowspec.commands.options import SAMPLING, count, number
from flowspec.core.request import Request, Sampling
from flowspec.errors import UserError, need
from flowspec.files import kept_lines
from flowspec.models.families import read_config
from flowspec.models.hub import MODEL_FILES, local_folder
from flowspec.output import Parser
from flowspec.preflight import check_prompt, check_writable, read_prompts
from flowspec.text import Text, TextStream, check_same_tokens, load_tokenizer

if TYPE_CHECKING:
    from flowspec.host.speculative import Written

METHODS = {
    "ar": "a token a forward",
    "speculative": "a draft model guesses --gamma tokens, one forward of the target checks them",
}
RULES = {
    "rejection": "keep a guess with probability min(1, p / q), else draw from what is left of p "
    "(leviathan, chen): the target's distribution",
    "keyed": "draw with the same keyed noise on both sides and keep what is equal: the text of "
    "--method ar with the same seed",
}
SAME = {"leviathan": "rejection", "chen": "rejection"}
"""These papers' rules draw alike (flowspec/rejection.py)."""
DTYPES = ("float32", "bfloat16", "float16")
COLOURS = {"draft": "green", "resampled": "red", "bonus": "blue", "plain": ""}


def _parser() -> Parser:
    parser = Parser(
        prog="flowspec generate",
        description="Continue prompts in one process, without ranks.",
        epilog="\n".join(["methods:", *_listed(METHODS), "rules of speculative:", *_listed(RULES)]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--method", default="speculative", choices=METHODS, metavar="METHOD")
    parser.add_argument("--target", required=True, metavar="DIR", help="the target's checkpoint")
    parser.add_argument("--draft", metavar="DIR", help="the draft model's; not for method ar")
    parser.add_argument("--rule", default="rejection", choices=[*RULES, *SAME], metavar="RULE")
    parser.add_argument(
        "-K", "--gamma", default="4", metavar="N", help="guesses for a forward (default 4)"
    )
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT")
    parser.add_argument("--prompt-file", metavar="FILE", help=".txt: a prompt a line; or .jsonl")
    for name, (kind, what) in SAMPLING.items():
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, metavar="N" if kind is int else "X", help=what)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="(default float32)")
    parser.add_argument("--threads", metavar="N", help="threads to compute with (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="write a line a prompt")
    parser.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show where tokens came from: accepted from the draft (green), drawn in the place of "
        "a rejected one (red), drawn behind a draft that was accepted whole (blue)",
    )
    return parser


def _listed(names: dict[str, str]) -> list[str]:
    return [f"  {name:<12} {what}" for name, what in names.items()]


class _Task(NamedTuple):
    """What the command line asks for, checked."""

    text: Text
    target: Path
    draft: Path | None
    prompts: list[tuple[int, ...]]
    sampling: Sampling
    positions: int
    """A text has at most so many tokens, prompt and all."""
    rule: str
    gamma: int


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    check_writable(options.json)
    threads = None if options.threads is None else count(options.threads, "--threads")
    task = _task(options)
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    write = _writer(task, getattr(torch, options.dtype))
    with kept_lines(options.json, "--json") as keep:
        for number_, prompt in enumerate(task.prompts):
            sampling = _seeded(task.sampling, number_)
            room = min(sampling.max_new_tokens, task.positions - len(prompt))
            request = Request(
                id=number_,
                prompt=prompt,
                sampling=Sampling(**{**vars(sampling), "max_new_tokens": room}),
                eos=task.text.eos,
            )
            keep(json.dumps(_one(task, request, write, options)))
    return 0


# ---- what is asked -------------------------------------------------------------------------------
def _task(options: argparse.Namespace) -> _Task:
    drafts = options.method != "ar"
    need(drafts or options.draft is None, "--draft is of no use to --method ar: leave it out")
    need(not drafts or options.draft is not None, f"--method {options.method} needs --draft DIR")
    target = local_folder(options.target, "--target", MODEL_FILES)
    text, config = Text(target), read_config(target)
    positions, draft = config["max_position_embeddings"], None
    if drafts:
        draft = local_folder(options.draft, "--draft", MODEL_FILES)
        check_same_tokens(text.tokenizer, load_tokenizer(draft), f"--draft {options.draft}")
        positions = min(positions, read_config(draft)["max_position_embeddings"])
    return _Task(
        text=text,
        target=target,
        draft=draft,
        prompts=_prompts(options, text, positions, config["vocab_size"]),
        sampling=_sampling(options),
        positions=positions,
        rule=SAME.get(options.rule, options.rule),
        gamma=count(options.gamma, "--gamma"),
    )


def _prompts(
    options: argparse.Namespace, text: Text, positions: int, vocabulary: int
) -> list[tuple[int, ...]]:
    from flowspec.models.unsplit import Limits

    said = [*options.prompt]
    said += read_prompts(options.prompt_file) if options.prompt_file else []
    need(bool(said), "no prompt: give --prompt TEXT or --prompt-file FILE")
    encoded = [text.encode(prompt) for prompt in said]
    for n, tokens in enumerate(encoded, 1):
        check_prompt(tokens, Limits(positions, vocabulary), f"prompt {n}")
    return encoded


def _sampling(options: argparse.Namespace) -> Sampling:
    given = {
        name: number(getattr(options, name), kind, "--" + name.replace("_", "-"))
        for name, (kind, _) in SAMPLING.items()
        if getattr(options, name) is not None
    }
    try:
        return Sampling(**given)  # type: ignore[arg-type]
    except UserError as error:
        raise UserError(f"--{str(error).removeprefix('sampling.').replace('_', '-', 2)}") from None


def _seeded(sampling: Sampling, prompt: int) -> Sampling:
    """Return how a prompt is sampled: each has a seed of its own."""
    seed = secrets.randbits(63) if sampling.seed is None else sampling.seed + prompt
    return Sampling(**{**vars(sampling), "seed": seed})


# ---- what is done --------------------------------------------------------------------------------
Write = Callable[[Request], tuple[Iterator[list["Written"]], Callable[[], dict[str, int]]]]
"""This begins a text; it returns its tokens as they come, and what counts the forwards."""


def _writer(task: _Task, dtype: Any) -> Write:
    """Load the models and return what writes a text."""
    from flowspec.host.reader import Reader, Whole
    from flowspec.host.speculative import Keyed, Rejection, write

    vocabulary = read_config(task.target)["vocab_size"]
    target = Whole.load(task.target, dtype, "cpu", vocabulary)
    draft = Whole.load(task.draft, dtype, "cpu", vocabulary) if task.draft else None

    def begin(request: Request):
        sampling, readers = request.sampling, [Reader(one) for one in (target, draft) if one]
        keyed = task.rule == "keyed" or draft is None or sampling.temperature == 0
        rule = Keyed(sampling, target.vocabulary) if keyed else Rejection(sampling)
        made = write(request, rule, readers[0], readers[1] if draft else None, task.gamma)
        names = ("target_forwards", "draft_forwards")
        return made, lambda: {n: r.forwards for n, r in zip(names, readers, strict=False)}

    return begin


def _one(
    task: _Task, request: Request, write: Write, options: argparse.Namespace
) -> dict[str, Any]:
    """Write one text, show it, and return what is known of it."""
    from rich.console import Console
    from rich.text import Text as Coloured

    console = Console(highlight=False, soft_wrap=True)
    console.print(task.text.decode(request.prompt), end="", markup=False)
    stream = TextStream(task.text.tokenizer, prompt=request.prompt)
    begun = time.perf_counter()
    first, tokens, origins = begun, list[int](), Counter[str]()
    made, forwards = write(request)
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
