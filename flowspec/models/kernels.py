"""The kernels multiply a few rows with a large matrix on a CPU, which is most of a stage's work.

One row is bound by memory: the weights are read once, at the speed of the memory. So are eight, if
each weight that is read serves all of them. The libraries at hand take two to three times as long
for eight rows as for one (docs/architecture.md), because their kernels are made for many rows. Here
weights lie in the order in which they are read, in blocks of WIDTH outputs,

    packed[block, input, WIDTH]

and a kernel holds up to ROWS x WIDTH sums in registers while it walks down a block. It is LLVM's
vector code, written out below and compiled for the processor at hand by llvmlite when the first
matrix of its kind is packed (0.3 s). Weights are float32, bfloat16, float16 or int8 (one scale an
output, symmetric, weight only); rows, sums and results are float32.

A sum runs over the inputs in their order, CHUNK at a time, whatever the number of rows. So a row's
result is the same, to the bit, in a batch of any shape.
"""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

import torch
from torch import Tensor, nn

from flowspec.models.jit import LANES, Shared, compiled, part
from flowspec.models.weights import mapped

VECTORS = 2
WIDTH = LANES * VECTORS
ROWS = 6
"""A kernel takes so many rows at a time: of 16 registers, 6 x VECTORS sums leave some for the
weights."""
NARROW = 2
"""So many rows, or fewer, leave registers for two blocks at once, whose two streams of weights come
faster than one."""
CHUNK = 64
"""After so many inputs the next rows take their turn: a block's piece of so many stays in the
nearest cache."""
AHEAD = 2048
"""Weights are fetched this many bytes before they are needed."""
THREADED = 1 << 18
"""A matrix of so many weights, or more, is worth waking other threads for."""
KINDS = {torch.float32: "float", torch.bfloat16: "i16", torch.float16: "half", torch.int8: "i8"}
"""This maps a kind of weights to LLVM's type of a stored one."""


class PackedLinear(nn.Module):
    """A PackedLinear is an `nn.Linear` over packed weights.

    It maps rows [.., inputs] to [.., outputs] float32."""

    packed: Tensor
    scale: Tensor | None

    def __init__(
        self, weight: Tensor, bias: nn.Parameter | None = None, dtype: torch.dtype | None = None
    ):
        """Pack `weight` [outputs, inputs] and keep it as `dtype`.

        `dtype` is float32, bfloat16, float16 or int8; None means the weight's own."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        scale = None
        if dtype == torch.int8:
            weight, scale = quantised(weight)
        self.register_buffer("packed", packed(weight.to(dtype or weight.dtype)))
        self.register_buffer("scale", scale)
        self.bias = bias
        self._remember()

    def _remember(self) -> None:
        """Keep what each product asks for where a module's attributes are found at once."""
        weights = self.packed
        self._product, self._worth_threads = _product(weights.dtype), weights.numel() >= THREADED
        self._held = weights, self.scale, weights.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        rows = x if x.dim() == 2 else x.reshape(-1, self.in_features)
        rows = (
            rows
            if rows.dtype == torch.float32 and rows.stride(1) == 1
            else rows.float().contiguous()
        )
        out = self.products(rows)
        return out if x.dim() == 2 else out.reshape(*x.shape[:-1], self.out_features)

    def products(self, rows: Tensor) -> Tensor:
        """Return the products [n, outputs] of rows, float32 [n, inputs], each in one piece."""
        n, (weights, scale, blocks) = rows.shape[0], self._held
        out = torch.empty(n, blocks * WIDTH)
        if n:
            job = _Job(
                rows.data_ptr(),
                n,
                rows.stride(0),
                weights.data_ptr(),
                out.data_ptr(),
                blocks * WIDTH,
                self.in_features,
                blocks,
            )
            self._product(job, blocks, self._worth_threads)
        if blocks * WIDTH != self.out_features:
            out = out[:, : self.out_features]
        if scale is not None:
            out *= scale
        if self.bias is not None:  # it may come after the weights
            out += self.bias
        return out

    def weight(self) -> Tensor:
        """Return a copy of the weight [outputs, inputs]; it is float32 if int8 is kept."""
        weight = unpacked(self.packed, self.out_features)
        return weight if self.scale is None else weight * self.scale[:, None]


