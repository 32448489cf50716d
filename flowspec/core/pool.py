"""Ranks that draft for rank 0: which of them is asked for what, by what they cost and bring.

Ranks with the same draft model share the nodes of a drafter's forward: a rank gets those branches
of the tree whose rows it has. Drafters with other models are asked together, and the slowest is
waited for. Neither is done where it does not pay.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from flowspec.core.cost import RowCost
from flowspec.core.messages import Commit, DraftNode

Asked = dict[int, list[DraftNode]]
"""This maps a request to nodes of it that a rank is asked for, parents first."""
TRIED = 3
"""Forwards of a rank until its cost is known."""
OFTEN = 32
"""Once in so many forwards something else is tried, so that what is known is not old."""


class _Tree:
    """A request's nodes that were asked for and live, and where they are."""

    def __init__(self, ranks: Sequence[int]):
        self.nodes: dict[int, DraftNode] = {}
        self.held: dict[int, set[int]] = {rank: set() for rank in ranks}
        """Each rank has, or was sent, the rows of these nodes."""
        self.behind = dict.fromkeys(ranks, 0)
        """Each rank lacks so many rows of the text, which come with its next forward."""

    def chain(self, node: DraftNode, held: set[int]) -> list[DraftNode]:
        """Return the node, and those above it that are not held, from above."""
        chain = [node]
        while (above := self.nodes.get(chain[-1].parent)) and above.id not in held:
            chain.append(above)
        return chain[::-1]

    def commit(self, commit: Commit) -> None:
        for rank, held in self.held.items():
            self.behind[rank] += sum(node not in held for node in commit.path)
        live = {commit.root}
        live.update(id for id, node in self.nodes.items() if node.parent in live)
        self.nodes = {id: node for id, node in self.nodes.items() if id in live}
        for held in self.held.values():
            held &= live


class Shares:
    """Shares divide the nodes of a drafter's forward among ranks that all have its model."""

    def __init__(self, ranks: Sequence[int]):
        self.costs = {rank: RowCost() for rank in ranks}
        """These are the ranks that are not lost, and what a forward costs there, with its way."""
        self._seen = dict.fromkeys(ranks, 0)  # forwards
        self._trees: dict[int, _Tree] = {}
        self._forwards = 0

    def begin(self, request: int) -> None:
        self._trees[request] = _Tree([*self.costs])

    def commit(self, request: int, commit: Commit) -> None:
        self._trees[request].commit(commit)

    def end(self, request: int) -> None:
        self._trees.pop(request, None)

    def lost(self, rank: int) -> None:
        self.costs.pop(rank, None)

    def observe(self, rank: int, rows: int, seconds: float) -> None:
        """Take in that a rank answered with so many rows after so many seconds."""
        self._seen[rank] += 1
        self.costs[rank].observe(rows, seconds)

    def saw(self, request: int, nodes: Iterable[DraftNode]) -> None:
        """Take in nodes of a request of which children may be asked for later."""
        self._trees[request].nodes |= {node.id: node for node in nodes}

    def divide(
        self, asks: Sequence[tuple[int, Sequence[DraftNode]]]
    ) -> dict[int, tuple[Asked, int]]:
        """Return which rank computes which nodes, with those above them that it lacks, and how many
        rows that is.

        By what their forwards cost, the last of those ranks is done as early as can be. All ranks
        are asked while too little is known of one. Now and then another number of them is tried."""
        for request, nodes in asks:
            self.saw(request, nodes)
        self._forwards += 1
        plans = self._plans(asks)
        if not (plans and plans[-1]):
            return {}
        best = plans[0] if len(plans) == 1 else min(plans, key=self._longest)
        rows = {rank: self._rows(rank, asked) for rank, asked in best.items()}
        for rank, asked in best.items():
            for request, nodes in asked.items():
                self._trees[request].held[rank].update(node.id for node in nodes)
                self._trees[request].behind[rank] = 0
        return {rank: (asked, rows[rank]) for rank, asked in best.items()}

    def _plans(self, asks: Sequence[tuple[int, Sequence[DraftNode]]]) -> list[dict[int, Asked]]:
        """Return the plans to choose from, none if there is no rank; a single one costs nothing."""
        fastest = [*self.costs]
        if len(fastest) > 1:
            fastest.sort(key=self._seconds)
        plans = [self._plan(asks, fastest[:n]) for n in range(1, len(fastest) + 1)]
        if plans and any(self._seen[rank] < TRIED for rank in plans[-1]):
            return plans[-1:]
        turn, tries = divmod(self._forwards, OFTEN)
        return [plans[turn % len(plans)]] if plans and tries == 0 else plans

    def _rows(self, rank: int, asked: Asked) -> int:
        """Return how many rows a rank would compute for this: nodes, and text that it lacks."""
        return sum(len(nodes) + self._trees[r].behind[rank] for r, nodes in asked.items())

    def _seconds(self, rank: int, rows: int = 1) -> float:
        return self.costs[rank].curve().at(rows)

    def _longest(self, plan: dict[int, Asked]) -> float:
        return max(self._seconds(rank, self._rows(rank, asked)) for rank, asked in plan.items())

    def _plan(
        self, asks: Sequence[tuple[int, Sequence[DraftNode]]], ranks: Sequence[int]
    ) -> dict[int, Asked]:
        """Return what each rank gets if a node goes where the fewest rows are then computed."""
        plan: dict[int, Asked] = {rank: {} for rank in ranks}
        loads = dict.fromkeys(ranks, 0)
        for request, nodes in asks:
            tree = self._trees[request]
            held = {rank: set(tree.held[rank]) for rank in ranks}
            for node in nodes:
                chains = {rank: tree.chain(node, held[rank]) for rank in ranks}
                rank = min(ranks, key=lambda r: loads[r] + len(chains[r]))
                plan[rank].setdefault(request, []).extend(chains[rank])
                loads[rank] += len(chains[rank])
                held[rank].update(each.id for each in chains[rank])
        return {rank: asked for rank, asked in plan.items() if asked}


