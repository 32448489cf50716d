"""Grow a Llama checkpoint into a far larger one that computes the same function.

    python scripts/inflate.py --model demo/target --output /tmp/big --size-gb 2 --check
    python scripts/inflate.py --model demo/target --output /tmp/big --check          # of one that is there already

The big model costs what its size costs, in arithmetic, memory and transport, and still writes the small model's text, so
a benchmark sees real acceptance. What makes it the same function:

- width k: the residual stream holds k copies of the small one. A mean square over copies is the mean square of one, so
  norms, their weights repeated, need no other epsilon and no rounding. Matrices that read the stream read the first copy
  (other columns zero), matrices that write it write every copy (rows repeated).
- heads: k times as many query and key-value heads of the same size, in the same groups; the new ones are random, and
  o_proj ignores them (zero columns). Likewise neurons and down_proj.
- head: the final norm keeps the first copy only (other weights zero), which serves tied and untied heads alike.
- depth: layers are appended whose o_proj and down_proj are zero.

Every new weight that may be anything is random, so that no kernel meets blocks of zeros it could skip.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import signal
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec.errors import UserError
from flowspec.launcher import ROOT
from flowspec.models.families import EMBEDDING, HEAD, NORM
from flowspec.models.split import CONFIG, COORDINATOR_FILES, DTYPES, Parser, Source, read_bytes, staged_folder
from flowspec.models.weights import INDEX, Checkpoint, Entry, write_file, write_tensors
from flowspec.preflight import read_prompts
from flowspec.text import load_tokenizer

NEURONS = 32  # the MLP grows by multiples of this
SHARD_BYTES = 500_000_000
SPREAD = 0.02  # standard deviation of random weights
READS_STREAM = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
WRITES_STREAM = ("o_proj", "down_proj")
CHECKED_PROMPTS, CHECKED_TOKENS = 4, 32


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama that matter here. `head_dim` and the group size never change."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    tied: bool

    @classmethod
    def of(cls, source: Source) -> Shape:
        config = source.config
        heads = config["num_attention_heads"]
        return cls(
            config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], heads,
            config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"], source.tied,
        )  # fmt: skip

    def wider(self, k: int) -> Shape:
        return replace(self, hidden=k * self.hidden, heads=k * self.heads, kv_heads=k * self.kv_heads, neurons=k * self.neurons)

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each projection of a layer, by its name inside the layer."""
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = {
            "q_proj": (query, self.hidden),
            "k_proj": (kv, self.hidden),
            "v_proj": (kv, self.hidden),
            "o_proj": (self.hidden, query),
        }
        wide, narrow = (self.neurons, self.hidden), (self.hidden, self.neurons)
        return {f"self_attn.{name}": shape for name, shape in attention.items()} | {
            "mlp.gate_proj": wide, "mlp.up_proj": wide, "mlp.down_proj": narrow,
        }  # fmt: skip

    @property
    def layer_weights(self) -> int:
        return sum(map(math.prod, self.matrices.values())) + 2 * self.hidden

    @property
    def weights(self) -> int:
        return self.layers * self.layer_weights + (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden


def grown(small: Shape, weights: int) -> Shape:
    """The shape of about `weights` weights: first wide (while twice the layers would still fit), then deep, the rest in the MLP.

    UserError when the model is larger already.
    """
    if weights < small.weights:
        raise UserError(f"--size-gb: the model has {small.weights} weights already, {weights} were asked for")
    k = 1
    while replace(small.wider(k + 1), layers=2 * small.layers).weights <= weights:
        k += 1
    wide = small.wider(k)
    deep = replace(wide, layers=small.layers + (weights - wide.weights) // wide.layer_weights)
    per_neuron = 3 * deep.hidden * deep.layers
    return replace(deep, neurons=deep.neurons + (weights - deep.weights) // per_neuron // NEURONS * NEURONS)


# ---- tensors ---------------------------------------------------------------------------------------
def random_matrix(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Normal noise that depends on the tensor's name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).mul_(SPREAD)


@dataclass(frozen=True)
class Inflation:
    """The small checkpoint and the two shapes; makes each tensor of the big one in float32."""

    checkpoint: Checkpoint
    small: Shape
    big: Shape

    @property
    def copies(self) -> int:
        return self.big.hidden // self.small.hidden

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the big model, in the order of a forward."""
        big = self.big
        names: dict[str, tuple[int, ...]] = {EMBEDDING: (big.vocab, big.hidden)}
        for layer in range(big.layers):
            prefix = f"model.layers.{layer}."
            names |= {prefix + "input_layernorm.weight": (big.hidden,), prefix + "post_attention_layernorm.weight": (big.hidden,)}
            names |= {f"{prefix}{name}.weight": shape for name, shape in big.matrices.items()}
        names[NORM] = (big.hidden,)
        return names if big.tied else names | {HEAD: (big.vocab, big.hidden)}

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        kind, old = name.split(".")[-2], self._old(name)
        if name == EMBEDDING:
            return old.repeat(1, self.copies)
        if name == NORM:
            return torch.cat([old, torch.zeros(shape[0] - len(old))])
        if kind.endswith("layernorm"):
            return torch.ones(shape) if old is None else old.repeat(self.copies)
        if kind in WRITES_STREAM:
            return self._writer(old, shape)
        return self._reader(name, old, shape)

    def _old(self, name: str) -> torch.Tensor | None:
        """The small model's tensor; None in the layers it does not have."""
        return self.checkpoint.file(name).read(name, torch.float32) if name in self.checkpoint.names else None

    def _reader(self, name: str, old: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """Old rows see the first copy of the stream, new rows are random. The head has no new rows."""
        new = random_matrix(name, shape)
        if old is not None:
            rows, columns = old.shape
            new[:rows, :columns] = old
            new[:rows, columns:] = 0
        return new

    def _writer(self, old: torch.Tensor | None, shape: tuple[int, ...]) -> torch.Tensor:
        """Every copy of the stream gets what the old columns give; new columns are ignored."""
        new = torch.zeros(shape)
        if old is not None:
            new[:, : old.shape[1]] = old.repeat(self.copies, 1)
        return new

    def entry(self, name: str, shape: tuple[int, ...], dtype: str) -> Entry:
        return Entry(name, DTYPES[dtype], shape, partial(self._chunks, name, shape, getattr(torch, dtype)))

    def _chunks(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[memoryview]:
        yield self.tensor(name, shape).to(dtype).view(-1).view(torch.uint8).numpy().data


# ---- files -----------------------------------------------------------------------------------------
def shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Consecutive entries of at most `limit` bytes together, a larger tensor alone."""
    parts: list[list[Entry]] = [[]]
    for entry in entries:
        if parts[-1] and sum(each.nbytes for each in parts[-1]) + entry.nbytes > limit:
            parts.append([])
        parts[-1].append(entry)
    return parts


def write_shards(folder: Path, entries: list[Entry], limit: int) -> None:
    parts, weight_map = shards(entries, limit), {}
    for i, part in enumerate(parts, 1):
        name = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        written, _ = write_tensors(folder / name, part, {"format": "pt"})
        weight_map |= {entry.name: name for entry in part}
        print(f"{name}  {written / 1e6:10.1f} MB", file=sys.stderr, flush=True)
    total = sum(entry.nbytes for entry in entries)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def write_json(path: Path, value: dict) -> None:
    text = (json.dumps(value, indent=2) + "\n").encode()
    write_file(path, [text], len(text))


def big_config(config: dict, big: Shape, dtype: str) -> dict:
    rest = {key: value for key, value in config.items() if key not in ("torch_dtype", "layer_types")}
    return rest | {
        "hidden_size": big.hidden, "num_hidden_layers": big.layers, "num_attention_heads": big.heads,
        "num_key_value_heads": big.kv_heads, "head_dim": big.head_dim, "intermediate_size": big.neurons,
        "tie_word_embeddings": big.tied, "dtype": dtype,
    }  # fmt: skip


def inflate(model: Path, output: Path, size_gb: float, dtype: str, shard_bytes: int = SHARD_BYTES) -> Shape:
    """Write the big checkpoint of about `size_gb` (10^9 bytes) and return its shape. UserError for bad input."""
    source = Source.open(model)
    config = source.config
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"--model {model}: only a Llama without biases can be inflated")
    if not 0 < size_gb < math.inf:
        raise UserError(f"--size-gb is {size_gb}, it must be a positive number")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not an empty folder")
    small = Shape.of(source)
    big = grown(small, int(size_gb * 1e9 / getattr(torch, dtype).itemsize))
    inflation = Inflation(source.checkpoint, small, big)
    entries = [inflation.entry(name, shape, dtype) for name, shape in inflation.shapes().items()]
    with staged_folder(output.resolve(), sum(entry.nbytes for entry in entries)) as folder:
        write_shards(folder, entries, shard_bytes)
        write_json(folder / CONFIG, big_config(config, big, dtype))
        for name in COORDINATOR_FILES:
            if (model / name).is_file():
                (folder / name).write_bytes(read_bytes(model / name))
    return big


# ---- check -----------------------------------------------------------------------------------------
@torch.inference_mode()
def greedy(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Of each prompt transformers' greedy tokens, computed in float32, and the lead of each over the next best logit."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = dict(max_new_tokens=CHECKED_TOKENS, do_sample=False, return_dict_in_generate=True, output_logits=True)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        best = torch.cat(out.logits).topk(2).values
        texts.append((out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()))
    return texts


def check(small: Path, big: Path, prompts: list[str]) -> bool:
    """Say of each prompt whether both models continue it alike, or where they part; one model is in memory at a time."""
    for folder in (small, big):
        Source.open(folder)  # a UserError for what is no checkpoint
    tokenizer = load_tokenizer(small)
    tokens = [tokenizer.encode(prompt).ids for prompt in prompts]
    texts = list(zip(greedy(small, tokens), greedy(big, tokens), strict=True))
    for number, ((want, leads), (got, _)) in enumerate(texts, 1):
        at = next((i for i, (a, b) in enumerate(itertools.zip_longest(want, got)) if a != b), None)
        verdict = (
            f"identical ({len(want)} tokens)" if at is None else f"parts at new token {at}: {parting(tokenizer, want, got, leads, at)}"
        )
        print(f"prompt {number}: {verdict}", flush=True)
    return all(want == got for (want, _), (got, _) in texts)


def parting(tokenizer, want: list[int], got: list[int], leads: list[float], at: int) -> str:
    old, new = (repr(tokenizer.decode([ids[at]])) if at < len(ids) else "the end" for ids in (want, got))
    return f"{old} by the small model" + (f" (its lead: {leads[at]:.1e})" if at < len(leads) else "") + f", {new} by the big one"


# ---- command line ----------------------------------------------------------------------------------
def arguments(argv: list[str] | None) -> argparse.Namespace:
    each = Parser(prog="inflate.py", description="Grow a Llama checkpoint into a larger one that computes the same function.")
    each.add_argument("--model", required=True, type=Path, metavar="DIR")
    each.add_argument("--output", required=True, type=Path, metavar="DIR")
    each.add_argument("--size-gb", type=float, metavar="GB", help="of weights as stored, in 10^9 bytes")
    each.add_argument("--dtype", default="float16", choices=("float16", "float32"), help="as stored (default: float16)")
    each.add_argument("--check", action="store_true", help="replay demo prompts with both models; alone: of an output made before")
    args = each.parse_args(argv)
    if args.size_gb is None and not args.check:
        raise UserError("--size-gb is missing: how large is the model to be?")
    return args


def run(args: argparse.Namespace) -> int:
    if args.size_gb is not None:
        big = inflate(args.model, args.output, args.size_gb, args.dtype)
        stored, computed = (big.weights * getattr(torch, name).itemsize / 1e6 for name in (args.dtype, "float32"))
        sizes = f"{stored:.0f} MB as stored ({args.dtype}), {computed:.0f} MB as computed with on a CPU (float32)"
        print(f"{args.output}: {big.weights / 1e6:.0f} M weights, {sizes}, {big}", file=sys.stderr)
    if args.check:
        prompts = read_prompts(str(ROOT / "demo" / "prompts.jsonl"))[:CHECKED_PROMPTS]
        return 0 if check(args.model, args.output, prompts) else 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 when --check finds another text, 2 for bad input (one line on stderr), 130 when interrupted."""
    try:
        return run(arguments(argv))
    except UserError as error:
        print(f"flowspec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flowspec: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a plain kill cleans up like Ctrl-C does
    sys.exit(main())
