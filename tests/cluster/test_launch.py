"""What a cluster run does on each host, by its words; copying, with agents that are started without ssh."""

import base64
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flowspec.cluster import launch, ssh
from flowspec.cluster.agent import Refused, Store, interfaces
from flowspec.cluster.hosts import load_cluster
from flowspec.cluster.launch import Job
from flowspec.cluster.shipping import copy, of_text
from flowspec.commands.cluster import main
from flowspec.config import Config, load_config
from flowspec.errors import RankLost, UserError
from flowspec.launcher import LOST
from flowspec.schema import build, plain
from tests.dist.conftest import ROOT

HOSTS = """
config: {config}
stages: {stages}
hosts:
  - {{name: a, address: 10.9.9.1, ranks: [0], python: "x; touch /tmp/y", folder: "~/$(id)"}}
  - {{name: b, address: 10.9.9.2, ranks: [2, 1], user: me, ssh_port: 2222, interface: eth7, device: cuda}}
  - {{name: c, address: 10.9.9.3, spare: true}}
"""


@pytest.fixture
def cluster(tmp_path):
    path = tmp_path / "cluster.yaml"
    path.write_text(HOSTS.format(config=ROOT / "configs" / "demo.yaml", stages="nowhere"))
    return path


@pytest.fixture
def session(cluster, monkeypatch):
    """A session with an agent on this machine, without ssh between."""
    monkeypatch.setattr(ssh, "command", lambda cluster, host: [sys.executable, "-c", ssh.BOOT])
    made = load_cluster(cluster)
    with_agent = ssh.Session(made, made.hosts[0])
    yield with_agent
    with_agent.end()
    assert with_agent.close(20)


def greet(session, where, **changed):
    request = {
        "folder": str(where),
        "python": sys.executable,
        "interface": None,
        "address": "127.0.0.1",
    }
    return session.ask("hello", **{**request, **changed})


# ---- words
def test_a_dry_run_says_each_host_s_commands_and_needs_no_stages(cluster, capsys, monkeypatch):
    monkeypatch.setenv("FLOWSPEC_SECRET", secret := "only for the ranks of a run")
    assert (
        main([str(cluster), "--dry-run", "--prompt", "x", "--stop", "a b", "--json", "r.jsonl"])
        == 0
    )
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line[0] != " "] == [
        "host a (10.9.9.1), rank 0",
        "host b (10.9.9.2), ranks 2, 1",
        "host c (10.9.9.3), spare",
    ]
    assert out.endswith("  nothing, unless it takes the place of a host that is away for 10 s\n")
    first, *_ = [line for line in out.splitlines() if "RANK=0" in line]
    assert first.endswith(
        "-m flowspec run run.yaml --log-level warning --stop 'a b' --prompt-file prompts.jsonl --json results.jsonl"
    )
    second, *_ = [line for line in out.splitlines() if " RANK=1 " in line]
    assert (
        "WORLD_SIZE=3 LOCAL_RANK=1 LOCAL_WORLD_SIZE=2 MASTER_ADDR=10.9.9.1 MASTER_PORT=29500"
        in second
    )
    assert "GLOO_SOCKET_IFNAME=eth7" in second and "prompt" not in second
    assert secret not in out


def test_a_dry_run_counts_the_files_of_a_split(cluster, pair, capsys):
    config = cluster.with_name("run.yaml")
    config.write_text(f"stages: x\ndrafter: {{kind: lm, path: {pair.draft}}}\n")
    cluster.write_text(HOSTS.format(config=config, stages=pair.split(2)))
    assert main([str(cluster), "--dry-run", "--prompt", "x"]) == 0
    assert capsys.readouterr().out.count(" files, ") == 2
    cluster.write_text(HOSTS.format(config=config, stages=pair.split(1)))
    with pytest.raises(UserError, match=r"the run is of 2 ranks .*, and hosts list rank 2 too"):
        main([str(cluster), "--dry-run", "--prompt", "x"])


