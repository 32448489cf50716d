"""An EAGLE-1/2 head in the published layout: one decoder layer that guesses the target's next feature (arXiv 2401.15077).

A row is the token at t + 1 beside the target's feature at t, its last hidden state behind the final norm. What comes out
stands for the feature at t + 1: the target's own lm_head makes logits of it, and it goes into the row of the next token.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowspec.errors import UserError
from flowspec.models.device import placed
from flowspec.models.families import EAGLE_BIAS, EAGLE_EMBEDDING, EAGLE_FC, EMBEDDING, read_config
from flowspec.models.manifest import Manifest
from flowspec.models.stage import Head, StageModel
from flowspec.models.weights import FLOATS, Checkpoint, TensorFile, pickled

LAYER = "layers.0."


class EagleHead:
    """The embedding [vocabulary, hidden], fc [hidden, 2 * hidden] with its bias or None, and the layer."""

    def __init__(self, embedding: Tensor, fc: Tensor, bias: Tensor | None, layer: StageModel):
        self._embedding, self._fc, self._bias, self.layer = embedding, fc, bias, layer

    @property
    def hidden(self) -> int:
        return self._fc.shape[0]

    def place(self, features: Tensor) -> Tensor:
        """Where and as what this head computes."""
        return placed(features, self._fc.device).to(self._fc.dtype)

    @torch.inference_mode()
    def rows(self, tokens: Tensor, features: Tensor) -> Tensor:
        """What the layer takes, [n, hidden]: tokens [n] beside the features [n, hidden] of the tokens before them.

        A token that only the target's padding has is read as the last one."""
        tokens = placed(tokens.clamp(max=len(self._embedding) - 1), self._embedding.device)
        return F.linear(torch.cat([self._embedding[tokens], features], -1), self._fc, self._bias)


def load_eagle(folder: Path, manifest: Manifest, head: Head, dtype: torch.dtype, device: str) -> EagleHead:
    """The head in `folder` for the target of `manifest`, whose lm_head is `head`. UserError names what does not fit."""
    tensors, config = _read(folder, dtype), read_config(folder)
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    layer = decoder_layer(config, tensors, device, str(folder))
    fc = _taken(tensors, EAGLE_FC, (hidden, 2 * hidden), folder).to(device)
    bias = _taken(tensors, EAGLE_BIAS, (hidden,), folder).to(device) if EAGLE_BIAS in tensors else None
    if EAGLE_EMBEDDING in tensors:
        embedding = _taken(tensors, EAGLE_EMBEDDING, (vocabulary, hidden), folder).to(device)
    else:
        embedding = target_embedding(folder, manifest, head, dtype, device)
    return EagleHead(embedding, fc, bias, layer)


def target_embedding(folder: Path, manifest: Manifest, head: Head, dtype: torch.dtype, device: str) -> Tensor:
    """The target's embedding [vocabulary, hidden]: its lm_head if they are tied, else out of the first stage's file."""
    if manifest.tied:
        return head.weight
    path = manifest.path(manifest.ranks[1])
    if not path.exists():
        raise UserError(f"{folder} has no {EAGLE_EMBEDDING}, so the target's is needed: copy {path} to rank 0's machine")
    return TensorFile(path).read(EMBEDDING, dtype).to(device)


def _read(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """The head's weights by name."""
    path = pickled(folder)
    if path is None:
        checkpoint = Checkpoint(folder)
        return {name: checkpoint.file(name).read(name, dtype) for name in checkpoint.names if checkpoint.info(name).dtype in FLOATS}
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
        return {name: tensor.to(dtype) for name, tensor in tensors.items() if tensor.is_floating_point()}
    except Exception as error:  # whatever a damaged file makes of the reader
        raise UserError(f"{path} cannot be read as weights ({type(error).__name__}): download it again") from None


def decoder_layer(config: dict, tensors: dict[str, Tensor], device: str, source: str) -> StageModel:
    """The decoder layer; published heads leave out the norm before attention, and their files tell which biases they have."""
    config = {**config, "num_hidden_layers": 1}
    if LAYER + "self_attn.q_proj.bias" in tensors:
        whole = LAYER + "self_attn.o_proj.bias" in tensors
        config |= {"attention_bias": True} if whole else {"model_type": "qwen2"}
    model = StageModel(config, 1, first=False, last=False)
    if LAYER + "input_layernorm.weight" not in tensors:
        model.layers[0].input_layernorm = nn.Identity()
    return model.load(((name, tensor) for name, tensor in tensors.items() if name.startswith(LAYER)), device, source)


def _taken(tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], folder: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{folder} has no tensor {name}: it is no EAGLE head")
    if tensors[name].shape != shape:
        raise UserError(f"{folder}: {name} has shape {tuple(tensors[name].shape)}, an EAGLE-1/2 head of this config.json has {shape}")
    return tensors[name]
