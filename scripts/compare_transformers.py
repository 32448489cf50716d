"""Real compute in pairs: flowspec and its plain pipeline against transformers' generate and assisted generation.

    python scripts/inflate.py --model demo/target --output build/big1 --size-gb 1 --dtype float32
    python scripts/compare_transformers.py --model build/big1 --draft demo/draft --stages 2

Four sides continue the same prompts from the same token ids, computing in float32:

- flowspec, ar: rank 0 and a rank a stage, a process and one thread each (rank 0 drafts in a thread of its own)
- transformers, assisted: one process with as many threads as there are stages; `generate` with its defaults, alone and with
  the same draft as `assistant_model`

All processes live from beginning to end and wait blocked for their turn; `idle_cpu` says what they computed meanwhile. The
order of the sides is drawn anew for each prompt and repeat, and a ratio is of two runs of the same prompt and repeat. At
temperature 0 all sides must write the same tokens; above it flowspec and ar must, and transformers draws others.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec.config import Config, load_config
from flowspec.engine import Engine
from flowspec.errors import RankLost, UserError
from flowspec.files import ROOT
from flowspec.lossless import tolerance
from flowspec.models.manifest import Manifest
from flowspec.models.split import Source, split
from flowspec.output import Parser, command
from flowspec.preflight import check_prompt, check_run, check_writable, read_prompts
from flowspec.rank import serve as serve_stage
from flowspec.text import Text

DTYPE = "float32"
CLOSE = tolerance(DTYPE, layers=8, hidden=256)
"""a lead below which rounding may choose: of the demo target, whose function inflated models compute"""
RING, ALONE = ("flowspec", "ar"), ("transformers", "assisted")
SIDES = (*RING, *ALONE)
WARM_UP_TOKENS = 8
PATIENCE = 20.0
"""seconds that a process has to end by itself"""
Ask = Callable[[dict], dict]
"""{side, tokens, new_tokens, temperature, seed, traced} -> {token_ids, gaps, prefill_seconds, decode_seconds, facts}"""


# ---- what answers, in processes of their own --------------------------------------------------------
def ring(engine: Engine) -> Ask:
    """Answers by the ring whose rank 0 this is."""

    def answer(asked: dict) -> dict:
        engine.traced = asked["traced"]
        settings = {name: asked[name] for name in ("temperature", "seed")}
        generation = engine.generate(
            asked["tokens"], method=asked["side"], max_new_tokens=asked["new_tokens"], **settings
        )
        gaps = [token.gap for token in generation]
        assert generation.result is not None
        facts = dataclasses.asdict(generation.result)
        del facts["text"]
        return {
            name: facts.pop(name) for name in ("token_ids", "prefill_seconds", "decode_seconds")
        } | {"gaps": gaps, "facts": facts}

    return answer


class Clock(BaseStreamer):
    """Notes when tokens come and how many; first of all the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing was held back."""


def alone(target: Any, draft: Any) -> Ask:
    """Answers by transformers' `generate` of these two models."""

    @torch.inference_mode()
    def answer(asked: dict) -> dict:
        prompt, clock, hot = torch.tensor([asked["tokens"]]), Clock(), asked["temperature"] > 0
        options = (
            dict(do_sample=True, temperature=asked["temperature"], top_k=0)
            if hot
            else dict(do_sample=False)
        )
        options |= dict(
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=asked["new_tokens"],
            streamer=clock,
        )
        options |= dict(assistant_model=draft) if asked["side"] == "assisted" else {}
        torch.manual_seed(asked["seed"])
        begun = time.perf_counter()
        out = target.generate(prompt, **options)
        _, first, *_ = clock.times
        seconds = {"prefill_seconds": first - begun, "decode_seconds": clock.times[-1] - first}
        facts = {
            "target_forwards": len(clock.times) - 1,
            "tokens_of_first_forward": clock.counts[1],
        }
        return {
            "token_ids": out[0, prompt.shape[1] :].tolist(),
            "gaps": None,
            **seconds,
            "facts": facts,
        }

    return answer


