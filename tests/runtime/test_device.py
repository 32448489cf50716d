"""What a GPU would need, as far as a machine without one can tell: which is taken, what lies there, what comes back to the host.

torch's meta device stands in for a GPU: it computes shapes only."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowspec import Engine, UserError, lossless
from flowspec.comm.base import Inbox, Pulse
from flowspec.comm.inproc import InprocTransport
from flowspec.config import load_config
from flowspec.core.messages import Batch, Piece, Prune, Segment
from flowspec.core.policy import PolicyConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.stage import StageState
from flowspec.core.topology import Topology
from flowspec.models.device import on_host, placed
from flowspec.models.eagle import load_eagle
from flowspec.models.manifest import Manifest
from flowspec.models.stage import Cached, CachedText, Head, Share, forward_together, load_stage
from flowspec.rank import checked_device, warm_up
from flowspec.runtime import wire
from flowspec.runtime.worker import Worker
from tests.stages import Hand

META = torch.device("meta")


def gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.mark.parametrize(
    "wanted,rank,local,count,taken",
    [
        ("cuda", 3, None, 4, "cuda:3"),  # threads: all ranks are on this host
        ("cuda", 5, "1", 4, "cuda:1"),  # the second rank of another host
        ("cuda", 2, "2", 1, "cuda:0"),  # shared
        ("cuda:1", 0, "0", 2, "cuda:1"),
        ("[cpu, cuda, cuda]", 2, "2", 2, "cuda:0"),
        ("[cpu, cuda, cuda]", 0, "0", 2, "cpu"),
        ("cpu", 0, None, 0, "cpu"),
    ],
)
def test_ranks_of_a_host_take_its_gpus_in_turn(
    pair, monkeypatch, wanted, rank, local, count, taken
):
    gpus(monkeypatch, count)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert checked_device(load_config(pair.config(2), [f"device={wanted}"]), rank) == taken


@pytest.mark.parametrize(
    "wanted,count,said",
    [
        ("cuda", 0, "device is cuda, but torch sees no GPU on rank 1"),
        ("cuda:2", 2, "cuda:1 is the last"),
    ],
)
def test_a_gpu_that_is_not_there_is_named_before_the_ring_is_joined(
    pair, monkeypatch, wanted, count, said
):
    gpus(monkeypatch, count)
    config = load_config(pair.config(2), [f"device={wanted}"])
    with pytest.raises(UserError, match=said):
        warm_up(config, Manifest.load(config.stages_path), 1)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_method_in_half_precision_parts_from_plain_decoding_at_ties_only(pair, capsys, dtype):
    with Engine.from_config(
        pair.config(2), [f"dtype={dtype}", "sampling.max_new_tokens=12"]
    ) as engine:
        assert lossless.verify(
            engine,
            ["def add"],
            [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.9, "seed": 1}],
        )
        assert engine.dtype_name == dtype


# ---- where tensors lie -----------------------------------------------------------------------------
class OneDevice(TorchDispatchMode):
    """No operation but a copy may see tensors of two devices; a GPU would refuse it, meta does not always."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        devices = {t.device for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        assert len(devices) < 2 or operation is torch.ops.aten.copy_.default, operation
        return operation(*args, **(kwargs or {}))


def stage(pair, rank: int):
    return load_stage(Manifest.load(pair.split(2)), rank, torch.float16, "meta")


@pytest.mark.parametrize("rank", [1, 2])
def test_a_forward_a_gather_and_a_head_touch_nothing_on_the_host(pair, monkeypatch, rank):
    monkeypatch.setattr(StageState, "COMPACT", -1)
    sequence = Hand(stage(pair, rank))
    rows = torch.tensor([1, 2, 3]) if rank == 1 else torch.zeros(3, 48)
    with OneDevice():
        assert sequence.prefill(rows).device == META
        kept, positions, out = sequence.verify([0, 1, 2, 3], [-1, 0, 0, 2], rows[[0, 1, 2, 0]])
        sequence.prune(Prune(1, 0, 2))
        assert Head(torch.zeros(320, 48, device=META))(torch.zeros(4, 48)).device == META
    assert (kept, positions.tolist(), out.device, out.shape) == (
        [0, 1, 2, 3],
        [3, 4, 4, 5],
        META,
        (4, 48),
    )
    assert sequence.cache.length == sequence.state.length == 6  # node 1 was taken out


