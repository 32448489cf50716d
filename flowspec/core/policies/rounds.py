"""Rounds draft a whole tree, send it in pieces and begin again.

With a tree of one node this is plain decoding. With one piece it is serial tree speculation. With
as many pieces as the ring has hops it is the naive chunked pipeline, which is verified when all
pieces are back; with pruning, every piece is verified as it comes back. This module is pure (no
torch, clock or I/O)."""

from __future__ import annotations

import itertools

from flowspec.core.policy import Attached, TreeConfig, best_first
from flowspec.core.score import Scorer
from flowspec.core.tree import Node


class Rounds(Attached):
    """Rounds draft a tree level by level (EAGLE-2) and send its best `budget` nodes in `pieces`.

    Once all pieces are back, they are verified and the next round begins. With `pruning`, every
    piece is verified as it comes back, and what it rules out is dropped on its way; nothing is
    drafted meanwhile. The round ends at a token that was not sent."""

    just_in_time = False

    def __init__(self, config: TreeConfig, pieces: int, pruning: bool = False):
        self.budget = config.budget or 80
        self.drafts = self.budget > 1
        self.top_k = config.top_k or 10
        self.levels = (config.depth or 6) + 1
        self.segment_rows = config.segment
        self.credits = self.pieces = pieces
        self.pruning = pruning
        self.scorer = Scorer(calibrate=False, ngrams=False)
        self.planned: list[list[Node]] | None = None

    def rerooted(self) -> None:
        if self._rides(self.tree.root):  # the round goes on
            return
        self.level = 0
        self.planned = None

    def draft(self) -> list[Node]:
        """Return the best top_k nodes of the deepest level; none once the tree is deep enough."""
        if self.planned is not None or self.level >= min(self.levels, self.levels_left()):
            return []
        frontier = [n for n in self.tree.nodes.values() if self.tree.depth(n) == self.level]
        self.level += 1
        return sorted(frontier, key=best_first)[: self.top_k]

    def segment(self, drafting: bool) -> list[Node]:
        if self.planned is None:
            if drafting:
                return []
            self.planned = self._plan()
        while self.planned:  # with other requests in the ring, some may have died before they left
            if piece := [node for node in self.planned.pop(0) if node.id in self.tree]:
                return piece
        return []

    def verify_now(self, segments_out: int) -> bool:
        return self.pruning or (segments_out == 0 and not self.planned)

    def keeps(self, child: Node) -> bool:
        return self.pruning and self._rides(child)

    def _rides(self, node: Node) -> bool:
        """Return whether the node was sent in this round, or will be."""
        return node.sent or any(node in piece for piece in self.planned or ())

    def _plan(self) -> list[list[Node]]:
        """Return pieces of nearly equal size in the order of scores, smaller ones first.

        There are more of them than `pieces` if `segment` limits their rows."""
        nodes = sorted(self.tree.nodes.values(), key=best_first)[: self.budget]
        pieces = min(self.pieces, len(nodes))
        if self.segment_rows:
            pieces = max(pieces, -(-len(nodes) // self.segment_rows))
            self.credits = max(self.credits, pieces)
        cuts = [len(nodes) * k // pieces for k in range(pieces + 1)]
        return [nodes[a:b] for a, b in itertools.pairwise(cuts)]
