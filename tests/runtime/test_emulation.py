"""Emulated time to the microsecond, by a virtual clock: who is charged what. And proof that each check can fail.

In virtual time a forward of real layers takes nothing unless a hook says so; what passes is what the emulation charges."""

import inspect

import numpy as np
import pytest
import torch

from flowspec.comm import inproc, shaped
from flowspec.comm.base import Inbox, Message, Pulse
from flowspec.comm.shaped import ShapedTransport
from flowspec.core.cost import Emulate, Group
from flowspec.core.machine import StageMachine
from flowspec.core.messages import (
    FRAME_BYTES,
    Batch,
    Commit,
    Draft,
    Drafted,
    DraftNode,
    Piece,
    Proposal,
    Prune,
    Read,
    Segment,
)
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.topology import Topology
from flowspec.engine import Engine
from flowspec.models.manifest import Manifest
from flowspec.models.stage import ALWAYS, StageModel, load_stage
from flowspec.runtime import wire
from flowspec.runtime.drafting import DraftThread, Local
from flowspec.runtime.driver import Driver
from flowspec.runtime.tracing import SpanLog
from flowspec.runtime.worker import Worker
from tests.clock import VirtualClock

REQUEST = Request(id=1, prompt=(1, 2, 3), sampling=Sampling(seed=1))


def exactly(seconds):
    return pytest.approx(seconds, abs=1e-9)


TWO = Topology(2)


class Ring(inproc.InprocTransport):
    """A rank's end of a ring of three whose messages are only kept."""

    def __init__(self, rank: int, topology: Topology):
        inboxes = [Inbox(VirtualClock()) for _ in topology.ranks]
        super().__init__(rank, topology, inboxes, [Pulse() for _ in topology.ranks])
        self.sent = []

    def send_next(self, message):
        self.sent.append(message)

    def send_control(self, to, message):
        self.sent.append(message)

    def kinds(self) -> list[str]:
        """Of what was sent since the last time."""
        sent, self.sent = self.sent, []
        return [message.kind for message in sent]


class Stage:
    """Rank 1 or 2 of two, its time virtual, its model real; a layer takes `layer_ms` of that time."""

    def __init__(
        self,
        model: StageModel,
        rank: int = 1,
        layer_ms: float = 0.0,
        switches: PolicyConfig | None = None,
        topology: Topology = TWO,
        spread: bool = False,
        **emulate,
    ):
        self.model, self.layers, self.layer_ms = model, 0, layer_ms
        self.end = Ring(rank, topology)
        self.clock = self.end.inbox.clock
        self.worker = Worker(self.end, model, emulate=Emulate(**emulate))
        about = (REQUEST, True, False, (), switches or PolicyConfig())
        self.worker.take(wire.start(*about, spread=spread))

    @property
    def live(self):
        return self.worker._live[REQUEST.id]

    @property
    def state(self):
        return self.worker.machine.books(REQUEST.id)

    def prefill(self, rows: int) -> float:
        return self._took(wire.prefill(REQUEST.id, self._rows(rows)))

    def segment(self, ids, parents, meanwhile=()) -> float:
        """Seconds that it took; `meanwhile`: (seconds from its beginning, message beside the ring)."""
        for after, message in meanwhile:
            self.end.inbox.put((0, message), urgent=True, due=self.clock.now() + after)
        return self._took(
            wire.batch(
                Batch((Piece(REQUEST.id, Segment(1, tuple(ids), tuple(parents), tuple(ids))),)),
                self._rows(len(ids)),
            )
        )

    def _rows(self, n: int) -> torch.Tensor:
        return (
            torch.ones(n, dtype=torch.int32)
            if self.model.embed_tokens is not None
            else torch.ones(n, 48)
        )

    def _took(self, message) -> float:
        self.end.kinds()
        self.layers, begun = 0, self.clock.now()
        hooks = [layer.register_forward_hook(self._layer) for layer in self.model.layers]
        self.worker.take(message)
        for hook in hooks:
            hook.remove()
        return self.clock.now() - begun

    def _layer(self, *_) -> None:
        self.layers += 1
        self.clock.sleep(self.layer_ms / 1000)


