"""Verify's verdicts can be bad: a text that parts, a wrong split, another lead; a tie is told from a bug by both distances."""

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch

from flowspec import Engine, UserError, lossless
from flowspec.core.request import Sampling
from flowspec.lossless import Reference, distance, lead_is_certain, margins, verify
from flowspec.models.manifest import Manifest
from flowspec.models.split import split
from flowspec.preflight import check_reference
from flowspec.sampling import filtered, noise_for, pick

GREEDY = [{"temperature": 0.0}]
SETTINGS = [*GREEDY, {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 5}]
FILTERS = [
    dict(top_k=7),
    dict(top_p=0.9),
    dict(min_p=0.05),
    dict(top_k=30, top_p=0.8, min_p=0.02),
    dict(top_p=0.3),
    {},
]


# ---- the ring with itself --------------------------------------------------------------------------
class FakeEngine:
    """Plain decoding says 1 2 3 4; the method says `speculative`."""

    config = SimpleNamespace(method="flowspec", sampling=Sampling())
    sums_in = "float32"
    manifest = SimpleNamespace(num_layers=8, hidden_size=256)
    text = SimpleNamespace(encode=lambda prompt: (0,) * 10, decode=str)

    def __init__(self, speculative, gap):
        self.speculative, self.gap = speculative, gap

    def generate(self, prompt, method=None, **setting):
        ids = [1, 2, 3, 4] if method == "ar" else self.speculative
        return [SimpleNamespace(id=i, gap=self.gap) for i in ids]


@pytest.mark.parametrize(
    "speculative,gap,words,good",
    [
        ([1, 2, 3, 4], 0.5, "identical (4 tokens)", True),
        (
            [1, 2, 9, 4],
            0.5,
            "differs at position 12: 9 '[9]' with speculation, 3 '[3]' without; top-2 gap 5.00e-01, so a bug",
            False,
        ),
        (
            [1, 9, 3, 4],
            5e-6,
            "differs at position 11: 9 '[9]' with speculation, 2 '[2]' without; top-2 gap 5.00e-06, so a numeric tie",
            True,
        ),
        (
            [1, 2, 3],
            5e-6,
            "differs at position 13: nothing with speculation, 4 '[4]' without",
            False,
        ),
    ],
)
def test_verify_tells_identical_tie_and_bug_and_what_it_compared(
    capsys, speculative, gap, words, good
):
    assert verify(FakeEngine(speculative, gap), ["x"], GREEDY) is good
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith(f"prompt 1, greedy: {words}")
    finding = "speculation changes nothing" if good else "speculation changed the text"
    assert (
        last
        == f"compared: the ring with itself: {finding}; give --reference DIR to compare with the unsplit model"
    )


def test_verify_of_plain_decoding_is_refused_without_a_reference():
    engine = FakeEngine([1], 1.0)
    engine.config = SimpleNamespace(method="ar")
    with pytest.raises(UserError, match="another method than ar"):
        verify(engine, ["x"], GREEDY)


# ---- the ring with the unsplit model ---------------------------------------------------------------
@pytest.fixture(scope="module")
def reference(pair):
    return {dtype: Reference(pair.target, "float32", [dtype]) for dtype in ("float32", "bfloat16")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["flowspec", "ar"])
def test_a_right_split_writes_what_the_unsplit_model_does(pair, reference, capsys, dtype, method):
    with Engine.from_config(pair.config(2), [f"dtype={dtype}", f"method={method}"]) as engine:
        assert verify(engine, ["def add(a, b):", "for i"], SETTINGS, reference[dtype])
    *lines, last = capsys.readouterr().out.splitlines()
    assert str(reference[dtype]) in last and "0 at a bug" in last
    assert len(lines) == 4 + (method != "ar") and all(
        "and the unsplit model: " in line for line in lines[:4]
    )


def test_a_split_that_was_rounded_is_compared_with_the_model_rounded_alike(
    pair, reference, tmp_path, capsys
):
    split(str(pair.target), 2, tmp_path / "split", dtype="bfloat16")
    config = tmp_path / "config.yaml"
    config.write_text("stages: split\ndrafter: {kind: ngram}\nsampling: {max_new_tokens: 24}\n")
    with Engine.from_config(config) as engine:
        assert engine.dtype_name == "float32"
        assert verify(
            engine,
            ["def add(a, b):"],
            GREEDY,
            Reference(pair.target, "float32", [engine.manifest.dtype]),
        )
        assert not verify(engine, ["def add(a, b):"], GREEDY, reference["float32"])


def changed(pair, folder, change):
    """A configuration with a split of the pair's target after `change(state)` of its weights."""
    model = copy.deepcopy(pair.model)
    with torch.no_grad():
        change(model.model.layers)
    model.save_pretrained(folder / "other")
    (folder / "other" / "tokenizer.json").write_bytes((pair.target / "tokenizer.json").read_bytes())
    split(str(folder / "other"), 2, folder / "split")
    config = folder / "config.yaml"
    config.write_text(
        f"stages: split\ndrafter: {{kind: lm, path: {pair.draft}}}\nsampling: {{max_new_tokens: 24}}\n"
    )
    return config


def layers_twice(layers):
    for k in (3, 4):  # the second stage begins with what the first ended with
        layers[k].load_state_dict(layers[k - 2].state_dict())


