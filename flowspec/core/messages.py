"""These are the events that rank 0's scheduler hears, its actions, and what a stage hears.

Node ids are stable: they grow in the order of creation, a parent's id is below its children's, and
no id is used twice in a request. The root is the newest known token that has not been through the
target. This module is pure (no torch, clock or I/O)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flowspec.core.curve import Curve

PREFILL_ROWS = 128
"""A message holds at most this many rows of the prompt."""
FRAME_BYTES = 160
"""A message takes about this many bytes beside its tensors: header, kind, facts, dtypes and shapes
(comm/codec.py)."""
KEPT = 20
"""A drafter names at most this many candidates for a node, if it knows a distribution."""


# ---- rank 0 to the stages ------------------------------------------------------------------------
class Prune(NamedTuple):
    """A prune says what was decided: the path up to `anchor` is text now.

    Only `root` and its descendants live on. A prune may come late, early or never. A stage derives
    the rest from the parents that it was given."""

    version: int
    anchor: int
    root: int


class Segment(NamedTuple):
    """A segment holds nodes of one request to verify, parents before children.

    A root's parent is the last committed node (or -1). Its number is that of the batch it leaves
    in; a run uses none twice for a request."""

    number: int
    ids: tuple[int, ...]
    parents: tuple[int, ...]
    tokens: tuple[int, ...]
    stands_on: Prune | None = None
    """This was decided before it left, for a stage that might hear of it later (core/dsi.py)."""

    def only(self, kept: Sequence[int]) -> Segment:
        """Return the part of the segment at these indices."""
        if len(kept) == len(self.ids):
            return self
        ids, parents, tokens = (
            tuple(column[k] for k in kept) for column in (self.ids, self.parents, self.tokens)
        )
        return Segment(self.number, ids, parents, tokens, self.stands_on)


class Piece(NamedTuple):
    """A piece is a segment on its way, with the request to which it belongs."""

    request: int
    segment: Segment


class Batch(NamedTuple):
    """A batch holds segments of different requests that travel together.

    It is one message on each hop and one forward in each stage. Its segments share its number."""

    pieces: tuple[Piece, ...]
    server: int = 0
    """It goes to this target server."""

    @property
    def number(self) -> int:
        return self.pieces[0].segment.number

    @property
    def rows(self) -> int:
        return sum(len(piece.segment.ids) for piece in self.pieces)


# ---- actions -------------------------------------------------------------------------------------
class DraftNode(NamedTuple):
    """This is a node that the drafter should expand.

    If the node is the root, `parent` is the anchor."""

    id: int
    parent: int
    token: int


class Draft(NamedTuple):
    """Run one drafter forward over nodes of some requests and propose children for each node."""

    asks: tuple[tuple[int, tuple[DraftNode, ...]], ...]
    """These are pairs of a request and its nodes."""
    lap: float = 0.0
    """A token without speculation takes so many seconds."""


class Commit(NamedTuple):
    """A commit holds tokens that are final now, in the order of the text.

    `path` are the nodes after which they were picked; the first is the old root. `accepted[i]` is
    True if the token had been drafted and sent before the target picked it."""

    path: tuple[int, ...]
    tokens: tuple[int, ...]
    accepted: tuple[bool, ...]
    root: int
    """This is the id of the last token's node, which is the new root."""


class Wake(NamedTuple):
    """Call the scheduler again at this time (seconds of the driver's clock).

    The call is due only if nothing comes before."""

    at: float


class Finish(NamedTuple):
    """The text is complete: `stop` (an end token) or `length` (the limit of new tokens)."""

    reason: str


class Decision(NamedTuple):
    """The text of one request has grown."""

    request: int
    commit: Commit
    finish: Finish | None = None


class Prunes(NamedTuple):
    """Tell all stages of a target server what was decided of some requests."""

    server: int
    prunes: tuple[tuple[int, Prune], ...]
    """These are pairs of a request and its prune."""


Action = Batch | Draft | Prunes | Decision | Wake


# ---- events --------------------------------------------------------------------------------------
@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """A proposal holds a drafter's children for one node, best first."""

    tokens: np.ndarray
    """These are the children's tokens, int64 [k]."""
    z: np.ndarray
    """These are log-probabilities, float64 [k], or [k, D] by D drafters. They hold at the request's
    temperature (at 1 if it is greedy). If the proposal is coupled, the target's own keyed Gumbel
    noise at that position is added."""
    coverage: float = 0.97
    """The target's choice is in the list with this probability."""
    coupled: bool = False
    """The noise is in `z`."""


@dataclass(frozen=True, slots=True, eq=False)
class Drafted:
    """Drafted is the drafter's answer: the proposals for n nodes as arrays of k candidates each.

    Nodes from which the drafter cannot go on are left out. Several drafters that answer as one
    (draft/mixture.py) give a `z` each, D in all; otherwise D is 1."""

    nodes: tuple[int, ...]
    tokens: np.ndarray
    """These are the candidates' tokens, int64 [n, k]."""
    z: np.ndarray
    """These are the candidates' `z` as in a proposal, float64 [n, k, D]; entries behind the end of
    a shorter list are -inf."""
    coupled: bool
    coverage: np.ndarray
    """This is each proposal's coverage, float64 [n]."""

    @classmethod
    def pack(cls, ids: Iterable[int], proposals: Iterable[Proposal | None]) -> Drafted:
        """Return the answer that holds one proposal for each node.

        None stands for a node from which the drafter cannot go on."""
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
        """Return the candidates of one node; None if there are none."""
        if node not in self.nodes:
            return None
        row = self.nodes.index(node)
        there = self.z[row, :, 0] > -np.inf
        return Proposal(
            self.tokens[row][there], self.z[row][there], float(self.coverage[row]), self.coupled
        )

    def only(self, rows: list[int]) -> Drafted:
        """Return the answer for the nodes in these rows."""
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
    """The drafter has read the prompt of a request and can be asked for children of its nodes."""

    request: int


class Answered(NamedTuple):
    """A drafter forward has ended, with an answer for each request whose nodes were in it."""

    answers: tuple[tuple[int, Drafted], ...]


Choose = Callable[[int, Sequence[int]], int]
"""A call with a node and the nodes decided before it returns the token that the target picks after
the node."""


class Returned(NamedTuple):
    """A segment came back, with which the target's picks after these of its nodes can be told.

    If the last stage picks the tokens, it has done the walk: the nodes are those that became text,
    often none. If rank 0 picks them, they are all nodes that live."""

    request: int
    number: int
    ids: tuple[int, ...]
    choose: Choose
    """It is called for the nodes of the walk alone, once each and in their order."""


class Back(NamedTuple):
    """Segments came back together, as they were computed."""

    segments: tuple[Returned, ...]


class Started(NamedTuple):
    """The first stage took a batch, of which `rows` rows were alive, off its queue.

    It expects to be free in `expected` seconds. The batch had lain in the queue for `waited`
    seconds."""

    number: int
    rows: int
    expected: float
    waited: float


class Cost(NamedTuple):
    """A cost is what a stage has measured: the curve of its forwards and the cost of a row's hop.

    Its hop over n rows takes `row` * n seconds more than one over no rows."""

    stage: int
    forward: Curve
    row: float
    busy: float = 0.0
    """All forwards so far took so many seconds; only differences count."""


class Idle(NamedTuple):
    """The first stage abandoned a batch of which no row lived any more: it is free now."""


class Woke(NamedTuple):
    """The time of a Wake has come."""


Event = Read | Answered | Back | Started | Cost | Idle | Woke
