"""What a server is started with. This module needs none of the packages that serve."""

from __future__ import annotations

import sys
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a server is started with."""

    name: str
    """Clients call the model so."""
    host: str = "127.0.0.1"
    port: int = 8000
    """Port 0 takes a free one."""
    key: str | None = None
    most_texts: int = 64
    """So many texts may be in the ring, or wait for room in it."""
    most_bytes: int = 4 << 20
    """A body has at most so many."""
    compat: str | None = None
    log: bool = False


def warn_if_open(settings: Settings) -> None:
    """Say so if anybody may use the server."""
    if settings.key is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        print(
            f"flowspec: anybody who reaches {settings.host} may use this server: no --api-key",
            file=sys.stderr,
        )
