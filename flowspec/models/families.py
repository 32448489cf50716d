"""The model families that can be computed here: their classes, their tensor names, and what of them
is refused.

Every tensor that is read of a checkpoint gets the name that it would have in Llama's
(`Family.named`), and every value of config.json that is read here Llama's key (`settled`). So
nobody else knows how a family calls them.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from flowspec.errors import UserError, need
from flowspec.models.quantised import Tensors, quantisation

if TYPE_CHECKING:
    import torch

EMBEDDING = "model.embed_tokens.weight"
NORM, NORM_BIAS = "model.norm.weight", "model.norm.bias"
HEAD = "lm_head.weight"
REQUIRED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
)
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
ATTENTIONS = ("full_attention", "sliding_attention")


class Classes(NamedTuple):
    """These are the transformers classes of which a stage is made."""

    config: Any
    model: Any
    """This is the model without a head."""


@dataclass(frozen=True)
class Family:
    """A family is one `model_type` of config.json, whose classes' names begin with `prefix`."""

    model_type: str
    prefix: str
    folder: str | None = None
    """transformers keeps it in this module; None means that of its model_type."""
    inside: str = ""
    """The model is this module of transformers' model, if not that itself."""
    halves: bool = False
    """A layer is x + attention(norm(x)) and then x + mlp(norm(x)), of q, k, v, o and gate, up, down
    (or no gate, or experts of these): so members of a stage can share it (shard.py)."""
    llama: bool = False
    """What is between these matrices is as in Llama, too, so native.py can compute it."""
    linear: bool = True
    """All large matrices of a layer are `nn.Linear`. (Experts come fused, which is none.)"""
    entrance: tuple[str, ...] = ()
    """These modules stand between the embedding and the first layer. An embedding among them is one
    of positions, whose rows are added; the others are applied."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The parts of the model that have another name in Llama's, with that name."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """The keys of config.json that Llama has under another name, with that name."""
    only: Mapping[str, Any] = field(default_factory=dict)
    """Of these keys of config.json no other values are supported."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes of keys that config.json may leave out and that are read here. What
    scales or caps something is meant by no other family."""

    def classes(self) -> Classes:
        """Return the family's classes; this imports transformers."""
        folder = self.folder or self.model_type
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
        return Classes(
            getattr(module, f"{self.prefix}Config"), getattr(module, f"{self.prefix}Model")
        )

    def meant(self, config: dict, key: str) -> Any:
        """Return what a config.json says under a key of `defaults`; None in other families."""
        return config.get(key, self.defaults[key]) if key in self.defaults else None

    def theirs(self, part: str) -> str:
        """Return transformers' name of a part of the model, by that of Llama's."""
        return next((name for name, ours in self.names.items() if ours == part), part)

    def named(self, stored: str) -> str:
        """Return the name of a checkpoint's tensor as it would be in Llama's.

        What is no part of the text's model keeps its own."""
        first, dot, rest = ROOTS.sub("", stored, count=1).partition(".")
        first = self.names.get(first, first)
        if first == "lm_head":
            return f"{first}{dot}{rest}"
        ours = ("embed_tokens", "layers", "norm", *self.entrance)
        return f"model.{first}{dot}{rest}" if first in ours else stored