@pytest.mark.parametrize("rank", [1, 2])
def test_a_forward_of_several_requests_touches_nothing_on_the_host(pair, rank):
    model, books = stage(pair, rank), [StageState() for _ in range(2)]
    cached = [Cached(model, taps=taps) for taps in ((0, 1), (1,))]
    with OneDevice():
        for ids in (None, [0, 1]):
            admitted = [
                b.extend(2 + k) if ids is None else b.admit(ids, [-1, 0])
                for k, b in enumerate(books)
            ]
            n = sum(len(each.kept) for each in admitted)
            rows = torch.ones(n, dtype=torch.long) if rank == 1 else torch.zeros(n, 48)
            out = forward_together(rows, list(map(Share, cached, admitted, [ids] * 2)))
            assert (out.device, out.shape) == (META, (n, 48))
            entered = [each.entered(0).rows for each in cached]
            assert [(t.device, t.shape[1]) for t in entered] == [(META, 96), (META, 48)]
    assert [each.cache.length for each in cached] == [4, 5]


@pytest.mark.parametrize("kind,name,width", [("eagle", "head", 48), ("eagle3", "head3", 3 * 48)])
def test_an_eagle_head_touches_nothing_on_the_host(deep, kind, name, width):
    head = Head(torch.zeros(320, 48, device=META))
    eagle = load_eagle(
        kind, getattr(deep, name), Manifest.load(deep.split(2)), head, torch.float16, "meta"
    )
    assert eagle.names is None or eagle.names.device.type == "cpu"  # where candidates are found
    with OneDevice():
        rows = eagle.rows(torch.tensor([1, 2]), eagle.place(torch.zeros(2, width)))
        assert (rows.device, rows.dtype) == (META, torch.float16)
        assert eagle.logits(CachedText(eagle.layer).prefill(rows)).device == META


class Ring(InprocTransport):
    """A rank's end of a ring whose messages are only kept."""

    def __init__(self, rank: int):
        inboxes, pulses = [Inbox() for _ in range(3)], [Pulse() for _ in range(3)]
        super().__init__(rank, Topology(2), inboxes, pulses)
        self.sent = []

    def send_next(self, message):
        self.sent.append(message)

    def send_control(self, to, message):
        self.sent.append(message)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("features,layers", [(True, ()), (False, ()), (False, (1, 4))])
def test_no_tensor_reaches_the_transport_before_it_is_on_the_host(
    pair, monkeypatch, rank, features, layers
):
    copied = []

    def copy(rows):
        copied.append(rows.device)
        return torch.zeros(rows.shape, dtype=rows.dtype)

    monkeypatch.setattr("flowspec.models.stage.on_host", copy)
    end = Ring(rank)
    worker = Worker(end, stage(pair, rank), first_layer=3 * (rank - 1))
    request = Request(id=1, prompt=(1, 2, 3), sampling=Sampling(seed=1))
    rows = torch.tensor([1, 2], dtype=torch.int32) if rank == 1 else torch.zeros(2, 48)
    worker.take(wire.start(request, False, features, layers, PolicyConfig()))
    worker.take(wire.prefill(1, rows))
    segment = Segment(1, (0, 1), (-1, 0), (3, 4))
    worker.take(wire.batch(Batch((Piece(1, segment),)), None if rank == 1 else rows))
    worker.take(wire.prunes([(1, Prune(1, 0, 1))]))
    told = ["text_features"] * bool(layers)
    assert copied == 2 * [
        META,
        *[META] * bool(layers),
    ]  # one copy a forward, and one of what entered the layers
    with_tensors = [message for message in end.sent if message.tensors]
    kinds = {
        1: [*told, "prefill", "batch", *told],
        2: [*told, *["prompt_features"] * features, "features", *told],
    }
    assert [message.kind for message in with_tensors] == kinds[rank]
    assert {t.device.type for message in with_tensors for t in message.tensors} == {"cpu"}


def test_on_a_cpu_nothing_is_copied():
    rows = torch.zeros(3)
    assert on_host(rows) is rows and placed(rows, torch.device("cpu")) is rows