def stacked(layers: list[PackedLinear]) -> PackedLinear:
    """Return one layer whose outputs are those of the given ones, side by side.

    Each must have whole blocks of outputs."""
    assert all(layer.out_features % WIDTH == 0 for layer in layers), "a block of two matrices"
    whole = PackedLinear.__new__(PackedLinear)
    nn.Module.__init__(whole)
    first = layers[0]
    whole.in_features, whole.out_features = (
        first.in_features,
        sum(layer.out_features for layer in layers),
    )
    memory = _memory(sum(layer.packed.numel() for layer in layers), first.packed.dtype).view(
        -1, first.in_features, WIDTH
    )
    whole.register_buffer("packed", torch.cat([layer.packed for layer in layers], out=memory))
    whole.register_buffer(
        "scale",
        None
        if first.scale is None
        else torch.cat([layer.scale for layer in layers if layer.scale is not None]),
    )
    biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
    assert len(biases) in (0, len(layers)), "a bias for some of the outputs"
    whole.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    whole._remember()
    return whole


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return an int8 matrix [outputs, inputs] and a float32 scale [outputs].

    The weight is about int8 * scale; the largest of each output is at 127."""
    weight = weight.float()
    scale = weight.abs().amax(1).clamp_(min=1e-12) / 127
    return torch.round(weight / scale[:, None]).to(torch.int8), scale


def packed(weight: Tensor) -> Tensor:
    """Return a weight [outputs, inputs] as [blocks, inputs, WIDTH].

    The last block is filled up with zeros. The result lies in huge pages where there are any."""
    outputs, inputs = weight.shape
    blocks = -(-outputs // WIDTH)
    out = _memory(blocks * inputs * WIDTH, weight.dtype).view(blocks, inputs, WIDTH)
    whole = outputs // WIDTH
    out[:whole] = weight[: whole * WIDTH].view(whole, WIDTH, inputs).transpose(1, 2)
    if whole < blocks:
        out[whole] = 0
        out[whole, :, : outputs - whole * WIDTH] = weight[whole * WIDTH :].T
    return out


def unpacked(weights: Tensor, outputs: int) -> Tensor:
    """Return the weight [outputs, inputs] of which `packed` made these."""
    return weights.transpose(1, 2).reshape(-1, weights.shape[1])[:outputs]


def _memory(count: int, dtype: torch.dtype) -> Tensor:
    """Return room for `count` numbers, in huge pages if they are worth it and there are any.

    To walk through a matrix in pages of 4 kB costs a tenth of the time."""
    if not hasattr(mmap, "MADV_HUGEPAGE") or count * dtype.itemsize < 1 << 21:
        return torch.empty(count, dtype=dtype)
    return mapped(count, dtype, mmap.MADV_HUGEPAGE)


# ---- the kernels ---------------------------------------------------------------------------------
class _Job(ctypes.Structure):
    """A job is what `product` reads.

    x is [rows, inputs] with x_stride floats from row to row; y is [rows, blocks * WIDTH]."""

    _fields_ = (
        ("x", ctypes.c_void_p), ("rows", ctypes.c_int64), ("x_stride", ctypes.c_int64), ("w", ctypes.c_void_p),
        ("y", ctypes.c_void_p), ("y_stride", ctypes.c_int64), ("inputs", ctypes.c_int64), ("blocks", ctypes.c_int64),
    )  # fmt: skip


@cache
def _product(dtype: torch.dtype) -> Shared:
    """Return the function for y = x w^T over weights of this dtype.

    It computes the blocks [begin, end) of a job."""
    return Shared(compiled(source(dtype)), "product")


# ---- their code ----------------------------------------------------------------------------------
def source(dtype: torch.dtype) -> str:
    """Return the LLVM code of the kernels over weights of `dtype`."""
    shapes = [
        (rows, blocks)
        for rows in range(1, ROWS + 1)
        for blocks in ((1, 2) if rows <= NARROW else (1,))
    ]
    parts = [
        _DECLARATIONS,
        *(_piece(dtype, *shape) for shape in shapes),
        _blocks(dtype, shapes),
        part("product", "%job", 7),
    ]
    return "\n".join(parts)


_DECLARATIONS = f"""
%job = type {{ ptr, i64, i64, ptr, ptr, i64, i64, i64 }}
declare <{LANES} x float> @llvm.fma.v{LANES}f32(<{LANES} x float>, <{LANES} x float>, <{LANES} x float>)
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
"""


def _piece(dtype: torch.dtype, rows: int, blocks: int) -> str:
    """Return the code of y += x w^T for `rows` rows, n inputs and `blocks` blocks of weights.

    At the first inputs it is y = x w^T. A turn of its loop takes one input: it loads the weights of
    all outputs from memory and each row's value in all lanes, and adds their products to the sums,
    which are the loop's variables."""
    vec, sums = f"<{LANES} x float>", [(r, v) for r in range(rows) for v in range(blocks * VECTORS)]
    parameters = (
        "ptr %x, i64 %x_stride, ptr %w, i64 %block, ptr %y, i64 %y_stride, i64 %n, i1 %first"
    )
    code = [f"define internal void @piece_{rows}_{blocks}({parameters}) {{", "entry:"]
    for name in ("x", "y"):
        for r in range(rows):
            code += [f"%{name}o{r} = mul i64 %{name}_stride, {r}"]
            code += [f"%{name}{r} = getelementptr float, ptr %{name}, i64 %{name}o{r}"]
    for b in range(blocks):
        code += [f"%w{b} = getelementptr i8, ptr %w, i64 {'0' if b == 0 else '%block'}"]
    code += ["br label %turn", "turn:", "%i = phi i64 [0, %entry], [%next, %turn]"]
    for r, v in sums:
        code += [f"%s{r}_{v} = phi {vec} [zeroinitializer, %entry], [%t{r}_{v}, %turn]"]
    code += _inputs(dtype, rows, blocks)
    fma = f"call {vec} @llvm.fma.v{LANES}f32"
    code += [f"%t{r}_{v} = {fma}({vec} %v{v}, {vec} %xv{r}, {vec} %s{r}_{v})" for r, v in sums]
    code += ["%next = add nuw i64 %i, 1", "%more = icmp ult i64 %next, %n"]
    code += ["br i1 %more, label %turn, label %end", "end:"]
    code += [f"%z{r}_{v} = getelementptr float, ptr %y{r}, i64 {v * LANES}" for r, v in sums]
    code += ["br i1 %first, label %set, label %add", "set:"]
    code += [f"store {vec} %t{r}_{v}, ptr %z{r}_{v}, align 4" for r, v in sums]
    code += ["ret void", "add:"]
    for r, v in sums:
        code += [f"%o{r}_{v} = load {vec}, ptr %z{r}_{v}, align 4"]
        code += [f"%u{r}_{v} = fadd {vec} %o{r}_{v}, %t{r}_{v}"]
        code += [f"store {vec} %u{r}_{v}, ptr %z{r}_{v}, align 4"]
    return "\n".join([*code, "ret void", "}"])


