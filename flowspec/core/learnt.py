"""What a run has found out, for its next requests. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowspec.core.control import Findings
from flowspec.core.ring import Ring
from flowspec.core.score import Weights


@dataclass
class Learnt:
    """Owned by the run on rank 0. A second request starts with the costs, weights and findings that the first one ended with."""

    ring: Ring = field(default_factory=Ring)
    weights: dict[tuple[int, bool], Weights] = field(default_factory=dict)
    """(drafters, coupled with the target's noise) -> how far the drafters' lists are to be believed"""
    findings: dict[float, Findings] = field(default_factory=dict)
    """temperature -> whether speculation has paid"""
