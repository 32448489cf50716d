"""The split tool: what it writes is the checkpoint, whole or not at all, and bad input is one line."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flowspec.commands.split import main
from flowspec.errors import UserError
from flowspec.models import split as split_module
from flowspec.models import weights
from flowspec.models.families import (
    FAMILIES,
    check_config,
    layer_of,
    module_tensors,
    settled,
)
from flowspec.models.manifest import FORMAT, Manifest, verify_files
from flowspec.models.split import layer_ranges, split
from flowspec.models.weights import Checkpoint, Entry, TensorFile, write_tensors

ROOT = Path(__file__).resolve().parents[2]
TINY = dict(
    vocab_size=61, hidden_size=16, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24,
    max_position_embeddings=64,
)  # fmt: skip


def make_llama(folder: Path, tied: bool = False, shard: str = "1GB") -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY, tie_word_embeddings=tied))
    model.save_pretrained(folder, max_shard_size=shard)
    return model


@pytest.fixture
def llama(tmp_path) -> Path:
    make_llama(tmp_path / "model")
    return tmp_path / "model"


def stage_tensors(manifest: Manifest) -> dict[str, torch.Tensor]:
    """Everything the stages hold, by its name in the checkpoint; no tensor may be in two of them."""
    found: dict[str, torch.Tensor] = {}
    for rank in manifest.ranks[1:]:
        part = load_file(manifest.path(rank))
        assert not part.keys() & found.keys()
        assert {layer_of(name) for name in part} - {None} == set(range(*rank.layers))
        found |= part
    return found


def folder_state(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- what is written -------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shard", ["1GB", "8KB"])
@pytest.mark.parametrize(("stages", "layers"), [(1, None), (2, None), (3, "1,3,1"), (5, None)])
def test_the_stages_together_are_the_checkpoint(tmp_path, tied, shard, stages, layers):
    stored = make_llama(tmp_path / "model", tied, shard).state_dict()
    manifest = split(str(tmp_path / "model"), stages, tmp_path / "out", layers=layers)
    found = stage_tensors(manifest)
    for rank in (0, stages):
        found |= load_file(manifest.path(manifest.ranks[rank].lm_head))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert manifest.tied is tied and manifest.topology.stages == stages


def test_every_rank_gets_its_part(tmp_path, llama):
    (llama / "tokenizer.json").write_text("{}")
    (llama / "chat_template.jinja").write_text("{{ messages }}")
    manifest = split(str(llama), 3, tmp_path / "deep" / "out")
    names = [set(load_file(manifest.path(rank))) for rank in manifest.ranks]
    assert names[0] == set()
    assert [name in each for each in names for name in ("model.embed_tokens.weight", "model.norm.weight")] == [False] * 2 + [
        True, False, False, False, False, True,
    ]  # fmt: skip
    assert [rank.role for rank in manifest.ranks] == ["coordinator", "first", "stage", "last"]
    assert [rank.layers for rank in manifest.ranks] == [(0, 0), (0, 1), (1, 3), (3, 5)]
    assert [rank.lm_head is not None for rank in manifest.ranks] == [True, False, False, True]
    present = {path.name for path in manifest.folder(0).iterdir()}
    assert {
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "config.json",
    } < present
    assert {path.name for path in manifest.folder(2).iterdir()} == {
        "model.safetensors",
        "config.json",
    }


def test_transformers_reads_a_split_put_back_together(tmp_path, llama):
    manifest = split(str(llama), 2, tmp_path / "out")
    whole = stage_tensors(manifest) | load_file(manifest.path(manifest.ranks[2].lm_head))
    (tmp_path / "again").mkdir()
    save_file(whole, tmp_path / "again" / "model.safetensors", {"format": "pt"})
    (tmp_path / "again" / "config.json").write_bytes(
        (manifest.folder(1) / "config.json").read_bytes()
    )
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        logits = [
            LlamaForCausalLM.from_pretrained(folder)(tokens).logits
            for folder in (llama, tmp_path / "again")
        ]
    assert torch.equal(*logits)


def test_dtype_is_converted(tmp_path, llama):
    stored = load_file(llama / "model.safetensors")
    manifest = split(str(llama), 2, tmp_path / "out", dtype="bfloat16")
    assert all(
        torch.equal(tensor, stored[name].bfloat16())
        for name, tensor in stage_tensors(manifest).items()
    )
    assert manifest.dtype == "bfloat16"
    assert json.loads((manifest.folder(1) / "config.json").read_text())["dtype"] == "bfloat16"
    assert split(str(llama), 2, tmp_path / "auto").dtype == "float32"


def test_float16_that_would_overflow_is_refused(tmp_path, llama):
    stored = load_file(llama / "model.safetensors")
    stored["model.norm.weight"][3] = 1e6
    save_file(stored, llama / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight has values too large for float16"):
        split(str(llama), 2, tmp_path / "out", dtype="float16")


def test_a_head_that_differs_from_the_embedding_is_kept_though_the_config_ties_them(
    tmp_path, llama
):
    edit_config(llama, tie_word_embeddings=True)
    manifest = split(str(llama), 2, tmp_path / "out")
    head = load_file(manifest.path(manifest.ranks[0].lm_head))["lm_head.weight"]
    assert (
        torch.equal(head, load_file(llama / "model.safetensors")["lm_head.weight"])
        and not manifest.tied
    )


def test_tensors_of_no_use_are_left_out(tmp_path, llama, capsys):
    stored = load_file(llama / "model.safetensors")
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2),
        "value_head.weight": torch.ones(3),
    }
    save_file(stored | extra, llama / "model.safetensors", {"format": "pt"})
    assert main(["--model", str(llama), "--stages", "2", "--output", str(tmp_path / "out")]) == 0
    assert not extra.keys() & stage_tensors(Manifest.load(tmp_path / "out")).keys()
    assert "left out 1 tensors" in capsys.readouterr().err


def test_layers_are_near_equal_with_the_remainder_late():
    assert layer_ranges(8, 3) == [(0, 2), (2, 5), (5, 8)]
    assert layer_ranges(8, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert layer_ranges(5, 2, "4,1") == [(0, 4), (4, 5)]


# ---- bad input -------------------------------------------------------------------------------------
def refused(capsys, *argv: str) -> str:
    """The one line that main prints; nothing else, and exit code 2."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.startswith("flowspec: ") and error.endswith("\n") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--stages", "0"], "--stages is 0"),
        (["--stages", "-1"], "--stages is -1"),
        (["--stages", "6"], "only 5 layers"),
        (["--stages", "two"], "invalid int value"),
        (["--stages", "2", "--layers", "5"], "names 1 stages, --stages is 2"),
        (["--stages", "2", "--layers", "2,x"], "must be integers"),
        (["--stages", "2", "--layers", ""], "must be integers"),
        (["--stages", "2", "--layers", "2,2"], "adds up to 4, the model has 5"),
        (["--stages", "2", "--layers", "5,0"], "at least one layer"),
        (["--stages", "2", "--dtype", "float8"], "--dtype is 'float8'"),
        (["--stages", "2", "--speed", "9"], "--speed"),
        ([], "--stages"),
        (["--stages", "2", "--model", "./nowhere"], "no such folder"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, llama, capsys, arguments, said):
    assert said in refused(
        capsys, "--model", str(llama), "--output", str(tmp_path / "new" / "out"), *arguments
    )
    assert not (tmp_path / "new").exists()


def damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def drop_tensors(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in stored.items() if "layers.3.mlp" not in k}, folder / "model.safetensors"
    )


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size - 5)


def garble(folder: Path) -> None:
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[8:20] = b"x" * 12
    (folder / "model.safetensors").write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (damage_config, "config.json is not valid JSON"),
        (lambda folder: (folder / "config.json").unlink(), "config.json: No such file"),
        (
            lambda folder: edit_config(folder, model_type="rwkv"),
            "model_type 'rwkv' is not supported",
        ),
        (
            lambda folder: edit_config(folder, num_hidden_layers=None),
            "num_hidden_layers must be a positive integer",
        ),
        (lambda folder: edit_config(folder, num_hidden_layers=4), "weights of layer 4"),
        (
            lambda folder: edit_config(folder, vocab_size=60),
            "model.embed_tokens.weight has shape [61, 16]",
        ),
        (
            lambda folder: edit_config(folder, quantization_config={"bits": 4}),
            "quantization_config",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (only_pickles, "convert them"),
        (drop_tensors, "model.layers.3.mlp.gate_proj.weight"),
        (truncate, "model.safetensors is truncated"),
        (garble, "model.safetensors has a damaged safetensors header"),
    ],
)
def test_bad_checkpoints_are_one_line(tmp_path, llama, capsys, spoil, said):
    spoil(llama)
    assert said in refused(
        capsys, "--model", str(llama), "--stages", "2", "--output", str(tmp_path / "out")
    )
    assert not (tmp_path / "out").exists()


