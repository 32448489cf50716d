"""This starts a run on all hosts of a cluster, shows what it says, and ends it everywhere.

Each rank is started by its host's agent with the variables that torchrun would set, and not by a
torchrun a host: so any host may hold any ranks, the end of each is told with its signal, and a host
holds no second Python for each rank."""

from __future__ import annotations

import base64
import json
import os
import queue
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowspec.cluster import shipping, ssh
from flowspec.cluster.hosts import Cluster, Host
from flowspec.cluster.shipping import CODE, RUN, Parcel
from flowspec.cluster.ssh import Session
from flowspec.config import Config
from flowspec.core.topology import Topology
from flowspec.errors import RankLost, UserError
from flowspec.files import replacing
from flowspec.journal import JOURNAL
from flowspec.launcher import LOST, ended, say
from flowspec.models.manifest import Manifest
from flowspec.secret import secret_for_run

PASSED_ON = ("FLOWSPEC_HEARTBEAT", "FLOWSPEC_CONNECT")
"""These variables of the launcher's environment are the ranks' as well."""
LEAVE = 10.0
"""Once rank 0 is done, the others leave within so many seconds, or are ended."""
SPARE, RETURN = 10.0, 60.0
"""A host that was lost has so many seconds to be reached again: the first, if a spare host can take
its place, else the second."""
KEPT = "journal"
"""Rank 0 keeps its journal in this file of its host's folder, if the run may be started again."""
END = 5.0
"""A host has so many seconds to tell that its ranks have ended."""


@dataclass(frozen=True)
class Job:
    """A job is what is to be run on a cluster."""

    command: str
    """This sub-command of flowspec takes the words."""
    cluster: Cluster
    config: Config
    """It is without the devices that hosts name."""
    words: tuple[str, ...]
    """All ranks take these words of the command line, beside the configuration."""
    first: tuple[str, ...]
    """Rank 0 takes these too."""
    files: tuple[Parcel, ...]
    """Rank 0's host gets these besides its ranks' files."""
    results: Mapping[str, Path]
    """These files of rank 0's host come here in the end."""
    talks: bool
    """What is typed here goes to rank 0."""
    restart: int
    """If a rank or a host is lost, all ranks are started again at most so many times."""

    @property
    def placed(self) -> Config:
        """Return the configuration that the ranks have."""
        return self.cluster.placed(self.config)

    def argv(self, rank: int) -> list[str]:
        """Return the words behind the python of a rank."""
        own = self.first if rank == Topology.COORDINATOR else ()
        return ["-m", "flowspec", self.command, RUN, *self.words, *own]

    def environment(self, rank: int) -> dict[str, str]:
        """Return the variables of a rank; its host adds those that only it knows."""
        cluster, host = self.cluster, self.cluster.host_of(rank)
        here = host.ranks
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(cluster.ranks)),
            "LOCAL_RANK": str(here.index(rank)),
            "LOCAL_WORLD_SIZE": str(len(here)),
            "MASTER_ADDR": cluster.host_of(Topology.COORDINATOR).address,
            "MASTER_PORT": str(cluster.port),
            "FLOWSPEC_HOST": host.name,
            # as torchrun would do; the engine sets each rank's threads
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            **{name: os.environ[name] for name in PASSED_ON if name in os.environ},
            **({JOURNAL: KEPT} if rank == Topology.COORDINATOR and self.restart else {}),
        }

    def parcels(self, host: Host, shared: list[Parcel], manifest: Manifest) -> list[Parcel]:
        """Return all files that a host needs; `shared` are those of every host."""
        own = self.files if Topology.COORDINATOR in host.ranks else ()
        return [*shared, *own, *shipping.weights(self.placed, manifest, host.ranks)]


def describe(job: Job, manifest: Manifest | None) -> Iterator[str]:
    """Return the lines that say what would be done on each host, without contacting any.

    Without a manifest, which files a host would get is left open."""
    shared = [*shipping.code(), shipping.run_file(job.placed)]
    for host in job.cluster.holding:
        ranks = ", ".join(map(str, host.ranks))
        yield f"{host.shown}, rank{'s' if len(host.ranks) > 1 else ''} {ranks}"
        yield f"  {shlex.join(ssh.command(job.cluster, host))}"
        if manifest is None:
            yield f"  to {host.folder}: the code, {RUN}, and the ranks' files (not split yet)"
        else:
            parcels = job.parcels(host, shared, manifest)
            size = sum(parcel.size for parcel in parcels) / 1e6
            yield f"  to {host.folder}: {len(parcels)} files, {size:.1f} MB, what it lacks of them"
        for rank in host.ranks:
            own = {"GLOO_SOCKET_IFNAME": host.interface or f"<interface of {host.address}>"}
            env = {**job.environment(rank), **own, "PYTHONPATH": CODE}
            told = [f"{name}={shlex.quote(value)}" for name, value in env.items()]
            yield f"  in {host.folder}: {' '.join(told)} {host.python} {shlex.join(job.argv(rank))}"
    for host in job.cluster.spares:
        yield f"{host.shown}, spare"
        yield f"  {shlex.join(ssh.command(job.cluster, host))}"
        yield f"  nothing, unless it takes the place of a host that is away for {SPARE:g} s"


