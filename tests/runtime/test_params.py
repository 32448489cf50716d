"""Penalties, biases and log-probabilities: along every path they are those of plain decoding.

The oracle recomputes the whole text with the unsplit model for each token, and counts in Python."""

import argparse
import dataclasses
import json
import random
from collections import Counter

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from flowspec import Engine, UserError
from flowspec.cli import main as cli
from flowspec.commands.options import add_shared, configuration
from flowspec.config import load_config
from flowspec.core import dsi
from flowspec.core.messages import DraftNode
from flowspec.core.past import Past
from flowspec.core.policies import METHODS
from flowspec.core.request import MOST_BIASES, Sampling
from flowspec.draft.base import Alike
from flowspec.host.decoding import Pair
from flowspec.host.reader import Whole
from flowspec.host.trees import Branches, Likeliest
from flowspec.lossless import Reference, replay
from flowspec.sampling import adjusted, noise_for, pick
from tests.runtime.test_generate import asked
from tests.runtime.test_identity import assert_same, slow

PROMPT, N, FEW = [7, 8, 9, 7], 12, 6
EACH = [
    dict(presence_penalty=1.5),
    dict(frequency_penalty=0.7),
    dict(repetition_penalty=1.4),
    dict(logit_bias={5: 4.0, 17: -100.0, 31: 2.5}),
    dict(logprobs=0),
]
ALL = dict(
    presence_penalty=0.6,
    frequency_penalty=0.5,
    repetition_penalty=1.3,
    logit_bias={5: 4.0, 17: -100.0},
    logprobs=3,
)
HOW = [dict(), dict(temperature=0.5, top_p=0.95, seed=3)]
VERIFY_ON = ("last", "coordinator")


class Oracle:
    """Texts of the unsplit model, and the logits of each token as they are; each is asked for once."""

    def __init__(self, model):
        self._model, self._made = model, {}

    def __call__(self, prompt=PROMPT, n=N, **settings):
        key = (tuple(prompt), n, Sampling(**settings))
        if key not in self._made:
            self._made[key] = self._write([*prompt], n, key[-1])
        return self._made[key]

    @torch.no_grad()
    def _write(self, prompt, n, sampling):
        noise, text, rows = noise_for(sampling, 320), [], []
        for position in range(len(prompt), len(prompt) + n):
            rows.append(self._model(torch.tensor([prompt + text])).logits[0, -1].double())
            x = rows[-1].clone()
            for token, bias in sampling.logit_bias:
                x[token] += bias
            for token in {*prompt, *text}:
                r = sampling.repetition_penalty
                x[token] = x[token] / r if x[token] > 0 else x[token] * r
            for token, times in Counter(text).items():
                x[token] -= sampling.presence_penalty + sampling.frequency_penalty * times
            text.append(pick(x, sampling, noise, position).token)
        return text, rows


@pytest.fixture(scope="module")
def oracle(pair):
    return Oracle(pair.model)


@pytest.fixture(scope="module")
def rings(pair):
    """By who picks the tokens."""
    made = {
        where: Engine.from_config(pair.config(2), [f"verify_on={where}"]) for where in VERIFY_ON
    }
    yield made
    for engine in made.values():
        engine.close()


def ids(tokens) -> list[int]:
    return [token.id for token in tokens]


def assert_told(tokens, rows, top):
    """The tokens' log-probabilities are those of the unsplit model's logits as they are."""
    for token, row in zip(tokens, rows, strict=True):
        want = torch.log_softmax(row, -1)
        assert token.logprob == pytest.approx(float(want[token.id]), abs=1e-4)
        assert len(token.top) == top
        for (id, value), best in zip(token.top, want.topk(top).values, strict=True):
            assert value == pytest.approx(float(best), abs=1e-4)
            assert value == pytest.approx(float(want[id]), abs=1e-4)


