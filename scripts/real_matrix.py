"""Is speculation ever slower than plain decoding? Real shapes, real compute, every combination of a
few axes, in pairs.

    python scripts/real_matrix.py configs/real/full.yaml

A cell is a context length, vocabulary, dtype, drafter, number of stages and temperature. Its pairs
are a run by `flowspec` and one by `ar` of the same prompt in the same ring, in random order. The
models are the demo's, inflated (scripts/inflate.py, scripts/weaken.py) into build/real/ on first
use; a ring of processes is started once for all cells of a target, drafter, dtype and number of
stages.

Each run is a line of OUTPUT/runs.jsonl as soon as it is done, and what is there is not run again:
interrupt it and start it anew, or start it with more axes or more pairs. The tables, of all that is
there, are printed and written to OUTPUT/table.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec.config import DTYPES
from flowspec.errors import UserError, need
from flowspec.files import ROOT, replacing
from flowspec.launcher import is_rank
from flowspec.output import Parser, command
from flowspec.schema import build

METHODS = ("ar", "flowspec")
AGREEMENT = {"good": 0.8, "weak": 0.3, "useless": 0.0}
"""This maps a drafter to how often its first choice is the target's, on the target's own text. Each
is the demo target itself, with noise in its lm_head."""
LIMIT = 0.97
"""A cell whose median ratio is below this is listed."""
WARM_UP_TOKENS = 8
TEXTS = (
    "tarfile",
    "argparse",
    "inspect",
    "typing",
    "optparse",
    "pickle",
    "subprocess",
    "ipaddress",
)
"""The sources of these modules of the standard library are prompts, one for each pair."""
SKIPPED = 500
"""Return so many tokens of a module's source, with its successors' behind it where it is too
short."""


@dataclass(frozen=True)
class Model:
    """This is the target's shape, as scripts/inflate.py takes it."""

    hidden: int = 1024
    layers: int = 16
    heads: str = "32/8"
    positions: int = 16384


@dataclass(frozen=True)
class Matrix:
    """A matrix holds the axes of a YAML file."""

    contexts: tuple[int, ...]
    vocabularies: tuple[int, ...]
    dtypes: tuple[str, ...]
    drafters: tuple[str, ...]
    stages: tuple[int, ...]
    temperatures: tuple[float, ...]
    pairs: int = 5
    new_tokens: int = 64
    cells: int | None = None
    """So many of the cells are measured, drawn once and for all (fewer are among more); null means
    all."""
    model: Model = dataclasses.field(default_factory=Model)

    def __post_init__(self) -> None:
        for name in self.drafters:
            need(
                name in AGREEMENT,
                f"drafters: {name!r} is not known: choose among {', '.join(AGREEMENT)}",
            )
        for name in self.dtypes:
            need(name in DTYPES, f"dtypes: {name!r} is not known: choose among {', '.join(DTYPES)}")
        for name in ("contexts", "vocabularies", "stages"):
            need(
                all(value >= 1 for value in getattr(self, name)), f"{name}: each must be at least 1"
            )
        need(
            self.pairs >= 1 and self.new_tokens >= 2,
            "pairs must be at least 1, new_tokens at least 2",
        )
        need(self.cells is None or self.cells >= 1, f"cells is {self.cells}: it must be at least 1")
        room = self.model.positions - self.new_tokens
        need(
            max(self.contexts) <= room,
            f"contexts: {max(self.contexts)} leaves no room for the new tokens (model.positions)",
        )


class Ring(NamedTuple):
    """A ring is what a set of processes is started for."""

    vocabulary: int
    dtype: str
    drafter: str
    stages: int


class Cell(NamedTuple):
    vocabulary: int
    dtype: str
    drafter: str
    stages: int
    temperature: float
    context: int

    @property
    def ring(self) -> Ring:
        return Ring(*self[:4])


class Run(NamedTuple):
    """A run is a line of runs.jsonl."""

    cell: Cell
    pair: int
    method: str
    tokens_per_second: float | None
    """It is None if the text has one token, and so no rate."""
    new_tokens: int
    prefill_seconds: float
    accepted_per_segment: float
    tokens_sha: str

    def line(self) -> str:
        facts = self._asdict()
        return json.dumps({**facts.pop("cell")._asdict(), **facts}) + "\n"

    @classmethod
    def of(cls, facts: dict[str, Any]) -> Run:
        return cls(Cell(*(facts.pop(name) for name in Cell._fields)), **facts)


