"""The topology says which rank does what; only this module computes with the number of ranks.

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Topology:
    """Rank 0 coordinates: it drafts and schedules. Behind it, `stages` hold consecutive layers.

    A stage is `members` ranks that share its layers, which is one rank unless the model is split
    for tensor parallelism. The first of them leads the stage. The ring leads from rank 0 through
    the leaders back to rank 0. Besides, rank 0 talks with each leader directly, and so does a
    leader with each of its followers; no others talk."""

    stages: int
    members: int = 1

    COORDINATOR = 0
    FIRST = 1
    """This rank leads the stage that holds the embedding and the first layers of the target."""

    @classmethod
    def of_world(cls, world_size: int, members: int = 1) -> Topology:
        """Return the topology of `world_size` ranks; raise ValueError if there is none."""
        stages, rest = divmod(world_size - 1, members)
        if rest:
            raise ValueError(f"{world_size - 1} ranks are no stages of {members}")
        return cls(stages, members)

    @property
    def world_size(self) -> int:
        return 1 + self.stages * self.members

    @property
    def ranks(self) -> range:
        return range(self.world_size)

    @property
    def stage_ranks(self) -> range:
        """Return the leaders of the stages, in the order of their layers."""
        return range(self.FIRST, self.world_size, self.members)

    @property
    def hops(self) -> int:
        """Return the number of hops of a message that goes once round the ring."""
        return self.stages + 1

    @property
    def last(self) -> int:
        """Return the leader of the stage that holds the last layers and the final norm."""
        return self.stage_ranks[-1] if self.stages else self.COORDINATOR

    def stage(self, rank: int) -> int:
        """Return the number of a rank's stage, from 1 on; 0 stands for the coordinator."""
        return -(-rank // self.members)

    def member(self, rank: int) -> int:
        """Return which member of its stage a rank is, from 0 on; the leader is 0."""
        return (rank - self.FIRST) % self.members if rank else 0

    def leader(self, rank: int) -> int:
        return rank - self.member(rank)

    def leads(self, rank: int) -> bool:
        """Return whether a rank is part of the ring."""
        return self.member(rank) == 0

    def group(self, rank: int) -> range:
        """Return the ranks of a rank's stage, the leader first."""
        return range(self.leader(rank), self.leader(rank) + (self.members if rank else 1))

    def followers(self, rank: int) -> range:
        """Return the ranks that this rank leads."""
        return self.group(rank)[1:] if self.leads(rank) else range(0)

    def next(self, rank: int) -> int:
        """Return the rank to which a leader's messages of the ring go."""
        following = self.group(rank).stop
        return following if following < self.world_size else self.COORDINATOR

    def previous(self, rank: int) -> int:
        """Return the rank from which a leader's messages of the ring come."""
        if rank == self.COORDINATOR:
            return self.last
        return self.COORDINATOR if rank == self.FIRST else rank - self.members

    def control_peers(self, rank: int) -> Sequence[int]:
        """Return the ranks with which this rank talks beside the ring."""
        if rank == self.COORDINATOR:
            return self.stage_ranks
        if self.leads(rank):
            return (self.COORDINATOR, *self.followers(rank))
        return (self.leader(rank),)

    def role(self, rank: int) -> str:
        """Return the role of a rank's stage as stages.yaml names it."""
        if rank == self.COORDINATOR:
            return "coordinator"
        leader = self.leader(rank)
        return "last" if leader == self.last else "first" if leader == self.FIRST else "stage"

    @property
    def words(self) -> str:
        """Return what the ring is made of, for whoever reads a table: "4 stages"."""
        stages = f"{self.stages} stage{'' if self.stages == 1 else 's'}"
        return stages if self.members == 1 else f"{stages} of {self.members} ranks"

    def title(self, rank: int) -> str:
        """Return what a rank is, for whoever reads a message: "stage 2", "stage 2, member 1"."""
        if rank == self.COORDINATOR:
            return "coordinator"
        member = "" if self.members == 1 else f", member {self.member(rank)}"
        return f"stage {self.stage(rank)}{member}"


class Shard(NamedTuple):
    """A shard is that of the `member`-th of `members` ranks."""

    member: int
    members: int

    def of(self, size: int) -> range:
        """Return this member's part of `size` things: near equal parts, in order."""
        return range(size * self.member // self.members, size * (self.member + 1) // self.members)


WHOLE = Shard(0, 1)
