"""What ranks tell each other through torch's store is sealed with the run's key.

The store asks nobody who they are. A seal says that a rank of this run wrote the value, and under
this name: it is an HMAC (RFC 2104) with SHA-256 of both."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

SIZE = 32
"""An HMAC has so many bytes."""


def mac(key: bytes, *parts: bytes) -> bytes:
    """Return the HMAC of these parts, each behind its length, so that no two lists are alike."""
    return hmac.digest(key, b"".join(len(p).to_bytes(8, "big") + p for p in parts), "sha256")


class Sealed:
    """A Sealed is a store of this run's values; what somebody else wrote reads as empty."""

    def __init__(self, store: dist.Store, key: bytes, name: str):
        """`key` is the run's (runtime/trust.py), and `name` stands before all of its names."""
        self._store = dist.PrefixStore(f"flowspec/{name}", store)
        self._key, self._name = key, name.encode()

    def set(self, name: str, text: str) -> None:
        value = text.encode()
        self._store.set(name, self._seal(name, value).hex() + text)

    def get(self, name: str) -> bytes:
        """Wait for a value, for as long as the store's own timeout is."""
        return self._opened(name, self._store.get(name))

    def multi_get(self, names: Sequence[str]) -> list[bytes]:
        values = self._store.multi_get([*names])
        return [self._opened(*each) for each in zip(names, values, strict=True)]

    def wait(self, names: Sequence[str], patience: timedelta) -> None:
        self._store.wait([*names], patience)

    def _seal(self, name: str, value: bytes) -> bytes:
        return mac(self._key, self._name, name.encode(), value)

    def _opened(self, name: str, text: bytes) -> bytes:
        seal, value = text[: 2 * SIZE], text[2 * SIZE :]
        right = hmac.compare_digest(seal, self._seal(name, value).hex().encode())
        return value if right else b""
