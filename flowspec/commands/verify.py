"""`flowspec verify` proves, here and now, that speculation changes no token."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec.commands.options import DEMO, DEMO_PROMPT, given_prompts
from flowspec.commands.ring import RingCommand
from flowspec.config import Config
from flowspec.errors import need
from flowspec.models.manifest import Manifest
from flowspec.preflight import check_reference

if TYPE_CHECKING:
    from flowspec.engine import Engine

ABOUT = """Replay prompts with the configured method and with plain decoding, greedy and sampled,
and say whether the tokens are identical; at a divergence: where, which tokens, how close the
target's choice was, and so whether it is a numeric tie or a bug. That compares the ring with
itself. With --reference DIR the texts are also compared, token by token, with what the unsplit
model says."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference",
        metavar="DIR",
        help="the unsplit model (it must fit in rank 0's memory): compare with it, too",
    )


def _prompts(options: argparse.Namespace, path: Path) -> list[str]:
    given = given_prompts(options)
    need(bool(given) or path == DEMO, "no prompt: give --prompt TEXT or --prompt-file FILE")
    return given or [DEMO_PROMPT]


def _check(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    if options.reference is not None:
        check_reference(options.reference, manifest, config.dtypes)


def _prepare(options: argparse.Namespace) -> None:
    if options.reference is not None:
        from transformers import AutoModelForCausalLM  # noqa: F401


def _lead(engine: Engine, options: argparse.Namespace, prompts: list[str]) -> int:
    from flowspec import lossless
    from flowspec.runtime.process import report

    reference = None
    if options.reference is not None:
        source = check_reference(options.reference, engine.manifest, engine.config.dtypes)
        reference = lossless.Reference(
            source.folder, engine.sums_in, (engine.manifest.dtype, engine.dtype_name)
        )
    same = lossless.verify(engine, prompts, _settings(engine.config), reference)
    if not same:
        report("the text is not what it should be: see above", 1)
    return 0 if same else 1


def _settings(config: Config) -> list[dict]:
    """Return greedy sampling and the configured sampling with three seeds.

    Where the configuration is greedy, temperature 0.8 and top-p 0.9 take its place."""
    own = config.sampling
    sampled = {
        "temperature": own.temperature or 0.8,
        "top_p": own.top_p if own.temperature else 0.9,
    }
    return [{"temperature": 0.0}, *({**sampled, "seed": seed} for seed in (1, 2, 3))]


main = RingCommand("verify", ABOUT, _add_arguments, _prompts, _lead, _check, _prepare).main
