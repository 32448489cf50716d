"""Methods are measured on the same prompts in one call, with the simulator's prediction beside.

Each repeat takes the prompts in a new random order, and for each of them the methods in a random
order, so that whatever else the machines do falls on all of them alike. Speed-ups are ratios of
pairs (same prompt, same repeat). Nothing that a method learns outlives its request: the measured
costs of the stages start afresh."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from flowspec.bench import report, timeline
from flowspec.bench.forecast import Forecaster, Models, check_simulable, emulated, obstacle, rate
from flowspec.bench.rivals import Ask, asked
from flowspec.config import Config
from flowspec.core.cost import Emulate
from flowspec.core.costs import Costs, merged, read
from flowspec.core.policies import METHODS
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.topology import Topology
from flowspec.draft.recorded import Tape
from flowspec.engine import Engine
from flowspec.errors import UserError
from flowspec.files import BUILD, kept_lines, replacing
from flowspec.generation import Result
from flowspec.lossless import Count, first_difference, tolerance_of

WARM_UP_TOKENS = 8
SWEEP = {
    "serial": {"budget": (16, 32, 80, 160), "depth": (3, 4, 6, 8)},
    "naive": {"budget": (16, 32, 80, 160), "depth": (3, 4, 6, 8)},
    "pruned": {"budget": (16, 32, 80, 160), "depth": (3, 4, 6, 8)},
    "pipedec": {"segment": (4, 8, 16, 32)},
}
"""These are the settings of `tree` that --sweep tries for each baseline."""


class Variant(NamedTuple):
    """A variant is what is compared: a method, with switches."""

    name: str
    method: str
    policy: PolicyConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan says what to compare."""

    methods: Sequence[str] = METHODS
    without: Sequence[str] = ()
    """flowspec is also run with each of these switches off alone."""
    temperatures: Sequence[float]
    repeats: int = 3
    sweep: bool = False
    """Each baseline's best tree settings are also looked for, by simulation."""
    rivals: Rivals | None = None
    """These are run, too."""
    output: Path | None = None
    """Tables, records and the chart go to this folder; None means BUILD/bench/NAME."""
    command: str = ""
    """This command asked for the comparison."""


class Run(NamedTuple):
    """A run is one generation of the comparison."""

    variant: Variant
    prompt: int
    repeat: int
    request: Request
    result: Result
    figures: timeline.Summary
    draft_ms: float | None
    """This is the median time of the drafter's forwards."""
    gaps: list[float]
    """These are the target's leads of each token over the next best."""
    accepted: list[bool]
    """This says of each token whether the draft had it on its way."""

    @property
    def token_ids(self) -> list[int]:
        return self.result.token_ids

    def record(self, simulated: float | None = None) -> report.Record:
        result, figures = self.result, self.figures
        return report.Record(
            method=self.variant.name,
            temperature=result.temperature,
            prompt=self.prompt,
            repeat=self.repeat,
            new_tokens=result.new_tokens,
            tokens_per_second=result.tokens_per_second,
            prefill_seconds=result.prefill_seconds,
            accepted_per_segment=result.accepted_per_segment,
            utilisation=list(figures.utilisation),
            bubbles=figures.bubbles,
            wasted=figures.wasted,
            dead_rows=figures.dead_rows,
            bytes_per_token=[size / result.new_tokens for size in figures.bytes_per_link],
            bookkeeping_ms=result.bookkeeping_ms,
            stage_overhead_ms=result.stage_overhead_ms,
            drafted_tokens=result.drafted_tokens,
            forwarded_tokens=result.forwarded_tokens,
            accepted_runs=_runs_of(self.accepted),
            simulated=simulated,
            costs=result.costs,
            tokens_sha=hash_of(result.token_ids),
        )


class Beside(NamedTuple):
    """This is one text of a rival."""

    name: str
    temperature: float
    prompt: int
    repeat: int
    token_ids: list[int]
    prefill_seconds: float
    decode_seconds: float

    def record(self) -> report.Record:
        count = len(self.token_ids)
        return report.Record(
            method=self.name,
            temperature=self.temperature,
            prompt=self.prompt,
            repeat=self.repeat,
            new_tokens=count,
            tokens_per_second=(count - 1) / self.decode_seconds if self.decode_seconds else None,
            prefill_seconds=self.prefill_seconds,
            tokens_sha=hash_of(self.token_ids),
        )


