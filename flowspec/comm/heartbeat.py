"""The heartbeat finds out which ranks are alive and which of them move.

Every rank tells torch's store a number and what its working thread is at, and watches the others.
A killed process breaks its connections at once. A stopped one (SIGSTOP, a machine that swaps)
breaks nothing, so silence is the only sign. One that hangs in a read beats on, so its beat tells
how often its working thread has moved. A rank that waits for work need not move: an idle ring beats
on for days. If the store itself is gone or silent, its host or launcher is. Calls to a silent store
block, so one thread speaks with the store and another one watches.

The store asks nobody who they are. What ranks tell is sealed (comm/seal.py), and all the same it is
shown, compared and checked, never obeyed.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from flowspec.comm.base import STILL, Awake, Lost, Pulse
from flowspec.comm.seal import Sealed

GONE = "the launcher or the first rank's host is gone"
EVERY, LIMIT = 0.2, 4.2
"""A dead rank is to be named within 5 s, and a link may stall for 3 s. A rank's silence is seen to
begin up to 2 EVERY late, and to last too long up to EVERY late: LIMIT + 3 EVERY = 4.8 s. A stall
looks as long as it is and 2 EVERY longer: 3.4 s."""
_GRACE = 1.0
"""After the store's end it takes so many seconds to conclude that nobody told us to leave."""
RUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")
"""These variables of a rank's environment say which rank it is and of which run."""


def host_name() -> str:
    """Return this host's name: that of the cluster file (FLOWSPEC_HOST), or the system's own."""
    return os.environ.get("FLOWSPEC_HOST") or socket.gethostname()


def machine() -> list[str]:
    """Return what names this boot of this machine and this namespace of process ids.

    Host names repeat among boards of one image. Where /proc does not tell, it is the host name."""
    boot, ids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not (boot.exists() and ids.exists()):
        return [socket.gethostname()]
    return [boot.read_text().strip(), os.readlink(ids)]


def is_rank_of_this_run(pid: object, rank: int) -> bool:
    """Return whether this is the id of a process of ours, started as that rank of our run.

    It is False where /proc does not tell."""
    if type(pid) is not int or pid <= 1 or pid == os.getpid():
        return False
    process = Path("/proc") / str(pid)
    try:
        if process.stat().st_uid != os.getuid():
            return False
        started = dict(
            fact.partition(b"=")[::2] for fact in (process / "environ").read_bytes().split(b"\0")
        )
    except OSError:
        return False
    wanted = {name: os.environ.get(name) for name in RUN} | {"RANK": str(rank)}
    return all(
        started.get(name.encode()) == (value and value.encode()) for name, value in wanted.items()
    )


LONGEST = 1 << 12
"""Nobody has more to tell here, in bytes."""


def told(text: bytes, types: list[type]) -> list:
    """Return what stands in the store for a rank: a list of these types.

    Raise ValueError if it is anything else."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text if len(text) <= LONGEST else b"")
        if isinstance(found, list) and [type(part) for part in found] == types:
            return found
    raise ValueError(f"its heartbeat is none of ours: {shown(repr(text[:40]))}")


class _Who(NamedTuple):
    host: str
    machine: list[str]
    pid: int


def _who(text: bytes) -> _Who:
    """Return who a rank says it is; raise ValueError for what no rank of ours announces."""
    host, where, pid = told(text, [str, list, int])
    return _Who(shown(host), where, pid)


def shown(text: str) -> str:
    """Return the text made fit for a line of a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text[:80])


LEFT = -1
"""A rank whose beat has this number has left the run, as it was asked to."""


class _Beat(NamedTuple):
    number: int
    moves: int
    doing: str


def _beat(text: bytes) -> _Beat:
    """Return a rank's beat; raise ValueError for what no rank of ours tells."""
    number, moves, doing = told(text, [int, int, str])
    return _Beat(number, moves, shown(doing))


class _Unchanged:
    """_Unchanged tells how long things have been what they are, by a clock of the caller's."""

    def __init__(self) -> None:
        self._since: dict[object, tuple[object, float]] = {}

    def seconds(self, thing: object, value: object, now: float) -> float:
        if thing not in self._since or self._since[thing][0] != value:
            self._since[thing] = (value, now)
        return now - self._since[thing][1]


