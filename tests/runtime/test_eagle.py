"""EAGLE heads: what is loaded computes what was published, an incremental tree what a fresh forward would, and no text changes."""

import dataclasses
import json
import math
import random
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from flowspec import Engine, UserError
from flowspec.comm.base import Inbox
from flowspec.commands.split import parser
from flowspec.config import load_config
from flowspec.core.messages import Commit, Draft, Drafted, DraftNode, Prune, Read
from flowspec.core.policies import METHODS
from flowspec.core.request import Request, Sampling
from flowspec.core.stage import StageState
from flowspec.draft.eagle import EagleDrafter
from flowspec.models.eagle import decoder_layer, load_eagle
from flowspec.models.families import check_config
from flowspec.models.heads import check_head, kind_of
from flowspec.models.hub import HUB_ID
from flowspec.models.manifest import Manifest
from flowspec.models.stage import CachedText, Head, load_head, load_stage
from flowspec.preflight import check_run
from flowspec.runtime import driver, wire
from flowspec.runtime.drafting import DraftThread, Joined, Local
from flowspec.runtime.tracing import SpanLog
from flowspec.sampling import NoiseRows
from tests.alone import Alone
from tests.conftest import KNOWN, eagle3, features_given
from tests.stages import Hand

ROOT = Path(__file__).resolve().parent.parent.parent
PROMPT = (5, 6, 7, 8)
HIDDEN = 48


def load(folder, pair, kind="eagle", **changes):
    manifest = dataclasses.replace(Manifest.load(pair.split(1)), **changes)
    head = load_head(manifest, 0, torch.float32, "cpu")
    return load_eagle(kind, folder, manifest, head, torch.float32, "cpu")


@pytest.fixture(scope="module")
def eagle(pair):
    return load(pair.head, pair)


KINDS = {"eagle": ("pair", "head"), "eagle3": ("deep", "head3")}


@pytest.fixture
def pairs(request):
    """kind -> (the pair with such a head, the head's folder)"""

    def of(kind):
        pair, head = KINDS[kind]
        found = request.getfixturevalue(pair)
        return found, getattr(found, head)

    return of


@pytest.fixture
def head(pair, tmp_path):
    """A copy of the head: its folder, free to be changed, and its tensors."""
    shutil.copytree(pair.head, tmp_path / "head")
    return tmp_path / "head", load_file(pair.head / "model.safetensors")


# ---- loading ---------------------------------------------------------------------------------------
def predicted(eagle, tokens, features):
    """What the head predicts at each of these tokens, [n, hidden], without a tree."""
    return CachedText(eagle.layer).prefill(eagle.rows(torch.tensor(tokens), features))


@torch.no_grad()
def by_transformers(pair, tensors, kind, tokens, features, norm=False):
    """The same by a whole model of one layer, as the papers' code builds it."""
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind].from_dict(
        {**pair.model.config.to_dict(), "num_hidden_layers": 1}
    )
    model = {"qwen2": Qwen2Model, "llama": LlamaModel}[kind](config).eval()
    model.norm = torch.nn.Identity()
    if not norm:
        model.layers[0].input_layernorm = torch.nn.Identity()
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    assert not model.load_state_dict(own, strict=False).unexpected_keys
    embedding = tensors.get("embed_tokens.weight", pair.model.model.embed_tokens.weight)
    rows = torch.cat([embedding[torch.tensor(tokens)], features], -1) @ tensors[
        "fc.weight"
    ].T + tensors.get("fc.bias", 0.0)
    return model(inputs_embeds=rows[None]).last_hidden_state[0]


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("variant", ["bare", "whole", "qwen"])
def test_a_published_head_computes_what_it_did_where_it_was_trained(pair, head, file, variant):
    folder, tensors = head
    torch.manual_seed(3)
    if variant == "whole":  # its own embedding, a bias in fc, and a norm that published heads lack
        more = {
            "embed_tokens.weight": (320, HIDDEN),
            "fc.bias": (HIDDEN,),
            "layers.0.input_layernorm.weight": (HIDDEN,),
        }
        tensors |= {name: torch.randn(shape) for name, shape in more.items()}
    if variant == "qwen":  # its config.json says llama
        tensors |= {
            f"layers.0.self_attn.{k}_proj.bias": torch.randn(n)
            for k, n in (("q", HIDDEN), ("k", 24), ("v", 24))
        }
    (folder / "model.safetensors").unlink()
    if file.endswith("bin"):
        torch.save(
            tensors | {"layers.0.self_attn.rotary_emb.steps": torch.arange(6)}, folder / file
        )
    else:
        save_file(tensors, folder / file)
    loaded = load(folder, pair)
    tokens, features = [3, 1, 4, 1, 5, 9], torch.randn(6, HIDDEN)
    kind = "qwen2" if variant == "qwen" else "llama"
    want = by_transformers(pair, tensors, kind, tokens, features, norm=variant == "whole")
    torch.testing.assert_close(predicted(loaded, tokens, features), want, rtol=1e-4, atol=1e-4)


