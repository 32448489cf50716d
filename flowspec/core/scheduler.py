"""Rank 0's mind: events in, actions out. Pure: it knows no tensor, device, clock, thread or transport.

The truth of a request lives here: the committed text, the tree of guesses below its last token, and what
is on its way. Whatever the policy drafts and sends, and whatever comes late or never, a token is committed only
because the target picked it at a node whose path is the text so far; so the text is that of plain decoding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from flowspec.core.messages import (
    Action,
    Commit,
    Draft,
    Drafted,
    DraftNode,
    Event,
    Finish,
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


class Pipe:
    """What rank 0 knows of the ring: segments out, and when the first stage can take the next one."""

    def __init__(self) -> None:
        self.out: dict[int, tuple[int, ...]] = {}  # number -> ids, while a node of it is alive
        self.waiting: dict[int, float] = {}  # number -> when it was sent, until the first stage starts on it
        self.free_at = -math.inf
        self.hop = math.inf  # seconds of one hop: half of the quickest answer of an idle first stage
        self._idle_when_sent: dict[int, bool] = {}

    def sent(self, number: int, ids: tuple[int, ...], now: float) -> None:
        self._idle_when_sent[number] = not self.waiting and now >= self.free_at
        self.out[number], self.waiting[number] = ids, now

    def started(self, event: Started, now: float) -> None:
        sent_at = self.waiting.pop(event.number, None)
        if sent_at is None:  # it came back before this news did
            return
        if self._idle_when_sent.pop(event.number):
            self.hop = min(self.hop, (now - sent_at) / 2)
        self.free_at = now + event.expected - self._known_hop

    def returned(self, number: int, now: float) -> None:
        self.out.pop(number, None)
        if self.waiting.pop(number, None) is not None:
            self._idle_when_sent.pop(number)
            self.free_at = now

    def drop_dead(self, tree: TokenTree) -> None:
        """A segment none of whose nodes is alive need not come back."""
        self.out = {number: ids for number, ids in self.out.items() if not tree.nodes.keys().isdisjoint(ids)}

    @property
    def room_at(self) -> float:
        """When a segment may leave so that it arrives as the first stage becomes free; never while one waits there."""
        return math.inf if self.waiting else self.free_at - self._known_hop

    @property
    def _known_hop(self) -> float:
        return 0.0 if math.isinf(self.hop) else self.hop


class Scheduler:
    """One request. `handle(event, now) -> actions`; `now` is any clock in seconds that does not go back."""

    def __init__(self, request: Request, policy: Policy, drafts: bool = True):
        self.request, self.policy, self.drafts = request, policy, drafts
        self.tree = TokenTree(request.prompt[-1], request.prompt_length - 1)
        self.policy.attach(self.tree, lambda: self.remaining - 1)
        self.pipe = Pipe()
        self.anchor = -1
        self.version = self.segments = self.returned_segments = 0
        self.tokens: list[int] = []
        self.finished = False
        self._drafting = False
        self._known: dict[int, Mapping[int, int]] = {}

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
            self._drafted(event)
        elif isinstance(event, Started):
            self.pipe.started(event, now)
            if event.rows:
                self.policy.observe(event)
        else:
            assert isinstance(event, Woke)
        return actions if self.finished else actions + self._fill(now)

    # ---- what came back ----------------------------------------------------------------------------
    def _returned(self, event: Returned, now: float) -> list[Action]:
        self.pipe.returned(event.number, now)
        self.returned_segments += 1
        self._known.update({i: event.choices for i in event.ids if i in self.tree})
        if self.tree.root.id not in self._known or not self.policy.verify_now(len(self.pipe.out)):
            return []
        path, tokens, accepted, child = self._walk()
        self.tokens += tokens
        self.anchor = path[-1].id
        if child is not None and self.policy.keeps(child):
            self.tree.reroot(child)
        else:
            self.tree.restart(self.anchor, tokens[-1], path[-1].position + 1)
        self._known = {}
        self.policy.rerooted()
        self.pipe.drop_dead(self.tree)
        self.version += 1
        commit = Commit(tuple(n.id for n in path), tuple(tokens), tuple(accepted), self.tree.root.id)
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
            token = int(self._known[node.id][node.id])
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
    def _drafted(self, event: Drafted) -> None:
        self._drafting = False
        nodes = self.tree.nodes
        alive = [row for row, id in enumerate(event.nodes) if id in nodes]
        if alive:
            event = event if len(alive) == len(event.nodes) else event.only(alive)
            self.policy.proposed([nodes[id] for id in event.nodes], event)

    def _fill(self, now: float) -> list[Action]:
        drafts = self._draft()
        sends = self._sends(now)
        return drafts + sends + self._draft()  # again: a layer that has just left can be drafted from

    def _draft(self) -> list[Action]:
        if not self.drafts or self._drafting or not (batch := self.policy.draft()):
            return []
        self._drafting = True
        for node in batch:
            node.expanded = True
        return [Draft(tuple(DraftNode(n.id, n.parent, n.token) for n in batch))]

    def _sends(self, now: float) -> list[Action]:
        actions: list[Action] = []
        while len(self.pipe.out) < self.policy.credits:
            if self.policy.just_in_time and now < self.pipe.room_at:
                if not math.isinf(self.pipe.room_at):
                    actions.append(Wake(self.pipe.room_at))
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
        segment = Segment(self.segments, tuple(n.id for n in nodes), tuple(n.parent for n in nodes), tuple(n.token for n in nodes))
        self.pipe.sent(segment.number, segment.ids, now)
        return segment

    def validate(self) -> None:
        """Assert what must hold between events."""
        self.tree.validate()
        assert self.tree.root.position == self.request.prompt_length + len(self.tokens) - 1
        assert self.finished or self.remaining > 0
        assert len(self.pipe.out) <= self.policy.credits
        assert not any(self.tree.nodes.keys().isdisjoint(ids) for ids in self.pipe.out.values())
