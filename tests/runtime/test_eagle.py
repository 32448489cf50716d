"""EAGLE heads: what is loaded computes what was published, an incremental tree what a fresh forward would, and no text changes."""

import dataclasses
import random
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from flowspec import Engine, UserError
from flowspec.comm.base import Inbox
from flowspec.core.messages import Commit, Draft, DraftNode
from flowspec.core.policy import METHODS
from flowspec.core.request import Request, Sampling
from flowspec.core.stage import StageState
from flowspec.draft.eagle import EagleDrafter
from flowspec.models.eagle import decoder_layer, load_eagle
from flowspec.models.families import check_config
from flowspec.models.manifest import Manifest
from flowspec.models.stage import Head, Sequence, load_head
from flowspec.runtime import driver
from flowspec.runtime.drafting import DraftThread
from flowspec.runtime.tracing import Log
from flowspec.runtime.worker import Worker
from flowspec.sampling import NoiseRows

PROMPT = (5, 6, 7, 8)
HIDDEN = 48


def load(folder, pair, **changes):
    manifest = dataclasses.replace(Manifest.load(pair.split(1)), **changes)
    head = load_head(manifest, 0, torch.float32, "cpu")
    return load_eagle(folder, manifest, head, torch.float32, "cpu"), head


@pytest.fixture(scope="module")
def eagle(pair):
    return load(pair.head, pair)


@pytest.fixture
def head(pair, tmp_path):
    """A copy of the head: its folder, free to be changed, and its tensors."""
    shutil.copytree(pair.head, tmp_path / "head")
    return tmp_path / "head", load_file(pair.head / "model.safetensors")


# ---- loading ---------------------------------------------------------------------------------------
def predicted(eagle, tokens, features):
    """What the head predicts at each of these tokens, [n, hidden], without a tree."""
    return Sequence(eagle.layer).prefill(eagle.rows(torch.tensor(tokens), features))


@torch.no_grad()
def by_transformers(pair, tensors, kind, tokens, features, norm=False):
    """The same by a whole model of one layer, as the papers' code builds it."""
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[kind].from_dict({**pair.model.config.to_dict(), "num_hidden_layers": 1})
    model = {"qwen2": Qwen2Model, "llama": LlamaModel}[kind](config).eval()
    model.norm = torch.nn.Identity()
    if not norm:
        model.layers[0].input_layernorm = torch.nn.Identity()
    own = {name: tensor for name, tensor in tensors.items() if name.startswith("layers.")}
    assert not model.load_state_dict(own, strict=False).unexpected_keys
    embedding = tensors.get("embed_tokens.weight", pair.model.model.embed_tokens.weight)
    rows = torch.cat([embedding[torch.tensor(tokens)], features], -1) @ tensors["fc.weight"].T + tensors.get("fc.bias", 0.0)
    return model(inputs_embeds=rows[None]).last_hidden_state[0]


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("variant", ["bare", "whole", "qwen"])
def test_a_published_head_computes_what_it_did_where_it_was_trained(pair, head, file, variant):
    folder, tensors = head
    torch.manual_seed(3)
    if variant == "whole":  # its own embedding, a bias in fc, and a norm that published heads lack
        more = {"embed_tokens.weight": (320, HIDDEN), "fc.bias": (HIDDEN,), "layers.0.input_layernorm.weight": (HIDDEN,)}
        tensors |= {name: torch.randn(shape) for name, shape in more.items()}
    if variant == "qwen":  # its config.json says llama
        tensors |= {f"layers.0.self_attn.{k}_proj.bias": torch.randn(n) for k, n in (("q", HIDDEN), ("k", 24), ("v", 24))}
    (folder / "model.safetensors").unlink()
    if file.endswith("bin"):
        torch.save(tensors | {"layers.0.self_attn.rotary_emb.steps": torch.arange(6)}, folder / file)
    else:
        save_file(tensors, folder / file)
    loaded, _ = load(folder, pair)
    tokens, features = [3, 1, 4, 1, 5, 9], torch.randn(6, HIDDEN)
    kind = "qwen2" if variant == "qwen" else "llama"
    want = by_transformers(pair, tensors, kind, tokens, features, norm=variant == "whole")
    torch.testing.assert_close(predicted(loaded, tokens, features), want, rtol=1e-4, atol=1e-4)