def test_a_missing_shard_is_named(tmp_path, capsys):
    make_llama(tmp_path / "model", shard="8KB")
    shard = sorted((tmp_path / "model").glob("model-00002*"))[0]
    shard.unlink()
    assert shard.name in refused(
        capsys,
        "--model",
        str(tmp_path / "model"),
        "--stages",
        "2",
        "--output",
        str(tmp_path / "out"),
    )


def test_an_output_that_is_no_split_is_left_alone(tmp_path, llama, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    arguments = ("--model", str(llama), "--stages", "2", "--output")
    assert "holds no stages.yaml" in refused(capsys, *arguments, str(out))
    (out / "stages.yaml").write_text("")
    assert "thesis.txt" in refused(capsys, *arguments, str(out))
    assert "is a file" in refused(capsys, *arguments, str(out / "thesis.txt"))
    assert "cannot write" in refused(capsys, *arguments, str(out / "thesis.txt" / "out"))
    assert (out / "thesis.txt").read_text() == "mine"


def test_the_script_prints_one_line_and_exits_2(tmp_path, llama):
    command = [
        sys.executable,
        str(ROOT / "split_models.py"),
        "--model",
        str(llama),
        "--stages",
        "9",
        "--output",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "flowspec: --stages is 9, the model has only 5 layers\n"


def test_a_hub_id_that_cannot_be_had_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    arguments = (
        "--model",
        "flowspec-test/absent",
        "--stages",
        "2",
        "--output",
        str(tmp_path / "out"),
    )
    assert "hub did not give it" in refused(capsys, *arguments)


# ---- whole or not at all ---------------------------------------------------------------------------
def failing_after(monkeypatch, calls: int, error: BaseException) -> None:
    """Let that many writes pass, then fail."""
    left = [calls]
    real = weights._write_all

    def write(file, piece):
        left[0] -= 1
        if left[0] < 0:
            raise error
        real(file, piece)

    monkeypatch.setattr(weights, "_write_all", write)


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [(FULL, 2, "no space left"), (KeyboardInterrupt(), 130, "interrupted")],
)
@pytest.mark.parametrize("calls", [0, 7, 50])
@pytest.mark.parametrize("older", [False, True])
def test_a_split_that_fails_leaves_the_older_one_and_no_debris(
    tmp_path, llama, monkeypatch, capsys, error, code, said, calls, older
):
    work = tmp_path / "work"
    if older:
        split(str(llama), 4, work / "out")
    before = folder_state(tmp_path)
    failing_after(monkeypatch, calls, error)
    capsys.readouterr()
    assert main(["--model", str(llama), "--stages", "2", "--output", str(work / "out")]) == code
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert folder_state(tmp_path) == before and work.exists() == older
    assert not older or os.listdir(work) == ["out"]


def test_a_failed_swap_puts_the_older_split_back(tmp_path, llama, monkeypatch):
    split(str(llama), 4, tmp_path / "work" / "out")
    before, real = folder_state(tmp_path), os.rename

    def rename(source, target):
        if ".partial-" in str(source):
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(source, target)

    monkeypatch.setattr(split_module.os, "rename", rename)
    with pytest.raises(UserError, match="busy"):
        split(str(llama), 2, tmp_path / "work" / "out")
    assert folder_state(tmp_path) == before and os.listdir(tmp_path / "work") == ["out"]


def test_too_small_a_disk_is_told_beforehand(tmp_path, llama, monkeypatch, capsys):
    monkeypatch.setattr(
        split_module.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})
    )
    assert "no space left" in refused(
        capsys, "--model", str(llama), "--stages", "2", "--output", str(tmp_path / "a" / "out")
    )
    assert not (tmp_path / "a").exists()


