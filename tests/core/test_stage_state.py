"""A stage's books, with the worked example of the design and the defects of other implementations as vectors."""

import random

import pytest

from flowspec.core.cost import Emulate
from flowspec.core.messages import Prune
from flowspec.core.stage import Accepted, Gather, StageState, Waiting

PARENTS = {0: -1, 1: 0, 2: 1, 3: 0, 4: 1, 5: 2, 6: 3, 7: 4, 8: 2}


def admit(state, *ids):
    return state.admit(ids, [PARENTS[i] for i in ids])


def visible(admitted):
    return [sorted(admitted.sees(k)) for k in range(len(admitted.kept))]


def prompted(n=10):
    state = StageState()
    state.extend(n)
    return state


def test_prompt_rows_are_causal():
    state = StageState()
    assert visible(state.extend(2)) == [[0], [0, 1]]
    second = state.extend(2)
    assert second.positions.tolist() == [2, 3] and visible(second) == [[0, 1, 2], [0, 1, 2, 3]]


def test_the_worked_example_on_a_stage_that_has_two_segments():
    """Nodes 0 and 1 accepted, node 4 the new root: it holds rows 0..5 of the tree and keeps 0, 1, 4."""
    state = prompted()
    state.COMPACT = -1
    admit(state, 0, 1, 2)
    admit(state, 3, 4, 5)
    assert state.prune(Prune(1, 1, 4)) == Gather(12, [14]), (
        "rows 10 and 11 are in place, the root moves behind them"
    )
    assert state.context == 12 and state.row == {4: 12} and state.length == 13
    third = admit(state, 6, 7, 8)
    assert third.kept == [1], "of the third segment only node 7 is alive"
    assert visible(third) == [[*range(12), 12, 13]] and third.positions.tolist() == [13]


def test_the_worked_example_on_a_stage_that_has_one_segment():
    state = prompted()
    admit(state, 0, 1, 2)
    state.prune(Prune(1, 1, 4))
    second = admit(state, 3, 4, 5)
    assert second.kept == [1] and second.positions.tolist() == [12]
    assert visible(second) == [[*range(12), 13]], (
        "row 12 held the dead node 2 and is still there, unseen"
    )


def test_a_single_row_does_not_see_its_siblings():
    state = prompted(1)
    admit(state, 0)
    admit(state, 1)
    assert visible(admit(state, 3)) == [[0, 1, 3]]


def test_a_miss_keeps_nothing_and_the_new_root_is_admitted():
    state = prompted(1)
    admit(state, 0, 1, 2, 3)
    state.prune(Prune(1, 1, 20))
    assert state.row == {} and state.context == 3
    assert state.admit([20, 5], [1, 2]).kept == [0]


def test_an_early_prune_and_a_lost_one_end_in_the_same_books():
    late, lost = prompted(1), prompted(1)
    for state in (late, lost):
        admit(state, 0, 1, 2, 3, 4)
    late.prune(Prune(1, 0, 1))
    for state in (late, lost):
        state.prune(Prune(2, 1, 4))
    assert late.context == lost.context == 3 and list(late.row) == list(lost.row) == [4]
    assert late.prune(Prune(1, 0, 1)) is None, "an older prune changes nothing"


def test_dead_rows_are_gathered_only_when_many():
    state = prompted(1)
    ids = list(range(StageState.COMPACT + 2))
    state.admit(ids, [-1, *[0] * (len(ids) - 1)])
    assert state.prune(Prune(1, 0, 1)) is None and state.dead == StageState.COMPACT
    state.admit([100], [1])
    state.admit([101], [1])
    gather = state.prune(Prune(2, 1, 100))
    assert gather is not None and gather.base + len(gather.rows) == state.length and state.dead == 0


def test_tokens_can_be_committed_behind_a_tree():
    """Nodes 0 and 1 became text but their rows are to be made again; node 4 below them lives on."""
    state = prompted()
    admit(state, 0, 1, 2, 4)  # rows 10 .. 13
    assert state.prune(Prune(1, -1, 4)) is None and state.context == 10 and state.dead == 3
    again = state.extend(2).then(state.admit([9], [4]))
    assert again.kept == [0, 1, 2] and again.positions.tolist() == [10, 11, 13]
    assert visible(again) == [[*range(10), 14], [*range(10), 14, 15], [*range(10), 13, 14, 15, 16]]
    state.COMPACT = -1
    assert state.prune(Prune(2, 4, 9)) == Gather(10, [14, 15, 13, 16])
    assert state.context == 13 and state.row == {9: 13}


