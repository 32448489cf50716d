"""A split cuts a Hugging Face checkpoint into one folder for each rank.

    OUT/stages.yaml
    OUT/rank_00/   config, tokenizer, lm_head.safetensors, an empty model.safetensors
    OUT/rank_NN/   config, model.safetensors with the rank's layers

The first stage's model.safetensors also has the embedding, and the last stage's has the final norm
(with lm_head.safetensors beside it). If stages are groups of ranks, each rank's files hold its
shard (shard.py). Tensors are copied in chunks under the names they have; nothing larger than a
chunk is ever held. All is written into a folder beside OUT, which is renamed at the
end, so a split that fails or is interrupted leaves OUT as it was.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path

from flowspec.core.topology import WHOLE, Shard, Topology
from flowspec.errors import UserError, need
from flowspec.models.families import (
    CONFIG,
    EMBEDDING,
    HEAD,
    NORM,
    entrance_tensors,
    family_of,
    is_table,
    layer_tensors,
    missing_tensors,
    norm_tensors,
    read_config,
)
from flowspec.models.fingerprint import embedding_hash
from flowspec.models.hub import COORDINATOR_FILES, MODEL_FILES, local_folder
from flowspec.models.manifest import CACHE_NAME, FILE_NAME, FORMAT, FileEntry, Manifest, RankEntry
from flowspec.models.quantised import Tensors, parts, plain
from flowspec.models.shard import Cut, check_members, copies, cut, is_added
from flowspec.models.weights import (
    CHUNK,
    CONVERTED,
    DTYPE_BYTES,
    FLOATS,
    TORCH_NAMES,
    Bytes,
    Checkpoint,
    Entry,
    TensorFile,
    file_bytes,
    torch_dtype,
    write_file,
    write_tensors,
)

MODEL, LM_HEAD = "model.safetensors", "lm_head.safetensors"
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
METADATA = {"format": "pt"}


class Progress:
    """A progress is told what a split is doing; this one shows nothing."""

    def line(self, text: str) -> None:
        """Take in that a step is done, which `text` describes."""

    def percent(self, part: float) -> None:
        """Take in that this share (0 to 1) of all bytes is written."""


class Screen(Progress):
    """A screen shows lines on stderr.

    On a terminal it also shows a percentage, which the next line overwrites."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.shown = -1

    def line(self, text: str) -> None:
        clear = "\r\033[K" if self.terminal else ""
        print(f"{clear}{text}", file=sys.stderr, flush=True)

    def percent(self, part: float) -> None:
        if self.terminal and int(100 * part) != self.shown:
            self.shown = int(100 * part)
            print(f"\r{self.shown:3d} %", end="", file=sys.stderr, flush=True)


# ---- the split -----------------------------------------------------------------------------------
def split(
    model: str,
    stages: int,
    output: str | os.PathLike[str],
    *,
    members: int = 1,
    layers: str | Sequence[int] | None = None,
    dtype: str = "auto",
    progress: Progress | None = None,
) -> Manifest:
    """Cut `model` (a folder or hub id) into `stages` stages under `output`; return the manifest.

    Each stage is cut into shards for `members` ranks (tensor parallelism). Raise UserError for bad
    input."""
    if dtype != "auto" and dtype not in DTYPES:
        raise UserError(f"--dtype is {dtype!r}, it must be one of auto, {', '.join(DTYPES)}")
    if stages < 1:
        raise UserError(f"--stages is {stages}, it must be at least 1")
    target = check_output(output)
    source = Source.open(local_folder(model, "--model", MODEL_FILES))
    ranges = layer_ranges(source.num_layers, stages, layers)
    check_members(source.config, members)
    for option, given in (("--dtype", dtype != "auto"), ("--tensor-parallel", members > 1)):
        need(
            not given or source.tensors is source.checkpoint,
            f"{option}: the layers of a quantised checkpoint are copied as they are stored, leave "
            "it out",
        )
    job = Job(source, ranges, members, DTYPES.get(dtype), progress or Progress())
    with staged_folder(target, job.total) as folder:
        manifest = job.write(folder)
    return replace(manifest, root=target)


