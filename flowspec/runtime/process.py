"""A rank is a process of a torchrun world: it joins the run, and leaves it by name if something
breaks."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch.distributed as dist

from flowspec.comm.base import STILL, Lost, Pulse
from flowspec.comm.codec import Limits
from flowspec.comm.doors import hasten, listening, shut, sockets
from flowspec.comm.gloo import FOREVER, GlooTransport, Stranger
from flowspec.comm.heartbeat import EVERY, LIMIT, Heartbeat, host_name
from flowspec.comm.seal import Sealed
from flowspec.core.cost import Emulate
from flowspec.core.topology import Topology
from flowspec.errors import RankLost, UserError, need
from flowspec.output import WITHOUT
from flowspec.runtime.agreement import Facts, agree
from flowspec.runtime.trust import introduce

log = logging.getLogger(__name__)

LISTEN = "FLOWSPEC_LISTEN"
"""Rank 0's store listens at this address of its host, or else at MASTER_ADDR; never at all."""
REPORT = "FLOWSPEC_REPORT"
"""Ranks leave their last words for the launcher in this file; without it they go to stderr."""
_last_words = threading.Lock()


_known: Topology | None = None
"""This is the topology of this process's run, once it is known."""


def title(rank: int) -> str:
    """Return what a rank of this process's run is, such as "stage 2"."""
    return (_known or Topology(rank)).title(rank)


def rank_name(rank: int, host: str) -> str:
    return (_known or Topology(rank)).name(rank, host)


def own_name() -> str:
    return rank_name(int(os.environ.get("RANK", 0)), host_name())


def launched() -> bool:
    """Return whether somebody waits for the ranks' last words, and will print the first."""
    return REPORT in os.environ


def report(line: str, code: int, speak: bool = True, aloud: bool = False) -> None:
    """Leave one line for the launcher to print. This never fails.

    The line is printed here if there is no launcher and `speak` is true, and in any case if `aloud`
    is."""
    path = os.environ.get(REPORT)
    if path:
        try:
            with open(path, "a") as file:
                file.write(json.dumps({"line": line, "code": code}) + "\n")
        except OSError:  # a full disk
            aloud = True
    if aloud or (speak and not path):
        with contextlib.suppress(OSError, ValueError):
            print(f"flowspec: {line}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process now, whatever its threads are waiting for."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def check_world(topology: Topology, one_clock: bool) -> None:
    """Raise UserError if torchrun started what cannot be a run of this model.

    That is another number of ranks than the model was split for, or ranks on several machines where
    one clock is needed."""
    global _known
    _known = topology
    started, world_size = int(os.environ["WORLD_SIZE"]), topology.world_size
    need(
        started == world_size,
        f"wrong world size: the run is of {world_size} ranks (rank 0 and {topology.words}), "
        f"torchrun started {started}",
    )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", started))
    need(
        here == started or not one_clock,
        f"emulate.link_ms, link_mbps: all ranks must be on one machine, {started - here} of "
        f"{started} are not",
    )


class Loss(NamedTuple):
    """A loss is what became of a rank that does not answer, or of the launcher (-1)."""

    rank: int
    reason: str
    hung: bool
    """This is true if the rank stood still; else its links broke."""


def _check_environment() -> None:
    need(
        {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(),
        "MASTER_ADDR and MASTER_PORT say where ranks meet: start them by torchrun",
    )
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1"):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"
        )  # listen on loopback only


def join_run(
    topology: Topology,
    facts: Facts,
    limits: Limits,
    emulate: Emulate,
    at_loss: Callable[[Heartbeat, Loss], None],
    own_gpu: bool = False,
    secret: bytes = b"",
) -> tuple[GlooTransport, Callable[[], None]]:
    """Connect to the other ranks; return the transport, and what to call once it was closed.

    `own_gpu` is as for GlooTransport, and all ranks must know the run's `secret`
    (runtime/trust.py). `at_loss` is called in a thread of its own if a rank is lost, in this run or
    on the way into it.
    Raise RankLost if one of them does not come in time, and UserError if they do not run what this
    one runs: `facts`, which runtime/agreement.py compares."""
    _check_environment()
    rank, pulses, pace = int(os.environ["RANK"]), [Pulse() for _ in topology.ranks], _pace()
    with _Connecting(_seconds_to_connect()) as connecting:
        before = sockets()
        store, another = _stores(rank, topology.world_size)
        key = introduce(store, topology, rank, secret, rank_name, connecting.awaits)

        def lost(hung: bool) -> Lost:
            return lambda r, why: at_loss(heartbeat, Loss(r, why, hung))

        keeper, beats, hung = _keeper(rank), Sealed(another, key, "heartbeat"), lost(hung=True)
        heartbeat: Heartbeat = Heartbeat(beats, rank, pulses, hung, keeper=keeper, **pace)
        heartbeat.announce()
        heartbeat.start(connecting.awaits)  # from here on a rank that fails to connect is noticed
        name = partial(_name, heartbeat)
        try:
            agree(Sealed(store, key, "agreement"), topology, rank, facts, name)
        except UserError:
            heartbeat.stop()  # the others leave by themselves: nobody is to be called lost
            raise
        pulses[rank].at(CONNECTING)
        connecting.to = lambda: _unconnected(heartbeat, pulses, rank)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=topology.world_size, timeout=FOREVER
        )
        still = pace.get("still", STILL)
        try:
            transport = GlooTransport(
                topology, lost(hung=False), limits, emulate, pulses, still, own_gpu, key
            )
        except Stranger as stranger:
            heartbeat.stop()
            raise RankLost(_IMPOSTOR.format(name(stranger.rank))) from None
        # NCCL connects when it is first used
        _settle(before, more_come=topology.members > 1 and own_gpu)
        pulses[rank].at()
    log.info("joined a run of %d ranks as %s", topology.world_size, rank_name(rank, host_name()))

    def depart() -> None:
        heartbeat.stop()
        dist.destroy_process_group()

    return transport, depart


