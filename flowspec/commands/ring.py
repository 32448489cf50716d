"""The commands that run on a ring of ranks share this: `run`, `serve`, `verify` and `bench`.

Such a command is started twice: first as the launcher, which checks all that can be checked without
importing torch, then by torchrun as each rank. Over several hosts it is started as the ranks alone
(launch/run.py)."""

from __future__ import annotations

import argparse
import gc
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flowspec.commands.options import add_shared, configuration, split_demo
from flowspec.config import Config
from flowspec.errors import RankLost, UserError, need
from flowspec.launcher import QUIET, guard, is_rank, launch
from flowspec.models.manifest import Manifest
from flowspec.output import Parser, speaking

if TYPE_CHECKING:
    from flowspec.engine import Engine

LET_RANK_0_SPEAK = 10.0
"""A rank that torchrun started waits so many seconds when something is wrong. Rank 0, which has
read the same configuration, speaks meanwhile."""


@dataclass(frozen=True)
class RingCommand:
    """This is what tells such commands apart.

    `main(words)` runs one as a whole."""

    name: str
    about: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    prompts: Callable[[argparse.Namespace, Path], list[str]]
    """This returns the prompts, given the options and the configuration's path."""
    lead: Callable[[Engine, argparse.Namespace, list[str]], int]
    """This is rank 0's part, once all ranks are loaded; it returns the exit code."""
    check: Callable[[argparse.Namespace, Config, Manifest], None]
    """This raises UserError for what is wrong with the command's own options, before any rank
    starts."""
    prepare: Callable[[argparse.Namespace], None] = lambda options: None
    """Rank 0 calls this before it joins the others: it takes seconds, in which a rank that has
    joined would be silent."""

    def main(self, words: Sequence[str]) -> int:
        options = self.parser(self.name, self.about).parse_intermixed_args(words)
        options.given = list(words)
        return _rank(self, options) if is_rank() else _launch(self, options)

    def parser(self, name: str, about: str) -> Parser:
        """Return the parser of this command, or of one that takes the same words."""
        parser = Parser(prog=f"flowspec {name}", description=about)
        add_shared(parser)
        parser.set_defaults(restart="0")
        self.add_arguments(parser)
        return parser

    def checked(
        self, options: argparse.Namespace, path: Path, config: Config
    ) -> tuple[Manifest, list[str]]:
        """Return the manifest and the prompts of a run with the configuration of this file.

        Raise UserError for all that can be found wrong before any rank starts."""
        from flowspec.preflight import check_prompt, check_run, check_writable
        from flowspec.text import Text

        split_demo(config)
        manifest = check_run(config)
        self.check(options, config, manifest)
        text, prompts = Text(manifest.folder(0)), self.prompts(options, path)
        for number, prompt in enumerate(prompts, 1):
            need(prompt != "", f"prompt {number} is empty: give at least one token of text")
            need(
                not any("\ud800" <= c <= "\udfff" for c in prompt),
                f"prompt {number} is not valid UTF-8",
            )
            check_prompt(text.encode(prompt), manifest, f"prompt {number}")
        check_writable(str(config.trace_path) if config.trace else None, "trace")
        return manifest, prompts


# ---- as the launcher -----------------------------------------------------------------------------
def _launch(command: RingCommand, options: argparse.Namespace) -> int:
    manifest, _ = command.checked(options, *configuration(options))
    words = [*command.name.split(), *options.given]
    return launch(words, manifest.topology, int(options.restart))


# ---- as a rank -----------------------------------------------------------------------------------
def _rank(command: RingCommand, options: argparse.Namespace) -> NoReturn:
    rank = os.environ["RANK"]
    if rank != "0" and (code := _guarded(options)) is not None:
        os._exit(code)
    from flowspec.runtime.process import launched, leave, own_name, report

    place = "rank0" if rank == "0" else f"rank{rank}/stage{rank}"
    if rank != "0":
        signal.signal(
            signal.SIGINT, signal.SIG_IGN
        )  # torchrun passes Ctrl-C to all; rank 0 answers for them
    logging.basicConfig(
        level=options.log_level.upper(), format=f"[{place}] %(levelname)s %(name)s: %(message)s"
    )
    code = 0
    try:
        code = _serve(command, options)
    except UserError as error:
        if rank != "0" and not launched():
            time.sleep(
                LET_RANK_0_SPEAK
            )  # it most likely fails for the same reason; torchrun ends us as soon as it has
        report(str(error), code := 2)
    except RankLost as error:
        report(str(error), code := 1)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        traceback.print_exc()
        report(f"{own_name()} failed: {type(error).__name__}: {error}", code := 1)
    leave(code)


def _guarded(options: argparse.Namespace) -> int | None:
    """Return the exit code of this rank as a child, if a run can do without it."""
    from flowspec.preflight import manifest_of

    try:
        topology = manifest_of(configuration(options)[1]).topology
    except UserError:  # to be said where it is said of every rank
        return None
    return guard() if topology.spare(int(os.environ["RANK"])) else None


def _serve(command: RingCommand, options: argparse.Namespace) -> int:
    """Do this rank's part of the run; return its exit code."""
    path, config = configuration(options)
    if os.environ["RANK"] != "0":
        from flowspec.rank import serve_as

        serve_as(config)
        return 0
    from flowspec.engine import Engine

    command.prepare(options)
    engine, code = Engine.join(config), QUIET
    with speaking():
        code = _lead(engine, command, options, path)
    engine.close()  # not after a failure: then nobody is to be told that all is well
    if config.trace:
        print(
            f"timeline: {config.trace_path} (python -m flowspec trace FILE, or "
            "https://ui.perfetto.dev)",
            file=sys.stderr,
        )
    return code


def _lead(engine: Engine, command: RingCommand, options: argparse.Namespace, path: Path) -> int:
    from flowspec.commands.session import show_loading

    show_loading(engine)
    # what is loaded stays: the collector need not look at it again between two segments
    gc.freeze()
    return command.lead(engine, options, command.prompts(options, path))