@dataclass(frozen=True)
class Rivals:
    """Rivals continue the same texts beside the ring; this holds their names, and how to ask
    them."""

    names: Sequence[str]
    ask: Ask
    room: int
    """A text has so many tokens at most, its prompt included."""

    def run(
        self, name: str, number: int, repeat: int, tokens: Sequence[int], sampling: Sampling
    ) -> Beside:
        new_tokens = min(sampling.max_new_tokens, self.room - len(tokens))
        answer = self.ask(asked(name, tokens, sampling, new_tokens))
        seconds = answer["prefill_seconds"], answer["decode_seconds"]
        return Beside(name, sampling.temperature, number, repeat, answer["token_ids"], *seconds)


def compare(engine: Engine, prompts: Sequence[str], plan: Plan) -> bool:
    """Run, predict, print and write; return False if two methods wrote different tokens."""
    config, ring = engine.config, engine.topology
    if plan.sweep:
        check_simulable(config)
    folder = _folder(plan.output or BUILD / "bench" / f"{config.name}_{_sizes(ring)}")
    seed = 0
    chosen = _variants(config.policy, plan.methods, plan.without)
    runs: list[Run] = []
    theirs: list[Beside] = []
    with kept_lines(folder / "records.jsonl", "--output") as write:
        for run in _runs(engine, prompts, chosen, plan, random.Random(seed)):
            if isinstance(run, Run):
                runs.append(run)
            else:
                theirs.append(run)
            write(report.line(run.record()))
    forecasters = {
        coupled: _forecaster(config, coupled)
        for coupled in {config.policy.coupled, *(v.policy.coupled for v in chosen)}
    }
    predicted = _predictions(runs, forecasters, engine.topology)
    ours = [run.record(predicted[_cell(run)]) for run in runs]
    records = [*ours, *(run.record() for run in theirs)]
    emulated = ", emulated times" if config.emulate.active else ""
    title = f"{config.name}, {engine.topology.words}{emulated}"
    report.show(records, title)
    if plan.sweep:
        _sweep(
            forecasters[config.policy.coupled],
            [r.method for r in ours],
            engine.topology,
            plan.temperatures,
        )
    different = report.identical(ours)
    print("\n".join(different) or "every method wrote the same tokens")
    counts = partings(runs, theirs, tolerance_of(engine))
    for name, count in counts.items():
        print(f"{name}, greedy: {count}")
    _write(folder, records, title, _facts(engine, plan, seed))
    return not different and not any(count.bugs for count in counts.values())


def partings(runs: Sequence[Run], theirs: Sequence[Beside], close: float) -> dict[str, Count]:
    """Return how many greedy texts of each rival are the ring's, part at a tie, or at a bug.

    A tie is where the target led by less than `close`. Above temperature 0 rivals draw others."""
    texts = {run.prompt: run for run in runs if run.result.temperature == 0}
    counts: dict[str, Count] = {}
    for other in theirs:
        if other.temperature == 0:
            own = texts[other.prompt]
            at = first_difference(other.token_ids, own.token_ids)
            ends = at == min(len(own.token_ids), len(other.token_ids))  # where the other goes on
            bug = at is not None and (ends or own.gaps[at] >= close)
            counts.setdefault(other.name, Count()).add(at is not None, bug)
    return counts


def _variants(
    policy: PolicyConfig, methods: Sequence[str], without: Sequence[str]
) -> list[Variant]:
    """Return the methods, and flowspec with each of these switches off alone."""
    lesser = [
        Variant(f"flowspec - {name}", "flowspec", dataclasses.replace(policy, **{name: False}))
        for name in without
    ]
    return [Variant(method, method, policy) for method in methods] + lesser


