"""Rank 0's machine read as a transcript: an event goes in, a list of actions comes out."""

import numpy as np
import pytest

from flowspec.core.curve import Curve
from flowspec.core.decoding import Decoding
from flowspec.core.learnt import Learnt
from flowspec.core.messages import (
    Answered,
    Back,
    Batch,
    Commit,
    Cost,
    Decision,
    Draft,
    Drafted,
    DraftNode,
    Finish,
    Proposal,
    Prune,
    Prunes,
    Returned,
    Segment,
    Started,
    Wake,
    Woke,
)
from flowspec.core.policies import make_policy
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.scheduler import Scheduler
from flowspec.core.topology import Topology
from flowspec.errors import UserError

ROOT = DraftNode(0, -1, 9)


def proposal(**chances):
    """Candidates t<token>=probability, best first."""
    tokens = [int(name[1:]) for name in chances]
    return Proposal(np.array(tokens), np.log(list(chances.values())))


def scheduler(method="flowspec", stages=2, new=20, eos=(), drafts=True, jit=False, **tree):
    policy = make_policy(
        method, TreeConfig(**tree), PolicyConfig(just_in_time=jit), Topology(stages)
    )
    request = Request(
        id=1, prompt=(7, 8, 9), sampling=Sampling(max_new_tokens=new), eos=frozenset(eos)
    )
    return Alone(Decoding(request, policy, learnt := Learnt(), drafts), Topology(stages), learnt)


class Alone:
    """A scheduler with one request, whose prompt the drafter has read; what it says as one flat list."""

    def __init__(self, decoding, topology, learnt):
        self.decoding, self.scheduler = decoding, Scheduler(topology, learnt)
        decoding.asked = False

    @property
    def tree(self):
        return self.decoding.tree

    def start(self, now):
        return self._flat(self.scheduler.admit(self.decoding, now))

    def handle(self, event, now):
        if isinstance(event, Returned):
            event = Back((event,))
        elif isinstance(event, Drafted):
            event = Answered(((1, event),))
        return self._flat(self.scheduler.handle(event, now))

    def _flat(self, actions):
        self.scheduler.validate()
        flat = []
        for action in actions:
            if isinstance(action, Batch):
                flat += [segment for _, segment in action.pieces]
            elif isinstance(action, Prunes):
                flat += [prune for _, prune in action.prunes]
            elif isinstance(action, Decision):
                flat += [action.commit, *([action.finish] if action.finish else [])]
            elif isinstance(action, Draft):
                flat.append(action._replace(lap=0.0))
            else:
                flat.append(action)
        return flat


def draft(*nodes):
    return Draft(((1, nodes),))


def back(number, choices):
    """A segment with the target's tokens after some of its nodes."""
    return Returned(1, number, tuple(choices), lambda node, path: choices[node])


def test_plain_decoding_is_one_row_at_a_time():
    s = scheduler("ar")
    assert s.start(0.0) == [Segment(1, (0,), (-1,), (9,))]
    assert s.handle(back(1, {0: 5}), 1.0) == [
        Prune(1, 0, 1),
        Commit((0,), (5,), (False,), 1),
        Segment(2, (1,), (0,), (5,)),
    ]


def test_the_root_leaves_at_once_and_is_drafted_from_meanwhile():
    assert scheduler().start(0.0) == [draft(ROOT), Segment(1, (0,), (-1,), (9,))]


def test_a_draft_is_sent_behind_the_root_likeliest_first():
    s = scheduler(top_k=2)
    s.start(0.0)
    actions = s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)
    assert actions == [
        draft(DraftNode(1, 0, 5), DraftNode(2, 0, 6)),
        Segment(2, (1, 2), (0, 0), (5, 6)),
    ]


def test_a_hit_keeps_the_subtree_and_a_miss_keeps_nothing():
    s = scheduler(top_k=2)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)
    s.handle(Drafted.pack((1, 2), (proposal(t1=0.9), proposal(t2=0.9))), 2.0)
    hit = s.handle(back(1, {0: 6}), 3.0)
    assert hit[:2] == [Prune(1, 0, 2), Commit((0,), (6,), (True,), 2)]
    assert set(s.tree.nodes) == {2, 4}
    miss = s.handle(back(2, {1: 0, 2: 30}), 4.0)
    assert miss == [Prune(2, 2, 5), Commit((2,), (30,), (False,), 5), Segment(4, (5,), (2,), (30,))]
    assert len(s.tree) == 1
    assert s.handle(Drafted.pack((3, 4), (None, None)), 5.0) == [draft(DraftNode(5, 2, 30))], (
        "one drafter forward at a time"
    )


