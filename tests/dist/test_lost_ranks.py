"""A rank that dies or hangs ends the run for all: exit code 1, a last line that names it, and no process left."""

import signal
import socket
import time

import pytest

from tests.dist.conftest import PATIENCE

HOST = socket.gethostname()
NAMES = {0: f"rank 0 (coordinator, {HOST})", 1: f"rank 1 (stage 1, {HOST})", 2: f"rank 2 (stage 2, {HOST})"}
PROMPT = "for i in"
LONG = "for i in range(10):\n" * 18
"""nearly all that the tiny model takes"""


MEMBERS = {rank: f"rank {rank} (stage 1, member {rank - 1}, {HOST})" for rank in (1, 2)}


def assert_ends_naming(run, rank: int, reason: str, names=NAMES) -> None:
    run.process.wait(PATIENCE)  # while its standard input is open: rank 0 of a chat is not to leave by itself
    assert run.end() == 1, run.err
    assert run.err.splitlines()[-1] == f"flowspec: {names[rank]} {reason}"
    assert "Traceback" not in run.err, run.err


def while_decoding(command, config, **more):
    run = command(config, "--prompt", PROMPT, "--max-new-tokens", 100, "emulate.stage_ms=100", **more)
    run.wait_until(lambda: len(run.out) > len(PROMPT))
    return run


def while_prefilling(command, config):
    """A prompt that takes stage 1 several seconds."""
    run = command(config, "--prompt", LONG, "emulate.token_ms=100")
    run.wait_until(lambda: run.out == LONG)
    time.sleep(0.3)
    assert run.out == LONG
    return run


def while_idle(command, config, **more):
    run = command(config, "--chat", **more)
    run.wait_until_loaded(2)
    return run


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "when,rank",
    [
        pytest.param(while_decoding, 0, marks=SLOW),
        pytest.param(while_prefilling, 1, marks=SLOW),
        (while_idle, 1),
    ],
)
def test_a_killed_rank_ends_the_run_and_is_named(pair, command, when, rank):
    run = when(command, pair.config(2))
    run.signal(rank, signal.SIGKILL)
    assert_ends_naming(run, rank, "died: killed by signal 9")


@SLOW
@pytest.mark.parametrize("method", ["tp", "galaxy"])
def test_a_killed_member_of_a_stage_is_named_by_the_others(pair, command, method):
    run = command(pair.config(1, members=2), "--prompt", PROMPT, "--max-new-tokens", 100, "--method", method, "emulate.stage_ms=30", "tree.budget=2")
    run.wait_until(lambda: len(run.out) > len(PROMPT))
    run.signal(2, signal.SIGKILL)
    assert_ends_naming(run, 2, "died: killed by signal 9", MEMBERS)


@SLOW
def test_a_stopped_member_of_a_stage_is_named_by_the_others(pair, command):
    run = while_decoding(command, pair.config(1, members=2), env={"FLOWSPEC_HEARTBEAT": "0.5,5"})
    run.signal(2, signal.SIGSTOP)
    assert_ends_naming(run, 2, "hung: no heartbeat for 5 s", MEMBERS)


@SLOW
def test_an_interrupted_run_says_so(pair, command):
    run = while_decoding(command, pair.config(2))
    run.process.send_signal(signal.SIGINT)
    run.process.wait(timeout=60)
    assert run.process.returncode == 130
    assert run.err.splitlines()[-1] == "flowspec: interrupted"
    run.wait_until(lambda: not run.alive())


@pytest.mark.parametrize("when,rank", [pytest.param(while_decoding, 0, marks=SLOW), pytest.param(while_idle, 2, marks=SLOW)])
def test_a_stopped_rank_ends_the_run_and_is_named(pair, command, when, rank):
    run = when(command, pair.config(2), env={"FLOWSPEC_HEARTBEAT": "0.5,5"})  # 3 s by default: a busy box needs more to load
    run.signal(rank, signal.SIGSTOP)
    assert_ends_naming(run, rank, "hung: no heartbeat for 5 s")


@SLOW
def test_a_rank_that_is_stopped_is_named_also_when_the_others_are_about_to_leave(pair, command):
    run = while_idle(command, pair.config(2), env={"FLOWSPEC_HEARTBEAT": "0.5,10"})  # longer than leaving takes
    run.signal(2, signal.SIGSTOP)
    run.process.stdin.close()
    assert_ends_naming(run, 2, "hung: no heartbeat for 10 s")


@SLOW
def test_a_launcher_that_stops_ends_every_rank_and_each_says_why(pair, command):
    run = while_idle(command, pair.config(2), env={"FLOWSPEC_HEARTBEAT": "0.5,5"})
    run.process.send_signal(signal.SIGSTOP)
    run.wait_until(lambda: set(run.alive().values()) == {None})
    for name in NAMES.values():
        assert f"flowspec: {name} leaves: the launcher or the first rank's host is gone (torch's store was silent for 5 s)" in run.err


@SLOW
@pytest.mark.parametrize(
    "rank,words",
    [(0, "rank 1 (stage 1) did not come to {}"), (1, f"{NAMES[1]} could not connect to the run's store at {{}}")],
)
def test_a_rank_that_waits_for_others_in_vain_names_them_and_leaves(pair, command, rank, words):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    alone = {"RANK": rank, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FLOWSPEC_CONNECT": 2}
    run = command(pair.config(2), "--prompt", PROMPT, env={name: str(value) for name, value in alone.items()})
    assert run.end() == 1
    where = words.format(f"127.0.0.1:{port}")
    assert run.err.splitlines()[-1] == f"flowspec: {where} within 2 s (FLOWSPEC_CONNECT=SECONDS gives more time)"
