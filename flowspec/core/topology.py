"""Who is who in a run: the only place that computes with the number of ranks. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Rank 0 coordinates: it drafts and schedules. Ranks 1 to `stages` hold consecutive layers of the target.

    The ring leads from each rank to the next and from the last stage back to rank 0. Beside it rank 0 and each stage talk to each other
    directly; two stages never do."""

    stages: int

    COORDINATOR = 0
    FIRST = 1
    """the stage that holds the embedding and the first layers"""

    @classmethod
    def of_world(cls, world_size: int) -> Topology:
        """The topology of so many ranks."""
        return cls(world_size - 1)

    @property
    def world_size(self) -> int:
        return self.stages + 1

    @property
    def ranks(self) -> range:
        return range(self.world_size)

    @property
    def stage_ranks(self) -> range:
        """All ranks but the coordinator, in the order of their layers."""
        return range(self.FIRST, self.world_size)

    @property
    def hops(self) -> int:
        """Of a message that goes once round the ring."""
        return self.world_size

    @property
    def last(self) -> int:
        """The stage that holds the last layers and the final norm."""
        return self.stages

    def next(self, rank: int) -> int:
        """To whom this rank's messages of the ring go."""
        return (rank + 1) % self.world_size

    def previous(self, rank: int) -> int:
        """From whom this rank's messages of the ring come."""
        return (rank - 1) % self.world_size

    def control_peers(self, rank: int) -> Sequence[int]:
        """With whom this rank talks beside the ring."""
        return self.stage_ranks if rank == self.COORDINATOR else (self.COORDINATOR,)

    def role(self, rank: int) -> str:
        """What a rank is, as stages.yaml says it."""
        if rank == self.COORDINATOR:
            return "coordinator"
        return "last" if rank == self.last else "first" if rank == self.FIRST else "stage"
