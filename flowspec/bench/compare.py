"""`python -m flowspec bench compare CONFIG`: methods on the same prompts in one call, measured, with the simulator beside.

Each repeat takes the prompts in a new random order and, for each, the methods in a random order, so that whatever else the
machines do falls on all of them alike; speed-ups are ratios of pairs (same prompt, same repeat). Nothing that a
method learns outlives its request: the measured costs of the stages start afresh.
"""

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
from flowspec.config import METHODS, Config
from flowspec.core.cost import Emulate
from flowspec.core.costs import Costs, merged, read
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Request
from flowspec.draft.recorded import Tape
from flowspec.engine import Engine
from flowspec.errors import UserError
from flowspec.files import BUILD, kept_lines, replacing
from flowspec.generation import Result

WARM_UP_TOKENS = 8
SWEEP = {
    "serial": {"budget": (16, 32, 80, 160), "depth": (3, 4, 6, 8)},
    "naive": {"budget": (16, 32, 80, 160), "depth": (3, 4, 6, 8)},
    "pruned": {"budget": (16, 32, 80, 160), "depth": (3, 4, 6, 8)},
    "pipedec": {"segment": (4, 8, 16, 32)},
}
"""settings of `tree` that --sweep tries for each baseline"""


class Variant(NamedTuple):
    """What is compared: a method, with switches."""

    name: str
    method: str
    policy: PolicyConfig


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to compare."""

    methods: Sequence[str] = METHODS
    without: Sequence[str] = ()
    """also flowspec with each of these switches off alone"""
    temperatures: Sequence[float]
    repeats: int = 3
    sweep: bool = False
    """also each baseline's best tree settings, by simulation"""
    output: Path | None = None
    """where tables, records and the chart go; None: BUILD/bench/NAME"""
    command: str = ""
    """by which it was asked for"""


class Run(NamedTuple):
    """One generation of the comparison."""

    variant: Variant
    prompt: int
    repeat: int
    request: Request
    result: Result
    figures: timeline.Summary
    draft_ms: float | None
    """median length of the drafter's forwards"""


def compare(engine: Engine, prompts: Sequence[str], plan: Plan) -> bool:
    """Run, predict, print, write; False if two methods wrote different tokens."""
    config, stages = engine.config, engine.topology.stages
    if plan.sweep:
        check_simulable(config)
    folder = _folder(plan.output or BUILD / "bench" / f"{config.name}_s{stages}")
    seed = 0
    chosen = _variants(config.policy, plan.methods, plan.without)
    measured = _runs(engine, prompts, chosen, plan.temperatures, plan.repeats, random.Random(seed))
    runs = []
    with kept_lines(folder / "records.jsonl", "--output") as write:
        for run in measured:
            runs.append(run)
            write(report.line(_record(run, None)))
    forecasters = {
        coupled: _forecaster(config, coupled)
        for coupled in {config.policy.coupled, *(v.policy.coupled for v in chosen)}
    }
    predicted = _predictions(runs, forecasters, stages)
    records = [_record(run, predicted[_cell(run)]) for run in runs]
    title = f"{config.name}, {stages} stages{', emulated times' if config.emulate.active else ''}"
    report.show(records, title)
    if plan.sweep:
        _sweep(
            forecasters[config.policy.coupled],
            [r.method for r in records],
            stages,
            plan.temperatures,
        )
    different = report.identical(records)
    print("\n".join(different) or "every method wrote the same tokens")
    _write(folder, records, title, _facts(engine, plan, seed))
    return not different


def _variants(
    policy: PolicyConfig, methods: Sequence[str], without: Sequence[str]
) -> list[Variant]:
    """The methods, and flowspec with each of these switches off alone."""
    lesser = [
        Variant(f"flowspec - {name}", "flowspec", dataclasses.replace(policy, **{name: False}))
        for name in without
    ]
    return [Variant(method, method, policy) for method in methods] + lesser


# ---- measured --------------------------------------------------------------------------------------
def _runs(
    engine: Engine,
    prompts: Sequence[str],
    chosen: list[Variant],
    temperatures: Sequence[float],
    repeats: int,
    order: random.Random,
) -> Iterator[Run]:
    for variant in chosen:
        list(
            engine.generate(
                prompts[0],
                method=variant.method,
                policy=variant.policy,
                max_new_tokens=WARM_UP_TOKENS,
            )
        )
    engine.traced = True
    total, done, began = (
        len(prompts) * len(temperatures) * repeats * len(chosen),
        0,
        time.monotonic(),
    )
    for repeat in range(1, repeats + 1):
        turns = list(itertools.product(range(len(prompts)), temperatures))
        order.shuffle(turns)
        for k, temperature in turns:
            for variant in order.sample(chosen, len(chosen)):
                yield _run(engine, k + 1, repeat, prompts[k], variant, temperature)
                done += 1
                _progress(done, total, time.monotonic() - began)


