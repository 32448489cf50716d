"""Doors are the sockets at which this process listens: at one address, no longer than needed.

torch's store and gloo take any connection that comes. Both need new ones only while ranks connect.
Afterwards the doors are shut, on Linux: the system drops what knocks, and what is connected stays.
"""

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


def doors() -> dict[str, int]:
    """Return the sockets of this process that listen: what the system calls each, and its number.

    It is empty where /proc does not tell."""
    if sys.platform != "linux" or not _OPEN.is_dir():
        return {}
    return {name: number for number, name in _sockets() if _listens(number)}


def _sockets() -> Iterator[tuple[int, str]]:
    for entry in _OPEN.iterdir():
        with contextlib.suppress(OSError):  # it was closed meanwhile
            name = os.readlink(entry)
            if name.startswith("socket:"):
                yield int(entry.name), name


def _listens(number: int) -> bool:
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as same:
        return bool(same.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def shut(opened: Mapping[str, int]) -> None:
    """Let nobody come in any more by these doors. Who owns them notices nothing."""
    program = ctypes.create_string_buffer(_DROP, len(_DROP))
    filter = struct.pack("HP", 1, ctypes.addressof(program))  # struct sock_fprog
    for _, number in opened.items() & doors().items():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(number)) as same:
            same.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, filter)