def load_matrix(path: Path) -> Matrix:
    """Read the axes; raise UserError, which names the key that is wrong."""
    try:
        tree = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{path} is not valid YAML") from None
    return build(Matrix, tree)


def cells(matrix: Matrix) -> list[Cell]:
    """Return the cells, those of a ring side by side, short contexts first."""
    axes = (
        matrix.vocabularies,
        matrix.dtypes,
        matrix.drafters,
        matrix.stages,
        matrix.temperatures,
        matrix.contexts,
    )
    found = [Cell(*values) for values in itertools.product(*axes)]
    drawn = set(random.Random(0).sample(found, len(found))[: matrix.cells])
    return [cell for cell in found if cell in drawn]


def read_runs(path: Path) -> list[Run]:
    """Return what was measured before; a line that an interruption cut short is left out."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [Run.of(json.loads(line)) for line in lines if line.endswith("\n")]


def missing(matrix: Matrix, runs: Iterable[Run]) -> list[tuple[Cell, int]]:
    """Return the pairs that are still to be measured."""
    done = {(run.cell, run.pair, run.method) for run in runs}
    pairs = itertools.product(cells(matrix), range(1, matrix.pairs + 1))
    return [
        (cell, pair)
        for cell, pair in pairs
        if any((cell, pair, method) not in done for method in METHODS)
    ]


# ---- models --------------------------------------------------------------------------------------
class Models:
    """These are folders under build/real/. Each is made on first use, and is whole once it has its
    name."""

    def __init__(self, folder: Path, model: Model):
        self._folder, self._model = folder, model

    def stages(self, ring: Ring) -> Path:
        return self._made(
            f"{self._target(ring).name}_s{ring.stages}",
            "split_models.py",
            "--model",
            self._target(ring),
            "--stages",
            ring.stages,
        )

    def draft(self, ring: Ring) -> Path:
        """Make a draft model with the target's vocabulary and positions.

        Its lm_head then costs what a draft model's costs at that vocabulary."""
        demo, name = (
            ROOT / "demo" / "target",
            f"draft_{ring.drafter}_v{ring.vocabulary}_p{self._model.positions}",
        )
        about = ("--draft", demo, "--target", demo, "--agree", AGREEMENT[ring.drafter])
        return self._made(
            name,
            "scripts/weaken.py",
            *about,
            "--vocab",
            ring.vocabulary,
            "--positions",
            self._model.positions,
        )

    def _target(self, ring: Ring) -> Path:
        m = self._model
        name = f"target_h{m.hidden}_l{m.layers}_{m.heads.replace('/', 'x')}_v{ring.vocabulary}_p{m.positions}"
        shape = ("--hidden", m.hidden, "--layers", m.layers, "--heads", m.heads)
        about = (
            "--model",
            ROOT / "demo" / "target",
            *shape,
            "--vocab",
            ring.vocabulary,
            "--positions",
            m.positions,
        )
        return self._made(name, "scripts/inflate.py", *about, "--dtype", "float32")

    def _made(self, name: str, script: str, *words: object) -> Path:
        folder = self._folder / name
        if not folder.exists():
            print(f"making {folder}", file=sys.stderr, flush=True)
            _run([sys.executable, ROOT / script, *words, "--output", folder], quiet=True)
        return folder


def _run(words: Sequence[object], quiet: bool = False, **environment: str) -> None:
    """Run a command.

    Raise UserError if it fails, with the last line that it said if it was `quiet`."""
    done = subprocess.run(
        [str(word) for word in words],
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        env=os.environ | environment,
    )
    if done.returncode:
        said = (done.stderr or "").strip().splitlines()
        raise UserError(
            said[-1].removeprefix("flowspec: ")
            if said
            else f"{Path(str(words[-1])).name}: exit code {done.returncode}"
        )


