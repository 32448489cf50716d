"""A hash of its embedding tells which model it is, however the model is stored and split.

It is the sha256 of the embedding's values in reading order [vocabulary, hidden]. Each is rounded to
float32 and then to float16 (nearest, ties to even; little-endian; infinite if it is too large). So
a model in float32 and its copy in float16 have the same hash. A split tells the hash of the
checkpoint from which it was made, and a head that of the target for which it was trained. This
module needs no torch.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np

from flowspec.errors import UserError
from flowspec.models.families import EMBEDDING
from flowspec.models.weights import Checkpoint

CARD = "target_embedding_sha256"
"""A head's config.json has the hash under this key."""


def embedding_hash(checkpoint: Checkpoint, name: str = EMBEDDING) -> str:
    """Return the hash, in hex, of the embedding of a checkpoint, which calls it `name`."""
    file = checkpoint.file(name)
    dtype, digest = file.info(name).dtype, hashlib.sha256()
    for piece in file.chunks(name):
        digest.update(_half(piece, dtype))
    return digest.hexdigest()


def _half(piece: bytes | bytearray, dtype: str) -> bytes | bytearray:
    """Return the same values in float16."""
    if dtype == "F16":
        return piece
    if dtype == "BF16":
        single = (np.frombuffer(piece, "<u2").astype("<u4") << 16).view("<f4")
    else:
        single = np.frombuffer(piece, {"F32": "<f4", "F64": "<f8"}[dtype]).astype("<f4")
    with np.errstate(over="ignore"):
        return single.astype("<f2").tobytes()


def told_by(head: dict, where: Path) -> str | None:
    """Return the hash in a head's config.json; None where it tells none.

    Raise UserError if it is no hash."""
    told = head.get(CARD)
    if told is not None and not (isinstance(told, str) and re.fullmatch("[0-9a-f]{64}", told)):
        raise UserError(f"{where}: {CARD} is {told!r}: it must be 64 digits of a hash, or left out")
    return told
