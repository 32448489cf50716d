"""Lookahead drafts without waiting, and sends a task every few levels: DSI (arXiv 2405.14105).

This module is pure (no torch, clock or I/O)."""

from __future__ import annotations

import math

from flowspec.core.policy import Attached, TreeConfig, best_first
from flowspec.core.score import Scorer
from flowspec.core.topology import Topology
from flowspec.core.tree import Node


class Lookahead(Attached):
    """A new root leaves at once, so the text never grows slower than without drafts.

    What is drafted below it leaves when `lookahead` levels of it have not been sent, or all that
    will be drafted. None is `auto`: as many levels as are drafted while a server becomes free (the
    paper's condition: servers >= latency of a task / (lookahead * latency of a draft)). Levels
    have `top_k` nodes, one by default: a chain."""

    AHEAD = 128
    """The tree has at most so many nodes by default."""
    just_in_time = False
    drafts = True

    def __init__(self, config: TreeConfig, topology: Topology, lookahead: int | None):
        self.budget, self.top_k = config.budget or self.AHEAD, config.top_k or 1
        self.levels = config.depth or math.inf
        self._topology, self._lookahead = topology, lookahead
        self.scorer = Scorer(calibrate=False, ngrams=False)

    @property
    def credits(self) -> int:
        """Return how many segments may be in flight.

        Of several servers, the scheduler knows which have nothing to do."""
        return self.ring.credits(self._topology) if self._topology.servers == 1 else self.budget

    @property
    def lookahead(self) -> int:
        if self._lookahead is not None:
            return self._lookahead
        if not self.ring.draft:  # none has been measured
            return 1
        tasks = self._topology.servers * self.ring.credits(self._topology)
        return max(1, math.ceil(self.ring.lap(self._topology) / (tasks * self.ring.draft)))

    def rerooted(self) -> None:
        """The tree is all there is to know."""

    def draft(self) -> list[Node]:
        """Return the best nodes of the deepest level, if there may be a level below it."""
        if len(self.tree) >= self.budget:
            return []
        deepest = max(node.position for node in self.tree.nodes.values())
        depth = deepest - self.tree.root.position
        if depth >= min(self.levels, self.levels_left()):
            return []
        level = [n for n in self.tree.nodes.values() if n.position == deepest and not n.expanded]
        return sorted(level, key=best_first)[: self.top_k]

    def segment(self, drafting: bool) -> list[Node]:
        unsent = [node for node in self.tree.nodes.values() if not node.sent]
        if not unsent:
            return []
        positions = {node.position for node in unsent}
        last = not drafting and not self.draft()
        if self.tree.root.sent and len(positions) < self.lookahead and not last:
            return []
        return sorted(unsent, key=lambda node: node.id)

    def explain(self) -> list[str]:
        return [*super().explain(), f"lookahead {self.lookahead}"]