def _inputs(dtype: torch.dtype, rows: int, blocks: int) -> list[str]:
    """Return the code that loads what belongs to input %i.

    These are its weights as %v0, %v1, ..., and each row's value in all lanes as %xv0, %xv1, ..."""
    vec, code = f"<{LANES} x float>", [f"%at = mul i64 %i, {WIDTH * dtype.itemsize}"]
    for b in range(blocks):
        code += [f"%p{b} = getelementptr i8, ptr %w{b}, i64 %at"]
        code += [f"%ahead{b} = getelementptr i8, ptr %p{b}, i64 {AHEAD}"]
        code += [f"call void @llvm.prefetch.p0(ptr %ahead{b}, i32 0, i32 3, i32 1)"]
        for v in range(VECTORS):
            code += [f"%q{b}_{v} = getelementptr i8, ptr %p{b}, i64 {v * LANES * dtype.itemsize}"]
            code += _load(dtype, f"%q{b}_{v}", f"v{b * VECTORS + v}")
    for r in range(rows):
        code += [f"%xp{r} = getelementptr float, ptr %x{r}, i64 %i"]
        code += [f"%xs{r} = load float, ptr %xp{r}"]
        code += [f"%xi{r} = insertelement {vec} poison, float %xs{r}, i32 0"]
        zero = f"<{LANES} x i32> zeroinitializer"
        code += [f"%xv{r} = shufflevector {vec} %xi{r}, {vec} poison, {zero}"]
    return code


def _load(dtype: torch.dtype, address: str, name: str) -> list[str]:
    """Return the code of %name = the vector of weights at an address, as float32."""
    vec, align = f"<{LANES} x float>", dtype.itemsize
    stored, ints = f"<{LANES} x {KINDS[dtype]}>", f"<{LANES} x i32>"
    if dtype == torch.float32:
        return [f"%{name} = load {vec}, ptr {address}, align {align}"]
    code = [f"%{name}_raw = load {stored}, ptr {address}, align {align}"]
    if dtype == torch.float16:
        return [*code, f"%{name} = fpext {stored} %{name}_raw to {vec}"]
    if dtype == torch.int8:
        return [
            *code,
            f"%{name}_int = sext {stored} %{name}_raw to {ints}",
            f"%{name} = sitofp {ints} %{name}_int to {vec}",
        ]
    code += [
        f"%{name}_int = zext {stored} %{name}_raw to {ints}",
        f"%{name}_high = shl {ints} %{name}_int, splat (i32 16)",
    ]
    return [*code, f"%{name} = bitcast {ints} %{name}_high to {vec}"]