# ---- as the launcher -----------------------------------------------------------------------------
def measure(matrix: Matrix, output: Path) -> None:
    """Start each ring that has something to measure."""
    models, path = Models(ROOT / "build" / "real", matrix.model), output / "runs.jsonl"
    wanted = missing(matrix, read_runs(path))
    rings = list(dict.fromkeys(cell.ring for cell, _ in wanted))
    for number, ring in enumerate(rings, 1):
        begun = time.monotonic()
        part = [[*cell, pair] for cell, pair in wanted if cell.ring == ring]
        config = {
            "stages": str(models.stages(ring)),
            "drafter": {"kind": "lm", "path": str(models.draft(ring))},
            "dtype": ring.dtype,
            "sampling": {"seed": 1, "max_new_tokens": matrix.new_tokens},
        }
        (output / "ring.yaml").write_text(yaml.safe_dump(config))
        (output / "ring.json").write_text(json.dumps(part))
        start = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            ring.stages + 1,
        ]
        _run(
            [*start, __file__, "--rank", output],
            OMP_NUM_THREADS="1",
            TOKENIZERS_PARALLELISM="false",
            MASTER_ADDR="127.0.0.1",
        )
        print(
            f"ring {number} of {len(rings)} ({', '.join(map(str, ring))}): "
            f"{time.monotonic() - begun:.0f} s",
            file=sys.stderr,
            flush=True,
        )


# ---- as a rank -----------------------------------------------------------------------------------
def rank(output: Path) -> None:
    """Be a rank of the ring that ring.yaml describes; rank 0 runs the pairs of ring.json."""
    from flowspec.config import load_config
    from flowspec.engine import Engine
    from flowspec.rank import serve_as

    config = load_config(output / "ring.yaml")
    if os.environ["RANK"] != "0":
        serve_as(config)
        return
    engine = Engine.join(config)
    engine.wait_until_loaded()
    with open(output / "runs.jsonl", "a") as file:
        for run in _pairs(
            engine,
            [(Cell(*cell), pair) for *cell, pair in json.loads((output / "ring.json").read_text())],
        ):
            file.write(run.line())
            file.flush()
    engine.close()


def _pairs(engine, wanted: Sequence[tuple[Cell, int]]) -> Iterator[Run]:
    order = random.Random(0)
    for method in METHODS:
        for _ in engine.generate(
            prompt(engine.text.encode, 1, 64), method=method, max_new_tokens=WARM_UP_TOKENS
        ):
            pass
    for cell, pair in wanted:
        for method in order.sample(METHODS, len(METHODS)):
            tokens = prompt(engine.text.encode, pair, cell.context)
            generation = engine.generate(
                tokens, method=method, temperature=float(cell.temperature), seed=pair
            )
            for _ in generation:
                pass
            result = generation.result
            sha = hashlib.sha256(str(result.token_ids).encode()).hexdigest()[:16]
            figures = (
                result.tokens_per_second,
                result.new_tokens,
                result.prefill_seconds,
                result.accepted_per_segment,
            )
            yield Run(cell, pair, method, *figures, sha)


def prompt(encode, pair: int, tokens: int) -> list[int]:
    """So many tokens of a module's source, its successors' behind it where it is too short."""
    library, first = Path(sysconfig.get_paths()["stdlib"]), (pair - 1) % len(TEXTS)
    found: list[int] = []
    for name in itertools.cycle(TEXTS[first:] + TEXTS[:first]):
        found += encode((library / f"{name}.py").read_text("utf-8"))[SKIPPED:]
        if len(found) >= tokens:
            return found[:tokens]
    raise AssertionError("a cycle has no end")


# ---- tables --------------------------------------------------------------------------------------
class Outcome(NamedTuple):
    """An outcome holds a cell's medians over its pairs."""

    ratios: list[float]
    """These are the ratios of flowspec over ar, ascending."""
    ms: dict[str, float]
    """This maps a method to its milliseconds a token."""
    accepted: float
    """flowspec brought so many new tokens a segment."""
    different: int
    """So many pairs have texts that are not the same."""