def test_several_tokens_of_one_segment_are_committed_at_once():
    s = scheduler("serial", budget=4, top_k=1, depth=2)
    s.start(0.0)
    for node, token in [(0, 5), (1, 6), (2, 4)]:
        actions = s.handle(Drafted.pack((node,), (proposal(**{f"t{token}": 0.9}),)), 1.0)
    assert actions == [Segment(1, (0, 1, 2, 3), (-1, 0, 1, 2), (9, 5, 6, 4))]
    assert s.handle(back(1, {0: 5, 1: 6, 2: 30}), 2.0)[:2] == [
        Prune(1, 2, 4),
        Commit((0, 1, 2), (5, 6, 30), (True, True, False), 4),
    ]


def test_naive_waits_for_all_its_pieces():
    s = scheduler("naive", stages=2, budget=6, top_k=2, depth=1)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)
    pieces = s.handle(Drafted.pack((1, 2), (proposal(t1=0.9), proposal(t2=0.9))), 1.0)
    assert [p.ids for p in pieces] == [(0,), (1, 3), (2, 4)]
    assert s.handle(back(1, {0: 5}), 2.0) == []
    assert s.handle(back(2, {1: 1, 3: 8}), 2.0) == []
    commit = s.handle(back(3, {2: 0, 4: 0}), 2.0)[1]
    assert commit.tokens == (5, 1, 8) and commit.accepted == (True, True, False)


def test_pruned_verifies_every_piece_and_drafts_only_between_rounds():
    s = scheduler("pruned", stages=2, budget=6, top_k=2, depth=1)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)
    pieces = s.handle(Drafted.pack((1, 2), (proposal(t1=0.9), proposal(t2=0.9))), 1.0)
    assert [p.ids for p in pieces] == [(0,), (1, 3), (2, 4)]
    assert s.handle(back(1, {0: 5}), 2.0) == [Prune(1, 0, 1), Commit((0,), (5,), (True,), 1)]
    assert s.handle(back(2, {1: 1, 3: 8}), 3.0) == [
        Prune(2, 3, 5),
        Commit((1, 3), (1, 8), (True, False), 5),
        draft(DraftNode(5, 3, 8)),
    ], "the third piece is dead: nobody waits for it"


def test_pruned_ends_a_round_at_a_token_that_was_drafted_but_not_sent():
    s = scheduler("pruned", stages=1, budget=2, top_k=2, depth=1, new=2)
    s.start(0.0)
    assert [p.ids for p in s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)] == [
        (0,),
        (1,),
    ]
    assert s.handle(back(1, {0: 6}), 2.0) == [
        Prune(1, 0, 3),
        Commit((0,), (6,), (False,), 3),
        Segment(3, (3,), (0,), (6,)),
    ], "a fresh tree, of one node since one token is left"


def layered(**tree):
    """A ring of two stages with the root, a layer of two and a layer of two in flight, and one more drafted."""
    s = scheduler("pipedec", top_k=2, segment=2, **tree)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)
    s.handle(Drafted.pack((1, 2), (proposal(t1=0.6, t2=0.3), proposal(t3=0.8, t4=0.1))), 2.0)
    assert s.handle(Drafted.pack((3, 4), (proposal(t7=0.9), proposal(t8=0.9))), 3.0) == [], (
        "three credits: the layer waits"
    )
    return s


def test_pipedec_sends_the_best_of_each_layer_and_drafts_from_it():
    s = scheduler("pipedec", top_k=2, segment=2)
    assert s.start(0.0) == [draft(ROOT), Segment(1, (0,), (-1,), (9,))]
    assert s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0) == [
        Segment(2, (1, 2), (0, 0), (5, 6)),
        draft(DraftNode(1, 0, 5), DraftNode(2, 0, 6)),
    ]
    assert s.handle(
        Drafted.pack((1, 2), (proposal(t1=0.6, t2=0.3), proposal(t3=0.8, t4=0.1))), 2.0
    ) == [
        Segment(3, (3, 4), (1, 2), (1, 3)),
        draft(DraftNode(3, 1, 1), DraftNode(4, 2, 3)),
    ], "0.6 * 0.6 and 0.3 * 0.8 before 0.6 * 0.3"


