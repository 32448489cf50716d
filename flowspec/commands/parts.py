"""A list of prompts is shared by several processes, and gone on with where it was left.

Each process appends what it has finished to a part of its own, in a folder beside the output. The
parts outlive a kill; when all prompts are there, they become the output, in the prompts' order.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowspec.errors import UserError, need
from flowspec.files import add_json, begun_with, extended, replacing, whole_lines

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
            self._check(asked)
            self._file = extended(self._folder / f"{rank}.jsonl", f"--out {out}")
        except OSError as error:
            raise UserError(f"--out {out}: cannot write {self._folder}: {error.strerror}") from None

    def _check(self, asked: Mapping[str, Any]) -> None:
        other = begun_with(self._folder / "asked.json", asked, {})
        need(
            not other,
            f"--out {self._out}: {self._folder} was begun with another {', '.join(other)}: ask for "
            "the same to go on, or remove that folder",
        )

    def mine(self) -> list[int]:
        """Return which prompts this process has still to write.

        Every process takes each of so many, so all take different ones whenever they look."""
        done = self._finished()
        return [k for k in range(self._rank, self._prompts, self._processes) if k not in done]

    def keep(self, k: int, record: Mapping[str, Any]) -> None:
        """Keep what was written to the k-th prompt."""
        add_json(self._file, {"prompt": k, **record}, f"--out {self._out}")

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
        lines = (line for part in self._folder.glob("*.jsonl") for line in whole_lines(part))
        return {json.loads(line)["prompt"]: line for line in lines}


def shared_by() -> tuple[int, int]:
    """Return which process of how many this is, as torchrun and `accelerate launch` say."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
