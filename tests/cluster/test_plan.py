"""Plans: layers sum up and fit, nothing in reach is better, the file says what is wrong with it, and a split obeys it."""

import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from flowspec import UserError
from flowspec.cluster import fleet
from flowspec.cluster.doctor import TIGHT
from flowspec.cluster.hosts import load_cluster
from flowspec.cluster.needs import CUDA, PROGRAM, needs_of
from flowspec.cluster.plan import Plan, PlannedModel, PlannedStage, load_plan
from flowspec.cluster.planner import (
    EQUAL,
    FEWER,
    LISTED,
    UNEVEN,
    Box,
    Candidate,
    Model,
    Way,
    Ways,
    alternatives,
    candidates,
    chosen,
    shortage,
    unfit,
)
from flowspec.cluster.report import Gpu, HostReport, Link, Needs, Report, Speed
from flowspec.commands import plan as command
from flowspec.commands.split import main as split
from flowspec.config import load_config
from flowspec.core.cost import Group
from flowspec.models.families import read_config
from flowspec.models.manifest import Manifest
from flowspec.models.split import Source
from flowspec.preflight import manifest_of
from tests.cluster.conftest import LONG
from tests.cluster.test_doctor import facts
from tests.dist.conftest import ROOT

TARGET = ROOT / "demo" / "target"
MIXED = ROOT / "configs" / "devices" / "mixed_fleet.yaml"
LAYER = 200_000_000
BASE, ROW = 0.05, 0.0005
"""A quick board's forward over 8 layers, and each row of it, in seconds (configs/devices/)."""


def board(name: str, times: float = 1.0, **changed) -> Box:
    """A board that takes so many times as long as a quick one."""
    well = Box(
        name=name,
        base=times * BASE / (8 * LAYER),
        slope=times * ROW / (8 * LAYER),
        free=8e9,
        program=500_000_000,
        weight=2,
        looked_up=2,
        number=2,
    )
    return replace(well, **changed)


def boards(*times: float, **changed) -> list[Box]:
    return [board(f"n{k}", each, **changed) for k, each in enumerate(times)]


def model(layers: int = 32, **changed) -> Model:
    sizes = dict(embedding=130_000_000, head=130_000_000, hidden=4096, cache=4_000_000)
    drafter = dict(draft=LAYER, drafter=LAYER)
    return Model(layers=(LAYER,) * layers, **{**sizes, **drafter, **changed})


def ways(boxes, ms: float = 1.0, mbps: float = 150.0) -> Ways:
    pairs = itertools.permutations([box.name for box in boxes], 2)
    return Ways(dict.fromkeys(pairs, Way(ms, mbps)))


def reckoned(emulate, stages: int):
    """Rates as a simulator might find them: quick, and in the right order."""
    times = [emulate.stage_seconds(k, 8) for k in range(1, 1 + stages)]
    trip = sum(times) + (stages + 1) * emulate.link_ms / 1000
    return 1 / trip, 1 / (max(times) + 0.1 * (trip + emulate.draft_ms / 1000))


# ---- which split ---------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
def test_layers_sum_up_and_respect_what_memory_there_is(seed):
    random = np.random.default_rng(seed)
    count = int(random.integers(2, 6))
    boxes = [
        replace(board(f"n{k}", random.uniform(1, 4)), free=random.uniform(1.2e9, 12e9))
        for k in range(count)
    ]
    of = model(int(random.integers(4, 20)))
    tried = candidates(of, boxes, ways(boxes), members=(1, 2))
    for one in tried:
        assert sum(one.layers) == len(of.layers) and min(one.layers) > 0
        room_of = {box.name: box.free for box in boxes}
        held = dict.fromkeys(one.hosts, 0.0)
        picks = one.setting.verify_on == "coordinator"
        held[one.hosts[0]] += 5e8 + 2 * (of.drafter + (of.head if picks else 0))
        for k, (room, start, stop) in enumerate(one.stages):
            size = 2 * (LAYER + of.cache) * (stop - start)
            size += 2 * of.embedding if start == 0 else 0
            size += 2 * of.head if k == len(one.stages) - 1 and not picks else 0
            for name in room.names:
                held[name] += 5e8 + size / room.members
        lacks = {n: b - room_of[n] for n, b in held.items() if b > room_of[n] + 1}
        if one.lacks or lacks:
            assert one.lacks.keys() == lacks.keys()
            assert [one.lacks[name] for name in lacks] == pytest.approx([*lacks.values()], rel=0.01)
    best = alternatives(tried, reckoned)
    assert not any(each.best.lacks for each in best)
    assert bool(best) == (not shortage(of, boxes, ways(boxes)))


