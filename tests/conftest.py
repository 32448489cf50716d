"""Tiny random targets, drafts that mostly agree with them, and their splits: made once, in a temporary folder."""

import functools
import json
import signal

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from flowspec.commands.split import main as split
from flowspec.draft.eagle import EagleDrafter, EagleSession
from flowspec.models.cache import RowCache

SMALL = dict(
    vocab_size=320,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    max_position_embeddings=512,
)
MODELS = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**SMALL, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False),
    ),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, num_key_value_heads=3, head_dim=16)),
}
TEXT = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i, 'é', '語')\n"] * 4

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    # a shell starts what is in the background like that, and commands under test would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


def save_tokenizer(folder, vocabulary: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def save_head(folder, model: LlamaForCausalLM) -> None:
    """An EAGLE head in the published layout: small random weights, and an fc fitted to the target on random tokens.

    Least squares shrinks what it cannot predict; doubled, the head is as sure of itself as policies want it to be."""
    torch.manual_seed(2)
    hidden, config = model.config.hidden_size, model.config.to_dict() | {"num_hidden_layers": 1}
    like = {
        f"layers.0.{k}": v
        for k, v in model.model.layers[0].state_dict().items()
        if "input_layernorm" not in k
    }
    layer = {k: 0.02 * torch.randn_like(v) for k, v in like.items()}
    layer["layers.0.post_attention_layernorm.weight"] += 1
    with torch.no_grad():
        tokens = torch.randint(0, 300, (40, 40))
        features = model.model(tokens).last_hidden_state
        rows = torch.cat([model.model.embed_tokens(tokens[:, 1:]), features[:, :-1]], -1).flatten(
            0, 1
        )
        fc = (
            2
            * torch.linalg.solve(
                rows.T @ rows + 0.1 * torch.eye(2 * hidden), rows.T @ features[:, 1:].flatten(0, 1)
            ).T
        )
    folder.mkdir()
    save_file({"fc.weight": fc.contiguous(), **layer}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


KNOWN = ([5], [7, 8], list(range(40, 75)))
"""prompts whose texts an EAGLE-3 head has seen"""


def eagle3(tensors, config: LlamaConfig, tokens, features, normed=False):
    """The paper's formulas, without a cache: what an EAGLE-3 head predicts at tokens [n] beside fused features [n, hidden].

    If `normed`, the residual stream begins behind the feature's norm."""

    def norm(x, name):
        return torch.nn.functional.rms_norm(
            x, x.shape[-1:], tensors[f"midlayer.{name}.weight"], config.rms_norm_eps
        )

    def linear(x, name):
        return x @ tensors[f"midlayer.{name}_proj.weight"].T

    read = torch.cat(
        [
            norm(tensors["embed_tokens.weight"][tokens], "input_layernorm"),
            norm(features, "hidden_norm"),
        ],
        -1,
    )
    q, k, v = (
        linear(read, f"self_attn.{x}").unflatten(-1, (-1, config.head_dim)).transpose(0, 1)[None]
        for x in "qkv"
    )
    q, k = apply_rotary_pos_emb(
        q, k, *LlamaRotaryEmbedding(config)(features, torch.arange(len(tokens))[None])
    )
    mixed = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    x = norm(features, "hidden_norm") if normed else features
    x = x + linear(mixed[0].transpose(0, 1).flatten(1), "self_attn.o")
    y = norm(x, "post_attention_layernorm")
    return x + linear(
        torch.nn.functional.silu(linear(y, "mlp.gate")) * linear(y, "mlp.up"), "mlp.down"
    )


def save_head3(folder, model: LlamaForCausalLM, own: int) -> None:
    """An EAGLE-3 head in the published layout with a vocabulary of `own` tokens, which has seen what the target says to KNOWN."""
    torch.manual_seed(4)
    config, deep = model.config, model.config.num_hidden_layers
    hidden, narrow = config.hidden_size, config.num_key_value_heads * config.head_dim
    shapes = {
        f"self_attn.{x}_proj": (n, 2 * hidden)
        for x, n in (("q", hidden), ("k", narrow), ("v", narrow))
    }
    shapes |= {
        "self_attn.o_proj": (hidden, hidden),
        "mlp.down_proj": (hidden, config.intermediate_size),
    }
    shapes |= {f"mlp.{x}_proj": (config.intermediate_size, hidden) for x in ("gate", "up")}
    tensors = {
        f"midlayer.{name}.weight": shape[1] ** -0.5 * torch.randn(shape)
        for name, shape in shapes.items()
    }
    tensors |= {
        "fc.weight": 0.1 * torch.randn(hidden, 3 * hidden),
        "lm_head.weight": 0.1 * torch.randn(own, hidden),
    }
    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    tensors |= {
        name: torch.ones(hidden)
        for name in ("norm.weight", *(f"midlayer.{n}.weight" for n in norms))
    }
    lent = {"embed_tokens.weight": model.model.embed_tokens.weight.detach()}
    with torch.no_grad():
        texts = [
            model.generate(torch.tensor([p]), max_new_tokens=30, do_sample=False, pad_token_id=0)[0]
            for p in KNOWN
        ]
        states = [
            model.model(text[None], output_hidden_states=True).hidden_states for text in texts
        ]
    common = torch.cat([*texts, torch.arange(own)]).unique()[-own:]
    training = torch.optim.Adam([t.requires_grad_() for t in tensors.values()], lr=0.01)
    for text, state in [*zip(texts, states, strict=True)] * 30:
        fused = (
            torch.cat([state[k][0] for k in (2, deep // 2, deep - 3)], -1) @ tensors["fc.weight"].T
        )
        guess = eagle3(tensors | lent, config, text[1:-1], fused[:-2])
        logits = (
            torch.nn.functional.rms_norm(
                guess, (hidden,), tensors["norm.weight"], config.rms_norm_eps
            )
            @ tensors["lm_head.weight"].T
        )
        loss = torch.nn.functional.cross_entropy(
            logits, torch.searchsorted(common, text[2:]).clamp(max=own - 1)
        )
        training.zero_grad()
        loss.backward()
        training.step()
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    known = torch.zeros(config.vocab_size, dtype=torch.bool).index_fill_(0, common, True)
    folder.mkdir()
    save_file(
        tensors | {"d2t": common - torch.arange(own), "t2d": known}, folder / "model.safetensors"
    )
    (folder / "config.json").write_text(
        json.dumps(config.to_dict() | {"num_hidden_layers": 1, "draft_vocab_size": own})
    )


class TinyPair:
    """Folders `target`, `draft` (the target with noise on its weights), `head` (an EAGLE head) and `split(stages)`."""

    def __init__(self, folder, layers: int = 6):
        self.folder = folder
        self.target, self.draft, self.head = folder / "target", folder / "draft", folder / "head"
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=160,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
        )
        self.model = LlamaForCausalLM(config).eval()
        for p in self.model.parameters():
            torch.nn.init.normal_(p, std=0.15) if p.ndim == 2 else torch.nn.init.normal_(
                p, 1.0, 0.1
            )
        self.model.save_pretrained(self.target)
        near = LlamaForCausalLM(config)
        near.load_state_dict(
            {k: v + 0.005 * torch.randn_like(v) for k, v in self.model.state_dict().items()}
        )
        near.save_pretrained(self.draft)
        save_head(self.head, self.model)
        for place in (self.target, self.draft):
            save_tokenizer(place, 300)  # 20 tokens of padding, as real checkpoints have
        self._made, self._greedy = {}, {}

    def split(self, stages: int, layers: str | None = None, members: int = 1):
        """The folder of the target split into that many stages of that many ranks."""
        key = (stages, layers, members)
        if key not in self._made:
            out = self.folder / f"split_{stages}_{layers}_{members}"
            words = ["--model", str(self.target), "--stages", str(stages), "--output", str(out)]
            words += ["--tensor-parallel", str(members)]
            split([*words, *(["--layers", layers] if layers else [])])
            self._made[key] = out
        return self._made[key]

    @functools.cached_property
    def head3(self):
        """The folder of an EAGLE-3 head."""
        save_head3(self.folder / "head3", self.model, 200)
        return self.folder / "head3"

    def config(self, stages: int, layers: str | None = None, drafter: str = "lm", members: int = 1):
        """A configuration file for that split."""
        path = self.folder / f"config_{stages}_{layers}_{drafter}_{members}.yaml"
        places = {"lm": "draft", "eagle": "head", "eagle3": "head3"}
        kind = (
            f"{{kind: {drafter}, path: {getattr(self, places[drafter])}}}"
            if drafter in places
            else f"{{kind: {drafter}}}"
        )
        path.write_text(
            f"stages: {self.split(stages, layers, members)}\ndrafter: {kind}\nsampling: {{max_new_tokens: 40}}\n"
        )
        return path

    def greedy(self, tokens, n: int) -> list[int]:
        """transformers' own generate, asked once for each request."""
        key = (tuple(tokens), n)
        if key not in self._greedy:
            self._greedy[key] = self._generate(*key)
        return self._greedy[key]

    @torch.no_grad()
    def _generate(self, tokens, n: int) -> list[int]:
        ids = torch.tensor([list(tokens)])
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
        )
        return out[0, ids.shape[1] :].tolist()


@pytest.fixture(params=[None, 1], ids=["wide", "tight"])
def cache_step(request, monkeypatch):
    """Row caches that grow as in production, and such that have a single row to spare: nearly every forward grows all buffers."""
    if request.param:
        monkeypatch.setattr(RowCache, "STEP", request.param)
        monkeypatch.setattr(RowCache, "SHARE", 0.0)


@pytest.fixture(scope="session", params=MODELS)
def small(request, tmp_path_factory):
    """The folder of a model of two layers."""
    make, config = MODELS[request.param]
    torch.manual_seed(3)
    model = make(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    path = tmp_path_factory.mktemp("small")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return TinyPair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """Of enough layers for an EAGLE-3 head: it reads what enters layers 2, 4 and 5."""
    return TinyPair(tmp_path_factory.mktemp("deep"), layers=8)


def features_given(monkeypatch, by: str) -> list:
    """All features that EAGLE drafters are given from now on, by `begin` (which starts the list anew) and by `commit` or `learn`."""
    got: list = []
    told, begun = getattr(EagleSession, by), EagleDrafter.begin

    def noted(self, *given):
        got.append(given[-1])
        told(self, *given)

    def began(self, request, noise, features=None):
        got[:] = [features]
        return begun(self, request, noise, features)

    monkeypatch.setattr(EagleSession, by, noted)
    monkeypatch.setattr(EagleDrafter, "begin", began)
    return got
