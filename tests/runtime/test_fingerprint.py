"""Which model a split or a head was made from: one hash however it is stored, and what it is compared with."""

import json
import logging
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flowspec import UserError
from flowspec.launcher import ROOT
from flowspec.models.eagle import load_eagle
from flowspec.models.families import EMBEDDING
from flowspec.models.fingerprint import CARD, embedding_hash
from flowspec.models.heads import EAGLE_EMBEDDING, check_head
from flowspec.models.manifest import Manifest
from flowspec.models.split import split
from flowspec.models.stage import Head
from flowspec.models.weights import Checkpoint


def stored(folder, embedding):
    folder.mkdir()
    save_file({EMBEDDING: embedding}, folder / "model.safetensors")
    return embedding_hash(Checkpoint(folder))


def test_the_hash_is_of_the_values_and_not_of_how_they_are_stored(tmp_path):
    torch.manual_seed(5)
    half = torch.randn(700, 800).bfloat16().half()  # more than one chunk; what both halves can say
    half[0, 0] = 0.0
    found = {
        stored(tmp_path / str(dtype), half.to(dtype))
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
    }
    assert len(found) == 1
    large = half.float()
    large[3, 3] = 1e6  # infinite as a half
    large[1:2] += 2e-4  # some of these round up, some down
    assert (
        stored(tmp_path / "large", large) == stored(tmp_path / "rounded", large.half()) not in found
    )


def test_every_split_of_a_model_tells_the_same_hash_and_an_older_one_none(pair, tmp_path):
    known = embedding_hash(Checkpoint(pair.target))
    assert {Manifest.load(pair.split(stages)).embedding for stages in (1, 3)} == {known}
    assert split(str(pair.target), 2, tmp_path / "half", dtype="bfloat16").embedding == known
    assert embedding_hash(Checkpoint(pair.draft)) != known
    path = tmp_path / "stages.yaml"
    older = yaml.safe_load((pair.split(2) / "stages.yaml").read_text())
    del older["embedding"]
    path.write_text(yaml.safe_dump(older))
    assert Manifest.load(path).embedding is None
    Manifest.load(path).save(tmp_path / "again.yaml")
    assert yaml.safe_load((tmp_path / "again.yaml").read_text()) == older


@pytest.fixture
def head(pair, tmp_path):
    """`head(card, embedding)`: a copy of the pair's head with these."""

    def made(card=None, embedding=None):
        folder = tmp_path / "head"
        shutil.copytree(pair.head, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | ({CARD: card} if card else {})))
        if embedding is not None:
            save_file(
                load_file(folder / "model.safetensors") | {EAGLE_EMBEDDING: embedding},
                folder / "model.safetensors",
            )
        return folder

    return made


def warnings(folder, manifest, caplog):
    check_head("eagle", folder, manifest, "drafter.path")
    with caplog.at_level(logging.WARNING):
        load_eagle("eagle", folder, manifest, Head(torch.zeros(320, 48)), torch.float32, "cpu")
    return [record.getMessage() for record in caplog.records]


def test_a_head_of_another_target_is_refused_by_name(pair, head):
    manifest, other = Manifest.load(pair.split(2)), embedding_hash(Checkpoint(pair.draft))
    with pytest.raises(
        UserError,
        match=rf"drafter.path: .*{CARD} is {other}, the target's is {manifest.embedding}: give the head",
    ):
        check_head("eagle", head(other), manifest, "drafter.path")


def test_a_card_that_holds_no_hash_is_refused(pair, head):
    with pytest.raises(UserError, match=f"{CARD} is 'mine': it must be 64 digits"):
        check_head("eagle", head("mine"), Manifest.load(pair.split(2)), "drafter.path")


def test_a_head_of_this_target_is_taken_without_a_word(pair, head, caplog):
    manifest = Manifest.load(pair.split(2))
    assert warnings(head(manifest.embedding), manifest, caplog) == []


def test_a_published_head_is_known_by_the_embedding_that_it_carries(pair, head, caplog):
    embedding = pair.model.get_input_embeddings().weight.detach()
    assert warnings(head(None, embedding.half()), Manifest.load(pair.split(2)), caplog) == []


def test_what_cannot_be_compared_is_a_warning(pair, head, caplog):
    [line] = warnings(folder := head(), Manifest.load(pair.split(2)), caplog)
    assert str(folder) in line and f"no {CARD}" in line


def test_another_embedding_is_a_warning(pair, head, caplog):
    [line] = warnings(head(None, torch.zeros(320, 48)), Manifest.load(pair.split(2)), caplog)
    assert f"its {EAGLE_EMBEDDING} is not the target's embedding" in line


def test_the_shipped_head_names_the_shipped_target():
    config = json.loads((ROOT / "demo" / "eagle" / "config.json").read_text())
    assert config[CARD] == embedding_hash(Checkpoint(ROOT / "demo" / "target"))