# ---- over a ring ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "verify_on,how",
    [
        ("last", HOW[1]),
        ("coordinator", HOW[0]),
        slow("last", HOW[0]),
        slow("coordinator", HOW[1]),
    ],
)
def test_every_method_writes_what_the_unsplit_model_would(rings, oracle, how, verify_on):
    want, rows = oracle(**ALL, **how)
    several = 0
    for method in METHODS:
        generation = rings[verify_on].generate(
            PROMPT, method=method, max_new_tokens=N, **ALL, **how
        )
        tokens = list(generation)
        assert_same(ids(tokens), want)
        assert_told(tokens, rows, ALL["logprobs"])
        several += generation.accepted
    assert several > N // 2, "hardly any path was longer than one token"
    assert want != oracle(**how)[0], "they change nothing"


@pytest.mark.slow
@pytest.mark.parametrize("verify_on", VERIFY_ON)
@pytest.mark.parametrize("how", HOW, ids=["greedy", "sampled"])
@pytest.mark.parametrize("one", EACH, ids=lambda one: next(iter(one)))
def test_each_parameter_alone(rings, oracle, one, how, verify_on):
    want, rows = oracle(n=FEW, **one, **how)
    assert ("logprobs" in one) == (want == oracle(n=FEW, **how)[0]), "it changes nothing"
    for method in METHODS:
        tokens = list(
            rings[verify_on].generate(PROMPT, method=method, max_new_tokens=FEW, **one, **how)
        )
        assert_same(ids(tokens), want)
        if "logprobs" in one:
            assert_told(tokens, rows, 0)
        else:
            assert all(token.logprob is None and token.top == () for token in tokens)


@pytest.mark.parametrize("verify_on", VERIFY_ON)
def test_penalties_need_the_path_of_a_node(rings, oracle, verify_on, monkeypatch):
    """The defect planted: what counts is the text up to the root of the walk."""
    plain, how = Past.reach, HOW[0]

    def forgetful(self, position, token):
        plain(self, position, token)
        if position >= len(PROMPT) and token in self._new:
            self._new[token] = 0

    want = oracle(**ALL, **how)[0]
    monkeypatch.setattr(Past, "reach", forgetful)
    found = rings[verify_on].generate(PROMPT, method="serial", max_new_tokens=N, **ALL, **how)
    assert ids(found) != want


@pytest.mark.parametrize("verify_on", VERIFY_ON)
def test_a_text_that_is_gone_on_with_counts_its_known_tokens(rings, oracle, verify_on):
    for how in HOW:
        want, rows = oracle(**ALL, **how)
        generation = rings[verify_on].generate(
            PROMPT, known=want[:7], max_new_tokens=N, **ALL, **how
        )
        tokens = list(generation)
        assert_same(generation.token_ids, want)
        assert_told(tokens, rows[7:], ALL["logprobs"])
        told = json.loads(generation.result.line())["logprobs"]
        assert told == [[token.logprob, [list(each) for each in token.top]] for token in tokens]


def test_requests_side_by_side_have_each_its_own(rings, oracle):
    """One of them asks for nothing, so that it needs two logits and another all of them."""
    wanted = [dict(), {**ALL, **HOW[1]}, dict(logprobs=2), EACH[2], {**EACH[0], **HOW[1]}]
    for engine in rings.values():
        begun = [engine.submit(PROMPT, max_new_tokens=N, **each) for each in wanted]
        for generation, each in zip(begun, wanted, strict=True):
            tokens, (want, rows) = list(generation), oracle(**each)
            assert_same(ids(tokens), want)
            if "logprobs" in each:
                assert_told(tokens, rows, each["logprobs"])
            assert (generation.result.logprobs is None) == ("logprobs" not in each)