def test_a_dry_run_of_eval_gives_the_questions_to_rank_0_s_host(cluster, pair, tmp_path, capsys):
    config = cluster.with_name("run.yaml")
    config.write_text(f"stages: x\ndrafter: {{kind: lm, path: {pair.draft}}}\n")
    cluster.write_text(HOSTS.format(config=config, stages=pair.split(2)))
    (tmp_path / "nq.jsonl").write_text('{"question_id": 1, "turns": ["x"]}')
    words = ["--datasets", "nq", "--data", str(tmp_path), "--out", str(tmp_path / "my run")]
    assert main(["eval", str(cluster), "--dry-run", *words]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if "RANK=" in line]
    assert found[0].endswith(
        "-m flowspec eval run.yaml --log-level warning --datasets nq --questions : --data questions "
        "--methods ar,naive,pipedec,flowspec --out 'eval_my run'"
    )
    assert all(line.endswith("-m flowspec eval run.yaml --log-level warning") for line in found[1:])
    assert not (tmp_path / "my run").exists()
    with pytest.raises(UserError, match="eval writes a folder"):
        main(["eval", str(cluster), "--dry-run", *words[:4]])


def test_values_reach_ssh_as_arguments_and_no_remote_shell(cluster):
    made = load_cluster(cluster)
    for host in made.holding:
        *argv, remote = ssh.command(made, host)
        assert remote == ssh.REMOTE and argv[-2:] == ["--", host.ssh]
    assert argv[-6:-2] == ["-p", "2222", "-l", "me"]


CONFIGS = [
    ROOT / "configs" / "demo.yaml",
    *(ROOT / "configs").glob("devices/*.yaml"),
    *(ROOT / "configs").glob("heads/*.yaml"),
]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_is_written_as_it_was_read(path):
    config = load_config(path)
    again = yaml.safe_load(yaml.safe_dump(plain(config)))
    assert build(Config, again, folder=config.folder, name=config.name) == config


# ---- copying
def test_what_was_interrupted_goes_on_and_what_is_there_stays(session, tmp_path, capsys):
    there = tmp_path / "there"
    parcels = [
        of_text("stages/rank_01/w", "0123456789" * 1000),
        of_text("run.yaml", "a: 1"),
        of_text("code/empty", ""),
    ]
    digest = hashlib.sha256(b"0123456789" * 1000).hexdigest()
    partial = there / "stages" / "rank_01" / f"w.{digest[:16]}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(b"0123456789" * 900)
    greet(session, there)
    copy(session, parcels)
    assert "a: 3 files (0.0 MB) copied, 0 (0.0 MB) were there" in capsys.readouterr().err
    assert (there / "stages/rank_01/w").read_bytes() == b"0123456789" * 1000
    assert (there / "code/empty").read_bytes() == b"" and not partial.exists()
    copy(session, parcels)
    assert "a: 0 files (0.0 MB) copied, 3 (0.0 MB) were there" in capsys.readouterr().err
    (there / "run.yaml").write_text("b: 1")
    copy(session, parcels)
    assert "a: 1 files (0.0 MB) copied, 2 (0.0 MB) were there" in capsys.readouterr().err
    assert (there / "run.yaml").read_text() == "a: 1"


def test_only_what_is_missing_of_an_interrupted_file_is_sent(tmp_path):
    store, digest = Store(tmp_path), hashlib.sha256(b"abcdef").hexdigest()
    assert store.missing([["x/y", 6, digest]]) == [["x/y", 0]]
    store.add("x/y", b"abcd")
    later = Store(tmp_path)
    assert later.missing([["x/y", 6, digest]]) == [["x/y", 4]]
    later.add("x/y", b"ef")
    assert later.settle() == [] and (tmp_path / "x/y").read_bytes() == b"abcdef"


