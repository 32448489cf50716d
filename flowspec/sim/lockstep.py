"""This is FlowSpec as published (arXiv 2507.02620), which takes turns in lock step.

It is a yardstick for the event-driven schedule, in simulation only. In a turn, the last stage's
segment returns, rank 0 verifies it and broadcasts the prune. Then every stage computes what is left
of the one segment that waits for it, while rank 0 drafts a tree afresh from the new root and sends
the nodes that are new. A round ends when the target's token is nowhere in the tree; the next one
drafts, fills the pipeline and goes on.

Times are an exact recurrence: a stage begins when its prune, its input and itself are ready. There
is no barrier of all ranks, no mask on the wire and no empty message that costs more than its delay,
so the published system is not faster."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from flowspec.core.messages import PREFILL_ROWS, Commit, DraftNode
from flowspec.core.policy import TreeConfig, best_first
from flowspec.core.request import Request
from flowspec.core.score import Scorer
from flowspec.core.tree import Node, TokenTree
from flowspec.sim.world import Guesser, Outcome, RingSpec
from flowspec.trace import Fates, Span, untangled

EXPANSION = 64
"""The tree that is drafted each turn has this many nodes; the first one of a round has
tree.budget."""


@dataclass
class _Item:
    """This is a segment that waits somewhere.

    If it has no nodes, it is the empty message of a turn without work."""

    nodes: list[Node]
    arrival: float
    number: int = 0


class LockStep:
    """This runs one request.

    It takes what `World` takes, but the tree's settings instead of a policy."""

    def __init__(
        self, request: Request, text: list[int], tree: TreeConfig, guesser: Guesser, ring: RingSpec
    ):
        self.request, self.text, self.guesser = request, text, guesser
        self.ring = ring = replace(
            ring, verify_last=False
        )  # rank 0 holds the lm_head and needs the features
        self.top_k, self.levels = tree.top_k or 10, (tree.depth or 6) + 1
        self.budget = tree.budget or 80
        self.tree = TokenTree(request.prompt[-1], request.prompt_length - 1)
        self.outcome = Outcome()
        self._links = [ring.link(sender) for sender in ring.topology.ranks]
        self._free = [0.0] * ring.topology.world_size
        self._fates, self._spans = Fates(), list[Span]()
        self._segments = 0
        self._scorer = Scorer(calibrate=False, ngrams=False)
        self._scorer.attach(self.tree, request.prompt, {})

    def run(self) -> Outcome:
        now = self._prefill()
        while not self._over:
            now = self._round(now)
        out = self.outcome
        out.drafted = self.tree.drafted
        out.spans = untangled(
            self._fates.judge(s) for s in self._spans if s.begin <= out.last_token
        )
        return out

    @property
    def _over(self) -> bool:
        tokens = self.outcome.tokens
        return len(tokens) >= self.request.sampling.max_new_tokens or bool(
            tokens and tokens[-1] in self.request.eos
        )

    # ---- a round ---------------------------------------------------------------------------------
    def _prefill(self) -> float:
        """Return when rank 0's drafter has read the prompt, in seconds.

        The prompt goes through the stages, and the drafter may have to wait for its features."""
        known = 0.0
        for begin in range(0, self.request.prompt_length - 1, PREFILL_ROWS):
            rows, arrival = min(PREFILL_ROWS, self.request.prompt_length - 1 - begin), 0.0
            for rank in self.ring.topology.ranks:
                if rank:
                    arrival = self._free[rank] = max(arrival, self._free[rank]) + self.ring.seconds(
                        rank, rows, begin
                    )
                if rank < self.ring.stages or self.ring.features:
                    arrival = self._links[rank].arrival(
                        self.ring.hop_bytes(rank, rows, nodes=False), arrival
                    )
            known = arrival if self.ring.features else 0.0
        return known + self.ring.reading(self.request.prompt_length)

    def _round(self, now: float) -> float:
        """Fill the pipeline, then take turns until the text ends or leaves the tree.

        Return the time (in seconds) at which that was known."""
        waiting = self._fill(now)
        while True:
            head = waiting.pop()  # [of stage 1, ..., of stage S, of rank 0]
            decided = max(head.arrival, self._free[0])
            lost = bool(head.nodes) and not self._verify(head.nodes, decided)
            if lost or self._over:
                return decided
            told = decided + self.ring.latency
            moved = [self._stage(rank, item, told) for rank, item in enumerate(waiting, 1)]
            waiting = [self._expand(decided) if head.nodes else self._send(0, [], decided), *moved]

    def _fill(self, now: float) -> list[_Item]:
        """Draft a tree and send it in pieces of nearly equal size, smaller ones first.

        Each stage computes all pieces that reach it but the last."""
        now, pool = self._draft(now)
        nodes = [self.tree.root, *sorted(pool, key=best_first)[: self.budget - 1]]
        pieces = self.ring.topology.hops
        cuts = [len(nodes) * k // pieces for k in range(pieces + 1)]
        items = [self._send(0, nodes[a:b], now) for a, b in itertools.pairwise(cuts)]
        waiting = []
        for rank in range(1, pieces):
            waiting.append(items.pop())
            items = [self._stage(rank, item, 0.0) for item in items]
        return waiting + items

    def _verify(self, segment: list[Node], now: float) -> bool:
        """Walk down inside the segment; return False if the token after it is nowhere in the
        tree."""
        inside = {n.id for n in segment}
        node: Node | None = self.tree.root
        assert node is not None and node.id in inside, (
            "the root is in the first segment that is not empty"
        )
        path, tokens, accepted = [], [], []
        while node is not None and node.id in inside and not self._over:
            token = self.text[node.position + 1 - self.request.prompt_length]
            path.append(node)
            tokens.append(token)
            node = node.children.get(token)
            node = node if node is not None and node.sent else None
            accepted.append(node is not None)
            self.outcome.tokens.append(token)
        if node is not None:
            self.tree.reroot(node)
        else:
            self.tree.restart(path[-1].id, tokens[-1], path[-1].position + 1)
        self._commit(
            Commit(tuple(n.id for n in path), tuple(tokens), tuple(accepted), self.tree.root.id),
            now,
        )
        return node is not None

    def _commit(self, commit: Commit, now: float) -> None:
        out = self.outcome
        out.first_token = out.first_token or now
        out.last_token = now
        out.returned_segments += 1
        self._fates.decided(commit.path, commit.root, now)
        self.guesser.commit(commit)

    # ---- what takes time -------------------------------------------------------------------------
    def _draft(self, now: float) -> tuple[float, list[Node]]:
        """Draft a tree from the root, level by level, from the best top_k nodes of each.

        Return the time (in seconds) at which it is done, and its nodes."""
        pool: list[Node] = []
        frontier = [self.tree.root]
        for _ in range(self.levels):
            drafted = self.guesser.propose([DraftNode(n.id, n.parent, n.token) for n in frontier])
            nodes = [self.tree.nodes[id] for id in drafted.nodes]
            level = []
            for node, tokens, scores in self._scorer.scored(nodes, drafted, self.top_k):
                level += [self.tree.add(node, *child) for child in zip(tokens, scores, strict=True)]
            pool += level
            frontier = sorted(level, key=best_first)[: self.top_k]
            begun, now = now, now + self.ring.draft_seconds(len(frontier))
            self._spans.append(Span(0, "draft", "draft", begun, now, {"request": self.request.id}))
            if not frontier:
                break
        self._free[0] = now
        return now, pool

    def _expand(self, now: float) -> _Item:
        now, pool = self._draft(now)
        return self._send(
            0, [n for n in sorted(pool, key=best_first)[:EXPANSION] if not n.sent], now
        )

    def _stage(self, rank: int, item: _Item, told: float) -> _Item:
        """Let stage `rank` compute what is alive of its item, once it knows the last prune.

        Return what the next rank gets."""
        nodes = [n for n in item.nodes if n.id in self.tree]
        begin = max(item.arrival, told, self._free[rank])
        if not nodes:
            return self._send(rank, [], begin)
        end = self._free[rank] = begin + self.ring.seconds(
            rank, len(nodes), self.tree.root.position
        )
        self._note(rank, "compute", begin, end, nodes, item.number)
        self.outcome.forwarded += len(nodes) if rank == 1 else 0
        return self._send(rank, nodes, end, item.number)

    def _send(self, rank: int, nodes: list[Node], now: float, number: int = 0) -> _Item:
        if nodes and rank == 0:
            for node in nodes:
                node.sent = True
            self._segments += 1
            number = self._segments
            self._fates.sent([n.id for n in nodes], [n.parent for n in nodes])
        size = self.ring.hop_bytes(rank, len(nodes))
        arrival = self._links[rank].arrival(size, now)
        if nodes:
            self._note(rank, "send", now, arrival, nodes, number, bytes=size)
        return _Item(nodes, arrival, number)

    def _note(
        self, rank: int, row: str, begin: float, end: float, nodes: list[Node], number: int, **facts
    ) -> None:
        about = {"request": self.request.id, "segment": number, "ids": [n.id for n in nodes]}
        self._spans.append(Span(rank, row, "prefill", begin, end, about | facts))
