"""The messages of the ring by name: what is packed into each, and how it is read again."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowspec.comm.base import Message
from flowspec.core.cost import Point
from flowspec.core.curve import Curve
from flowspec.core.messages import Cost, Idle, Prune, Segment, Started
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import Request, Sampling
from flowspec.trace import Span


# ---- round the ring --------------------------------------------------------------------------------
def start(request: Request, trace: bool, features: bool, layers: Sequence[int], switches: PolicyConfig) -> Message:
    """A request begins: stages make room for it, and note what they do when it is traced. `features`: rank 0's drafter reads
    the last stage's rows of the prompt and of all nodes that become text; `layers`: it reads what enters these layers there."""
    about = {"request": request.id, "trace": trace, "features": features, "layers": list(layers)}
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
    return rows_of(request, segment.number, segment.ids, segment.parents, torch.tensor(segment.tokens, dtype=torch.int32))


def rows_of(request: int, number: int, ids: Sequence[int], parents: Sequence[int], rows: Tensor, tokens: Sequence[int] = ()) -> Message:
    """A segment on its way: per node its id, its parent, and a token (first hop) or a feature row.

    `tokens` go along with feature rows if the last stage is to tell which nodes became text."""
    nodes = torch.tensor([ids, parents, *([tokens] if tokens else [])], dtype=torch.int32)
    return Message("segment", _numbered(request, number), (nodes, rows))


def read_nodes(message: Message) -> tuple[list[int], list[int]]:
    ids, parents = message.tensors[0][:2].tolist()
    return ids, parents


def read_tokens(message: Message) -> list[int]:
    """The tokens of a segment's nodes: its rows on the first hop, else those that went along (none if they did not)."""
    nodes, rows = message.tensors
    return rows.tolist() if rows.ndim == 1 else nodes[2].tolist() if len(nodes) > 2 else []


def features(request: int, number: int, ids: list[int], positions: Tensor, rows: Tensor) -> Message:
    """A segment back at rank 0 that verifies itself: the last stage's normed rows."""
    return Message("features", _numbered(request, number), (torch.tensor(ids, dtype=torch.int32), positions, rows))


def choices(
    request: int, number: int, ids: list[int], tokens: list[int], gaps: list[float], accepted: tuple[list[int], Tensor] | None = None
) -> Message:
    """A segment back from a last stage that verifies: the target's token after each node, and how clear it was.

    `accepted`: ids and feature rows of those nodes that became text, for a drafter that reads features."""
    table = torch.tensor([ids, tokens], dtype=torch.int32)
    more = () if accepted is None else (torch.tensor(accepted[0], dtype=torch.int32), accepted[1])
    return Message("choices", _numbered(request, number), (table, torch.tensor(gaps, dtype=torch.float64), *more))


def read_features(message: Message) -> tuple[list[int], Tensor]:
    """Of a segment that came back: the nodes whose feature rows came along, and these rows [n, hidden]."""
    *_, rows = message.tensors
    ids = message.tensors[0] if message.kind == "features" else message.tensors[2]
    return ids.tolist(), rows


# ---- beside the ring -------------------------------------------------------------------------------
def prune(request: int, prune: Prune) -> Message:
    return Message("prune", {"request": request, **prune._asdict()})


def read_prune(message: Message) -> Prune:
    return Prune(*(message.meta[name] for name in Prune._fields))


def text_features(request: int, layers: Sequence[int], at: int, rows: Tensor) -> Message:
    """What entered these layers at the text's tokens from position `at` on, [n, layers * hidden], for a drafter that reads it."""
    return Message("text_features", {"request": request, "layers": list(layers), "at": at}, (rows,))


def started(request: int, started: Started) -> Message:
    return Message("started", {"request": request, **started._asdict()})


def read_started(message: Message) -> Started:
    return Started(*(message.meta[name] for name in Started._fields))


def cost(request: int, cost: Cost) -> Message:
    return Message("cost", {"request": request, **cost._asdict(), "forward": dataclasses.asdict(cost.forward)})


def read_cost(message: Message) -> Cost:
    forward = message.meta["forward"]
    knots = tuple((rows, seconds) for rows, seconds in forward["knots"])
    curve = Curve(knots, (forward["deep"][0], forward["deep"][1]), forward["context"])
    return Cost(message.meta["stage"], curve, message.meta["row"])


def idle(request: int) -> Message:
    """The first stage abandoned a forward, so it is free earlier than it said."""
    return Message("idle", {"request": request})


def read_idle(message: Message) -> Idle:
    return Idle()


def prefilled(request: int) -> Message:
    """A stage has computed a chunk of the prompt: a sign of life, since prefill has no answer."""
    return Message("prefilled", {"request": request})


def end(request: int) -> Message:
    """A request is over: forget it, and answer with a report."""
    return Message("end", {"request": request})


class Report(NamedTuple):
    """What a stage did for a request."""

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
    read = {"spans": [Span(*span) for span in fields["spans"]], "points": [Point(*point) for point in fields["points"]]}
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
