"""This policy never pauses: the likeliest nodes leave as soon as the first stage can take them.

It is FlowSpec, driven by events; docs/policy.md has its formulas. Pure."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence

from flowspec.core.control import Controller, Findings
from flowspec.core.learnt import Learnt
from flowspec.core.messages import Drafted
from flowspec.core.policy import DUE, Attached, PolicyConfig, TreeConfig
from flowspec.core.request import Request
from flowspec.core.score import Scorer
from flowspec.core.topology import Topology
from flowspec.core.tree import Node, TokenTree


class Candidates:
    """Candidates are a node's children as the drafter proposed them last, best first.

    Those before `next` have been looked at."""

    __slots__ = ("next", "offsets", "tokens")

    def __init__(self, tokens: list[int], offsets: list[float]):
        self.tokens, self.offsets = (
            tokens,
            offsets,
        )  # log p of each: a child's score less its parent's
        self.next = 0


class Continuous(Attached):
    """The event-driven policy keeps one tree, and as many segments in flight as the ring holds.

    The likeliest unsent nodes leave just in time."""

    ROWS = 10
    """A drafter forward has this many nodes."""
    REFRESHED = 5
    """At most this many of them were drafted before, and are drafted again."""
    ALIVE = math.log(0.05)
    """A node is drafted again if it is reached with at least this log-probability."""
    MOVE = 0.1
    """The scores of a subtree move if they change by at least this much."""
    PATIENCE = 2.0
    """A new root waits for a draft that is worth this many times the delay."""
    CROWD = 600
    """If the budget is auto, the tree has this many nodes."""

    def __init__(
        self, config: TreeConfig, topology: Topology, switches: PolicyConfig, features: bool
    ):
        self.budget = config.budget or self.CROWD
        self.drafts = self.budget > 1
        self.top_k = config.top_k or 16
        self.levels = (config.depth + 1) if config.depth else 64
        self._fixed_rows, self._topology = config.segment, topology
        self.just_in_time = switches.just_in_time
        self.refreshes = switches.refresh and features
        self.scorer = Scorer(switches.calibrate, switches.ngram_feature)

    def attach(
        self, tree: TokenTree, learnt: Learnt, request: Request, levels_left: Callable[[], int]
    ) -> None:
        findings = learnt.findings.setdefault(request.sampling.temperature, Findings())
        self.control = Controller(learnt.ring, self._topology, self._fixed_rows, findings)
        self.promise = 1.0  # how likely the best child of a node is, of late
        super().attach(tree, learnt, request, levels_left)

    def decided(
        self, path: Sequence[int], tokens: Sequence[int], segments_out: int, now: float
    ) -> None:
        super().decided(path, tokens, segments_out, now)
        speculated, left = self.control.speculates, self.levels_left() + 1
        self.control.decided(len(tokens), now, left, self.scorer.promise, segments_out)
        if speculated and not self.control.speculates:
            self.scorer.judge_anew()

    def explain(self) -> list[str]:
        return [*self.control.explain(), *self.scorer.explain()]

    def _reset(self) -> None:
        self.drafting = (
            self.tree.root.score
        )  # the best node that the drafter is asked for the first time
        # Heaps of (-score, id), absolute: moving the root reorders nothing. An entry that is not
        # its node's present score is
        # dropped where it comes up; so is that of a dead node.
        self.unsent = [(-self.tree.root.score, self.tree.root.id)]
        self.unexpanded = list(self.unsent)
        self.tail: list[tuple[float, int]] = []  # (-score of the next candidate, parent)
        self.wave: list[
            tuple[float, int]
        ] = []  # drafted from features that are older than those at hand
        self.asked_again: set[int] = set()  # those of the wave that were given to the drafter
        self.too_deep: list[
            tuple[float, int]
        ] = []  # unexpanded, but not before the root has moved on
        self.candidates: dict[int, Candidates] = {}

    def rerooted(self) -> None:
        root = self.tree.root
        if len(self.tree) == 1 and not root.expanded and not root.sent:
            self._reset()  # a miss, or a leaf: nothing of the heaps is alive but this
            return
        for entry in self.too_deep:
            heapq.heappush(self.unexpanded, entry)
        self.too_deep = []
        self.wave, self.asked_again = (
            ([(-root.score, root.id)] if self.refreshes and root.expanded else []),
            set(),
        )
        if len(self.candidates) > 2 * len(self.tree) + 64:  # of nodes that died
            self.candidates = {i: found for i, found in self.candidates.items() if i in self.tree}
        self._grow()

    @property
    def credits(self) -> int:
        return self.control.credits

    def proposed(self, nodes: list[Node], drafted: Drafted) -> None:
        scored = self.scorer.scored(nodes, drafted, self.top_k)
        offsets = [
            [score - node.score for score in scores] for node, _, scores in scored
        ]  # before any of them is moved
        for (node, tokens, _), below in zip(scored, offsets, strict=True):
            again, found = node.id in self.candidates, Candidates(tokens, below)
            self.candidates[node.id] = found
            if again:
                self._refreshed(node, found)
            self._push_tail(node, found)
        if offsets:
            self.promise += 0.15 * (math.exp(offsets[0][0]) - self.promise)
        self._grow()

    def _refreshed(self, node: Node, found: Candidates) -> None:
        """Give the node's children the scores that they have by its new list.

        They are to be drafted again themselves, unless a newer wave is on its way to them. A child
        that is in the list no more is not likelier than the last one in it."""
        spreads = node.id in self.asked_again
        offsets, last = dict(zip(found.tokens, found.offsets, strict=True)), found.offsets[-1]
        for token, child in node.children.items():
            change = (
                node.score + offsets.get(token, min(last, child.score - node.score)) - child.score
            )
            if abs(change) > self.MOVE:
                self._move(child, change)
            if child.expanded and spreads:
                heapq.heappush(self.wave, (-child.score, child.id))

    def _move(self, top: Node, change: float) -> None:
        """Add to the scores of a node and of all below it."""
        stack = [top]
        while stack:
            node = stack.pop()
            node.score += change
            entry = (-node.score, node.id)
            if not node.sent:
                heapq.heappush(self.unsent, entry)
            if not node.expanded:
                heapq.heappush(self.unexpanded, entry)
            elif node.id in self.candidates:
                self._push_tail(node, self.candidates[node.id])
            stack.extend(node.children.values())

    def _push_tail(self, node: Node, found: Candidates) -> None:
        if found.next < len(found.tokens):
            heapq.heappush(self.tail, (-(node.score + found.offsets[found.next]), node.id))

    def draft(self) -> list[Node]:
        """Return what is to be drafted again, then the likeliest unexpanded nodes.

        These are expanded while P >= theta / 4 and the budget has room."""
        if not self.control.speculates:
            root = self.tree.root
            return [root] if self.control.probes and not root.expanded else []
        batch = self._stale() if self.wave else []
        again = len(batch)
        nodes, least = self.tree.nodes, self._score_of(self.control.theta / 4)
        useless, deepest = (self.tree.root.position + n for n in (self.levels_left(), self.levels))
        while self.unexpanded and len(batch) < self.ROWS and len(nodes) < self.budget:
            key, id = self.unexpanded[0]
            node = nodes.get(id)
            if node is not None and -key < least:
                break
            entry = heapq.heappop(self.unexpanded)
            if node is None or node.expanded or -key != node.score or node.position >= useless:
                continue
            if node.position < deepest:
                batch.append(node)
            else:
                self.too_deep.append(entry)
        if len(batch) > again:
            self.drafting = batch[again].score
        return batch

    def _stale(self) -> list[Node]:
        """Return the best nodes of the wave: the root, whose features are known now, then those
        below the nodes that were drafted again."""
        batch: list[Node] = []
        useless = self.tree.root.position + self.levels_left()
        while (
            self.wave
            and len(batch) < self.REFRESHED
            and -self.wave[0][0] >= self.tree.root.score + self.ALIVE
        ):
            node = self.tree.nodes.get(heapq.heappop(self.wave)[1])
            if node is not None and node.position < useless:
                batch.append(node)
        self.asked_again.update(node.id for node in batch)
        return batch

    def segment(self, drafting: bool) -> list[Node]:
        """Return the root if it is unsent, then the likeliest unsent nodes while P >= theta.

        They are no more than the rows of a segment."""
        batch: list[Node] = []
        nodes, root, least = self.tree.nodes, self.tree.root, self._score_of(self.control.theta)
        if drafting and not root.sent and self.control.speculates and self._worth_waiting():
            return []
        most = self.control.rows if self.control.speculates else int(not root.sent)
        while self.unsent and len(batch) < most:
            key, id = self.unsent[0]
            node = nodes.get(id)
            if node is not None and not node.sent and -key == node.score:
                if node is not root and node.score < least:
                    break
                batch.append(node)
            heapq.heappop(self.unsent)
        return batch

    def reach(self, node: Node) -> float:
        root = self.tree.root
        return DUE if node is root else math.exp(node.score - root.score)

    def put_back(self, nodes: list[Node]) -> None:
        for node in nodes:
            heapq.heappush(self.unsent, (-node.score, node.id))

    def _worth_waiting(self) -> bool:
        """Return whether to hold a new root back for the draft under way.

        Its children would be verified with it rather than a forward later. That saves a forward
        (`base`) with the probability that one of them is right, less what they add to this one; but
        everything waits for the draft. In company the others would leave without it, and a root
        that misses a batch waits for the next."""
        if self.ring.requests > 1:
            return False
        reach = math.exp(min(0.0, self.drafting - self.tree.root.score)) * self.promise
        more = float(self.ring.times[2]) - self.ring.base
        return 0 < self.PATIENCE * self.ring.draft < reach * self.ring.base - more

    def _score_of(self, reach: float) -> float:
        """Return the score of a node that is accepted with probability `reach`, given the present
        root."""
        return self.tree.root.score + math.log(reach)

    def _grow(self) -> None:
        """Make candidates into nodes, likeliest first, while P >= theta / 4 and the budget has
        room.

        The bound is that of expanding: what is below it would be neither drafted nor sent until the
        root moves, and then this is asked again."""
        tree, tail, most = self.tree, self.tail, -self._score_of(self.control.theta / 4)
        while tail and len(tree.nodes) < self.budget and tail[0][0] <= most:
            key, id = heapq.heappop(tail)
            node, found = tree.nodes.get(id), self.candidates.get(id)
            if (
                node is None
                or found is None
                or found.next == len(found.tokens)
                or -key != node.score + found.offsets[found.next]
            ):
                continue
            token = found.tokens[found.next]
            found.next += 1
            if token not in node.children:
                child = tree.add(node, token, -key)
                entry = (key, child.id)
                heapq.heappush(self.unsent, entry)
                heapq.heappush(self.unexpanded, entry)
            self._push_tail(node, found)