@pytest.mark.parametrize("times", [(1, 1, 3, 1), (1, 1, 2, 3), (2, 1, 1.3, 4)])
def test_no_split_of_twelve_layers_over_three_hosts_is_reckoned_to_be_better(times):
    found, every = against_every_split(boards(*times), reckoned)
    assert found >= 0.995 * max(every)


@pytest.mark.slow
def test_no_split_of_twelve_layers_over_three_hosts_is_simulated_to_be_much_better():
    found, every = against_every_split(boards(1, 1, 1.5, 3), simulator(tokens=16), orders=1)
    assert found >= 0.97 * max(every), (found, max(every))


def against_every_split(boxes, predict, orders: int | None = None):
    """What is found with rank 0 on the first host, and the worth of every split with it there."""
    of, mine = model(12), {}
    tried = [
        one
        for one in candidates(of, boxes, ways(boxes))
        if one.hosts[0] == "n0" and "n0" not in one.hosts[1:] and one.setting.verify_on == "last"
    ]
    for one in tried:
        mine.setdefault(one.setting.rooms, one.setting)
    every = []
    for setting in [*mine.values()][:orders]:
        for ends in itertools.combinations_with_replacement(range(13), 2):
            counts = tuple(b - a for a, b in itertools.pairwise((0, *ends, 12)))
            every.append(predict(*Candidate("", setting, counts).ring)[1])
    return chosen(alternatives(tried, predict)).worth, every


def simulator(tokens: int = 24):
    """The command's own predictor, of one short text."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "TEXTS", 1)
        patch.setattr(command, "TOKENS", tokens)
        return command._simulator(load_config(MIXED), [0.6, 0.2], hidden=4096)


def test_on_the_mixed_fleet_the_plan_beats_the_equal_split_in_virtual_time():
    """configs/devices/mixed_fleet.yaml: rank 0 beside four boards, of which the second is slow."""
    emulate = load_config(MIXED).emulate
    boxes = boards(1, *(ms / 1000 / BASE for ms in emulate.stage_ms))
    of = model(head=0, draft=round(emulate.draft_ms / 1000 / boxes[0].seconds()))
    tried = candidates(of, boxes, ways(boxes), listed=[box.name for box in boxes])
    ring, stages = tried[0].ring
    assert (tried[0].kind, stages) == (LISTED, 4)
    assert ring.stage_ms == pytest.approx(emulate.stage_ms)
    assert ring.token_ms == pytest.approx(emulate.token_ms)
    assert ring.draft_ms == pytest.approx(emulate.draft_ms)
    assert ring.link_mbps == emulate.link_mbps and ring.link_ms == emulate.link_ms
    found = {each.best.kind: each for each in alternatives(tried, simulator())}
    uneven, listed = found[UNEVEN], found[LISTED]
    assert uneven.rates[0] > 1.15 * listed.rates[0]
    assert uneven.rates[1] > 1.2 * listed.rates[1]
    best = chosen([*found.values()])
    assert best.worth >= uneven.worth / 1.01 and best.best.kind != LISTED


def test_where_no_place_hides_the_slow_boards_no_equal_split_is_as_good():
    boxes = boards(1, 1, 3, 3, 1)
    found = {
        each.best.kind: each
        for each in alternatives(candidates(model(), boxes, ways(boxes)), reckoned)
    }
    best = chosen([*found.values()])
    assert best.best.kind in (FEWER, UNEVEN) and best.worth > 1.2 * found[EQUAL].worth


def test_a_host_that_is_not_worth_its_hop_is_left_out():
    boxes = boards(1, 1, 1, 40)
    best = chosen(alternatives(candidates(model(12), boxes, ways(boxes)), reckoned)).best
    assert best.kind == FEWER and "n3" not in best.hosts[1:]


def test_equal_hosts_get_equal_stages_and_nothing_is_called_uneven():
    boxes = boards(1, 1, 1, 1, 1)
    none = replace(model(), head=0)
    found = alternatives(
        candidates(none, boxes, ways(boxes), listed=["n0", "n1", "n2", "n3", "n4"]), reckoned
    )
    best = chosen(found).best
    assert best.kind in (LISTED, EQUAL) and set(best.layers) == {8}


@pytest.mark.parametrize(("ms", "mbps", "pays"), [(0.01, 1e5, True), (1.0, 150.0, False)])
def test_groups_pay_on_quick_links_alone(ms, mbps, pays):
    boxes = boards(1, 1, 1, 1, 1)
    found = alternatives(candidates(model(), boxes, ways(boxes, ms, mbps), (1, 2, 4)), reckoned)
    kinds = {each.best.kind for each in found}
    assert {"groups of 2", "groups of 4"} <= kinds
    assert chosen(found).best.kind.startswith("groups") == pays


def test_a_group_takes_as_long_as_one_that_is_emulated():
    """A stage of two ranks with 16 layers between them weighs as Emulate's, of 8 layers a rank."""
    boxes = boards(1, 1, 1)
    none = replace(model(16, head=0), draft=0, drafter=0)
    tried = candidates(none, boxes, ways(boxes), (2,))
    one = next(c for c in tried if len(set(c.hosts)) == 3 and c.setting.verify_on == "last")
    emulate, stages = one.ring
    like = replace(emulate, stage_ms=1000 * BASE, token_ms=1000 * ROW)
    for rows in (1, 8, 16):
        wanted = like.group_seconds(1, rows, Group(2), like.row_bytes(4096))
        assert stages == 1 and emulate.stage_seconds(1, rows) == pytest.approx(wanted, rel=1e-3)


