"""A run that lost a rank is started again and goes on with its texts, which are those of an undisturbed run."""

import json
import signal

import pytest

from flowspec.engine import Engine
from flowspec.journal import Journal
from tests.dist.test_lost_ranks import NAMES
from tests.runtime.test_identity import PROMPTS

SLOW = pytest.mark.slow
PROMPT, NEXT = "for i in", "def add(a, b):"
WORDS = ["--prompt", PROMPT, "--prompt", NEXT, "--max-new-tokens", 40, "--seed", 7]


@pytest.mark.parametrize(
    "rank,number,temperature",
    [
        (1, signal.SIGKILL, 0.9),
        pytest.param(0, signal.SIGKILL, 0.9, marks=SLOW),
        pytest.param(2, signal.SIGSTOP, 0, marks=SLOW),
    ],
)
def test_the_texts_are_those_of_an_undisturbed_run(pair, command, tmp_path, rank, number, temperature):
    config, results = pair.config(2), tmp_path / "broken.jsonl"
    words = [*WORDS, "--temperature", temperature, "--json", results, "--restart", 1]
    run = command(config, *words, "emulate.stage_ms=30", env={"FLOWSPEC_HEARTBEAT": "0.5,5"})
    run.wait_until(lambda: len(run.out) > len(PROMPT) + 3)
    run.signal(rank, number)
    want = undisturbed(config, temperature)
    assert run.end() == 0, run.err
    how = "died: killed by signal 9" if number == signal.SIGKILL else "hung: no heartbeat for 5 s"
    assert f"flowspec: {NAMES[rank]} {how}; started again (1 of 1)" in run.err
    got = [json.loads(line) for line in results.read_text().splitlines()]
    for name in ("token_ids", "text", "finish_reason", "prompt_tokens", "new_tokens", "seed"):
        assert [line[name] for line in got] == [getattr(result, name) for result in want]
    assert run.out == "".join(f"{p}{r.text}\n" for p, r in zip((PROMPT, NEXT), want, strict=True))
    assert got[0]["known_tokens"] > 0 == got[1]["known_tokens"]


def undisturbed(config, temperature):
    """The results of the same ring as threads of this process."""
    with Engine.from_config(config) as engine:
        settings = {"max_new_tokens": 40, "seed": 7, "temperature": temperature}
        texts = [engine.submit(prompt, **settings) for prompt in (PROMPT, NEXT)]
        for text in texts:
            list(text)
        return [text.result for text in texts]


@SLOW
def test_a_rank_that_is_lost_again_and_again_ends_the_run(pair, command):
    run = command(pair.config(2), *WORDS, "--restart", 1, "emulate.stage_ms=30")
    run.wait_until(lambda: len(run.out) > len(PROMPT) + 3)
    run.signal(1, signal.SIGKILL)
    run.wait_until(lambda: "started again" in run.err)
    said = len(run.out)
    run.wait_until(lambda: len(run.out) > said)
    run.signal(2, signal.SIGKILL)
    assert run.end() == 1
    assert run.err.splitlines()[-1] == f"flowspec: {NAMES[2]} died: killed by signal 9"


@pytest.mark.parametrize(
    "words,line",
    [
        (["--restart", "-1"], "--restart is -1"),
        (["--restart", "1", "--chat"], "--restart goes on with prompts, not with a conversation"),
    ],
)
def test_what_is_wrong_is_one_line(pair, command, words, line):
    run = command(pair.config(1), *WORDS, *words)
    assert run.end() == 2 and run.err.count("\n") == 1 and line in run.err


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.9, "seed": 5}], ids=str)
def test_a_text_goes_on_behind_what_is_known(pair, settings):
    with Engine.from_config(pair.config(1)) as engine:
        calm = engine.generate(PROMPTS[1], max_new_tokens=20, **settings)
        want = [token.id for token in calm]
        for k in (1, 7, 19):
            generation = engine.generate(PROMPTS[1], known=want[:k], max_new_tokens=20, **settings)
            assert len([*generation]) == 20 - k
            result = generation.result
            assert result.token_ids == want and result.text == calm.result.text
            assert (result.new_tokens, result.known_tokens) == (20, k)
            assert result.prompt_tokens == len(PROMPTS[1])


def test_a_journal_is_read_up_to_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "journal"
    first = Journal(path)
    first.begin(0, 5)
    first.commit(0, 11)
    first.end(0, "{}")
    first.begin(1, None)
    first.commit(1, 12)
    with open(path, "a") as file:
        file.write('{"prompt": 1, "tok')
    second = Journal(path)
    assert second.of(0) == ([11], 5, "{}") and second.of(1) == ([12], None, None)
    second.commit(1, 13)
    assert Journal(path).of(1).tokens == [12, 13] and Journal(path).of(2).tokens == []
