"""The doctor on made-up hosts: every fault that is planted is found, and nothing else is."""

from dataclasses import replace

import pytest

from flowspec import UserError
from flowspec.cluster.doctor import FAULT, OK, WARNING, can_start, interface_of, judge
from flowspec.cluster.report import (
    Clock,
    Door,
    Facts,
    Gpu,
    HostReport,
    Interface,
    Link,
    Needs,
    Report,
    Resolved,
    Speed,
    load_report,
)

GB = 10**9
FILES = (("stages/stages.yaml", 900, "aa"), ("stages/rank_01/model.safetensors", 3 * GB, "bb"))
LOOPBACK = Interface(name="lo", address="127.0.0.1", loopback=True)


def facts(address: str = "10.0.0.1", **changed) -> Facts:
    """A board with nothing wrong."""
    well = dict(
        python="3.10.12",
        system="Linux aarch64",
        hostname="nano",
        own_addresses=(address,),
        resolved=(),
        flowspec="0.1.0",
        torch="2.13.0+cpu",
        transformers="5.23.0",
        driver=None,
        omp_num_threads=None,
        gloo_interface=None,
        interfaces=(LOOPBACK, Interface(name="eth0", address=address, loopback=False)),
        port=None,
        broken=None,
        gloo=True,
        nccl=False,
        cuda=None,
        gpus=(),
        memory_free=6 * GB,
        memory_total=8 * GB,
        folder="/home/me/flowspec-run",
        disk_free=20 * GB,
        writable=True,
        cores=6,
        usable_cores=6.0,
        load=0.1,
        missing=(),
        other=(),
    )
    return Facts(**well | changed)


def host(rank: int, **changed) -> HostReport:
    address = f"10.0.0.{rank + 1}"
    well = HostReport(
        name=f"nano{rank}",
        address=address,
        ranks=(rank,),
        needs=Needs(memory=2 * GB),
        files=FILES,
        facts=facts(address, **({"port": "free"} if rank == 0 else {})),
        clock=Clock(ahead_ms=-3.0, within_ms=2.0),
    )
    return replace(well, **changed)


def cluster(third: HostReport | None = None, **changed) -> Report:
    """Three boards with nothing wrong, or with another third one."""
    hosts = (host(0), host(1), third or host(2))
    names = [each.name for each in hosts]
    pairs = [(a, b) for a in names for b in names if a != b]
    well = Report(
        hosts=hosts,
        port=29500,
        doors=tuple(Door(source=name) for name in names[1:]),
        links=tuple(Link(source=a, target=b, ms=0.5, mbps=940.0) for a, b in pairs),
        devices=("cpu", "cpu", "cpu"),
    )
    return replace(well, **changed)


def ill(**changed) -> Report:
    """Three boards of which the third says something else."""
    return cluster(host(2, facts=facts("10.0.0.3", **changed)))


def complaints(report: Report) -> list[tuple[str, str, str]]:
    """What is not ok: state, host, and the line."""
    return [(f.state, f.host, f.line) for f in judge(report) if f.state != OK]


def test_nothing_is_found_where_nothing_is_wrong():
    found = judge(cluster())
    assert {finding.state for finding in found} == {OK} and can_start(found)
    assert {finding.host for finding in found} == {"nano0", "nano1", "nano2", "all hosts"}


def test_a_run_can_start_without_its_spare_hosts():
    spare = {"ranks": (), "spare": (1,), "devices": ("cuda",)}
    said = "needs 2.0 GB of memory to take rank 1 (spare), 1.0 GB are free"
    small = host(2, **spare, facts=facts("10.0.0.3", memory_free=GB))
    broken = (Link(source="nano0", target="nano2", error="timed out"),)
    for report, where, words in [
        (
            cluster(host(2, **spare, facts=None, silent="timed out")),
            "nano2",
            "no answer (timed out)",
        ),
        (cluster(small), "nano2", said),
        (cluster(small), "nano2", "rank 1 computes on cuda, and torch sees no GPU"),
        (cluster(host(2, **spare), links=broken), "nano0", "does not reach a free port of nano2"),
        (
            cluster(host(2, **spare), doors=(Door(source="nano2", error="refused"),)),
            "nano2",
            "does not reach port 29500",
        ),
    ]:
        assert can_start(judge(report))
        assert any(state == WARNING and who == where and words in line for state, who, line in complaints(report))  # fmt: skip


