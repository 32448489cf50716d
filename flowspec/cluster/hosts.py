"""A cluster file says on which hosts the ranks of a run are, and how each host is reached.

It is a YAML file of our own (configs/cluster.yaml is an example), or the JSON hostfile of
`mlx.launch`. This module imports no torch and contacts nobody."""

from __future__ import annotations

import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowspec.config import Config
from flowspec.core.topology import Topology
from flowspec.errors import UserError, need
from flowspec.schema import build, read_values

HOSTFILE = ("ssh", "ips")
"""A host of mlx.launch's hostfile has these keys."""
WHAT = "a cluster file: a YAML mapping with `hosts`, or the JSON hostfile of mlx.launch"
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._:%-]*")
"""A host name or an address, IPv4 or IPv6; it cannot be taken for an option."""


@dataclass(frozen=True, kw_only=True)
class Host:
    """A host is a machine that holds some of the ranks."""

    address: str
    """The other ranks reach it by this name or address: its place in the cluster's network."""
    name: str = ""
    """It is called so in messages; its address if nothing is said."""
    ssh: str = ""
    """ssh reaches it by this name or address; `address` if nothing is said."""
    user: str | None = None
    """ssh logs in as this user. `auto` is what ssh's own configuration says."""
    ssh_port: int | None = None
    """ssh connects to this port. `auto` is what ssh's own configuration says."""
    ranks: tuple[int, ...] = ()
    """These ranks run on it. If no host lists any, the k-th host that is not spare has rank k."""
    spare: bool = False
    """It has no rank, and takes the place of a host that stays away when a run is started again."""
    folder: str = "~/flowspec-run"
    """What is copied to the host goes into this folder, and nothing else does."""
    python: str = "python3"
    """The ranks run by this python: a command, or a path seen from `folder`."""
    interface: str | None = None
    """The ranks' traffic uses this network interface. `auto` is the one that has `address`."""
    device: str | None = None
    """The ranks here compute on cpu, cuda or cuda:N. `auto` is what the configuration says."""
    where: str = field(default="hosts", compare=False, metadata={"internal": True})
    """This is the key under which the host stands in the cluster file."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.name or self.address)
        object.__setattr__(self, "ssh", self.ssh or self.address)
        for key in ("address", "ssh", "user", "interface"):
            value = getattr(self, key)
            need(
                value is None or NAME.fullmatch(value) is not None,
                f"{self.where}.{key} is {value!r}: it must be a plain name or address",
            )
        need(
            self.name.isprintable() and "/" not in self.name,
            f"{self.where}.name is {self.name!r}: it must be printable, without a slash",
        )
        for key in ("folder", "python"):
            value = getattr(self, key)
            need(value.strip() != "", f"{self.where}.{key} is empty: leave it out or give a path")
        _check_port(f"{self.where}.ssh_port", self.ssh_port)
        need(not (self.spare and self.ranks), f"{self.where}.ranks: a spare host has none")
        need(
            self.device is None or re.fullmatch(r"cpu|cuda(:\d+)?", self.device) is not None,
            f"{self.where}.device is {self.device}: it must be cpu, cuda or cuda:N",
        )

    @property
    def shown(self) -> str:
        """Return how the host is called in a message, such as `host nano1 (10.0.0.1)`."""
        return f"host {self.name}" + (f" ({self.ssh})" if self.ssh != self.name else "")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """A cluster is the hosts of a run, and what it runs.

    Paths are relative to the cluster file."""

    hosts: tuple[Host, ...]
    stages: str | None = None
    """This folder was made by split_models.py. `auto` is the one that the configuration names."""
    config: str | None = None
    """This is the YAML file of the run, as run_pipe.sh takes it."""
    port: int = 29500
    """The ranks meet at this port of rank 0's host."""
    restart: int = 0
    """If a rank or a host is lost, the run is started again at most so many times, and goes on with
    its text."""
    ssh_config: str | None = None
    """ssh reads this file instead of the user's own (`ssh -F`): keys, jump hosts, known hosts."""
    folder: Path = field(default=Path(), metadata={"internal": True})
    path: Path = field(default=Path(), metadata={"internal": True})

    def __post_init__(self) -> None:
        need(bool(self.hosts), "hosts is an empty list: name one at least")
        _check_port("port", self.port)
        need(self.restart >= 0, f"restart is {self.restart}: it must be 0 or more")
        if not self.holding:
            count = itertools.count()
            numbered = (h if h.spare else replace(h, ranks=(next(count),)) for h in self.hosts)
            object.__setattr__(self, "hosts", tuple(numbered))
        need(bool(self.holding), "hosts are spare all of them: one must have rank 0")
        for host in self.hosts:
            has = bool(host.ranks) or host.spare
            need(has, f"{host.where}.ranks is missing, and other hosts list theirs")
            least = min(host.ranks, default=0)
            need(least >= 0, f"{host.where}.ranks lists {least}")
        _once("name", [host.name for host in self.hosts])
        _once("rank", [rank for host in self.hosts for rank in host.ranks])
        need(0 in self._by_rank, "no host lists rank 0")

    @property
    def _by_rank(self) -> dict[int, Host]:
        return {rank: host for host in self.hosts for rank in host.ranks}

    def host_of(self, rank: int) -> Host:
        """Return the host of a rank."""
        return self._by_rank[rank]

    @property
    def holding(self) -> list[Host]:
        """Return the hosts that have ranks."""
        return [host for host in self.hosts if host.ranks]

    @property
    def spares(self) -> list[Host]:
        """Return the spare hosts."""
        return [host for host in self.hosts if host.spare]

    def instead(self, away: Host, spare: Host) -> Cluster:
        """Return the cluster in which a spare host has the ranks of another, which is left out."""
        taking = replace(spare, spare=False, ranks=away.ranks)
        rest = (host for host in self.hosts if host != spare)
        return replace(self, hosts=tuple(taking if host == away else host for host in rest))

    @property
    def ranks(self) -> list[int]:
        """Return the ranks of all hosts, in order."""
        return sorted(self._by_rank)

    @property
    def config_path(self) -> Path | None:
        return None if self.config is None else self.folder / self.config

    @property
    def stages_path(self) -> Path | None:
        return None if self.stages is None else self.folder / self.stages

    @property
    def ssh_config_path(self) -> Path | None:
        return None if self.ssh_config is None else self.folder / self.ssh_config

    @property
    def overrides(self) -> list[str]:
        """Return what the file says of its run, as overrides of the run's configuration."""
        return [] if self.stages is None else [f"stages={json.dumps(str(self.stages_path))}"]

    def placed(self, config: Config) -> Config:
        """Return a run's configuration with the devices on which hosts say their ranks compute.

        Raise UserError if the configuration lists a device for each rank as well."""
        if all(host.device is None for host in self.hosts):
            return config
        need(
            isinstance(config.device, str),
            f"device lists ranks, and so do hosts of {self.path}: say it in one place",
        )
        devices = (self.host_of(rank).device or str(config.device) for rank in self.ranks)
        return replace(config, device=tuple(devices))

    def check_ranks(self, topology: Topology) -> None:
        """Raise UserError unless the hosts' ranks together are those of the run."""
        wanted, listed = set(topology.ranks), set(self.ranks)
        run = f"the run is of {topology.world_size} ranks (rank 0 and {topology.words})"
        missing, strange = sorted(wanted - listed), sorted(listed - wanted)
        need(not missing, f"{self.path}: {run}, and no host lists rank {_listed(missing)}")
        need(not strange, f"{self.path}: {run}, and hosts list rank {_listed(strange)} too")


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))


