"""Messages arrive as they were sent, in order, whatever carries them: threads, processes over gloo, an emulated network.

A scenario is a function that every rank runs on its end of the ring. Threads run it in this process; for gloo, one
world of three processes (this file as a program) runs all scenarios after one another and writes down what it saw.
"""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flowspec.comm import gloo, inproc
from flowspec.comm.base import Inbox, Message
from flowspec.comm.codec import decode, encode, payload_size
from flowspec.comm.heartbeat import Heartbeat
from flowspec.comm.shaped import ShapedTransport, shaped, wire_bytes
from flowspec.core.cost import Emulate
from flowspec.core.messages import FRAME_BYTES, Cost, Prune, Segment, Started
from flowspec.errors import UserError
from flowspec.runtime import wire
from flowspec.runtime.process import check_world

ROOT = Path(__file__).resolve().parent.parent.parent
WORLD = 3
PATIENCE = 60.0
"""seconds: a guard against hanging, no measure of anything"""
NETWORK = Emulate(link_ms=2.0, link_mbps=1000.0, hidden_scale=2.0)
DTYPES = [
    getattr(torch, name) for name in ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64")
]
SHAPES = [(), (0,), (0, 8), (8, 0), (1,), (3, 5), (2, 3, 7)]


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 100, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


# ---- frames ----------------------------------------------------------------------------------------
def there_and_back(*tensors: torch.Tensor, **meta) -> Message:
    header, payload = encode(Message("any", meta, tensors))
    assert payload_size(header) == len(payload)
    return decode(header, payload)


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
    facts = {"request": 7, "name": "é語", "share": 0.1, "none": None, "list": [1, [2]], "big": 2**63}
    for tensors in [(), (tensor(torch.int8, (3,)), tensor(torch.float64, (2,)))]:
        got = there_and_back(*tensors, **facts)
        assert (got.kind, got.meta, len(got.tensors)) == ("any", facts, len(tensors))


@pytest.mark.parametrize("header", [[0, 0], [-8, 4], [16, 0], [16, -1], [16, 24], [1 << 60, 8], [0x7B22_6B69_6E64_223A, 32]])
def test_a_header_of_garbage_is_refused(header):
    with pytest.raises(ValueError, match="not a flowspec frame"):
        payload_size(torch.tensor(header))


def from_the_future(message: Message) -> tuple[torch.Tensor, torch.Tensor]:
    """The frame that a version 9 would write."""
    header, payload = encode(message)
    text = payload.numpy().tobytes().replace(b'"version": 1', b'"version": 9', 1)
    return header, torch.frombuffer(bytearray(text), dtype=torch.uint8)


def test_a_frame_of_another_version_is_refused():
    with pytest.raises(ValueError, match="version 9"):
        decode(*from_the_future(Message("any")))


def test_a_payload_of_garbage_is_refused():
    with pytest.raises(ValueError):
        decode(torch.tensor([64, 40]), torch.full((64,), 200, dtype=torch.uint8))


# ---- the inbox -------------------------------------------------------------------------------------
def test_urgent_items_leave_the_inbox_first_and_each_kind_in_order():
    inbox = Inbox()
    for item, urgent in [("a", False), ("X", True), ("b", False), ("Y", True), ("Z", True)]:
        inbox.put(item, urgent)
    assert inbox.get_urgent() == "X"
    assert [inbox.get(0.0) for _ in range(5)] == ["Y", "Z", "a", "b", None]
    assert inbox.get_urgent() is None


def test_an_inbox_that_waits_wakes_for_an_item_and_for_a_failure():
    for wake, expected in [(lambda box: box.put("a"), "a"), (lambda box: box.fail(OSError("gone")), "gone")]:
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
    t.send_next(Message("big", {}, (tensor(torch.int64, (700_000,), seed=t.rank), tensor(torch.float32, (300, 1000), seed=t.rank))))
    [(source, m)] = receive(t, 1)
    return [same(m.tensors[0], tensor(torch.int64, (700_000,), source)), same(m.tensors[1], tensor(torch.float32, (300, 1000), source))]


def every_tensor(t) -> list:
    sent = [tensor(dtype, shape) for dtype in DTYPES for shape in SHAPES]
    t.send_next(Message("all", {}, tuple(sent)))
    t.send_next(Message("nothing", {"of": "tensors"}))
    (_, everything), (_, nothing) = receive(t, 2)
    return [[same(a, b) for a, b in zip(everything.tensors, sent, strict=True)], nothing.kind, nothing.meta, list(nothing.tensors)]


def control_and_back(t) -> list:
    if t.rank:
        [(source, m)] = receive(t, 1)
        t.send_control(0, Message("answer", {"to": m.meta["question"], "by": t.rank}, m.tensors))
        return [source, m.kind]
    for rank in range(1, t.world_size):
        t.send_control(rank, Message("question", {"question": rank * 11}, (torch.arange(rank),)))
    return sorted([source, m.meta["to"], m.meta["by"], m.tensors[0].tolist()] for source, m in receive(t, t.world_size - 1))


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


SCENARIOS = {f.__name__: f for f in (in_order, big, every_tensor, control_and_back, overtaken)}


def over_threads(scenario: str, emulate: Emulate | None) -> list:
    before = set(threading.enumerate())
    ends: list = list(inproc.ring(WORLD))
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
    env = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")} | {"OMP_NUM_THREADS": "1"}
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


def test_every_dtype_and_shape_arrives_as_it_was_and_so_does_a_message_of_no_tensors(seen):
    assert seen("every_tensor") == [[[True] * len(DTYPES) * len(SHAPES), "nothing", {"of": "tensors"}, []]] * WORLD


