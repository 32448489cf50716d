"""Scheduler, books and cache together, in any order of events: hypothesis says which message arrives, is lost, or cuts into a forward next.

The worlds are the fuzz's (tests/core/world.py), but nothing in them happens by itself. Failures are printed as steps."""

from collections import defaultdict, deque

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from flowspec.core.curve import Curve
from flowspec.core.machine import Decided
from flowspec.core.messages import Cost, Idle, Prune, Started
from flowspec.core.policies import METHODS
from flowspec.core.stage import StageState
from flowspec.models.cache import RowCache
from tests.core.test_fuzz import CacheMutants
from tests.core.world import REQUEST, Case, Stage, World, greedy

BOUNDS = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
FAST = settings(max_examples=20, stateful_step_count=40, derandomize=True, **BOUNDS)
LONG = settings(max_examples=30, stateful_step_count=60, print_blob=True, **BOUNDS)
# sampled, since numbers that hypothesis draws by itself depend on the constants of all loaded modules
CASES = st.builds(Case, seed=st.sampled_from(range(2**32)), method=st.sampled_from(METHODS))
SECONDS = st.sampled_from(range(1, 3001)).map(lambda ms: ms / 1000)


class Still(World):
    """A world in which messages wait until they are told to arrive; each link keeps its order."""

    def __init__(self, case: Case, stage=Stage):
        super().__init__(case, stage)
        self.links: dict[str, deque] = defaultdict(deque)
        self.cuts = 0  # prunes that shall come in the midst of the forward at hand

    def _post(self, link, now, delay, event):
        self.links[link].append(event)

    def interrupted(self) -> bool:
        self.cuts -= 1
        return self.cuts >= 0

    def waiting(self) -> list[str]:
        return sorted(link for link, events in self.links.items() if events)


class RingMachine(RuleBasedStateMachine):
    stage = Stage

    def __init__(self):
        super().__init__()
        self.now, self.world = 0.0, None

    @initialize(case=CASES, step=st.sampled_from([1, 256]))
    def begin(self, case, step):
        self.step = step
        self._request(case)

    def _request(self, case: Case) -> None:
        self.world, self.want = Still(case, self.stage), greedy(case.request)
        self.world.begin(self.now)
        for stage in self.world.stages:
            cache = stage.kept[REQUEST].cached.cache
            cache.STEP, cache.SHARE = self.step, 0.0

    @property
    def going(self) -> bool:
        return self.world.reason is None

    def _arrives(self, link: str) -> None:
        self.world.happens(self.now, self.world.links[link].popleft())

    @precondition(lambda self: self.world.waiting())
    @rule(which=st.sampled_from(range(21)), after=SECONDS, cuts=st.sampled_from(range(3)))
    def something_arrives(self, which, after, cuts):
        links = self.world.waiting()
        self.now, self.world.cuts = self.now + after, cuts
        self._arrives(links[which % len(links)])

    @precondition(lambda self: self.world.waiting())
    @rule(after=SECONDS, cuts=st.sampled_from(range(3)))
    def everything_in_sight_arrives(self, after, cuts):
        for link in self.world.waiting():
            self.now, self.world.cuts = self.now + after, cuts
            self._arrives(link)

    @precondition(lambda self: any(self.world.prunes))
    @rule(which=st.sampled_from(range(6)))
    def a_prune_arrives(self, which):
        self.world._on_prune(self.now, which % len(self.world.stages))

    @precondition(lambda self: any(self.world.prunes))
    @rule(which=st.sampled_from(range(6)))
    def a_prune_is_lost(self, which):
        prunes = self.world.prunes[which % len(self.world.stages)]
        if prunes:
            prunes.popleft()

    @rule(which=st.sampled_from(range(6)))
    def an_old_prune_comes_again(self, which):
        stage = self.world.stages[which % len(self.world.stages)]
        books = stage.machine.books(REQUEST)
        if books:
            stage.perform(Decided(REQUEST, Prune(books.version, books.root, books.root)))

    @precondition(lambda self: self.world.links["control"])
    @rule()
    def news_is_lost(self):
        """But for a start: as long as it is not known, the next segment waits (core/ring.py)."""
        news = self.world.links["control"]
        if not isinstance(news[0][1], Started):
            news.popleft()

    @precondition(lambda self: self.going)
    @rule(
        stage=st.sampled_from(range(1, 7)),
        seconds=st.tuples(SECONDS, SECONDS, SECONDS),
        idle=st.booleans(),
    )
    def news_out_of_turn(self, stage, seconds, idle):
        base, slope, row = seconds
        cost = Cost(1 + stage % len(self.world.stages), Curve.line(base, slope), row)
        self.world.happens(self.now, ("news", Idle() if idle else cost))

    @precondition(lambda self: self.going)
    @rule(after=SECONDS)
    def time_passes(self, after):
        self.now += after
        self.world.happens(self.now, ("wake",))

    @rule(case=CASES)
    def the_request_is_cancelled_or_over_and_another_begins(self, case):
        self._request(case)

    @invariant()
    def the_text_is_plain_decodings_so_far(self):
        if self.world:
            assert self.world.out == self.want[: len(self.world.out)]

    @invariant()
    def the_books_are_right(self):
        for stage in self.world.stages if self.world else ():
            stage.validate()

    def teardown(self):
        """What is still on its way arrives, and the text is whole: nothing that was lost may keep the ring waiting."""
        if not self.world:
            return
        for _ in range(20_000):
            links = self.world.waiting()
            if not self.going:
                break
            assert links, "nobody will ever say anything again"
            for link in links:
                self.now += 0.5
                self._arrives(link)
        assert self.world.out == self.want


TestInAnyOrder = RingMachine.TestCase
TestInAnyOrder.settings = FAST


class LongMachine(RingMachine):
    pass


TestInAnyOrderAtLength = pytest.mark.slow(LongMachine.TestCase)
TestInAnyOrderAtLength.settings = LONG


# ---- proof that it can fail ------------------------------------------------------------------------
class Forgetful(StageState):
    def _chain(self, node):  # trusts that every earlier prune arrived
        return super()._chain(node)[-1:]


class Unsettled(StageState):
    def _settle(self):
        """Committed rows stay in the tail."""


class Uncounted(StageState):
    def prune(self, prune):
        gather = super().prune(prune)
        self.length += gather is not None  # one more than is moved
        return gather


@pytest.mark.parametrize("state", [Forgetful, Unsettled, Uncounted])
def test_broken_books_are_caught(state):
    stage = type("Broken", (Stage,), {"STATE": state, "COMPACT": 4})
    fails(type("Mutant", (RingMachine,), {"stage": stage}))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["layers_grow_when_they_are_written", "nothing_is_gathered"])
def test_a_broken_cache_is_caught(name, monkeypatch):
    for method, broken in getattr(CacheMutants, name)().items():
        monkeypatch.setattr(RowCache, method, broken)
    fails(type("Mutant", (RingMachine,), {"stage": type("Compacting", (Stage,), {"COMPACT": 4})}))


def fails(machine) -> None:
    with pytest.raises((AssertionError, KeyError, IndexError, RuntimeError)):
        run_state_machine_as_test(
            machine,
            settings=settings(
                FAST, max_examples=1000, phases=[Phase.generate], report_multiple_bugs=False
            ),
        )
