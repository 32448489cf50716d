"""The topology says which rank does what; only this module computes with the number of ranks.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Rank 0 coordinates: it drafts and schedules. Ranks 1 to `stages` hold consecutive layers.

    The ring leads from each rank to the next and from the last stage back to rank 0. Besides, rank
    0 and each stage talk to each other directly; two stages never do."""

    stages: int

    COORDINATOR = 0
    FIRST = 1
    """This stage holds the embedding and the first layers of the target."""

    @classmethod
    def of_world(cls, world_size: int) -> Topology:
        """Return the topology of `world_size` ranks."""
        return cls(world_size - 1)

    @property
    def world_size(self) -> int:
        return self.stages + 1

    @property
    def ranks(self) -> range:
        return range(self.world_size)

    @property
    def stage_ranks(self) -> range:
        """Return all ranks but the coordinator, in the order of their layers."""
        return range(self.FIRST, self.world_size)

    @property
    def hops(self) -> int:
        """Return the number of hops of a message that goes once round the ring."""
        return self.world_size

    @property
    def last(self) -> int:
        """Return the stage that holds the last layers and the final norm."""
        return self.stages

    def next(self, rank: int) -> int:
        """Return the rank to which this rank's messages of the ring go."""
        return (rank + 1) % self.world_size

    def previous(self, rank: int) -> int:
        """Return the rank from which this rank's messages of the ring come."""
        return (rank - 1) % self.world_size

    def control_peers(self, rank: int) -> Sequence[int]:
        """Return the ranks with which this rank talks beside the ring."""
        return self.stage_ranks if rank == self.COORDINATOR else (self.COORDINATOR,)

    def role(self, rank: int) -> str:
        """Return the role of a rank as stages.yaml names it."""
        if rank == self.COORDINATOR:
            return "coordinator"
        return "last" if rank == self.last else "first" if rank == self.FIRST else "stage"
