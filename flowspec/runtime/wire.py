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
from flowspec.core.messages import PREFILL_ROWS, Batch, Cost, Idle, Piece, Prune, Segment, Started
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import Request, Sampling
from flowspec.trace import Span

FORMAT = 3
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


def _sent(pieces: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Facts of a batch: when it left (by the sender's clock), and of each piece its request, its number and its rows."""
    return {"pieces": pieces, "sent": time.monotonic()}


def batch(batch: Batch, rows: Tensor | None = None) -> Message:
    """Segments on a hop: per node its id, its parent, its token (by which a last stage knows whether the node became text) and,
    between stages, a feature row. `rows`: [n, hidden]; None on the first hop, where the tokens are the rows."""
    segments = [segment for _, segment in batch.pieces]
    ids, parents, tokens = ([i for own in column for i in own] for column in _columns(segments))
    about = [[request, segment.number, len(segment.ids)] for request, segment in batch.pieces]
    if rows is None:
        nodes = torch.tensor([ids, parents], dtype=torch.int32)
        return Message("batch", _sent(about), (nodes, torch.tensor(tokens, dtype=torch.int32)))
    nodes = torch.tensor([ids, parents, tokens], dtype=torch.int32)
    return Message("batch", _sent(about), (nodes, rows))


def read_batch(message: Message) -> Batch:
    """The segments of either."""
    nodes, rows = message.tensors
    columns = nodes.tolist()
    columns = columns if len(columns) == 3 else [*columns, rows.tolist()]
    pieces, first = [], 0
    for request, number, n in message.meta["pieces"]:
        own = (tuple(column[first : first + n]) for column in columns)
        pieces.append(Piece(request, Segment(number, *own)))
        first += n
    return Batch(tuple(pieces))


class Answer(NamedTuple):
    """What comes back of a segment."""

    request: int
    number: int
    ids: list[int]
    """Of a last stage that verifies: which of its nodes became text, often none. Else: those that it computed."""
    tokens: list[int]
    """the target's token after each; none if rank 0 verifies"""
    gaps: list[float]
    """how clear it was"""
    positions: Tensor | None
    """int64 [n], if rank 0 verifies"""
    rows: Tensor | None
    """feature rows [n, hidden], if rank 0 verifies, or if its drafter reads them"""


def choices(answers: Sequence[Answer]) -> Message:
    """A batch back from a last stage that verifies."""
    about = [[a.request, a.number, len(a.ids), a.rows is not None] for a in answers]
    table = [[i for a in answers for i in a.ids], [t for a in answers for t in a.tokens]]
    gaps = torch.tensor([gap for a in answers for gap in a.gaps], dtype=torch.float64)
    rows = [a.rows for a in answers if a.rows is not None]
    more = (torch.cat(rows),) if rows else ()
    return Message("choices", _sent(about), (torch.tensor(table, dtype=torch.int32), gaps, *more))


def features(answers: Sequence[Answer]) -> Message:
    """A batch back at rank 0 that verifies itself: the last stage's normed rows."""
    about = [[a.request, a.number, len(a.ids), True] for a in answers]
    ids = torch.tensor([i for a in answers for i in a.ids], dtype=torch.int32)
    positions = torch.cat([a.positions for a in answers if a.positions is not None])
    rows = torch.cat([a.rows for a in answers if a.rows is not None])
    return Message("features", _sent(about), (ids, positions, rows))


def read_answers(message: Message) -> list[Answer]:
    """The segments of either."""
    answers, first, read = [], 0, 0
    verified = message.kind == "choices"
    table, second, *features = message.tensors
    ids, tokens = table.tolist() if verified else (table.tolist(), [])
    for request, number, n, wanted in message.meta["pieces"]:
        own = slice(first, first + n)
        rows = features[0][read : read + n] if wanted else None
        gaps, positions = (second[own].tolist(), None) if verified else ([], second[own])
        answers.append(Answer(request, number, ids[own], tokens[own], gaps, positions, rows))
        first, read = first + n, read + (n if wanted else 0)
    return answers


def _columns(segments: Sequence[Segment]) -> tuple[list[tuple[int, ...]], ...]:
    return (
        [segment.ids for segment in segments],
        [segment.parents for segment in segments],
        [segment.tokens for segment in segments],
    )


# ---- beside the ring -------------------------------------------------------------------------------
def prunes(prunes: Sequence[tuple[int, Prune]]) -> Message:
    """What was decided of some requests at a time."""
    return Message("prunes", {"prunes": [[request, *prune] for request, prune in prunes]})


def read_prunes(message: Message) -> list[tuple[int, Prune]]:
    return [
        (request, Prune(version, anchor, root))
        for request, version, anchor, root in message.meta["prunes"]
    ]


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


def news(event: Started | Cost | Idle) -> Message:
    about = event._asdict()
    if isinstance(event, Cost):
        about["forward"] = dataclasses.asdict(event.forward)
    return Message(_KINDS[type(event)], about)


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
    """seconds spent computing while the request was there, whosever rows"""
    rows: int
    """tree rows computed"""
    segments: int
    """forwards over tree rows meanwhile"""
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


def ping(request: int) -> Message:
    """What time is it at your end? (Asked for the trace of a request.)"""
    return Message("ping", {"request": request, "sent": time.monotonic()})


def pong(ping: Message) -> Message:
    return Message("pong", {**ping.meta, "clock": time.monotonic()})


def loading(megabytes: float, seconds: float) -> Message:
    """A stage has read this much of its weights."""
    return Message("loading", {"megabytes": megabytes, "seconds": seconds})


def loaded(megabytes: float, seconds: float, what: str, cache_rows: int) -> Message:
    """A stage holds its weights, has memory for the keys and values of so many tokens, and waits for work."""
    about = {"megabytes": megabytes, "seconds": seconds, "what": what}
    return Message("loaded", about | {"cache_rows": cache_rows})


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
        ("prefill", "batch", "features", "choices", "prompt_features"),
        Limit(FACTS, numbers + features),
    )
    words = (
        "start",
        "prunes",
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