def test_control_reaches_each_stage_and_comes_back(seen):
    first, *stages = seen("control_and_back")
    assert first == [[rank, rank * 11, rank, list(range(rank))] for rank in range(1, WORLD)]
    assert stages == [[0, "question"]] * (WORLD - 1)


def test_control_is_heard_before_data_that_lies_unread(seen):
    assert seen("overtaken") == [[], ["control", 0, 1, 2], []]


def test_a_world_over_gloo_ends_without_losing_anyone_or_keeping_a_thread(gloo_world):
    assert [(rank["lost"], rank["threads"]) for rank in gloo_world] == [([], [])] * WORLD


def test_a_peer_of_another_version_is_lost_by_name_and_not_silently(gloo_world):
    assert gloo_world[2]["future"] == [[1, "a peer speaks version 9 of the wire format, this is version 1"]]


# ---- an emulated network ---------------------------------------------------------------------------
@pytest.mark.parametrize("scale", [1.0, 16.0])
def test_hidden_rows_weigh_two_bytes_an_element_times_the_scale_and_numbers_as_they_are(scale):
    ids = tensor(torch.int32, (2, 5))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert wire_bytes(Message("rows", {}, (ids, tensor(dtype, (5, 48)))), scale) == FRAME_BYTES + 2 * 5 * 4 + 5 * 48 * 2 * scale
    assert wire_bytes(Message("none"), scale) == FRAME_BYTES


def test_a_frame_weighs_about_what_is_sent_beside_the_tensors():
    ids = list(range(1000, 1016))
    tokens, rows = torch.zeros(16, dtype=torch.int32), torch.zeros(16, 64)
    for message in (
        wire.prune(1, Prune(57, 990, 1005)),
        wire.segment(1, Segment(77, tuple(ids), tuple(ids), tuple(ids))),
        wire.rows_of(1, 77, ids, ids, ids, rows),
        wire.choices(1, 77, ids, ids, [0.5] * 16),
        wire.started(1, Started(77, 16, 0.0123456789, 0.0)),
        wire.cost(1, Cost(1, 0.00123456789, 0.00123456789, 0.00123456789)),
        wire.prefill(1, tokens),
    ):
        header, payload = encode(message)
        beside = header.nbytes + payload.nbytes - sum(t.nbytes for t in message.tensors)
        assert abs(beside - FRAME_BYTES) <= 40, (message.kind, beside)


def test_only_a_network_that_is_emulated_is_shaped():
    [end] = inproc.ring(1)
    assert shaped(end, Emulate(stage_ms=5.0)) is end
    wrapped = shaped(end, Emulate(link_ms=0.1))
    assert isinstance(wrapped, ShapedTransport)
    wrapped.close()


def test_no_message_arrives_before_its_time_nor_out_of_order():
    emulate = Emulate(link_ms=20.0, link_mbps=8.0, hidden_scale=3.0)  # 1000 bytes a millisecond
    first, second = inproc.ring(2)
    end = ShapedTransport(first, emulate)
    sizes = [10_000, 0, 4_000, 20_000]
    begun = time.monotonic()
    for n, size in enumerate(sizes):
        end.send_next(Message("rows", {"n": n}, (torch.zeros(1, size // 6, dtype=torch.float32), torch.zeros(size % 6, dtype=torch.uint8))))
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


# ---- heartbeats ------------------------------------------------------------------------------------
def test_a_silent_rank_is_named_once_and_those_that_beat_are_not():
    store, lost, told = dist.HashStore(), [], threading.Event()

    def note(rank, reason):
        lost.append((rank, reason))
        told.set()

    hearts = [Heartbeat(store, rank, 3, note if rank == 0 else lambda *_: None, every=0.02, limit=1.0) for rank in range(3)]
    for heart in hearts:
        heart.announce()
    for heart in hearts:
        heart.start()
    assert not told.wait(1.5)  # longer than the limit: nobody is lost while all beat
    hearts[2].stop()
    assert told.wait(PATIENCE)
    for heart in hearts:
        heart.stop()
    assert lost == [(2, "no heartbeat for 1 s")]


# ---- a rank of the world of processes --------------------------------------------------------------
def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=gloo.FOREVER)
    lost: list = []
    seen = {}
    for name, scenario in SCENARIOS.items():
        transport = gloo.GlooTransport(lambda *what: lost.append(what))
        seen[name] = scenario(transport)
        transport.close()
        transport.close()
    threads = [t.name for t in threading.enumerate() if t.name.startswith(("send to", "receive from"))]
    (folder / f"{rank}.json").write_text(json.dumps({"seen": seen, "lost": lost, "threads": threads, "future": future(rank)}))
    sys.stdout.flush()
    os._exit(0)  # a link that was broken on purpose still waits


def future(rank: int) -> list:
    """Rank 1 writes one frame of a later version; rank 2 tells whom it lost for that."""
    lost: list = []
    told = threading.Event()

    def note(*what):
        lost.append(what)
        told.set()

    transport = gloo.GlooTransport(note)
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
    check_world(3, one_clock=False)
    with pytest.raises(UserError, match=r"emulate.link_ms.*1 of 3 are not"):
        check_world(3, one_clock=True)


def test_an_item_is_not_seen_before_it_is_due_and_control_that_is_due_leaves_first():
    inbox, now = Inbox(), time.monotonic()
    inbox.put("late control", urgent=True, due=now + 0.2)
    inbox.put("data", due=now + 0.1)
    assert inbox.get_urgent() is None and inbox.get(timeout=0.0) is None
    assert inbox.get() == "data" and inbox.since == now + 0.1 <= time.monotonic()
    inbox.put("more data")
    assert inbox.get_urgent(1.0) == "late control" and time.monotonic() >= now + 0.2
    assert inbox.get() == "more data"
