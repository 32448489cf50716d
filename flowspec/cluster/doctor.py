"""The doctor judges what was found out about hosts: what is well, what is not, and what to do.

Pure: reports in, findings out (report.py, visit.py). A fault is what no run can start with."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

from flowspec.cluster.report import Facts, HostReport, Link, Report

OK, WARNING, FAULT = "ok", "warning", "fault"
OLDEST = (3, 10)
"""flowspec needs this Python or a newer one."""
SAME = ("torch", "transformers")
"""Ranks refuse each other if these versions differ (runtime/agreement.py). That of flowspec must be
the same, too, but the launcher brings it along."""
APART_MS = 50.0
"""Clocks that differ by more are told."""
TIGHT = 0.9
"""More of the free memory than this share should not be needed."""
SLOW = 4.0
"""A link so many times slower than the middle one is told,"""
QUICK_MS = 0.5
"""but for one that is quick enough anyway."""
EVERY = "all hosts"
EPHEMERAL = "those of /proc/sys/net/ipv4/ip_local_port_range"


class Finding(NamedTuple):
    """A finding is what is to be said of a host: its state, and if it is not ok, what to do."""

    state: str
    host: str
    what: str
    to_do: str = ""

    @property
    def line(self) -> str:
        line = f"{self.host}: {self.what}" + (f": {self.to_do}" if self.to_do else "")
        return "".join(letter if letter.isprintable() else "?" for letter in line)


Found = Iterator[Finding]


def can_start(findings: list[Finding]) -> bool:
    """Return whether a run can start: whether none of the findings is a fault."""
    return all(finding.state != FAULT for finding in findings)


def judge(report: Report) -> list[Finding]:
    """Return what is to be said of the hosts, one after the other, then of what is between them.

    A run can start without its spare hosts, whose faults are warnings."""
    found = _of_hosts(report)
    if report.unsplit:
        what = f"memory, disk and files were not compared: {report.unsplit}"
        found.append(Finding(WARNING, EVERY, what))
    spare = {host.name for host in report.hosts if host.spare}
    return [
        each._replace(state=WARNING) if each.state == FAULT and each.host in spare else each
        for each in (*found, *_doors(report), *_links(report, spare))
    ]


def _of_hosts(report: Report) -> list[Finding]:
    found: list[Finding] = []
    for host in report.hosts:
        if host.facts is None:
            to_do = "see that it runs and that ssh reaches it without a password"
            found.append(Finding(FAULT, host.name, f"no answer ({host.silent})", to_do))
            continue
        for check in CHECKS:
            found += check(host, host.facts, report)
    return found


# ---- one host ------------------------------------------------------------------------------------
def _installed(host: HostReport, facts: Facts, report: Report) -> Found:
    words = [f"python {facts.python}", *(f"{n} {getattr(facts, n)}" for n in SAME)]
    words += [f"flowspec {facts.flowspec}"] if facts.flowspec else []
    words += [f"driver {facts.driver}"] if facts.driver else []
    if tuple(map(int, re.findall(r"\d+", facts.python)[:2])) < OLDEST:
        needed = ".".join(map(str, OLDEST))
        to_do = f"install {needed} or newer and name it as this host's `python`"
        yield Finding(FAULT, host.name, f"python {facts.python} is too old", to_do)
    for name in SAME:
        if getattr(facts, name) is None:
            to_do = "install what requirements.txt lists (on a Jetson: requirements_jetson.txt)"
            yield Finding(FAULT, host.name, f"{name} is not installed", to_do)
            return
    if facts.broken:
        to_do = "install the wheel that is made for this Python and CUDA"
        yield Finding(
            FAULT, host.name, f"torch {facts.torch} cannot be imported ({facts.broken})", to_do
        )
        return
    skew = _skew(host, facts, report.meeting)
    yield from skew or [Finding(OK, host.name, ", ".join(words))]


def _skew(host: HostReport, facts: Facts, first: HostReport) -> list[Finding]:
    """Return how the versions differ from those of rank 0's host."""
    if first.facts is None:
        return []
    found = []
    for name in SAME:
        mine, theirs = getattr(facts, name), getattr(first.facts, name)
        # the local part of a version (after "+") names a wheel's CUDA, which may differ
        if mine and theirs and mine.partition("+")[0] != theirs.partition("+")[0]:
            what = f"{name} {mine}, and {first.name} has {theirs}"
            to_do = "install the same version on all hosts, the ranks refuse each other else"
            found.append(Finding(FAULT, host.name, what, to_do))
    if first.facts.flowspec and facts.flowspec not in (None, first.facts.flowspec):
        what = f"flowspec {facts.flowspec}, and {first.name} has {first.facts.flowspec}"
        to_do = "run_cluster.sh brings its own; with another launcher install the same one"
        found.append(Finding(WARNING, host.name, what, to_do))
    if facts.driver and facts.driver != (first.facts.driver or facts.driver):
        what = f"driver {facts.driver}, and {first.name} has {first.facts.driver}"
        to_do = "nothing, unless their results differ by more than rounding"
        found.append(Finding(WARNING, host.name, what, to_do))
    return found