# hidden, intermediate, heads, key/value heads (None: not in the file), vocabulary, extra: Vicuna 7B and Llama 3 8B as in the configurations
# that the EAGLE repository trains with, the others by the sizes of their targets
PUBLISHED = {
    "Vicuna 7B": (4096, 11008, 32, None, 32000, {}),
    "Vicuna 13B": (5120, 13824, 40, None, 32000, {}),
    "Llama 3 8B": (4096, 14336, 32, 8, 128256, {"rope_theta": 500000.0, "bias": False}),
    "Llama 3 70B": (8192, 28672, 64, 8, 128256, {"rope_theta": 500000.0, "bias": False}),
    "Qwen 2 7B": (3584, 18944, 28, 4, 152064, {"rope_theta": 1000000.0, "qkv_bias": True}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_published_heads_fit(name):
    """Without weights: tensors on torch's meta device have shapes only."""
    hidden, wide, heads, groups, vocabulary, more = PUBLISHED[name]
    config = dict(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=wide,
        num_attention_heads=heads,
        num_hidden_layers=1,
    )
    config |= dict(vocab_size=vocabulary, max_position_embeddings=2048, rms_norm_eps=1e-5, **more)
    config |= {"num_key_value_heads": groups} if groups else {}
    check_config(config)
    narrow = hidden * (groups or heads) // heads
    shapes = {
        f"self_attn.{k}_proj": (n, hidden)
        for k, n in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden))
    }
    shapes |= {
        "mlp.gate_proj": (wide, hidden),
        "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    shapes |= {"post_attention_layernorm": (hidden,)}
    tensors = {
        f"layers.0.{k}.weight": torch.empty(shape, device="meta") for k, shape in shapes.items()
    }
    biased = {"q": hidden, "k": narrow, "v": narrow} if "qkv_bias" in more else {}
    tensors |= {
        f"layers.0.self_attn.{k}_proj.bias": torch.empty(n, device="meta")
        for k, n in biased.items()
    }
    layer = decoder_layer(config, tensors, "meta", name, torch.float32)
    assert {n: p.shape for n, p in layer.named_parameters()} == {
        n: t.shape for n, t in tensors.items()
    }


def embedded(deep, tensors):
    return {"embed_tokens.weight": deep.model.model.embed_tokens.weight.detach()} | tensors


@pytest.mark.parametrize("variant", ["bare", "own embedding", "all tokens", "narrow"])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_published_eagle3_head_computes_what_the_paper_says(deep, tmp_path, file, variant):
    folder, config = tmp_path / "head", deep.model.config
    shutil.copytree(deep.head3, folder)
    tensors, about = (
        load_file(folder / "model.safetensors"),
        json.loads((folder / "config.json").read_text()),
    )
    torch.manual_seed(3)
    if variant == "own embedding":
        tensors["embed_tokens.weight"] = torch.randn(320, HIDDEN)
    if variant == "all tokens":
        del tensors["d2t"], tensors["t2d"], about["draft_vocab_size"]
        tensors["lm_head.weight"] = torch.randn(320, HIDDEN)
    if variant == "narrow":  # like the head of Llama 3.3 70B
        about |= {
            "hidden_size": 24,
            "target_hidden_size": HIDDEN,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 12,
        }
        config = LlamaConfig.from_dict(about)
        tensors |= {
            "fc.weight": torch.randn(24, 3 * HIDDEN),
            "embed_tokens.weight": torch.randn(320, 24),
            "norm.weight": torch.randn(24),
        }
        tensors |= {"lm_head.weight": torch.randn(200, 24)}
        shapes = {
            "self_attn.q": (24, 48),
            "self_attn.k": (12, 48),
            "self_attn.v": (12, 48),
            "self_attn.o": (24, 24),
        }
        shapes |= {"mlp.gate": (96, 24), "mlp.up": (96, 24), "mlp.down": (24, 96)}
        tensors |= {
            f"midlayer.{name}_proj.weight": 0.2 * torch.randn(shape)
            for name, shape in shapes.items()
        }
        tensors |= {
            f"midlayer.{n}.weight": torch.randn(24)
            for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
        }
    (folder / "config.json").write_text(json.dumps(about))
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / file) if file.endswith("bin") else save_file(
        tensors, folder / file
    )
    loaded = load(folder, deep, "eagle3")
    tokens, states = [3, 1, 4, 1, 5, 9], torch.randn(6, 3 * HIDDEN)
    fused = states @ tensors["fc.weight"].T
    torch.testing.assert_close(loaded.place(states), fused)
    want = eagle3(embedded(deep, tensors), config, tokens, fused)
    torch.testing.assert_close(predicted(loaded, tokens, fused), want, rtol=1e-4, atol=1e-4)
    normed = torch.nn.functional.rms_norm(
        want, want.shape[-1:], tensors["norm.weight"], config.rms_norm_eps
    )
    torch.testing.assert_close(
        loaded.logits(want), normed @ tensors["lm_head.weight"].T, rtol=1e-4, atol=1e-4
    )
    if variant == "all tokens":
        assert loaded.names is None
    else:
        assert loaded.names.tolist() == (torch.arange(200) + tensors["d2t"]).tolist()


def in_speculators_layout(head, folder, kind, pair, **more) -> Path:
    """The same head as the library `speculators` writes it: EAGLE-1 by its version 0.2, EAGLE-3 by 0.9."""
    tensors = load_file(head / "model.safetensors")
    begins = {
        "eagle": {"layers.0.": "transformer.", "fc.": "fusion_fc."},
        "eagle3": {"midlayer.": "layers.0."},
    }[kind]
    for own, theirs in begins.items():
        tensors = {
            n.replace(own, theirs) if n.startswith(own) else n: t for n, t in tensors.items()
        }
    layer = json.loads((head / "config.json").read_text())
    about = {key: layer.pop(key) for key in ("draft_vocab_size",) if key in layer}
    about |= {
        "architectures": [{"eagle": "EagleSpeculator", "eagle3": "Eagle3Speculator"}[kind]],
        "model_type": "speculator_model",
        "speculators_model_type": kind,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind,
            "verifier": {"name_or_path": "some/target", "architectures": []},
        },
        "norm_before_residual": False,
    }
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(about | more))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_drafts_the_same_in_either_layout_and_its_card_tells_the_kind(pairs, tmp_path, kind):
    pair, own = pairs(kind)
    theirs = in_speculators_layout(own, tmp_path / "theirs", kind, pair)
    assert kind_of(own) == kind_of(theirs) == kind
    drafted = []
    for folder in (own, theirs):
        words = ["method=serial", f"drafter={{head: {folder}}}"]
        with Engine.from_config(pair.config(1, None, kind), words) as engine:
            ids = text(engine, KNOWN[0], max_new_tokens=16)
            result = engine._last.result
            drafted.append((ids, result.accepted_tokens, result.drafted_tokens))
    assert drafted[0] == drafted[1] and drafted[0][1] > 3
    tokens, width = [3, 1, 4, 1, 5], HIDDEN
    features = torch.randn(5, width, generator=torch.Generator().manual_seed(6))
    one, other = (load(folder, pair, kind) for folder in (own, theirs))
    assert torch.equal(predicted(one, tokens, features), predicted(other, tokens, features))


