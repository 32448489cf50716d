"""A run of consecutive decoder layers of a transformers model, alone: the target's stages and the draft model.

The layers, rotary embedding and norms are transformers' own classes; rows, positions and attention (attention.py) are ours.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Iterable, Iterator
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowspec.core.messages import PREFILL_ROWS, Prune
from flowspec.core.stage import Admitted, StageState, Waiting
from flowspec.errors import UserError, need
from flowspec.models import attention, jit, kernels, native, vector
from flowspec.models.attention import Seen
from flowspec.models.cache import RowCache
from flowspec.models.device import on_host, placed
from flowspec.models.families import HEAD, family_of, module_tensors, read_config
from flowspec.models.kernels import PackedLinear
from flowspec.models.manifest import Manifest
from flowspec.models.weights import Checkpoint, TensorFile

Needed = Callable[[], bool]
ALWAYS: Needed = lambda: True  # noqa: E731


class StageModel(nn.Module):
    """Decoder layers [0, layers) of one rank, behind the embedding if `first`, before the final norm if `last`."""

    def __init__(self, config: dict, layers: int, first: bool, last: bool):
        super().__init__()
        classes = family_of(config).classes()
        self.config = classes.config.from_dict(
            {**config, "attn_implementation": attention.implementation()}
        )
        with torch.device("meta"):
            self.embed_tokens = (
                nn.Embedding(self.config.vocab_size, self.config.hidden_size) if first else None
            )
            self.layers = nn.ModuleList(classes.layer(self.config, k) for k in range(layers))
            self.norm = (
                classes.norm(self.config.hidden_size, eps=self.config.rms_norm_eps)
                if last
                else None
            )
        self.alone = False
        self.native = False
        self.rotary = classes.rotary(self.config)  # its frequencies are in no file: never on meta
        self.eval()

    def load(
        self, tensors: Iterable[tuple[str, Tensor]], device: str, source: str, dtype: torch.dtype
    ) -> StageModel:
        """Take each tensor as it comes (the caller holds one at a time); UserError if some are missing or misshapen.

        On a CPU that has kernels for `dtype` the matrices are packed as they come, and everything else is float32 (kernels.py)."""
        waiting = dict(self.named_parameters())
        packs = packs_weights(self.config.to_dict(), dtype, device)
        self.dtype = torch.float32 if packs else dtype
        for name, tensor in tensors:
            expected = waiting.pop(name, None)
            if expected is None:
                continue  # what a layer of this family does not know, such as stored rotary frequencies
            if expected.shape != tensor.shape:
                raise UserError(
                    f"{source}: {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(expected.shape)}"
                )
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            if packs and leaf == "weight" and isinstance(module, nn.Linear):
                self.set_submodule(path, PackedLinear(tensor, module.bias, dtype))
                continue
            tensor = (
                tensor.to(device) if not packs or module is self.embed_tokens else tensor.float()
            )
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        if waiting:
            raise UserError(
                f"{source}: {len(waiting)} tensors are missing, such as {next(iter(waiting))}"
            )
        self.rotary.to(device)
        self.native = packs and all(native.suits(layer, self.config) for layer in self.layers)
        if self.native:
            self.layers = nn.ModuleList(
                native.NativeLayer(layer, self.config) for layer in self.layers
            )
        return self

    def compute_alone(self) -> None:
        """From now on a row of a tree has the same result, to the bit, whatever is in its batch or between its ancestors in the cache.

        Native layers are like that anyway; others take each row by itself, with keys and values laid out in the order of positions."""
        self.alone = not self.native

    @property
    def size(self) -> int:
        """Bytes of the weights as they are held."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode()
    def forward(
        self,
        rows: Tensor,
        admitted: Admitted,
        cache: RowCache,
        taps: Seq[int] = (),
        needed: Needed = ALWAYS,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Append n rows to the cache and return their outputs [n, hidden], and what enters the layers `taps`: [n, len(taps) * hidden].

        None and None once they are not `needed` (asked between layers).

        rows: token ids int [n] for a first stage, else features [n, hidden]; admitted: where they stand and what they see."""
        cache.extend(len(rows))
        device = self.device
        rows = placed(rows, device)
        x = (self.embed_tokens(rows.long()) if self.embed_tokens is not None else rows).to(
            self.dtype
        )[None]
        seen = Seen(admitted, device, in_order=self.alone)
        turns = self.rotary(x, placed(torch.from_numpy(admitted.positions), device)[None])
        turns = native.turns(*turns) if self.native else turns
        entered = {}
        for k, layer in enumerate(self.layers):
            if k and not needed():
                return None, None
            if k in taps:
                entered[k] = x[0]
            x = layer(
                x,
                attention_mask=seen,
                position_embeddings=turns,
                past_key_values=cache,
                use_cache=True,
            )
        tapped = torch.cat([entered[k] for k in taps], -1) if taps else None
        return (x[0] if self.norm is None else self._normed(x[0])), tapped

    def _normed(self, x: Tensor) -> Tensor:
        assert self.norm is not None
        return (
            vector.norm(x, self.norm.weight, self.config.rms_norm_eps)
            if self.native
            else self.norm(x)
        )


def packs_weights(config: dict, dtype: torch.dtype, device: str) -> bool:
    """Matrices of `dtype` are computed with by our own kernels there, their rows and sums float32; UserError where nothing else can.

    Experts come fused, which is no `nn.Linear`: with them only float32 can be both."""
    whole = dtype == torch.float32 or not config.get("num_local_experts")
    possible = device == "cpu" and jit.available() and dtype in kernels.KINDS and whole
    need(
        dtype != torch.int8 or possible,
        "dtype int8 works on a CPU with fused multiply-add, with llvmlite, without experts",
    )
    return possible


class Tapped(NamedTuple):
    """What entered some layers at consecutive tokens of the text."""

    at: int
    """position of the first"""
    rows: Tensor
    """[n, layers * hidden]"""


class Cached:
    """The rows of one request in one model. Which row holds what is the caller's to know (core/stage.py).

    Features are left on the model's device, where they may still be computed, or wanted `to_host`: a forward then ends when they are there.

    taps: layers of this model (0 its first) whose inputs are wanted of every token that becomes text."""

    def __init__(self, model: StageModel, to_host: bool = False, taps: Seq[int] = ()):
        self.model, self.cache = model, RowCache()
        self._to_host, self._taps = to_host, taps
        self._waiting = Waiting[Tensor]()
        self._entered: Tensor | None = None  # the taps of the last forward
        self.model_cpu = 0.0
        """CPU seconds that this thread spent in the model"""

    def forward(
        self, rows: Tensor, admitted: Admitted, needed: Needed = ALWAYS, ids: Seq[int] | None = None
    ) -> Tensor | None:
        """These rows (tokens, or features [n, hidden]) through the model: features [n, hidden], or None once they are not `needed`.

        `ids`: the nodes of a tree that they are; None: rows of the text. What entered the taps is held until it is known which
        nodes became text."""
        begun = time.thread_time()
        forward = self._in_parts if ids is not None and self.model.alone else self._through
        out, self._entered = forward(rows, admitted, needed)
        if self._to_host:
            out, self._entered = (
                made if made is None else on_host(made) for made in (out, self._entered)
            )
        if ids is not None and self._entered is not None:
            self._waiting.hold(ids, self._entered)
        self.model_cpu += time.thread_time() - begun
        return out

    def _through(
        self, rows: Tensor, admitted: Admitted, needed: Needed
    ) -> tuple[Tensor | None, Tensor | None]:
        return self.model(rows, admitted, self.cache, self._taps, needed)

    def _in_parts(
        self, rows: Tensor, admitted: Admitted, needed: Needed
    ) -> tuple[Tensor | None, Tensor | None]:
        """A forward for each row. (Chunks of the prompt are the same in every method, and go through whole.)"""
        outs, entered = [], []
        for k in range(len(rows)):
            out, tapped = self._through(rows[k : k + 1], admitted.only(k), needed)
            if out is None:
                self.cache.extend(len(rows) - 1 - k)  # the books count them
                return None, None
            outs.append(out)
            entered += [] if tapped is None else [tapped]
        return torch.cat(outs), torch.cat(entered) if entered else None

    def entered(self, at: int) -> Tapped | None:
        """The taps of the text's rows that went through last, the first of them at position `at`; None without taps."""
        return None if self._entered is None else Tapped(at, self._entered)

    def settle(self, at: int, text: Iterable[int], alive: Container[int]) -> Tapped | None:
        """The taps of the nodes that became text, at the positions from `at` on, if there are any. What is not alive is forgotten."""
        if not self._taps:
            return None
        rows = self._waiting.settle(text, alive)
        return Tapped(at, torch.stack(rows)) if rows else None


class Sequence:
    """A drafter's request: the books and the cache, moved together."""

    def __init__(self, model: StageModel):
        self.state, self._rows = StageState(), Cached(model)

    def prefill(self, rows: Tensor) -> Tensor:
        """Rows of the text (tokens or features [n, hidden]) at its end, through the model: features [n, hidden]."""
        return self._forward(rows, self.state.extend(len(rows)))

    def extend_and_verify(
        self, rows: Tensor, at: int, ids: list[int], parents: list[int]
    ) -> tuple[np.ndarray, Tensor]:
        """In one forward m rows of committed tokens, at the positions from `at` on, and behind them n tree rows that are all worth it.

        rows: [m + n, hidden]; positions [m + n] and features [m + n, hidden] of all of them."""
        admitted = self.state.extend(len(rows) - len(ids), at).then(self.state.admit(ids, parents))
        assert len(admitted.kept) == len(rows), "a row that is not worth it"
        return admitted.positions, self._forward(rows, admitted)

    def prune(self, prune: Prune) -> None:
        """Follow a decision."""
        gather = self.state.prune(prune)
        if gather:
            self._rows.cache.gather(gather)

    def _forward(self, rows: Tensor, admitted: Admitted) -> Tensor:
        out = self._rows.forward(rows, admitted)
        assert out is not None
        return out


class Head:
    """lm_head: features [n, hidden] -> logits [n, vocabulary] in float32, or float64 if the weights are.

    Products of half-precision numbers are exact in float32, and rounded back to half many logits would tie. Where there is no
    kernel for that (kernels.py), half-precision weights are made float32 a piece at a time, which stays in the processor's cache."""

    PIECE = 1 << 20
    """elements"""

    def __init__(self, weight: Tensor, dtype: torch.dtype | None = None):
        """weight [vocabulary, hidden], computed with as `dtype` (None: its own)."""
        dtype = dtype or weight.dtype
        self.vocabulary, self.device = len(weight), weight.device
        packs = self.device.type == "cpu" and dtype in kernels.KINDS and jit.available()
        self.alone = False
        """each row by itself, so that its logits are the same in any batch"""
        self._packed = PackedLinear(weight, dtype=dtype) if packs else None
        self._weight = None if packs else weight

    @property
    def weight(self) -> Tensor:
        """[vocabulary, hidden]; a copy where it is packed."""
        if self._packed is None:
            assert self._weight is not None
            return self._weight
        return self._packed.weight()

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed(features.float())
        if self.alone and len(features) > 1:
            return torch.cat([self(row) for row in features.split(1)])
        features, weight = placed(features, self.device), self.weight
        if weight.dtype in (torch.float32, torch.float64):
            return (
                weight @ features.to(weight.dtype).T
            ).T.contiguous()  # for few rows much quicker than the other way round
        features, logits = (
            features.float(),
            weight.new_empty(len(features), len(weight), dtype=torch.float32),
        )
        step = max(1, self.PIECE // weight.shape[1])
        for begin in range(0, len(weight), step):
            piece = weight[begin : begin + step].float()
            torch.mm(features, piece.T, out=logits[:, begin : begin + step])
        return logits


def load_stage(
    manifest: Manifest,
    rank: int,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int], None] = lambda size: None,
) -> StageModel:
    """The layers of one rank of a split model; `progress(bytes)` after each tensor, in bytes as computed with."""
    config, entry, ring = (
        read_config(manifest.folder(rank)),
        manifest.ranks[rank],
        manifest.topology,
    )
    path = manifest.path(entry)
    model = StageModel(config, entry.num_layers, rank == ring.FIRST, rank == ring.last)
    tensors = module_tensors(TensorFile(path), family_of(config), entry.layers[0], stored_as(dtype))
    return model.load(_counted(tensors, progress), device, str(path), dtype)


SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, PREFILL_ROWS)


@torch.inference_mode()
def rehearse(
    model: StageModel, head: Head | None = None, rows: Callable[[int], Tensor] | None = None
) -> None:
    """Forwards of many sizes whose results nobody wants; `head` as well if it is given. A GPU loads each kernel when it is first used,
    which takes many times what the kernel does: a ring that met this while it decodes would believe that its rows are dear.

    rows(n): n rows of what the model takes; None: tokens for a first stage, else features."""
    if model.device.type == "cpu":
        return
    width, first = model.config.hidden_size, model.embed_tokens is not None
    rows = rows or (
        lambda n: (
            torch.zeros(n, dtype=torch.long) if first else torch.zeros(n, width, dtype=model.dtype)
        )
    )
    books, cached = StageState(), Cached(model, to_host=True)
    for n in (*SIZES, 1):
        out = cached.forward(rows(n), books.extend(n))
        if head and out is not None:
            head(out)


def stored_as(dtype: torch.dtype) -> torch.dtype | None:
    """What to read for computing with `dtype`: None, for what is made of the stored numbers, reads them as they are."""
    return None if dtype == torch.int8 else dtype


def _counted(
    tensors: Iterable[tuple[str, Tensor]], progress: Callable[[int], None]
) -> Iterator[tuple[str, Tensor]]:
    done = 0
    for name, tensor in tensors:
        done += tensor.nbytes
        yield name, tensor
        progress(done)


