"""The online simulator of SI and DSI: what is written, with how many forwards, and that nobody is left behind. No time is
asserted: latencies are as short as the order of events allows."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from flowspec.bench import online as bench
from flowspec.bench.online import Chance, Way, measure
from flowspec.cli import main
from flowspec.core.policies import make_policy
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.topology import Topology
from flowspec.errors import RankLost
from flowspec.sim import online as sim
from flowspec.sim.online import Drafter, Latencies, Process, online
from flowspec.sim.server import serve
from flowspec.sim.world import Job

SEED = 5
SHORT = Latencies(0.002, 0.002, 0.0005, 0.0005)
WAYS = {"non-SI": Way("ar", None, 1), "SI": Way("si", 3, 1), "DSI": Way("dsi", 2, 3)}


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def plain(tokens: int) -> Job:
    request = Request(id=0, prompt=(0,), sampling=Sampling(max_new_tokens=tokens))
    policy = make_policy("ar", TreeConfig(), PolicyConfig(), Topology(1))
    return Job(request, range(tokens), policy, None, PolicyConfig())


# ---- a text --------------------------------------------------------------------------------------
@pytest.mark.parametrize("acceptance", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("way", [*WAYS.values(), Way("dsi", 4, 1), Way("dsi", 1, 5)])
def test_every_method_writes_the_text_whatever_is_accepted(way, acceptance):
    """`write` compares the tokens with the made-up text; texts follow one another on the same servers."""
    with online(way.servers, SHORT) as ring:
        for seed in (SEED, SEED + 1):
            written = bench.write(ring, way, Chance(12, acceptance), seed)
            assert len(written.tokens) == 12
            assert way.method == "dsi" or written.abandoned == 0
            assert written.abandoned <= written.forwards


def test_decoding_alone_is_a_forward_a_token_without_drafts():
    (written,) = measure({"": WAYS["non-SI"]}, Chance(12, 0.7), SHORT, 1, SEED)[""]
    assert (written.forwards, written.abandoned, written.drafts) == (12, 0, 0)


def test_si_makes_the_drafts_and_forwards_that_its_rule_says():
    def counts(acceptance: float) -> list[int]:
        (written,) = measure({"": WAYS["SI"]}, Chance(10, acceptance), SHORT, 1, SEED)[""]
        return [written.forwards, written.drafts]

    assert counts(1.0) == [3, 7]  # 4, 4 and 2 tokens, of 3, 3 and 1 drafts
    assert counts(0.0) == [10, 24]  # seven times 3 drafts, then 2, 1 and 0


def test_which_drafts_are_right_depends_on_the_seed_and_the_repeat_alone():
    def forwards(seed: int) -> list[int]:
        ways = {"SI": WAYS["SI"], "again": WAYS["SI"]}
        done = measure(ways, Chance(40, 0.6), SHORT, 3, seed)
        assert [one.forwards for one in done["SI"]] == [one.forwards for one in done["again"]]
        return [one.forwards for one in done["SI"]]

    first, later = forwards(SEED), forwards(SEED + 1)
    assert first[1:] == later[:2]  # the n-th text has the drafts of seed + n
    assert len({*first, *later}) > 1


def test_methods_take_turns_in_a_shuffled_order(monkeypatch):
    order: list[str] = []
    real = bench.write
    monkeypatch.setattr(
        bench, "write", lambda ring, way, *of: order.append(way.method) or real(ring, way, *of)
    )
    measure(WAYS, Chance(1, 0.5), SHORT, 8, SEED)
    rounds = {tuple(order[k : k + 3]) for k in range(0, 24, 3)}
    assert all(sorted(one) == ["ar", "dsi", "si"] for one in rounds) and len(rounds) > 1


def test_forwards_of_which_nothing_can_become_text_are_abandoned():
    """No draft is right, so whatever other servers have begun is void once the root's token is known."""
    slow = Latencies(0.03, 0.03, 0.001, 0.001)
    (written,) = measure({"": Way("dsi", 1, 3)}, Chance(4, 0.0), slow, 1, SEED)[""]
    assert written.abandoned >= 2 and written.forwards >= 4 + written.abandoned


