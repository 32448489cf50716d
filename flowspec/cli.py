"""Finds the sub-command (flowspec/commands/) and nothing else."""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib
from collections.abc import Sequence

from flowspec.commands import COMMANDS
from flowspec.launcher import QUIET
from flowspec.output import Parser, command, open_standard_streams, speaking
from flowspec.version import __version__


def _parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<8} {what}" for name, what in COMMANDS.items())
    parser = Parser(
        prog="flowspec",
        description="One request to a large language model, fast, on several small devices.",
        epilog=f"commands (each with its own --help):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flowspec {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="command")
    return parser


def _start_and_end_fast() -> None:
    """Let the collector of cycles leave alone what libraries define, which is hardly ever garbage.

    It would walk over all of it again and again while it is imported, and once more at the end."""
    gc.set_threshold(100_000)
    atexit.register(gc.freeze)


@command
def main(argv: Sequence[str]) -> int:
    open_standard_streams()
    _start_and_end_fast()
    code = QUIET
    with speaking():
        name = _parser().parse_args(argv[:1]).command
        code = importlib.import_module(f"flowspec.commands.{name}").main(argv[1:])
    return code
