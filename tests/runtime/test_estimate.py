"""`estimate`: what it says of a pair against slow oracles, its file, and its bad input."""

import json
import shutil
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

from flowspec import UserError, cli
from flowspec.core.geometric import Run
from flowspec.core.request import Sampling
from flowspec.estimates import Acceptance, Latency, load_estimates, to_line
from flowspec.sampling import noise_for, pick
from flowspec.text import Text
from tests.conftest import save_tokenizer

PROMPTS = ["def add(a, b):", "for i in range(10):\n", "print('é')", "return"]
NEW = 24


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p}) for p in PROMPTS))
    return path


@pytest.fixture(scope="module")
def measured(pair, dataset, tmp_path_factory):
    """`measured(what, draft, *words)`: the estimates of the tiny pair, asked once for each request."""
    made = {}

    def ask(what: str, draft, *words):
        key = (what, draft, *words)
        if key not in made:
            out = tmp_path_factory.mktemp("out") / "estimates.json"
            named = ["--target", pair.target, "--draft", draft, "--dataset", dataset]
            named += ["--max-new-tokens", NEW, "--json", out, *words]
            assert cli.main(["estimate", what, *map(str, named)]) == 0
            made[key] = load_estimates(out)
        return made[key]

    return ask


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def next_row(model, tokens):
    """The logits after these tokens, all of them computed anew."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0, -1]


def plain_text(model, prompt, sampling):
    noise, tokens = noise_for(sampling, 320), list(prompt)
    for _ in range(NEW):
        tokens.append(pick(next_row(model, tokens), sampling, noise, len(tokens)).token)
    return tokens[len(prompt) :]


def drafted(model, prompt, text, sampling) -> list[Run]:
    """What a drafter does that drafts token by token from its own guesses until one is rejected, and then begins again."""
    noise, done, found = noise_for(sampling, 320), 0, []
    while done < len(text):
        own, right = [*prompt, *text[:done]], 0
        while done + right < len(text):
            guess = pick(next_row(model, own), sampling, noise, len(own)).token
            if guess != text[done + right]:
                break
            own.append(guess)
            right += 1
        found.append(Run(right, censored=done + right == len(text)))
        done += right + 1
    return found


@pytest.mark.parametrize(
    "temperature,rule", [pytest.param(0.0, "greedy", marks=pytest.mark.slow), (0.9, "coupled")]
)
def test_runs_are_those_of_a_drafter_that_drafts_token_by_token(pair, measured, temperature, rule):
    found = measured("acceptance", pair.draft, "--temperatures", "0,0.9", "--seed", 7)
    one = next(a for a in found.acceptances if a.rule == rule)
    target, draft, encode = loaded(pair.target), loaded(pair.draft), Text(pair.target).encode
    oracle = []
    for number, prompt in enumerate(map(encode, PROMPTS)):
        sampling = Sampling(temperature=temperature, seed=7 + number)
        text = plain_text(target, prompt, sampling)
        if rule == "greedy":
            assert text == pair.greedy(prompt, NEW)
        oracle += drafted(draft, prompt, text, sampling)
    accepted = sum(run.length for run in oracle)
    assert 0.2 < one.acceptance < 1
    assert (one.accepted, one.rejected + one.accepted) == (accepted, NEW * len(PROMPTS))
    assert one.censored == sum(run.censored for run in oracle)
    assert sum(row[2] for row in one.lengths) == sum(not run.censored for run in oracle)
    assert (one.temperature, one.seed, one.prompts) == (temperature, 7, len(PROMPTS))
    assert one.low <= one.acceptance <= one.high


def test_the_classic_rule_accepts_what_both_distributions_share(pair, measured):
    found = measured("acceptance", pair.draft, "--temperatures", "0,0.9", "--seed", 7)
    greedy, coupled, classic = found.acceptances
    assert [greedy.rule, coupled.rule, classic.rule] == ["greedy", "coupled", "classic"]
    target, draft, encode = loaded(pair.target), loaded(pair.draft), Text(pair.target).encode
    shares = []
    for number, prompt in enumerate(map(encode, PROMPTS)):
        sampling = Sampling(temperature=0.9, seed=7 + number)
        text = plain_text(target, prompt, sampling)
        for k in range(NEW):
            p, q = (next_row(m, [*prompt, *text[:k]]).double() / 0.9 for m in (target, draft))
            shares.append(float(torch.minimum(p.softmax(-1), q.softmax(-1)).sum()))
    assert classic.acceptance == pytest.approx(statistics.fmean(shares), abs=1e-5)
    assert classic.censored is classic.lengths is classic.p_value is None


def test_a_model_accepts_itself(pair, measured):
    tokens = NEW * len(PROMPTS)
    for one in measured("acceptance", pair.target, "--temperatures", "0,1").acceptances:
        assert one.acceptance == pytest.approx(1, abs=1e-5)
        assert one.rejected == pytest.approx(0, abs=1e-3)
        assert tokens / (tokens + 4) < one.low < 1 and one.high == pytest.approx(1, abs=1e-6)
        assert one.censored in (len(PROMPTS), None)


def test_an_end_token_ends_a_text_and_is_its_last(pair, dataset, tmp_path):
    ends = shutil.copytree(pair.target, tmp_path / "ends")
    eos = pair.greedy(Text(pair.target).encode(PROMPTS[0]), NEW)[5]
    (ends / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    out = tmp_path / "out.json"
    words = ["--target", ends, "--draft", pair.draft, "--dataset", dataset, "--prompts", 1]
    words += ["--temperatures", 0, "--max-new-tokens", NEW, "--json", out]
    assert cli.main(["estimate", "acceptance", *map(str, words)]) == 0
    (one,) = load_estimates(out).acceptances
    text = pair.greedy(Text(pair.target).encode(PROMPTS[0]), NEW)
    assert one.accepted + one.rejected == text.index(eos) + 1


def test_padding_of_the_vocabulary_may_differ(pair, measured, tmp_path):
    """A draft model without the target's 20 tokens of padding guesses as before, where the text has none of them."""
    narrow = tmp_path / "narrow"
    model = loaded(pair.draft)
    model.resize_token_embeddings(310)
    model.save_pretrained(narrow)
    save_tokenizer(narrow, 300)
    (one,) = measured("acceptance", narrow, "--temperatures", "0").acceptances
    (other,) = measured("acceptance", pair.draft, "--temperatures", "0").acceptances
    assert 0 < one.acceptance <= other.acceptance
    assert one.accepted + one.rejected == other.accepted + other.rejected


