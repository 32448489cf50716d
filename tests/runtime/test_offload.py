"""Layers that are offloaded or spread over devices: the same text, two layers at a time, the next one on its way."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from flowspec.bench.sampling import SIDES
from flowspec.cli import main as cli
from flowspec.files import ROOT
from flowspec.host.reader import Whole
from flowspec.models import placement
from flowspec.models.placement import Placement, memory_of
from flowspec.models.stage import CachedText
from tests.clock import VirtualClock
from tests.runtime.test_generate import sampling_words, written
from tests.runtime.test_identity import PROMPTS, SAMPLED
from tests.runtime.test_quantised import TOKENS, made

HAVE = {name: importlib.util.find_spec(name) is not None for name in ("accelerate", "deepspeed")}
ACCELERATE = pytest.mark.skipif(
    not HAVE["accelerate"], reason="accelerate is not installed (requirements_offload.txt)"
)
DEEPSPEED = pytest.mark.skipif(
    not all(HAVE.values()), reason="deepspeed is not installed (requirements_deepspeed.txt)"
)
GPUS = [
    pytest.mark.skipif(torch.cuda.device_count() < n, reason=f"torch sees no {n} GPUs")
    for n in (1, 2)
]
LAYERS = 6
TIGHT = memory_of("cpu=600KB,disk", "--max-memory")
"""Of the pair's target this holds some layers, and not all."""
PLACEMENTS = {
    "cpu": Placement("cpu"),
    "disk": Placement("disk"),
    "link": Placement("cpu", gbps=100.0),
    "map": Placement(None, memory=TIGHT),
    "roomy": Placement(None),
}


class Plain:
    """A text without a tree."""

    def __init__(self, whole):
        self.whole, self.text, self.length = whole, CachedText(whole.model), 0

    def logits(self, text, n):
        """The logits after its last n tokens, which goes on from what it was."""
        rows = self.text.prefill(torch.tensor(text[self.length :]))
        self.length = len(text)
        return self.whole.head(rows[-n:])


def placed(folder, placement, dtype=torch.float32):
    return Whole.placed(Path(folder), dtype, placement, 320)


def held(model) -> list[int]:
    """The layers that have weights."""
    return [
        k for k, layer in enumerate(model.layers) if any(not p.is_meta for p in layer.parameters())
    ]


def ring_of(whole):
    return whole.model.layers[-1]._hf_hook._ring


def drained(whole):
    """Wait until the fetching thread has nothing to do."""
    ring_of(whole)._thread.submit(lambda: None).result()


# ---- the text ------------------------------------------------------------------------------------
ASKED = (("keyed", None, {}), ("keyed", "draft", SAMPLED[1]), ("rejection", "draft", SAMPLED[0]))


