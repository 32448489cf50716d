"""What the commands that decode in one process share: the pair of models, and what is asked."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowspec.commands.options import (
    add_prompts,
    add_sampling,
    count,
    given_prompts,
    given_sampling,
)
from flowspec.commands.placing import add_offload, in_runs, placement_of
from flowspec.core.request import Request, Sampling
from flowspec.errors import UserError, need
from flowspec.models.families import read_config
from flowspec.models.hub import MODEL_FILES, local_folder
from flowspec.models.placement import Placement
from flowspec.preflight import check_prompt
from flowspec.text import Text, check_same_tokens, load_tokenizer

if TYPE_CHECKING:
    from flowspec.host.decoding import Pair
    from flowspec.host.reader import Whole

METHODS = {
    "ar": "a token a forward",
    "speculative": "a draft model guesses --gamma tokens, one forward of the target checks them",
    "specinfer": "it guesses a tree of --max-n-beams branches of --max-beam-len tokens",
    "specexec": "it guesses the --max-budget likeliest tokens of all trees of at most "
    "--max-beam-len levels",
}
SHAPES: dict[str, dict[str, int]] = {
    "ar": {},
    "speculative": {"gamma": 4},
    "specinfer": {"max_n_beams": 4, "max_beam_len": 8},
    "specexec": {"max_budget": 128, "max_n_beams": 32, "max_beam_len": 32},
}
"""This maps a method to the numbers that shape its guesses, with their defaults."""
RULES = {
    "rejection": "keep a guess with probability min(1, p / q), else draw from what is left of p "
    "(leviathan, chen): the target's distribution",
    "keyed": "draw with the same keyed noise on both sides and keep what is equal: the text of "
    "--method ar with the same seed",
}
SAME = {"leviathan": "rejection", "chen": "rejection"}
"""These papers' rules draw alike (flowspec/rejection.py)."""
DTYPES = ("float32", "bfloat16", "float16")


def add_pair(parser: argparse.ArgumentParser) -> None:
    """Add the two models, how guesses are judged, prompts, sampling, and what computes."""
    parser.add_argument("--target", required=True, metavar="DIR", help="the target's checkpoint")
    parser.add_argument("--draft", metavar="DIR", help="the draft model's; not for method ar")
    parser.add_argument(
        "--rule",
        choices=[*RULES, *SAME],
        metavar="RULE",
        help="; ".join(f"{name}: {what}" for name, what in RULES.items())
        + " (default rejection; method specexec is always keyed)",
    )
    shape = parser.add_argument_group("the shape of guesses")
    shape.add_argument("-K", "--gamma", metavar="N", help="guesses for a forward")
    shape.add_argument(
        "--max-n-beams",
        metavar="N",
        help="branches of the tree; with specexec: nodes that the draft model goes on from at once",
    )
    shape.add_argument("--max-beam-len", metavar="N", help="levels of the tree")
    shape.add_argument("--max-budget", metavar="N", help="nodes of the tree")
    shape.add_argument(
        "--as-published",
        action="store_true",
        help="method specexec: the likeliest tokens by the draft model's probabilities alone, "
        "where by default they are the likeliest with the noise that is known",
    )
    add_prompts(parser)
    add_sampling(parser)
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="(default float32)")
    parser.add_argument("--threads", metavar="N", help="threads to compute with (default: torch's)")
    add_offload(parser)


class Task(NamedTuple):
    """What the command line asks for, checked."""

    text: Text
    target: Path
    draft: Path | None
    prompts: list[tuple[int, ...]]
    sampling: Sampling
    positions: int
    """A text has at most so many tokens, prompt and all."""
    method: str
    rule: str
    shape: dict[str, int]
    """These are the numbers of SHAPES."""
    coupled: bool
    placement: Placement | None
    """The target's layers are there; None means on a CPU, like the draft model's."""

    @property
    def facts(self) -> dict[str, Any]:
        """Return what a result says of the placement."""
        where = self.placement and (self.placement.offload or "auto")
        return {"offload": where, "emulated": bool(self.placement and self.placement.emulated)}