def test_a_large_lm_head_moves_layers_away_from_where_it_is():
    boxes = boards(1, 1, 1)
    heavy = replace(model(16), head=4 * LAYER, draft=0, drafter=0)
    for one in candidates(heavy, boxes, ways(boxes)):
        if one.kind == UNEVEN and one.setting.verify_on == "last" and len(set(one.hosts)) == 3:
            assert one.layers[-1] < one.layers[0]
            break
    else:
        pytest.fail("no uneven split")


def test_where_nothing_fits_the_hosts_say_how_much_they_lack():
    boxes = boards(1, 1, 1, free=2e9)
    tried = candidates(model(), boxes, ways(boxes))
    assert alternatives(tried, reckoned) == []
    lacks = shortage(model(), boxes, ways(boxes))
    # 13.6 GB in all, beside 0.4 for drafting and 0.5 for each of four ranks
    needed = 2 * (32 * (LAYER + 4_000_000) + 2 * 130_000_000 + LAYER) + 4 * 5e8
    assert sum(lacks.values()) == pytest.approx(needed - 3 * 2e9, rel=0.1)
    assert unfit(tried).keys() == {EQUAL}


def test_a_link_that_was_not_measured_counts_as_the_slowest():
    some = Ways({("a", "b"): Way(1.0, 100.0), ("b", "a"): Way(3.0, 50.0)})
    assert some.along(["a", "b", "b", "c"]) == Way(pytest.approx(4 / 3), 50.0)
    assert some.among(["a", "b"]) == Way(3.0, 50.0)
    assert Ways({}).along(["a", "b"]) == Way(0.0, None)


# ---- the file ------------------------------------------------------------------------------------
def planned(**changed) -> Plan:
    config = read_config(TARGET)
    stages = (
        PlannedStage(layers=(0, 5), hosts=("nano1",)),
        PlannedStage(layers=(5, 8), hosts=("nano0",)),
    )
    well = Plan(model=PlannedModel.of(config), coordinator="nano0", stages=stages, verify_on="last")
    return replace(well, **changed)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    plan = planned()
    plan.save(tmp_path / "plan.yaml")
    assert load_plan(tmp_path / "plan.yaml") == plan
    (tmp_path / "plan.json").write_text(
        json.dumps(yaml.safe_load((tmp_path / "plan.yaml").read_text()))
    )
    assert load_plan(tmp_path / "plan.json") == plan
    assert plan.layers == [5, 3] and plan.ranks == {"nano0": [0, 2], "nano1": [1]}


