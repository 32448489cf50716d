"""Every model family against transformers' own logits: whole, in stages, and with trees of guesses.

Windows are shorter than the texts, and caps are low enough to be felt."""

import functools
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from flowspec.comm.group import threads
from flowspec.core.messages import Prune
from flowspec.core.request import Request, Sampling
from flowspec.core.stage import StageState
from flowspec.engine import Engine
from flowspec.errors import UserError
from flowspec.host.decoding import Pair
from flowspec.host.reader import Whole
from flowspec.host.trees import Likeliest
from flowspec.models.families import FAMILIES, check_config, settled
from flowspec.models.manifest import Manifest
from flowspec.models.split import split
from flowspec.models.stage import (
    Cached,
    Share,
    forward_together,
    load_head,
    load_stage,
    load_whole,
)
from flowspec.models.weights import TensorFile
from tests.conftest import save_tokenizer
from tests.stages import Hand

SHAPE = dict(
    vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WINDOW = 6
SLIDING = ["sliding_attention", "full_attention"] * 2
SCALED = dict(
    embedding_multiplier=3.0, logits_scaling=2.0, residual_multiplier=0.5, attention_multiplier=0.3
)
ROUTED = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, n_group=1, topk_group=1, n_shared_experts=1,
    first_k_dense_replace=1,
)  # fmt: skip
LATENT = dict(
    kv_lora_rank=8, q_lora_rank=12, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12, num_key_value_heads=4
)  # fmt: skip
KINDS = dict(sliding_window=WINDOW, layer_types=SLIDING)
CONFIGS = {
    "mistral": dict(sliding_window=WINDOW, head_dim=12),
    "mistral native": dict(sliding_window=WINDOW, head_dim=16),
    "mixtral": dict(sliding_window=WINDOW, num_local_experts=4),
    "qwen2": dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": dict(head_dim=16, use_sliding_window=True, **KINDS),
    "gemma2": dict(
        head_dim=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
        **KINDS,
    ),
    "gemma3_text": dict(
        head_dim=16,
        query_pre_attn_scalar=8,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
        **KINDS,
    ),
    "qwen3_moe": dict(
        head_dim=8,
        mlp_only_layers=[1],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
    ),
    "phi3": dict(sliding_window=WINDOW),
    "olmo2": dict(),
    "glm4": dict(head_dim=16),
    "gpt_oss": dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2, **KINDS),
    "gpt2": dict(num_key_value_heads=4, scale_attn_by_inverse_layer_idx=True),
    "bloom": dict(num_attention_heads=6, num_key_value_heads=6, hidden_size=48),
}
MORE = {
    "arcee": dict(),
    "cohere": dict(use_qk_norm=True),
    "cohere2": dict(head_dim=8, **KINDS),
    "deepseek_v2": dict(**ROUTED, **LATENT),
    "deepseek_v3": dict(**ROUTED, **LATENT),
    "dots1": dict(**ROUTED, **KINDS),
    "ernie4_5": dict(),
    "exaone4": KINDS,
    "gemma": dict(head_dim=16),
    "glm": dict(head_dim=8),
    "glm4_moe": dict(head_dim=8, **ROUTED),
    "gpt_neox": dict(),
    "granite": SCALED,
    "helium": dict(head_dim=8),
    "hunyuan_v1_dense": dict(head_dim=8),
    "ministral": dict(head_dim=8, **KINDS),
    "ministral3": dict(
        head_dim=8,
        sliding_window=WINDOW,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=16.0, original_max_position_embeddings=8, max_position_embeddings=128,
            llama_4_scaling_beta=0.3, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
        ),
    ),
    "nemotron": dict(),
    "olmo3": KINDS,
    "olmoe": dict(num_experts=4, num_experts_per_tok=2),
    "opt": dict(ffn_dim=48, word_embed_proj_dim=32),
    "qwen2_moe": dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=24
    ),
    "seed_oss": dict(head_dim=8),
    "smollm3": dict(no_rope_layers=[1, 0, 1, 0]),
    "stablelm": dict(qk_layernorm=True, use_parallel_residual=False),
    "starcoder2": dict(sliding_window=WINDOW),
}  # fmt: skip
SEED = 11


def config_of(name: str):
    kind = name.split()[0]
    return FAMILIES[kind].classes().config(**{**SHAPE, **(CONFIGS | MORE)[name]})


