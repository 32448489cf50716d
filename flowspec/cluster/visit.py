"""The doctor's visit: what hosts say is gathered over ssh, and the links between them are measured.

On each host one Python runs the source of facts.py, which comes over its standard input, and
answers until that ends. A host that does not answer, or not in time, is noted as silent."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import secrets
import select
import socket
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

from flowspec.cluster import facts
from flowspec.cluster.hosts import Cluster
from flowspec.cluster.needs import in_digits, wanted
from flowspec.cluster.report import Clock, Door, Facts, HostReport, Link, Report, Speed
from flowspec.cluster.shipping import CODE, PACKAGE
from flowspec.cluster.ssh import BOOT, command
from flowspec.errors import UserError
from flowspec.files import ROOT
from flowspec.schema import build

INTO = f"""
import json, os, shutil
folder, named = map(os.path.expanduser, json.loads(r.readline()))
python = shutil.which(os.path.join(folder, named) if os.sep in named else named)
told = dict() if python else dict(error="there is no program " + named)
os.write(1, ({facts.MARK!r} + json.dumps(told) + chr(10)).encode())
os.execv(python, [python, "-c", {BOOT!r}])
"""
"""This is the first one that it is sent: be the Python of the ranks, seen from a folder."""
HELLO, FACTS, SPEEDS, PATIENCE = 30.0, 600.0, 120.0, 3.0
"""So many seconds a host has to answer at all, to tell its facts (it may have to read large files
for their hashes), to measure its speed, and to be reached by another."""
STREAM = 0.5
"""Each link carries a stream for so many seconds."""
CLOCKS = 8
LATE = "it did not answer in time"
LONGEST = 1 << 20
"""An answer has no more bytes."""


class Silent(Exception):
    """A host does not answer; the words say what is known of the reason."""


class Refused(Exception):
    """A host answers that it could not do what it was asked; the words say why."""


class Visit:
    """A visit is a conversation with the Python of a host."""

    def __init__(self, argv: Sequence[str]):
        """Start `argv`, which runs BOOT here or, by ssh, elsewhere. Raise Silent if it cannot be
        started."""
        self._late, self._heard = False, b""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115
        try:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                start_new_session=True,  # Ctrl-C is for us, who then end it in order
            )
        except OSError as error:
            raise Silent(f"cannot run {argv[0]}: {error.strerror}") from None

    def lead_to(self, folder: str, python: str) -> None:
        """Speak with this Python, seen from this folder, from now on; raise Refused or Silent."""
        self._send(INTO.encode())
        self._tell(json.dumps([folder, python]) + "\n")
        self._agreed(time.monotonic() + HELLO)
        self._send(Path(facts.__file__).read_bytes())

    def ask(self, do: str, within: float, /, **about: Any) -> dict:
        """Return the answer to a request (a method of facts.Agent), within so many seconds.

        Raise Refused or Silent."""
        if self._late:  # what comes now may be an answer to what was asked before
            raise Silent(LATE)
        self._tell(json.dumps({"do": do, **about}) + "\n")
        return self._agreed(time.monotonic() + within)

    def tried(self, do: str, within: float, /, **about: Any) -> tuple[dict | None, str | None]:
        """Return the answer to a request, or why there is none."""
        try:
            return self.ask(do, within, **about), None
        except (Refused, Silent) as error:
            return None, str(error)

    def _agreed(self, until: float) -> dict:
        answer = self._answer(until)
        if "error" in answer:
            raise Refused(str(answer["error"])[:300])
        return answer

    def _send(self, program: bytes) -> None:
        self._tell(f"{len(program)}\n{program.decode()}")

    def _tell(self, text: str) -> None:
        assert self._process.stdin
        with contextlib.suppress(
            OSError, ValueError
        ):  # its end is noticed where the answer is awaited
            self._process.stdin.write(text.encode())
            self._process.stdin.flush()

    def _answer(self, until: float) -> dict:
        while True:
            line, mark, rest = self._heard.partition(b"\n")
            if not mark:
                self._hear(until)
                continue
            self._heard = rest
            if line.startswith(facts.MARK.encode()):
                return self._read(line[len(facts.MARK) :])

    @staticmethod
    def _read(line: bytes) -> dict:
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise Silent("its answer is no JSON object")
        return answer

    def _hear(self, until: float) -> None:
        """Wait for more of the answer; raise Silent if none comes."""
        stdout, left = self._process.stdout, until - time.monotonic()
        assert stdout
        try:
            if left <= 0 or not select.select([stdout], [], [], left)[0]:
                self._late = True
                raise Silent(LATE)
            piece = os.read(stdout.fileno(), 1 << 16)
        except (OSError, ValueError):  # it was closed by another thread: the doctor leaves
            raise Silent("the visit is over") from None
        if not piece:
            raise Silent(self._last_words())
        self._heard += piece
        if len(self._heard) > LONGEST:
            raise Silent("its answer is too long")

    def _last_words(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        self._said.seek(0)
        lines = self._said.read(LONGEST).decode("utf-8", "replace").split("\n")
        said = [line.strip() for line in lines if line.strip()]
        return said[-1][:300] if said else f"exit code {self._process.returncode}"

    def close(self) -> None:
        """End the conversation, and with it what runs on the host."""
        process = self._process
        for pipe in (process.stdin, process.stdout):
            assert pipe
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            process.wait(0 if self._late else 1)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._said.close()


@dataclass(frozen=True)
class Site:
    """A site is a host to visit."""

    host: HostReport
    """What is wanted of it; nothing that is found out is in it yet."""
    argv: tuple[str, ...]
    """This runs BOOT on it."""
    python: str
    """The ranks' Python, seen from `folder`."""
    folder: str
    """What is copied to the host lies there, or will."""
    code: str
    """flowspec lies there, seen from `folder`, or will."""
    names: tuple[str, ...] = ()
    """It must know these names of hosts."""
    port: int | None = None
    """The ranks will meet at this port of it."""