# ---- what must hold --------------------------------------------------------------------------------
class Checks:
    """Each takes stage 1 of two, of three layers."""

    def rows_are_charged(model):
        for rank, base, slope in ((1, 0.010, 0.002), (2, 0.020, 0.003)):
            stage = Stage(model, rank, stage_ms=(10.0, 20.0), token_ms=(2.0, 3.0))
            took = [
                stage.prefill(7),
                stage.segment([0], [-1]),
                stage.segment([1, 2, 3, 4, 5], [0, 0, 1, 2, 2]),
            ]
            assert took == [exactly(base + n * slope) for n in (7, 1, 5)]
            took += [stage.segment([6, 7, 8], [1, 2, 99])]
            assert took[3] == exactly(base + 2 * slope), "a row that is not computed is not charged"
            assert stage.segment([10], [98]) == 0.0, "nor is a forward of none"
            assert stage.worker._spent.busy == exactly(sum(took)) and (
                stage.live.computed,
                stage.worker._spent.segments,
            ) == (8, 3)
            assert [s.end - s.begin for s in stage.live.log.spans if s.row == "compute"] == [
                *map(exactly, took)
            ]

    def computing_is_part_of_what_is_charged(model):
        for layer_ms, seconds in ((4.0, 0.023), (30.0, 0.090)):
            stage = Stage(model, layer_ms=layer_ms, stage_ms=20.0, token_ms=1.0)
            assert stage.prefill(3) == exactly(seconds) and stage.segment(
                [0, 1, 2], [-1, 0, 0]
            ) == exactly(seconds)

    def an_emulated_forward_ends_with_the_layer_in_which_its_rows_died(model):
        dies, off = wire.prunes([(REQUEST.id, Prune(1, 0, 50))]), PolicyConfig(abort=False)
        for after, seconds, kinds in (
            (0.033, 0.040, ["started", "idle"]),
            (0.079, 0.080, ["started", "idle"]),
            (0.081, 0.080, None),
        ):
            stage = Stage(model, stage_ms=78.0, token_ms=1.0)  # eight layers of 10 ms
            stage.segment([0], [-1])
            assert stage.segment([1, 2], [0, 0], [(after, dies)]) == exactly(seconds)
            assert stage.end.kinds() == (kinds or ["started", "cost", "batch"])
        stage = Stage(model, stage_ms=78.0, token_ms=1.0, switches=off)
        stage.segment([0], [-1])
        assert stage.segment([1, 2], [0, 0], [(0.033, dies)]) == exactly(0.080), "switched off"
        assert stage.segment([51, 52], [50, 50], [(0.033, wire.end(REQUEST.id))]) == 0.0, (
            "below a root that never came"
        )
        assert stage.segment([50, 51], [0, 50], [(0.033, wire.end(REQUEST.id))]) == exactly(
            0.040
        ), "the request is over"

    def a_forward_is_abandoned_between_two_layers(model):
        dies = wire.prunes([(REQUEST.id, Prune(1, 0, 50))])
        for after, layers in ((0.005, 1), (0.015, 2), (0.025, 3), (0.035, 3)):
            stage = Stage(model, layer_ms=10.0)
            stage.segment([0], [-1])
            assert (
                stage.segment([1, 2], [0, 0], [(after, dies)]) == exactly(layers * 0.010)
                and stage.layers == layers
            )
            assert ("idle" in stage.end.kinds()) == (layers < 3)
            assert stage.live.rows.cache.length == stage.state.length
        stage = Stage(model, layer_ms=10.0, switches=PolicyConfig(abort=False))
        stage.segment([0], [-1])
        assert (
            stage.segment([1, 2], [0, 0], [(0.005, dies)]) == exactly(0.030) and stage.layers == 3
        )

    def drafts_are_charged(model):
        for itself, seconds in ((0.0, 0.010), (0.004, 0.010), (0.025, 0.025)):
            inbox = Inbox(clock := VirtualClock())
            thread, log, begun = (
                DraftThread(Drafter(clock, itself), inbox, least=0.010),
                SpanLog(True, 1),
                clock.now(),
            )
            thread.begin(REQUEST, None, log)
            assert inbox.get() == Local(Read(REQUEST.id))
            for k in range(3):
                thread.draft(Draft(((REQUEST.id, (DraftNode(k, k - 1, 5),)),)))
                [(_, drafted)] = inbox.get().event.answers
                assert drafted.nodes == (k,) and inbox.since - begun == exactly((k + 2) * seconds)
                thread.commit(REQUEST.id, Commit((k,), (5,), (True,), k + 1), None)
            thread.close()
            assert clock.now() - begun == exactly(4 * seconds), "a commit is no forward"
            assert [span.end - span.begin for span in log.spans] == [exactly(seconds)] * 4

    def links_are_charged(model):
        clock = VirtualClock()
        first, second = inproc.ring(Topology(1), clock)
        end = ShapedTransport(
            first, Emulate(link_ms=20.0, link_mbps=8.0, hidden_scale=3.0)
        )  # 1000 bytes a millisecond
        begun, due = clock.now(), []
        for elements, numbers in ((1000, 0), (0, 0), (500, 1000)):
            end.send_next(
                Message(
                    "rows", {}, (torch.zeros(1, elements), torch.zeros(numbers, dtype=torch.uint8))
                )
            )
        end.send_control(1, Message("control"))
        for _ in range(4):
            due.append((second.inbox.get()[1].kind, clock.now() - begun))
            assert second.inbox.since == clock.now()
        frame = FRAME_BYTES / 1e6  # around each
        rows = [("rows", exactly(t)) for t in (0.026 + frame, 0.026 + 2 * frame, 0.030 + 3 * frame)]
        assert due == [("control", exactly(0.020 + frame)), *rows], (
            "one after the other, each link by itself"
        )

    def rank_0_wakes_when_it_is_time(model):
        end = Ring(0, TWO)
        driver = Driver(end, None, 320)
        begun = end.inbox.clock.now()
        driver._live[REQUEST.id], driver._wake_at = None, begun + 0.5
        assert driver._next() is None and end.inbox.clock.now() - begun == exactly(0.5)