ROOTS = re.compile(r"^((model|language_model|transformer|gpt_neox|decoder)\.)*")
"""Behind these, if they are there, stand the names of the text's model."""
TIED = {"tie_word_embeddings": True}
SCALED = {"logit_scale": 0.0625}
CAPPED = {"final_logit_softcapping": 30.0}
GRANITE = {"embedding_multiplier": 1.0, "logits_scaling": 1.0}
GEMMA3 = {
    "final_logit_softcapping": None,
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
}
GPT = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_embed": "hidden_size",
}
FAMILIES = {
    family.model_type: family
    for family in (
        Family("llama", "Llama", halves=True, llama=True),
        Family("mistral", "Mistral", halves=True, llama=True),
        Family("qwen2", "Qwen2", halves=True, llama=True),
        Family("qwen3", "Qwen3", halves=True, llama=True),
        Family("mixtral", "Mixtral", halves=True, linear=False),
        Family("qwen3_moe", "Qwen3Moe", halves=True, linear=False),
        Family("gemma", "Gemma", halves=True, defaults=TIED),
        Family("gemma2", "Gemma2", defaults=TIED | CAPPED),
        Family(
            "gemma3_text",
            "Gemma3Text",
            "gemma3",
            only={"use_bidirectional_attention": False},
            defaults=TIED | GEMMA3,
        ),
        Family("phi3", "Phi3"),
        Family("olmo2", "Olmo2"),
        Family("glm4", "Glm4"),
        Family("gpt_oss", "GptOss", linear=False),
        Family("arcee", "Arcee", halves=True),
        Family("cohere", "Cohere", defaults=TIED | SCALED),
        Family("cohere2", "Cohere2", defaults=TIED | SCALED),
        Family("deepseek_v2", "DeepseekV2", linear=False),
        Family("deepseek_v3", "DeepseekV3", linear=False),
        Family("dots1", "Dots1", linear=False),
        Family("ernie4_5", "Ernie4_5", halves=True, defaults=TIED),
        Family("exaone4", "Exaone4"),
        Family("glm", "Glm"),
        Family("glm4_moe", "Glm4Moe", linear=False),
        Family("granite", "Granite", defaults=GRANITE),
        Family("helium", "Helium"),
        Family("hunyuan_v1_dense", "HunYuanDenseV1", halves=True),
        Family("ministral", "Ministral", halves=True, llama=True),
        Family("ministral3", "Ministral3", halves=True),
        Family("nemotron", "Nemotron", halves=True),
        Family("olmo3", "Olmo3"),
        Family("olmoe", "Olmoe", linear=False),
        Family("qwen2_moe", "Qwen2Moe", linear=False, only={"use_sliding_window": False}),
        Family("seed_oss", "SeedOss", halves=True, llama=True),
        Family("smollm3", "SmolLM3", halves=True, defaults=TIED),
        Family("stablelm", "StableLm"),
        Family("starcoder2", "Starcoder2", defaults=TIED),
        Family(
            "gpt_neox",
            "GPTNeoX",
            names={"embed_in": "embed_tokens", "final_layer_norm": "norm", "embed_out": "lm_head"},
        ),
        Family(
            "opt",
            "OPT",
            inside="decoder",
            entrance=("embed_positions",),
            names={"final_layer_norm": "norm"},
            only={"do_layer_norm_before": True},
            defaults=TIED,
        ),
        Family(
            "gpt2",
            "GPT2",
            entrance=("wpe",),
            names={"wte": "embed_tokens", "h": "layers", "ln_f": "norm"},
            keys=GPT,
            only={"add_cross_attention": False, "quantization_config": None},
            defaults=TIED,
        ),
        Family(
            "bloom",
            "Bloom",
            entrance=("word_embeddings_layernorm",),
            names={"word_embeddings": "embed_tokens", "h": "layers", "ln_f": "norm"},
            keys={**GPT, "seq_length": "max_position_embeddings"},
            defaults=TIED | {"max_position_embeddings": 2048},
        ),
    )
}

CONFIG = "config.json"


def read_config(folder: Path, card: Callable[[dict], dict] = lambda config: config) -> dict:
    """Return the config.json of a checkpoint or a stage, or what `card` makes of it,
    settled.

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
        config = settled(card(config))
        check_config(config)
    except UserError as error:
        raise UserError(f"{folder}/{error}") from None
    return config


def settled(config: dict) -> dict:
    """Return a config.json, of whatever family, with Llama's keys for what is read of it here.

    A model of pictures and text is its text's model. Raise UserError if it is not supported."""
    text = config.get("text_config")
    if isinstance(text, dict) and text.get("model_type") in FAMILIES:
        outer = {key: config[key] for key in OUTER if key in config}
        config = outer | text
    family = family_of(config)
    ours = {key: config[theirs] for theirs, key in family.keys.items() if theirs in config}
    return {**family.defaults, **ours, **config}


OUTER = ("architectures", "dtype", "torch_dtype", "tie_word_embeddings", "quantization_config")


# ---- who is refused ------------------------------------------------------------------------------
RECURRENT = (
    "its layers keep a state of all tokens, which cannot branch, nor go back to where a guess was "
    "wrong"
)
ENCODER = "it has an encoder, and only models that continue a text are"
OWN = "its attention asks for no other one (transformers' AttentionInterface)"
REFUSED = {
    **dict.fromkeys(("codegen", "falcon", "gpt_neo", "gptj", "mpt"), OWN),
    **dict.fromkeys(
        (
            "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2",
            "lfm2_moe", "mamba", "mamba2", "minimax", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_5_moe",
            "qwen3_5_moe_text", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
        ),
        RECURRENT,
    ),
    **dict.fromkeys(
        (
            "bart", "bert", "bigbird_pegasus", "blenderbot", "blenderbot-small", "fsmt", "led", "longt5", "m2m_100", "marian",
            "mbart", "mt5", "mvp", "nllb-moe", "pegasus", "pegasus_x", "plbart", "prophetnet", "roberta", "seamless_m4t",
            "speech_to_text", "switch_transformers", "t5", "t5gemma", "umt5", "whisper",
        ),
        ENCODER,
    ),
}  # fmt: skip
"""Model types that are often met, and why they are not supported."""


