"""Doors are the sockets at which this process listens: at one address, no longer than needed.

torch's store and gloo take any connection that comes. Both need new ones only while ranks connect.
Afterwards the doors are shut, on Linux: the system drops what knocks, and what is connected stays.
torch hides its sockets, so they are found by what this process has opened."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

_BACKLOG = 2048
_OPEN = Path("/proc/self/fd")
_SO_ATTACH_FILTER = 26
_RTO_MAX_MS = 44
"""This option of TCP, Linux's from 6.15 on, bounds the time between attempts after a loss."""
_DROP = struct.pack("=HBBI", 0x06, 0, 0, 0)
"""A program for the kernel's filter of packets (struct sock_filter): return 0, keep no byte."""


def listening(address: str, port: int) -> socket.socket:
    """Return a socket that listens at this address alone; port 0 lets the system choose one.

    Raise OSError if nobody can listen there."""
    family, _, _, _, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0]
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(where)
        made.listen(_BACKLOG)
    except OSError:
        made.close()
        raise
    return made


def sockets() -> dict[str, int]:
    """Return the sockets of this process: what the system calls each, and its number.

    It is empty where /proc does not tell."""
    found = {}
    if sys.platform == "linux" and _OPEN.is_dir():
        for entry in _OPEN.iterdir():
            with contextlib.suppress(OSError):  # it was closed meanwhile
                name = os.readlink(entry)
                if name.startswith("socket:"):
                    found[name] = int(entry.name)
    return found


def shut(opened: Mapping[str, int]) -> None:
    """Let nobody come in any more where these sockets listen. Who owns them notices nothing."""
    program = ctypes.create_string_buffer(_DROP, len(_DROP))
    filter = struct.pack("HP", 1, ctypes.addressof(program))  # struct sock_fprog
    for same in _same(opened):
        if same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter)


def hasten(opened: Mapping[str, int]) -> None:
    """Let these sockets soon try again what a link has lost, also after it lost all for seconds.

    TCP doubles the time between its attempts: after 3 s of silence it may take 3 s more."""
    for same in _same(opened):
        if same.family in (socket.AF_INET, socket.AF_INET6):
            same.setsockopt(socket.IPPROTO_TCP, _RTO_MAX_MS, 1000)  # or OSError: an older kernel


def _same(opened: Mapping[str, int]) -> Iterator[socket.socket]:
    """Yield these sockets, as far as they are still open, as objects of their own."""
    for _, number in opened.items() & sockets().items():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as same:
            yield same
