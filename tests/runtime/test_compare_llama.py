"""scripts/compare_llama.py and scripts/write_gguf.py: what is written, started and said, without llama.cpp. Never how fast."""

import importlib.util
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from flowspec.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


write_gguf = script("write_gguf")
compare = script("compare_llama")


def run(
    side: str, prompt: int, tokens: list[int], seconds: float, gaps: list[float] | None = None
) -> compare.Run:
    return compare.Run(prompt, 0, 0, side, tokens, gaps, 0.0, seconds, {})


# ---- GGUF ------------------------------------------------------------------------------------------
def test_turning_neighbours_of_interleaved_rows_is_turning_halves():
    """llama.cpp turns rows (2 i, 2 i + 1) of a head, transformers rows (i, i + size / 2): scores must not tell."""
    heads, size, hidden, positions = 3, 8, 5, 4
    torch.manual_seed(1)
    weights, x = (
        [torch.randn(heads * size, hidden) for _ in range(2)],
        torch.randn(positions, hidden),
    )
    angles = torch.arange(positions)[:, None] * 100.0 ** (
        -torch.arange(0, size, 2) / size
    )  # [positions, size / 2]

    def seen(weight: torch.Tensor) -> torch.Tensor:
        return (x @ weight.T).view(positions, heads, size).transpose(0, 1)

    def neighbours(rows: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)

    both = torch.cat([angles, angles], -1)[None]
    q, k = apply_rotary_pos_emb(
        seen(weights[0])[None], seen(weights[1])[None], both.cos(), both.sin()
    )
    ours, theirs = (neighbours(seen(write_gguf.interleaved(weight, heads))) for weight in weights)
    torch.testing.assert_close(ours @ theirs.transpose(-1, -2), (q @ k.transpose(-1, -2))[0])


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_holds_the_checkpoint(pair, tmp_path, tied):
    gguf = pytest.importorskip("gguf", reason="writing GGUF needs gguf (requirements_llama.txt)")
    sizes = dict(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
    )
    model = LlamaForCausalLM(
        LlamaConfig(**sizes, tie_word_embeddings=tied, max_position_embeddings=128, eos_token_id=3)
    )
    model.save_pretrained(tmp_path / "model")
    shutil.copy(pair.target / "tokenizer.json", tmp_path / "model")
    assert (
        write_gguf.main(
            ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "model.gguf")]
        )
        == 0
    )
    found = gguf.GGUFReader(tmp_path / "model.gguf")
    tensors, state = {each.name: each.data for each in found.tensors}, model.state_dict()
    assert len(tensors) == 2 * 9 + (2 if tied else 3) and ("output.weight" in tensors) != tied
    np.testing.assert_array_equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    np.testing.assert_array_equal(
        tensors["blk.1.ffn_down.weight"], state["model.layers.1.mlp.down_proj.weight"]
    )
    key = state["model.layers.1.self_attn.k_proj.weight"]
    np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"], write_gguf.interleaved(key, 2))
    told = {
        name: found.get_field(f"llama.{name}").contents()
        for name in ("block_count", "attention.head_count_kv", "context_length")
    }
    assert told == {"block_count": 2, "attention.head_count_kv": 2, "context_length": 128}
    assert found.get_field("tokenizer.ggml.eos_token_id").contents() == 3
    read = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if tied or name != "model.embed_tokens.weight"
    )
    assert write_gguf.Llama.open(tmp_path / "model").read_weights == read