def interface_of(host: HostReport) -> str | None:
    """Return the interface that a host's ranks are to use (GLOO_SOCKET_IFNAME): that which has its
    address; None if there is none, or if it is not the one that the cluster file names."""
    if host.facts is None:
        return None
    having = [each.name for each in host.facts.interfaces if each.address == host.address]
    if host.interface:
        return host.interface if host.interface in having else None
    return having[0] if having else None


def _network(host: HostReport, facts: Facts, report: Report) -> Found:
    """Say which interface the traffic uses.

    gloo, unless it is told, listens where the host's own name leads, which is often 127.0.1.1: then
    no other host reaches it."""
    several = len(report.hosts) > 1
    lost = bool(facts.own_addresses) and all(map(_is_loopback, facts.own_addresses))
    lost = lost or not facts.own_addresses
    if report.port is None:
        yield from _alone(host, facts, lost)
        return
    shown = ", ".join(f"{each.name} {each.address}" for each in facts.interfaces) or "none"
    chosen = interface_of(host)
    if several and _is_loopback(host.address):
        what = f"its address {host.address} is the loopback, which no other host reaches"
        to_do = f"write an address of the cluster's network as `address` (it has {shown})"
        yield Finding(FAULT, host.name, what, to_do)
    elif chosen is None and facts.interfaces:
        named = f"interface {host.interface}" if host.interface else "no interface"
        what = f"{named} has {'not ' if host.interface else ''}the address {host.address}"
        to_do = f"correct `address` or `interface` in the cluster file (it has {shown})"
        yield Finding(FAULT, host.name, what, to_do)
    else:
        name = f"its name {facts.hostname} leads to {', '.join(facts.own_addresses) or 'nothing'}"
        trap = f"; {name}, so it must be told" if several and lost else ""
        what = f"interface {chosen} has {host.address}: GLOO_SOCKET_IFNAME={chosen}{trap}"
        yield Finding(OK, host.name, what)
    yield from _names(host, facts) if several else ()
    if facts.gloo_interface and facts.gloo_interface != chosen:
        what = f"its logins set GLOO_SOCKET_IFNAME={facts.gloo_interface}"
        yield Finding(WARNING, host.name, what, "the launcher sets another, take it out there")
    if facts.port and facts.port != "free":
        to_do = "end what listens there, or set another `port`"
        yield Finding(FAULT, host.name, f"port {report.port} is not free ({facts.port})", to_do)


def _names(host: HostReport, facts: Facts) -> Found:
    """Say which names lead astray here: a host's own, by which its interface is found, and that
    of the host where the ranks meet."""
    for known in facts.resolved:
        found = not all(map(_is_loopback, known.addresses))
        if found or (known.name == host.called and host.interface):
            continue
        leads = f"leads to {known.addresses[0]}" if known.addresses else "is not known"
        to_do = "write the address in digits in the cluster file, or mend /etc/hosts there"
        yield Finding(FAULT, host.name, f"the name {known.name} {leads} there", to_do)


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address == "::1"


def _alone(host: HostReport, facts: Facts, lost: bool) -> Found:
    """Say which interface would do for a run over several machines."""
    outward: dict[str, list[str]] = {}
    for each in facts.interfaces:
        if not each.loopback:
            outward.setdefault(each.name, []).append(each.address)
    if not outward:
        yield Finding(OK, host.name, "no network but the loopback: runs are of this machine alone")
        return
    named = " or ".join(f"{name} ({', '.join(own)})" for name, own in outward.items())
    if not lost:
        yield Finding(OK, host.name, f"for several machines: GLOO_SOCKET_IFNAME={named}")
        return
    leads = ", ".join(facts.own_addresses) or "nowhere"
    what = f"its name {facts.hostname} leads to {leads}, where no other machine reaches it"
    to_do = f"in runs over several machines set GLOO_SOCKET_IFNAME={named}"
    yield Finding(WARNING, host.name, what, to_do)


