"""This module is LLVM code for what a decoder layer does between its matrix products.

It computes norm, attention and activation for a few rows on a CPU. As in kernels.py a row's result
is the same, to the bit, in a batch of any shape: each row is computed by itself, vector after
vector, and attention walks through the tokens in the order of their positions, wherever their rows
lie in the cache. So what has been drafted around a token changes nothing, in any dtype.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flowspec.models.jit import LANES, Shared, compiled, part

TILE = 64
"""All queries of a group read the keys, or values, of so many tokens before the next ones are
fetched."""
SCORES = 1 << 18
"""So many scores of a group of heads at most are computed at a time; more would leave the
processor's nearer caches."""
LOWEST = -1e30
"""A score of this value has no weight."""


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight for rows x [n, width], in a new tensor.

    This is RMSNorm (arXiv 1910.07467)."""
    n, width = x.shape
    out = torch.empty(n, width)
    _functions()["norm"](
        _Norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), width, x.stride(0), eps),
        n,
        worth_threads=False,
    )
    return out


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up (SwiGLU, arXiv 2002.05202) for [n, width], each row by itself.

    The result is written into `gate`."""
    n, width = gate.shape
    _functions()["gated"](
        _Gated(gate.data_ptr(), up.data_ptr(), width, gate.stride(0), up.stride(0)),
        n,
        worth_threads=False,
    )
    return gate


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    base: int,
    slots: Tensor,
    counts: Tensor,
    scaling: float,
) -> Tensor:
    """Return the attention of n rows to a cache, [n, heads, head_dim].

    Each row sees the cache's rows [0, base) and then those that its row of `slots` names. `query`
    is [n, heads, head_dim]; `keys` and `values` are [kv_heads, length, head_dim] with a stride
    between heads. `slots` is int64 [n, most]; `counts` (int64 [n]) is how many of a row's slots
    count."""
    n, heads, width = query.shape
    kv_heads, most = keys.shape[0], slots.shape[1]
    span, share = -(-(base + most) // LANES) * LANES, heads // kv_heads
    part = min(n, max(1, SCORES // (share * span)))  # rows at a time
    out, scores = torch.empty(n, heads, width), torch.empty(heads, part, span)
    for k in range(0, n, part):
        rows = min(part, n - k)
        job = _Attend(
            query[k:].data_ptr(), keys.data_ptr(), values.data_ptr(), out[k:].data_ptr(), scores.data_ptr(), slots[k:].data_ptr(),
            counts[k:].data_ptr(), rows, heads, share, query.stride(0), keys.stride(0), base, most, span, kv_heads, scaling,
        )  # fmt: skip
        _functions()[f"attend{width}"](
            job, kv_heads, worth_threads=rows * heads * (base + 1) > 1 << 14
        )
    return out


def fits(width: int) -> bool:
    """Return whether rows of this width are whole vectors."""
    return width % LANES == 0


def prepare(width: int) -> None:
    """Compile what a layer with heads of this width will ask for.

    So its first forward is like the others."""
    for name in ("norm", "gated", f"attend{width}"):
        _functions()[name]


# ---- their arguments -----------------------------------------------------------------------------
P, N, R = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Norm(ctypes.Structure):
    _fields_ = (("x", P), ("weight", P), ("out", P), ("width", N), ("stride", N), ("eps", R))


class _Gated(ctypes.Structure):
    _fields_ = (("gate", P), ("up", P), ("width", N), ("stride", N), ("up_stride", N))


class _Attend(ctypes.Structure):
    _fields_ = (
        ("query", P), ("keys", P), ("values", P), ("out", P), ("scores", P), ("slots", P), ("counts", P),
        ("rows", N), ("heads", N), ("share", N), ("query_stride", N), ("head_stride", N), ("base", N), ("most", N), ("span", N),
        ("kv_heads", N), ("scaling", R),
    )  # fmt: skip


class _Functions(dict):
    """_Functions map a name to its function, which is compiled when it is first asked for."""

    def __missing__(self, name: str) -> Shared:
        code, threads = _Code(), ""
        if name == "norm":
            _write_norm(code)
        elif name == "gated":
            _write_gated(code)
        else:
            _write_attend(code, int(name.removeprefix("attend")))
            kinds = [{P: "ptr", N: "i64", R: "float"}[kind] for _, kind in _Attend._fields_]
            threads = part(
                "run", f"{{ {', '.join(kinds)} }}", list(dict(_Attend._fields_)).index("kv_heads")
            )
        function = self[name] = Shared(compiled(f"{code.module}\n{threads}"), "run")
        return function


@cache
def _functions() -> _Functions:
    return _Functions()


# ---- their code ----------------------------------------------------------------------------------
class _Code:
    """A _Code is `run(job, begin, end)` as it is written.

    It is llvmlite's builder with names for what is used here. Numbers are float32 or int64."""

    def __init__(self) -> None:
        from llvmlite import ir

        self.ir = ir
        self.float, self.int, self.pointer = ir.FloatType(), ir.IntType(64), ir.PointerType()
        self.vector, self.integers = (
            ir.VectorType(self.float, LANES),
            ir.VectorType(ir.IntType(32), LANES),
        )
        self.module = ir.Module()
        self.module.triple = self.module.data_layout = ""
        kinds = [self.pointer, self.int, self.int]
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), kinds), "run")
        self.job, self.begin, self.end = function.args
        self.entry = function.append_basic_block("entry")
        self.b = ir.IRBuilder(function.append_basic_block("body"))

    # numbers
    def n(self, value: int) -> Any:
        return self.ir.Constant(self.int, value)

    def all(self, value: float) -> Any:
        """Return a vector of one number in every lane."""
        return self.ir.Constant(self.vector, [value] * LANES)

    def spread(self, value: Any) -> Any:
        """Return a vector of a float32 value in every lane."""
        one = self.b.insert_element(
            self.ir.Constant(self.vector, self.ir.Undefined),
            value,
            self.ir.Constant(self.ir.IntType(32), 0),
        )
        return self.b.shuffle_vector(one, one, self.ir.Constant(self.integers, [0] * LANES))

    def call(self, name: str, *values: Any) -> Any:
        """Call an intrinsic, such as fma, with values of one type."""
        kind = values[0].type
        suffix = f"v{LANES}f32" if kind == self.vector else "f32"
        name = f"llvm.{name}.{suffix}"
        known = self.module.globals.get(name)
        if known is None:
            known = self.ir.Function(
                self.module, self.ir.FunctionType(kind, [kind] * len(values)), name
            )
        return self.b.call(known, values)

    def folded(self, operation: Any, vector: Any) -> Any:
        """Return all lanes folded into one number, half upon half."""
        for half in (4, 2, 1):
            order = self.ir.Constant(self.integers, [(k + half) % LANES for k in range(LANES)])
            vector = operation(vector, self.b.shuffle_vector(vector, vector, order))
        return self.b.extract_element(vector, self.ir.Constant(self.ir.IntType(32), 0))

    # memory
    def field(self, structure: type, name: str) -> Any:
        names = [field for field, *_ in structure._fields_]  # type: ignore[attr-defined]
        kinds = {P: self.pointer, N: self.int, R: self.float}
        types = [kinds[kind] for _, kind in structure._fields_]  # type: ignore[attr-defined]
        at = [self.ir.Constant(self.ir.IntType(32), k) for k in (0, names.index(name))]
        address = self.b.gep(self.job, at, source_etype=self.ir.LiteralStructType(types))
        return self.b.load(address, typ=types[names.index(name)])

    def at(self, pointer: Any, index: Any, kind: Any = None) -> Any:
        return self.b.gep(pointer, [index], source_etype=kind or self.float)

    def load(self, pointer: Any, kind: Any = None) -> Any:
        kind = kind or self.vector
        return self.b.load(pointer, typ=kind, align=8 if kind == self.int else 4)

    def store(self, value: Any, pointer: Any) -> None:
        self.b.store(value, pointer, align=4)

    def variable(self, value: Any) -> Any:
        """Return a place that holds `value` and that LLVM turns into a register."""
        with self.b.goto_block(self.entry):
            place = self.b.alloca(value.type)
        self.b.store(value, place)
        return place

    def get(self, place: Any, kind: Any = None) -> Any:
        return self.b.load(place, typ=kind or self.vector)

    # turns
    @contextmanager
    def turns(self, begin: Any, end: Any, step: int = 1) -> Iterator[Any]:
        """Repeat the block under it for each number from `begin` on and below `end`, by `step`."""
        place = self.variable(begin)
        test, body, after = (self.b.append_basic_block() for _ in range(3))
        self.b.branch(test)
        self.b.position_at_end(test)
        number = self.get(place, self.int)
        self.b.cbranch(self.b.icmp_signed("<", number, end), body, after)
        self.b.position_at_end(body)
        yield number
        self.b.store(self.b.add(number, self.n(step)), place)
        self.b.branch(test)
        self.b.position_at_end(after)

    def close(self) -> None:
        self.b.ret_void()
        self.ir.IRBuilder(self.entry).branch(self.job.parent.basic_blocks[1])

    # arithmetic
    def exp(self, x: Any) -> Any:
        """Return e^x of a vector, with x clamped to [-87, 88].

        It is 2^n 2^f with n whole and |f| <= 1/2; 2^f is its Taylor polynomial of degree 7."""
        b, whole_numbers = self.b, lambda value: self.ir.Constant(self.integers, [value] * LANES)
        x = self.call("minnum", self.call("maxnum", x, self.all(-87.0)), self.all(88.0))
        t = b.fmul(x, self.all(1.4426950408889634))
        whole = self.call("rint", t)
        f = self.call("fma", x, self.all(1.4426950408889634), b.fneg(whole))
        terms = [1.0]
        for k in range(1, 8):
            terms.append(terms[-1] * 0.6931471805599453 / k)
        power = self.all(terms[-1])
        for term in terms[-2::-1]:
            power = self.call("fma", power, f, self.all(term))
        exponent = b.shl(
            b.add(b.fptosi(whole, self.integers), whole_numbers(127)), whole_numbers(23)
        )
        return b.fmul(power, b.bitcast(exponent, self.vector))