def test_a_damaged_beginning_is_sent_again(session, tmp_path):
    parcel = of_text("x/y", "abcdef")
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / f"y.{parcel.sha256[:16]}.partial").write_text("abXd")
    greet(session, tmp_path)
    copy(session, [parcel])
    assert (tmp_path / "x/y").read_text() == "abcdef"


def test_a_file_that_always_arrives_damaged_is_named(session, tmp_path):
    greet(session, tmp_path)
    wrong = of_text("x/y", "abcdef")._replace(source=b"abcdeX")
    with pytest.raises(UserError, match="x/y does not arrive as it is here"):
        copy(session, [wrong])
    assert not (tmp_path / "x" / "y").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_no_file_is_written_outside_the_folder(tmp_path, name):
    with pytest.raises(Refused, match="outside"):
        Store(tmp_path).missing([[name, 1, "0" * 64]])


# ---- what a host refuses
@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"python": "no-such-python"}, "python no-such-python is not on the PATH"),
        ({"python": ".venv/bin/python"}, "cannot be run"),
        ({"interface": "eth99"}, "interface eth99 has no IPv4 address here; there are "),
        ({"address": "192.0.2.1"}, "no interface has the address 192.0.2.1: set interface"),
        ({"folder": "/proc/none"}, "/proc/none"),
    ],
)
def test_a_host_says_in_one_line_what_it_lacks(session, tmp_path, changed, said):
    with pytest.raises(UserError) as caught:
        greet(session, tmp_path, **changed)
    assert str(caught.value).startswith("host a (10.9.9.1): ") and said in str(caught.value)


def test_a_host_s_python_must_have_what_ranks_import(session, tmp_path):
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(UserError, match=r"has no torch, .*: install requirements.txt there"):
        greet(session, tmp_path, python=str(bare))


def test_the_loopback_address_is_on_the_loopback_interface(session, tmp_path):
    assert greet(session, tmp_path)["interface"] == "lo"
    assert interfaces()["lo"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'Host key verification failed.' >&2; exit 255", "its host key is not known here: run `ssh 10.9.9.1` once"),
        ("echo '@ REMOTE HOST IDENTIFICATION HAS CHANGED!' >&2; exit 255", "its host key is not the known one"),
        ("echo 'me@b: Permission denied (publickey).' >&2; exit 255", "run `ssh-copy-id 10.9.9.1`"),
        ("echo 'ssh: connect to host b port 22: No route to host' >&2; exit 255", "cannot be reached: ssh: connect to host b"),
        ("exit 127", "it has no python3"),
        ("exit 1", "ssh ended without a word"),
    ],
)  # fmt: skip
def test_why_a_host_cannot_be_reached_is_one_line(cluster, monkeypatch, script, said):
    monkeypatch.setattr(ssh, "command", lambda cluster, host: ["sh", "-c", script])
    made = load_cluster(cluster)
    session = ssh.Session(made, made.hosts[0])
    with pytest.raises(UserError) as caught:
        session.ask("hello")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_login_shell_prints_is_passed_over(cluster, monkeypatch, tmp_path):
    noisy = f"echo welcome; echo '{{}}'; exec {sys.executable} -c '{ssh.BOOT}'"
    monkeypatch.setattr(ssh, "command", lambda cluster, host: ["sh", "-c", noisy])
    made = load_cluster(cluster)
    session = ssh.Session(made, made.hosts[0])
    assert greet(session, tmp_path)["event"] == "ready"
    session.end()
    assert session.close(20)


def test_a_connection_that_ends_is_no_bad_input(session, tmp_path):
    greet(session, tmp_path)
    session.end()
    with pytest.raises(RankLost, match="the ssh connection was lost"):
        session.answer()


# ---- starting again
NOTING = """
import os
with open(os.environ["FLOWSPEC_JOURNAL"], "a") as journal:
    for k in range(200):
        journal.write(f"{k}\\n")
        journal.flush()
        os.write(1, f"{k}\\n".encode())
    journal.write("the end\\n")
"""


