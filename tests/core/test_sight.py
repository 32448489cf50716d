"""What a watcher is shown of the ring is what rank 0 knows, and no more of a tree than fits."""

import pytest

from flowspec.core.curve import Curve
from flowspec.core.decoding import Decoding
from flowspec.core.messages import Cost
from flowspec.core.policies import make_policy
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.scheduler import Scheduler
from flowspec.core.sight import MOST, SeenNode, SeenStage, seen
from flowspec.core.topology import Topology

RING = Topology(2)


@pytest.fixture
def scheduler():
    return Scheduler(RING)


def admitted(scheduler: Scheduler, id: int = 1) -> Decoding:
    """A request whose root has been sent; it drafts nothing by itself."""
    policy = make_policy("ar", TreeConfig(), PolicyConfig(), RING)
    request = Request(
        id=id, prompt=(7, 8, 9), sampling=Sampling(max_new_tokens=20), eos=frozenset()
    )
    decoding = Decoding(request, policy, scheduler.learnt)
    scheduler.admit(decoding, 0.0)
    return decoding


def test_nothing_is_known_before_a_stage_has_told(scheduler):
    sight = seen(scheduler, RING, [1])
    assert (sight.stages, sight.plain, sight.tried, sight.trees) == ({}, None, False, {})


def test_costs_and_how_busy_a_stage_was_are_shown_by_rank(scheduler):
    decoding = admitted(scheduler)
    for now, busy in ((1.0, 5.0), (2.0, 5.25), (5.0, 6.0)):
        scheduler.handle(Cost(2, Curve.line(0.1, 0.0), 0.01, busy), now)
    sight = seen(scheduler, RING, [])
    assert sight.stages == {2: SeenStage(pytest.approx(0.1), 0.01, pytest.approx(0.25))}
    assert sight.plain == scheduler.ring.lap(RING) and not sight.tried
    scheduler.ring.plain = (0.5, decoding.context)
    sight = seen(scheduler, RING, [])
    assert (sight.plain, sight.tried, sight.batches, sight.rows) == (0.5, True, 1, 1)
    scheduler.cancel(1, 6.0)
    admitted(scheduler, 2)  # between texts nobody is busy, so that time does not count
    assert scheduler.ring.busy(2) is None


def test_a_tree_is_shown_from_its_root_as_far_as_it_fits(scheduler):
    decoding = admitted(scheduler)
    tree = decoding.tree
    child = tree.add(tree.root, 30, -1.0)
    for token in range(MOST):
        tree.add(child, token, -2.0)
    shown = seen(scheduler, RING, [1, 2]).trees
    assert shown.keys() == {1} and len(shown[1].nodes) == MOST and shown[1].more == 2
    assert shown[1].nodes[:2] == (SeenNode(0, -1, 9, True), SeenNode(1, 0, 30, False))
    met = {-1}
    for node in shown[1].nodes:
        assert node.parent in met
        met.add(node.id)
    assert (shown[1].drafted, shown[1].sent) == (MOST + 1, 0)


def test_nodes_that_became_text_are_named(scheduler):
    decoding = admitted(scheduler)
    decoding.text = [(id, 5) for id in range(100)]
    assert seen(scheduler, RING, [1]).trees[1].text == tuple(range(36, 100))