class Patience:
    """Patience says which of several drafters are worth waiting for.

    If a draft takes t seconds and its best candidate is right with probability p, a token takes
    p t + (1 - p) L, where L is the time of a token without speculation: the next draft follows on a
    right one, and a wrong one is known after L (DSI, arXiv 2405.14105). Of the fastest drafters as
    many are asked as make that least. For each such set, p is counted on the same guesses."""

    JUDGED = 24
    """All drafters are asked until so many guesses of each set were judged."""
    FORGET = 0.98
    """A guess counts by this factor less for each later one."""
    SHARE = 0.02
    """Asking all of them, so that what is known is not old, may take this share of the time."""

    def __init__(self, drafters: int, always: frozenset[int] = frozenset()):
        """Those in `always` are asked in any case."""
        self._took = [0.0] * drafters
        self._always = always
        self._judged: dict[frozenset[int], tuple[int, float, float]] = {}
        """This maps a set to (guesses, their weight, that of the right ones)."""
        self._tried = 0.0
        """All were asked at this time."""

    @property
    def sets(self) -> list[frozenset[int]]:
        """Return the sets of drafters to choose from, each within the next."""
        order = sorted(range(len(self._took)), key=self._took.__getitem__)
        others = [k for k in order if k not in self._always]
        least = 0 if self._always else 1
        return [self._always | {*others[:n]} for n in range(least, len(others) + 1)]

    def took(self, drafter: int, seconds: float) -> None:
        """Take in how long a drafter was waited for."""
        known = self._took[drafter]
        self._took[drafter] = 0.8 * known + 0.2 * seconds if known else seconds

    def judged(self, drafters: frozenset[int], right: bool) -> None:
        """Take in whether the guess of a set of drafters was right."""
        seen, weight, good = self._judged.get(drafters, (0, 0.0, 0.0))
        weights = self.FORGET * weight + 1, self.FORGET * good + right
        self._judged[drafters] = (seen + 1, *weights)

    def chosen(self, lap: float, now: float) -> frozenset[int]:
        """Return the drafters to be asked; a token without speculation takes `lap` seconds."""
        sets = self.sets
        known = all(self._judged.get(some, (0,))[0] >= self.JUDGED for some in sets)
        if not known or max(self._took) < self.SHARE * (now - self._tried):
            self._tried = now
            return sets[-1]
        return min(sets, key=lambda some: self._token(some, lap))

    def _token(self, drafters: frozenset[int], lap: float) -> float:
        _, weight, good = self._judged[drafters]
        seconds = max(self._took[drafter] for drafter in drafters)
        return (good * seconds + (weight - good) * max(lap, seconds)) / weight
