"""Many runs in virtual time are simulated here.

They differ in the number of stages, the temperature, the settings and the method. Their costs are
emulated or measured."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

from flowspec.bench.forecast import Forecaster
from flowspec.config import Config
from flowspec.core.cost import Emulate
from flowspec.core.costs import Costs, merged, read
from flowspec.core.request import Request, Sampling
from flowspec.core.topology import Topology
from flowspec.draft.config import DrafterConfig
from flowspec.errors import UserError, need
from flowspec.preflight import check_prompt, check_run
from flowspec.sim.world import Outcome


class Cell(NamedTuple):
    """A cell is one setting of a sweep."""

    topology: Topology
    temperature: float
    varied: tuple[str, ...]
    """These are texts key=value, one for each --vary."""
    config: Config


def record(
    forecaster: Forecaster, config: Config, prompts: list[str], samplings: list[Sampling]
) -> None:
    """Record the target's text for each prompt and sampling that has no tape yet.

    Plain decoding over threads writes it, with nothing emulated."""
    from flowspec.text import Text

    manifest = check_run(config)
    text = Text(manifest.folder(0))
    missing = [
        (p, s) for p in prompts for s in samplings if (text.encode(p), s) not in forecaster.tapes
    ]
    if not missing:
        return
    for number, prompt in enumerate(prompts, 1):
        check_prompt(text.encode(prompt), manifest, f"prompt {number}")
    from flowspec.engine import Engine

    print(f"recording {len(missing)} texts of the target ...", file=sys.stderr, flush=True)
    plain = dataclasses.replace(
        config, method="ar", drafter=DrafterConfig(), emulate=Emulate(), trace=None
    )
    with Engine.over_threads(plain, manifest) as engine:
        for prompt, sampling in missing:
            about = dataclasses.asdict(sampling)
            ids = [token.id for token in engine.generate(prompt, **about)]
            forecaster.add(
                Request(id=0, prompt=text.encode(prompt), sampling=sampling, eos=text.eos), ids
            )


def load_costs(path: Path) -> dict[str, Costs]:
    """Return what the runs of a file measured, by method, and of all of them as "".

    Raise UserError, which says what is wrong with the file."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--costs: cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(
            f"--costs: {path} is not JSON: give a file that run --json or bench compare wrote"
        ) from None
    costs: dict[str, list[Costs]] = {"": []}
    for number, line in enumerate(found, 1):
        known = read(
            line.get("costs") if isinstance(line, dict) else None,
            f"--costs: line {number} of {path}",
        )
        for method in ("", str(line.get("method", ""))):
            costs.setdefault(method, []).append(known)
    need(bool(found), f"--costs: {path} is empty")
    return {method: merged(several) for method, several in costs.items()}


def run(
    forecaster: Forecaster, cells: list[Cell], chosen: list[str], costs: dict[str, Costs] | None
) -> dict[tuple[int, str], list[Outcome]]:
    """Return a map of (cell's index, method) to an outcome for each prompt.

    `costs` are by method; a method that has none takes those of all."""
    results = {}
    for k, cell in enumerate(cells):
        tapes = [
            t
            for t in forecaster.tapes.values()
            if t.request.sampling.temperature == cell.temperature
        ]
        need(bool(tapes), f"no text is recorded for temperature {cell.temperature:g}")
        for method in chosen:
            own = costs.get(method, costs[""]) if costs else None
            results[k, method] = [
                forecaster.run(tape, method, cell.topology, config=cell.config, costs=own)
                for tape in tapes
            ]
    return results
