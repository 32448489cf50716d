"""The messages of the ring by name: what is packed into each, and how it is read again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspec.comm.base import Message
from flowspec.comm.codec import Limit, Limits
from flowspec.core.cost import Point
from flowspec.core.curve import Curve
from flowspec.core.messages import PREFILL_ROWS, Cost, Idle, Prune, Segment, Started
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import Request, Sampling
from flowspec.trace import Span

FORMAT = 2
"""of the messages below, by name and content: raise it with every change, and ranks that would misread each other do not start"""


# ---- round the ring --------------------------------------------------------------------------------
def start(
    request: Request,
    trace: bool,
    features: bool,
    layers: Sequence[int],
    switches: PolicyConfig,
    fresh: bool = False,
) -> Message:
    """A request begins: stages make room for it, and note what they do when it is traced. `features`: rank 0's drafter reads
    the last stage's rows of the prompt and of all nodes that become text; `layers`: it reads what enters these layers there;
    `fresh`: what stages measured in earlier requests is forgotten."""
    about = {
        "request": request.id,
        "trace": trace,
        "features": features,
        "layers": list(layers),
        "fresh": fresh,
    }
    about |= {"drop_dead": switches.drop_dead, "abort": switches.abort}
    return Message("start", about | {"sampling": dataclasses.asdict(request.sampling)})


def read_sampling(message: Message) -> Sampling:
    return Sampling(**message.meta["sampling"])


def prefill(request: int, rows: Tensor) -> Message:
    """Prompt rows: token ids to the first stage, features after it. Nobody waits for an answer."""
    return Message("prefill", {"request": request, "sent": time.monotonic()}, (rows,))


def prompt_features(request: int, rows: Tensor) -> Message:
    """A chunk of the prompt back at rank 0, whose drafter reads features: the last stage's normed rows."""
    return Message("prompt_features", {"request": request, "sent": time.monotonic()}, (rows,))


def _numbered(request: int, number: int) -> dict[str, Any]:
    """Of a segment: its number, and when it left (by the sender's clock)."""
    return {"request": request, "number": number, "sent": time.monotonic()}


def segment(request: int, segment: Segment) -> Message:
    """A segment on its first hop: per node its id, its parent and its token."""
    nodes, tokens = (
        torch.tensor([segment.ids, segment.parents], dtype=torch.int32),
        torch.tensor(segment.tokens, dtype=torch.int32),
    )
    return Message("segment", _numbered(request, segment.number), (nodes, tokens))


def rows_of(request: int, segment: Segment, rows: Tensor) -> Message:
    """A segment on its way between stages: per node its id, its parent, its token (by which a last stage knows whether the node
    became text) and a feature row."""
    return Message(
        "segment",
        _numbered(request, segment.number),
        (torch.tensor(segment[1:], dtype=torch.int32), rows),
    )


def read_segment(message: Message) -> Segment:
    """The nodes of either; on the first hop their tokens are the rows."""
    nodes, rows = message.tensors
    ids, parents, *tokens = nodes.tolist()
    return Segment(
        message.meta["number"],
        tuple(ids),
        tuple(parents),
        tuple(tokens[0] if tokens else rows.tolist()),
    )


def features(
    request: int, number: int, ids: Sequence[int], positions: Tensor, rows: Tensor
) -> Message:
    """A segment back at rank 0 that verifies itself: the last stage's normed rows."""
    return Message(
        "features",
        _numbered(request, number),
        (torch.tensor(ids, dtype=torch.int32), positions, rows),
    )


def choices(
    request: int,
    number: int,
    ids: list[int],
    tokens: list[int],
    gaps: list[float],
    rows: Tensor | None = None,
) -> Message:
    """A segment back from a last stage that verifies: which of its nodes became text (often none), the target's token after each, and
    how clear it was.

    rows: their feature rows, for a drafter that reads features."""
    table = torch.tensor([ids, tokens], dtype=torch.int32)
    more = () if rows is None else (rows,)
    return Message(
        "choices",
        _numbered(request, number),
        (table, torch.tensor(gaps, dtype=torch.float64), *more),
    )


def read_features(message: Message) -> tuple[list[int], Tensor]:
    """Of a segment that came back: the nodes whose feature rows came along, and these rows [n, hidden]."""
    nodes, *_, rows = message.tensors
    return (nodes if message.kind == "features" else nodes[0]).tolist(), rows


# ---- beside the ring -------------------------------------------------------------------------------
def prune(request: int, prune: Prune) -> Message:
    return Message("prune", {"request": request, **prune._asdict()})


def read_prune(message: Message) -> Prune:
    return Prune(*(message.meta[name] for name in Prune._fields))