# ---- measured ------------------------------------------------------------------------------------
def _runs(
    engine: Engine,
    prompts: Sequence[str],
    chosen: list[Variant],
    plan: Plan,
    order: random.Random,
) -> Iterator[Run | Beside]:
    short = dataclasses.replace(engine.config.sampling, max_new_tokens=WARM_UP_TOKENS)
    tokens = [engine.text.encode(prompt) for prompt in prompts]
    sides: list[Variant | str] = [*chosen, *(plan.rivals.names if plan.rivals else ())]

    def run(side: Variant | str, k: int, repeat: int, sampling: Sampling) -> Run | Beside:
        if isinstance(side, Variant):
            return measure(engine, k + 1, repeat, prompts[k], side, sampling)
        assert plan.rivals is not None
        return plan.rivals.run(side, k + 1, repeat, tokens[k], sampling)

    engine.traced = True
    for side in sides:
        run(side, 0, 0, short)
    turns = list(itertools.product(range(len(prompts)), plan.temperatures))
    total, done, began = len(turns) * plan.repeats * len(sides), 0, time.monotonic()
    for repeat in range(1, plan.repeats + 1):
        for k, temperature in order.sample(turns, len(turns)):
            sampling = dataclasses.replace(engine.config.sampling, temperature=temperature)
            for side in order.sample(sides, len(sides)):
                yield run(side, k, repeat, sampling)
                done += 1
                progress(done, total, time.monotonic() - began)


def measure(
    engine: Engine,
    number: int,
    repeat: int,
    prompt: str | Sequence[int],
    variant: Variant,
    sampling: Sampling,
    stop: Sequence[str] = (),
) -> Run:
    """Return a measured generation of a ring that is traced; the text ends before one in `stop`."""
    # each run is as the first of a ring: what one has learnt is no gift to the next
    engine.forget()
    generation = engine.generate(
        prompt,
        method=variant.method,
        policy=variant.policy,
        stop=stop,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=sampling.seed or 0,
    )
    tokens = list(generation)
    assert generation.result is not None
    drafts = [1000 * (s.end - s.begin) for s in generation.spans if s.row == "draft"]
    return Run(
        variant,
        number,
        repeat,
        generation.request,
        generation.result,
        timeline.summary(generation.spans, engine.topology.stages),
        statistics.median(drafts) if drafts else None,
        [token.gap for token in tokens],
        [token.accepted for token in tokens],
    )


def _runs_of(accepted: Sequence[bool]) -> list[int]:
    """Return how many tokens were accepted before each one that was not, and behind the last."""
    ends = [k for k, taken in enumerate(accepted) if not taken]
    return [b - a - 1 for a, b in itertools.pairwise([-1, *ends, len(accepted)])]


