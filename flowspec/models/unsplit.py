"""The unsplit model is a checkpoint, whole, as transformers computes it.

The ring is proved against it, and pairs of such models are measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flowspec.errors import UserError


def load_unsplit(folder: Path, dtype: str, option: str) -> Any:
    """Return the model of a checkpoint in safetensors, ready to compute in this dtype.

    Nothing is downloaded, and no code of the checkpoint is run. Raise UserError, which names the
    option that the folder came from, if transformers cannot load it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        ).eval()
    except (OSError, ValueError, RuntimeError, MemoryError) as error:
        raise UserError(
            f"{option}: transformers cannot load {folder}: {str(error).splitlines()[0]}"
        ) from None
