"""Quantised checkpoints: what is read of them is what the format's own packer meant, whole or split."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from flowspec.commands.split import main as split
from flowspec.errors import UserError
from flowspec.models.families import check_config
from flowspec.models.manifest import Manifest
from flowspec.models.quantised import Dequantised, plain
from flowspec.models.stage import load_head, load_stage, load_whole
from flowspec.models.unsplit import load_unsplit
from flowspec.models.weights import Checkpoint
from tests.quantised import FORMATS, save_quantised, scheme, section
from tests.stages import Hand

SMALL = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL, tie_word_embeddings=False),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=3, num_experts_per_tok=2),
}
LEFT_OUT = "model.layers.1.mlp.up_proj"
TOKENS = torch.arange(1, 30)


def checkpoint_names(model) -> dict[str, torch.Tensor]:
    """The model's tensors as a checkpoint has them: Mixtral's experts one by one."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        stem = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")[0]
        if name.endswith("experts.gate_up_proj"):  # [experts, 2 * inner, hidden]
            for k, (gate, up) in enumerate(both.chunk(2) for both in tensor):
                tensors |= {f"{stem}.{k}.w1.weight": gate, f"{stem}.{k}.w3.weight": up}
        elif name.endswith("experts.down_proj"):
            tensors |= {f"{stem}.{k}.w2.weight": down for k, down in enumerate(tensor)}
        else:
            moe = ".mlp.gate." in name
            tensors[name.replace(".mlp.", ".block_sparse_moe.") if moe else name] = tensor
    return {name: tensor.clone() for name, tensor in tensors.items()}


def dequantised(model, meant: dict) -> torch.nn.Module:
    """The same model with the matrices that the quantised ones mean."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            stem = name.replace(".mlp.", ".block_sparse_moe.").rpartition(".")[0]
            experts = range(getattr(model.config, "num_local_experts", 0))
            if name.endswith("experts.gate_up_proj"):
                each = [
                    torch.cat([meant[f"{stem}.{k}.w{j}.weight"] for j in (1, 3)]) for k in experts
                ]
                parameter.copy_(torch.stack(each))
            elif name.endswith("experts.down_proj"):
                parameter.copy_(torch.stack([meant[f"{stem}.{k}.w2.weight"] for k in experts]))
            else:
                moe = ".mlp.gate." in name
                parameter.copy_(meant[name.replace(".mlp.", ".block_sparse_moe.") if moe else name])
    return model


def made(folder, family: str, form: str) -> torch.Tensor:
    """Write a quantised checkpoint; return transformers' logits [tokens, vocabulary] of the model that it means."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    config = model.config.to_dict() | {"sliding_window": None}
    tensors = checkpoint_names(model)
    meant = save_quantised(folder, tensors, config, form, leave_out=(LEFT_OUT,))
    (folder / "tokenizer.json").write_text("{}")
    with torch.no_grad():
        return dequantised(model, meant)(TOKENS[None]).logits[0]


@pytest.mark.parametrize(
    ("family", "form"), [*(("llama", form) for form in FORMATS), ("mixtral", "gptq")]
)
def test_whole_and_split_it_computes_what_the_dequantised_model_does(tmp_path, family, form):
    wanted = made(tmp_path / "whole", family, form)
    model, head = load_whole(tmp_path / "whole", torch.float32, "cpu")
    torch.testing.assert_close(head(Hand(model).prefill(TOKENS)), wanted, rtol=1e-4, atol=1e-4)

    words = ["--model", str(tmp_path / "whole"), "--stages", "2", "--output", str(tmp_path / "out")]
    assert split(words) in (0, None)
    manifest, rows = Manifest.load(tmp_path / "out"), TOKENS
    for rank in (1, 2):
        rows = Hand(load_stage(manifest, rank, torch.float32, "cpu")).prefill(rows)
    head = load_head(manifest, 0, torch.float32, "cpu")
    torch.testing.assert_close(head(rows), wanted, rtol=1e-4, atol=1e-4)


def test_the_stages_hold_the_tensors_as_they_are_stored(tmp_path):
    made(tmp_path / "whole", "llama", "gptq act-order")
    words = ["--model", str(tmp_path / "whole"), "--stages", "2", "--output", str(tmp_path / "out")]
    split(words)
    manifest, whole = Manifest.load(tmp_path / "out"), Checkpoint(tmp_path / "whole")
    stored = {
        name: tensor
        for rank in (1, 2)
        for name, tensor in load_file(manifest.path(manifest.ranks[rank])).items()
    }
    assert manifest.dtype == "float16"  # of the matrices' scales, which is the matrices'
    assert LEFT_OUT + ".weight" in stored and LEFT_OUT + ".qweight" not in stored
    assert set(stored) == set(whole.names) - {"lm_head.weight"}
    for name, tensor in stored.items():
        assert tensor.dtype == whole.read(name).dtype and torch.equal(tensor, whole.read(name))


