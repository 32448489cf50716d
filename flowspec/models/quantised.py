"""Quantised checkpoints are read as they are; a linear layer becomes a plain matrix as it comes.

Instead of `X.weight` [outputs, inputs] a linear layer X has a matrix of small integers q, and for
every output and every group of inputs a scale s and a zero point z:

    weight[o, i] = s[o, g(i)] * (q[o, i] - z[o, g(i)])

The product is rounded to the scales' dtype, as the libraries that write these files do it. Integers
of b bits lie 32 / b in an int32, the first in the lowest bits. What differs between the methods is
a layout: how the tensors are called, which of the two dimensions comes first and which is packed.

GPTQ (arXiv 2210.17323; the files of AutoGPTQ and GPTQModel): any input may be of any group
(`g_idx`, act-order). Version 1 of the format stores z - 1.
AWQ (arXiv 2306.00978; the files of AutoAWQ, version gemm): 8 outputs lie in a word in the order
AWQ_ORDER.
compressed-tensors (pack-quantized, and int-quantized with plain int8): a symmetric layer stores no
zero points, and versions up to 0.9.2 do not pack them. What quantises activations, too, is refused:
it is another computation.

Whether a layer is quantised is told by the tensors that are there, so layers that the checkpoint's
lists leave out (`ignore`, `modules_to_not_convert`) need no rule. This module imports torch only to
compute; a split copies the tensors and checks no more than their shapes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

from flowspec.errors import UserError, need
from flowspec.models.weights import FLOATS, INTEGERS, TensorInfo, room, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

SECTION = "quantization_config"
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The k-th number of a word belongs to this output of the word's eight."""
WORD = 32  # bits
BLOCK = 1 << 20
"""So many elements are dequantised at a time: what is held beside the matrix stays small."""


