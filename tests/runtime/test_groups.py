"""Stages of several ranks: their shards are the checkpoint, they compute what one rank computes, and the text stays the same."""

import functools
import itertools
import json
import shutil
import threading

import pytest
import torch
from torch.testing import assert_close

from flowspec.comm.collectives import summed
from flowspec.comm.group import threads
from flowspec.commands.split import main as split_main
from flowspec.core.policies import METHODS, SHARED
from flowspec.core.request import Sampling
from flowspec.core.stage import StageState
from flowspec.core.topology import Shard, Topology
from flowspec.engine import Engine
from flowspec.errors import UserError
from flowspec.models import weights
from flowspec.models.autotp import JoinedFile
from flowspec.models.families import layer_of
from flowspec.models.manifest import Manifest
from flowspec.models.parallel import Galaxy, Megatron
from flowspec.models.shard import cut
from flowspec.models.split import split
from flowspec.models.stage import Cached, Share, forward_together, load_head, load_stage
from flowspec.models.weights import Checkpoint, TensorFile
from flowspec.runtime.group import gathered_logits, gathered_two
from flowspec.sampling import pick
from flowspec.trace import read
from tests.families import families

FAMILIES = families(
    vocab_size=61, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
    max_position_embeddings=128,
)  # fmt: skip
EACH_WAY = pytest.mark.parametrize("sharing", [Megatron, Galaxy])


@functools.cache
def made(name: str, folder):
    torch.manual_seed(0)
    model = FAMILIES[name][0](FAMILIES[name][1]).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    model.save_pretrained(folder / name)
    return model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("groups")


def together(size: int, work) -> list:
    """What `work(index)` returns in threads of their own."""
    results, errors = [None] * size, []

    def run(index: int) -> None:
        try:
            results[index] = work(index)
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run, args=(k,), daemon=True) for k in range(size)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join(30)
    assert not errors, errors
    return results


# ---- the topology --------------------------------------------------------------------------------
@pytest.mark.parametrize("servers", [1, 3])
@pytest.mark.parametrize("stages,members", [(1, 1), (4, 1), (1, 4), (3, 2), (2, 3)])
def test_the_ring_leads_through_all_leaders_and_every_rank_has_one(stages, members, servers):
    ring, alone = Topology(stages, members, servers), Topology(stages, members)
    assert Topology.of_world(alone.world_size, members, servers) == ring
    assert ring.world_size - 1 == servers * (alone.world_size - 1)
    for server in range(servers):
        way = [0, ring.next(0)[server]]
        while [after := ring.next(way[-1])[0]] != [0]:
            assert ring.previous(after) == [way[-1]]
            way.append(after)
        assert way[1:] == [*ring.ring(server)] and ring.previous(0)[server] == way[-1]
        assert len(way) == ring.hops and ring.previous(way[1]) == [0]
        assert {ring.server(rank) for rank in way[1:]} == {server}
        assert [ring.place(rank) for rank in way[1:]] == [*alone.stage_ranks]
        assert [ring.role(rank) for rank in way] == [alone.role(ring.place(rank)) for rank in way]
    assert ring.last == alone.last and [*ring.stage_ranks] == [*itertools.chain(*ring.rings)]
    groups = [[*ring.group(rank)] for rank in ring.stage_ranks]
    assert [*itertools.chain(*groups)] == [*ring.ranks][1:]
    for rank in ring.ranks[1:]:
        assert ring.leader(rank) == ring.group(rank)[0]
        assert ring.leads(rank) == (rank in ring.stage_ranks)
        assert ring.group(rank)[ring.member(rank)] == rank
        assert all(rank in ring.control_peers(peer) for peer in ring.control_peers(rank))


def test_a_world_that_is_no_whole_stages_is_refused():
    with pytest.raises(ValueError, match="4 ranks are no stages of 3"):
        Topology.of_world(5, 3)