PLANTED = {
    "a host that is down": (
        cluster(host(2, facts=None, silent="connect to host 10.0.0.3 port 22: timed out")),
        *(FAULT, "nano2", "timed out"),
    ),
    "an address that no interface has": (
        cluster(host(2, address="10.9.0.3")),
        *(FAULT, "nano2", "no interface has the address 10.9.0.3"),
    ),
    "an interface without the address": (
        cluster(host(2, interface="lo")),
        *(FAULT, "nano2", "interface lo has not the address 10.0.0.3"),
    ),
    "the loopback as address": (
        cluster(host(2, address="127.0.0.1")),
        *(FAULT, "nano2", "127.0.0.1 is the loopback"),
    ),
    "a name of the meeting host that leads to the loopback": (
        ill(resolved=(Resolved(name="nano0.local", addresses=("127.0.1.1",)),)),
        *(FAULT, "nano2", "the name nano0.local leads to 127.0.1.1"),
    ),
    "a name that is not known": (
        ill(resolved=(Resolved(name="nano0.local", addresses=()),)),
        *(FAULT, "nano2", "the name nano0.local is not known"),
    ),
    "an own name that leads to the loopback": (
        cluster(
            host(
                2,
                called="nano2.local",
                facts=facts(
                    "10.0.0.3", resolved=(Resolved(name="nano2.local", addresses=("127.0.1.1",)),)
                ),
            )
        ),
        *(FAULT, "nano2", "the name nano2.local leads to 127.0.1.1"),
    ),
    "an interface that logins set": (
        ill(gloo_interface="wlan0"),
        *(WARNING, "nano2", "GLOO_SOCKET_IFNAME=wlan0"),
    ),
    "a port that is shut": (
        cluster(doors=(Door(source="nano1"), Door(source="nano2", error="timed out"))),
        *(FAULT, "nano2", "does not reach port 29500 of nano0 (10.0.0.1): timed out"),
    ),
    "free ports that are shut": (
        cluster(links=(Link(source="nano1", target="nano2", error="Connection refused"),)),
        *(FAULT, "nano1", "does not reach a free port of nano2"),
    ),
    "too little memory": (
        ill(memory_free=GB),
        *(FAULT, "nano2", "needs 2.0 GB of memory for rank 2, 1.0 GB are free"),
    ),
    "hardly enough memory": (ill(memory_free=2 * GB), *(WARNING, "nano2", "which is tight")),
    "too little disk": (
        ill(disk_free=GB, missing=(FILES[1][0],)),
        *(FAULT, "nano2", "3.0 GB are to be copied"),
    ),
    "a folder of somebody else": (
        ill(writable=False, missing=(FILES[1][0],)),
        *(FAULT, "nano2", "cannot be written"),
    ),
    "another torch": (
        ill(torch="2.9.1"),
        *(FAULT, "nano2", "torch 2.9.1, and nano0 has 2.13.0+cpu"),
    ),
    "another transformers": (
        ill(transformers="5.22.0"),
        *(FAULT, "nano2", "transformers 5.22.0, and nano0 has 5.23.0"),
    ),
    "another flowspec": (
        ill(flowspec="0.0.9"),
        *(WARNING, "nano2", "flowspec 0.0.9, and nano0 has 0.1.0"),
    ),
    "an old python": (ill(python="3.8.10"), *(FAULT, "nano2", "python 3.8.10 is too old")),
    "no torch": (ill(torch=None), *(FAULT, "nano2", "torch is not installed")),
    "a torch that cannot be imported": (
        ill(broken="OSError: libcudart.so.12: cannot open"),
        *(FAULT, "nano2", "libcudart.so.12"),
    ),
    "a torch without gloo": (ill(gloo=False), *(FAULT, "nano2", "no gloo")),
    "a stage file of another split": (
        ill(other=(FILES[1][0],)),
        *(WARNING, "nano2", "rank_01/model.safetensors is of another split"),
    ),
    "a clock that is 200 ms ahead": (
        cluster(host(2, clock=Clock(ahead_ms=200.0, within_ms=2.0))),
        *(WARNING, "nano2", "200 ms ahead"),
    ),
    "one thread": (
        ill(omp_num_threads="1"),
        *(WARNING, "nano2", "OMP_NUM_THREADS=1 with 6 cores"),
    ),
    "a container of two cores": (
        ill(usable_cores=2.0),
        *(WARNING, "nano2", "set threads: 2, a rank would take 6"),
    ),
    "a busy host": (ill(load=5.0), *(WARNING, "nano2", "5.0 programs computed on its 6 cores")),
}