def _run(
    engine: Engine, number: int, repeat: int, prompt: str, variant: Variant, temperature: float
) -> Run:
    seed = engine.config.sampling.seed or 0
    engine.forget()  # each run is as the first of a ring: what one has learnt is no gift to the next
    generation = engine.generate(
        prompt, method=variant.method, policy=variant.policy, temperature=temperature, seed=seed
    )
    for _ in generation:
        pass
    assert generation.result is not None
    drafts = [1000 * (s.end - s.begin) for s in generation.spans if s.row == "draft"]
    draft_ms = statistics.median(drafts) if drafts else None
    return Run(
        variant,
        number,
        repeat,
        generation.request,
        generation.result,
        timeline.summary(generation.spans),
        draft_ms,
    )


def _progress(done: int, total: int, seconds: float) -> None:
    """On a terminal a line that counts, elsewhere ten lines in all."""
    live = sys.stderr.isatty()
    if live or done == total or done % max(1, total // 10) == 0:
        end = "\r" if live and done < total else "\n"
        print(f"{done} of {total} runs, {seconds:.0f} s", end=end, file=sys.stderr, flush=True)


def _record(run: Run, simulated: float | None) -> report.Record:
    result, figures = run.result, run.figures
    return report.Record(
        method=run.variant.name,
        temperature=result.temperature,
        prompt=run.prompt,
        repeat=run.repeat,
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
        simulated=simulated,
        costs=result.costs,
        tokens_sha=hashlib.sha256(str(result.token_ids).encode()).hexdigest()[:16],
    )


# ---- simulated -------------------------------------------------------------------------------------
Cell = tuple[Variant, float, int]


def _forecaster(config: Config, coupled: bool) -> Forecaster:
    """For all variants with or without the noise in their drafts: it loads the models once."""
    return Forecaster(
        dataclasses.replace(config, policy=dataclasses.replace(config.policy, coupled=coupled)),
        Models.of(config),
    )


def _cell(run: Run) -> Cell:
    """What was compared, the temperature, the prompt."""
    return run.variant, run.result.temperature, run.prompt


def _predictions(
    runs: Sequence[Run], forecasters: Mapping[bool, Forecaster], stages: int
) -> dict[Cell, float | None]:
    """Tokens/s in virtual time, with the costs that the configuration emulates, and those measured in these very runs where
    it emulates none. None where there can be no simulation. `forecasters`: by policy.coupled, on which drafts depend."""
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
                tape, run.variant.method, stages, emulate, config, costs
            ).tokens_per_second
    return predicted


def priced(emulate: Emulate, runs: Sequence[Run]) -> tuple[Emulate, Costs | None]:
    """What the runs' like costs: as emulated (a drafter that is not, as measured), or all as measured where no stage is emulated."""
    priced, costs = priced_alike(emulate, [run.result for run in runs])
    drafts = [run.draft_ms for run in runs if run.draft_ms is not None]
    if costs is None and priced.draft_ms == 0 and drafts:
        priced = dataclasses.replace(priced, draft_ms=statistics.median(drafts))
    return priced, costs


def priced_alike(emulate: Emulate, results: Sequence[Result]) -> tuple[Emulate, Costs | None]:
    """As emulated, or where no stage is emulated as these results measured it."""
    if emulate.stage_ms == 0 and emulate.token_ms == 0:
        return emulate, merged([read(result.costs, "this run") for result in results])
    return emulate, None


def _sweep(
    forecaster: Forecaster, chosen: Sequence[str], stages: int, temperatures: Sequence[float]
) -> None:
    """Print each baseline's best tree settings at each temperature; simulated."""
    for temperature in temperatures:
        tapes = [
            t for t in forecaster.tapes.values() if t.request.sampling.temperature == temperature
        ]
        tried = [
            (text, m, _simulated(forecaster, tapes, m, stages, tree))
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
    forecaster: Forecaster, tapes: Sequence[Tape], method: str, stages: int, tree: TreeConfig
) -> float:
    config = dataclasses.replace(forecaster.config, tree=tree)
    return rate(forecaster.run(tape, method, stages, config=config) for tape in tapes)


# ---- written ---------------------------------------------------------------------------------------
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