def _once(what: str, values: Sequence[object]) -> None:
    twice = [value for value, count in Counter(values).items() if count > 1]
    need(not twice, f"hosts: the {what} {''.join(map(str, twice[:1]))} is given twice")


def _check_port(key: str, port: int | None) -> None:
    need(port is None or 0 < port < 1 << 16, f"{key} is {port}: it must be from 1 to 65535")


def load_cluster(path: str | os.PathLike[str]) -> Cluster:
    """Read a cluster file and check what it says.

    Raise UserError, which names the file and the key, if something is wrong."""
    path = Path(path)
    values = read_values(path, WHAT)
    values = {"hosts": values} if isinstance(values, list) else values
    need(isinstance(values, dict), f"{path}: no mapping; it must be {WHAT}")
    try:
        values = _of_hostfile(values) if _is_hostfile(values) else values
        return build(Cluster, values, folder=path.resolve().parent, path=path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


# ---- mlx.launch ----------------------------------------------------------------------------------
def _is_hostfile(values: dict[str, Any]) -> bool:
    hosts = values.get("hosts")
    told = hosts if isinstance(hosts, list) else []
    return any(isinstance(host, dict) and "ips" in host for host in told)


def _of_hostfile(values: dict[str, Any]) -> dict[str, Any]:
    """Return a hostfile's hosts as those of a cluster file, a rank each.

    What the file says of MLX's own transports (`backend`, `rdma`) and variables (`envs`) has no
    meaning here."""
    return {"hosts": [_of_entry(host, f"hosts.{k}") for k, host in enumerate(values["hosts"])]}


def _of_entry(host: Any, where: str) -> dict[str, Any]:
    entry = host if isinstance(host, dict) else {}
    ssh, ips = (entry.get(key) for key in HOSTFILE)
    listed = ips if isinstance(ips, list) else []
    plain = isinstance(ssh, str) and all(isinstance(ip, str) for ip in listed)
    need(plain and isinstance(ips, list), f"{where} must have `ssh`, a name, and `ips`, a list")
    assert isinstance(ssh, str)
    user, _, name = ssh.rpartition("@")
    address = listed[0] if listed else name
    return {"name": name, "ssh": name, "address": address, "user": user or None}
