"""`flowspec serve` answers OpenAI's HTTP interface over the ring of stages."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from flowspec.commands.options import configuration, count, given_prompts, number
from flowspec.commands.ring import RingCommand
from flowspec.commands.run import restarts
from flowspec.config import Config
from flowspec.errors import UserError, need
from flowspec.models.manifest import Manifest
from flowspec.output import sigterm_interrupts

if TYPE_CHECKING:
    from flowspec.engine import Engine
    from flowspec.http.settings import Settings

KEY = "FLOWSPEC_API_KEY"
"""This variable of the environment holds the key, if no option does."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen at (127.0.0.1: this host alone)"
    )
    parser.add_argument("--port", default="8000", help="0 takes a free one (8000)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help=f"what clients must show; who lists processes sees it: better set {KEY} in the "
        "environment, or give --api-key-file",
    )
    parser.add_argument("--api-key-file", metavar="FILE", help="a file whose first line is the key")
    parser.add_argument(
        "--max-requests",
        metavar="N",
        default="64",
        help="texts in the ring or waiting for room in it; beyond them clients hear 429 (64)",
    )
    parser.add_argument(
        "--metrics-compat", choices=["vllm"], help="give /metrics the names that vLLM has"
    )
    parser.add_argument(
        "--log-requests", action="store_true", help="a line of JSON a request, on standard error"
    )
    parser.add_argument(
        "--restart",
        metavar="N",
        help="if a rank is lost, start all again, at most N times; requests fail meanwhile (0)",
    )


def _prompts(options: argparse.Namespace, path: Path) -> list[str]:
    need(not given_prompts(options), "serve takes no prompts: clients send them")
    return []


def _key(options: argparse.Namespace) -> str | None:
    """Return the key that clients must show, or None."""
    given = [options.api_key, options.api_key_file]
    need(None in given, "--api-key and --api-key-file: give one of them")
    key, name = os.environ.get(KEY), KEY
    if options.api_key is not None:
        key, name = options.api_key, "--api-key"
    if options.api_key_file is not None:
        name = f"--api-key-file {options.api_key_file}"
        try:
            key = (Path(options.api_key_file).read_text().splitlines() or [""])[0].strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: cannot read it: {error}") from None
    need(key is None or key.strip() != "", f"{name} holds an empty key")
    return key


def _settings(options: argparse.Namespace) -> Settings:
    for name in ("fastapi", "uvicorn"):
        need(
            importlib.util.find_spec(name) is not None,
            f"{name} is not installed: .venv/bin/pip install -r requirements_serve.txt (the extra "
            "`serve`)",
        )
    from flowspec.http.settings import Settings

    port = int(number(options.port, int, "--port"))
    need(0 <= port < 1 << 16, f"--port is {port}: it must lie in [0, 65535]")
    return Settings(
        name=configuration(options)[1].name,
        host=options.host,
        port=port,
        key=_key(options),
        most_texts=count(options.max_requests, "--max-requests"),
        compat=options.metrics_compat,
        log=options.log_requests,
    )


def _check(options: argparse.Namespace, config: Config, manifest: Manifest) -> None:
    restarts(options)
    _settings(options)


def _prepare(options: argparse.Namespace) -> None:
    from flowspec.http.server import Server
    from flowspec.http.settings import warn_if_open

    settings = _settings(options)
    options.server = Server(settings)
    warn_if_open(settings)


def _lead(engine: Engine, options: argparse.Namespace, prompts: list[str]) -> int:
    server = options.server
    with sigterm_interrupts():
        server.attach(engine)
        print(
            f"flowspec: {server.calls.name} is served at {server.url}/v1",
            file=sys.stderr,
            flush=True,
        )
        server.wait(engine)
    return 0


SERVE = RingCommand(
    "serve",
    "Serve the model by OpenAI's HTTP interface, from rank 0 of the ring of stages.",
    _add_arguments,
    _prompts,
    _lead,
    _check,
    _prepare,
)
main = SERVE.main
