"""Weights in four bits: what they mean, rows that do not depend on their batch, rings against one process, and refusals."""

import copy
import importlib.util
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

from flowspec import Engine, UserError, cli, preflight
from flowspec.cluster.needs import CONTEXT, PROGRAM, needs_of
from flowspec.commands.split import main as split
from flowspec.config import load_config
from flowspec.models import fourbit, jit
from flowspec.models.families import family_of, read_config
from flowspec.models.stage import Head, StageModel, load_head, load_stage, module_tensors
from flowspec.models.weights import Checkpoint
from flowspec.preflight import check_reference, check_run, manifest_of
from flowspec.rank import compute_dtype, dtype_name
from tests.runtime.test_alone import check
from tests.stages import Hand

PROMPT, NEW = [5, 17, 3, 250, 40], 24


def lacking() -> str | None:
    """Why four bits cannot be computed with here; None if they can."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed (requirements_quant.txt)"
    if not fourbit.library().functional.has_avx512bf16():
        return "a processor without AVX512-BF16"
    return None if jit.available() else "no llvmlite, or a processor without fused multiply-add"


computes = pytest.mark.skipif(lacking() is not None, reason=str(lacking()))
SMALL = dict(vocab_size=320, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(**SMALL, intermediate_size=128, num_key_value_heads=2, max_position_embeddings=512)
CONFIGS = {  # with biases; with matrices the other way round, behind transformers' own layers
    "llama": LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**LLAMA),
    "gpt2": GPT2Config(vocab_size=320, n_embd=64, n_layer=2, n_head=4, n_inner=128),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`folder(name)`: a random checkpoint of one of CONFIGS, and transformers' model of it."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(3)
            model = AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.25)
            at = tmp_path_factory.mktemp(name) / "model"
            model.save_pretrained(at)
            made[name] = at, model
        return made[name]

    return make


@pytest.fixture(scope="module")
def config(folder, pair, tmp_path_factory):
    """A configuration of the little Llama in two stages, all of whose matrices are of whole blocks."""
    at, _ = folder("llama")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        if (pair.target / file).exists():
            (at / file).write_bytes((pair.target / file).read_bytes())
    home = tmp_path_factory.mktemp("four")
    assert split(["--model", str(at), "--stages", "2", "--output", str(home / "split")]) == 0
    drafter = f"{{kind: lm, path: {at}}}"
    (home / "four.yaml").write_text(f"stages: split\ndrafter: {drafter}\ndtype: nf4\n")
    return home / "four.yaml"


def whole(at, nf4=True, device="cpu"):
    """A checkpoint as one stage, with its matrices in four bits, and its head."""
    config = read_config(at)
    model = StageModel(config, config["num_hidden_layers"], first=True, last=True)
    checkpoint = Checkpoint(at, family_of(config).named)
    tensors = module_tensors(checkpoint, 0, torch.float32)
    model.load(tensors, device, str(at), torch.float32, nf4=nf4)
    return model, Head(Checkpoint(at).read("lm_head.weight")) if config[
        "model_type"
    ] == "llama" else None


def meant(weight):
    """The matrix that the four bits of this one mean, by the library's own reading."""
    functional = fourbit.library().functional
    packed, state = functional.quantize_4bit(weight, blocksize=fourbit.BLOCK, quant_type="nf4")
    return functional.dequantize_4bit(packed, state)


@computes
def test_it_is_the_product_with_what_the_library_reads_and_takes_its_bytes():
    torch.manual_seed(1)
    weight, bias = torch.randn(96, 192), torch.nn.Parameter(torch.randn(96), requires_grad=False)
    layer, x = fourbit.FourBitLinear(weight, bias, torch.float32, "cpu"), torch.randn(7, 192)
    right = x @ meant(weight).T + bias
    assert (
        (layer(x) - right).norm() / right.norm()
        < 0.01
        < (x @ weight.T + bias - right).norm() / right.norm()
    )
    assert torch.equal(layer(x[None]), layer(x)[None]) and layer.products(x[:0]).shape == (0, 96)
    held = sum(t.nbytes for t in (*layer.parameters(), *layer.buffers())) - bias.nbytes
    assert held == weight.numel() * 17 // 32  # four bits, and a bfloat16 for 64 weights


