"""Each message of the ring has a name; here each is packed, and read again."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowspec.comm.base import Message
from flowspec.comm.codec import Limit, Limits
from flowspec.core.cost import Point
from flowspec.core.curve import Curve
from flowspec.core.messages import (
    KEPT,
    PREFILL_ROWS,
    Batch,
    Commit,
    Cost,
    Drafted,
    DraftNode,
    Idle,
    Piece,
    Prune,
    Segment,
    Started,
)
from flowspec.core.past import Past
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import MOST_LOGPROBS, Request, Sampling
from flowspec.core.stage import Admitted, Gather
from flowspec.sampling import Logprobs
from flowspec.trace import Span

FORMAT = 8
"""This is the version of the messages below, of their names and contents. Raise it with every
change: ranks that would misread each other then do not start."""


# ---- round the ring ------------------------------------------------------------------------------
def start(
    request: Request,
    trace: bool,
    features: bool,
    layers: Sequence[int],
    switches: PolicyConfig,
    fresh: bool = False,
    spread: bool = False,
    past: bool = False,
) -> Message:
    """A request begins: stages make room for it, and note what they do if `trace` is set.

    If `features` is set, rank 0's drafter reads the last stage's rows of the prompt and of all
    nodes that become text. `layers` are the layers whose inputs it reads at these tokens.
    `switches` are those of the request's policy. If `fresh` is set, stages forget what they
    measured in earlier requests. If `spread` is set, the members of a tensor-parallel stage each
    keep a part of the rows between the layers' products (method galaxy). If `past` is set, the
    prompt's tokens go along, for penalties of a last stage that picks."""
    about = {
        "request": request.id,
        "trace": trace,
        "features": features,
        "layers": list(layers),
        "fresh": fresh,
        "spread": spread,
    }
    about |= {"drop_dead": switches.drop_dead, "abort": switches.abort, "known": request.known}
    about["sampling"] = dataclasses.asdict(request.sampling)
    prompt = (torch.tensor(request.prompt, dtype=torch.int32),) if past else ()
    return Message("start", about, prompt)


def read_sampling(message: Message) -> Sampling:
    return Sampling(**message.meta["sampling"])


def read_past(message: Message) -> Past | None:
    """Return what penalties count when a request begins; None if the prompt did not go along."""
    return Past(message.tensors[0].tolist(), message.meta["known"]) if message.tensors else None


def prefill(request: int, rows: Tensor) -> Message:
    """Rows of the prompt go to the next stage; nobody waits for an answer.

    They are token ids on the way to the first stage and features behind it."""
    return Message("prefill", {"request": request, "sent": time.monotonic()}, (rows,))


def prompt_features(request: int, rows: Tensor) -> Message:
    """A chunk of the prompt is back at rank 0, whose drafter reads features.

    `rows` are the last stage's rows behind the final norm."""
    return Message("prompt_features", {"request": request, "sent": time.monotonic()}, (rows,))


