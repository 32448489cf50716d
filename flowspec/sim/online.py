"""Online simulator: texts are written on the wall clock while forwards are waits.

Rank 0 is the real `Scheduler` with a real policy, and the minds of the target servers are real
`StageMachine`s; all are in this process. A forward of the target is a wait in a process of its own
(server.py), told and abandoned by messages; one of the drafter is a wait in a thread of its own. So
what is scheduled, sent and woken up takes real time, and nothing is computed: text and drafts are
known beforehand (KnownText and Guesser in world.py).

The first forward of a text, which reads the prompt, may have a latency of its own: the drafter's,
and on each server the one that it begins first, even if that is abandoned.
"""

from __future__ import annotations

import itertools
import os
import queue
import selectors
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from flowspec.core.decoding import Decoding
from flowspec.core.machine import (
    Arrived,
    Begin,
    Compute,
    Computed,
    Decided,
    End,
    Pass,
    StageEvent,
    StageMachine,
    Tell,
)
from flowspec.core.messages import (
    Action,
    Answered,
    Back,
    Batch,
    Decision,
    Draft,
    Event,
    Prunes,
    Read,
)
from flowspec.core.scheduler import Scheduler
from flowspec.core.topology import Topology
from flowspec.errors import RankLost
from flowspec.sim.world import Job, KnownText

SERVER = Path(__file__).with_name("server.py")
PATIENCE = 10.0
"""Who says nothing for so many seconds more than the longest forward takes is given up."""


class Latencies(NamedTuple):
    """These are the seconds that forwards take: the first of a text, and each later one."""

    first_target: float
    target: float
    first_drafter: float
    drafter: float


class Written(NamedTuple):
    """This is what writing a text came to."""

    tokens: list[int]
    seconds: float
    """From the request to the last token."""
    forwards: int
    """So many target forwards were begun on all servers together."""
    abandoned: int
    """So many of them were told to end early."""
    drafts: int
    """So many drafter forwards were begun."""


# ---- who waits -----------------------------------------------------------------------------------
class Process:
    """A process is a target server, seen from rank 0."""

    def __init__(self, number: int):
        self.title = f"target server {number}"
        self.names = itertools.count(1)
        """Forwards have these names, over all texts."""
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # Ctrl-C is for this process, and the pipe's end for that one
        )
        assert self._popen.stdin and self._popen.stdout
        self._in, self._out = self._popen.stdin, self._popen.stdout
        self._rest = b""

    @property
    def pid(self) -> int:
        return self._popen.pid

    def fileno(self) -> int:
        """Return what can be waited for until it has said something."""
        return self._out.fileno()

    def say(self, *words: object) -> None:
        try:
            self._in.write(b"%s\n" % " ".join(map(str, words)).encode())
        except BrokenPipeError:
            raise self._lost() from None

    def hear(self) -> list[list[str]]:
        """Return the words of each line that it has said; there is something to be read."""
        if not (data := os.read(self.fileno(), 4096)):
            raise self._lost()
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode().split() for line in lines]

    def _lost(self) -> RankLost:
        code = self._popen.wait(PATIENCE)
        how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return RankLost(f"{self.title} (process {self.pid}) {how}")

    def close(self) -> None:
        """End the process."""
        self._in.close()
        try:
            self._popen.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._out.close()


