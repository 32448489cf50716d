"""A run over hosts that lost a rank or a host is started again, and its text is that of an undisturbed run."""

import json
import os
import signal
import time
from pathlib import Path

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


@LONG
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


# ---- the matrix
class Endured:
    """A run that is disturbed again and again; each time the loss is named, and nothing of the lost start is left."""

    NAMES = ("coordinator", "stage 1", "stage 2", "stage 3", "stage 4")

    def __init__(self, site, temperature: float, words: int):
        self.site, self.times, self.cut = site, 0, []
        self.words = (
            *("--prompt", "def add(a, b):", "--prompt", "class Stack:"),
            *("--max-new-tokens", words, "--temperature", temperature, "--seed", 3),
        )
        self.results = site.folder / "results.jsonl"
        self.want = site.alone(*self.words)
        more = ("--json", self.results, "--restart", 20)
        self.command = site.start(SLOWLY, *self.words, *more, heartbeat="0.5,3")

    def strike(self, rank: int, host: str, how: str, strike) -> None:
        """Do something to a rank or its host, and wait until it is named and the run has left its host."""
        self._go_on()
        before, said, begun = self.site.rig.ranks(), len(self.command.err), time.monotonic()
        strike(before[rank])
        name = f"flowspec: rank {rank} ({self.NAMES[rank]}, {host}) {how}"
        self.command.wait_until(lambda: "\nflowspec: " in self.command.err[said:])
        print(f"{time.monotonic() - begun:.1f} s: {name}")
        self.times += 1
        self.command.wait_until(lambda: f"started again ({self.times} of 20)" in self.command.err)
        assert name in self.command.err[said:], self.command.err[said:]
        cut = {pid for name in self.cut for pid in self.site.rig.pids(name)}
        assert not [pid for pid in before.values() if pid not in cut and running(pid)]

    def _go_on(self) -> None:
        """Wait until the present start has shown something."""
        shown, started = len(self.command.out), f"started again ({self.times} of 20)"
        self.command.wait_until(lambda: not self.times or started in self.command.err)
        self.command.wait_until(lambda: len(self.command.out) > max(shown, len("def add(a, b):")))

    def unplug(self, name: str):
        """Return what takes a host's cable out, for good."""

        def cut(_: int) -> None:
            self.cut.append(name)
            self.site.rig.cut(name)

        return cut

    def end(self) -> None:
        """Wait for the end; what was written is what an undisturbed run writes, each text shown once."""
        assert self.command.end() == 0, self.command.err
        assert tokens(self.results) == self.want
        lines = [json.loads(line) for line in self.results.read_text().splitlines()]
        texts = zip(("def add(a, b):", "class Stack:"), lines, strict=True)
        assert self.command.out == "".join(f"{prompt}{line['text']}\n" for prompt, line in texts)
        self.site.rig.wait_until_clean(20)


def running(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


@LONG
@pytest.mark.parametrize("temperature", [0, 0.8])
def test_every_rank_may_be_killed_and_stopped(site, temperature):
    run = Endured(site, temperature, 40)
    for rank in range(5):
        killed = "died: killed by signal 9"
        run.strike(rank, f"h{rank}", killed, lambda pid: os.kill(pid, signal.SIGKILL))
    # the ranks of the rig's hosts see each other's processes, so one may kill a stopped one of another host
    # (Heartbeat.kill_if_here), and either is told first; they do not do so to rank 0
    for rank, how in ((0, "hung: torch's store was silent"), (3, "")):
        run.strike(rank, f"h{rank}", how, lambda pid: os.kill(pid, signal.SIGSTOP))
    run.end()


@pytest.mark.parametrize(
    ("lost", "temperature"),
    [([0], 0.8), pytest.param([1, 0], 0, marks=LONG), pytest.param([1, 0], 0.8, marks=LONG)],
)
def test_spare_hosts_take_the_places_of_hosts_that_are_lost_for_good(site, lost, temperature):
    """A stage's host, and that of rank 0 with its journal."""
    site.write(stages=2, spares=2)
    run = Endured(site, temperature, 20)
    how = {1: "hung: no heartbeat", 0: "hung: torch's store was silent"}
    try:
        for rank in lost:
            run.strike(rank, f"h{rank}", how[rank], run.unplug(f"h{rank}"))
        run.end()
    finally:
        for name in run.cut:
            site.rig.cut(name, up=True)
    for spare in ("host h3 (10.77.0.13)", "host h4 (10.77.0.14)")[: len(lost)]:
        assert f"spare {spare} takes its place" in run.command.err
