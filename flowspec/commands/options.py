"""The commands that take a configuration share this part of the command line.

This module imports no torch."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowspec.config import Config, load_config
from flowspec.core.policies import ALL_METHODS
from flowspec.errors import UserError, need
from flowspec.files import BUILD, CHECKOUT, SHIPPED
from flowspec.preflight import read_prompts
from flowspec.version import __version__

DEMO = SHIPPED / "configs" / "demo.yaml"
DEMO_PROMPT = "import os\n\n\ndef read_lines(path):"
DEMO_PROMPTS = SHIPPED / "demo" / "prompts.jsonl"
SAMPLING = {
    "temperature": (float, "0 is greedy"),
    "top_p": (float, "keep the likeliest tokens until their probability reaches X"),
    "top_k": (int, "keep the N likeliest tokens; 0 keeps all"),
    "min_p": (float, "keep tokens of at least X times the likeliest one's probability"),
    "presence_penalty": (float, "taken from the logits of tokens that are in the new text"),
    "frequency_penalty": (float, "the same, for each time that a token is there"),
    "repetition_penalty": (float, "logits of tokens of prompt and new text shrink by this factor"),
    "logit_bias": (dict, "added to the logits of these tokens, such as 13:-100,50:2.5"),
    "logprobs": (
        int,
        "with --json: log-probabilities of tokens and of the N likeliest beside them",
    ),
    "seed": (int, "of the keyed noise; the same seed writes the same text with every method"),
    "max_new_tokens": (int, "the limit of new tokens"),
}
"""This maps a flag to its type and its help."""
_METAVARS = {int: "N", float: "X", dict: "ID:X,ID:X"}


def add_shared(parser: argparse.ArgumentParser) -> None:
    """Add CONFIG, overrides, prompts, the method and how it samples."""
    parser.add_argument(
        "words",
        nargs="*",
        metavar="CONFIG | key=value",
        help="a YAML file (default: the demo) and overrides of its keys",
    )
    add_prompts(parser)
    parser.add_argument("--method", help=" ".join(ALL_METHODS))
    parser.add_argument("--version", action="version", version=f"flowspec {__version__}")
    add_sampling(parser)
    parser.add_argument(
        "--log-level", default="warning", choices=["debug", "info", "warning", "error"]
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    """Add what `given_prompts` reads."""
    parser.add_argument(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the text to continue; may be given several times",
    )
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help=".txt: a prompt a line; .jsonl: an object with `prompt` a line",
    )


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add what `given_sampling` reads."""
    for name, (kind, what) in SAMPLING.items():
        parser.add_argument("--" + name.replace("_", "-"), metavar=_METAVARS[kind], help=what)


def given_sampling(options: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of Sampling that flags give."""
    return {
        name: (_biases if kind is dict else number)(text, kind, "--" + name.replace("_", "-"))
        for name, (kind, _) in SAMPLING.items()
        if (text := getattr(options, name)) is not None
    }


def _biases(text: str, kind: type, flag: str) -> dict[int, float]:
    """Return the tokens of a list with commas, and what is added to the logit of each."""
    found = {}
    for part in text.split(","):
        token, colon, bias = part.partition(":")
        need(
            bool(colon),
            f"{flag} is {text!r}: it must be tokens with biases, such as 13:-100,50:2.5",
        )
        found[int(number(token, int, flag))] = float(number(bias, float, flag))
    return found


def configuration(options: argparse.Namespace) -> tuple[Path, Config]:
    """Return the configuration file and what it says, with flags and overrides applied."""
    files = [word for word in options.words if "=" not in word]
    need(len(files) <= 1, f"one configuration at a time: {' and '.join(files)} were given")
    path = Path(files[0]).resolve() if files else DEMO
    return path, load_config(path, overrides_of(options, path))


def overrides_of(options: argparse.Namespace, path: Path) -> list[str]:
    """Return what overrides keys of a configuration: words key=value, and flags."""
    # an installed package may lie where nothing can be written: its demo is split elsewhere
    overrides = [] if CHECKOUT or path != DEMO else [f"stages={BUILD / 'demo'}"]
    overrides += [word for word in options.words if "=" in word]
    overrides += [f"method={options.method}"] if options.method is not None else []
    overrides += [f"sampling.{name}={value}" for name, value in given_sampling(options).items()]
    return overrides


def count(text: str, flag: str) -> int:
    """Return the number of a flag, which must be 1 or more."""
    found = int(number(text, int, flag))
    need(found >= 1, f"{flag} is {found}: it must be at least 1")
    return found


def number(text: str, kind: type, flag: str) -> int | float:
    try:
        return kind(text)
    except ValueError:
        raise UserError(
            f"{flag} is {text!r}: it must be {'a whole number' if kind is int else 'a number'}"
        ) from None


def numbers(text: str, kind: type, flag: str) -> list:
    """Return the numbers of a list with commas."""
    return [number(part, kind, flag) for part in text.split(",")]


def methods(text: str, known: Iterable[str], flag: str = "--methods") -> list[str]:
    """Return the methods of a list with commas; each must be known."""
    known, chosen = list(known), text.split(",")
    need(len(set(chosen)) == len(chosen), f"{flag}: {text} names something twice")
    for name in chosen:
        need(name in known, f"{flag}: {name!r} is not known here: choose among {', '.join(known)}")
    return chosen


def temperatures_of(options: argparse.Namespace, config: Config) -> list[float]:
    """Return the temperatures that --temperatures lists, or else the configured one."""
    return (
        numbers(options.temperatures, float, "--temperatures")
        if options.temperatures
        else [config.sampling.temperature]
    )


def given_prompts(options: argparse.Namespace) -> list[str]:
    return options.prompt + (read_prompts(options.prompt_file) if options.prompt_file else [])


def benchmark_prompts(options: argparse.Namespace) -> list[str]:
    """Return the given prompts, or else the demo's; --prompts limits how many."""
    prompts = given_prompts(options) or read_prompts(str(DEMO_PROMPTS))
    most = number(options.prompts, int, "--prompts")
    need(most >= 1, f"--prompts is {most}: use at least one")
    return prompts[: int(most)]


# ---- the demo model ------------------------------------------------------------------------------
def demo_stages(config: Config) -> int | None:
    """Return in how many stages the configuration wants the shipped target; None for another model.

    The shipped target is demo, and demo_sN in BUILD."""
    folder = config.stages_path.resolve()
    found = (
        re.fullmatch(r"demo(?:_s(\d+))?", folder.name) if folder.parent == BUILD.resolve() else None
    )
    return int(found[1] or 2) if found else None


def split_demo(config: Config) -> None:
    """Split the shipped target if that was not done since it last changed."""
    from flowspec.models.split import split

    stages, source, made = (
        demo_stages(config),
        SHIPPED / "demo" / "target",
        config.stages_path / "stages.yaml",
    )
    if stages and (
        not made.exists() or made.stat().st_mtime < (source / "model.safetensors").stat().st_mtime
    ):
        split(str(source), stages, config.stages_path)
