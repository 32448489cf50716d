"""Random runs of the heart against plain decoding, and proof that the fuzz can fail."""

import dataclasses
import itertools
import os
import random
from collections import Counter

import pytest

from flowspec.core import dsi
from flowspec.core.messages import Batch
from flowspec.core.policies import ALL_METHODS, METHODS, SERVED
from flowspec.core.stage import Gather, StageState
from flowspec.models.cache import RowCache
from tests.core.world import Case, Stage, World, greedy

RUNS = int(os.environ.get("FLOWSPEC_FUZZ", 6))
"""worlds of each method and loss; more of them before a release"""
TIGHT = pytest.mark.parametrize("cache_step", [1], indirect=True, ids=["tight"])


def wrong(cases, stage=Stage, most: int | None = None) -> list[Case]:
    """The cases whose text is not plain decoding's, or that trip a check; no more than `most` are looked for."""
    return list(itertools.islice((case for case in cases if fails(case, stage)), most))


def fails(case: Case, stage: type[Stage]) -> bool:
    try:
        return World(case, stage).run() != greedy(case.request)
    except (AssertionError, KeyError, IndexError, ValueError, RuntimeError):
        return True


@TIGHT
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lost", [0.0, 0.05, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seeds", [range(4), pytest.param(range(4, RUNS), marks=pytest.mark.slow)])
def test_text_is_plain_decodings_under_any_delay_and_loss(method, lost, seeds, cache_step):
    bad = wrong(Case(seed, method, lost) for seed in seeds)
    assert not bad, f"{len(bad)} of {len(seeds)} runs are wrong, the first with {bad[0]}"


@TIGHT
@pytest.mark.parametrize("method", ["ar", "flowspec", *SERVED])
@pytest.mark.parametrize("lost", [0.0, 1.0])
@pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, RUNS // 2), marks=pytest.mark.slow)]
)
def test_the_text_is_the_same_over_several_servers(method, lost, seeds, cache_step, monkeypatch):
    cases = [Case(seed, method, lost, servers=n) for seed in seeds for n in (2, 3, 7)]
    bad = wrong(cases)
    monkeypatch.setattr(dsi, "BEHIND", 3)  # so that servers catch up all the time
    monkeypatch.setattr(dsi, "MOST", 5)
    bad += wrong(cases)
    assert not bad, f"{len(bad)} of {2 * len(cases)} runs are wrong, the first with {bad[0]}"