def test_a_ring_that_runs_layers_twice_is_found_by_the_reference_alone(
    pair, reference, tmp_path, capsys
):
    with Engine.from_config(changed(pair, tmp_path, layers_twice)) as engine:
        assert verify(engine, ["def add(a, b):"], SETTINGS)
        assert "2 of 2 identical" in capsys.readouterr().out
        assert not verify(engine, ["def add(a, b):"], SETTINGS, reference["float32"])
    *_, itself, unsplit = capsys.readouterr().out.splitlines()
    assert itself == "flowspec: 2 of 2 identical, 0 parted at a numeric tie, 0 at a bug"
    assert "0 of 4 identical, 0 parted at a numeric tie, 4 at a bug" in unsplit


def test_a_ring_that_is_wrong_by_a_little_is_found_by_its_leads(pair, reference, tmp_path, capsys):
    """Too little to change a token."""

    def a_little(layers):
        layers[4].mlp.down_proj.weight *= 1 + 5e-4

    with Engine.from_config(changed(pair, tmp_path, a_little)) as engine:
        assert not verify(engine, ["def add(a, b):"], GREEDY, reference["float32"])
    assert "has another lead of" in capsys.readouterr().out


def test_a_reference_that_cannot_be_is_refused_by_name(pair, tmp_path):
    manifest = Manifest.load(pair.split(2))
    assert check_reference(str(pair.target), manifest, ["auto"]).folder == pair.target
    for folder, words in ((tmp_path / "none", "no such folder"), (tmp_path, "config.json")):
        with pytest.raises(UserError, match=f"^--reference.*{words}"):
            check_reference(str(folder), manifest, ["auto"])
    with pytest.raises(
        UserError, match=r"hidden_size is 48, .*stages.yaml says 64: give the model that was split"
    ):
        check_reference(str(pair.target), dataclasses.replace(manifest, hidden_size=64), ["auto"])
    with pytest.raises(UserError, match="another embedding"):
        check_reference(str(pair.draft), manifest, ["auto"])


# ---- distances -------------------------------------------------------------------------------------
def row(seed, scale=2.0):
    return torch.randn(60, generator=torch.Generator().manual_seed(seed)) * scale


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("seed", range(4))
def test_margins_say_what_the_filters_keep(filters, seed):
    sampling, logits = Sampling(temperature=0.7, **filters), row(seed)
    logits[::7] = logits[1]  # ties are kept together
    inside = margins(torch.log_softmax(logits.double() / 0.7, -1), sampling)
    assert torch.equal(inside >= 0, filtered(logits, sampling).isfinite())


@pytest.mark.parametrize("filters", [*FILTERS, None])
def test_no_token_is_picked_by_a_shift_much_smaller_than_its_distance_and_some_shift_of_that_size_picks_it(
    filters,
):
    reached = 0
    for seed in range(40):
        sampling = (
            Sampling() if filters is None else Sampling(temperature=0.8, seed=seed, **filters)
        )
        logits, noise = row(seed).double(), noise_for(sampling, 60)
        apart = torch.tensor([distance(logits, sampling, noise, 9, token) for token in range(60)])
        best = pick(logits, sampling, noise, 9).token
        assert apart[best] == 0 and (apart >= 0).all()
        second = int(apart.masked_fill(apart == 0, torch.inf).argmin())
        shifts = apart[second] * (
            torch.rand(200, 60, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            - 0.5
        )
        small = {pick(logits + shift / 4, sampling, noise, 9).token for shift in shifts}
        assert small == {best}, f"seed {seed}"
        aimed = logits.clone()
        aimed[second] += 1.01 * apart[second]
        aimed[best] -= 1.01 * apart[second]
        reached += pick(aimed, sampling, noise, 9).token == second
    assert reached >= 30  # a border is crossed by more than two tokens' moving, now and then


def test_a_token_at_a_filters_border_is_near_though_its_score_is_far():
    """The third token has by far the best score by its noise, and top-k drops it by a hair."""
    logits = torch.full((60,), -20.0)
    logits[:3] = torch.tensor([2.0, 1.0, 1.0 - 1e-5])
    rows = (noise_for(Sampling(temperature=1.0, seed=seed), 60)(0)[:3] for seed in range(2000))
    seed = next(
        k
        for k, (first, second, third) in enumerate(rows)
        if third > max(first, second) + 4 and first > second
    )
    sampling = Sampling(temperature=1.0, top_k=2, seed=seed)
    noise = noise_for(sampling, 60)
    chosen = pick(logits, sampling, noise, 0)
    assert chosen.token == 0 and chosen.gap > 1
    assert distance(logits, sampling, noise, 0, 2) == pytest.approx(1e-5, rel=0.1)
    assert distance(logits, sampling, noise, 0, 1) == pytest.approx(
        1.0, rel=0.1
    )  # the first is dropped for the third
    assert lead_is_certain(logits, sampling, noise, 0, 1e-6)
    assert not lead_is_certain(logits, sampling, noise, 0, 1e-4)


def test_rounding_may_do_more_in_deeper_models_and_shorter_numbers():
    one = lossless.tolerance("float32", 8, 256)
    assert (
        one
        < lossless.tolerance("float32", 32, 256)
        < lossless.tolerance("float16", 8, 256)
        < lossless.tolerance("bfloat16", 8, 256)
    )
    assert lossless.tolerance("int8", 8, 256) == one
    assert lossless.tolerance("float32", 8, 256, 20.0) == pytest.approx(2 * one)
