"""Rank 0's mind: events in, actions out. Pure: it knows no tensor, device, clock, thread or transport.

The truth of a request lives here: the committed text, the tree of guesses below its last token, and what
is on its way. Whatever the policy drafts and sends, and whatever comes late or never, a token is committed only
because the target picked it at a node whose path is the text so far; so the text is that of plain decoding.
"""

from __future__ import annotations

import math

from flowspec.core.learnt import Learnt
from flowspec.core.messages import (
    Action,
    Choose,
    Commit,
    Cost,
    Draft,
    Drafted,
    DraftNode,
    Event,
    Finish,
    Idle,
    Prune,
    Returned,
    Segment,
    Started,
    Wake,
    Woke,
)
from flowspec.core.policy import Policy
from flowspec.core.request import Request
from flowspec.core.tree import Node, TokenTree


class Scheduler:
    """One request. `handle(event, now) -> actions`; `now` is any clock in seconds that does not go back."""

    def __init__(
        self, request: Request, policy: Policy, learnt: Learnt | None = None, drafts: bool = True
    ):
        """`learnt`: by the run's earlier requests; it goes on learning."""
        self.request, self.policy, self.drafts = request, policy, drafts and policy.drafts
        self.tree = TokenTree(request.prompt[-1], request.prompt_length - 1)
        learnt = learnt or Learnt()
        self.ring = learnt.ring
        self.ring.begin(self.tree.root.position)
        self.policy.attach(self.tree, learnt, request, lambda: self.remaining - 1)
        self.anchor = -1
        self.version = self.segments = self.returned_segments = 0
        self.tokens: list[int] = []
        self.finished = False
        self._drafting, self._draft_begun = False, 0.0
        self._known: dict[int, Choose] = {}

    @property
    def remaining(self) -> int:
        """New tokens still wanted. A node d levels below the root decides the (d+1)-th of them."""
        return self.request.sampling.max_new_tokens - len(self.tokens)

    def start(self, now: float) -> list[Action]:
        return self._fill(now)

    def handle(self, event: Event, now: float) -> list[Action]:
        if self.finished:
            return []
        actions: list[Action] = []
        if isinstance(event, Returned):
            actions = self._returned(event, now)
        elif isinstance(event, Drafted):
            self._drafted(event, now)
        elif isinstance(event, Started):
            self.ring.started(event, now)
        elif isinstance(event, Cost):
            self.ring.measured(event)
        elif isinstance(event, Idle):
            self.ring.idle(now)
        else:
            assert isinstance(event, Woke)
        return actions if self.finished else actions + self._fill(now)

    # ---- what came back ----------------------------------------------------------------------------
    def _returned(self, event: Returned, now: float) -> list[Action]:
        self.ring.returned(event.number, now)
        self.returned_segments += 1
        self._known.update({i: event.choose for i in event.ids if i in self.tree})
        if self.tree.root.id not in self._known or not self.policy.verify_now(len(self.ring.out)):
            return []
        path, tokens, accepted, child = self._walk()
        self.tokens += tokens
        self.anchor = path[-1].id
        self.ring.deepened(path[-1].position + 1)
        self.policy.decided([n.id for n in path], tokens, now)
        if child is not None and self.policy.keeps(child):
            self.tree.reroot(child)
        else:
            self.tree.restart(self.anchor, tokens[-1], path[-1].position + 1)
        self._known = {}
        self.policy.rerooted()
        self.ring.drop_dead(self.tree)
        self.version += 1
        commit = Commit(
            tuple(n.id for n in path), tuple(tokens), tuple(accepted), self.tree.root.id
        )
        reason = self._end(tokens[-1])
        if reason:
            self.finished = True
            return [commit, Finish(reason)]
        return [Prune(self.version, self.anchor, self.tree.root.id), commit]

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

    # ---- what to do next ---------------------------------------------------------------------------
    def _drafted(self, event: Drafted, now: float) -> None:
        self._drafting = False
        self.ring.drafted(now - self._draft_begun)
        nodes = self.tree.nodes
        alive = [row for row, id in enumerate(event.nodes) if id in nodes]
        if alive:
            event = event if len(alive) == len(event.nodes) else event.only(alive)
            self.policy.proposed([nodes[id] for id in event.nodes], event)

    def _fill(self, now: float) -> list[Action]:
        drafts = self._draft(now)
        sends = self._sends(now)
        return (
            drafts + sends + self._draft(now)
        )  # again: a layer that has just left can be drafted from

    def _draft(self, now: float) -> list[Action]:
        if not self.drafts or self._drafting or not (batch := self.policy.draft()):
            return []
        self._drafting, self._draft_begun = True, now
        for node in batch:
            node.expanded = True
        return [Draft(tuple(DraftNode(n.id, n.parent, n.token) for n in batch))]

    def _sends(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while len(self.ring.out) < self.policy.credits:
            if self.policy.just_in_time and now < self.ring.room_at:
                if not math.isinf(self.ring.room_at):
                    actions.append(Wake(self.ring.room_at))
                break
            nodes = self.policy.segment(self._drafting)
            if not nodes:
                break
            actions.append(self._send(nodes, now))
        return actions

    def _send(self, nodes: list[Node], now: float) -> Segment:
        for node in nodes:
            node.sent = True
        self.segments += 1
        segment = Segment(
            self.segments,
            tuple(n.id for n in nodes),
            tuple(n.parent for n in nodes),
            tuple(n.token for n in nodes),
        )
        self.ring.sent(segment.number, segment.ids, now)
        return segment

    def validate(self) -> None:
        """Assert what must hold between events."""
        self.tree.validate()
        assert self.tree.root.position == self.request.prompt_length + len(self.tokens) - 1
        assert self.finished or self.remaining > 0
        assert not any(self.tree.nodes.keys().isdisjoint(ids) for ids in self.ring.out.values())