def run(job: Job, manifest: Manifest) -> int:
    """Run a job and return its exit code; nothing of it is left on any host.

    After a loss all ranks are started again, as often as the job says, and go on with what rank 0
    has noted in its journal, which is kept here as it grows. Raise UserError if a host cannot take
    part, and RankLost if one is lost before the run, or stays away after a loss."""
    journal = bytearray()
    try:
        code = _once(job, manifest, journal)
        for turn in range(1, job.restart + 1):
            if code != LOST:
                break
            _say(f"started again ({turn} of {job.restart})")
            job, code = _again(job, manifest, journal)
    except _Away as away:
        raise away.error from None
    return code


class _Away(Exception):
    """A host cannot take part: it is not reached, or it refuses."""

    def __init__(self, host: Host, error: UserError | RankLost):
        self.host, self.error = host, error


def _again(job: Job, manifest: Manifest, journal: bytearray) -> tuple[Job, int]:
    """Run a job once more, as soon as all hosts can be reached; return its exit code, and the job
    as it was run, in which spare hosts may have taken the places of others.

    Raise RankLost if a host stays away and there is no spare one."""
    begun = time.monotonic()
    while True:
        try:
            return job, _once(job, manifest, journal)
        except _Away as away:
            waited, spares = time.monotonic() - begun, job.cluster.spares
            if spares and waited > SPARE:
                _say(f"{away.error}: spare {spares[0].shown} takes its place")
                job = replace(job, cluster=job.cluster.instead(away.host, spares[0]))
            elif waited > RETURN:
                raise RankLost(str(away.error)) from None
            else:
                time.sleep(1.0)


def _say(line: str) -> None:
    print(f"flowspec: {line}", file=sys.stderr, flush=True)


def _once(job: Job, manifest: Manifest, journal: bytearray) -> int:
    """Run a job with what is in the journal, which grows by what rank 0 notes.

    Raise _Away if a host cannot take part."""
    if job.restart:
        del journal[journal.rfind(b"\n") + 1 :]  # the connection may have been cut in a line
        kept = shipping.of_text(KEPT, journal.decode())
        job = replace(job, files=(*job.files, kept))
    shared = [*shipping.code(), shipping.run_file(job.placed)]
    parcels = {host.name: job.parcels(host, shared, manifest) for host in job.cluster.holding}
    with _sessions(job.cluster) as sessions:
        _together(_greet, sessions)
        _together(lambda each: shipping.copy(each, parcels[each.host.name]), sessions)
        code = _Run(job, manifest.topology, sessions, journal).follow()
        if code == 0:
            first = next(each for each in sessions if Topology.COORDINATOR in each.host.ranks)
            for name, path in job.results.items():
                _fetch(first, name, path)
        return code


@contextmanager
def _sessions(cluster: Cluster) -> Iterator[list[Session]]:
    """Yield a session for each host with ranks; whatever happens, all of them are ended."""
    sessions: list[Session] = []
    try:
        for host in cluster.holding:
            sessions.append(Session(cluster, host))
        yield sessions
    finally:
        for session in sessions:
            session.end()
        deadline = time.monotonic() + END
        for session in sessions:
            session.close(max(0.0, deadline - time.monotonic()))


def _together(work: Callable[[Session], None], sessions: Iterable[Session]) -> None:
    """Do the work for all sessions at a time; raise what is raised first, as _Away if that is what
    a host says.

    No thread is waited for then: what it waits for ends with its session."""
    outcomes: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def one(session: Session) -> None:
        try:
            work(session)
            outcomes.put(None)
        except (UserError, RankLost) as error:
            outcomes.put(_Away(session.host, error))
        except BaseException as error:
            outcomes.put(error)

    threads = [threading.Thread(target=one, args=(each,), daemon=True) for each in sessions]
    for thread in threads:
        thread.start()
    for _ in threads:
        if error := outcomes.get():
            raise error


def _greet(session: Session) -> None:
    host = session.host
    session.ask(
        "hello",
        folder=host.folder,
        python=host.python,
        interface=host.interface,
        address=host.address,
    )


def _fetch(session: Session, name: str, path: Path) -> None:
    """Copy a file of a host to here."""
    session.lead_into(queue.SimpleQueue())
    session.send("fetch", name=name)
    with replacing(path) as beside, open(beside, "wb") as file:
        while (event := session.answer())["event"] != "fetched":
            if event["event"] == "piece":
                file.write(base64.b64decode(event["data"]))
    print(f"{path} is here, from {session.host.shown}", file=sys.stderr)


