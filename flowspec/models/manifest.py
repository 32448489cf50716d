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
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from flowspec.core.topology import Topology
from flowspec.errors import UserError, need
from flowspec.files import replacing
from flowspec.schema import build, read_mapping

FORMAT = 2
"""Format 1 is that of splits without tensor parallelism, which are still written so."""
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

    def __post_init__(self) -> None:
        path = PurePosixPath(self.file)
        inside = not path.is_absolute() and ".." not in path.parts
        need(inside, f"file {self.file} lies outside the folder")
        need(self.bytes >= 0, f"{self.file} has bytes {self.bytes}")


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

    def __post_init__(self) -> None:
        FileEntry(self.file, self.bytes, self.sha256)  # is checked as it is made

    @property
    def num_layers(self) -> int:
        return self.layers[1] - self.layers[0]

    @property
    def weights(self) -> FileEntry:
        return FileEntry(self.file, self.bytes, self.sha256)


@dataclass(frozen=True)
class Manifest:
    """A manifest describes a split model.

    `ranks[0]` is the coordinator, and `ranks[1:]` are the stages in order, each with
    `tensor_parallel` members. `dtype` is the stored
    one by torch's name."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_positions: int
    dtype: str
    tied: bool
    ranks: tuple[RankEntry, ...]
    format: int
    tensor_parallel: int = 1
    """Each stage has so many ranks, which share its layers."""
    embedding: str | None = None
    """This hash tells which model was split (models/fingerprint.py); None if the flowspec that
    split it did not tell."""
    root: Path = field(default=Path(), compare=False, metadata={"internal": True})
    servers: int = field(default=1, metadata={"internal": True})
    """In this run so many servers hold the stages (DSI)."""
    drafters: int = field(default=0, metadata={"internal": True})
    """In this run so many ranks draft for rank 0."""

    def __post_init__(self) -> None:
        need(self.format >= 1, f"format is {self.format}")
        for name in ("vocab_size", "hidden_size", "num_layers", "max_positions"):
            need(getattr(self, name) > 0, f"{name} is {getattr(self, name)}")
        members, others = self.tensor_parallel, len(self.ranks) - 1
        need(
            members > 0 and others % members == 0,
            f"tensor_parallel is {members}, and there are {others} ranks beside rank 0",
        )
        _check_ranks(self.ranks, self.num_layers, self.topology)

    @property
    def topology(self) -> Topology:
        """Return the topology of a run of the split model."""
        return Topology.of_world(len(self.ranks), self.tensor_parallel, self.servers, self.drafters)

    def entry(self, rank: int) -> RankEntry:
        """Return what a rank of the run reads."""
        return self.ranks[self.topology.place(rank)]

    def folder(self, rank: int) -> Path:
        """Return the folder of this rank's config.json; rank 0's also has the tokenizer."""
        return (self.root / self.entry(rank).file).parent

    def path(self, entry: FileEntry | RankEntry) -> Path:
        return self.root / entry.file

    @classmethod
    def load(cls, path: str | os.PathLike[str], servers: int = 1, drafters: int = 0) -> Manifest:
        """Read the manifest from stages.yaml, or from the folder that holds it.

        In the run, so many servers hold what it describes, and so many ranks draft.

        Raise UserError if it is missing, damaged or too new."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        need(path.exists(), f"no {path}: split a model first (run split_models.py)")
        values = read_mapping(path, f"the manifest of a split model: {AGAIN}")
        version = values.get("format")
        need(
            type(version) is not int or version <= FORMAT,
            f"{path} was made by a newer flowspec (format {version}, this one reads {FORMAT}): "
            "upgrade flowspec or split again",
        )
        try:
            return build(cls, values, root=path.parent, servers=servers, drafters=drafters)
        except UserError as error:
            raise UserError(f"{path}: {error}: {AGAIN}") from None

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write stages.yaml at this path (or into this folder), whole or not at all."""
        path = Path(path)
        path = path / FILE_NAME if path.is_dir() else path
        with replacing(path) as beside:
            beside.write_text(yaml.safe_dump(self._plain(), sort_keys=False, width=1000))

    def _plain(self) -> dict[str, Any]:
        plain = {"format": self.format, **asdict(self)}
        left_out = {"root", "servers", "drafters"} | (
            {"embedding"} if self.embedding is None else set()
        )
        left_out |= {"tensor_parallel"} if self.tensor_parallel == 1 else set()
        return {key: value for key, value in plain.items() if key not in left_out}


def _check_ranks(ranks: tuple[RankEntry, ...], num_layers: int, topology: Topology) -> None:
    """Raise UserError unless the ranks count 0, 1, ... and cover the layers [0, num_layers).

    The layers must have no gap, rank 0 must hold none, and all members of a stage the same."""
    at = 0
    for i, rank in enumerate(ranks):
        need(
            rank.rank == i and rank.role in ROLES,
            f"rank {i} is described as rank {rank.rank}, {rank.role}",
        )
        first, end = rank.layers
        if not topology.leads(i):
            need(
                rank.layers == ranks[i - 1].layers,
                f"rank {i} has layers {[first, end]}, its stage has {[*ranks[i - 1].layers]}",
            )
            continue
        need(
            first == (at if i else end) and (i == 0 or rank.num_layers > 0),
            f"rank {i} has layers {[first, end]}, they should follow on layer {at}",
        )
        at = end if i else 0
    need(len(ranks) > 1 and at == num_layers, f"the ranks hold {at} of {num_layers} layers")


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
            for entry in files_of(manifest.entry(rank), heads is None or rank in heads):
                fresh[entry.file] = _verify(manifest.root, entry, known.get(entry.file))
    finally:
        if any(known.get(name) != value for name, value in fresh.items()):
            _write_cache(manifest.root, fresh)


def files_of(rank: RankEntry, with_head: bool) -> list[FileEntry]:
    """Return the files that a rank reads; `with_head` says whether it loads lm_head."""
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
                f"{path} has {stat.st_size} bytes instead of {entry.bytes}: copy it again or "
                f"{AGAIN}"
            )
        line = [stat.st_size, stat.st_mtime_ns]
        digest = (
            known[2]
            if isinstance(known, list) and known[:2] == line and len(known) == 3
            else sha256_of(path)
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


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
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
