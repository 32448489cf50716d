"""A trace says who did what when: it holds spans of all ranks on one clock, and is kept in a file.

The runtime and the simulator make the same spans, so the same pictures, verdicts and figures are
made of both. The file has Chrome's trace format (JSON): it opens in https://ui.perfetto.dev, with a
process for each rank and a thread for each row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowspec.errors import UserError, need
from flowspec.files import replacing

ROWS = ("compute", "send", "receive", "draft")
"""The row `compute` has forwards (on rank 0, what the scheduler does), `send` has bytes on their
way to the next rank of the ring, `receive` has what has arrived and waits for this rank, and
`draft` has the drafter's forwards (on rank 0)."""
VERDICTS = ("accepted", "pruned", "stale")
"""A segment is accepted if a token of it became text, stale if all of its rows were refused before
the span began, and pruned otherwise."""
_COLOURS = {"accepted": "good", "pruned": "bad", "stale": "terrible", "prefill": "grey"}


class Span(NamedTuple):
    """A span is something that took time, in seconds of rank 0's clock."""

    rank: int
    row: str
    """The row is one of ROWS."""
    name: str
    """The name of a segment's span, on any row, is one of VERDICTS; others are prefill, draft and
    schedule."""
    begin: float
    end: float
    facts: dict[str, Any]
    """A segment's facts are request, segment (its number), rows, accepted (rows that became text)
    and dead (rows that were refused before the span began). The row `send` has bytes."""


class Fates:
    """Fates say what became of each node of a request, and when (seconds of rank 0's clock).

    Node ids are those of core/messages."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._alive: set[int] = set()
        self._accepted: set[int] = set()
        self._died: dict[int, float] = {}
        self._named: dict[int, int] = {}

    def sent(
        self, ids: Sequence[int], parents: Sequence[int], named: Mapping[int, int] | None = None
    ) -> None:
        """Record that nodes were sent, whose ids are names on a server (core/dsi.py) if `named`."""
        self._named.update(named or {})
        nodes = [self._named.get(i, i) for i in ids]
        self._parents.update(zip(nodes, (self._named.get(p, p) for p in parents), strict=True))
        self._alive.update(node for node in nodes if node not in self._accepted)

    def decided(self, path: Iterable[int], root: int, now: float) -> None:
        """Record that `path` became text and that `root` and its descendants live on."""
        self._accepted.update(path)
        below = {root}
        for i in sorted(self._alive):  # a parent's id is below its children's
            if self._parents[i] in below:
                below.add(i)
        for i in self._alive - below - self._accepted:
            self._died[i] = now
        self._alive &= below

    def of(self, ids: Iterable[int], begin: float) -> tuple[str, int, int]:
        """Return the verdict on work on these nodes that began at `begin`, and two counts.

        The counts are how many of the nodes were accepted and how many were dead by then."""
        nodes = [self._named.get(i, i) for i in ids]
        accepted = sum(i in self._accepted for i in nodes)
        dead = sum(self._died.get(i, begin + 1) <= begin for i in nodes)
        return (
            ("accepted" if accepted else "stale" if dead == len(nodes) else "pruned"),
            accepted,
            dead,
        )

    def judge(self, span: Span) -> Span:
        """Return the span named by its verdict, with counts in its facts instead of the node `ids`.

        A span without `ids`, which is not of work on a segment, is returned as it is."""
        if "ids" not in span.facts:
            return span
        facts = dict(span.facts)
        ids = facts.pop("ids")
        name, accepted, dead = self.of(ids, span.begin)
        return span._replace(
            name=name, facts={**facts, "rows": len(ids), "accepted": accepted, "dead": dead}
        )


def untangled(spans: Iterable[Span]) -> list[Span]:
    """Return the spans sorted by begin and clipped so that none overlap on a row.

    On each row a span begins no earlier than the one before ends. Messages on a link or in a queue
    wait for each other, and a viewer wants slices that do not overlap."""
    ends: dict[tuple[int, str], float] = {}
    clipped = []
    for span in sorted(spans, key=lambda s: s.begin):
        row = span.rank, span.row
        begin = min(max(span.begin, ends.get(row, span.begin)), span.end)
        ends[row] = max(span.end, ends.get(row, span.end))
        clipped.append(span._replace(begin=begin))
    return sorted(clipped, key=lambda s: s.begin)


# ---- files ---------------------------------------------------------------------------------------
def write(path: str | os.PathLike[str], spans: Iterable[Span], facts: dict[str, Any]) -> None:
    """Write the spans as Chrome-trace JSON, beside the name, which the file gets when it is whole.

    `facts` (method, stages, emulated ...) are kept with it."""
    spans = sorted(spans, key=lambda s: s.begin)
    zero = spans[0].begin if spans else 0.0
    ranks = sorted({s.rank for s in spans})
    events: list[dict] = []
    for rank in ranks:
        name = "rank 0, coordinator" if rank == 0 else f"rank {rank}, stage {rank}"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        events.append(
            {"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}}
        )
    for rank, row in sorted({(s.rank, ROWS.index(s.row)) for s in spans}):
        events.append(
            {"ph": "M", "name": "thread_name", "pid": rank, "tid": row, "args": {"name": ROWS[row]}}
        )
    for s in spans:
        event = {
            "ph": "X",
            "pid": s.rank,
            "tid": ROWS.index(s.row),
            "name": s.name,
            "args": s.facts,
        }
        event |= {"ts": round((s.begin - zero) * 1e6, 1), "dur": round((s.end - s.begin) * 1e6, 1)}
        events.append(event | ({"cname": _COLOURS[s.name]} if s.name in _COLOURS else {}))
    with replacing(path) as beside, open(beside, "w") as file:
        json.dump({"displayTimeUnit": "ms", "otherData": facts, "traceEvents": events}, file)


def read(path: str | os.PathLike[str]) -> tuple[list[Span], dict[str, Any]]:
    """Return the spans and facts of a file that `write` made.

    Raise UserError, which says what is wrong, for any other file."""
    try:
        trace = json.loads(Path(path).read_text())
    except OSError as error:
        raise UserError(f"cannot read the trace {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(
            f"{path} is not JSON: give a file that a run wrote with trace=FILE"
        ) from None
    try:
        spans = [_read_event(e) for e in trace["traceEvents"] if e["ph"] == "X"]
        facts = dict(trace.get("otherData", {}))
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        raise UserError(
            f"{path} is no trace of flowspec's: give a file that a run wrote with trace=FILE"
        ) from None
    need(bool(spans), f"{path} holds no spans")
    return spans, facts


def _read_event(event: dict) -> Span:
    begin = event["ts"] / 1e6
    return Span(
        int(event["pid"]),
        ROWS[event["tid"]],
        event["name"],
        begin,
        begin + event["dur"] / 1e6,
        event["args"],
    )