def test_an_older_split_is_replaced(tmp_path, llama):
    split(str(llama), 4, tmp_path / "work" / "out")
    split(str(llama), 2, tmp_path / "work" / "out")
    assert Manifest.load(tmp_path / "work" / "out").topology.stages == 2
    assert sorted(os.listdir(tmp_path / "work" / "out")) == [
        "rank_00",
        "rank_01",
        "rank_02",
        "stages.yaml",
    ]
    assert os.listdir(tmp_path / "work") == ["out"]


# ---- the manifest ----------------------------------------------------------------------------------
def test_the_manifest_round_trips(tmp_path, llama):
    written = split(str(llama), 3, tmp_path / "out")
    assert (
        Manifest.load(tmp_path / "out")
        == Manifest.load(tmp_path / "out" / "stages.yaml")
        == written
    )
    assert written.root == Manifest.load(tmp_path / "out").root == tmp_path / "out"
    written.save(tmp_path / "copy.yaml")
    assert Manifest.load(tmp_path / "copy.yaml") == written


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda m: m.update(format=FORMAT + 1), "made by a newer flowspec"),
        (lambda m: m.pop("format"), "format is missing"),
        (lambda m: m.update(format=0), "format is 0"),
        (lambda m: m.pop("tied"), "tied is missing"),
        (lambda m: m.update(num_layers="five"), "num_layers is 'five'"),
        (lambda m: m.update(num_layers=6), "the ranks hold 5 of 6 layers"),
        (lambda m: m["ranks"].pop(2), "rank 2 is described as rank 3"),
        (lambda m: m.update(ranks=m["ranks"][:1]), "the ranks hold 0 of 5"),
        (lambda m: m["ranks"][2].update(layers=[2, 3]), "should follow on layer 1"),
        (lambda m: m["ranks"][2].update(layers=3), "layers is 3"),
        (lambda m: m["ranks"][2].update(layers=[1, 2, 3]), "[1, 2, 3]: expected a list of 2"),
        (lambda m: m["ranks"][2].update(bytes=-1), "has bytes -1"),
        (lambda m: m.update(hidden=3), "unknown key hidden: did you mean hidden_size"),
        (lambda m: m["ranks"][1].pop("sha256"), "ranks.1.sha256 is missing"),
        (lambda m: m["ranks"][1].update(file="../secret"), "lies outside"),
        (lambda m: m["ranks"].__setitem__(1, "rank"), "ranks.1 must be a mapping"),
        (lambda m: m["ranks"][1].update(extra="files"), "extra is 'files'"),
        (lambda m: m["ranks"][1].update(extra=[5]), "ranks.1.extra.0 must be a mapping"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused(tmp_path, llama, change, said):
    split(str(llama), 3, tmp_path / "out")
    path = tmp_path / "out" / "stages.yaml"
    plain = yaml.safe_load(path.read_text())
    change(plain)
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(UserError) as error:
        Manifest.load(path)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["a: [", "just text", "", "\x00", "- 1"])
def test_a_manifest_that_is_none_is_refused(tmp_path, text):
    (tmp_path / "stages.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"stages\.yaml: no.*must be the manifest of a split model: run"
    ):
        Manifest.load(tmp_path)


