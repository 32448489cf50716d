"""A sight is what can be seen of the ring and its trees at a moment, for whoever watches.

It is made of what rank 0 knows anyway, and only when somebody asks. This module is pure (no torch,
clock or I/O)."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import NamedTuple

from flowspec.core.decoding import Decoding
from flowspec.core.scheduler import Scheduler
from flowspec.core.topology import Topology

MOST = 160
"""A tree shows at most so many nodes, the oldest, which are those near the root."""
LATELY = 64
"""So many nodes that became text last are named, so that they differ from those that died."""


class SeenNode(NamedTuple):
    """This is a node of a tree; parents stand before their children."""

    id: int
    parent: int
    token: int
    sent: bool
    """It is in the ring, or has been."""


class SeenTree(NamedTuple):
    """This is the tree of a request; its first node is the root."""

    nodes: tuple[SeenNode, ...]
    more: int
    """So many nodes are left out."""
    text: tuple[int, ...]
    """These nodes became text last."""
    drafted: int
    sent: int
    """So many nodes were drafted, and sent, since the request began."""


class SeenStage(NamedTuple):
    """This is what a stage has said of its costs, in seconds."""

    forward: float
    """A forward of one row takes so long."""
    row: float
    """A row adds so much to the hop to it."""
    busy: float | None
    """It has computed for this share of the time lately; None before it has said so twice."""


class Sight(NamedTuple):
    """All times are in seconds."""

    stages: dict[int, SeenStage]
    """This maps the rank of a stage to its costs, once it has said them."""
    hop: float
    """A hop usually takes so long; 0 if none was measured."""
    draft: float
    """So long takes a forward of the drafter; 0 if there was none."""
    plain: float | None
    """A token takes so long without speculation; None before the stages have said their costs."""
    tried: bool
    """That was measured by decoding without speculation; else it follows from costs."""
    batches: int
    """So many batches are on their way."""
    rows: int
    """They hold so many nodes."""
    trees: dict[int, SeenTree]
    """These are the trees of the requests that were asked for and are in the ring."""


def seen(scheduler: Scheduler, topology: Topology, requests: Collection[int]) -> Sight:
    """Return what can be seen now, with the trees of these requests."""
    ring, decodings = scheduler.ring, scheduler.decodings
    out = [flight for decoding in decodings.values() for flight in decoding.out.items()]
    return Sight(
        {
            stage: SeenStage(curve.at(1, ring.context), ring.rows[stage], ring.busy(stage))
            for stage, curve in sorted(ring.costs.items())
        },
        ring.usual_hop,
        ring.draft,
        ring.plain_token(topology) if ring.costs else None,
        ring.plain is not None,
        len({number for number, _ in out}),
        sum(len(ids) for _, ids in out),
        {id: _tree(decodings[id]) for id in requests if id in decodings},
    )


def _tree(decoding: Decoding) -> SeenTree:
    tree = decoding.tree
    nodes = itertools.islice(tree.nodes.values(), MOST)
    return SeenTree(
        tuple(SeenNode(node.id, node.parent, node.token, node.sent) for node in nodes),
        max(0, len(tree) - MOST),
        tuple(id for id, _ in decoding.text[-LATELY:]),
        tree.drafted,
        decoding.guesses,
    )
