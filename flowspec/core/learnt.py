"""A run keeps what it has found out for its next requests.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from flowspec.core.control import Findings
from flowspec.core.ring import Ring
from flowspec.core.score import Weights


@dataclass
class Learnt:
    """What was learnt is owned by the run, on rank 0.

    A request starts with the costs, weights and findings that the one before ended with."""

    ring: Ring = field(default_factory=Ring)
    weights: dict[tuple[int, bool], Weights] = field(default_factory=dict)
    """This maps (number of drafters, whether they are coupled with the target's noise) to how far
    the drafters' lists are to be believed."""
    verified: list[float] = field(default_factory=lambda: [4.0, 1.0])
    """These are how many drafts of speculative inference the target has accepted and rejected. It
    begins with 4 and 1, as if some had been."""
    findings: dict[float, Findings] = field(default_factory=dict)
    """This maps a temperature to whether speculation has paid."""
