"""A row's result, to the bit, whatever is drafted around it: in any batch, at any place of the cache, behind any dead rows."""

import random
import weakref

import pytest
import torch

from flowspec.core.messages import Prune
from flowspec.core.stage import StageState
from flowspec.models import jit
from flowspec.models.attention import Seen
from flowspec.models.stage import load_whole
from tests.runtime.test_families import make
from tests.stages import Hand

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@torch.inference_mode()
def plainly(model, head, prompt, text):
    """Logits after each token of the text, a row at a time."""
    sequence = Hand(model)
    sequence.prefill(torch.tensor(prompt))
    logits = []
    for k, token in enumerate(text):
        _, _, out = sequence.verify([k], [k - 1], torch.tensor([token]))
        logits.append(head(out)[0])
        sequence.prune(Prune(k + 1, k, k + 1))
    return logits


@torch.inference_mode()
def speculatively(model, head, prompt, text, random):
    """The same, the text's nodes in segments among others that die: children of any living node, in any number."""
    sequence, logits = Hand(model), []
    sequence.prefill(torch.tensor(prompt))
    version, new, done = 0, 0, 0  # nodes of the text are those whose id is in `path`
    path, sent = {}, []
    parent = -1
    while done < len(text):
        ids, parents, tokens = [], [], []
        length = min(random.randint(1, 5), len(text) - done)
        for k in range(done, done + length):
            while random.random() < 0.6 and (ids or sent):
                ids, parents, tokens = (
                    [*ids, new],
                    [*parents, random.choice([*ids, *sent])],
                    [*tokens, random.randrange(320)],
                )
                new += 1
            ids, parents, tokens = [*ids, new], [*parents, parent], [*tokens, text[k]]
            path[k], parent, new = new, new, new + 1
        kept, _, out = sequence.verify(ids, parents, torch.tensor(tokens))
        found = dict(zip((ids[k] for k in kept), head(out), strict=True))
        logits += [found[path[k]] for k in range(done, done + length)]
        done, sent = done + length, [*sent, *(ids[k] for k in kept)]
        if random.random() < 0.7:
            version += 1
            last = random.randint(max(0, done - 2), done - 1)
            anchor, root = path[last], path.get(last + 1, new)
            sequence.prune(Prune(version, anchor, root))
            sent = [i for i in sent if i in sequence.state.row]
            parent = path[done - 1]
    return logits


def test_what_a_forward_saw_is_forgotten_with_it():
    state = StageState()
    seen = Seen(state.extend(3).only(2), torch.device("cpu"))
    assert (
        seen.spans(None)[0].counts.tolist() == [3]
        and seen.unseen(None)[1].shape == (1, 3)
        and seen.order(None).tolist() == [0, 1, 2]
    )
    forgotten = weakref.ref(seen)
    del seen
    assert forgotten() is None


@pytest.mark.parametrize("native", [True, False], ids=["native", "transformers"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_drafted_around_a_token_changes_no_bit(small, dtype, native, monkeypatch):
    if native and not jit.available():
        pytest.skip("no llvmlite, or a processor without fused multiply-add")
    if not native and dtype == torch.int8:
        pytest.skip("int8 is native only")
    monkeypatch.setattr(jit, "available", lambda: native)
    monkeypatch.setattr(StageState, "COMPACT", 6)
    model, head = load_whole(small, dtype, "cpu")
    model.compute_alone()
    head.alone = True
    assert model.native is native
    check(model, head, 12)


def check(model, head, seeds):
    for seed in range(seeds):
        print("seed", seed)
        rng = random.Random(seed)
        prompt, text = ([rng.randrange(320) for _ in range(n)] for n in (rng.randint(1, 150), 24))
        for k, (a, b) in enumerate(
            zip(
                plainly(model, head, prompt, text),
                speculatively(model, head, prompt, text, rng),
                strict=True,
            )
        ):
            assert torch.equal(a, b), f"token {k}: {(a - b).abs().max():.1e} apart"


@pytest.mark.parametrize(
    "name", ["mistral native", "mistral", "gemma2", "gpt_oss", "bloom", "gpt2"]
)
def test_nor_does_it_where_rows_see_a_window_or_positions_are_not_rotary(
    name, tmp_path, monkeypatch
):
    monkeypatch.setattr(StageState, "COMPACT", 6)
    make(name, tmp_path / "model")
    model, head = load_whole(tmp_path / "model", torch.float32, "cpu")
    model.compute_alone()
    head.alone = True
    assert model.native is (name.endswith("native") and jit.available())
    check(model, head, 3)
