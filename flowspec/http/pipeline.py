"""What the page shows of the ring: snapshots that rank 0 makes while somebody watches.

A snapshot is made when a watcher has taken the one before, and all watchers share it: nothing is
kept for one that is slow, and without watchers nothing is made at all. The texts in a tree are told
only to whoever names the request by its id, which its own client chose or was told."""

from __future__ import annotations

import asyncio
import functools
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

from flowspec.http.calls import Call, Calls
from flowspec.http.refusal import Refusal

if TYPE_CHECKING:
    from flowspec.core.sight import SeenTree, Sight
    from flowspec.engine import Engine

EVERY = 0.2
"""A watcher hears at most once in so many seconds."""
LEAST = 0.1
"""Snapshots are made at most once in so many seconds."""
QUIET = 15.0
"""A watcher hears something at least once in so many seconds."""
MOST = 16
"""So many may watch at a time."""


class Pipeline:
    """The watchers of a server."""

    def __init__(self, calls: Calls):
        self._calls = calls
        self.watchers: dict[object, str | None] = {}
        """This maps each watcher to the id of the request whose tree it wants to see."""
        self.looks = 0
        """Rank 0 was asked so often."""
        self._looking: asyncio.Future[Sight] | None = None
        self._asked = 0.0
        self._text: Callable[[int], str] | None = None

    def enter(self, request: str | None) -> object:
        """Return a new watcher, who is to `leave`; raise Refusal if nobody more may watch."""
        self._calls.ready()
        if len(self.watchers) >= MOST:
            raise Refusal(429, f"{MOST} watch already: try later", headers={"Retry-After": "5"})
        watcher = object()
        self.watchers[watcher] = request
        return watcher

    def leave(self, watcher: object) -> None:
        self.watchers.pop(watcher, None)

    async def events(self, watcher: object) -> AsyncIterator[str]:
        """Yield what a watcher hears, as server-sent events."""
        engine = self._calls.ready()
        last, at = "", time.monotonic()
        while not self._calls.broken:
            if sight := await self._look(engine):
                event = json.dumps(self._told(engine, sight, self.watchers[watcher]))
                if event != last:
                    last, at = event, time.monotonic()
                    yield f"data: {event}\n\n"
                elif time.monotonic() - at > QUIET:
                    at = time.monotonic()
                    yield ": nothing new\n\n"
            await asyncio.sleep(EVERY)

    # ---- snapshots -------------------------------------------------------------------------------
    async def _look(self, engine: Engine) -> Sight | None:
        """Return the newest snapshot; None if rank 0 has not come to make one in time."""
        now = time.monotonic()
        looking = self._looking
        if looking is None or (looking.done() and now - self._asked >= LEAST):
            looking = asyncio.wrap_future(engine.look(self._requests()))
            self._looking, self._asked = looking, now
            self.looks += 1
        await asyncio.wait([looking], timeout=EVERY)
        return looking.result() if looking.done() else None

    def _requests(self) -> set[int]:
        """Return the engine's numbers of the requests whose trees are watched."""
        calls = filter(None, map(self._call, self.watchers.values()))
        return {call.texts[0].request.id for call in calls}

    def _call(self, id: str | None) -> Call | None:
        return next((call for call in self._calls.open if call.id == id), None)

    # ---- in words --------------------------------------------------------------------------------
    def _told(self, engine: Engine, sight: Sight, request: str | None) -> dict[str, Any]:
        """Return a snapshot as JSON, in milliseconds; `plain_ms` is null while it is not known."""
        load, call = engine.load, self._call(request)
        tree = sight.trees.get(call.texts[0].request.id) if call else None
        return {
            "stages": [self._stage(engine, sight, rank) for rank in engine.topology.stage_ranks],
            "hop_ms": _ms(sight.hop),
            "draft_ms": _ms(sight.draft),
            "plain_ms": None if sight.plain is None else _ms(sight.plain),
            "plain_tried": sight.tried,
            "batches": sight.batches,
            "rows": sight.rows,
            "running": load.running,
            "waiting": load.waiting,
            "tree": tree and self._tree(engine, tree),
        }

    def _stage(self, engine: Engine, sight: Sight, rank: int) -> dict[str, Any]:
        topology = engine.topology
        told: dict[str, Any] = {
            "name": topology.title(rank),
            "busy_last": self._calls.metrics.busy.get(topology.number(rank)),
        }
        if (stage := sight.stages.get(rank)) is not None:
            busy = None if stage.busy is None else round(stage.busy, 3)
            told |= {"forward_ms": _ms(stage.forward), "row_ms": _ms(stage.row), "busy": busy}
        return told

    def _tree(self, engine: Engine, tree: SeenTree) -> dict[str, Any]:
        text = self._text = self._text or _texts(engine)
        return {
            "nodes": [[n.id, n.parent, text(n.token), n.sent] for n in tree.nodes],
            "more": tree.more,
            "text": tree.text,
            "drafted": tree.drafted,
            "sent": tree.sent,
        }


def _ms(seconds: float) -> float:
    return round(1000 * seconds, 3)


def _texts(engine: Engine) -> Callable[[int], str]:
    """Return what makes text of a token, and remembers that of some thousand tokens."""
    return functools.lru_cache(maxsize=4096)(lambda token: engine.text.decode([token]))