def test_latency_is_measured_of_both(pair, measured, capsys):
    found = measured("latency", pair.draft, "--repeats", 1, "--prompts", 2)
    (one,) = found.latencies
    assert not found.acceptances
    assert (one.prompts, one.repeats, one.max_new_tokens) == (2, 1, NEW)
    for name in ("target_first", "target", "draft_first", "draft"):
        low, high = getattr(one, f"{name}_range_ms")
        assert 0 < low <= getattr(one, f"{name}_ms") <= high


# ---- the file ------------------------------------------------------------------------------------
ACCEPTANCE = Acceptance(
    target="a", draft="b", dtype="float32", rule="coupled", temperature=0.5, seed=1, max_new_tokens=8, prompts=2, acceptance=0.5,
    low=0.25, high=0.75, worth=9.5, accepted=5.0, rejected=5.0, censored=1, lengths=((0, 0, 3, 2.5), (1, None, 2, 2.5)), p_value=0.7,
)  # fmt: skip
LATENCY = Latency(
    target="a", draft="b", dtype="float32", threads=1, prompts=2, prompt_tokens=7.5, max_new_tokens=8, repeats=3,
    target_first_ms=4.0, target_first_range_ms=(3.0, 5.0), target_ms=2.0, target_range_ms=(1.0, 3.0),
    draft_first_ms=1.0, draft_first_range_ms=(0.5, 2.0), draft_ms=0.5, draft_range_ms=(0.25, 1.0),
)  # fmt: skip


def test_estimates_come_back_from_their_file(tmp_path):
    path = tmp_path / "e.json"
    path.write_text(f"{to_line(LATENCY)}\n{to_line(ACCEPTANCE)}\n")
    assert load_estimates(path) == ((ACCEPTANCE,), (LATENCY,))


