"""How a draft model's guesses become a tree of tokens, by the method's own shape of it."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from flowspec.core.messages import DraftNode
from flowspec.host.rules import Keyed, Rule

Asking = Generator[Sequence[DraftNode], Tensor, "Tree"]
"""It asks for the draft model's logits [n, vocabulary] after n nodes, as often as it needs some,
and returns a tree."""


class Tree:
    """A tree is a root, the last token of the text, and what is guessed behind it."""

    def __init__(self, root: DraftNode):
        self.nodes = [root]
        """Parents are before their children."""
        self.children: dict[int, list[DraftNode]] = {}
        """It maps a node's id to its children, in the order in which they are tried."""
        self.q: dict[int, Tensor | None] = {}
        """It maps a node's id to the distribution from which its children were drawn, if the rule
        needs it."""
        self.height = 0
        self.asked = 0
        """The draft model was asked so often."""

    def add(self, node: DraftNode) -> None:
        """Add a child of a node that is there."""
        self.nodes.append(node)
        self.children.setdefault(node.parent, []).append(node)


class Grower(Protocol):
    """A grower is the shape of a method's trees."""

    def grow(
        self, root: DraftNode, ids: Iterator[int], rule: Rule, position: int, height: int
    ) -> Asking:
        """Grow a tree below a root, which stands at a position, at most so many levels high.

        `ids` are those of its nodes to come."""


class Branches(NamedTuple):
    """Branches are drawn from the draft model token by token, as the rule says, and merged.

    One branch is speculative decoding; several are SpecInfer's expansion (arXiv 2305.09781), with
    as many children at each node as its branches would have on average (rules.py). None is decoding
    alone."""

    beams: int
    length: int

    def grow(
        self, root: DraftNode, ids: Iterator[int], rule: Rule, position: int, height: int
    ) -> Asking:
        tree, ends = Tree(root), [(root, self.beams)] if self.beams else []
        while ends and tree.height < min(self.length, height):
            logits = yield [node for node, _ in ends]
            tree.height += 1
            level = []
            for (node, branches), row in zip(ends, logits, strict=True):
                drawn = rule.draw(row, position + tree.height, branches)
                tree.q[node.id] = drawn.q
                for token, share in zip(drawn.tokens, drawn.branches, strict=True):
                    tree.add(DraftNode(next(ids), node.id, token))
                    level.append((tree.nodes[-1], share))
            ends = level
        return tree


class Likeliest(NamedTuple):
    """The nodes of the highest cumulative probability are the tree (SpecExec, arXiv 2406.02532).

    That is the product of the probabilities on the way from the root (`Keyed.chances`). Of all
    nodes within the length the `budget` likeliest are found: a child is never likelier than its
    parent, so it is enough to go on from nodes that are among the likeliest so far, at most `width`
    of them in a forward, until none is left."""

    budget: int
    width: int
    length: int

    def grow(
        self, root: DraftNode, ids: Iterator[int], rule: Rule, position: int, height: int
    ) -> Asking:
        assert isinstance(rule, Keyed), "what was not drawn from q cannot be kept by rejection"
        found = _Found.root(root)
        length = min(self.length, height)
        while len(ends := found.ends(length)[: self.width]):
            logits = yield [found.node(k) for k in ends]
            chances = rule.chances(logits, [position + 1 + int(d) for d in found.depth[ends]])
            found = found.with_children(ends, chances, self.budget, ids)
        return found.tree()


class _Found(NamedTuple):
    """These are the likeliest nodes so far, n of them and the root, the likeliest first."""

    id: np.ndarray
    parent: np.ndarray
    token: np.ndarray
    depth: np.ndarray
    score: np.ndarray
    """It is the log of the cumulative probability, float64."""
    open: np.ndarray
    """Its children are not known, bool."""

    @classmethod
    def root(cls, root: DraftNode) -> _Found:
        id, parent, token, depth = (np.array([number], dtype=np.int64) for number in (*root, 0))
        return cls(id, parent, token, depth, np.zeros(1), np.ones(1, dtype=bool))

    def node(self, k: int) -> DraftNode:
        return DraftNode(int(self.id[k]), int(self.parent[k]), int(self.token[k]))

    def ends(self, length: int) -> np.ndarray:
        """Return the indices of those to go on from, the likeliest first."""
        return np.flatnonzero(self.open & (self.depth < length))

    def with_children(
        self, ends: np.ndarray, chances: Tensor, budget: int, ids: Iterator[int]
    ) -> _Found:
        """Return the root and the `budget` likeliest of these nodes and of the children of `ends`.

        `chances` [len(ends), vocabulary] are the logs of the probabilities behind the ends."""
        # rounding may not make a child likelier than its parent
        below = (chances.clamp(max=0) + torch.from_numpy(self.score[ends])[:, None]).flatten()
        least = self.score[-1] if len(self.id) > budget else -np.inf
        some = torch.nonzero(below > least)[:, 0]
        if len(some) > budget:
            some = below.topk(budget, sorted=False).indices
        children, scores = some.numpy(), below[some].numpy()
        # of equals the earlier is first, so no child comes before its parent
        order = np.argsort(-np.concatenate([self.score, scores]), kind="stable")[: budget + 1]
        old, new = order[order < len(self.id)], order[order >= len(self.id)] - len(self.id)
        above, token = np.divmod(children[new], chances.shape[1])
        above = ends[above]
        parts = (
            (self.id, np.fromiter((next(ids) for _ in new), np.int64, len(new))),
            (self.parent, self.id[above]),
            (self.token, token),
            (self.depth, self.depth[above] + 1),
            (self.score, scores[new]),
            (self._closed(ends), np.ones(len(new), dtype=bool)),
        )
        merged = [np.concatenate([mine[old], theirs]) for mine, theirs in parts]
        again = np.argsort(-merged[4], kind="stable")
        return _Found(*(each[again] for each in merged))

    def _closed(self, ends: np.ndarray) -> np.ndarray:
        open = self.open.copy()
        open[ends] = False
        return open

    def tree(self) -> Tree:
        tree = Tree(self.node(0))
        for k in range(1, len(self.id)):
            tree.add(self.node(k))
        tree.height = int(self.depth.max())
        return tree
