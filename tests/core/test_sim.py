"""The simulator: the text comes out, the times are what can be worked out by hand, recorded drafts survive a file."""

import dataclasses
import heapq
import itertools
import json

import numpy as np
import pytest
import torch

from flowspec.comm.shaped import wire_bytes
from flowspec.core.control import Controller, Findings
from flowspec.core.cost import Emulate
from flowspec.core.learnt import Learnt
from flowspec.core.machine import Begin, Decided
from flowspec.core.messages import (
    FRAME_BYTES,
    Batch,
    Commit,
    Drafted,
    DraftNode,
    Piece,
    Proposal,
    Prune,
    Segment,
)
from flowspec.core.policies import METHODS, make_policy
from flowspec.core.policies.continuous import Continuous
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.scheduler import Scheduler
from flowspec.core.topology import Topology
from flowspec.draft.recorded import (
    LiveDrafter,
    RecordedDrafter,
    SyntheticDrafter,
    Tape,
    load,
    made_up_text,
    save,
)
from flowspec.errors import UserError
from flowspec.runtime import wire
from flowspec.sim.lockstep import LockStep
from flowspec.sim.world import Job, RingSpec, World, _Live

BOARD = Emulate(stage_ms=50, token_ms=0.5, draft_ms=8, link_ms=1, link_mbps=150, hidden_scale=16)


def request(tokens: int = 40, prompt: int = 10, seed: int = 0, **sampling) -> Request:
    return Request(
        id=seed,
        prompt=tuple(range(100, 100 + prompt)),
        sampling=Sampling(max_new_tokens=tokens, seed=seed, **sampling),
    )


def simulate(
    method: str,
    wanted: Request,
    text: list[int],
    guesser,
    ring: RingSpec,
    tree: TreeConfig | None = None,
    switches: PolicyConfig = PolicyConfig(),  # noqa: B008
):
    tree = tree or TreeConfig()
    if method == "flowspec-paper":
        return LockStep(wanted, text, tree, guesser, ring).run()
    policy = make_policy(method, tree, switches, ring.topology)
    (out,) = World(ring, [Job(wanted, text, policy, guesser, switches)]).run()
    return out


@pytest.mark.parametrize("profile", [[1.0], [0.6, 0.2, 0.1], [0.0, 0.3], [1e-9]])
@pytest.mark.parametrize("stages", [1, 2, 5])
@pytest.mark.parametrize("method", [*METHODS, "flowspec-paper"])
def test_every_method_writes_the_text_whatever_is_drafted(method, stages, profile):
    wanted, text = request(), made_up_text(40)
    guesser = None if method == "ar" else SyntheticDrafter(wanted, text, profile)
    out = simulate(
        method, wanted, text, guesser, RingSpec(stages=stages, emulate=BOARD, hidden=256)
    )
    assert out.tokens == text
    assert all(s.begin <= s.end for s in out.spans)
    computed = [s for s in out.spans if s.rank and s.row == "compute" and s.name != "prefill"]
    for stage in range(1, stages + 1):  # a stage does one thing at a time
        own = sorted((s.begin, s.end) for s in computed if s.rank == stage)
        assert all(b[0] >= a[1] - 1e-9 for a, b in itertools.pairwise(own))
    assert sum(s.facts["accepted"] for s in computed if s.rank == stages) == len(text)


@pytest.mark.parametrize("method", [*METHODS, "flowspec-paper"])
def test_an_end_token_ends_it(method):
    wanted, text = dataclasses.replace(request(), eos=frozenset({7})), made_up_text(7)
    guesser = SyntheticDrafter(wanted, text, [0.8])
    assert (
        simulate(
            method, wanted, text, guesser, RingSpec(stages=3, emulate=BOARD, hidden=256)
        ).tokens
        == text
    )


def test_plain_decoding_takes_the_time_worked_out_by_hand():
    wanted, text = request(tokens=11), made_up_text(11)
    out = simulate("ar", wanted, text, None, RingSpec(stages=4, emulate=BOARD, hidden=256))
    row = 0.0505 + 0.001  # a stage over one row, and the latency of a hop
    wire_seconds = (
        (5 * FRAME_BYTES + 12 + 3 * (256 * 2 * 16 + 12) + 16) * 8 / 150e6
    )  # ids out, rows between stages, a choice back
    token = 4 * row + 0.001 + wire_seconds
    assert out.last_token - out.first_token == pytest.approx(10 * token)
    assert out.tokens_per_second == pytest.approx(1 / token)


