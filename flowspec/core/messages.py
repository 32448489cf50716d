"""Everything rank 0's scheduler hears (events) and says (actions), and what a stage hears. Pure.

Node ids are stable: they grow in the order of creation, a parent's id is below its children's, and no
id is used twice in a request. The root is the newest known token that has not been through the target.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flowspec.core.curve import Curve

PREFILL_ROWS = 128
"""of the prompt in a message"""
FRAME_BYTES = 160
"""of a message beside its tensors, about: header, kind, facts, dtypes and shapes (comm/codec.py)"""
KEPT = 20
"""candidates that a drafter names for a node at most, if it knows a distribution"""


# ---- rank 0 to the stages --------------------------------------------------------------------------
class Segment(NamedTuple):
    """Nodes of one request to verify, parents before children.

    A root's parent is the last committed node (or -1). A run uses no number twice."""

    number: int
    ids: tuple[int, ...]
    parents: tuple[int, ...]
    tokens: tuple[int, ...]

    def only(self, kept: Sequence[int]) -> Segment:
        """The part at these indices."""
        if len(kept) == len(self.ids):
            return self
        ids, parents, tokens = (tuple(column[k] for k in kept) for column in self[1:])
        return Segment(self.number, ids, parents, tokens)


class Piece(NamedTuple):
    """A segment on its way, and whose it is."""

    request: int
    segment: Segment


class Batch(NamedTuple):
    """Segments of different requests that travel together: one message a hop, one forward a stage.

    It goes by the number of its first segment."""

    pieces: tuple[Piece, ...]

    @property
    def number(self) -> int:
        return self.pieces[0].segment.number

    @property
    def rows(self) -> int:
        return sum(len(piece.segment.ids) for piece in self.pieces)


class Prune(NamedTuple):
    """What was decided: the path up to `anchor` is text now, and only `root` and its descendants live on.

    It may come late, early or never. A stage derives the rest from the parents it was given."""

    version: int
    anchor: int
    root: int


# ---- actions ---------------------------------------------------------------------------------------
class DraftNode(NamedTuple):
    """A node the drafter should expand. `parent` is the anchor when the node is the root."""

    id: int
    parent: int
    token: int


class Draft(NamedTuple):
    """Run one drafter forward over nodes of some requests and propose children for each."""

    asks: tuple[tuple[int, tuple[DraftNode, ...]], ...]
    """pairs of a request and its nodes"""


class Commit(NamedTuple):
    """Tokens that are final now, in order; `path` are the nodes they were picked at (the first is the old root).

    `accepted[i]`: the token had been drafted and sent before the target picked it."""

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    root: int
    """The id of the last token's node: the new root."""


class Wake(NamedTuple):
    """Call again at this time (seconds of the driver's clock) unless something comes before."""

    at: float


class Finish(NamedTuple):
    """The text is complete: `stop` (an end token) or `length` (the limit of new tokens)."""

    reason: str


Consequence = Prune | Commit | Finish
"""what comes of a decision"""


class Decision(NamedTuple):
    """The text of one request has grown; `what` follows from it, in this order."""

    request: int
    what: tuple[Consequence, ...]


Action = Batch | Draft | Decision | Wake


# ---- events ----------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A drafter's children for one node, best first."""

    tokens: np.ndarray
    """int64 [k]"""
    z: np.ndarray
    """float64 [k], or [k, D] by D drafters: log-probabilities at the request's temperature (1 when greedy), plus the target's own keyed
    Gumbel noise at that position if coupled"""
    coverage: float = 0.97
    """how often the target's choice is in the list"""
    coupled: bool = False
    """z has that noise in it"""


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """The drafter's answer: the proposals of n nodes as arrays, k candidates each. Nodes that it cannot go on from are left out.

    Several drafters that answer as one (draft/mixture.py) say a z each, D in all; else D is 1."""

    nodes: tuple[int, ...]
    tokens: np.ndarray
    """int64 [n, k]"""
    z: np.ndarray
    """float64 [n, k, D]; -inf behind a list that is shorter"""
    coupled: bool
    coverage: np.ndarray
    """float64 [n]"""

    @classmethod
    def pack(cls, ids: Iterable[int], proposals: Iterable[Proposal | None]) -> Drafted:
        """One proposal a node; None: it cannot go on from there."""
        pairs = [(id, p) for id, p in zip(ids, proposals, strict=True) if p is not None]
        k = max((len(p.tokens) for _, p in pairs), default=0)
        tokens, z = (
            np.zeros((len(pairs), k), np.int64),
            np.full((len(pairs), k, _drafters(pairs[0][1]) if pairs else 1), -np.inf),
        )
        for row, (_, p) in enumerate(pairs):
            tokens[row, : len(p.tokens)] = p.tokens
            z[row, : len(p.tokens)] = p.z.reshape(len(p.tokens), z.shape[2])
        coupled = any(p.coupled for _, p in pairs)
        return cls(
            tuple(id for id, _ in pairs),
            tokens,
            z,
            coupled,
            np.array([p.coverage for _, p in pairs]),
        )

    def proposal(self, node: int) -> Proposal | None:
        """The candidates of one node; None if there are none."""
        if node not in self.nodes:
            return None
        row = self.nodes.index(node)
        there = self.z[row, :, 0] > -np.inf
        return Proposal(
            self.tokens[row][there], self.z[row][there], float(self.coverage[row]), self.coupled
        )

    def only(self, rows: list[int]) -> Drafted:
        """The answer for some of its nodes."""
        return Drafted(
            tuple(self.nodes[r] for r in rows),
            self.tokens[rows],
            self.z[rows],
            self.coupled,
            self.coverage[rows],
        )


def _drafters(proposal: Proposal) -> int:
    return proposal.z.shape[1] if proposal.z.ndim == 2 else 1


class Read(NamedTuple):
    """The drafter has read the prompt of a request: it can be asked for children of its nodes."""

    request: int


class Answered(NamedTuple):
    """A drafter forward is over, with an answer for each request whose nodes were in it."""

    answers: tuple[tuple[int, Drafted], ...]


Choose = Callable[[int, Sequence[int]], int]
"""(node, the nodes decided before it) -> the token that the target picks after it"""


class Returned(NamedTuple):
    """A segment came back, and what the target picks after these of its nodes can be told.

    A last stage that picks walks itself: they are those that are text, often none. When rank 0 picks, all that live."""

    request: int
    number: int
    ids: tuple[int, ...]
    choose: Choose
    """asked of the nodes of the walk alone, once each and in their order"""


class Back(NamedTuple):
    """Segments came back together, as they were computed."""

    segments: tuple[Returned, ...]


class Started(NamedTuple):
    """The first stage took a batch off its queue: `rows` were alive, and it expects to be free in `expected` seconds.

    `waited` is how long the batch had lain in its queue."""

    number: int
    rows: int
    expected: float
    waited: float


class Cost(NamedTuple):
    """What a stage has measured: its forwards, and that its hop over n rows takes `row` * n seconds more than over none."""

    stage: int
    forward: Curve
    row: float


class Idle(NamedTuple):
    """The first stage abandoned a batch none of whose rows lived any more: it is free now."""


class Woke(NamedTuple):
    """The time of a Wake has come."""


Event = Read | Answered | Back | Started | Cost | Idle | Woke
