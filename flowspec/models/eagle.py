"""An EAGLE head is one decoder layer that guesses the target's next feature (published layouts).

EAGLE-1/2 (arXiv 2401.15077): the target's feature at position t is its last hidden state, behind
the final norm. A row is the token at t + 1 beside that feature; fc makes one vector of the two.
What comes out stands for the feature at t + 1, and the target's own lm_head makes logits of it.

EAGLE-3 (arXiv 2503.01840): the target's feature at t is fc of what enters three of its layers, side
by side: decoder layers 2, L // 2 and L - 3 of L (as in the published code and in the servers that
run these heads). A row is the token's embedding beside that feature. The layer's attention reads
both, each behind a norm; the feature alone is the residual stream. What comes out stands for fc's
output at t + 1. A norm and an lm_head of its own make logits over the head's own vocabulary, whose
token k is the target's token k + d2t[k]."""

from __future__ import annotations

import logging
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspec.errors import UserError
from flowspec.models.device import placed
from flowspec.models.families import CONFIG, EMBEDDING, HEAD
from flowspec.models.fingerprint import CARD, embedding_hash, told_by
from flowspec.models.heads import (
    EAGLE_BIAS,
    EAGLE_EMBEDDING,
    EAGLE_FC,
    EAGLE_NAMES,
    EAGLE_NORM,
    LAYER,
    eagle3_layers,
    eagle_shapes,
    own_name,
    read_head,
)
from flowspec.models.manifest import Manifest
from flowspec.models.stage import Head, StageModel
from flowspec.models.weights import FLOATS, INTEGERS, Checkpoint, TensorFile, pickled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class EagleHead:
    """This is an EAGLE-1/2 head, or an EAGLE-3 head if it reads `layers` of the target."""

    embedding: Tensor
    """The shape is [vocabulary, hidden]."""
    fc: Tensor
    """The shape is [hidden, 2 * hidden], or for EAGLE-3 [hidden, 3 * the target's hidden]."""
    bias: Tensor | None
    layer: StageModel
    lm_head: Head
    norm: nn.Module
    """This norm stands before lm_head."""
    layers: tuple[int, ...] = ()
    names: Tensor | None = None
    """int64 [own vocabulary]: the target's ids of the head's tokens; None means that they are the
    same."""

    def place(self, features: Tensor | None) -> Tensor:
        """Return the target's features [n, width] where, as what and in what size the head
        computes: [n, hidden].

        None stands for a row of zeros."""
        if features is None:
            return self.fc.new_zeros(1, len(self.fc))
        features = placed(features, self.fc.device).to(self.fc.dtype)
        return F.linear(features, self.fc, self.bias) if self.layers else features

    @torch.inference_mode()
    def rows(self, tokens: Tensor, features: Tensor) -> Tensor:
        """Return what the layer takes: tokens [n] beside features [n, hidden] of the tokens before
        them.

        The features are placed or predicted ones. A token that only the target's padding has is
        read as the last one."""
        tokens = placed(tokens.clamp(max=len(self.embedding) - 1), self.embedding.device)
        both = torch.cat([self.embedding[tokens], features], -1)
        return both if self.layers else F.linear(both, self.fc, self.bias)

    def silence(self, n: int) -> Tensor:
        """Return n rows of what the layer takes: token 0 and no features."""
        return self.rows(torch.zeros(n, dtype=torch.long), self.fc.new_zeros(n, len(self.fc)))

    @torch.inference_mode()
    def logits(self, features: Tensor) -> Tensor:
        """Return logits [n, own vocabulary] of predicted features [n, hidden]."""
        return self.lm_head(self.norm(features))


class Beside(nn.Module):
    """This is EAGLE-3's layer, made of a decoder layer's parts.

    An embedding beside a feature [.., 2 * hidden] goes in, and a feature comes out. The residual
    stream is the feature, or that behind its norm if `normed`."""

    def __init__(self, layer: Any, norm: nn.Module, normed: bool = False):
        super().__init__()
        self.normed = normed
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.hidden_norm, self.post_attention_layernorm = (
            layer.input_layernorm,
            norm,
            layer.post_attention_layernorm,
        )
        for name in ("q_proj", "k_proj", "v_proj"):
            narrow = getattr(self.self_attn, name)
            biased = narrow.bias is not None
            setattr(
                self.self_attn,
                name,
                nn.Linear(2 * narrow.in_features, narrow.out_features, biased, device="meta"),
            )

    def forward(self, x: Tensor, **around) -> Tensor:
        embedded, feature = x.chunk(2, -1)
        normed = self.hidden_norm(feature)
        read = torch.cat([self.input_layernorm(embedded), normed], -1)
        feature = (normed if self.normed else feature) + self.self_attn(
            hidden_states=read, **around
        )[0]
        return feature + self.mlp(self.post_attention_layernorm(feature))