def serve(answer: Ask, facts: dict) -> None:
    """Say `facts`, then answer each line of standard input with one of standard output; all else that is printed goes to stderr."""
    with os.fdopen(os.dup(1), "w", buffering=1) as out:
        os.dup2(2, 1)
        print(json.dumps(facts), file=out)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=out)


def serve_ring(ranks: str, config: str, *overrides: str) -> None:
    """torchrun, without its pages about a rank that fell."""
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
    """One rank of the ring; the first answers."""
    if os.environ["RANK"] != "0":
        return serve_stage(config, overrides)
    with Engine.from_config(config, overrides) as engine:
        engine.wait_until_loaded()
        serve(ring(engine), {"threads": torch.get_num_threads(), "dtype": engine.dtype_name})


def serve_alone(model: str, draft: str, threads: str, assistant_tokens: str) -> None:
    torch.set_num_threads(int(threads))
    target, helper = (
        AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, DTYPE)).eval()
        for path in (model, draft)
    )
    helper.generation_config.num_assistant_tokens = int(assistant_tokens) or None
    settings = {
        **helper.generation_config._get_default_generation_params(),
        **helper.generation_config.to_diff_dict(),
    }
    assistant = {name: value for name, value in settings.items() if "assistant" in name}
    serve(
        alone(target, helper),
        {"threads": torch.get_num_threads(), "dtype": DTYPE, "assistant": assistant},
    )