# hidden, intermediate, heads, key/value heads (None: not in the file), vocabulary, extra: Vicuna 7B and Llama 3 8B as in the configurations
# that the EAGLE repository trains with, the others by the sizes of their targets
PUBLISHED = {
    "Vicuna 7B": (4096, 11008, 32, None, 32000, {}),
    "Vicuna 13B": (5120, 13824, 40, None, 32000, {}),
    "Llama 3 8B": (4096, 14336, 32, 8, 128256, {"rope_theta": 500000.0, "bias": False}),
    "Llama 3 70B": (8192, 28672, 64, 8, 128256, {"rope_theta": 500000.0, "bias": False}),
    "Qwen 2 7B": (3584, 18944, 28, 4, 152064, {"rope_theta": 1000000.0, "qkv_bias": True}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_and_shapes_of_published_heads_fit(name):
    """Without weights: tensors on torch's meta device have shapes only."""
    hidden, wide, heads, groups, vocabulary, more = PUBLISHED[name]
    config = dict(model_type="llama", hidden_size=hidden, intermediate_size=wide, num_attention_heads=heads, num_hidden_layers=1)
    config |= dict(vocab_size=vocabulary, max_position_embeddings=2048, rms_norm_eps=1e-5, **more)
    config |= {"num_key_value_heads": groups} if groups else {}
    check_config(config)
    narrow = hidden * (groups or heads) // heads
    shapes = {f"self_attn.{k}_proj": (n, hidden) for k, n in (("q", hidden), ("k", narrow), ("v", narrow), ("o", hidden))}
    shapes |= {"mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden), "mlp.down_proj": (hidden, wide)}
    shapes |= {"post_attention_layernorm": (hidden,)}
    tensors = {f"layers.0.{k}.weight": torch.empty(shape, device="meta") for k, shape in shapes.items()}
    biased = {"q": hidden, "k": narrow, "v": narrow} if "qkv_bias" in more else {}
    tensors |= {f"layers.0.self_attn.{k}_proj.bias": torch.empty(n, device="meta") for k, n in biased.items()}
    layer = decoder_layer(config, tensors, "meta", name)
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: t.shape for n, t in tensors.items()}


def test_half_precision_is_read_as_what_is_computed_with(pair, head):
    folder, tensors = head
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    loaded, _ = load(folder, pair)
    assert loaded.place(torch.zeros(1, HIDDEN, dtype=torch.float16)).dtype == torch.float32
    assert predicted(loaded, [1, 2], torch.randn(2, HIDDEN)).dtype == torch.float32


def test_a_tied_target_lends_its_lm_head(pair, head):
    loaded, lm_head = load(head[0], pair, tied=True)
    rows = loaded.rows(torch.tensor([7]), torch.zeros(1, HIDDEN))
    torch.testing.assert_close(rows[0], head[1]["fc.weight"][:, :HIDDEN] @ lm_head.weight[7])


def test_a_token_of_the_targets_padding_is_read_as_the_last_one(eagle):
    rows = eagle[0].rows(torch.tensor([319, 999]), torch.zeros(2, HIDDEN))
    torch.testing.assert_close(rows[0], rows[1])


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda t: t.pop("fc.weight"), "has no tensor fc.weight"),
        (lambda t: t.update({"fc.weight": torch.zeros(HIDDEN, 3 * HIDDEN)}), "fc.weight has shape"),
        (lambda t: t.update({"embed_tokens.weight": torch.zeros(9, HIDDEN)}), "embed_tokens.weight has shape"),
        (lambda t: t.pop("layers.0.mlp.up_proj.weight"), "1 tensors are missing, such as layers.0.mlp.up_proj.weight"),
    ],
)
def test_a_head_that_does_not_fit_is_refused_when_it_is_read(pair, head, change, message):
    folder, tensors = head
    change(tensors)
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=message):
        load(folder, pair)


def test_a_damaged_file_is_refused_when_it_is_read(pair, head):
    folder, _ = head
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(UserError, match=r"pytorch_model\.bin cannot be read as weights"):
        load(folder, pair)


def test_without_an_embedding_anywhere_it_says_what_to_copy(pair, head, tmp_path):
    manifest = Manifest.load(pair.split(1))
    shutil.copytree(manifest.root / "rank_00", tmp_path / "rank_00")
    alone = dataclasses.replace(manifest, root=tmp_path)
    with pytest.raises(UserError, match=r"has no embed_tokens.weight, so the target's is needed: copy .*rank_01"):
        load_eagle(head[0], alone, Head(torch.zeros(320, HIDDEN)), torch.float32, "cpu")


