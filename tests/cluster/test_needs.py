"""What ranks need: as much memory as stages that are really loaded hold, and the files that the launcher copies."""

import socket

import pytest
import torch
import yaml

from flowspec import UserError
from flowspec.cluster import needs
from flowspec.cluster.hosts import load_cluster
from flowspec.cluster.needs import CONTEXT, CUDA, PROGRAM, in_digits, needs_of, wanted
from flowspec.config import load_config
from flowspec.models.stage import load_head, load_stage
from flowspec.preflight import manifest_of


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_stage_needs_what_it_holds_once_it_is_loaded(pair, dtype):
    config = load_config(pair.config(2), [f"dtype={dtype}"])
    manifest = manifest_of(config)
    for rank in (1, 2):
        model = load_stage(manifest, rank, getattr(torch, dtype), "cpu")
        held = model.size + model.row_bytes * min(CONTEXT, manifest.max_positions)
        if rank in config.head_ranks(manifest.topology):
            head = load_head(manifest, rank, getattr(torch, dtype), "cpu")
            held += head.weight.numel() * getattr(torch, dtype).itemsize
        reckoned = needs_of(manifest, config, [rank]).memory - PROGRAM
        # beside them are turns of the rotary embedding, norms in float32, and int8's scales
        assert 0.95 * held < reckoned <= held


def test_rank_0_needs_its_drafter_and_a_gpu_its_own_share(pair):
    config = load_config(pair.config(2))
    manifest = manifest_of(config)
    drafting = needs_of(manifest, config, [0]).memory - PROGRAM
    alone = needs_of(manifest, load_config(pair.config(2), ["drafter={kind: ngram}"]), [0]).memory
    assert drafting > 10_000 and alone - PROGRAM < drafting
    on_gpu = load_config(pair.config(2), ["device=cuda", "dtype=float32"])
    found, before = needs_of(manifest, on_gpu, [1]), needs_of(manifest, config, [1])
    assert (found.memory, found.gpu) == (PROGRAM, CUDA + before.memory - PROGRAM)
    both = needs_of(manifest, config, [1, 2]).memory
    assert both == sum(needs_of(manifest, config, [rank]).memory for rank in (1, 2))


def test_caches_take_what_the_configuration_says(pair):
    plain, more = (load_config(pair.config(2), [f"cache_mb={mb}"]) for mb in (1, 3))
    manifest = manifest_of(plain)
    found = [needs_of(manifest, config, [1]).memory for config in (plain, more)]
    assert found[1] - found[0] == 2 * 10**6
    assert needs_of(manifest, plain, [0]) == needs_of(manifest, more, [0])  # it has no layers


@pytest.fixture
def file(pair, tmp_path):
    """`file(**changed)`: a cluster file of three hosts for the tiny pair."""

    def write(**changed):
        hosts = [{"address": f"10.0.0.{k}"} for k in range(3)]
        (tmp_path / "c.yaml").write_text(
            yaml.safe_dump({"hosts": hosts, "config": str(pair.config(2)), **changed})
        )
        return load_cluster(tmp_path / "c.yaml")

    return write


def test_hosts_are_asked_for_their_own_files(file):
    found = wanted(file())
    assert found.unsplit is None and found.devices == ("cpu", "cpu", "cpu")
    names = [{name for name, _, _ in host.files} for host in found.hosts]
    assert all("stages/stages.yaml" in each for each in names)
    for rank, each in enumerate(names):
        own = f"stages/rank_0{rank}/model.safetensors"
        assert own in each and not any(own in other for other in names if other is not each)
    assert any(name.startswith("drafter_0/") for name in names[0])


def test_a_spare_host_is_asked_for_what_the_neediest_needs(file, pair):
    hosts = [{"address": f"10.0.0.{k}"} for k in range(3)]
    plain, own = {"address": "10.0.0.8", "spare": True}, {"address": "10.0.0.9", "spare": True}
    found = wanted(file(hosts=[*hosts, plain, own | {"device": "cuda"}]))
    *ranked, spare, on_gpu = found.hosts
    most = max(ranked, key=lambda host: host.needs.memory)
    assert found.devices == ("cpu", "cpu", "cpu")
    assert (spare.ranks, spare.spare, spare.devices) == ((), most.ranks, ("cpu",))
    assert (spare.needs, spare.files) == (most.needs, most.files)
    assert on_gpu.devices == ("cuda",) and on_gpu.needs.gpu > CUDA
    later = wanted(file(hosts=[*hosts, plain], stages="none")).hosts[-1]
    assert later.spare and not later.files and not later.ranks


def test_a_model_may_be_split_later(file, tmp_path):
    found = wanted(file(stages=str(tmp_path / "none")))
    assert "split the model first" in found.unsplit and not found.hosts[0].files
    assert "names no config" in wanted(file(config=None)).unsplit


def test_other_ranks_than_the_run_has_are_refused(file):
    with pytest.raises(UserError, match="no host lists rank 2"):
        wanted(file(hosts=[{"address": "10.0.0.1"}, {"address": "10.0.0.2"}]))


def test_a_name_becomes_the_address_that_others_reach(monkeypatch):
    known = {"nano": ["127.0.1.1", "10.0.0.7"], "box": ["127.0.1.1"]}

    def lookup(name, *_, **__):
        if name not in known:
            raise socket.gaierror("not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, 0)) for each in known[name]]

    monkeypatch.setattr(needs.socket, "getaddrinfo", lookup)
    assert [in_digits(name) for name in ("nano", "box", "what")] == [
        "10.0.0.7",
        "127.0.1.1",
        "what",
    ]
