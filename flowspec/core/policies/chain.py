"""A chain is drafted, sent, waited for and verified: speculative inference (SI).

This is what DSI is compared with (arXiv 2211.17192, 2302.01318). This module is pure (no torch,
clock or I/O)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flowspec.core.learnt import Learnt
from flowspec.core.policies.rounds import Rounds
from flowspec.core.policy import TreeConfig
from flowspec.core.request import Request
from flowspec.core.topology import Topology
from flowspec.core.tree import TokenTree


def best_lookahead(acceptance: float, draft: float, target: float, most: int) -> int:
    """Return how many drafts a round should have, up to `most`.

    A round of k drafts, each accepted with the probability `acceptance` < 1, takes k * draft +
    target seconds and yields (1 - a^(k + 1)) / (1 - a) tokens on average."""

    def token(k: int) -> float:
        return (k * draft + target) / (1 - acceptance ** (k + 1))

    return min(range(1, most + 1), key=token)


class Chain(Rounds):
    """A chain has `lookahead` levels of `top_k` nodes, one by default.

    None is `auto`: as many as are best at the measured latencies and the acceptance seen so far."""

    MOST = 16
    """With `auto`, a round has at most so many levels."""
    FIRST = 5
    """It has so many before anything is measured."""

    def __init__(self, config: TreeConfig, topology: Topology, lookahead: int | None):
        self.lookahead = lookahead or self.FIRST
        self._config, self._topology, self._auto = config, topology, lookahead is None
        most = self.MOST if self._auto else self.lookahead
        top_k = config.top_k or 1
        shape = TreeConfig(budget=config.budget or 1 + most * top_k**2, top_k=top_k)
        super().__init__(shape, pieces=1)

    def attach(
        self, tree: TokenTree, learnt: Learnt, request: Request, levels_left: Callable[[], int]
    ) -> None:
        self._verified = learnt.verified
        super().attach(tree, learnt, request, levels_left)

    def rerooted(self) -> None:
        if self._auto and self.ring.draft:
            accepted, rejected = self._verified
            lap = self.ring.lap(self._topology)
            acceptance = accepted / (accepted + rejected)
            self.lookahead = best_lookahead(acceptance, self.ring.draft, lap, self.MOST)
        self.levels = min(self.lookahead, self._config.depth or self.lookahead)
        super().rerooted()

    def decided(
        self, path: Sequence[int], tokens: Sequence[int], segments_out: int, now: float
    ) -> None:
        self._verified[0] += len(path) - 1
        self._verified[1] += bool(self.tree.nodes[path[-1]].children)
        super().decided(path, tokens, segments_out, now)

    def explain(self) -> list[str]:
        return [*super().explain(), f"lookahead {self.lookahead}"]
