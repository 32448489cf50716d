"""A run over hosts that lost a rank or a host is started again, and its text is that of an undisturbed run."""

import os
import signal
import time

import pytest

from tests.cluster.conftest import LONG, tokens

pytestmark = pytest.mark.slow
PROMPT = (
    "--prompt",
    "def add(a, b):",
    "--max-new-tokens",
    "40",
    "--temperature",
    "0.8",
    "--seed",
    "3",
)
SLOWLY = "emulate.stage_ms=60"


def begun(site, *words):
    """A run in which some tokens are shown, where they go in the end, and what they have to be."""
    site.write(stages=2)
    results = site.folder / "results.jsonl"
    want = site.alone(*PROMPT)
    command = site.start(SLOWLY, *PROMPT, "--json", results, *words, heartbeat="0.5,4")
    command.wait_until(lambda: len(command.out) > len("def add(a, b):") + 8)
    return command, results, want


@pytest.mark.parametrize("rank", [pytest.param(0, marks=LONG), 2])
def test_a_killed_rank_comes_back_and_the_text_goes_on(site, rank):
    command, results, want = begun(site, "--restart", 2)
    os.kill(site.rig.ranks()[rank], signal.SIGKILL)
    assert command.end() == 0, command.err
    assert f"flowspec: rank {rank} (" in command.err and "started again (1 of 2)" in command.err
    assert tokens(results) == want
    site.rig.wait_until_clean(1)


def test_a_host_whose_cable_was_cut_is_waited_for(site):
    command, results, want = begun(site, "--restart", 2)
    site.rig.cut("h2")
    try:
        command.wait_until(lambda: "started again (1 of 2)" in command.err)
        time.sleep(3)
    finally:
        site.rig.cut("h2", up=True)
    assert command.end() == 0, command.err
    assert tokens(results) == want
    site.rig.wait_until_clean(20)


@LONG
def test_without_restarts_a_loss_is_the_end(site):
    command, results, _ = begun(site)
    os.kill(site.rig.ranks()[1], signal.SIGKILL)
    assert command.end() == 1 and not results.exists()
    assert "started again" not in command.err
