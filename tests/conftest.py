"""A tiny random target, a draft that mostly agrees with it, and their splits: made once, in a temporary folder."""

import json

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from flowspec.models.split import main as split

TEXT = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i, 'é', '語')\n"] * 4


def save_tokenizer(folder, vocabulary: int) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False))
    tokenizer.save(str(folder / "tokenizer.json"))


def save_head(folder, model: LlamaForCausalLM) -> None:
    """An EAGLE head in the published layout: small random weights, and an fc fitted to the target on random tokens.

    Least squares shrinks what it cannot predict; doubled, the head is as sure of itself as policies want it to be."""
    torch.manual_seed(2)
    hidden, config = model.config.hidden_size, model.config.to_dict() | {"num_hidden_layers": 1}
    like = {f"layers.0.{k}": v for k, v in model.model.layers[0].state_dict().items() if "input_layernorm" not in k}
    layer = {k: 0.02 * torch.randn_like(v) for k, v in like.items()}
    layer["layers.0.post_attention_layernorm.weight"] += 1
    with torch.no_grad():
        tokens = torch.randint(0, 300, (40, 40))
        features = model.model(tokens).last_hidden_state
        rows = torch.cat([model.model.embed_tokens(tokens[:, 1:]), features[:, :-1]], -1).flatten(0, 1)
        fc = 2 * torch.linalg.solve(rows.T @ rows + 0.1 * torch.eye(2 * hidden), rows.T @ features[:, 1:].flatten(0, 1)).T
    folder.mkdir()
    save_file({"fc.weight": fc.contiguous(), **layer}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


class TinyPair:
    """Folders `target`, `draft` (the target with noise on its weights), `head` (an EAGLE head) and `split(stages)`."""

    def __init__(self, folder):
        self.folder = folder
        self.target, self.draft, self.head = folder / "target", folder / "draft", folder / "head"
        torch.manual_seed(1)
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=160,
            tie_word_embeddings=False,
            eos_token_id=None,
            bos_token_id=None,
        )
        self.model = LlamaForCausalLM(config).eval()
        for p in self.model.parameters():
            torch.nn.init.normal_(p, std=0.15) if p.ndim == 2 else torch.nn.init.normal_(p, 1.0, 0.1)
        self.model.save_pretrained(self.target)
        near = LlamaForCausalLM(config)
        near.load_state_dict({k: v + 0.005 * torch.randn_like(v) for k, v in self.model.state_dict().items()})
        near.save_pretrained(self.draft)
        save_head(self.head, self.model)
        for place in (self.target, self.draft):
            save_tokenizer(place, 300)  # 20 tokens of padding, as real checkpoints have
        self._made, self._greedy = {}, {}

    def split(self, stages: int, layers: str | None = None):
        """The folder of the target split into that many stages."""
        key = (stages, layers)
        if key not in self._made:
            out = self.folder / f"split_{stages}_{layers}"
            words = ["--model", str(self.target), "--stages", str(stages), "--output", str(out)]
            split([*words, *(["--layers", layers] if layers else [])])
            self._made[key] = out
        return self._made[key]

    def config(self, stages: int, layers: str | None = None, drafter: str = "lm"):
        """A configuration file for that split."""
        path = self.folder / f"config_{stages}_{layers}_{drafter}.yaml"
        paths = {"lm": self.draft, "eagle": self.head}
        kind = f"{{kind: {drafter}, path: {paths[drafter]}}}" if drafter in paths else f"{{kind: {drafter}}}"
        path.write_text(f"stages: {self.split(stages, layers)}\ndrafter: {kind}\nsampling: {{max_new_tokens: 40}}\n")
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
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, pad_token_id=0)
        return out[0, ids.shape[1] :].tolist()


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return TinyPair(tmp_path_factory.mktemp("pair"))