def test_members_of_a_stage_have_ranks_side_by_side():
    stages = (
        PlannedStage(layers=(0, 4), hosts=("a", "b")),
        PlannedStage(layers=(4, 8), hosts=("c", "d")),
    )
    assert planned(coordinator="c", stages=stages).ranks == {
        "c": [0, 3],
        "a": [1],
        "b": [2],
        "d": [4],
    }


BAD = {
    "verify_on": ("verify_on", "first", "verify_on is first"),
    "no stages": ("stages", [], "stages is an empty list"),
    "a gap": ("stages.1.layers", [6, 8], "stages.1.layers is [6, 8]"),
    "too few": ("stages.1.layers", [5, 7], "stages hold 7 layers, model.num_hidden_layers is 8"),
    "none": ("stages.0.layers", [0, 0], "stages.0.layers is [0, 0]"),
    "no pair": ("stages.0.layers", [5], "stages.0.layers is [5]: expected a list of 2"),
    "a text": ("stages.0.hosts", "nano1", "stages.0.hosts is 'nano1': expected a list"),
    "unequal groups": ("stages.1.hosts", ["x", "y"], "stages.1.hosts has 2 names"),
    "one host twice": ("stages.1.hosts", ["nano1"], "stages.1.hosts: nano1 has a stage already"),
    "unknown": ("stages.0.layer", [0, 5], "unknown key stages.0.layer: did you mean"),
    "a size": ("model.hidden_size", "256", "model.hidden_size is '256': expected int"),
    "another model": ("model.hidden_size", 512, "is a plan of another model: its model.hidden_size"),
    "a newer one": ("format", 2, "has format 2"),
}  # fmt: skip


