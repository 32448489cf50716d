"""A result file is written beside its name and gets the name when it is whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flowspec.errors import UserError


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """The path to write to; it becomes `path` afterwards. UserError when the disk or the folder does not allow it."""
    beside = Path(f"{path}.partial")
    try:
        yield beside
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