@pytest.mark.parametrize(
    "stages,members,words",
    [
        (1, 2, []),
        (1, 1, ["dsi.servers=3"]),
        slow(2, 2, ["dsi.servers=2", "verify_on=coordinator"]),
    ],
)
def test_stages_of_several_ranks_and_several_servers(
    pair, oracle, stages, members, words, monkeypatch
):
    monkeypatch.setattr(dsi, "BEHIND", 4)  # so that servers also catch up
    with Engine.from_config(pair.config(stages, None, "lm", members), words) as engine:
        for how in HOW:
            want, rows = oracle(**ALL, **how)
            for method in ("flowspec", "dsi") if members == 1 else ("flowspec", "galaxy"):
                tokens = list(
                    engine.generate(PROMPT, method=method, max_new_tokens=N, **ALL, **how)
                )
                assert_same(ids(tokens), want)
                assert_told(tokens, rows, ALL["logprobs"])


@pytest.mark.parametrize("drafter", ["eagle", slow("ngram")])
def test_other_drafters(pair, oracle, drafter):
    with Engine.from_config(pair.config(2, None, drafter)) as engine:
        for how in HOW:
            for method in ("serial", "flowspec"):
                found = engine.generate(PROMPT, method=method, max_new_tokens=N, **ALL, **how)
                assert_same(ids(found), oracle(**ALL, **how)[0])


def test_a_drafter_is_adjusted_as_the_target_is(pair):
    """The target drafts for itself, one guess at a place: all are right."""
    words = [f"drafter.path={pair.target}", "tree.top_k=1", "tree.depth=3"]
    with Engine.from_config(pair.config(1), words) as engine:
        for each in EACH[:4]:
            generation = engine.generate(PROMPT, method="serial", max_new_tokens=N, **each)
            assert len(list(generation)) == N and generation.accepted == N - N // 4, each


def test_a_drafter_counts_the_path_of_a_node():
    """Nodes of a tree before and after a commit, one of them below a node that nobody asked for."""
    request = asked([3, 4, 3], presence_penalty=1.0, logit_bias={9: 0.5})
    alike, names = Alike(request), torch.tensor([0, 3, 5, 7, 9])
    root, left, right, below = (
        DraftNode(0, -1, 3),
        DraftNode(1, 0, 5),
        DraftNode(2, 0, 7),
        DraftNode(3, 1, 9),
    )

    def penalised(*nodes):
        rows = alike(nodes, torch.zeros(len(nodes), 5), names)
        return [{int(names[k]) for k in range(4) if row[k] == -1.0} for row in rows]

    assert penalised(root, left, right) == [set(), {5}, {7}]
    assert float(alike([below], torch.zeros(1, 5), names)[0, 4]) == -0.5, "biased and penalised"
    assert penalised(DraftNode(9, 8, 3)) == [set()], "what is not known is not counted"
    alike.commit([root, left], 3)
    assert penalised(below) == [{5}] and penalised(DraftNode(4, 3, 7), below) == [{5, 7}, {5}]


def test_verify_asks_the_unsplit_model_for_the_same(pair, rings):
    reference, setting = Reference(pair.target, "float32"), {**ALL, **HOW[1]}
    found = list(rings["last"].generate("def add(", max_new_tokens=N, **setting))
    setting["max_new_tokens"] = N
    assert not replay(rings["last"], reference, "def add(", found, setting).parted
    other = {**HOW[1], "max_new_tokens": N}
    assert replay(rings["last"], reference, "def add(", found, other).bugs


# ---- in one process ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def models(pair):
    return {
        name: Whole.load(getattr(pair, name), torch.float32, "cpu", 320)
        for name in ("target", "draft")
    }


def written(models, grower, rule, drafter, settings):
    begun = Pair(models, grower, rule).begin([asked(PROMPT, N, **settings)], drafter)
    return [token for block in begun.blocks for token in block.written]