def _write_norm(c: _Code) -> None:
    b = c.b
    x, weight, out, width, stride = (
        c.field(_Norm, name) for name in ("x", "weight", "out", "width", "stride")
    )
    eps = c.field(_Norm, "eps")
    with c.turns(c.begin, c.end) as row:
        source, target = c.at(x, b.mul(row, stride)), c.at(out, b.mul(row, width))
        total = c.variable(c.all(0.0))
        with c.turns(c.n(0), width, LANES) as k:
            value = c.load(c.at(source, k))
            b.store(c.call("fma", value, value, c.get(total)), total)
        mean = b.fdiv(c.folded(b.fadd, c.get(total)), b.sitofp(width, c.float))
        factor = c.spread(b.fdiv(c.ir.Constant(c.float, 1.0), c.call("sqrt", b.fadd(mean, eps))))
        with c.turns(c.n(0), width, LANES) as k:
            c.store(
                b.fmul(c.load(c.at(weight, k)), b.fmul(c.load(c.at(source, k)), factor)),
                c.at(target, k),
            )
    c.close()


def _write_gated(c: _Code) -> None:
    b = c.b
    gate, up, width, stride, up_stride = (
        c.field(_Gated, name) for name in ("gate", "up", "width", "stride", "up_stride")
    )
    with c.turns(c.begin, c.end) as row:
        gates, ups = c.at(gate, b.mul(row, stride)), c.at(up, b.mul(row, up_stride))
        with c.turns(c.n(0), width, LANES) as k:
            g = c.load(c.at(gates, k))
            silu = b.fdiv(g, b.fadd(c.all(1.0), c.exp(b.fneg(g))))
            c.store(b.fmul(silu, c.load(c.at(ups, k))), c.at(gates, k))
    c.close()