def _blocks(dtype: torch.dtype, shapes: list[tuple[int, int]]) -> str:
    """Return the code of `product`, which computes the blocks [begin, end) of a job.

    It goes through each block (or two), in it through each CHUNK of inputs, and in that through
    each group of rows."""
    number = {shape: k for k, shape in enumerate(shapes)}
    names = ("x", "rows", "x_stride", "w", "y", "y_stride", "inputs")
    fields = []
    for k, name in enumerate(names):
        kind = "ptr" if name in "xwy" else "i64"
        fields += [
            f"%{name}_at = getelementptr %job, ptr %job, i32 0, i32 {k}",
            f"%{name} = load {kind}, ptr %{name}_at",
        ]
    cases = " ".join(f"i64 {k}, label %case{k}" for k in number.values())
    arguments = (
        "ptr %xr, i64 %x_stride, ptr %wk, i64 %block, ptr %yr, i64 %y_stride, i64 %n, i1 %first"
    )
    calls = [
        f"case{k}:\ncall void @piece_{rows}_{blocks}({arguments})\nbr label %rows_next"
        for (rows, blocks), k in number.items()
    ]
    # The number of a shape of r rows and one block is 2(r - 1) up to NARROW rows, then
    # NARROW + r - 1; with two blocks it is one more.
    return "\n".join([
        "define void @product(ptr %job, i64 %begin, i64 %end) {", "entry:", *fields,
        f"%block = mul i64 %inputs, {WIDTH * dtype.itemsize}",
        f"%narrow = icmp ule i64 %rows, {NARROW}",
        "%any = icmp ult i64 %begin, %end",
        "br i1 %any, label %blocks, label %out",
        "blocks:", "%b = phi i64 [%begin, %entry], [%b_next, %blocks_next]",
        "%b_two = add i64 %b, 2", "%fits = icmp ule i64 %b_two, %end", "%two = and i1 %narrow, %fits", "%second = zext i1 %two to i64",
        "%wo = mul i64 %b, %block", "%wb = getelementptr i8, ptr %w, i64 %wo",
        f"%yo = mul i64 %b, {WIDTH}", "%yb = getelementptr float, ptr %y, i64 %yo",
        "br label %chunks",
        "chunks:", "%k = phi i64 [0, %blocks], [%k_next, %chunks_next]",
        "%left = sub i64 %inputs, %k", f"%last = icmp ult i64 %left, {CHUNK}", f"%n = select i1 %last, i64 %left, i64 {CHUNK}",
        f"%ko = mul i64 %k, {WIDTH * dtype.itemsize}", "%wk = getelementptr i8, ptr %wb, i64 %ko",
        "%xk = getelementptr float, ptr %x, i64 %k", "%first = icmp eq i64 %k, 0",
        "br label %groups",
        "groups:", "%r = phi i64 [0, %chunks], [%r_next, %rows_next]", "%rest = sub i64 %rows, %r",
        f"%full = icmp uge i64 %rest, {2 * ROWS}", f"%small = icmp ule i64 %rest, {ROWS}",
        # two groups share seven to eleven rows evenly
        "%up = add i64 %rest, 1", "%half = lshr i64 %up, 1",
        f"%some = select i1 %full, i64 {ROWS}, i64 %half", "%g = select i1 %small, i64 %rest, "
                                                           "i64 %some",
        "%xo = mul i64 %r, %x_stride", "%xr = getelementptr float, ptr %xk, i64 %xo",
        "%yro = mul i64 %r, %y_stride", "%yr = getelementptr float, ptr %yb, i64 %yro",
        f"%few = icmp ule i64 %g, {NARROW}", "%before = sub i64 %g, 1", "%twice = shl i64 %before, 1",
        f"%beyond = add i64 %before, {NARROW}", "%one = select i1 %few, i64 %twice, i64 %beyond", "%number = add i64 %one, %second",
        f"switch i64 %number, label %case0 [{cases}]",
        *calls,
        "rows_next:", "%r_next = add i64 %r, %g", "%r_more = icmp ult i64 %r_next, %rows",
        "br i1 %r_more, label %groups, label %chunks_next",
        "chunks_next:", f"%k_next = add i64 %k, {CHUNK}", "%k_more = icmp ult i64 %k_next, %inputs",
        "br i1 %k_more, label %chunks, label %blocks_next",
        "blocks_next:", "%b_one = add i64 %b, 1", "%b_next = add i64 %b_one, %second", "%b_more = icmp ult i64 %b_next, %end",
        "br i1 %b_more, label %blocks, label %out", "out:", "ret void", "}",
    ])  # fmt: skip