# ---- while it runs -------------------------------------------------------------------------------
class _Run:
    """The ranks from their start to the end of the last one."""

    def __init__(self, job: Job, topology: Topology, sessions: list[Session], journal: bytearray):
        self._job, self._topology, self._journal = job, topology, journal
        self._sessions = {rank: each for each in sessions for rank in each.host.ranks}
        self._running = set(self._sessions)
        self._events: queue.SimpleQueue[tuple[Session, dict[str, Any]]] = queue.SimpleQueue()
        self._screen = _Screen(topology, {r: each.host.name for r, each in self._sessions.items()})
        for session in sessions:
            session.lead_into(self._events)

    def follow(self) -> int:
        """Start the ranks, show what they say, and return the exit code of the run."""
        self._start()
        deadline: float | None = None
        while self._running:
            left = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                session, event = self._events.get(timeout=left)
            except queue.Empty:
                break
            code = self._handle(session, event)
            if code is not None:
                return code
            if Topology.COORDINATOR not in self._running and deadline is None:
                deadline = time.monotonic() + LEAVE
        return 0

    def _start(self) -> None:
        job, secret = self._job, secret_for_run()
        for rank, session in self._sessions.items():
            talks = job.talks and rank == Topology.COORDINATOR
            env, argv = job.environment(rank), job.argv(rank)
            about: dict[str, Any] = {"rank": rank, "code": CODE, "talks": talks}
            about["notes"] = env.get(JOURNAL)
            # the secret goes beside the environment, which a dry run shows
            session.send("start", argv=argv, env=env, secret=secret, **about)
        if job.talks:
            threading.Thread(target=self._type, daemon=True).start()

    def _type(self) -> None:
        session = self._sessions[Topology.COORDINATOR]
        # not through sys.stdin, whose lock a thread must not hold when Python ends
        while data := os.read(0, 1 << 16):
            session.send("type", rank=Topology.COORDINATOR, typed=base64.b64encode(data).decode())
        session.send("type", rank=Topology.COORDINATOR, typed=None)

    def _handle(self, session: Session, event: dict[str, Any]) -> int | None:
        """Do what an event asks for; return the exit code if it ends the run."""
        kind = event["event"]
        if kind == "said":
            self._screen.show(event["rank"], event["stream"], base64.b64decode(event["data"]))
        elif kind == "noted":
            self._journal += base64.b64decode(event["data"])
        elif kind == "ended":
            return self._ended(event["rank"], event["code"], event["words"])
        elif kind == "refused":
            raise _Away(session.host, UserError(f"{session.host.shown}: {event['why']}"))
        elif kind == "closed":
            return self._closed(session)
        return None

    def _ended(self, rank: int, code: int, words: str) -> int | None:
        self._running.discard(rank)
        self._screen.end(rank)
        if not self._matters(rank) or code == 0:
            return None
        with suppress(ValueError, KeyError, TypeError):  # it left no words, or half of them
            said = json.loads(words)
            return say(said["line"], said["code"])
        name = self._topology.name(rank, self._sessions[rank].host.name)
        return say(f"{name} died: {ended(code)}", LOST)

    def _closed(self, session: Session) -> int | None:
        lost = self._running & set(session.host.ranks)
        self._running -= lost
        if not any(self._matters(rank) for rank in lost):
            return None
        names = ", ".join(f"rank {r} ({self._topology.title(r)})" for r in sorted(lost))
        return say(f"{session.loss()}, and with it {names}", LOST)

    def _matters(self, rank: int) -> bool:
        """Return whether the run ends with this rank: rank 0 is at it, and cannot do without."""
        working = Topology.COORDINATOR in self._running or rank == Topology.COORDINATOR
        return working and not self._topology.spare(rank)


class _Screen:
    """What rank 0 says is shown as it is; each line of the others begins with who says it."""

    def __init__(self, topology: Topology, hosts: Mapping[int, str]):
        self._rests: dict[tuple[int, str], bytes] = {}
        self._places = {
            rank: f"rank{rank}/{topology.title(rank).replace(' ', '')}" for rank in hosts
        }
        self._hosts = hosts

    def show(self, rank: int, stream: str, data: bytes) -> None:
        if rank == Topology.COORDINATOR:
            _write(stream, data)
            return
        *lines, rest = (self._rests.pop((rank, stream), b"") + data).split(b"\n")
        self._rests[rank, stream] = rest
        for line in lines:
            _write(stream, self._named(rank, line))

    def end(self, rank: int) -> None:
        """Show the lines of a rank that were never ended."""
        for stream in ("out", "err"):
            if rest := self._rests.pop((rank, stream), b""):
                _write(stream, self._named(rank, rest))

    def _named(self, rank: int, line: bytes) -> bytes:
        place = self._places[rank]
        own = f"[{place}] ".encode()  # as logging begins its lines
        return f"[{place} {self._hosts[rank]}] ".encode() + line.removeprefix(own) + b"\n"


def _write(stream: str, data: bytes) -> None:
    to = (sys.stdout if stream == "out" else sys.stderr).buffer
    to.write(data)
    to.flush()