def load_eagle(
    kind: str, folder: Path, manifest: Manifest, head: Head | None, dtype: torch.dtype, device: str
) -> EagleHead:
    """Return the `eagle` or `eagle3` head in `folder`, for the target of `manifest`.

    `head` is the target's lm_head; it is None if it is not here, which suits EAGLE-3. Raise
    UserError, which names what does not fit."""
    config = read_head(folder)
    tensors = {own_name(name): tensor for name, tensor in _read(folder, dtype).items()}
    doubt = doubtful(folder, config, manifest)
    if doubt:
        log.warning("%s: %s; a head made for another target drafts what is refused", folder, doubt)
    hidden = config["hidden_size"]
    shapes = eagle_shapes(kind, config, manifest.hidden_size)
    shapes |= {EAGLE_BIAS: (hidden,)} if EAGLE_BIAS in tensors else {}
    own = EAGLE_EMBEDDING in tensors or hidden != manifest.hidden_size
    shapes |= {EAGLE_EMBEDDING: (config["vocab_size"], hidden)} if own else {}
    fixed = {
        name: _taken(tensors, name, shape, folder, kind).to(device)
        for name, shape in shapes.items()
    }
    fc, bias = fixed[EAGLE_FC], fixed.get(EAGLE_BIAS)
    embedding = (
        fixed[EAGLE_EMBEDDING] if own else target_embedding(folder, manifest, head, dtype, device)
    )
    layer = decoder_layer(config, tensors, device, str(folder), dtype, beside=kind == "eagle3")
    if kind == "eagle":
        assert head is not None, "an EAGLE-1/2 head needs the target's lm_head"
        return EagleHead(embedding, fc, bias, layer, head, nn.Identity())
    norm = deepcopy(layer.layers[0].get_submodule("hidden_norm"))
    norm.weight = nn.Parameter(fixed[EAGLE_NORM], requires_grad=False)
    names = (
        _names(tensors[EAGLE_NAMES], manifest.vocab_size, folder) if EAGLE_NAMES in shapes else None
    )
    return EagleHead(
        embedding,
        fc,
        bias,
        layer,
        Head(fixed[HEAD]),
        norm,
        eagle3_layers(manifest.num_layers),
        names,
    )


def doubtful(folder: Path, config: dict, manifest: Manifest) -> str | None:
    """Return why it cannot be said that this head was made for this target; None where it can.

    What is known not to be is refused before (models/heads.py). Published heads tell no hash, but
    most carry the target's embedding."""
    if manifest.embedding is None:
        return (
            "the split does not tell which model it was made from, so the head cannot be "
            "compared with it: split the model again"
        )
    if told_by(config, folder / CONFIG):
        return None
    if pickled(folder) or EAGLE_EMBEDDING not in (checkpoint := Checkpoint(folder)).names:
        return f"its config.json has no {CARD}, so nothing tells for which target it was made"
    same = embedding_hash(checkpoint, EAGLE_EMBEDDING) == manifest.embedding
    return None if same else f"its {EAGLE_EMBEDDING} is not the target's embedding"


def _names(offsets: Tensor, vocabulary: int, folder: Path) -> Tensor:
    """Return the target's ids of the head's tokens, on the CPU, from d2t [own vocabulary] there."""
    names = torch.arange(len(offsets)) + offsets.long()
    strange = names[(names < 0) | (names >= vocabulary)]
    if len(strange):
        raise UserError(
            f"{folder}: {EAGLE_NAMES} names token {int(strange[0])}, the target's vocabulary has "
            f"{vocabulary}"
        )
    return names


def target_embedding(
    folder: Path, manifest: Manifest, head: Head | None, dtype: torch.dtype, device: str
) -> Tensor:
    """Return the target's embedding [vocabulary, hidden].

    It is the target's lm_head if the two are tied and that is here; else it is read from the first
    stage's file."""
    if manifest.tied and head is not None:
        return head.weight.to(dtype)
    path = manifest.path(manifest.ranks[1])
    if not path.exists():
        raise UserError(
            f"{folder} has no {EAGLE_EMBEDDING}, so the target's is needed: copy {path} to rank "
            "0's machine"
        )
    return TensorFile(path).read(EMBEDDING, dtype).to(device)


def _read(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the head's weights by name, and its integers as they are."""
    path = pickled(folder)
    if path is None:
        checkpoint = Checkpoint(folder)
        types = {name: checkpoint.info(name).dtype for name in checkpoint.names}
        wanted = {
            name: dtype if kind in FLOATS else None
            for name, kind in types.items()
            if kind in FLOATS | INTEGERS
        }
        return {name: checkpoint.file(name).read(name, kind) for name, kind in wanted.items()}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in tensors.items()
        }
    except Exception as error:  # whatever a damaged file makes of the reader
        raise UserError(
            f"{path} cannot be read as weights ({type(error).__name__}): download it again"
        ) from None


def decoder_layer(
    config: dict,
    tensors: dict[str, Tensor],
    device: str,
    source: str,
    dtype: torch.dtype,
    beside: bool = False,
) -> StageModel:
    """Return the decoder layer, which is that of EAGLE-3 if `beside`.

    Files tell which biases a head has. EAGLE-1/2 heads as published leave out the norm before
    attention."""
    config = {**config, "num_hidden_layers": 1}
    own = {
        own_name(name): tensor
        for name, tensor in tensors.items()
        if own_name(name).startswith(LAYER)
    }
    if LAYER + "self_attn.q_proj.bias" in own:
        whole = LAYER + "self_attn.o_proj.bias" in own
        config |= {"attention_bias": True} if whole else {"model_type": "qwen2"}
    model = StageModel(config, 1, first=False, last=False)
    if beside:
        layer = model.layers[0]
        whole = bool(config.get("norm_before_residual"))
        norm = deepcopy(layer.get_submodule("input_layernorm"))
        model.layers[0] = Beside(layer, norm, whole)
    elif LAYER + "input_layernorm.weight" not in own:
        model.layers[0].input_layernorm = nn.Identity()
    return model.load(own.items(), device, source, dtype)


def _taken(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], folder: Path, kind: str
) -> Tensor:
    if name not in tensors:
        raise UserError(f"{folder} has no tensor {name}: it is no head of kind {kind}")
    if tensors[name].shape != shape:
        raise UserError(
            f"{folder}: {name} has shape {tuple(tensors[name].shape)}, a head of kind {kind} "
            f"with this config.json has {shape}"
        )
    return tensors[name]