def text_features(request: int, layers: Sequence[int], at: int, rows: Tensor) -> Message:
    """What entered these layers at the text's tokens from position `at` on, [n, layers * hidden], for a drafter that reads it."""
    return Message("text_features", {"request": request, "layers": list(layers), "at": at}, (rows,))


NEWS: dict[str, type[Started] | type[Cost] | type[Idle]] = {
    "started": Started,
    "cost": Cost,
    "idle": Idle,
}
"""what stages tell rank 0 (core/machine.py), by the kind of its message"""
_KINDS = {event: kind for kind, event in NEWS.items()}


def news(request: int, event: Started | Cost | Idle) -> Message:
    about = event._asdict()
    if isinstance(event, Cost):
        about["forward"] = dataclasses.asdict(event.forward)
    return Message(_KINDS[type(event)], {"request": request, **about})


def read_news(message: Message) -> Started | Cost | Idle:
    """KeyError for another kind."""
    event = NEWS[message.kind]
    about = {name: message.meta[name] for name in event._fields}
    if event is Cost:
        about["forward"] = _curve(about["forward"])
    return event(**about)


def _curve(fields: dict[str, Any]) -> Curve:
    knots = tuple((rows, seconds) for rows, seconds in fields["knots"])
    return Curve(knots, (fields["deep"][0], fields["deep"][1]), fields["context"])


def prefilled(request: int) -> Message:
    """A stage has computed a chunk of the prompt: a sign of life, since prefill has no answer."""
    return Message("prefilled", {"request": request})


def end(request: int) -> Message:
    """A request is over: forget it, and answer with a report."""
    return Message("end", {"request": request})


class Report(NamedTuple):
    """What a stage did for a request, and what it has measured in the run so far."""

    busy: float
    """seconds spent computing"""
    rows: int
    """tree rows computed"""
    segments: int
    """forwards that they took"""
    overhead: float
    """CPU seconds of the stage's thread for them beside the model's forward, lm_head and sampling"""
    points: list[Point]
    """measured costs of its forwards"""
    row: float
    """measured: seconds that a row adds to the hop to it"""
    peak_mb: float
    """the most memory that the process ever held, MB"""
    spans: list[Span]
    """what it noted, by its own clock; empty unless the request is traced"""


def report(request: int, report: Report) -> Message:
    return Message("report", {"request": request, **report._asdict()})


def read_report(message: Message) -> Report:
    fields = {name: message.meta[name] for name in Report._fields}
    read = {
        "spans": [Span(*span) for span in fields["spans"]],
        "points": [Point(*point) for point in fields["points"]],
    }
    return Report(**{**fields, **read})


def ping() -> Message:
    """What time is it at your end?"""
    return Message("ping", {"sent": time.monotonic()})


def pong(ping: Message) -> Message:
    return Message("pong", {"sent": ping.meta["sent"], "clock": time.monotonic()})


def loading(megabytes: float, seconds: float) -> Message:
    """A stage has read this much of its weights."""
    return Message("loading", {"megabytes": megabytes, "seconds": seconds})


def loaded(megabytes: float, seconds: float, what: str) -> Message:
    """A stage holds its weights and waits for work."""
    return Message("loaded", {"megabytes": megabytes, "seconds": seconds, "what": what})


STOP = Message("stop")
"""The run is over: leave."""


# ---- how much each can hold ------------------------------------------------------------------------
FACTS = 1 << 16
"""bytes of JSON in any message but a traced report"""
SPANS = 1 << 14
"""bytes of JSON that a stage notes of a position of a traced text"""
ELEMENT = 8
"""bytes of the widest dtype"""


def limits(tree: int, hidden: int, layers: int, positions: int) -> Limits:
    """Every kind of message, and what it can hold in a run of a model with that many hidden units, layers and positions, whose trees
    have at most so many nodes."""
    rows = max(tree, PREFILL_ROWS)
    numbers = (
        8 * ELEMENT * rows
    )  # of each node: id, parent, token, position, gap, and room between tensors
    features = ELEMENT * rows * hidden
    ring = dict.fromkeys(
        ("prefill", "segment", "features", "choices", "prompt_features"),
        Limit(FACTS, numbers + features),
    )
    words = (
        "start",
        "prune",
        "started",
        "cost",
        "idle",
        "prefilled",
        "end",
        "ping",
        "pong",
        "loading",
        "loaded",
        STOP.kind,
    )
    return {
        **ring,
        **dict.fromkeys(words, Limit(FACTS, 0)),
        "text_features": Limit(FACTS, layers * features),
        "report": Limit(FACTS + SPANS * positions, 0),
    }
