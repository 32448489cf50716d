"""Which nodes to draft and which to send, when: small strategies on one machine (scheduler.py). Pure.

Two shapes cover the methods. `Rounds` drafts a whole tree, sends it in pieces, verifies when all are
back and begins again: with a tree of one node that is plain autoregression, with one piece serial tree
speculation, with a piece a rank the naive chunked pipeline. `Continuous` never stops: the tree persists, the
likeliest nodes leave as soon as the first stage can take them (FlowSpec, event-driven; POLICY section 6).
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flowspec.core.messages import Proposal, Started
from flowspec.core.request import need
from flowspec.core.tree import Node, TokenTree

METHODS = ("ar", "serial", "naive", "flowspec")


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """Size and shape of the drafted tree; null is `auto`: the method's own default."""

    budget: int | None = None
    """Nodes of the tree, the root included."""
    top_k: int | None = None
    """Children kept for a node."""
    depth: int | None = None
    """Drafter levels after the first (EAGLE-2's counting): the tree reaches depth + 1 below the root."""
    segment: int | None = None
    """Rows in a segment."""

    def __post_init__(self) -> None:
        for name in ("budget", "top_k", "depth", "segment"):
            value = getattr(self, name)
            need(value is None or value >= 1, f"tree.{name} is {value}: it must be at least 1, or auto")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """Switches of single ideas; each can be turned off alone to see what it is worth."""

    coupled: bool = True
    """Above temperature 0, rank candidates with the target's own keyed noise (communication-free coupling)."""
    just_in_time: bool = True
    """Let a segment leave when the first stage is about to be free, instead of queueing it there."""


def log_probabilities(proposal: Proposal) -> np.ndarray:
    """log p of each candidate to be the target's choice: p = C * softmax(logq + noise) over the kept ones, float64 [k].

    If the target's logits are the drafter's plus independent Gumbel error of scale 1, this is exact (POLICY
    section 4, with weight 1); C < 1, the share of choices that the list holds, keeps every child strictly
    below its parent."""
    z = proposal.logq if proposal.noise is None else proposal.logq + proposal.noise
    z = z - z.max()
    return z - np.log(np.exp(z).sum()) + np.log(proposal.coverage)


