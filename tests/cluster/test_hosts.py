"""Cluster files: what they may say, and one line for what they may not."""

import json

import pytest

from flowspec.cli import main as cli
from flowspec.cluster.hosts import load_cluster
from flowspec.config import Config
from flowspec.core.topology import Topology
from flowspec.errors import UserError
from tests.dist.conftest import ROOT


def written(folder, text: str):
    path = folder / "cluster.yaml"
    path.write_text(text)
    return path


def test_the_example_is_five_hosts_with_a_rank_each():
    cluster = load_cluster(ROOT / "configs" / "cluster.yaml")
    cluster.check_ranks(Topology(4))
    assert [host.ranks for host in cluster.hosts] == [(0,), (1,), (2,), (3,), (4,)]
    assert cluster.config_path == ROOT / "configs" / "demo.yaml"
    assert (cluster.hosts[4].interface, cluster.hosts[3].interface) == ("eth0", None)


def test_ranks_are_counted_where_no_host_lists_any(tmp_path):
    cluster = load_cluster(written(tmp_path, "hosts: [{address: a}, {address: b, name: x}]"))
    assert [(host.name, host.ssh, host.ranks) for host in cluster.hosts] == [
        ("a", "a", (0,)),
        ("x", "b", (1,)),
    ]
    assert cluster.host_of(1).name == "x"


def test_a_spare_host_takes_the_ranks_and_the_place_of_another(tmp_path):
    text = """
    hosts: [{address: a}, {address: s, spare: true}, {address: b, device: cuda}, {address: t, spare: true, device: cpu}]
    """
    cluster = load_cluster(written(tmp_path, text))
    assert [(host.name, host.ranks) for host in cluster.holding] == [("a", (0,)), ("b", (1,))]
    assert [host.name for host in cluster.spares] == ["s", "t"]
    away, (one, other) = cluster.host_of(1), cluster.spares
    first = cluster.instead(away, one)
    assert [(host.name, host.ranks) for host in first.hosts] == [
        ("a", (0,)),
        ("s", (1,)),
        ("t", ()),
    ]
    assert [host.name for host in first.spares] == ["t"]
    config = Config(stages="x", device="cuda:1")
    devices = [
        each.placed(config).device for each in (cluster, first, cluster.instead(away, other))
    ]
    assert devices == [("cuda:1", "cuda"), ("cuda:1", "cuda:1"), ("cuda:1", "cpu")]
    with pytest.raises(UserError, match="device lists ranks, and so do hosts"):
        cluster.placed(Config(stages="x", device=("cpu", "cpu")))


@pytest.mark.parametrize("bare", [False, True])
def test_the_hostfile_of_mlx_launch(tmp_path, bare):
    hosts = [
        {"ssh": "me@one", "ips": ["10.0.0.1"], "rdma": [None, "rdma_en2"]},
        {"ssh": "two", "ips": []},
    ]
    text = json.dumps(hosts if bare else {"backend": "ring", "envs": [], "hosts": hosts})
    one, two = load_cluster(written(tmp_path, text)).hosts
    assert (one.name, one.ssh, one.user, one.address, one.ranks) == (
        "one",
        "one",
        "me",
        "10.0.0.1",
        (0,),
    )
    assert (two.ssh, two.user, two.address, two.ranks) == ("two", None, "two", (1,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hosts: [{address: a, rank: [0]}]", "unknown key hosts.0.rank: did you mean hosts.0.ranks?"),
        ("hosts: [{name: a}]", "hosts.0.address is missing"),
        ("hosts: []", "hosts is an empty list"),
        ("stages: here", "hosts is missing"),
        ("hosts: [{address: '-oProxyCommand=x'}]", "hosts.0.address is '-oProxyCommand=x'"),
        ("hosts: [{address: a, user: 'x y'}]", "hosts.0.user is 'x y'"),
        ("hosts: [{address: a, ssh_port: 0}]", "hosts.0.ssh_port is 0"),
        ("hosts: [{address: a}]\nport: 70000", "port is 70000"),
        ("hosts: [{address: a, device: gpu}]", "hosts.0.device is gpu"),
        ("hosts: [{address: a}, {address: a}]", "the name a is given twice"),
        ("hosts: [{address: a, ranks: [0, 1]}, {address: b, ranks: [1]}]", "the rank 1 is given twice"),
        ("hosts: [{address: a, ranks: [0]}, {address: b}]", "hosts.1.ranks is missing"),
        ("hosts: [{address: a, ranks: [1]}]", "no host lists rank 0"),
        ("hosts: [{address: a}, {address: b, spare: true, ranks: [1]}]", "hosts.1.ranks: a spare host has none"),
        ("hosts: [{address: a, spare: true}]", "hosts are spare all of them"),
        ("hosts: [{address: a, ranks: [0, -1]}]", "hosts.0.ranks lists -1"),
        ('{"hosts": [{"ssh": "a"}, {"ssh": "b", "ips": []}]}', "hosts.0 must have `ssh`, a name, and `ips`"),
        ("just words", "no mapping; it must be a cluster file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_by_key(tmp_path, text, said):
    path = written(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_cluster(path)
    assert str(caught.value).startswith(str(path)) and said in str(caught.value)


@pytest.mark.parametrize(
    ("ranks", "said"), [([0, 1], "no host lists rank 2"), ([0, 1, 2, 3], "hosts list rank 3 too")]
)
def test_the_hosts_hold_the_ranks_of_the_run_and_no_others(tmp_path, ranks, said):
    cluster = load_cluster(written(tmp_path, f"hosts: [{{address: a, ranks: {ranks}}}]"))
    with pytest.raises(UserError, match=said):
        cluster.check_ranks(Topology(2))


# ---- starting again ------------------------------------------------------------------------------
@pytest.mark.parametrize("said", ["x", "-1"])
def test_a_wrong_number_of_restarts_is_one_line(said, capsys):
    words = [
        "cluster",
        str(ROOT / "configs" / "cluster.yaml"),
        "--dry-run",
        "--restart",
        said,
        "--prompt",
        "a",
    ]
    assert cli(words) == 2
    assert "flowspec: --restart is" in capsys.readouterr().err


@pytest.mark.parametrize(("words", "kept"), [(["--prompt", "a"], True), (["--chat"], False)])
def test_a_conversation_is_not_gone_on_with(words, kept, capsys):
    """The example's file says restart: 2, which is for prompts."""
    assert cli(["cluster", str(ROOT / "configs" / "cluster.yaml"), "--dry-run", *words]) == 0
    assert ("FLOWSPEC_JOURNAL=journal" in capsys.readouterr().out) == kept
