"""What a stage decides: events in, actions out."""

import pytest

from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    End,
    Move,
    Pass,
    Passed,
    Settled,
    StageMachine,
    Tell,
)
from flowspec.core.messages import Batch, Cost, Idle, Piece, Prune, Segment, Started
from flowspec.core.ring import Ring
from flowspec.core.stage import Gather, StageState
from flowspec.core.topology import Topology


class Eager(StageState):
    COMPACT = -1


def machine(rank=1, books=StageState, **switches) -> StageMachine:
    """Of a ring of three stages, with a request whose prompt of four tokens is in its cache."""
    found = StageMachine(rank, Topology(3), books)
    found.handle(Begin(1, **switches))
    [compute] = found.handle(Chunk(1, 4))
    assert (compute.rows, compute.context, compute.segments) == (4, 0, [])
    assert found.handle(Computed(0.01))[-1] == passed(None, [0, 1, 2, 3])
    return found


def arrived(number, ids, parents, request=1) -> Arrived:
    return batch(Piece(request, Segment(number, tuple(ids), tuple(parents), tuple(ids))))


def batch(*pieces) -> Arrived:
    return Arrived(Batch(pieces), 0.5, 0.001)


def passed(segment, rows) -> Pass:
    return Pass([Passed(1, segment, rows)])


def kinds(actions) -> list:
    return [type(action.event if isinstance(action, Tell) else action) for action in actions]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_segment_is_computed_and_passed_on_and_the_first_stage_says_when_it_will_be_free(rank):
    stage = machine(rank)
    *told, compute = stage.handle(arrived(7, [0, 1], [-1, 0]))
    assert [(t.event.number, t.event.rows, t.event.waited) for t in told] == (
        [(7, 2, 0.5)] if rank == 1 else []
    )
    assert (compute.rows, compute.context) == (2, 4) and stage.running is compute and stage.wanted()
    done = stage.handle(Computed(0.02))
    assert kinds(done) == [Cost, Pass] and done[0].event.stage == rank
    assert done[1] == passed(compute.segments[0], [0, 1]) and stage.running is None


def test_what_is_dead_is_neither_computed_nor_passed_on():
    stage = machine()
    stage.handle(arrived(1, [0, 1, 2], [-1, 0, 0]))
    assert kinds(stage.handle(Decided(1, Prune(1, 0, 2)))) == [Settled]
    assert stage.handle(Computed(0.02))[-1] == passed(Segment(1, (2,), (0,), (2,)), [2]), (
        "its rows: the third of those computed"
    )
    assert [(t.event.rows, t.event.expected) for t in stage.handle(arrived(2, [3, 4], [1, 3]))] == [
        (0, 0.0)
    ], "and nothing to compute"
    *_, compute = stage.handle(arrived(3, [5, 6], [1, 2]))
    assert compute.segments[0].ids == (6,) and compute.parts[0].rows == [1]


def test_dead_rows_take_their_way_where_the_policy_does_not_drop_them():
    stage = machine(drop_dead=False, abort=False)
    stage.handle(arrived(1, [0, 1], [-1, 0]))
    stage.handle(Decided(1, Prune(1, 0, 9)))
    assert stage.wanted(), "and no forward is abandoned"
    assert stage.handle(Computed(0.02))[-1].rows == [0, 1]
    *_, compute = stage.handle(arrived(2, [3], [1]))
    assert compute.rows == 1


@pytest.mark.parametrize("rank", [1, 2])
def test_a_forward_all_of_whose_rows_died_is_not_wanted_and_the_first_stage_says_that_it_is_idle(
    rank,
):
    stage = machine(rank)
    stage.handle(arrived(1, [0], [-1]))
    stage.handle(Computed(0.02))
    stage.handle(arrived(2, [1, 2], [0, 0]))
    stage.handle(Decided(1, Prune(1, 0, 3)))
    assert not stage.wanted()
    assert kinds(stage.handle(Computed(0.01, whole=False))) == ([Idle] if rank == 1 else [])


def test_rows_of_the_cache_move_when_no_forward_is_under_way():
    stage = machine(books=Eager)
    stage.handle(arrived(1, [0, 1, 2], [-1, 0, 0]))
    stage.handle(Computed(0.02))
    stage.handle(arrived(2, [3], [2]))
    assert stage.handle(Decided(1, Prune(1, 0, 2))) == [Settled(1, 4, [0])]
    done = stage.handle(Computed(0.02))
    assert kinds(done) == [Cost, Move, Pass] and done[1] == Move(1, Gather(5, [6, 7]))
    assert kinds(stage.handle(Decided(1, Prune(2, 2, 3)))) == [Settled, Move], "at once"
    stage.books(1).validate()


