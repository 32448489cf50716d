"""`flowspec plan MODEL CLUSTER.yaml` says which layers of a model go to which host of a cluster."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence

from flowspec.cluster.doctor import FAULT, judge
from flowspec.cluster.fleet import boxes_of, group_sizes, measured, model_of, run_of, ways_of
from flowspec.cluster.hosts import load_cluster
from flowspec.cluster.plan import Plan, PlannedModel, PlannedStage, Prediction
from flowspec.cluster.planner import (
    Alternative,
    Candidate,
    Predict,
    alternatives,
    candidates,
    chosen,
    shortage,
    unfit,
)
from flowspec.cluster.report import Needs, Report, load_report
from flowspec.commands.options import numbers
from flowspec.config import Config
from flowspec.core.cost import Emulate
from flowspec.core.topology import Topology
from flowspec.models.hub import MODEL_FILES, local_folder
from flowspec.models.split import Source
from flowspec.output import Parser
from flowspec.preflight import check_writable

ABOUT = """Measure the hosts of a cluster file, or read a doctor's report, and say how a model is best
split over them: which layers where, rank 0 and lm_head where, whether groups pay. What is said of
tokens/s is simulated, with made-up drafts. Exit code 1: no split fits."""
DRAFTS = "0.6,0.2"
TEXTS, TOKENS = 2, 96
"""So many texts of so many tokens are simulated of each alternative."""


def _parser() -> Parser:
    parser = Parser(prog="flowspec plan", description=ABOUT)
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder with a safetensors checkpoint, or a name on the Hugging Face hub",
    )
    parser.add_argument(
        "cluster", metavar="CLUSTER.yaml", help="the hosts, as run_cluster.sh takes them"
    )
    parser.add_argument(
        "--report",
        metavar="FILE",
        help="what flowspec doctor --json wrote (default: the hosts are measured now)",
    )
    parser.add_argument(
        "--out", metavar="FILE", help="write the plan, for split_models.py --plan FILE"
    )
    parser.add_argument(
        "--synthetic",
        default=DRAFTS,
        metavar="P,P",
        help="the target's token is the draft's k-th choice with this probability "
        f"(default {DRAFTS})",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    check_writable(options.out, "--out")
    profile = numbers(options.synthetic, float, "--synthetic")
    cluster = load_cluster(options.cluster)
    config = run_of(cluster)
    source = Source.open(local_folder(options.model, "MODEL", MODEL_FILES))
    model = model_of(source, config, _note)
    predict = _simulator(config, profile, model.hidden)
    if options.report is None:
        print(f"asking {len(cluster.hosts)} hosts ...", file=sys.stderr, flush=True)
    report = load_report(options.report) if options.report else measured(cluster, config)
    _tell_faults(report)
    where = options.report or "the doctor"
    boxes = boxes_of(report, cluster, config, source.dtype, where, _note)
    ways = ways_of(report, _note)
    listed = [cluster.host_of(rank).name for rank in cluster.ranks]
    tried = candidates(model, boxes, ways, group_sizes(source, len(boxes)), listed)
    found = alternatives(tried, predict)
    if not found:
        print(f"flowspec: no split fits: {_lacks(shortage(model, boxes, ways))}", file=sys.stderr)
        return 1
    print("\n".join(_table(found, unfit(tried))))
    plan = _plan(PlannedModel.of(source.config), found)
    print("\n".join(_advice(plan, options.model, options.out)))
    if options.out:
        plan.save(options.out)
    return 0


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _tell_faults(report: Report) -> None:
    """Tell what the doctor finds, but for what a split that is there already needs."""
    hosts = (dataclasses.replace(host, needs=Needs(), files=()) for host in report.hosts)
    for finding in judge(dataclasses.replace(report, hosts=tuple(hosts))):
        if finding.state == FAULT:
            _note(f"no run can start before this is mended: {finding.line}")


def _simulator(config: Config, profile: list[float], hidden: int) -> Predict:
    """Return what predicts the rates of a ring, with made-up drafts of this profile."""
    from flowspec.bench.forecast import made_up, rate

    drafts = config.drafter_kinds != "none" and config.method != "ar"
    sampling = dataclasses.replace(config.sampling, max_new_tokens=TOKENS)
    forecaster = made_up(dataclasses.replace(config, sampling=sampling), profile, TEXTS, hidden)
    tapes = forecaster.tapes.values()

    def simulated(method: str, emulate: Emulate, stages: int) -> float:
        return rate(forecaster.run(tape, method, Topology(stages), emulate) for tape in tapes)

    def predict(emulate: Emulate, stages: int) -> tuple[float, float | None]:
        ar = simulated("ar", emulate, stages)
        return ar, simulated("flowspec", emulate, stages) if drafts else None

    return predict


# ---- what is found -------------------------------------------------------------------------------
def _plan(model: PlannedModel, found: Sequence[Alternative]) -> Plan:
    best = chosen(found).best
    stages = (
        PlannedStage(layers=(start, stop), hosts=room.names) for room, start, stop in best.stages
    )
    return Plan(
        model=model,
        coordinator=best.setting.coordinator.name,
        stages=tuple(stages),
        verify_on=best.setting.verify_on,
        chosen=best.kind,
        simulated=tuple(_prediction(each) for each in found),
    )


def _prediction(found: Alternative) -> Prediction:
    (ar, flowspec), best = found.rates, found.best
    return Prediction(
        alternative=best.kind,
        hosts=best.hosts,
        layers=best.layers,
        verify_on=best.setting.verify_on,
        ar=round(ar, 3),
        flowspec=None if flowspec is None else round(flowspec, 3),
        emulate=best.ring[0],
    )


# ---- what is shown -------------------------------------------------------------------------------
def _table(found: Sequence[Alternative], unfit: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield a line for each alternative, and for each kind of which none fits."""
    rows: list[tuple[str, ...]] = [("", "ar", "flowspec", "rank 0", "lm_head", "layers")]
    rows += [
        (kind, "-", "-", "", "", f"does not fit: {_lacks(lacks)}") for kind, lacks in unfit.items()
    ]
    rows += [_row(each) for each in found]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield "simulated tokens/s; each line is the best of its kind"
    for row in rows:
        name, ar, flowspec, *rest, layers = (
            f"{cell:>{width}}" if k in (1, 2) else f"{cell:<{width}}"
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join([name, ar, flowspec, *rest, layers]).rstrip()


def _row(found: Alternative) -> tuple[str, ...]:
    (ar, flowspec), best = found.rates, found.best
    shown = "-" if flowspec is None else f"{flowspec:.2f}"
    setting = best.setting
    return best.kind, f"{ar:.2f}", shown, setting.coordinator.name, setting.verify_on, _layers(best)


def _layers(best: Candidate) -> str:
    """Return how many layers which hosts have, in order."""
    each = (f"{'+'.join(room.names)} {stop - start}" for room, start, stop in best.stages)
    return ", ".join(each)


def _lacks(lacks: dict[str, float]) -> str:
    return ", ".join(f"{name} lacks {size / 1e9:.2f} GB" for name, size in lacks.items())


def _advice(plan: Plan, model: str, out: str | None) -> Iterator[str]:
    """Yield which alternative is chosen, why, and what is to be done with it."""
    rates = {
        each.alternative: each.ar if each.flowspec is None else each.flowspec
        for each in plan.simulated
    }
    mine = rates.pop(plan.chosen)
    against = (f"{mine / rate:.2f} x {name}" for name, rate in rates.items())
    yield f"chosen: {plan.chosen} ({', '.join(against) or 'nothing else fits'}, simulated)"
    ranks = (f"{name} {held}" for name, held in plan.ranks.items())
    yield f"ranks in the cluster file: {', '.join(ranks)}; in the run's: verify_on: {plan.verify_on}"
    if out:
        yield f"next: split_models.py --model {model} --plan {out} --output DIR"
