"""Grow a Llama checkpoint into a far larger one that computes the same function.

    python scripts/inflate.py --model demo/target --output /tmp/big --size-gb 2 --check
    python scripts/inflate.py --model demo/target --output /tmp/big --check          # of one that
    is there already
    python scripts/inflate.py --model demo/target --output /tmp/real --hidden 4096 --layers 12
    --heads 32/8 --head-dim 128 \\
        --vocab 128256 --positions 16384

The big model costs what its size costs, in arithmetic, memory and transport, and still writes the
small model's text, so a benchmark sees real acceptance. What makes it the same function:

- width k: the residual stream holds k copies of the small one. A mean square over copies is the
  mean square of one, so
  norms, their weights repeated, need no other epsilon and no rounding. Matrices that read the
  stream read the first copy
  (other columns zero), matrices that write it write every copy (rows repeated).
- heads: a small head's query, key and value become those of one of the big heads, in whatever
  groups these are, as long as there
  are enough; the new ones are random, and o_proj ignores them (zero columns). Likewise neurons and
  down_proj.
- head size: m times as large, dimension i is i * m of its half, which turns by the same angle;
  q_proj's rows grow by sqrt(m), since
  scores are divided by sqrt(head size), and its new ones are zero. Exact where m is a power of 4,
  others are refused.
- head: the final norm keeps the first copy only (other weights zero), which serves tied and untied
  heads alike.
- depth: layers are appended whose o_proj and down_proj are zero.
- positions: nothing changes but the limit; where the rotary embedding depends on it, that is
  refused.
- vocabulary: see `Constant`. What the new tokens need is a place in the stream, so there are fewer
  copies than the width holds, the
  rest is zero, and norms' weights shrink by sqrt(copies / k): by half where k is a multiple of 4,
  else by what is rounded as stored
  (3e-8 of it in float32, 2e-4 in float16, so near ties of the text may fall otherwise).

Every new weight that may be anything is random, so that no kernel meets blocks of zeros it could
skip.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec.errors import UserError
from flowspec.files import ROOT
from flowspec.lossless import first_difference
from flowspec.models.families import EMBEDDING, HEAD, NORM, rope_types
from flowspec.models.split import (
    CONFIG,
    COORDINATOR_FILES,
    DTYPES,
    Source,
    read_bytes,
    staged_folder,
)
from flowspec.models.weights import INDEX, Checkpoint, Entry, write_file, write_tensors
from flowspec.output import Parser, command
from flowspec.preflight import read_prompts
from flowspec.text import load_tokenizer

NEURONS = 32  # the MLP grows by multiples of this
SHARD_BYTES = 500_000_000
SPREAD = 0.02  # standard deviation of random weights
ROPE_OF_ANY_LENGTH = ("default", "linear", "llama3")
WRITES_STREAM = ("o_proj", "down_proj")
CHECKED_PROMPTS, CHECKED_TOKENS = 4, 32


@dataclass(frozen=True)
class Shape:
    """A shape holds the sizes of a Llama that matter here."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    neurons: int
    positions: int
    tied: bool

    @classmethod
    def of(cls, source: Source) -> Shape:
        config = source.config
        heads = config["num_attention_heads"]
        return cls(
            config["vocab_size"], config["hidden_size"], config["num_hidden_layers"], heads,
            config.get("num_key_value_heads") or heads, config.get("head_dim") or config["hidden_size"] // heads,
            config["intermediate_size"], config["max_position_embeddings"], source.tied,
        )  # fmt: skip

    def wider(self, k: int) -> Shape:
        return replace(
            self,
            hidden=k * self.hidden,
            heads=k * self.heads,
            kv_heads=k * self.kv_heads,
            neurons=k * self.neurons,
        )

    @property
    def group(self) -> int:
        """Return the query heads that share a key and a value head."""
        return self.heads // self.kv_heads

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Return [out, in] of each projection of a layer, by its name inside the layer."""
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
        return (
            self.layers * self.layer_weights
            + (1 if self.tied else 2) * self.vocab * self.hidden
            + self.hidden
        )


@dataclass(frozen=True)
class Wanted:
    """This is what is asked for; None means as the rest makes it."""

    weights: int | None = None
    hidden: int | None = None
    layers: int | None = None
    vocab: int | None = None
    positions: int | None = None
    heads: tuple[int, int] | None = None
    """These are the query and the key-value heads."""
    head_dim: int | None = None

    def shape(self, small: Shape) -> Shape:
        """Return the whole shape.

        Raise UserError, by the option's name, for one that cannot compute the small model's
        function."""
        hidden, layers = self.hidden or small.hidden, self.layers or small.layers
        if hidden % small.hidden or hidden < small.hidden:
            raise UserError(
                f"--hidden {hidden}: it must be a multiple of the model's {small.hidden}"
            )
        if layers < small.layers:
            raise UserError(f"--layers {layers}: the model has {small.layers} already")
        if self.weights is None:
            return replace(self._wide(small, hidden // small.hidden), layers=layers)
        if self.hidden or self.layers:
            raise UserError("--size-gb chooses --hidden and --layers: give either")
        return self._grown(small, self.weights)

    def _wide(self, small: Shape, k: int) -> Shape:
        wide = small.wider(k)
        heads, kv_heads = self.heads or (wide.heads, wide.kv_heads)
        chosen = dict(vocab=self.vocab or small.vocab, positions=self.positions or small.positions)
        big = replace(
            wide, heads=heads, kv_heads=kv_heads, head_dim=self.head_dim or small.head_dim, **chosen
        )
        for name, value in chosen.items():
            if value < getattr(small, name):
                raise UserError(f"--{name} {value}: the model has {getattr(small, name)} already")
        if heads % kv_heads or kv_heads < small.kv_heads or big.group < small.group:
            raise UserError(
                f"--heads {heads}/{kv_heads}: the model's {small.heads}/{small.kv_heads} do not "
                "fit into these groups"
            )
        times = big.head_dim / small.head_dim
        if times < 1 or not math.log(times, 4).is_integer():
            raise UserError(
                f"--head-dim {big.head_dim}: it must be the model's {small.head_dim} times a "
                "power of 4"
            )
        if big.vocab > small.vocab and k == 1:
            raise UserError(
                f"--vocab {big.vocab}: new tokens need a wider stream, give --hidden "
                f"{2 * small.hidden} or more"
            )
        return big

    def _grown(self, small: Shape, weights: int) -> Shape:
        """Return the shape of about so many weights.

        It grows first in width (while twice the layers would still fit), then in depth, and the
        rest goes into the MLP."""
        k = 2 if self.vocab and self.vocab > small.vocab else 1
        wide = self._wide(small, k)
        if weights < wide.weights:
            raise UserError(
                f"--size-gb: the least is a model of {wide.weights} weights, {weights} were "
                "asked for"
            )
        while replace(self._wide(small, k + 1), layers=2 * small.layers).weights <= weights:
            k += 1
        wide = self._wide(small, k)
        deep = replace(wide, layers=small.layers + (weights - wide.weights) // wide.layer_weights)
        per_neuron = 3 * deep.hidden * deep.layers
        return replace(
            deep, neurons=deep.neurons + (weights - deep.weights) // per_neuron // NEURONS * NEURONS
        )


@dataclass(frozen=True)
class Constant:
    """The constant is the last place of the stream, which is the same for every token of the small
    model. New tokens lose by it.

    The embedding holds `value` there and nothing writes it; what it adds to a mean square is taken
    off the norms' epsilon. Behind the final norm it is KEPT * value / rms, rms being the stream's.
    New tokens' rows of the head have LOSING there, so their logits are about LOSING * KEPT * value
    / rms: for a value of 2^-5 minus 1,000 and less at any rms up to 1,000, far below all others,
    also under noise and without filters. The others' rows have 0, or in a tied head `value` itself,
    which adds the same KEPT * value^2 / rms, about 1 / rms, to all of them."""

    value: float
    KEPT: ClassVar = 2.0**10
    LOSING: ClassVar = -(2.0**15)

    @classmethod
    def below(cls, square: float) -> Constant:
        """Return a power of two whose square is at most half of `square`."""
        return cls(2.0 ** math.floor(math.log2(square / 2) / 2))


# ---- tensors -------------------------------------------------------------------------------------
def random_matrix(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return normal noise that depends on the tensor's name alone."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator).mul_(SPREAD)


@dataclass(frozen=True)
class Inflation:
    """An inflation holds the small checkpoint and the two shapes, and makes each tensor of the big
    one in float32."""

    checkpoint: Checkpoint
    small: Shape
    big: Shape
    small_epsilon: float

    @property
    def copies(self) -> int:
        """Return how many copies of the small stream the big one has.

        New tokens need a place beside them."""
        k = self.big.hidden // self.small.hidden
        if self.constant is None:
            return k
        return k - 1 if k % 4 else k // 4

    @property
    def shrink(self) -> float:
        """Return by how much the norms' weights are smaller: the stream's rms is as much smaller
        than the small one's."""
        return math.sqrt(self.copies * self.small.hidden / self.big.hidden)

    @property
    def constant(self) -> Constant | None:
        return (
            Constant.below(self.small_epsilon * self.small.hidden)
            if self.big.vocab > self.small.vocab
            else None
        )

    @property
    def epsilon(self) -> float:
        """Return the epsilon of the big model's norms."""
        used = self.constant.value**2 if self.constant else 0.0
        return (self.small_epsilon * self.copies * self.small.hidden - used) / self.big.hidden

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor of the big model, in the order of a forward."""
        big = self.big
        names: dict[str, tuple[int, ...]] = {EMBEDDING: (big.vocab, big.hidden)}
        for layer in range(big.layers):
            prefix = f"model.layers.{layer}."
            names |= {
                prefix + "input_layernorm.weight": (big.hidden,),
                prefix + "post_attention_layernorm.weight": (big.hidden,),
            }
            names |= {f"{prefix}{name}.weight": shape for name, shape in big.matrices.items()}
        names[NORM] = (big.hidden,)
        return names if big.tied else names | {HEAD: (big.vocab, big.hidden)}

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        kind, old = name.split(".")[-2], self._old(name)
        if name == EMBEDDING:
            assert old is not None
            return self._embedding(old, shape)
        if name == HEAD:
            return self._losing(self._reader(name, old, slice(self.small.vocab), shape))
        if name == NORM:
            assert old is not None
            return self._final_norm(old)
        if kind.endswith("layernorm"):
            return self._norm(old)
        if kind in WRITES_STREAM:
            return self._writer(old, self._places(kind), shape)
        return self._attention_reader(name, kind, old, shape)

    def _old(self, name: str) -> torch.Tensor | None:
        """Return the small model's tensor; None in the layers that it does not have."""
        return (
            self.checkpoint.file(name).read(name, torch.float32)
            if name in self.checkpoint.names
            else None
        )

    # ---- the stream
    def _embedding(self, old: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        new = random_matrix(EMBEDDING, shape)
        new[: len(old)] = 0
        new[: len(old), : self.copies * self.small.hidden] = old.repeat(1, self.copies)
        if self.constant is not None:
            new[:, -1] = self.constant.value
        return self._losing(new) if self.big.tied else new

    def _losing(self, head: torch.Tensor) -> torch.Tensor:
        """Return the head with rows of new tokens that never win."""
        head[self.small.vocab :, -1] = Constant.LOSING
        return head

    def _norm(self, old: torch.Tensor | None) -> torch.Tensor:
        new = torch.ones(self.big.hidden)
        if old is not None:
            new[: self.copies * len(old)] = old.repeat(self.copies)
        return new * self.shrink

    def _final_norm(self, old: torch.Tensor) -> torch.Tensor:
        new = torch.zeros(self.big.hidden)
        new[: len(old)] = old * self.shrink
        if self.constant is not None:
            new[-1] = Constant.KEPT
        return new

    # ---- the matrices
    def _reader(
        self,
        name: str,
        old: torch.Tensor | None,
        places: torch.Tensor | slice,
        shape: tuple[int, ...],
    ) -> torch.Tensor:
        """Return old rows, at their places, that see the first copy of the stream; new rows are
        random."""
        new = random_matrix(name, shape)
        if old is not None:
            new[places] = torch.cat([old, torch.zeros(len(old), shape[1] - old.shape[1])], 1)
        return new

    def _attention_reader(
        self, name: str, kind: str, old: torch.Tensor | None, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return what `_reader` does; what is new in a head that is in use must not add to its
        scores."""
        new = self._reader(name, old, self._places(kind), shape)
        if kind == "q_proj" and old is not None:
            rows = new.view(self.big.heads, self.big.head_dim, -1)
            rows[self._heads] *= math.sqrt(self.big.head_dim / self.small.head_dim)
            rows[self._heads[:, None], self._unused_dims] = 0
        return new

    def _writer(
        self, old: torch.Tensor | None, places: torch.Tensor | slice, shape: tuple[int, ...]
    ) -> torch.Tensor:
        """Return a matrix that gives every copy of the stream what the old columns give; new
        columns are ignored."""
        new = torch.zeros(shape)
        if old is not None:
            new[: self.copies * len(old), places] = old.repeat(self.copies, 1)
        return new

    # ---- where small heads lie in the big ones
    @property
    def _heads(self) -> torch.Tensor:
        """Return the big query head of each small one, int64 [heads].

        The first key-value heads are the small ones."""
        old = torch.arange(self.small.heads)
        return old // self.small.group * self.big.group + old % self.small.group

    @property
    def _turned(self) -> torch.Tensor:
        """Return the dimension of a big head that turns as each of a small one's does, int64
        [head_dim].

        The pairs are i and i + half."""
        half, times = self.small.head_dim // 2, self.big.head_dim // self.small.head_dim
        first = torch.arange(half) * times
        return torch.cat([first, first + self.big.head_dim // 2])

    @property
    def _unused_dims(self) -> torch.Tensor:
        unused = torch.ones(self.big.head_dim, dtype=torch.bool)
        unused[self._turned] = False
        return unused.nonzero()[:, 0]

    def _places(self, kind: str) -> torch.Tensor | slice:
        """Return where the rows of an old matrix (of o_proj and down_proj the columns) are in the
        new one."""
        if kind in ("gate_proj", "up_proj", "down_proj"):
            return slice(self.small.neurons)
        heads = self._heads if kind in ("q_proj", "o_proj") else torch.arange(self.small.kv_heads)
        dims = self._turned if kind in ("q_proj", "k_proj") else torch.arange(self.small.head_dim)
        return (heads[:, None] * self.big.head_dim + dims).flatten()

    def entry(self, name: str, shape: tuple[int, ...], dtype: str) -> Entry:
        return Entry(
            name, DTYPES[dtype], shape, partial(self._chunks, name, shape, getattr(torch, dtype))
        )

    def _chunks(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> Iterator[memoryview]:
        yield self.tensor(name, shape).to(dtype).view(-1).view(torch.uint8).numpy().data


# ---- files ---------------------------------------------------------------------------------------
def shards(entries: list[Entry], limit: int) -> list[list[Entry]]:
    """Yield consecutive entries of at most `limit` bytes together, and a larger tensor alone."""
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


def big_config(config: dict, inflation: Inflation, dtype: str) -> dict:
    big = inflation.big
    rest = {
        key: value for key, value in config.items() if key not in ("torch_dtype", "layer_types")
    }
    return rest | {
        "vocab_size": big.vocab, "hidden_size": big.hidden, "num_hidden_layers": big.layers, "num_attention_heads": big.heads,
        "num_key_value_heads": big.kv_heads, "head_dim": big.head_dim, "intermediate_size": big.neurons,
        "max_position_embeddings": big.positions, "rms_norm_eps": inflation.epsilon, "tie_word_embeddings": big.tied, "dtype": dtype,
    }  # fmt: skip


def inflate(
    model: Path, output: Path, wanted: Wanted, dtype: str, shard_bytes: int = SHARD_BYTES
) -> Shape:
    """Write the big checkpoint and return its shape; raise UserError for bad input."""
    source = Source.open(model)
    config = source.config
    if config["model_type"] != "llama" or config.get("attention_bias") or config.get("mlp_bias"):
        raise UserError(f"--model {model}: only a Llama without biases can be inflated")
    small = Shape.of(source)
    big = wanted.shape(small)
    rotary = {kind for kind in rope_types(config) if kind not in ROPE_OF_ANY_LENGTH}
    if big.positions > small.positions and rotary:
        raise UserError(
            f"--positions {big.positions}: rope type {', '.join(sorted(rotary))} may depend on it"
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not an empty folder")
    inflation = Inflation(source.checkpoint, small, big, config.get("rms_norm_eps", 1e-6))
    entries = [inflation.entry(name, shape, dtype) for name, shape in inflation.shapes().items()]
    with staged_folder(output.resolve(), sum(entry.nbytes for entry in entries)) as folder:
        write_shards(folder, entries, shard_bytes)
        write_json(folder / CONFIG, big_config(config, inflation, dtype))
        for name in COORDINATOR_FILES:
            if (model / name).is_file():
                (folder / name).write_bytes(read_bytes(model / name))
    return big


# ---- check ---------------------------------------------------------------------------------------
@torch.inference_mode()
def greedy(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Return transformers' greedy tokens of each prompt, computed in float32, and the lead of each
    over the next best logit."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    options = dict(
        max_new_tokens=CHECKED_TOKENS,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        best = torch.cat(out.logits).topk(2).values
        texts.append((out.sequences[0, len(prompt) :].tolist(), (best[:, 0] - best[:, 1]).tolist()))
    return texts


def check(small: Path, big: Path, prompts: list[str]) -> bool:
    """Say of each prompt whether both models continue it alike, or where they part.

    One model is in memory at a time."""
    for folder in (small, big):
        Source.open(folder)  # a UserError for what is no checkpoint
    tokenizer = load_tokenizer(small)
    tokens = [tokenizer.encode(prompt).ids for prompt in prompts]
    texts = list(zip(greedy(small, tokens), greedy(big, tokens), strict=True))
    for number, ((want, leads), (got, _)) in enumerate(texts, 1):
        at = first_difference(want, got)
        verdict = (
            f"identical ({len(want)} tokens)"
            if at is None
            else f"parts at new token {at}: {parting(tokenizer, want, got, leads, at)}"
        )
        print(f"prompt {number}: {verdict}", flush=True)
    return all(want == got for (want, _), (got, _) in texts)


def parting(tokenizer, want: list[int], got: list[int], leads: list[float], at: int) -> str:
    old, new = (
        repr(tokenizer.decode([ids[at]])) if at < len(ids) else "the end" for ids in (want, got)
    )
    return (
        f"{old} by the small model"
        + (f" (its lead: {leads[at]:.1e})" if at < len(leads) else "")
        + f", {new} by the big one"
    )


# ---- command line --------------------------------------------------------------------------------
def arguments(argv: Sequence[str]) -> argparse.Namespace:
    each = Parser(
        prog="inflate.py",
        description="Grow a Llama checkpoint into a larger one that computes the same function.",
    )
    each.add_argument("--model", required=True, type=Path, metavar="DIR")
    each.add_argument("--output", required=True, type=Path, metavar="DIR")
    each.add_argument(
        "--size-gb", type=float, metavar="GB", help="of weights as stored, in 10^9 bytes"
    )
    each.add_argument(
        "--hidden", type=int, metavar="N", help="width of the stream; or --size-gb chooses it"
    )
    each.add_argument(
        "--layers", type=int, metavar="N", help="decoder layers; or --size-gb chooses them"
    )
    each.add_argument(
        "--heads",
        metavar="Q/KV",
        help="query and key-value heads, such as 32/8 (default: they grow with the width)",
    )
    each.add_argument(
        "--head-dim", type=int, metavar="N", help="size of a head (default: the model's)"
    )
    each.add_argument(
        "--vocab",
        type=int,
        metavar="N",
        help="tokens, such as 32000 or 128256; new ones never win (default: the model's)",
    )
    each.add_argument(
        "--positions", type=int, metavar="N", help="the longest text (default: the model's)"
    )
    each.add_argument(
        "--dtype",
        default="float16",
        choices=("float16", "float32"),
        help="as stored (default: float16)",
    )
    each.add_argument(
        "--check",
        action="store_true",
        help="replay demo prompts with both models; alone: of an output made before",
    )
    return each.parse_args(argv)


def wanted_of(args: argparse.Namespace) -> Wanted | None:
    """Return what is asked for, or None if that is nothing."""
    sizes = {
        name: getattr(args, name) for name in ("hidden", "layers", "vocab", "positions", "head_dim")
    }
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
    if args.size_gb is not None and not 0 < args.size_gb < math.inf:
        raise UserError(f"--size-gb is {args.size_gb}, it must be a positive number")
    heads = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", args.heads) if args.heads is not None else None
    if args.heads is not None and not heads:
        raise UserError(
            f"--heads is {args.heads!r}: it must be query/key-value heads, such as 32/8"
        )
    weights = (
        None
        if args.size_gb is None
        else int(args.size_gb * 1e9 / getattr(torch, args.dtype).itemsize)
    )
    wanted = Wanted(weights, heads=(int(heads[1]), int(heads[2])) if heads else None, **sizes)
    return None if wanted == Wanted() else wanted


def run(args: argparse.Namespace) -> int:
    wanted = wanted_of(args)
    if wanted is None and not args.check:
        raise UserError(
            "--size-gb is missing: how large is the model to be? (Or give --hidden, --layers, "
            "--vocab ...)"
        )
    if wanted is not None:
        big = inflate(args.model, args.output, wanted, args.dtype)
        stored, computed = (
            big.weights * getattr(torch, name).itemsize / 1e6 for name in (args.dtype, "float32")
        )
        sizes = (
            f"{stored:.0f} MB as stored ({args.dtype}), {computed:.0f} MB as computed with "
            "on a CPU (float32)"
        )
        print(f"{args.output}: {big.weights / 1e6:.0f} M weights, {sizes}, {big}", file=sys.stderr)
    if args.check:
        prompts = read_prompts(str(ROOT / "demo" / "prompts.jsonl"))[:CHECKED_PROMPTS]
        return 0 if check(args.model, args.output, prompts) else 1
    return 0


@command
def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, 1 if --check finds another text, 2 for bad input (one line on
    stderr), 130 if interrupted."""
    return run(arguments(argv))


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a plain kill cleans up like Ctrl-C does
    sys.exit(main())