def test_the_residual_stream_may_begin_behind_the_norm(deep, tmp_path):
    """`norm_before_residual` of speculators: x = norm(feature) + attention, where EAGLE-3 has x = feature + attention."""
    folder = in_speculators_layout(
        deep.head3, tmp_path / "normed", "eagle3", deep, norm_before_residual=True
    )
    check_head("eagle3", folder, Manifest.load(deep.split(1)), "drafter.head")
    torch.manual_seed(4)
    tokens, features = [3, 1, 4, 1, 5, 9], 3 * torch.randn(6, HIDDEN)
    tensors = embedded(deep, load_file(deep.head3 / "model.safetensors"))
    want = eagle3(tensors, deep.model.config, tokens, features, normed=True)
    found = predicted(load(folder, deep, "eagle3"), tokens, features)
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"speculators_model_type": "dflash"}, "speculators_model_type is 'dflash'"),
        ({"transformer_layer_config": None}, "transformer_layer_config is None"),
        ({"norm_before_fc": True}, "norm_before_fc: this variant"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "only what enters layers"),
    ],
)
def test_what_is_not_supported_of_speculators_is_refused_by_name(deep, tmp_path, more, said):
    folder = in_speculators_layout(deep.head3, tmp_path / "head", "eagle3", deep, **more)
    with pytest.raises(UserError) as refusal:
        check_head("eagle3", folder, Manifest.load(deep.split(1)), "drafter.head")
    assert said in str(refusal.value) and str(folder) in str(refusal.value)


def test_a_card_for_another_target_says_for_which(deep, tmp_path):
    folder = in_speculators_layout(deep.head3, tmp_path / "head", "eagle3", deep)
    card = json.loads((folder / "config.json").read_text())
    for key, value in (("hidden_size", 64), ("vocab_size", 999), ("num_hidden_layers", 2)):
        layer = card["transformer_layer_config"] | {key: value}
        about = card | {"transformer_layer_config": layer}
        (folder / "config.json").write_text(json.dumps(about))
        with pytest.raises(UserError, match=rf"{key} is {value}") as refusal:
            check_head("eagle3", folder, Manifest.load(deep.split(1)), "drafter.head")
        assert ("it is for some/target" in str(refusal.value)) == (key != "num_hidden_layers")
    (folder / "config.json").write_text(json.dumps(card))
    with pytest.raises(UserError, match=r"it tells of an EAGLE-3 head: set drafter.kind: eagle3"):
        check_head("eagle", folder, Manifest.load(deep.split(1)), "drafter.path")


def test_only_rank_0_needs_the_files_of_a_head(pair):
    """The other boxes have no copy of it, and do not have to know its kind to agree with rank 0."""
    here, there = (
        load_config(pair.config(2), [f"drafter={{head: {folder}}}"])
        for folder in (pair.head, "nowhere")
    )
    check_run(there, [1])
    with pytest.raises(UserError, match=r"drafter.head nowhere: no such folder"):
        check_run(there, [0])
    assert here.found().drafter.kind == "eagle" and there.drafter.needs_lm_head
    assert here.found().shared() == there.shared()


@pytest.mark.parametrize(
    "words", ["{head: x, path: y}", "{head: x, kind: lm}", "{head: x, kind: ngram}"]
)
def test_a_head_stands_alone(pair, words):
    with pytest.raises(UserError, match=r"drafter.head stands for kind and path"):
        load_config(pair.config(2), [f"drafter={words}"])
    with pytest.raises(UserError, match=r"drafter.kind is head: choose one of lm, eagle, eagle3"):
        load_config(pair.config(2), ["drafter={kind: head, path: x}"])


# hidden, intermediate, heads, key/value heads, their width, vocabulary, own vocabulary
PUBLISHED_3 = {
    "Llama 3.1 8B": (4096, 14336, 32, 8, 128, 128256, 32000),
    "Vicuna 13B": (5120, 13824, 40, 40, 128, 32000, 32000),
    "Qwen 3 8B": (4096, 12288, 32, 8, 128, 151936, 32000),
}


