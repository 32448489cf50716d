"""This module finds checkpoints by the names they have on the Hugging Face hub.

It needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from flowspec.errors import UserError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
)  # fmt: skip
COORDINATOR_FILES = ("generation_config.json", *TOKENIZER_FILES)
MODEL_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    *COORDINATOR_FILES,
)
HEAD_FILES = (
    "config.json",
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)


def local_folder(named: str, option: str, files: Sequence[str], base: Path = Path()) -> Path:
    """Return the folder that `option` names.

    It is `named` itself, seen from `base`, or where the hub's client put `files` of the checkpoint
    of that name. Raise UserError if there is neither."""
    path = base / named
    if path.is_dir():
        return path
    if path.exists() or not HUB_ID.fullmatch(named) or named.split("/")[0] in (".", ".."):
        raise UserError(f"{option} {named}: no such folder ({path.absolute()})")
    return _from_hub(named, option, tuple(files))


@cache
def _from_hub(name: str, option: str, files: tuple[str, ...]) -> Path:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, allow_patterns=list(files)))
    except ImportError:
        raise UserError(
            f"{option} {name}: no such folder, and huggingface_hub is not installed to download it"
        ) from None
    # the hub's client raises dozens of kinds, some from the HTTP library below it
    except Exception as error:
        raise UserError(
            f"{option} {name}: no such folder, and the Hugging Face hub did not give it: "
            f"{_first_line(error)}"
        ) from None


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
