"""The model families that can be split into stages: their classes, their tensor names, and what of
them is refused."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowspec.errors import UserError
from flowspec.models.quantised import Tensors, quantisation

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"
HEAD = "lm_head.weight"
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")


class Classes(NamedTuple):
    """These are the transformers classes of which a stage is made."""

    config: Any
    layer: Any
    rotary: Any
    norm: Any


@dataclass(frozen=True)
class Family:
    """A family is one `model_type` of config.json.

    `window_default` is what transformers assumes if config.json has no `sliding_window`."""

    model_type: str
    prefix: str
    experts: bool = False
    window_switch: bool = False
    window_default: int | None = None

    @property
    def module(self) -> str:
        return f"transformers.models.{self.model_type}.modeling_{self.model_type}"

    def classes(self) -> Classes:
        """Return the family's classes; this imports transformers."""
        module = importlib.import_module(self.module)
        return Classes(
            *(
                getattr(module, self.prefix + part)
                for part in ("Config", "DecoderLayer", "RotaryEmbedding", "RMSNorm")
            )
        )


FAMILIES = {
    "llama": Family("llama", "Llama"),
    "mistral": Family("mistral", "Mistral", window_default=4096),
    "qwen2": Family("qwen2", "Qwen2", window_switch=True),
    "qwen3": Family("qwen3", "Qwen3", window_switch=True),
    "mixtral": Family("mixtral", "Mixtral", experts=True),
}


CONFIG = "config.json"


def read_config(folder: Path, card: Callable[[dict], dict] = lambda config: config) -> dict:
    """Return the config.json of a checkpoint or a stage, or what `card` makes of it.

    Raise UserError if it cannot be read, or if its model would not be computed right."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is not valid JSON") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object")
    try:
        config = card(config)
        check_config(config)
    except UserError as error:
        raise UserError(f"{folder}/{error}") from None
    return config


# ---- who is refused ------------------------------------------------------------------------------
def check_config(config: dict) -> None:
    """Raise UserError, by name, for a config.json whose model would not be computed right."""
    family = family_of(config)
    for key in REQUIRED:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(
                f"config.json: {key} must be a positive integer, it is {config.get(key)!r}"
            )
    _check_window(family, config)
    for kind in rope_types(config):
        if kind in LENGTH_DEPENDENT_ROPE:
            raise UserError(
                f"config.json: rope type {kind} changes with the length of the text and is not "
                "supported"
            )
    quantisation(config)


def family_of(config: dict) -> Family:
    """Return the family of a config; raise UserError if its model_type is not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"config.json: model_type {kind!r} is not supported; supported are "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _check_window(family: Family, config: dict) -> None:
    other = {kind for kind in config.get("layer_types") or () if kind != "full_attention"}
    if other:
        raise UserError(
            f"config.json: layer_types holds {', '.join(sorted(map(str, other)))}; only "
            "full_attention is supported"
        )
    if family.window_switch:
        if config.get("use_sliding_window"):
            raise UserError(
                "config.json: use_sliding_window is true; sliding-window attention is not supported"
            )
        return
    window = config.get("sliding_window", family.window_default)
    if window is not None:
        absent = (
            ""
            if "sliding_window" in config
            else " by default (the key is missing; null switches it off)"
        )
        raise UserError(
            f"config.json: sliding_window is {window}{absent}; sliding-window attention is not "
            "supported"
        )


def rope_types(config: dict) -> Iterator[str]:
    """Yield every rope type that the old `rope_scaling` or the new `rope_parameters` names.

    The latter may name one for each kind of layer."""
    for key in ("rope_scaling", "rope_parameters"):
        outer = config.get(key)
        if isinstance(outer, dict):
            for each in (outer, *(value for value in outer.values() if isinstance(value, dict))):
                yield str(each.get("rope_type", each.get("type", "default")))


# ---- tensor names --------------------------------------------------------------------------------
LAYER_NAME = re.compile(r"model\.layers\.(\d+)\.(.+)")


