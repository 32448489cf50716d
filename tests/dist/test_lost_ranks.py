"""A rank that dies or hangs ends the run for all: exit code 1, a last line that names it, and no process left."""

import signal
import socket
import time

import pytest

HOST = socket.gethostname()
NAMES = {0: f"rank 0 (coordinator, {HOST})", 1: f"rank 1 (stage 1, {HOST})", 2: f"rank 2 (stage 2, {HOST})"}
PROMPT = "for i in"
LONG = "for i in range(10):\n" * 18
"""nearly all that the tiny model takes"""


def assert_ends_naming(run, rank: int, reason: str) -> None:
    assert run.end() == 1, run.err
    assert run.err.splitlines()[-1] == f"flowspec: {NAMES[rank]} {reason}"
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
        (while_decoding, 2),
        pytest.param(while_prefilling, 1, marks=SLOW),
        pytest.param(while_idle, 1, marks=SLOW),
    ],
)
def test_a_killed_rank_ends_the_run_and_is_named(pair, command, when, rank):
    run = when(command, pair.config(2))
    run.signal(rank, signal.SIGKILL)
    assert_ends_naming(run, rank, "died: killed by signal 9")


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