def test_a_missing_manifest_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"run split_models\.py"):
        Manifest.load(tmp_path)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (flip, "is damaged"),
        (Path.unlink, "is missing"),
        (lambda path: os.truncate(path, 9), "has 9 bytes instead of"),
    ],
)
@pytest.mark.parametrize(
    "name", ["rank_02/model.safetensors", "rank_03/lm_head.safetensors", "rank_01/config.json"]
)
def test_a_spoilt_file_is_named(tmp_path, llama, spoil, said, name):
    manifest = split(str(llama), 3, tmp_path / "out")
    verify_files(manifest, range(4))
    spoil(tmp_path / "out" / name)
    with pytest.raises(UserError) as error:
        verify_files(manifest, [1, 2, 3])
    assert said in str(error.value) and name in str(error.value)
    verify_files(manifest, [])


def test_only_the_files_asked_for_are_verified(tmp_path, llama):
    manifest = split(str(llama), 3, tmp_path / "out")
    (tmp_path / "out" / "rank_03" / "lm_head.safetensors").unlink()
    (tmp_path / "out" / "rank_01" / "model.safetensors").unlink()
    verify_files(manifest, [0, 2, 3], lm_head=[0])
    with pytest.raises(UserError, match="rank_03/lm_head"):
        verify_files(manifest, [3])


def test_hashes_are_kept_until_a_file_changes(tmp_path, llama, monkeypatch):
    manifest = split(str(llama), 3, tmp_path / "out")
    verify_files(manifest, range(4))
    monkeypatch.setattr(
        "flowspec.models.manifest.sha256_of", lambda path: pytest.fail(f"{path} was read again")
    )
    verify_files(manifest, range(4))


def test_a_useless_cache_is_ignored(tmp_path, llama, monkeypatch):
    manifest = split(str(llama), 1, tmp_path / "out")
    for text in ("{", "[]", '{"rank_01/model.safetensors": 3}'):
        (tmp_path / "out" / ".sha256.json").write_text(text)
        verify_files(manifest, range(2))
    (tmp_path / "out" / ".sha256.json").unlink()
    (tmp_path / "out" / ".sha256.json").mkdir()
    verify_files(manifest, range(2))
    assert not list((tmp_path / "out").glob("*.tmp*"))


# ---- families --------------------------------------------------------------------------------------
def config_of(kind: type, **changes) -> dict:
    return json.loads(kind(**(TINY | changes)).to_json_string(use_diff=False))


