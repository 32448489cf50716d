"""A policy decides which nodes to draft and to send, and when; its settings are here too.

This module is the contract between the scheduler and the policies, which are in core/policies/, a
file each. It is pure (no torch, clock or I/O)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from flowspec.core.learnt import Learnt
from flowspec.core.messages import KEPT, Drafted
from flowspec.core.request import Request
from flowspec.core.score import Scorer
from flowspec.core.tree import Node, TokenTree
from flowspec.errors import need


@dataclass(frozen=True, kw_only=True)
class TreeConfig:
    """These are the size and shape of the drafted tree.

    None (null in a file) is `auto`: the method's own default."""

    budget: int | None = None
    """The tree has at most this many nodes, the root included."""
    top_k: int | None = None
    """At most this many children are kept for a node."""
    depth: int | None = None
    """The drafter adds this many levels after the first (EAGLE-2's counting), so the tree reaches
    depth + 1 levels below the root."""
    segment: int | None = None
    """A segment has at most this many rows; flowspec sends at most 96."""

    def __post_init__(self) -> None:
        for name in ("budget", "top_k", "depth", "segment"):
            value = getattr(self, name)
            need(
                value is None or value >= 1,
                f"tree.{name} is {value}: it must be at least 1, or auto",
            )
        need(
            (self.top_k or 1) <= KEPT,
            f"tree.top_k is {self.top_k}: drafters name {KEPT} candidates for a node",
        )


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """These switches turn off single ideas, each alone, to see what it is worth."""

    coupled: bool = True
    """Above temperature 0, rank candidates with the target's own keyed noise (communication-free
    coupling)."""
    calibrate: bool = True
    """Learn from each decided position how far to believe the drafter (flowspec)."""
    ngram_feature: bool = True
    """Take what followed the last tokens before, in prompt and output, as a hint beside the drafter
    (flowspec)."""
    refresh: bool = True
    """Draft again what was drafted from predicted features once the true ones are known; this rides
    in the next forwards (flowspec)."""
    just_in_time: bool = True
    """Let a segment leave when the first stage is about to be free, instead of queueing it
    there."""
    drop_dead: bool = True
    """Let stages drop rows that a prune has killed: before they compute a segment, and before they
    pass it on."""
    abort: bool = True
    """Let a stage abandon a forward between two layers once all of its rows are dead."""


@dataclass(frozen=True, kw_only=True)
class Dsi:
    """This is what speculation parallelism (DSI, arXiv 2405.14105) and SI go by."""

    servers: int = 1
    """There are so many target servers, each of which holds the whole split model."""
    lookahead: int | None = None
    """So many levels are drafted for a task. None (null) is `auto`: dsi takes what keeps its
    servers busy, si what is best at the measured latencies and acceptance."""

    def __post_init__(self) -> None:
        need(self.servers >= 1, f"dsi.servers is {self.servers}: it must be at least 1")
        need(
            self.lookahead is None or self.lookahead >= 1,
            f"dsi.lookahead is {self.lookahead}: it must be at least 1, or auto",
        )


DUE = math.inf
"""This is the reach of a node that the method sends in any case."""
SWITCHES = tuple(switch.name for switch in dataclasses.fields(PolicyConfig))


class Policy(Protocol):
    """A policy says what to draft and what to send, and when.

    It decides nothing about the text: whatever it says, the text is that of plain decoding. The
    scheduler (scheduler.py) asks it after each event. A policy serves one request; what it may know
    of the ring and of the drafter comes with `attach`. Those of core/policies/ share `Attached`."""

    drafts: bool
    """This is False if the policy never asks the drafter for anything."""
    budget: int
    """The tree has at most this many nodes, the root included."""
    just_in_time: bool
    """A segment leaves when the first stage is about to be free, instead of waiting there."""

    @property
    def credits(self) -> int:
        """Return how many segments may be in flight."""

    def attach(
        self, tree: TokenTree, learnt: Learnt, request: Request, levels_left: Callable[[], int]
    ) -> None:
        """Begin the request.

        `levels_left()` returns how many levels below the root can still become text."""

    def draft(self) -> list[Node]:
        """Return the nodes that the drafter should propose children for, in one forward.

        The list is empty if there are none now. This is asked when the drafter is idle."""

    def proposed(self, nodes: list[Node], drafted: Drafted) -> None:
        """Take in the drafter's answer for those of the nodes that are still alive."""

    def segment(self, drafting: bool) -> list[Node]:
        """Return the unsent nodes of the next segment, parents before children.

        The list is empty if there are none now. `drafting` is True while an answer of the drafter
        is still to come."""

    def reach(self, node: Node) -> float:
        """Return the probability that this node of the segment will be needed.

        DUE means that it is sent whatever it costs. A child's reach is at most its parent's."""

    def put_back(self, nodes: list[Node]) -> None:
        """Take back nodes of the segment that are not sent, since others gain more.

        A node that is DUE is never among them."""

    def verify_now(self, segments_out: int) -> bool:
        """Return whether to decide what is known so far, while so many segments are still in
        flight."""

    def keeps(self, child: Node) -> bool:
        """Return whether the tree below the new root goes on; if not, it is thrown away."""

    def decided(
        self, path: Sequence[int], tokens: Sequence[int], segments_out: int, now: float
    ) -> None:
        """Take in that the target chose tokens[i] after the node path[i].

        All of these nodes still hang in the tree."""

    def rerooted(self) -> None:
        """Take in that the tree has a new root, or is new itself."""

    def explain(self) -> list[str]:
        """Return what was chosen and why, as lines for people."""


class Attached:
    """Attached is what the policies share.

    These are the request's tree, the run's ring, and a scorer of candidates."""

    scorer: Scorer
    top_k: int

    def attach(
        self, tree: TokenTree, learnt: Learnt, request: Request, levels_left: Callable[[], int]
    ) -> None:
        self.tree, self.ring, self.levels_left = tree, learnt.ring, levels_left
        self.scorer.attach(tree, request.prompt, learnt.weights)
        self.rerooted()

    def rerooted(self) -> None:
        raise NotImplementedError

    def proposed(self, nodes: list[Node], drafted: Drafted) -> None:
        for node, tokens, scores in self.scorer.scored(nodes, drafted, self.top_k):
            for token, score in zip(tokens, scores, strict=True):
                self.tree.add(node, token, score)

    def verify_now(self, segments_out: int) -> bool:
        return True

    def keeps(self, child: Node) -> bool:
        return True

    def reach(self, node: Node) -> float:
        return DUE

    def put_back(self, nodes: list[Node]) -> None:
        raise AssertionError("a node that is due was left out")

    def decided(
        self, path: Sequence[int], tokens: Sequence[int], segments_out: int, now: float
    ) -> None:
        self.scorer.decided(path, tokens)

    def explain(self) -> list[str]:
        return [f"{name} {getattr(self, name)}" for name in ("budget", "top_k", "credits")]


def best_first(node: Node) -> tuple[float, int]:
    return (-node.score, node.id)