@pytest.mark.parametrize("how", HOW, ids=["greedy", "sampled"])
def test_one_process_writes_it_too(models, oracle, how):
    settings = {**ALL, **how}
    want, rows = oracle(**settings)
    for grower in (Branches(1, 4), Branches(3, 3), Likeliest(12, 4, 4)):
        for drafter in ("draft", "target"):
            found = written(models, grower, "keyed", drafter, settings)
            assert_same([token.token for token in found], want)
            for token, row in zip(found, rows, strict=True):
                own = float(torch.log_softmax(row, -1)[token.token])
                assert token.logprobs.own == pytest.approx(own, abs=1e-4)
            if drafter == "target":
                rejected = sum(token.origin == "resampled" for token in found)
                assert not rejected, "a guess of the target itself is adjusted as the target is"


def test_rejection_keeps_all_guesses_of_the_target_itself(models):
    for seed in range(3):
        settings = {**ALL, "temperature": 1.0, "seed": seed}
        found = written(models, Branches(1, 4), "rejection", "target", settings)
        assert len(found) == N and not any(token.origin == "resampled" for token in found)


# ---- what the words mean -------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(20))
def test_a_walk_counts_its_path(seed):
    """Random walks that go back and forth over a prompt, some of it known, and a text."""
    r = random.Random(seed)
    prompt = [r.randrange(9) for _ in range(r.randint(1, 12))]
    known = r.randint(0, len(prompt) - 1)
    sampling = Sampling(
        presence_penalty=r.uniform(-2, 2),
        frequency_penalty=r.uniform(-2, 2),
        repetition_penalty=r.choice([1.0, 0.6, 1.7]),
        logit_bias={token: r.uniform(-9, 9) for token in r.sample(range(12), 3)},
    )
    past, text, begin = Past(prompt, known), [*prompt], len(prompt) - known
    logits = torch.randn(12, generator=torch.Generator().manual_seed(seed))
    before = logits.clone()
    for _ in range(40):
        at = r.randint(max(0, len(prompt) - 1, len(text) - 4), len(text))
        token = r.randrange(9) if at >= len(prompt) else text[at]
        text = [*text[:at], token]
        past.reach(at, token)
        want, new = logits.double(), Counter(text[begin:])
        for each, bias in sampling.logit_bias:
            want[each] += bias
        want = RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty)(
            torch.tensor([text]), want[None]
        )[0]
        for each, times in new.items():
            want[each] -= sampling.presence_penalty + times * sampling.frequency_penalty
        torch.testing.assert_close(adjusted(logits, sampling, past), want, msg=f"seed {seed}")
    assert torch.equal(logits, before), "the logits as they are are still needed"


def test_a_draft_model_may_lack_tokens_that_are_counted():
    sampling = Sampling(repetition_penalty=2.0, presence_penalty=1.0, logit_bias={9: 1.0, 1: 0.5})
    past = Past([9, 2])
    past.reach(2, 8)
    assert adjusted(torch.ones(3), sampling, past).tolist() == [1.0, 1.5, 0.5]


def test_what_changes_nothing_costs_nothing():
    logits, sampling = torch.randn(9), Sampling(temperature=0.5, logprobs=3)
    assert adjusted(logits, sampling, None) is logits and not sampling.counts
    assert Sampling().highest
    for each in EACH:
        assert not Sampling(**each).highest


# ---- what is wrong -------------------------------------------------------------------------------
WRONG = [
    (dict(presence_penalty=2.5), r"sampling\.presence_penalty is 2\.5: it must lie in \[-2, 2\]"),
    (dict(frequency_penalty=-3.0), r"sampling\.frequency_penalty is -3\.0"),
    (dict(presence_penalty=float("nan")), r"sampling\.presence_penalty is nan"),
    (dict(repetition_penalty=0.0), r"sampling\.repetition_penalty is 0\.0: it must be more than 0"),
    (dict(logprobs=21), r"sampling\.logprobs is 21: it must be a whole number in \[0, 20\]"),
    (dict(logprobs=1.5), r"sampling\.logprobs is 1\.5"),
    (dict(logit_bias={5: 101}), r"sampling\.logit_bias of token 5 is 101"),
    (dict(logit_bias={-1: 1}), r"sampling\.logit_bias names token -1"),
    (dict(logit_bias={"5": 1}), r"sampling\.logit_bias names token '5'"),
    (dict(logit_bias={5: None}), r"sampling\.logit_bias of token 5 is None"),
    (dict(logit_bias=[5]), r"sampling\.logit_bias is \[5\]"),
    (dict(logit_bias=dict.fromkeys(range(MOST_BIASES + 1), 1.0)), "1025 tokens: 1024 are the most"),
    (
        dict(logit_bias={320: 1.0}),
        r"sampling\.logit_bias names token \[320\]: the vocabulary has 320",
    ),
]


