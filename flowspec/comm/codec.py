"""Messages as bytes: one header of two int64 (bytes in all, bytes of JSON) and one payload. No pickle.

The payload is JSON {version, kind, meta, tensors: [[dtype name, shape], ...]} and then the raw tensors, each at a
multiple of 8 bytes. dtypes travel by name, so bfloat16 is not mistaken for float16, nor an empty tensor for none.
"""

from __future__ import annotations

import json
import math

import torch
from torch import Tensor

from flowspec.comm.base import Message

VERSION = 1
HEADER = 2
"""int64 numbers in a header"""
_LIMIT = 1 << 34
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


def _padded(n: int) -> int:
    return -(-n // 8) * 8


def encode(message: Message) -> tuple[Tensor, Tensor]:
    """(header int64 [2], payload uint8 [n])"""
    tensors = [t.detach().cpu().contiguous() for t in message.tensors]
    specs = [[_NAMES[t.dtype], list(t.shape)] for t in tensors]
    about = json.dumps({"version": VERSION, "kind": message.kind, "meta": message.meta, "tensors": specs}).encode()
    at = _padded(len(about))
    payload = torch.zeros(at + sum(_padded(t.nbytes) for t in tensors), dtype=torch.uint8)
    payload[: len(about)] = torch.frombuffer(bytearray(about), dtype=torch.uint8)
    for t in tensors:
        payload[at : at + t.nbytes] = t.reshape(-1).view(torch.uint8)
        at += _padded(t.nbytes)
    return torch.tensor([len(payload), len(about)]), payload


def payload_size(header: Tensor) -> int:
    """Bytes of the payload that follows; ValueError for a header that no encoder of ours wrote."""
    total, about = header.tolist()
    if not 0 < about <= total <= _LIMIT:
        raise ValueError(f"not a flowspec frame (header {total}, {about})")
    return total


def decode(header: Tensor, payload: Tensor) -> Message:
    """The message; its tensors share the payload's memory. ValueError for what no encoder of this version wrote."""
    about = json.loads(payload[: int(header[1])].numpy().tobytes())
    if about.get("version") != VERSION:
        raise ValueError(f"a peer speaks version {about.get('version')} of the wire format, this is version {VERSION}")
    at, tensors = _padded(int(header[1])), []
    for name, shape in about["tensors"]:
        size = math.prod(shape) * _DTYPES[name].itemsize
        tensors.append(payload[at : at + size].view(_DTYPES[name]).reshape(shape))
        at += _padded(size)
    return Message(about["kind"], about["meta"], tuple(tensors))