def _torch(host: HostReport, facts: Facts, report: Report) -> Found:
    if facts.torch is None or facts.broken:
        return
    if not facts.gloo:
        to_do = "install a wheel of torch with torch.distributed and gloo"
        yield Finding(FAULT, host.name, "torch has no gloo, by which ranks speak", to_do)
    wants = [(rank, device) for rank, device in _devices(report, host) if device != "cpu"]
    if wants and not facts.gpus:
        why = "built for the CPU alone" if facts.cuda is None else f"built for CUDA {facts.cuda}"
        what = "rank {} computes on {}, and torch sees no GPU".format(*wants[0])
        to_do = f"set device: cpu, or install driver and wheel that fit (torch is {why})"
        yield Finding(FAULT, host.name, what, to_do)
    elif facts.gpus and not facts.nccl:
        what = "torch has no NCCL (wheels for Jetson often lack it), so gloo is used"
        to_do = "nothing, unless ranks share a stage (tensor parallelism): that is slower by gloo"
        yield Finding(WARNING, host.name, what, to_do)
    elif facts.gpus:
        cards = ", ".join(gpu.name for gpu in facts.gpus)
        yield Finding(OK, host.name, f"gloo and NCCL, {cards} (CUDA {facts.cuda})")
    elif facts.gloo:
        yield Finding(OK, host.name, "gloo; no GPU" + ("" if facts.nccl else ", no NCCL"))


def _devices(report: Report, host: HostReport) -> Iterator[tuple[int, str]]:
    """Return what each rank of a host computes on, or would on a spare one."""
    if host.spare:
        return zip(host.spare, host.devices, strict=False)
    return ((rank, report.devices[rank]) for rank in host.ranks if rank < len(report.devices))


def _memory(host: HostReport, facts: Facts, report: Report) -> Found:
    shared = facts.memory_is_shared
    memory = host.needs.memory + (host.needs.gpu if shared else 0)
    yield from _room(host, "memory", memory, facts.memory_free)
    if host.needs.gpu and facts.gpus and not shared:
        free = sum(gpu.free for gpu in facts.gpus)
        yield from _room(host, "memory of its GPUs", host.needs.gpu, free)


def _room(host: HostReport, what: str, needed: int, free: int | None) -> Found:
    if free is None:
        return
    if not needed:
        yield Finding(OK, host.name, f"{_size(free)} of {what} are free")
        return
    own = host.ranks or host.spare
    ranks = f"rank{'s' if len(own) > 1 else ''} {', '.join(map(str, own))}"
    aim = f"to take {ranks} (spare)" if host.spare else f"for {ranks}"
    words = f"{_size(needed)} of {what} {aim}, {_size(free)} are free"
    fewer = "fewer layers here (split_models.py --layers), a smaller dtype, or end other programs"
    if needed > free:
        yield Finding(FAULT, host.name, f"needs {words}", fewer)
    elif needed > TIGHT * free:
        yield Finding(WARNING, host.name, f"needs {words}, which is tight", fewer)
    else:
        yield Finding(OK, host.name, f"needs {words}")


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _disk(host: HostReport, facts: Facts, report: Report) -> Found:
    sizes = {name: size for name, size, _ in host.files}
    missing = sum(sizes.get(name, 0) for name in (*facts.missing, *facts.other))
    words = f"{_size(facts.disk_free)} of disk are free in {facts.folder}"
    if not facts.writable and (missing or not host.files):
        to_do = "give the user the right to, or set another `folder`"
        yield Finding(FAULT, host.name, f"{facts.folder} cannot be written", to_do)
    elif missing > facts.disk_free:
        what = f"{words}, and {_size(missing)} are to be copied"
        yield Finding(FAULT, host.name, what, "make room, or set another `folder`")
    else:
        yield Finding(OK, host.name, words)


def _files(host: HostReport, facts: Facts, report: Report) -> Found:
    if not host.files:
        return
    if facts.other:
        what = f"{facts.other[0]} is of another split, or damaged ({len(facts.other)} such files)"
        to_do = "run_cluster.sh brings this split's; with another launcher copy them again"
        yield Finding(WARNING, host.name, what, to_do)
    elif facts.missing:
        what = f"{len(facts.missing)} of {len(host.files)} files are to be copied"
        yield Finding(OK, host.name, what)
    else:
        yield Finding(OK, host.name, f"its {len(host.files)} files are there, unchanged")