def load_head(manifest: Manifest, rank: int, dtype: torch.dtype, device: str) -> Head:
    """The lm_head that lies beside rank 0 and beside the last stage."""
    entry = manifest.ranks[rank].lm_head
    assert entry is not None, f"the split has no head beside rank {rank}"
    return Head(TensorFile(manifest.path(entry)).read(HEAD, stored_as(dtype)).to(device), dtype)


def load_whole(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int], None] = lambda size: None,
) -> tuple[StageModel, Head]:
    """A whole checkpoint as one stage and its head: a draft model; `progress` as for `load_stage`."""
    config, checkpoint = read_config(folder), Checkpoint(folder)
    family = family_of(config)
    model = StageModel(config, config["num_hidden_layers"], first=True, last=True)
    files = {checkpoint.file(name).path: checkpoint.file(name) for name in checkpoint.names}
    tensors = (
        pair
        for file in files.values()
        for pair in module_tensors(file, family, 0, stored_as(dtype))
    )
    model.load(_counted(tensors, progress), device, str(folder), dtype)
    tied = HEAD not in checkpoint.names
    need(
        not tied or bool(config.get("tie_word_embeddings")),
        f"{folder} has no {HEAD}, and config.json does not tie it to the embedding",
    )
    weight = (
        model.get_parameter("embed_tokens.weight")
        if tied
        else checkpoint.file(HEAD).read(HEAD, stored_as(dtype)).to(device)
    )
    return model, Head(weight, dtype)
