"""Several target servers as the scheduler sees them, by hand."""

import itertools

import numpy as np
import pytest

from flowspec.core.curve import Curve
from flowspec.core.decoding import Decoding
from flowspec.core.dsi import Servers
from flowspec.core.messages import (
    Answered,
    Back,
    Batch,
    Cost,
    Drafted,
    Proposal,
    Prunes,
    Read,
    Returned,
)
from flowspec.core.policies import make_policy
from flowspec.core.policies.chain import best_lookahead
from flowspec.core.policy import Dsi, PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.scheduler import Scheduler
from flowspec.core.topology import Topology

PROMPT = (7, 8, 9)


class Ring:
    """A scheduler over servers that answer when they are told to; the target counts on from 100."""

    def __init__(self, servers: int, method: str = "dsi", lookahead: int | None = 2):
        self.topology = Topology(1, servers=servers)
        self.scheduler, self.method = Scheduler(self.topology), method
        self.dsi = Dsi(servers=servers, lookahead=lookahead)
        self.flights: dict[int, list] = {server: [] for server in range(servers)}
        self.prunes, self.asked, self.now = [], [], 0.0
        self.position = [{-1: 1} for _ in range(servers)]

    def begin(self, new: int = 20, number: int = 1) -> Decoding:
        policy = make_policy(self.method, TreeConfig(), PolicyConfig(), self.topology, dsi=self.dsi)
        request = Request(id=number, prompt=PROMPT, sampling=Sampling(max_new_tokens=new))
        self.decoding = Decoding(request, policy, self.scheduler.learnt)
        self._take(self.scheduler.admit(self.decoding, self.now))
        self._take(self.scheduler.handle(Read(number), self.now))
        return self.decoding

    def _take(self, actions) -> None:
        for action in actions:
            if isinstance(action, Batch):
                [(_, segment)] = action.pieces
                at = self.position[action.server]
                for name, parent in zip(segment.ids, segment.parents, strict=True):
                    at[name] = at[parent] + 1
                self.flights[action.server].append(segment)
            elif isinstance(action, Prunes):
                self.prunes.append(action)
            elif hasattr(action, "asks"):
                self.asked.append(action)

    def draft(self, right: bool = True) -> None:
        """Answer what the drafter was asked: with the target's token, or with another."""
        [(request, nodes)] = self.asked.pop(0).asks
        tree = self.decoding.tree.nodes
        proposals = [
            Proposal(np.array([100 + tree[n.id].position + 1 - (not right)]), np.zeros(1))
            for n in nodes
        ]
        answer = Drafted.pack([n.id for n in nodes], proposals)
        self._take(self.scheduler.handle(Answered(((request, answer),)), self.now))

    def back(self, server: int) -> None:
        """The oldest flight of a server comes back, with the target's tokens after all its nodes."""
        segment = self.flights[server].pop(0)
        nodes = self.scheduler.nodes(server, 1, segment.number, segment.ids)
        after = {
            node: 101 + self.position[server][name]
            for node, name in zip(nodes, segment.ids, strict=False)
        }
        event = Returned(1, segment.number, tuple(after), lambda node, path: after[node])
        self._take(self.scheduler.handle(Back((event,)), self.now))

    def busy(self) -> list[int]:
        return [len(flights) for flights in self.flights.values()]


def test_a_root_leaves_at_once_and_a_task_every_lookahead_levels_to_a_server_of_its_own():
    ring = Ring(3)
    ring.begin()
    assert ring.busy() == [1, 0, 0], "the root"
    ring.draft()
    assert ring.busy() == [1, 0, 0], "one level is drafted"
    ring.draft()
    assert ring.busy() == [1, 1, 0]
    [task] = ring.flights[1]
    assert len(task.ids) == 3 and task.parents[0] == -1, "the root and two levels: it catches up"
    ring.draft(), ring.draft()
    assert ring.busy() == [1, 1, 1] and len(ring.flights[2][0].ids) == 5
    ring.draft(), ring.draft()
    assert ring.busy() == [1, 1, 1], "no server has nothing to do, but the drafter goes on"
    assert len(ring.decoding.tree) == 7


