"""Who did what when: spans of all ranks on one clock, and how they are kept in a file.

The runtime and the simulator make the same spans, so the same pictures, verdicts and figures are made of both. The file is
Chrome's trace format (JSON): it opens in https://ui.perfetto.dev, a process a rank, a thread a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowspec.errors import UserError, need
from flowspec.files import replacing

ROWS = ("compute", "send", "receive", "draft")
"""compute: forwards (rank 0: what the scheduler does); send: bytes on their way to the next rank of the ring; receive:
arrived, waiting for this rank; draft: the drafter's forwards (rank 0)"""
VERDICTS = ("accepted", "pruned", "stale")
"""of a segment: a token of it became text; all of its rows were refused later; all were refused before this began"""
_COLOURS = {"accepted": "good", "pruned": "bad", "stale": "terrible", "prefill": "grey"}


class Span(NamedTuple):
    """Something that took time; seconds of rank 0's clock."""

    rank: int
    row: str
    """one of ROWS"""
    name: str
    """of a segment, on any row: one of VERDICTS; else prefill, draft, schedule"""
    begin: float
    end: float
    facts: dict[str, Any]
    """of a segment: request, segment (its number), rows, accepted (rows that became text), dead (rows that were refused
    before this began); send: bytes"""


class Fates:
    """What became of each node of a request, and when it was decided (seconds of rank 0's clock). Node ids as in core/messages."""

    def __init__(self) -> None:
        self._parents: dict[int, int] = {}
        self._alive: set[int] = set()
        self._accepted: set[int] = set()
        self._died: dict[int, float] = {}

    def sent(self, ids: Sequence[int], parents: Sequence[int]) -> None:
        self._parents.update(zip(ids, parents, strict=True))
        self._alive.update(ids)

    def decided(self, path: Iterable[int], root: int, now: float) -> None:
        """`path` became text, `root` and its descendants live on."""
        self._accepted.update(path)
        below = {root}
        for i in sorted(self._alive):  # a parent's id is below its children's
            if self._parents[i] in below:
                below.add(i)
        for i in self._alive - below - self._accepted:
            self._died[i] = now
        self._alive &= below

    def of(self, ids: Iterable[int], begin: float) -> tuple[str, int, int]:
        """The verdict on work on these nodes that began at `begin`, how many were accepted, how many were dead by then."""
        nodes = list(ids)
        accepted = sum(i in self._accepted for i in nodes)
        dead = sum(self._died.get(i, begin + 1) <= begin for i in nodes)
        return (
            ("accepted" if accepted else "stale" if dead == len(nodes) else "pruned"),
            accepted,
            dead,
        )

    def judge(self, span: Span) -> Span:
        """A span of work on a segment, whose facts hold its node `ids`: now named by its verdict, with counts for the ids."""
        if "ids" not in span.facts:
            return span
        facts = dict(span.facts)
        ids = facts.pop("ids")
        name, accepted, dead = self.of(ids, span.begin)
        return span._replace(
            name=name, facts={**facts, "rows": len(ids), "accepted": accepted, "dead": dead}
        )


def untangled(spans: Iterable[Span]) -> list[Span]:
    """Sorted by begin; on each row a span begins no earlier than the one before ends (messages on a link, or in a queue,
    wait for each other; a viewer wants slices that do not overlap)."""
    ends: dict[tuple[int, str], float] = {}
    clipped = []
    for span in sorted(spans, key=lambda s: s.begin):
        row = span.rank, span.row
        begin = min(max(span.begin, ends.get(row, span.begin)), span.end)
        ends[row] = max(span.end, ends.get(row, span.end))
        clipped.append(span._replace(begin=begin))
    return sorted(clipped, key=lambda s: s.begin)


# ---- files -----------------------------------------------------------------------------------------
def write(path: str | os.PathLike[str], spans: Iterable[Span], facts: dict[str, Any]) -> None:
    """Chrome-trace JSON, written beside and renamed. `facts` (method, stages, emulated ...) are kept with it."""
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
    """The spans and facts of a file that `write` made. UserError says what is wrong with another."""
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
