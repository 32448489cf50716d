"""`flowspec generate`: one process, whatever is guessed the text is the target's."""

import json

import pytest
import torch

from flowspec.bench.sampling import SIDES
from flowspec.cli import main as cli
from flowspec.commands.generate import main
from flowspec.core.request import Request, Sampling
from flowspec.engine import Engine
from flowspec.host.decoding import Pair
from flowspec.host.reader import Whole
from flowspec.host.trees import Branches, Likeliest
from tests.runtime.test_identity import PROMPTS, SAMPLED, text


@pytest.fixture(scope="module")
def models(pair):
    return {
        name: Whole.load(getattr(pair, name), torch.float32, "cpu", 320)
        for name in ("target", "draft")
    }


def asked(prompt, n=24, eos=(), number=1, **sampling):
    return Request(
        id=number,
        prompt=tuple(prompt),
        sampling=Sampling(max_new_tokens=n, **sampling),
        eos=frozenset(eos),
    )


def written(models, prompt, rule="keyed", gamma=4, drafter="draft", grower=None, **settings):
    """Blocks of a text, its tokens, and how many forwards of the target there were."""
    pair = Pair(models, grower or Branches(1, gamma), rule)
    begun = pair.begin([asked(prompt, **settings)], drafter)
    blocks = [block.written for block in begun.blocks]
    return blocks, [w.token for block in blocks for w in block], begun.readers["target"].forwards


GROWERS = [Branches(1, 1), Branches(1, 9), Branches(3, 4), Branches(20, 3), Likeliest(1, 1, 9)]
GROWERS += [Likeliest(40, 4, 6), Likeliest(300, 64, 16)]


