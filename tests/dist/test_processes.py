"""Real processes over gloo: the same text as transformers', the whole result, and nothing left when it is over."""

import json
import socket
import subprocess
import sys

import pytest
from tokenizers import Tokenizer

from flowspec import __version__
from flowspec.bench.report import RIVALS
from flowspec.core.policies import METHODS
from flowspec.engine import Engine
from flowspec.trace import read
from tests.dist.conftest import PATIENCE, ROOT, Command

FIELDS = {
    *("method", "prompt_tokens", "new_tokens", "token_ids", "text", "finish_reason", "prefill_seconds", "decode_seconds"),
    *("tokens_per_second", "accepted_per_segment", "drafted_tokens", "forwarded_tokens", "stage_utilisation", "world_size"),
    *("seed", "temperature"),
}
PROMPTS = ["def add(a, b):\n    return", "for i in", "print(i, 'é', '語')\n" * 11]
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "seed": 11}
LIMIT = 160
"""positions of the tiny model"""


@pytest.fixture(scope="module")
def tokenizer(pair):
    return Tokenizer.from_file(str(pair.target / "tokenizer.json"))


@pytest.fixture(scope="module")
def sampled(pair):
    """What the same request gives over threads: its tokens and its text."""
    with Engine.from_config(pair.config(2)) as engine:
        generation = engine.generate(PROMPTS[0], **SAMPLED)
        for _ in generation:
            pass
        return generation.result


@pytest.fixture(scope="module")
def stop(sampled):
    """A piece of the middle of that text which does not occur before."""
    middle = len(sampled.text) // 2
    return next(piece for n in range(1, middle) if sampled.text.index(piece := sampled.text[middle : middle + n]) == middle)


def finished(folder, prompts, *words):
    """A run that has ended well, with its `results` and the `prompts` that it was given."""
    with Command(folder, *words, "--json", folder / "results.jsonl") as run:
        assert run.end() == 0, run.err
        run.prompts, run.results = prompts, [json.loads(line) for line in (folder / "results.jsonl").open()]
        assert list(folder.glob("*.partial")) == []
        return run


@pytest.fixture(scope="module")
def greedy(pair, tmp_path_factory):
    """Greedy over three stages from a prompt file, with a timeline."""
    folder = tmp_path_factory.mktemp("greedy")
    prompts, timeline = folder / "prompts.jsonl", folder / "t.json"
    prompts.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    run = finished(folder, PROMPTS, pair.config(3), "--prompt-file", prompts, f"trace={timeline}")
    run.timeline = timeline
    return run


@pytest.fixture(scope="module")
def drawn(pair, stop, tmp_path_factory):
    """Sampled over two stages with one prompt twice, up to a stop text."""
    flags = [word for name, value in SAMPLED.items() for word in ("--" + name.replace("_", "-"), value)]
    words = [pair.config(2), *["--prompt", PROMPTS[0]] * 2, *flags, "--stop", stop]
    return finished(tmp_path_factory.mktemp("drawn"), [PROMPTS[0]] * 2, *words)


@pytest.fixture(params=["greedy", pytest.param("drawn", marks=pytest.mark.slow)])
def run(request):
    return request.getfixturevalue(request.param)


def test_processes_write_transformers_greedy_text_in_the_order_of_the_prompts(pair, tokenizer, greedy):
    assert len(greedy.results) == len(PROMPTS)
    for prompt, result in zip(PROMPTS, greedy.results, strict=True):
        ids = tokenizer.encode(prompt).ids
        assert result["prompt_tokens"] == len(ids)
        assert result["token_ids"] == pair.greedy(ids, min(40, LIMIT - len(ids)))
        assert result["text"] == tokenizer.decode(result["token_ids"]).rstrip("\ufffd")  # bytes at the end that are no character yet
        assert (result["world_size"], result["temperature"], result["finish_reason"]) == (4, 0.0, "length")
    assert greedy.results[-1]["new_tokens"] < 40  # the last prompt runs into the model's limit


@pytest.mark.slow
def test_a_seed_gives_the_same_text_each_time_over_processes_and_threads_up_to_the_stop_text(drawn, sampled, stop):
    assert len(drawn.results) == 2
    for result in drawn.results:
        assert result["token_ids"] == sampled.token_ids[: result["new_tokens"]]
        assert result["text"] == sampled.text[: sampled.text.index(stop)]
        assert (result["world_size"], result["temperature"], result["seed"], result["finish_reason"]) == (3, 0.9, 11, "stop")


def test_the_result_has_all_its_fields_and_they_agree(run):
    for result in run.results:
        assert set(result) >= FIELDS
        assert result["method"] == "flowspec"
        assert result["new_tokens"] == len(result["token_ids"]) <= result["forwarded_tokens"]
        assert result["tokens_per_second"] == pytest.approx((result["new_tokens"] - 1) / result["decode_seconds"])
        assert result["prefill_seconds"] > 0 and result["accepted_per_segment"] > 0
        assert 0 <= result["accepted_tokens"] <= min(result["drafted_tokens"], result["forwarded_tokens"])
        shares = result["stage_utilisation"]
        assert len(shares) == result["world_size"] - 1 and all(0 < share <= 1 for share in shares)