class Drafter:
    """Takes so long for whatever is a forward."""

    features, layers = False, ()

    def __init__(self, clock: VirtualClock, seconds: float):
        self.clock, self.seconds = clock, seconds

    def begin(self, request, noise, features=None):
        self.clock.sleep(self.seconds)
        return self

    def propose(self, asks):
        self.clock.sleep(self.seconds)
        [(_, nodes)] = asks
        drafted = Drafted.pack(
            [n.id for n in nodes], [Proposal(np.array([5]), np.zeros(1)) for _ in nodes]
        )
        return [drafted]

    def commit(self, commit, features):
        pass


@pytest.fixture(scope="module")
def model(pair):
    return load_stage(Manifest.load(pair.split(2)), 1, torch.float32, "cpu")


def named(members) -> list[str]:
    return [name for name in vars(members) if not name.startswith("_")]


@pytest.mark.parametrize("spread", [False, True])
def test_a_leader_is_charged_for_what_its_members_exchange_and_tells_them_all(model, spread):
    """Two stages of two ranks; the followers are heard of only in what they are told."""
    about = dict(stage_ms=(10.0, 20.0), token_ms=(2.0, 3.0), link_ms=0.1, link_mbps=100)
    emulate, group = Emulate(**about, hidden_scale=8), Group(2, spread)
    for rank, stage in ((1, 1), (3, 2)):
        made = Stage(model, rank, topology=Topology(2, 2), spread=spread, **about, hidden_scale=8)
        took = [made.prefill(7), made.segment([0], [-1])]
        assert took == [exactly(emulate.group_seconds(stage, n, group, 48 * 2 * 8)) for n in (7, 1)]
        assert took[0] > emulate.stage_seconds(stage, 7)
        assert made.end.kinds().count("compute") == 1, "of the segment; the prompt came before"


@pytest.mark.parametrize("check", named(Checks))
def test_emulated_time(model, check):
    getattr(Checks, check)(model)


@pytest.fixture
def spans(pair):
    """What all ranks of a run with emulated times noted. By the real clock: nothing may be quicker than it is said to be.

    The times are far above the real ones of so small a model, on a busy machine too."""
    times = [
        "emulate={stage_ms: [10, 20], token_ms: 10, draft_ms: 40}",
        "policy.abort=false",
        "tree.budget=4",
        "sampling.max_new_tokens=5",
    ]
    with Engine.from_config(pair.config(2), times) as engine:
        engine.traced = True
        list(generation := engine.generate([5, 6, 7], method="serial"))
        return generation.spans


def quick(spans) -> list:
    """The forwards and drafts that took less than they should; each kind is there, and forwards of several rows."""
    least = {
        "draft": lambda span: 0.040,
        "compute": lambda span: 0.010 * (span.rank + span.facts.get("rows", 2)),
    }  # 2 of the prompt
    charged = [
        span for span in spans if span.row == "draft" or (span.row == "compute" and span.rank)
    ]
    assert {span.rank for span in charged} == {0, 1, 2} and max(
        span.facts.get("rows", 0) for span in charged
    ) > 1
    return [span for span in charged if span.end - span.begin < least[span.row](span) - 1e-6]


def test_a_run_is_charged_as_its_configuration_says(spans):
    assert not quick(spans)


