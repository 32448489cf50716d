"""Files of EAGLE heads: what they must hold, and whether one was made for a target. No weight is
read here, and no torch imported.

Two layouts are read: that of the EAGLE authors' own heads, and that of the library `speculators`
(vLLM's project), whose config.json has the decoder layer's under `transformer_layer_config`, and
which calls some tensors otherwise (NAMES). models/eagle.py computes with them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowspec.errors import need
from flowspec.models.families import CONFIG, HEAD, read_config
from flowspec.models.fingerprint import CARD, told_by
from flowspec.models.manifest import Manifest
from flowspec.models.weights import Checkpoint, pickled

EAGLE_FC, EAGLE_BIAS, EAGLE_EMBEDDING = "fc.weight", "fc.bias", "embed_tokens.weight"
EAGLE_NORM, EAGLE_NAMES, EAGLE_LAYERS = "norm.weight", "d2t", 3
VARIANTS = ("norm_before_fc", "fc_norm", "norm_output", "layernorms")
"""of heads, which we do not compute"""
READS = "eagle_aux_hidden_state_layer_ids"
SPECULATORS, LAYER_CONFIG = "speculators_model_type", "transformer_layer_config"
LAYER = "layers.0."
NAMES = {"midlayer.": LAYER, "transformer.": LAYER, "fusion_fc.": "fc."}
"""This maps how names of tensors begin in one layout or another to how they begin here."""
HEADS = ("eagle", "eagle3")
TITLES = {"eagle": "EAGLE-1/2", "eagle3": "EAGLE-3"}


def own_name(name: str) -> str:
    """Return what a head's tensor is called here."""
    return next((own + name[len(k) :] for k, own in NAMES.items() if name.startswith(k)), name)


def read_head(folder: Path) -> dict:
    """Return the config.json of a head's decoder layer, with what it tells of the head itself.

    Raise UserError if it cannot be read, or if the head would not be computed right."""
    return read_config(folder, _card)


def _card(config: dict) -> dict:
    if SPECULATORS not in config:
        return config
    kind, layer = config[SPECULATORS], config.get(LAYER_CONFIG)
    need(
        kind in HEADS,
        f"config.json: {SPECULATORS} is {kind!r}; supported are {', '.join(HEADS)}",
    )
    need(isinstance(layer, dict), f"config.json: {LAYER_CONFIG} is {layer!r}: it must be an object")
    assert isinstance(layer, dict)
    return {key: value for key, value in config.items() if key != LAYER_CONFIG} | layer


def told_kind(config: dict) -> str | None:
    """Return of which kind a head is by its config.json; None where that says nothing."""
    if SPECULATORS in config:
        return config[SPECULATORS]
    named = any("eagle3" in str(name).lower() for name in config.get("architectures") or [])
    only3 = ("draft_vocab_size", READS, "eagle_config")
    return "eagle3" if named or any(key in config for key in only3) else None


def kind_of(folder: Path) -> str:
    """Return of which kind the head in a folder is, by its config.json, else by its tensors."""
    told = told_kind(read_head(folder))
    if told or pickled(folder):
        return told or "eagle"
    names = Checkpoint(folder).names
    return "eagle3" if any(name.startswith("midlayer.") for name in names) else "eagle"


def eagle_shapes(kind: str, config: dict, target_hidden: int) -> dict[str, tuple[int, ...]]:
    """What an `eagle` or `eagle3` head of this config.json must hold beside its decoder layer, and
    of which shapes."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    if kind == "eagle":
        return {EAGLE_FC: (hidden, 2 * hidden)}
    own = config.get("draft_vocab_size") or vocabulary
    names = {EAGLE_NAMES: (own,)} if own != vocabulary else {}
    return {
        EAGLE_FC: (hidden, EAGLE_LAYERS * target_hidden),
        EAGLE_NORM: (hidden,),
        HEAD: (own, hidden),
        **names,
    }


def eagle3_layers(num_layers: int) -> tuple[int, ...]:
    """The target's layers whose inputs an EAGLE-3 head reads, as where the published ones were
    trained: a low, a middle, a high one."""
    return (2, num_layers // 2, num_layers - 3)


def check_head(kind: str, folder: Path, manifest: Manifest, setting: str) -> None:
    """What can be known of an EAGLE head without reading its weights: that it is one of this kind,
    of this target's sizes."""
    config, where = read_head(folder), f"{setting}: {folder / CONFIG}"
    told = told_kind(config)
    need(
        told in (None, kind),
        f"{where}: it tells of an {TITLES.get(told or '')} head: set drafter.kind: {told} (or "
        "drafter.head, which finds the kind)",
    )
    size = (
        "target_hidden_size"
        if kind == "eagle3" and "target_hidden_size" in config
        else "hidden_size"
    )
    advice = "give the head that was trained for this target" + _made_for(config)
    for key in VARIANTS:
        need(not config.get(key), f"{where}: {key}: this variant of a head is not supported")
    for key, ours in ((size, manifest.hidden_size), ("vocab_size", manifest.vocab_size)):
        need(
            config[key] == ours,
            f"{where}: {key} is {config[key]}, the target's is {ours}: {advice}",
        )
    name, split = told_by(config, folder / CONFIG), manifest.embedding
    same = name is None or split is None or name == split
    need(same, f"{where}: {CARD} is {name}, the target's is {split}: {advice}")
    (_check_eagle3 if kind == "eagle3" else _check_eagle1)(config, where, manifest)
    if pickled(folder):
        return  # its names are known once torch has read it
    checkpoint = Checkpoint(folder)
    stored = {own_name(name): name for name in checkpoint.names}
    for name, shape in eagle_shapes(kind, config, manifest.hidden_size).items():
        found = checkpoint.info(stored.get(name, name)).shape
        need(
            found == shape,
            f"{setting}: {folder}: {name} has shape {list(found)}, for kind {kind} it must be "
            f"{list(shape)}",
        )


def _made_for(config: dict) -> str:
    """Return, for a message, for which target a head says that it was made."""
    about: Any = config.get("speculators_config")
    for key in ("verifier", "name_or_path"):
        about = about.get(key) if isinstance(about, dict) else None
    return f" (this one says that it is for {about})" if about else ""


def _check_eagle1(config: dict, where: str, manifest: Manifest) -> None:
    layers = config["num_hidden_layers"]
    need(
        layers == 1,
        f"{where}: num_hidden_layers is {layers}, an EAGLE head has 1 (a draft model is "
        "drafter.kind: lm)",
    )


def _check_eagle3(config: dict, where: str, manifest: Manifest) -> None:
    """Heads that compute or read something else are refused by name. (num_hidden_layers says
    nothing in EAGLE's own layout: some give the target's.)"""
    deep = SPECULATORS in config and config["num_hidden_layers"] != 1
    need(
        not deep,
        f"{where}: num_hidden_layers is {config['num_hidden_layers']}, only heads of 1 layer are "
        "supported",
    )
    layers, about = list(eagle3_layers(manifest.num_layers)), config.get("eagle_config") or {}
    need(
        layers == sorted(set(layers)),
        f"{where}: the target has {manifest.num_layers} layers, EAGLE-3 needs 7 or more",
    )
    need(
        about.get("use_aux_hidden_state", True),
        f"{where}: it reads the last layer alone, which is not supported",
    )
    # some count a layer by what enters it, some by what leaves the one before
    reads = about.get(READS) or config.get(READS) or layers
    usual = reads == layers or (reads == [k - 1 for k in layers] and SPECULATORS not in config)
    need(
        usual,
        f"{where}: {READS} is {reads}; only what enters layers {layers} of this target is "
        "supported",
    )