@pytest.mark.parametrize("gamma", [1, 4, 9])
@pytest.mark.parametrize("drafter", ["draft", "target", None])
def test_greedy_text_is_that_of_transformers(pair, models, gamma, drafter):
    for prompt in PROMPTS:
        blocks, tokens, forwards = written(models, prompt, gamma=gamma, drafter=drafter)
        assert tokens == pair.greedy(prompt, 24)
        assert forwards == len(blocks)
        if drafter == "target":  # it is always right
            assert {w.origin for block in blocks for w in block} <= {"draft", "bonus", "plain"}
            assert len(blocks) == -(-24 // (gamma + 1))
        if drafter is None:
            assert {w.origin for block in blocks for w in block} == {"plain"}


@pytest.mark.parametrize("grower", GROWERS, ids=str)
def test_keyed_text_is_that_of_plain_decoding(pair, models, grower):
    for k, settings in enumerate(({}, dict(temperature=0.9, seed=4), *SAMPLED)):
        prompt = PROMPTS[k % len(PROMPTS)]
        _, want, _ = written(models, prompt, drafter=None, **settings)
        for drafter in ("draft", "target"):
            found = written(models, prompt, grower=grower, drafter=drafter, **settings)
            assert found[1] == want


def test_keyed_text_is_that_of_the_ring(pair, models):
    with Engine.from_config(pair.config(1)) as engine:
        for settings in SAMPLED:
            want = text(engine, PROMPTS[1], method="ar", max_new_tokens=24, **settings)
            assert written(models, PROMPTS[1], **settings)[1] == want


@pytest.mark.parametrize("rule", ["keyed", "rejection"])
@pytest.mark.parametrize("grower", [Branches(1, 4), Branches(6, 3), Likeliest(30, 8, 5)], ids=str)
def test_texts_in_step_are_those_alone(models, grower, rule):
    """Of several lengths, with seeds and ends of their own."""
    wanted = [dict(n=n, temperature=0.8, seed=n) for n in (3, 24, 11, 17)]
    if isinstance(grower, Likeliest) and rule == "rejection":
        wanted = [dict(n=n) for n in (3, 24, 11, 17)]  # greedy: no rule rejects
    pair, prompts = Pair(models, grower, rule), [*PROMPTS, *PROMPTS]
    requests = [asked(prompts[k], number=k, **each) for k, each in enumerate(wanted)]
    together: dict[int, list[int]] = {k: [] for k in range(len(requests))}
    begun = pair.begin(requests, "draft")
    blocks = [*begun.blocks]
    for block in blocks:
        together[block.text] += [w.token for w in block.written]
    for k, each in enumerate(wanted):
        assert together[k] == written(models, prompts[k], rule, grower=grower, **each)[1]
    assert begun.readers["target"].forwards < len(blocks), "no forward held rows of several"


def test_a_text_ends_at_its_length_and_at_an_end_token(pair, models):
    want = pair.greedy(PROMPTS[1], 24)
    for n in range(1, 8):
        assert written(models, PROMPTS[1], n=n)[1] == want[:n]
    for k in (3, 4, 5):
        until = want.index(want[k]) + 1
        assert written(models, PROMPTS[1], eos=[want[k]])[1] == want[:until]


@pytest.mark.slow
def test_rejection_draws_the_same_distribution_from_the_model_as_the_target_alone(models):
    """The first token behind a prompt, by 400 texts each way: their counts do not differ."""
    settings = dict(temperature=1.0, top_k=4)
    counts = {}
    for gamma, drafter in ((1, None), (1, "draft")):
        found = torch.zeros(320)
        for seed in range(400):
            _, tokens, _ = written(
                models, PROMPTS[1], "rejection", gamma, drafter, n=2, seed=seed, **settings
            )
            found[tokens[0]] += 1
        counts[drafter] = found
    some = sum(counts.values()) > 0
    assert 1 < some.sum() <= 4
    both = torch.stack([c[some] for c in counts.values()])
    want = both.sum(0, keepdim=True) / 2
    assert float(((both - want) ** 2 / want).sum()) < 21.1  # 3 degrees of freedom, p = 1e-4


def test_a_seed_gives_the_same_text_and_another_another(models):
    settings = dict(temperature=1.0)
    one, same, other = (
        written(models, PROMPTS[1], "rejection", seed=seed, **settings)[1] for seed in (4, 4, 5)
    )
    assert one == same != other


def test_a_draft_that_is_the_target_loses_no_guess(models):
    blocks, _, _ = written(
        models, PROMPTS[1], "rejection", drafter="target", temperature=0.7, seed=2
    )
    assert all(w.origin != "resampled" for block in blocks for w in block)


def test_the_command_writes_a_line_a_prompt_and_says_where_tokens_came_from(pair, tmp_path, capsys):
    out = tmp_path / "o.jsonl"
    words = ["--target", pair.target, "--draft", pair.draft, "--max-new-tokens", 12, "-v"]
    words += ["--prompt", "def add(a, b):", "--prompt", "for i in", "--json", out]
    assert main([str(word) for word in words]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    said = capsys.readouterr().out
    for record in records:
        assert record["new_tokens"] == len(record["token_ids"]) == sum(record["origins"].values())
        assert f"12 tokens in {record['target_forwards']} forwards of the target" in said
        assert record["text"] in said
    assert [r["finish_reason"] for r in records] == ["length"] * 2


@pytest.mark.parametrize(
    "words,line",
    [
        (["--method", "ar", "--draft", "{draft}"], "--draft is of no use to --method ar"),
        ([], "--draft DIR is missing"),
        (["--draft", "{draft}", "--gamma", "0"], "--gamma is 0"),
        (["--draft", "{draft}", "--top-p", "3"], "--top-p is 3"),
        (["--draft", "{draft}", "--temperature", "hot"], "--temperature"),
        (["--draft", "{draft}", "--max-budget", "9"], "--max-budget is of no use to --method spec"),
        (["--draft", "{draft}", "--method", "specexec", "--rule", "chen"], "--rule chen: method"),
        (["--draft", "{draft}", "--batch-size", "0"], "--batch-size is 0"),
        (["--draft", "nowhere"], "--draft"),
        (["--draft", "{draft}", "--json", "{target}"], "--json"),
    ],
)
def test_what_is_wrong_is_one_line(pair, words, line, capsys):
    words = [word.format(target=pair.target, draft=pair.draft) for word in words]
    assert cli(["generate", "--target", str(pair.target), "--prompt", "a", *words]) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1


# ---- bench sampling ------------------------------------------------------------------------------
def sampling_words(pair, *more):
    words = ["bench", "sampling", "--target", pair.target, "--draft", pair.draft]
    return [str(word) for word in (*words, "--num-runs", 3, "-N", 12, "-K", 3, *more)]


def test_a_table_of_decoding_alone_and_speculatively(pair, tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    assert cli(sampling_words(pair, "--json", out)) == 0
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(runs) == 9 and all(run["new_tokens"] == 12 for run in runs)
    forwards = {side: [r["target_forwards"] for r in runs if r["side"] == side] for side in SIDES}
    assert forwards["ar"] == [12] * 3 and forwards["the target drafts"] == [3] * 3
    said = capsys.readouterr().out
    assert all(side in said for side in ("ar", "speculative")) and "T = 0.6" in said


def test_transformers_stands_beside_us(pair, tmp_path):
    out = tmp_path / "runs.jsonl"
    assert cli(sampling_words(pair, "--json", out, "--against", "transformers")) == 0
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    theirs = [run for run in runs if run["side"] == "transformers, assisted"]
    assert len(runs) == 15 and len(theirs) == 3
    assert all(run["new_tokens"] == 12 > run["target_forwards"] - 1 for run in theirs)


def test_a_target_that_rejects_its_own_guesses_is_a_fault(pair, monkeypatch):
    monkeypatch.setitem(SIDES, "the target drafts", "draft")
    with pytest.raises(AssertionError, match="a guess of the target itself was rejected"):
        cli(sampling_words(pair, "--temperature", 2))


def test_what_is_wrong_with_a_bench_is_one_line(pair, capsys):
    assert cli(sampling_words(pair, "--num-runs", 0)) == 2
    assert "--num-runs is 0" in capsys.readouterr().err


# ---- bench specexec ------------------------------------------------------------------------------
def trees_words(pair, *more):
    words = ["bench", "specexec", "--target", pair.target, "--draft", pair.draft]
    return [str(word) for word in (*words, "--num-runs", 2, "--max-new-tokens", 12, *more)]


def test_a_table_of_trees_by_their_size(pair, tmp_path, capsys):
    out = tmp_path / "runs.jsonl"
    assert (
        cli(
            trees_words(
                pair, "--max-budget", "4,20", "--max-beam-len", 3, "--as-published", "--json", out
            )
        )
        == 0
    )
    runs = [json.loads(line) for line in out.read_text().splitlines()]
    sides = ["ar", "specexec 4", "specexec 20", "specinfer 4", "specinfer 20"]
    sides += ["published 4", "published 20"]
    assert sorted(run["side"] for run in runs) == sorted(2 * sides)
    said = capsys.readouterr().out
    for run in runs:
        name, _, budget = run["side"].partition(" ")
        assert run["side"] in said and run["new_tokens"] == 12
        iterations = run["target_forwards"]
        if name == "ar":
            assert iterations == 12 and run["nodes"] == 0
            continue
        assert run["height"] <= 3 * iterations and run["nodes"] <= int(budget) * iterations
        assert run["height"] > 0 and run["draft_seconds"] > 0 and run["cache_mb"] > 0
    trees = {run["side"]: run["nodes"] / run["target_forwards"] for run in runs}
    assert trees["specexec 20"] > 10 > trees["specexec 4"]


@pytest.mark.parametrize(
    "words,line",
    [
        (["--max-budget", "0,4"], "--max-budget is 0,4"),
        (["--max-budget", "few"], "--max-budget is 'few'"),
        (["--gen-type", "tree"], "--gen-type: 'tree' is not known here"),
        (["--gamma", "3"], "--gamma is of no use to --method spec"),
    ],
)
def test_what_is_wrong_with_trees_is_one_line(pair, words, line, capsys):
    assert cli(trees_words(pair, *words)) == 2
    said = capsys.readouterr().err
    assert line in said and said.count("\n") == 1