def test_rows_of_the_text_can_be_made_anew():
    """Whether they lie in place, behind, or nowhere yet; what comes after them keeps its rows."""
    state = prompted(4)
    admit(state, 0, 1, 2, 4)  # rows 4 .. 7
    state.prune(Prune(1, 1, 4))  # 0 and 1 are text
    again = state.extend(1, at=4)
    assert again.positions.tolist() == [4] and visible(again) == [[0, 1, 2, 3, 8]]
    assert state.context == 6 and visible(state.admit([9], [4])) == [[0, 1, 2, 3, 5, 7, 8, 9]]
    both = state.extend(3, at=4)
    assert both.positions.tolist() == [4, 5, 6] and visible(both) == [
        [0, 1, 2, 3, 10],
        [0, 1, 2, 3, 10, 11],
        [0, 1, 2, 3, 10, 11, 12],
    ]
    assert state.context == 7 and state.dead == 4
    state.COMPACT = -1
    assert state.prune(Prune(2, 4, 9)) == Gather(4, [10, 11, 12, 7, 9]) and state.dead == 0


def test_what_became_text_is_handed_over_once_and_in_order():
    late, lost = (prompted(1) for _ in range(2))
    handed = {}
    for name, state, prunes in (
        ("late", late, [Prune(2, 1, 4), Prune(1, 0, 1)]),
        ("lost", lost, [Prune(2, 1, 4)]),
    ):
        waiting = Waiting()
        admit(state, 0, 1, 2, 3, 4)
        waiting.hold([0, 1, 2, 3, 4], "abcde")
        handed[name] = []
        for prune in prunes:
            text = state.decided(prune)
            state.prune(prune)
            handed[name].append(waiting.settle(text, state.row))
        assert waiting._held == {4: "e"}, "what died is forgotten"
    assert handed == {"late": [["a", "b"], []], "lost": [["a", "b"]]}


def test_nothing_admitted_beside_something():
    state = prompted(3)
    assert visible(state.extend(0).then(state.admit([0], [-1]))) == [[0, 1, 2, 3]]
    assert visible(state.extend(2).then(state.admit([], []))) == [[0, 1, 2, 4], [0, 1, 2, 4, 5]]


def test_a_last_stage_knows_what_becomes_text():
    accepted, asked = Accepted(), []

    def walk(ids, parents, tokens, choices):
        asked.clear()
        return accepted.walk(ids, parents, tokens, lambda k: asked.append(ids[k]) or choices[k])

    assert walk([0, 1, 2], [-1, 0, 0], [5, 6, 7], [7, 1, 8]) == [0, 2], (
        "the root, and the child with its choice"
    )
    assert asked == [0, 2], "the choice after a node that was refused is nobody's business"
    assert walk([3, 4, 5], [1, 2, 2], [1, 9, 3], [0, 0, 0]) == asked == [], (
        "3 carries the choice of a node that was refused"
    )
    assert walk([6, 7], [2, 6], [8, 4], [4, 2]) == [0, 1] and asked == [6, 7], (
        "a new root after a miss"
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_walk_over_segments_is_the_one_over_the_whole_tree(seed):
    """Random trees in random segments, parents before children; every now and then a new root where no child carries the choice."""
    r = random.Random(seed)
    parents, tokens, choices = [-1], [3], [r.randrange(4)]
    while len(parents) < 120:
        parents.append(r.randrange(max(0, len(parents) - 8), len(parents)))
        used = {tokens[i] for i, p in enumerate(parents[:-1]) if p == parents[-1]}
        tokens.append(r.choice([t for t in range(9) if t not in used]))
        choices.append(r.randrange(4))
    path = [0]
    while (
        after := [
            i for i, p in enumerate(parents) if p == path[-1] and tokens[i] == choices[path[-1]]
        ]
    ) or len(parents) < 150:
        if not after:  # a miss
            parents, tokens, choices = (
                [*parents, path[-1]],
                [*tokens, choices[path[-1]]],
                [*choices, r.randrange(4)],
            )
            after = [len(parents) - 1]
        path += after
    accepted, found, begin = Accepted(), [], 0
    while begin < len(parents):
        end = begin + r.randint(1, 20)
        part = slice(begin, end)
        text = accepted.walk(
            range(begin, len(parents))[: end - begin],
            parents[part],
            tokens[part],
            lambda k, at=begin: choices[at + k],
        )
        found += [begin + k for k in text]
        begin = end
    assert found == path, f"seed {seed}"


def test_emulated_times():
    emulate = Emulate(stage_ms=(10.0, 20.0), token_ms=1.0, link_mbps=8.0)
    assert emulate.stage_seconds(2, 5) == 0.025 and emulate.wire_seconds(1000) == 0.001
    assert emulate.active and not Emulate().active