def test_a_request_that_ends_is_wanted_no_more_and_leaves_nothing():
    stage = machine()
    stage.handle(arrived(1, [0], [-1]))
    stage.handle(End(1))
    assert not stage.wanted() and stage.books(1) is None
    assert kinds(stage.handle(Computed(0.01))) == [Cost], "what was measured counts"
    assert kinds(stage.handle(arrived(2, [1], [0]))) == [Started], "rank 0 waits for that"
    assert stage.handle(Chunk(1, 3)) == stage.handle(Decided(1, Prune(1, 0, 1))) == []


def test_an_end_may_overtake_its_beginning():
    stage = StageMachine(2, Topology(3))
    stage.handle(End(5))
    stage.handle(Begin(5))
    assert stage.books(5) is None
    stage.handle(Begin(6))
    assert stage.books(6) is not None and isinstance(stage.handle(Chunk(6, 1))[0], Compute)


def test_what_forwards_cost_is_kept_from_request_to_request_until_it_is_forgotten():
    stage = machine()
    assert stage.meter.forward.predict(4) == pytest.approx(0.01)
    stage.handle(End(1))
    stage.handle(Begin(2))
    assert stage.meter.forward.predict(4) == pytest.approx(0.01)
    stage.forget()
    assert stage.meter.forward.points() == []


def test_whatever_a_stage_says_of_its_wait_a_hop_takes_no_less_than_nothing():
    ring = Ring()
    ring.sent(1, 1.0)
    ring.started(Started(1, 1, 0.1, waited=5.0), 1.2)
    assert ring.known_hop == 0.0


def test_rows_of_a_prompt_are_not_wanted_once_their_request_is_over():
    stage = StageMachine(2, Topology(3))
    stage.handle(Begin(1))
    stage.handle(Chunk(1, 4))
    assert stage.wanted()
    stage.handle(End(1))
    assert not stage.wanted() and stage.handle(Computed(0.01, whole=False)) == []


def test_what_a_hop_takes_as_a_rule_is_no_matter_of_one_lucky_message():
    ring = Ring()
    for number, took in enumerate((0.2, 0.01, 0.3, 0.25, 0.2)):
        ring.sent(number, 0.0)
        ring.started(Started(number, 1, 0.1, waited=0.0), 2 * took)
    assert (ring.known_hop, ring.usual_hop) == (pytest.approx(0.01), pytest.approx(0.2))


def test_rows_of_two_requests_are_one_forward_and_each_sees_its_own_cache():
    stage = machine()
    stage.handle(Begin(2))
    one, two = Segment(7, (0, 1), (-1, 0), (5, 6)), Segment(8, (0,), (-1,), (9,))
    told, compute = stage.handle(batch(Piece(1, one), Piece(2, two)))
    assert (told.event.number, told.event.rows, compute.rows) == (7, 3, 3)
    assert [(p.request, p.rows, p.admitted.length) for p in compute.parts] == [
        (1, [0, 1], 6),
        (2, [2], 1),
    ]
    assert compute.context == 2, "rows behind 4, 4 and none: the mean"
    stage.handle(Decided(1, Prune(1, 0, 9)))
    assert stage.wanted(), "the other's row lives"
    *_, passes = stage.handle(Computed(0.01))
    assert passes.parts == [Passed(2, two, [2])] and passes.batch == Batch((Piece(2, two),))
    stage.handle(End(2))
    (told,) = stage.handle(batch(Piece(2, Segment(9, (1,), (0,), (4,)))))
    assert told.event.rows == 0


def test_a_forward_goes_on_while_any_of_its_requests_wants_it():
    stage = machine()
    stage.handle(Begin(2))
    stage.handle(
        batch(Piece(1, Segment(1, (0,), (-1,), (5,))), Piece(2, Segment(2, (0,), (-1,), (5,))))
    )
    stage.handle(End(1))
    assert stage.wanted()
    stage.handle(Decided(2, Prune(1, -1, 9)))
    assert not stage.wanted() and kinds(stage.handle(Computed(0.01, whole=False))) == [Idle]
