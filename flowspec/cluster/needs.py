"""What the ranks of a run need of their hosts: memory, room for files, the files themselves.

It is reckoned from the manifest and the headers of the files, which must be on this machine.
Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import math
import socket
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flowspec.cluster.hosts import Cluster
from flowspec.cluster.report import HostReport, Needs
from flowspec.cluster.shipping import weights
from flowspec.config import Config, load_config
from flowspec.draft.config import DrafterConfig
from flowspec.errors import UserError
from flowspec.models.families import EMBEDDING, read_config
from flowspec.models.manifest import FILE_NAME, Manifest
from flowspec.models.quantised import Tensors, plain
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
    hosts = [
        HostReport(
            name=host.name,
            address=in_digits(host.address),
            called=host.address,
            interface=host.interface,
            ranks=host.ranks,
        )
        for host in cluster.hosts
    ]
    devices = {rank: cluster.host_of(rank).device for rank in cluster.ranks}
    if cluster.config_path is None:
        said = "the cluster file names no config"
        return Wanted(tuple(hosts), tuple(d or "cpu" for d in devices.values()), None, said)
    config = load_config(cluster.config_path)
    listed = tuple(device or config.device_of(rank) for rank, device in devices.items())
    stages = config.stages_path if cluster.stages_path is None else cluster.stages_path
    config = dataclasses.replace(config, stages=str(stages.resolve()), device=listed)
    if not (stages / FILE_NAME if stages.is_dir() else stages).exists():
        return Wanted(
            tuple(hosts), listed, config.threads, f"{stages} is not there: split the model first"
        )
    manifest = manifest_of(config)
    cluster.check_ranks(manifest.topology)
    told = (_with_needs(host, manifest, config) for host in hosts)
    return Wanted(tuple(told), listed, config.threads, None)


def in_digits(address: str) -> str:
    """Return the address that a name leads to from here, other than the loopback if possible."""
    with contextlib.suppress(OSError, ValueError):
        known = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        found = [str(each[4][0]) for each in known]
        outward = [each for each in found if not ipaddress.ip_address(each).is_loopback]
        return (outward or found)[0]
    return address


def _with_needs(host: HostReport, manifest: Manifest, config: Config) -> HostReport:
    files = tuple(parcel[:3] for parcel in weights(config, manifest, host.ranks))
    return dataclasses.replace(host, needs=needs_of(manifest, config, host.ranks), files=files)


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
    held = sum(_drafter(drafter, config.folder, beside) for drafter in drafters)
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
    heads = model.get("num_key_value_heads") or model["num_attention_heads"]
    width = model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"]
    # our kernels on a CPU have rows of float32, whatever the weights are
    size = BYTES["float32"] if config.device_of(rank) == "cpu" else BYTES[dtype]
    return layers * 2 * heads * width * size * min(CONTEXT, manifest.max_positions)


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


def _drafter(drafter: DrafterConfig, folder: Path, dtype: str) -> int:
    """Return the bytes of a drafter's weights; 0 if they are not on this machine, or not read."""
    if not drafter.computes or not (folder / (drafter.path or "")).is_dir():
        return 0
    path = drafter.checkpoint(folder)
    try:
        model = {} if drafter.reads_features else read_config(path)
        return _bytes(plain(Checkpoint(path), model, str(path)), dtype)
    except UserError:  # preflight says what is wrong with it
        return 0
