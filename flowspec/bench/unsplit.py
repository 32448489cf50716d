"""The unsplit model as transformers computes it, as a rival of the ring.

`transformers` is `generate` alone, and `assisted` has the ring's draft model as its assistant. Both
have their defaults. `python -m flowspec.bench.unsplit MODEL DRAFT THREADS DTYPE` serves them; an
empty DRAFT means that there is none."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer

from flowspec.bench.rivals import Ask, serve
from flowspec.models.unsplit import load_unsplit


class Clock(BaseStreamer):
    """A clock notes when tokens come and how many; first of all comes the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.counts: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(value.numel())

    def end(self) -> None:
        """Nothing was held back."""


def answers(target: Any, draft: Any) -> Ask:
    """Return what answers by `generate` of these two models; `draft` may be None."""

    @torch.inference_mode()
    def answer(asked: dict) -> dict:
        prompt, clock = torch.tensor([asked["tokens"]]), Clock()
        options = {"attention_mask": torch.ones_like(prompt), "streamer": clock}
        if asked["side"] == "assisted":
            options["assistant_model"] = draft
        torch.manual_seed(asked["seed"])
        begun = time.perf_counter()
        out = target.generate(
            prompt, max_new_tokens=asked["new_tokens"], **options, **sampling(asked)
        )
        _, first, *_ = clock.times
        return {
            "token_ids": out[0, prompt.shape[1] :].tolist(),
            "prefill_seconds": first - begun,
            "decode_seconds": clock.times[-1] - first,
            "facts": {
                "target_forwards": len(clock.times) - 1,
                "tokens_of_first_forward": clock.counts[1],
            },
        }

    return answer


def sampling(asked: dict) -> dict[str, Any]:
    """Return the options of `generate` for these settings."""
    if asked["temperature"] == 0:
        return {"do_sample": False}
    filters = {"top_k": asked["top_k"], "top_p": asked["top_p"], "min_p": asked["min_p"] or None}
    return {"do_sample": True, "temperature": asked["temperature"], **filters}


def main(model: str, draft: str, threads: str, dtype: str) -> None:
    torch.set_num_threads(int(threads))
    target, helper = (
        load_unsplit(Path(path), dtype, option) if path else None
        for option, path in (("--reference", model), ("drafter.path", draft))
    )
    facts = {"transformers": transformers.__version__, "threads": torch.get_num_threads()}
    serve(answers(target, helper), facts)


if __name__ == "__main__":
    main(*sys.argv[1:])
