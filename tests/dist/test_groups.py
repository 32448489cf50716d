"""Tensor-parallel stages as processes: every family, over flowspec's own collectives and over DeepSpeed's."""

import importlib.util
import json

import pytest
import torch

from flowspec.commands.split import main as split
from tests.conftest import save_tokenizer
from tests.dist.conftest import Command
from tests.families import families

EACH = families(
    vocab_size=320, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    max_position_embeddings=128, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
FAMILIES = {name: made for name, made in EACH.items() if name not in ("llama", "llama_native")}
"""of Llama the one with biases: each takes half a minute"""
PROMPT, NEW = "for i in range", 16
HAVE = importlib.util.find_spec("deepspeed") is not None
SLOW = pytest.mark.slow
WITHOUT = pytest.mark.skipif(not HAVE, reason="deepspeed is not installed (requirements_deepspeed.txt)")


@pytest.fixture(scope="module")
def family(request, tmp_path_factory):
    """A folder with the model and its tokenizer, and what transformers writes."""
    folder = tmp_path_factory.mktemp(request.param)
    make, config = FAMILIES[request.param]
    torch.manual_seed(5)
    model = make(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder)
    save_tokenizer(folder, 300)
    return folder, model


WORDS = {"tp": ["--method", "tp", "tree.segment=1"], "flowspec": ["--method", "flowspec"]}
"""serial trees whose rows go one by one, and continuous ones"""


def cases() -> list:
    """All over DeepSpeed; of our own, which the threads' tests try at length, some."""
    own = {"llama_biased": "tp", "mixtral": "flowspec"}
    found = [
        pytest.param(name, "native", [method], marks=SLOW, id=f"{name}-native-{method}")
        for name, method in own.items()
    ]
    for name in FAMILIES:
        marks = [SLOW, WITHOUT]
        found.append(pytest.param(name, "deepspeed", WORDS, marks=marks, id=f"{name}-deepspeed"))
    return found


@pytest.mark.parametrize("family,backend,methods", cases(), indirect=["family"])
def test_a_group_writes_transformers_text(family, backend, methods, tmp_path):
    """Two stages of two ranks."""
    folder, model = family
    out, config = tmp_path / "split", tmp_path / "c.yaml"
    assert split(["--model", str(folder), "--stages", "2", "--tensor-parallel", "2", "--output", str(out)]) == 0
    config.write_text(f"stages: {out}\ndrafter: {{kind: ngram}}\nsampling: {{max_new_tokens: {NEW}}}\n")
    for words in map(WORDS.__getitem__, methods):
        results = tmp_path / "results.jsonl"
        with Command(tmp_path, config, "--prompt", PROMPT, f"tensor_parallel.backend={backend}", *words, "--json", results) as run:
            assert run.end() == 0, run.err
        [result] = [json.loads(line) for line in results.open()]
        ids = torch.tensor([result["token_ids"]])
        prompt = torch.tensor([encoded(folder)])
        with torch.no_grad():
            want = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        assert ids[0].tolist() == want[0, prompt.shape[1] :].tolist()
        assert result["world_size"] == 5


def encoded(folder) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids


def test_without_deepspeed_one_line_says_which_extra(pair, tmp_path, monkeypatch, capsys):
    from flowspec import cli, preflight

    real = importlib.util.find_spec
    monkeypatch.setattr(preflight.importlib.util, "find_spec", lambda name: None if name == "deepspeed" else real(name))
    words = ["run", str(pair.config(1, members=2)), "--prompt", "for", "tensor_parallel.backend=deepspeed"]
    assert cli.main(words) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert "requirements_deepspeed.txt (the extra `deepspeed`)" in said


@pytest.mark.parametrize(
    "words,said",
    [
        (["tensor_parallel.backend=gloo"], "tensor_parallel.backend is gloo: choose one of native, deepspeed"),
        (["tensor_parallel.size=2"], "size"),
        (["--method", "galaxy", "tensor_parallel.backend=deepspeed"], "galaxy"),
    ],
)
def test_what_no_group_can_do_is_refused(pair, capsys, words, said):
    from flowspec import cli

    assert cli.main(["run", str(pair.config(1, members=2)), "--prompt", "for", *words]) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