class Made(NamedTuple):
    """A checkpoint, and transformers' model of it."""

    folder: Path
    model: Any
    reference: Callable[..., torch.Tensor]
    """The logits [n, vocabulary] of n tokens of a text."""

    def pieces(self, count: int):
        """Stages, and the head behind the last; 1: the checkpoint as it is, not split."""
        if count == 1:
            whole, head = load_whole(self.folder, torch.float32, "cpu")
            return [whole], head
        output = self.folder.parent / f"split{count}"
        manifest = split(str(self.folder), count, output)
        ranks = manifest.topology.stage_ranks
        head = load_head(manifest, ranks[-1], torch.float32, "cpu")
        return [load_stage(manifest, rank, torch.float32, "cpu") for rank in ranks], head


def make(name: str, folder: Path) -> Made:
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(
        config_of(name), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    stored = model.state_dict(keep_vars=True).values()  # biases of a router are no parameters
    for tensor in stored:
        torch.nn.init.normal_(tensor, std=0.25)
    model.save_pretrained(folder)

    @functools.cache
    @torch.no_grad()
    def reference(*tokens):
        return model(torch.tensor([tokens])).logits[0]

    return Made(folder, model, reference)


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp("model") / "whole")


@pytest.fixture(scope="module", params=[1, 3])
def stages(request, family):
    return family.reference, *family.pieces(request.param)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def prefilled(pieces, tokens):
    sequences, x = [Hand(piece) for piece in pieces], torch.tensor(tokens)
    for sequence in sequences:
        x = sequence.prefill(x)
    return sequences, x


def check_a_text(reference, pieces, head):
    """A text longer than the window, in chunks."""
    text = [3 + 7 * k % 89 for k in range(23)]
    sequences, x = prefilled(pieces, text[:9])
    rows = [head(x)]
    for part in (text[9:10], text[10:]):
        x = torch.tensor(part)
        for sequence in sequences:
            x = sequence.prefill(x)
        rows.append(head(x))
    close(torch.cat(rows), reference(*text))


PROMPT = [3 + 5 * k % 89 for k in range(WINDOW + 3)]
PARENTS = {0: -1, 1: 0, 2: 0, 3: 2, 4: 1, 5: 3, 6: 5, 7: 5, 8: 6, 9: 8, 10: 9, 11: 7}
LATER = {20: 9, 21: 20, 22: 20, 23: 10, 24: 21}


def token(node: int) -> int:
    return 4 + 3 * node


def text_to(node: int) -> list[int]:
    path = []
    while node != -1:
        path.append(token(node))
        node = (PARENTS | LATER)[node]
    return PROMPT + path[::-1]


def check_a_tree(reference, pieces, head):
    """Nodes of many depths in one forward, before a decision and, on the path it made text, after it."""
    sequences, _ = prefilled(pieces, PROMPT)
    for some, prune in (([*PARENTS], Prune(1, 6, 8)), ([*LATER], None)):
        x, tree = torch.tensor([token(i) for i in some]), PARENTS | LATER
        for sequence in sequences:
            kept, positions, x = sequence.verify(some, [tree[i] for i in some], x)
            assert len(kept) == len(some)
            if prune:
                sequence.prune(prune)
        assert [*positions] == [len(text_to(i)) - 1 for i in some]
        for i, logits in zip(some, head(x), strict=True):
            close(logits, reference(*text_to(i))[-1])


def test_a_text_longer_than_the_window(stages):
    check_a_text(*stages)


@pytest.mark.parametrize("alone", [False, True])
def test_a_tree_sees_its_paths(stages, alone, monkeypatch):
    reference, pieces, head = stages
    for limit in (-1, 64):  # gather at once, or leave the dead rows in place
        monkeypatch.setattr(StageState, "COMPACT", limit)
        for piece in pieces:
            monkeypatch.setattr(piece, "alone", alone and not piece.native)
        check_a_tree(reference, pieces, head)


@pytest.mark.slow  # together
@pytest.mark.parametrize("name", MORE)
def test_the_other_families(name, tmp_path, monkeypatch):
    monkeypatch.setattr(StageState, "COMPACT", -1)
    made = make(name, tmp_path / "whole")
    for count in (1, 2):
        check_a_text(made.reference, *made.pieces(count))
        check_a_tree(made.reference, *made.pieces(count))


