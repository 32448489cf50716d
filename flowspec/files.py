"""This module says where files lie, and writes result files so that no half file has the name.

A result file is written beside its name and gets the name when it is whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from flowspec.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
"""This is the checkout, or the folder of packages in which flowspec is installed."""
CHECKOUT = (ROOT / "demo" / "target").is_dir()
SHIPPED = ROOT if CHECKOUT else ROOT / "flowspec" / "shipped"
"""This folder holds `demo` and `configs`."""
BUILD = (
    ROOT / "build"
    if CHECKOUT
    else Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "flowspec"
)
"""This folder is for what commands make without being asked for it."""
PARTIAL = ".partial"
"""The name of a result file that is not complete yet ends in this."""


def beside_of(path: str | os.PathLike[str]) -> Path:
    """Return where results are written before they get their name.

    A pipe or a device is written to as it is."""
    target = Path(path).resolve()
    special = target.exists() and not target.is_file()
    return target if special else target.with_name(target.name + PARTIAL)


def claimed(path: str | os.PathLike[str]) -> Path:
    """Return `beside_of`, with an empty file of our own there, whatever had that name.

    A link that somebody laid there is not followed. Raise OSError if the file cannot be made."""
    beside = beside_of(path)
    if beside.name.endswith(PARTIAL):
        beside.unlink(missing_ok=True)
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return beside


def settle(beside: Path) -> None:
    """Give its name to a file that was written beside it and is whole."""
    if beside.name.endswith(PARTIAL):
        os.replace(beside, beside.with_name(beside.name.removesuffix(PARTIAL)))


def add_line(file: TextIO, line: str, flag: str) -> None:
    """Write a line (its end included) that is to survive an interruption.

    Raise UserError, which names the flag that the file came from, if the disk takes no more."""
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        with suppress(OSError):  # the disk refuses what is buffered once more
            file.close()
        raise UserError(
            f"{flag}: cannot write {file.name}: {error.strerror}; what it holds so far is kept"
        ) from None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path to write to; the file there becomes `path` afterwards.

    Raise UserError if the disk or the folder does not allow it."""
    try:
        beside = claimed(path)
        yield beside
        settle(beside)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
