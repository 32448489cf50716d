"""A journal holds what rank 0 has committed, so that a run that broke can be gone on with.

A token is a pure function of the seed, its position and what stands before it (sampling.py), so the
text goes on behind the committed tokens as it would have: a run that is started again reads them as
part of the prompt, and every rank rebuilds its caches from them.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

JOURNAL = "FLOWSPEC_JOURNAL"
"""This variable of the environment names the journal's file; the launcher sets it."""


class Past(NamedTuple):
    """The past is what earlier starts of the run have made of a prompt."""

    tokens: list[int]
    seed: int | None
    """It was drawn for the prompt; None if the prompt was not begun."""
    result: str | None
    """The prompt is finished, and this is the result's line."""


NONE = Past([], None, None)


class Journal:
    """A journal is appended to by rank 0 alone, a line of JSON an event."""

    def __init__(self, path: str | os.PathLike[str]):
        self._path, self.past = Path(path), dict[int, Past]()
        """It maps a prompt's number to its past."""
        held = self._path.read_text() if self._path.exists() else ""
        for line in held.split("\n")[:-1]:  # a kill may have cut off the last
            self._take(json.loads(line))
        self._file = open(self._path, "a")  # noqa: SIM115
        if held and not held.endswith("\n"):
            self._file.truncate(len(held[: held.rfind("\n") + 1].encode()))

    @classmethod
    def of_run(cls) -> Journal | None:
        """Return the journal of this run; None if it is not to be gone on with."""
        path = os.environ.get(JOURNAL)
        return cls(path) if path else None

    def of(self, prompt: int) -> Past:
        """Return the past of a prompt."""
        return self.past.get(prompt, NONE)

    def begin(self, prompt: int, seed: int | None) -> None:
        """Note the seed of a prompt's text, before its first token."""
        self._note({"prompt": prompt, "seed": seed})

    def commit(self, prompt: int, token: int) -> None:
        """Note the next token of a prompt's text, before it is shown.

        The last is not noted: it comes with the result."""
        self._note({"prompt": prompt, "token": token})

    def end(self, prompt: int, result: str) -> None:
        """Note that a prompt is finished."""
        self._note({"prompt": prompt, "result": result})

    def _note(self, event: dict[str, Any]) -> None:
        self._take(event)
        self._file.write(json.dumps(event) + "\n")
        self._file.flush()

    def _take(self, event: dict[str, Any]) -> None:
        past = self.of(event["prompt"])
        self.past[event["prompt"]] = Past(
            past.tokens + ([event["token"]] if "token" in event else []),
            event.get("seed", past.seed),
            event.get("result", past.result),
        )
