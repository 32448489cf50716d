"""scripts/real_matrix.py and scripts/weaken.py: what is still to be measured, what the tables say, a draft as weak as asked."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from flowspec.errors import UserError

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


def script(name: str):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


real, weaken = script("real_matrix"), script("weaken")
AXES = dict(
    contexts=(64, 1024),
    vocabularies=(4096,),
    dtypes=("float32",),
    drafters=("good", "weak"),
    stages=(1,),
    temperatures=(0.0, 1.0),
)


def run(cell, pair: int, method: str, rate: float | None, text: str = "same"):
    return real.Run(cell, pair, method, rate, 64, 1.0, 2.5, text)


def test_the_shipped_matrices_are_read():
    shipped = {
        path.stem: real.load_matrix(path)
        for path in (SCRIPTS.parent / "configs" / "real").glob("*.yaml")
    }
    assert len(real.cells(shipped["full"])) == 4 * 3 * 2 * 3 * 2 * 2
    assert all(matrix.pairs >= 5 and matrix.new_tokens == 64 for matrix in shipped.values())


@pytest.mark.parametrize("wrong, named", [
    ("drafters: [bad]", "'bad' is not known"),
    ("contexts: [16384]", "leaves no room"),
    ("dtypes: [int3]", "'int3' is not known"),
    ("colour: red", "unknown key colour"),
    ("stages: [0]", "stages: each must be at least 1"),
])  # fmt: skip
def test_a_wrong_matrix_is_named(tmp_path, wrong, named):
    good = (SCRIPTS.parent / "configs" / "real" / "few.yaml").read_text()
    kept = [line for line in good.splitlines() if not line.startswith(wrong.split(":")[0])]
    (tmp_path / "matrix.yaml").write_text("\n".join([*kept, wrong]))
    with pytest.raises(UserError, match=named):
        real.load_matrix(tmp_path / "matrix.yaml")


def test_what_was_measured_is_not_measured_again(tmp_path):
    matrix = real.Matrix(**AXES, pairs=2)
    first, *_ = real.cells(matrix)
    runs = [run(first, 1, method, 10.0) for method in real.METHODS] + [run(first, 2, "ar", 10.0)]
    path = tmp_path / "runs.jsonl"
    path.write_text("".join(each.line() for each in runs) + runs[0].line()[:40])
    assert real.read_runs(path) == runs
    wanted = real.missing(matrix, runs)
    assert (first, 1) not in wanted and (first, 2) in wanted and len(wanted) == 8 * 2 - 1
    assert real.read_runs(tmp_path / "none") == []


def test_fewer_cells_are_among_more():
    some = [real.cells(real.Matrix(**AXES, cells=n)) for n in (1, 3, 8, 100)]
    assert [len(each) for each in some] == [1, 3, 8, 8]
    assert all(set(a) <= set(b) for a, b in itertools.pairwise(some))
    assert some[2] == some[3] == real.cells(real.Matrix(**AXES))


def test_cells_of_a_ring_are_side_by_side():
    rings = [cell.ring for cell in real.cells(real.Matrix(**AXES))]
    assert rings == sorted(rings, key=rings.index) and len(set(rings)) == 2


def test_the_tables_pair_runs_and_name_slow_cells():
    good, slow, *_ = real.cells(real.Matrix(**AXES))
    runs = [
        run(good, pair, method, rate)
        for pair in (1, 2, 3)
        for method, rate in (("ar", 10.0 * pair), ("flowspec", 20.0 * pair))
    ]
    runs += [
        run(slow, 1, "ar", 10.0),
        run(slow, 1, "flowspec", 5.0, "other"),
        run(slow, 2, "ar", 10.0),
        run(slow, 3, "ar", None),
    ]
    found = real.outcomes(runs)
    assert found[good].ratios == [2.0, 2.0, 2.0] and found[good].ms == {
        "ar": 50.0,
        "flowspec": 25.0,
    }
    assert found[slow].ratios == [0.5] and found[slow].different == 1
    table = real.markdown(found)
    assert "| 4096 | float32 | good | 1 | 0 | 64 | 2.00 | 2.00..2.00 | 3 |" in table
    assert "Cells below 0.97: 1 of 2\n- 4096, float32, good, 1, 0, 1024: 0.50\n" in table


def test_prompts_are_as_long_as_asked_and_differ():
    made = [
        real.prompt(str.split, pair, length)
        for pair, length in ((1, 64), (2, 64), (1, 9000), (1, 200_000))
    ]
    assert (
        [len(each) for each in made] == [64, 64, 9000, 200_000]
        and made[0] != made[1]
        and made[2][:64] == made[0]
    )


def test_a_weak_head_agrees_as_often_as_asked():
    torch.manual_seed(2)
    head, features = torch.randn(200, 16), torch.randn(500, 16)
    chosen = (features @ head.T).argmax(-1)
    for wanted in (0.7, 0.3, 0.0):
        made, found = weaken.weakened(head, features, chosen, wanted)
        assert abs(found - wanted) < 0.03 and found == weaken.agreement(made, features, chosen)
    with pytest.raises(UserError, match=r"--agree 0\.9: the draft agrees at 0\.00 as it is"):
        weaken.weakened(-head, features, chosen, 0.9)


@pytest.mark.slow
def test_a_weak_draft_is_a_checkpoint_with_a_head_of_its_own(pair, tmp_path, capsys):
    words = [
        "--draft",
        str(pair.draft),
        "--target",
        str(pair.target),
        "--output",
        str(tmp_path / "weak"),
    ]
    assert weaken.main([*words, "--agree", "0"]) == 0
    assert (
        json.loads((tmp_path / "weak" / "config.json").read_text())["tie_word_embeddings"] is False
    )
    assert (tmp_path / "weak" / "tokenizer.json").is_file()
    capsys.readouterr()
    for wrong in (["--agree", "2"], ["--agree", "0"]):
        assert weaken.main([*words, *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@torch.inference_mode()
def test_a_draft_with_room_computes_what_it_did_and_its_new_tokens_lose(pair, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    words = ["--draft", str(pair.draft), "--target", str(pair.draft), "--agree", "1"]
    assert (
        weaken.main(
            [*words, "--output", str(tmp_path / "roomy"), "--vocab", "5000", "--positions", "4096"]
        )
        == 0
    )
    small, roomy = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (pair.draft, tmp_path / "roomy")
    )
    own = small.config.vocab_size
    assert (roomy.config.vocab_size, roomy.config.max_position_embeddings) == (5000, 4096)
    text = torch.arange(5, 45)[None]
    want, got = (model.model(text).last_hidden_state for model in (small, roomy))
    torch.testing.assert_close(got[..., : want.shape[-1]], want, rtol=2e-3, atol=2e-3)
    logits = roomy(text).logits
    assert (logits[..., own:] < logits[..., :own].min() - 1).all()
    capsys.readouterr()
    assert weaken.main([*words, "--output", str(tmp_path / "no"), "--vocab", "5"]) == 2
    assert "--vocab" in capsys.readouterr().err