@dataclass(frozen=True)
class Source:
    """A source is a checkpoint whose config and tensors have been checked."""

    folder: Path
    config: dict
    checkpoint: Checkpoint

    @classmethod
    def open(cls, folder: Path) -> Source:
        """Return the checkpoint of a folder as a source.

        Raise UserError if its config cannot be read or is not supported, or if its tensors are
        missing or do not fit the config."""
        config = read_config(folder)
        source = cls(folder, config, Checkpoint(folder, family_of(config).named))
        source._check_tensors()
        return source

    @property
    def num_layers(self) -> int:
        return self.config["num_hidden_layers"]

    @property
    def tied(self) -> bool:
        """Return whether the embedding is also the lm_head.

        A checkpoint that holds both matrices means them, whatever its config says (transformers
        takes it so, too)."""
        return (
            bool(self.config.get("tie_word_embeddings", False)) and HEAD not in self.tensors.names
        )

    @cached_property
    def tensors(self) -> Tensors:
        """Return the checkpoint's tensors, with plain matrices where it has quantised layers.

        Raise UserError if a layer lacks a tensor."""
        return plain(self.checkpoint, self.config, str(self.folder))

    @property
    def head(self) -> str:
        return EMBEDDING if self.tied else HEAD

    @property
    def dtype(self) -> str:
        """Return the dtype of most of the (plain) tensors' bytes, by torch's name."""
        sizes: Counter[str] = Counter()
        for name in self._used:
            info = self.tensors.info(name)
            sizes[info.dtype] += DTYPE_BYTES[info.dtype] * math.prod(info.shape)
        return TORCH_NAMES[sizes.most_common(1)[0][0]]

    @cached_property
    def _layers(self) -> dict[int, list[str]]:
        return layer_tensors(self.tensors.names)

    def layer_names(self, start: int, stop: int) -> list[str]:
        return [name for layer in range(start, stop) for name in self._layers.get(layer, ())]

    @property
    def entrance(self) -> list[str]:
        """Return what the first stage has before its layers."""
        return [EMBEDDING, *entrance_tensors(family_of(self.config), self.tensors.names)]

    @property
    def exit(self) -> list[str]:
        """Return what the last stage has behind its layers."""
        return norm_tensors(self.tensors.names)

    @property
    def _used(self) -> list[str]:
        return [*self.entrance, *self.layer_names(0, self.num_layers), *self.exit, self.head]

    def unused(self) -> list[str]:
        """Return the tensors that the architecture does not have.

        The tables of old checkpoints, which are computed, are not among them."""
        used = {part for name in (*self._used, HEAD) for part in parts(self.tensors, name)}
        return [name for name in self.checkpoint.names if name not in used and not is_table(name)]

    def _check_tensors(self) -> None:
        stored = set(self.tensors.names)
        missing = [name for name in self._used if name not in stored]
        missing += missing_tensors(self._layers, self.num_layers)
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise UserError(
                f"{self.folder} lacks tensors the model needs: {', '.join(missing[:3])}{more}"
            )
        for name in self._used:
            if self.tensors.info(name).dtype not in FLOATS:
                raise UserError(
                    f"{self.folder}: {name} is stored as {self.tensors.info(name).dtype}; "
                    f"only {', '.join(sorted(FLOATS))} are supported"
                )
        self._check_shapes()

    def _check_shapes(self) -> None:
        vocab, hidden = self.config["vocab_size"], self.config["hidden_size"]
        for name, shape in (
            (EMBEDDING, (vocab, hidden)),
            (self.head, (vocab, hidden)),
            (NORM, (hidden,)),
        ):
            if self.tensors.info(name).shape != shape:
                raise UserError(
                    f"{self.folder}: {name} has shape {list(self.tensors.info(name).shape)}, "
                    f"config.json says {list(shape)}"
                )
        deepest = max(self._layers, default=0)
        more = self.config.get("num_nextn_predict_layers") or 0  # layers that guess, not used here
        if deepest >= self.num_layers + more:
            raise UserError(
                f"{self.folder} has weights of layer {deepest}, config.json says "
                f"num_hidden_layers {self.num_layers}"
            )


