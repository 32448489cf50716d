"""A run over five hosts (network namespaces with an sshd each): it starts, it writes the right text, and nothing of it is left."""

import json
import os
import re
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.cluster.conftest import LONG, tokens
from tests.dist.test_trust import listeners

pytestmark = pytest.mark.slow
PROMPT = ("--prompt", "def add(a, b):", "--max-new-tokens", "24")


def copied(err: str) -> dict[str, tuple[int, int]]:
    """Host -> files copied, and files that were there, as the run tells it."""
    found = re.findall(r"^(\w+): (\d+) files \([\d.]+ MB\) copied, (\d+) \(", err, re.MULTILINE)
    return {host: (int(new), int(old)) for host, new, old in found}


def test_from_empty_hosts_to_the_text_and_again_without_copying(site):
    """On links of 150 Mbps. The second start holds a conversation, in which a rank is killed."""
    for name in site.rig.names:
        site.rig.shape(name, "150mbit")
    results = site.folder / "results.jsonl"
    command = site.start(*PROMPT, "--json", results)
    assert command.end() == 0, command.err
    assert tokens(results) == site.alone(*PROMPT)
    assert command.out.startswith("def add(a, b):")
    assert {host for host, (new, old) in copied(command.err).items() if new and not old} == set(
        site.rig.names
    )
    own = [
        sorted(path.name for path in (site.home(name) / "stages").glob("rank_*"))
        for name in site.rig.names
    ]
    assert own == [[f"rank_0{k}"] for k in range(5)]
    site.rig.wait_until_clean(1)

    command = site.start("--chat", *PROMPT[2:], "--log-level", "info")
    command.wait_until_loaded(4)
    assert_apart(site)
    assert "[rank2/stage2 h2] INFO " in command.err and "[rank0] INFO " in command.err
    assert {host for host, (new, old) in copied(command.err).items() if old and not new} == set(
        site.rig.names
    )
    command.say("def add(a, b):")
    command.wait_until(lambda: command.out.strip() != "")
    os.kill(site.rig.ranks()[2], signal.SIGKILL)
    assert one_line(command, 1) == "flowspec: rank 2 (stage 2, h2) died: killed by signal 9"
    site.rig.wait_until_clean(1)


def assert_apart(site) -> None:
    """Each rank listens at its host's address alone, and knows a secret of the run that no command line holds."""
    ranks = site.rig.ranks()
    for rank, pid in ranks.items():
        assert {address for address, _ in listeners([pid])} == {site.rig.address(f"h{rank}")}
    held = {
        fact.partition(b"=")[2]
        for pid in ranks.values()
        for fact in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if fact.startswith(b"FLOWSPEC_SECRET=")
    }
    [secret] = held
    assert len(secret) == 64
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            assert secret not in entry.read_bytes()


def one_line(command, code: int) -> str:
    """The last line of a command that must end with this code, and say no more than progress beside it."""
    assert command.end() == code, command.err
    assert "Traceback" not in command.err
    return command.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"address": "10.77.0.99"}, "flowspec: host h2 (10.77.0.99): it cannot be reached: ssh: connect to host 10.77.0.99"),
        ({"ssh_port": 23}, "flowspec: host h2 (10.77.0.12): it cannot be reached: ssh: connect to host 10.77.0.12 port 23"),
        ({"interface": "wlan0"}, "flowspec: host h2 (10.77.0.12): interface wlan0 has no IPv4 address here; there are lo "),
        ({"user": "nobody"}, "flowspec: host h2 (10.77.0.12): it does not let us in without a password: run `ssh-copy-id nobody@"),
    ],
)  # fmt: skip
def test_a_host_that_cannot_take_part_is_one_line(site, changed, said):
    site.write(h2=changed)
    assert one_line(site.start(*PROMPT), 2).startswith(said)
    assert not any((site.home(name) / "code").exists() for name in site.rig.names)


def test_a_host_that_ssh_does_not_know_is_not_trusted(site):
    known = site.rig.folder / "known_hosts"
    whole = known.read_text()
    known.write_text(
        "".join(line for line in whole.splitlines(keepends=True) if "10.77.0.13" not in line)
    )
    try:
        assert "host h3 (10.77.0.13): its host key is not known here" in one_line(
            site.start(*PROMPT), 2
        )
    finally:
        known.write_text(whole)


