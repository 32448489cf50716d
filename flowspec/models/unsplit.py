"""The unsplit model is a checkpoint, whole, as transformers computes it.

The ring is proved against it, and pairs of such models are measured."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from flowspec.errors import UserError, need
from flowspec.models.quantised import SECTION, Dequantised, Quantisation, quantisation
from flowspec.models.weights import Checkpoint

OFFLINE: dict[str, Any] = dict(local_files_only=True, trust_remote_code=False)


def load_unsplit(folder: Path, dtype: str, option: str) -> Any:
    """Return the model of a checkpoint in safetensors, ready to compute in this dtype.

    Nothing is downloaded, and no code of the checkpoint is run. Of a quantised checkpoint
    transformers gets the plain matrices (quantised.py): for the packed ones it needs a package for
    each format, and most need a GPU. Raise UserError, which names the option that the folder came
    from, if transformers cannot load it."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # what it warns of is an error here
    options: dict[str, Any] = dict(ignore_mismatched_sizes=True, output_loading_info=True)
    options |= {"dtype": getattr(torch, dtype)}
    with _naming(folder, option):
        config = _config(folder)
        how = quantisation({SECTION: getattr(config, SECTION, None)})
        if how:
            delattr(config, SECTION)
            options |= {"config": config, "state_dict": _plain(folder, how)}
            kind: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded: Any = kind.from_pretrained(None, **options)
        else:
            options |= {**OFFLINE, "use_safetensors": True}
            loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    model, told = loaded
    made_up = sorted([*told["missing_keys"], *(name for name, *_ in told["mismatched_keys"])])
    need(
        not made_up,
        f"{option}: {folder} has no tensor {', '.join(made_up[:1])} of the shape that its "
        "config.json says",
    )
    return model.eval()


def _config(folder: Path) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, **OFFLINE)


def _plain(folder: Path, how: Quantisation) -> dict[str, torch.Tensor]:
    file = Dequantised(Checkpoint(folder), how, str(folder))
    return {name: file.read(name) for name in file.names}


class Limits(NamedTuple):
    """Limits are what a model takes: positions of a text, and tokens below `vocab_size`."""

    max_positions: int
    vocab_size: int


def read_limits(folder: Path, option: str) -> Limits:
    """Return the limits of a checkpoint's model, of any family, by its config.json.

    Raise UserError, which names the option that the folder came from, if they are not there."""
    with _naming(folder, option):
        config = _config(folder).get_text_config()
    for name in ("max_position_embeddings", "vocab_size"):
        found = getattr(config, name, None)
        need(isinstance(found, int), f"{option}: {folder}/config.json: {name} is {found}")
    return Limits(config.max_position_embeddings, config.vocab_size)


@contextmanager
def _naming(folder: Path, option: str) -> Iterator[None]:
    """Turn what transformers raises for a bad checkpoint into a UserError."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{option}: {error}") from None
    except (OSError, ValueError, RuntimeError, MemoryError, SafetensorError) as error:
        raise UserError(
            f"{option}: transformers cannot load {folder}: {str(error).splitlines()[0]}"
        ) from None