@dataclass
class Job:
    """A job is one split under way: which tensors go where, and how many bytes are done."""

    source: Source
    ranges: list[tuple[int, int]]
    members: int
    dtype: str | None
    progress: Progress
    tensors: list[list[Entry]] = field(init=False)
    """These are the tensors of each rank, from rank 1 on."""
    heads: dict[int, list[Entry]] = field(init=False)
    """This maps a rank whose lm_head is written (not linked) to the head."""
    total: int = field(init=False)
    done: int = 0

    def __post_init__(self) -> None:
        ring = self.topology
        self.tensors = [
            [
                self._entry(part, self._shard(rank))
                for name in self._names(rank)
                for part in parts(self.source.tensors, name)
            ]
            for rank in ring.ranks[1:]
        ]
        sharded = ring.group(ring.last) if self.members > 1 else ()
        self.heads = {
            rank: self._head_entries(shard)
            for rank, shard in [(0, WHOLE), *((rank, self._shard(rank)) for rank in sharded)]
        }
        written = [*self.tensors, *self.heads.values()]
        self.total = sum(file_bytes(entries, METADATA) for entries in written)

    @property
    def topology(self) -> Topology:
        return Topology(len(self.ranges), self.members)

    def write(self, folder: Path) -> Manifest:
        """Write every rank's folder and stages.yaml under `folder`."""
        unused = self.source.unused()
        if unused:
            self.progress.line(
                f"left out {len(unused)} tensors that the architecture does not have "
                f"({unused[0]}, ...)"
            )
        if (same := copies(self.source.config, self.members)) > 1:
            self.progress.line(
                f"each key/value head is held by {same} ranks: the model has only "
                f"{self.members // same} of them for {self.members} members"
            )
        for rank in self.topology.ranks:
            (folder / rank_name(rank)).mkdir()
        whole = self._tensors(folder, f"{rank_name(0)}/{LM_HEAD}", self.heads[0])
        manifest = self._manifest(
            tuple(self._rank(folder, rank, whole) for rank in self.topology.ranks)
        )
        manifest.save(folder / FILE_NAME)
        return manifest

    def _shard(self, rank: int) -> Shard:
        return Shard(self.topology.member(rank), self.members)

    def _names(self, rank: int) -> list[str]:
        leader = self.topology.leader(rank)
        first = self.source.entrance if self.topology.is_first(leader) else []
        last = self.source.exit if self.topology.is_last(leader) else []
        return [*first, *self.source.layer_names(*self._layers(rank)), *last]

    def _head_entries(self, shard: Shard) -> list[Entry]:
        head = self.source.head
        if head != HEAD:
            return [self._entry(head, shard)._replace(name=HEAD)]
        return [self._entry(part, shard) for part in parts(self.source.tensors, head)]

    def _layers(self, rank: int) -> tuple[int, int]:
        return self.ranges[self.topology.stage(rank) - 1] if rank else (0, 0)

    def _entry(self, name: str, shard: Shard) -> Entry:
        info, part = self.source.checkpoint.info(name), cut(name, self.source.config, shard)
        dtype = self.dtype or info.dtype
        if part and info.shape[part.dim] != part.size:
            raise UserError(
                f"{self.source.folder}: {name} has shape {list(info.shape)}, by config.json "
                f"dimension {part.dim} is {part.size}: to cut it into shards, config.json must "
                "tell the model's num_key_value_heads and head_dim"
            )
        shape = part.shape(info.shape) if part else info.shape
        zeros = shard.member > 0 and is_added(name)
        return Entry(name, dtype, shape, partial(self._chunks, name, dtype, part, zeros))

    def _chunks(self, name: str, dtype: str, part: Cut | None, zeros: bool) -> Iterator[Bytes]:
        file = self.source.checkpoint.file(name)
        for piece in _pieces(file, name, dtype, part):
            if zeros:
                piece = bytes(len(piece))
            yield piece
            self.done += len(piece)
            self.progress.percent(self.done / self.total)

    def _rank(self, folder: Path, rank: int, head: FileEntry) -> RankEntry:
        name, role = rank_name(rank), self.topology.role(rank)
        weights = self._tensors(folder, f"{name}/{MODEL}", self.tensors[rank - 1] if rank else [])
        own_head = self._head(folder, rank, head)
        layers = self._layers(rank)
        held = sum(entry.bytes for entry in (weights, own_head) if entry)
        what = f"layers {layers[0]}-{layers[1] - 1}" if rank else "lm_head"
        self.progress.line(f"{name}  {role:11}  {what:14}  {held / 1e6:10.1f} MB")
        return RankEntry(
            rank,
            role,
            layers,
            weights.file,
            weights.bytes,
            weights.sha256,
            lm_head=own_head,
            extra=self._small_files(folder, rank),
        )

    def _head(self, folder: Path, rank: int, whole: FileEntry) -> FileEntry | None:
        name = f"{rank_name(rank)}/{LM_HEAD}"
        if rank == 0:
            return whole
        if rank in self.heads:
            return self._tensors(folder, name, self.heads[rank])
        return linked(folder, whole, name) if rank == self.topology.last else None

    def _tensors(self, folder: Path, name: str, entries: list[Entry]) -> FileEntry:
        return FileEntry(name, *write_tensors(folder / name, entries, METADATA))

    def _small_files(self, folder: Path, rank: int) -> tuple[FileEntry, ...]:
        contents = {CONFIG: self._config()}
        for name in COORDINATOR_FILES if rank == 0 else ():
            if (self.source.folder / name).is_file():
                contents[name] = read_bytes(self.source.folder / name)
        paths = {f"{rank_name(rank)}/{name}": content for name, content in contents.items()}
        return tuple(
            FileEntry(path, *write_file(folder / path, [content], len(content)))
            for path, content in paths.items()
        )

    def _config(self) -> bytes:
        """Return config.json as it is, or with the dtype that the tensors now have."""
        if self.dtype is None:
            return read_bytes(self.source.folder / CONFIG)
        rest = {key: value for key, value in self.source.config.items() if key != "torch_dtype"}
        return json.dumps({**rest, "dtype": TORCH_NAMES[self.dtype]}, indent=2).encode()

    def _manifest(self, ranks: tuple[RankEntry, ...]) -> Manifest:
        config = self.source.config
        return Manifest(
            model_type=config["model_type"], vocab_size=config["vocab_size"], hidden_size=config["hidden_size"],
            num_layers=self.source.num_layers, max_positions=config["max_position_embeddings"],
            dtype=TORCH_NAMES[self.dtype] if self.dtype else self.source.dtype, tied=self.source.tied, ranks=ranks,
            embedding=embedding_hash(self.source.checkpoint), tensor_parallel=self.members,
            format=FORMAT if self.members > 1 else 1,
        )  # fmt: skip


