"""The doctor's visit for real, on this machine's loopback addresses: what hosts say, and how they fall silent."""

import ast
import hashlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from flowspec import cli
from flowspec.cluster import facts, visit
from flowspec.cluster.doctor import FAULT, OK, WARNING, judge
from flowspec.cluster.report import HostReport, Report, load_report
from flowspec.cluster.ssh import BOOT
from flowspec.cluster.visit import Refused, Silent, Site, Visit, examine
from flowspec.files import ROOT
from flowspec.version import __version__

HERE = (sys.executable, "-c", BOOT)


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def light(tmp_path_factory):
    """What runs BOOT where torch cannot be imported, which would take seconds."""
    folder = tmp_path_factory.mktemp("light")
    (folder / "torch.py").write_text("raise ImportError('left out')\n")
    return with_variables(PYTHONPATH=folder)


def with_variables(**variables: object) -> tuple[str, ...]:
    """What runs BOOT on "another host": with other variables in its environment."""
    return ("env", *(f"{name}={value}" for name, value in variables.items()), *HERE)


def site(number: int, argv=(), **changed) -> Site:
    """A host of its own loopback address, whose flowspec is the checkout."""
    host = HostReport(name=f"host{number}", address=f"127.0.0.{number + 1}", ranks=(number,))
    host = replace(host, **changed)
    return Site(host, tuple(argv), sys.executable, str(ROOT), ".", (), None)


def visited(*sites: Site, port: int | None = None, timed: bool = False) -> Report:
    return examine(sites, Report(hosts=tuple(s.host for s in sites), port=port), timed)


def free_port(address: str) -> int:
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


@pytest.fixture
def talk(light):
    """`talk(argv)`: a visit that is ended after the test."""
    open_ones = []

    def enter(argv=light, folder=str(ROOT), python=sys.executable) -> Visit:
        open_ones.append(Visit(argv))
        open_ones[-1].lead_to(folder, python)
        return open_ones[-1]

    yield enter
    for each in open_ones:
        each.close()


# ---- what a host says ----------------------------------------------------------------------------
def test_a_host_says_what_is_installed_and_where_it_is():
    [host] = visited(site(0, with_variables(OMP_NUM_THREADS=1, GLOO_SOCKET_IFNAME="lo"))).hosts
    told = host.facts
    assert told.python == ".".join(map(str, sys.version_info[:3]))
    assert told.flowspec == __version__ and told.torch and told.transformers and told.gloo
    assert (told.omp_num_threads, told.gloo_interface) == ("1", "lo")
    assert told.cores == os.cpu_count() and 0 < told.usable_cores <= told.cores
    assert 0 < told.memory_free <= told.memory_total and told.disk_free > 0 and told.writable
    assert ("127.0.0.1", True) in [(each.address, each.loopback) for each in told.interfaces]
    assert abs(host.clock.ahead_ms) <= host.clock.within_ms + 5


def test_what_a_login_prints_is_passed_over(light):
    noisy = ("bash", "-c", 'echo "Welcome!"; echo {}; exec "$@"', "-", *light)
    [host] = visited(site(0, noisy)).hosts
    assert host.silent is None and host.facts.flowspec == __version__