def test_what_rank_0_notes_is_told_before_what_it_shows(session, tmp_path):
    """So a run that goes on with what was told shows nothing twice."""
    greet(session, tmp_path)
    (tmp_path / "journal").write_text("earlier\n")
    env = {"FLOWSPEC_JOURNAL": "journal"}
    session.send(
        "start",
        rank=0,
        argv=["-c", NOTING],
        env=env,
        code="code",
        talks=False,
        notes="journal",
        secret="",
    )
    noted, shown = b"", b""
    while (event := session.answer())["event"] != "ended":
        if event["event"] == "noted":
            noted += base64.b64decode(event["data"])
        else:
            shown += base64.b64decode(event["data"])
        assert noted.startswith(shown)
    assert event["code"] == 0 and len(shown.split()) == 200
    while not noted.endswith(b"the end\n"):
        noted += base64.b64decode(session.answer()["data"])


class Clock:
    """Time that passes only where somebody sleeps, and while a host is tried."""

    now = 0.0

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


@pytest.mark.parametrize(
    ("spares", "away", "took", "seconds"),
    [
        ("c", {"b"}, ["a", "c"], (10, 15)),
        ("c d", {"b", "c"}, ["a", "d"], (10, 20)),
        ("c d", {"a", "b"}, ["c", "d"], (10, 20)),
        ("", {"b"}, None, (60, 65)),
        ("c", {"b", "c"}, None, (60, 65)),
    ],
)
def test_spare_hosts_take_the_places_of_those_that_stay_away(
    tmp_path, monkeypatch, spares, away, took, seconds
):
    names = [f"{{address: {name}}}" for name in "ab"]
    names += [f"{{address: {name}, spare: true}}" for name in spares.split()]
    (tmp_path / "c.yaml").write_text(f"hosts: [{', '.join(names)}]")
    cluster = load_cluster(tmp_path / "c.yaml")
    job = Job("run", cluster, Config(stages="x"), (), (), (), {}, False, 1)
    clock, tried = Clock(), []

    def once(job, *_):
        tried.append([host.name for host in job.cluster.holding])
        if len(tried) == 1:
            return LOST
        clock.sleep(2.0)
        for host in job.cluster.holding:
            if host.name in away:
                raise launch._Away(host, UserError(f"{host.name} is not there"))
        return 0

    monkeypatch.setattr(launch, "_once", once)
    monkeypatch.setattr(launch, "time", clock)
    if took is None:
        with pytest.raises(RankLost, match="is not there"):
            launch.run(job, None)
    else:
        assert launch.run(job, None) == 0 and tried[-1] == took
    assert seconds[0] <= clock.now <= seconds[1]


def test_the_agent_leaves_with_its_ranks_when_its_input_ends(tmp_path):
    """A rank that ignores SIGTERM, and has started a process of its own."""
    stubborn = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
subprocess.Popen(["sleep", "1000"])
print("up", flush=True)
time.sleep(1000)
"""
    text = (ROOT / "flowspec" / "cluster" / "agent.py").read_bytes()
    process = subprocess.Popen(
        [sys.executable, "-c", ssh.BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdin.write(b"%d\n%b" % (len(text), text))
    for request in (
        {
            "ask": "hello",
            "folder": str(tmp_path),
            "python": sys.executable,
            "interface": "lo",
            "address": "",
        },
        {
            "ask": "start",
            "rank": 1,
            "argv": ["-c", stubborn],
            "env": {"MARK": str(tmp_path)},
            "code": "code",
            "talks": False,
            "notes": None,
            "secret": "",
        },
    ):
        process.stdin.write(json.dumps(request).encode() + b"\n")
    process.stdin.flush()
    *_, third = (process.stdout.readline() for _ in range(3))
    assert b"said" in third
    process.stdin.close()
    assert process.wait(20) == 0
    assert not [
        path
        for path in Path("/proc").glob("[0-9]*/environ")
        if f"MARK={tmp_path}".encode() in read(path)
    ]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it ended meanwhile
        return b""