@computes
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_is_the_same_in_every_batch(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(2)
        layer = fourbit.FourBitLinear(torch.randn(256, 320), None, torch.float32, "cpu")
        x = torch.randn(70, 320)
        alone = torch.cat([layer(row[None]) for row in x])
        for n in (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 40, 64, 65, 70):
            assert torch.equal(layer(x[:n]), alone[:n]) and torch.equal(layer(x[-n:]), alone[-n:])
    finally:
        torch.set_num_threads(before)


@computes
@pytest.mark.parametrize("name", CONFIGS)
def test_layers_compute_what_transformers_does_with_such_matrices(folder, name):
    at, plain = folder(name)
    model, _ = whole(at)
    assert model.native is (name != "gpt2")
    right = copy.deepcopy(plain)
    for parameter in (
        p for n, p in right.named_parameters() if p.dim() == 2 and (".layers." in n or ".h." in n)
    ):
        turned = name == "gpt2"
        parameter.data = meant(parameter.data.T.contiguous()).T if turned else meant(parameter.data)
    with torch.no_grad():
        ours = Hand(model).prefill(torch.tensor(PROMPT))
        theirs, other = (
            m.base_model(torch.tensor([PROMPT])).last_hidden_state[0] for m in (right, plain)
        )
    apart, rounded = ((ours - x).norm() / x.norm() for x in (theirs, other))
    assert apart < 0.05 < rounded, (apart, rounded)


@computes
def test_what_is_drafted_around_a_token_changes_no_bit(folder):
    model, head = whole(folder("llama")[0])
    model.compute_alone()
    assert model.native and not model.alone
    check(model, head, 3)


@computes
def test_a_ring_writes_what_one_process_does(folder, config):
    model, head = whole(folder("llama")[0])
    with torch.inference_mode():
        by_hand, text = Hand(model), []
        token = head(by_hand.prefill(torch.tensor(PROMPT)))[-1].argmax()
        for _ in range(NEW):
            text.append(int(token))
            token = head(by_hand.prefill(token[None]))[-1].argmax()
    float32 = whole(folder("llama")[0], nf4=False)[0]
    assert not torch.equal(
        Hand(float32).prefill(torch.tensor(PROMPT)), Hand(model).prefill(torch.tensor(PROMPT))
    )
    with Engine.from_config(config) as engine:
        assert engine.dtype_name == "nf4" and engine.sums_in == "bfloat16"
        for method in ("ar", "flowspec"):
            made = engine.generate(PROMPT, method=method, max_new_tokens=NEW, temperature=0)
            assert [t.id for t in made] == text, method
        sampled = [
            [
                t.id
                for t in engine.generate(
                    PROMPT, method=m, max_new_tokens=NEW, temperature=0.9, seed=4
                )
            ]
            for m in ("ar", "flowspec")
        ]
    assert sampled[0] == sampled[1] != text


def assert_same_text(engine):
    made = [
        [t.id for t in engine.generate(PROMPT, method=m, max_new_tokens=NEW, temperature=0)]
        for m in ("ar", "flowspec")
    ]
    assert made[0] == made[1]


@pytest.mark.skipif(
    not torch.cuda.is_available() or importlib.util.find_spec("bitsandbytes") is None,
    reason="no GPU here, or no bitsandbytes",
)
def test_on_a_gpu_layers_and_rings_do_so_too(folder, config):
    at, _ = folder("llama")
    model, _ = whole(at, device="cuda")
    plain, tokens = whole(at, nf4=False)[0], torch.tensor(PROMPT)
    ours, other = Hand(model, to_host=True).prefill(tokens), Hand(plain).prefill(tokens)
    assert 0.05 < (ours - other).norm() / other.norm() < 0.5
    with Engine.from_config(config, ["device=cuda", "deterministic=true"]) as engine:
        assert_same_text(engine)


@computes
def test_each_stage_may_have_its_own_dtype(config):
    mixed = load_config(config, ["dtype=[nf4, int8]"])
    manifest = manifest_of(mixed)
    assert [dtype_name(mixed, manifest, rank) for rank in range(3)] == ["int8", "nf4", "int8"]
    assert [compute_dtype(mixed, manifest, rank) for rank in (1, 2)] == [torch.float32, torch.int8]
    with Engine.from_config(config, ["dtype=[nf4, float32]"]) as engine:
        assert engine.sums_in == "bfloat16"
        assert_same_text(engine)


@computes
def test_matrices_that_are_not_of_whole_blocks_stay_as_they_are(pair):
    held = []
    for nf4 in (True, False):
        manifest = manifest_of(load_config(pair.config(2)))
        model = load_stage(manifest, 2, torch.float32, "cpu", nf4=nf4)
        rows = torch.randn(3, manifest.hidden_size, generator=torch.Generator().manual_seed(1))
        held.append((model.size, Hand(model).prefill(rows)))
    assert held[0][0] == held[1][0] and torch.equal(held[0][1], held[1][1])


@computes
def test_a_stage_needs_what_it_holds_once_it_is_loaded(config):
    four = load_config(config)
    manifest = manifest_of(four)
    for rank in (1, 2):
        model = load_stage(manifest, rank, torch.float32, "cpu", nf4=True)
        held = model.size + model.row_bytes * min(CONTEXT, manifest.max_positions)
        if rank == 2:
            held += load_head(manifest, rank, torch.float32, "cpu").weight.nbytes
        reckoned = needs_of(manifest, four, [rank]).memory - PROGRAM
        assert 0.95 * held < reckoned < 1.05 * held


# ---- what is refused -----------------------------------------------------------------------------
def fake(**functional):
    return SimpleNamespace(__version__="1.2", functional=SimpleNamespace(**functional))


def test_a_processor_without_the_kernel_is_refused(monkeypatch):
    monkeypatch.setattr(fourbit, "library", lambda: fake(has_avx512bf16=lambda: False))
    with pytest.raises(UserError, match=r"dtype nf4 on a CPU works on x86 with AVX512-BF16.*int8"):
        fourbit.check("cpu")


def test_so_it_is_where_ranks_are_threads(pair, monkeypatch):
    monkeypatch.setattr(fourbit, "library", lambda: fake(has_avx512bf16=lambda: False))
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(UserError, match="dtype nf4 on a CPU works on x86"):
        Engine.from_config(pair.config(2), ["dtype=nf4"])


def test_a_gpu_that_the_library_was_not_built_for_is_refused(monkeypatch):
    def layer(*_):
        raise RuntimeError("Error named symbol not found at line 233\nmore")

    monkeypatch.setattr(fourbit, "library", fake)
    monkeypatch.setattr(fourbit, "FourBitLinear", layer)
    said = r"bitsandbytes 1.2 cannot compute on cuda:0 \(Error named .* line 233\).*docs/jetson.md"
    with pytest.raises(UserError, match=said):
        fourbit.check("cuda:0")


def test_without_the_library_one_line_says_which_extra(pair, monkeypatch, capsys):
    real = importlib.util.find_spec
    missing = lambda name: None if name == "bitsandbytes" else real(name)  # noqa: E731
    monkeypatch.setattr(preflight.importlib.util, "find_spec", missing)
    words = ["run", str(pair.config(2)), "--prompt", "for", "dtype=nf4"]
    assert cli.main(words) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert "requirements_quant.txt (the extra `quant`" in said and "int8" in said
    check_run(load_config(pair.config(2), ["dtype=[nf4, int8]"]), [2])  # which is not rank 1


@pytest.mark.parametrize(
    "dtype, said",
    [
        ("nf5", "dtype is nf5: did you mean nf4"),
        ("[int8, auto]", "dtype lists auto"),
        ("[int8]", "dtype lists 1 stages, the split has 2"),
    ],
)
def test_a_dtype_is_for_all_or_for_each_stage(pair, capsys, dtype, said):
    assert cli.main(["run", str(pair.config(2)), "--prompt", "for", f"dtype={dtype}"]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_an_unsplit_model_has_no_such_weights(pair):
    manifest = manifest_of(load_config(pair.config(2)))
    for dtypes, said in ((["nf4"], "no nf4 weights"), (["float32", "float16"], "several")):
        with pytest.raises(UserError, match=f"--reference: the unsplit model has .*{said}"):
            check_reference(str(pair.target), manifest, dtypes)


def test_experts_are_refused(monkeypatch):
    config = CONFIGS["llama"].to_dict() | {"model_type": "mixtral", "num_local_experts": 2}
    model = StageModel(config, 1, first=False, last=False)
    with pytest.raises(UserError, match=r"dtype nf4.*experts"):
        model.load([], "cpu", "here", torch.float32, nf4=True)
