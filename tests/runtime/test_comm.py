"""Messages arrive as they were sent, in order, whatever carries them: threads, processes over gloo, an emulated network.

A scenario is a function that every rank runs on its end of the ring. Threads run it in this process; for gloo, one
world of three processes (this file as a program) runs all scenarios after one another and writes down what it saw.
"""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from flowspec.comm import gloo, inproc
from flowspec.comm import heartbeat as beats
from flowspec.comm.base import DUE, STILL, Inbox, Message, Pulse
from flowspec.comm.codec import Limit, decode, encode, payload_size
from flowspec.comm.heartbeat import Heartbeat, is_rank_of_this_run
from flowspec.comm.shaped import Arrivals, ShapedTransport, shaped, wire_bytes
from flowspec.core.cost import Emulate
from flowspec.core.messages import (
    FRAME_BYTES,
    KEPT,
    PREFILL_ROWS,
    Batch,
    Commit,
    Drafted,
    DraftNode,
    Piece,
    Prune,
    Segment,
    Started,
)
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import MOST_BIASES, MOST_LOGPROBS, Request, Sampling
from flowspec.core.topology import Topology
from flowspec.errors import RankLost, UserError
from flowspec.runtime import process, waiting, wire
from flowspec.runtime.process import check_world
from flowspec.sampling import Logprobs

ROOT = Path(__file__).resolve().parent.parent.parent
WORLD = 3
PATIENCE = 60.0
"""seconds: a guard against hanging, no measure of anything"""
NETWORK = Emulate(link_ms=2.0, link_mbps=1000.0, hidden_scale=2.0)
DTYPES = [
    getattr(torch, name)
    for name in (
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "bfloat16",
        "float32",
        "float64",
    )
]
SHAPES = [(), (0,), (0, 8), (8, 0), (1,), (3, 5), (2, 3, 7)]


