"""A list of prompts is shared by several processes, and gone on with where it was left.

Each process appends what it has finished to a part of its own, in a folder beside the output. The
parts outlive a kill; when all prompts are there, they become the output, in the prompts' order.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from flowspec.errors import UserError, need
from flowspec.files import replacing

WAIT = 0.2
"""Seconds between two looks at what the other processes have finished."""


class Parts:
    """Parts are the finished prompts of a list, by all processes."""

    def __init__(self, out: str, asked: Mapping[str, Any], prompts: int, rank: int, processes: int):
        """`asked` says what is to be written: parts of anything else are not gone on with.

        Raise UserError, which names --out, if the parts there are of another run or in use."""
        self._out, self._rank, self._processes = Path(out), rank, processes
        self._prompts = prompts
        self._folder = self._out.with_name(self._out.name + ".parts")
        need(not self._out.is_dir(), f"--out {out} is a folder: name a file")
        try:
            self._folder.mkdir(exist_ok=True)
            self._check(json.loads(json.dumps(asked)))
            self._file = self._own()
        except OSError as error:
            raise UserError(f"--out {out}: cannot write {self._folder}: {error.strerror}") from None

    def _check(self, asked: dict[str, Any]) -> None:
        said = self._folder / "asked.json"
        if not said.exists():
            with replacing(said) as beside:
                beside.write_text(json.dumps(asked))
            return
        found = json.loads(said.read_bytes())
        other = [name for name in asked if found.get(name) != asked[name]]
        need(
            not other,
            f"--out {self._out}: {self._folder} was begun with another {', '.join(other)}: ask for "
            "the same to go on, or remove that folder",
        )

    def _own(self) -> BinaryIO:
        """Return this process's part, without the line in which a kill cut it off."""
        file = open(self._folder / f"{self._rank}.jsonl", "a+b")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"--out {self._out}: another run is writing it") from None
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        return file

    def mine(self) -> list[int]:
        """Return which prompts this process has still to write.

        Every process takes each of so many, so all take different ones whenever they look."""
        done = self._finished()
        return [k for k in range(self._rank, self._prompts, self._processes) if k not in done]

    def keep(self, k: int, record: Mapping[str, Any]) -> None:
        """Keep what was written to the k-th prompt."""
        try:
            self._file.write(json.dumps({"prompt": k, **record}).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            told = f"cannot write {self._file.name}: {error.strerror}; what it holds is kept"
            raise UserError(f"--out {self._out}: {told}") from None

    def settle(self) -> None:
        """Make the parts the output; the first process does that, when all have done theirs."""
        self._file.close()
        if self._rank:
            return
        while len(done := self._finished()) < self._prompts:
            time.sleep(WAIT)
        with replacing(self._out) as beside:
            beside.write_text("".join(done[k] + "\n" for k in range(self._prompts)))
        shutil.rmtree(self._folder, ignore_errors=True)

    def _finished(self) -> dict[int, str]:
        """Return the lines of the finished prompts."""
        lines = (line for part in self._folder.glob("*.jsonl") for line in _whole_lines(part))
        return {json.loads(line)["prompt"]: line for line in lines}


def _whole_lines(part: Path) -> Iterable[str]:
    """Return the lines of a part that have an end."""
    *lines, _ = part.read_text().split("\n")
    return lines


def shared_by() -> tuple[int, int]:
    """Return which process of how many this is, as torchrun and `accelerate launch` say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
