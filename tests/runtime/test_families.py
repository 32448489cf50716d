"""Every model family against transformers' own logits: whole, in stages, and with trees of guesses.

Windows are shorter than the texts, and caps are low enough to be felt."""

import functools

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from flowspec.core.messages import Prune
from flowspec.core.request import Request, Sampling
from flowspec.core.stage import StageState
from flowspec.host.reader import Reader, Whole
from flowspec.host.speculative import Keyed, write
from flowspec.models.families import FAMILIES
from flowspec.models.split import split
from flowspec.models.stage import load_head, load_stage, load_whole
from tests.stages import Hand

SHAPE = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WINDOW = 6
SLIDING = ["sliding_attention", "full_attention"] * 2
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
CONFIGS = {
    "mistral": dict(sliding_window=WINDOW),
    "mistral native": dict(sliding_window=WINDOW, head_dim=16),
    "mixtral": dict(sliding_window=WINDOW, num_local_experts=4),
    "qwen2": dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=2),
    "qwen3": dict(head_dim=16, use_sliding_window=True, sliding_window=WINDOW, layer_types=SLIDING),
    "gemma": dict(head_dim=16),
    "gemma2": dict(
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=SLIDING,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
        query_pre_attn_scalar=8,
    ),
    "gemma3_text": dict(
        head_dim=16,
        sliding_window=WINDOW,
        layer_types=SLIDING,
        query_pre_attn_scalar=8,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "qwen3_moe": dict(head_dim=8, mlp_only_layers=[1], decoder_sparse_step=1, **EXPERTS),
    "phi3": dict(sliding_window=WINDOW),
    "olmo2": dict(),
    "glm4": dict(head_dim=16),
    "gpt_oss": dict(
        head_dim=16, sliding_window=WINDOW, layer_types=SLIDING, num_local_experts=4, num_experts_per_tok=2
    ),
    "gpt2": dict(scale_attn_by_inverse_layer_idx=True),
    "bloom": dict(num_attention_heads=6, hidden_size=48),
}  # fmt: skip
SEED = 11


def config_of(name: str):
    kind = name.split()[0]
    return FAMILIES[kind].classes().config(**{**SHAPE, **CONFIGS[name]})


@pytest.fixture(scope="module", params=CONFIGS)
def family(request, tmp_path_factory):
    """(transformers' model, its logits of a text, the checkpoint's folder)"""
    folder = tmp_path_factory.mktemp("model") / "whole"
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(
        config_of(request.param), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.25)
    model.save_pretrained(folder)

    @functools.cache
    @torch.no_grad()
    def reference(*tokens):
        return model(torch.tensor([tokens])).logits[0]

    return model, reference, folder


@pytest.fixture(scope="module", params=[1, 2, 3])
def stages(request, family):
    """(transformers' logits, stages in so many pieces, head); 1 is a checkpoint that is not split"""
    _, reference, folder = family
    if request.param == 1:
        whole, head = load_whole(folder, torch.float32, "cpu")
        return reference, [whole], head
    manifest = split(str(folder), request.param, folder.parent / f"split{request.param}")
    ranks = manifest.topology.stage_ranks
    pieces = [load_stage(manifest, rank, torch.float32, "cpu") for rank in ranks]
    return reference, pieces, load_head(manifest, ranks[-1], torch.float32, "cpu")


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def prefilled(pieces, tokens):
    sequences, x = [Hand(piece) for piece in pieces], torch.tensor(tokens)
    for sequence in sequences:
        x = sequence.prefill(x)
    return sequences, x


def test_a_text_longer_than_the_window(stages):
    reference, pieces, head = stages
    text = [3 + 7 * k % 89 for k in range(23)]
    sequences, x = prefilled(pieces, text[:9])
    rows = [head(x)]
    for part in (text[9:10], text[10:]):
        x = torch.tensor(part)
        for sequence in sequences:
            x = sequence.prefill(x)
        rows.append(head(x))
    close(torch.cat(rows), reference(*text))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("gathered", [False, True])
def test_a_tree_sees_its_paths(stages, alone, gathered, monkeypatch):
    """Nodes of many depths in one forward, before a decision and, on the path it made text, after it."""
    monkeypatch.setattr(StageState, "COMPACT", -1 if gathered else 64)
    reference, pieces, head = stages
    prompt = [3 + 5 * k % 89 for k in range(WINDOW + 3)]
    sequences, _ = prefilled(pieces, prompt)
    for piece in pieces:
        piece.alone = alone and not piece.native
    parents = {0: -1, 1: 0, 2: 0, 3: 2, 4: 1, 5: 3, 6: 5, 7: 5, 8: 6, 9: 8, 10: 9, 11: 7}
    later = {20: 9, 21: 20, 22: 20, 23: 10, 24: 21}
    told = {i: 4 + 3 * i for i in parents | later}

    def text(node):
        path = []
        while node != -1:
            path.append(told[node])
            node = (parents | later)[node]
        return prompt + path[::-1]

    for some, prune in (([*parents], Prune(1, 6, 8)), ([*later], None)):
        x, tree = torch.tensor([told[i] for i in some]), parents | later
        for sequence in sequences:
            kept, positions, x = sequence.verify(some, [tree[i] for i in some], x)
            assert len(kept) == len(some)
            if prune:
                sequence.prune(prune)
        assert [*positions] == [len(text(i)) - 1 for i in some]
        for i, logits in zip(some, head(x), strict=True):
            close(logits, reference(*text(i))[-1])
    for piece in pieces:
        piece.alone = False


def test_greedy_text_is_that_of_transformers(family):
    model, _, folder = family
    sampling = Sampling(temperature=0.0, max_new_tokens=12)
    prompt = (5, 9, 60, 33, 8, 71, 23, 40)
    whole = Whole.load(folder, torch.float32, "cpu", model.config.vocab_size)
    request = Request(id=1, prompt=prompt, sampling=sampling, eos=frozenset())
    made = [
        written.token
        for some in write(
            request, Keyed(sampling, whole.vocabulary), Reader(whole), Reader(whole), 3
        )
        for written in some
    ]
    expected = model.generate(
        torch.tensor([prompt]),
        generation_config=transformers.GenerationConfig(
            max_new_tokens=12, do_sample=False, pad_token_id=0
        ),
    )
    assert made == expected[0, len(prompt) :].tolist()