def published3(name):
    """config.json of such a head, and the shapes of its tensors."""
    hidden, wide, heads, groups, width, vocabulary, own = PUBLISHED_3[name]
    config = dict(
        model_type="llama",
        hidden_size=hidden,
        intermediate_size=wide,
        num_attention_heads=heads,
        num_key_value_heads=groups,
    )
    config |= dict(
        num_hidden_layers=1,
        vocab_size=vocabulary,
        draft_vocab_size=own,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
    )
    rows = {"q": heads * width, "k": groups * width, "v": groups * width}
    shapes = {f"midlayer.self_attn.{k}_proj.weight": (n, 2 * hidden) for k, n in rows.items()}
    shapes |= {
        "midlayer.self_attn.o_proj.weight": (hidden, heads * width),
        "midlayer.mlp.down_proj.weight": (hidden, wide),
    }
    shapes |= {f"midlayer.mlp.{k}_proj.weight": (wide, hidden) for k in ("gate", "up")}
    shapes |= {
        f"midlayer.{k}.weight": (hidden,)
        for k in ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    }
    return config, shapes | {
        "fc.weight": (hidden, 3 * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (own, hidden),
    }


@pytest.mark.parametrize("name", PUBLISHED_3)
def test_names_and_shapes_of_published_eagle3_heads_fit(name):
    config, shapes = published3(name)
    check_config(config)
    tensors = {k: torch.empty(shape, device="meta") for k, shape in shapes.items()}
    layer = decoder_layer(config, tensors, "meta", name, torch.float32, beside=True)
    own = {
        k.replace("midlayer.", "layers.0."): t.shape
        for k, t in tensors.items()
        if k.startswith("midlayer.")
    }
    assert {n: p.shape for n, p in layer.named_parameters()} == own


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs/heads").glob("*.yaml")), ids=lambda path: path.stem
)
def test_configurations_of_published_heads_are_whole(path):
    config = load_config(path)
    kind, _, target = path.stem[::-1].partition("_")
    assert config.drafter.kind == kind[::-1] and HUB_ID.fullmatch(config.drafter.path)
    [command] = [line for line in path.read_text().splitlines() if "split_models.py" in line]
    split = parser().parse_args(command.split("split_models.py")[1].split())
    assert HUB_ID.fullmatch(split.model) and config.stages_path.resolve() == ROOT / split.output
    assert Path(split.output).name == target[::-1]