@pytest.fixture(scope="module")
def here(pair):
    """For each dtype the draft, and the texts of a target that is held as always."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        target, draft = (Whole.load(f, dtype, "cpu", 320) for f in (pair.target, pair.draft))
        found[dtype] = draft, texts(target, draft)
    return found


def texts(target, draft):
    both = {"target": target, "draft": draft}
    return [
        written(both, PROMPTS[1], rule, n=16, drafter=drafter, **sampling)[1]
        for rule, drafter, sampling in ASKED
    ]


@ACCELERATE
@pytest.mark.parametrize(
    "kind,dtype",
    [
        *((kind, torch.float32) for kind in PLACEMENTS),
        ("disk", torch.bfloat16),
        ("map", torch.bfloat16),
    ],
)
def test_the_text_is_the_same_wherever_layers_are(pair, here, kind, dtype):
    draft, want = here[dtype]
    got = texts(placed(pair.target, PLACEMENTS[kind], dtype), draft)
    assert got == want
    if dtype == torch.float32:
        assert got[0] == pair.greedy(PROMPTS[1], 16)


@ACCELERATE
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_experts_and_layers_in_several_files_come_whole(tmp_path, kind):
    torch.manual_seed(6)
    config = MixtralConfig(
        **dict(vocab_size=320, hidden_size=48, intermediate_size=80, num_hidden_layers=3),
        **dict(num_attention_heads=4, num_key_value_heads=2, num_local_experts=4),
        **dict(max_position_embeddings=128, sliding_window=None),
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len([*tmp_path.glob("*.safetensors")]) > 3
    texts = [list(range(30)), list(range(9, 29)), list(range(50, 70))]
    want, got = (
        torch.cat([Plain(whole).logits(text, 5) for text in texts])
        for whole in (
            Whole.load(tmp_path, torch.float32, "cpu", 320),
            placed(tmp_path, Placement(kind)),
        )
    )
    assert torch.allclose(want, got, atol=1e-5)


@pytest.mark.parametrize(
    "placement",
    [
        pytest.param(Placement("cpu"), marks=GPUS[0], id="cpu"),
        pytest.param(Placement("disk"), marks=GPUS[0], id="disk"),
        pytest.param(
            Placement(None, memory_of("0=600KB,cpu=200KB,disk", "-")), marks=GPUS[0], id="map"
        ),
        pytest.param(Placement(None, memory_of("0=600KB,1=1GB", "-")), marks=GPUS[1], id="two"),
    ],
)
@ACCELERATE
def test_on_gpus_the_text_is_that_of_a_cpu(pair, placement):
    there = placed(pair.target, placement)
    assert there.model.device.type == "cuda"
    for prompt in PROMPTS:
        assert written({"target": there}, prompt, drafter=None)[1] == pair.greedy(prompt, 24)


# ---- how layers come and go ----------------------------------------------------------------------
@ACCELERATE
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_no_more_than_two_layers_hold_weights(pair, monkeypatch, kind):
    from flowspec.models import offload

    seen, fill = [], offload.fill

    def watched(layer, *words):
        fill(layer, *words)
        seen.append(held(whole.model))

    whole = placed(pair.target, PLACEMENTS[kind])
    drained(whole)
    monkeypatch.setattr(offload, "fill", watched)
    for layer in whole.model.layers:
        layer.mlp.register_forward_pre_hook(lambda *_: seen.append(held(whole.model)))
    Plain(whole).logits(list(range(9)), 1)
    drained(whole)
    assert len(seen) == 2 * LAYERS
    assert max(map(len, seen)) == 2, seen
    assert held(whole.model) == [0, 1]  # they wait for the next forward


@ACCELERATE
@pytest.mark.parametrize("kind", ["cpu", "disk"])
def test_the_next_layer_is_fetched_while_one_computes(pair, monkeypatch, kind):
    """In the middle of each layer it waits for the fetch of the next to begin; if that waited for the layer, both would wait for ever."""
    from flowspec.models import offload

    whole, fill, log = placed(pair.target, PLACEMENTS[kind]), offload.fill, []
    drained(whole)
    number = {id(layer): k for k, layer in enumerate(whole.model.layers)}
    begun = [threading.Semaphore(k < 2) for k in range(LAYERS)]

    def watched(layer, *words):
        log.append(("fetch", number[id(layer)]))
        begun[number[id(layer)]].release()
        fill(layer, *words)

    def computing(k):
        assert begun[(k + 1) % LAYERS].acquire(timeout=30), (
            f"layer {k} computes, nothing is fetched"
        )
        log.append(("compute", k))

    monkeypatch.setattr(offload, "fill", watched)
    for k, layer in enumerate(whole.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, k=k: computing(k))
    begun[0].acquire()
    for _ in range(2):
        Plain(whole).logits(list(range(9)), 1)
    drained(whole)
    # a buffer is free when the layer before the present has been computed
    fetches = [k for what, k in log if what == "fetch"]
    assert fetches == [*range(2, LAYERS), *range(LAYERS), 0, 1]
    for turn in range(2, len(fetches)):
        at = [n for n, (what, _) in enumerate(log) if what == "fetch"][turn]
        assert sum(what == "compute" for what, _ in log[:at]) >= turn, log


@ACCELERATE
def test_a_model_of_one_layer_streams_too(tmp_path, pair):
    folder = shutil.copytree(pair.target, tmp_path / "one")
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    (folder / "config.json").write_text(json.dumps(config))
    whole = placed(folder, PLACEMENTS["disk"])
    want = Plain(Whole.load(folder, torch.float32, "cpu", 320)).logits([1, 2, 3], 1)
    for _ in range(3):
        assert torch.allclose(Plain(whole).logits([1, 2, 3], 1), want, atol=1e-5)


@ACCELERATE
def test_a_gpu_has_computed_before_a_layer_goes_and_copied_before_one_is_used(monkeypatch):
    """The order of what the ring asks of CUDA, with all of that made up."""
    from flowspec.models.offload import Ring, Streamed

    log = []

    class Made:
        def __init__(self, *what):
            self.what = what

        def record_event(self):
            return Made("computed", sum(what == "compute" for what, *_ in log) - 1)

        def synchronize(self):
            log.append(self.what)

        __enter__ = __exit__ = lambda self, *_: None

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Made("copied"))
    for name in ("current_stream", "stream", "device"):
        monkeypatch.setattr(torch.cuda, name, Made)
    ring = Ring(
        [
            Streamed(lambda k=k: log.append(("fetch", k)), lambda k=k: log.append(("drop", k)))
            for k in range(3)
        ],
        torch.device("cuda:0"),
    )
    for turn in (0, 1, 2, 0, 1, 2):
        ring.arrived(turn)
        log.append(("compute", turn))
        ring.let_go(turn)
    ring._thread.shutdown()
    # the fetching thread's steps, in its order: each drop behind its event, each copy awaited
    steps = [entry for entry in log if entry[0] != "compute"]
    first, rest = steps[:4], steps[4:]
    assert first == [("fetch", 0), ("copied",), ("fetch", 1), ("copied",)]
    for n, k in enumerate((0, 1, 2, 0, 1, 2)):
        event, *others = rest[4 * n : 4 * n + 4]
        assert event == ("computed", n)
        assert others == [("drop", k), ("fetch", (k + 2) % 3), ("copied",)]
    for n, entry in enumerate(log):
        if entry[0] == "compute":  # the copy that it needs has been awaited
            turn = sum(what == "compute" for what, *_ in log[:n])
            assert log[:n].count(("copied",)) > turn


@ACCELERATE
@pytest.mark.parametrize("gb", [13.5, None])
def test_a_forward_over_an_emulated_link_takes_what_it_streams(pair, monkeypatch, gb):
    from flowspec.models import offload

    clock = VirtualClock()
    monkeypatch.setattr(offload, "Clock", lambda: clock)
    whole = placed(pair.target, Placement("cpu", gbps=25.0, gb=gb))
    drained(whole)
    at, reader = [clock.time], Plain(whole)
    for k in range(3):
        reader.logits(list(range(5 * k + 5)), 1)
        drained(whole)
        at.append(clock.time)
    size = sum(
        t.nbytes for n, t in load_file(pair.target / "model.safetensors").items() if "layers" in n
    )
    want = (gb or size / 1e9) / 25
    assert [b - a for a, b in pairwise(at)] == pytest.approx([want] * 3, abs=1e-9)


@ACCELERATE
def test_a_link_carries_one_layer_at_a_time_from_when_there_is_room():
    from flowspec.models.offload import Link

    clock = VirtualClock()
    link, begun = Link(2.0, clock), clock.time
    link.carry(begun)
    assert clock.time - begun == 2
    link.carry(begun + 1)  # asked for while the link was busy
    assert clock.time - begun == 4
    clock.time += 6
    link.carry(begun + 9)  # what has really taken a second takes one more
    assert clock.time - begun == 11
    clock.time += 9
    link.carry(begun + 11)  # it has really taken nine
    assert clock.time - begun == 20
    link.carry(begun + 20)
    assert clock.time - begun == 22


# ---- a map over devices --------------------------------------------------------------------------
@ACCELERATE
def test_what_does_not_fit_is_streamed(pair):
    whole = placed(pair.target, PLACEMENTS["map"])
    here = whole.places.count("cpu")
    assert 0 < here < LAYERS
    assert [*whole.places] == ["cpu"] * here + ["cpu from disk"] * (LAYERS - here)
    drained(whole)
    assert held(whole.model) == [*range(here + 2)]
    assert sum(p.nbytes for p in pair.model.parameters()) > 600_000
    layer = sum(p.nbytes for p in pair.model.model.layers[0].parameters())
    around = pair.model.lm_head, pair.model.model.embed_tokens, pair.model.model.norm
    assert (here + 2) * layer + sum(each.weight.nbytes for each in around) <= 600_000
    assert [*placed(pair.target, PLACEMENTS["roomy"]).places] == ["cpu"] * LAYERS


@ACCELERATE
def test_the_map_is_said(pair, capsys):
    words = ["generate", "--method", "ar", "--target", str(pair.target), "--prompt", "for"]
    words += ["--max-new-tokens", "2", "--device-map", "auto", "--max-memory", "cpu=600KB,disk"]
    assert cli(words) == 0
    assert capsys.readouterr().err.startswith("layers: 0..")


def test_sizes_are_numbers_and_units():
    said = "1=1.5GiB,0=2MB,cpu=3KiB,disk"
    assert memory_of(said, "-") == {1: 3 << 29, 0: 2_000_000, "cpu": 3072, "disk": 0}


# ---- the commands --------------------------------------------------------------------------------
def ar(pair, *words, target=None):
    words = ["--target", target or pair.target, "--prompt", "for i in", *words]
    return [str(word) for word in ("generate", "--method", "ar", "--max-new-tokens", 8, *words)]


@ACCELERATE
def test_the_commands_say_what_is_emulated(pair, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    for words, want in (
        ([], (None, False)),
        (["--offload", "disk"], ("disk", False)),
        (["--offload", "cpu", "--offload-gbps", "10"], ("cpu", True)),
    ):
        assert cli(ar(pair, *words, "--json", out)) == 0
        found = json.loads(out.read_text())
        assert (found["offload"], found["emulated"]) == want
    capsys.readouterr()
    link = ("--offload", "cpu", "--offload-gbps", "10", "--offload-gb", "0.001")
    assert cli(sampling_words(pair, *link, "--json", out, "--num-runs", 1)) == 0
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(runs) == len(SIDES) and all(run["emulated"] for run in runs)
    said = " ".join(capsys.readouterr().out.split())
    assert "(emulated link of 10 GB/s, as if of 0.001 GB)" in said
    assert cli(sampling_words(pair, *link, "--against", "transformers")) == 2
    assert "--against: emulated times" in capsys.readouterr().err


@ACCELERATE
def test_a_layer_that_cannot_be_read_ends_the_run_in_one_line(pair, tmp_path, capsys):
    folder = shutil.copytree(pair.target, tmp_path / "t")
    file, name = folder / "model.safetensors", "model.layers.4.mlp.up_proj.weight"
    tensors = load_file(file)
    for spoilt, line in (
        (tensors | {name: torch.zeros(3, 3)}, "layer 4: mlp.up_proj.weight has shape (3, 3)"),
        ({k: v for k, v in tensors.items() if k != name}, "layer 4: 1 tensors are missing"),
    ):
        save_file(spoilt, file)
        for kind in ("cpu", "disk"):
            assert cli(ar(pair, "--offload", kind, target=folder)) == 2
            said = capsys.readouterr().err
            assert line in said and said.count("\n") == 1


@pytest.mark.slow
@ACCELERATE
def test_an_interrupted_run_leaves_nothing_behind(pair, tmp_path):
    """It is interrupted while it reads from the disk, and ends soon with one line."""
    folder = shutil.copytree(pair.target, tmp_path / "t")
    before, out = sorted(folder.iterdir()), tmp_path / "tmp"
    out.mkdir()
    words = ar(pair, "--offload", "disk", "--offload-gbps", "1", "--offload-gb", "1", target=folder)
    run = subprocess.Popen(
        [sys.executable, "-m", "flowspec", *words],
        **dict(cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE),
        env=os.environ | {"TMPDIR": str(out)},
    )
    assert run.stdout.read(3) == "for"  # the prompt: models are loaded
    run.send_signal(2)
    _, said = run.communicate(timeout=60)
    assert (run.returncode, said) == (130, "flowspec: interrupted\n")
    assert sorted(folder.iterdir()) == before and not [*out.iterdir()]


def test_without_the_extra_one_line_says_which(pair, monkeypatch, capsys):
    real = importlib.util.find_spec
    for absent, kind in (("accelerate", "disk"), ("deepspeed", "deepspeed")):
        there = {name: object() for name in HAVE} | {absent: None}
        monkeypatch.setattr(
            placement.importlib.util, "find_spec", lambda n, t=there: t[n] if n in t else real(n)
        )
        assert cli(ar(pair, "--offload", kind)) == 2
        extra = {"accelerate": "offload"}.get(absent, absent)
        said = capsys.readouterr().err
        assert f"requirements_{extra}.txt (the extra `{extra}`)" in said and said.count("\n") == 1


@pytest.mark.parametrize(
    "words,line",
    [
        ("--offload gpu", "--offload is gpu: choose one of cpu, disk, deepspeed"),
        ("--offload-gbps 3", "--offload-gbps needs --offload"),
        ("--offload-gb 3", "--offload-gb needs --offload-gbps"),
        ("--offload cpu --offload-gbps 0", "--offload-gbps is 0: it must be above 0"),
        ("--offload cpu --offload-gbps fast", "--offload-gbps is 'fast'"),
        ("--offload cpu --offload-gbps 3 --offload-gb inf", "--offload-gb is inf"),
        ("--offload cpu --offload-nvme .", "--offload-nvme is for --offload deepspeed"),
        ("--offload deepspeed --offload-nvme nowhere", "--offload-nvme: no folder nowhere"),
        ("--device-map balanced", "--device-map is balanced"),
        ("--offload cpu --device-map auto", "exclude each other"),
        ("--max-memory cpu=1GB", "--max-memory needs --device-map auto"),
        ("--device-map auto --max-memory cpu", "'cpu': a size is a number and one of"),
        ("--device-map auto --max-memory cpu=many", "'cpu=many': a size is"),
        ("--device-map auto --max-memory tpu=1GB", "'tpu=1GB' names no device"),
        ("--device-map auto --max-memory=-1=1GB", "'-1=1GB' names no device"),
        ("--device-map auto --max-memory cpu=1GB,cpu=2GB", "names cpu twice"),
        ("--device-map auto --max-memory disk=1GB", "disk takes whatever is left"),
        pytest.param("--device-map auto --max-memory 99=1GB", "names GPU 99", marks=ACCELERATE),
        pytest.param("--device-map auto --max-memory cpu=9KB,disk", "allow more", marks=ACCELERATE),
        pytest.param("--device-map auto --max-memory cpu=600KB", "or add disk", marks=ACCELERATE),
        pytest.param(
            "--device-map auto --max-memory cpu=9GB --offload-gbps 3",
            "--offload-gbps: all layers fit",
            marks=ACCELERATE,
        ),
    ],
)
def test_bad_flags_are_one_line(pair, capsys, words, line):
    assert cli(ar(pair, *words.split())) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


# ---- DeepSpeed -----------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def wide(pair, tmp_path_factory):
    """A model whose matrices are large enough (1 MB) for DeepSpeed to put them on a disk."""
    folder = shutil.copytree(pair.target, tmp_path_factory.mktemp("wide") / "m")
    model = pair.model.config.to_dict() | {
        **dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=3, head_dim=128),
    }
    config = type(pair.model.config).from_dict(model)
    torch.manual_seed(7)
    type(pair.model)(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@DEEPSPEED
@pytest.mark.parametrize("where", ["cpu", "nvme"])
def test_deepspeed_writes_the_same_text_and_leaves_nothing(pair, wide, tmp_path, where):
    """A C++ operation is built the first time, which takes a minute or two."""
    if where == "nvme":
        from deepspeed.ops.op_builder import AsyncIOBuilder

        if not AsyncIOBuilder().is_compatible(verbose=False):
            pytest.skip(
                "DeepSpeed cannot build async_io: libaio's headers are missing (libaio-dev)"
            )
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    more = ["--offload", "deepspeed", *(["--offload-nvme", nvme] if where == "nvme" else [])]
    texts = []
    for words in ([], more):
        out = tmp_path / "o.jsonl"
        words = ar(pair, *words, "--json", out, "--temperature", 0.7, "--seed", 3, target=wide)
        done = subprocess.run(
            [sys.executable, "-m", "flowspec", *words],
            **dict(cwd=ROOT, capture_output=True, text=True, timeout=900),
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(out.read_text())
        assert done.stdout == f"for i in{found['text']}\n"  # nothing of DeepSpeed's is in it
        texts.append(found["token_ids"])
    assert texts[0] == texts[1]
    assert not [*nvme.iterdir()]


@pytest.mark.slow
@DEEPSPEED
def test_a_disk_that_deepspeed_cannot_use_is_one_line(pair, wide, capsys):
    from deepspeed.ops.op_builder import AsyncIOBuilder

    assert cli(ar(pair, "--offload", "deepspeed", "--offload-nvme", "/proc", target=wide)) == 2
    said = capsys.readouterr().err
    built = AsyncIOBuilder().is_compatible(verbose=False)
    assert ("no space left in /proc" if built else "libaio-dev") in said


# ---- with quantised layers -----------------------------------------------------------------------
@ACCELERATE
@pytest.mark.parametrize("kind", ["cpu", "disk"])
@pytest.mark.parametrize(("family", "form"), [("llama", "packed"), ("mixtral", "gptq")])
def test_quantised_layers_are_made_plain_as_they_come(tmp_path, family, form, kind):
    wanted = made(tmp_path / "whole", family, form)
    whole = Whole.placed(tmp_path / "whole", torch.float32, Placement(kind), len(wanted[0]))
    found = Plain(whole).logits(TOKENS.tolist(), len(TOKENS))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
