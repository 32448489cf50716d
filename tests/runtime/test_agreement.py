"""Ranks that do not run the same thing find out before they compute: which rank, which thing, both values."""

import shutil
import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
import yaml

from flowspec.config import load_config
from flowspec.core.topology import Topology
from flowspec.errors import UserError
from flowspec.models.manifest import Manifest
from flowspec.preflight import check_run
from flowspec.runtime import agreement
from flowspec.runtime.agreement import agree, facts_of, first_difference


def name(rank):
    return f"rank {rank} (HOST)"


def facts(pair, layers=None, words=(), dtype="float32", drafter="lm"):
    config = load_config(pair.config(2, layers, drafter), words)
    return facts_of(config.shared(), Manifest.load(config.stages_path), dtype)


def test_the_same_model_and_configuration_in_other_places_is_the_same(pair, tmp_path):
    shutil.copytree(pair.split(2), tmp_path / "elsewhere")
    here = [
        "stages=elsewhere",
        "threads=1",
        "device=[cpu, cpu, cpu]",
        "trace=x.json",
        "dtype=float32",
        "sampling.seed=4",
    ]
    config = tmp_path / "mine.yaml"
    config.write_text(pair.config(2).read_text())
    there = load_config(config, here)
    other = facts_of(there.shared(), Manifest.load(there.stages_path), None)
    assert first_difference([other, facts(pair), facts(pair)], name) is None


@pytest.mark.parametrize(
    "words,said",
    [
        (
            dict(layers="2,4"),
            "another split of the model: its stages.yaml says layers 2,4, rank 0's says 3,3",
        ),
        (
            dict(words=["verify_on=coordinator"]),
            "another configuration: its verify_on is coordinator, rank 0's is auto",
        ),
        (
            dict(words=["policy.abort=false"]),
            "another configuration: its policy.abort is False, rank 0's is True",
        ),
        (
            dict(words=["emulate.stage_ms=[1, 2]"]),
            "another configuration: its emulate.stage_ms is (1.0, 2.0), rank 0's is 0.0",
        ),
        (dict(drafter="ngram"), "another configuration: its drafter is ngram, rank 0's is lm"),
    ],
)
def test_what_differs_is_named_with_both_values(pair, words, said):
    assert (
        first_difference([facts(pair), facts(pair, **words), facts(pair)], name)
        == f"rank 1 (HOST) has {said}"
    )


def test_files_of_one_rank_and_versions_are_compared(pair):
    ours, others = facts(pair), facts(pair)
    others["split"]["files of rank 2"] = "0" * agreement.SHORT
    assert first_difference([ours, ours, others], name).startswith(
        "rank 2 (HOST) has another split of the model: its stages.yaml says files of rank 2 000000000000, rank 0's says "
    )
    others["version"]["wire format"] = "0"  # where the code differs, so may the rest
    own = ours["version"]["wire format"]
    assert (
        first_difference([ours, ours, others], name)
        == f"rank 2 (HOST) runs another wire format: 0, rank 0 runs {own}"
    )


def test_a_rank_that_computes_nothing_of_the_target_has_no_say_in_its_dtype(pair):
    told = [facts(pair, dtype=None), facts(pair, dtype="float16"), facts(pair, dtype="float32")]
    assert first_difference(told[:2], name) is None
    assert (
        first_difference(told, name)
        == "rank 2 (HOST) computes in float32, rank 1 in float16: set dtype in the configuration"
    )


def test_every_rank_says_the_same_through_the_store(pair):
    store, said = dist.HashStore(), {}
    told = [facts(pair), facts(pair), facts(pair, layers="2,4")]

    def join(rank):
        try:
            agree(store, Topology(2), rank, told[rank], name)
        except UserError as error:
            said[rank] = str(error)

    ranks = [threading.Thread(target=join, args=(rank,)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert set(said) == {0, 1, 2} and len(set(said.values())) == 1
    assert "rank 2 (HOST) has another split" in said[0] and "layers 2,4" in said[0]


def test_a_rank_that_tells_nothing_is_named(pair, monkeypatch):
    monkeypatch.setattr(agreement, "PATIENCE", timedelta(seconds=0.05))
    with pytest.raises(UserError, match=r"rank 1 \(HOST\) does not tell which model"):
        agree(dist.HashStore(), Topology(1), 0, facts(pair), name)


@pytest.mark.parametrize(
    "text", ["", "3", "[]", '{"split": 1}', '{"split": {"layers": 4}}', "[" * 100_000]
)
def test_a_rank_that_tells_something_else_is_named(pair, text):
    store = dist.HashStore()
    store.set("1", text)
    with pytest.raises(UserError, match=r"rank 1 \(HOST\) tells something else"):
        agree(store, Topology(1), 0, facts(pair), name)


@pytest.mark.parametrize(
    "field,value",
    [("hidden_size", 64), ("model_type", "mistral"), ("vocab_size", 321), ("max_positions", 99)],
)
def test_a_manifest_that_is_not_of_its_config_is_refused_by_field(pair, tmp_path, field, value):
    shutil.copytree(pair.split(2), tmp_path / "split")
    path = tmp_path / "split" / "stages.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), field: value}))
    config = tmp_path / "config.yaml"
    config.write_text("stages: split\ndrafter: {kind: ngram}\n")
    for ranks in (None, [0], [2]):
        with pytest.raises(
            UserError,
            match=rf"config.json: \w+ is .*, .*stages.yaml says {value}: run split_models.py again",
        ):
            check_run(load_config(config), ranks)
