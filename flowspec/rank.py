"""This module has what it takes to be a rank, and all that a stage or a drafter of its own is.

Rank 0 is engine.py."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch

from flowspec.comm.base import Transport
from flowspec.comm.codec import Limits
from flowspec.comm.shaped import shaped
from flowspec.config import Config, load_config
from flowspec.core.policies.continuous import Continuous
from flowspec.draft.registry import make_drafter
from flowspec.errors import RankLost, need
from flowspec.models import fourbit
from flowspec.models.device import free_bytes
from flowspec.models.families import family_of, read_config
from flowspec.models.heads import read_head
from flowspec.models.manifest import Manifest
from flowspec.models.stage import StageModel, load_head, load_stage, rehearse
from flowspec.preflight import check_run, manifest_of
from flowspec.runtime import wire
from flowspec.runtime.group import Crew, Follower, ShardedHead
from flowspec.runtime.pool import DrafterRank
from flowspec.runtime.worker import Worker
from flowspec.secret import own_secret

if TYPE_CHECKING:
    from flowspec.runtime.process import Losses


class Member(NamedTuple):
    """A member is this process, once it has joined its run."""

    manifest: Manifest
    transport: Transport
    leave: Callable[[], None]
    """This is to be called once the transport is closed."""
    losses: Losses
    """This is asked what a lost rank means for the run."""


def join(config: Config) -> Member:
    """Join the other ranks of a torchrun world.

    Raise UserError, which says what is wrong, or RankLost, which says who did not come."""
    from flowspec.runtime.agreement import facts_of
    from flowspec.runtime.process import Losses, check_world, join_run

    rank, topology = int(os.environ["RANK"]), manifest_of(config).topology
    check_world(topology, config.emulate.shapes_links)
    manifest = check_run(config, [rank])
    set_threads(config, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    warm_up(config, manifest, rank)
    coordinates = rank == topology.COORDINATOR and config.verifies_last
    takes_part = not (coordinates or topology.drafts(rank))
    dtypes = ", ".join(config.dtypes) if config.many_dtypes else dtype_name(config, manifest, rank)
    facts = facts_of(config.shared(), manifest, dtypes if takes_part else None)
    limits = wire_limits(config, manifest)
    own_gpu = has_own_gpu(config)
    losses = Losses(topology, rank)
    joined = join_run(topology, facts, limits, config.emulate, losses, own_gpu, own_secret())
    return Member(manifest, *joined, losses)


def serve(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> None:
    """Be this process's stage in a torchrun world until rank 0 ends the run.

    The arguments are those of `Engine.from_config`."""
    serve_as(load_config(path, overrides))


def serve_as(config: Config) -> None:
    member = join(config)
    transport = shaped(member.transport, config.emulate)
    try:
        work(config, member.manifest, transport)
    except ConnectionError as error:  # of an exchange among the members of a stage
        raise RankLost(str(error)) from None
    transport.close()  # not after a failure: then nobody is to be told that all is well
    member.leave()


def warm_up(config: Config, manifest: Manifest, rank: int) -> None:
    """Import the model's code and wake the GPU before there are heartbeats to miss.

    This takes seconds, and holds the interpreter's lock."""
    device = checked_device(config, rank)
    if device != "cpu":
        one = torch.ones(1, 1, device=device)
        torch.mm(one, one)
    if rank > 0 and not manifest.topology.drafts(rank):
        family_of(read_config(manifest.folder(rank))).classes()
        if dtype_name(config, manifest, rank) == "nf4":
            fourbit.check(device)  # which imports it
    for drafter in config.drafters_on(manifest.topology, rank):
        if drafter.computes:
            read = read_head if drafter.reads_features else read_config
            family_of(read(drafter.checkpoint(config.folder))).classes()


def wire_limits(config: Config, manifest: Manifest) -> Limits:
    """Return what messages of a run with this configuration can hold."""
    tree = max(Continuous.CROWD, config.tree.budget or 0, config.tree.segment or 0)
    return wire.limits(tree, manifest.hidden_size, manifest.num_layers, manifest.max_positions)


