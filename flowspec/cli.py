"""Sub-commands: read the command line, call what does the work, print, exit. Decides nothing.

`run` and `verify` are started twice: first as the launcher, which checks all it can without importing torch, then by
torchrun as each rank.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from flowspec.config import Config
from flowspec.core.request import need
from flowspec.errors import RankLost, UserError
from flowspec.launcher import QUIET, is_rank, launch
from flowspec.models.split import Parser
from flowspec.options import (
    DEMO,
    DEMO_PROMPT,
    add_bench,
    add_shared,
    benchmark_prompts,
    check_bench,
    configuration,
    given_prompts,
    split_demo,
)
from flowspec.output import command, open_standard_streams, speaking
from flowspec.version import __version__

if TYPE_CHECKING:
    from flowspec.engine import Engine

LET_RANK_0_SPEAK = 10.0
"""seconds, for a rank that torchrun started and that was told something wrong: rank 0 has read the same configuration"""
COMMANDS = {
    "run": "generate text over the ring of stages",
    "verify": "prove that speculation changes no token",
    "bench": "compare methods on the same prompts in one call (bench compare CONFIG)",
    "simulate": "predict tokens/s of any ring and method in virtual time",
    "trace": "say where the time of a traced run went, and draw it",
    "split": "cut a checkpoint into a file a stage (split_models.py)",
}
ALONE = {
    "split": "flowspec.models.split",
    "simulate": "flowspec.bench.simulate",
    "trace": "flowspec.bench.timeline",
}
"""commands of one process, and the modules whose `main(words)` they are; the others run on a ring of ranks"""


def _top_parser() -> argparse.ArgumentParser:
    listing = "\n".join(f"  {name:<8} {what}" for name, what in COMMANDS.items())
    top = Parser(
        prog="flowspec",
        description="One request to a large language model, fast, on several small devices.",
        epilog=f"commands (each with its own --help):\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"flowspec {__version__}")
    top.add_argument("command", choices=COMMANDS, metavar="command")
    return top


def _parser(command: str) -> argparse.ArgumentParser:
    """Of a command that runs on a ring."""
    parser = Parser(prog=f"flowspec {command}", description=_ABOUT[command])
    add_shared(parser)
    if command == "bench":
        add_bench(parser)
    if command == "verify":
        parser.add_argument("--reference", metavar="DIR", help="the unsplit model (it must fit in rank 0's memory): compare with it, too")
    if command == "run":
        parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
        parser.add_argument("--chat", action="store_true", help="hold a conversation in the terminal")
        parser.add_argument("--explain", action="store_true", help="after each text: what was chosen (rows, segments, speculation) and why")
        parser.add_argument("--json", metavar="FILE", help="write one result object a line, a prompt each")
    return parser


_ABOUT = {
    "run": "Generate text over the ring of stages.",
    "verify": """Replay prompts with the configured method and with plain decoding, greedy and sampled, and say whether the tokens are
identical; at a divergence: where, which tokens, how close the target's choice was, and so whether it is a numeric tie or a bug. That
compares the ring with itself. With --reference DIR the texts are also compared, token by token, with what the unsplit model says.""",
    "bench": """bench compare CONFIG: all methods on the same prompts, interleaved and in shuffled order, with what the simulator