# ---- proof that the checks can fail ----------------------------------------------------------------
class Mutants:
    """Each is (whose, method, the broken one; it is given the good one first), and what must notice it."""

    def drafts_are_free():
        return (
            DraftThread,
            "_at_least",
            lambda good, self, logs, work: (work(), 0.0),
            "drafts_are_charged",
        )

    def drafts_are_not_told_what_they_take():
        return (
            DraftThread,
            "__init__",
            lambda good, self, drafter, inbox, least=0.0: good(self, drafter, inbox),
            "drafts_are_charged",
        )

    def a_draft_takes_its_own_time_as_well():
        def _at_least(good, self, logs, work):
            result = work()
            return good(self, logs, lambda: result)

        return DraftThread, "_at_least", _at_least, "drafts_are_charged"

    def rows_are_free():
        return (
            Emulate,
            "stage_seconds",
            lambda good, self, stage, rows: good(self, stage, 0),
            "rows_are_charged",
        )

    def all_forwards_are_of_one_row():
        return (
            Worker,
            "_pretend",
            lambda good, self, begun, rows, spread: good(self, begun, 1, spread),
            "rows_are_charged",
        )

    def forwards_are_free():
        return Worker, "_pretend", lambda good, self, *about: True, "rows_are_charged"

    def all_stages_are_the_first():
        return (
            Emulate,
            "stage_seconds",
            lambda good, self, stage, rows: good(self, 1, rows),
            "rows_are_charged",
        )

    def computing_comes_on_top():
        def _pretend(good, self, begun, rows, spread):
            return good(self, self._clock.now(), rows, spread)

        return Worker, "_pretend", _pretend, "computing_is_part_of_what_is_charged"

    def all_is_needed():
        return (
            Worker,
            "_needed",
            lambda good, self: True,
            "a_forward_is_abandoned_between_two_layers",
        )

    def all_is_needed_of_what_is_emulated():
        check = "an_emulated_forward_ends_with_the_layer_in_which_its_rows_died"

        def _pretend(good, self, begun, rows, spread):
            self.machine.wanted, wanted = lambda: True, self.machine.wanted
            whole = good(self, begun, rows, spread)
            self.machine.wanted = wanted
            return whole

        return Worker, "_pretend", _pretend, check

    def all_that_lives_is_needed():
        check = "an_emulated_forward_ends_with_the_layer_in_which_its_rows_died"
        return Worker, "_needed", lambda good, self: self._hear_control() or True, check

    def layers_are_never_asked():
        def forward(good, self, *inputs, **more):
            given = inspect.signature(good).bind(self, *inputs, **more)
            given.arguments["needed"] = ALWAYS
            return good(*given.args, **given.kwargs)

        return StageModel, "forward", forward, "a_forward_is_abandoned_between_two_layers"

    def forwards_are_abandoned_though_that_is_off():
        def wanted(good, self):
            self._live[REQUEST.id].abort = True
            return good(self)

        return StageMachine, "wanted", wanted, "a_forward_is_abandoned_between_two_layers"

    def what_is_abandoned_ends_at_once():
        def _pretend(good, self, begun, rows, spread):
            self._clock.sleep, sleep = lambda seconds: None, self._clock.sleep
            whole = good(self, begun, rows, spread)
            self._clock.sleep = sleep
            return whole

        return (
            Worker,
            "_pretend",
            _pretend,
            "an_emulated_forward_ends_with_the_layer_in_which_its_rows_died",
        )

    def links_are_free():
        return shaped._Link, "due", lambda good, self, message: message, "links_are_charged"

    def bytes_are_free():
        return Emulate, "wire_seconds", lambda good, self, size: 0.0, "links_are_charged"

    def a_link_carries_all_at_once():
        def due(good, self, message):
            self._free_at = 0.0
            return good(self, message)

        return shaped._Link, "due", due, "links_are_charged"

    def nobody_wakes():
        def get(good, self, timeout=None):
            return good(self, timeout + 1.0 if timeout else timeout)

        return Inbox, "get", get, "rank_0_wakes_when_it_is_time"


def break_(monkeypatch, whose, method, broken) -> None:
    good = getattr(whose, method)
    monkeypatch.setattr(whose, method, lambda self, *a, **k: broken(good, self, *a, **k))


@pytest.mark.parametrize("mutant", named(Mutants))
def test_a_mutant_is_caught(model, monkeypatch, mutant):
    *broken, check = getattr(Mutants, mutant)()
    break_(monkeypatch, *broken)
    with pytest.raises(AssertionError):
        getattr(Checks, check)(model)


@pytest.mark.parametrize(
    "mutant",
    ["drafts_are_not_told_what_they_take", "all_forwards_are_of_one_row", "forwards_are_free"],
)
def test_a_mutant_is_caught_in_a_run(monkeypatch, request, mutant):
    break_(monkeypatch, *getattr(Mutants, mutant)()[:3])
    assert quick(request.getfixturevalue("spans"))


def test_a_forward_is_told_behind_the_context_that_it_had(model):
    """A prune in the midst of it may shorten the cache by more rows than the forward has."""
    stage = Stage(model, stage_ms=80.0)
    stage.prefill(3)
    stage.segment([*range(40)], [-1, *[0] * 39])
    dies = wire.prunes([(REQUEST.id, Prune(1, 0, 1))])
    stage.segment([*range(40, 80)], [1, *[2] * 39], [(0.033, dies)])
    assert stage.state.length == 6, "compacted"
    assert sorted(p.context for p in stage.worker.machine.meter.forward.points()) == [0, 23], (
        "40 rows behind 3 and behind 43"
    )
