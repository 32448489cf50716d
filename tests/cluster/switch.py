"""A switch in user space, for kernels without netem: between TUN devices of network namespaces, with delay, loss, rate, cuts and stalls.

`python switch.py PATH=ADDRESS ...` makes eth0 in the namespace at each PATH, and carries what is sent to ADDRESS
there. Lines of JSON on standard input change the links: {"ms": 25, "loss": 0.01, "mbps": 150, "cut": false, "stall": false, "seed": 1}
for all, or with "of": ADDRESS for one. A packet pays at both ends: half of `ms` each, `mbps` where it leaves. The
devices' MTU is large, so that Python sees few packets."""

import ctypes
import fcntl
import heapq
import itertools
import json
import os
import random
import select
import socket
import struct
import sys
import time
from contextlib import suppress
from dataclasses import dataclass

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 1, 0x1000
CLONE_NEWNET = 0x40000000
MTU = 16000
QUEUE = 4_000_000
"""bytes that wait at one end; what comes then is dropped, as by a switch"""


@dataclass
class Link:
    """One end's cable."""

    device: int
    ms: float = 0.0
    loss: float = 0.0
    mbps: float = 0.0
    cut: bool = False
    stall: bool = False
    """what comes waits until this is over"""
    free: float = 0.0
    """when the last packet has left"""


def device_in(space: str) -> int:
    """The file of a new TUN device eth0 in a network namespace; this process stays in its own."""
    setns = ctypes.CDLL(None, use_errno=True).setns
    with open("/proc/self/ns/net") as own, open(space) as other:
        if setns(other.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {space}")
        device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(device, TUNSETIFF, struct.pack("16sH22x", b"eth0", IFF_TUN | IFF_NO_PI))
        setns(own.fileno(), CLONE_NEWNET)
    return device


class Switch:
    def __init__(self, links: dict[bytes, Link]):
        self._links = links
        self._by_device = {link.device: link for link in links.values()}
        self._waiting: list[tuple[float, int, Link, bytes]] = []
        self._stalled: list[tuple[Link, Link, bytes]] = []
        self._numbers = itertools.count()
        self._random = random.Random(0)

    def change(self, of: str | None = None, seed: int | None = None, **changed: float) -> None:
        self._random = self._random if seed is None else random.Random(seed)
        for address, link in self._links.items():
            if of is None or socket.inet_aton(of) == address:
                vars(link).update(changed)
        stalled, self._stalled = self._stalled, []
        for each in stalled:
            self._carry(*each, time.monotonic())

    def take(self, device: int, now: float) -> None:
        """Read a packet of a device, and let it wait until it is due, or drop it."""
        packet, sender = os.read(device, MTU + 100), self._by_device[device]
        receiver = self._links.get(packet[16:20])
        if packet[0] >> 4 != 4 or receiver is None or sender.cut or receiver.cut:
            return
        if self._random.random() < 1 - (1 - sender.loss) * (1 - receiver.loss):
            return
        self._carry(sender, receiver, packet, now)

    def _carry(self, sender: Link, receiver: Link, packet: bytes, now: float) -> None:
        if sender.stall or receiver.stall:
            self._stalled.append((sender, receiver, packet))
            return
        rate = sender.mbps * 1e6 / 8
        if rate and (sender.free - now) * rate > QUEUE:
            return
        sender.free = max(now, sender.free) + (len(packet) / rate if rate else 0.0)
        due = sender.free + (sender.ms + receiver.ms) / 2000
        heapq.heappush(self._waiting, (due, next(self._numbers), receiver, packet))

    def give(self, now: float) -> float:
        """Hand over what is due; the seconds until the next packet is."""
        while self._waiting and self._waiting[0][0] <= now:
            _, _, receiver, packet = heapq.heappop(self._waiting)
            if not receiver.cut:
                with suppress(BlockingIOError, OSError):  # a device that is down, or full
                    os.write(receiver.device, packet)
        return self._waiting[0][0] - now if self._waiting else 3600.0

    def run(self) -> None:
        """Carry packets until standard input ends."""
        while True:
            left = self.give(time.monotonic())
            ready, _, _ = select.select([0, *self._by_device], [], [], max(0.0, left))
            for device in ready:
                if device:
                    with suppress(OSError):
                        self.take(device, time.monotonic())
                elif line := sys.stdin.readline():
                    self.change(**json.loads(line))
                    print("changed", flush=True)
                else:
                    return


def main() -> None:
    pairs = [word.split("=") for word in sys.argv[1:]]
    links = {socket.inet_aton(address): Link(device_in(space)) for space, address in pairs}
    print("ready", flush=True)
    Switch(links).run()


if __name__ == "__main__":
    main()