def rank_name(rank: int) -> str:
    return f"rank_{rank:02d}"


def _pieces(file: TensorFile, name: str, dtype: str, part: Cut | None) -> Iterator[Bytes]:
    """Yield the bytes of a part of a tensor (None: the whole), as this dtype."""
    info = file.info(name)
    spans = part and part.spans(info.shape, DTYPE_BYTES[info.dtype])
    if info.dtype == dtype:
        return file.chunks(name, spans=spans)
    return converted(file, name, dtype, spans)


def converted(
    file: TensorFile, name: str, dtype: str, spans: Iterable[tuple[int, int]] | None = None
) -> Iterator[memoryview]:
    """Yield the bytes of a tensor, or of these spans of it, as another dtype, chunk by chunk.

    Raise UserError where a finite value would become infinite."""
    import torch

    stored, wanted = torch_dtype(file.info(name).dtype), torch_dtype(dtype)
    for piece in file.chunks(name, CONVERTED * stored.itemsize, spans):
        before = torch.frombuffer(bytearray(piece), dtype=stored)
        after = before.to(wanted)
        if not math.isfinite(sum(after.aminmax())) and not torch.equal(
            before.isfinite(), after.isfinite()
        ):
            raise UserError(
                f"{file.path}: {name} has values too large for {TORCH_NAMES[dtype]}: choose "
                "another --dtype"
            )
        yield after.view(torch.uint8).numpy().data


