"""Links connect the members of a tensor-parallel stage, which compute together.

collectives.py says what they do. Here are links between threads of a process, and links
between processes over torch.distributed: gloo for tensors on a CPU, or NCCL for those on GPUs. The
working thread itself sends and receives here, since all members wait for each other anyway. An
exchange raises ConnectionError if a member is gone.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from flowspec.comm.base import Links

NAMED = 5.0
"""Within so many seconds of a broken exchange, whoever watches the ranks names the lost one."""


class ThreadLinks:
    """ThreadLinks connect members that are threads of one process; `threads(size)` makes all."""

    def __init__(self, index: int, shared: _Shared):
        self.index, self.size, self._shared = index, len(shared.slots), shared

    def gathered(self, own: Tensor) -> Sequence[Tensor]:
        slots = self._shared.slots
        slots[self.index] = own
        self._meet()
        found = [*slots]
        self._meet()  # before anybody fills a slot again
        return found

    def swapped(self, blocks: Tensor) -> Tensor:
        return torch.stack([theirs[self.index] for theirs in self.gathered(blocks)])

    def passed(self, out: Tensor, into: Tensor) -> Callable[[], object]:
        queues = self._shared.queues
        if out.numel():
            queues[(self.index + 1) % self.size].put(out)
        return lambda: into.copy_(self._received()) if into.numel() else None

    def close(self) -> None:
        """Let nobody wait any longer."""
        self._shared.barrier.abort()

    def _meet(self) -> None:
        try:
            self._shared.barrier.wait()
        except threading.BrokenBarrierError:
            raise ConnectionError("a member of the stage has left") from None

    def _received(self) -> Tensor:
        while True:
            try:
                return self._shared.queues[self.index].get(timeout=0.5)
            except queue.Empty:
                if self._shared.barrier.broken:
                    raise ConnectionError("a member of the stage has left") from None


class _Shared:
    """This is what the threads of a stage share."""

    def __init__(self, size: int):
        self.slots: list[Tensor] = [torch.empty(0)] * size
        self.barrier = threading.Barrier(size)
        self.queues: list[queue.SimpleQueue[Tensor]] = [queue.SimpleQueue() for _ in range(size)]


def threads(size: int) -> list[ThreadLinks]:
    shared = _Shared(size)
    return [ThreadLinks(index, shared) for index in range(size)]


def thread_links(members: int) -> Sequence[Links | None]:
    """Return the links of a stage's members as threads; a rank alone has none."""
    return threads(members) if members > 1 else [None]


class ProcessLinks:
    """ProcessLinks connect members that are processes, the members of a group of torch's.

    With gloo, tensors on a GPU take the way through the host's memory."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.first = dist.get_global_rank(group, 0)
        """This is the rank of the leader."""
        self.index, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._on_host = dist.get_backend(group) == "gloo"

    def gathered(self, own: Tensor) -> Sequence[Tensor]:
        mine = self._sent(own)
        parts = [mine if k == self.index else torch.empty_like(mine) for k in range(self.size)]
        self._begin(dict.fromkeys(self._others, mine), {k: parts[k] for k in self._others})()
        return [part.to(own.device) for part in parts]

    def swapped(self, blocks: Tensor) -> Tensor:
        mine = self._sent(blocks)
        found = mine.clone()
        self._begin({k: mine[k] for k in self._others}, {k: found[k] for k in self._others})()
        return found.to(blocks.device)

    def passed(self, out: Tensor, into: Tensor) -> Callable[[], object]:
        found = torch.empty_like(self._sent(into))
        after, before = ((self.index + step) % self.size for step in (1, -1))
        wait = self._begin({after: self._sent(out)}, {before: found})

        def end() -> None:
            wait()
            into.copy_(found)

        return end

    @property
    def _others(self) -> list[int]:
        return [k for k in range(self.size) if k != self.index]

    def _begin(
        self, sent: Mapping[int, Tensor], received: Mapping[int, Tensor]
    ) -> Callable[[], None]:
        """Begin to send tensors to members and to fill others from members, those that hold any.

        Return what waits for the end. Point to point, gloo takes a third of the time of its own
        collectives (docs/architecture.md, "What gloo does")."""
        operations = [
            dist.P2POp(what, tensor, dist.get_global_rank(self.group, member), group=self.group)
            for what, tensors in ((dist.isend, sent), (dist.irecv, received))
            for member, tensor in tensors.items()
            if tensor.numel()
        ]
        works: list[dist.Work] = []
        if operations:
            self._exchange(lambda: works.extend(dist.batch_isend_irecv(operations)))
        return lambda: self._exchange(lambda: [work.wait() for work in works])

    def close(self) -> None:
        """Do nothing: torch.distributed is left as a whole."""

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous().cpu() if self._on_host else tensor.contiguous()

    def _exchange(self, what: Callable[[], object]) -> None:
        try:
            what()
        except RuntimeError as error:
            # the links beside these break, too, and those who watch them know whose they are
            time.sleep(NAMED)
            raise ConnectionError(f"the members of the stage lost each other: {error}") from None