def task_of(options: argparse.Namespace, method: str) -> Task:
    """Return what the command line asks for, with this method.

    Raise UserError, which names the flag, for what is wrong."""
    drafts = method != "ar"
    need(
        method == "specexec" or not options.as_published,
        f"--as-published is of no use to --method {method}",
    )
    need(drafts or options.draft is None, "--draft is of no use to --method ar: leave it out")
    need(not drafts or options.draft is not None, "--draft DIR is missing: it names a draft model")
    target = local_folder(options.target, "--target", MODEL_FILES)
    text, config = Text(target), read_config(target)
    positions, draft = config["max_position_embeddings"], None
    if drafts:
        draft = local_folder(options.draft, "--draft", MODEL_FILES)
        check_same_tokens(text.tokenizer, load_tokenizer(draft), f"--draft {options.draft}")
        positions = min(positions, read_config(draft)["max_position_embeddings"])
    return Task(
        text=text,
        target=target,
        draft=draft,
        prompts=_prompts(options, text, positions, config["vocab_size"]),
        sampling=_sampling(options, config["vocab_size"]),
        positions=positions,
        method=method,
        rule=_rule(options.rule, method),
        shape=_shape(options, method),
        coupled=not options.as_published,
        placement=placement_of(options),
    )


def _rule(asked: str | None, method: str) -> str:
    rule = SAME.get(asked or "", asked)
    need(
        method != "specexec" or rule in (None, "keyed"),
        f"--rule {asked}: method specexec draws the target's token once and keeps what is equal "
        "(keyed)",
    )
    return rule or ("keyed" if method == "specexec" else "rejection")


def _shape(options: argparse.Namespace, method: str) -> dict[str, int]:
    wanted = SHAPES[method]
    found = {}
    for name in dict.fromkeys(name for shape in SHAPES.values() for name in shape):
        flag, said = f"--{name.replace('_', '-')}", getattr(options, name)
        need(said is None or name in wanted, f"{flag} is of no use to --method {method}")
        if name in wanted:
            found[name] = wanted[name] if said is None else count(said, flag)
    return found


def _prompts(
    options: argparse.Namespace, text: Text, positions: int, vocabulary: int
) -> list[tuple[int, ...]]:
    from flowspec.models.unsplit import Limits

    said = given_prompts(options)
    need(bool(said), "no prompt: give --prompt TEXT or --prompt-file FILE")
    encoded = [text.encode(prompt) for prompt in said]
    for n, tokens in enumerate(encoded, 1):
        check_prompt(tokens, Limits(positions, vocabulary), f"prompt {n}")
    return encoded


def _sampling(options: argparse.Namespace, vocabulary: int) -> Sampling:
    given = given_sampling(options)
    try:
        sampling = Sampling(**given)
        sampling.check(vocabulary)
        return sampling
    except UserError as error:
        raise UserError(f"--{str(error).removeprefix('sampling.').replace('_', '-', 2)}") from None


def request_of(task: Task, prompt: tuple[int, ...], number: int, later: int = 0) -> Request:
    """Return the request for the number-th text; its seed is so much later than the asked one."""
    from flowspec.sampling import settled

    sampling = settled(task.sampling, task.positions - len(prompt), later)
    return Request(id=number, prompt=prompt, sampling=sampling, eos=task.text.eos)


def models_of(task: Task, dtype: str, threads: str | None) -> dict[str, Whole]:
    """Load the models that the command line names."""
    import torch

    from flowspec.host.reader import Whole

    if threads is not None:
        torch.set_num_threads(count(threads, "--threads"))
    vocabulary, kind = read_config(task.target)["vocab_size"], getattr(torch, dtype)
    placed, device = task.placement, "cpu"
    if placed:
        target = Whole.placed(task.target, kind, placed, vocabulary)
        device = str(target.model.device)
        if placed.offload is None:
            print(f"layers: {in_runs(target.places)}", file=sys.stderr)
    else:
        target = Whole.load(task.target, kind, device, vocabulary)
    models = {"target": target}
    if task.draft:
        models["draft"] = Whole.load(task.draft, kind, device, vocabulary)
    return models


def pair_of(task: Task, models: dict[str, Whole]) -> Pair:
    """Return the models with the task's method."""
    from flowspec.host.decoding import Pair
    from flowspec.host.trees import Branches, Grower, Likeliest

    shape = task.shape
    grower: Grower
    if "max_budget" in shape:
        grower = Likeliest(shape["max_budget"], shape["max_n_beams"], shape["max_beam_len"])
    elif "max_n_beams" in shape:
        grower = Branches(shape["max_n_beams"], shape["max_beam_len"])
    else:
        grower = Branches(1, shape.get("gamma", 0))
    return Pair(models, grower, task.rule, task.coupled)