@dataclass(frozen=True)
class Layout:
    """A layout says how a linear layer's tensors are called and laid out.

    Stored matrices are [outputs, ..], or [inputs, outputs] and [groups, outputs] if
    `inputs_first`. The integers of `weight` are packed along the `packed` dimension (of [outputs,
    inputs]; None: not packed), and those of `zeros`, if `weight` is packed at all, along the
    outputs."""

    weight: str
    scales: str
    zeros: str
    index: str
    shape: str = ""
    inputs_first: bool = False
    packed: int | None = None
    order: tuple[int, ...] = ()

    @property
    def leaves(self) -> list[str]:
        return [*filter(None, (self.weight, self.scales, self.zeros, self.index, self.shape))]

    def turned(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return as stored a shape of (outputs, ..), or the other way round."""
        return shape[::-1] if self.inputs_first else shape


GPTQ = Layout("qweight", "scales", "qzeros", "g_idx", inputs_first=True, packed=1)
AWQ = Layout("qweight", "scales", "qzeros", "", inputs_first=True, packed=0, order=AWQ_ORDER)
PACKED = Layout(
    "weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape", packed=1
)
PLAIN = Layout("weight", "weight_scale", "weight_zero_point", "weight_g_idx")


class Numbers(NamedTuple):
    """Numbers say how a layer's integers are meant."""

    bits: int
    group: int | None = None
    """So many inputs are a group, neighbours unless the file has an index; None means all."""
    zeros: bool = True
    """The layer stores zero points; else each is `middle`."""
    middle: int = 0
    below: int = 0
    """What is stored as a zero point is so much less, modulo 2^bits."""


# ---- what the checkpoint says --------------------------------------------------------------------
@dataclass(frozen=True)
class Quantisation:
    """A quantisation is what a config.json tells of the quantised layers: one layout for all, and
    the numbers by the layer's name."""

    layout: Layout
    numbers: Callable[[str], Numbers]

    def linear(
        self, file: Tensors, name: str, stored: Collection[str], where: str
    ) -> Linear | None:
        """Return what of a file makes the matrix `name` (X.weight); None if it is stored plain.

        `stored` are the file's names. Raise UserError, naming the tensor and `where` it should be,
        if one is missing."""
        module, _, leaf = name.rpartition(".")
        layout = self.layout
        sign = layout.weight if layout.weight != "weight" else layout.scales
        if leaf != "weight" or f"{module}.{sign}" not in stored:
            return None
        numbers = self.numbers(module)
        optional = {layout.index} | (set() if numbers.zeros else {layout.zeros})
        parts = {leaf: f"{module}.{leaf}" for leaf in layout.leaves}
        missing = [n for leaf, n in parts.items() if n not in stored and leaf not in optional]
        if missing:
            raise UserError(f"{where} has no tensor {missing[0]}, which {module} needs")
        parts = {leaf: name for leaf, name in parts.items() if name in stored}
        return Linear(file, layout, numbers, parts, where)


def quantisation(config: dict) -> Quantisation | None:
    """Return how the checkpoint of this config.json is quantised; None if it is not.

    Raise UserError, by name, for what is not supported."""
    about = config.get(SECTION)
    if not about:
        return None
    need(isinstance(about, dict), f"config.json: {SECTION} is {about!r}: it must be an object")
    method = about.get("quant_method")
    need(
        isinstance(method, str) and method in METHODS,
        f"config.json: {SECTION}: quant_method {method!r} is not supported; supported are "
        f"{', '.join(METHODS)}, and the unquantised model",
    )
    return METHODS[method](about)


def _refuse(key: str, found: object, instead: str) -> NoReturn:
    raise UserError(f"config.json: {SECTION}: {key} is {found!r}; {instead}")


def _one_of(about: dict, key: str, allowed: tuple, default: object = None) -> Any:
    """Return what stands under `key`; raise UserError, naming the last part of it, if it is none
    of `allowed`."""
    found = about.get(key.rpartition(".")[2], default)
    found = found.lower() if isinstance(found, str) else found
    if found not in allowed:
        _refuse(key, found, f"supported: {', '.join(map(str, allowed))}")
    return found


def _group(about: dict, key: str = "group_size") -> int | None:
    found = about.get(key.rpartition(".")[2])
    if found in (None, -1):
        return None
    if type(found) is not int or found < 1:
        _refuse(key, found, "it must be a positive number of inputs, or -1 for all")
    return found


def _gptq(about: dict) -> Quantisation:
    """GPTQ's zero points are always stored, as z - 1 unless the format is gptq_v2."""
    form = "checkpoint_format" if "checkpoint_format" in about else "format"
    version = _one_of(about, form, ("gptq", "gptq_v2"), "gptq")
    if about.get("is_marlin_format"):
        _refuse("is_marlin_format", True, "only the format gptq (or gptq_v2) is supported")
    _one_of(about, "pack_dtype", ("int32",), "int32")
    rules = _rules(about.get("dynamic"))
    below = 1 if version == "gptq" else 0

    def numbers(module: str) -> Numbers:
        own = about | next((more for rule, more in rules if rule.match(module)), {})
        return Numbers(_one_of(own, "bits", (2, 4, 8)), _group(own), below=below)

    numbers("")
    return Quantisation(GPTQ, numbers)


def _rules(dynamic: Any) -> list[tuple[re.Pattern, dict]]:
    """Return what GPTQModel's `dynamic` says other than for all layers: (pattern of names, keys).

    A pattern behind "-:" means layers that are not quantised, which the tensors tell."""
    if not isinstance(dynamic, dict | None):
        _refuse("dynamic", dynamic, "it must be an object")
    kept = {key: more for key, more in (dynamic or {}).items() if not key.startswith("-:")}
    return [
        (_pattern("dynamic", key.removeprefix("+:")), more if isinstance(more, dict) else {})
        for key, more in kept.items()
    ]


def _pattern(key: str, pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error:
        raise UserError(
            f"config.json: {SECTION}: {key}: {pattern!r} is no regular expression"
        ) from None


def _awq(about: dict) -> Quantisation:
    form = next((key for key in ("version", "checkpoint_format") if about.get(key)), "version")
    _one_of(about, form, ("gemm",), "gemm")
    numbers = Numbers(_one_of(about, "bits", (4,)), _group(about))
    return Quantisation(AWQ, lambda module: numbers)


WEIGHTS_ONLY = "only what quantises weights, and these alone, is supported"
FORMATS = {"pack-quantized": PACKED, "int-quantized": PLAIN, "naive-quantized": PLAIN}


def _compressed(about: dict) -> Quantisation:
    for key in ("kv_cache_scheme", "transform_config", "sparsity_config"):
        if about.get(key):
            _refuse(key, _brief(about[key]), WEIGHTS_ONLY)
    groups = about.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        _refuse("config_groups", groups, "it must tell how the layers are quantised")
    schemes = [
        _scheme(group, f"config_groups.{name}", about.get("format"))
        for name, group in groups.items()
    ]
    layouts = {scheme.layout for scheme in schemes}
    if len(layouts) > 1:
        _refuse("format", about.get("format"), "all layers must be stored in one format")

    def numbers(module: str) -> Numbers:
        found = (s for how in range(3) for s in schemes if s.meets(module, how))
        return next(found, schemes[0]).numbers

    return Quantisation(layouts.pop(), numbers)


class Scheme(NamedTuple):
    """A scheme is one of the `config_groups`: how the layers that its `targets` name are stored."""

    layout: Layout
    numbers: Numbers
    targets: list[str]

    def meets(self, module: str, how: int) -> bool:
        """Return whether a target is the layer's name (`how` 0), a pattern of it (1), or its
        class (2)."""
        return any(
            (
                target == module,
                target.startswith("re:") and re.match(target[3:], module) is not None,
                target == "Linear",
            )[how]
            for target in self.targets
        )


def _scheme(group: object, key: str, form: object) -> Scheme:
    if not isinstance(group, dict):
        _refuse(key, group, "it must be an object with targets and weights")
    for also in ("input_activations", "output_activations"):
        if group.get(also) is not None:
            found = _brief(group[also])
            _refuse(f"{key}.{also}", found, WEIGHTS_ONLY)
    form = group.get("format") or form
    if not isinstance(form, str) or form not in FORMATS:
        _refuse("format", form, f"supported: {', '.join(FORMATS)}")
    about, key = group.get("weights"), f"{key}.weights"
    if not isinstance(about, dict):
        _refuse(key, about, "it must tell how the weights are quantised")
    _one_of(about, f"{key}.type", ("int",), "int")
    layout = FORMATS[form]
    whole = ("tensor",) if layout is PLAIN else ()
    _one_of(about, f"{key}.strategy", ("group", "channel", *whole))
    bits = _one_of(about, f"{key}.num_bits", (4, 8) if layout is PACKED else (8,))
    symmetric = about.get("symmetric", True)
    middle = 1 << (bits - 1) if layout is PACKED else 0
    size = _group(about, f"{key}.group_size") if about.get("strategy") == "group" else None
    targets = [str(target) for target in group.get("targets") or []]
    for target in targets:
        _pattern(f"{key}.targets", target.removeprefix("re:") if target[:3] == "re:" else "")
    return Scheme(layout, Numbers(bits, size, zeros=not symmetric, middle=middle), targets)


def _brief(about: object) -> object:
    """Return what tells one kind of scheme from another."""
    keys = ("format", "num_bits", "type", "dynamic")
    return {key: about[key] for key in keys if key in about} if isinstance(about, dict) else about


METHODS: dict[str, Callable[[dict], Quantisation]] = {
    "gptq": _gptq,
    "awq": _awq,
    "compressed-tensors": _compressed,
}
"""A method is what makes a Quantisation of its section of config.json."""


# ---- files ---------------------------------------------------------------------------------------
class Tensors(Protocol):
    """Tensors by name: a file (TensorFile), several read as one (JoinedFile), or a checkpoint."""

    @property
    def names(self) -> list[str]: ...

    def info(self, name: str) -> TensorInfo: ...

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor: ...

    def read_into(self, name: str, out: Tensor) -> None: ...


@dataclass(frozen=True)
class Linear:
    """A Linear is the stored tensors of a quantised linear layer: `parts` maps leaf to name."""

    file: Tensors
    layout: Layout
    numbers: Numbers
    parts: dict[str, str]
    where: str

    def info(self) -> TensorInfo:
        """Return the dtype and the shape [outputs, inputs] of the matrix, which lies nowhere.

        Raise UserError, naming the tensor, if one is of a dtype or a shape that does not fit."""
        for leaf, name in self.parts.items():
            found, kinds = self.file.info(name), self._kinds(leaf)
            need(
                found.dtype in kinds,
                f"{self.where}: {name} is stored as {found.dtype}; only {', '.join(sorted(kinds))} "
                "is supported",
            )
        layout, numbers = self.layout, self.numbers
        outputs, inputs = self._size()
        groups = self._groups(inputs)
        if layout.index in self.parts:
            self._fits(layout.index, (inputs,))
        alone = ((1,), (1, 1)) if layout is PLAIN and groups == 1 else ()
        self._fits(layout.scales, layout.turned((outputs, groups)), *alone)
        if layout.zeros in self.parts and numbers.zeros:
            packed = self.file.info(self.parts[layout.zeros]).dtype == "I32"
            words = math.ceil(outputs / self._each) if packed else outputs
            self._fits(layout.zeros, layout.turned((words, groups)), *alone)
        dtype = self.file.info(self.parts[layout.scales]).dtype
        return TensorInfo(dtype, (outputs, inputs), 0, 0)

    def matrix(self, out: Tensor) -> None:
        """Fill the contiguous `out`, which has the matrix's size."""
        shape = self.info().shape
        read = {leaf: self.file.read(name) for leaf, name in self.parts.items()}
        if self.layout.index in read:
            groups = self._groups(shape[1])
            named = read[self.layout.index].aminmax()
            strange = [int(k) for k in named if not 0 <= k < groups]
            need(
                not strange,
                f"{self.where}: {self.parts[self.layout.index]} names group {strange[:1]}, "
                f"there are {groups}",
            )
        dequantise(self.layout, self.numbers, read, out.view(shape))

    @property
    def _each(self) -> int:
        """Return how many integers lie in a stored one."""
        return 1 if self.layout.packed is None else WORD // self.numbers.bits

    def _groups(self, inputs: int) -> int:
        return math.ceil(inputs / (self.numbers.group or inputs))

    def _shape(self, leaf: str) -> tuple[int, ...]:
        return self.file.info(self.parts[leaf]).shape

    def _kinds(self, leaf: str) -> frozenset[str]:
        if leaf == self.layout.scales:
            return FLOATS
        if leaf in (self.layout.index, self.layout.shape):
            return INTEGERS
        if self.layout is PACKED and leaf == self.layout.zeros:
            return frozenset({"I32", "I8"})
        return frozenset({"I8" if self.layout.packed is None else "I32"})

    def _fits(self, leaf: str, *shapes: tuple[int, ...]) -> None:
        need(
            self._shape(leaf) in shapes,
            f"{self.where}: {self.parts[leaf]} has shape {list(self._shape(leaf))}; beside "
            f"{self.parts[self.layout.weight]} of shape {list(self._shape(self.layout.weight))}, "
            f"with {self.numbers.bits} bits in groups of {self.numbers.group or 'all'} inputs, it "
            f"must be {list(shapes[0])}",
        )

    def _size(self) -> tuple[int, int]:
        """Return how many outputs and inputs the matrix has, by its packed integers.

        The last word of a row may be filled only in part; then `weight_shape` tells."""
        layout, name = self.layout, self.parts[self.layout.weight]
        stored = self._shape(layout.weight)
        matrix = len(stored) == 2 and min(stored) > 0
        need(matrix, f"{self.where}: {name} has shape {list(stored)}: it is no matrix")
        size = [*layout.turned(stored)]
        if layout.packed is not None:
            size[layout.packed] *= self._each
        if layout.shape:
            told = self.file.read(self.parts[layout.shape]).flatten().tolist()
            need(
                len(told) == 2 and told[0] == size[0] and 0 <= size[1] - told[1] < self._each,
                f"{self.where}: {self.parts[layout.shape]} tells {told}, {name} holds {size}",
            )
            size = told
        return size[0], size[1]


def plain(file: Tensors, config: dict, where: str) -> Tensors:
    """Return the file itself, or if config.json says that it is quantised, what makes plain
    matrices of its layers as they are read. `where` names it in errors."""
    how = quantisation(config)
    return Dequantised(file, how, where) if how else file


def parts(file: Tensors, name: str) -> list[str]:
    """Return the names of the stored tensors of which a plain tensor of `plain` is made."""
    return file.parts(name) if isinstance(file, Dequantised) else [name]


class Dequantised:
    """A file whose quantised layers are read as plain matrices X.weight, in their scales' dtype."""

    def __init__(self, file: Tensors, how: Quantisation, where: str):
        """Raise UserError if a layer lacks a tensor."""
        self._file, stored, end = file, dict.fromkeys(file.names), f".{how.layout.weight}"
        matrices = [n.removesuffix(end) + ".weight" for n in stored if n.endswith(end)]
        found = {name: how.linear(file, name, stored, where) for name in matrices}
        self._made = {name: linear for name, linear in found.items() if linear}

    @property
    def names(self) -> list[str]:
        """Return the names of the plain tensors, in the order of the file."""
        made = {part: name for name, of in self._made.items() for part in of.parts.values()}
        return list(dict.fromkeys(made.get(name, name) for name in self._file.names))

    def parts(self, name: str) -> list[str]:
        return [*self._made[name].parts.values()] if name in self._made else [name]

    def info(self, name: str) -> TensorInfo:
        return self._made[name].info() if name in self._made else self._file.info(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the plain tensor; it is converted if `dtype` is given."""
        if name not in self._made:
            return self._file.read(name, dtype)
        info = self.info(name)
        out = room(info.shape, dtype or torch_dtype(info.dtype))
        self._made[name].matrix(out)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Fill the contiguous `out`, which has the tensor's size."""
        if name in self._made:
            self._made[name].matrix(out)
        else:
            self._file.read_into(name, out)


# ---- mathematics ---------------------------------------------------------------------------------
def dequantise(layout: Layout, numbers: Numbers, read: dict[str, Tensor], out: Tensor) -> None:
    """Fill `out` [outputs, inputs] with the matrix of the tensors `read` (leaf -> tensor).

    weight[o, i] = s[o, g(i)] * (q[o, i] - z[o, g(i)]), rounded to the dtype of s, then to that of
    `out`."""
    import torch

    outputs, inputs = out.shape
    s = _table(read[layout.scales], layout)
    if numbers.zeros:
        z = _zeros(read[layout.zeros], layout, numbers)[:outputs].to(s.dtype)
    else:
        z = torch.tensor([[numbers.middle]], dtype=s.dtype)
    s, z = (some.expand(outputs, s.shape[1]).contiguous() for some in (s, z))
    q = _integers(read[layout.weight], layout, numbers.bits, layout.packed)[:, :inputs].contiguous()
    size, index = numbers.group or inputs, read.get(layout.index)
    if index is not None and torch.equal(index, torch.arange(inputs, dtype=index.dtype) // size):
        index = None  # many files write down that neighbours are a group
    step = max(1, BLOCK // inputs)
    for start in range(0, outputs, step):
        rows = slice(start, start + step)
        scales, zeros = (_of_inputs(some[rows], inputs, size, index) for some in (s, z))
        out[rows] = (q[rows].to(s.dtype) - zeros) * scales


def _of_inputs(table: Tensor, inputs: int, size: int, index: Tensor | None) -> Tensor:
    """Return as [rows, inputs] what [rows, groups] says of groups.

    Input i is of group index[i], or if there is no index of group i // size."""
    if index is not None:
        return table[:, index.long()]
    return table[:, :, None].expand(-1, -1, size).flatten(1)[:, :inputs]


def _table(stored: Tensor, layout: Layout) -> Tensor:
    """Return a stored tensor as [outputs, ..]; one number alone is one for all: [1, 1]."""
    return stored.view(1, 1) if stored.numel() == 1 else stored.T if layout.inputs_first else stored


def _zeros(stored: Tensor, layout: Layout, numbers: Numbers) -> Tensor:
    """Return the zero points [outputs, groups]; int8 ones are not packed, and count from the
    middle."""
    import torch

    if stored.dtype == torch.int8:
        return _table(stored, layout).short() + numbers.middle
    z = _integers(stored, layout, numbers.bits, 0)
    return (z + numbers.below) & ((1 << numbers.bits) - 1)


def _integers(stored: Tensor, layout: Layout, bits: int, packed: int | None) -> Tensor:
    """Return the integers [outputs, ..] of a tensor whose dimension `packed` is packed."""
    table = _table(stored, layout)
    if packed is None:
        return table
    return unpacked(table.movedim(packed, -1), bits, layout.order).movedim(-1, packed)


def unpacked(words: Tensor, bits: int, order: Sequence[int] = ()) -> Tensor:
    """Return the integers, uint8 [.., n * 32 / bits], that lie along the last dimension of int32
    [.., n].

    Number k of a word has the bits from k * bits on, and its place in the word is `order[k]`; it is
    k if there is no order."""
    import torch

    octets = words.reshape(-1).view(torch.uint8)  # the low bits come first
    shifts = range(0, 8, bits)
    integers = torch.stack([(octets >> shift) & ((1 << bits) - 1) for shift in shifts], -1)
    if order:
        integers = integers.view(-1, len(order))[:, torch.tensor(order).argsort()]
    return integers.reshape(*words.shape[:-1], words.shape[-1] * WORD // bits)
