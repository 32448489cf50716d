"""Several requests at a time are measured here.

The figures are the tokens per second of all of them together, and how long a first token takes."""

from __future__ import annotations

import dataclasses
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from flowspec.bench import report
from flowspec.bench.compare import WARM_UP_TOKENS, priced_alike
from flowspec.bench.forecast import Forecaster, Models, emulated, obstacle
from flowspec.engine import Engine
from flowspec.files import kept_lines
from flowspec.generation import Result


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan says what is measured.

    Each method runs with so many requests at a time, at each temperature."""

    methods: Sequence[str]
    requests: Sequence[int]
    temperatures: Sequence[float]
    repeats: int
    output: Path | None = None
    """Records go to this file, a line for each run; the table is printed all the same."""


class Cell(NamedTuple):
    """A cell is what is compared between methods."""

    temperature: float
    requests: int


class Run(NamedTuple):
    """A run is so many requests that came at once, with one method."""

    cell: Cell
    method: str
    repeat: int
    results: list[Result]
    keys: list[tuple[int, float, int]]
    """Texts must agree by these keys: the prompt's number, the temperature and the seed."""
    seconds: float
    """The run took so many seconds from the first request to the last token of all."""

    @property
    def rate(self) -> float:
        """Return the tokens per second of all requests together."""
        return sum(result.new_tokens for result in self.results) / self.seconds

    @property
    def firsts(self) -> list[float]:
        """Return the seconds until the first token of each request."""
        return [result.prefill_seconds for result in self.results]

    @property
    def record(self) -> dict[str, Any]:
        """Return the line in the file of records, as an object."""
        return {
            "method": self.method,
            "requests": self.cell.requests,
            "temperature": self.cell.temperature,
            "repeat": self.repeat,
            "tokens_per_second": self.rate,
            "first_token_seconds": self.firsts,
            "new_tokens": sum(result.new_tokens for result in self.results),
            "emulated": self.results[0].emulated,
        }


def load(engine: Engine, prompts: Sequence[str], plan: Plan) -> bool:
    """Measure and print a table.

    Return whether each request wrote the same text in every company and with every method."""
    runs, texts, same = [], dict[tuple[int, float, int], list[int]](), True
    with kept_lines(plan.output, "--output") as write:
        for run in _runs(engine, prompts, plan):
            runs.append(run)
            for key, result in zip(run.keys, run.results, strict=True):
                same = same and texts.setdefault(key, result.token_ids) == result.token_ids
            write(json.dumps(run.record))
    config = engine.config
    simulated = {} if obstacle(config) else _simulated(engine, prompts, runs)
    about = f"{config.name}, {engine.topology.words}"
    title = f"{about}{', emulated times' if config.emulate.active else ''}"
    report.console().print(_table(runs, plan, simulated, title))
    return same


def _runs(engine: Engine, prompts: Sequence[str], plan: Plan) -> Iterator[Run]:
    """Run the cells in shuffled order, and the methods of a cell one after the other in a drawn
    order."""
    for method in plan.methods:
        list(engine.generate(prompts[0], method=method, max_new_tokens=WARM_UP_TOKENS))
    order = random.Random(0)
    for repeat in range(1, plan.repeats + 1):
        cells = [Cell(t, n) for t in plan.temperatures for n in plan.requests]
        for cell in order.sample(cells, len(cells)):
            for method in order.sample(list(plan.methods), len(plan.methods)):
                yield _run(engine, prompts, cell, method, repeat)


def _run(engine: Engine, prompts: Sequence[str], cell: Cell, method: str, repeat: int) -> Run:
    engine.forget()  # each run is like the first of a ring
    keys = [(k % len(prompts), cell.temperature, k // len(prompts)) for k in range(cell.requests)]
    generations = [
        engine.submit(prompts[k], method=method, temperature=temperature, seed=seed)
        for k, temperature, seed in keys
    ]
    results = []
    for generation in generations:
        for _ in generation:
            pass
        assert generation.result is not None
        results.append(generation.result)
    stats = [generation.stats for generation in generations]
    seconds = max(s.last_token for s in stats) - min(s.begun for s in stats)
    return Run(cell, method, repeat, results, keys, seconds)


def _simulated(
    engine: Engine, prompts: Sequence[str], runs: Sequence[Run]
) -> dict[tuple[Cell, str], float]:
    """Return the tokens per second of all requests together, in virtual time."""
    config = engine.config
    forecaster, rates = Forecaster(config, Models.of(config)), dict[tuple[Cell, str], float]()
    for run in runs:
        if (run.cell, run.method) in rates:
            continue
        same = [result for r in runs if r.method == run.method for result in r.results]
        emulate, costs = priced_alike(emulated(config), same)
        tapes = []
        for (prompt, temperature, seed), result in zip(run.keys, run.results, strict=True):
            sampling = dataclasses.replace(config.sampling, temperature=temperature, seed=seed)
            request = engine.request(engine.text.encode(prompts[prompt]), sampling)
            tapes.append(forecaster.add(request, result.token_ids))
        outcomes = forecaster.together(tapes, run.method, engine.topology, emulate, costs=costs)
        tokens = sum(len(outcome.tokens) for outcome in outcomes)
        rates[run.cell, run.method] = tokens / max(outcome.last_token for outcome in outcomes)
    return rates


def _table(
    runs: Sequence[Run], plan: Plan, simulated: dict[tuple[Cell, str], float], title: str
) -> Table:
    table = Table(title=title)
    base = plan.methods[0]
    for name in ("T", "requests", "method", "tokens/s", f"over {base}", "simulated", "first token"):
        table.add_column(name, justify="left" if name == "method" else "right")
    for cell in sorted({run.cell for run in runs}):
        of = {m: [r for r in runs if (r.cell, r.method) == (cell, m)] for m in plan.methods}
        for method, own in of.items():
            over = [a.rate / b.rate for a, b in zip(own, of[base], strict=True)]
            virtual = simulated.get((cell, method))
            firsts = [seconds for run in own for seconds in run.firsts]
            table.add_row(
                f"{cell.temperature:g}",
                str(cell.requests),
                method,
                _spread([run.rate for run in own], ".1f"),
                _spread(over, ".2f"),
                "-" if virtual is None else f"{virtual:.1f}",
                f"{statistics.median(firsts):.2f} s (at most {max(firsts):.2f})",
            )
    return table


def _spread(values: Sequence[float], digits: str) -> str:
    """Return the median, and the least and the largest value."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):{digits}} ({low:{digits}} to {high:{digits}})"