def test_the_first_forward_of_a_text_has_a_latency_of_its_own(monkeypatch):
    """On each server, and in each text anew."""
    told: dict[int, list[float]] = {}
    waits: list[float] = []
    say, wait = Process.say, Drafter.wait

    def listened(process, *words):
        if words[1:]:
            told.setdefault(process.pid, []).append(words[1])
        say(process, *words)

    def timed(drafter, end):
        waits.append(end - time.monotonic())
        wait(drafter, end)

    monkeypatch.setattr(Process, "say", listened)
    monkeypatch.setattr(Drafter, "wait", timed)
    latencies = Latencies(0.05, 0.04, 0.02, 0.001)
    with online(2, latencies) as ring:
        for n in range(2):
            told.clear(), waits.clear()
            bench.write(ring, Way("dsi", 2, 2), Chance(9, 1.0), SEED + n)
            assert len(told) == 2 and sum(map(len, told.values())) > 2
            assert all(own[0] == 0.05 and {*own[1:]} <= {0.04} for own in told.values())
            assert waits[0] > 0.01 and max(waits[1:]) <= 0.001


# ---- a server ------------------------------------------------------------------------------------
def test_a_server_waits_abandons_and_ends_with_its_pipe():
    asked, ask = os.pipe()
    hear, answer = os.pipe()
    thread = threading.Thread(target=serve, args=(asked, answer), daemon=True)
    thread.start()
    assert os.read(hear, 99) == b"ready\n"
    os.write(ask, b"1 0.0")
    time.sleep(0.02)  # so that the rest of the line comes apart
    os.write(ask, b"01\n")
    assert os.read(hear, 99) == b"1 whole\n"
    os.write(
        ask, b"2 600\n1\n2\n2\n3 0.001\n"
    )  # nobody computes 1 or 2 by the time these come again
    heard = b""
    while heard.count(b"\n") < 2:
        heard += os.read(hear, 99)
    assert heard == b"2 abandoned\n3 whole\n"
    os.write(ask, b"4 600\n")
    os.close(ask)
    thread.join(10)
    assert not thread.is_alive()
    for end in (asked, hear, answer):
        os.close(end)


def test_servers_are_gone_when_the_block_ends_however_it_ends():
    for error in (None, KeyboardInterrupt, ValueError):
        try:
            with online(3, SHORT) as ring:
                pids = [process.pid for process in ring.processes]
                assert len(pids) == 3 and all(map(alive, pids))
                assert [os.getpgid(pid) for pid in pids] == pids  # Ctrl-C is not for them
                if error:
                    raise error
        except (KeyboardInterrupt, ValueError):
            assert error
        assert not any(map(alive, pids))
    assert "drafter" not in [thread.name for thread in threading.enumerate()]


def test_if_one_cannot_begin_the_others_are_not_left_behind(monkeypatch):
    begun: list[Process] = []

    def process(number):
        if number == 3:
            raise MemoryError
        begun.append(Process(number))
        return begun[-1]

    monkeypatch.setattr(sim, "Process", process)
    with pytest.raises(MemoryError), online(3, SHORT):
        pass
    assert len(begun) == 2 and not any(alive(one.pid) for one in begun)


@pytest.mark.parametrize("before", [True, False])
def test_a_killed_server_is_named_and_the_others_end(before):
    """It dies before the text begins, or in the middle of its forward."""
    with (
        pytest.raises(RankLost, match=r"target server 2 \(process \d+\) was killed by signal 9"),
        online(2, Latencies(*[600.0] * 4)) as ring,
    ):
        pids = [process.pid for process in ring.processes]
        ring.processes.reverse()  # the text is written by server 2
        kill = threading.Timer(0 if before else 0.2, os.kill, (pids[1], signal.SIGKILL))
        kill.start()
        if before:
            kill.join()
        ring.write(plain(3), 1)
    assert not any(map(alive, pids))


def test_a_server_that_hangs_is_named_and_ended(monkeypatch):
    with online(2, SHORT) as ring:
        monkeypatch.setattr(sim, "PATIENCE", 0.2)
        pids = [process.pid for process in ring.processes]
        os.kill(pids[0], signal.SIGSTOP)
        with pytest.raises(RankLost, match=r"nothing was heard of target server 1 for 0\.2"):
            ring.write(plain(3), 1)
    assert not any(map(alive, pids))


def test_a_forward_is_told_once_to_end_and_then_ends_at_once(monkeypatch):
    """Server 2 computes for ten minutes what can never become text; at first it is too slow to hear of it."""
    ended: list[str] = []
    say = Process.say

    def lasting(process, *words):
        second = process.title == "target server 2"
        if second and not words[1:]:
            ended.append(words[0])
        say(process, *((words[0], 600) if second and words[1:] else words))

    with online(2, SHORT) as ring:
        monkeypatch.setattr(Process, "say", lasting)
        pid = ring.processes[1].pid
        os.kill(pid, signal.SIGSTOP)
        goes_on = threading.Timer(0.5, os.kill, (pid, signal.SIGCONT))
        goes_on.start()
        written = bench.write(ring, Way("dsi", 1, 2), Chance(9, 0.0), SEED)
        goes_on.join()
    assert written.abandoned == len(ended) == len(set(ended)) > 0