@TIGHT
@pytest.mark.parametrize("method", ALL_METHODS)
@pytest.mark.parametrize(
    "seeds", [range(2), pytest.param(range(2, RUNS // 2), marks=pytest.mark.slow)]
)
def test_servers_that_die_take_nothing_along(method, seeds, cache_step):
    """Unless the last one dies, too."""
    cases = [Case(s, method, 0.1, servers=n, die=n - 1) for s in seeds for n in (2, 3, 4)]
    bad = wrong(cases)
    assert not bad, f"{len(bad)} of {len(cases)} runs are wrong, the first with {bad[0]}"


def test_the_fuzz_of_several_servers_uses_them_gives_up_and_catches_up(monkeypatch):
    monkeypatch.setattr(dsi, "BEHIND", 8)
    sent, behind, given_up = Counter(), 0, 0
    forget = dsi._Copy._give_up

    def counted(copy, decoding) -> None:
        nonlocal given_up
        before = len(copy.out)
        forget(copy, decoding)
        given_up += before - len(copy.out)

    monkeypatch.setattr(dsi._Copy, "_give_up", counted)
    for seed in range(12):
        world = World(Case(seed, "dsi", 0.1, servers=3))
        perform, catch_up = world._perform, world.scheduler._servers.catch_up

        def noted(actions, now, perform=perform):
            sent.update(a.server for a in actions if isinstance(a, Batch))
            perform(actions, now)

        def caught(*facts, catch_up=catch_up):
            nonlocal behind
            batch = catch_up(*facts)
            behind += batch is not None
            return batch

        world._perform, world.scheduler._servers.catch_up = noted, caught
        assert world.run() == greedy(world.case.request), f"seed {seed}"
    assert min(sent[server] for server in range(3)) > 12 and behind > 2 and given_up > 12


@pytest.mark.slow
def test_the_fuzz_abandons_forwards(cache_step):
    worlds = [World(Case(seed, lost=0.1)) for seed in range(60)]
    assert all(world.run() == greedy(world.case.request) for world in worlds)
    assert sum(stage.abandoned for world in worlds for stage in world.stages) > 20


def company(seed: int) -> World:
    """Two to eight requests of mixed methods in one ring, some of which are given up."""
    r = random.Random(seed)
    cases = [
        Case(seed * 10 + k, r.choice(METHODS), lost=r.choice([0.0, 0.1]), number=k + 1)
        for k in range(r.randint(2, 8))
    ]
    cases[0].servers = r.choice([1, 1, 1, 2, 3])
    return World(cases[0], others=cases[1:])


@TIGHT
@pytest.mark.parametrize(
    "seeds", [range(5), pytest.param(range(5, 3 * RUNS), marks=pytest.mark.slow)]
)
def test_the_text_of_a_request_never_depends_on_who_else_is_there(seeds, cache_step):
    shared = 0
    for seed in seeds:
        world = company(seed)
        world.run()
        for asked in world.asked.values():
            text = greedy(asked.case.request)
            given_up = asked.reason == "cancelled"
            assert asked.out == (text[: len(asked.out)] if given_up else text), f"seed {seed}"
        assert not world.scheduler.decodings and not any(s.kept for s in world.stages)
        shared += sum(stage.shared for stage in world.stages)
    assert shared > 10 * len(seeds), "forwards over rows of several requests"


def mutant(method):
    """A stage whose StageState has one method replaced; `method(original, self, *args)`."""
    name = method.__name__
    state = type(
        "Mutant",
        (StageState,),
        {name: lambda self, *a: method(getattr(StageState, name), self, *a)},
    )
    return type("MutantStage", (Stage,), {"STATE": state, "COMPACT": 4})


def blind(admitted):
    """To all masks."""
    return admitted._replace(
        behind=[[*range(admitted.base, admitted.length)] for _ in admitted.kept]
    )


class Mutants:
    """Each breaks one rule of StageState."""

    def not_compacted():
        def prune(good, self, message):
            gather = good(self, message)
            return gather and Gather(
                gather.base, list(range(gather.base, gather.base + len(gather.rows)))
            )

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
            return admitted._replace(
                behind=[[row for row in seen if row not in self.tail] for seen in admitted.behind]
            )

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
    assert len(wrong((Case(seed, lost=0.2) for seed in range(60)), stage, 6)) == 6


class CacheMutants:
    """Each breaks one rule of RowCache."""

    def layers_grow_when_they_are_written():  # as they once did: an abandoned forward left later layers short
        def extend(self, rows):
            self.length += rows
            self.capacity = self.length + 1

        def update(self, keys, values, layer, *_):
            before = self.length - keys.shape[2]
            for buffers, new in ((self._keys, keys), (self._values, values)):
                if layer not in buffers or buffers[layer].shape[2] < self.length:
                    grown = new.new_zeros(1, 1, self.length + 1, new.shape[3])
                    if layer in buffers:
                        grown[:, :, :before] = buffers[layer][:, :, :before]
                    buffers[layer] = grown
                buffers[layer][:, :, before : self.length] = new
            return self._keys[layer][:, :, : self.length], self._values[layer][:, :, : self.length]

        return {"extend": extend, "update": update}

    def growing_forgets():
        def extend(self, rows):
            held = self.length
            good(self, rows)
            for buffer in self._keys.values() if rows > 1 else ():
                buffer[:, :, held - 1 : held] = 0

        good = RowCache.extend
        return {"extend": extend}

    def nothing_is_gathered():
        def gather(self, gather):
            self.length = gather.base + len(gather.rows)

        return {"gather": gather}

    def one_layer_is_gathered():
        def gather(self, gather):
            values, self._values = self._values, {}
            keys, self._keys = self._keys, {k: b for k, b in self._keys.items() if k == 0}
            good(self, gather)
            self._keys, self._values = keys, values

        good = RowCache.gather
        return {"gather": gather}

    def an_abandoned_forward_is_not_counted():
        def update(self, keys, values, layer, *_):
            out = good(self, keys, values, layer)
            self.length -= keys.shape[2] if layer == 0 else 0
            return out

        good = RowCache.update
        return {"update": update}


@TIGHT
@pytest.mark.parametrize("name", [n for n in vars(CacheMutants) if not n.startswith("_")])
def test_a_broken_cache_is_caught(name, cache_step, monkeypatch):
    for method, broken in getattr(CacheMutants, name)().items():
        monkeypatch.setattr(RowCache, method, broken)
    stage = type("Compacting", (Stage,), {"COMPACT": 4})
    assert wrong((Case(seed, lost=0.2) for seed in range(40)), stage, 1)


def test_eager_compaction_is_right_too():
    eager = type("Eager", (Stage,), {"COMPACT": -1})
    assert not wrong((Case(seed, lost=0.1) for seed in range(30)), eager)


def test_a_scheduler_that_ignores_end_tokens_is_caught():
    cases = [
        c
        for c in map(Case, range(60))
        if len(greedy(c.request)) < c.request.sampling.max_new_tokens
    ]
    assert cases, "no case ends early"
    for case in cases:
        want = greedy(case.request)
        case.request = dataclasses.replace(case.request, eos=frozenset())
        assert World(case).run() != want
