"""The shipped models: real text, real acceptance. The whole matrix is scripts/prove_identity.py."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from flowspec.commands.options import DEMO, split_demo
from flowspec.config import load_config
from flowspec.engine import Engine
from flowspec.files import ROOT
from flowspec.preflight import read_prompts
from scripts.prove_identity import DRAFTERS, METHODS, STAGES, generate, split

PROMPTS = read_prompts(str(ROOT / "demo" / "prompts.jsonl"))


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(
        ROOT / "demo" / "target", dtype=torch.float32
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "stages,drafter", [(1, "lm"), (2, "eagle"), (3, "mixture"), (4, "eagle"), (6, "ngram")]
)
def test_every_method_continues_real_text_as_transformers_does(stages, drafter, target, tmp_path):
    split(str(ROOT / "demo" / "target"), stages, tmp_path / "split", layers=STAGES[stages])
    (tmp_path / "config.yaml").write_text(
        f"stages: split\ndrafter: {DRAFTERS[drafter]}\nthreads: 1\n"
    )
    with Engine.from_config(tmp_path / "config.yaml") as engine:
        prompt = PROMPTS[stages]
        want = generate(target, engine.text.encode(prompt), 32)
        for method in (*METHODS, "ar"):
            assert [
                t.id for t in engine.generate(prompt, method=method, max_new_tokens=32)
            ] == want, (method, prompt)
        sampled = [
            [
                t.id
                for t in engine.generate(
                    prompt, method=m, max_new_tokens=32, temperature=0.8, top_p=0.9, seed=5
                )
            ]
            for m in (*METHODS, "ar")
        ]
        assert all(text == sampled[0] for text in sampled), prompt


def test_the_card_tells_the_agreement_that_was_asked_for():
    facts = json.loads((ROOT / "demo" / "training.json").read_text())["validation"]
    assert facts["first_choice_agreement"] >= 0.55
    assert f"{facts['first_choice_agreement']:.1%}" in (ROOT / "demo" / "README.md").read_text()
    head = json.loads((ROOT / "demo" / "eagle" / "training.json").read_text())["held_out"]
    assert head["first_choice_agreement"] >= 0.65
    assert f"{head['first_choice_agreement']:.1%}" in (ROOT / "demo" / "README.md").read_text()
    assert sum(f.stat().st_size for f in (ROOT / "demo").rglob("*") if f.is_file()) < 25e6


def test_the_readmes_python_example_runs():
    split_demo(load_config(DEMO))
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "length" in done.stdout or "stop" in done.stdout


def test_the_files_that_the_readme_names_exist():
    text = (ROOT / "README.md").read_text()
    names = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w-]+\.(?:py|sh|md))`", text) + re.findall(
        r"bash ([\w/.-]+\.sh)", text
    )
    missing = [
        n for n in names if not (Path(ROOT) / n).exists() and not n.startswith(("rank_", "split/"))
    ]
    assert not missing
