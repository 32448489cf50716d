"""A layer of the tree in each segment, without a pause (PipeDec, arXiv 2504.04104). Pure."""

from __future__ import annotations

import heapq

from flowspec.core.messages import Drafted
from flowspec.core.policy import Attached, TreeConfig
from flowspec.core.score import Scorer
from flowspec.core.topology import Topology
from flowspec.core.tree import Node


class PipeDec(Attached):
    """A segment is a layer of the tree: the root alone, then the best `width` children of the layer before, and so on.

    arXiv 2504.04104, event-driven: no turns and no barriers, a drafter forward a layer, S + 1 layers in flight. The
    drafter's candidates are kept aside and become nodes when their layer leaves, chosen among the children of what is
    alive then; so every node of the tree was sent. Each returned layer decides one token (never more: the next level
    is in the next segment), and a miss starts again with the new root alone. The root and the S layers that can be out
    with it are at most 1 + S * width nodes; a budget below that narrows the layers. `segment` is the width."""

    def __init__(self, config: TreeConfig, topology: Topology, just_in_time: bool):
        self.credits = topology.hops
        self.just_in_time = just_in_time
        self.width = config.segment or 16
        self.top_k = config.top_k or 16
        self.budget = config.budget or 1 + topology.stages * self.width
        self.drafts = self.budget > 1
        self.levels = (config.depth + 1) if config.depth else self.credits  # no more can be out
        self.scorer = Scorer(calibrate=False, ngrams=False)

    def rerooted(self) -> None:
        if not self.tree.root.sent:  # a miss: everything else is dead
            self.layer = [self.tree.root]
            self.candidates: list[
                tuple[float, int, int]
            ] = []  # (-score, parent, token), the children of the layer

    def proposed(self, nodes: list[Node], drafted: Drafted) -> None:
        for node, tokens, scores in self.scorer.scored(nodes, drafted, self.top_k):
            self.candidates += [
                (-score, node.id, token) for token, score in zip(tokens, scores, strict=True)
            ]

    def draft(self) -> list[Node]:
        """What is alive of the last layer, once."""
        levels = min(self.levels, self.levels_left())
        return [
            n
            for n in self.layer
            if n.id in self.tree and not n.expanded and self.tree.depth(n) < levels
        ]

    def segment(self, drafting: bool) -> list[Node]:
        """A new root alone, else the next layer: the likeliest candidates whose parents are alive."""
        if not self.tree.root.sent:
            return [self.tree.root]
        nodes, room = self.tree.nodes, min(self.width, self.budget - len(self.tree))
        best = heapq.nsmallest(room, (c for c in self.candidates if c[1] in nodes))
        if best:
            self.layer = [self.tree.add(nodes[id], token, -key) for key, id, token in best]
            self.candidates = []
        return self.layer if best else []

    def verify_now(self, segments_out: int) -> bool:
        return True

    def keeps(self, child: Node) -> bool:
        return True