def progress(done: int, total: int, seconds: float) -> None:
    """Show a line that counts on a terminal, and ten lines in all elsewhere."""
    live = sys.stderr.isatty()
    if live or done == total or done % max(1, total // 10) == 0:
        end = "\r" if live and done < total else "\n"
        print(f"{done} of {total} runs, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)


def hash_of(token_ids: Sequence[int]) -> str:
    return hashlib.sha256(str(token_ids).encode()).hexdigest()[:16]


# ---- simulated -----------------------------------------------------------------------------------
Cell = tuple[Variant, float, int]


def _forecaster(config: Config, coupled: bool) -> Forecaster:
    """Return what predicts all variants with, or without, the noise in their drafts.

    It loads the models once."""
    return Forecaster(
        dataclasses.replace(config, policy=dataclasses.replace(config.policy, coupled=coupled)),
        Models.of(config),
    )


def _cell(run: Run) -> Cell:
    """Return what was compared, the temperature, and the prompt."""
    return run.variant, run.result.temperature, run.prompt


def _predictions(
    runs: Sequence[Run], forecasters: Mapping[bool, Forecaster], topology: Topology
) -> dict[Cell, float | None]:
    """Return the tokens/s of each cell in virtual time.

    Costs are those that the configuration emulates, or where it emulates none those measured in
    these very runs. The value is None where there can be no simulation. `forecasters` are by
    policy.coupled, on which drafts depend."""
    predicted: dict[Cell, float | None] = {}
    for run in runs:
        cell, forecaster = _cell(run), forecasters[run.variant.policy.coupled]
        if obstacle(forecaster.config):
            predicted[cell] = None
        elif cell not in predicted:
            tape = forecaster.add(run.request, run.result.token_ids)
            same = [r for r in runs if _cell(r)[:2] == cell[:2]]
            emulate, costs = priced(emulated(forecaster.config), same)
            config = dataclasses.replace(forecaster.config, policy=run.variant.policy)
            predicted[cell] = forecaster.run(
                tape, run.variant.method, topology, emulate, config, costs
            ).tokens_per_second
    return predicted


def priced(emulate: Emulate, runs: Sequence[Run]) -> tuple[Emulate, Costs | None]:
    """Return what runs like these cost.

    That is as emulated (with a drafter that is not emulated as measured), or all as measured where
    no stage is emulated."""
    priced, costs = priced_alike(emulate, [run.result for run in runs])
    drafts = [run.draft_ms for run in runs if run.draft_ms is not None]
    if costs is None and priced.draft_ms == 0 and drafts:
        priced = dataclasses.replace(priced, draft_ms=statistics.median(drafts))
    return priced, costs


def priced_alike(emulate: Emulate, results: Sequence[Result]) -> tuple[Emulate, Costs | None]:
    """Return costs as emulated, or where no stage is emulated as these results measured them."""
    if emulate.stage_ms == 0 and emulate.token_ms == 0:
        return emulate, merged([read(result.costs, "this run") for result in results])
    return emulate, None


def _sizes(ring: Topology) -> str:
    """Return the sizes of a ring for the name of a folder: s4, or s2t2."""
    return f"s{ring.stages}" + (f"t{ring.members}" if ring.members > 1 else "")


def _sweep(
    forecaster: Forecaster,
    chosen: Sequence[str],
    topology: Topology,
    temperatures: Sequence[float],
) -> None:
    """Print each baseline's best tree settings at each temperature, by simulation."""
    for temperature in temperatures:
        tapes = [
            t for t in forecaster.tapes.values() if t.request.sampling.temperature == temperature
        ]
        tried = [
            (text, m, _simulated(forecaster, tapes, m, topology, tree))
            for m in SWEEP
            if m in chosen
            for text, tree in _settings(m)
        ]
        title = f"simulated tokens/s at temperature {temperature:g}: each baseline's best setting"
        report.console().print(report.sweep_table(tried, title))


def _settings(method: str) -> Iterator[tuple[str, TreeConfig]]:
    names = list(SWEEP[method])
    for values in itertools.product(*SWEEP[method].values()):
        chosen = dict(zip(names, values, strict=True))
        yield (
            " ".join(f"tree.{name}={value}" for name, value in chosen.items()),
            TreeConfig(**chosen),
        )


def _simulated(
    forecaster: Forecaster, tapes: Sequence[Tape], method: str, topology: Topology, tree: TreeConfig
) -> float:
    config = dataclasses.replace(forecaster.config, tree=tree)
    return rate(forecaster.run(tape, method, topology, config=config) for tape in tapes)


# ---- written -------------------------------------------------------------------------------------
def _facts(engine: Engine, plan: Plan, seed: int) -> dict[str, Any]:
    import torch

    machine = f"{os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}"
    return {
        "command": plan.command,
        "machine": machine,
        "date": time.strftime("%Y-%m-%d"),
        "repeats": plan.repeats,
        "order": f"shuffled, seed {seed}",
        "emulated": engine.config.emulate.active,
        "kept between requests": "nothing",
    }


def _folder(path: str | Path) -> Path:
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output: cannot write into {path}: {error.strerror}") from None
    return Path(path)


def _write(folder: Path, records: list[report.Record], title: str, facts: dict[str, Any]) -> None:
    report.save(records, folder / "records.jsonl")
    with replacing(folder / "table.md") as beside:
        beside.write_text(report.markdown(records, title, facts))
    if timeline.can_draw():
        report.chart(records, folder / "chart.png", title)
    else:
        print(f"no chart: {timeline.MISSING}", file=sys.stderr)
    print(f"written to {folder}")
