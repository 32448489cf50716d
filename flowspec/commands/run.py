"""`flowspec run` generates text over the ring of stages."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec.commands.options import DEMO, DEMO_PROMPT, given_prompts, number
from flowspec.commands.ring import RingCommand
from flowspec.config import Config
from flowspec.errors import need
from flowspec.models.manifest import Manifest
from flowspec.preflight import check_writable

if TYPE_CHECKING:
    from flowspec.engine import Engine


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end before this text; may be given several times",
    )
    parser.add_argument("--chat", action="store_true", help="hold a conversation in the terminal")
    parser.add_argument(
        "--explain",
        action="store_true",
        help="after each text: what was chosen (rows, segments, speculation) and why",
    )
    parser.add_argument(
        "--restart",
        metavar="N",
        help="if a rank is lost, start all again, at most N times, and go on with the text (0)",
    )
    parser.add_argument(
        "--json", metavar="FILE", help="write one result object a line, a prompt each"
    )


def _prompts(options: argparse.Namespace, path: Path) -> list[str]:
    given = given_prompts(options)
    if given or options.chat:
        return given
    need(path == DEMO, "no prompt: give --prompt TEXT or --prompt-file FILE or --chat")
    return [DEMO_PROMPT]


def restarts(options: argparse.Namespace) -> int:
    """Return how often a run may be started again."""
    times = int(number(options.restart, int, "--restart"))
    need(times >= 0, f"--restart is {times}: it must be 0 or more")
    return times


def _check(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    check_writable(options.json)
    need(
        not (restarts(options) and options.chat),
        "--restart goes on with prompts, not with a conversation",
    )


def _lead(engine: Engine, options: argparse.Namespace, prompts: list[str]) -> int:
    from flowspec.commands import session

    session.run(engine, prompts, options.stop, options.json, options.chat, options.explain)
    return 0


RUN = RingCommand(
    "run", "Generate text over the ring of stages.", _add_arguments, _prompts, _lead, _check
)
main = RUN.main