@pytest.mark.parametrize("key,value,said", BAD.values(), ids=BAD)
def test_a_bad_plan_is_one_line_that_names_the_field(tmp_path, capsys, key, value, said):
    path = tmp_path / "plan.yaml"
    planned().save(path)
    values = at = yaml.safe_load(path.read_text())
    *outer, leaf = (int(part) if part.isdigit() else part for part in key.split("."))
    for part in outer:
        at = at[part]
    at[leaf] = value
    path.write_text(yaml.safe_dump(values))
    words = ["--model", str(TARGET), "--output", str(tmp_path / "out"), "--plan", str(path)]
    assert split(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and str(path) in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--stages 2", "--layers 5,3", "--tensor-parallel 1"])
def test_a_plan_is_not_taken_beside_what_it_says(tmp_path, capsys, flag):
    planned().save(tmp_path / "plan.yaml")
    words = ["--model", str(TARGET), "--output", str(tmp_path / "out"), *flag.split()]
    assert split([*words, "--plan", str(tmp_path / "plan.yaml")]) == 2
    assert f"leave out {flag.split()[0]}" in capsys.readouterr().err


def test_a_model_is_split_as_planned(tmp_path):
    planned().save(tmp_path / "plan.yaml")
    words = ["--model", str(TARGET), "--output", str(tmp_path / "out")]
    assert split([*words, "--plan", str(tmp_path / "plan.yaml")]) == 0
    assert [each.layers for each in Manifest.load(tmp_path / "out").ranks[1:]] == [(0, 5), (5, 8)]


# ---- from a report -------------------------------------------------------------------------------
def told(name: str, times: float, **changed) -> HostReport:
    """A host that takes so many times as long as a quick one, with layers as small as the demo's."""
    each = (
        Speed(
            device="cpu",
            dtype="float32",
            rows=rows,
            threads=6,
            by="flowspec",
            weights=8_000_000,
            seconds=times * (BASE + rows * ROW),
        )
        for rows in (1, 16)
    )
    return HostReport(name=name, address="10.0.0.1", facts=facts(**changed), speeds=tuple(each))


def report(*times: float, **changed) -> Report:
    hosts = [told(f"nano{k}", each, **changed) for k, each in enumerate(times)]
    pairs = itertools.permutations([host.name for host in hosts], 2)
    links = tuple(Link(source=a, target=b, ms=1.0, mbps=150.0) for a, b in pairs)
    return Report(hosts=tuple(hosts), links=links)


class Fleet:
    """A cluster file of the demo and a report on its hosts."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.report = folder, folder / "c.yaml", folder / "report.json"
        self.run()
        self.write()

    def write(self, *times: float) -> None:
        found = report(*(times or (1, 1, 3, 1, 1)))
        self.keep(found)
        hosts = [
            {"name": host.name, "address": f"10.0.0.{k}"} for k, host in enumerate(found.hosts)
        ]
        self.path.write_text(yaml.safe_dump({"config": "run.yaml", "hosts": hosts}))

    def keep(self, found: Report) -> None:
        found.save(self.report)

    def run(self, **changed) -> None:
        drafter = {"kind": "lm", "path": str(ROOT / "demo" / "draft")}
        values = {"stages": "split", "drafter": drafter, **changed}
        (self.folder / "run.yaml").write_text(yaml.safe_dump(values))

    def plan(self, *words: object) -> int:
        words = (TARGET, self.path, "--report", self.report, *words)
        return command.main([str(word) for word in words])


@pytest.fixture
def fleet_of(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "TEXTS", 1)
    monkeypatch.setattr(command, "TOKENS", 8)
    return Fleet(tmp_path)


def test_a_plan_is_made_of_a_report_and_split_by(fleet_of, tmp_path, capsys):
    out = tmp_path / "plan.yaml"
    assert fleet_of.plan("--out", out) == 0
    shown = capsys.readouterr().out
    assert "simulated tokens/s" in shown and "as listed" in shown and "chosen: " in shown
    plan = load_plan(out)
    rates = {each.alternative: each.flowspec for each in plan.simulated}
    assert rates[plan.chosen] >= max(rates.values()) / 1.01 and LISTED in rates
    assert sum(plan.layers) == 8
    assert all(len(each.emulate.stage_ms) >= 1 for each in plan.simulated)
    words = ["--model", str(TARGET), "--output", str(tmp_path / "split"), "--plan", str(out)]
    assert split(words) == 0
    ring = Manifest.load(tmp_path / "split").topology
    assert (ring.stages, ring.members) == (len(plan.stages), plan.members)
    assert sorted(rank for held in plan.ranks.values() for rank in held) == [*ring.ranks]


def test_without_a_drafter_plain_decoding_decides(fleet_of, capsys):
    fleet_of.run(drafter={"kind": "none"})
    assert fleet_of.plan("--out", fleet_of.folder / "plan.yaml") == 0
    plan = load_plan(fleet_of.folder / "plan.yaml")
    assert all(each.flowspec is None for each in plan.simulated)
    rates = {each.alternative: each.ar for each in plan.simulated}
    assert rates[plan.chosen] >= max(rates.values()) / 1.01


def test_what_does_not_fit_is_one_line(fleet_of, capsys):
    fleet_of.keep(report(1, 1, 3, 1, 1, memory_free=10**8))
    assert fleet_of.plan("--out", fleet_of.folder / "plan.yaml") == 1
    lines = capsys.readouterr().err.splitlines()
    assert "no split fits: " in lines[-1] and "lacks 0." in lines[-1]
    assert not (fleet_of.folder / "plan.yaml").exists()


def test_a_host_that_does_not_answer_is_left_out(fleet_of, capsys):
    fleet_of.run(method="ar")
    found = report(1, 1, 3, 1, 1)
    dead = replace(found.hosts[3], facts=None, silent="timed out", speeds=())
    fleet_of.keep(replace(found, hosts=(*found.hosts[:3], dead, *found.hosts[4:])))
    assert fleet_of.plan() == 0
    said = capsys.readouterr()
    assert "nano3 is left out: no answer (timed out)" in said.err and "nano3" not in said.out


def test_what_the_doctor_finds_is_told_but_not_what_an_older_split_needs(fleet_of, capsys):
    fleet_of.run(method="ar")
    found = report(1, 1, 3, 1, 1)
    lame = replace(found.hosts[1], facts=facts(gloo=False), needs=Needs(memory=10**12))
    fleet_of.keep(replace(found, hosts=(found.hosts[0], lame, *found.hosts[2:])))
    assert fleet_of.plan() == 0
    told = capsys.readouterr().err
    assert "nano1: torch has no gloo" in told and "memory" not in told


@pytest.mark.parametrize(
    ("device", "changed", "free", "program"),
    [
        ("cpu", {}, 6e9, PROGRAM),
        ("cuda", {"driver": "L4T 36.4"}, 6e9, PROGRAM + CUDA),
        ("cuda", {"driver": "570.1", "gpus": (Gpu(name="x", free=9 * 10**9, total=10**10),)}, 9e9, CUDA),
        ("cuda:0", {}, 0, CUDA),
    ],
)  # fmt: skip
def test_memory_is_that_of_the_device(fleet_of, device, changed, free, program):
    host = told("nano0", 1, **changed)
    fast = tuple(replace(s, device="cuda", dtype="float16") for s in host.speeds)
    found = Report(hosts=(replace(host, speeds=(*host.speeds, *fast)),))
    hosts = [{"name": "nano0", "address": "10.0.0.1", "device": device}]
    fleet_of.path.write_text(yaml.safe_dump({"config": "run.yaml", "hosts": hosts}))
    cluster = load_cluster(fleet_of.path)
    (box,) = fleet.boxes_of(found, cluster, fleet.run_of(cluster), "float16", "report", print)
    assert (box.free, box.program) == (pytest.approx(TIGHT * free), program)
    assert (box.weight, box.number) == ((4, 4) if device == "cpu" else (2, 2))


WRONG = {
    "another dtype": (
        lambda f: f.run(dtype="bfloat16"),
        "of nano0 in bfloat16 on cpu was not measured",
    ),
    "servers": (lambda f: f.run(dsi={"servers": 2}), "dsi.servers is 2"),
    "a rank that drafts": (
        lambda f: f.run(drafter={"kind": "lm", "path": "x", "ranks": 1}),
        "drafter.ranks is 1",
    ),
    "devices by rank": (lambda f: f.run(device=["cpu", "cuda"]), "device is a list by rank"),
    "four bits": (lambda f: f.run(dtype="nf4"), "dtype is nf4: plans are for one dtype"),
    "no config": (
        lambda f: f.path.write_text(yaml.safe_dump({"hosts": [{"address": "10.0.0.1"}]})),
        "config is missing",
    ),
    "a host that was not asked": (
        lambda f: f.keep(replace(report(1, 1), hosts=report(1, 1).hosts[:1])),
        "has no host nano1",
    ),
    "no report": (lambda f: f.report.unlink(), "cannot read"),
}


@pytest.mark.parametrize("spoil,said", WRONG.values(), ids=WRONG)
def test_what_no_plan_can_be_made_of_is_one_line(fleet_of, spoil, said):
    spoil(fleet_of)
    with pytest.raises(UserError) as refused:
        fleet_of.plan()
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_rank_is_planned_to_need_what_the_doctor_says_it_needs(pair, tmp_path, dtype):
    """The planner's memory, which knows no split, is that of a split there is (needs.py)."""
    config = load_config(pair.config(2), [f"dtype={dtype}"])
    source = Source.open(pair.target)
    of = fleet.model_of(source, config, print)
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(
            {"hosts": [{"name": f"nano{k}", "address": f"10.0.0.{k}"} for k in range(3)]}
        )
    )
    found = report(1, 1, 1, memory_free=0)
    hosts = [
        replace(host, speeds=tuple(replace(s, dtype=dtype) for s in host.speeds))
        for host in found.hosts
    ]
    cluster = load_cluster(tmp_path / "c.yaml")
    boxes = fleet.boxes_of(
        replace(found, hosts=tuple(hosts)), cluster, config, source.dtype, "report", print
    )
    names = [box.name for box in boxes]
    listed = candidates(of, boxes, fleet.ways_of(found, print), listed=names)[0]
    manifest = manifest_of(config)
    for rank, name in enumerate(names):
        needed = needs_of(manifest, config, [rank]).memory
        assert listed.lacks[name] == pytest.approx(needed, abs=0.02 * (needed - 480e6) + 1)


@LONG
@pytest.mark.slow
def test_hosts_are_measured_for_a_plan(site, tmp_path):
    """Over ssh, in network namespaces: no split is needed, and none that is there is looked at."""
    import subprocess

    (site.folder / "run.yaml").write_text(
        yaml.safe_dump({"stages": "none", "drafter": {"kind": "ngram"}, "threads": 1})
    )
    argv = (sys.executable, "-m", "flowspec", "plan", TARGET, site.path, "--out", tmp_path / "p")
    done = subprocess.run(
        site.rig.within("desk", *argv), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    plan = load_plan(tmp_path / "p")
    assert sum(plan.layers) == 8 and plan.ranks.keys() <= set(site.rig.names)