class Liar:
    """Sure of six tokens after every node, all of them wrong."""

    features = False

    def propose(self, nodes):
        z = np.log([0.9] + [0.015] * 5)
        return Drafted.pack(
            [n.id for n in nodes],
            [Proposal(np.arange(6) + (1 << 30) + 10 * n.id, z) for n in nodes],
        )

    def commit(self, commit):
        pass


@pytest.mark.parametrize("row_ms", [0.5, 50, 200])
@pytest.mark.parametrize("stages", [1, 2, 4, 6])
@pytest.mark.parametrize("profile", [None, [5e-4], [0.3, 0.1], [0.8, 0.1]])
def test_speculation_is_never_slower_than_none(profile, stages, row_ms):
    """Whatever the drafter is worth (None: a liar), and though a row may cost as much as four forwards."""
    wanted, text = request(tokens=128), made_up_text(128)
    ring = RingSpec(stages=stages, emulate=dataclasses.replace(BOARD, token_ms=row_ms), hidden=256)
    plain = simulate("ar", wanted, text, None, ring)
    guesser = Liar() if profile is None else SyntheticDrafter(wanted, text, profile)
    assert (
        simulate("flowspec", wanted, text, guesser, ring).tokens_per_second
        > 0.97 * plain.tokens_per_second
    )


