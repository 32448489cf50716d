"""Ranks prove to each other that they know the run's secret, before they believe a word.

torch's store takes whoever comes, so this is done through it, and is the first thing that is.
Each rank says hello with a fresh nonce, and then proves that it knows the secret with an HMAC of
all hellos under its own rank: what was said in another run, or by another rank, proves nothing.
From the same hellos comes the run's key, with which all else that ranks tell is sealed
(comm/seal.py), and each link of theirs proves itself (comm/gloo.py).

Without a secret all this is done as well, with an empty one. It then protects from nobody, but
ranks of which only some have a secret find out.
"""

from __future__ import annotations

import hmac
import json
import secrets
from collections.abc import Callable
from typing import NamedTuple

import torch.distributed as dist

from flowspec.comm.heartbeat import host_name, shown, told
from flowspec.comm.seal import mac
from flowspec.core.topology import Topology
from flowspec.errors import UserError
from flowspec.runtime.agreement import PATIENCE, part
from flowspec.secret import FILE, SECRET

Name = Callable[[int, str], str]
"""A name is how messages call a rank on a host."""


class _Hello(NamedTuple):
    nonce: str
    host: str
    has_secret: bool
    """This is for the words of a refusal alone."""


def introduce(
    store: dist.Store,
    topology: Topology,
    rank: int,
    secret: bytes,
    name: Name,
    awaits: Callable[[int], None] = lambda rank: None,
) -> bytes:
    """Return the run's key, which nobody has who does not know the secret.

    `awaits` is called with each rank that is waited for. Raise UserError, which names the rank, if
    one does not know the secret that rank 0 knows."""
    store = dist.PrefixStore("flowspec/trust", store)
    hellos = _hellos(store, topology, rank, bool(secret), awaits)
    heard = [mac(b"hello", text) for text in hellos]  # of one length each
    store.set(f"proof/{rank}", _proof(secret, rank, heard).hex())
    strangers = [
        other
        for other in topology.ranks
        if not hmac.compare_digest(
            _waited(store, f"proof/{other}"), _proof(secret, other, heard).hex().encode()
        )
    ]
    if not strangers:
        return mac(secret, b"key", *heard)
    part(store, topology, rank)
    # the run's secret is rank 0's: who cannot follow its proof is the stranger
    stranger = rank if topology.COORDINATOR in strangers else strangers[0]
    raise UserError(_refusal(name, stranger, [_read(text) for text in hellos]))


def _proof(secret: bytes, rank: int, heard: list[bytes]) -> bytes:
    return mac(secret, b"proof", str(rank).encode(), *heard)


def _hellos(
    store: dist.Store, topology: Topology, rank: int, has: bool, awaits: Callable[[int], None]
) -> list[bytes]:
    own = _Hello(secrets.token_hex(16), host_name(), has)
    store.set(f"hello/{rank}", json.dumps(own))
    hellos = []
    for other in topology.ranks:
        awaits(other)
        hellos.append(store.get(f"hello/{other}"))
    return hellos


def _waited(store: dist.Store, name: str) -> bytes:
    """Return what a rank wrote, which is nothing if it does not come."""
    try:
        store.wait([name], PATIENCE)
    except RuntimeError:  # DistStoreError is one
        return b""
    return store.get(name)


def _read(text: bytes) -> _Hello:
    try:
        nonce, host, has = told(text, [str, str, bool])
    except ValueError:
        return _Hello("", "of no name", False)
    return _Hello(nonce, shown(host), has)


def _refusal(name: Name, stranger: int, hellos: list[_Hello]) -> str:
    who, first = name(stranger, hellos[stranger].host), hellos[Topology.COORDINATOR]
    if not first.has_secret:
        return f"{who} has a secret ({SECRET}, {FILE}), rank 0 has none: give all ranks the same"
    why = "it has another than rank 0" if hellos[stranger].has_secret else "it has none"
    return f"{who} does not know this run's secret: {why}; give it rank 0's ({SECRET}, {FILE})"