_IMPOSTOR = (
    "somebody who does not know this run's key answered in the place of {}: limit who reaches the "
    "ranks' ports (docs/cluster.md, Trust)"
)


def _settle(before: dict[str, int], more_come: bool) -> None:
    """Adjust the sockets that were opened since `before`, now that all ranks are connected."""
    opened = dict(sockets().items() - before.items())
    hasten(opened)
    if not more_come:
        shut(opened)


def _name(heartbeat: Heartbeat, rank: int) -> str:
    return rank_name(rank, heartbeat.host(rank))


def address() -> str:
    """Return the address at which the ranks of this run meet: that of torch's store."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _stores(rank: int, world_size: int) -> tuple[dist.Store, dist.Store]:
    """Return two connections to the run's store.

    It is torchrun's, or without one rank 0's, at one address of its host."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    door: dict[str, Any] = {}
    if rank == 0 and _rank_0_serves():
        host = os.environ.get(LISTEN) or host
        door = {"master_listen_fd": _door(host, port)}
    one, two = (
        dist.TCPStore(host, port, world_size, bool(mine), FOREVER, wait_for_workers=False, **mine)
        for mine in (door, {})
    )
    attempt = f"flowspec/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return dist.PrefixStore(attempt, one), dist.PrefixStore(attempt, two)


def _keeper(rank: int) -> int:
    """Return the other rank that holds the run's store; -1 if none does."""
    return 0 if rank and _rank_0_serves() else -1


