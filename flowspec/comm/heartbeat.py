"""Who is alive: every rank bumps a counter in torch's store, and watches the others'. A channel of its own.

A killed process breaks its connections at once; a stopped one (SIGSTOP, a swapping box) breaks nothing, so silence is
the only sign. An idle ring beats on for days. If the store itself is gone, its host or launcher is.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from pathlib import Path

import torch.distributed as dist

from flowspec.comm.base import Lost


def machine() -> list[str]:
    """This boot of this machine and this namespace of process ids; host names repeat among boards of one image."""
    boot, ids = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not (boot.exists() and ids.exists()):
        return [socket.gethostname()]
    return [boot.read_text().strip(), os.readlink(ids)]


class Heartbeat:
    """Beats every `every` seconds; calls `lost(rank, reason)` once when a rank was silent for `limit` seconds."""

    def __init__(self, store: dist.Store, rank: int, world_size: int, lost: Lost, every: float = 0.5, limit: float = 3.0):
        self._store = dist.PrefixStore("flowspec/heartbeat", store)
        self._rank, self._others = rank, [r for r in range(world_size) if r != rank]
        self._lost, self._every, self._limit = lost, every, limit
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def announce(self) -> None:
        self._store.set(f"beat/{self._rank}", "0")
        self._store.set(f"who/{self._rank}", json.dumps([socket.gethostname(), machine(), os.getpid()]))

    def start(self) -> None:
        """Waits until every rank has announced itself (the store's own timeout bounds that), then beats."""
        self._who = {r: json.loads(self._store.get(f"who/{r}")) for r in self._others}
        self._thread.start()

    def host(self, rank: int) -> str:
        return socket.gethostname() if rank == self._rank else self._who[rank][0]

    def kill_if_here(self, rank: int) -> None:
        """A stopped process does not hear SIGTERM; end it if it runs on this machine."""
        _, where, pid = self._who[rank]
        if where == machine():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def stop(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        count = 0
        heard: dict[int, tuple[bytes, float]] = {}
        begun = time.monotonic()
        while not self._stop.wait(self._every):
            now = time.monotonic()
            if now - begun > self._limit:  # it was we who slept: give the others their time again
                heard = {r: (beat, now) for r, (beat, _) in heard.items()}
            begun, count = now, count + 1
            try:
                self._store.set(f"beat/{self._rank}", str(count))
                beats = self._store.multi_get([f"beat/{r}" for r in self._others])
            except RuntimeError:  # DistNetworkError is one
                return self._lost(-1, "the launcher or the first rank's host is gone (torch's store does not answer)")
            for r, beat in zip(self._others, beats, strict=True):
                if r not in heard or heard[r][0] != beat:
                    heard[r] = (beat, now)
                elif now - heard[r][1] > self._limit:
                    return self._lost(r, f"no heartbeat for {self._limit:g} s")
