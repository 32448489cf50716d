"""On a GPU: what the CPU computes, transformers' text, ranks that share it. Everything here is left out where there is none."""

import copy

import pytest
import torch

from flowspec import Engine
from flowspec.core.messages import Prune
from flowspec.core.policies import METHODS
from flowspec.core.stage import StageState
from flowspec.lossless import tolerance
from flowspec.models.device import on_host, placed
from flowspec.models.manifest import Manifest
from flowspec.models.stage import load_head, load_stage
from tests.dist.conftest import Command
from tests.stages import Hand

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
PROMPT = "def add(a, b):\n    return"
A_WHILE = 50_000_000
"""GPU cycles: long enough that a host that does not wait is far ahead"""


def test_what_comes_to_the_host_is_computed_and_what_leaves_it_may_be_overwritten():
    numbers = torch.arange(100_000)
    torch.cuda._sleep(A_WHILE)
    there = placed(numbers, torch.device("cuda"))
    numbers.zero_()
    assert torch.equal(on_host(there + 1), torch.arange(1, 100_001))


def logits(pair, device: str, dtype: torch.dtype) -> torch.Tensor:
    """After a prompt, a tree of which one branch is taken out, and a node behind it, through two stages: [5, vocabulary]."""
    manifest = Manifest.load(pair.split(2))
    sequences = [Hand(load_stage(manifest, rank, dtype, device), to_host=True) for rank in (1, 2)]
    head, found = load_head(manifest, 2, dtype, device), []
    for tokens, ids, parents in [
        ([5, 6, 7], [], []),
        ([8, 9, 10, 11], [0, 1, 2, 3], [-1, 0, 0, 2]),
        ([12], [4], [3]),
    ]:
        rows = torch.tensor(tokens)
        for sequence in sequences:
            rows = sequence.verify(ids, parents, rows)[2] if ids else sequence.prefill(rows)
            assert rows.device.type == "cpu"
            if ids == [0, 1, 2, 3]:
                sequence.prune(Prune(1, 0, 2))
        found += [head(rows)] if ids else []
    return torch.cat(found).float().cpu()


@pytest.mark.parametrize(
    "dtype,tolerance",
    [(torch.float32, 1e-3), (torch.float16, 5e-2), (torch.bfloat16, 3e-1)],
    ids=str,
)
def test_stages_on_a_gpu_compute_what_they_do_on_a_cpu(pair, monkeypatch, dtype, tolerance):
    monkeypatch.setattr(StageState, "COMPACT", -1)
    torch.testing.assert_close(
        logits(pair, "cuda", dtype),
        logits(pair, "cpu", torch.float32),
        rtol=tolerance,
        atol=tolerance,
    )


@torch.no_grad()
def by_transformers(pair, tokens, dtype: str) -> list[int]:
    model = copy.deepcopy(pair.model).to("cuda", getattr(torch, dtype))
    ids = torch.tensor([tokens], device="cuda")
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, pad_token_id=0
    )
    return out[0, len(tokens) :].tolist()


def assert_same_but_for_ties(tokens, want: list[int], dtype: str) -> None:
    """The same text, or one that parts where the two best were too close to call."""
    assert len(tokens) == len(want)
    parted = next((t for t, w in zip(tokens, want, strict=True) if t.id != w), None)
    assert parted is None or parted.gap < tolerance(dtype, 6, 48)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("drafter", ["lm", "eagle"])
@pytest.mark.parametrize("verify_on", ["last", "coordinator"])
def test_every_method_writes_transformers_greedy_text(pair, dtype, drafter, verify_on):
    words = [
        "device=cuda",
        f"dtype={dtype}",
        f"verify_on={verify_on}",
        "sampling.max_new_tokens=24",
    ]
    with Engine.from_config(pair.config(2, None, drafter), words) as engine:
        want = by_transformers(pair, engine.text.encode(PROMPT), dtype)
        for method in METHODS:
            assert_same_but_for_ties(list(engine.generate(PROMPT, method=method)), want, dtype)


def test_some_ranks_on_a_gpu_and_some_on_the_cpu(pair):
    with Engine.from_config(pair.config(2), ["device=[cpu, cuda, cpu]", "dtype=float32"]) as engine:
        tokens = engine.text.encode(PROMPT)
        assert_same_but_for_ties(list(engine.generate(tokens)), pair.greedy(tokens, 40), "float32")


def test_ranks_of_a_run_share_a_gpu(pair, tmp_path):
    with Engine.from_config(pair.config(1), ["device=cuda:0", "dtype=float32"]) as engine:
        generation = engine.generate(PROMPT)
        list(generation)
    with Command(
        tmp_path, pair.config(1), "--prompt", PROMPT, "device=cuda:0", "dtype=float32"
    ) as run:
        assert run.end() == 0, run.err
        assert run.out == f"{PROMPT}{generation.result.text}\n"