class Rounds:
    """Draft a tree level by level (EAGLE-2), send its best `budget` nodes in `pieces`, verify once all are back, start afresh."""

    keep_tree = False
    just_in_time = False

    def __init__(self, config: TreeConfig, pieces: int):
        self.budget = config.budget or 80
        self.top_k = config.top_k or 10
        self.levels = (config.depth or 6) + 1
        self.segment_rows = config.segment
        self.credits = self.pieces = pieces

    def attach(self, tree: TokenTree, levels_left: Callable[[], int]) -> None:
        self.tree, self.levels_left = tree, levels_left
        self.rerooted()

    def rerooted(self) -> None:
        self.level = 0
        self.planned: list[list[Node]] | None = None

    def observe(self, started: Started) -> None:
        """Rounds do not look at costs."""

    def proposed(self, node: Node, proposal: Proposal) -> None:
        scores = log_probabilities(proposal).tolist()
        for token, logp in list(zip(proposal.tokens.tolist(), scores, strict=True))[: self.top_k]:
            self.tree.add(node, token, node.score + logp)

    def draft(self) -> list[Node]:
        """The best top_k nodes of the deepest level; none once the tree is deep enough."""
        if self.planned is not None or self.budget == 1 or self.level >= min(self.levels, self.levels_left()):
            return []
        frontier = [n for n in self.tree.nodes.values() if self.tree.depth(n) == self.level]
        self.level += 1
        return sorted(frontier, key=_best_first)[: self.top_k]

    def segment(self, drafting: bool) -> list[Node]:
        if self.planned is None:
            if drafting:
                return []
            self.planned = self._plan()
        return self.planned.pop(0) if self.planned else []

    def verify_now(self, segments_out: int) -> bool:
        return segments_out == 0 and not self.planned

    def _plan(self) -> list[list[Node]]:
        """Near-equal pieces in score order, small ones first; more of them if `segment` caps their rows."""
        nodes = sorted(self.tree.nodes.values(), key=_best_first)[: self.budget]
        pieces = min(self.pieces, len(nodes))
        if self.segment_rows:
            pieces = max(pieces, -(-len(nodes) // self.segment_rows))
            self.credits = max(self.credits, pieces)
        cuts = [len(nodes) * k // pieces for k in range(pieces + 1)]
        return [nodes[a:b] for a, b in itertools.pairwise(cuts)]


class Continuous:
    """The event-driven policy: a persistent tree, the likeliest unsent nodes leave just in time, on S + 1 credits."""

    keep_tree = True
    ROWS = 16
    """nodes in a drafter forward"""
    CROWD = 600
    """nodes of the tree when the budget is auto"""

    def __init__(self, config: TreeConfig, stages: int, just_in_time: bool):
        self.budget = config.budget or self.CROWD
        self.top_k = config.top_k or 16
        self.levels = (config.depth + 1) if config.depth else 64
        self.fixed_rows = config.segment
        self.credits = stages + 1
        self.just_in_time = just_in_time
        self.theta = 0.02
        self.rows = config.segment or 32

    def attach(self, tree: TokenTree, levels_left: Callable[[], int]) -> None:
        self.tree, self.levels_left = tree, levels_left
        self._reset()

    def _reset(self) -> None:
        # heaps of (-score, id, ...): absolute scores, so moving the root reorders nothing; entries of dead nodes are skipped
        self.unsent = [(-self.tree.root.score, self.tree.root.id)]
        self.unexpanded = list(self.unsent)
        self.tail: list[tuple[float, int, int]] = []  # (-score of the next candidate, node, its rank)
        self.candidates: dict[int, tuple[list[int], list[float]]] = {}

    def rerooted(self) -> None:
        if len(self.tree) == 1 and not self.tree.root.expanded and not self.tree.root.sent:
            self._reset()  # a miss, or a leaf: nothing of the heaps is alive but this
            return
        self.candidates = {i: c for i, c in self.candidates.items() if i in self.tree}
        self._grow()

    def observe(self, started: Started) -> None:
        """The marginal rule: a row is worth its cost while P >= slope / base (POLICY section 5)."""
        ratio = started.slope / started.base
        self.theta = min(0.25, max(0.002, ratio))
        if self.fixed_rows is None:
            self.rows = int(min(96, max(16, 0.35 / max(ratio, 1e-6))))

    def proposed(self, node: Node, proposal: Proposal) -> None:
        scores = (node.score + log_probabilities(proposal)[: self.top_k]).tolist()
        self.candidates[node.id] = (proposal.tokens[: self.top_k].tolist(), scores)
        if scores:
            heapq.heappush(self.tail, (-scores[0], node.id, 0))
        self._grow()

    def draft(self) -> list[Node]:
        """The likeliest unexpanded nodes, while P >= theta / 4 and the budget has room."""
        batch: list[Node] = []
        too_deep = []
        levels = min(self.levels, self.levels_left())
        while self.unexpanded and len(batch) < self.ROWS and len(self.tree) < self.budget:
            node = self.tree.nodes.get(self.unexpanded[0][1])
            if node is not None and self._reach(node.score) < self.theta / 4:
                break
            entry = heapq.heappop(self.unexpanded)
            if node is not None and not node.expanded:
                if self.tree.depth(node) < levels:
                    batch.append(node)
                else:
                    too_deep.append(entry)
        for entry in too_deep:  # until the root has moved on
            heapq.heappush(self.unexpanded, entry)
        return batch

    def segment(self, drafting: bool) -> list[Node]:
        """The root if it is unsent, then the likeliest unsent nodes while P >= theta, up to the rows of a segment."""
        batch: list[Node] = []
        while self.unsent and len(batch) < self.rows:
            node = self.tree.nodes.get(self.unsent[0][1])
            if node is not None and not node.sent:
                if node is not self.tree.root and self._reach(node.score) < self.theta:
                    break
                batch.append(node)
            heapq.heappop(self.unsent)
        return batch

    def verify_now(self, segments_out: int) -> bool:
        return True

    def _reach(self, score: float) -> float:
        """Probability to be accepted, given the present root."""
        return math.exp(min(0.0, score - self.tree.root.score))

    def _grow(self) -> None:
        """Make candidates into nodes, likeliest first, while P >= theta / 20 and the budget has room."""
        while self.tail and len(self.tree) < self.budget and self._reach(-self.tail[0][0]) >= self.theta / 20:
            _, id, rank = heapq.heappop(self.tail)
            node = self.tree.nodes.get(id)
            if node is None:
                continue
            tokens, scores = self.candidates[id]
            child = self.tree.add(node, tokens[rank], scores[rank])
            heapq.heappush(self.unsent, (-child.score, child.id))
            heapq.heappush(self.unexpanded, (-child.score, child.id))
            if rank + 1 < len(tokens):
                heapq.heappush(self.tail, (-scores[rank + 1], id, rank + 1))


Policy = Rounds | Continuous


def make_policy(method: str, tree: TreeConfig, switches: PolicyConfig, stages: int) -> Policy:
    """The strategy of a method over `stages` stages."""
    if method == "flowspec":
        return Continuous(tree, stages, switches.just_in_time)
    if method == "ar":
        return Rounds(dataclasses.replace(tree, budget=1), pieces=1)
    return Rounds(tree, pieces={"serial": 1, "naive": stages + 1}[method])


def _best_first(node: Node) -> tuple[float, int]:
    return (-node.score, node.id)
