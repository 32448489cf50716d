"""This module holds which drafter a run wants.

It imports no torch: the launcher checks this before anything heavy is loaded.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field, replace
from pathlib import Path

from flowspec.errors import need
from flowspec.models.heads import HEADS, kind_of
from flowspec.models.hub import HEAD_FILES, MODEL_FILES, local_folder

KINDS = ("lm", "eagle", "eagle3", "ngram", "none")
HEAD = "head"
"""This stands for eagle or eagle3 until the head's config.json has been read."""
NEED_FILES = {
    "lm": "a checkpoint",
    "eagle": "the folder of a head",
    "eagle3": "the folder of a head",
    HEAD: "the folder of a head",
}


@dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """A drafter's configuration names one of the KINDS and, where it has weights, their folder."""

    kind: str = ""
    """The kind is lm (a small language model with the target's vocabulary), eagle (an EAGLE-1/2
    head made for the target), eagle3 (an EAGLE-3 head), ngram (look-up in prompt and output) or
    none (also if nothing is said)."""
    path: str | None = None
    """The path is the draft model's checkpoint for lm, the head's folder for eagle and eagle3, or
    the name of either on the Hugging Face hub."""
    head: str | None = None
    """The head is the folder, or the hub's name, of an EAGLE head of any kind, instead of kind and
    path: its config.json tells the kind."""
    ranks: int = 0
    """So many ranks of their own, behind those of the stages, draft with it (lm alone), and share
    the nodes of a forward where that is faster. With 0 it drafts on rank 0."""
    where: str = field(default="drafter", compare=False, metadata={"internal": True})
    """This is the key under which the drafter stands in the configuration."""

    @property
    def computes(self) -> bool:
        """Return whether the drafter is a model, with weights of its own in `path`."""
        return self.kind in NEED_FILES

    @property
    def reads_features(self) -> bool:
        """Return whether the drafter reads the target's features."""
        return self.kind in ("eagle", "eagle3", HEAD)

    @property
    def needs_lm_head(self) -> bool:
        """Return whether the drafter has no lm_head and needs the target's on rank 0."""
        return self.kind in ("eagle", HEAD)

    def found(self, folder: Path) -> DrafterConfig:
        """Return the drafter with the kind of its `head`, whose files are here.

        `folder` is where the configuration lies. Raise UserError if they cannot be read."""
        if self.kind != HEAD:
            return self
        return replace(self, kind=kind_of(self.checkpoint(folder)))

    @property
    def setting(self) -> str:
        """Return the key that names the draft model's or the head's folder."""
        return f"{self.where}.{'head' if self.head else 'path'}"

    def checkpoint(self, folder: Path) -> Path:
        """Return the draft model's or the head's folder; `folder` is where the configuration lies.

        Raise UserError if there is none."""
        assert self.path is not None
        return local_folder(
            self.path,
            self.setting,
            HEAD_FILES if self.reads_features else MODEL_FILES,
            folder,
        )

    def __post_init__(self) -> None:
        if self.head is not None:
            alone = self.kind in ("", HEAD, *HEADS) and self.path in (None, self.head)
            need(alone, f"{self.where}.head stands for kind and path: leave these out")
            object.__setattr__(self, "kind", self.kind or HEAD)
            object.__setattr__(self, "path", self.head)
        need(
            bool(self.kind) or self.path is None,
            f"{self.where}.kind is missing beside {self.where}.path: name one of "
            f"{', '.join(KINDS)}",
        )
        object.__setattr__(self, "kind", self.kind or "none")
        near = difflib.get_close_matches(self.kind, KINDS, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        need(
            self.kind in KINDS or (self.kind == HEAD and self.head is not None),
            f"{self.where}.kind is {self.kind}: {hint}choose one of {', '.join(KINDS)}",
        )
        need(
            self.ranks >= 0 and (self.kind == "lm" or not self.ranks),
            f"{self.where}.ranks is {self.ranks}: "
            + (
                "it must be 0 or more"
                if self.kind == "lm"
                else f"a drafter of kind {self.kind} drafts on rank 0, leave it out"
            ),
        )
        missing = self.computes and self.path is None
        need(
            not missing,
            f"{self.where}.path is missing: kind {self.kind} needs {NEED_FILES.get(self.kind)}",
        )
