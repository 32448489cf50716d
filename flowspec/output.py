"""This module ends a command: with an exit code and a last line.

It also deals with a standard output that is closed, unread or full.
"""

from __future__ import annotations

import argparse
import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from flowspec.errors import RankLost, UserError

Command = Callable[[Sequence[str]], int]
TAKES_NO_MORE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)

WITHOUT = 75
"""A rank of a target server ends with this exit code if the run goes on without its server."""


class Parser(argparse.ArgumentParser):
    """A parser's errors are one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def command(main: Command) -> Callable[..., int]:
    """Return a command's `main(argv) -> exit code` that turns errors into exit codes.

    Bad input becomes one line on stderr and exit code 2, a lost rank one line and 1, and Ctrl-C one
    line and 130."""

    @functools.wraps(main)
    def ended(argv: Sequence[str] | None = None) -> int:
        try:
            return main(sys.argv[1:] if argv is None else argv)
        except (UserError, RankLost) as error:
            print(f"flowspec: {error}", file=sys.stderr)
            return 2 if isinstance(error, UserError) else 1
        except KeyboardInterrupt:
            print("flowspec: interrupted", file=sys.stderr)
            return 130

    return ended


def open_standard_streams() -> None:
    """Lead the streams that were closed when the process began to the null device.

    So no other file gets their numbers."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            if null != number:
                os.close(null)
            os.set_inheritable(number, True)
            setattr(sys, name, os.fdopen(number, mode))


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Let a plain kill clean up as Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def speaking() -> Iterator[None]:
    """End quietly what is done inside once whoever reads the output has enough.

    Raise UserError if the output takes no more."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        _give_up()
    except OSError as error:
        if error.errno not in TAKES_NO_MORE:
            raise
        _give_up()
        raise UserError(f"cannot write the output: {error.strerror}") from None


def _give_up() -> None:
    """Lead what is still buffered to the null device, so that it cannot fail again at the end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)