predicts beside what was measured.""",
}


@command
def main(argv: Sequence[str]) -> int:
    open_standard_streams()
    code = QUIET
    with speaking():
        code = _run(list(argv))
    return code


def _run(argv: list[str]) -> int:
    command = _top_parser().parse_args(argv[:1]).command
    if command in ALONE:
        return importlib.import_module(ALONE[command]).main(argv[1:])
    options = _parser(command).parse_intermixed_args(argv[1:])
    options.command, options.given = command, argv[1:]
    if command == "bench":
        need(options.words[:1] == ["compare"], "bench knows one thing to do: flowspec bench compare CONFIG ...")
        options.words = options.words[1:]
    return _rank(options) if is_rank() else _launch(options, argv)


# ---- as the launcher -------------------------------------------------------------------------------
def _launch(options: argparse.Namespace, argv: list[str]) -> int:
    from flowspec.preflight import check_prompt, check_reference, check_run, check_writable
    from flowspec.text import Text

    path, config = configuration(options)
    if options.command == "bench":
        check_bench(options, config)
    split_demo(config)
    manifest = check_run(config)
    text = Text(manifest.folder(0))
    for number, prompt in enumerate(_prompts(options, path, config), 1):
        need(prompt != "", f"prompt {number} is empty: give at least one token of text")
        need(not any("\ud800" <= c <= "\udfff" for c in prompt), f"prompt {number} is not valid UTF-8")
        check_prompt(text.encode(prompt), manifest, f"prompt {number}")
    if getattr(options, "reference", None) is not None:
        check_reference(options.reference, manifest, config.dtype)
    check_writable(getattr(options, "json", None))
    check_writable(str(config.trace_path) if config.trace else None, "trace")
    return launch(argv, manifest.topology.world_size)


def _prompts(options: argparse.Namespace, path: Path, config: Config) -> list[str]:
    if options.command == "bench":
        return benchmark_prompts(options)
    given = given_prompts(options)
    if given or getattr(options, "chat", False):
        return given
    need(path == DEMO, "no prompt: give --prompt TEXT or --prompt-file FILE" + (" or --chat" if options.command == "run" else ""))
    return [DEMO_PROMPT]


# ---- as a rank -------------------------------------------------------------------------------------
def _rank(options: argparse.Namespace) -> NoReturn:
    from flowspec.runtime.process import launched, leave, own_name, report

    rank = os.environ["RANK"]
    place = "rank0" if rank == "0" else f"rank{rank}/stage{rank}"
    if rank != "0":
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # torchrun passes Ctrl-C to all; rank 0 answers for them
    logging.basicConfig(level=options.log_level.upper(), format=f"[{place}] %(levelname)s %(name)s: %(message)s")
    code = 0
    try:
        code = _serve(options)
    except UserError as error:
        if rank != "0" and not launched():
            time.sleep(LET_RANK_0_SPEAK)  # it most likely fails for the same reason; torchrun ends us as soon as it has
        report(str(error), code := 2)
    except RankLost as error:
        report(str(error), code := 1)
    except KeyboardInterrupt:
        code = 130
    except BaseException as error:
        traceback.print_exc()
        report(f"{own_name()} failed: {type(error).__name__}: {error}", code := 1)
    leave(code)


def _serve(options: argparse.Namespace) -> int:
    """This rank's part of the run; its exit code."""
    from flowspec.engine import Engine

    path, config = configuration(options)
    if getattr(options, "reference", None) is not None and os.environ["RANK"] == "0":
        from transformers import AutoModelForCausalLM  # noqa: F401 (takes seconds, in which a rank that has joined would be silent)
    engine = Engine.join(config)
    code = 0
    if engine.rank:
        engine.work()
    else:
        code = QUIET
        with speaking():
            code = _lead(engine, options, path, config)
    engine.close()  # not after a failure: then nobody is to be told that all is well
    if config.trace and not engine.rank:
        print(f"timeline: {config.trace_path} (python -m flowspec trace FILE, or https://ui.perfetto.dev)", file=sys.stderr)
    return code


def _lead(engine: Engine, options: argparse.Namespace, path: Path, config: Config) -> int:
    """Rank 0's part."""
    from flowspec import session
    from flowspec.runtime.process import report

    session.show_loading(engine)
    gc.freeze()  # what is loaded stays: the collector need not look at it again between two segments
    prompts = _prompts(options, path, config)
    if options.command == "bench":
        from flowspec.bench.compare import compare

        same = compare(engine, prompts, options)
        if not same:
            report("methods wrote different tokens: see above", 1)
        return 0 if same else 1
    if options.command == "verify":
        return _verify(engine, options, prompts, config)
    session.run(engine, prompts, options.stop, options.json, options.chat, options.explain)
    return 0


def _verify(engine: Engine, options: argparse.Namespace, prompts: Sequence[str], config: Config) -> int:
    from flowspec import lossless
    from flowspec.preflight import check_reference
    from flowspec.runtime.process import report

    reference = None
    if options.reference is not None:
        source = check_reference(options.reference, engine.manifest, config.dtype)
        reference = lossless.Reference(source.folder, engine.sums_in, (engine.manifest.dtype, engine.dtype_name))
    same = lossless.verify(engine, prompts, _settings(config), reference)
    if not same:
        report("the text is not what it should be: see above", 1)
    return 0 if same else 1


def _settings(config: Config) -> list[dict]:
    """Greedy, and the configured sampling with three seeds (temperature 0.8, top-p 0.9 where it is greedy)."""
    own = config.sampling
    sampled = {"temperature": own.temperature or 0.8, "top_p": own.top_p if own.temperature else 0.9}
    return [{"temperature": 0.0}, *({**sampled, "seed": seed} for seed in (1, 2, 3))]