def _sent(pieces: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return the facts of a batch.

    They are the time at which it left, by the sender's clock, and of each piece its request, its
    number, how many rows it has, and on what it stands if that is said."""
    return {"pieces": pieces, "sent": time.monotonic()}


def batch(batch: Batch, rows: Tensor | None = None) -> Message:
    """Segments travel over a hop: of each node its id, parent and token, and a row of features.

    By its token, a last stage knows whether a node became text. `rows` are the features [n, hidden]
    that go from one stage to the next. It is None on the first hop, where the tokens are the
    rows."""
    segments = [segment for _, segment in batch.pieces]
    ids = [i for segment in segments for i in segment.ids]
    parents = [i for segment in segments for i in segment.parents]
    tokens = [i for segment in segments for i in segment.tokens]
    about = [
        [request, segment.number, len(segment.ids), *(segment.stands_on or ())]
        for request, segment in batch.pieces
    ]
    if rows is None:
        nodes = torch.tensor([ids, parents], dtype=torch.int32)
        return Message("batch", _sent(about), (nodes, torch.tensor(tokens, dtype=torch.int32)))
    nodes = torch.tensor([ids, parents, tokens], dtype=torch.int32)
    return Message("batch", _sent(about), (nodes, rows))


def read_batch(message: Message) -> Batch:
    """Return the segments of a message of `batch`, on the first hop or a later one."""
    nodes, rows = message.tensors
    columns = nodes.tolist()
    columns = columns if len(columns) == 3 else [*columns, rows.tolist()]
    pieces, first = [], 0
    for request, number, n, *decided in message.meta["pieces"]:
        ids, parents, tokens = (tuple(column[first : first + n]) for column in columns)
        stands_on = Prune(*decided) if decided else None
        pieces.append(Piece(request, Segment(number, ids, parents, tokens, stands_on)))
        first += n
    return Batch(tuple(pieces))


class Answer(NamedTuple):
    """An answer is what comes back of a segment."""

    request: int
    number: int
    ids: list[int]
    """If the last stage verifies, these are the nodes that became text, often none. Otherwise they
    are the nodes that it computed."""
    tokens: list[int]
    """These are the target's tokens after the nodes; the list is empty if rank 0 verifies."""
    gaps: list[float]
    """These are the target's leads of these tokens over the next best ones."""
    positions: Tensor | None
    """These are the nodes' absolute positions, int64 [n]; None unless rank 0 verifies."""
    rows: Tensor | None
    """These are the nodes' features [n, hidden]; None unless rank 0 verifies or its drafter reads
    them."""
    logprobs: Sequence[Logprobs] = ()
    """These are the target's of the tokens, each with as many alternatives; empty unless the
    request asks for them."""


def choices(answers: Sequence[Answer]) -> Message:
    """A batch is back from a last stage that verifies."""
    about = [
        [a.request, a.number, len(a.ids), a.rows is not None, *(len(p.top) for p in a.logprobs[:1])]
        for a in answers
    ]
    table = [[i for a in answers for i in a.ids], [t for a in answers for t in a.tokens]]
    gaps = torch.tensor([gap for a in answers for gap in a.gaps], dtype=torch.float64)
    rows = [a.rows for a in answers if a.rows is not None]
    more = [torch.cat(rows)] if rows else []
    told = [number for a in answers for each in a.logprobs for number in _numbers(each)]
    more += [torch.tensor(told, dtype=torch.float64)] if told else []
    return Message("choices", _sent(about), (torch.tensor(table, dtype=torch.int32), gaps, *more))


def _numbers(logprobs: Logprobs) -> list[float]:
    """Return a token's own log-probability, then tokens and theirs."""
    return [logprobs.own, *itertools.chain.from_iterable(logprobs.top)]


def _read_logprobs(n: int, top: int, numbers: Iterator[float]) -> list[Logprobs]:
    """Return those of the next n tokens, with so many alternatives each."""
    return [
        Logprobs(next(numbers), tuple((int(next(numbers)), next(numbers)) for _ in range(top)))
        for _ in range(n)
    ]


def features(answers: Sequence[Answer]) -> Message:
    """A batch is back at rank 0, which verifies: it gets the last stage's rows behind the final
    norm."""
    about = [[a.request, a.number, len(a.ids), True] for a in answers]
    ids = torch.tensor([i for a in answers for i in a.ids], dtype=torch.int32)
    positions = torch.cat([a.positions for a in answers if a.positions is not None])
    rows = torch.cat([a.rows for a in answers if a.rows is not None])
    return Message("features", _sent(about), (ids, positions, rows))


def read_answers(message: Message) -> list[Answer]:
    """Return the answers of a message of `choices` or of `features`."""
    answers, first, read = [], 0, 0
    verified = message.kind == "choices"
    table, second, *features = message.tensors
    ids, tokens = table.tolist() if verified else (table.tolist(), [])
    asks = any(top for _, _, _, _, *top in message.meta["pieces"])
    numbers = iter(features[-1].tolist() if asks else ())
    for request, number, n, wanted, *top in message.meta["pieces"]:
        own = slice(first, first + n)
        rows = features[0][read : read + n] if wanted else None
        gaps, positions = (second[own].tolist(), None) if verified else ([], second[own])
        told = [each for k in top for each in _read_logprobs(n, k, numbers)]
        answers.append(Answer(request, number, ids[own], tokens[own], gaps, positions, rows, told))
        first, read = first + n, read + (n if wanted else 0)
    return answers


# ---- beside the ring -----------------------------------------------------------------------------
def prunes(prunes: Sequence[tuple[int, Prune]]) -> Message:
    """This is what was decided of some requests at a time."""
    return Message("prunes", {"prunes": [[request, *prune] for request, prune in prunes]})


def read_prunes(message: Message) -> list[tuple[int, Prune]]:
    return [
        (request, Prune(version, anchor, root))
        for request, version, anchor, root in message.meta["prunes"]
    ]


def text_features(request: int, layers: Sequence[int], at: int, rows: Tensor) -> Message:
    """These rows [n, len(layers) * hidden] entered the layers, for a drafter that reads them.

    They belong to the text's tokens from position `at` on."""
    return Message("text_features", {"request": request, "layers": list(layers), "at": at}, (rows,))


NEWS: dict[str, type[Started] | type[Cost] | type[Idle]] = {
    "started": Started,
    "cost": Cost,
    "idle": Idle,
}
"""Stages tell rank 0 these events (core/machine.py), by the kinds of their messages."""
_KINDS = {event: kind for kind, event in NEWS.items()}


def news(event: Started | Cost | Idle) -> Message:
    about = event._asdict()
    if isinstance(event, Cost):
        about["forward"] = dataclasses.asdict(event.forward)
    return Message(_KINDS[type(event)], about)


def read_news(message: Message) -> Started | Cost | Idle:
    """Return the event of a message; raise KeyError if the message is of another kind."""
    event = NEWS[message.kind]
    about = {name: message.meta[name] for name in event._fields}
    if event is Cost:
        about["forward"] = _curve(about["forward"])
    return event(**about)


def _curve(fields: dict[str, Any]) -> Curve:
    knots = tuple((rows, seconds) for rows, seconds in fields["knots"])
    return Curve(knots, (fields["deep"][0], fields["deep"][1]), fields["context"])


def prefilled(request: int) -> Message:
    """A stage has computed a chunk of the prompt.

    This is a sign of life, since prefill has no answer."""
    return Message("prefilled", {"request": request})


def end(request: int) -> Message:
    """A request has ended: the stages forget it and answer with a report."""
    return Message("end", {"request": request})


class Report(NamedTuple):
    """A report is what a stage did for a request, and what it has measured in the run so far."""

    busy: float
    """The stage spent so many seconds computing, for any request, while this one was there."""
    rows: int
    """The stage computed so many tree rows of the request."""
    segments: int
    """The stage did so many forwards over tree rows meanwhile."""
    overhead: float
    """The stage's thread spent so many CPU seconds on these forwards beside the model's forward,
    lm_head and sampling."""
    points: list[Point]
    """These are the measured costs of its forwards."""
    row: float
    """A row adds so many seconds to the hop to the stage, as measured."""
    peak_mb: float
    """The process held at most so much memory, in MB."""
    spans: list[Span]
    """These are the spans that the stage noted, by its own clock; empty unless the request is
    traced."""


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
    """Ask a stage for the time of its clock, for the trace of a request."""
    return Message("ping", {"request": request, "sent": time.monotonic()})


def pong(ping: Message) -> Message:
    return Message("pong", {**ping.meta, "clock": time.monotonic()})


def loading(megabytes: float, seconds: float) -> Message:
    """A stage has read so many megabytes of its weights in so many seconds."""
    return Message("loading", {"megabytes": megabytes, "seconds": seconds})


def loaded(megabytes: float, seconds: float, what: str, cache_rows: int) -> Message:
    """A stage holds its weights and waits for work.

    It has memory for the keys and values of `cache_rows` tokens."""
    about = {"megabytes": megabytes, "seconds": seconds, "what": what}
    return Message("loaded", about | {"cache_rows": cache_rows})


STOP = Message("stop")
"""The run is over: the stage leaves."""


# ---- from a leader to its followers --------------------------------------------------------------
def follow(request: int, layers: Sequence[int], spread: bool) -> Message:
    """A request begins, as `start` says; `spread` says that its rows are spread over the members.

    `layers` are those of the stage's whose inputs rank 0's drafter reads."""
    return Message("follow", {"request": request, "layers": list(layers), "spread": spread})


class Ordered(NamedTuple):
    """An Ordered is what a follower is to compute of one request."""

    request: int
    tree: bool
    """The rows are nodes of a tree; else they are a chunk of the prompt."""
    admitted: Admitted


def compute(parts: Sequence[Ordered], rows: Tensor) -> Message:
    """A forward begins over rows (tokens, or features [n, hidden]) of some requests.

    What each row sees of its cache travels as numbers of cache rows from the part's base on."""
    about = [
        [part.request, part.tree, len(part.admitted.kept), part.admitted.base, part.admitted.length]
        for part in parts
    ]
    behind = [[row - p.admitted.base for row in seen] for p in parts for seen in p.admitted.behind]
    flat = [row for seen in behind for row in seen]
    dtype = torch.int16 if max(flat, default=0) < 1 << 15 else torch.int32
    positions = torch.cat([torch.from_numpy(part.admitted.positions) for part in parts])
    counts = torch.tensor([len(seen) for seen in behind], dtype=torch.int32)
    return Message(
        "compute", {"parts": about}, (rows, positions, counts, torch.tensor(flat, dtype=dtype))
    )


def read_compute(message: Message) -> tuple[list[Ordered], Tensor]:
    rows, positions, counts, flat = message.tensors
    seen = [part.tolist() for part in flat.split(counts.tolist())]
    parts, first = [], 0
    for request, tree, n, base, length in message.meta["parts"]:
        own = slice(first, first + n)
        behind = [[base + row for row in each] for each in seen[own]]
        admitted = Admitted([*range(n)], positions[own].numpy(), base, behind, length)
        parts.append(Ordered(request, tree, admitted))
        first += n
    return parts, rows


def move(request: int, gather: Gather) -> Message:
    """Rows of a request's cache move."""
    about = {"request": request, "base": gather.base}
    return Message("move", about, (torch.tensor(gather.rows, dtype=torch.int32),))


def read_move(message: Message) -> tuple[int, Gather]:
    rows = message.tensors[0].tolist()
    return message.meta["request"], Gather(message.meta["base"], rows)


def multiply(rows: Tensor, two_best: bool) -> Message:
    """Rows of features [n, hidden] are to be multiplied with lm_head.

    If `two_best` is set, only the two highest logits of each row are wanted."""
    return Message("multiply", {"two_best": two_best}, (rows,))


def leave(request: int) -> Message:
    """A request has ended: its cache goes."""
    return Message("leave", {"request": request})


def peak(megabytes: float) -> Message:
    """A follower tells its leader how much memory it held at most."""
    return Message("peak", {"megabytes": megabytes})


# ---- between rank 0 and its drafters -------------------------------------------------
def take_on(request: Request, coupled: bool) -> Message:
    """A drafter is to read the prompt of a request; `prefilled` answers when it has.

    If `coupled` is set, its ranking has the target's sampling noise in it."""
    about = {
        "request": request.id,
        "coupled": coupled,
        "known": request.known,
        "sampling": dataclasses.asdict(request.sampling),
    }
    return Message("take_on", about, (torch.tensor(request.prompt, dtype=torch.int32),))


def read_take_on(message: Message) -> tuple[Request, bool]:
    prompt, about = tuple(message.tensors[0].tolist()), message.meta
    request = Request(
        id=about["request"], prompt=prompt, sampling=read_sampling(message), known=about["known"]
    )
    return request, about["coupled"]


def ask(asked: Mapping[int, Sequence[DraftNode]]) -> Message:
    """A drafter is to propose children for these nodes of some requests."""
    table = [node for nodes in asked.values() for node in nodes]
    about = [[request, len(nodes)] for request, nodes in asked.items()]
    return Message("ask", {"asks": about}, (torch.tensor(table, dtype=torch.int32),))


def read_ask(message: Message) -> dict[int, list[DraftNode]]:
    nodes = iter(DraftNode(*row) for row in message.tensors[0].tolist())
    return {request: [*islice(nodes, n)] for request, n in message.meta["asks"]}


def drafted(answers: Mapping[int, Drafted]) -> Message:
    """A drafter proposes so many children for nodes of some requests."""
    about = [[r, *each.tokens.shape, each.coupled] for r, each in answers.items()]
    each = [*answers.values()]
    parts = (
        [np.array(one.nodes, np.int64) for one in each],
        [one.tokens for one in each],
        [one.z[:, :, 0] for one in each],
        [one.coverage for one in each],
    )
    flat = (np.concatenate([array.ravel() for array in part]) for part in parts)
    return Message("drafted", {"answers": about}, tuple(map(torch.from_numpy, flat)))


def read_drafted(message: Message) -> dict[int, Drafted]:
    nodes, tokens, z, coverage = (part.numpy() for part in message.tensors)
    answers, row, at = {}, 0, 0
    for request, n, k, coupled in message.meta["answers"]:
        rows, cells = slice(row, row + n), slice(at, at + n * k)
        answers[request] = Drafted(
            tuple(nodes[rows].tolist()),
            tokens[cells].reshape(n, k),
            z[cells].reshape(n, k, 1),
            coupled,
            coverage[rows],
        )
        row, at = row + n, at + n * k
    return answers


def text(request: int, commit: Commit) -> Message:
    """The text of a request has grown, which a drafter is to follow."""
    return Message("text", {"request": request, "commit": commit})


def read_text(message: Message) -> tuple[int, Commit]:
    path, tokens, accepted, root = message.meta["commit"]
    return message.meta["request"], Commit(tuple(path), tuple(tokens), tuple(accepted), root)


# ---- how much each can hold ----------------------------------------------------------------------
FACTS = 1 << 16
"""Any message but a traced report holds at most so many bytes of JSON."""
SPANS = 1 << 14
"""A stage notes at most so many bytes of JSON for each position of a traced text."""
NODE = 64
"""A node, its token and whether it was accepted take at most so many bytes of JSON."""
TOGETHER = 64
"""So many requests, each with a whole tree, fit into one forward of a drafter on another rank."""
ELEMENT = 8
"""The widest dtype takes so many bytes."""


def limits(tree: int, hidden: int, layers: int, positions: int) -> Limits:
    """Return each kind of message with the limit of what it holds.

    The limits hold in a run of a model with so many hidden units, layers and positions, whose trees
    have at most `tree` nodes."""
    rows = max(tree, PREFILL_ROWS)
    numbers = (
        8 * ELEMENT * rows
        # a node's id, parent, token, position and gap, and room between tensors
    )
    features = ELEMENT * rows * hidden
    ring = dict.fromkeys(
        ("prefill", "batch", "features", "prompt_features"),
        Limit(FACTS, numbers + features),
    )
    logprobs = ELEMENT * (1 + 2 * MOST_LOGPROBS) * rows
    words = (
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
        "follow",
        "leave",
        "peak",
        STOP.kind,
    )
    return {
        **ring,
        **dict.fromkeys(words, Limit(FACTS, 0)),
        "start": Limit(FACTS, ELEMENT * positions),
        "choices": Limit(FACTS, numbers + features + logprobs),
        "multiply": Limit(FACTS, numbers + features),
        "compute": Limit(FACTS, numbers + features + 4 * rows * (rows + positions)),
        "move": Limit(FACTS, 4 * positions + numbers),
        "text_features": Limit(FACTS, layers * features),
        "text": Limit(FACTS + NODE * rows, 0),
        "take_on": Limit(FACTS, ELEMENT * positions),
        "ask": Limit(FACTS, TOGETHER * numbers),
        "drafted": Limit(FACTS, TOGETHER * 2 * ELEMENT * (1 + KEPT) * rows),
        "report": Limit(FACTS + SPANS * positions, 0),
    }