def started(command, site) -> None:
    """Wait until all ranks are processes."""
    command.wait_until(lambda: set(site.rig.ranks()) == set(range(5)))


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)]
)
def test_the_end_of_the_launcher_is_the_end_of_every_rank(site, number, code):
    command = site.start(*PROMPT)
    started(command, site)
    command.process.send_signal(number)
    assert command.process.wait(60) == code
    site.rig.wait_until_clean(1 if number != signal.SIGKILL else 10)


def test_a_killed_rank_is_named_and_the_others_end(site):
    command = site.start(*PROMPT)
    started(command, site)
    os.kill(site.rig.ranks()[3], signal.SIGKILL)
    assert one_line(command, 1) == "flowspec: rank 3 (stage 3, h3) died: killed by signal 9"
    site.rig.wait_until_clean(1)


def test_a_lost_connection_is_named_with_its_ranks(site):
    command = site.start(*PROMPT)
    started(command, site)
    for pid in set(site.rig.pids("h4")) - set(site.rig.left()) - site.rig.listening:
        os.kill(pid, signal.SIGKILL)  # the sshd of the session
    said = one_line(command, 1)
    assert said.startswith("flowspec: host h4 (10.77.0.14): the ssh connection was lost")
    assert said.endswith("and with it rank 4 (stage 4)")
    site.rig.wait_until_clean(10)


@LONG
def test_a_host_whose_cable_is_cut_ends_its_ranks_by_itself(site):
    site.write(stages=2)
    command = site.start("--chat", heartbeat="0.5,3")
    command.wait_until_loaded(2)
    site.rig.cut("h1")
    try:
        command.process.wait(60)  # its input stays open: rank 0 waits for a line
        assert one_line(command, 1) == "flowspec: rank 1 (stage 1, h1) hung: no heartbeat for 3 s"
        site.rig.wait_until_clean(20)
    finally:
        site.rig.cut("h1", up=True)


@LONG
def test_links_that_are_slow_lose_packets_and_stall_change_no_token(far_site):
    """25 ms a hop, of 100 packets one is lost, and one host's cable is out for 2 s in the run."""
    far_site.write(stages=2)
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    far_site.rig.change(ms=25, mbps=150, loss=0.005, seed=seed)
    results = far_site.folder / "results.jsonl"
    command = far_site.start(*PROMPT, "--json", results)
    command.wait_until_loaded(2)
    far_site.rig.change(of=far_site.rig.address("h1"), cut=True)
    time.sleep(2.0)
    far_site.rig.change(of=far_site.rig.address("h1"), cut=False)
    assert command.end() == 0, command.err
    assert tokens(results) == far_site.alone(*PROMPT)
    assert json.loads(results.read_text())["costs"]["hop_ms"] > 25


@LONG
def test_questions_are_answered_on_a_cluster_and_come_home(site):
    """A second start finds all answers on rank 0's host."""
    site.write(stages=2)
    home = site.folder / "run"
    words = ("--datasets", "nq,gsm8k", "--questions", "1", "--methods", "ar,flowspec")
    for _ in range(2):
        command = site.start(*words, "--out", home, "--max-new-tokens", "8", first=("eval",))
        assert command.end() == 0, command.err
        assert len((home / "answers.jsonl").read_text().splitlines()) == 4
        assert command.out.count("identical") == 2 * 3
        site.rig.wait_until_clean(1)
    assert "4 answers" in command.err and "of 4 runs" not in command.err
    assert json.loads((home / "config.json").read_text())["config.stages"] == "stages"


@LONG
@pytest.mark.parametrize("how", ["stall", "cut"])
def test_a_link_that_is_silent_for_3_s_costs_no_token_and_no_rank(far_site, how):
    """At the heartbeat's own pace. What is on a stalled link waits; on one that is cut it is lost, and sent again."""
    far_site.write(stages=2)
    results = far_site.folder / "results.jsonl"
    command = far_site.start("emulate.stage_ms=60", *PROMPT, "--json", results, heartbeat="")
    command.wait_until(lambda: len(command.out) > len("def add(a, b):") + 8)
    of = far_site.rig.address("h1")
    far_site.rig.change(of=of, **{how: True})
    time.sleep(3.0)
    far_site.rig.change(of=of, **{how: False})
    assert command.end() == 0, command.err
    assert tokens(results) == far_site.alone(*PROMPT)
