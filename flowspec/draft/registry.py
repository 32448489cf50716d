"""This module makes a drafter from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from flowspec.draft.base import Drafter, Remote
from flowspec.draft.config import DrafterConfig
from flowspec.models.manifest import Manifest

if TYPE_CHECKING:
    from flowspec.models.stage import Head


def make_drafter(
    configs: Sequence[DrafterConfig],
    folder: Path,
    manifest: Manifest,
    head: Head | None,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int], None] = lambda size: None,
    remote: Callable[[DrafterConfig], Remote] | None = None,
) -> Drafter | None:
    """Return the drafter for this target, with several as one; None for kind none.

    `remote` makes those that have ranks of their own; without it, they compute here.

    Paths are relative to `folder`. `head` is the target's lm_head, for kinds that have none of
    their own (config.needs_lm_head). `progress(bytes)` is called as a draft model's tensors
    come."""
    made = [
        drafter
        for config in configs
        if (
            drafter := remote(config)
            if remote and config.ranks
            else _one(config, folder, manifest, head, dtype, device, progress)
        )
    ]
    if len(made) < 2:
        return made[0] if made else None
    from flowspec.draft.mixture import MixtureDrafter

    return MixtureDrafter(made)


def _one(
    config: DrafterConfig,
    folder: Path,
    manifest: Manifest,
    head: Head | None,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int], None],
) -> Drafter | None:
    config = config.found(folder)
    if config.kind == "lm":
        from flowspec.draft.lm import LmDrafter
        from flowspec.models.stage import load_whole, rehearse

        model, own_head = load_whole(config.checkpoint(folder), dtype, device, progress)
        rehearse(model, own_head)
        return LmDrafter(model, own_head, manifest.vocab_size)
    if config.reads_features:
        from flowspec.draft.eagle import EagleDrafter
        from flowspec.models.eagle import load_eagle
        from flowspec.models.stage import rehearse

        # fc and the embedding are no packed matrices, and 16-bit floats are slow on a CPU
        dtype = torch.float32 if device == "cpu" else dtype
        eagle = load_eagle(config.kind, config.checkpoint(folder), manifest, head, dtype, device)
        rehearse(eagle.layer, eagle.lm_head, eagle.silence)
        return EagleDrafter(eagle)
    if config.kind == "ngram":
        from flowspec.draft.ngram import NgramDrafter

        return NgramDrafter()
    return None