def outcomes(runs: Iterable[Run]) -> dict[Cell, Outcome]:
    """Return the outcomes of the cells that have a pair, in the order of their axes.

    A run that was made twice counts by its last."""
    by_cell: dict[Cell, dict[int, dict[str, Run]]] = {}
    for run in runs:
        by_cell.setdefault(run.cell, {}).setdefault(run.pair, {})[run.method] = run
    found = {}
    for cell in sorted(by_cell):
        pairs = [
            pair
            for pair in by_cell[cell].values()
            if len(pair) == 2 and all(run.tokens_per_second for run in pair.values())
        ]
        if pairs:
            rates = {
                method: [pair[method].tokens_per_second or 0.0 for pair in pairs]
                for method in METHODS
            }
            ratios = sorted(ours / plain for plain, ours in zip(*rates.values(), strict=True))
            accepted = median(pair["flowspec"].accepted_per_segment for pair in pairs)
            different = sum(pair["ar"].tokens_sha != pair["flowspec"].tokens_sha for pair in pairs)
            found[cell] = Outcome(
                ratios, {m: 1000 / median(rates[m]) for m in METHODS}, accepted, different
            )
    return found


def markdown(found: dict[Cell, Outcome]) -> str:
    head = [
        "vocabulary",
        "dtype",
        "drafter",
        "S",
        "T",
        "context",
        "flowspec / ar",
        "least..most",
        "pairs",
        "ar ms",
        "flowspec ms",
        "accepted",
        "other texts",
    ]
    rows = [
        [*map(_short, cell), f"{median(o.ratios):.2f}", f"{o.ratios[0]:.2f}..{o.ratios[-1]:.2f}", str(len(o.ratios)),
         *(f"{o.ms[m]:.1f}" for m in METHODS), f"{o.accepted:.2f}", str(o.different)]
        for cell, o in found.items()
    ]  # fmt: skip
    slow = [
        f"- {', '.join(map(_short, cell))}: {median(o.ratios):.2f}"
        for cell, o in found.items()
        if median(o.ratios) < LIMIT
    ]
    contexts = sorted({cell.context for cell in found})
    lines: dict[tuple, dict[int, str]] = {}
    for cell, o in found.items():
        lines.setdefault(cell[:5], {})[cell.context] = " / ".join(f"{o.ms[m]:.1f}" for m in METHODS)
    by_context = [
        [*map(_short, key), *(line.get(context, "") for context in contexts)]
        for key, line in lines.items()
    ]
    parts = [
        "Tokens/s of flowspec over those of ar, medians of pairs; milliseconds a token while "
        "decoding.", _table(head, rows),
        f"Cells below {LIMIT}: {len(slow)} of {len(found)}" + "".join(f"\n{line}" for line in slow),
        "Milliseconds a token against the context, ar / flowspec.", _table([*head[:5], *map(str, contexts)], by_context),
    ]  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *rows])


@command
def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, 2 for bad input or a ring that failed (one line on stderr), 130 if
    interrupted."""
    options = _arguments(argv)
    if is_rank():
        rank(options.rank)
        return 0
    need(
        options.matrix is not None, "which matrix? Give a YAML file, such as configs/real/full.yaml"
    )
    matrix = load_matrix(options.matrix)
    matrix = dataclasses.replace(
        matrix,
        **{
            k: v for k in ("pairs", "new_tokens", "cells") if (v := getattr(options, k)) is not None
        },
    )
    output = options.output or ROOT / "build" / "bench" / f"real_{options.matrix.stem}"
    output.mkdir(parents=True, exist_ok=True)
    try:
        measure(matrix, output)
    finally:
        wanted = set(cells(matrix))
        table = markdown(
            outcomes(run for run in read_runs(output / "runs.jsonl") if run.cell in wanted)
        )
        with replacing(output / "table.md") as beside:
            beside.write_text(table)
        print(table + f"\nwritten to {output}")
    return 0


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    each = Parser(
        prog="real_matrix.py", description="Pairs of flowspec and ar at real shapes, real compute."
    )
    each.add_argument(
        "matrix",
        nargs="?",
        type=Path,
        metavar="MATRIX",
        help="a YAML file of axes, as in configs/real/",
    )
    each.add_argument(
        "--pairs", type=int, metavar="N", help="of each cell (default: the matrix', or 5)"
    )
    each.add_argument(
        "--new-tokens", type=int, metavar="N", help="of each run (default: the matrix', or 64)"
    )
    each.add_argument(
        "--cells",
        type=int,
        metavar="N",
        help="so many of the cells, drawn once and for all (default: the matrix', or all)",
    )
    each.add_argument(
        "--output", type=Path, metavar="FOLDER", help="default: build/bench/real_NAME"
    )
    each.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    return each.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