def test_a_text_begins_when_nothing_of_the_one_before_is_under_way(monkeypatch):
    """The drafter still drafts when the first text ends, whose drafts are all wrong."""
    ends: list[float] = []
    over: list[float] = []
    wait, hear = Drafter.wait, Drafter.hear

    def heard(drafter):
        hear(drafter)
        over.append(time.monotonic())

    monkeypatch.setattr(Drafter, "wait", lambda self, end: ends.append(end) or wait(self, end))
    monkeypatch.setattr(Drafter, "hear", heard)
    with online(2, Latencies(0.002, 0.002, 0.05, 0.05)) as ring:
        for n in range(2):
            bench.write(ring, Way("dsi", 1, 2), Chance(4, 0.0), SEED + n)
    assert len(over) == len(ends) >= 2
    assert all(heard >= end for heard, end in zip(over, ends, strict=True))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_servers_outlive_neither_ctrl_c_nor_the_death_of_rank_0(how):
    script = (
        "import signal\n"
        "from flowspec.sim.online import Latencies, online\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "with online(2, Latencies(*[600.0] * 4)) as ring:\n"
        "    print(*[process.pid for process in ring.processes], flush=True)\n"
        "    ring.processes[0].say(1, 600.0)\n"
        "    ring.heard([])\n"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", script], **pipes) as rank:
        pids = [int(word) for word in rank.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        rank.send_signal(how)
        try:
            assert rank.wait(30) == -how
        finally:
            rank.kill()
    until = time.monotonic() + 30
    while any(map(alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, pids))


# ---- the command ---------------------------------------------------------------------------------
WORDS = [
    *("simulate", "dsi", "--online", "--target-latency", "4", "--drafter-latency", "1"),
    *("--acceptance", "0.7", "--tokens", "12", "--servers", "3", "--lookahead", "3,2"),
]


def test_the_command_shows_what_was_counted_beside_what_was_waited_for(tmp_path, capsys):
    file = tmp_path / "online.jsonl"
    assert main([*WORDS, "--repeats", "2", "--json", str(file)]) == 0
    out, err = capsys.readouterr()
    assert "simulated: time of a text of 12 tokens, mean of 1000 texts" in out
    assert "simulated by waiting, no model" in out and err == "waiting for about 0 s\n"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["method"] for line in lines] == ["non-SI", "SI", "DSI"]
    assert [line["lookahead"] for line in lines] == [None, 3, 2]
    assert [line["servers"] for line in lines] == [1, 1, 3]
    assert lines[0]["forwards"] == [12, 12] and lines[0]["offline"] == 48
    alone, si, dsi = (line["times"] for line in lines)
    for n in range(2):
        assert lines[2]["ratios"][n] == {
            "non-SI": alone[n] / dsi[n],
            "SI": si[n] / dsi[n],
            "the faster of both": min(alone[n], si[n]) / dsi[n],
        }
    assert all(line["simulated"] and line["asked"]["online"] for line in lines)
    assert min(alone) >= 48  # a wait is never too short, and latencies are in milliseconds


def test_the_command_repeats_five_times_by_default(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda *of: asked.append(of) or measure(*of))
    assert main(WORDS) == 0 and "of 5 texts" in capsys.readouterr().out
    ((ways, chance, latencies, repeats, seed),) = asked
    assert ways == {"non-SI": Way("ar", None, 1), "SI": Way("si", 3, 1), "DSI": Way("dsi", 2, 3)}
    assert (chance, repeats, seed) == (Chance(12, 0.7), 5, 1)
    assert latencies == (0.004, 0.004, 0.001, 0.001)


def test_first_latencies_reach_the_waits(monkeypatch):
    asked = []
    monkeypatch.setattr(bench, "measure", lambda *of: asked.append(of) or measure(*of))
    more = ["--first-target-latency", "9", "--first-drafter-latency", "2", "--repeats", "1"]
    assert main([*WORDS, *more]) == 0
    assert asked[0][2] == pytest.approx((0.009, 0.004, 0.002, 0.001))


def test_a_killed_server_ends_the_command_with_1_and_one_line(monkeypatch, capsys):
    real = bench.write

    def killing(ring, *of):
        os.kill(ring.processes[0].pid, signal.SIGKILL)
        return real(ring, *of)

    monkeypatch.setattr(bench, "write", killing)
    assert main(WORDS) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and err[1].startswith("flowspec: target server 1 (process ")
    assert err[1].endswith("was killed by signal 9")