@pytest.mark.parametrize(
    "text,named",
    [
        ("", "holds no estimates"),
        ("{", "line 1 is no JSON object"),
        ("[1]", "line 1 is no JSON object"),
        ('{"kind": "accptance"}', "line 1: kind is accptance: did you mean acceptance?"),
        ('{"acceptance": 0.5}', "line 1: kind is None"),
        (to_line(ACCEPTANCE) + "\n" + to_line(LATENCY).replace('"draft_ms"', '"draft_mss"'), "line 2: unknown key draft_mss"),
        (to_line(ACCEPTANCE).replace('"acceptance": 0.5', '"acceptance": 1.5'), "line 1: acceptance is 1.5"),
        (to_line(ACCEPTANCE).replace('"acceptance": 0.5', '"acceptance": NaN'), "line 1: acceptance is nan"),
        (to_line(ACCEPTANCE).replace('"low": 0.25, ', ""), "line 1: low is missing"),
        (to_line(ACCEPTANCE).replace('"coupled"', '"copled"'), "line 1: rule is copled: did you mean coupled?"),
        (to_line(LATENCY).replace('"draft_ms": 0.5', '"draft_ms": "fast"'), "line 1: draft_ms is 'fast': expected float"),
        (to_line(LATENCY).replace('"draft_ms": 0.5', '"draft_ms": -1'), "line 1: draft_ms is -1.0: it must be above 0"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named(tmp_path, text, named):
    path = tmp_path / "e.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        load_estimates(path)
    assert named in str(caught.value) and str(path) in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*none\.json: No such file"):
        load_estimates(tmp_path / "none.json")


# ---- bad input -----------------------------------------------------------------------------------
@pytest.fixture
def refused(pair, dataset, capsys):
    """`refused(what, {option: value})`: the one line that the command prints."""

    def run(what: str, changes: dict) -> str:
        options = {"target": pair.target, "draft": pair.draft, "dataset": dataset} | changes
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        capsys.readouterr()
        code = cli.main(["estimate", what, *words])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith("flowspec: ") and "Traceback" not in err
        return err

    return run


@pytest.mark.parametrize(
    "what,changes,named",
    [
        ("acceptance", {"target": "no/where/at/all"}, "--target no/where/at/all: no such folder"),
        ("latency", {"draft": "no/where/at/all"}, "--draft no/where/at/all: no such folder"),
        ("acceptance", {"dataset": "none.txt"}, "cannot read --dataset none.txt"),
        ("acceptance", {"dataset": "none.csv"}, "--dataset none.csv: the name must end in .txt"),
        ("acceptance", {"prompts": 0}, "--prompts is 0: it must be at least 1"),
        ("acceptance", {"threads": 0}, "--threads is 0: it must be at least 1"),
        ("acceptance", {"max-new-tokens": "x"}, "--max-new-tokens is 'x': it must be a whole number"),
        ("acceptance", {"temperatures": "0,-1"}, "temperature is -1.0: it must be 0 (greedy) or more"),
        ("acceptance", {"temperatures": "warm"}, "--temperatures is 'warm': it must be a number"),
        ("acceptance", {"seed": -1}, "seed is -1"),
        ("acceptance", {"dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
        ("acceptance", {"json": "no/where/e.json"}, "--json: cannot write"),
        ("acceptance", {"repeats": 3}, "unrecognized arguments: --repeats 3"),
        ("latency", {"repeats": 0}, "--repeats is 0: it must be at least 1"),
        ("latency", {"max-new-tokens": 1}, "--max-new-tokens is 1: a further token is the second"),
        ("latency", {"max-new-tokens": 159}, "lower --max-new-tokens"),
        ("speed", {}, "argument acceptance|latency: invalid choice: 'speed'"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(refused, what, changes, named):
    assert named in refused(what, changes)


def test_bad_datasets_and_models_are_one_line(pair, refused, tmp_path):
    empty, long = tmp_path / "empty.txt", tmp_path / "long.txt"
    empty.write_text("\n")
    long.write_text("short\n" + "0 1 " * 200)
    assert f"--dataset {empty} holds no prompt" in refused("acceptance", {"dataset": empty})
    assert f"--dataset {long}: prompt 2 has " in refused("acceptance", {"dataset": long})
    other = shutil.copytree(pair.draft, tmp_path / "other")
    save_tokenizer(other, 290)
    found = refused("acceptance", {"draft": other})
    assert f"--draft {other} has another vocabulary than the target" in found
    shutil.copy(pair.draft / "tokenizer.json", other)
    (other / "model.safetensors").unlink()
    assert f"--draft: transformers cannot load {other}" in refused("latency", {"draft": other})
    (other / "config.json").write_text("{")
    assert f"--draft: transformers cannot load {other}" in refused("latency", {"draft": other})
    (other / "tokenizer.json").unlink()
    assert "cannot read the tokenizer" in refused("latency", {"draft": other})
