"""A manifest (`stages.yaml`) says what a split wrote, rank by rank.

This module reads and writes it, and checks whether the files are still what the split wrote. It
needs no torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from flowspec.core.topology import Topology
from flowspec.errors import UserError
from flowspec.files import replacing

FORMAT = 1
FILE_NAME = "stages.yaml"
CACHE_NAME = ".sha256.json"
ROLES = ("coordinator", "first", "stage", "last")
AGAIN = "run split_models.py again"


@dataclass(frozen=True)
class FileEntry:
    """A FileEntry is a file of the split.

    It has the path relative to the split's root, the size in bytes and the sha256 in hex."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class RankEntry:
    """A RankEntry is what one rank reads.

    It has layers [a, b) in `file`, perhaps the head, and small files (config, tokenizer)."""

    rank: int
    role: str
    layers: tuple[int, int]
    file: str
    bytes: int
    sha256: str
    lm_head: FileEntry | None = None
    extra: tuple[FileEntry, ...] = ()

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]

    @property
    def weights(self) -> FileEntry:
        return FileEntry(self.file, self.bytes, self.sha256)


@dataclass(frozen=True)
class Manifest:
    """A manifest describes a split model.

    `ranks[0]` is the coordinator, and `ranks[1:]` are the stages in order. `dtype` is the stored
    one by torch's name."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    dtype: str
    tied: bool
    ranks: tuple[RankEntry, ...]
    embedding: str | None = None
    """This hash tells which model was split (models/fingerprint.py); None if the flowspec that
    split it did not tell."""
    format: int = FORMAT
    root: Path = field(default=Path(), compare=False)

    @property
    def topology(self) -> Topology:
        """Return the topology of a run of the split model."""
        return Topology.of_world(len(self.ranks))

    def folder(self, rank: int) -> Path:
        """Return the folder of this rank's config.json; rank 0's also has the tokenizer."""
        return (self.root / self.ranks[rank].file).parent

    def path(self, entry: FileEntry | RankEntry) -> Path:
        return self.root / entry.file

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Manifest:
        """Read the manifest from stages.yaml, or from the folder that holds it.

        Raise UserError if it is missing, damaged or too new."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        return _parse(_read_yaml(path), path)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write stages.yaml at this path (or into this folder), whole or not at all."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        with replacing(path) as beside:
            beside.write_text(yaml.safe_dump(_plain(self), sort_keys=False, width=1000))


# ---- YAML ----------------------------------------------------------------------------------------
def _plain(manifest: Manifest) -> dict:
    keys = (
        "format",
        "model_type",
        "vocab_size",
        "hidden_size",
        "num_layers",
        "max_positions",
        "dtype",
        "tied",
    )
    told = {} if manifest.embedding is None else {"embedding": manifest.embedding}
    return {
        **{key: getattr(manifest, key) for key in keys},
        **told,
        "ranks": [_plain_rank(rank) for rank in manifest.ranks],
    }


def _plain_rank(rank: RankEntry) -> dict:
    plain = {
        **vars(rank),
        "layers": list(rank.layers),
        "extra": [dict(vars(entry)) for entry in rank.extra],
    }
    plain["lm_head"] = dict(vars(rank.lm_head)) if rank.lm_head else None
    return plain


def _read_yaml(path: Path) -> dict:
    try:
        loaded = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"no {path}: split a model first (run split_models.py)") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{path} is not valid YAML: {AGAIN}") from None
    if not isinstance(loaded, dict):
        raise UserError(f"{path} is not a manifest of a split model: {AGAIN}")
    return loaded


@dataclass(frozen=True)
class _Fields:
    """_Fields are a mapping of the manifest, and where it lies, for errors to name."""

    values: Any
    where: str

    def get(self, key: str, kind: type):
        """Return the value of this key.

        Raise UserError if it is missing, of another type (a bool is no int) or a negative int."""
        if not isinstance(self.values, dict) or key not in self.values:
            raise UserError(f"{self.where}: {key} is missing: {AGAIN}")
        value = self.values[key]
        if type(value) is not kind or (type(value) is int and value < 0):
            raise UserError(f"{self.where}: {key} is {value!r}: {AGAIN}")
        return value

    def file(self) -> tuple[str, int, str]:
        name = self.get("file", str)
        parts = PurePosixPath(name)
        if parts.is_absolute() or ".." in parts.parts:
            raise UserError(f"{self.where}: file {name} lies outside the folder: {AGAIN}")
        return name, self.get("bytes", int), self.get("sha256", str)