@pytest.mark.parametrize("name", ["mistral", "gemma2", "gpt_oss", "gpt2", "bloom", "deepseek_v3"])
def test_several_requests_in_one_forward(name, tmp_path):
    made = make(name, tmp_path / "whole")
    [whole], head = made.pieces(1)
    texts = [[3 + 7 * k % 89 for k in range(n)] for n in (23, 4, 11)]
    shares = [Share(Cached(whole), StageState().extend(len(text)), None) for text in texts]
    rows = head(forward_together(torch.tensor([t for text in texts for t in text]), shares))
    for logits, text in zip(rows.split([len(text) for text in texts]), texts, strict=True):
        close(logits, made.reference(*text))
    for share in shares:
        cache = share.cached.cache
        held = [*cache._keys.values(), *cache._values.values()]
        assert sum(t[:, :, :1].nbytes for t in held) == whole.row_bytes


def test_every_family_is_tested():
    tested = {name.split()[0] for name in CONFIGS | MORE}
    assert tested == FAMILIES.keys() - {"llama"}  # which all other tests are about


def test_layers_are_native_where_they_are_of_that_kind(tmp_path):
    made = make("mistral native", tmp_path / "whole")
    assert all(piece.native for piece in made.pieces(2)[0])


# ---- files -----------------------------------------------------------------------------------------
def rewrite(folder: Path, named: Callable[[str], str], more: dict, config: Callable[[dict], dict]):
    tensors = load_file(folder / "model.safetensors")
    save_file({named(k): t for k, t in tensors.items()} | more, folder / "model.safetensors")
    told = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config(told)))


def check_rewritten(made: Made, kind: str):
    for count in (1, 2):
        check_a_text(made.reference, *made.pieces(count))
    assert Manifest.load(made.folder.parent / "split2").model_type == kind


def test_gpt2_as_the_hub_has_it(tmp_path):
    """Names without the model's own, tables that are computed, and a config.json that leaves out what it need not say."""
    made = make("gpt2", tmp_path / "whole")
    tables = {f"h.{k}.attn.bias": torch.ones(1, 1, 8, 8).byte() for k in range(4)}
    rewrite(
        made.folder,
        lambda name: name.removeprefix("transformer."),
        tables,
        lambda told: {k: v for k, v in told.items() if k != "tie_word_embeddings"},
    )
    check_rewritten(made, "gpt2")
    held = TensorFile(tmp_path / "split2" / "rank_01" / "model.safetensors").names
    assert not any(name.endswith(".attn.bias") for name in held)
    assert {"model.embed_tokens.weight", "model.wpe.weight", "model.layers.0.ln_1.bias"} <= {*held}
    last = TensorFile(tmp_path / "split2" / "rank_02" / "model.safetensors").names
    assert {"model.norm.weight", "model.norm.bias"} <= {*last}


def test_the_text_of_a_model_of_pictures_and_text(tmp_path):
    made = make("gemma3_text", tmp_path / "whole")
    rewrite(
        made.folder,
        lambda name: f"language_model.{name}",
        {"vision_tower.vision_model.layers.0.weight": torch.ones(3)},
        lambda told: {"model_type": "gemma3", "architectures": ["X"], "text_config": told},
    )
    check_rewritten(made, "gemma3_text")


def test_a_layer_behind_the_last_that_guesses_is_left_out(tmp_path, capsys):
    made = make("glm4_moe", tmp_path / "whole")
    extra = {"model.layers.4.eh_proj.weight": torch.ones(3)}
    rewrite(made.folder, str, extra, lambda told: told | {"num_nextn_predict_layers": 0})
    with pytest.raises(UserError, match="weights of layer 4, config"):
        split(str(made.folder), 2, tmp_path / "out")
    rewrite(made.folder, str, {}, lambda told: told | {"num_nextn_predict_layers": 1})
    check_rewritten(made, "glm4_moe")


def test_what_a_family_does_not_know_means_nothing(tmp_path):
    made = make("seed_oss", tmp_path / "whole")
    stray = {
        "sliding_window": 3,
        "embedding_multiplier": 5.0,
        "logit_scale": 0.1,
        "logits_scaling": 4.0,
    }
    stray |= {"final_logit_softcapping": 1.0, "attn_logit_softcapping": 1.0}
    rewrite(made.folder, str, {}, lambda told: told | stray)
    check_rewritten(made, "seed_oss")
    assert made.pieces(1)[0][0].native


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    for family in FAMILIES.values():
        assumed = family.classes().config()
        for key, value in family.defaults.items():
            if hasattr(assumed, key):  # Bloom takes any number of positions
                assert getattr(assumed, key) == value, (family.model_type, key)


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before is False; only True is"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention is True; only False is"),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config is .*; only None is"),
    ],
)
def test_variants_that_are_not_computed_are_refused_by_key(name, changes, said):
    told = json.loads(config_of(name).to_json_string(use_diff=False))
    check_config(settled(told))
    with pytest.raises(UserError, match=said):
        check_config(settled(told | changes))