@pytest.mark.parametrize("settings,line", WRONG)
def test_a_bad_value_is_named(rings, settings, line):
    with pytest.raises(UserError, match=line):
        rings["last"].generate(PROMPT, **settings)


def test_a_configuration_holds_them(pair):
    words = ["sampling.logit_bias={5: 2, 9: -100}", "sampling.logprobs=2"]
    config = load_config(pair.config(2), [*words, "sampling.presence_penalty=1"])
    assert config.sampling.logit_bias == ((5, 2.0), (9, -100.0)) and config.sampling.logprobs == 2
    assert (
        Sampling(**json.loads(json.dumps(dataclasses.asdict(config.sampling)))) == config.sampling
    )
    with pytest.raises(UserError, match=r"a key of sampling\.logit_bias is 'five'"):
        load_config(pair.config(2), ["sampling.logit_bias={five: 2}"])
    with pytest.raises(UserError, match=r"sampling\.logit_bias is 3: expected a mapping"):
        load_config(pair.config(2), ["sampling.logit_bias=3"])


def test_flags_say_them_to_both_commands(pair, rings, tmp_path, capsys):
    flags = ["--logit-bias", "5:4,17:-100", "--frequency-penalty", "0.5", "--logprobs", "1"]
    settings = dict(logit_bias={5: 4.0, 17: -100.0}, frequency_penalty=0.5, logprobs=1)
    parser, out = argparse.ArgumentParser(), tmp_path / "out.jsonl"
    add_shared(parser)
    _, config = configuration(parser.parse_args([str(pair.config(2)), *flags]))
    assert config.sampling == Sampling(max_new_tokens=40, **settings)
    pairs = ["--target", str(pair.target), "--draft", str(pair.draft), "--rule", "keyed"]
    words = ["--prompt", "def add(", "--max-new-tokens", str(FEW), "--json", str(out)]
    assert cli(["generate", *pairs, *flags, *words]) == 0
    own = json.loads(out.read_text())
    theirs = rings["last"].generate("def add(", max_new_tokens=FEW, **settings)
    assert own["token_ids"] == ids(theirs) and len(own["logprobs"]) == FEW
    for (ours, [[token, _]]), told in zip(own["logprobs"], theirs.logprobs, strict=True):
        assert ours == pytest.approx(told.own, abs=1e-4) and token == told.top[0][0]


@pytest.mark.parametrize(
    "words,line",
    [
        (["--logit-bias", "5"], "--logit-bias is '5'"),
        (["--logit-bias", "a:5"], "--logit-bias is 'a'"),
        (["--logit-bias", "5:x"], "--logit-bias is 'x'"),
        (["--logit-bias", "320:1"], "--logit-bias names token [320]"),
        (["--presence-penalty", "3"], "--presence-penalty is 3.0"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0"),
        (["--logprobs", "many"], "--logprobs is 'many'"),
    ],
)
def test_a_bad_flag_is_one_line(pair, words, line, capsys):
    words = ["--method", "ar", "--target", str(pair.target), "--prompt", "a", *words]
    assert cli(["generate", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


def test_transformers_is_not_asked_for_them(pair, capsys):
    words = ["bench", "sampling", "--target", str(pair.target), "--draft", str(pair.draft)]
    assert cli([*words, "--against", "transformers", "--presence-penalty", "1"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("flowspec: --against: transformers") and said.count("\n") == 1
