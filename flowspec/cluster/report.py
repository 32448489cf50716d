"""A report holds what `flowspec doctor` found out about the hosts of a run, and keeps it in a file.

`flowspec doctor --json FILE` writes it, and `flowspec plan` reads it. Imports no torch."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass, field

from flowspec.files import replacing
from flowspec.schema import stored

FORMAT = 1
"""This is the version of a report's format."""


@dataclass(frozen=True, kw_only=True)
class Interface:
    """An interface is a network device that is up, with one of its addresses."""

    name: str
    address: str
    loopback: bool


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """This is which addresses a host knows for a name."""

    name: str
    addresses: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU that torch sees, with its bytes of memory."""

    name: str
    free: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Speed:
    """This is how long the product of so many rows with a matrix of `weights` elements takes."""

    device: str
    dtype: str
    rows: int
    threads: int
    by: str
    """`flowspec` (the kernels of its stages) or `torch` computed it."""
    weights: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts are what a host says of itself (flowspec/cluster/facts.py); sizes are in bytes."""

    python: str
    system: str
    hostname: str
    own_addresses: tuple[str, ...]
    """These addresses the host knows for its own name."""
    resolved: tuple[Resolved, ...]
    flowspec: str | None
    torch: str | None
    transformers: str | None
    driver: str | None
    """The version of NVIDIA's driver, or the release of a Jetson."""
    omp_num_threads: str | None
    gloo_interface: str | None
    """GLOO_SOCKET_IFNAME, as a login has it."""
    interfaces: tuple[Interface, ...]
    port: str | None
    """Of rank 0's host: whether the run's port is `free`, `taken`, or what the system said."""
    broken: str | None
    """This is why torch, which is installed, cannot be imported."""
    gloo: bool
    nccl: bool
    cuda: str | None
    gpus: tuple[Gpu, ...]
    memory_free: int | None
    memory_total: int | None
    folder: str
    disk_free: int
    writable: bool
    cores: int
    usable_cores: float
    load: float
    """So many programs wanted a core in the last minute."""
    missing: tuple[str, ...]
    """Files of its ranks that are not here yet."""
    other: tuple[str, ...]
    """Files of its ranks whose size or sha256 is another."""

    @property
    def memory_is_shared(self) -> bool:
        """Return whether the GPU has the host's memory, as a Jetson's has."""
        return (self.driver or "").startswith("L4T")


@dataclass(frozen=True, kw_only=True)
class Clock:
    """This is how far a host's clock is ahead of the doctor's, and how far that may be wrong."""

    ahead_ms: float
    within_ms: float


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Needs are what the ranks of a host need of it, in bytes."""

    memory: int = 0
    """For weights, caches and programs, on the host's side."""
    gpu: int = 0
    """For weights and caches, on all its GPUs together."""


@dataclass(frozen=True, kw_only=True)
class HostReport:
    """A host's report is what is wanted of it and what was found."""

    name: str
    address: str
    """The other hosts reach it there: an address in digits, as far as the name is known."""
    called: str = ""
    """So it stands in the cluster file."""
    interface: str | None = None
    """The cluster file names this interface."""
    ranks: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()
    """It is a spare host: it has no rank, and is examined as if it had these, which need most."""
    devices: tuple[str, ...] = ()
    """A spare host would compute on these, for the ranks in `spare`."""
    needs: Needs = field(default_factory=Needs)
    files: tuple[tuple[str, int, str], ...] = ()
    """The files of its ranks: their names in the host's folder, bytes and sha256."""
    silent: str | None = None
    """This is why the host could not be asked."""
    facts: Facts | None = None
    clock: Clock | None = None
    speeds: tuple[Speed, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Link:
    """A link is the way from one host to another, to a port that the system chose, as for gloo."""

    source: str
    target: str
    ms: float | None = None
    """A short message takes so long, one way."""
    mbps: float | None = None
    """A stream carries so many megabits a second."""
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Door:
    """This is whether a host reaches the port at which the ranks meet."""

    source: str
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Report:
    """A report is what was found out about a run's hosts."""

    hosts: tuple[HostReport, ...]
    port: int | None = None
    """The ranks meet at this port of the host with rank 0; none without a cluster file."""
    links: tuple[Link, ...] = ()
    doors: tuple[Door, ...] = ()
    devices: tuple[str, ...] = ()
    """What each rank computes on."""
    threads: int | None = None
    """Each rank is to have so many threads; `auto` shares a host's cores among its ranks."""
    unsplit: str | None = None
    """This is why nothing is known of the stages, if so."""
    format: int = FORMAT

    def threads_on(self, host: HostReport) -> int:
        """Return how many threads each rank of a host takes (rank.set_threads)."""
        assert host.facts
        return self.threads or max(1, host.facts.cores // max(1, len(host.ranks or host.spare)))

    @property
    def meeting(self) -> HostReport:
        """Return the host where the ranks meet."""
        return next((host for host in self.hosts if 0 in host.ranks), self.hosts[0])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the report, whole or not at all."""
        with replacing(path) as beside:
            beside.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")


def load_report(path: str | os.PathLike[str]) -> Report:
    """Return the report that a file holds; raise UserError, which names the file and the key."""
    what, again = (
        "a report as `flowspec doctor --json` writes it",
        "run flowspec doctor --json again",
    )
    return stored(Report, path, what, again, FORMAT)
