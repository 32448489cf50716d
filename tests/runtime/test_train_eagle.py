"""The script that trains a head: a few steps on the tiny target, and what it leaves loads and predicts as it did in training."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from flowspec.models.eagle import load_eagle
from flowspec.models.fingerprint import CARD
from flowspec.models.manifest import Manifest
from flowspec.models.stage import CachedText, Head
from scripts import train_eagle
from tests.conftest import TEXT

WORDS = ["--context", "24", "--batch", "2", "--device", "cpu", "--text"]


@pytest.fixture
def train(pair, tmp_path, monkeypatch):
    """`train(*words)`: run the script on a small text; the folder of the head."""
    (tmp_path / "text.md").write_text("".join(TEXT) * 12)
    out = tmp_path / "head"

    def run(*words):
        argv = [
            "train_eagle.py",
            "--target",
            pair.target,
            "--out",
            out,
            *WORDS,
            tmp_path / "text.md",
            *words,
        ]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        train_eagle.main()
        return out

    return run


def test_what_is_left_is_a_head_in_the_published_layout(pair, train):
    out = train("--steps", "3")
    tensors, like = load_file(out / "model.safetensors"), load_file(pair.head / "model.safetensors")
    assert {n: t.shape for n, t in tensors.items()} == {n: t.shape for n, t in like.items()} | {
        "embed_tokens.weight": (320, 48)
    }
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    facts = json.loads((out / "training.json").read_text())
    assert facts["steps"] == 3 and set(facts["held_out"]) >= {"first_choice_agreement"}
    assert (
        json.loads((out / "config.json").read_text())[CARD]
        == Manifest.load(pair.split(1)).embedding
    )


def test_the_head_predicts_as_it_did_in_training(pair, train):
    out = train("--steps", "3")
    target = train_eagle.Target(pair.target, "cpu")
    training = train_eagle.Training(train_eagle.Eagle(target.config), out, 1e-3, target.name)
    training.resume()
    ids = torch.randint(0, 300, (1, 12))
    features = target.features(ids)
    with torch.no_grad():
        want = training.eagle(target.embedding(ids[:, 1:]), features[:, :-1])[0]
    head = load_eagle(
        "eagle", out, Manifest.load(pair.split(1)), Head(torch.zeros(320, 48)), torch.float32, "cpu"
    )
    got = CachedText(head.layer).prefill(head.rows(ids[0, 1:], features[0, :-1]))
    torch.testing.assert_close(got, want, rtol=0.01, atol=0.01)  # the file is in half precision


def test_an_interrupted_training_goes_on(train, monkeypatch, capsys):
    step = train_eagle.Training.step

    def stop_after_two(self, *args):
        step(self, *args)
        if self.steps == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_eagle.Training, "step", stop_after_two)
    out = train("--steps", "5")
    assert (
        "interrupted after 2 steps" in capsys.readouterr().out
        and (out / "model.safetensors").exists()
    )
    monkeypatch.setattr(train_eagle.Training, "step", step)
    train("--steps", "5", "--resume")
    assert json.loads((out / "training.json").read_text())["steps"] == 5
    assert not list(out.glob("*.partial"))


def test_it_wants_a_limit_and_enough_text(train):
    with pytest.raises(SystemExit):
        train()
    with pytest.raises(SystemExit, match="too few for --context 999"):
        train("--steps", "1", "--context", "999")


OWN = ["--steps", "2", "--on-policy", "5", "--prompt-tokens", "6"]


def test_on_policy_it_learns_from_what_the_target_writes(pair, train, monkeypatch):
    """Greedy, a text is a piece of the given one and what transformers' generate makes of it; sampled, its seed's own."""
    learnt, step = [], train_eagle.loss_of
    monkeypatch.setattr(
        train_eagle, "loss_of", lambda e, t, ids, args: learnt.extend(ids) or step(e, t, ids, args)
    )
    facts = json.loads((train(*OWN, "--temperature", "0") / "training.json").read_text())
    assert facts["settings"]["on_policy"] == 5 and set(facts) >= {"held_out", "held_out_own"}
    assert len(learnt) == 4
    for text in learnt:
        assert text[6:].tolist() == pair.greedy(text[:6].tolist(), 18)

    runs = []
    for more in ((), (), ("--seed", "2")):
        learnt.clear()
        train(*OWN, *more)
        runs.append(torch.stack(learnt))
        assert any(t[6:].tolist() != pair.greedy(t[:6].tolist(), 18) for t in learnt)
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_where_the_target_ends_a_text_another_piece_follows(pair):
    target = train_eagle.Target(pair.target, "cpu")
    [text] = target.write(lambda: [5, 6, 7], 24, [train_eagle.Sampling()]).tolist()
    at = next(k for k in range(3, 20) if text[k] not in text[3:k])
    target.config.eos_token_id = text[at]
    [cut] = target.write(lambda: [5, 6, 7], 24, [train_eagle.Sampling()]).tolist()
    assert cut[: at + 4] == [*text[: at + 1], 5, 6, 7]


def test_a_prompt_leaves_room_for_the_target(train):
    with pytest.raises(SystemExit):
        train("--steps", "1", "--on-policy", "3", "--prompt-tokens", "24")