def test_a_layer_of_pipedec_is_chosen_among_the_children_of_the_living():
    s = layered()
    assert s.handle(back(1, {0: 6}), 4.0) == [
        Prune(1, 0, 2),
        Commit((0,), (6,), (True,), 2),
        Segment(4, (5,), (4,), (8,)),
        draft(DraftNode(5, 4, 8)),
    ]
    assert s.handle(back(2, {2: 30}), 5.0) == [
        Prune(2, 2, 6),
        Commit((2,), (30,), (False,), 6),
        Segment(5, (6,), (2,), (30,)),
    ], "a miss: the new root alone"
    assert s.handle(Drafted.pack((5,), (proposal(t1=0.9),)), 6.0) == [draft(DraftNode(6, 2, 30))]


def test_just_in_time_a_layer_is_chosen_when_it_leaves():
    s = scheduler("pipedec", jit=True, top_k=1)
    s.start(0.0)
    assert s.handle(Drafted.pack((0,), (proposal(t5=0.9),)), 1.0) == [], (
        "the root has not started yet"
    )
    s.handle(Cost(1, Curve.line(3.15, 0.05), 0.0), 1.0)
    assert s.handle(Started(1, 1, expected=4.0, waited=0.0), 2.0) == [Wake(3.8)]
    assert len(s.tree) == 1
    assert s.handle(Woke(), 3.8) == [Segment(2, (1,), (0,), (5,)), draft(DraftNode(1, 0, 5))]


def test_a_full_tree_holds_the_next_layer_back_until_the_root_moves_on():
    s = layered(budget=5)
    assert s.handle(back(1, {0: 5}), 4.0)[2] == Segment(4, (5,), (3,), (7,))
    assert [a for a in scheduler("pipedec", budget=1).start(0.0) if isinstance(a, Draft)] == [], (
        "no room for any"
    )


def test_depth_bounds_the_layers_of_pipedec():
    s = scheduler("pipedec", top_k=1, depth=1, stages=5)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.9),)), 1.0)
    assert s.handle(Drafted.pack((1,), (proposal(t6=0.9),)), 2.0) == [
        Segment(3, (2,), (1,), (6,))
    ], "two levels below the root"
    assert s.handle(back(1, {0: 5}), 3.0)[2:] == [draft(DraftNode(2, 1, 6))]


def test_an_end_token_inside_the_accepted_path_ends_the_text_there():
    s = scheduler("serial", eos=[5], budget=3, top_k=1, depth=1)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.9),)), 1.0)
    s.handle(Drafted.pack((1,), (proposal(t6=0.9),)), 1.0)
    actions = s.handle(back(1, {0: 5, 1: 6, 2: 7}), 2.0)
    assert actions == [Commit((0,), (5,), (True,), 3), Finish("stop")]
    assert s.handle(Woke(), 3.0) == []


def test_the_limit_cuts_an_accepted_path():
    s = scheduler("serial", new=2, budget=3, top_k=1, depth=3)
    s.start(0.0)
    actions = s.handle(Drafted.pack((0,), (proposal(t5=0.9),)), 1.0)
    assert actions == [Segment(1, (0, 1), (-1, 0), (9, 5))], (
        "a node deeper than the limit is never drafted"
    )
    assert s.handle(back(1, {0: 5, 1: 6}), 2.0) == [
        Commit((0, 1), (5, 6), (True, False), 2),
        Finish("length"),
    ]


def test_without_a_drafter_nothing_is_drafted():
    assert scheduler(drafts=False).start(0.0) == [Segment(1, (0,), (-1,), (9,))]


def test_a_dead_proposal_is_dropped():
    s = scheduler()
    s.start(0.0)
    s.handle(back(1, {0: 30}), 1.0)
    assert s.handle(Drafted.pack((0,), (proposal(t5=0.9),)), 2.0) == [draft(DraftNode(1, 0, 30))]
    assert len(s.tree) == 1


def test_just_in_time_the_next_segment_waits_for_the_first_stage():
    s = scheduler(jit=True, top_k=1)
    s.start(0.0)
    assert s.handle(Drafted.pack((0,), (proposal(t5=0.9),)), 1.0) == [draft(DraftNode(1, 0, 5))], (
        "the root has not started yet"
    )
    s.handle(Cost(1, Curve.line(3.15, 0.05), 0.0), 1.0)
    [wake] = s.handle(Started(1, 1, expected=4.0, waited=0.0), 2.0)
    assert wake == Wake(3.8), (
        "two seconds there and back: free at 5 by our clock, a hop and a sixteenth of a forward earlier it may leave"
    )
    assert s.handle(Woke(), 3.8) == [Segment(2, (1,), (0,), (5,))]


