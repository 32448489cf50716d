"""Write a Llama checkpoint as GGUF, the file that llama.cpp reads, in float32.

    python scripts/write_gguf.py --model demo/target --output build/target.gguf

The vocabulary holds numbers instead of texts: prompts go to llama.cpp as token ids, and ids come
back. So any tokenizer will do, and a draft model fits its target exactly when ids mean the same to
both.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec.errors import UserError
from flowspec.files import replacing
from flowspec.models.families import EMBEDDING, HEAD, NORM
from flowspec.models.split import Source
from flowspec.models.weights import Checkpoint
from flowspec.output import Parser, command
from flowspec.text import Text

MISSING = (
    "writing GGUF needs the package gguf: install it with .venv/bin/pip install -r "
    "requirements_llama.txt"
)
LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
NAMES = {EMBEDDING: "token_embd.weight", NORM: "output_norm.weight", HEAD: "output.weight"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """Return what llama.cpp calls a tensor of a Hugging Face Llama."""
    layer = LAYER.fullmatch(name)
    return f"blk.{layer[1]}.{LAYER_NAMES[layer[2]]}.weight" if layer else NAMES[name]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Return the rows of a query or key projection [heads * size, in] in llama.cpp's order.

    Rotary embedding turns pairs: (i, i + size / 2) of a head in Hugging Face's files, (2 i, 2 i +
    1) in llama.cpp's."""
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


@dataclass(frozen=True)
class Llama:
    """This is a checkpoint that GGUF's plain `llama` architecture covers."""

    config: dict
    checkpoint: Checkpoint
    names: list[str]
    """These are its tensors; a tied head is left out."""
    ends: tuple[int, ...]
    """These tokens end a text."""

    @classmethod
    def open(cls, folder: Path) -> Llama:
        """Open a checkpoint; raise UserError for what is no such checkpoint."""
        source = Source.open(folder)
        config, rope = source.config, source.config.get("rope_parameters") or {}
        plain = (
            config["model_type"] == "llama"
            and rope.get("rope_type", "default") == "default"
            and not config.get("rope_scaling")
        )
        names = [name for name in source.checkpoint.names if name != HEAD or not source.tied]
        if not plain or not all(name in NAMES or _known(name) for name in names):
            raise UserError(
                f"{folder}: only a Llama without biases and without scaled rotary positions can "
                "be written as GGUF"
            )
        return cls(config, source.checkpoint, names, tuple(sorted(Text(folder).eos)))

    @property
    def heads(self) -> int:
        return self.config["num_attention_heads"]

    @property
    def kv_heads(self) -> int:
        return self.config.get("num_key_value_heads") or self.heads

    @property
    def read_weights(self) -> int:
        """Return the weights that a forward of one token reads.

        These are all but the embedding, of which it reads a row, unless it is the head too."""
        read = [name for name in self.names if name != EMBEDDING or HEAD not in self.names]
        return sum(math.prod(self.checkpoint.info(name).shape) for name in read)

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors in float32, in the order of `names`, one in memory at a time."""
        for name in self.names:
            weight = self.checkpoint.file(name).read(name, torch.float32)
            turned = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
            yield interleaved(weight, turned) if turned else weight

    def describe(self, writer: Any, types: Any) -> None:
        """Write the metadata with a `gguf.GGUFWriter`; `types` is `gguf.TokenType`."""
        config, vocabulary = self.config, self.config["vocab_size"]
        size = config.get("head_dim") or config["hidden_size"] // self.heads
        rope = config.get("rope_parameters") or config
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(self.heads)
        writer.add_head_count_kv(self.kv_heads)
        writer.add_key_length(size)
        writer.add_value_length(size)
        writer.add_rope_dimension_count(size)
        writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_vocab_size(vocabulary)
        writer.add_tokenizer_model("llama")
        writer.add_token_list([str(token) for token in range(vocabulary)])
        writer.add_token_scores([0.0] * vocabulary)
        writer.add_token_types(
            [types.CONTROL if token in self.ends else types.NORMAL for token in range(vocabulary)]
        )
        for token in self.ends[:1]:
            writer.add_eos_token_id(token)


def _known(name: str) -> bool:
    layer = LAYER.fullmatch(name)
    return layer is not None and layer[2] in LAYER_NAMES


def write_gguf(model: Llama, path: Path) -> None:
    """Write tensor by tensor; `path` appears when it is whole. Raise UserError if gguf is not
    installed."""
    try:
        import gguf
    except ImportError:
        raise UserError(MISSING) from None
    with replacing(path) as beside:
        writer = gguf.GGUFWriter(beside, "llama")
        model.describe(writer, gguf.TokenType)
        for name in model.names:
            shape = model.checkpoint.info(name).shape
            writer.add_tensor_info(
                gguf_name(name), shape, np.dtype(np.float32), 4 * math.prod(shape)
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in model.tensors():
            writer.write_tensor_data(tensor.numpy())
        writer.close()


@command
def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, 2 for bad input."""
    each = Parser(
        prog="write_gguf.py",
        description="Write a Llama checkpoint as GGUF for llama.cpp, in float32.",
    )
    each.add_argument("--model", required=True, type=Path, metavar="DIR")
    each.add_argument("--output", required=True, type=Path, metavar="FILE")
    args = each.parse_args(argv)
    write_gguf(Llama.open(args.model), args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