# ---- drafting --------------------------------------------------------------------------------------
def request(prompt=PROMPT, **sampling):
    return Request(id=1, prompt=prompt, sampling=Sampling(**sampling))


class Oracle:
    """What the drafter should know: which feature each row was made of, recomputed from scratch each time."""

    def __init__(self, eagle, prompt, features):
        self.eagle, self.head = eagle
        self.text = list(zip(prompt[1:-1], features[:-1], strict=True))  # committed tokens, each with the target's feature before it
        self.anchor = features[-1]
        self.given, self.made = {}, {}  # node -> the feature that its row was made of, the feature predicted there

    def logq(self, path):
        """After a path [(id, token), ...] from the root on; the drafter is asked for its last node now."""
        (*_, (parent, _), (id, _)) = [(None, None), *path]
        self.given[id] = self.anchor if parent is None else self.made[parent]
        tokens, before = zip(*self.text, *((token, self.given[node]) for node, token in path), strict=True)
        self.made[id] = predicted(self.eagle, tokens, torch.stack(before))[-1]
        return torch.log_softmax(self.head(self.made[id][None])[0], -1)

    def commit(self, tokens, features):
        self.text += list(zip(tokens, [self.anchor, *features[:-1]], strict=True))
        self.anchor = features[-1]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prompt,compact", [(PROMPT, 64), ((9, 4), -1)])
def test_an_incremental_tree_proposes_what_a_fresh_forward_with_the_same_features_would(eagle, monkeypatch, seed, prompt, compact):
    """Random growth and commits: deep hits, misses, several commits without a draft in between; dead rows left or gathered at once."""
    monkeypatch.setattr(StageState, "COMPACT", compact)
    r, drafter = random.Random(seed), EagleDrafter(*eagle)
    torch.manual_seed(seed)
    features = torch.randn(len(prompt) - 1, HIDDEN)
    drafter.begin(request(prompt), None, features)
    oracle = Oracle(eagle, prompt, features)
    anchor, next_id = -1, 1
    paths, asked = {0: [(0, prompt[-1])]}, set()  # node -> (id, token) of the nodes from the root to it
    for _ in range(25):
        if r.random() < 0.6:
            waiting = [i for i in paths if i not in asked]
            batch = r.sample(waiting, min(len(waiting), r.randint(1, 4)))
            answer = drafter.propose([DraftNode(i, ([(anchor, 0)] + paths[i])[-2][0], paths[i][-1][1]) for i in batch])
            for i in batch:
                proposal, want = answer.proposal(i), oracle.logq(paths[i])
                np.testing.assert_allclose(proposal.z[:, 0], want[proposal.tokens].double().numpy(), atol=2e-4)
                assert proposal.tokens[0] == int(want.argmax())
                asked.add(i)
                for token in proposal.tokens[: r.randint(1, 3)].tolist():
                    paths[next_id] = [*paths[i], (next_id, token)]
                    next_id += 1
        else:
            *path, last = paths[r.choice(list(paths))]
            hit = bool(path) and r.random() < 0.6
            path = path if hit else [*path, last]
            root = last if hit else (next_id, r.randrange(300))
            next_id += not hit
            known = torch.randn(len(path), HIDDEN)
            tokens = [token for _, token in [*path[1:], root]]
            drafter.commit(Commit(tuple(i for i, _ in path), tuple(tokens), (False,) * len(path), root[0]), known)
            oracle.commit([token for _, token in path], known)
            anchor = path[-1][0]
            kept = {i: p[len(path) :] for i, p in paths.items() if root in p}
            paths = kept or {root[0]: [root]}
    assert drafter._sequence.cache.length == drafter._sequence.state.length


def test_rows_of_text_are_made_of_the_targets_features_once_they_are_known(eagle, monkeypatch):
    """After a commit, drafting from a new root is the same as reading the whole text as a prompt, in chunks."""
    monkeypatch.setattr("flowspec.draft.eagle.PREFILL_ROWS", 2)
    features = torch.randn(6, HIDDEN)
    grown, fresh = EagleDrafter(*eagle), EagleDrafter(*eagle)
    grown.begin(request(), None, features[:3])
    for nodes in ([DraftNode(0, -1, 8)], [DraftNode(1, 0, 20)], [DraftNode(2, 1, 21)]):
        grown.propose(nodes)
    grown.commit(Commit((0, 1, 2), (20, 21, 30), (True, True, False), 9), features[3:])
    fresh.begin(request((*PROMPT, 20, 21, 30)), None, features)
    a, b = grown.propose([DraftNode(9, 2, 30)]), fresh.propose([DraftNode(0, -1, 30)])
    np.testing.assert_allclose(a.z, b.z, atol=1e-5)
    assert a.tokens.tolist() == b.tokens.tolist()


