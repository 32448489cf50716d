"""Random runs of the heart against plain decoding, and proof that the fuzz can fail."""

import dataclasses

import pytest

from flowspec.core.policy import METHODS
from flowspec.core.stage import Gather, StageState
from tests.core.world import Case, ToyStage, World, greedy

RUNS = 120


def wrong(cases, stage=ToyStage) -> list[Case]:
    """The cases whose text is not plain decoding's, or that trip a check."""
    bad = []
    for case in cases:
        try:
            if World(case, stage).run() != greedy(case.request):
                bad.append(case)
        except (AssertionError, KeyError, IndexError, ValueError):
            bad.append(case)
    return bad


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lost", [0.0, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seeds", [range(12), pytest.param(range(12, RUNS), marks=pytest.mark.slow)])
def test_text_is_plain_decodings_under_any_delay_and_loss(method, lost, seeds):
    bad = wrong(Case(seed, method, lost) for seed in seeds)
    assert not bad, f"{len(bad)} of {len(seeds)} runs are wrong, the first with {bad[0]}"


def mutant(method):
    """A stage whose StageState has one method replaced; `method(original, self, *args)`."""
    name = method.__name__
    state = type("Mutant", (StageState,), {name: lambda self, *a: method(getattr(StageState, name), self, *a)})

    class MutantStage(ToyStage):
        def __init__(self):
            super().__init__()
            self.state = state()
            self.state.COMPACT = 4

    return MutantStage


def blind(admitted):
    """To all masks."""
    return admitted._replace(behind=[[*range(admitted.base, admitted.length)] for _ in admitted.kept])


class Mutants:
    """Each breaks one rule of StageState."""

    def not_compacted():
        def prune(good, self, message):
            gather = good(self, message)
            return gather and Gather(gather.base, list(range(gather.base, gather.base + len(gather.rows))))

        return prune

    def path_of_one_node():  # trusts that every earlier prune arrived
        def _chain(good, self, node):
            return good(self, node)[-1:]

        return _chain

    def anchor_mistaken_for_root():
        def prune(good, self, message):
            return good(self, message._replace(anchor=message.root))

        return prune

    def siblings_visible():
        def admit(good, self, *segment):
            return blind(good(self, *segment))

        return admit

    def single_rows_unmasked():  # ALGORITHM 8.1 (1): a segment of one row must not lose its mask
        def admit(good, self, *segment):
            admitted = good(self, *segment)
            return blind(admitted) if len(admitted.kept) == 1 else admitted

        return admit

    def tail_forgotten():  # committed rows that were not moved down yet
        def admit(good, self, *segment):
            admitted = good(self, *segment)
            return admitted._replace(behind=[[row for row in seen if row not in self.tail] for seen in admitted.behind])

        return admit

    def survivors_forgotten():
        def prune(good, self, message):
            gather = good(self, message)
            self.row = {i: r for i, r in self.row.items() if i == self.root}
            return gather

        return prune


@pytest.mark.parametrize("name", [n for n in vars(Mutants) if not n.startswith("_")])
def test_a_broken_stage_is_caught(name):
    stage = mutant(getattr(Mutants, name)())
    assert len(wrong((Case(seed, lost=0.2) for seed in range(60)), stage)) > 5


def test_eager_compaction_is_right_too():
    class Eager(ToyStage):
        def __init__(self):
            super().__init__()
            self.state.COMPACT = -1

    assert not wrong((Case(seed, lost=0.1) for seed in range(60)), Eager)


def test_a_scheduler_that_ignores_end_tokens_is_caught():
    cases = [c for c in map(Case, range(60)) if len(greedy(c.request)) < c.request.sampling.max_new_tokens]
    assert cases, "no case ends early"
    for case in cases:
        want = greedy(case.request)
        case.request = dataclasses.replace(case.request, eos=frozenset())
        assert World(case).run() != want