def set_threads(config: Config, ranks_here: int) -> None:
    """Set this rank's CPU threads: as configured, or an equal share of the cores.

    torchrun alone would leave it one."""
    torch.set_num_threads(config.threads or max(1, (os.cpu_count() or 1) // ranks_here))


def checked_device(config: Config, rank: int) -> str:
    """Return this rank's device: cpu, or cuda:N.

    Without a number, the ranks of a host take its GPUs in turn, and share them if there are fewer.
    Raise UserError if there is no such GPU."""
    device = config.device_of(rank)
    if device == "cpu":
        return device
    need(torch.cuda.is_available(), f"device is {device}, but torch sees no GPU on rank {rank}")
    number, count = device.partition(":")[2], torch.cuda.device_count()
    index = int(number) if number else int(os.environ.get("LOCAL_RANK", rank)) % count
    need(
        index < count,
        f"device is {device}, but torch sees {count} GPUs on rank {rank}, so cuda:{count - 1} is "
        "the last",
    )
    return f"cuda:{index}"


def has_own_gpu(config: Config) -> bool:
    """Return whether this rank computes on a GPU that no other rank of this host uses."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return config.device == "cuda" and torch.cuda.device_count() >= here


def compute_dtype(config: Config, manifest: Manifest, rank: int) -> torch.dtype:
    """Return the dtype in which a rank computes; with matrices of nf4, that of all else."""
    name = dtype_name(config, manifest, rank)
    return getattr(torch, config.plain_dtype(rank, manifest.dtype) if name == "nf4" else name)


def dtype_name(config: Config, manifest: Manifest, rank: int) -> str:
    """Return the dtype of a rank's weights by its name, such as float32 or nf4."""
    return config.dtype_of(manifest.topology, rank, manifest.dtype)


def work(config: Config, manifest: Manifest, transport: Transport) -> None:
    """Load what this rank computes with, and serve until rank 0 ends the run."""
    (draft if transport.topology.drafts(transport.rank) else compute)(config, manifest, transport)


def draft(config: Config, manifest: Manifest, transport: Transport) -> None:
    """Be a rank that drafts for rank 0."""
    rank, begun, size = transport.rank, time.monotonic(), 0
    [own] = config.drafters_on(transport.topology, rank)
    dtype, device = compute_dtype(config, manifest, rank), checked_device(config, rank)
    pulse = transport.pulses[rank]

    def progress(sum: int) -> None:
        nonlocal size
        pulse.move()
        size = sum

    pulse.at("loading its draft model")
    drafter = make_drafter([own], config.folder, manifest, None, dtype, device, progress)
    assert drafter is not None
    pulse.at()
    seconds, what = time.monotonic() - begun, f"draft model {own.path}"
    transport.send_control(0, wire.loaded(size / 1e6, seconds, what, 0))
    DrafterRank(transport, drafter, manifest.vocab_size, config.emulate.draft_ms / 1000).run()


def compute(config: Config, manifest: Manifest, transport: Transport) -> None:
    """Be a member of a stage."""
    rank, begun = transport.rank, time.monotonic()
    dtype, device = compute_dtype(config, manifest, rank), checked_device(config, rank)
    said = begun

    pulse = transport.pulses[rank]
    pulse.at("loading its weights")

    def progress(size: int) -> None:
        nonlocal said
        pulse.move()
        if time.monotonic() - said > 1.0:
            said = time.monotonic()
            if transport.topology.leads(rank):
                transport.send_control(0, wire.loading(size / 1e6, said - begun))

    topology, links = transport.topology, transport.links
    leader = topology.leader(rank)
    autotp = links is not None and config.tensor_parallel.backend == "deepspeed"
    nf4 = dtype_name(config, manifest, rank) == "nf4"
    model = load_stage(manifest, rank, dtype, device, progress, links, autotp, nf4)
    head = (
        load_head(manifest, rank, dtype, device)
        if topology.is_last(leader) and config.verifies_last
        else None
    )
    size = model.size / 1e6
    if config.deterministic:
        model.compute_alone()
        if head:
            head.alone = True
    rehearse(model, head)
    first, end = manifest.entry(rank).layers
    room = cache_rows(config, manifest, model)
    pulse.at()
    crew = Crew(transport)
    for follower in crew.wait_until_loaded():
        size, room = size + follower.meta["megabytes"], min(room, follower.meta["cache_rows"])
    seconds, what = time.monotonic() - begun, f"layers {first} to {end - 1}"
    transport.send_control(leader if rank != leader else 0, wire.loaded(size, seconds, what, room))
    if rank != leader:
        Follower(transport, model, head, manifest.vocab_size, first).run()
        return
    if head and links:
        head = ShardedHead(head, manifest.vocab_size, links, crew)
    Worker(transport, model, head, config.emulate, first).run()


SHARE = 0.8
"""If `cache_mb` is auto, the caches get this share of what is free."""
MANY = 10**12
"""If nobody says what is free, the caches hold this many tokens."""


def cache_rows(config: Config, manifest: Manifest, model: StageModel) -> int:
    """Return for how many tokens' keys and values this stage has memory."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", manifest.topology.world_size))
    free = SHARE * free_bytes(model.device) / (here if model.device.type == "cpu" else 1)
    room = free if config.cache_mb is None else config.cache_mb * 1e6
    return int(min(room / model.row_bytes, MANY))


def work_as_thread(config: Config, manifest: Manifest, end: Transport, first: Transport) -> None:
    """Be a stage in a thread; what goes wrong in it is raised where rank 0 waits."""
    end = shaped(end, config.emulate)
    try:
        work(config, manifest, end)
    except BaseException as error:
        first.inbox.fail(error)
    finally:
        end.close()
