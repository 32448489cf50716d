"""Rank 0 waits for what comes to it, but not for what will never come."""

from __future__ import annotations

import math
from typing import Any

from flowspec.comm.base import Awake, Transport
from flowspec.errors import RankLost

STALL = 600.0
"""So many seconds may pass without a message while nobody is at work. More are a bug, since ranks
that are dead, hung or stand still show earlier."""
_LOOK = 1.0
"""Rank 0 looks at the others' pulses at least once in so many seconds."""


def receive(transport: Transport, until: float = math.inf) -> Any:
    """Return the next item of the inbox; None once it is `until` (seconds of the inbox's clock).

    Raise RankLost, which names the stage, when one stands still at its work for `transport.still`
    seconds; a stage that moves may take any time. Raise RankLost too when nothing at all moves for
    STALL seconds."""
    awake, clock = Awake(2 * _LOOK), transport.inbox.clock
    began = awake()
    last = [(pulse.moves, began) for pulse in transport.pulses]
    while True:
        item = transport.inbox.get(max(0.0, min(until - clock.now(), _LOOK)))
        if item is not None or clock.now() >= until:
            return item
        now = awake()
        last = [
            then if then[0] == pulse.moves else (pulse.moves, now)
            for then, pulse in zip(last, transport.pulses, strict=True)
        ]
        for rank, (pulse, (_, since)) in enumerate(zip(transport.pulses, last, strict=True)):
            if pulse.doing and now - since > transport.still:
                raise RankLost(
                    f"rank {rank} ({transport.topology.title(rank)}) hung: it stood still for {transport.still:g} s: "
                    f"{pulse.doing}"
                )
        if now - max(since for _, since in last) > STALL:
            raise RankLost(
                f"nothing came back for {STALL:g} s although every rank is alive and waits for work"
            )
