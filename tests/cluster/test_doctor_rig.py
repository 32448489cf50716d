"""The doctor over ssh, on five hosts (network namespaces): faults that are planted for real are found, each where it is."""

import subprocess
import sys

import pytest
import yaml

from flowspec.cluster.doctor import FAULT, WARNING, judge
from flowspec.cluster.report import load_report
from flowspec.commands.options import split_demo
from flowspec.config import load_config
from tests.cluster.conftest import LONG
from tests.cluster.rig import ip
from tests.dist.conftest import ROOT

pytestmark = pytest.mark.slow
WRAPPER = """#!/bin/sh
export OMP_NUM_THREADS=1 PYTHONPATH={folder}
exec {python} "$@"
"""
LATE = "import time\nright = time.time\ntime.time = lambda: right() + 0.2\n"


@pytest.fixture
def doctor(site, tmp_path):
    """`doctor(*words)`: what the doctor says of the hosts, its report, and its exit code."""

    split_demo(load_config(site.folder / "run.yaml"))

    def ask(*words: object):
        out = tmp_path / "report.json"
        argv = (sys.executable, "-m", "flowspec", "doctor", site.path, "--json", out, *words)
        done = subprocess.run(
            site.rig.within("desk", *argv), cwd=ROOT, capture_output=True, text=True, timeout=300
        )
        assert done.returncode in (0, 1), done.stderr
        report = load_report(out)
        told = [(f.state, f.host, f.line) for f in judge(report)]
        assert [f"{state:<8} {line}" for state, _, line in told] == [
            line for line in done.stdout.splitlines() if line.split()[0] in ("ok", WARNING, FAULT)
        ]
        return told, report, done.returncode

    return ask


def complaints(told, state):
    """The lines of this state, by host; how busy this machine is is not asked."""
    return {
        (host, line)
        for said, host, line in told
        if said == state and "programs computed on its" not in line
    }


def said(told, state, host, *words) -> None:
    """Exactly one line of a host and state has these words, and each such line is asked for."""
    lines = [line for name, line in complaints(told, state) if name == host]
    assert len(lines) == len(words), lines
    assert all(sum(word in line for line in lines) == 1 for word in words), lines


@LONG
def test_well_hosts_and_their_links(doctor, site):
    site.rig.shape("h2", "100mbit")
    try:
        told, report, code = doctor()
    finally:
        for space, device in ((site.rig.space("h2"), "eth0"), (site.rig.space("switch"), "h2")):
            subprocess.run(["tc", "-n", space, "qdisc", "del", "dev", device, "root"], check=True)
    assert code == 0 and not complaints(told, FAULT)
    shaped = {link for link in report.links if "h2" in (link.source, link.target)}
    assert len(report.links) == 20 and len(shaped) == 8 and len(report.doors) == 4
    assert all(10 < link.mbps < 100 for link in shaped), shaped
    assert all(link.mbps > 100 for link in set(report.links) - shaped)
    assert {(s.by, s.dtype) for host in report.hosts for s in host.speeds} >= {("flowspec", "int8")}
    assert not any(site.home(name).exists() for name in site.rig.names)  # nothing was written


def test_what_is_planted_is_found(doctor, site):
    """h1: wrong interface. h2: an own Python with another transformers, one thread, a clock 200 ms ahead.
    h3: a stage file of another split. h4: no cable."""
    home = site.home("h2")
    (home / "bin").mkdir(parents=True)
    (home / "transformers-4.0.0.dist-info").mkdir()
    (home / "transformers-4.0.0.dist-info" / "METADATA").write_text(
        "Name: transformers\nVersion: 4.0.0\n"
    )
    (home / "sitecustomize.py").write_text(LATE)
    wrapper = home / "bin" / "python"
    wrapper.write_text(WRAPPER.format(folder=home, python=sys.executable))
    wrapper.chmod(0o755)
    other = site.home("h3") / "stages" / "rank_03" / "model.safetensors"
    other.parent.mkdir(parents=True)
    split = ROOT / "build" / "demo_s4" / "rank_02" / "model.safetensors"
    other.write_bytes(split.read_bytes())
    site.write(h1={"interface": "lo"}, h2={"python": "bin/python"})
    site.rig.cut("h4")
    try:
        told, _, code = doctor("--quick")
    finally:
        site.rig.cut("h4", up=True)
    assert code == 1
    said(told, FAULT, "h0")
    said(told, FAULT, "h1", "interface lo has not the address 10.77.0.11")
    said(told, FAULT, "h2", "transformers 4.0.0")
    said(told, FAULT, "h3")
    said(told, FAULT, "h4", "no answer")
    said(told, WARNING, "h2", "OMP_NUM_THREADS=1", "its clock is 200 ms ahead")
    said(told, WARNING, "h3", "rank_03/model.safetensors is of another split")
    said(told, WARNING, "h0"), said(told, WARNING, "h1")


@LONG
def test_ports_and_memory(doctor, site):
    """The ranks' port of h0 is shut by a firewall, and no host has the memory that the caches are to have."""
    space, rules = site.rig.space("h0"), [
        ("add", "priority", 10, "lookup", "local"),
        ("del", "priority", 0),
        ("add", "priority", 5, "iif", "eth0", "ipproto", "tcp", "dport", 29500, "blackhole"),
    ]  # fmt: skip
    run = yaml.safe_load((site.folder / "run.yaml").read_text())
    (site.folder / "run.yaml").write_text(yaml.safe_dump({**run, "cache_mb": 10**7}))
    for rule in rules:
        ip("-n", space, "rule", *rule)
    try:
        told, report, code = doctor("--quick")
    finally:
        for rule in (
            ("add", "priority", 0, "lookup", "local"),
            ("del", "priority", 10),
            ("del", "priority", 5),
        ):
            ip("-n", space, "rule", *rule)
    assert code == 1
    said(told, FAULT, "h0")
    for host in report.hosts[1:]:
        shut = "does not reach port 29500 of h0 (10.77.0.10): timed out"
        said(told, FAULT, host.name, shut, f"needs 10000.5 GB of memory for rank {host.ranks[0]}")
