"""What each host of a run needs lies here under the names it has there, and is copied to it.

A host gets flowspec's own code, the run's configuration with the paths it has there, and the files
of its own ranks. What is there already, by sha256, is not copied again, and what was interrupted
goes on where it stopped."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import yaml

from flowspec.cluster.ssh import Session
from flowspec.config import Config
from flowspec.draft.config import DrafterConfig
from flowspec.errors import UserError, need
from flowspec.models.hub import HEAD_FILES, MODEL_FILES
from flowspec.models.manifest import FILE_NAME, Manifest, files_of, sha256_of
from flowspec.schema import plain

CODE, STAGES, RUN, TRACE = "code", "stages", "run.yaml", "trace.json"
"""These are names in a host's folder."""
PACKAGE = Path(__file__).resolve().parent.parent
PIECE = 1 << 20
AGAIN = 2
"""A file that arrives damaged is sent so many times in all."""
EVERY = 2.0
"""Progress is told every so many seconds."""


class Parcel(NamedTuple):
    """A parcel is a file for a host: its name there, its size and hash, and where it is here."""

    name: str
    size: int
    sha256: str
    source: Path | bytes

    def pieces(self, offset: int) -> Iterable[bytes]:
        """Return what follows on `offset` in pieces."""
        if isinstance(self.source, bytes):
            yield self.source[offset:]
            return
        with open(self.source, "rb") as file:
            file.seek(offset)
            while piece := file.read(PIECE):
                yield piece


def _of_file(name: str, path: Path) -> Parcel:
    try:
        return Parcel(name, path.stat().st_size, sha256_of(path), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def of_text(name: str, text: str) -> Parcel:
    """Return a file that holds this text."""
    data = text.encode()
    return Parcel(name, len(data), hashlib.sha256(data).hexdigest(), data)


# ---- what a host needs ---------------------------------------------------------------------------
def code() -> list[Parcel]:
    """Return the files of flowspec itself."""
    inside = sorted(PACKAGE.rglob("*.py"))
    return [_of_file(f"{CODE}/{p.relative_to(PACKAGE.parent).as_posix()}", p) for p in inside]


def run_file(config: Config) -> Parcel:
    """Return the run's configuration, with the paths that things have on a host."""
    drafters = tuple(_there(drafter, k) for k, drafter in enumerate(config.drafters))
    there = replace(
        config,
        stages=STAGES,
        drafter=drafters if isinstance(config.drafter, tuple) else drafters[0],
        trace=TRACE if config.trace else None,
    )
    return of_text(RUN, yaml.safe_dump(plain(there), sort_keys=False))


def _there(drafter: DrafterConfig, k: int) -> DrafterConfig:
    if drafter.path is None:
        return drafter
    head = None if drafter.head is None else _drafter(k)
    return replace(drafter, path=_drafter(k), head=head)


def _drafter(k: int) -> str:
    return f"drafter_{k}"


def weights(config: Config, manifest: Manifest, ranks: Sequence[int]) -> list[Parcel]:
    """Return the files of these ranks: of the split, and of the drafters that compute there."""
    topology, heads = manifest.topology, config.head_ranks(manifest.topology)
    entries = {
        entry.file: Parcel(
            f"{STAGES}/{entry.file}", entry.bytes, entry.sha256, manifest.root / entry.file
        )
        for rank in config.read_by(topology, ranks)
        for entry in files_of(manifest.entry(rank), rank in heads)
    }
    split = _of_file(f"{STAGES}/{FILE_NAME}", manifest.root / FILE_NAME)
    drafting = {d.where for rank in ranks for d in config.drafters_on(topology, rank) if d.computes}
    drafters = [
        parcel
        for k, drafter in enumerate(config.drafters)
        if drafter.where in drafting
        for parcel in _of_drafter(drafter, k, config.folder)
    ]
    return [split, *entries.values(), *drafters]


def _of_drafter(drafter: DrafterConfig, k: int, base: Path) -> list[Parcel]:
    folder = drafter.checkpoint(base)
    patterns = HEAD_FILES if drafter.reads_features else MODEL_FILES
    found = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return [_of_file(f"{_drafter(k)}/{path.name}", path) for path in found]


# ---- copying -------------------------------------------------------------------------------------
def copy(session: Session, parcels: Sequence[Parcel]) -> None:
    """Copy what the host lacks, and tell on stderr how far that is.

    Raise UserError if the host refuses it, and RankLost if the connection is lost."""
    by_name = {parcel.name: parcel for parcel in parcels}
    files = [[parcel.name, parcel.size, parcel.sha256] for parcel in parcels]
    missing = session.ask("compare", files=files)["files"]
    progress = _Progress(session.host.name, [(by_name[name], offset) for name, offset in missing])
    for _ in range(AGAIN):
        for name, offset in missing:
            for piece in by_name[name].pieces(offset):
                session.send("put", piece, name=name, size=len(piece))
                progress.add(len(piece))
        missing = [(name, 0) for name in session.ask("settle")["bad"]] if missing else []
    first = "".join(name for name, _ in missing[:1])
    need(not missing, f"{session.host.shown}: {first} does not arrive as it is here: copy it again")
    progress.end(parcels)


class _Progress:
    """Progress tells of a host's files."""

    def __init__(self, host: str, missing: Sequence[tuple[Parcel, int]]):
        self._host, self._count = host, len(missing)
        self._total = sum(parcel.size - offset for parcel, offset in missing)
        self._done, self._told = 0, time.monotonic()

    def add(self, size: int) -> None:
        self._done += size
        if time.monotonic() - self._told > EVERY:
            self._told = time.monotonic()
            self._say(f"{_mega(self._done)} of {_mega(self._total)} MB copied")

    def end(self, parcels: Sequence[Parcel]) -> None:
        here, size = len(parcels) - self._count, sum(parcel.size for parcel in parcels)
        old = f"{here} ({_mega(size - self._total)} MB) were there"
        self._say(f"{self._count} files ({_mega(self._total)} MB) copied, {old}")

    def _say(self, what: str) -> None:
        print(f"{self._host}: {what}", file=sys.stderr, flush=True)


def _mega(size: int) -> str:
    return f"{size / 1e6:.1f}"