def test_the_supported_are_accepted():
    for config in (
        config_of(LlamaConfig),
        config_of(LlamaConfig, rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                                "high_freq_factor": 4.0, "original_max_position_embeddings": 32}),
        config_of(MistralConfig), config_of(MixtralConfig), config_of(Qwen2Config), config_of(Qwen3Config),
        {key: value for key, value in config_of(Qwen2Config).items() if key != "layer_types"} | {"sliding_window": 4096},
    ):  # fmt: skip
        check_config(settled(config))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            config_of(LlamaConfig) | {"model_type": "no_such"},
            "model_type 'no_such' is not supported;",
        ),
        (config_of(LlamaConfig) | {"model_type": None}, "model_type None"),
        *[
            (
                config_of(LlamaConfig) | {"model_type": kind},
                f"{kind!r} is not supported: its layers keep a state",
            )
            for kind in (
                "qwen3_next",
                "mamba",
                "jamba",
                "rwkv",
                "lfm2",
                "falcon_h1",
                "recurrent_gemma",
            )
        ],
        *[
            (
                config_of(LlamaConfig) | {"model_type": kind},
                f"{kind!r} is not supported: it has an encoder",
            )
            for kind in ("t5", "bart", "whisper", "pegasus")
        ],
        (
            config_of(LlamaConfig) | {"model_type": "falcon"},
            "'falcon' is not supported: its attention asks for no other one",
        ),
        (
            config_of(LlamaConfig) | {"model_type": "new", "is_encoder_decoder": True},
            "'new' is not supported: it has an encoder",
        ),
        (
            config_of(Qwen3Config) | {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types holds chunked_attention",
        ),
        (
            config_of(LlamaConfig) | {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            "rope type dynamic",
        ),
        (
            config_of(LlamaConfig) | {"rope_parameters": {"rope_type": "longrope"}},
            "rope type longrope",
        ),
        (
            config_of(LlamaConfig)
            | {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
            "rope type dynamic",
        ),
    ],
)
def test_the_others_are_refused_by_name(config, said):
    with pytest.raises(UserError) as error:
        check_config(settled(config))
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_its_classes(name):
    classes = FAMILIES[name].classes()
    assert classes.config.model_type == name and classes.model.config_class is classes.config


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        (LlamaForCausalLM, LlamaConfig(**TINY, attention_bias=True, mlp_bias=True)),
        (Qwen2ForCausalLM, Qwen2Config(**TINY)),
        (
            Qwen3ForCausalLM,
            Qwen3Config(**TINY, attention_bias=True, head_dim=8, tie_word_embeddings=True),
        ),
        (MixtralForCausalLM, MixtralConfig(**TINY, num_local_experts=3)),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_stage_gets_what_transformers_own_layers_hold(tmp_path, kind, config, fused):
    """Names and values of a stage's tensors are those of the model's state dict, fused experts included."""
    model = kind(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "model", save_original_format=not fused)
    manifest = split(str(tmp_path / "model"), 2, tmp_path / "out")
    expected, seen = model.model.state_dict(), set()
    for rank in manifest.ranks[1:]:
        for name, tensor in module_tensors(TensorFile(manifest.path(rank)), rank.layers[0]):
            head, layer, *rest = name.split(".", 2)
            full = f"layers.{int(layer) + rank.layers[0]}.{rest[0]}" if head == "layers" else name
            assert torch.equal(tensor, expected[full]), full
            seen.add(full)
    assert seen == expected.keys()


def test_stage_tensors_are_converted_while_they_load(tmp_path):
    model = MixtralForCausalLM(MixtralConfig(**TINY, num_local_experts=3))
    model.save_pretrained(tmp_path / "model")
    manifest = split(str(tmp_path / "model"), 1, tmp_path / "out")
    loaded = dict(module_tensors(TensorFile(manifest.path(manifest.ranks[1])), 0, torch.bfloat16))
    assert all(
        torch.equal(tensor, model.model.state_dict()[name].bfloat16())
        for name, tensor in loaded.items()
    )


# ---- safetensors files -----------------------------------------------------------------------------
def test_files_are_read_as_safetensors_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "CONVERTED", 4)
    tensors = {
        "half": torch.randn(5, 3).half(), "brain": torch.randn(4, 2, 2).bfloat16(), "byte": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 4), "scalar": torch.tensor(2.5), "flag": torch.tensor([True, False]), "long": torch.arange(9),
    }  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors", {"note": "x"})
    file = TensorFile(tmp_path / "a.safetensors")
    assert set(file.names) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name), tensor) and file.read(name).dtype == tensor.dtype
        assert torch.equal(file.read(name, torch.float64), tensor.double())
        assert (
            b"".join(file.chunks(name, 3)) == tensor.flatten().view(torch.uint8).numpy().tobytes()
        )
    assert file.info("half").shape == (5, 3) and file.info("half").dtype == "F16"
    with pytest.raises(UserError, match="has no tensor other"):
        file.read("other")


def test_files_are_written_as_safetensors_reads_them(tmp_path):
    tensors = {
        "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "half": torch.randn(3).half(),
        "empty": torch.empty(0, 2),
    }
    names = {torch.uint8: "U8", torch.float16: "F16", torch.float32: "F32"}
    entries = [
        Entry(
            name,
            names[tensor.dtype],
            tuple(tensor.shape),
            lambda tensor=tensor: [tensor.flatten().view(torch.uint8).numpy().tobytes()],
        )
        for name, tensor in tensors.items()
    ]
    size, digest = write_tensors(tmp_path / "b.safetensors", entries, {"format": "pt"})
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == tensors.keys() and all(
        torch.equal(again[name], tensors[name]) for name in tensors
    )
    assert size == (tmp_path / "b.safetensors").stat().st_size and len(digest) == 64
    with pytest.raises(ValueError, match="announced"):
        write_tensors(tmp_path / "c.safetensors", [entries[0]._replace(shape=(9,))])
    assert os.listdir(tmp_path) == ["b.safetensors"]


