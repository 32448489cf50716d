"""What the planner needs to know is gathered here: what a model weighs, what hosts can do.

The model's sizes are those in its files' headers, the hosts' are in the doctor's report. Imports no
torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

from flowspec.cluster.doctor import TIGHT
from flowspec.cluster.hosts import Cluster, Host
from flowspec.cluster.needs import (
    BYTES,
    CUDA,
    PROGRAM,
    cache_numbers,
    drafter_tensors,
    number_bytes,
)
from flowspec.cluster.planner import Box, Model, Way, Ways
from flowspec.cluster.report import Facts, HostReport, Report, Speed
from flowspec.cluster.visit import examine, sites_of
from flowspec.config import Config, load_config, plain_dtype
from flowspec.draft.config import DrafterConfig
from flowspec.errors import UserError, need
from flowspec.models.families import HEAD
from flowspec.models.quantised import Tensors
from flowspec.models.shard import check_members
from flowspec.models.split import Source

EMBEDDED = "embed_tokens.weight"

Tell = Callable[[str], None]
"""It is told what counts for nothing here, though it may be something."""


def run_of(cluster: Cluster) -> Config:
    """Return the configuration of a cluster file's run, if a plan can be made for it.

    Raise UserError, which names the key, if not."""
    path = cluster.config_path
    if path is None:
        raise UserError(
            f"{cluster.path}: config is missing: a plan needs the run's drafter and dtype"
        )
    config = load_config(path)
    need(
        config.dsi.servers == 1,
        f"{path}: dsi.servers is {config.dsi.servers}: plans are for one server",
    )
    for drafter in config.drafters:
        need(
            not drafter.ranks,
            f"{path}: {drafter.where}.ranks is {drafter.ranks}: plans are for drafters on rank 0",
        )
    need(
        not config.many_dtypes and "nf4" not in config.dtypes,
        f"{path}: dtype is {config.dtype}: plans are for one dtype, and the doctor measures no nf4",
    )
    need(
        isinstance(config.device, str) or all(host.device for host in cluster.hosts),
        f"{path}: device is a list by rank, and a plan gives out the ranks: write `device` at the "
        "hosts of the cluster file",
    )
    return config


def measured(cluster: Cluster, config: Config) -> Report:
    """Ask all hosts and measure them, each as if it had one rank; return the report."""
    alone = tuple(replace(host, ranks=(k,), spare=False) for k, host in enumerate(cluster.hosts))
    sites, report = sites_of(replace(cluster, hosts=alone, config=None, stages=None))
    return examine(sites, replace(report, threads=config.threads))


# ---- the model -----------------------------------------------------------------------------------
def model_of(source: Source, config: Config, tell: Tell) -> Model:
    """Return what the parts of a model and of its drafters weigh."""
    tensors = source.tensors
    used = [source.layer_names(k, k + 1) for k in range(source.num_layers)]
    head = _weights(tensors, [source.head])
    drafters = [_drafter(drafter, config, tell) for drafter in config.drafters]
    held, embedded, drafting = map(sum, zip(*drafters, strict=True))
    return Model(
        layers=tuple(_weights(tensors, names) for names in used),
        embedding=_weights(tensors, source.entrance),
        head=head,
        hidden=source.config["hidden_size"],
        cache=0 if config.cache_mb is not None else cache_numbers(source.config),
        draft=drafting + (head if config.needs_lm_head else 0),
        drafter=held + (head if config.needs_lm_head else 0),
        draft_embedding=embedded,
    )


def _weights(tensors: Tensors, names: Iterable[str]) -> int:
    return sum(math.prod(tensors.info(name).shape) for name in names)


def _drafter(drafter: DrafterConfig, config: Config, tell: Tell) -> tuple[int, int, int]:
    """Return how many weights a drafter holds but for its embedding, how many that has, and with
    how many a forward multiplies."""
    tensors = drafter_tensors(drafter, config.folder)
    if tensors is None:
        if drafter.computes:
            tell(f"{drafter.setting} {drafter.path} is not here: its drafts count as free")
        return 0, 0, 0
    embeddings = [name for name in tensors.names if name.endswith(EMBEDDED)]
    embedded = _weights(tensors, embeddings)
    held = _weights(tensors, tensors.names) - embedded
    # where there is no lm_head the embedding is one
    tied = HEAD not in tensors.names and not drafter.reads_features
    return held, embedded, held + (embedded if tied else 0)


def group_sizes(source: Source, hosts: int) -> list[int]:
    """Return of how many ranks stages can be: 1, and those into whose shards the model can be
    cut."""
    found = [1]
    for members in range(2, hosts + 1):
        try:
            check_members(source.config, members)
            found.append(members)
        except UserError:
            continue
    return found if source.tensors is source.checkpoint else [1]


# ---- the hosts -----------------------------------------------------------------------------------
def boxes_of(
    report: Report, cluster: Cluster, config: Config, stored: str, where: str, tell: Tell
) -> list[Box]:
    """Return what the hosts of a cluster file can do, by a report that is called `where`.

    A host that did not answer is left out. Raise UserError if one was not measured."""
    told = {host.name: host for host in report.hosts}
    boxes = []
    for host in cluster.hosts:
        found = told.get(host.name)
        if found is None:
            raise UserError(f"{where} has no host {host.name}: run flowspec doctor --json again")
        if found.facts is None:
            tell(f"{host.name} is left out: no answer ({found.silent})")
            continue
        boxes.append(_box(host, found, found.facts, config, stored, where))
    need(bool(boxes), f"{where}: no host answers")
    return boxes


def _box(
    host: Host, found: HostReport, facts: Facts, config: Config, stored: str, where: str
) -> Box:
    device = host.device or (config.device if isinstance(config.device, str) else "cpu")
    [asked] = config.dtypes
    dtype = plain_dtype(device, stored) if asked == "auto" else asked
    base, slope = _speed(found, device, dtype, where)
    cache = 0 if config.cache_mb is None else int(config.cache_mb * 1e6)
    free, program = _memory(facts, device)
    return Box(
        name=host.name,
        base=base,
        slope=slope,
        free=TIGHT * free,
        program=program + cache,
        weight=BYTES[dtype],
        # the embedding does not become int8
        looked_up=BYTES[stored] if dtype == "int8" else BYTES[dtype],
        number=number_bytes(device, dtype),
    )


def _speed(found: HostReport, device: str, dtype: str, where: str) -> tuple[float, float]:
    """Return the seconds of a forward over no row, and of each row, for each weight."""
    kind = device.partition(":")[0]
    known = {s.rows: _each(s) for s in found.speeds if (s.device, s.dtype) == (kind, dtype)}
    few, many = min(known, default=0), max(known, default=0)
    if few == many:
        raise UserError(
            f"{where}: the speed of {found.name} in {dtype} on {kind} was not measured: run "
            "flowspec doctor --json again, without --quick, or set another dtype"
        )
    slope = max(0.0, (known[many] - known[few]) / (many - few))
    return max(0.0, known[few] - few * slope), slope


def _each(speed: Speed) -> float:
    return speed.seconds / speed.weights


def _memory(facts: Facts, device: str) -> tuple[int, int]:
    """Return the free bytes where a rank computes, and those of its program there."""
    memory = facts.memory_free or 0
    if device == "cpu":
        return memory, PROGRAM
    if facts.memory_is_shared:
        return memory, PROGRAM + CUDA
    return max((gpu.free for gpu in facts.gpus), default=0), CUDA


def ways_of(report: Report, tell: Tell) -> Ways:
    """Return the links between the hosts."""
    known = {
        (link.source, link.target): Way(link.ms, link.mbps)
        for link in report.links
        if link.ms is not None and link.mbps
    }
    if not known and len(report.hosts) > 1:
        tell("no link was measured: messages count as free")
    return Ways(known)