KINDS = ("any", "number", "big", "all", "nothing", "answer", "question", "data", "control", "later")
LIMITS = dict.fromkeys(KINDS, Limit(1 << 16, 1 << 23))


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ---- frames ----------------------------------------------------------------------------------------
def there_and_back(*tensors: torch.Tensor, **meta) -> Message:
    header, payload = encode(Message("any", meta, tensors))
    assert payload_size(header, LIMITS) == len(payload)
    return decode(header, payload, LIMITS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_survives_its_frame(dtype):
    sent = [tensor(dtype, shape) for shape in SHAPES]
    got = there_and_back(*sent).tensors
    assert [same(a, b) for a, b in zip(got, sent, strict=True)] == [True] * len(sent)


def test_a_tensor_need_not_be_contiguous():
    rows = tensor(torch.bfloat16, (6, 10))
    sent = [rows.T, rows[::2, 1::3], rows[:, 4], rows[0, 0].expand(4, 5)]
    got = there_and_back(*sent).tensors
    assert [same(a, b) for a, b in zip(got, sent, strict=True)] == [True] * len(sent)


def test_facts_travel_beside_tensors_and_without_them():
    facts = {
        "request": 7,
        "name": "é語",
        "share": 0.1,
        "none": None,
        "list": [1, [2]],
        "big": 2**63,
    }
    for tensors in [(), (tensor(torch.int8, (3,)), tensor(torch.float64, (2,)))]:
        got = there_and_back(*tensors, **facts)
        assert (got.kind, got.meta, len(got.tensors)) == ("any", facts, len(tensors))


@pytest.mark.parametrize(
    "header",
    [
        [0, 0],
        [-8, 4],
        [16, 0],
        [16, -1],
        [16, 24],
        [1 << 60, 8],
        [0x7B22_6B69_6E64_223A, 32],
        [20, 18],
    ],
)
def test_a_header_of_garbage_is_refused(header):
    with pytest.raises(ValueError, match="not a flowspec frame"):
        payload_size(torch.tensor(header), LIMITS)


def test_no_frame_is_longer_than_its_kind_can_be():
    limits = {"small": Limit(200, 0), "rows": Limit(200, 800)}
    for message, refused in [
        (Message("rows", {}, (torch.zeros(100),)), None),
        (Message("rows", {}, (torch.zeros(200, dtype=torch.float64),)), "not a flowspec frame"),
        (Message("small", {}, (torch.zeros(2),)), "a small message of .* 200 \\+ 0 is the most"),
        (Message("small", {"text": "x" * 200}), "not a flowspec frame"),
        (Message("rows", {}, (torch.zeros(0),)), None),
        (Message("other"), "unknown kind 'other'"),
    ]:
        header, payload = encode(message)
        if refused is None:
            assert (
                decode(header, payload[: payload_size(header, limits)], limits).kind == message.kind
            )
        else:
            with pytest.raises(ValueError, match=refused):
                payload_size(header, limits)
                decode(header, payload, limits)


def frame(about: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Its facts are what is given (text as it is), behind them 16 bytes of tensors."""
    text = about.encode() if isinstance(about, str) else json.dumps(about).encode()
    payload = torch.zeros(-(-len(text) // 8) * 8 + 16, dtype=torch.uint8)
    payload[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return torch.tensor([len(payload), len(text)]), payload


GOOD = {"version": 1, "kind": "any", "meta": {}, "tensors": [["float32", [2, 2]]]}


def test_the_frame_that_is_made_worse_is_good():
    assert decode(*frame(GOOD), LIMITS).tensors[0].shape == (2, 2)


@pytest.mark.parametrize(
    "about",
    [
        "null", "7", "[]", '"any"', "{}", "[" * 3000, "\xff", '{"version": 1, "kind": "any", "meta": {"a": NaN}, "tensors": []}',
        {**GOOD, "kind": None}, {**GOOD, "kind": ["any"]}, {**GOOD, "kind": "__init__"}, {**GOOD, "meta": []}, {**GOOD, "tensors": {}},
        {**GOOD, "version": "1"}, {**GOOD, "version": [1]},
        *({**GOOD, "tensors": tensors} for tensors in (
            [], [7], [[]], ["float32"], [["float32"]], [["float", [2, 2]]], [[["float32"], [2, 2]]], [["float32", 4]], [["float32", "4"]],
            [["float32", [2, 2, 1.0]]], [["float32", [-2, -2]]], [["float32", [2, True, 2]]], [["float32", [2, 3]]], [["float32", [1]]],
            [["float32", [0, 1 << 62]]], [["float32", [1 << 62, 1 << 62]]], [["float32", [2, 2]]] * 2, [["float32", [1] * 70]],
            [["float32", [2, 2]], ["float64", [1 << 50]]],
        )),
    ],
    ids=str,
)  # fmt: skip
def test_facts_that_no_encoder_writes_are_refused(about):
    with pytest.raises(ValueError):
        decode(*frame(about), LIMITS)


def test_a_frame_with_bytes_changed_is_refused_or_a_message_and_nothing_else():
    """Never another error, and never more memory than the frame has."""
    seed = time.time_ns()
    print("seed", seed)
    rng = random.Random(seed)
    good = Message(
        "any",
        {"request": 3, "sent": 0.25, "list": [1, [2]]},
        (tensor(torch.int32, (2, 3)), tensor(torch.bfloat16, (3, 5))),
    )
    clean = [part.numpy().tobytes() for part in encode(good)]
    telling = b'0123456789[]{}",:-eE.tfn\\u\xff\x00 '
    refused = 0
    for _ in range(3000):
        header, payload = (bytearray(part) for part in clean)
        for _ in range(rng.choice([1, 1, 2, 8])):
            where = header if rng.random() < 0.05 else payload
            where[rng.randrange(len(where))] = (
                rng.choice(telling) if rng.random() < 0.7 else rng.randrange(256)
            )
        try:
            size = payload_size(frame_header := torch.frombuffer(header, dtype=torch.int64), LIMITS)
            payload = (payload + bytes(size))[:size] if size != len(payload) else payload
            message = decode(frame_header, torch.frombuffer(payload, dtype=torch.uint8), LIMITS)
        except ValueError:
            refused += 1
        else:
            assert message.kind in LIMITS and sum(t.nbytes for t in message.tensors) <= len(payload)
    assert 0 < refused < 3000


TWO = [Logprobs(-1.5, ((6, -1.5), (9, -2.25))), Logprobs(-3.0, ((9, -0.25), (2, -3.0)))]


def one(segment: Segment) -> Batch:
    return Batch((Piece(1, segment),))


def test_segments_of_several_requests_are_read_as_they_were_sent():
    batch = Batch(
        (Piece(3, Segment(7, (0, 1), (-1, 0), (5, 6))), Piece(9, Segment(8, (4,), (2,), (7,))))
    )
    rows = torch.arange(6.0).view(3, 2)
    assert wire.read_batch(wire.batch(batch)) == wire.read_batch(wire.batch(batch, rows)) == batch
    told = [
        wire.Answer(3, 7, [0, 1], [6, 2], [0.5, 0.25], None, rows[:2]),
        wire.Answer(4, 8, [], [], [], None, None),
        wire.Answer(9, 9, [4], [8], [1.0], None, rows[2:]),
        wire.Answer(2, 9, [5], [3], [1.0], None, None, [Logprobs(-0.5)]),
        wire.Answer(5, 9, [2, 3], [6, 2], [0.5, 0.25], None, None, TWO),
        wire.Answer(6, 9, [], [], [], None, None),
    ]
    for said, heard in zip(told, wire.read_answers(wire.choices(told)), strict=True):
        assert said[:5] == heard[:5] and heard.positions is None
        assert [*said.logprobs] == heard.logprobs
        assert heard.rows is None if said.rows is None else heard.rows.equal(said.rows)
    told = [
        answer._replace(
            tokens=[],
            gaps=[],
            positions=torch.arange(len(answer.ids)),
            rows=rows[: len(answer.ids)],
        )
        for answer in told
    ]
    for said, heard in zip(told, wire.read_answers(wire.features(told)), strict=True):
        assert (
            said[:5] == heard[:5]
            and heard.positions.equal(said.positions)
            and heard.rows.equal(said.rows)
        )


def proposed(ids, k=KEPT) -> Drafted:
    z = np.random.default_rng(1).normal(size=(len(ids), k, 1))
    tokens = np.arange(len(ids) * k).reshape(len(ids), k)
    return Drafted(tuple(ids), tokens, z, True, np.full(len(ids), 0.5))


def test_what_rank_0_and_its_drafters_tell_each_other_arrives():
    request = Request(id=3, prompt=(4, 5), sampling=Sampling(temperature=0.7, seed=9), known=1)
    assert wire.read_take_on(sent(wire.take_on(request, True))) == (request, True)
    asked = {3: [DraftNode(7, 6, 5)], 4: [DraftNode(1, 0, 2), DraftNode(2, 1, 3)]}
    assert wire.read_ask(sent(wire.ask(asked))) == asked
    told = {3: proposed([7]), 4: proposed([]), 5: proposed([1, 2], 3), 6: Drafted.pack((), ())}
    heard = wire.read_drafted(sent(wire.drafted(told)))
    assert heard.keys() == told.keys()
    for said, got in zip(told.values(), heard.values(), strict=True):
        assert said.nodes == got.nodes and said.coupled == got.coupled
        for name in ("tokens", "z", "coverage"):
            np.testing.assert_array_equal(getattr(said, name), getattr(got, name))
    commit = Commit((3, 4), (8, 9), (True, False), 6)
    assert wire.read_text(sent(wire.text(3, commit))) == (3, commit)


def sent(message: Message) -> Message:
    header, payload = encode(message)
    return decode(header, payload, wire.limits(200, 64, 4, 1000))


def test_all_that_a_ring_says_is_within_the_limits_of_its_kind():
    tree, hidden, layers = 200, 64, 4
    limits = wire.limits(tree, hidden, layers, 1000)
    ids, rows = list(range(tree)), torch.zeros(tree, hidden, dtype=torch.float64)
    biases = {2**31 - k: 1 / 3 for k in range(MOST_BIASES)}
    request = Request(id=1, prompt=(1, 2), sampling=Sampling(seed=2**64 - 1, logit_bias=biases))
    much = dataclasses.replace(request, prompt=(2**31 - 1,) * 1000)
    told = [Logprobs(-1 / 3, ((2**31 - 1, -1 / 3),) * MOST_LOGPROBS)] * tree
    said = [
        wire.start(request, True, True, range(layers), PolicyConfig()),
        wire.start(much, True, True, range(layers), PolicyConfig(), past=True),
        wire.prefill(1, torch.zeros(PREFILL_ROWS, hidden, dtype=torch.float64)),
        wire.prompt_features(1, rows),
        wire.batch(one(Segment(9, tuple(ids), tuple(ids), tuple(ids))), rows),
        wire.features([wire.Answer(1, 9, ids, [], [], torch.arange(tree), rows)]),
        wire.choices([wire.Answer(1, 9, ids, ids, [0.5] * tree, None, rows, told)]),
        wire.text_features(1, range(layers), 0, rows.repeat(1, layers)),
        wire.report(1, wire.Report(0.0, 0, 0, 0.0, [], 0.0, 0.0, [])),
        wire.pong(wire.ping(1)),
        wire.loaded(1.0, 2.0, "layers 0 to 3", 10**9),
        wire.take_on(dataclasses.replace(request, prompt=(9,) * 1000), True),
        wire.ask({k: [DraftNode(i, i, i) for i in ids] for k in range(wire.TOGETHER)}),
        wire.drafted(dict.fromkeys(range(wire.TOGETHER), proposed(ids))),
        wire.text(1, Commit((2**31,) * tree, (2**31,) * tree, (False,) * tree, 2**31)),
        wire.STOP,
    ]
    for message in said:
        header, payload = encode(message)
        assert payload_size(header, limits) == len(payload)
        assert decode(header, payload, limits).meta.keys() == message.meta.keys()
    largest = sum(max(numbers) for numbers in zip(*limits.values(), strict=True))
    assert largest < 64e6, "what a peer of this small run can make us allocate"


def from_the_future(message: Message) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame that a version 9 would write."""
    header, payload = encode(message)
    text = payload.numpy().tobytes().replace(b'"version": 1', b'"version": 9', 1)
    return header, torch.frombuffer(bytearray(text), dtype=torch.uint8)


def test_a_frame_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version 9"):
        decode(*from_the_future(Message("any")), LIMITS)


def test_a_payload_of_garbage_is_refused():
    with pytest.raises(ValueError):
        decode(torch.tensor([64, 40]), torch.full((64,), 200, dtype=torch.uint8), LIMITS)


# ---- the inbox -------------------------------------------------------------------------------------
def test_urgent_items_leave_the_inbox_first_and_each_kind_in_order():
    inbox = Inbox()
    for item, urgent in [("a", False), ("X", True), ("b", False), ("Y", True), ("Z", True)]:
        inbox.put(item, urgent)
    assert inbox.get_urgent() == "X"
    assert [inbox.get(0.0) for _ in range(5)] == ["Y", "Z", "a", "b", None]
    assert inbox.get_urgent() is None


def test_an_inbox_that_waits_wakes_for_an_item_and_for_a_failure():
    for wake, expected in [
        (lambda box: box.put("a"), "a"),
        (lambda box: box.fail(OSError("gone")), "gone"),
    ]:
        inbox, got = Inbox(), []

        def wait(inbox=inbox, got=got):
            try:
                got.append(inbox.get(PATIENCE))
            except OSError as error:
                got.append(str(error))

        waiter = threading.Thread(target=wait)
        waiter.start()
        wake(inbox)
        waiter.join(PATIENCE)
        assert got == [expected]


def test_a_failed_inbox_raises_its_first_failure_for_ever():
    inbox = Inbox()
    inbox.put("a")
    inbox.fail(ValueError("first"))
    inbox.fail(ValueError("second"))
    for _ in range(2):
        with pytest.raises(ValueError, match="first"):
            inbox.get(0.0)


# ---- scenarios: what every rank does, and what it saw ----------------------------------------------
def receive(t, count: int) -> list[tuple[int, Message]]:
    items = [t.inbox.get(PATIENCE) for _ in range(count)]
    assert None not in items, "a message did not arrive"
    return items


def in_order(t) -> list:
    for n in range(100):
        t.send_next(Message("number", {"n": n}, (torch.tensor([n] * (n % 3)),)))
    return [[source, m.meta["n"], m.tensors[0].tolist()] for source, m in receive(t, 100)]


def big(t) -> list:
    t.send_next(
        Message(
            "big",
            {},
            (
                tensor(torch.int64, (700_000,), seed=t.rank),
                tensor(torch.float32, (300, 1000), seed=t.rank),
            ),
        )
    )
    [(source, m)] = receive(t, 1)
    return [
        same(m.tensors[0], tensor(torch.int64, (700_000,), source)),
        same(m.tensors[1], tensor(torch.float32, (300, 1000), source)),
    ]


def around_the_first_send(t) -> list:
    """Messages that just fit into one send, and such that need a second one, in turn."""
    sizes = [size + (k % 2) * 70_000 for k, size in enumerate(range(65_200, 65_560, 8))]
    for size in sizes:
        t.send_next(Message("any", {}, (tensor(torch.uint8, (size,), seed=size),)))
    return [
        same(m.tensors[0], tensor(torch.uint8, (size,), seed=size))
        for size, (_, m) in zip(sizes, receive(t, len(sizes)), strict=True)
    ]


def every_tensor(t) -> list:
    sent = [tensor(dtype, shape) for dtype in DTYPES for shape in SHAPES]
    t.send_next(Message("all", {}, tuple(sent)))
    t.send_next(Message("nothing", {"of": "tensors"}))
    (_, everything), (_, nothing) = receive(t, 2)
    return [
        [same(a, b) for a, b in zip(everything.tensors, sent, strict=True)],
        nothing.kind,
        nothing.meta,
        list(nothing.tensors),
    ]


def control_and_back(t) -> list:
    if t.rank:
        [(source, m)] = receive(t, 1)
        t.send_control(0, Message("answer", {"to": m.meta["question"], "by": t.rank}, m.tensors))
        return [source, m.kind]
    for rank in t.topology.stage_ranks:
        t.send_control(rank, Message("question", {"question": rank * 11}, (torch.arange(rank),)))
    return sorted(
        [source, m.meta["to"], m.meta["by"], m.tensors[0].tolist()]
        for source, m in receive(t, t.topology.stages)
    )


def overtaken(t) -> list:
    """Rank 1 hears the control message though data that was sent before it lies unread."""
    if t.rank == 0:
        for n in range(3):
            t.send_next(Message("data", {"n": n}))
        t.send_control(1, Message("control"))
    if t.rank != 1:
        return []
    deadline, heard = time.monotonic() + PATIENCE, None
    while heard is None and time.monotonic() < deadline:
        heard = t.inbox.get_urgent()
        time.sleep(0.002)
    return [heard and heard[1].kind] + [m.meta["n"] for _, m in receive(t, 3)]


SCENARIOS = {
    f.__name__: f
    for f in (in_order, big, around_the_first_send, every_tensor, control_and_back, overtaken)
}


def over_threads(scenario: str, emulate: Emulate | None) -> list:
    before = set(threading.enumerate())
    ends: list = list(inproc.ring(Topology.of_world(WORLD)))
    ends = [ShapedTransport(end, emulate) for end in ends] if emulate else ends
    seen: list = [None] * WORLD

    def rank(end):
        seen[end.rank] = SCENARIOS[scenario](end)

    ranks = [threading.Thread(target=rank, args=(end,)) for end in ends]
    for step in (threading.Thread.start, threading.Thread.join):
        for thread in ranks:
            step(thread)
    for end in [*ends, *ends]:  # twice: closing again is nothing
        end.close()
    assert set(threading.enumerate()) <= before
    return json.loads(json.dumps(seen))


@pytest.fixture(scope="module")
def gloo_world(tmp_path_factory):
    """What each rank of a world of processes wrote down."""
    folder = tmp_path_factory.mktemp("gloo")
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")} | {
        "OMP_NUM_THREADS": "1"
    }
    words = [sys.executable, "-m", "tests.runtime.test_comm", str(folder)]
    ranks = [subprocess.Popen([*words, str(rank)], cwd=ROOT, env=env) for rank in range(WORLD)]
    try:
        codes = [rank.wait(timeout=180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert codes == [0] * WORLD
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@pytest.fixture(params=["threads", "emulated", "gloo"])
def seen(request):
    """`seen(scenario)`: what each rank saw."""
    if request.param == "gloo":
        world = request.getfixturevalue("gloo_world")
        return lambda scenario: [rank["seen"][scenario] for rank in world]
    return lambda scenario: over_threads(scenario, NETWORK if request.param == "emulated" else None)


def test_each_link_of_the_ring_keeps_its_order(seen):
    for rank, numbers in enumerate(seen("in_order")):
        assert numbers == [[(rank - 1) % WORLD, n, [n] * (n % 3)] for n in range(100)]


def test_a_message_of_megabytes_arrives_as_it_was(seen):
    assert seen("big") == [[True, True]] * WORLD
    assert seen("around_the_first_send") == [[True] * 45] * WORLD


def test_every_dtype_and_shape_arrives_as_it_was_and_so_does_a_message_of_no_tensors(seen):
    assert (
        seen("every_tensor")
        == [[[True] * len(DTYPES) * len(SHAPES), "nothing", {"of": "tensors"}, []]] * WORLD
    )


def test_control_reaches_each_stage_and_comes_back(seen):
    first, *stages = seen("control_and_back")
    assert first == [[rank, rank * 11, rank, list(range(rank))] for rank in range(1, WORLD)]
    assert stages == [[0, "question"]] * (WORLD - 1)


def test_control_is_heard_before_data_that_lies_unread(seen):
    assert seen("overtaken") == [[], ["control", 0, 1, 2], []]


def test_a_world_over_gloo_ends_without_losing_anyone_or_keeping_a_thread(gloo_world):
    assert [(rank["lost"], rank["threads"]) for rank in gloo_world] == [([], [])] * WORLD


def test_a_peer_of_another_version_is_lost_by_name_and_not_silently(gloo_world):
    assert gloo_world[2]["future"] == [
        [
            1,
            "its message was refused: a peer speaks version 9 of the wire format, this is version 1",
        ]
    ]


def test_whatever_goes_wrong_in_a_receiving_thread_is_told_by_name(gloo_world):
    assert gloo_world[1]["odd"] == [
        [0, "its message could not be read: KeyError: 'nobody expected this'"]
    ]


# ---- an emulated network ---------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_hidden_rows_weigh_two_bytes_an_element_times_the_scale_and_numbers_as_they_are(scale):
    ids = tensor(torch.int32, (2, 5))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert (
            wire_bytes(Message("rows", {}, (ids, tensor(dtype, (5, 48)))), scale)
            == FRAME_BYTES + 2 * 5 * 4 + 5 * 48 * 2 * scale
        )
    assert wire_bytes(Message("none"), scale) == FRAME_BYTES


def test_a_frame_weighs_about_what_is_sent_beside_the_tensors():
    """A cost is longer, with its curve, but comes every few forwards only."""
    ids = list(range(1000, 1016))
    segment = Segment(77, tuple(ids), tuple(ids), tuple(ids))
    tokens, rows = torch.zeros(16, dtype=torch.int32), torch.zeros(16, 64)
    for message in (
        wire.prunes([(1, Prune(57, 990, 1005))]),
        wire.batch(one(segment)),
        wire.batch(one(segment), rows),
        wire.choices([wire.Answer(1, 77, ids, ids, [0.5] * 16, None, None)]),
        wire.news(Started(77, 16, 0.0123456789, 0.0)),
        wire.prefill(1, tokens),
    ):
        header, payload = encode(message)
        beside = header.nbytes + payload.nbytes - sum(t.nbytes for t in message.tensors)
        assert abs(beside - FRAME_BYTES) <= 50, (message.kind, beside)


def test_only_a_network_that_is_emulated_is_shaped():
    end, _ = inproc.ring(Topology(1))
    assert shaped(end, Emulate(stage_ms=5.0)) is end
    wrapped = shaped(end, Emulate(link_ms=0.1))
    assert isinstance(wrapped, ShapedTransport)
    wrapped.close()


def test_no_message_arrives_before_its_time_nor_out_of_order():
    emulate = Emulate(link_ms=20.0, link_mbps=8.0, hidden_scale=3.0)  # 1000 bytes a millisecond
    first, second = inproc.ring(Topology(1))
    end = ShapedTransport(first, emulate)
    sizes = [10_000, 0, 4_000, 20_000]
    begun = time.monotonic()
    for n, size in enumerate(sizes):
        end.send_next(
            Message(
                "rows",
                {"n": n},
                (
                    torch.zeros(1, size // 6, dtype=torch.float32),
                    torch.zeros(size % 6, dtype=torch.uint8),
                ),
            )
        )
    end.send_control(1, Message("control"))
    due = {"control": 0.020} | {n: 0.020 + sum(sizes[: n + 1]) / 1e6 for n in range(len(sizes))}
    got = []
    for _ in range(len(sizes) + 1):
        _, message = second.inbox.get(PATIENCE)
        name = message.meta.get("n", message.kind)
        assert time.monotonic() - begun >= due[name]
        got.append(name)
    end.close()
    assert [name for name in got if name != "control"] == [0, 1, 2, 3] and "control" in got


def test_a_time_from_the_wire_hides_no_message():
    """For longer than the link that is emulated can have taken."""
    emulate = Emulate(link_ms=20.0, link_mbps=8.0)
    for asked in (1e18, float("inf"), float("nan"), 2**80, "soon", None, [1]):
        now = time.monotonic()
        due = Arrivals(emulate).due(
            Message("any", {DUE: asked}, (torch.zeros(1000, dtype=torch.uint8),))
        )
        most = (emulate.link_ms + (1000 + FRAME_BYTES) / 1000) / 1000  # 1000 bytes a millisecond
        assert due <= time.monotonic() + most
        assert not isinstance(asked, float | int) or due >= now + most
        assert Arrivals(Emulate(stage_ms=3.0)).due(Message("any", {DUE: asked})) == 0.0


def test_what_an_emulated_link_asks_for_is_what_it_gets():
    emulate = Emulate(link_ms=20.0, link_mbps=8.0)
    first, second = inproc.ring(Topology(1))
    end, arrivals = ShapedTransport(first, emulate), Arrivals(emulate)
    for _ in range(20):  # faster than the link carries them
        end.send_next(Message("any", {}, (torch.zeros(1000, dtype=torch.uint8),)))
    for entry in sorted(second.inbox._normal):
        assert arrivals.due(Message("any", {DUE: entry.due}, entry.item[1].tensors)) == entry.due


# ---- heartbeats ------------------------------------------------------------------------------------
def test_a_silent_rank_is_named_once_and_those_that_beat_are_not():
    store, lost, told = dist.HashStore(), [], threading.Event()

    def note(rank, reason):
        lost.append((rank, reason))
        told.set()

    hearts = started_hearts(store, note)
    assert not told.wait(1.5)  # longer than the limit: nobody is lost while all beat
    hearts[1].stop()
    assert not told.wait(1.5)  # nor is who has left in order
    last = hearts[2]._own(0)
    hearts[2]._own = lambda number: last
    assert told.wait(PATIENCE)
    for heart in hearts:
        heart.stop()
    assert lost == [(2, "no heartbeat for 1 s")]


def started_hearts(store, note, **pace) -> list[Heartbeat]:
    """Of three ranks; `note` hears what rank 0 finds. Each has pulses of its own, as processes do."""
    pace = {"every": 0.02, "limit": 1.0} | pace
    hearts = [
        Heartbeat(
            store, rank, [Pulse() for _ in range(3)], note if rank == 0 else lambda *_: None, **pace
        )
        for rank in range(3)
    ]
    for step in (Heartbeat.announce, Heartbeat.start):
        for heart in hearts:
            step(heart)
    return hearts


def heard(store=None, until=lambda hearts: None, **pace) -> list:
    """What rank 0 says of three hearts once `until(hearts)` has been done to them."""
    lost, told = [], threading.Event()

    def note(*what):
        lost.append(what)
        told.set()

    hearts = started_hearts(store or dist.HashStore(), note, **pace)
    until(hearts)
    assert told.wait(PATIENCE)
    for heart in hearts:
        heart.stop()
    return lost


def test_a_rank_that_beats_but_stands_still_at_work_is_named_and_one_that_waits_or_moves_is_not():
    def work(hearts):
        hearts[2]._pulses[2].at("at work on a segment message")
        hearts[1]._pulses[1].at("loading its weights")
        for _ in range(40):  # rank 1 takes longer than any limit, layer by layer
            time.sleep(0.02)
            hearts[1]._pulses[1].move()
        hearts[1]._pulses[1].at()

    assert heard(until=work, still=0.6) == [
        (2, "it beats, but stood still for 0.6 s: at work on a segment message")
    ]


class Silent(dist.HashStore):
    """A store whose host is stopped: calls block, once it is told to."""

    def __init__(self):
        super().__init__()
        self.stopped, self.over = threading.Event(), threading.Event()

    def set(self, *words):
        if self.stopped.is_set():
            self.over.wait(PATIENCE)
        super().set(*words)


@pytest.mark.parametrize(
    ("keeper", "said"),
    [
        (-1, "the launcher or the first rank's host is gone (torch's store was silent for 0.3 s)"),
        (0, "torch's store was silent for 0.3 s"),
    ],
)
def test_a_store_that_goes_silent_is_its_keeper_s_end_within_the_limit(keeper, said):
    store = Silent()
    begun = time.monotonic()
    lost, told = [], threading.Event()

    def note(*what):
        lost.append(what)
        told.set()

    heart = Heartbeat(store, 0, [Pulse()], note, every=0.02, limit=0.3, keeper=keeper)
    heart.announce()
    heart.start()
    assert not told.wait(0.6)
    store.stopped.set()
    assert told.wait(PATIENCE)
    assert lost == [(keeper, said)]
    heart.stop()
    assert time.monotonic() - begun < PATIENCE, "nobody waited for the store"
    store.over.set()


def test_what_stands_in_the_store_for_a_rank_is_checked():
    for told in (
        b"",
        b"[",
        b"[" * 9000,
        b"\xff",
        b"7",
        b"null",
        b"[1, 2]",
        b'[1, 2, "a", 3]',
        b'["1", 2, "a"]',
        b'[true, 2, "a"]',
    ):
        with pytest.raises(ValueError, match="none of ours"):
            beats._beat(told)
        with pytest.raises(ValueError, match="none of ours"):
            beats._who(told)
    assert beats._beat(b'[4, 5, "a\\u001b[31m\\n"]').doing == "a?[31m?"


# ---- whom to kill ----------------------------------------------------------------------------------
RUN = {
    "RANK": "0",
    "WORLD_SIZE": "3",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29999",
    "TORCHELASTIC_RUN_ID": "none",
}


@pytest.fixture
def sleeper(monkeypatch):
    """`sleeper(**environment)`: the id of a process with this run's environment, changed so."""
    for name, value in RUN.items():
        monkeypatch.setenv(name, value)
    started = []

    def start(**changed: str | None) -> int:
        env = {
            name: value for name, value in {**os.environ, **changed}.items() if value is not None
        }
        started.append(subprocess.Popen(["sleep", "60"], env=env))
        process = Path(f"/proc/{started[-1].pid}")
        while (process / "comm").read_text() != "sleep\n" or not (
            process / "environ"
        ).read_bytes():  # exec's: the name comes first
            time.sleep(0.01)
        return started[-1].pid

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_only_a_process_that_was_started_as_that_rank_of_this_run_is_one_of_ours(sleeper):
    pid = sleeper(RANK="2")
    assert is_rank_of_this_run(pid, 2)
    assert not is_rank_of_this_run(pid, 1)
    for changed in (
        {"MASTER_PORT": "29998"},
        {"TORCHELASTIC_RUN_ID": "other"},
        {"WORLD_SIZE": None},
        {"RANK": None},
    ):
        assert not is_rank_of_this_run(sleeper(**{"RANK": "2", **changed}), 2)
    for other in (
        0,
        1,
        -1,
        -pid,
        os.getpid(),
        os.getppid(),
        2**40,
        True,
        2.0,
        str(pid),
        None,
        [pid],
    ):
        assert not is_rank_of_this_run(other, 2)


def test_a_process_id_that_somebody_else_wrote_into_the_store_is_not_killed(sleeper):
    """What kill_if_here does to a stranger, and to a rank of ours."""
    for changed, gone in (({"RANK": "1", "MASTER_PORT": "1"}, False), ({"RANK": "1"}, True)):
        pid = sleeper(**changed)
        heart = Heartbeat(dist.HashStore(), 0, [Pulse(), Pulse()], lambda *_: None)
        heart._who = {1: beats._who(json.dumps(["host", beats.machine(), pid]).encode())}
        heart.kill_if_here(1)
        assert (os.waitpid(pid, 0 if gone else os.WNOHANG)[1] == signal.SIGKILL) == gone


# ---- waiting ---------------------------------------------------------------------------------------
def test_rank_0_waits_for_a_stage_that_moves_and_names_one_that_stands_still(monkeypatch):
    monkeypatch.setattr(waiting, "_LOOK", 0.02)
    ends = inproc.ring(Topology(2))
    for end in ends:
        end.still = 0.3
    ends[0].inbox.put("here")
    assert waiting.receive(ends[0]) == "here"
    assert waiting.receive(ends[0], time.monotonic() + 0.05) is None
    ends[0].pulses[1].at("loading its weights")
    ends[0].pulses[2].at("at work on a segment message")
    over = threading.Event()

    def slow() -> None:
        for _ in range(30):
            time.sleep(0.05)
            ends[1].pulses[1].move()
            if over.is_set():
                return

    thread = threading.Thread(target=slow)
    thread.start()
    with pytest.raises(
        RankLost,
        match=r"rank 2 \(stage 2\) hung: it stood still for 0.3 s: at work on a segment message",
    ):
        waiting.receive(ends[0])
    over.set()
    thread.join()
    for pulse in ends[0].pulses:
        pulse.at()
    monkeypatch.setattr(waiting, "STALL", 0.3)
    with pytest.raises(RankLost, match="nothing came back"):
        waiting.receive(ends[0])


# ---- last words ------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", ["/dev/full", "/nowhere/report"])
def test_last_words_that_cannot_be_written_are_spoken(monkeypatch, capsys, path):
    monkeypatch.setenv(process.REPORT, path)
    process.report("rank 2 died", 1, speak=False)
    assert capsys.readouterr().err == "flowspec: rank 2 died\n"


def test_a_rank_that_mourns_leaves_whatever_its_words_meet(monkeypatch):
    left = []
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(process, "leave", left.append)
    monkeypatch.setattr(process, "report", lambda *_, **__: 1 / 0)
    heart = Heartbeat(dist.HashStore(), 0, [Pulse(), Pulse()], lambda *_: None)
    for rank in (-1, 1):
        with pytest.raises((ZeroDivisionError, KeyError)):
            process.end_process(heart, process.Loss(rank, "no heartbeat", hung=True))
    assert left == [1, 1]


@pytest.mark.parametrize("text", ["", "0", "-1", "a", "inf", "nan", "1e3", "1,2"])
def test_a_bound_that_is_no_number_of_seconds_is_refused(monkeypatch, text):
    monkeypatch.setenv("FLOWSPEC_CONNECT", text)
    with pytest.raises(UserError, match="FLOWSPEC_CONNECT"):
        process._seconds_to_connect()


@pytest.mark.parametrize("text", ["1", "3,1", "0,1", "a,b", "1,2,3,4", "1,inf", "1,2,0", "nan,1"])
def test_a_pace_that_is_none_is_refused(monkeypatch, text):
    monkeypatch.setenv("FLOWSPEC_HEARTBEAT", text)
    with pytest.raises(UserError, match="FLOWSPEC_HEARTBEAT"):
        process._pace()


def test_the_pace_has_two_numbers_or_three(monkeypatch):
    for text, pace in (("0.5,5", (0.5, 5.0, STILL)), ("1,2,300", (1.0, 2.0, 300.0))):
        monkeypatch.setenv("FLOWSPEC_HEARTBEAT", text)
        assert tuple(process._pace().values()) == pace


# ---- a rank of the world of processes --------------------------------------------------------------
def main(folder: Path, rank: int) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=gloo.FOREVER,
    )
    lost: list = []
    seen = {}
    for name, scenario in SCENARIOS.items():
        transport = make(lambda *what: lost.append(what))
        seen[name] = scenario(transport)
        transport.close()
        transport.close()
    threads = [
        t.name for t in threading.enumerate() if t.name.startswith(("send to", "receive from"))
    ]
    facts = {
        "seen": seen,
        "lost": lost,
        "threads": threads,
        "future": future(rank),
        "odd": odd(rank),
    }
    (folder / f"{rank}.json").write_text(json.dumps(facts))
    sys.stdout.flush()
    os._exit(0)  # a link that was broken on purpose still waits


def make(lost) -> gloo.GlooTransport:
    return gloo.GlooTransport(
        Topology.of_world(WORLD), lost, LIMITS, Emulate(), [Pulse() for _ in range(WORLD)], STILL
    )


def odd(rank: int) -> list:
    """Rank 1 cannot read what rank 0 says, for a reason that nobody thought of."""
    lost: list = []
    told = threading.Event()

    def decode(*frame):
        raise KeyError("nobody expected this")

    def note(*what):
        lost.append(what)
        told.set()

    transport = make(note)
    if rank == 1:
        gloo.decode = decode
    dist.barrier()
    if rank == 0:
        transport.send_next(Message("any"))
    told.wait(10.0 if rank == 1 else 0.0)
    found = list(lost)
    dist.barrier()
    return found


def future(rank: int) -> list:
    """Rank 1 writes one frame of a later version; rank 2 tells whom it lost for that."""
    lost: list = []
    told = threading.Event()

    def note(*what):
        lost.append(what)
        told.set()

    transport = make(note)
    if rank == 1:
        gloo.encode = from_the_future
        transport.send_next(Message("later"))
    told.wait(10.0 if rank == 2 else 0.0)
    found = list(lost)
    dist.barrier()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))


def test_emulated_links_need_one_clock(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_world(Topology(2), one_clock=False)
    with pytest.raises(UserError, match=r"emulate.link_ms.*1 of 3 are not"):
        check_world(Topology(2), one_clock=True)


def test_an_item_is_not_seen_before_it_is_due_and_control_that_is_due_leaves_first():
    inbox, now = Inbox(), time.monotonic()
    inbox.put("late control", urgent=True, due=now + 0.2)
    inbox.put("data", due=now + 0.1)
    assert inbox.get_urgent() is None and inbox.get(timeout=0.0) is None
    assert inbox.get() == "data" and inbox.since == now + 0.1 <= time.monotonic()
    inbox.put("more data")
    assert inbox.get_urgent(1.0) == "late control" and time.monotonic() >= now + 0.2
    assert inbox.get() == "more data"
