"""What the ranks of a run need of their hosts: memory, room for files, the files themselves.

It is reckoned from the manifest and the headers of the files, which must be on this machine.
Imports no torch."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import socket
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from flowspec.cluster.hosts import Cluster, Host
from flowspec.cluster.report import HostReport, Needs
from flowspec.cluster.shipping import weights
from flowspec.config import Config, load_config
from flowspec.draft.config import DrafterConfig
from flowspec.errors import UserError
from flowspec.models.families import EMBEDDING, read_config
from flowspec.models.manifest import FILE_NAME, Manifest
from flowspec.models.quantised import Tensors, plain
from flowspec.models.shard import heads
from flowspec.models.weights import Checkpoint, TensorFile
from flowspec.preflight import manifest_of

PROGRAM = 480 * 10**6
"""A rank takes so much beside its weights: Python, torch, transformers (docs/measured.md)."""
CONTEXT = 2048
"""The caches have room for a request of so many tokens at least, if the model takes as many."""
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
CUDA = 500 * 10**6
"""CUDA's own share of a GPU's memory, for each process."""


class Wanted(NamedTuple):
    """This is what a run wants of its hosts."""

    hosts: tuple[HostReport, ...]
    devices: tuple[str, ...]
    """What each rank computes on."""
    threads: int | None
    """So many threads each rank is to have; None: a share of the cores."""
    unsplit: str | None
    """This is why nothing is known of the stages, if so."""


def wanted(cluster: Cluster) -> Wanted:
    """Return what the run of a cluster file wants of its hosts.

    A model may be split later. Raise UserError if the run's configuration is wrong, or if the hosts
    list other ranks than it has."""
    if cluster.config_path is None:
        devices = tuple(cluster.host_of(rank).device or "cpu" for rank in cluster.ranks)
        hosts = tuple(_bare(host, cluster) for host in cluster.hosts)
        return Wanted(hosts, devices, None, "the cluster file names no config")
    config = load_config(cluster.config_path, cluster.overrides)
    placed, stages, unsplit, manifest = cluster.placed(config), config.stages_path, None, None
    if (stages / FILE_NAME if stages.is_dir() else stages).exists():
        manifest = manifest_of(config)
        cluster.check_ranks(manifest.topology)
    else:
        unsplit = f"{stages} is not there: split the model first"
    hosts = tuple(_wanted_of(host, cluster, config, manifest) for host in cluster.hosts)
    devices = tuple(placed.device_of(rank) for rank in cluster.ranks)
    return Wanted(hosts, devices, config.threads, unsplit)


def _bare(host: Host, cluster: Cluster) -> HostReport:
    return HostReport(
        name=host.name,
        address=in_digits(host.address),
        called=host.address,
        interface=host.interface,
        ranks=host.ranks,
        spare=max((other.ranks for other in cluster.holding), key=len) if host.spare else (),
    )


def _wanted_of(
    host: Host, cluster: Cluster, config: Config, manifest: Manifest | None
) -> HostReport:
    """Return what is wanted of a host; of a spare one what a host with needs like no other has.

    Without a manifest that is no memory and no files."""
    bare = _bare(host, cluster)
    if not host.spare:
        return _with_needs(bare, host.ranks, manifest, cluster.placed(config))
    told = []
    for other in cluster.holding:
        there = cluster.instead(other, host).placed(config)
        devices = tuple(there.device_of(rank) for rank in other.ranks)
        taking = replace(bare, spare=other.ranks, devices=devices)
        told.append(_with_needs(taking, other.ranks, manifest, there))
    return max(told, key=lambda each: (each.needs.memory + each.needs.gpu, len(each.spare)))


def in_digits(address: str) -> str:
    """Return the address that a name leads to from here, other than the loopback if possible."""
    with contextlib.suppress(OSError, ValueError):
        known = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        found = [str(each[4][0]) for each in known]
        outward = [each for each in found if not ipaddress.ip_address(each).is_loopback]
        return (outward or found)[0]
    return address


def _with_needs(
    host: HostReport, ranks: tuple[int, ...], manifest: Manifest | None, config: Config
) -> HostReport:
    if manifest is None:
        return host
    files = tuple(parcel[:3] for parcel in weights(config, manifest, ranks))
    return replace(host, needs=needs_of(manifest, config, ranks), files=files)


def needs_of(manifest: Manifest, config: Config, ranks: Iterable[int]) -> Needs:
    """Return what a host with these ranks needs."""
    ranks, memory, gpu = list(ranks), 0, 0
    for rank in ranks:
        held = _held(manifest, config, rank)
        if config.device_of(rank) == "cpu":
            memory += PROGRAM + held
        else:
            memory, gpu = memory + PROGRAM, gpu + CUDA + held
    return Needs(memory=memory, gpu=gpu)


def _held(manifest: Manifest, config: Config, rank: int) -> int:
    """Return the bytes of a rank's weights and caches, where it computes."""
    topology = manifest.topology
    dtype = config.dtype_of(topology, rank, manifest.dtype)
    beside = config.plain_dtype(rank, manifest.dtype) if dtype == "nf4" else dtype
    drafters = config.drafters_on(topology, rank)
    tensors = (drafter_tensors(drafter, config.folder) for drafter in drafters)
    held = sum(_bytes(each, beside) for each in tensors if each)
    if topology.drafts(rank):
        return held
    entry = manifest.entry(rank)
    path, model = manifest.path(entry), read_config(manifest.folder(rank))
    file = plain(TensorFile(path), model, str(path))
    held += _in_four_bits(file, beside) if dtype == "nf4" else _bytes(file, dtype)
    if entry.lm_head and rank in config.head_ranks(topology):
        held += _bytes(TensorFile(manifest.path(entry.lm_head)), beside)
    return held + _cache(manifest, config, rank, model, beside)