def test_standard_output_holds_prompts_and_texts_and_nothing_else(run):
    assert run.out == "".join(f"{prompt}{result['text']}\n" for prompt, result in zip(run.prompts, run.results, strict=True))


def test_standard_error_shows_each_stage_loading_and_a_table_for_each_text(run):
    stages = run.results[0]["world_size"] - 1
    loading = [line for line in run.err.splitlines() if line.startswith("rank ")]  # once a second, and when it is done
    done = [line for line in loading if ": layers " in line]
    assert sorted(line.split(":")[0] for line in done) == [f"rank {rank} of {stages}" for rank in range(1, stages + 1)]
    assert all("MB in" in line for line in loading)
    for row in ("method", "tokens", "speed", "accepted per segment", "stage utilisation", "seed"):
        assert run.err.count(f"\n  {row} ") == len(run.results), run.err
    assert run.err.count("\n") == len(loading) + 7 * len(run.results) + run.err.count("\ntimeline: "), run.err  # no warning of any library between them


def test_the_timeline_of_a_run_has_all_ranks_and_requests(greedy):
    spans, facts = read(greedy.timeline)
    assert facts["stages"] == 3 and {s.rank for s in spans} == {0, 1, 2, 3}
    new_tokens = sum(result["new_tokens"] for result in greedy.results)
    assert sum(s.facts["accepted"] for s in spans if (s.rank, s.row) == (3, "compute") and s.name != "prefill") == new_tokens


@pytest.mark.slow
def test_methods_are_compared_over_processes(pair, command, tmp_path):
    words = ["--prompt", PROMPTS[0], "--max-new-tokens", 8, "--repeats", 1, "--output", tmp_path / "out"]
    words += ["--against", "transformers", "--reference", pair.target]
    run = command("bench", "compare", pair.config(2), *words, start=("-m", "flowspec"))
    assert run.end() == 0, run.err
    assert "every method wrote the same tokens" in run.out and "assisted, greedy: 1 of 1 identical" in run.out
    assert {json.loads(line)["method"] for line in (tmp_path / "out" / "records.jsonl").open()} == {*METHODS, *RIVALS}
    wrong = command("bench", "campare", pair.config(2), start=("-m", "flowspec"))
    assert wrong.end() == 2 and "bench compare CONFIG" in wrong.err


@pytest.mark.slow
def test_verify_over_processes_finds_every_text_identical(pair, command):
    run = command("verify", pair.config(2), "--prompt", PROMPTS[0], "--max-new-tokens", 16, start=("-m", "flowspec"))
    assert run.end() == 0, run.err
    *lines, last = run.out.splitlines()
    assert last == "compared: the ring with itself: speculation changes nothing; give --reference DIR to compare with the unsplit model"
    assert [line.split(": ")[0] for line in lines[:-1]] == [
        "prompt 1, greedy",
        *(f"prompt 1, temperature 0.8, top_p 0.9, seed {seed}" for seed in (1, 2, 3)),
    ]
    assert all(line.endswith(": identical (16 tokens)") for line in lines[:-1])
    assert lines[-1] == "flowspec: 4 of 4 identical, 0 parted at a numeric tie, 0 at a bug"


@pytest.mark.slow
def test_a_conversation_survives_a_pause_longer_than_every_timeout(pair, tokenizer, command):
    def answer(text: str) -> str:
        return tokenizer.decode(pair.greedy(tokenizer.encode(text).ids, 12))

    first = answer("User: add\nAssistant:")
    second = answer(f"User: add\nAssistant: {first}\nUser: print\nAssistant:")
    run = command(pair.config(2), "--chat", "--max-new-tokens", 12, env={"FLOWSPEC_HEARTBEAT": "0.5,5"})
    run.say("add")
    run.wait_until(lambda: run.out == f"{first}\n")
    with pytest.raises(subprocess.TimeoutExpired):
        run.process.wait(7)
    run.say("print")
    run.wait_until(lambda: run.out == f"{first}\n{second}\n")
    assert run.end() == 0, run.err


def test_the_version_is_told():
    done = subprocess.run([sys.executable, "-m", "flowspec", "--version"], cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"flowspec {__version__}\n", "")


@pytest.mark.slow
def test_a_killed_launcher_takes_its_ranks_along_and_the_port_is_free_again(pair, tokenizer, command):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = {"MASTER_PORT": str(probe.getsockname()[1])}
    killed = command(pair.config(2), "--chat", env=port)
    killed.wait_until_loaded(2)
    assert sorted(rank for rank in killed.alive().values() if rank) == ["0", "1", "2"]
    killed.process.kill()
    killed.process.wait()
    killed.wait_until_gone()
    again = command(pair.config(2), "--prompt", PROMPTS[1], "--max-new-tokens", 8, env=port)
    assert again.end() == 0, again.err
    text = tokenizer.decode(pair.greedy(tokenizer.encode(PROMPTS[1]).ids, 4))  # whole characters
    assert again.out.startswith(PROMPTS[1] + text)