class Drafter:
    """The drafter's thread waits until one forward after the other is over."""

    title = "the drafter"

    def __init__(self) -> None:
        self._ends: queue.SimpleQueue[float | None] = queue.SimpleQueue()
        self._over, self._tell = os.pipe()
        self._thread = threading.Thread(target=self._run, name="drafter", daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        """Return what can be waited for until a forward is over."""
        return self._over

    def wait(self, end: float) -> None:
        """Begin a forward, which is over at this time of the monotonic clock (in seconds)."""
        self._ends.put(end)

    def hear(self) -> None:
        """Take in that the forward is over."""
        os.read(self._over, 1)

    def _run(self) -> None:
        while (end := self._ends.get()) is not None:
            with suppress(queue.Empty):
                self._ends.get(timeout=max(0.0, end - time.monotonic()))
                return  # it was closed meanwhile
            os.write(self._tell, b".")

    def close(self) -> None:
        self._ends.put(None)
        self._thread.join()
        os.close(self._over)
        os.close(self._tell)


@contextmanager
def online(servers: int, latencies: Latencies) -> Iterator[Online]:
    """Run so many target servers; they are gone when the block ends, however it ends."""
    with ExitStack() as stack:
        drafter = stack.enter_context(closing(Drafter()))
        processes = [stack.enter_context(closing(Process(1 + k))) for k in range(servers)]
        found = stack.enter_context(Online(drafter, processes, latencies))
        found.awaken()
        yield found


class Online:
    """Online writes texts, one after the other, with a drafter and target servers that wait."""

    def __init__(self, drafter: Drafter, processes: list[Process], latencies: Latencies):
        self.drafter, self.processes, self.latencies = drafter, processes, latencies
        self._selector = selectors.DefaultSelector()
        waited: list[Process | Drafter] = [drafter, *processes]
        for one in waited:
            self._selector.register(one, selectors.EVENT_READ)

    def __enter__(self) -> Online:
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()

    def awaken(self) -> None:
        """Wait until all servers have begun."""
        asleep = set(self.processes)
        while asleep:
            for process in self.heard(sorted(one.title for one in asleep)):
                assert isinstance(process, Process)
                process.hear()  # that it is ready
                asleep.remove(process)

    def heard(self, awaited: list[str]) -> list[Process | Drafter]:
        """Wait until there is news; return from whom. `awaited` is who can have some."""
        patience = max(self.latencies) + PATIENCE
        if not (ready := self._selector.select(patience)):
            raise RankLost(f"nothing was heard of {', '.join(awaited)} for {patience:.3g} s")
        return [key.fileobj for key, _ in ready]  # type: ignore[misc]

    def write(self, job: Job, servers: int) -> Written:
        """Write a text with the first `servers` servers, for which its policy is made."""
        return _Writing(self, job, servers).run()


# ---- one text ------------------------------------------------------------------------------------
@dataclass
class _Server:
    """This is a target server during one text."""

    number: int
    process: Process
    machine: StageMachine
    queue: deque[tuple[float, Batch]] = field(default_factory=deque)
    """Each entry holds when it was sent (in seconds), and what."""
    running: str | None = None
    """This is the name of the forward under way."""
    begun: float = 0.0
    ending: bool = False
    """The forward under way was told to end early."""
    fresh: bool = True
    """It has not begun any forward of the text."""


class _Writing:
    """This is a text on its way."""

    def __init__(self, online: Online, job: Job, servers: int):
        topology = Topology(1, servers=servers)
        self._online, self._job = online, job
        self._scheduler = Scheduler(topology)
        self._decoding = Decoding(
            job.request, job.policy, self._scheduler.learnt, job.guesser is not None
        )
        self._known = KnownText(job.text, servers)
        self._servers = {
            process: _Server(number, process, StageMachine(rank, topology))
            for number, (rank, process) in enumerate(
                zip(topology.stage_ranks, online.processes, strict=False)
            )
        }
        self._by_number = [*self._servers.values()]
        self._events: deque[Event] = deque()
        self._answer: Answered | None = None  # of the drafter's forward under way
        self._tokens: list[int] = []
        self._ended: float | None = None
        self._forwards = self._abandoned = self._drafts = 0

    def run(self) -> Written:
        request, switches = self._job.request, self._job.switches
        for server in self._by_number:
            server.machine.handle(Begin(request.id, switches.drop_dead, switches.abort))
        begun = time.monotonic()
        self._perform(self._scheduler.admit(self._decoding, begun))
        if self._decoding.drafts:
            self._events.append(Read(request.id))  # its first forward reads the prompt
        self._settle()
        while self._ended is None or self._awaited:
            for one in self._online.heard(self._awaited):
                if isinstance(one, Process):
                    self._replied(self._servers[one])
                else:
                    self._drafted(one)
                self._settle()
        assert self._ended is not None
        seconds = self._ended - begun
        return Written(self._tokens, seconds, self._forwards, self._abandoned, self._drafts)

    @property
    def _awaited(self) -> list[str]:
        """Return who has something under way."""
        busy = [one.title for one, server in self._servers.items() if server.running]
        return busy if self._answer is None else [*busy, self._online.drafter.title]

    # ---- rank 0 ----------------------------------------------------------------------------------
    def _settle(self) -> None:
        while self._events:
            event = self._events.popleft()
            self._perform(self._scheduler.handle(event, time.monotonic()))

    def _perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Batch):
                for _, segment in action.pieces:
                    self._known.sent(action.server, segment)
                server = self._by_number[action.server]
                server.queue.append((time.monotonic(), action))
                self._next(server)
            elif isinstance(action, Prunes):
                for request, prune in action.prunes:
                    self._tell(self._by_number[action.server], Decided(request, prune))
            elif isinstance(action, Decision):
                self._decide(action)
            else:
                assert isinstance(action, Draft), "these methods do not wait for a time"
                self._draft(action)

    def _decide(self, decision: Decision) -> None:
        self._tokens += decision.commit.tokens
        if decision.finish:
            self._ended = time.monotonic()
            for server in self._by_number:
                self._tell(server, End(decision.request))
        elif self._job.guesser:
            self._job.guesser.commit(decision.commit)

    def _draft(self, draft: Draft) -> None:
        latencies, guesser = self._online.latencies, self._job.guesser
        assert guesser is not None
        seconds = latencies.drafter if self._drafts else latencies.first_drafter
        self._drafts += 1
        self._online.drafter.wait(time.monotonic() + seconds)
        self._answer = Answered(tuple((request, guesser.propose(n)) for request, n in draft.asks))

    def _drafted(self, drafter: Drafter) -> None:
        drafter.hear()
        assert self._answer is not None
        self._events.append(self._answer)
        self._answer = None

    # ---- target servers --------------------------------------------------------------------------
    def _next(self, server: _Server) -> None:
        """Take what waits for a server, until there is a forward."""
        while server.queue and not server.running:
            sent, batch = server.queue.popleft()
            self._handled(server, Arrived(batch, time.monotonic() - sent, 0.0))

    def _tell(self, server: _Server, event: Decided | End) -> None:
        """Tell a server what was decided: its forward is abandoned if nobody waits for it now."""
        self._handled(server, event)
        if server.running and not server.ending and not server.machine.wanted():
            server.ending = True
            self._abandoned += 1
            server.process.say(server.running)

    def _replied(self, server: _Server) -> None:
        for name, how in server.process.hear():
            assert name == server.running
            server.running, server.ending = None, False
            self._handled(server, Computed(time.monotonic() - server.begun, how == "whole"))
        self._next(server)

    def _handled(self, server: _Server, event: StageEvent) -> None:
        """Perform what a server decides; what moves in its cache takes no time."""
        for action in server.machine.handle(event):
            if isinstance(action, Compute):
                self._compute(server)
            elif isinstance(action, Tell):
                self._events.append(action.event)
            elif isinstance(action, Pass):
                self._came_back(server, action.batch)

    def _came_back(self, server: _Server, batch: Batch) -> None:
        """Let rank 0 decide at once: it knows from here on that the server has nothing to do."""
        back = (
            self._known.returned(self._scheduler, server.number, piece) for piece in batch.pieces
        )
        self._perform(self._scheduler.handle(Back(tuple(back)), time.monotonic()))

    def _compute(self, server: _Server) -> None:
        latencies = self._online.latencies
        seconds = latencies.first_target if server.fresh else latencies.target
        server.running, server.begun = str(next(server.process.names)), time.monotonic()
        server.fresh = False
        self._forwards += 1
        server.process.say(server.running, seconds)