def _cache(manifest: Manifest, config: Config, rank: int, model: dict, dtype: str) -> int:
    layers = manifest.entry(rank).num_layers
    if config.cache_mb is not None and layers:
        return int(config.cache_mb * 1e6)
    return layers * cache_numbers(model) * number_bytes(config.device_of(rank), dtype)


def cache_numbers(model: dict) -> int:
    """Return of how many numbers a layer's keys and values are, for CONTEXT tokens."""
    _, groups, width = heads(model)
    return 2 * groups * width * min(CONTEXT, model["max_position_embeddings"])


def number_bytes(device: str, dtype: str) -> int:
    """Return the size of a number of rows, keys and values on a device."""
    # our kernels on a CPU have rows of float32, whatever the weights are
    return BYTES["float32"] if device == "cpu" else BYTES[dtype]


def _bytes(file: Tensors, dtype: str) -> int:
    """Return the bytes of a file's tensors as they are held once they are plain matrices."""
    infos = {name: file.info(name) for name in file.names}
    return sum(
        # the embedding is looked up, not multiplied, so it does not become int8
        info.nbytes
        if name == EMBEDDING and dtype == "int8"
        else math.prod(info.shape) * BYTES[dtype]
        for name, info in infos.items()
    )


def _in_four_bits(file: Tensors, beside: str) -> int:
    """Return the same of matrices in nf4, each 64 weights with a float32, and all else `beside`."""
    infos = [(name, file.info(name).shape) for name in file.names]
    return sum(
        math.prod(shape) * 9 // 16
        if len(shape) == 2 and name != EMBEDDING
        else math.prod(shape) * BYTES[beside]
        for name, shape in infos
    )


def drafter_tensors(drafter: DrafterConfig, folder: Path) -> Tensors | None:
    """Return a drafter's weights; None if they are not on this machine, or cannot be read."""
    if not drafter.computes or not (folder / (drafter.path or "")).is_dir():
        return None
    path = drafter.checkpoint(folder)
    try:
        model = {} if drafter.reads_features else read_config(path)
        return plain(Checkpoint(path), model, str(path))
    except UserError:  # preflight says what is wrong with it
        return None
