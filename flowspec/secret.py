"""The run's secret: who has it may be a rank of the run.

It comes from the environment or from a file, never from a command line, which all users of a
machine see; and it is shown nowhere. Launchers make one for a run, unless they are given one."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from flowspec.errors import UserError, need

SECRET, FILE = "FLOWSPEC_SECRET", "FLOWSPEC_SECRET_FILE"
SHORTEST, LONGEST = 16, 4096
"""A secret has at least and at most so many bytes; proofs of a shorter one could be tried out."""


def own_secret() -> bytes:
    """Return the secret of this process's run; it is empty if none is set.

    Raise UserError for one that is no secret, or for a file that others may read."""
    text, path = os.environ.get(SECRET), os.environ.get(FILE)
    need(not (text and path), f"{SECRET} and {FILE} are both set: give one of them")
    if path:
        return _fit(_read(Path(path)), f"{FILE} {path}")
    return _fit(os.fsencode(text), SECRET) if text else b""


def secret_for_run() -> str:
    """Return what a launcher gives its ranks as FLOWSPEC_SECRET: its own secret, or a new one."""
    return os.fsdecode(own_secret()) or secrets.token_hex(32)


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(LONGEST + 1)
    except OSError as error:
        raise UserError(f"{FILE} {path} cannot be read: {error.strerror}") from None
    need(
        not mode & (stat.S_IRWXG | stat.S_IRWXO),
        f"{FILE} {path} is open to other users: chmod 600 it, and make a new secret",
    )
    return text


def _fit(text: bytes, what: str) -> bytes:
    secret = text.strip()
    need(
        SHORTEST <= len(secret) <= LONGEST and b"\0" not in secret,
        f"{what} must have {SHORTEST} to {LONGEST} bytes, none of them 0: `openssl rand -hex 32` "
        "makes one",
    )
    return secret