def sites_here() -> tuple[list[Site], Report]:
    """Return this machine as the one site, and the report on it that is to be filled."""
    host = HostReport(name=socket.gethostname(), address="")
    argv = (sys.executable, "-c", BOOT)
    return [Site(host, argv, sys.executable, str(ROOT), ".")], Report(hosts=(host,))


def sites_of(cluster: Cluster) -> tuple[list[Site], Report]:
    """Return the hosts of a cluster file, and the report on them that is to be filled.

    Raise UserError if they do not fit the run."""
    needed, meets = wanted(cluster), cluster.host_of(0)
    named = {host.address for host in cluster.hosts if in_digits(host.address) != host.address}
    sites = [
        Site(
            told,
            tuple(command(cluster, host)),
            host.python,
            host.folder,
            CODE,
            tuple(named & {host.address, meets.address}),
            cluster.port if host is meets else None,
        )
        for host, told in zip(cluster.hosts, needed.hosts, strict=True)
    ]
    return sites, Report(port=cluster.port, **needed._asdict())


def examine(sites: Sequence[Site], report: Report, timed: bool = True) -> Report:
    """Visit all sites, and return the report with what was found out.

    Speeds and links are measured if it is to be `timed`."""
    with ThreadPoolExecutor(len(sites)) as pool, contextlib.ExitStack() as ends:
        visits: dict[str, Visit] = {}

        def enter(site: Site) -> HostReport:
            try:
                visit = Visit(site.argv)
                ends.callback(visit.close)
                visit.lead_to(site.folder, site.python)
                told = _asked(visit, site)
            except (Silent, Refused) as error:
                return replace(site.host, silent=str(error))
            visits[site.host.name] = visit
            return told

        found = replace(report, hosts=tuple(pool.map(enter, sites)))
        found = replace(found, doors=_knocked(found, visits, pool))
        if timed:
            hosts = tuple(pool.map(lambda host: _timed(host, found, visits), found.hosts))
            found = replace(found, hosts=hosts, links=_measured(found, visits))
        return found


def _asked(visit: Visit, site: Site) -> HostReport:
    clock = _clock(visit)
    told = visit.ask(
        "facts",
        FACTS,
        folder=site.folder,
        code=site.code,
        wanted=site.host.files,
        names=site.names,
        port=[site.host.address, site.port] if site.port else [],
    )
    try:
        return replace(site.host, facts=build(Facts, told), clock=clock)
    except UserError as error:
        raise Silent(f"what it says is not understood: {error}") from None