def test_the_python_of_the_ranks_is_seen_from_the_folder(talk, tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    assert talk(folder=str(tmp_path), python="bin/python").ask("clock", 10)["time"] > 0
    with pytest.raises(Refused, match="there is no program bin/nothing"):
        talk(folder=str(tmp_path), python="bin/nothing")


def test_no_shell_reads_what_a_cluster_file_says(talk, tmp_path):
    bad = f"$(touch {tmp_path}/was_run); `touch {tmp_path}/was_run`"
    with pytest.raises(Refused, match="there is no program python; true"):
        talk(folder=bad, python="python; true")
    talk().ask("facts", 60, folder=bad, code=".", wanted=[], names=[bad], port=[])
    assert not (tmp_path / "was_run").exists()


def test_a_clock_that_is_200_ms_ahead(light, tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('left out')\n")
    (tmp_path / "sitecustomize.py").write_text(
        "import time\nright = time.time\ntime.time = lambda: right() + 0.2\n"
    )
    first, late = visited(
        site(0, light), site(1, with_variables(PYTHONPATH=tmp_path)), port=1
    ).hosts
    assert abs(first.clock.ahead_ms) <= first.clock.within_ms + 5
    assert abs(late.clock.ahead_ms - 200) <= late.clock.within_ms + 5


def test_files_are_the_same_or_missing_or_other(tmp_path):
    part = tmp_path / "stages"
    part.mkdir()
    for name in ("same", "other", "short", "believed", "changed"):
        (part / name).write_text("text")
    sha = hashlib.sha256(b"text").hexdigest()
    stat = (part / "believed").stat()
    kept = {
        "believed": [4, stat.st_mtime_ns, "ee"],  # not its hash: it is believed, not reckoned
        "changed": [4, stat.st_mtime_ns - 1, "ee"],
    }
    (part / ".sha256.json").write_text(json.dumps(kept))
    wanted = [
        ["stages/same", 4, sha],
        ["stages/other", 4, "aa"],
        ["stages/short", 5, sha],
        ["stages/believed", 4, "ee"],
        ["stages/changed", 4, sha],
        ["stages/none", 4, sha],
        ["nowhere/none", 4, sha],
    ]
    assert facts.files(tmp_path, wanted) == {
        "missing": ["stages/none", "nowhere/none"],
        "other": ["stages/other", "stages/short"],
    }


def test_speeds_are_those_of_the_stages_own_kernels(monkeypatch):
    monkeypatch.setattr(facts, "SIDE", 64)
    monkeypatch.setattr(facts, "TIMED", 0.0)
    found = facts.speeds(1)
    cpu = {(s["dtype"], s["rows"]) for s in found if s["device"] == "cpu" and s["by"] == "flowspec"}
    assert cpu == {(d, r) for d in ("float32", "bfloat16", "float16", "int8") for r in facts.ROWS}
    assert all(s["seconds"] > 0 and s["weights"] == 64 * 64 for s in found)


# ---- hosts that do not answer --------------------------------------------------------------------
GARBAGE = f"import sys; sys.stdin.readline(); print({facts.MARK!r} + 'no JSON', flush=True)"
FLOOD = "while True: print('x' * 4096)"
SILENT = {
    "no such command": (["no-such-ssh"], "cannot run no-such-ssh"),
    "its last words": (["bash", "-c", "echo first >&2; echo no route >&2; exit 255"], "no route"),
    "no words": (["bash", "-c", "exit 3"], "exit code 3"),
    "garbage": ([sys.executable, "-c", GARBAGE], "no JSON object"),
    "a flood": (
        [sys.executable, "-c", FLOOD.replace("print(", "print(end='', *[").replace(")", "])")],
        "too long",
    ),
    "frozen": (["sleep", "60"], "did not answer in time"),
}


@pytest.mark.parametrize("kind", SILENT)
def test_a_host_that_does_not_answer_is_silent_and_the_others_are_heard(light, kind, monkeypatch):
    monkeypatch.setattr(visit, "HELLO", 2.0 if kind == "frozen" else 20.0)
    argv, words = SILENT[kind]
    report = visited(site(0, light), site(1, argv), port=1)
    assert report.hosts[0].facts and report.hosts[1].facts is None
    assert words in report.hosts[1].silent
    assert [f.state for f in judge(report) if f.host == "host1"] == [FAULT]


LIES = {
    "facts": ({"cores": "six"}, "cores is 'six'"),
    "clock": ({"time": "noon"}, "no time"),
    "speeds": ({"speeds": [{"rows": "all"}]}, None),
    "listen": ({"port": "a port"}, None),
    "answer": ({"steady": None}, None),
}


@pytest.mark.parametrize("about", LIES)
def test_what_is_no_answer_is_not_believed(light, about, monkeypatch):
    monkeypatch.setattr(visit, "_modules", lambda: "")
    monkeypatch.setattr(visit, "PATIENCE", 0.5)
    real, (lie, words) = Visit.ask, LIES[about]

    def ask(self, do, within, **asked):
        if do in ("lend", "speeds"):  # they take long
            return lie if do == about else {}
        return real(self, do, within, **asked) | (lie if do == about else {})

    monkeypatch.setattr(Visit, "ask", ask)
    report = visited(site(0, light), site(1, light), port=1, timed=True)
    assert all((host.silent is None) is (words is None) for host in report.hosts)
    assert words is None or words in report.hosts[0].silent
    assert report.hosts[0].speeds == ()
    assert all((link.error is None) is (about == "speeds") for link in report.links)
    judge(report)


def test_nothing_is_left_when_a_visit_ends(talk):
    each = talk()
    each.ask("clock", 10)
    each.close()
    assert each._process.returncode == 0  # it left by itself: its input had ended


def test_a_host_that_was_late_is_not_asked_again(talk):
    """What it says then may be the answer to what was asked before."""
    each = talk()
    with pytest.raises(Silent, match="in time"):
        each.ask("knock", 0.0, address="127.0.0.1", port=1, seconds=1)
    assert each.tried("clock", 10) == (None, visit.LATE)


def test_a_host_that_dies_between_two_questions_is_an_answer_too(talk):
    each = talk()
    each._process.kill()
    assert each.tried("clock", 10) == (None, "exit code -9")


# ---- between hosts -------------------------------------------------------------------------------
def test_links_and_the_port_between_hosts(light):
    port = free_port("127.0.0.1")
    sites = [replace(site(0, light), port=port), site(1, light), site(2, light)]
    report = examine(sites, Report(hosts=tuple(s.host for s in sites), port=port), timed=False)
    assert report.hosts[0].facts.port == "free"
    assert {door.source: door.error for door in report.doors} == {"host1": None, "host2": None}
    assert report.links == ()


def test_a_link_is_measured(talk):
    here, there = site(0).host, site(1).host
    link = visit._link(here, there, {"host0": talk(), "host1": talk()})
    assert link.error is None and link.ms > 0 and link.mbps > 1


def test_a_port_that_is_taken_is_found(light):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        sites = [replace(site(0, light), port=port), site(1, light)]
        report = examine(sites, Report(hosts=tuple(s.host for s in sites), port=port), False)
    assert report.hosts[0].facts.port == "taken" and report.doors == ()
    found = [f.line for f in judge(report) if f.state == FAULT]
    assert any(f"port {port} is not free (taken)" in line for line in found)


def test_what_cannot_be_reached_is_an_error_of_the_link(talk):
    """An address that is not the host's; and one where nobody listens any more."""
    visits = {"host0": talk(), "host1": talk()}
    elsewhere = replace(site(1).host, address="192.0.2.77")
    assert visit._link(site(0).host, elsewhere, visits) is None
    nobody = {"address": "127.0.0.1", "port": free_port("127.0.0.1")}
    with pytest.raises(Refused, match="refused"):
        visits["host0"].ask("knock", 10, **nobody, seconds=1)


def test_the_rate_of_a_link_is_that_of_the_steady_part_of_its_stream():
    """A burst at its begin and a pause before its last piece, which was lost, make no difference; and a few pieces will do."""
    even = [(10 + 0.01 * k, 1000 * k + 50_000) for k in range(60)]
    bytes_, seconds = facts._steady([(9.99, 50_000), *even, (10.9, 111_000)])
    assert bytes_ / seconds == pytest.approx(100_000)
    assert facts._steady([(1.0, 10), (1.1, 30)]) == (20, pytest.approx(0.1))
    assert facts._steady([(1.0, 0)]) == (0, 0)


@pytest.mark.parametrize("address", ["", "0.0.0.0", "::"])
def test_nothing_listens_on_all_addresses(talk, address):
    with pytest.raises(Refused, match="on all addresses"):
        talk().ask("listen", 10, address=address, port=0)


def test_strangers_at_the_port_are_not_answered(talk):
    """Silence, half a token, a wrong one and a flood: the one with the token is served all the same."""
    far, token = talk(), secrets.token_hex(16)
    port = far.ask("listen", 10, address="127.0.0.1", port=0)["port"]
    counted: list = []
    waiting = threading.Thread(
        target=lambda: counted.append(far.ask("answer", 30, token=token, seconds=10))
    )
    waiting.start()
    strangers = [b"", b"half", bytes(16), bytes(1 << 20)]
    lines = [socket.create_connection(("127.0.0.1", port)) for _ in strangers]
    for line, words in zip(lines, strangers, strict=True):
        line.setblocking(False)
        if words:
            line.send(words)
    about = {"address": "127.0.0.1", "port": port, "token": token}
    sent = talk().ask("stream", 30, **about, patience=10, seconds=0.2)
    waiting.join()
    assert sent["ms"] > 0 and counted[0]["bytes"] > 0
    for line in lines:
        line.close()


def test_one_who_sends_nothing_ends_with_the_time(talk):
    far, token = talk(), secrets.token_hex(16)
    port = far.ask("listen", 10, address="127.0.0.1", port=0)["port"]
    with pytest.raises(Refused, match="timed out"):
        far.ask("answer", 10, token=token, seconds=0.3)
    answered: list = []
    host = threading.Thread(
        target=lambda: answered.append(far.ask("answer", 10, token=token, seconds=1))
    )
    host.start()
    with socket.create_connection(("127.0.0.1", port)) as line:
        facts._enter(line, bytes.fromhex(token), 3)
        line.sendall(b"s")
        host.join()
    assert answered[0]["bytes"] == 0


def test_both_ends_of_a_measurement_prove_themselves():
    """Without the token, with what another connection heard, or drop by drop nobody comes in."""
    token, heard = secrets.token_bytes(16), []

    def met(guest) -> bool:
        near, far = socket.socketpair()
        with near, far:
            visitor = threading.Thread(target=guest, args=(near,))
            visitor.start()
            with suppress(OSError):
                return facts._welcome(far, token)
            far.close()
            visitor.join()
            return False

    def right(line) -> None:
        nonce = facts._exactly(line, 16, time.monotonic() + 3)
        heard.append(bytes(16) + facts._proof(token, b"guest", nonce, bytes(16)))
        line.sendall(heard[0])

    def slow(line) -> None:
        with suppress(OSError):
            for _ in range(48):
                line.sendall(b"x")
                time.sleep(0.05)

    assert met(right)
    assert not met(lambda line: line.sendall(heard[0]))
    assert not met(lambda line: line.sendall(bytes(48)))
    assert not met(slow)
    near, far = socket.socketpair()
    with near, far:
        far.sendall(bytes(48))  # a host that only seems to be one
        with pytest.raises(OSError, match="another program answers there"):
            facts._enter(near, token, 1)


# ---- the command ---------------------------------------------------------------------------------
def test_the_command_for_this_machine(tmp_path, capsys):
    out = tmp_path / "report.json"
    assert cli.main(["doctor", "--quick", "--json", str(out)]) == 0
    said = capsys.readouterr().out
    assert f"flowspec {__version__}" in said and said.endswith("a run can start\n")
    assert {line.split()[0] for line in said.splitlines()[:-1]} <= {OK, WARNING}
    assert load_report(out).hosts[0].facts.flowspec == __version__


def test_the_command_for_hosts_that_are_not_there(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        visit, "command", lambda cluster, host: ["bash", "-c", "echo no >&2; exit 9"]
    )
    (tmp_path / "c.yaml").write_text("hosts: [{address: 127.0.0.1}, {address: 127.0.0.2}]\n")
    assert cli.main(["doctor", str(tmp_path / "c.yaml")]) == 1
    said = capsys.readouterr().out
    assert "fault    127.0.0.1: no answer (no)" in said and "no run can start: 2 to mend" in said


def test_bad_input_is_one_line(tmp_path, capsys):
    assert cli.main(["doctor", str(tmp_path / "none.yaml")]) == 2
    assert "cannot read" in capsys.readouterr().err
    (tmp_path / "c.yaml").write_text("hosts: [{address: 127.0.0.1}]\nconfig: none.yaml\n")
    assert cli.main(["doctor", str(tmp_path / "c.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err


def test_the_source_that_is_sent_is_for_old_pythons_too():
    ast.parse(Path(facts.__file__).read_text(), feature_version=(3, 8))