# ---- the processes as their parent sees them --------------------------------------------------------
class Server:
    """A command that serves (see `serve`), with the CPU time that it and its children used in and out of its turns."""

    def __init__(self, name: str, command: Sequence[str], threads: int):
        self._name = name
        quiet = {
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        quiet |= {
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
        }
        quiet |= {
            "FLOWSPEC_HEARTBEAT": os.environ.get("FLOWSPEC_HEARTBEAT", "0.5,30")
        }  # others compute on the same cores
        self._process = subprocess.Popen(
            [sys.executable, *command],
            env={**os.environ, **quiet},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, failure: type[BaseException] | None, *_: object) -> None:
        """It ends by itself when nothing can be asked any more; after a failure, or when it does not, it is made to."""
        assert self._process.stdin and self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(0 if failure else PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.terminate()  # torchrun ends its ranks
            self._process.wait()
        self._process.stdout.close()

    def ready(self) -> dict:
        """What it says once it can answer."""
        facts = self._hear()
        self._begun, self._before = time.monotonic(), cpu_seconds(self._process.pid)
        self._turns = self._used = 0.0
        return facts

    def ask(self, asked: dict) -> dict:
        """The answer; its facts also tell how many cores strangers used meanwhile."""
        assert self._process.stdin
        begun, before, busy = time.monotonic(), cpu_seconds(self._process.pid), machine_seconds()
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        answer = self._hear()
        spent, used = time.monotonic() - begun, cpu_seconds(self._process.pid) - before
        self._turns, self._used = self._turns + spent, self._used + used
        answer["facts"]["strangers_cores"] = max(0.0, machine_seconds() - busy - used) / spent
        return answer

    def idle_cpu(self) -> float:
        """Share of a core that it used while it was not its turn."""
        waited = time.monotonic() - self._begun - self._turns
        return (cpu_seconds(self._process.pid) - self._before - self._used) / waited

    def _hear(self) -> dict:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RankLost(
                f"the process of {self._name} ended (exit code {self._process.wait()}): see above"
            )
        return json.loads(line)


def cpu_seconds(pid: int) -> float:
    """Of a process and its children; Linux only, 0 elsewhere and for what has ended."""
    place = Path(f"/proc/{pid}")
    try:
        fields = (place / "stat").read_text().rpartition(")")[2].split()
        children = [
            int(child)
            for task in (place / "task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") + sum(
        map(cpu_seconds, children)
    )


def machine_seconds() -> float:
    """CPU time that this machine's cores spent on anything so far; Linux only, 0 elsewhere."""
    place = Path("/proc/stat")
    if not place.exists():
        return 0.0
    user, nice, system, _, _, *interrupts = map(
        int, place.read_text().split("\n", 1)[0].split()[1:9]
    )
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


# ---- runs ------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Run:
    """One text of one side."""

    prompt: int
    repeat: int
    turn: int
    """its place in the drawn order of the sides"""
    side: str
    token_ids: list[int]
    gaps: list[float] | None
    """the target's lead of each token over the next best; transformers does not tell"""
    prefill_seconds: float
    """from the request to the first token"""
    decode_seconds: float
    """from there to the last"""
    facts: dict

    @property
    def decode_rate(self) -> float | None:
        """(tokens - 1) / decode_seconds; what comes together with the first token counts as decoded in no time."""
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
    """What every side is asked for."""

    prompts: list[tuple[int, ...]]
    room: int
    """positions of the model"""
    new_tokens: int
    repeats: int
    temperature: float
    seed: int

    def asked(
        self,
        side: str,
        number: int,
        repeat: int,
        new_tokens: int | None = None,
        traced: bool = False,
    ) -> dict:
        tokens = self.prompts[number]
        wanted = min(new_tokens or self.new_tokens, self.room - len(tokens))
        settings = {"temperature": self.temperature, "seed": self.seed + repeat}
        return {"side": side, "tokens": tokens, "new_tokens": wanted, "traced": traced, **settings}


def measure(plan: Plan, sides: dict[str, Ask], say: Callable[[str], None]) -> list[Run]:
    """Every side on every prompt in every repeat, in a drawn order, after a short text of each that does not count."""
    draw, runs = random.Random(plan.seed), []
    for side, ask in sides.items():
        ask(plan.asked(side, 0, 0, WARM_UP_TOKENS))
    for repeat, number in itertools.product(range(plan.repeats), range(len(plan.prompts))):
        order = draw.sample(list(sides), len(sides))
        now = [
            Run(number, repeat, turn, side, **sides[side](plan.asked(side, number, repeat)))
            for turn, side in enumerate(order)
        ]
        said = ", ".join(f"{run.side} {run.total_rate:.1f}" for run in now)
        say(f"repeat {repeat + 1}, prompt {number + 1}: {said} tokens/s in all")
        runs += now
    return runs


# ---- what they say ---------------------------------------------------------------------------------
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


def rates(runs: Sequence[Run]) -> dict:
    """Of each side: tokens/s decoding and in all, and flowspec's over it in the pairs of the same prompt and repeat."""
    mine = {(run.prompt, run.repeat): run for run in runs if run.side == "flowspec"}
    found: dict = {}
    for side in SIDES:
        theirs = [run for run in runs if run.side == side]
        found[side] = {}
        for rate in RATES:
            pairs = [
                (getattr(mine[run.prompt, run.repeat], rate), getattr(run, rate)) for run in theirs
            ]
            found[side][rate] = spread(b for _, b in pairs)
            found[side][f"flowspec_over_{rate}"] = spread(
                a / b if a and b else None for a, b in pairs
            )
    return found


def partings(runs: Sequence[Run], temperature: float) -> list[dict]:
    """Where runs of one prompt part from its plain decoding (`ar`, of the same seed); a tie if its lead was less than CLOSE there."""
    plain = {(run.prompt, run.repeat): run for run in runs if run.side == "ar"}
    compared = [run for run in runs if temperature == 0 or run.side in RING]
    found = []
    for run in compared:
        want = plain[run.prompt, run.repeat if temperature else 0]
        at = next(
            (
                i
                for i, (a, b) in enumerate(itertools.zip_longest(run.token_ids, want.token_ids))
                if a != b
            ),
            None,
        )
        if at is not None:
            gap = want.gaps[at] if want.gaps and at < len(want.gaps) else None
            tie = gap is not None and gap < CLOSE
            found.append(
                {
                    "side": run.side,
                    "prompt": run.prompt,
                    "repeat": run.repeat,
                    "new_token": at,
                    "gap": gap,
                    "tie": tie,
                }
            )
    return found


def report(plan: Plan, texts: Sequence[str], runs: Sequence[Run]) -> dict:
    """All of it, as plain values."""
    each = []
    for number, text in enumerate(texts):
        own = [run for run in runs if run.prompt == number]
        ids = next(run.token_ids for run in own if run.side == "ar")
        lengths = {"prompt_tokens": len(plan.prompts[number]), "new_tokens": len(ids)}
        each.append(
            {
                "prompt": text,
                **lengths,
                "token_ids": ids,
                "partings": partings(own, plan.temperature),
                "sides": rates(own),
            }
        )
    asked = {name: getattr(plan, name) for name in ("new_tokens", "repeats", "temperature", "seed")}
    return {**asked, "sides": rates(runs), "prompts": each, "runs": [run.record() for run in runs]}


def table(sides: dict) -> str:
    """A line a side: its rates, and how many times as fast flowspec was; median (least to most)."""

    def cell(found: dict | None, digits: int) -> str:
        return (
            "-"
            if found is None
            else f"{found['median']:.{digits}f} ({found['min']:.{digits}f} to {found['max']:.{digits}f})"
        )

    head = ["", *RATES.values(), "flowspec/it decoding", "in all"]
    rows = [
        [side, *(cell(f[r], 1) for r in RATES), *(cell(f[f"flowspec_over_{r}"], 2) for r in RATES)]
        for side, f in sides.items()
    ]
    return "\n".join(
        "  "
        + "".join(f"{text:<{width}}" for text, width in zip(row, (14, 25, 25, 25, 0), strict=True))
        for row in [head, *rows]
    )


def show(found: dict) -> None:
    for number, each in enumerate(found["prompts"], 1):
        print(
            f"prompt {number}: {each['prompt']!r}, {each['prompt_tokens']} tokens, {each['new_tokens']} new"
        )
        for part in each["partings"]:
            where = f"{part['side']} (repeat {part['repeat'] + 1}) parts from ar at new token {part['new_token']}"
            print(
                f"  {where}, top-2 gap {part['gap']}: {'a numeric tie' if part['tie'] else 'A BUG'}"
            )
        print(table(each["sides"]))
    print(
        f"all prompts ({len(found['runs'])} runs; median, least to most):\n{table(found['sides'])}"
    )
    compared = [each for each in found["runs"] if found["temperature"] == 0 or each["side"] in RING]
    ties, bugs = verdict(found)
    print(
        f"tokens: {len(compared) - ties - bugs} of {len(compared)} runs identical to ar, {ties} parted at a numeric tie, {bugs} at a bug"
    )
    print(
        "computed while others had their turn: "
        + ", ".join(f"{k} {v:.1%} of a core" for k, v in found["idle_cpu"].items())
    )
    print(
        "cores that strangers used during a run: {median:.2f} ({min:.2f} to {max:.2f})".format(
            **found["strangers_cores"]
        )
    )


def verdict(found: dict) -> tuple[int, int]:
    """Runs that parted at a tie, and at a bug."""
    parted = [part["tie"] for each in found["prompts"] for part in each["partings"]]
    return sum(parted), len(parted) - sum(parted)


# ---- command line ----------------------------------------------------------------------------------
def arguments(argv: Sequence[str]) -> argparse.Namespace:
    each = Parser(
        prog="compare_transformers.py",
        description="flowspec against transformers on this machine: real compute, paired runs.",
    )
    each.add_argument("--model", required=True, type=Path, metavar="DIR", help="the target")
    each.add_argument(
        "--draft",
        required=True,
        type=Path,
        metavar="DIR",
        help="the draft model, of flowspec and of assisted generation",
    )
    each.add_argument(
        "--stages",
        default=2,
        type=int,
        metavar="N",
        help="also the threads of transformers (default: 2)",
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
        default=5,
        type=int,
        metavar="N",
        help="of the file, from its beginning (default: 5)",
    )
    each.add_argument("--new-tokens", default=96, type=int, metavar="N")
    each.add_argument("--repeats", default=3, type=int, metavar="N")
    each.add_argument("--temperature", default=0.0, type=float, metavar="T")
    each.add_argument(
        "--seed",
        default=0,
        type=int,
        metavar="N",
        help="of the orders, and of the texts above temperature 0",
    )
    each.add_argument(
        "--assistant-tokens",
        default=0,
        type=int,
        metavar="N",
        help="drafted a round by assisted generation (default: its own)",
    )
    each.add_argument("--json", metavar="OUT", help="write the whole report")
    each.add_argument(
        "--trace",
        metavar="OUT",
        help="write a timeline of flowspec on each prompt, run once more at the end",
    )
    args = each.parse_args(argv)
    for name, least in (
        ("prompts_used", 1),
        ("new_tokens", 2),
        ("repeats", 1),
        ("seed", 0),
        ("assistant_tokens", 0),
    ):
        if getattr(args, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}: it must be at least {least}"
            )
    check_writable(args.json)
    check_writable(args.trace, "--trace")
    return args


def prepare(args: argparse.Namespace, folder: Path) -> tuple[Path, Manifest]:
    """The split and its configuration, checked before anything is started."""
    split(str(args.model), args.stages, folder / "split")
    settings = {
        "stages": "split",
        "drafter": {"kind": "lm", "path": str(args.draft.resolve())},
        "sampling": {"temperature": args.temperature},
        "threads": 1,
        "dtype": DTYPE,
        "trace": args.trace and str(Path(args.trace).resolve()),
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(settings))  # JSON is YAML
    config: Config = load_config(path)
    Source.open(args.draft)
    return path, check_run(config)


def compare(args: argparse.Namespace, folder: Path) -> dict:
    config, manifest = prepare(args, folder)
    texts = read_prompts(str(args.prompts))[: args.prompts_used]
    prompts = [Text(manifest.folder(0)).encode(text) for text in texts]
    for number, prompt in enumerate(prompts, 1):
        check_prompt(prompt, manifest, f"prompt {number}")
    plan = Plan(
        prompts, manifest.max_positions, args.new_tokens, args.repeats, args.temperature, args.seed
    )
    with ExitStack() as stack:
        many = stack.enter_context(
            Server("the ring", [__file__, "--serve-ring", str(args.stages + 1), str(config)], 1)
        )
        words = [args.model, args.draft, args.stages, args.assistant_tokens]
        one = stack.enter_context(
            Server("transformers", [__file__, "--serve-alone", *map(str, words)], args.stages)
        )
        facts = {
            "ring": many.ready(),
            "transformers": one.ready()
            | {"version": transformers.__version__, "torch": torch.__version__},
        }
        runs = measure(
            plan,
            {side: many.ask if side in RING else one.ask for side in SIDES},
            lambda line: print(line, file=sys.stderr),
        )
        idle = {"ring": many.idle_cpu(), "transformers": one.idle_cpu()}
        for number in range(len(prompts)) if args.trace else ():
            many.ask(plan.asked("flowspec", number, 0, traced=True))
    strangers = spread(run.facts["strangers_cores"] for run in runs)
    about = {
        "model": str(args.model),
        "draft": str(args.draft),
        "stages": args.stages,
        "processes": facts,
        "idle_cpu": idle,
        "strangers_cores": strangers,
    }
    return about | report(plan, texts, runs)


@command
def main(argv: Sequence[str]) -> int:
    """Exit code: 0, 1 when tokens differ or a process is lost, 2 for bad input, 130 when interrupted."""
    args = arguments(argv)
    with tempfile.TemporaryDirectory(prefix="flowspec-") as folder:
        found = compare(args, Path(folder))
    show(found)
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    return 1 if verdict(found)[1] else 0


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["--serve-ring", ranks, config, *overrides]:
            serve_ring(ranks, config, *overrides)
        case ["--rank", config, *overrides]:
            serve_rank(config, *overrides)
        case ["--serve-alone", *words]:
            serve_alone(*words)
        case words:
            signal.signal(
                signal.SIGTERM, signal.default_int_handler
            )  # a plain kill cleans up like Ctrl-C does
            sys.exit(main(words))