def test_a_node_that_is_asked_again_is_drafted_from_anew(eagle):
    """After a hit the new root's row is made of a guess; asked again, it and what is asked below it are as if read afresh."""
    features = torch.randn(4, HIDDEN)
    grown, fresh = EagleDrafter(*eagle), EagleDrafter(*eagle)
    grown.begin(request(), None, features[:3])
    for nodes in ([DraftNode(0, -1, 8)], [DraftNode(1, 0, 20)], [DraftNode(2, 1, 21), DraftNode(3, 1, 22)]):
        stale = grown.propose(nodes)
    grown.commit(Commit((0,), (20,), (True,), 1), features[3:])
    fresh.begin(request((*PROMPT, 20)), None, features)
    for again, first in (([DraftNode(1, 0, 20)], [DraftNode(0, -1, 20)]), ([DraftNode(2, 1, 21)], [DraftNode(1, 0, 21)])):
        a, b = grown.propose(again), fresh.propose(first)
        np.testing.assert_allclose(a.z, b.z, atol=1e-5)
    assert abs(stale.z[0] - a.z[0]).max() > 1e-4


@pytest.mark.parametrize("prompt", [PROMPT, (9, 4), (9,)])
def test_candidates_are_ranked_with_the_noise_of_their_own_position(eagle, monkeypatch, prompt):
    monkeypatch.setattr("flowspec.draft.base.KEPT", 320)
    noise = NoiseRows(3, 320)
    features = torch.randn(len(prompt) - 1, HIDDEN) if len(prompt) > 1 else None
    known = torch.randn(1, HIDDEN)
    said = []
    for coupled in (noise, None):
        drafter = EagleDrafter(*eagle)
        drafter.begin(request(prompt, temperature=1.0, seed=3), coupled, features)
        answers = [drafter.propose([DraftNode(0, -1, prompt[-1])])]
        drafter.commit(Commit((0,), (11,), (False,), 5), known)
        answers.append(drafter.propose([DraftNode(5, 0, 11)]))
        said.append([answer.z[0, answer.tokens[0].argsort(), 0] for answer in answers])
        assert all(answer.coupled == (coupled is noise) and (np.diff(answer.z[0, :, 0]) <= 0).all() for answer in answers)
    for k, (z, logq) in enumerate(zip(*said, strict=True)):
        np.testing.assert_allclose(z - logq, noise(len(prompt) + k).numpy(), atol=1e-5)


def test_a_node_whose_branch_died_gets_no_proposal(eagle):
    drafter = EagleDrafter(*eagle)
    drafter.begin(request(), None, torch.randn(3, HIDDEN))
    drafter.propose([DraftNode(0, -1, 8)])
    drafter.commit(Commit((0,), (9,), (False,), 5), torch.randn(1, HIDDEN))
    assert drafter.propose([DraftNode(1, 0, 30)]).nodes == ()
    assert drafter.propose([DraftNode(1, 0, 30), DraftNode(5, 0, 9)]).nodes == (5,)


class Noting:
    """A drafter that notes what it is told."""

    def __init__(self, features):
        self.features, self.heard = features, []

    def begin(self, request, noise, features=None):
        self.heard.append(("begin", None if features is None else len(features)))

    def propose(self, nodes):
        self.heard.append(("propose", nodes[0].id))

    def commit(self, commit, features=None):
        self.heard.append(("commit", None if features is None else len(features)))


@pytest.mark.parametrize("wanted", [True, False])
def test_drafting_waits_for_the_prompts_features_if_it_reads_them(wanted):
    drafter = Noting(wanted)
    thread = DraftThread(drafter, Inbox())
    nodes, rows = (DraftNode(0, -1, 8),), torch.zeros(1, HIDDEN)
    thread.begin(request(), None, Log(False, 1))  # is cancelled before all of them are here
    if wanted:
        thread.draft(request(), Draft(nodes))
        thread.prompt_features(torch.zeros(2, HIDDEN))
        thread.begin(request(), None, Log(False, 1))
    thread.draft(request(), Draft(nodes))
    thread.commit(SimpleNamespace(), rows if wanted else None)
    if wanted:
        thread.prompt_features(torch.zeros(2, HIDDEN))
        assert drafter.heard == []
        thread.prompt_features(rows)
    thread._queue.put(None)
    thread._thread.join()
    assert drafter.heard == [("begin", 3 if wanted else None), ("propose", 0), ("commit", 1 if wanted else None)]