# ---- the files -----------------------------------------------------------------------------------
@pytest.mark.parametrize("members", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_the_shards_of_a_stage_are_the_checkpoint(folder, tmp_path, family, members, dtype):
    made(family, folder)
    whole = Checkpoint(folder / family)
    manifest = split(str(folder / family), 2, tmp_path / "out", members=members, dtype=dtype)
    assert Manifest.load(tmp_path / "out") == manifest
    ring = manifest.topology
    assert ring == Topology(2, members)
    config = FAMILIES[family][1].to_dict()
    for name in whole.names:
        stored = whole.file(name).read(name)
        stored = stored.to(torch.bfloat16) if dtype == "bfloat16" else stored
        for rank in ring.ranks[1:]:
            files = [entry.weights for entry in [manifest.ranks[rank]]]
            files += [manifest.ranks[rank].lm_head] if manifest.ranks[rank].lm_head else []
            file = next(
                (f for f in (TensorFile(manifest.path(e)) for e in files) if name in f.names), None
            )
            if file is None:
                continue
            got, shard = file.read(name), Shard(ring.member(rank), members)
            part = cut(name, config, shard)
            if part is None:
                added = name.endswith(("o_proj.bias", "down_proj.bias")) and shard.member
                want = torch.zeros_like(stored) if added else stored
            else:
                index = torch.tensor([k for each in part.ranges for k in each])
                want = stored.index_select(part.dim, index)
            assert torch.equal(got, want), (name, rank)
    for k, rank in enumerate(ring.stage_ranks):
        files = [TensorFile(manifest.path(manifest.ranks[each])) for each in ring.group(rank)]
        joined = JoinedFile(files, k % members, config)
        for name in (n for n in joined.names if layer_of(n) is not None):
            stored = whole.file(name).read(name)
            stored = stored.to(torch.bfloat16) if dtype == "bfloat16" else stored
            assert torch.equal(joined.read(name), stored), name
            assert joined.info(name).shape == stored.shape
    head = TensorFile(manifest.path(manifest.ranks[0].lm_head))
    assert head.info("lm_head.weight").shape == (61, 64)


def test_more_members_than_key_value_heads_share_them_and_are_told(folder, tmp_path, capsys):
    made("llama", folder)
    words = ["--model", str(folder / "llama"), "--output", str(tmp_path / "out")]
    assert split_main([*words, "--tensor-parallel", "4"]) == 0
    said = capsys.readouterr().err
    assert "each key/value head is held by 2 ranks: the model has only 2 of them" in said
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.topology == Topology(1, 4)
    files = [TensorFile(manifest.path(manifest.ranks[rank])) for rank in range(1, 5)]
    keys = [file.read("model.layers.0.self_attn.k_proj.weight") for file in files]
    assert torch.equal(keys[0], keys[1]) and torch.equal(keys[2], keys[3])
    assert not torch.equal(keys[0], keys[2])


@pytest.mark.parametrize(
    "members,said",
    [
        (0, "--tensor-parallel is 0, it must be at least 1"),
        (3, "--tensor-parallel is 3, it must divide the 4 attention heads"),
        (8, "--tensor-parallel is 8, it must divide the 4 attention heads"),
    ],
)
def test_members_that_do_not_divide_the_heads_are_refused(folder, tmp_path, members, said):
    made("llama", folder)
    with pytest.raises(UserError, match=said):
        split(str(folder / "llama"), 1, tmp_path / "out", members=members)
    assert not (tmp_path / "out").exists()


def without(folder, tmp_path, key: str):
    """A copy of the model whose config.json does not say this."""
    made("qwen2", folder)
    shutil.copytree(folder / "qwen2", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    return str(tmp_path / "model")


def test_a_config_without_what_only_shards_need_is_split_as_ever(folder, tmp_path):
    model = without(folder, tmp_path, "intermediate_size")
    assert split(model, 1, tmp_path / "out").topology == Topology(1)
    with pytest.raises(UserError, match="--tensor-parallel needs intermediate_size in config"):
        split(model, 1, tmp_path / "cut", members=2)


def test_a_tensor_of_another_size_than_its_config_says_is_not_cut(folder, tmp_path):
    """Families differ in what they assume where config.json is silent."""
    model = without(folder, tmp_path, "num_key_value_heads")
    with pytest.raises(UserError, match=r"k_proj.* dimension 0 is 64: .* num_key_value_heads"):
        split(model, 1, tmp_path / "cut", members=2)
    assert not (tmp_path / "cut").exists()


# ---- what they compute together ------------------------------------------------------------------
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("rows,width", [(1, 12), (5, 12), (40, 1200), (3, 70000)])
def test_a_sum_is_the_same_everywhere_and_no_row_of_it_depends_on_others(size, rows, width):
    torch.manual_seed(rows)
    parts = torch.randn(size, rows, width)
    links = threads(size)
    sums = together(size, lambda k: summed(links[k], parts[k], abandon=False))
    assert not any(each.abandon for each in sums)
    want = functools.reduce(torch.add, parts)
    assert all(torch.equal(each.total, want) for each in sums)
    alone = together(size, lambda k: summed(links[k], parts[k, :1], abandon=k == size - 1))
    assert all(torch.equal(each.total, want[:1]) for each in alone)
    assert all(each.abandon for each in alone)


def members_of(manifest: Manifest, rank: int):
    """The members of a stage: their models, and their shares of lm_head if the stage is the last."""
    ring = manifest.topology
    links = threads(ring.members)
    ranks = [*ring.group(rank)]
    found = []
    for k, each in enumerate(ranks):
        model = load_stage(manifest, each, torch.float32, "cpu", links=links[k])
        head = load_head(manifest, each, torch.float32, "cpu") if rank == ring.last else None
        found.append((model, head, links[k]))
    return found


@EACH_WAY
@pytest.mark.parametrize("members", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_group_computes_what_the_model_does(folder, tmp_path, family, members, sharing):
    """A prompt, one row, a tree with fewer rows than members, and rows that do not divide."""
    model = made(family, folder)
    manifest = split(str(folder / family), 1, tmp_path / "out", members=members)
    group = members_of(manifest, 1)
    tokens = torch.randint(0, 61, (23,), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        want = model(tokens[None]).logits[0]

    def work(k: int) -> torch.Tensor:
        shard, head, links = group[k]
        books, cached = StageState(), Cached(shard, sharing=sharing)
        out, at = [], 0
        for n in (9, 1, 3, 1, 2, 7):
            out.append(cached.forward(tokens[at : at + n], books.extend(n)))
            at += n
        return gathered_logits(head, 61, links, torch.cat(out))

    for got in together(members, work):
        assert_close(got, want, atol=2e-4, rtol=2e-4)
    files = (TensorFile(manifest.path(manifest.ranks[k + 1])) for k in range(members))
    assert sum(shard.size for shard, *_ in group) >= sum(
        4 * file.info(name).nbytes // weights.DTYPE_BYTES[file.info(name).dtype]
        for file in files
        for name in file.names
    ), "a product is not counted"


def test_two_best_of_sharded_logits_are_those_of_all(folder, tmp_path):
    """Also where two tokens of different members, or of one, tie: the lowest wins."""
    made("llama", folder)
    manifest = split(str(folder / "llama"), 1, tmp_path / "out", members=2)
    group = members_of(manifest, 1)
    rows = torch.randn(9, 64, generator=torch.Generator().manual_seed(1))
    rows[3] = 0  # all tokens tie
    whole = together(2, lambda k: gathered_logits(group[k][1], 61, group[k][2], rows))[0]
    for two in together(2, lambda k: gathered_two(group[k][1], 61, group[k][2], rows)):
        for got, want in zip(two, whole, strict=True):
            assert pick(got, Sampling(), None, 5) == pick(want, Sampling(), None, 5)


@EACH_WAY
def test_all_members_leave_off_at_once_and_nothing_is_left_of_it(folder, tmp_path, sharing):
    """The leader needs the rows no longer at some layer; the next forwards are as if it had never been."""
    model = made("llama_native", folder)
    manifest = split(str(folder / "llama_native"), 1, tmp_path / "out", members=2)
    group = members_of(manifest, 1)
    tokens = torch.randint(0, 61, (12,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want = model.model(tokens[None]).last_hidden_state[0]

    def work(k: int) -> list:
        shard, _, _ = group[k]
        books, cached = StageState(), Cached(shard, sharing=sharing)
        out = [cached.forward(tokens[:6], books.extend(6))]
        for layers in (1, 2):
            asked = iter([True] * (layers - 1) + [False])
            needed = (lambda: next(asked)) if k == 0 else (lambda: True)  # noqa: B023
            some = books.admit([100 * layers, 100 * layers + 1], [0, 0], False)
            share = Share(cached, some, [1, 2])
            assert forward_together(torch.tensor([5, 6]), [share], needed) is None
        out.append(cached.forward(tokens[6:], books.extend(6)))
        return out

    for first, second in together(2, work):
        assert_close(torch.cat([first, second]), want, atol=1e-4, rtol=1e-4)


# ---- the text ------------------------------------------------------------------------------------
PROMPTS = [[5], [7, 8, 9, 10, 11], list(range(40, 75))]
SAMPLED = [dict(temperature=0.8, top_p=0.9, seed=1), dict(temperature=1.2, top_k=20, seed=4)]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def text(engine, prompt, **settings):
    return [t.id for t in engine.generate(prompt, **settings)]


@pytest.mark.parametrize(
    "stages,members,drafter",
    [(1, 2, "eagle"), slow(1, 4, "lm"), (2, 2, "ngram"), slow(3, 2, "eagle")],
)
@pytest.mark.parametrize("tree", [["tree.segment=1", "tree.budget=8"], slow([])])
def test_every_method_writes_transformers_greedy_text(pair, stages, members, drafter, tree):
    config = pair.config(stages, None, drafter, members)
    prompts, n = (PROMPTS[1:2], 10) if tree else (PROMPTS[1:], 20)
    with Engine.from_config(config, tree) as engine:
        for prompt in prompts:
            want = pair.greedy(prompt, n)
            for method in (*METHODS, *SHARED):
                assert text(engine, prompt, method=method, max_new_tokens=n) == want, method


@pytest.mark.parametrize("verify_on", ["last", slow("coordinator")])
@pytest.mark.parametrize("stages,members", [(1, 2), slow(1, 4), slow(2, 2)])
def test_every_method_writes_the_sampled_text_of_a_plain_ring(pair, stages, members, verify_on):
    want = {}
    with Engine.from_config(pair.config(1)) as engine:
        for k, settings in enumerate(SAMPLED):
            want[k] = text(engine, PROMPTS[1], method="ar", max_new_tokens=16, **settings)
    config = pair.config(stages, None, "lm", members)
    with Engine.from_config(config, [f"verify_on={verify_on}"]) as engine:
        for k, settings in enumerate(SAMPLED):
            for method in ("serial", "flowspec", "ar", *SHARED):
                assert (
                    text(engine, PROMPTS[1], method=method, max_new_tokens=16, **settings)
                    == want[k]
                ), method


def test_the_timeline_of_groups_shows_their_stages(pair, tmp_path):
    path = tmp_path / "t.json"
    with Engine.from_config(pair.config(2, None, "lm", 2), [f"trace={path}"]) as engine:
        assert text(engine, PROMPTS[1], max_new_tokens=8) == pair.greedy(PROMPTS[1], 8)
    spans, _ = read(path)
    assert {span.rank for span in spans} == {0, 1, 2}
    assert all(span.end >= span.begin for span in spans if span.row == "compute")


def test_several_requests_share_a_group(pair):
    with Engine.from_config(pair.config(2, None, "lm", 2)) as engine:
        methods = ("flowspec", "galaxy", "tp", "ar")
        running = [
            engine.submit(PROMPTS[k % 3], method=method, max_new_tokens=20)
            for k, method in enumerate(methods)
        ]
        for k, generation in enumerate(running):
            assert [t.id for t in generation] == pair.greedy(PROMPTS[k % 3], 20)


def test_what_adds_up_in_another_order_is_not_called_deterministic(pair):
    config = pair.config(1, members=4)
    with pytest.raises(UserError, match="deterministic is true: method galaxy over 4 members"):
        Engine.from_config(config, ["method=galaxy", "deterministic=true"])
    with Engine.from_config(config, ["method=tp", "deterministic=true"]) as engine:
        with pytest.raises(UserError, match="deterministic is true: method galaxy"):
            engine.submit(PROMPTS[0], method="galaxy")
        assert text(engine, PROMPTS[1], max_new_tokens=6) == pair.greedy(PROMPTS[1], 6)


@pytest.mark.parametrize("method", SHARED)
def test_a_group_method_on_a_plain_ring_is_refused(pair, method):
    with pytest.raises(UserError, match=f"method is {method}: .* --tensor-parallel"):
        Engine.from_config(pair.config(2), [f"method={method}"])