def _threads(host: HostReport, facts: Facts, report: Report) -> Found:
    ranks = max(1, len(host.ranks or host.spare))
    own = report.threads_on(host)
    fine = True
    if facts.omp_num_threads == "1" and facts.cores > 1:
        fine = False
        what = f"OMP_NUM_THREADS=1 with {facts.cores} cores"
        to_do = (
            f"take it out of the host's environment; ranks set their own threads ({own} each), "
            "what else computes there has one"
        )
        yield Finding(WARNING, host.name, what, to_do)
    if facts.usable_cores < own * ranks:
        fine = False
        fit = max(1, int(facts.usable_cores / ranks))
        what = f"{facts.usable_cores:g} of {facts.cores} cores may be used (a container, taskset)"
        yield Finding(WARNING, host.name, what, f"set threads: {fit}, a rank would take {own}")
    if facts.load > facts.cores / 2:
        fine = False
        what = f"in the last minute {facts.load:.1f} programs computed on its {facts.cores} cores"
        to_do = "end them, they slow down the ranks and what is measured here"
        yield Finding(WARNING, host.name, what, to_do)
    if fine:
        each = f"{own} thread{'s' if own > 1 else ''}" + (" a rank" if ranks > 1 else "")
        yield Finding(OK, host.name, f"{facts.cores} cores, {each}")


def _clock(host: HostReport, facts: Facts, report: Report) -> Found:
    if host.clock is None or report.port is None:
        return
    ahead, within = host.clock.ahead_ms, host.clock.within_ms
    words = f"its clock is {abs(ahead):.0f} ms {'ahead' if ahead > 0 else 'behind'}"
    words += f" (within {within:.0f} ms)"
    if abs(ahead) - within > APART_MS:
        to_do = "timedatectl set-ntp true; a run needs no clock, but logs of hosts do not line up"
        yield Finding(WARNING, host.name, words, to_do)
    else:
        yield Finding(OK, host.name, words)


def _speed(host: HostReport, facts: Facts, report: Report) -> Found:
    """Say per device and dtype how many weights are read (one row) and multiplied (many rows)."""
    found: dict[tuple[str, str], list[str]] = {}
    for speed in host.speeds:
        rate = f"{speed.rows * speed.weights / max(speed.seconds, 1e-9) / 1e9:.1f}"
        one = f"{speed.dtype} {rate} G weights/s"
        words = found.setdefault((speed.device, speed.by), [])
        words.append(one if speed.rows == 1 else f"{rate} at {speed.rows} rows")
    for (device, by), words in found.items():
        threads = host.speeds[0].threads
        on = f"{device}, {threads} threads" if device == "cpu" else device
        yield Finding(OK, host.name, f"matrix products ({on}, {by}): {', '.join(words)}")


CHECKS: tuple[Callable[[HostReport, Facts, Report], Found], ...] = (
    *(_installed, _torch, _network, _memory, _disk, _files, _threads, _clock, _speed),
)


# ---- between hosts -------------------------------------------------------------------------------
def _doors(report: Report) -> Found:
    meeting, address = report.meeting.name, report.meeting.address
    shut = [door for door in report.doors if door.error]
    for door in shut:
        what = f"does not reach port {report.port} of {meeting} ({address}): {door.error}"
        to_do = f"open it in {meeting}'s firewall for the other hosts, or set another `port`"
        yield Finding(FAULT, door.source, what, to_do)
    if report.doors and not shut:
        yield Finding(OK, meeting, f"port {report.port} is reached by all other hosts")


def _links(report: Report, spare: set[str]) -> Found:
    for link in report.links:
        if link.error:
            state = WARNING if link.target in spare else FAULT
            what = f"does not reach a free port of {link.target}: {link.error}"
            to_do = f"open {EPHEMERAL} there to the other hosts, for gloo takes its ports of these"
            yield Finding(state, link.source, what, to_do)
    measured = [link for link in report.links if link.error is None]
    if not measured:
        return
    way, rate = (statistics.median(each) for each in zip(*map(_speed_of, measured), strict=True))
    for link in measured:
        ms, mbps = _speed_of(link)
        if ms > SLOW * max(way, QUICK_MS) or mbps * SLOW < rate:
            what = f"its link to {link.target} is slow: {ms:.2f} ms, {mbps:.0f} Mbps"
            to_do = f"the middle link has {way:.2f} ms and {rate:.0f} Mbps: try a cable, not Wi-Fi"
            yield Finding(WARNING, link.source, what, to_do)
    what = f"{len(measured)} of {len(report.links)} links between hosts work; the middle one has"
    yield Finding(OK, EVERY, f"{what} {way:.2f} ms one way, {rate:.0f} Mbps")


def _speed_of(link: Link) -> tuple[float, float]:
    """Return the milliseconds and the Mbps of a link that was measured."""
    return link.ms or 0.0, link.mbps or 0.0