def test_what_gguf_cannot_say_is_refused(pair, tmp_path):
    shutil.copytree(pair.target, tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_text()
    for old, new in (
        ('"rope_type": "default"', '"rope_type": "linear", "factor": 2.0'),
        ('"llama"', '"mistral", "sliding_window": null'),
    ):
        assert old in config
        (tmp_path / "model" / "config.json").write_text(config.replace(old, new))
        with pytest.raises(UserError, match="only a Llama"):
            write_gguf.Llama.open(tmp_path / "model")


def test_a_missing_gguf_is_one_line_that_says_how_to_get_it(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install -r requirements_llama\.txt"):
        write_gguf.write_gguf(write_gguf.Llama.open(pair.target), tmp_path / "model.gguf")


# ---- what is started --------------------------------------------------------------------------------
def test_every_side_listens_on_loopback_and_computes_with_its_threads():
    sides = compare.llama_sides(3)
    assert [side.name for side in sides][:5] == [
        "rpc",
        "rpc draft 3",
        "rpc draft 8",
        "rpc q8_0",
        "rpc q8_0 draft 8",
    ]
    for side in sides:
        *remote, own = compare.commands(
            side, Path("bin"), Path("models"), 64, range(1, side.stages + 2)
        )
        assert len(remote) == (3 if side.name.startswith("rpc") else 0)
        for command in (*remote, own):
            assert command[command.index("--host") + 1] == "127.0.0.1"
        assert all(command[command.index("--threads") + 1] == "1" for command in remote)
        assert own[own.index("--threads") + 1] == ("1" if remote else "3")
        assert ("--rpc" in own) == bool(remote) and ("--model-draft" in own) == bool(side.drafted)


def test_variants_are_rings_of_their_own():
    found = compare.rings(Path("draft"), Path("head"), ["tree.budget=64"], ["dtype=int8"])
    assert [list(ring.sides) for ring in found] == [
        ["ar", "flowspec lm"], ["flowspec eagle"], ["ar dtype=int8", "flowspec lm dtype=int8"], ["flowspec eagle dtype=int8"],
    ]  # fmt: skip
    assert found[-1].overrides == ("tree.budget=64", "dtype=int8")


def test_sides_are_chosen_by_name():
    assert compare.chosen("rpc, ar", ["ar", "rpc", "one"]) == ["ar", "rpc"]
    with pytest.raises(UserError, match="no side 'two'"):
        compare.chosen("two", ["ar", "rpc"])


def test_a_command_that_ends_is_told_with_its_last_words(tmp_path):
    with compare.ExitStack() as stack:
        process = compare.start(stack, ["sh", "-c", "echo no such model; exit 3"], tmp_path / "log")
        with pytest.raises(
            SystemExit, match=r"rpc ended \(exit code 3\); its last words: no such model"
        ):
            compare.wait_for(process, lambda: False, "rpc", tmp_path / "log")


def test_bad_input_is_one_line(pair, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    folders = ["--model", str(pair.target), "--draft", str(pair.draft)]
    here = ["--llama", str(tmp_path)]
    for more in (
        [],
        here,
        ["--build", str(tmp_path)],
        [*here, "--repeats=0"],
        [*here, "--sides=x"],
        [*here, "dtype=int3", "--sides=ar"],
    ):
        assert compare.main([*folders, *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith("flowspec: ") and error.count("\n") == 1, error


# ---- what is said -----------------------------------------------------------------------------------
def test_ratios_are_of_pairs_and_limits_of_the_side_s_own_bytes():
    facts = {
        "ar": compare.Facts(4.0, 1, "ar"),
        "rpc": compare.Facts(4.0, 1, "ar"),
        "rpc draft 3": compare.Facts(4.0, 1, "ar"),
    }
    facts |= {
        "rpc draft 8": compare.Facts(4.0, 1, "ar"),
        "rpc q8_0": compare.Facts(1.0, 1, None),
        "one": compare.Facts(4.0, 2, "ar"),
    }
    seconds = {
        "ar": 2.0,
        "rpc": 1.0,
        "rpc draft 3": 0.5,
        "rpc draft 8": 0.25,
        "rpc q8_0": 0.5,
        "one": 0.5,
    }
    runs = [
        run(side, prompt, [1, 2, 3], (prompt + 1) * each, [1.0] * 3)
        for side, each in seconds.items()
        for prompt in (0, 1)
    ]
    found = compare.summary(runs, facts, {1: 16.0, 2: 24.0})
    assert found["ar"]["decode_rate"] == {"median": 0.75, "min": 0.5, "max": 1.0, "count": 2}
    assert {name: each["median"] for name, each in found["ar"]["over"].items()} == {
        "rpc": 0.5,
        "best rpc draft": 0.125,
        "rpc q8_0": 0.25,
    }
    assert (found["ar"]["of_limit"], found["one"]["of_limit"], found["rpc q8_0"]["of_limit"]) == (
        0.75 / 4,
        3 / 6,
        3 / 16,
    )
    assert "one" in compare.table(found)


def test_sides_are_compared_with_their_own_plain_decoding():
    facts = {
        "ar": compare.Facts(4.0, 1, "ar"),
        "rpc": compare.Facts(4.0, 1, "ar"),
        "rpc q8_0": compare.Facts(1.0, 1, None),
    }
    facts |= {
        "ar dtype=int8": compare.Facts(1.0, 1, "ar dtype=int8"),
        "flowspec lm dtype=int8": compare.Facts(1.0, 1, "ar dtype=int8"),
    }
    runs = [
        run("ar", 0, [1, 2], 1.0, [1.0, 1e-6]),
        run("rpc", 0, [1, 3], 1.0),
        run("rpc q8_0", 0, [7, 7], 1.0),
    ]
    runs += [
        run("ar dtype=int8", 0, [5, 6], 1.0, [1.0, 1.0]),
        run("flowspec lm dtype=int8", 0, [5, 7], 1.0),
    ]
    found = {
        (each["side"], each["plain"], each["new_token"], each["tie"])
        for each in compare.differing(runs, facts)
    }
    assert found == {("rpc", "ar", 1, True), ("flowspec lm dtype=int8", "ar dtype=int8", 1, False)}