# ---- in the ring -----------------------------------------------------------------------------------
SAMPLED = [dict(temperature=0.8, top_p=0.9, seed=1), dict(temperature=1.2, top_k=20, min_p=0.02, seed=4)]


def text(engine, prompt, **settings):
    return [t.id for t in engine.generate(prompt, **settings)]


@pytest.mark.parametrize(
    "stages,verify_on", [(1, "last"), *(pytest.param(3, where, marks=pytest.mark.slow) for where in ("coordinator", "last"))]
)
def test_every_method_writes_the_targets_text(pair, stages, verify_on):
    words = [f"verify_on={verify_on}", "emulate={stage_ms: 10, draft_ms: 1}"]
    with Engine.from_config(pair.config(stages, None, "eagle"), words) as engine:
        accepted = dict.fromkeys(METHODS, 0)
        for prompt in ([5], [7, 8], list(range(40, 75))):
            want = pair.greedy(prompt, 16)
            for method in METHODS:
                assert text(engine, prompt, method=method, max_new_tokens=16) == want
                accepted[method] += engine._running.result.accepted_tokens
        assert accepted.pop("ar") == 0 and min(accepted.values()) > 3
        for settings in SAMPLED:
            texts = [text(engine, [7, 8, 9], method=method, max_new_tokens=16, **settings) for method in METHODS]
            assert texts == texts[:1] * len(METHODS)


def wait_for_the_drafter(engine):
    done = threading.Event()
    engine._draft._queue.put(done.set)
    assert done.wait(60)


@pytest.mark.parametrize("verify_on", ["coordinator", "last"])
def test_the_features_at_commits_are_the_targets_own(pair, monkeypatch, verify_on):
    """Whatever came back when, the drafter gets for each token of the text what transformers computes there."""
    got = []

    def noted(self, commit, features=None, told=EagleDrafter.commit):
        got.append(features)
        told(self, commit, features)

    def began(self, request, noise, features=None, told=EagleDrafter.begin):
        got[:] = [features]
        told(self, request, noise, features)

    monkeypatch.setattr(EagleDrafter, "commit", noted)
    monkeypatch.setattr(EagleDrafter, "begin", began)
    monkeypatch.setattr(driver, "PREFILL_ROWS", 4)
    prompt = list(range(40, 50))
    with Engine.from_config(pair.config(3, None, "eagle"), [f"verify_on={verify_on}", "emulate.stage_ms=2"]) as engine:
        for method in METHODS:
            ids = text(engine, prompt, method=method, max_new_tokens=16)
            if method == "ar":
                assert got == []  # a tree of one node needs no drafter, and no features
                continue
            wait_for_the_drafter(engine)
            with torch.no_grad():
                want = pair.model.model(torch.tensor([prompt + ids[:-1]])).last_hidden_state[0]
            torch.testing.assert_close(torch.cat(got), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [True, False])
def test_only_a_drafter_that_reads_features_is_sent_any(pair, monkeypatch, features):
    sent = []
    monkeypatch.setattr(Worker, "_accepted", lambda self, live, nodes, choices, out: sent.append(out) or ([], out[:0]))
    monkeypatch.setattr(driver.Driver, "_features_of", lambda self, path: torch.zeros(len(path), HIDDEN))
    with Engine.from_config(pair.config(2, None, "eagle" if features else "lm")) as engine:
        text(engine, [5, 6, 7], max_new_tokens=6)
    assert bool(sent) == features


def test_a_generation_can_be_abandoned_before_its_prompt_is_read(pair):
    with Engine.from_config(pair.config(2, None, "eagle"), ["emulate.stage_ms=5"]) as engine:
        for n in (1, 2, 3):
            generation = engine.generate([5] * 40, max_new_tokens=8)
            for _ in range(n):
                next(generation)
            assert text(engine, [7, 8, 9], max_new_tokens=12) == pair.greedy([7, 8, 9], 12)
