"""Files of EAGLE heads: what they must hold, and whether one was made for a target. No weight is
read here, and no torch imported.

models/eagle.py computes with them.
"""

from __future__ import annotations

from pathlib import Path

from flowspec.errors import need
from flowspec.models.families import CONFIG, HEAD, read_config
from flowspec.models.fingerprint import CARD, told_by
from flowspec.models.manifest import Manifest
from flowspec.models.weights import Checkpoint, pickled

EAGLE_FC, EAGLE_BIAS, EAGLE_EMBEDDING = "fc.weight", "fc.bias", "embed_tokens.weight"
EAGLE_NORM, EAGLE_NAMES, EAGLE_LAYERS = "norm.weight", "d2t", 3
VARIANTS = ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output")
"""of EAGLE-3, which we do not compute"""
READS = "eagle_aux_hidden_state_layer_ids"


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
    config, where = read_config(folder), f"{setting}: {folder / CONFIG}"
    size = (
        "target_hidden_size"
        if kind == "eagle3" and "target_hidden_size" in config
        else "hidden_size"
    )
    advice = "give the head that was trained for this target"
    for key, ours in ((size, manifest.hidden_size), ("vocab_size", manifest.vocab_size)):
        need(
            config[key] == ours,
            f"{where}: {key} is {config[key]}, the target's is {ours}: {advice}",
        )
    told, split = told_by(config, folder / CONFIG), manifest.embedding
    same = told is None or split is None or told == split
    need(same, f"{where}: {CARD} is {told}, the target's is {split}: {advice}")
    (_check_eagle3 if kind == "eagle3" else _check_eagle1)(config, where, manifest)
    if pickled(folder):
        return  # its names are known once torch has read it
    checkpoint = Checkpoint(folder)
    for name, shape in eagle_shapes(kind, config, manifest.hidden_size).items():
        found = checkpoint.info(name).shape
        need(
            found == shape,
            f"{setting}: {folder}: {name} has shape {list(found)}, for kind {kind} it must be "
            f"{list(shape)}",
        )


def _check_eagle1(config: dict, where: str, manifest: Manifest) -> None:
    layers = config["num_hidden_layers"]
    need(
        "draft_vocab_size" not in config,
        f"{where}: it has a draft_vocab_size, so this is an EAGLE-3 head: set drafter.kind: eagle3",
    )
    need(
        layers == 1,
        f"{where}: num_hidden_layers is {layers}, an EAGLE head has 1 (a draft model is "
        "drafter.kind: lm)",
    )


def _check_eagle3(config: dict, where: str, manifest: Manifest) -> None:
    """Heads that compute or read something else are refused by name. (num_hidden_layers says
    nothing: some give the target's.)"""
    for key in VARIANTS:
        need(not config.get(key), f"{where}: {key}: this variant of EAGLE-3 is not supported")
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
    usual = reads in (layers, [k - 1 for k in layers])
    need(
        usual,
        f"{where}: {READS} is {reads}; only what enters layers {layers} of this target is "
        "supported",
    )