def filled(shape: tuple[int, ...], some: torch.Tensor) -> torch.Tensor:
    size = math.prod(shape)
    return some.repeat(-(-size // some.numel()))[:size].clone().view(shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama 3.1 8B", "Vicuna 13B"])
def test_a_head_of_its_true_size_is_read_and_drafts(deep, tmp_path, name):
    config, shapes = published3(name)
    some = torch.empty(999_983, dtype=torch.bfloat16).normal_(
        std=0.02
    )  # repeated: a head has 1e9 weights
    tensors = {k: filled(shape, some) for k, shape in shapes.items()}
    tensors["d2t"] = 3 * torch.arange(32000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    del tensors
    sizes = dict(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_layers=32, tied=True
    )
    small = Manifest.load(deep.split(1))
    ranks = (small.ranks[0], dataclasses.replace(small.ranks[1], layers=(0, 32)))
    manifest = dataclasses.replace(small, ranks=ranks, **sizes)
    check_head("eagle3", tmp_path, manifest, "drafter")
    lent = Head(torch.zeros(config["vocab_size"], config["hidden_size"], dtype=torch.bfloat16))
    try:
        eagle = load_eagle("eagle3", tmp_path, manifest, lent, torch.bfloat16, "cpu")
        drafter = Alone(EagleDrafter(eagle))
    finally:
        (tmp_path / "model.safetensors").unlink()
    drafter.begin(request(), None, torch.randn(3, 3 * config["hidden_size"]))
    [tokens] = drafter.propose([DraftNode(0, -1, 8)]).tokens
    assert len(set(tokens.tolist())) == 20 and (
        name == "Vicuna 13B" or all(token % 4 == 0 for token in tokens)
    )


def test_half_precision_is_read_as_what_is_computed_with(pair, head):
    folder, tensors = head
    save_file(
        {name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    loaded = load(folder, pair)
    assert loaded.place(torch.zeros(1, HIDDEN, dtype=torch.float16)).dtype == torch.float32
    assert predicted(loaded, [1, 2], torch.randn(2, HIDDEN)).dtype == torch.float32


def test_a_tied_target_lends_its_lm_head(pair, head):
    loaded = load(head[0], pair, tied=True)
    rows = loaded.rows(torch.tensor([7]), torch.zeros(1, HIDDEN))
    torch.testing.assert_close(rows[0], head[1]["fc.weight"][:, :HIDDEN] @ loaded.lm_head.weight[7])


def test_a_token_of_the_targets_padding_is_read_as_the_last_one(eagle):
    rows = eagle.rows(torch.tensor([319, 999]), torch.zeros(2, HIDDEN))
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("fc.weight"), "has no tensor fc.weight"),
        (lambda t: t.update({"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN)}), "fc.weight has shape"),
        (
            lambda t: t.update({"embed_tokens.weight": torch.zeros(9, HIDDEN)}),
            "embed_tokens.weight has shape",
        ),
        (
            lambda t: t.pop("layers.0.mlp.up_proj.weight"),
            "1 tensors are missing, such as layers.0.mlp.up_proj.weight",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused_when_it_is_read(pair, head, change, message):
    folder, tensors = head
    change(tensors)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        load(folder, pair)


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("d2t"), "has no tensor d2t: it is no head of kind eagle3"),
        (
            lambda t: t.update({"d2t": torch.full((200,), 200)}),
            "d2t names token 320, the target's vocabulary has 320",
        ),
        (
            lambda t: t.update({"d2t": torch.zeros(9, dtype=torch.long)}),
            r"d2t has shape \(9,\), a head of kind eagle3 .* has \(200,\)",
        ),
        (lambda t: t.update({"fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN)}), "fc.weight has shape"),
        (
            lambda t: t.pop("midlayer.hidden_norm.weight"),
            "1 tensors are missing, such as layers.0.hidden_norm.weight",
        ),
        (
            lambda t: t.update({"midlayer.self_attn.q_proj.weight": torch.zeros(HIDDEN, HIDDEN)}),
            "q_proj.weight has shape",
        ),
    ],
)
def test_an_eagle3_head_that_does_not_fit_is_refused_when_it_is_read(
    deep, tmp_path, change, message
):
    shutil.copy(deep.head3 / "config.json", tmp_path)
    tensors = load_file(deep.head3 / "model.safetensors")
    change(tensors)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        load(tmp_path, deep, "eagle3")


@pytest.mark.parametrize("kind,given", [("eagle", "eagle3"), ("eagle3", "eagle")])
def test_a_head_of_the_other_kind_is_refused_when_it_is_read(pairs, kind, given):
    with pytest.raises(UserError, match=rf"fc.weight has shape .*, a head of kind {given} "):
        load(*pairs(kind)[::-1], given)


def test_a_damaged_file_is_refused_when_it_is_read(pair, head):
    folder, _ = head
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read as weights"):
        load(folder, pair)


def test_without_an_embedding_anywhere_it_says_what_to_copy(pair, head, tmp_path):
    manifest = Manifest.load(pair.split(1))
    shutil.copytree(manifest.root / "rank_00", tmp_path / "rank_00")
    alone = dataclasses.replace(manifest, root=tmp_path)
    with pytest.raises(
        UserError, match=r"has no embed_tokens.weight, so the target's is needed: copy .*rank_01"
    ):
        load_eagle("eagle", head[0], alone, Head(torch.zeros(320, HIDDEN)), torch.float32, "cpu")


# ---- drafting --------------------------------------------------------------------------------------
def request(prompt=PROMPT, **sampling):
    return Request(id=1, prompt=prompt, sampling=Sampling(**sampling))


class Oracle:
    """What the drafter should know: which feature each row was made of, everything recomputed from scratch each time."""

    def __init__(self, eagle, prompt, features):
        self.eagle = eagle
        self.truth = list(
            eagle.place(features)
        )  # of the target: before each row of the text, then before the root
        self.text = [(None, token) for token in prompt[1:-1]]
        self.given = self.truth[
            : len(self.text)
        ]  # what the text's rows were made of; None: no row yet
        self.sure = len(self.text)
        self.anchor, self.tree, self.made = (
            -1,
            {},
            {},
        )  # node -> the feature its row was made of; the one predicted there

    def commit(self, path):
        self.text += path
        self.given += [self.tree.pop(id, None) for id, _ in path]
        self.tree, self.anchor = {}, path[-1][0]

    def learn(self, features):
        self.truth += self.eagle.place(features)

    def propose(self, paths):
        """Logits [vocabulary] after each of these paths [(id, token), ...] from the root on; the drafter is asked for their last nodes."""
        while None in self.given[self._rows_due() :] or self._before_root() is None:
            self._make() or self._guess(self.given.index(None))
        before = [
            self._before_root() if len(path) == 1 else self.made[path[-2][0]] for path in paths
        ]
        self._make()
        self.tree.update(
            (path[-1][0], feature) for path, feature in zip(paths, before, strict=True)
        )
        for path in paths:
            self.made[path[-1][0]] = self._predicted(
                [*self.text, *path], [*self.given, *(self.tree[id] for id, _ in path)]
            )
        return [self.eagle.logits(self.made[path[-1][0]][None])[0] for path in paths]

    def _rows_due(self):
        return min(len(self.text), len(self.truth))

    def _before_root(self):
        return self.truth[-1] if len(self.truth) > len(self.text) else self.made.get(self.anchor)

    def _make(self):
        """Rows of the text anew of what the target said meanwhile."""
        due = range(self.sure, self._rows_due())
        self.given[due.start : due.stop] = self.truth[due.start : due.stop]
        self.sure = due.stop
        for row in due:
            self._note(row)
        return len(due)

    def _guess(self, row):
        self.given[row] = self.made[self.text[row - 1][0]]
        self._note(row)

    def _note(self, row):
        self.made[self.text[row][0]] = self._predicted(self.text[: row + 1], self.given[: row + 1])

    def _predicted(self, path, given):
        return predicted(self.eagle, [token for _, token in path], torch.stack(given))[-1]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("prompt,compact", [(PROMPT, 64), ((9, 4), -1)])
def test_an_incremental_tree_proposes_what_a_fresh_forward_with_the_same_features_would(
    pairs, monkeypatch, kind, seed, prompt, compact, late
):
    """Random growth, nodes asked again, and commits: deep hits, misses, several without a draft in between; features with the commits or
    any time after; dead rows left or gathered at once."""
    monkeypatch.setattr(StageState, "COMPACT", compact)
    eagle, r = load(*pairs(kind)[::-1], kind), random.Random(seed)
    drafter = Alone(EagleDrafter(eagle))
    torch.manual_seed(seed)
    width = HIDDEN * (len(eagle.layers) or 1)
    names = list(range(320)) if eagle.names is None else eagle.names.tolist()
    features, coming = torch.randn(len(prompt) - 1, width), []
    drafter.begin(request(prompt), None, features)
    oracle = Oracle(eagle, prompt, features)
    anchor, next_id = -1, 1
    paths, asked = (
        {0: [(0, prompt[-1])]},
        set(),
    )  # node -> (id, token) of the nodes from the root to it
    for _ in range(30):
        if late and r.random() < 0.4:
            n = r.randint(0, len(coming))
            for told in (drafter, oracle) if n else ():
                told.learn(torch.stack(coming[:n]))
            del coming[:n]
        elif r.random() < 0.6:
            ready = [i for i in paths if len(paths[i]) == 1 or paths[i][-2][0] in asked]
            batch = sorted(r.sample(ready, min(len(ready), r.randint(1, 4))))
            answer = drafter.propose(
                [DraftNode(i, ([(anchor, 0)] + paths[i])[-2][0], paths[i][-1][1]) for i in batch]
            )
            assert answer.nodes == tuple(batch)
            for i, logits in zip(batch, oracle.propose([paths[i] for i in batch]), strict=True):
                proposal, want = answer.proposal(i), torch.log_softmax(logits, -1)
                own = [names.index(token) for token in proposal.tokens]
                np.testing.assert_allclose(proposal.z[:, 0], want[own].double().numpy(), atol=2e-4)
                assert proposal.tokens[0] == names[int(want.argmax())]
                for token in proposal.tokens[: r.randint(1, 3)].tolist() if i not in asked else ():
                    paths[next_id] = [*paths[i], (next_id, token)]
                    next_id += 1
                asked.add(i)
        else:
            *path, last = paths[r.choice(list(paths))]
            hit = bool(path) and r.random() < 0.6
            path = path if hit else [*path, last]
            root = last if hit else (next_id, r.randrange(300))
            next_id += not hit
            known = torch.randn(len(path), width)
            tokens = [token for _, token in [*path[1:], root]]
            drafter.commit(
                Commit(tuple(i for i, _ in path), tuple(tokens), (False,) * len(path), root[0]),
                None if late else known,
            )
            oracle.commit(path)
            coming += known if late else ()
            if not late:
                oracle.learn(known)
            anchor = path[-1][0]
            kept = {i: p[len(path) :] for i, p in paths.items() if root in p}
            paths = kept or {root[0]: [root]}
    assert drafter.session._sequence._rows.cache.length == drafter.session._sequence.state.length


def test_rows_of_text_are_made_of_the_targets_features_once_they_are_known(eagle, monkeypatch):
    """After a commit, drafting from a new root is the same as reading the whole text as a prompt, in chunks."""
    monkeypatch.setattr("flowspec.draft.eagle.PREFILL_ROWS", 2)
    features = torch.randn(6, HIDDEN)
    grown, fresh = Alone(EagleDrafter(eagle)), Alone(EagleDrafter(eagle))
    grown.begin(request(), None, features[:3])
    for nodes in ([DraftNode(0, -1, 8)], [DraftNode(1, 0, 20)], [DraftNode(2, 1, 21)]):
        grown.propose(nodes)
    grown.commit(Commit((0, 1, 2), (20, 21, 30), (True, True, False), 9), features[3:])
    fresh.begin(request((*PROMPT, 20, 21, 30)), None, features)
    a, b = grown.propose([DraftNode(9, 2, 30)]), fresh.propose([DraftNode(0, -1, 30)])
    np.testing.assert_allclose(a.z, b.z, atol=1e-5)
    assert a.tokens.tolist() == b.tokens.tolist()


def test_a_node_that_is_asked_again_is_drafted_from_anew(eagle):
    """After a hit the new root's row is made of a guess; asked again, it and what is asked below it are as if read afresh."""
    features = torch.randn(4, HIDDEN)
    grown, fresh = Alone(EagleDrafter(eagle)), Alone(EagleDrafter(eagle))
    grown.begin(request(), None, features[:3])
    for nodes in (
        [DraftNode(0, -1, 8)],
        [DraftNode(1, 0, 20)],
        [DraftNode(2, 1, 21), DraftNode(3, 1, 22)],
    ):
        stale = grown.propose(nodes)
    grown.commit(Commit((0,), (20,), (True,), 1), features[3:])
    fresh.begin(request((*PROMPT, 20)), None, features)
    for again, first in (
        ([DraftNode(1, 0, 20)], [DraftNode(0, -1, 20)]),
        ([DraftNode(2, 1, 21)], [DraftNode(1, 0, 21)]),
    ):
        a, b = grown.propose(again), fresh.propose(first)
        np.testing.assert_allclose(a.z, b.z, atol=1e-5)
    assert abs(stale.z[0] - a.z[0]).max() > 1e-4


def test_candidates_of_a_head_with_a_vocabulary_of_its_own_are_the_targets_tokens(
    deep, monkeypatch
):
    monkeypatch.setattr("flowspec.draft.base.KEPT", 320)
    noise, drafter = NoiseRows(3, 320), Alone(EagleDrafter(load(deep.head3, deep, "eagle3")))
    features, said = torch.randn(3, 3 * HIDDEN), []
    for coupled in (noise, None):
        drafter.begin(request(temperature=0.7, seed=3), coupled, features)
        found = drafter.propose([DraftNode(0, -1, 8)]).proposal(0)
        assert (
            sorted(found.tokens.tolist()) == drafter.drafter._eagle.names.tolist()
            and (np.diff(found.z[:, 0]) <= 0).all()
        )
        said.append(found.z[found.tokens.argsort(), 0])
    np.testing.assert_allclose(
        said[0] - said[1], noise(len(PROMPT))[drafter.drafter._eagle.names].numpy(), atol=1e-5
    )


@pytest.mark.parametrize("prompt", [PROMPT, (9, 4), (9,)])
def test_candidates_are_ranked_with_the_noise_of_their_own_position(eagle, monkeypatch, prompt):
    monkeypatch.setattr("flowspec.draft.base.KEPT", 320)
    noise = NoiseRows(3, 320)
    features = torch.randn(len(prompt) - 1, HIDDEN) if len(prompt) > 1 else None
    known = torch.randn(1, HIDDEN)
    said = []
    for coupled in (noise, None):
        drafter = Alone(EagleDrafter(eagle))
        drafter.begin(request(prompt, temperature=1.0, seed=3), coupled, features)
        answers = [drafter.propose([DraftNode(0, -1, prompt[-1])])]
        drafter.commit(Commit((0,), (11,), (False,), 5), known)
        answers.append(drafter.propose([DraftNode(5, 0, 11)]))
        said.append([answer.z[0, answer.tokens[0].argsort(), 0] for answer in answers])
        assert all(
            answer.coupled == (coupled is noise) and (np.diff(answer.z[0, :, 0]) <= 0).all()
            for answer in answers
        )
    for k, (z, logq) in enumerate(zip(*said, strict=True)):
        np.testing.assert_allclose(z - logq, noise(len(prompt) + k).numpy(), atol=1e-5)


def test_a_node_whose_branch_died_gets_no_proposal(eagle):
    drafter = Alone(EagleDrafter(eagle))
    drafter.begin(request(), None, torch.randn(3, HIDDEN))
    drafter.propose([DraftNode(0, -1, 8)])
    drafter.commit(Commit((0,), (9,), (False,), 5), torch.randn(1, HIDDEN))
    assert drafter.propose([DraftNode(1, 0, 30)]).nodes == ()
    assert drafter.propose([DraftNode(1, 0, 30), DraftNode(5, 0, 9)]).nodes == (5,)


class Noting:
    """A drafter that notes what it is told."""

    def __init__(self, features, layers=()):
        self.features, self.layers, self.heard = features, layers, []

    def begin(self, request, noise, features=None):
        self.heard.append(("begin", None if features is None else len(features)))
        return self

    def propose(self, asks):
        self.heard.append(("propose", *(nodes[0].id for _, nodes in asks)))
        return [Drafted.pack((), ()) for _ in asks]

    def commit(self, commit, features=None):
        self.heard.append(("commit", None if features is None else len(features)))

    def learn(self, features):
        self.heard.append(("learn", len(features)))

    def end(self):
        """A session of this drafter holds nothing."""


def ended(thread) -> None:
    """Once it has done all its jobs."""
    thread._queue.put(None)
    thread._thread.join()


def test_features_of_layers_go_to_the_prompt_first_and_then_to_what_was_committed():
    drafter = Noting(False, layers=(0,))
    thread = DraftThread(drafter, inbox := Inbox())
    thread.begin(request(), None, SpanLog(False, 1))
    thread.commit(1, SimpleNamespace(), None)
    thread.layer_features(1, [0], 0, torch.zeros(2, HIDDEN))
    assert drafter.heard == []
    thread.layer_features(1, [0], 2, torch.zeros(3, HIDDEN))
    ended(thread)
    assert drafter.heard == [("begin", 3), ("commit", None), ("learn", 2)]
    assert inbox.get() == Local(Read(1))


@pytest.mark.parametrize("wanted", [True, False])
def test_a_prompt_is_read_once_its_features_are_there_if_they_are_wanted(wanted):
    drafter = Noting(wanted)
    thread = DraftThread(drafter, inbox := Inbox())
    rows = torch.zeros(1, HIDDEN)
    thread.begin(request(), None, SpanLog(False, 1))
    if wanted:
        thread.learn(1, torch.zeros(2, HIDDEN))
        thread.end(1)  # before all of them are here
        thread.begin(request(), None, SpanLog(False, 1))
    thread.commit(1, SimpleNamespace(), rows if wanted else None)
    if wanted:
        thread.learn(1, torch.zeros(2, HIDDEN))
        assert drafter.heard == []
        thread.learn(1, rows)
    assert inbox.get(10) == Local(Read(1))
    thread.draft(Draft(((1, (DraftNode(0, -1, 8),)),)))
    ended(thread)
    assert drafter.heard == [
        ("begin", 3 if wanted else None),
        ("commit", 1 if wanted else None),
        ("propose", 0),
    ]


def test_a_request_whose_features_are_awaited_does_not_hold_up_another():
    drafter = Noting(True)
    thread = DraftThread(drafter, inbox := Inbox())
    thread.begin(request(), None, SpanLog(False, 1))
    thread.begin(dataclasses.replace(request(), id=2), None, SpanLog(False, 2))
    thread.learn(2, torch.zeros(3, HIDDEN))
    assert inbox.get(10) == Local(Read(2))
    thread.learn(1, torch.zeros(3, HIDDEN))
    assert inbox.get(10) == Local(Read(1))
    thread.draft(Draft(tuple((k, (DraftNode(7 + k, -1, 8),)) for k in (1, 2))))
    ended(thread)
    assert drafter.heard[-1] == ("propose", 8, 9), "both in one forward"
    assert [request for request, _ in inbox.get().event.answers] == [1, 2]


def test_a_draft_that_outlives_its_request_is_noted_as_its_own():
    logs, drafting, over = (
        [SpanLog(True, 1), SpanLog(True, 2)],
        threading.Event(),
        threading.Event(),
    )
    drafter, answer = Noting(False), [Drafted.pack((), ())]
    drafter.propose = lambda asks: (drafting.set() or over.wait(10)) and answer
    thread = DraftThread(drafter, Inbox())
    thread.begin(request(), None, logs[0])
    thread.draft(Draft(((1, (DraftNode(0, -1, 8),)),)))
    assert drafting.wait(10)
    thread.end(1)
    thread.begin(dataclasses.replace(request(), id=2), None, logs[1])
    over.set()
    ended(thread)
    assert [len(log.spans) for log in logs] == [2, 1]


# ---- in the ring -----------------------------------------------------------------------------------
SAMPLED = [
    dict(temperature=0.8, top_p=0.9, seed=1),
    dict(temperature=1.2, top_k=20, min_p=0.02, seed=4),
]


def text(engine, prompt, **settings):
    return [t.id for t in engine.generate(prompt, **settings)]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


WORLDS = [("eagle", 1, "last"), slow("eagle", 3, "coordinator")]
WORLDS += [slow("eagle3", n, on) for n, on in ((1, "last"), (3, "last"))]


@pytest.mark.parametrize("kind,stages,verify_on", WORLDS)
def test_every_method_writes_the_targets_text(pairs, kind, stages, verify_on):
    words = [f"verify_on={verify_on}", "emulate={stage_ms: 10, draft_ms: 1}"]
    pair, _ = pairs(kind)
    with Engine.from_config(pair.config(stages, None, kind), words) as engine:
        accepted = dict.fromkeys(METHODS, 0)
        for prompt in KNOWN:
            want = pair.greedy(prompt, 16)
            for method in METHODS:
                assert text(engine, prompt, method=method, max_new_tokens=16) == want
                accepted[method] += engine._last.result.accepted_tokens
        for timed in (
            "flowspec",
            "pipedec",
        ):  # how many drafts are on their way in time is the machine's
            accepted.pop(timed)
        assert accepted.pop("ar") == 0 and min(accepted.values()) > 3
        for settings in SAMPLED:
            texts = [
                text(engine, [7, 8, 9], method=method, max_new_tokens=16, **settings)
                for method in METHODS
            ]
            assert texts == texts[:1] * len(METHODS)


def wait_for_the_drafter(engine):
    done = threading.Event()
    engine._draft._queue.put(done.set)
    assert done.wait(60)


@pytest.mark.parametrize("verify_on", [slow("coordinator"), "last"])
def test_the_features_at_commits_are_the_targets_own(pair, monkeypatch, verify_on):
    """Whatever came back when, the drafter gets for each token of the text what transformers computes there."""
    got = features_given(monkeypatch, "commit")
    monkeypatch.setattr(driver, "PREFILL_ROWS", 4)
    prompt = list(range(40, 50))
    with Engine.from_config(
        pair.config(3, None, "eagle"), [f"verify_on={verify_on}", "emulate.stage_ms=2"]
    ) as engine:
        for method in METHODS:
            ids = text(engine, prompt, method=method, max_new_tokens=16)
            if method == "ar":
                assert got == []  # a tree of one node needs no drafter, and no features
                continue
            wait_for_the_drafter(engine)
            with torch.no_grad():
                want = pair.model.model(torch.tensor([prompt + ids[:-1]])).last_hidden_state[0]
            torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "stages,layers", [(1, None), (3, "2,2,4"), slow(2, None), slow(3, None), slow(4, "3,1,1,3")]
)
def test_what_an_eagle3_head_learns_is_what_enters_the_targets_layers(
    deep, monkeypatch, stages, layers
):
    """Each layer's features come from the stage that holds it, whenever they like; side by side they are the text's, in its order."""
    got = features_given(monkeypatch, "learn")
    monkeypatch.setattr(driver, "PREFILL_ROWS", 4)
    prompt = list(range(40, 75))
    with Engine.from_config(
        deep.config(stages, layers, "eagle3"), ["emulate.stage_ms=2"]
    ) as engine:
        for method in METHODS:
            ids = text(engine, prompt, method=method, max_new_tokens=16)
            if method == "ar":
                assert got == []
                continue
            wait_for_the_drafter(engine)
            with torch.no_grad():
                states = deep.model.model(
                    torch.tensor([prompt + ids[:-1]]), output_hidden_states=True
                ).hidden_states
            want, told = torch.cat([states[k][0] for k in (2, 4, 5)], -1), torch.cat(got)
            assert len(prompt) + 4 < len(told) <= len(want)  # the last ones come after the end
            torch.testing.assert_close(told, want[: len(told)], rtol=1e-4, atol=1e-4)


def test_a_prune_in_the_midst_of_a_forward_hands_over_what_was_there_before_it(deep, monkeypatch):
    """Nothing of the forward under way is text yet; its rows are handed over by the next prune. Dead and abandoned rows never are."""
    monkeypatch.setattr(StageState, "COMPACT", -1)
    sequence = Hand(
        load_stage(Manifest.load(deep.split(1)), 1, torch.float32, "cpu"), taps=[2, 4, 5]
    )
    sequence.prefill(torch.tensor([5, 6, 7]))
    sequence.verify([0, 1, 2], [-1, 0, 0], torch.tensor([8, 9, 10]))

    def needed():
        sequence.prune(Prune(1, 0, 1))
        return True

    sequence.verify([3, 4], [1, 2], torch.tensor([11, 12]), drop=False, needed=needed)
    assert sequence.verify([5], [1], torch.tensor([13]), needed=lambda: False)[2] is None
    for _ in range(2):  # the second time it is old news
        sequence.prune(Prune(2, 3, 6))
    with torch.no_grad():
        states = deep.model.model(
            torch.tensor([[5, 6, 7, 8, 9, 11]]), output_hidden_states=True
        ).hidden_states
    assert [tapped.at for tapped in sequence.told] == [0, 3, 4]
    want = torch.cat([states[k][0] for k in (2, 4, 5)], -1)
    torch.testing.assert_close(
        torch.cat([tapped.rows for tapped in sequence.told]), want, rtol=1e-4, atol=1e-4
    )


def test_features_of_several_layers_are_put_side_by_side_in_the_texts_order():
    joined, whole = Joined((2, 4, 5)), torch.randn(9, 12)
    of = dict(zip((2, 4, 5), whole.chunk(3, -1), strict=True))
    assert joined.add([4, 5], 0, whole[:3, 4:]) is None
    torch.testing.assert_close(joined.add([2], 0, of[2][:2]), whole[:2])
    torch.testing.assert_close(joined.add([2], 2, of[2][2:9]), whole[2:3])
    torch.testing.assert_close(joined.add([4, 5], 3, whole[3:, 4:]), whole[3:])
    with pytest.raises(AssertionError, match="order"):
        joined.add([2], 10, of[2][:1])


@pytest.mark.parametrize("features", [True, False])
def test_only_a_drafter_that_reads_features_is_sent_any(pair, monkeypatch, features):
    sent, choices = [], wire.choices
    monkeypatch.setattr(
        wire,
        "choices",
        lambda *given: (
            sent.extend(a.rows if a.rows is None else len(a.rows) for [a] in given)
            or choices(*given)
        ),
    )
    with Engine.from_config(pair.config(2, None, "eagle" if features else "lm")) as engine:
        text(engine, [5, 6, 7], max_new_tokens=6)
    assert (None not in sent and any(sent)) if features else set(sent) == {None}


def test_a_generation_can_be_abandoned_before_its_prompt_is_read(pair):
    with Engine.from_config(pair.config(2, None, "eagle"), ["emulate.stage_ms=5"]) as engine:
        for n in (1, 2, 3):
            generation = engine.generate([5] * 40, max_new_tokens=8)
            for _ in range(n):
                next(generation)
            assert text(engine, [7, 8, 9], max_new_tokens=12) == pair.greedy([7, 8, 9], 12)