@pytest.mark.parametrize(
    "raw",
    [
        b"", b"1234567", (99).to_bytes(8, "little"), (2**60).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xfe", (2).to_bytes(8, "little") + b"{}more",
        *[len(text).to_bytes(8, "little") + text.encode() + b"12345678" for text in (
            '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}', '{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
            '{"a":{"dtype":"Q4","shape":[2],"data_offsets":[0,8]}}', '{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}',
            '{"a":{"dtype":"F32","shape":[2]}}', '{"a":3}', '{"a":{"dtype":[],"shape":[2],"data_offsets":[0,8]}}',
        )],
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(UserError) as error:
        Checkpoint(tmp_path)
    assert "model.safetensors" in str(error.value)


def test_a_damaged_index_is_named(tmp_path):
    for text in ("{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json cannot be read"):
            Checkpoint(tmp_path)


# ---- memory ----------------------------------------------------------------------------------------
PEAK = """
import sys
from flowspec.models.split import split
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before = peak()
split(sys.argv[1], 3, sys.argv[2])
assert "torch" not in sys.modules
print(peak() - before)
"""


def random_llama(folder: Path, hidden: int = 512, layers: int = 4, vocab: int = 4096) -> int:
    """A sharded checkpoint of random bytes, a file a layer; returns its size in bytes."""
    sizes = dict(
        TINY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        vocab_size=vocab,
        intermediate_size=4 * hidden,
        num_attention_heads=8,
    )
    folder.mkdir()
    config = LlamaConfig(**sizes, tie_word_embeddings=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {
            name: tuple(tensor.shape)
            for name, tensor in LlamaForCausalLM(config).state_dict().items()
            if name != "lm_head.weight"
        }
    shards: dict[str, list[Entry]] = {}
    for name, shape in shapes.items():
        entry = Entry(name, "F32", shape, list)
        shards.setdefault(f"model-{layer_of(name)}.safetensors", []).append(
            entry._replace(chunks=lambda e=entry: [os.urandom(e.nbytes)])
        )
    total = sum(write_tensors(folder / shard, entries)[0] for shard, entries in shards.items())
    index = {
        "weight_map": {entry.name: shard for shard, entries in shards.items() for entry in entries}
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_split_streams(tmp_path):
    """The peak is read from VmHWM: getrusage's maximum survives exec and would be the test runner's own."""
    assert random_llama(tmp_path / "model") > 64e6
    command = [sys.executable, "-c", PEAK, str(tmp_path / "model"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) < 20_000, f"{done.stdout} KiB above an empty start"


LOADED = """
import sys, torch
from flowspec.models import stage
from flowspec.models.manifest import Manifest
def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
torch.set_num_threads(1)
manifest = Manifest.load(sys.argv[1])
stage.family_of(stage.read_config(manifest.folder(1))).classes()
before = peak()
model = stage.load_stage(manifest, 1, torch.float32, "cpu")
print(peak() - before, model.size // 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("members", [1, 2])
def test_a_stage_takes_little_more_than_its_weights(tmp_path, members):
    """Also while it is loaded, packed and stacked: 60 MB a layer, a layer at a time."""
    random_llama(tmp_path / "model", hidden=1024, layers=5, vocab=512)
    split(str(tmp_path / "model"), 1, tmp_path / "out", members=members)
    code = LOADED.replace('"cpu")', '"cpu", links=links)') if members > 1 else LOADED
    code = code.replace(
        "before = peak()",
        "from flowspec.comm.group import threads\nlinks = threads(2)[0]\nbefore = peak()",
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    more, size = map(int, done.stdout.split())
    assert size > 250_000 // members
    assert more < 1.2 * size + 90_000, f"{more} KiB for {size} KiB of weights"
