"""One request in the ring: the committed text, the tree of guesses below its last token, and what
of it is on its way.

This module is pure (no torch, clock or I/O). The truth of a request lives here: whatever its policy
drafts and sends, and whatever comes late or never, a token is committed only because the target
picked it at a node whose path is the text so far; so the text is that of plain decoding.
"""

from __future__ import annotations

from flowspec.core.learnt import Learnt
from flowspec.core.messages import (
    Choose,
    Commit,
    Decision,
    Drafted,
    DraftNode,
    Finish,
    Prune,
    Returned,
    Segment,
)
from flowspec.core.policy import Policy
from flowspec.core.request import Request
from flowspec.core.tree import Node, TokenTree


class Decoding:
    """A decoding is told what the drafter and the target said of its nodes, and makes text of
    it."""

    def __init__(self, request: Request, policy: Policy, learnt: Learnt, drafts: bool = True):
        """`learnt` is what the run's requests have found out; it goes on learning. `drafts` is
        False where no drafter is."""
        self.request, self.policy, self.drafts = request, policy, drafts and policy.drafts
        self.tree = TokenTree(request.prompt[-1], request.prompt_length - 1)
        self.policy.attach(self.tree, learnt, request, lambda: self.remaining - 1)
        self.out: dict[int, tuple[int, ...]] = {}
        """This maps the number of a segment in flight to its nodes, while one of them is alive."""
        self.asked = self.drafts
        """An answer of the drafter is to come; at first it reads the prompt."""
        self.anchor = -1
        self.version = self.segments = self.returned_segments = self.guesses = 0
        self.tokens: list[int] = []
        self.text: list[tuple[int, int]] = []
        """These are the nodes that have become text, and their tokens."""
        self.finished = False
        self._again: list[Node] = []  # what was lost on its way
        self._known: dict[int, Choose] = {}

    @property
    def remaining(self) -> int:
        """New tokens still wanted. A node d levels below the root decides the (d+1)-th of them."""
        return self.request.sampling.max_new_tokens - len(self.tokens)

    @property
    def context(self) -> int:
        """Tokens of the text so far that have been through the target."""
        return self.tree.root.position

    # ---- what is asked for -----------------------------------------------------------------------
    def draft(self) -> tuple[DraftNode, ...]:
        """Return the nodes that the drafter is asked for now; none while it has not answered."""
        if not self.drafts or self.asked or not (batch := self.policy.draft()):
            return ()
        self.asked = True
        for node in batch:
            node.expanded = True
        return tuple(DraftNode(n.id, n.parent, n.token) for n in batch)

    def segment(self) -> list[Node]:
        """Return what would be sent now, parents before children; what was lost goes first."""
        again, self._again = [node for node in self._again if node.id in self.tree], []
        return sorted(again, key=lambda node: node.id) or self.policy.segment(self.asked)

    def send(self, number: int, nodes: list[Node]) -> Segment:
        """Return the segment of these nodes, which leaves now."""
        for node in nodes:
            node.sent = True
        self.segments += 1
        self.guesses += sum(node is not self.tree.root for node in nodes)
        ids, parents, tokens = zip(*((n.id, n.parent, n.token) for n in nodes), strict=True)
        segment = Segment(number, ids, parents, tokens)
        self.out[number] = segment.ids
        return segment

    # ---- what came back --------------------------------------------------------------------------
    def drafted(self, event: Drafted) -> None:
        """Take in the drafter's answer; nodes that died meanwhile are left out."""
        self.asked = False
        nodes = self.tree.nodes
        alive = [row for row, id in enumerate(event.nodes) if id in nodes]
        if alive:
            event = event if len(alive) == len(event.nodes) else event.only(alive)
            self.policy.proposed([nodes[id] for id in event.nodes], event)

    @property
    def prune(self) -> Prune:
        """Return what is decided so far."""
        return Prune(self.version, self.anchor, self.tree.root.id)

    def returned(self, event: Returned, now: float) -> Decision | None:
        """Take in that a segment came back, and decide what can be decided."""
        self.out.pop(event.number, None)
        self.returned_segments += 1
        self._known.update({i: event.choose for i in event.ids if i in self.tree})
        return self._decide(now)

    def lost(self, numbers: list[int], ids: list[int], now: float) -> Decision | None:
        """Take in that segments will not come back, and that these nodes have to be sent again."""
        for number in numbers:
            self.out.pop(number, None)
        self._again += [self.tree.nodes[id] for id in ids if id in self.tree]
        for node in self._again:
            node.sent = False
        return self._decide(now)

    def _decide(self, now: float) -> Decision | None:
        if self.tree.root.id not in self._known or not self.policy.verify_now(len(self.out)):
            return None
        path, tokens, accepted, child = self._walk()
        self.tokens += tokens
        self.text += [(node.id, node.token) for node in path]
        self.anchor = path[-1].id
        self.policy.decided([n.id for n in path], tokens, len(self.out), now)
        if child is not None and self.policy.keeps(child):
            self.tree.reroot(child)
        else:
            self.tree.restart(self.anchor, tokens[-1], path[-1].position + 1)
        self._known = {}
        self.policy.rerooted()
        self._drop_dead()
        self.version += 1
        commit = Commit(
            tuple(n.id for n in path), tuple(tokens), tuple(accepted), self.tree.root.id
        )
        reason = self._end(tokens[-1])
        self.finished = reason is not None
        return Decision(self.request.id, commit, Finish(reason) if reason else None)

    def _walk(self) -> tuple[list[Node], list[int], list[bool], Node | None]:
        """Follow the target's choices down from the root as far as they are known: verification."""
        path: list[Node] = []
        tokens: list[int] = []
        accepted: list[bool] = []
        node: Node | None = self.tree.root
        while node is not None and node.id in self._known:
            token = int(self._known[node.id](node.id, [n.id for n in path]))
            path.append(node)
            tokens.append(token)
            node = node.children.get(token)
            accepted.append(node is not None and node.sent)
            if token in self.request.eos or len(tokens) == self.remaining:
                break
        return path, tokens, accepted, node

    def _end(self, token: int) -> str | None:
        if token in self.request.eos:
            return "stop"
        return "length" if self.remaining == 0 else None

    def _drop_dead(self) -> None:
        """Forget segments of which no node is alive: they need not come back."""
        alive = self.tree.nodes.keys()
        self.out = {n: ids for n, ids in self.out.items() if not alive.isdisjoint(ids)}

    def validate(self) -> None:
        """Assert what must hold between events."""
        self.tree.validate()
        assert self.context == self.request.prompt_length + len(self.tokens) - 1
        assert self.finished or self.remaining > 0
        assert not any(self.tree.nodes.keys().isdisjoint(ids) for ids in self.out.values())