def test_a_layer_that_lacks_what_others_have_is_named(tmp_path):
    made = make("qwen3_moe", tmp_path / "whole")  # its layer 1 has no experts, and lacks nothing
    tensors = load_file(made.folder / "model.safetensors")
    del tensors["model.layers.2.mlp.experts.3.up_proj.weight"]
    save_file(tensors, made.folder / "model.safetensors")
    with pytest.raises(
        UserError, match=r"needs: model\.layers\.2\.mlp\.experts\.3\.up_proj\.weight$"
    ):
        split(str(made.folder), 2, tmp_path / "out")


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gpt_neox", "glm4_moe", "gemma3_text"])
def test_layers_are_streamed_from_where_they_are(name, tmp_path):
    pytest.importorskip("accelerate")
    from flowspec.models.offload import load_placed
    from flowspec.models.placement import Placement

    made = make(name, tmp_path / "whole")
    whole, head, _ = load_placed(made.folder, torch.float32, Placement("disk"))
    check_a_text(made.reference, [whole], head)
    check_a_tree(made.reference, [whole], head)


# ---- groups ----------------------------------------------------------------------------------------
SHARED = [name for name in CONFIGS | MORE if FAMILIES[name.split()[0]].halves]


@pytest.mark.parametrize("name", SHARED)
def test_members_share_the_layers(name, tmp_path):
    made = make(name, tmp_path / "whole")
    manifest = split(str(made.folder), 1, tmp_path / "split", members=2)
    links, text = threads(2), [3 + 7 * k % 89 for k in range(23)]
    models = [load_stage(manifest, k, torch.float32, "cpu", links=links[k - 1]) for k in (1, 2)]

    def compute(k):
        return Cached(models[k]).forward(torch.tensor(text), StageState().extend(len(text)))

    with ThreadPoolExecutor(2) as pool:
        [rows, same] = pool.map(compute, range(2))
    assert torch.equal(rows, same)
    close(load_head(manifest, 0, torch.float32, "cpu")(rows), made.reference(*text))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom"])
def test_layers_that_are_not_cut_are_refused_by_name(name, tmp_path):
    make(name, tmp_path / "whole")
    with pytest.raises(UserError, match=f"layers of model_type {name} are not cut into shards"):
        split(str(tmp_path / "whole"), 1, tmp_path / "split", members=2)


# ---- whole programs --------------------------------------------------------------------------------
TEXT = (5, 9, 60, 33, 8, 71, 23, 40)


def greedy(made: Made, n: int) -> list[int]:
    asked = GenerationConfig(max_new_tokens=n, do_sample=False, pad_token_id=0)
    written = made.model.generate(torch.tensor([TEXT]), generation_config=asked)
    return written[0, len(TEXT) :].tolist()


def test_greedy_text_is_that_of_transformers(family):
    """In one process, with a tree of guesses."""
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    whole = Whole.load(family.folder, torch.float32, "cpu", SHAPE["vocab_size"])
    request = Request(id=1, prompt=TEXT, sampling=sampling, eos=frozenset({SHAPE["eos_token_id"]}))
    pair = Pair({"target": whole, "draft": whole}, Likeliest(12, 4, 5), "keyed")
    blocks = pair.begin([request], "draft").blocks
    assert [each.token for block in blocks for each in block.written] == greedy(family, 12)


@pytest.mark.parametrize("method", ["flowspec", "ar"])
def test_a_ring_writes_the_same(family, method, tmp_path):
    save_tokenizer(family.folder, 300)
    split(str(family.folder), 2, tmp_path / "split")
    (tmp_path / "run.yaml").write_text(
        f"stages: {tmp_path / 'split'}\ndrafter: {{kind: lm, path: {family.folder}}}\n"
    )
    with Engine.from_config(tmp_path / "run.yaml", ["sampling.temperature=0"]) as engine:
        made = engine.generate(TEXT, method=method, max_new_tokens=20)
        assert [token.id for token in made] == greedy(family, 20)
