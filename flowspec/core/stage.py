"""A stage's books say which cache row holds which node, what a new row sees and what a prune frees.

Rows [0, base) of the cache hold committed tokens in the order of the text. Behind them lie, in the
order of their arrival, the `tail` (rows of committed tokens that have not been moved down yet),
live tree rows and dead rows. Dead rows cost memory and nothing else, so they are removed lazily: a
gather moves the other rows together once more than COMPACT rows are dead.

The accepted path is never sent. A stage derives it: it is the chain of parents of the prune's
anchor, through rows that are still tree rows here. So prune k+1 repairs a lost prune k, and a stage
that never hears a prune is still right.

This module is pure (no torch, clock or I/O)."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np

from flowspec.core.messages import Prune

T = TypeVar("T")


class Admitted(NamedTuple):
    """Admitted are the rows of a segment that are worth computing here, with what each row sees."""

    kept: list[int]
    """These are indices into the segment, n of them."""
    positions: np.ndarray
    """These are the absolute positions of their tokens, int64 [n]."""
    base: int
    """Every one of them sees the cache rows [0, base)."""
    behind: list[list[int]]
    """Each also sees the cache rows of its own list, from `base` on, in the order of positions. The
    last row in a list is the admitted row itself."""
    length: int
    """The cache has this many rows, the new ones included."""

    @property
    def unseen(self) -> np.ndarray:
        """Return which of the cache rows from `base` on each row must not see, bool [n, length -
        base]."""
        unseen = np.ones((len(self.kept), self.length - self.base), dtype=bool)
        for row, seen in zip(unseen, self.behind, strict=True):
            row[np.array(seen, dtype=np.int64) - self.base] = False
        return unseen

    def sees(self, k: int) -> list[int]:
        """Return the cache rows that the k-th row sees, in the order of positions."""
        return [*range(self.base), *self.behind[k]]

    def only(self, k: int) -> Admitted:
        """Return the k-th row alone, as it is when no row after it is in the cache."""
        return Admitted(
            [0],
            self.positions[k : k + 1],
            self.base,
            self.behind[k : k + 1],
            self.length - (len(self.kept) - 1 - k),
        )

    def then(self, next: Admitted) -> Admitted:
        """Return both in one forward; `next` was admitted right after this one."""
        settled = range(self.base, next.base)  # these rows became part of the base in between
        behind = [*self.behind, *([*settled, *seen] for seen in next.behind)]
        kept = self.kept + [len(self.kept) + k for k in next.kept]
        return Admitted(
            kept, np.concatenate([self.positions, next.positions]), self.base, behind, next.length
        )


class Gather(NamedTuple):
    """A gather moves cache rows: cache[base : base + len(rows)] = cache[rows].

    The cache ends behind them."""

    base: int
    rows: list[int]


class StageState:
    COMPACT = 64
    """So many dead rows are tolerated before a gather."""

    def __init__(self) -> None:
        self.base = 0
        self.length = 0  # rows in the cache: base + tail + live + dead
        self.version = 0
        self.root = 0  # the first root's id
        self.row: dict[int, int] = {}  # live node -> its row; parents come before children
        self.parent: dict[int, int] = {}
        self.tail: list[int] = []

    @property
    def context(self) -> int:
        """Return the number of committed tokens."""
        return self.base + len(self.tail)

    @property
    def dead(self) -> int:
        return self.length - self.context - len(self.row)

    def alive(self, ids: Sequence[int]) -> list[int]:
        """Return the indices of the nodes that still hold a row."""
        return [k for k, i in enumerate(ids) if i in self.row]

    def all_dead(self, ids: Sequence[int]) -> bool:
        return not any(i in self.row for i in ids)

    def extend(self, n: int, at: int | None = None) -> Admitted:
        """Admit n committed tokens, at the end or anew at the positions [at, at + n).

        Those of the prompt are admitted at the end. When tokens are admitted anew, their older rows
        die. Each token sees what was committed before it. Rows of the positions behind them
        stay."""
        at = self.context if at is None else at
        if at < self.base:
            self.base, self.tail = at, [*range(at, self.base), *self.tail]
        behind = self.tail[at - self.base + n :]
        del self.tail[at - self.base :]
        rows = range(self.length, self.length + n)
        self.length += n
        admitted = Admitted(
            [*range(n)],
            np.arange(at, at + n),
            self.base,
            [[*self.tail, *rows[: k + 1]] for k in range(n)],
            self.length,
        )
        self.tail += [*rows, *behind]
        self._settle()
        return admitted

    def worth(self, ids: Sequence[int], parents: Sequence[int]) -> list[int]:
        """Return the indices of the nodes that may still be needed.

        These are the root and the children of nodes that hold a row or will hold one."""
        kept, coming = [], set()
        for k, (i, p) in enumerate(zip(ids, parents, strict=True)):
            if i == self.root or p in self.row or p in coming:
                coming.add(i)
                kept.append(k)
        return kept

    def admit(self, ids: Sequence[int], parents: Sequence[int], drop: bool = True) -> Admitted:
        """Give rows to the nodes that are worth it.

        If `drop` is False, the others get rows too, which nobody will ever look at."""
        worth = self.worth(ids, parents)
        kept, live = (worth if drop else list(range(len(ids)))), set(worth)
        for k in kept:
            if k in live:
                self.row[ids[k]], self.parent[ids[k]] = self.length, parents[k]
            self.length += 1
        behind = [[*self.tail, *(self.row[a] for a in self._chain(ids[k]))] for k in kept]
        positions = np.array([max(0, self.base + len(seen) - 1) for seen in behind], dtype=np.int64)
        return Admitted(kept, positions, self.base, behind, self.length)

    def decided(self, prune: Prune) -> list[int]:
        """Return the nodes that `prune` makes text here, oldest first; ask before it is applied.

        Their positions are those from `context` on."""
        return self._chain(prune.anchor) if prune.version > self.version else []

    def prune(self, prune: Prune) -> Gather | None:
        """Commit the path to the anchor and forget what is not below the root.

        Return the move of rows that is due, or None. A prune that is not newer than the last is
        ignored."""
        if prune.version <= self.version:
            return None
        path = self.decided(prune)
        self.version, self.root = prune.version, prune.root
        live = {prune.root}
        for i in self.row:  # parents come before children
            if self.parent[i] in live:
                live.add(i)
        live.difference_update(path)
        self.tail += [self.row[i] for i in path]
        self.row = {i: r for i, r in self.row.items() if i in live}
        self.parent = {i: self.parent[i] for i in self.row}
        self._settle()
        return self._compact() if self.dead > self.COMPACT else None

    def validate(self) -> None:
        """Assert what must hold between calls."""
        held = [*self.tail, *self.row.values()]
        assert len({*held}) == len(held), "two tokens in a row"
        assert all(self.base <= row < self.length for row in held), (
            "a row beyond the cache, or one of the base"
        )
        assert self.dead >= 0 and self.base not in self.tail[:1]
        assert self.row.keys() == self.parent.keys()
        assert [*self.row.values()] == sorted(self.row.values()), "not in the order of arrival"
        for node, parent in self.parent.items():
            assert node == self.root or self.row.get(parent, self.length) < self.row[node], (
                "a node that hangs below nothing"
            )

    def _settle(self) -> None:
        """Count those rows of the tail that are already in place as rows of the base."""
        settled = 0
        while settled < len(self.tail) and self.tail[settled] == self.base:
            self.base += 1
            settled += 1
        del self.tail[:settled]

    def _chain(self, node: int) -> list[int]:
        """Return the node and its ancestors that hold a tree row here, oldest first.

        The list is empty if the node holds no tree row."""
        ids = []
        while node in self.row:
            ids.append(node)
            node = self.parent[node]
        return ids[::-1]

    def _compact(self) -> Gather:
        gather = Gather(self.base, [*self.tail, *self.row.values()])
        self.base += len(self.tail)
        self.tail = []
        self.row = {i: self.base + k for k, i in enumerate(self.row)}
        self.length = self.base + len(self.row)
        return gather


class Waiting(Generic[T]):
    """Waiting holds a thing of each node in flight until it is known whether the node became text.

    Such a thing is a row of features, for example."""

    def __init__(self) -> None:
        self._held: dict[int, T] = {}

    def hold(self, ids: Iterable[int], things: Iterable[T]) -> None:
        self._held.update(zip(ids, things, strict=True))

    def settle(self, text: Iterable[int], alive: Container[int]) -> list[T]:
        """Return what was held of the nodes that became text, and forget all nodes that are not
        alive."""
        handed = [self._held[i] for i in text]
        self._held = {i: thing for i, thing in self._held.items() if i in alive}
        return handed


class Accepted:
    """Accepted tells which nodes become text, on a last stage that picks the tokens.

    So such a stage also knows at which rows to pick. The nodes that become text form one path. It
    begins with the first root, whose parent is -1. Each next node is a child of the newest node of
    the path and carries the token that was chosen after it. A new root after a miss does that too,
    since its parent is the last committed node. The ring is first in, first out, so a node comes
    after its parent, and it suffices to know the newest node and the choice after it."""

    def __init__(self) -> None:
        self._newest = -1
        self._choice: int | None = None  # None before the first root, which may have any token

    def walk(
        self,
        ids: Sequence[int],
        parents: Sequence[int],
        tokens: Sequence[int],
        choose: Callable[[int], int],
        root: int = 0,
    ) -> list[int]:
        """Return the indices of the segment's nodes that become text.

        `choose(k)` returns the target's token after node k; it is called for these nodes alone.
        `root` is the root of the newest prune: it is text by then, whatever was walked here."""
        found = []
        for k, (i, parent) in enumerate(zip(ids, parents, strict=True)):
            follows = parent == self._newest and self._choice in (None, tokens[k])
            if follows or i == root:
                self._newest, self._choice = i, choose(k)
                found.append(k)
        return found
