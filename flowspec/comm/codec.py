"""The codec makes a message into bytes and back, without pickle: one header and one payload.

The header is two int64: the payload's bytes in all and its bytes of JSON. The payload is JSON
{version, kind, meta, tensors: [[dtype name, shape], ...]} and then the raw tensors, each at a
multiple of 8 bytes. dtypes travel by name, so bfloat16 is not mistaken for float16, nor an empty
tensor for none.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from flowspec.comm.base import Message

VERSION = 1
HEADER = 2
"""A header has so many int64 numbers."""
_DIMENSIONS = 8
_MOST = 1 << 40
"""The product of a shape's numbers, zeros aside, must be below this, as torch counts in int64."""
_DTYPES = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.bool,
        torch.uint8,
        torch.int8,
        torch.int16,
        torch.int32,
        torch.int64,
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
    )
}
_NAMES = {d: name for name, d in _DTYPES.items()}


class Limit(NamedTuple):
    """A limit is the most that a message of one kind can hold, in bytes."""

    facts: int
    """The JSON has at most so many bytes."""
    tensors: int
    """The tensors, padded, have at most so many bytes."""


Limits = Mapping[str, Limit]
"""Limits map a message's kind to its limit; there are no other kinds."""


def _padded(n: int) -> int:
    return -(-n // 8) * 8


def encode(message: Message) -> tuple[Tensor, Tensor]:
    """Return the message's header (int64 [2]) and payload (uint8 [n])."""
    tensors = [t.detach().cpu().contiguous() for t in message.tensors]
    specs = [[_NAMES[t.dtype], list(t.shape)] for t in tensors]
    about = json.dumps(
        {"version": VERSION, "kind": message.kind, "meta": message.meta, "tensors": specs},
        allow_nan=False,
    ).encode()
    at = _padded(len(about))
    payload = torch.zeros(at + sum(_padded(t.nbytes) for t in tensors), dtype=torch.uint8)
    payload[: len(about)] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
    for t in tensors:
        payload[at : at + t.nbytes] = t.reshape(-1).view(torch.uint8)
        at += _padded(t.nbytes)
    return torch.tensor([len(payload), len(about)]), payload


def payload_size(header: Tensor, limits: Limits) -> int:
    """Return the bytes of the payload that follows this header.

    Raise ValueError if no encoder wrote the header or if it promises more than any kind holds."""
    total, about = header.tolist()
    facts, tensors = (max(numbers) for numbers in zip(*limits.values(), strict=True))
    if not (0 < about <= facts and _padded(about) <= total <= _padded(about) + tensors):
        raise ValueError(f"not a flowspec frame (header {total}, {about})")
    return total


def decode(header: Tensor, payload: Tensor, limits: Limits) -> Message:
    """Return the message of a header that `payload_size` let pass and of this payload.

    Its tensors share the payload's memory. Raise ValueError if no encoder of this version wrote it
    or if it is more than its kind can hold."""
    about, at = int(header[1]), _padded(int(header[1]))
    kind, meta, specs = _facts(payload[:about].numpy().tobytes())
    if kind not in limits:
        raise ValueError(f"a message of the unknown kind {kind[:40]!r}")
    most = limits[kind]
    if about > most.facts or len(payload) - at > most.tensors:
        raise ValueError(
            f"a {kind} message of {about} + {len(payload) - at} bytes: {most.facts} + "
            f"{most.tensors} is the most"
        )
    tensors = []
    for spec in specs:
        dtype, shape, size = _spec(spec)
        if at + size > len(payload):
            raise ValueError(f"a {kind} message whose tensors are longer than itself")
        tensors.append(payload[at : at + size].view(dtype).reshape(shape))
        at += _padded(size)
    if at != len(payload):
        raise ValueError(f"a {kind} message with {len(payload) - at} bytes of no tensor")
    return Message(kind, meta, tuple(tensors))


def _facts(text: bytes) -> tuple[str, dict[str, Any], list[Any]]:
    """Return the kind, the facts and the tensors' descriptions."""
    try:
        about = json.loads(text, parse_constant=_not_finite)
    except (ValueError, RecursionError):
        raise ValueError("facts that are no JSON") from None
    about = about if isinstance(about, dict) else {}
    if about.get("version") != VERSION:
        raise ValueError(
            f"a peer speaks version {str(about.get('version'))[:20]} of the wire format, this is "
            f"version {VERSION}"
        )
    kind, meta, specs = (about.get(name) for name in ("kind", "meta", "tensors"))
    if not (isinstance(kind, str) and isinstance(meta, dict) and isinstance(specs, list)):
        raise ValueError("a frame without a kind, facts or tensors")
    return kind, meta, specs


def _not_finite(name: str) -> NoReturn:
    raise ValueError(name)


def _spec(spec: Any) -> tuple[torch.dtype, list[int], int]:
    """Return a tensor's dtype, shape and number of bytes from [dtype's name, shape]."""
    name, shape = spec if isinstance(spec, list) and len(spec) == 2 else ("", [])
    if not (isinstance(name, str) and name in _DTYPES):
        raise ValueError("a tensor of a dtype that is none")
    sound = (
        isinstance(shape, list)
        and len(shape) <= _DIMENSIONS
        and all(type(n) is int and n >= 0 for n in shape)
    )
    if not (sound and math.prod(max(1, n) for n in shape) < _MOST):
        raise ValueError("a tensor of a shape that is none")
    return _DTYPES[name], shape, math.prod(shape) * _DTYPES[name].itemsize
