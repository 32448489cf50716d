"""Which rank of a pool drafts what, and which drafters are waited for."""

import random

import pytest

from flowspec.core.messages import Commit, DraftNode
from flowspec.core.pool import OFTEN, TRIED, Patience, Shares
from flowspec.core.topology import Topology


# ---- ranks with the same model -------------------------------------------------------------------
class Rank:
    """What a rank holds, checked as a draft model would need it: a node comes after its parent."""

    def __init__(self):
        self.text, self.rows = [0], set()

    def compute(self, nodes, root):
        for node in nodes:
            assert node.id == root or node.parent in self.rows, f"{node} before its parent"
            self.rows.add(node.id)


class World:
    """A tree that grows and is cut at random, over ranks of a pool."""

    def __init__(self, seed: int, ranks: int, seconds):
        self.random, self.seconds = random.Random(seed), seconds
        self.shares = Shares([*range(1, ranks + 1)])
        self.ranks = {rank: Rank() for rank in self.shares.costs}
        self.shares.begin(7)
        self.nodes, self.asked = {0: DraftNode(0, -1, 5)}, set()
        self.root = self.newest = 0

    def frontier(self) -> list[DraftNode]:
        open_ = [
            n
            for n in self.nodes.values()
            if n.id not in self.asked and (n.id == self.root or n.parent in self.asked)
        ]
        return open_[: self.random.choice([1, 2, 8, 30])]

    def ask(self) -> dict:
        if not (wanted := self.frontier()):
            return {}
        parts = self.shares.divide([(7, wanted)])
        got = [n.id for asked, _ in parts.values() for n in asked[7]]
        assert {n.id for n in wanted} <= {*got}
        for rank, (asked, rows) in parts.items():
            assert rows >= len(asked[7]) == len({n.id for n in asked[7]})
            self.ranks[rank].compute(asked[7], self.root)
            self.shares.observe(rank, rows, self.seconds(rank, rows))
        self.asked |= {n.id for n in wanted}
        for node in wanted:
            for _ in range(self.random.randrange(4)):
                self.newest += 1
                self.nodes[self.newest] = DraftNode(self.newest, node.id, 9)
        return parts

    def commit(self) -> None:
        path, root = [self.root], self.root
        while below := [n.id for n in self.nodes.values() if n.parent == path[-1]]:
            root = self.random.choice(below)
            if self.random.random() < 0.5:
                break
            path.append(root)
        else:
            self.newest += 1
            root = self.newest
            self.nodes[root] = DraftNode(root, path[-1], 9)
        self.shares.commit(7, Commit(tuple(path), (9,) * len(path), (True,) * len(path), root))
        self.root, live = root, {root}
        live.update(n.id for n in sorted(self.nodes.values()) if n.parent in live)
        self.nodes = {i: self.nodes[i] for i in live}
        self.asked &= live


@pytest.mark.parametrize("seed", range(12))
def test_every_node_is_drafted_from_and_no_rank_lacks_what_is_above_it(seed):
    world = World(seed, 1 + seed % 4, lambda rank, rows: 0.001 * rank + 0.002 * rows)
    for step in range(200):
        world.ask()
        if world.random.random() < 0.2:
            world.commit()
        if step == 150 and len(world.shares.costs) > 1:
            world.shares.lost(1)


def used(seconds, ranks=3, forwards=130) -> list[int]:
    """How many ranks each forward over 24 branches used, in the end."""
    shares, found = Shares([*range(1, ranks + 1)]), []
    shares.begin(1)
    for k in range(forwards):
        roots = [DraftNode(100 * k + n, -1, 5) for n in range(24)]
        parts = shares.divide([(1, roots)])
        for rank, (_, rows) in parts.items():
            shares.observe(rank, rows, seconds(rank, rows))
        found.append(len(parts))
    return found


def test_rows_that_cost_are_shared_and_rows_that_do_not_are_not():
    assert {*used(lambda rank, rows: 0.001 * rows, forwards=OFTEN - 1)} == {3}
    cheap = used(lambda rank, rows: 0.01 + 0.002 * (rank > 1), forwards=8 * OFTEN)
    assert cheap[:TRIED] == [3] * TRIED
    late = {k: n for k, n in enumerate(cheap, 1) if k > 4 * OFTEN}
    assert {n for k, n in late.items() if k % OFTEN} == {1}
    assert {n for k, n in late.items() if k % OFTEN == 0} == {1, 2, 3}  # tried now and then