@pytest.mark.parametrize("name", PLANTED)
def test_what_is_planted_is_found_and_nothing_else(name):
    report, state, where, words = PLANTED[name]
    [(said, at, line)] = complaints(report)
    assert (said, at) == (state, where) and words in line, line
    assert can_start(judge(report)) == (state == WARNING)


def test_threads_that_are_configured_are_those_of_a_rank():
    assert complaints(replace(ill(usable_cores=2.0), threads=2)) == []
    [(state, _, line)] = complaints(replace(ill(usable_cores=2.0), threads=3))
    assert state == WARNING and "set threads: 2, a rank would take 3" in line


def test_the_port_of_the_meeting_host_may_be_taken():
    taken = host(0, facts=facts(port="taken"))
    report = replace(cluster(), hosts=(taken, host(1), host(2)), doors=())
    [(state, name, line)] = complaints(report)
    assert (state, name) == (FAULT, "nano0") and "port 29500 is not free (taken)" in line


def test_what_a_host_says_does_not_reach_the_terminal_as_it_is():
    evil = "\x1b]0;title\x07\n2.9"
    [(_, _, line)] = complaints(ill(torch=evil))
    assert line.isprintable() and "torch ?]0;title??2.9" in line


def test_what_needs_no_action_is_no_complaint():
    """Copies still to be made, a clock that is well known to be near, other local versions."""
    assert complaints(ill(missing=tuple(name for name, *_ in FILES), torch="2.13.0+cu126")) == []
    unsure = host(2, clock=Clock(ahead_ms=200.0, within_ms=180.0))
    assert complaints(cluster(unsure)) == []
    small = facts("10.0.0.3", omp_num_threads="1", cores=1, usable_cores=1.0)
    assert complaints(cluster(host(2, facts=small))) == []


def test_a_name_that_leads_to_the_loopback_makes_no_difference_once_the_interface_is_told():
    report = ill(own_addresses=("127.0.1.1",))
    assert complaints(report) == []
    assert any("leads to 127.0.1.1" in f.what and "=eth0" in f.what for f in judge(report))
    assert interface_of(report.hosts[2]) == "eth0"


def test_an_own_name_leads_nobody_astray_where_the_interface_is_given():
    name = Resolved(name="nano2.local", addresses=("127.0.1.1",))
    told = facts("10.0.0.3", resolved=(name,))
    assert complaints(cluster(host(2, called=name.name, interface="eth0", facts=told))) == []


def test_a_model_that_is_not_split_yet_is_told():
    [(state, _, line)] = complaints(cluster(unsplit="split is not there"))
    assert state == WARNING and line.endswith("not compared: split is not there")