SHAPES = {
    "jump": lambda rows, context: 0.05 * (1 if rows == 1 else 1.3 + 0.01 * (rows - 2)),
    "high jump": lambda rows, context: 0.05 * (1 if rows == 1 else 1.6 + 0.01 * (rows - 2)),
    "dear rows": lambda rows, context: 0.05 * (1 + 0.12 * (rows - 1)),
    "tiles": lambda rows, context: 0.05 * (1 + 0.35 * ((rows - 1) // 8 + (rows > 1))),
    "deep": lambda rows, context: 0.02 + context * (5e-6 + 1e-6 * rows) + 0.002 * (rows - 1),
}
"""seconds of a forward, as real devices take them"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shaped(RingSpec):
    """Stages of such a shape. `slowed`: what a forward takes more that begins while the drafter is at work, on the same cores."""

    shape: str
    slowed: float = 1.0

    def seconds(self, stage, rows, context):
        return SHAPES[self.shape](rows, context)


class Shared(World):
    """Drafts take a share of the stages' cores."""

    def _next(self, now, stage):
        busy = now < self._drafter_free
        object.__setattr__(
            self.ring,
            "seconds",
            lambda s, n, c: SHAPES[self.ring.shape](n, c) * (self.ring.slowed if busy else 1.0),
        )
        super()._next(now, stage)


def against_plain(shape, stages, profile, tokens, slowed=1.0):
    """Tokens/s of flowspec over those of plain decoding, and its controller."""
    wanted, text = (
        dataclasses.replace(
            request(tokens=tokens), prompt=tuple(range(2000, 6000 if shape == "deep" else 2064))
        ),
        made_up_text(tokens),
    )
    rate = {}
    for method in ("ar", "flowspec"):
        ring = Shaped(
            stages=stages,
            emulate=Emulate(link_ms=0.3, draft_ms=8),
            hidden=256,
            shape=shape,
            slowed=slowed,
        )
        guesser = (
            None
            if method == "ar"
            else Liar()
            if profile is None
            else SyntheticDrafter(wanted, text, profile)
        )
        policy = make_policy(method, TreeConfig(), PolicyConfig(), Topology(stages))
        (out,) = Shared(ring, [Job(wanted, text, policy, guesser, PolicyConfig())]).run()
        rate[method] = out.tokens_per_second
    return rate["flowspec"] / rate["ar"], policy.control


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("tokens", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_speculation_is_never_slower_than_none_where_rows_cost_as_on_real_devices(
    shape, stages, tokens
):
    for profile, least in ((None, 0.97), ([5e-4], 0.97), ([0.3, 0.1], 0.97), ([0.85, 0.1], 1.25)):
        ratio, control = against_plain(shape, stages, profile, tokens)
        assert ratio >= least, f"{shape}, {stages} stages, {profile}"
        assert control._findings.rests == 0 or least < 1, "a good drafter was stopped"


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("profile", [[5e-4], [0.3, 0.1]])
def test_drafts_that_slow_the_stages_are_found_out_by_trial(stages, profile):
    """No measured cost tells: forwards look the same with speculation and without, as long as drafts run beside both."""
    ratio, control = against_plain("jump", stages, profile, 128, slowed=1.4)
    assert ratio >= 0.97 and control._findings.trials >= 1


def test_a_second_request_begins_with_what_the_first_has_learnt():
    wanted, text = request(tokens=64), made_up_text(64)
    ring = RingSpec(stages=2, emulate=dataclasses.replace(BOARD, token_ms=50), hidden=256)
    learnt, spent, forwarded, rows = Learnt(), [], [], []
    for _ in range(2):
        policy = make_policy("flowspec", TreeConfig(), switches := PolicyConfig(), ring.topology)
        rows.append(Controller(learnt.ring, ring.topology, None, Findings()).rows)
        (out,) = World(ring, [Job(wanted, text, policy, Liar(), switches)], learnt).run()
        spent.append(out.last_token - out.first_token)
        forwarded.append(out.forwarded)
    assert rows == [2, 96], (
        "the first segments of a run are short, those of a second request are not"
    )
    assert spent[1] < spent[0] and forwarded[1] < forwarded[0], (
        "the liar is not believed a second time"
    )
    plain = simulate("ar", wanted, text, None, ring)
    assert spent[1] < (plain.last_token - plain.first_token) / 0.98


def test_speculation_that_does_not_pay_is_turned_off_and_tried_again():
    """Without calibration nothing else stops it from sending what a liar is sure of."""
    wanted, text = request(tokens=200), made_up_text(200)
    ring = RingSpec(stages=2, emulate=dataclasses.replace(BOARD, token_ms=50), hidden=256)
    policy = make_policy(
        "flowspec", TreeConfig(), switches := PolicyConfig(calibrate=False), ring.topology
    )
    (out,) = World(ring, [Job(wanted, text, policy, Liar(), switches)]).run()
    assert out.tokens == text
    assert policy.control._findings.rests >= 1 and policy.ring.plain
    assert out.forwarded < 2 * len(text), "most of the text was decoded plainly"


def test_a_forward_is_abandoned_once_at_the_end_of_its_layer_whatever_prunes_follow():
    wanted, text = request(), made_up_text(40)
    ring = RingSpec(stages=1, emulate=Emulate(stage_ms=80), hidden=256)  # layers of 10 ms
    policy = make_policy("ar", TreeConfig(), PolicyConfig(), ring.topology)
    world = World(ring, [job := Job(wanted, text, policy, None, PolicyConfig())])
    [stage] = world._stages
    world._live[wanted.id] = _Live(job, Learnt(), features=False, servers=1)
    stage.machine.handle(Begin(wanted.id))
    for number, id in enumerate((0, 8)):
        batch = Batch((Piece(wanted.id, segment := Segment(number, (id,), (-1,), (1,))),))
        world._live[wanted.id].known.sent(0, segment)
        world._on_arrival(0.0, stage, (0.0, 0.0, batch))
    world._on_decided(0.011, stage, Decided(wanted.id, Prune(1, -1, 7)))
    world._on_decided(0.012, stage, Decided(wanted.id, Prune(2, -1, 8)))
    while world._events:
        now, _, happen, what = heapq.heappop(world._events)
        if happen == world._on_computed:
            happen(now, *what)
    computed = [(s.begin, s.end) for s in world._spans if s.row == "compute"]
    assert computed == [pytest.approx((0.0, 0.02)), pytest.approx((0.02, 0.1))]


def test_a_link_carries_one_message_at_a_time():
    link = RingSpec(stages=1, emulate=Emulate(link_ms=2, link_mbps=8), hidden=1).link(
        0
    )  # a byte a microsecond
    assert [link.arrival(1000, t) for t in (0.0, 0.0, 5.0)] == pytest.approx([0.003, 0.004, 5.003])


@pytest.mark.parametrize("accepted", [None, [], [4, 7]])
@pytest.mark.parametrize("verify_last", [True, False])
def test_the_simulated_bytes_are_those_of_the_real_messages(verify_last, accepted):
    ids, hidden, scale, features = (4, 5, 7), 6, 3.0, accepted is not None
    ring = RingSpec(
        stages=2,
        emulate=Emulate(hidden_scale=scale),
        hidden=hidden,
        verify_last=verify_last,
        features=features,
    )
    rows, positions = torch.zeros(3, hidden), torch.zeros(3, dtype=torch.int64)
    tokens = torch.zeros(3, dtype=torch.int32)
    if verify_last:
        text = list(ids[: len(accepted or ())])
        wanted = rows[: len(text)] if features else None
        zeros = [0] * len(text)
        answer = wire.choices([wire.Answer(1, 1, text, zeros, zeros, None, wanted)])
    else:
        answer = wire.features([wire.Answer(1, 1, list(ids), [], [], positions, rows)])
    batch = Batch((Piece(1, Segment(1, ids, ids, ids)),))
    real = [
        wire.batch(batch),
        wire.batch(batch, rows),
        answer,
    ]
    became_text = len(accepted or ())
    assert [wire_bytes(m, scale) for m in real] == [
        ring.hop_bytes(sender, 3, accepted=became_text) for sender in (0, 1, 2)
    ]
    prompt = [wire.prefill(1, tokens), wire.prefill(1, rows), wire.prompt_features(1, rows)]
    assert [wire_bytes(m, scale) for m in prompt] == [
        ring.hop_bytes(sender, 3, nodes=False) for sender in (0, 1, 2)
    ]


@pytest.mark.parametrize("method", ["serial", "naive", "pruned", "pipedec", "flowspec"])
@pytest.mark.parametrize("prompt", [1, 2, 200])
def test_every_row_of_prompt_and_text_comes_back_once_for_a_drafter_that_reads_features(
    method, prompt
):
    wanted, text = request(prompt=prompt), made_up_text(40)
    ring = RingSpec(stages=3, emulate=BOARD, hidden=256, features=True)
    out = simulate(method, wanted, text, SyntheticDrafter(wanted, text, [0.6, 0.2]), ring)
    assert out.tokens == text
    row = 256 * 2 * 16
    back = [s for s in out.spans if (s.rank, s.row) == (3, "send")]
    assert (
        sum(s.facts["bytes"] - FRAME_BYTES for s in back if "segment" not in s.facts)
        == (prompt - 1) * row
    )
    nodes = [s.facts["bytes"] - FRAME_BYTES for s in back if "segment" in s.facts]
    assert sum(size / (row + 16) for size in nodes) == pytest.approx(len(text))


@pytest.mark.parametrize("method", ["flowspec", "flowspec-paper"])
def test_the_first_draft_waits_for_the_features_of_the_prompt(method):
    wanted, text = request(), made_up_text(40)
    rings = [
        RingSpec(stages=2, emulate=BOARD, hidden=256, features=features)
        for features in (False, True)
    ]
    without, waiting = (
        simulate(method, wanted, text, SyntheticDrafter(wanted, text, [0.9]), ring)
        for ring in rings
    )
    first = [min(s.begin for s in out.spans if s.row == "draft") for out in (without, waiting)]
    stage, hop = 0.05 + 9 * 0.0005, (FRAME_BYTES + 9 * 256 * 2 * 16) * 8 / 150e6 + 0.001
    back = 0.001 + (FRAME_BYTES + 9 * 4) * 8 / 150e6 + 2 * (stage + hop)
    assert first == pytest.approx([0.008, back + 0.008])


def test_a_drafter_asked_live_gets_the_features_of_its_path_and_of_no_other_row():
    heard = []

    class Noting:
        features = True

        def begin(self, request, noise, features=None):
            heard.append(None if features is None else features.tolist())
            return self

        def propose(self, asks):
            return [Drafted.pack([n.id for n in nodes], [None for _ in nodes]) for _, nodes in asks]

        def commit(self, commit, features=None):
            heard.append(features.tolist())

    rows = torch.arange(14.0)
    for prompt in (1, 10):
        heard.clear()
        live = LiveDrafter(Noting(), request(prompt=prompt), None, rows[: prompt + 4])
        live.commit(Commit((0, 3), (1, 2), (True, False), 7))
        live.commit(Commit((7, 8, 9), (3, 4, 5), (True, True, False), 10))
        given = rows.tolist()
        assert heard == [
            given[: prompt - 1] or None,
            given[prompt - 1 : prompt + 1],
            given[prompt + 1 : prompt + 4],
        ]


def test_a_made_up_drafter_says_the_same_again():
    wanted, text = request(), made_up_text(40)
    drafter = SyntheticDrafter(wanted, text, [0.1, 0.1])
    root, wrong = DraftNode(0, -1, wanted.prompt[-1]), DraftNode(1, 0, 1 << 30)
    first = [drafter.propose([node]).tokens.tolist() for node in (root, wrong)]
    assert [drafter.propose([node]).tokens.tolist() for node in (root, wrong)] == first and first[
        0
    ] != first[1]


def test_a_list_of_stages_that_is_too_short_begins_again():
    mixed = Emulate(stage_ms=(50, 150), token_ms=(1.0, 3.0))
    assert [mixed.stage_seconds(stage, 10) for stage in (1, 2, 3)] == pytest.approx(
        [0.06, 0.18, 0.06]
    )


# ---- recorded drafts -------------------------------------------------------------------------------
class Counting:
    """A drafter that can be asked for any path, and remembers what it was asked for."""

    def __init__(self):
        self.asked = []

    def begin(self, request, noise):
        self.parents = {}
        return self

    def propose(self, asks):
        return [self._propose(nodes) for _, nodes in asks]

    def _propose(self, nodes):
        self.asked += [n.id for n in nodes]
        for n in nodes:
            assert n.parent in self.parents or n.parent == -1
            self.parents[n.id] = n.parent
        made = [
            Proposal(
                np.array([n.token + 1, 3]), np.log([0.7, 0.1]) + np.array([0.1, 1.0]), coupled=True
            )
            for n in nodes
        ]
        return Drafted.pack(
            [n.id for n in nodes],
            [None if n.token == 13 else p for n, p in zip(nodes, made, strict=True)],
        )

    def commit(self, commit):
        raise AssertionError("a recording commits nothing")


def test_a_tape_asks_once_for_each_path_and_plays_alone_after_a_file(tmp_path):
    wanted = request(temperature=1.0)
    tape, drafter = Tape(wanted, [1, 2]), Counting()
    root = DraftNode(0, -1, wanted.prompt[-1])
    first = RecordedDrafter(tape, drafter)
    assert first.propose([root]).tokens.tolist() == [[110, 3]]
    first.propose([DraftNode(1, 0, 110), DraftNode(2, 0, 13)])
    again = RecordedDrafter(tape, drafter)  # another run: other ids for the same paths
    answer = again.propose([root, DraftNode(5, 0, 13), DraftNode(9, 0, 110)])
    assert answer.nodes == (0, 9) and answer.tokens.tolist() == [[110, 3], [111, 3]]
    assert len(drafter.asked) == 3
    again.commit(Commit((0,), (55,), (False,), 20))  # a miss: the new root was never proposed
    assert again.propose([DraftNode(20, 0, 55)]).tokens.tolist() == [[56, 3]]
    save(tmp_path / "d.npz", [tape], "these models")
    (read,), source = load(tmp_path / "d.npz")
    assert source == "these models" and read.request == wanted and read.text == [1, 2]
    alone = RecordedDrafter(read)
    answer = alone.propose([root, DraftNode(2, 0, 13)])
    there = answer.proposal(0)
    assert answer.proposal(2) is None and alone.lacked == 0
    assert (
        there.tokens.tolist() == [110, 3]
        and there.coupled
        and there.coverage == pytest.approx(0.97)
    )
    assert there.z[:, 0] == pytest.approx(np.log([0.7, 0.1]) + np.array([0.1, 1.0]))
    assert alone.propose([DraftNode(3, 0, 77)]).nodes == () and alone.lacked == 1


def test_a_tape_of_several_drafters_survives_a_file_and_an_older_file_is_read(tmp_path):
    wanted = request(temperature=1.0)
    tape = Tape(wanted, [1, 2])
    tape.proposals = {
        0: Proposal(np.array([5, 6]), np.array([[-1.0, -2.0], [-3.0, -0.5]]), 0.75),
        tape.child(0, 5): None,
    }
    save(tmp_path / "d.npz", [tape, Tape(wanted, [])], "these models")
    (read, empty), _ = load(tmp_path / "d.npz")
    there = RecordedDrafter(read).propose([DraftNode(0, -1, wanted.prompt[-1])])
    assert (
        there.z.tolist() == [[[-1.0, -2.0], [-3.0, -0.5]]]
        and not there.coupled
        and read.proposals[1] is None
    )
    assert empty.proposals == {}
    with np.load(tmp_path / "d.npz") as arrays:
        old = dict(arrays)
    head = json.loads(bytes(old["head"])) | {"format": 1}
    del head["tapes"][0]["coupled"], head["tapes"][1:]
    one = old.pop("0.z")[:, 0]
    old |= {
        "head": np.frombuffer(json.dumps(head).encode(), np.uint8),
        "0.logq": one,
        "0.noise": one + 1,
    }
    np.savez(tmp_path / "old.npz", **old)
    (read,), _ = load(tmp_path / "old.npz")
    there = read.proposals[0]
    assert (
        there.coupled and there.tokens.tolist() == [5, 6] and there.z.tolist() == [[-1.0], [-5.0]]
    )


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive", None])
def test_a_file_that_holds_no_drafts_is_named(tmp_path, content):
    path = tmp_path / "d.npz"
    if content is None:
        np.savez(path, other=np.zeros(3))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"d\.npz"):
        load(path)


# ---- in company ------------------------------------------------------------------------------------
DEAR = Emulate(stage_ms=50, token_ms=10, link_ms=0.3, draft_ms=8)
"""five rows take twice what one does"""


def together(method: str, requests: int, profile, emulate: Emulate, stages: int) -> float:
    """Tokens/s of so many requests together, which come one after the other."""
    ring, jobs = RingSpec(stages=stages, emulate=emulate, hidden=2048), []
    for k in range(requests):
        wanted, text = dataclasses.replace(request(tokens=96), id=k + 1), made_up_text(96)
        guesser = None if method == "ar" else SyntheticDrafter(wanted, text, profile, seed=k)
        policy = make_policy(method, TreeConfig(), PolicyConfig(), ring.topology)
        jobs.append(Job(wanted, text, policy, guesser, PolicyConfig(), at=0.3 * k))
    outs = World(ring, jobs).run()
    assert all(out.tokens == job.text for out, job in zip(outs, jobs, strict=True))
    return requests * 96 / max(job.at + out.last_token for out, job in zip(outs, jobs, strict=True))


@pytest.mark.parametrize("emulate", [BOARD, DEAR], ids=["cheap rows", "dear rows"])
@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("requests", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_in_company_too_a_useless_drafter_costs_next_to_nothing(requests, stages, emulate):
    plain = together("ar", requests, None, emulate, stages)
    assert together("flowspec", requests, [1e-9], emulate, stages) >= 0.99 * plain


def test_many_requests_gain_from_riding_together_and_from_speculation():
    plain = {n: together("ar", n, None, BOARD, 4) for n in (1, 8)}
    assert plain[8] > 6 * plain[1], "batches of roots"
    assert together("flowspec", 8, [0.7, 0.15, 0.05], BOARD, 4) > 1.5 * plain[8]


def test_requests_that_fell_out_of_step_share_the_batches_equally():
    """Where rows are dear, a batch of five roots and one of eleven take as long as two of eleven."""
    assert together("flowspec", 8, [1e-9], DEAR, 2) > 0.99 * together("ar", 8, None, DEAR, 2)


GOOD = [0.7, 0.15, 0.05]


@pytest.mark.parametrize("stages", [1, 2, 4])
@pytest.mark.parametrize("requests", [3, pytest.param(16, marks=pytest.mark.slow)])
def test_in_company_speculation_is_no_loss_where_rows_are_dear(requests, stages):
    """A root that waits for a draft misses its batch; batches that differ leave stages idle. (What
    is left is the end: who is done early leaves smaller batches behind.)"""
    plain = together("ar", requests, None, DEAR, stages)
    assert together("flowspec", requests, GOOD, DEAR, stages) > 0.98 * plain


def test_batches_that_grow_slowly_keep_all_stages_of_one_request_busy(monkeypatch):
    grown = together("flowspec", 1, GOOD, DEAR, 4)
    monkeypatch.setattr(Scheduler, "_most", lambda self: self.ring.MOST)
    assert grown > 1.05 * together("flowspec", 1, GOOD, DEAR, 4)


@pytest.mark.parametrize("mutant", ["a root waits for a draft", "a batch has any length"])
def test_without_either_rule_of_company_speculation_loses(monkeypatch, mutant):
    if mutant == "a root waits for a draft":
        real = Continuous._worth_waiting
        monkeypatch.setattr(Continuous, "_worth_waiting", lambda self: _alone(self, real))
    else:
        monkeypatch.setattr(Scheduler, "_most", lambda self: self.ring.MOST)
    plain = together("ar", 12, None, DEAR, 3)
    assert together("flowspec", 12, [0.5, 0.2, 0.1], DEAR, 3) < 0.95 * plain


def _alone(policy, real) -> bool:
    requests, policy.ring.requests = policy.ring.requests, 1
    try:
        return real(policy)
    finally:
        policy.ring.requests = requests
