"""A stage is a run of consecutive decoder layers of a transformers model, alone.

The target's stages and the draft model are such runs. The layers, rotary embedding and norms are
transformers' own classes; rows, positions and attention (attention.py) are ours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from copy import copy
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from flowspec.comm.base import Links
from flowspec.core.messages import PREFILL_ROWS, Prune
from flowspec.core.stage import Admitted, StageState, Waiting
from flowspec.core.topology import WHOLE, Shard
from flowspec.errors import UserError, need
from flowspec.models import attention, fourbit, jit, kernels, native, vector
from flowspec.models.adapted import adapted, as_held
from flowspec.models.attention import Seen
from flowspec.models.cache import Caches, Part, RowCache, joined, split
from flowspec.models.device import on_host, placed
from flowspec.models.families import HEAD, family_of, layer_of, module_tensors, read_config
from flowspec.models.kernels import PackedLinear
from flowspec.models.manifest import Manifest
from flowspec.models.parallel import Megatron, ParallelLayer, Way, embedded
from flowspec.models.quantised import Tensors, plain
from flowspec.models.shard import narrowed
from flowspec.models.weights import Checkpoint, Portion, TensorFile

Needed = Callable[[], bool]
ALWAYS: Needed = lambda: True  # noqa: E731


class StageModel(nn.Module):
    """A StageModel is the decoder layers [0, layers) of one rank, or its shard of them.

    In the whole model they are the layers from `at` on. They are behind the embedding if `first`,
    and before the final norm if `last`. `links` lead to the other members of the stage; they are
    None if the rank is a stage alone. If `whole` is set, the tensors to load are those of whole
    layers, of which `share` makes shards."""

    def __init__(
        self,
        config: dict,
        layers: int,
        first: bool,
        last: bool,
        links: Links | None = None,
        whole: bool = False,
        at: int = 0,
    ):
        super().__init__()
        family = family_of(config)
        classes = family.classes()
        shard = Shard(links.index, links.size) if links else WHOLE
        self.links, self._whole = links, whole
        self.share: Callable[[nn.Module], nn.Module] | None = None
        self.config = classes.config.from_dict(
            narrowed(config, 1 if whole else shard.members)
            | {"attn_implementation": attention.implementation()}
        )
        with torch.device("meta"):
            model = classes.model(self._of_shard(shard)).get_submodule(family.inside)
        own = slice(at, at + layers)
        self.embed_tokens = model.get_input_embeddings() if first else None
        self.layers = nn.ModuleList(map(adapted, model.get_submodule(family.theirs("layers"))[own]))
        self.norm = model.get_submodule(family.theirs("norm")) if last else None
        self.entrance = family.entrance if first else ()
        self._multiplier = family.meant(config, "embedding_multiplier") or 1.0
        for name in self.entrance:
            self.add_module(name, model.get_submodule(name))
        for module, leaf in self._computed():  # in no file: never on meta
            if getattr(module, leaf).is_meta:
                setattr(module, leaf, torch.empty_like(getattr(module, leaf), device="cpu"))
                model._init_weights(module)
        asked = signature(self.layers[0].forward).parameters
        self._cache_name = "layer_past" if "layer_past" in asked else "past_key_values"
        rotary = getattr(model, "rotary_emb", None)
        self.rotary = rotary and type(rotary)(self.config)  # nor are its frequencies on meta
        several = rotary and "layer_type" in signature(rotary.forward).parameters
        self._angles = self.config.layer_types[own] if several else [None] * layers
        """Rotary positions of each layer are by the angles of this kind; None if there is one."""
        self.alone = False
        self.native = False
        self.eval()

    def load(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        device: str,
        source: str,
        dtype: torch.dtype,
        apart: Iterable[int] = (),
        nf4: bool = False,
    ) -> StageModel:
        """Take each tensor as it comes (the caller holds one at a time) and return the model.

        On a CPU that has kernels for `dtype` the matrices are packed as they come, and everything
        else is float32 (kernels.py). If `nf4` is set, they become four bits a weight as they come
        (fourbit.py), and `dtype` is that of all else. Raise UserError if tensors are missing or of
        another shape.
        The layers `apart` have none: they stay on the meta device, as the dtype of the rows."""
        if nf4:
            need(
                family_of(self.config.to_dict()).linear,
                "dtype nf4 is for the matrices of linear layers, and experts are none",
            )
            fourbit.check(device)
        waiting = self.state_dict(keep_vars=True)
        packs = not self._whole and packs_weights(self.config.to_dict(), dtype, device)
        self.dtype = torch.float32 if packs else dtype
        for k in apart:
            self.layers[k].to(self.dtype).requires_grad_(False)
            for name in self.layers[k].state_dict():
                del waiting[f"layers.{k}.{name}"]
        for name, tensor in tensors:
            expected = waiting.pop(name, None)
            if expected is None:
                continue  # a layer of this family does not know it
            path, _, leaf = name.rpartition(".")
            module = self.get_submodule(path)
            tensor = as_held(module, leaf, tensor)
            if expected.shape != tensor.shape:
                raise UserError(
                    f"{source}: {name} has shape {tuple(tensor.shape)}, config.json asks for "
                    f"{tuple(expected.shape)}"
                )
            if leaf == "weight" and isinstance(module, nn.Linear):
                made = self._made(tensor, module.bias, dtype, device, nf4, packs)
                if made is not None:
                    self.set_submodule(path, made)
                    continue
            tensor = (
                tensor.to(device) if not packs or module is self.embed_tokens else tensor.float()
            )
            held = leaf in module._parameters
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if held else tensor)
            self._shared(name, waiting)
        if waiting:
            raise UserError(
                f"{source}: {len(waiting)} tensors are missing, such as {next(iter(waiting))}"
            )
        for module, leaf in self._computed():
            setattr(module, leaf, getattr(module, leaf).to(device))
        self._prepare(packs)
        return self

    def _prepare(self, packs: bool) -> None:
        """Make of the loaded layers what computes on this device and among these members."""
        self.native = packs and all(native.suits(layer, self.config) for layer in self.layers)
        for k in range(len(self.layers)):  # one by one: a native layer copies matrices
            if self.native:
                self.layers[k] = native.NativeLayer(self.layers[k], self.config)
            if self.links and not self._whole:
                self.layers[k] = ParallelLayer(self.layers[k])

    def _made(
        self,
        weight: Tensor,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        device: str,
        nf4: bool,
        packs: bool,
    ) -> nn.Module | None:
        """Return what multiplies with a matrix of a linear layer; None means torch's own."""
        if nf4 and fourbit.fits(weight):
            return fourbit.FourBitLinear(weight, bias, self.dtype, device)
        return PackedLinear(weight, bias, dtype) if packs else None

    def _computed(self) -> list[tuple[nn.Module, str]]:
        """Return the tensors that are in no file: modules, and the tensor's name in each."""
        return [
            (module, leaf)
            for module in self.modules()
            for leaf in sorted(module._non_persistent_buffers_set)
        ]

    def _shared(self, name: str, waiting: Iterable[str]) -> None:
        """Keep a shard of the layer to which the tensor `name` belongs, if it is complete."""
        place = re.match(r"layers\.(\d+)\.", name)
        if self.share is None or not place or any(n.startswith(place[0]) for n in waiting):
            return
        self.layers[int(place[1])] = self.share(self.layers[int(place[1])])

    def compute_alone(self) -> None:
        """Make the result of a tree's row the same, to the bit, whatever is around it, from now on.

        That is what is in its batch or between its ancestors in the cache. Native layers are like
        that anyway; others take each row by itself, with keys and values laid out in the order of
        positions."""
        self.alone = not self.native

    @property
    def size(self) -> int:
        """Return the bytes of the weights as they are held."""
        return sum(t.nbytes for t in (*self.parameters(), *self.buffers()))

    @property
    def row_bytes(self) -> int:
        """Return the bytes of the keys and values of a token in all layers."""
        config = self.config
        groups = getattr(config, "num_key_value_heads", config.num_attention_heads)
        if self._whole and self.links:  # of which this rank keeps its share
            groups //= self.links.size
        numbers = 2 * groups * native.head_dim(config)
        if latent := getattr(config, "kv_lora_rank", None):  # multi-head latent attention
            numbers = latent + config.qk_rope_head_dim
        return len(self.layers) * numbers * self.dtype.itemsize

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @torch.inference_mode()
    def forward(
        self,
        rows: Tensor,
        parts: Sequence[Part],
        taps: Sequence[int] = (),
        needed: Needed = ALWAYS,
        sharing: Way = Megatron,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Append n rows to the caches of their requests; return their outputs [n, hidden] and taps.

        The taps are what enters these layers, side by side: [n, len(taps) * hidden]. Both are None
        once the rows are not `needed`, which is asked between layers. `rows` are token ids (int
        [n]) for a first stage, else features [n, hidden], one request's after the other's. `parts`,
        in the same order, say where the rows stand, what they see and which cache they have.

        All members of a stage are called with the same rows and parts, and share the work as
        `sharing` says. If one of them needs the rows no longer, all leave off at once; whole layers
        that have been made shards are computed to the end."""
        caches, device = Caches(parts), self.device
        rows = placed(rows, device)
        positions = joined([torch.from_numpy(part.admitted.positions) for part in parts])
        positions = placed(positions, device)
        x = self._entered(rows.long(), positions) if self.embed_tokens is not None else rows
        x = x.to(self.dtype)
        seen = [Seen(part.admitted, device, in_order=self.alone) for part in parts]
        around = [
            native.Around(seen, turns, caches, positions[None])
            for turns in self._turns(x, positions)
        ]
        out, entered = (
            self._through_shards(x, around, taps, needed, sharing)
            if self.links and not self._whole
            else self._through(x, around, taps, ALWAYS if self._whole else needed)
        )
        if out is None:
            return None, None
        tapped = torch.cat([entered[k] for k in taps], -1) if taps else None
        return (out if self.norm is None else self._normed(out)), tapped

    def _through(
        self, x: Tensor, around: Sequence[native.Around], taps: Sequence[int], needed: Needed
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Return the rows [n, hidden] behind the layers, and what entered those of `taps`.

        The rows are None once they are not needed."""
        entered: dict[int, Tensor] = {}
        x = x[None]
        for k, layer in enumerate(self.layers):
            if k and not needed():
                return None, entered
            if k in taps:
                entered[k] = x[0]
            x = layer(
                x,
                attention_mask=around[k].seen,
                position_embeddings=around[k].turns,
                position_ids=around[k].positions,
                use_cache=True,
                **{self._cache_name: around[k].caches},
            )
        return x[0], entered

    def _through_shards(
        self,
        x: Tensor,
        around: Sequence[native.Around],
        taps: Sequence[int],
        needed: Needed,
        sharing: Way,
    ) -> tuple[Tensor | None, dict[int, Tensor]]:
        """Do the same together with the other members of the stage."""
        assert self.links is not None
        entered: dict[int, Tensor] = {}
        shared = sharing(self.links, len(x))
        x = shared.enter(x)
        for k, layer in enumerate(self.layers):
            if k in taps:
                entered[k] = shared.rows(x)
            x = layer(x, shared, around[k], k > 0 and not needed())
            if shared.abandon:
                return None, entered
        return shared.rows(x), entered

    def _of_shard(self, shard: Shard) -> Any:
        """Return the configuration with the part of the vocabulary that a shard's embedding has."""
        if shard.members == 1:
            return self.config
        config = copy(self.config)
        config.vocab_size, config.pad_token_id = len(shard.of(config.vocab_size)), None
        return config

    def _turns(self, x: Tensor, positions: Tensor) -> list[tuple[Tensor, Tensor] | None]:
        """Return the rotary positions for each layer; None where a family has none.

        Some families turn by other angles in layers of another kind."""
        if self.rotary is None:
            return [None] * len(self.layers)
        made = {
            kind: self.rotary(x[None], positions[None], *([kind] if kind else []))
            for kind in dict.fromkeys(self._angles)
        }
        if self.native:
            made = {kind: native.turns(*turns) for kind, turns in made.items()}
        return [made[kind] for kind in self._angles]

    def _entered(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Return what enters the first layer, [n, hidden], at tokens (int64 [n]) of a text."""
        x = self._embedded(tokens).to(self.dtype) * self._multiplier
        for name in self.entrance:
            module = self.get_submodule(name)
            if isinstance(module, nn.Embedding):  # OPT's first positions mean something else
                x = x + module.weight[positions + getattr(module, "offset", 0)]
            else:
                x = module(x)
        return x

    def _embedded(self, tokens: Tensor) -> Tensor:
        """Return the embeddings [n, hidden] of tokens (int64 [n])."""
        assert self.embed_tokens is not None
        if self.links:
            return embedded(self.links, self.embed_tokens, self.config.vocab_size, tokens)
        return self.embed_tokens(tokens)

    def _normed(self, x: Tensor) -> Tensor:
        assert self.norm is not None
        return (
            vector.norm(x, self.norm.weight, self.config.rms_norm_eps)
            if self.native
            else self.norm(x)
        )


def packs_weights(config: dict, dtype: torch.dtype, device: str) -> bool:
    """Return whether our own kernels compute with matrices of `dtype` on this device.

    Their rows and sums are float32. Experts come fused, which is no `nn.Linear`, so with experts
    only float32 is possible. Raise UserError where the kernels cannot and nothing else can."""
    whole = dtype == torch.float32 or family_of(config).linear
    possible = device == "cpu" and jit.available() and dtype in kernels.KINDS and whole
    need(
        dtype != torch.int8 or possible,
        "dtype int8 works on a CPU with fused multiply-add, with llvmlite, without experts",
    )
    return possible


class Tapped(NamedTuple):
    """A Tapped is what entered some layers at consecutive tokens of the text."""

    at: int
    """The first token has this position."""
    rows: Tensor
    """The rows are [n, layers * hidden]."""


class Cached:
    """A Cached holds the rows of one request in one model.

    The caller knows which row holds what (core/stage.py). Features are left on the model's device,
    where they may still be being computed; if they are wanted `to_host`, a forward ends when they
    are there. `taps` are the layers of this model (0 is its first) whose inputs are wanted at every
    token that becomes text. If a stage has several members, they share the work as `sharing` says,
    in a forward with other requests as that of the first."""

    def __init__(
        self,
        model: StageModel,
        to_host: bool = False,
        taps: Sequence[int] = (),
        sharing: Way = Megatron,
    ):
        self.model, self.cache = model, RowCache()
        self.to_host, self.taps, self.sharing = to_host, tuple(taps), sharing
        self._waiting = Waiting[Tensor]()
        self._entered: Tensor | None = None  # the taps of the last forward
        self.model_cpu = 0.0
        """The threads of its forwards spent so many CPU seconds in the model. Of a forward with
        other requests only the share of its rows counts."""

    def forward(
        self,
        rows: Tensor,
        admitted: Admitted,
        needed: Needed = ALWAYS,
        ids: Sequence[int] | None = None,
    ) -> Tensor | None:
        """Put these rows alone through the model; see `forward_together` and `Share`.

        Return what `forward_together` returns."""
        return forward_together(rows, [Share(self, admitted, ids)], needed)

    def hold(self, entered: Tensor | None, ids: Sequence[int] | None) -> None:
        """Keep what entered the taps in a forward until it is known which nodes became text.

        `entered` is [n, taps * hidden]; None if there are no taps or the forward was abandoned."""
        self._entered = entered
        if ids is not None and entered is not None:
            self._waiting.hold(ids, entered)

    def entered(self, at: int) -> Tapped | None:
        """Return the taps of the text's rows that went through last; None without taps.

        The first of these rows is at position `at`."""
        return None if self._entered is None else Tapped(at, self._entered)

    def settle(self, at: int, text: Iterable[int], alive: Container[int]) -> Tapped | None:
        """Return the taps of the nodes that became text, at the positions from `at` on.

        It is None if there are none. What is not alive is forgotten."""
        if not self.taps:
            return None
        rows = self._waiting.settle(text, alive)
        return Tapped(at, torch.stack(rows)) if rows else None


class Share(NamedTuple):
    """A share is what of a forward belongs to one request."""

    cached: Cached
    admitted: Admitted
    ids: Sequence[int] | None
    """These nodes of a tree are its rows; None means that its rows are of the text."""

    @property
    def rows(self) -> int:
        """Return how many rows the share has."""
        return len(self.admitted.kept)

    @property
    def whole(self) -> Part:
        """Return all of the share as one part of a forward."""
        return Part(self.admitted, self.cached.cache)

    @property
    def pieces(self) -> list[Part]:
        """Return the parts that a model that computes alone takes one by one.

        They are each row of a tree, or a whole chunk of the text. (Chunks of the prompt are the
        same in every method.)"""
        if self.ids is None:
            return [self.whole]
        return [Part(self.admitted.only(k), self.cached.cache) for k in range(self.rows)]


def forward_together(
    rows: Tensor, shares: Sequence[Share], needed: Needed = ALWAYS
) -> Tensor | None:
    """Put rows of several requests through one model, together unless it computes alone.

    `rows` are tokens, or features [n, hidden], in the order of the shares, whose requests are all
    different and all want their features in the same place. Return the features [n, hidden] of all
    rows, or None once they are not `needed`: then, too, each cache is longer by its rows."""
    begun, model, to_host = time.thread_time(), shares[0].cached.model, shares[0].cached.to_host
    taps = tuple(dict.fromkeys(k for share in shares for k in share.cached.taps))
    sharing = shares[0].cached.sharing
    if model.alone:
        pieces = [part for share in shares for part in share.pieces]
        out, entered = _one_by_one(model, rows, pieces, taps, needed, sharing)
    else:
        out, entered = model(rows, [share.whole for share in shares], taps, needed, sharing)
    if to_host:
        out, entered = (made if made is None else on_host(made) for made in (out, entered))
    of_each = None if entered is None else split(entered, [share.rows for share in shares])
    for k, (cached, _, ids) in enumerate(shares):
        cached.hold(None if of_each is None else _columns(of_each[k], taps, cached.taps), ids)
    spent = time.thread_time() - begun
    for share in shares:
        share.cached.model_cpu += spent * share.rows / max(1, len(rows))
    return out


def _one_by_one(
    model: StageModel,
    rows: Tensor,
    parts: Sequence[Part],
    taps: Sequence[int],
    needed: Needed,
    sharing: Way,
) -> tuple[Tensor | None, Tensor | None]:
    """Put each part through in a forward of its own; return what `StageModel.forward` does."""
    outs, entered = [], []
    for k, some in enumerate(split(rows, [part.rows for part in parts])):
        out, tapped = model(some, [parts[k]], taps, needed, sharing)
        if out is None:
            for part in parts[k + 1 :]:
                part.cache.extend(part.rows)  # the books count them
            return None, None
        outs.append(out)
        entered += [] if tapped is None else [tapped]
    return joined(outs), joined(entered) if entered else None


def _columns(entered: Tensor, held: tuple[int, ...], wanted: tuple[int, ...]) -> Tensor | None:
    """Return what entered the layers `wanted`, out of what entered those `held`.

    `entered` is [n, held * hidden]; None is returned if no layers are wanted."""
    if held == wanted:
        return entered
    of_layer = dict(zip(held, entered.chunk(len(held), 1), strict=True))
    return torch.cat([of_layer[k] for k in wanted], 1) if wanted else None


class CachedText:
    """A cached text is one request of a drafter: its books and its cache, moved together."""

    def __init__(self, model: StageModel):
        self.state, self._rows = StageState(), Cached(model)

    @property
    def size(self) -> int:
        """Return the bytes of the keys and values for which there is room."""
        return self._rows.cache.capacity * self._rows.model.row_bytes

    def prefill(self, rows: Tensor) -> Tensor:
        """Put rows of the text, at its end, through the model; return their features [n, hidden].

        The rows are tokens or features [n, hidden]."""
        out = self._rows.forward(rows, self.state.extend(len(rows)))
        assert out is not None
        return out

    def prune(self, prune: Prune) -> None:
        """Follow a decision in the books and the cache."""
        gather = self.state.prune(prune)
        if gather:
            self._rows.cache.gather(gather)


class DraftRows(NamedTuple):
    """Draft rows are what a drafter wants of one request.

    They are m rows of committed tokens, at the positions from `at` on, and behind them n tree rows
    that are all worth it."""

    text: CachedText
    rows: Tensor
    """The rows are tokens, or features [m + n, hidden]."""
    at: int
    ids: list[int]
    """These are the ids of the n tree rows."""
    parents: list[int]

    def admitted(self) -> Admitted:
        """Enter the rows into the request's books and return what the books admitted."""
        state, text = self.text.state, len(self.rows) - len(self.ids)
        admitted = state.extend(text, self.at).then(state.admit(self.ids, self.parents))
        assert len(admitted.kept) == len(self.rows), "a row that is not worth it"
        return admitted


def verify_together(asks: Sequence[DraftRows]) -> list[tuple[np.ndarray, Tensor]]:
    """Answer what is asked of different requests of one model, in one forward.

    Return for each ask the positions [m + n] and the features [m + n, hidden] of its rows."""
    shares = [Share(ask.text._rows, ask.admitted(), None) for ask in asks]
    out = forward_together(joined([ask.rows for ask in asks]), shares)
    assert out is not None
    made = split(out, [share.rows for share in shares])
    return [(share.admitted.positions, rows) for share, rows in zip(shares, made, strict=True)]


class Shape(NamedTuple):
    """A shape is what a family makes of the products of features with the lm_head."""

    scale: float = 1.0
    """A product s becomes scale * s;"""
    cap: float | None = None
    """and that, s', becomes cap * tanh(s' / cap)."""

    @classmethod
    def of(cls, config: dict) -> Shape:
        """Return the shape for a settled config.json."""
        family = family_of(config)
        scale = family.meant(config, "logit_scale") or 1.0
        scale /= family.meant(config, "logits_scaling") or 1.0
        return cls(scale, family.meant(config, "final_logit_softcapping"))

    def __call__(self, products: Tensor) -> Tensor:
        """Return the logits, perhaps in the products' place."""
        logits = products if self.scale == 1.0 else products.mul_(self.scale)
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)


AS_THEY_ARE = Shape()


class Head:
    """A head is the lm_head, which makes features [n, hidden] into logits [n, vocabulary].

    The logits are float32, or float64 if the weights are. Products of half-precision numbers are
    exact in float32, and rounded back to half precision many logits would tie. Where there is no
    kernel for that (kernels.py), half-precision weights are made float32 a piece at a time, which
    stays in the processor's cache."""

    PIECE = 1 << 20
    """A piece has at most so many elements, in whole rows, but at least one row."""

    def __init__(
        self, weight: Tensor, dtype: torch.dtype | None = None, shape: Shape = AS_THEY_ARE
    ):
        """Take `weight` [vocabulary, hidden] to compute with it as `dtype`.

        None means the weight's own dtype."""
        self._shape = shape
        dtype = dtype or weight.dtype
        self.vocabulary, self.device = len(weight), weight.device
        packs = self.device.type == "cpu" and dtype in kernels.KINDS and jit.available()
        self.alone = False
        """Each row is computed by itself, so that its logits are the same in any batch."""
        self._packed = PackedLinear(weight, dtype=dtype) if packs else None
        self._weight = None if packs else weight

    @property
    def weight(self) -> Tensor:
        """Return the weight [vocabulary, hidden]; it is a copy where the weight is packed."""
        if self._packed is None:
            assert self._weight is not None
            return self._weight
        return self._packed.weight()

    def two_best(self, features: Tensor) -> Tensor:
        """Return the logits, all but the two highest of each row perhaps lowered to -inf."""
        return self(features)

    @torch.inference_mode()
    def __call__(self, features: Tensor) -> Tensor:
        return self._shape(self._products(features))

    def _products(self, features: Tensor) -> Tensor:
        if self._packed is not None:
            return self._packed(features.float())
        if self.alone and len(features) > 1:
            return torch.cat([self._products(row) for row in features.split(1)])
        features, weight = placed(features, self.device), self.weight
        if weight.dtype in (torch.float32, torch.float64):
            # for few rows this is much quicker than the other way round
            return (weight @ features.to(weight.dtype).T).T.contiguous()
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
    links: Links | None = None,
    autotp: bool = False,
    nf4: bool = False,
) -> StageModel:
    """Return the layers of one rank of a split model, or its shard of them.

    `links` lead to the other members of its stage. If `autotp` is set, DeepSpeed shards the layers
    (autotp.py), and `links` are those of processes. `nf4` is as for `StageModel.load`.
    `progress(bytes)` is called after each tensor with all bytes so far, counted in the dtype in
    which they are read."""
    config, entry, ring = (
        read_config(manifest.folder(rank)),
        manifest.entry(rank),
        manifest.topology,
    )
    path = manifest.path(entry)
    leader = ring.leader(rank)
    model = StageModel(
        config,
        entry.num_layers,
        ring.is_first(leader),
        ring.is_last(leader),
        links,
        autotp,
        entry.layers[0],
    )
    file: Tensors = plain(TensorFile(path), config, str(path))
    if autotp:
        from flowspec.models.autotp import JoinedFile, sharer

        model.share = sharer(links, model.config, device)
        files = [TensorFile(manifest.path(manifest.entry(each))) for each in ring.group(rank)]
        file = JoinedFile(files, ring.member(rank), config)
    tensors = module_tensors(file, entry.layers[0], stored_as(dtype))
    return model.load(_counted(tensors, progress), device, str(path), dtype, nf4=nf4)


SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 24, 32, 48, 64, 96, PREFILL_ROWS)


@torch.inference_mode()
def rehearse(
    model: StageModel, head: Head | None = None, rows: Callable[[int], Tensor] | None = None
) -> None:
    """Run forwards of many sizes whose results nobody wants, through `head` as well if it is given.

    A GPU loads each kernel when it is first used, which takes many times as long as the kernel
    runs: a ring that met this while it decodes would believe that its rows are dear. `rows(n)`
    gives n rows that the model takes; None means tokens for a first stage, else features. On a CPU
    nothing is run."""
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
    """Return the dtype as which to read weights that are computed with as `dtype`.

    None means that the numbers are read as they are stored; int8 is made of these."""
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
    """Return the lm_head that lies beside this rank: rank 0 or the last stage, or its shard."""
    entry = manifest.entry(rank).lm_head
    assert entry is not None, f"the split has no head beside rank {rank}"
    path, config = manifest.path(entry), read_config(manifest.folder(rank))
    file = plain(TensorFile(path), config, str(path))
    weight = file.read(HEAD, stored_as(dtype)).to(device)
    return Head(weight, dtype, Shape.of(config))


def load_whole(
    folder: Path,
    dtype: torch.dtype,
    device: str,
    progress: Callable[[int], None] = lambda size: None,
    apart: Container[int] = (),
) -> tuple[StageModel, Head]:
    """Return a whole checkpoint as one stage and its head, which is a draft model.

    `progress` is as for `load_stage`. Nothing is read of the layers `apart` (offload.py)."""
    config = read_config(folder)
    checkpoint = Checkpoint(folder, family_of(config).named)
    layers = range(config["num_hidden_layers"])
    model = StageModel(config, len(layers), first=True, last=True)
    here = {None, *(k for k in layers if k not in apart)}
    names = [name for name in checkpoint.names if layer_of(name) in here]
    file = plain(Portion(checkpoint, names), config, str(folder))
    tensors = module_tensors(file, 0, stored_as(dtype))
    left_out = [k for k in layers if k in apart]
    model.load(_counted(tensors, progress), device, str(folder), dtype, left_out)
    tied = HEAD not in file.names
    need(
        not tied or bool(config.get("tie_word_embeddings")),
        f"{folder} has no {HEAD}, and config.json does not tie it to the embedding",
    )
    weight = (
        model.get_parameter("embed_tokens.weight")
        if tied
        else file.read(HEAD, stored_as(dtype)).to(device)
    )
    return model, Head(weight, dtype, Shape.of(config))
