"""A run of `flowspec eval` is a folder, which is read and gone on with here.

`config.json` says what was asked for and of which versions, `answers.jsonl` has a line for each
question, turn, temperature and method, written as it comes. This module imports no torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from flowspec.bench.questions import Question, fingerprints
from flowspec.bench.report import Record
from flowspec.config import Config
from flowspec.core.topology import Topology
from flowspec.errors import UserError, need
from flowspec.files import add_json, begun_with, extended, whole_lines
from flowspec.models.manifest import Manifest, sha256_of
from flowspec.schema import plain
from flowspec.version import __version__

CONFIG, ANSWERS = "config.json", "answers.jsonl"
REFERENCE = "ar"
SELECTED = ("methods", "temperatures", "questions")
"""Runs that differ in nothing but these are one: what they hold is put together."""
LIBRARIES = ("torch", "numpy", "tokenizers", "transformers")


class Place(NamedTuple):
    """All methods answer the same prompt at a place."""

    dataset: str
    question: str
    turn: int
    """Turns count from 1."""
    temperature: float


@dataclass(frozen=True, kw_only=True)
class Answer(Record):
    """An answer is a measured generation with its place and its text. `prompt` counts questions
    from 1."""

    dataset: str
    question: str
    category: str
    turn: int
    prompt_tokens: int
    token_ids: list[int]
    text: str
    finish_reason: str
    decode_seconds: float
    emulated: bool

    @property
    def place(self) -> Place:
        return Place(self.dataset, self.question, self.turn, self.temperature)


class Skipped(NamedTuple):
    """A turn that was not asked, nor were those behind it."""

    place: Place
    why: str


def reference(methods: Sequence[str]) -> str:
    """Return the method whose answers later turns build on, and others are compared with."""
    return REFERENCE if REFERENCE in methods else methods[0]


# ---- what was asked for --------------------------------------------------------------------------
def asked(
    config: Config,
    manifest: Manifest,
    methods: Sequence[str],
    temperatures: Sequence[float],
    questions: Sequence[Question],
    length: int | None,
) -> dict[str, Any]:
    """Return all that the answers depend on, by name.

    `length` is of prompts, in tokens, if they are not the questions' own."""
    return {
        **{f"config.{name}": value for name, value in _flat(plain(config)).items()},
        "model": _hash_of([entry.sha256 for entry in manifest.ranks]),
        "drafter": _hash_of([sha256_of(path) for path in _weights(config, manifest)]),
        "ring": manifest.topology.words,
        "methods": list(methods),
        "temperatures": list(temperatures),
        "questions": fingerprints(questions),
        "prompt_tokens": length,
        "versions": {"flowspec": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in LIBRARIES},
        "machine": f"{os.cpu_count()} cores ({platform.machine()})",
    }


def noted(words: Sequence[str]) -> dict[str, Any]:
    """Return what else is kept of a run."""
    command = " ".join(["python -m flowspec eval", *words])
    return {"command": command, "date": time.strftime("%Y-%m-%d")}


def _flat(values: dict[str, Any], above: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by their names with dots."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{above}{name}.") if inner else {f"{above}{name}": value}
    return flat


def _hash_of(hashes: Sequence[str]) -> str:
    return hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]


def _weights(config: Config, manifest: Manifest) -> list[Path]:
    """Return the files of the drafters that compute on rank 0."""
    here = config.drafters_on(manifest.topology, Topology.COORDINATOR)
    folders = [drafter.checkpoint(config.folder) for drafter in here if drafter.computes]
    return [path for folder in folders for path in sorted(folder.glob("*.safetensors"))]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


# ---- the folder ----------------------------------------------------------------------------------
class Answers:
    """What a run has answered, which grows; a kill costs what was not whole yet."""

    def __init__(self, folder: Path, asked: dict[str, Any], noted: dict[str, Any]):
        """Begin or go on with the run of a folder.

        Raise UserError, which names --out, if the folder has another run, is in use or cannot be
        written."""
        self._flag = f"--out {folder}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            check(folder, asked, noted)
            self._file = extended(folder / ANSWERS, self._flag)
        except OSError as error:
            raise UserError(f"{self._flag}: cannot write: {error.strerror}") from None
        self._answers: dict[tuple[Place, str], Answer] = {}
        self._skipped: dict[Place, Skipped] = {}
        for each in read_lines(folder):
            self._take(each)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._answers)

    def of(self, place: Place, method: str) -> Answer | None:
        return self._answers.get((place, method))

    def skipped(self, place: Place) -> Skipped | None:
        return self._skipped.get(place)

    def keep(self, found: Answer | Skipped) -> None:
        """Add a line, which is there before the next question is asked."""
        add_json(self._file, _line(found), self._flag)
        self._take(found)

    def _take(self, found: Answer | Skipped) -> None:
        if isinstance(found, Skipped):
            self._skipped[found.place] = found
        else:
            self._answers[found.place, found.method] = found


def check(folder: Path, asked: dict[str, Any], noted: dict[str, Any]) -> None:
    """Note what a run is asked for in its folder, or raise UserError if that was something else."""
    before = begun_with(folder / CONFIG, asked, noted)
    differs = [f"{name} was {before[name]} and is {asked[name]}" for name in before]
    need(
        not differs,
        f"--out {folder} was begun with something else: {'; '.join(differs)}: ask for the same to "
        "go on, or name another folder (eval report puts several together)",
    )


def _line(found: Answer | Skipped) -> dict[str, Any]:
    if isinstance(found, Skipped):
        return {**found.place._asdict(), "skipped": found.why}
    return dataclasses.asdict(found)


def read_lines(folder: Path) -> list[Answer | Skipped]:
    """Return the whole lines of a run; raise UserError, which names the line, for a damaged one."""
    path = folder / ANSWERS
    try:
        lines = whole_lines(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return [_read(line, f"{path} line {n}") for n, line in enumerate(lines, 1)]


def _read(line: str, where: str) -> Answer | Skipped:
    try:
        held = json.loads(line)
        if "skipped" in held:
            return Skipped(Place(**{name: held[name] for name in Place._fields}), held["skipped"])
        return Answer(**held)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{where} is no answer of flowspec eval: remove that line") from None


@dataclass(frozen=True)
class Run:
    """A run is what one or more folders of the same configuration hold."""

    name: str
    asked: dict[str, Any]
    answers: list[Answer]
    skipped: list[Skipped]

    @property
    def emulated(self) -> bool:
        return any(answer.emulated for answer in self.answers)


def read_runs(folders: Iterable[Path]) -> list[Run]:
    """Return the runs of folders, those of one configuration together; raise UserError for
    others."""
    runs: dict[str, Run] = {}
    for folder in folders:
        try:
            said = json.loads((folder / CONFIG).read_bytes())
        except (OSError, ValueError):
            raise UserError(f"{folder} holds no run of flowspec eval ({CONFIG})") from None
        apart = (*SELECTED, *noted(()))
        same = json.dumps({k: v for k, v in said.items() if k not in apart}, sort_keys=True)
        run = runs.setdefault(same, Run(folder.name, said, [], []))
        for each in read_lines(folder):
            if isinstance(each, Skipped):
                run.skipped.append(each)
            else:
                run.answers.append(each)
    need(any(run.answers for run in runs.values()), "no answers to report yet")
    return list(runs.values())
