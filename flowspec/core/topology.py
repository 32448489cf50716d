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
    leader with each of its followers; no others talk.

    There may be several target `servers` (DSI), each of which holds the whole target: a ring of
    its own, with the same stages, that begins and ends at the same rank 0. Rank
    1 + (server * stages + stage) * members + member counts server, stage and member from 0 on.

    The last ranks may be `drafters`: they draft for rank 0, and talk with it alone."""

    stages: int
    members: int = 1
    servers: int = 1
    drafters: int = 0

    COORDINATOR = 0
    FIRST = 1
    """This rank leads the first stage of the first server."""

    @classmethod
    def of_world(
        cls, world_size: int, members: int = 1, servers: int = 1, drafters: int = 0
    ) -> Topology:
        """Return the topology of `servers` servers, each of which alone were `world_size` ranks.

        Besides, there are `drafters` ranks that draft. Raise ValueError if there is none."""
        stages, rest = divmod(world_size - 1, members)
        if rest:
            raise ValueError(f"{world_size - 1} ranks are no stages of {members}")
        return cls(stages, members, servers, drafters)

    @property
    def world_size(self) -> int:
        return self._behind + self.drafters

    @property
    def _behind(self) -> int:
        """Return the first number that is no stage's rank."""
        return self.FIRST + self.servers * self._each

    @property
    def _each(self) -> int:
        """Return the number of ranks of a server."""
        return self.stages * self.members

    @property
    def ranks(self) -> range:
        return range(self.world_size)

    @property
    def stage_ranks(self) -> range:
        """Return the leaders of all stages, server by server in the order of their layers."""
        return range(self.FIRST, self._behind, self.members)

    @property
    def drafter_ranks(self) -> range:
        """Return the ranks that draft for rank 0."""
        return range(self._behind, self.world_size)

    def drafts(self, rank: int) -> bool:
        """Return whether a rank is there to draft for rank 0."""
        return rank in self.drafter_ranks

    def ring(self, server: int) -> range:
        """Return the leaders of a server's stages, in the order of their layers."""
        first = self.FIRST + server * self._each
        return range(first, first + self._each, self.members)

    @property
    def rings(self) -> list[range]:
        """Return the leaders of each server's stages."""
        return [self.ring(server) for server in range(self.servers)]

    def server(self, rank: int) -> int:
        """Return to which server a stage's rank belongs, from 0 on; the coordinator's is 0."""
        return (rank - self.FIRST) // self._each if rank else 0

    def place(self, rank: int) -> int:
        """Return the rank that has this rank's place in the first server: it reads the same files.

        A drafter reads the coordinator's."""
        if rank == self.COORDINATOR or self.drafts(rank):
            return self.COORDINATOR
        return (rank - self.FIRST) % self._each + self.FIRST

    def spare(self, rank: int) -> Sequence[int]:
        """Return the ranks that a run does without if it loses this one; if none, it ends.

        Those are a drafter, or one of several servers."""
        if self.drafts(rank):
            return [rank]
        if rank == self.COORDINATOR or self.servers == 1:
            return []
        first = self.FIRST + self.server(rank) * self._each
        return range(first, first + self._each)

    @property
    def hops(self) -> int:
        """Return the number of hops of a message that goes once round the ring."""
        return self.stages + 1

    def is_first(self, rank: int) -> bool:
        """Return whether a rank leads a stage that holds the embedding and the first layers."""
        return self.leads(rank) and self.stage(rank) == 1

    def is_last(self, rank: int) -> bool:
        """Return whether a rank leads a stage that holds the last layers and the final norm."""
        return self.leads(rank) and self.stage(rank) == self.stages

    @property
    def last(self) -> int:
        """Return the leader of the first server's stage with the last layers."""
        return self.ring(0)[-1] if self.stages else self.COORDINATOR

    def stage(self, rank: int) -> int:
        """Return the number of a rank's stage, from 1 on; 0 stands for the coordinator."""
        return -(-self.place(rank) // self.members)

    def number(self, rank: int) -> int:
        """Return the number of a rank's stage among those of all servers, from 1 on; else 0."""
        return -(-rank // self.members)

    def member(self, rank: int) -> int:
        """Return which member of its stage a rank is, from 0 on; the leader is 0."""
        return 0 if rank == self.COORDINATOR or self.drafts(rank) else (rank - 1) % self.members

    def leader(self, rank: int) -> int:
        return rank - self.member(rank)

    def leads(self, rank: int) -> bool:
        """Return whether a rank is part of the ring."""
        return self.member(rank) == 0 and not self.drafts(rank)

    def group(self, rank: int) -> range:
        """Return the ranks of a rank's stage, the leader first."""
        leader = self.leader(rank)
        return range(leader, leader + (self.members if leader in self.stage_ranks else 1))

    def followers(self, rank: int) -> range:
        """Return the ranks that this rank leads."""
        return self.group(rank)[1:] if self.leads(rank) else range(0)

    def next(self, rank: int) -> Sequence[int]:
        """Return the ranks to which a leader's messages of the ring go.

        That is one, or from the coordinator each server's first stage, server by server."""
        if rank == self.COORDINATOR:
            return [ring[0] for ring in self.rings]
        return [self.COORDINATOR if self.is_last(rank) else rank + self.members]

    def previous(self, rank: int) -> Sequence[int]:
        """Return the ranks from which a leader's messages of the ring come."""
        if rank == self.COORDINATOR:
            return [ring[-1] for ring in self.rings]
        return [self.COORDINATOR if self.is_first(rank) else rank - self.members]

    def control_peers(self, rank: int) -> Sequence[int]:
        """Return the ranks with which this rank talks beside the ring."""
        if rank == self.COORDINATOR:
            return (*self.stage_ranks, *self.drafter_ranks)
        if self.drafts(rank):
            return (self.COORDINATOR,)
        if self.leads(rank):
            return (self.COORDINATOR, *self.followers(rank))
        return (self.leader(rank),)

    def role(self, rank: int) -> str:
        """Return the role of a rank's stage as stages.yaml names it."""
        if rank == self.COORDINATOR:
            return "coordinator"
        leader = self.leader(rank)
        return "last" if self.is_last(leader) else "first" if self.is_first(leader) else "stage"

    @property
    def words(self) -> str:
        """Return what the ring is made of, for whoever reads a table: "4 stages"."""
        stages = f"{self.stages} stage{'' if self.stages == 1 else 's'}"
        stages = stages if self.members == 1 else f"{stages} of {self.members} ranks"
        stages = stages if self.servers == 1 else f"{self.servers} servers of {stages}"
        drafters = f"{self.drafters} drafter{'' if self.drafters == 1 else 's'}"
        return f"{stages}, {drafters}" if self.drafters else stages

    def title(self, rank: int) -> str:
        """Return what a rank is, for whoever reads a message: "stage 2", "stage 2, member 1"."""
        if rank == self.COORDINATOR:
            return "coordinator"
        if self.drafts(rank):
            return f"drafter {rank - self._behind + 1}"
        server = "" if self.servers == 1 else f"server {self.server(rank) + 1}, "
        member = "" if self.members == 1 else f", member {self.member(rank)}"
        return f"{server}stage {self.stage(rank)}{member}"

    def name(self, rank: int, host: str) -> str:
        """Return the name of a rank for whoever reads a message: "rank 2 (stage 2, HOST)"."""
        return f"rank {rank} ({self.title(rank)}, {host})"


class Shard(NamedTuple):
    """A shard is that of the `member`-th of `members` ranks."""

    member: int
    members: int

    def of(self, size: int) -> range:
        """Return this member's part of `size` things: near equal parts, in order."""
        return range(size * self.member // self.members, size * (self.member + 1) // self.members)


WHOLE = Shard(0, 1)
