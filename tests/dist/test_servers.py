"""Several target servers, and drafters on ranks of their own, over processes."""

import json
import signal
import socket

import pytest

from flowspec.text import Text

PROMPT = "for i in range"
HOST = socket.gethostname()


@pytest.mark.slow
@pytest.mark.parametrize("stages,members,drafter", [(1, 1, "lm"), (2, 1, "eagle")])
def test_servers_write_the_text_of_plain_decoding(pair, command, stages, members, drafter, tmp_path):
    config, results = pair.config(stages, None, drafter, members), tmp_path / "r.jsonl"
    words = ["--prompt", PROMPT, "--method", "dsi", "dsi.servers=2", "--json", results]
    run = command(config, *words)
    assert run.end() == 0, run.err
    [result] = [json.loads(line) for line in results.open()]
    assert result["token_ids"] == pair.greedy(Text(pair.target).encode(PROMPT), 40)
    assert result["world_size"] == 1 + 2 * stages * members and result["method"] == "dsi"
    assert "rank 2 of " in run.err


def while_decoding(command, config, *words, **more):
    run = command(config, "--prompt", PROMPT, "--method", "dsi", "emulate.stage_ms=60", "emulate.draft_ms=5", *words, **more)
    run.wait_until(lambda: len(run.out) > len(PROMPT))
    return run


LIVE = [(signal.SIGKILL, "died: the connection broke"), (signal.SIGSTOP, "hung: no heartbeat for 5 s")]


@pytest.mark.slow
@pytest.mark.parametrize("number,reason", LIVE)
def test_a_run_goes_on_without_a_server(pair, command, number, reason, tmp_path):
    results = tmp_path / "r.jsonl"
    run = while_decoding(command, pair.config(1), "dsi.servers=3", "--json", results, env={"FLOWSPEC_HEARTBEAT": "0.5,5"})
    run.signal(2, number)
    assert run.end() == 0, run.err
    [result] = [json.loads(line) for line in results.open()]
    assert result["token_ids"] == pair.greedy(Text(pair.target).encode(PROMPT), 40)
    assert f"flowspec: rank 2 (server 2, stage 1, {HOST}) {reason}; the run goes on with 2 of 3 servers\n" in run.err
    assert "Traceback" not in run.err


@pytest.mark.slow
def test_a_server_of_several_ranks_leaves_as_a_whole_and_the_last_one_ends_the_run(pair, command):
    run = while_decoding(command, pair.config(2), "dsi.servers=2", "--max-new-tokens", 120)
    run.signal(4, signal.SIGKILL)
    run.wait_until(lambda: "the run goes on with 1 of 2 servers" in run.err)
    run.signal(1, signal.SIGKILL)
    assert run.end() == 1
    last = run.err.splitlines()[-1]
    assert last.startswith(("flowspec: rank 1 (server 1, stage 1,", "flowspec: rank 2 (server 1, stage 2,")), run.err
    assert "Traceback" not in run.err


@pytest.mark.parametrize("number,reason", [LIVE[0], pytest.param(*LIVE[1], marks=pytest.mark.slow)])
def test_a_run_without_its_drafter_ends_in_plain_decoding(pair, command, number, reason, tmp_path):
    results, drafter = tmp_path / "r.jsonl", f"drafter={{kind: lm, path: {pair.draft}, ranks: 1}}"
    words = ["--prompt", PROMPT, drafter, "emulate.stage_ms=60", "--json", results]
    run = command(pair.config(1), *words, env={"FLOWSPEC_HEARTBEAT": "0.5,5"})
    run.wait_until(lambda: len(run.out) > len(PROMPT))
    run.signal(2, number)
    assert run.end() == 0, run.err
    [result] = [json.loads(line) for line in results.open()]
    assert result["token_ids"] == pair.greedy(Text(pair.target).encode(PROMPT), 40)
    assert result["world_size"] == 3 and "rank 2 of 2: draft model" in run.err
    assert run.err.count(f"flowspec: rank 2 (drafter 1, {HOST}) {reason}; the run goes on without it\n") == 1
    assert run.err.count("goes on") == 1
    assert "Traceback" not in run.err


@pytest.mark.slow
def test_a_run_ends_while_its_stopped_drafter_is_not_missed_yet(pair, command):
    """The text is done before the heartbeat says anything of the drafter, of which an answer is awaited."""
    drafter = f"drafter={{kind: lm, path: {pair.draft}, ranks: 1}}"
    run = command(pair.config(1), "--prompt", PROMPT, drafter, "emulate.stage_ms=25", env={"FLOWSPEC_HEARTBEAT": "0.5,8"})
    run.wait_until(lambda: len(run.out) > len(PROMPT))
    run.signal(2, signal.SIGSTOP)
    assert run.end() in (0, 1), run.err
    assert "tokens/s" in run.err
