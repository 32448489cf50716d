"""A rank as a process of a torchrun world: joining the run, and leaving it by name when something breaks."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist

from flowspec.comm.gloo import FOREVER, GlooTransport
from flowspec.comm.heartbeat import Heartbeat
from flowspec.core.request import need
from flowspec.errors import UserError
from flowspec.runtime.agreement import Facts, agree

log = logging.getLogger(__name__)

REPORT = "FLOWSPEC_REPORT"
"""file in which ranks leave their last words for the launcher; without it they go to stderr"""
_last_words = threading.Lock()


def rank_name(rank: int, host: str) -> str:
    role = "coordinator" if rank == 0 else f"stage {rank}"
    return f"rank {rank} ({role}, {host})"


def own_name() -> str:
    return rank_name(int(os.environ.get("RANK", 0)), socket.gethostname())


def launched() -> bool:
    """Somebody waits for the ranks' last words, and will print the first."""
    return REPORT in os.environ


def report(line: str, code: int, speak: bool = True) -> None:
    """Leave one line for the launcher to print; say it here if there is no launcher and `speak`."""
    path = os.environ.get(REPORT)
    if path:
        with open(path, "a") as file:
            file.write(json.dumps({"line": line, "code": code}) + "\n")
    elif speak:
        print(f"flowspec: {line}", file=sys.stderr, flush=True)


def leave(code: int) -> NoReturn:
    """End this process now, whatever its threads are waiting for."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def check_world(world_size: int, one_clock: bool) -> None:
    """UserError when torchrun started another number of ranks than the model was split for, or on several machines what needs one clock."""
    started, stages = int(os.environ["WORLD_SIZE"]), world_size - 1
    need(
        started == world_size,
        f"wrong world size: the model is split for {world_size} ranks (rank 0 and {stages} stages), torchrun started {started}",
    )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", started))
    need(
        here == started or not one_clock,
        f"emulate.link_ms, link_mbps: all ranks must be on one machine, {started - here} of {started} are not",
    )


def join_run(world_size: int, facts: Facts) -> tuple[GlooTransport, Callable[[], None]]:
    """Connect to the other ranks; the transport, and what to call after it was closed. UserError when they do not run what this one
    runs: `facts`, as runtime/agreement.py compares them."""
    if os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")  # listen on loopback only
    store, rank, _ = next(dist.rendezvous("env://"))
    heartbeat = Heartbeat(store.clone(), rank, world_size, lambda r, why: _mourn(heartbeat, rank, r, why), **_pace())
    heartbeat.announce()
    heartbeat.start()  # from here on a rank that fails to connect is noticed
    try:
        agree(store, rank, world_size, facts, lambda r: rank_name(r, heartbeat.host(r)))
    except UserError:
        heartbeat.stop()  # the others leave by themselves: nobody is to be called lost
        raise
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=FOREVER)
    transport = GlooTransport(lambda r, why: _mourn(heartbeat, rank, r, why))
    log.info("joined a run of %d ranks as %s", world_size, rank_name(rank, socket.gethostname()))

    def depart() -> None:
        heartbeat.stop()
        dist.destroy_process_group()

    return transport, depart


def _pace() -> dict[str, float]:
    """FLOWSPEC_HEARTBEAT=every,limit in seconds, for links or boxes that need more patience than the default."""
    text = os.environ.get("FLOWSPEC_HEARTBEAT")
    if not text:
        return {}
    try:
        every, limit = (float(part) for part in text.split(","))
    except ValueError:
        every = limit = 0.0
    need(0 < every < limit, f"FLOWSPEC_HEARTBEAT is {text!r}: it must be two numbers of seconds, such as 0.5,3")
    return {"every": every, "limit": limit}


def _mourn(heartbeat: Heartbeat, me: int, rank: int, reason: str) -> NoReturn:
    """A rank is lost, so the run is: say which and why, end a stopped process on this machine, go."""
    hung = reason.startswith("no heartbeat")
    if not hung:
        time.sleep(1.0)  # a local death is torchrun's to report: it knows the signal, and ends us before this is over
    with _last_words:
        if rank < 0:
            report(reason, 1)
        else:
            line = f"{rank_name(rank, heartbeat.host(rank))} {'hung' if hung else 'died'}: {reason}"
            report(line, 1, speak=me == (1 if rank == 0 else 0))
            if hung:
                heartbeat.kill_if_here(rank)
        leave(1)