def check_config(config: dict) -> None:
    """Raise UserError, by name, for a settled config.json whose model would not be computed
    right."""
    for key, value in family_of(config).only.items():
        found = config.get(key, value)
        need(found == value, f"config.json: {key} is {found}; only {value} is supported")
    for key in REQUIRED:
        if type(config.get(key)) is not int or config[key] < 1:
            raise UserError(
                f"config.json: {key} must be a positive integer, it is {config.get(key)!r}"
            )
    other = {*(config.get("layer_types") or ())} - {*ATTENTIONS}
    need(
        not other,
        f"config.json: layer_types holds {', '.join(sorted(map(str, other)))}; only "
        f"{' and '.join(ATTENTIONS)} are supported",
    )
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
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    why = REFUSED.get(kind) if isinstance(kind, str) else None
    why = why or (ENCODER if config.get("is_encoder_decoder") else None)
    raise UserError(
        f"config.json: model_type {kind!r} is not supported{': ' + why if why else ''}; supported "
        f"are {', '.join(FAMILIES)}"
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
_TABLE = re.compile(r".*\.(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")


def layer_of(name: str) -> int | None:
    """Return the layer of a tensor (7 for `model.layers.7.mlp.up_proj.weight`), or None if it has
    none."""
    match = LAYER_NAME.fullmatch(name)
    return int(match[1]) if match else None


def is_table(name: str) -> bool:
    """Return whether a tensor of an old checkpoint is one that is computed."""
    return _TABLE.fullmatch(name) is not None


def layer_tensors(stored: Iterable[str]) -> dict[int, list[str]]:
    """Return the names of all tensors of each layer that has some, without tables."""
    found: dict[int, list[str]] = {}
    for name in stored:
        layer = layer_of(name)
        if layer is not None and not is_table(name):
            found.setdefault(layer, []).append(name)
    return found


def missing_tensors(held: Mapping[int, Sequence[str]], num_layers: int) -> list[str]:
    """Return the names of tensors that layers lack.

    A layer lacks what another one has, if it has nothing that the other has not."""
    if not held:
        return ["model.layers.0"]
    within = {
        layer: frozenset(name.split(".", 3)[3] for name in held.get(layer, ()))
        for layer in range(num_layers)
    }
    kinds = sorted({*within.values()}, key=len)
    lacks = {own: next((more - own for more in kinds if own < more), ()) for own in kinds}
    return [
        f"model.layers.{layer}.{name}"
        for layer, own in within.items()
        for name in sorted(lacks[own])
    ]


def entrance_tensors(family: Family, stored: Iterable[str]) -> list[str]:
    """Return the names of what stands between the embedding and the first layer."""
    prefixes = tuple(f"model.{part}." for part in family.entrance)
    return [name for name in stored if name.startswith(prefixes)]


def norm_tensors(stored: Iterable[str]) -> list[str]:
    """Return the names of what the final norm has."""
    return [NORM, *(name for name in stored if name == NORM_BIAS)]


# ---- loading -------------------------------------------------------------------------------------
EXPERT_NAME = re.compile(
    r"(layers\.\d+\.)(block_sparse_moe|mlp)\.experts\.\d+\.(w[123]|(gate|up|down)_proj)\.weight"
)


def module_tensors(
    file: Tensors,
    first_layer: int,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name inside the stage, tensor) for every tensor of a stage's file, one in memory at a
    time.

    Names lose `model.`, and layers count from `first_layer`: `layers.0.self_attn.q_proj.weight`.
    Experts come fused."""
    experts: dict[str, list[str]] = {}
    for name in file.names:
        local = _local_name(name, first_layer)
        match = EXPERT_NAME.fullmatch(local)
        if match:
            experts.setdefault(match[1], []).append(name)
        elif not is_table(name):
            yield local.replace(".block_sparse_moe.", ".mlp."), file.read(name, dtype)
    for prefix, names in experts.items():
        old = names[0].endswith((".w1.weight", ".w2.weight", ".w3.weight"))  # Mixtral's
        gate, up, down = ("w1", "w3", "w2") if old else ("gate_proj", "up_proj", "down_proj")
        yield prefix + "mlp.experts.gate_up_proj", _fused(file, names, (gate, up), dtype)
        yield prefix + "mlp.experts.down_proj", _fused(file, names, (down,), dtype)


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
