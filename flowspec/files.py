"""This module says where files lie, and writes result files so that no half file has the name.

A result file is written beside its name and gets the name when it is whole.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO

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


def beside_of(path: str | os.PathLike[str], suffix: str = PARTIAL) -> Path:
    """Return where results are written before they get their name.

    A pipe or a device is written to as it is."""
    target = Path(path).resolve()
    special = target.exists() and not target.is_file()
    return target if special else target.with_name(target.name + suffix)


def _own(beside: Path, path: str | os.PathLike[str]) -> bool:
    """Return whether it lies beside `path`, and is no pipe or device that is written to itself."""
    return beside != Path(path).resolve()


def _claimed(path: str | os.PathLike[str], suffix: str = PARTIAL) -> Path:
    """Return `beside_of`, with an empty file of our own there, whatever had that name.

    A link that somebody laid there is not followed. Raise OSError if the file cannot be made."""
    beside = beside_of(path, suffix)
    if _own(beside, path):
        beside.unlink(missing_ok=True)
        os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    return beside


def _settle(beside: Path, path: str | os.PathLike[str]) -> None:
    """Give the name `path` to a file that was written beside it and is whole."""
    if _own(beside, path):
        os.replace(beside, Path(path).resolve())


@contextmanager
def kept_lines(path: str | os.PathLike[str] | None, flag: str) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes one line (without its end), which survives an interruption.

    The lines lie beside `path`, and become it when all are there; None writes nothing. Raise
    UserError, which names the flag that the path came from, if the disk takes no more."""
    if path is None:
        yield lambda line: None
        return
    with _naming(f"{flag}: cannot write {path}"):
        beside = _claimed(path)
    with open(beside, "w") as file:
        yield lambda line: _add_line(file, line + "\n", flag)
    with _naming(f"{flag}: cannot write {path}"):
        _settle(beside, path)


@contextmanager
def _naming(what: str) -> Iterator[None]:
    """Turn an OSError into a UserError that begins with `what`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{what}: {error.strerror}") from None


def _add_line(file: TextIO, line: str, flag: str) -> None:
    try:
        file.write(line)
        file.flush()
    except OSError as error:
        with suppress(OSError):  # the disk refuses what is buffered once more
            file.close()
        told = f"cannot write {file.name}: {error.strerror}; what it holds so far is kept"
        raise UserError(f"{flag}: {told}") from None


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield the path to write to; the file there becomes `path` afterwards, whole or not at all.

    Each process and thread has a file of its own, and the last one to be done wins. Raise UserError
    if the disk or the folder does not allow it."""
    suffix = f"{PARTIAL}-{os.getpid()}-{threading.get_ident()}"
    with _naming(f"cannot write {path}"):
        beside = _claimed(path, suffix)
        try:
            yield beside
            _settle(beside, path)
        except BaseException:
            if _own(beside, path):
                with suppress(OSError):
                    beside.unlink()
            raise


# ---- what is gone on with ------------------------------------------------------------------------
def extended(path: str | os.PathLike[str], flag: str) -> BinaryIO:
    """Open a file of lines to go on with, without the line in which a kill cut it off.

    It is this process's alone until it is closed. Raise UserError, which begins with `flag`, if
    another process has it, and OSError if it cannot be written."""
    file = open(path, "a+b")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{flag}: another run is writing it") from None
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
    return file


def add_json(file: BinaryIO, value: Mapping[str, Any], flag: str) -> None:
    """Add a line to a file that was opened by `extended`; raise UserError if the disk is full."""
    try:
        file.write(json.dumps(value).encode() + b"\n")
        file.flush()
    except OSError as error:
        told = f"cannot write {file.name}: {error.strerror}; what it holds is kept"
        raise UserError(f"{flag}: {told}") from None


def whole_lines(path: Path) -> list[str]:
    """Return the lines of a file that have an end."""
    return path.read_text().split("\n")[:-1]


def begun_with(path: Path, asked: Mapping[str, Any], noted: Mapping[str, Any]) -> dict[str, Any]:
    """Note in a file what is asked for, or return what it said before, if that is something else.

    Both are plain values. What is `noted` beside is not compared. The result holds what was said
    by the names of what differs, and is empty if nothing does."""
    if not path.exists():
        with replacing(path) as beside:
            beside.write_text(json.dumps({**asked, **noted}, indent=1) + "\n")
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        raise UserError(f"{path} is not JSON, and says not what was begun: remove it") from None
    asked = json.loads(json.dumps(asked))
    return {name: found.get(name) for name in asked if found.get(name) != asked[name]}
