"""This module reads and writes safetensors files as streams.

Nothing is mapped into memory, so file pages never count as this process's own: a rank holds the
tensors for which it asked, and a copy holds one chunk. A file is an 8-byte little-endian header
length, a JSON header `{name: {dtype, shape, data_offsets}}` and the raw bytes, row-major and
little-endian.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flowspec.errors import UserError
from flowspec.files import replacing

if TYPE_CHECKING:
    import torch

CHUNK = 1 << 20  # bytes
# elements; torch converts so few on one thread, and waking others on a busy machine costs
# milliseconds
CONVERTED = 1 << 15
MAX_HEADER = 100_000_000
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "U16": "uint16",
    "I16": "int16", "F16": "float16", "BF16": "bfloat16", "U32": "uint32", "I32": "int32", "F32": "float32",
    "U64": "uint64", "I64": "int64", "F64": "float64",
}  # fmt: skip
FLOATS = frozenset({"F16", "BF16", "F32", "F64"})
INTEGERS = frozenset({"I32", "I64"})


Bytes = bytes | bytearray | memoryview


class TensorInfo(NamedTuple):
    """A TensorInfo says where a tensor lies.

    It has the safetensors dtype, the shape, and the bytes [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Entry(NamedTuple):
    """An entry is a tensor to write; `chunks()` starts a fresh iterator over its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunks: Callable[[], Iterable[Bytes]]

    @property
    def nbytes(self) -> int:
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


def torch_dtype(name: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype name ("F16")."""
    import torch

    return getattr(torch, TORCH_NAMES[name])


# ---- reading -------------------------------------------------------------------------------------
class TensorFile:
    """A TensorFile is one safetensors file; its header is read and checked once.

    Its tensors go by the names that `named` makes of the stored ones. If the file is damaged, a
    UserError names it."""

    def __init__(self, path: str | os.PathLike[str], named: Callable[[str], str] = str):
        self.path = Path(path)
        self._infos = {named(name): info for name, info in _read_header(self.path).items()}

    @property
    def names(self) -> list[str]:
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        """Return where this tensor lies; raise UserError if the file has no such tensor."""
        try:
            return self._infos[name]
        except KeyError:
            raise UserError(f"{self.path} has no tensor {name}") from None

    def chunks(
        self, name: str, size: int = CHUNK, spans: Iterable[tuple[int, int]] | None = None
    ) -> Iterator[bytes | bytearray]:
        """Yield the tensor's bytes, or those of its spans [start, end), in order.

        All pieces but the last have `size` bytes; spans are put together for that."""
        info, gathered = self.info(name), bytearray()
        with _open(self.path) as file:
            for start, end in [(0, info.nbytes)] if spans is None else spans:
                file.seek(info.start + start)
                while start < end:
                    piece = file.read(min(size - len(gathered), end - start))
                    if not piece:
                        raise _truncated(self.path)
                    start += len(piece)
                    gathered += piece
                    if len(gathered) == size:
                        yield gathered
                        gathered = bytearray()
        if gathered:
            yield gathered

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return the tensor in a buffer of its own; it is converted if `dtype` is given."""
        info = self.info(name)
        out = room(info.shape, dtype or torch_dtype(info.dtype))
        self.read_into(name, out)
        return out

    def read_into(self, name: str, out: torch.Tensor) -> None:
        """Fill the contiguous `out`, which has the tensor's size.

        Where the dtypes differ, the tensor is converted piece by piece."""
        info = self.info(name)
        if not out.is_contiguous() or out.numel() != math.prod(info.shape):
            raise ValueError(f"{name} of shape {info.shape} does not fill {tuple(out.shape)}")
        stored, flat = torch_dtype(info.dtype), out.view(-1)
        with _open(self.path) as file:
            file.seek(info.start)
            if flat.dtype == stored:
                _fill(file, flat, self.path)
            else:
                _fill_converted(file, flat, stored, self.path)


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return an unwritten tensor whose memory, if it is large, goes back to the system with it.

    The heap would keep holes, for a stage of 1 GB more than half as much again."""
    import torch

    size = math.prod(shape)
    if size * dtype.itemsize < CHUNK or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(tuple(shape), dtype=dtype)
    return mapped(size, dtype).view(tuple(shape))


def mapped(count: int, dtype: torch.dtype, advice: int | None = None) -> torch.Tensor:
    """Return room for `count` numbers in pages of their own, of which the system is advised."""
    import torch

    # the map is private: shared memory has no huge pages
    area = mmap.mmap(-1, count * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if advice is not None:
        area.madvise(advice)
    return torch.frombuffer(area, dtype=dtype, count=count)


def _fill(file, flat: torch.Tensor, path: Path) -> None:
    """Read straight into the memory of a flat tensor."""
    import torch

    view = flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")
    done = 0
    while done < len(view):
        got = file.readinto(view[done:])
        if not got:
            raise _truncated(path)
        done += got


def _fill_converted(file, flat: torch.Tensor, stored: torch.dtype, path: Path) -> None:
    import torch

    staging = torch.empty(min(CONVERTED, flat.numel()), dtype=stored)
    for part in flat.split(CONVERTED):
        _fill(file, staging[: part.numel()], path)
        part.copy_(staging[: part.numel()])


def _open(path: Path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _truncated(path: Path) -> UserError:
    return UserError(f"{path} is truncated: copy or download it again")


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(
                f"{path} is truncated or no safetensors file: copy or download it again"
            )
        if length > MAX_HEADER:
            raise UserError(f"{path} is no safetensors file: its header claims {length} bytes")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        infos = {name: _info(entry, 8 + length) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} has a damaged safetensors header: copy or download it again"
        ) from None
    end = max((info.end for info in infos.values()), default=8 + length)
    if end > size:
        raise _truncated(path)
    if end < size:
        raise UserError(
            f"{path} has {size - end} bytes after its last tensor: copy or download it again"
        )
    return infos


def _info(entry: dict, data: int) -> TensorInfo:
    """Return one header entry with its offsets made absolute; tensor bytes begin at `data`.

    Raise ValueError if the offsets contradict the shape."""
    dtype, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError("shape or offsets")
    if end - start != DTYPE_BYTES[dtype] * math.prod(shape):
        raise ValueError("size")
    return TensorInfo(dtype, shape, data + start, data + end)


# ---- a Hugging Face folder -----------------------------------------------------------------------
INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"


def pickled(folder: Path) -> Path | None:
    """Return the file of a folder whose weights are in torch's own format only; else None."""
    path = folder / PICKLED
    return path if path.is_file() and not (folder / "model.safetensors").is_file() else None


class Checkpoint:
    """A checkpoint is a folder with model.safetensors, or with an index and its shards.

    Shard headers are read when first needed. Its tensors go by the names that `named` makes of the
    stored ones."""

    def __init__(self, folder: str | os.PathLike[str], named: Callable[[str], str] = str):
        self.folder, self._named = Path(folder), named
        self._files: dict[str, TensorFile] = {}
        self._shard_of = self._locate()

    @property
    def names(self) -> list[str]:
        return list(self._shard_of)

    def file(self, name: str) -> TensorFile:
        """Return the file that holds this tensor; raise UserError if no shard does."""
        if name not in self._shard_of:
            raise UserError(f"{self.folder} has no tensor {name}")
        return self._open(self._shard_of[name])

    def info(self, name: str) -> TensorInfo:
        return self.file(name).info(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.file(name).read(name, dtype)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self.file(name).read_into(name, out)

    def _open(self, shard: str) -> TensorFile:
        if shard not in self._files:
            self._files[shard] = TensorFile(self.folder / shard, self._named)
        return self._files[shard]

    def _locate(self) -> dict[str, str]:
        if (self.folder / "model.safetensors").is_file():
            return dict.fromkeys(self._open("model.safetensors").names, "model.safetensors")
        if (self.folder / INDEX).is_file():
            shards = _shards_of_index(self.folder)
            return {self._named(name): shard for name, shard in shards.items()}
        raise UserError(_no_checkpoint(self.folder))


class Portion:
    """A portion is some tensors of a checkpoint, of whatever shards, read as those of one file."""

    def __init__(self, checkpoint: Checkpoint, names: Iterable[str]):
        self._checkpoint, self.names = checkpoint, list(names)

    def info(self, name: str) -> TensorInfo:
        return self._checkpoint.info(name)

    def read(self, name: str, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self._checkpoint.read(name, dtype)

    def read_into(self, name: str, out: torch.Tensor) -> None:
        self._checkpoint.read_into(name, out)


def _shards_of_index(folder: Path) -> dict[str, str]:
    try:
        shard_of = json.loads((folder / INDEX).read_bytes())["weight_map"]
        shards = sorted(set(shard_of.values()))
        absent = [shard for shard in shards if not (folder / shard).is_file()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{folder / INDEX} cannot be read: copy or download it again") from None
    if absent:
        raise UserError(
            f"{folder} lacks {len(absent)} of {len(shards)} shards ({', '.join(absent[:3])}): "
            "download them again"
        )
    return shard_of


def _no_checkpoint(folder: Path) -> str:
    if not folder.is_dir():
        return f"no folder {folder}"
    if any(folder.glob("*.bin")) or any(folder.glob("*.pth")) or any(folder.glob("*.pt")):
        return (
            f"{folder} has its weights in pickled files only: convert them (transformers: "
            "save_pretrained writes safetensors)"
        )
    return (
        f"{folder} has no model.safetensors and no {INDEX}: give a folder with a Hugging Face "
        "checkpoint in safetensors"
    )


# ---- writing -------------------------------------------------------------------------------------
def write_tensors(
    path: str | os.PathLike[str], entries: Sequence[Entry], metadata: dict[str, str] | None = None
) -> tuple[int, str]:
    """Stream tensors into a safetensors file; return (bytes, sha256 in hex).

    The file appears whole or not at all: it is written under another name, synced and renamed.
    Raise UserError if the disk is full or not writable.
    """
    # wide types come first, which keeps every offset aligned
    entries = sorted(entries, key=lambda entry: -DTYPE_BYTES[entry.dtype])
    return write_file(path, _file_pieces(entries, metadata), file_bytes(entries, metadata))


def file_bytes(entries: Iterable[Entry], metadata: dict[str, str] | None = None) -> int:
    """Return the size in bytes of the file that `write_tensors` would write."""
    entries = list(entries)
    return len(_header(entries, metadata)) + sum(entry.nbytes for entry in entries)


def write_file(
    path: str | os.PathLike[str], pieces: Iterable[Bytes], total: int
) -> tuple[int, str]:
    """Write the pieces under another name, then rename the file; return (bytes, sha256 in hex).

    `total` is their size in bytes, for the message when space runs out."""
    path = Path(path)
    digest, written = hashlib.sha256(), 0
    with replacing(path) as beside, open(beside, "wb", buffering=0) as file:
        for piece in pieces:
            try:
                _write_all(file, piece)
            except OSError as error:
                raise _write_error(error, path, total - written) from None
            digest.update(piece)
            written += len(piece)
        os.fsync(file.fileno())
    return written, digest.hexdigest()


def _write_all(file, piece: Bytes) -> None:
    """Write the whole piece.

    An unbuffered write may take less than it is given, most of all when the disk fills up."""
    view = memoryview(piece)
    while view:
        view = view[file.write(view) :]


def _write_error(error: OSError, path: Path, missing: int) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"no space left in {path.parent}: {path.name} needs about "
            f"{max(1, -(-missing // 10**6))} MB more"
        )
    return UserError(f"cannot write {path}: {error.strerror}")


def _header(entries: Iterable[Entry], metadata: dict[str, str] | None) -> bytes:
    table: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    at = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [at, at + entry.nbytes],
        }
        at += entry.nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _file_pieces(entries: Sequence[Entry], metadata: dict[str, str] | None) -> Iterator[Bytes]:
    yield _header(entries, metadata)
    for entry in entries:
        count = 0
        for piece in entry.chunks():
            count += len(piece)
            yield piece
        if count != entry.nbytes:
            raise ValueError(f"{entry.name}: {count} bytes given, {entry.nbytes} announced")
