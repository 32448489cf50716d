"""PipeDec (arXiv 2504.04104) sends a layer of the tree in each segment, without a pause.

This module is pure (no torch, clock or I/O)."""

from __future__ import annotations

import heapq

from flowspec.core.messages import Drafted
from flowspec.core.policy import Attached, TreeConfig
from flowspec.core.score import Scorer
from flowspec.core.topology import Topology
from flowspec.core.tree import Node


class PipeDec(Attached):
    """A segment is a layer of the tree, and segments follow each other without a pause.

    The first layer is the root alone; each next one has the best `width` children of the layer
    before. This is arXiv 2504.04104, driven by events: there are no turns and no barriers, each
    layer takes a drafter forward, and S + 1 layers are in flight in a ring of S stages. The
    drafter's candidates are kept aside. They become nodes when their layer leaves, chosen among the
    children of what is alive then; so every node of the tree was sent. Each returned layer decides
    one token (never more, since the next level is in the next segment), and a miss starts again
    with the new root alone. The root and the S layers that can be in flight with it have at most 1
    + S * width nodes; a smaller budget narrows the layers. The setting `segment` is the width."""

    def __init__(self, config: TreeConfig, topology: Topology, just_in_time: bool):
        self.credits = topology.hops
        self.just_in_time = just_in_time
        self.width = config.segment or 16
        self.top_k = config.top_k or 16
        self.budget = config.budget or 1 + topology.stages * self.width
        self.drafts = self.budget > 1
        # no more can be in flight
        self.levels = (config.depth + 1) if config.depth else self.credits
        self.scorer = Scorer(calibrate=False, ngrams=False)

    def rerooted(self) -> None:
        if not self.tree.root.sent:  # after a miss, everything else is dead
            self.layer = [self.tree.root]
            self.candidates: list[
                tuple[float, int, int]
            ] = []  # the children of the layer: (-score, parent, token)

    def proposed(self, nodes: list[Node], drafted: Drafted) -> None:
        for node, tokens, scores in self.scorer.scored(nodes, drafted, self.top_k):
            self.candidates += [
                (-score, node.id, token) for token, score in zip(tokens, scores, strict=True)
            ]

    def draft(self) -> list[Node]:
        """Return the nodes of the last layer that are alive; each node is returned once."""
        levels = min(self.levels, self.levels_left())
        return [
            n
            for n in self.layer
            if n.id in self.tree and not n.expanded and self.tree.depth(n) < levels
        ]

    def segment(self, drafting: bool) -> list[Node]:
        """Return a new root alone, or else the next layer.

        The next layer holds the likeliest candidates whose parents are alive."""
        if not self.tree.root.sent:
            return [self.tree.root]
        nodes, room = self.tree.nodes, min(self.width, self.budget - len(self.tree))
        best = heapq.nsmallest(room, (c for c in self.candidates if c[1] in nodes))
        if best:
            self.layer = [self.tree.add(nodes[id], token, -key) for key, id, token in best]
            self.candidates = []
        return self.layer if best else []