def test_a_segment_that_returned_has_started():
    s = scheduler(jit=True, top_k=1)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.9),)), 1.0)
    assert s.handle(back(1, {0: 5}), 2.0)[-1] == Segment(2, (1,), (0,), (5,))
    assert s.handle(Started(1, 1, 9.0, 0.0), 2.1) == [], "old news changes nothing"


def test_credits_bound_the_segments_in_flight():
    s = scheduler(stages=2, segment=1, top_k=4)
    s.start(0.0)
    actions = s.handle(Drafted.pack((0,), (proposal(t1=0.3, t2=0.3, t3=0.2, t4=0.2),)), 1.0)
    assert sum(isinstance(a, Segment) for a in actions) == 1, (
        "two credits with two stages, one is the root's"
    )


@pytest.mark.parametrize("name", ["budget", "top_k", "depth", "segment"])
def test_bad_trees_are_named(name):
    with pytest.raises(UserError, match=f"tree.{name} is 0"):
        TreeConfig(**{name: 0})


# ---- riding refresh --------------------------------------------------------------------------------
def refreshing(**tree):
    """The root (0) with children 1 (t5) and 2 (t6), both drafted; 3 (t1) and 5 (t2) are 1's, 4 is 2's."""
    policy = make_policy(
        "flowspec",
        TreeConfig(top_k=2, **tree),
        PolicyConfig(just_in_time=False, calibrate=False),
        Topology(4),
        features=True,
    )
    request = Request(id=1, prompt=(7, 8, 9), sampling=Sampling(max_new_tokens=20))
    s = Alone(Decoding(request, policy, learnt := Learnt()), Topology(4), learnt)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)
    s.handle(Drafted.pack((1, 2), (proposal(t1=0.5, t2=0.4), proposal(t1=0.9))), 2.0)
    return s, s.handle(
        Drafted.pack((3, 4, 5), (proposal(t8=0.9), proposal(t8=0.9), proposal(t8=0.9))), 3.0
    )


def asked(actions):
    [draft] = [a for a in actions if isinstance(a, Draft)]
    [(_, nodes)] = draft.asks
    return nodes


def test_a_new_root_is_drafted_again_from_its_true_feature_and_rides_with_the_frontier():
    s, actions = refreshing()
    frontier = tuple(n.id for n in asked(actions))
    assert 1 not in frontier
    s.handle(back(1, {0: 5}), 4.0)
    again = asked(s.handle(Drafted.pack(frontier, [proposal(t9=0.9)] * len(frontier)), 5.0))
    assert again[0] == DraftNode(1, 0, 5), "the root first, what is new behind it"
    assert len(again) > 1


def test_a_node_that_is_drafted_again_moves_its_subtree():
    s, actions = refreshing()
    frontier = tuple(n.id for n in asked(actions))
    s.handle(back(1, {0: 5}), 4.0)
    again = asked(s.handle(Drafted.pack(frontier, [proposal(t9=0.9)] * len(frontier)), 5.0))
    nodes = s.tree.nodes
    before = {i: nodes[i].score - nodes[1].score for i in (3, 5)}
    below = {
        id: node.score - nodes[node.parent].score
        for id, node in nodes.items()
        if node.parent in (3, 5)
    }
    others = [proposal(t9=0.9)] * (len(again) - 1)
    actions = s.handle(
        Drafted.pack([n.id for n in again], [proposal(t2=0.9, t7=0.09), *others]), 6.0
    )
    s.scheduler.validate()
    after = {i: nodes[i].score - nodes[1].score for i in (3, 5)}
    assert after[5] > before[5] and after[3] < before[3], (
        "t2 is the favourite now, t1 is in the list no more"
    )
    assert {id: nodes[id].score - nodes[nodes[id].parent].score for id in below} == pytest.approx(
        below
    ), "and what hangs below moved along"
    assert 7 in nodes[1].children, "a candidate that was not there before"
    assert {n.id for n in asked(actions)} >= {3, 5}, "its children are next"


def test_without_features_nothing_is_drafted_twice():
    s = scheduler(top_k=2)
    s.start(0.0)
    s.handle(Drafted.pack((0,), (proposal(t5=0.6, t6=0.3),)), 1.0)
    s.handle(Drafted.pack((1, 2), (proposal(t1=0.9), proposal(t1=0.9))), 2.0)
    actions = s.handle(back(1, {0: 5}), 3.0)
    assert not any(n.id == 1 for a in actions if isinstance(a, Draft) for n in a.nodes)