def _rank_0_serves() -> bool:
    """Return whether rank 0 holds the run's store, and not torchrun."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"


def _door(host: str, port: int) -> int:
    """Return a socket that listens where the ranks meet, which the store then owns."""
    try:
        return listening(host, port).detach()
    except OSError as error:
        raise UserError(
            f"rank 0 cannot listen at {host}:{port}: {error.strerror} (MASTER_ADDR, or where that "
            f"is another machine's, {LISTEN}, is an address of rank 0's host)"
        ) from None


CONNECTING = "connecting to the other ranks"


def _unconnected(heartbeat: Heartbeat, pulses: list[Pulse], me: int) -> str:
    """Return the ranks that are not connected to all others."""
    names = (
        rank_name(r, heartbeat.host(r))
        for r, pulse in enumerate(pulses)
        if pulse.doing == CONNECTING or r == me
    )
    return (
        f"not all ranks that met at {address()} could connect to each other: "
        f"{', '.join(names)} still try"
    )


class _Connecting:
    """A context that must be over in time; otherwise the process ends, and says what it waited for.

    A thread of its own sees to that: the calls that connect know no limit, or one that kills links
    later. What they raise becomes RankLost, with the same words."""

    def __init__(self, seconds: float):
        self.to: Callable[[], str] = lambda: (
            f"{own_name()} could not connect to the run's store at {address()}"
        )
        self._seconds, self._timer = seconds, threading.Timer(seconds, self._give_up)
        self._timer.daemon = True

    def awaits(self, rank: int) -> None:
        self.to = lambda: f"rank {rank} ({title(rank)}) did not come to {address()}"

    def _give_up(self) -> None:
        with _last_words:
            report(
                f"{self.to()} within {self._seconds:g} s (FLOWSPEC_CONNECT=SECONDS gives more "
                "time)",
                1,
            )
            leave(1)

    def __enter__(self) -> _Connecting:
        self._timer.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._timer.cancel()
        if isinstance(error, RuntimeError | ValueError):
            raise RankLost(f"{self.to()}: {str(error).splitlines()[0]}") from None


def _seconds_to_connect() -> float:
    """Return the seconds in which all ranks must be connected.

    The variable FLOWSPEC_CONNECT gives more to hosts that are started by hand, or that check large
    files first."""
    text = os.environ.get("FLOWSPEC_CONNECT", "60")
    found = re.fullmatch(r"\d+(\.\d+)?", text)
    need(
        found is not None and 0 < float(text) < threading.TIMEOUT_MAX,
        f"FLOWSPEC_CONNECT is {text!r}: it must be a number of seconds",
    )
    return float(text)


def _pace() -> dict[str, float]:
    """Return the pace of heartbeats.

    The variable FLOWSPEC_HEARTBEAT=every,limit[,still], in seconds, is for links, boxes or disks
    that need more patience than the default."""
    text = os.environ.get("FLOWSPEC_HEARTBEAT")
    if not text:
        return {}
    try:
        every, limit, still = map(
            float, text.split(",") if text.count(",") == 2 else f"{text},{STILL}".split(",")
        )
    except ValueError:
        every = limit = still = 0.0
    ok = 0 < every < limit < math.inf and still > 0
    need(
        ok,
        f"FLOWSPEC_HEARTBEAT is {text!r}: it must be two or three numbers of seconds, such as "
        f"{EVERY:g},{LIMIT:g} or {EVERY:g},{LIMIT:g},{STILL:g}",
    )
    return {"every": every, "limit": limit, "still": still}


class Losses:
    """Losses say what becomes of a run that loses a rank: it ends, or does without that rank.

    It can do without a drafter, and without one of several target servers (DSI), whose other ranks
    leave. Ranks that are not concerned need not care."""

    def __init__(self, topology: Topology, rank: int):
        self._topology, self._rank = topology, rank
        self.tell: Callable[[int, str], None] | None = None
        """Rank 0 calls this with a rank that is lost and what became of it, once it is set."""
        self.before_the_end: Callable[[str], None] = lambda line: None
        """This is called with what became of a rank, before this process ends for it."""

    def __call__(self, heartbeat: Heartbeat, loss: Loss) -> None:
        without = self._topology.spare(loss.rank) if loss.rank > 0 else ()
        if without and self._rank == self._topology.COORDINATOR and self.tell:
            if loss.hung:
                heartbeat.kill_if_here(loss.rank)
            self.tell(loss.rank, obituary(heartbeat, loss))
        elif without and self._rank != self._topology.COORDINATOR:
            if self._rank in without:
                leave(WITHOUT)
        else:
            end_process(heartbeat, loss, self.before_the_end)


def obituary(heartbeat: Heartbeat, loss: Loss) -> str:
    """Return what became of a rank, with its name."""
    how = "hung" if loss.hung else "died"
    return f"{rank_name(loss.rank, heartbeat.host(loss.rank))} {how}: {loss.reason}"


def end_process(
    heartbeat: Heartbeat, loss: Loss, before: Callable[[str], None] = lambda line: None
) -> NoReturn:
    """End this process because a rank is lost, come what may; `before` is told so first.

    Say which rank, and why, and end a process of it that hangs on this machine."""
    rank, reason, hung = loss
    with contextlib.suppress(Exception):
        before(reason if rank < 0 else obituary(heartbeat, loss))
    if not hung:
        time.sleep(
            1.0
            # a local death is torchrun's to report: it knows the signal, and ends us before this is
            # over
        )
    try:
        with _last_words:
            if rank < 0:  # nobody may be left to print what is reported
                report(f"{own_name()} leaves: {reason}", 1, aloud=True)
            else:
                line = obituary(heartbeat, loss)
                report(line, 1, speak=int(os.environ["RANK"]) == (1 if rank == 0 else 0))
                if hung:
                    heartbeat.kill_if_here(rank)
    finally:
        leave(1)