def test_an_lm_head_may_be_quantised(tmp_path):
    wanted = made(tmp_path / "whole", "llama", "gptq")
    folder, file = tmp_path / "whole", Checkpoint(tmp_path / "whole")
    tensors = {name: file.read(name) for name in file.names}
    parts, meant = FORMATS["gptq"][0](tensors.pop("lm_head.weight"))
    tensors |= {f"lm_head.{leaf}": part.contiguous() for leaf, part in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    split(["--model", str(folder), "--stages", "1", "--output", str(tmp_path / "out")])
    rows = torch.randn(5, 64)
    for head in (
        load_head(Manifest.load(tmp_path / "out"), 0, torch.float32, "cpu"),
        load_whole(folder, torch.float32, "cpu")[1],
    ):
        torch.testing.assert_close(head(rows), rows @ meant.float().T, rtol=1e-4, atol=1e-4)
    assert wanted.shape[1] == len(meant)


@pytest.mark.parametrize("form", FORMATS)
def test_every_matrix_is_exact(tmp_path, form):
    """Shapes that fill no word and no group to the end, where the format has them; every bit as the packer meant it."""
    torch.manual_seed(8)
    inputs = 96 if form.startswith(("awq", "gptq")) else 100 if "channels" in form else 64
    weight = torch.randn(7 if form.startswith("packed") else 40, inputs)
    meant = save_quantised(tmp_path, {"model.layers.0.x.weight": weight}, {}, form)
    config = json.loads((tmp_path / "config.json").read_text())
    file = plain(Checkpoint(tmp_path), config, "here")
    assert isinstance(file, Dequantised) and file.names == ["model.layers.0.x.weight"]
    assert torch.equal(file.read(file.names[0]), meant[file.names[0]])
    assert file.info(file.names[0]).shape == weight.shape


def test_a_rule_for_some_layers(tmp_path):
    """GPTQModel's `dynamic`, and compressed-tensors' groups of targets: each layer by the numbers of its own."""
    torch.manual_seed(9)
    names = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"]
    for forms, about in (
        (("gptq", "gptq 8 bits"), section("gptq", dynamic={"+:.*mlp.*": {"bits": 8}, "-:x": {}})),
        (("packed", "packed 8 bits"), scheme(4)),
    ):
        if "config_groups" in about:
            eight = scheme(8, None, symmetric=False)["config_groups"]["group_0"]
            about["config_groups"]["group_1"] = eight | {"targets": ["re:.*mlp.*"]}
        tensors, meant = {}, {}
        for name, form in zip(names, forms, strict=True):
            parts, meant[name] = FORMATS[form][0](torch.randn(32, 64))
            tensors |= {f"{name}.{leaf}": part.contiguous() for leaf, part in parts.items()}
        save_file(tensors, tmp_path / "model.safetensors")
        file = plain(Checkpoint(tmp_path), {"quantization_config": about}, "here")
        for name in names:
            assert torch.equal(file.read(name + ".weight"), meant[name])


GROUP = "config_groups.group_0"
ACTIVATIONS = {"num_bits": 8, "type": "int", "dynamic": True}


@pytest.mark.parametrize(
    ("about", "said"),
    [
        ({"bits": 4}, "quant_method None is not supported"),
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes' is not supported"),
        ({"quant_method": "fp8"}, "'fp8'"),
        ({"quant_method": ["gptq"]}, "['gptq']"),
        ("gptq", "must be an object"),
        (section("gptq", 3), "bits is 3; supported: 2, 4, 8"),
        (section("gptq", "four"), "bits is 'four'"),
        (section("gptq", group=0), "group_size is 0"),
        (section("gptq", checkpoint_format="marlin"), "checkpoint_format is 'marlin'"),
        (section("gptq", is_marlin_format=True), "is_marlin_format"),
        (section("gptq", dynamic={"+:(": {}}), "'(' is no regular expression"),
        (section("awq", version="gemv"), "version is 'gemv'; supported: gemm"),
        (section("awq", 8), "bits is 8; supported: 4"),
        (scheme(3), f"{GROUP}.weights.num_bits is 3"),
        (scheme(4, weights={"type": "float"}), f"{GROUP}.weights.type is 'float'"),
        (scheme(4, weights={"strategy": "block"}), f"{GROUP}.weights.strategy is 'block'"),
        (scheme(8, format="float-quantized"), "format is 'float-quantized'"),
        (scheme(4, format="nvfp4-pack-quantized"), "format is 'nvfp4-pack-quantized'"),
        (
            scheme(8, format="int-quantized", group_0={"input_activations": ACTIVATIONS}),
            f"{GROUP}.input_activations is {{'num_bits': 8, 'type': 'int', 'dynamic': True}}",
        ),
        (scheme(4, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (scheme(4, sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (scheme(4, config_groups={"W4A16": ["Linear"]}), "config_groups.W4A16"),
        (scheme(4, config_groups={}), "config_groups is {}"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(about, said):
    config = CONFIGS["llama"].to_dict() | {"quantization_config": about}
    with pytest.raises(UserError) as refusal:
        check_config(config)
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def spoiled(folder, leaf: str, change) -> str:
    """Change (None: leave out) one tensor of a checkpoint; return its name."""
    file = Checkpoint(folder)
    tensors = {name: file.read(name) for name in file.names}
    name = next(name for name in tensors if name.endswith("." + leaf))
    changed = change(tensors.pop(name))
    tensors |= {} if changed is None else {name: changed.contiguous()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return name


@pytest.mark.parametrize(
    ("form", "leaf", "change", "said"),
    [
        ("gptq", "qzeros", lambda t: None, "has no tensor"),
        ("awq", "scales", lambda t: None, "has no tensor"),
        ("packed", "weight_shape", lambda t: None, "has no tensor"),
        ("packed asymmetric", "weight_zero_point", lambda t: None, "has no tensor"),
        ("gptq", "qzeros", lambda t: t[:, :-1], "has shape [2, 7]"),
        ("gptq", "scales", lambda t: t[:1], "has shape [1, 64]"),
        ("gptq", "qweight", lambda t: t.flatten(), "it is no matrix"),
        ("awq", "qweight", lambda t: t[:0], "it is no matrix"),
        ("gptq", "qweight", lambda t: t.float(), "is stored as F32"),
        ("gptq", "g_idx", lambda t: t[:-1], "has shape [63]"),
        ("packed", "weight_shape", lambda t: t + 8, "tells [72, 72]"),
        ("int8", "weight_scale", lambda t: t[:-1], "has shape [63, 1]"),
    ],
)
def test_a_damaged_layer_is_named_at_the_split(tmp_path, capsys, form, leaf, change, said):
    made(tmp_path / "whole", "llama", form)
    name = spoiled(tmp_path / "whole", leaf, change)
    words = ["--model", str(tmp_path / "whole"), "--stages", "2", "--output", str(tmp_path / "out")]
    assert split(words) == 2
    told = capsys.readouterr().err
    assert name in told and said in told and str(tmp_path / "whole") in told
    with pytest.raises(UserError, match=name):
        load_whole(tmp_path / "whole", torch.float32, "cpu")


def test_a_group_that_is_not_there_is_named(tmp_path):
    made(tmp_path, "llama", "gptq")
    name = spoiled(tmp_path, "g_idx", lambda t: t + 9)
    with pytest.raises(UserError, match=rf"{name} names group \[9\], there are 2"):
        load_whole(tmp_path, torch.float32, "cpu")


@pytest.mark.parametrize("more", [["--dtype", "float32"], ["--tensor-parallel", "2"]])
def test_a_quantised_checkpoint_is_neither_converted_nor_cut_into_shards(tmp_path, capsys, more):
    made(tmp_path / "whole", "llama", "awq")
    words = ["--model", str(tmp_path / "whole"), "--stages", "2", "--output", str(tmp_path / "out")]
    assert split([*words, *more]) == 2
    assert f"{more[0]}: the layers of a quantised checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(("family", "form"), [("llama", "packed"), ("mixtral", "gptq")])
def test_transformers_gets_the_plain_matrices(tmp_path, family, form):
    """For `verify --reference` and the rivals: transformers would need a package for each format."""
    wanted = made(tmp_path, family, form)
    model = load_unsplit(tmp_path, "float32", "--reference")
    with torch.no_grad():
        assert torch.equal(model(TOKENS[None]).logits[0], wanted)


def test_what_transformers_cannot_have_is_one_line(tmp_path):
    made(tmp_path, "llama", "gptq")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"--reference: .* quant_method 'bitsandbytes' is not supported"
    ):
        load_unsplit(tmp_path, "float32", "--reference")