def test_a_rank_that_would_hold_the_others_up_is_left_out():
    assert used(lambda rank, rows: 0.001 * rows * (30 if rank == 2 else 1))[-1] == 2


def test_nothing_is_asked_of_a_pool_that_lost_all_its_ranks():
    shares = Shares([3])
    shares.begin(1)
    shares.lost(3)
    assert shares.divide([(1, [DraftNode(0, -1, 5)])]) == {}


# ---- drafters with other models ------------------------------------------------------------------
def settled(patience: Patience, took, right, lap: float) -> set[frozenset[int]]:
    """What is chosen in the end; asking everyone now and then takes a small share of the time."""
    draw, chosen, now, trying = random.Random(5), [], 0.0, 0.0
    for _ in range(2000):
        asked = patience.chosen(lap, now)
        chosen.append(asked)
        for drafter in asked:
            patience.took(drafter, took[drafter])
        u, seconds = draw.random(), max(took[drafter] for drafter in asked)
        now, trying = now + seconds, trying + seconds * (patience._tried == now)
        if asked == patience.sets[-1]:
            for some in patience.sets:
                patience.judged(some, u < right(some))
    often = {some for some in chosen if chosen[-1000:].count(some) > 500}
    assert trying < (Patience.SHARE + 0.01) * now + Patience.JUDGED * max(took)
    assert patience.sets[-1] in chosen[-1000:], "everyone is asked again"
    return often


@pytest.mark.parametrize(
    "took,right,lap,want",
    [
        # 0.5 * 1 + 0.5 * 100 ms against 0.9 * 20 + 0.1 * 100: the slow one pays
        ((0.001, 0.02), (0.5, 0.9), 0.1, {0, 1}),
        # 0.5 * 1 + 0.5 * 10 against 0.9 * 20 + 0.1 * 20: it does not
        ((0.001, 0.02), (0.5, 0.9), 0.01, {0}),
        # it brings nothing
        ((0.001, 0.02), (0.5, 0.5), 0.1, {0}),
    ],
)
def test_a_slow_drafter_is_waited_for_where_it_pays(took, right, lap, want):
    patience = Patience(2, frozenset({0}))
    best = {frozenset({0}): right[0], frozenset({0, 1}): right[1]}
    assert settled(patience, took, best.__getitem__, lap) == {frozenset(want)}


def test_of_drafters_elsewhere_one_at_least_is_asked():
    patience = Patience(2)
    assert patience.sets == [frozenset({0}), frozenset({0, 1})]
    assert settled(patience, (0.03, 0.02), lambda some: 0.3, 0.1) == {frozenset({1})}


# ---- their ranks ---------------------------------------------------------------------------------
def test_drafters_come_behind_all_servers_and_talk_with_rank_0_alone():
    ring = Topology(2, members=2, servers=2, drafters=2)
    assert ring.world_size == 11 and [*ring.drafter_ranks] == [9, 10]
    assert [*ring.stage_ranks] == [1, 3, 5, 7] and [*ring.control_peers(0)] == [1, 3, 5, 7, 9, 10]
    for rank in ring.drafter_ranks:
        assert [*ring.control_peers(rank)] == [0] and [*ring.group(rank)] == [rank]
        assert not (ring.leads(rank) or ring.is_first(rank) or ring.is_last(rank))
        assert ring.place(rank) == 0 and not ring.followers(rank)
    assert ring.title(10) == "drafter 2"
    assert ring.words == "2 servers of 2 stages of 2 ranks, 2 drafters"


def test_a_run_can_do_without_a_drafter_and_without_one_of_several_servers():
    assert [*Topology(2, drafters=1).spare(3)] == [3]
    assert not Topology(2, drafters=1).spare(2) and not Topology(2, servers=2).spare(0)
    assert [*Topology(2, servers=2, drafters=1).spare(4)] == [3, 4]
