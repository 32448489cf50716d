"""scripts/inflate.py: the big model is transformers-valid, about as large as asked, and says what the small one says."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from flowspec.errors import UserError
from flowspec.models.split import split

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "inflate.py"
spec = importlib.util.spec_from_file_location("inflate", SCRIPT)
inflate = sys.modules["inflate"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(inflate)

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


def small_llama(folder: Path, tied: bool, **other) -> LlamaForCausalLM:
    """A model whose weights are large enough that every part of it matters to the next token."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{**SIZES, "tie_word_embeddings": tied, "max_position_embeddings": 128, **other}
        )
    ).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.dim() == 1 else 0.0, std=0.3)
    model.save_pretrained(folder)
    return model


def sized(gigabytes: float, dtype: str = "float32") -> "inflate.Wanted":
    return inflate.Wanted(int(gigabytes * 1e9 / getattr(torch, dtype).itemsize))


def greedy(model: LlamaForCausalLM) -> list[int]:
    prompt = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    return model.generate(
        prompt, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
    )[0].tolist()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size_gb", [0.00012, 0.0004, 0.002])
def test_the_inflated_model_computes_the_same_function(tmp_path, tied, size_gb):
    small = small_llama(tmp_path / "small", tied)
    shape = inflate.inflate(
        tmp_path / "small", tmp_path / "big", sized(size_gb), "float32", shard_bytes=100_000
    )
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big").eval()
    prompt = torch.randint(0, 97, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(big(prompt).logits, small(prompt).logits, rtol=1e-4, atol=1e-4)
    assert greedy(big) == greedy(small)
    assert sum(parameter.numel() for parameter in big.parameters()) == shape.weights
    assert shape.heads // shape.kv_heads == 2 and shape.head_dim == 8


REAL = {
    "vocabulary": dict(hidden=128, vocab=500),
    "vocabulary, rounded norms": dict(hidden=64, vocab=500),
    "groups of four": dict(hidden=64, heads=(16, 4)),
    "head size": dict(head_dim=32, heads=(8, 2)),
    "all of it": dict(hidden=128, layers=3, vocab=1000, heads=(32, 8), head_dim=32, positions=4096),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("wanted", REAL.values(), ids=REAL)
def test_real_shapes_compute_the_same_function_and_new_tokens_never_win(tmp_path, tied, wanted):
    small = small_llama(tmp_path / "small", tied)
    shape = inflate.inflate(
        tmp_path / "small", tmp_path / "big", inflate.Wanted(**wanted), "float32"
    )
    big = AutoModelForCausalLM.from_pretrained(tmp_path / "big").eval()
    prompt = torch.randint(0, 97, (2, 20))
    with torch.no_grad():
        got, want = big(prompt).logits, small(prompt).logits
    # a tied head adds the same to all old tokens
    torch.testing.assert_close(
        got[..., :97].log_softmax(-1), want.log_softmax(-1), rtol=1e-4, atol=2e-4
    )
    assert greedy(big) == greedy(small)
    assert (got[..., 97:] < want.min() - 1000).all()
    assert {name: getattr(shape, name) for name in wanted if name != "heads"} == {
        k: v for k, v in wanted.items() if k != "heads"
    }
    assert (big.config.num_attention_heads, big.config.num_key_value_heads) == wanted.get(
        "heads", (shape.heads, shape.kv_heads)
    )
    assert sum(parameter.numel() for parameter in big.parameters()) == shape.weights


def test_the_size_is_met_with_a_vocabulary_and_groups():
    small = inflate.Shape(
        vocab=4096,
        hidden=64,
        layers=8,
        heads=8,
        kv_heads=4,
        head_dim=8,
        neurons=192,
        positions=64,
        tied=True,
    )
    big = inflate.Wanted(10**8, vocab=32000, heads=(32, 8), head_dim=32).shape(small)
    assert 0.85e8 < big.weights <= 1e8 and (big.vocab, big.heads, big.kv_heads, big.head_dim) == (
        32000,
        32,
        8,
        32,
    )


def test_half_precision_loses_nothing_of_a_half_precision_model(tmp_path):
    small_llama(tmp_path / "small", True).half().save_pretrained(tmp_path / "small")
    inflate.inflate(tmp_path / "small", tmp_path / "big", sized(0.001, "float16"), "float16")
    small, big = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        for name in ("small", "big")
    )
    assert greedy(big) == greedy(small)


@pytest.mark.parametrize("weights", [10**6, 10**7, 3 * 10**8, 7 * 10**9])
def test_the_size_is_met(weights):
    small = inflate.Shape(
        vocab=4096,
        hidden=64,
        layers=8,
        heads=8,
        kv_heads=4,
        head_dim=8,
        neurons=192,
        positions=64,
        tied=True,
    )
    big = inflate.Wanted(weights).shape(small)
    assert 0.85 * weights < big.weights <= weights


def test_the_big_model_is_sharded_and_splits(tmp_path):
    small_llama(tmp_path / "small", False)
    (tmp_path / "small" / "tokenizer.json").write_text("{}")
    shape = inflate.inflate(
        tmp_path / "small",
        tmp_path / "big",
        sized(0.002, "float16"),
        "float16",
        shard_bytes=400_000,
    )
    assert len(list((tmp_path / "big").glob("model-*.safetensors"))) > 2
    assert (tmp_path / "big" / "tokenizer.json").read_text() == "{}"
    manifest = split(str(tmp_path / "big"), 2, tmp_path / "out")
    assert (manifest.num_layers, manifest.hidden_size, manifest.dtype) == (
        shape.layers,
        shape.hidden,
        "float16",
    )


def test_bad_input_is_one_line(tmp_path, capsys):
    small_llama(tmp_path / "small", True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep").write_text("me")
    capsys.readouterr()
    for arguments in (
        ["--size-gb=1e-6"],
        ["--size-gb=nan"],
        ["--hidden=48"],
        ["--layers=1"],
        ["--vocab=50"],
        ["--vocab=500"],
        ["--heads=4/4"],
        ["--heads=8"],
        ["--heads=12/8"],
        ["--head-dim=16"],
        ["--positions=64"],
        ["--hidden=0"],
        ["--size-gb=1", "--hidden=64"],
        ["--size-gb=1", f"--output={tmp_path / 'full'}"],
        [],
    ):
        assert (
            inflate.main(
                ["--model", str(tmp_path / "small"), "--output", str(tmp_path / "big"), *arguments]
            )
            == 2
        )
        error = capsys.readouterr().err
        assert error.startswith("flowspec: ") and error.count("\n") == 1
    assert not (tmp_path / "big").exists()


def test_a_rotary_embedding_that_depends_on_the_limit_is_refused(tmp_path):
    yarn = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}
    small_llama(tmp_path / "small", True, rope_parameters=yarn)
    with pytest.raises(UserError, match="--positions 4096: rope type yarn"):
        inflate.inflate(
            tmp_path / "small", tmp_path / "big", inflate.Wanted(positions=4096), "float32"
        )


def test_biases_are_refused(tmp_path):
    small_llama(tmp_path / "small", True, attention_bias=True)
    with pytest.raises(UserError, match="without biases"):
        inflate.inflate(tmp_path / "small", tmp_path / "big", sized(0.01), "float32")


def test_an_interrupt_leaves_one_line_and_no_folder(tmp_path, capsys, monkeypatch):
    small_llama(tmp_path / "small", True)

    def interrupted(*_):
        raise KeyboardInterrupt  # not by a signal: a background shell's children ignore that one

    monkeypatch.setattr(inflate, "random_matrix", interrupted)
    capsys.readouterr()
    assert (
        inflate.main(
            [
                "--model",
                str(tmp_path / "small"),
                "--output",
                str(tmp_path / "big"),
                "--size-gb",
                "0.001",
            ]
        )
        == 130
    )
    assert capsys.readouterr().err == "flowspec: interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["small"]


def test_the_check_tells_the_same_function_from_another(pair, tmp_path, capsys):
    words = ["--model", str(pair.target), "--output", str(tmp_path / "big")]
    assert inflate.main([*words, "--size-gb", "0.002", "--dtype", "float32", "--check"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"prompt {n}: identical (32 tokens)" for n in range(1, 5)]
    assert "2 MB as stored (float32), 2 MB as computed" in err

    tensors = load_file(tmp_path / "big" / "model-00001-of-00001.safetensors")
    tensors["model.norm.weight"] *= -1
    save_file(tensors, tmp_path / "big" / "model-00001-of-00001.safetensors", {"format": "pt"})
    assert inflate.main([*words, "--check"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(
        "parts at new token 0: " in line and "(its lead: " in line for line in lines
    )