def layer_of(name: str) -> int | None:
    """Return the layer of a tensor (7 for `model.layers.7.mlp.up_proj.weight`), or None if it has
    none."""
    match = LAYER_NAME.fullmatch(name)
    return int(match[1]) if match else None


def layer_tensors(config: dict, layer: int, stored: set[str]) -> list[str]:
    """Return the names of all tensors that this decoder layer must have.

    Of Mixtral's two layouts they are those of the one that `stored` uses."""
    family = family_of(config)
    prefix = f"model.layers.{layer}."
    fused = prefix + "mlp.experts.gate_up_proj" in stored
    biased = family.model_type == "llama" and bool(config.get("mlp_bias"))
    mlp = (
        _expert_names(config, fused)
        if family.experts
        else _projections("mlp", "gate up down", biased)
    )
    return [
        prefix + name
        for name in (
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            *_attention_names(config),
            *mlp,
        )
    ]


def _attention_names(config: dict) -> list[str]:
    kind, biased = config["model_type"], bool(config.get("attention_bias"))
    qkv = _projections(
        "self_attn", "q k v", kind == "qwen2" or (kind in ("llama", "qwen3") and biased)
    )
    out = _projections("self_attn", "o", kind in ("llama", "qwen3") and biased)
    norms = ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if kind == "qwen3" else []
    return [*qkv, *out, *norms]


def _projections(module: str, letters: str, bias: bool) -> list[str]:
    return [
        f"{module}.{letter}_proj.{part}"
        for letter in letters.split()
        for part in (("weight", "bias") if bias else ("weight",))
    ]


def _expert_names(config: dict, fused: bool) -> list[str]:
    if fused:
        return ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    each = [
        f"block_sparse_moe.experts.{i}.w{j}.weight"
        for i in range(config.get("num_local_experts", 8))
        for j in (1, 2, 3)
    ]
    return ["block_sparse_moe.gate.weight", *each]


# ---- loading -------------------------------------------------------------------------------------
EXPERT_NAME = re.compile(r"(layers\.\d+\.)block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")


def module_tensors(
    file: Tensors,
    family: Family,
    first_layer: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name inside the stage, tensor) for every tensor of a stage's file, one in memory at a
    time.

    Names lose `model.`, and layers count from `first_layer`: `layers.0.self_attn.q_proj.weight`.
    Mixtral's experts come fused."""
    experts: dict[str, list[str]] = {}
    for name in file.names:
        local = _local_name(name, first_layer)
        match = EXPERT_NAME.fullmatch(local) if family.experts else None
        if match:
            experts.setdefault(match[1], []).append(name)
        else:
            yield local.replace(".block_sparse_moe.", ".mlp."), file.read(name, dtype)
    for prefix, names in experts.items():
        yield prefix + "mlp.experts.gate_up_proj", _fused(file, names, ("w1", "w3"), dtype)
        yield prefix + "mlp.experts.down_proj", _fused(file, names, ("w2",), dtype)


def _local_name(name: str, first_layer: int) -> str:
    match = LAYER_NAME.fullmatch(name)
    return (
        f"layers.{int(match[1]) - first_layer}.{match[2]}" if match else name.removeprefix("model.")
    )


def _fused(
    file: Tensors,
    names: list[str],
    parts: tuple[str, ...],
    dtype: torch.dtype | None,
) -> torch.Tensor:
    """Return [experts, sum of rows, columns]: the named matrices of each expert above one
    another."""
    import torch

    from flowspec.models.weights import torch_dtype

    stem = names[0].split(".experts.")[0] + ".experts."
    count = 1 + max(int(name.removeprefix(stem).split(".")[0]) for name in names)
    info = file.info(f"{stem}0.{parts[0]}.weight")
    rows, columns = info.shape
    out = torch.empty(count, len(parts), rows, columns, dtype=dtype or torch_dtype(info.dtype))
    for expert in range(count):
        for k, part in enumerate(parts):
            file.read_into(f"{stem}{expert}.{part}.weight", out[expert, k])
    return out.view(count, len(parts) * rows, columns)