def _clock(visit: Visit) -> Clock:
    """Return how far the host's clock is ahead: of the middle of the quickest of some questions,
    which may be wrong by half of the time that it took."""
    asked = []
    for _ in range(CLOCKS):
        wall, begun = time.time(), time.perf_counter()
        told = _number(visit.ask("clock", HELLO), "time")
        took = time.perf_counter() - begun
        asked.append((took, told - (wall + took / 2)))
    took, ahead = min(asked)
    return Clock(ahead_ms=1e3 * ahead, within_ms=1e3 * took / 2)


def _number(answer: dict, name: str) -> float:
    """Return a number of an answer; raise Silent if there is none."""
    value = answer.get(name)
    if not isinstance(value, int | float):
        raise Silent(f"its answer has no {name}")
    return value


def _timed(host: HostReport, report: Report, visits: dict[str, Visit]) -> HostReport:
    if host.facts is None or host.name not in visits:
        return host
    visits[host.name].tried("lend", SPEEDS, code=_modules())
    told, _ = visits[host.name].tried("speeds", SPEEDS, threads=report.threads_on(host))
    listed = (told or {}).get("speeds")
    try:
        speeds = [build(Speed, each) for each in listed] if isinstance(listed, list) else []
    except UserError:  # what is no speed is none
        return host
    return replace(host, speeds=tuple(speeds))


@cache
def _modules() -> str:
    """Return flowspec's own modules as a zip file, in base64."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted(PACKAGE.rglob("*.py")):
            file.write(path, path.relative_to(PACKAGE.parent).as_posix())
    return base64.b64encode(packed.getvalue()).decode()


# ---- between hosts -------------------------------------------------------------------------------
def _knocked(
    report: Report, visits: dict[str, Visit], pool: ThreadPoolExecutor
) -> tuple[Door, ...]:
    """Return who reaches the port where the ranks meet, if it is free to be listened at."""
    meeting = report.meeting
    if meeting.facts is None or meeting.facts.port != "free":
        return ()
    visit, where = visits[meeting.name], {"address": meeting.address, "port": report.port}
    visit.tried("listen", HELLO, **where)
    others = [host.name for host in report.hosts if host is not meeting and host.name in visits]

    def knock(name: str) -> Door:
        _, error = visits[name].tried("knock", HELLO, seconds=PATIENCE, **where)
        return Door(source=name, error=error)

    doors = tuple(pool.map(knock, others))
    visit.tried("close", HELLO)
    return doors


def _measured(report: Report, visits: dict[str, Visit]) -> tuple[Link, ...]:
    """Return the links between all hosts that answer, measured one after the other.

    None leads to a host that cannot listen at its address: that is told of the host."""
    hosts = [host for host in report.hosts if host.name in visits]
    links = (_link(*pair, visits) for pair in permutations(hosts, 2))
    return tuple(link for link in links if link)


def _link(source: HostReport, target: HostReport, visits: dict[str, Visit]) -> Link | None:
    token, near, far = secrets.token_hex(16), visits[source.name], visits[target.name]
    opened, _ = far.tried("listen", HELLO, address=target.address, port=0)
    if opened is None:
        return None
    where = {"address": target.address, "port": opened.get("port"), "token": token}
    with ThreadPoolExecutor(1) as pool:
        counted = pool.submit(far.tried, "answer", HELLO, token=token, seconds=PATIENCE)
        sent, error = near.tried("stream", HELLO, **where, patience=PATIENCE, seconds=STREAM)
        got, deaf = counted.result()
    far.tried("close", HELLO)
    link = Link(source=source.name, target=target.name)
    if sent is None or got is None:
        return replace(link, error=error or deaf)
    try:
        steady, seconds = _number(got, "steady"), _number(got, "seconds")
        mbps = 8e-6 * steady / seconds if seconds else 0.0
        return replace(link, ms=_number(sent, "ms"), mbps=mbps)
    except Silent as wrong:
        return replace(link, error=str(wrong))
