"""A rank is a process of a torchrun world.

It joins the run, and when something breaks it leaves with a line that names what broke."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from flowspec.comm.base import STILL, Pulse
from flowspec.comm.codec import Limits
from flowspec.comm.gloo import FOREVER, GlooTransport
from flowspec.comm.heartbeat import Heartbeat
from flowspec.core.cost import Emulate
from flowspec.core.topology import Topology
from flowspec.errors import RankLost, UserError, need
from flowspec.runtime.agreement import Facts, agree

log = logging.getLogger(__name__)

REPORT = "FLOWSPEC_REPORT"
"""This variable names the file in which ranks leave their last words for the launcher. If it is not
set, the words go to stderr."""
_last_words = threading.Lock()


def rank_name(rank: int, host: str) -> str:
    role = "coordinator" if rank == 0 else f"stage {rank}"
    return f"rank {rank} ({role}, {host})"


def own_name() -> str:
    return rank_name(int(os.environ.get("RANK", 0)), socket.gethostname())


def launched() -> bool:
    """Return whether a launcher waits for the ranks' last words; it prints the first ones."""
    return REPORT in os.environ


def report(line: str, code: int, speak: bool = True, aloud: bool = False) -> None:
    """Leave one line for the launcher to print; never fail.

    If there is no launcher and `speak` is set, or in any case if `aloud` is set, print it here."""
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
    """Raise UserError unless torchrun started as many ranks as the model was split for.

    UserError is also raised if the ranks are on several machines but need one clock."""
    started, world_size = int(os.environ["WORLD_SIZE"]), topology.world_size
    need(
        started == world_size,
        f"wrong world size: the model is split for {world_size} ranks (rank 0 and {topology.stages} stages), torchrun started {started}",
    )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", started))
    need(
        here == started or not one_clock,
        f"emulate.link_ms, link_mbps: all ranks must be on one machine, {started - here} of {started} are not",
    )


def join_run(
    topology: Topology, facts: Facts, limits: Limits, emulate: Emulate
) -> tuple[GlooTransport, Callable[[], None]]:
    """Connect to the other ranks; return the transport and what to call once it was closed.

    Raise RankLost if one of them does not come in time. Raise UserError if they do not run what
    this one runs: `facts` are compared by runtime/agreement.py."""
    need(
        {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys(),
        "MASTER_ADDR and MASTER_PORT say where ranks meet: start them by torchrun",
    )
    if os.environ["MASTER_ADDR"] in ("127.0.0.1", "localhost", "::1"):
        os.environ.setdefault(
            "GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0"
        )  # listen on loopback only
    rank, pulses, pace = int(os.environ["RANK"]), [Pulse() for _ in topology.ranks], _pace()
    with _Connecting(_seconds_to_connect()) as connecting:
        store, another = _stores(rank, topology.world_size)
        heartbeat = Heartbeat(
            another, rank, pulses, lambda r, why: _mourn(heartbeat, rank, r, why, hung=True), **pace
        )
        heartbeat.announce()
        heartbeat.start(connecting.awaits)  # from here on a rank that fails to connect is noticed
        try:
            agree(store, topology, rank, facts, lambda r: rank_name(r, heartbeat.host(r)))
        except UserError:
            heartbeat.stop()  # the others leave by themselves: nobody is to be called lost
            raise
        pulses[rank].at(CONNECTING)
        connecting.to = lambda: _unconnected(heartbeat, pulses, rank)
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=topology.world_size, timeout=FOREVER
        )
        lost = lambda r, why: _mourn(heartbeat, rank, r, why, hung=False)  # noqa: E731
        transport = GlooTransport(lost, limits, emulate, pulses, pace.get("still", STILL))
        pulses[rank].at()
    log.info(
        "joined a run of %d ranks as %s", topology.world_size, rank_name(rank, socket.gethostname())
    )

    def depart() -> None:
        heartbeat.stop()
        dist.destroy_process_group()

    return transport, depart


def address() -> str:
    """Return the address at which the ranks of this run meet: that of torch's store."""
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def _stores(rank: int, world_size: int) -> tuple[dist.Store, dist.Store]:
    """Return two connections to the run's store: torchrun's or, without torchrun, rank 0's."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    one, two = (
        dist.TCPStore(host, port, world_size, serving, FOREVER, wait_for_workers=False)
        for serving in (serves, False)
    )
    attempt = f"flowspec/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    return dist.PrefixStore(attempt, one), dist.PrefixStore(attempt, two)


CONNECTING = "connecting to the other ranks"


def _unconnected(heartbeat: Heartbeat, pulses: list[Pulse], me: int) -> str:
    """Return a line that names the ranks that are not connected to all others."""
    names = (
        rank_name(r, heartbeat.host(r))
        for r, pulse in enumerate(pulses)
        if pulse.doing == CONNECTING or r == me
    )
    return f"not all ranks that met at {address()} could connect to each other: {', '.join(names)} still try"


class _Connecting:
    """A context that ends the process if it is not over in time.

    A line then says what the process waited for. A thread of its own sees to that, since the calls
    that connect know no limit, or one that kills links later. An error that they raise becomes
    RankLost, with the same line."""

    def __init__(self, seconds: float):
        self.to: Callable[[], str] = lambda: (
            f"{own_name()} could not connect to the run's store at {address()}"
        )
        self._seconds, self._timer = seconds, threading.Timer(seconds, self._give_up)
        self._timer.daemon = True

    def awaits(self, rank: int) -> None:
        role = "coordinator" if rank == 0 else f"stage {rank}"
        self.to = lambda: f"rank {rank} ({role}) did not come to {address()}"

    def _give_up(self) -> None:
        with _last_words:
            report(
                f"{self.to()} within {self._seconds:g} s (FLOWSPEC_CONNECT=SECONDS gives more time)",
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
    """Return the limit of FLOWSPEC_CONNECT in seconds.

    It is meant for hosts that are started by hand, or that check large files first."""
    text = os.environ.get("FLOWSPEC_CONNECT", "60")
    found = re.fullmatch(r"\d+(\.\d+)?", text)
    need(
        found is not None and 0 < float(text) < threading.TIMEOUT_MAX,
        f"FLOWSPEC_CONNECT is {text!r}: it must be a number of seconds",
    )
    return float(text)


def _pace() -> dict[str, float]:
    """Return the numbers of FLOWSPEC_HEARTBEAT=every,limit[,still], in seconds.

    They are meant for links, boxes or disks that need more patience than the default."""
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
        f"FLOWSPEC_HEARTBEAT is {text!r}: it must be two or three numbers of seconds, such as 0.5,3 or 0.5,3,{STILL:g}",
    )
    return {"every": every, "limit": limit, "still": still}


def _mourn(heartbeat: Heartbeat, me: int, rank: int, reason: str, hung: bool) -> NoReturn:
    """End this process since a rank is lost (-1 is the launcher), and so the run is.

    Say which one and why, and end a hung process on this machine. This process ends whatever goes
    wrong here."""
    if not hung:
        time.sleep(
            1.0
            # a local death is torchrun's to report, which knows the signal and ends us before this
            # ends
        )
    try:
        with _last_words:
            if rank < 0:  # nobody may be left to print what is reported
                report(f"{own_name()} leaves: {reason}", 1, aloud=True)
            else:
                line = f"{rank_name(rank, heartbeat.host(rank))} {'hung' if hung else 'died'}: {reason}"
                report(line, 1, speak=me == (1 if rank == 0 else 0))
                if hung:
                    heartbeat.kill_if_here(rank)
    finally:
        leave(1)
