"""From a drafter's configuration to a drafter."""

from __future__ import annotations

from pathlib import Path

import torch

from flowspec.draft.base import Drafter
from flowspec.draft.config import DrafterConfig


def make_drafter(config: DrafterConfig, folder: Path, vocabulary: int, dtype: torch.dtype, device: str) -> Drafter | None:
    """The drafter, with paths relative to `folder`; None for kind none. `vocabulary`: the target's size."""
    if config.kind == "lm":
        from flowspec.draft.lm import LmDrafter
        from flowspec.models.stage import load_whole

        return LmDrafter(*load_whole(config.checkpoint(folder), dtype, device), vocabulary)
    if config.kind == "ngram":
        from flowspec.draft.ngram import NgramDrafter

        return NgramDrafter()
    return None