class Heartbeat:
    """A heartbeat beats every `every` seconds and calls `lost(rank, reason)` once for a rank.

    It does so when a rank was silent for `limit` seconds or stood still at its work for `still`
    seconds, with rank `keeper` when the store was silent for `limit` seconds, and with rank -1 when
    it is gone. The keeper is the rank that holds the store; -1: a launcher does. The others
    are watched further, if `lost` returns. `pulses` are
    by rank: this rank's own is told to the store, the others' become what they tell."""

    def __init__(
        self,
        store: dist.Store | Sealed,
        rank: int,
        pulses: list[Pulse],
        lost: Lost,
        every: float = EVERY,
        limit: float = LIMIT,
        still: float = STILL,
        keeper: int = -1,
    ):
        self._keeper = keeper
        self._store = store
        self._rank, self._pulses, self._others = (
            rank,
            pulses,
            [r for r in range(len(pulses)) if r != rank],
        )
        self._lost, self._every, self._limit, self._still = lost, every, limit, still
        self._step = max(2 * every, limit / 4)
        """Between two looks at the others no more seconds count: we or the store may have slept."""
        self._unchanged = _Unchanged()
        self._who: dict[int, _Who] = {}
        # how often the store has answered, and what it said
        self._heard: tuple[int, list[bytes]] = (0, [])
        self._broken = False
        self._gone: set[int] = set()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=run, name="heartbeat", daemon=True)
            for run in (self._speak, self._watch)
        ]

    def announce(self) -> None:
        self._store.set(f"beat/{self._rank}", self._own(0))
        self._store.set(f"who/{self._rank}", json.dumps(_Who(host_name(), machine(), os.getpid())))

    def start(self, awaits: Callable[[int], None] = lambda rank: None) -> None:
        """Wait until every rank has announced itself, then beat.

        `awaits` is called with each rank that is waited for. Raise whatever the store's client
        raises, and ValueError if an announcement is from no rank of ours."""
        for rank in self._others:
            awaits(rank)
            self._who[rank] = _who(self._store.get(f"who/{rank}"))
        for thread in self._threads:
            thread.start()

    def host(self, rank: int) -> str:
        return host_name() if rank == self._rank else self._who[rank].host

    def kill_if_here(self, rank: int) -> None:
        """Kill a rank's process if it runs on this machine and is what it says.

        A stopped process does not hear SIGTERM. The store's keeper is left to its launcher: it may
        be that only the way to the store is cut."""
        who = self._who[rank]
        if rank == self._keeper:
            return
        if who.machine == machine() and is_rank_of_this_run(who.pid, rank):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(who.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop the threads and wait for them, but not for a store that is silent."""
        self._stop.set()
        for thread in self._threads:
            if thread.is_alive():
                thread.join(self._limit)

    def _own(self, number: int) -> str:
        pulse = self._pulses[self._rank]
        return json.dumps(_Beat(number, pulse.moves, pulse.doing))

    def _speak(self) -> None:
        """Beat and hear the others' beats; once started, only this thread calls the store.

        The last beat says that this rank has left, so that nobody waits for one more."""
        number = 0
        while not self._stop.wait(self._every):
            number += 1
            try:
                self._store.set(f"beat/{self._rank}", self._own(number))
                self._heard = (number, self._store.multi_get([f"beat/{r}" for r in self._others]))
            # as a rule this is DistNetworkError; whatever it is, nobody would hear us any more
            except Exception:
                self._broken = True
                return
        with contextlib.suppress(Exception):  # the store's host may have left before us
            self._store.set(f"beat/{self._rank}", self._own(LEFT))

    def _watch(self) -> None:
        """Watch the store and the other ranks.

        The others' silence counts only while the store answers, and the store's only while this
        process is awake."""
        awake, answering = Awake(self._step), 0.0
        answered, at = 0, awake()
        while not self._stop.wait(self._every):
            now, (number, beats) = awake(), self._heard
            if self._broken:
                # at the end of a run the store's host may leave a moment before us
                if not self._stop.wait(_GRACE):
                    self._lost(-1, f"{GONE} (torch's store does not answer)")
                return
            if number != answered:
                answering += min(now - at, self._step)
                answered, at = number, now
                for rank, reason in self._judge(beats, answering):
                    self._gone.add(rank)
                    self._lost(rank, reason)
            elif now - at > self._limit:
                silent = f"torch's store was silent for {self._limit:g} s"
                return self._lost(
                    self._keeper, f"{GONE} ({silent})" if self._keeper < 0 else silent
                )

    def _judge(self, beats: list[bytes], now: float) -> Iterator[tuple[int, str]]:
        """Yield each rank that is lost, and why."""
        for rank, text in zip(self._others, beats, strict=True):
            if rank not in self._gone and (reason := self._fault(rank, text, now)):
                yield rank, reason

    def _fault(self, rank: int, text: bytes, now: float) -> str | None:
        """Return why a rank is lost whose beat is this text; None if it is not."""
        try:
            beat = _beat(text)
        except ValueError as error:
            return str(error)
        if beat.number == LEFT:
            return None
        pulse = self._pulses[rank]
        pulse.moves, pulse.doing = beat.moves, beat.doing
        if self._unchanged.seconds(rank, beat.number, now) > self._limit:
            return f"no heartbeat for {self._limit:g} s"
        if self._unchanged.seconds((rank, "moves"), beat.moves, now) > self._still and beat.doing:
            return f"it beats, but stood still for {self._still:g} s: {beat.doing}"
        return None