def _write_attend(c: _Code, width: int) -> None:
    """Write the attention of the key/value heads [begin, end).

    These are the scores, by tiles of tokens and then of each row's own tokens, their softmax, and
    the weighted sum of values."""
    with c.turns(c.begin, c.end) as group:
        _Attention(c, width, group).write()
    c.close()


class _Attention:
    """_Attention writes the code for one key/value head and the query heads that share it."""

    def __init__(self, c: _Code, width: int, group: Any):
        self.c, self.b, self.width, self.vectors = c, c.b, width, width // LANES
        self.f = {name: c.field(_Attend, name) for name, _ in _Attend._fields_}
        self.keys, self.values = (
            c.at(self.f[name], c.b.mul(group, self.f["head_stride"])) for name in ("keys", "values")
        )
        self.first = c.b.mul(group, self.f["share"])

    def write(self) -> None:
        c, b, f = self.c, self.b, self.f
        for begin, end in self._tiles():
            # the tokens below this one are whole vectors of scores
            eights = b.sub(end, b.and_(b.sub(end, begin), c.n(LANES - 1)))
            with self._queries() as (_, query, _, scores):
                q = self._vectors(query)
                with c.turns(begin, eights, LANES) as token:
                    self._score_eight(q, token, c.at(scores, token))
                with c.turns(eights, end) as token:
                    self._score(q, token, c.at(scores, token))
        with self._queries() as (row, query, out, scores):
            q = self._vectors(query)
            with c.turns(c.n(0), self._count(row)) as place:
                self._score(q, self._slot(row, place), c.at(scores, b.add(f["base"], place)))
            with c.turns(b.add(f["base"], self._count(row)), f["span"]) as token:
                c.store(c.ir.Constant(c.float, LOWEST), c.at(scores, token))
            _write_softmax(c, scores, f["span"])
            self._set(out, [c.all(0.0)] * self.vectors)
        for tile in self._tiles():
            with self._queries() as (_, _, out, scores), self._summed(out) as sums:
                with c.turns(*tile) as token:
                    self._add(sums, token, c.at(scores, token))
        with self._queries() as (row, _, out, scores), self._summed(out) as sums:
            with c.turns(c.n(0), self._count(row)) as place:
                self._add(sums, self._slot(row, place), c.at(scores, b.add(f["base"], place)))

    # turns
    def _tiles(self) -> Iterator[tuple[Any, Any]]:
        """Repeat what follows for each TILE of the cache's rows [0, base).

        Yield the tile's first token and the one after its last."""
        c, b, base = self.c, self.b, self.f["base"]
        with c.turns(c.n(0), base, TILE) as begin:
            end = b.add(begin, c.n(TILE))
            yield begin, b.select(b.icmp_signed("<", end, base), end, base)

    @contextmanager
    def _queries(self) -> Iterator[tuple[Any, Any, Any, Any]]:
        """Repeat what follows for each row and each of the query heads.

        Yield the row, its query, its output and its scores."""
        c, b, f = self.c, self.b, self.f
        with (
            c.turns(c.n(0), f["rows"]) as row,
            c.turns(self.first, b.add(self.first, f["share"])) as head,
        ):
            within = b.mul(head, c.n(self.width))
            query = c.at(f["query"], b.add(b.mul(row, f["query_stride"]), within))
            out = c.at(f["out"], b.add(b.mul(b.mul(row, f["heads"]), c.n(self.width)), within))
            yield (
                row,
                query,
                out,
                c.at(f["scores"], b.mul(b.add(b.mul(head, f["rows"]), row), f["span"])),
            )

    @contextmanager
    def _summed(self, out: Any) -> Iterator[list[Any]]:
        """Take an output into registers and, after the block, write it back."""
        places = [self.c.variable(value) for value in self._vectors(out)]
        yield places
        self._set(out, [self.c.get(place) for place in places])

    # one token
    def _count(self, row: Any) -> Any:
        return self.c.load(self.c.at(self.f["counts"], row, self.c.int), self.c.int)

    def _slot(self, row: Any, place: Any) -> Any:
        """Return the cache row that this slot of a row names."""
        at = self.b.add(self.b.mul(row, self.f["most"]), place)
        return self.c.load(self.c.at(self.f["slots"], at, self.c.int), self.c.int)

    def _products(self, query: list[Any], token: Any) -> Any:
        """Return the products of a query and a token's key, still to be folded."""
        keys = self._vectors(self.c.at(self.keys, self.b.mul(token, self.c.n(self.width))))
        total = self.b.fmul(query[0], keys[0])
        for q, key in zip(query[1:], keys[1:], strict=True):
            total = self.c.call("fma", q, key, total)
        return total

    def _score(self, query: list[Any], token: Any, to: Any) -> None:
        total = self.c.folded(self.b.fadd, self._products(query, token))
        self.c.store(self.b.fmul(total, self.f["scaling"]), to)

    def _score_eight(self, query: list[Any], token: Any, to: Any) -> None:
        """Write the scores of the LANES tokens from this one on.

        They are folded half upon half in the same order as in `_Code.folded`, but two tokens at a
        time."""

        def folded(first: int, count: int) -> Any:
            if count == 1:
                return self._products(query, self.b.add(token, self.c.n(first)))
            left, right = folded(first, count // 2), folded(first + count // 2, count // 2)
            part = LANES // count  # so many numbers of a token are left
            near = [k for k in range(2 * LANES) if k % (2 * part) < part]
            halves = (
                self.b.shuffle_vector(left, right, self._lanes([k + far for k in near]))
                for far in (0, part)
            )
            return self.b.fadd(*halves)

        self.c.store(self.b.fmul(folded(0, LANES), self.c.spread(self.f["scaling"])), to)

    def _lanes(self, lanes: list[int]) -> Any:
        return self.c.ir.Constant(self.c.integers, lanes)

    def _add(self, sums: list[Any], token: Any, weight: Any) -> None:
        weight = self.c.spread(self.c.load(weight, self.c.float))
        values = self._vectors(self.c.at(self.values, self.b.mul(token, self.c.n(self.width))))
        for place, value in zip(sums, values, strict=True):
            self.b.store(self.c.call("fma", weight, value, self.c.get(place)), place)

    def _vectors(self, pointer: Any) -> list[Any]:
        return [self.c.load(self.c.at(pointer, self.c.n(v * LANES))) for v in range(self.vectors)]

    def _set(self, pointer: Any, values: list[Any]) -> None:
        for v, value in enumerate(values):
            self.c.store(value, self.c.at(pointer, self.c.n(v * LANES)))


def _write_softmax(c: _Code, scores: Any, span: Any) -> None:
    """Write the softmax of the scores, e^(s - max) over their sum, in place."""
    b = c.b
    most = c.variable(c.all(LOWEST))
    with c.turns(c.n(0), span, LANES) as k:
        b.store(c.call("maxnum", c.get(most), c.load(c.at(scores, k))), most)
    highest = c.spread(c.folded(lambda x, y: c.call("maxnum", x, y), c.get(most)))
    total = c.variable(c.all(0.0))
    with c.turns(c.n(0), span, LANES) as k:
        power = c.exp(b.fsub(c.load(c.at(scores, k)), highest))
        c.store(power, c.at(scores, k))
        b.store(b.fadd(c.get(total), power), total)
    share = c.spread(b.fdiv(c.ir.Constant(c.float, 1.0), c.folded(b.fadd, c.get(total))))
    with c.turns(c.n(0), span, LANES) as k:
        c.store(b.fmul(c.load(c.at(scores, k)), share), c.at(scores, k))