def test_a_machine_alone_is_told_of_that_name():
    alone = HostReport(name="box", address="", facts=facts(own_addresses=("127.0.1.1",)))
    [(state, _, line)] = complaints(Report(hosts=(alone,)))
    assert state == WARNING and "GLOO_SOCKET_IFNAME=eth0 (10.0.0.1)" in line
    calm = replace(alone, facts=facts())
    assert complaints(Report(hosts=(calm,))) == []


def test_a_link_much_slower_than_the_others_is_told():
    links = list(cluster().links)
    links[-1] = replace(links[-1], ms=9.0)
    [(state, name, line)] = complaints(cluster(links=tuple(links)))
    assert (state, name) == (WARNING, "nano2") and "its link to nano1 is slow" in line
    links[-1] = replace(links[-1], ms=0.5, mbps=60.0)
    assert [state for state, *_ in complaints(cluster(links=tuple(links)))] == [WARNING]


# ---- boards with a GPU ---------------------------------------------------------------------------
GPU = Gpu(name="Orin", free=5 * GB, total=8 * GB)


def boards(needs: Needs, **changed) -> Report:
    """Three boards, of which the third computes on its GPU."""
    told = dict(driver="540.4.0", cuda="12.6", gpus=(GPU,), nccl=True) | changed
    third = host(2, needs=needs, facts=facts("10.0.0.3", **told))
    return cluster(third, devices=("cpu", "cpu", "cuda"))


NEEDS = Needs(memory=GB, gpu=4 * GB)


def test_a_gpu_is_asked_for_its_own_memory():
    assert complaints(boards(NEEDS)) == []
    [(state, _, line)] = complaints(boards(replace(NEEDS, gpu=6 * GB)))
    assert state == FAULT and "6.0 GB of memory of its GPUs" in line


def test_a_jetson_has_one_memory_for_both():
    assert complaints(boards(NEEDS, driver="L4T R36.4.0")) == []
    [(state, _, line)] = complaints(boards(replace(NEEDS, gpu=int(5.5 * GB)), driver="L4T R36.4.0"))
    assert state == FAULT and "needs 6.5 GB of memory for rank 2" in line


def test_a_gpu_without_nccl_falls_back_and_one_that_is_not_seen_does_not():
    [(state, _, line)] = complaints(boards(NEEDS, nccl=False))
    assert state == WARNING and "so gloo is used" in line
    found = complaints(boards(NEEDS, gpus=(), cuda=None, nccl=False))
    assert [state for state, *_ in found] == [FAULT] and "torch sees no GPU" in found[0][2]


def test_drivers_that_differ_are_told():
    first = host(0, facts=facts(port="free", driver="535.1"))
    report = replace(boards(NEEDS), hosts=(first, host(1), boards(NEEDS).hosts[2]))
    [(state, _, line)] = complaints(report)
    assert state == WARNING and "driver 540.4.0, and nano0 has 535.1" in line


# ---- the file ------------------------------------------------------------------------------------
def test_a_report_is_read_as_it_was_written(tmp_path):
    speed = Speed(
        device="cpu", dtype="int8", rows=16, threads=2, by="torch", weights=9, seconds=0.5
    )
    report = cluster(host(2, speeds=(speed,), silent="because"), unsplit="no split")
    report.save(tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"port": 29500', '"port": "x"'), "port is 'x'"),
        (('"cores": 6', '"kores": 6'), "unknown key"),
        (('"format": 1', '"format": 2'), "format 2"),
    ],
)
def test_a_report_of_something_else_is_refused(tmp_path, change, words):
    cluster().save(tmp_path / "report.json")
    text = (tmp_path / "report.json").read_text()
    assert change[0] in text
    (tmp_path / "report.json").write_text(text.replace(*change))
    with pytest.raises(UserError, match=words) as error:
        load_report(tmp_path / "report.json")
    assert str(tmp_path / "report.json") in str(error.value)