def linked(folder: Path, entry: FileEntry, name: str) -> FileEntry:
    """Return the same file under a second name.

    It is a hard link, or a copy where the file system has no hard links."""
    try:
        os.link(folder / entry.file, folder / name)
    except OSError:
        write_file(folder / name, blocks(folder / entry.file), entry.bytes)
    return replace(entry, file=name)


def blocks(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            yield piece


def layer_ranges(
    num_layers: int, stages: int, layers: str | Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Return half-open layer ranges, one for each stage.

    They are as `layers` asks ("8,8,8"), else near equal with the remainder on the later stages.
    Raise UserError if they do not fit the model or the number of stages."""
    if stages > num_layers:
        raise UserError(f"--stages is {stages}, the model has only {num_layers} layers")
    counts = _even(num_layers, stages) if layers is None else _asked(layers)
    if len(counts) != stages:
        raise UserError(f"--layers names {len(counts)} stages, --stages is {stages}")
    if min(counts) < 1:
        raise UserError(
            f"--layers {','.join(map(str, counts))}: every stage needs at least one layer"
        )
    if sum(counts) != num_layers:
        raise UserError(
            f"--layers {','.join(map(str, counts))} adds up to {sum(counts)}, the model has "
            f"{num_layers} layers"
        )
    ends = list(accumulate(counts, initial=0))
    return list(pairwise(ends))


def _even(num_layers: int, stages: int) -> list[int]:
    base, more = divmod(num_layers, stages)
    return [base + (stage >= stages - more) for stage in range(stages)]


def _asked(layers: str | Sequence[int]) -> list[int]:
    try:
        return [int(count) for count in (layers.split(",") if isinstance(layers, str) else layers)]
    except ValueError:
        raise UserError(
            f"--layers is {layers!r}, it must be integers with commas between them, like 8,8,8,8"
        ) from None


# ---- where it comes from -------------------------------------------------------------------------
def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


# ---- where it goes -------------------------------------------------------------------------------
def check_output(output: str | os.PathLike[str]) -> Path:
    """Return the absolute folder to write.

    Raise UserError if something other than an older split lies there."""
    target = Path(output).resolve()
    if target.exists() and not target.is_dir():
        raise UserError(f"--output {output} is a file")
    present = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    if present and FILE_NAME not in present:
        raise UserError(
            f"--output {output} is not empty and holds no {FILE_NAME}: choose another folder"
        )
    foreign = [
        name
        for name in present
        if name not in (FILE_NAME, CACHE_NAME) and not re.fullmatch(r"rank_\d+", name)
    ]
    if foreign:
        raise UserError(
            f"--output {output} holds an older split and also {foreign[0]}: move that away, the "
            "folder will be replaced"
        )
    return target


@contextlib.contextmanager
def staged_folder(target: Path, needed: int) -> Iterator[Path]:
    """Yield a folder beside `target` that takes its place at the end.

    On any failure the folder is deleted and `target` stays as it was. `needed` bytes must be free.
    Raise UserError if they are not, or if the place cannot be written.
    """
    partial_folder = target.with_name(f"{target.name}.partial-{os.getpid()}")
    made: list[Path] = []
    try:
        try:
            _make_parents(target.parent, made)
            _check_space(target.parent, needed)
            partial_folder.mkdir()
            yield partial_folder
            _swap(partial_folder, target)
        except OSError as error:
            raise UserError(f"cannot write {target}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _make_parents(folder: Path, made: list[Path]) -> None:
    """Make `folder` and the missing folders above it, and note each in `made`."""
    for parent in (*reversed(folder.parents), folder):
        if not parent.exists():
            parent.mkdir()
            made.append(parent)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise UserError(
            f"no space left in {folder}: {needed / 1e6:.0f} MB are needed, {free / 1e6:.0f} MB "
            "are free"
        )


def _swap(new: Path, target: Path) -> None:
    """Put `new` where `target` is, then delete the old one; a signal waits until both are done."""
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        if target.exists():
            os.rename(target, old)
        try:
            os.rename(new, target)
        except OSError:
            if old.exists():
                os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