def test_the_first_verdict_counts_and_what_it_refutes_is_given_up():
    ring = Ring(3)
    ring.begin()
    ring.draft(), ring.draft(right=False)
    assert ring.busy() == [1, 1, 0]
    ring.back(1)  # before the root's own server
    assert ring.decoding.tokens == [103, 104]
    given_up = {p.server: p.prunes[0][1] for p in ring.prunes}
    assert given_up.keys() == {0, 1}
    assert given_up[0].anchor == -1 and given_up[0].root not in ring.flights[0][0].ids
    root = ring.flights[1][0]  # it lacks least: all of the text came back from it
    assert len(root.ids) == 1 and root.stands_on.root == root.ids[0]
    ring.back(0)
    assert ring.decoding.tokens == [103, 104], "nobody waits for it"


def test_a_server_that_is_lost_while_nothing_runs_is_never_used_again():
    ring = Ring(2, "ar")
    assert ring.scheduler.lost(0, 0.0) == []
    ring.begin()
    for _ in range(5):
        assert ring.busy() == [0, 1]
        ring.back(1)
    assert len(ring.decoding.tokens) == 5


def test_what_was_in_flight_on_a_lost_server_goes_to_another():
    ring = Ring(2)
    ring.begin()
    assert ring.busy() == [1, 0]
    ring._take(ring.scheduler.lost(0, 0.0))
    assert ring.busy() == [1, 1] and len(ring.flights[1][0].ids) == 1, "the root"
    ring.back(1)
    assert ring.decoding.tokens == [103]


@pytest.mark.parametrize("method", ["ar", "si"])
def test_a_server_that_lacks_much_of_a_text_catches_up_when_it_has_nothing_to_do(method):
    ring = Ring(2, method, lookahead=4)
    ring.begin(new=80)
    for _ in itertools.takewhile(lambda _: not ring.decoding.finished, range(500)):
        if ring.asked:
            ring.draft()
        elif ring.flights[0]:
            ring.back(0)
        if ring.flights[1]:
            break
    [behind] = ring.flights[1]
    assert 32 <= len(behind.ids) <= 64 and len(ring.decoding.tokens) >= 32


def test_si_takes_the_lookahead_that_is_best_for_what_is_measured():
    assert [best_lookahead(a, 1.0, t, 16) for a, t in ((0.93, 3.03), (0.87, 1.485))] == [6, 2]
    assert best_lookahead(0.63, 2.5, 37.7, 16) == 4 and best_lookahead(0.999, 1.0, 100.0, 16) == 16
    assert best_lookahead(0.01, 1.0, 1.0, 16) == 1
    ring = Ring(1, "si", lookahead=None)
    ring.begin(new=60)
    assert ring.decoding.policy.lookahead == 5, "before anything is measured"
    ring.scheduler.learnt.ring.measured(Cost(1, Curve.line(20.6, 0.0), 0.0))
    for _ in itertools.takewhile(lambda _: len(ring.decoding.tokens) < 40, range(200)):
        ring.now += 6.8 if ring.asked else 20.6
        ring.draft() if ring.asked else ring.back(0)
    accepted, rejected = ring.scheduler.learnt.verified
    assert rejected == 1 and accepted > 30, "all were right"
    assert ring.decoding.policy.lookahead == best_lookahead(
        accepted / (accepted + 1), 6.8, 20.6, 16
    )


def test_a_server_that_lacks_a_little_of_many_texts_catches_up_too():
    """Else it gets no task for what it lacks of all, and never lacks enough of one: the ring stood still."""
    ring, servers = Ring(1), Servers(Topology(1, servers=2))
    decodings = []
    for number, n in enumerate((25, 30, 20), 1):
        decoding = ring.begin(number=number)
        servers.admit(number)
        decoding.text += [(id, 100 + id) for id in range(1, n + 1)]
        decodings.append(decoding)
    assert servers.next(1, decodings) is None
    caught = []
    while servers.next(1, decodings) is None:
        batch = servers.catch_up(1, decodings, len(caught) + 1)
        assert batch is not None, "both servers are free, get no task and do not catch up"
        [(request, segment)] = batch.pieces
        caught.append((batch.server, request, len(segment.ids)))
        servers.returned(batch.server, request, segment.number, segment.ids)
    assert caught == [(0, 2, 30)]
