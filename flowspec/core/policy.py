"""The contract between the scheduler and what decides which nodes to draft and to send, when; and its settings. Pure.

The policies themselves are in core/policies/, a file each."""

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
    """Size and shape of the drafted tree; null is `auto`: the method's own default."""

    budget: int | None = None
    """Nodes of the tree, the root included."""
    top_k: int | None = None
    """Children kept for a node."""
    depth: int | None = None
    """Drafter levels after the first (EAGLE-2's counting): the tree reaches depth + 1 below the root."""
    segment: int | None = None
    """Rows in a segment; flowspec sends at most 96."""

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
    """Switches of single ideas; each can be turned off alone to see what it is worth."""

    coupled: bool = True
    """Above temperature 0, rank candidates with the target's own keyed noise (communication-free coupling)."""
    calibrate: bool = True
    """Learn from each decided position how far the drafter is to be believed (flowspec)."""
    ngram_feature: bool = True
    """Take what followed the last tokens before, in prompt and output, as a hint beside the drafter (flowspec)."""
    refresh: bool = True
    """Draft again what was drafted from predicted features once the true ones are known, riding in the next forwards (flowspec)."""
    just_in_time: bool = True
    """Let a segment leave when the first stage is about to be free, instead of queueing it there."""
    drop_dead: bool = True
    """Stages drop rows that a prune has killed: before they compute a segment, and before they pass it on."""
    abort: bool = True
    """A stage abandons a forward between two layers once all of its rows are dead."""


DUE = math.inf
"""the reach of a node that the method sends in any case"""
SWITCHES = tuple(switch.name for switch in dataclasses.fields(PolicyConfig))


class Policy(Protocol):
    """What to draft and what to send, when. It decides nothing about the text: whatever it says, the text is that of plain decoding.

    The scheduler (scheduler.py) asks it after each event. A policy serves one request; what it may know of the ring and of the drafter
    comes with `attach`. Those of core/policies/ share `Attached`."""

    drafts: bool
    """False: it never asks the drafter for anything"""
    budget: int
    """nodes that its tree has at most, the root included"""
    just_in_time: bool
    """a segment leaves when the first stage is about to be free, instead of waiting there"""

    @property
    def credits(self) -> int:
        """Segments that may be in flight."""

    def attach(
        self, tree: TokenTree, learnt: Learnt, request: Request, levels_left: Callable[[], int]
    ) -> None:
        """The request begins. `levels_left()`: how many levels below the root can still become text."""

    def draft(self) -> list[Node]:
        """Nodes that the drafter should propose children for, in one forward; empty: none now. Asked when the drafter is idle."""

    def proposed(self, nodes: list[Node], drafted: Drafted) -> None:
        """The drafter's answer for those of the nodes that are still alive."""

    def segment(self, drafting: bool) -> list[Node]:
        """Unsent nodes for the next segment, parents before children; empty: none now. `drafting`: an answer is to come."""

    def reach(self, node: Node) -> float:
        """How likely it is that this node of the segment will be needed; DUE: it is sent whatever it costs.

        A child's reach is at most its parent's."""

    def put_back(self, nodes: list[Node]) -> None:
        """These nodes of the segment are not sent: others gain more. Never one that is DUE."""

    def verify_now(self, segments_out: int) -> bool:
        """Whether to decide what is known so far, with so many segments still in flight."""

    def keeps(self, child: Node) -> bool:
        """Whether the tree below the new root goes on, or is thrown away."""

    def decided(
        self, path: Sequence[int], tokens: Sequence[int], segments_out: int, now: float
    ) -> None:
        """The target chose tokens[i] after the node path[i]; all of this still hangs in the tree."""

    def rerooted(self) -> None:
        """The tree has a new root, or is new itself."""

    def explain(self) -> list[str]:
        """What was chosen, and why; for people."""


class Attached:
    """What the policies share: the request's tree, the run's ring, and a scorer of candidates."""

    scorer: Scorer

    def attach(
        self, tree: TokenTree, learnt: Learnt, request: Request, levels_left: Callable[[], int]
    ) -> None:
        self.tree, self.ring, self.levels_left = tree, learnt.ring, levels_left
        self.scorer.attach(tree, request.prompt, learnt.weights)
        self.rerooted()

    def rerooted(self) -> None:
        raise NotImplementedError

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
