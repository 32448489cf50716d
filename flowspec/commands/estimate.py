"""`flowspec estimate acceptance|latency` measures a pair of local models, for simulators."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from flowspec.commands.options import count, number, numbers
from flowspec.core.request import Sampling
from flowspec.errors import need
from flowspec.estimates import Acceptance, Latency, to_line
from flowspec.files import kept_lines
from flowspec.models.hub import MODEL_FILES, local_folder
from flowspec.output import Parser
from flowspec.preflight import check_prompt, check_writable, read_prompts
from flowspec.text import Text, check_same_tokens, load_tokenizer

if TYPE_CHECKING:
    from flowspec.bench.estimate import Pair

ABOUT = {
    "acceptance": """How often the target accepts what the draft model drafts, along the target's
own texts: the fit of the geometric distribution with an interval of 95 % confidence, greedy and,
above temperature 0, by keyed coupling and by the classic rule.""",
    "latency": """What a forward of each model takes, over a prompt (time to first token) and over a
further token: medians, and from the 10th to the 90th percentile.""",
}
DTYPES = ("float32", "bfloat16", "float16")


def _parser() -> Parser:
    parser = Parser(prog="flowspec estimate", description="Measure a pair of local models.")
    ways = parser.add_subparsers(dest="what", required=True, metavar="acceptance|latency")
    for what, about in ABOUT.items():
        each = ways.add_parser(what, description=about)
        _add_arguments(each)
        if what == "acceptance":
            each.add_argument(
                "--temperatures",
                default="0,1",
                metavar="X,X",
                help="temperatures of both models; 0 is greedy (default 0,1)",
            )
            each.add_argument(
                "--seed", default="1", metavar="N", help="of the keyed noise (default 1)"
            )
        else:
            each.add_argument(
                "--repeats", default="3", metavar="N", help="texts of each prompt (default 3)"
            )
    return parser


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    for name in ("target", "draft"):
        parser.add_argument(
            f"--{name}", required=True, metavar="DIR", help=f"the checkpoint of the {name} model"
        )
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="FILE",
        help=".txt: a prompt a line; .jsonl: an object with `prompt` a line",
    )
    parser.add_argument("--prompts", metavar="N", help="use the first N prompts (default: all)")
    parser.add_argument(
        "--max-new-tokens", default="64", metavar="N", help="tokens of a text (default 64)"
    )
    parser.add_argument(
        "--dtype", default="float32", choices=DTYPES, help="of both models (default float32)"
    )
    parser.add_argument("--threads", metavar="N", help="threads to compute with (default: torch's)")
    parser.add_argument("--json", metavar="FILE", help="write a line an estimate, for simulators")


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    check_writable(options.json)
    ask = _acceptances if options.what == "acceptance" else _latencies
    measured: Iterable[Acceptance | Latency] = ask(options)
    with kept_lines(options.json, "--json") as keep:
        for estimate in measured:
            print(_in_words(estimate), flush=True)
            keep(to_line(estimate))
    return 0


# ---- what is measured ----------------------------------------------------------------------------
class Task(NamedTuple):
    """A task is what both commands need of the command line, checked and loaded."""

    pair: Pair
    prompts: list[tuple[int, ...]]
    positions: int
    """A text has at most so many tokens, prompt and all, in both models."""
    eos: frozenset[int]


def _task(options: argparse.Namespace, room: int) -> Task:
    """Return the task; each prompt must leave room for so many new tokens.

    Models are loaded when all else is right."""
    prompts = read_prompts(options.dataset, "--dataset")
    if options.prompts is not None:
        prompts = prompts[: _count(options, "prompts")]
    threads = None if options.threads is None else _count(options, "threads")
    folders = {
        side: local_folder(getattr(options, side), f"--{side}", MODEL_FILES)
        for side in ("target", "draft")
    }
    text = Text(folders["target"])
    check_same_tokens(text.tokenizer, load_tokenizer(folders["draft"]), f"--draft {options.draft}")
    from flowspec.bench.estimate import load_pair
    from flowspec.models.unsplit import Limits, read_limits

    taken = [read_limits(folder, f"--{side}") for side, folder in folders.items()]
    limits = Limits(*map(min, *taken))
    encoded = [text.encode(prompt) for prompt in prompts]
    for n, tokens in enumerate(encoded, 1):
        name = f"--dataset {options.dataset}: prompt {n}"
        check_prompt(tokens, limits, name)
        need(
            len(tokens) + room <= limits.max_positions,
            f"{name} has {len(tokens)} tokens; with {room} more they are above the "
            f"{limits.max_positions} that the models take: lower --max-new-tokens",
        )
    about = {"target": options.target, "draft": options.draft}
    pair = load_pair(folders["target"], folders["draft"], options.dtype, about, threads)
    return Task(pair, encoded, limits.max_positions, text.eos)


def _acceptances(options: argparse.Namespace) -> Iterator[Acceptance]:
    samplings = [
        Sampling(
            temperature=temperature,
            seed=int(number(options.seed, int, "--seed")),
            max_new_tokens=_count(options, "max_new_tokens"),
        )
        for temperature in numbers(options.temperatures, float, "--temperatures")
    ]
    task = _task(options, room=1)
    from flowspec.bench.estimate import acceptance

    return itertools.chain.from_iterable(
        acceptance(task.pair, task.prompts, sampling, task.positions, task.eos)
        for sampling in samplings
    )


def _latencies(options: argparse.Namespace) -> list[Latency]:
    new_tokens, repeats = _count(options, "max_new_tokens"), _count(options, "repeats")
    need(new_tokens > 1, "--max-new-tokens is 1: a further token is the second at least")
    task = _task(options, room=new_tokens)
    from flowspec.bench.estimate import latency

    return [latency(task.pair, task.prompts, new_tokens, repeats)]


def _count(options: argparse.Namespace, name: str) -> int:
    """Return the number of an option, which must be 1 or more."""
    return count(getattr(options, name), "--" + name.replace("_", "-"))


# ---- what is shown -------------------------------------------------------------------------------
def _in_words(estimate: Acceptance | Latency) -> str:
    if isinstance(estimate, Acceptance):
        return "\n".join(_acceptance_lines(estimate))
    return "\n".join(_latency_lines(estimate))


def _acceptance_lines(found: Acceptance) -> Iterator[str]:
    at = "" if found.rule == "greedy" else f", T = {found.temperature:g}"
    yield (
        f"{found.rule}{at}: acceptance {found.acceptance:.3f} ({found.low:.3f}..{found.high:.3f}); "
        f"{found.accepted:.0f} of {found.accepted + found.rejected:.0f} tokens, {found.prompts} "
        f"prompts, worth {found.worth:.0f} independent tokens"
    )
    if found.lengths:
        runs = (
            f"{_named(first, last)}: {observed} ({expected:.1f})"
            for first, last, observed, expected in found.lengths
        )
        yield f"  rejected after N tokens, (if geometric): {', '.join(runs)}; {found.censored} cut off"
    if found.p_value is not None:
        p = "< 0.01" if found.p_value < 0.01 else f"= {found.p_value:.2f}"
        yield f"  were runs geometric, they would lie so far from what is expected with p {p}"


def _named(first: int, last: int | None) -> str:
    if last is None:
        return f"{first} and more"
    return f"{first}" if first == last else f"{first}-{last}"


def _latency_lines(found: Latency) -> Iterator[str]:
    yield (
        f"{found.prompts} prompts of {found.prompt_tokens:g} tokens x {found.repeats}, "
        f"{found.max_new_tokens} new tokens, {found.dtype}, threads: {found.threads}; "
        "ms, median (10th..90th percentile)"
    )
    for side in ("target", "draft"):
        first, further = (_time(found, name) for name in (f"{side}_first", side))
        yield f"  {side}: {first} the first token, {further} a further one"


def _time(found: Latency, name: str) -> str:
    low, high = getattr(found, f"{name}_range_ms")
    return f"{getattr(found, f'{name}_ms'):.2f} ({low:.2f}..{high:.2f})"