def _parse(loaded: dict, path: Path) -> Manifest:
    top = _Fields(loaded, str(path))
    version = top.get("format", int)
    if version > FORMAT:
        raise UserError(
            f"{path} was made by a newer flowspec (format {version}, this one reads {FORMAT}): upgrade flowspec or split again"
        )
    if version < 1:
        raise UserError(f"{path}: format is {version}: {AGAIN}")
    numbers = {
        key: top.get(key, int)
        for key in ("vocab_size", "hidden_size", "num_layers", "max_positions")
    }
    ranks = tuple(
        _parse_rank(_Fields(entry, f"{path}: rank {i}"))
        for i, entry in enumerate(top.get("ranks", list))
    )
    _check_ranks(ranks, numbers["num_layers"], path)
    names = {key: top.get(key, str) for key in ("model_type", "dtype")}
    embedding = top.get("embedding", str) if "embedding" in loaded else None
    return Manifest(
        **names,
        **numbers,
        tied=top.get("tied", bool),
        ranks=ranks,
        embedding=embedding,
        format=version,
        root=path.parent,
    )


def _parse_rank(entry: _Fields) -> RankEntry:
    layers = entry.get("layers", list)
    if len(layers) != 2 or any(type(number) is not int for number in layers):
        raise UserError(f"{entry.where}: layers is {layers!r}: {AGAIN}")
    head = entry.values.get("lm_head")
    extra = tuple(
        FileEntry(*_Fields(each, f"{entry.where}: extra").file())
        for each in entry.get("extra", list)
    )
    return RankEntry(
        entry.get("rank", int), entry.get("role", str), (layers[0], layers[1]), *entry.file(),
        lm_head=FileEntry(*_Fields(head, f"{entry.where}: lm_head").file()) if head is not None else None, extra=extra,
    )  # fmt: skip


def _check_ranks(ranks: tuple[RankEntry, ...], num_layers: int, path: Path) -> None:
    """Raise UserError unless the ranks count 0, 1, ... and cover the layers [0, num_layers).

    The layers must have no gap, and rank 0 must hold none."""
    at = 0
    for i, rank in enumerate(ranks):
        if rank.rank != i or rank.role not in ROLES:
            raise UserError(
                f"{path}: rank {i} is described as rank {rank.rank}, {rank.role}: {AGAIN}"
            )
        if rank.layers[0] != (at if i else rank.layers[1]) or (i and rank.num_layers < 1):
            raise UserError(
                f"{path}: rank {i} has layers {list(rank.layers)}, they should follow on layer {at}: {AGAIN}"
            )
        at = rank.layers[1] if i else 0
    if len(ranks) < 2 or at != num_layers:
        raise UserError(f"{path}: the ranks hold {at} of {num_layers} layers: {AGAIN}")


# ---- files ---------------------------------------------------------------------------------------
def verify_files(
    manifest: Manifest, ranks: Iterable[int], *, lm_head: Iterable[int] | None = None
) -> None:
    """Compare the size and sha256 of all files of these ranks with the manifest.

    `lm_head` are the ranks whose head will be loaded; None means every one. Hashes are kept in
    ROOT/.sha256.json by size and time of change, so an unchanged file is read once; a folder that
    cannot be written is hashed anew each time. Raise UserError, which names the first file that
    differs.
    """
    heads = None if lm_head is None else set(lm_head)
    known = _read_cache(manifest.root)
    fresh = {}
    try:
        for rank in sorted(set(ranks)):
            for entry in _files_of(manifest.ranks[rank], heads is None or rank in heads):
                fresh[entry.file] = _verify(manifest.root, entry, known.get(entry.file))
    finally:
        if any(known.get(name) != value for name, value in fresh.items()):
            _write_cache(manifest.root, fresh)


def _files_of(rank: RankEntry, with_head: bool) -> list[FileEntry]:
    head = [rank.lm_head] if rank.lm_head and with_head else []
    return [*rank.extra, rank.weights, *head]


def _verify(root: Path, entry: FileEntry, known: object) -> list:
    """Return the hash cache's line [bytes, mtime_ns, sha256] of a file.

    Raise UserError unless the file is as the manifest says."""
    path = root / entry.file
    try:
        stat = path.stat()
        if stat.st_size != entry.bytes:
            raise UserError(
                f"{path} has {stat.st_size} bytes instead of {entry.bytes}: copy it again or {AGAIN}"
            )
        line = [stat.st_size, stat.st_mtime_ns]
        digest = (
            known[2]
            if isinstance(known, list) and known[:2] == line and len(known) == 3
            else _sha256(path)
        )
    except FileNotFoundError:
        raise UserError(f"{path} is missing: copy it here or {AGAIN}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if digest != entry.sha256:
        raise UserError(
            f"{path} is damaged (its sha256 is not the manifest's): copy it again or {AGAIN}"
        )
    return [*line, digest]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _read_cache(root: Path) -> dict:
    try:
        cache = json.loads((root / CACHE_NAME).read_bytes())
    except (OSError, ValueError):
        return {}
    return cache if isinstance(cache, dict) else {}


def _write_cache(root: Path, fresh: dict) -> None:
    """Merge these lines into what another process may have written meanwhile.

    The last rename wins; a file whose line is lost is only hashed again."""
    with contextlib.suppress(UserError), replacing(root / CACHE_NAME) as beside:
        beside.write_text(json.dumps({**_read_cache(root), **fresh}))
