"""Which drafter a run wants. Imports no torch: the launcher checks this before anything heavy is loaded."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path

from flowspec.core.request import need

KINDS = ("lm", "ngram", "none")


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    kind: str = "none"
    """lm (a small language model with the target's vocabulary), ngram (look-up in prompt and output), none"""
    path: str | None = None
    """The draft model's checkpoint, for lm."""

    def checkpoint(self, folder: Path) -> Path:
        """The draft model's folder; `folder` is where the configuration lies."""
        assert self.path is not None
        return folder / self.path

    def __post_init__(self) -> None:
        near = difflib.get_close_matches(self.kind, KINDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        need(self.kind in KINDS, f"drafter.kind is {self.kind}: {hint}choose one of {', '.join(KINDS)}")
        need(self.kind != "lm" or self.path is not None, "drafter.path is missing: an lm drafter needs a checkpoint")
