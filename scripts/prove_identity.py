"""Prove on the demo models that every method writes the same text: long, run by hand before a
release.

    python scripts/prove_identity.py                     # 20 prompts of 128 tokens; about 20
    minutes on two cores

For 1, 2, 3, 4 and 6 stages (uneven where that is possible), each drafter, and on each prompt
another tree (1 to 200 nodes), segment (1 to 64 rows) and set of policy switches, on stages and
links that take some (emulated) time: greedy text of every method against transformers' generate
(where weights are float32); sampled text (temperature 0.8, top-p 0.9, three seeds) of all methods
against each other. All ranks are threads of this process.

Beside it: --dtype and --device (anything but float32 on a CPU runs with `deterministic: true`, all
methods against each other),
--growth N (caches with N rows to spare, so that they grow in the midst of abandoned forwards),
  --context N (prompts begin with N tokens
of other text; a model with room for them is made by scripts/inflate.py --positions, for --model).
"""

import argparse
import dataclasses
import itertools
import random
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec import Engine
from flowspec.config import DTYPES
from flowspec.core.policies import METHODS, SERVED, SHARED
from flowspec.core.policy import SWITCHES, PolicyConfig, TreeConfig
from flowspec.files import ROOT
from flowspec.lossless import first_difference, tolerance_of
from flowspec.models.cache import RowCache
from flowspec.models.split import split
from flowspec.preflight import read_prompts

STAGES = {1: None, 2: "3,5", 3: "1,3,4", 4: None, 6: "1,2,1,1,2,1"}
LM, EAGLE = (
    f"{{kind: {kind}, path: {ROOT / 'demo' / folder}}}"
    for kind, folder in (("lm", "draft"), ("eagle", "eagle"))
)
DRAFTERS = {"lm": LM, "eagle": EAGLE, "ngram": "{kind: ngram}", "mixture": f"[{EAGLE}, {LM}]"}
TIMES = "{stage_ms: 3, token_ms: 0.05, draft_ms: 1, link_ms: 0.5}"
SPECULATIVE = [m for m in METHODS if m != "ar"]
LOOKAHEADS = (None, 1, 2, 5, 16)


def random_tree(draw: random.Random) -> TreeConfig:
    sizes = {
        "budget": [1, 2, 8, 40, 80, 200, None],
        "segment": [1, 2, 7, 16, 64, None],
        "top_k": [1, 4, 16, None],
        "depth": [1, 4, 8, None],
    }
    return TreeConfig(**{name: draw.choice(values) for name, values in sizes.items()})


def random_switches(draw: random.Random) -> PolicyConfig:
    return PolicyConfig(**{name: draw.random() < 0.7 for name in SWITCHES})


class Proof:
    """A proof counts texts that were compared, that are identical, that part at a tie, and that
    part otherwise."""

    def __init__(self) -> None:
        self.texts = self.tokens = self.ties = self.bugs = 0

    def compare(
        self, what: str, got: list[int], want: list[int], gaps: list[float], close: float
    ) -> None:
        """Compare two texts; rounding may choose where the gap is below `close`."""
        self.texts, self.tokens = self.texts + 1, self.tokens + len(want)
        at = first_difference(got, want)
        if at is None:
            return
        tie = at < len(gaps) and gaps[at] < close
        self.ties, self.bugs = self.ties + tie, self.bugs + (not tie)
        print(
            f"{'tie' if tie else 'BUG'}: {what} parts at new token {at}, top-2 gap "
            f"{gaps[at] if at < len(gaps) else None}",
            flush=True,
        )


def prove(
    engine: Engine,
    prompts: list[str],
    context: int,
    tokens: int,
    model,
    proof: Proof,
    draw: random.Random,
    where: str,
) -> None:
    other = engine.text.encode("\n\n".join(reversed(prompts)) * (1 + context // 40))
    for number, written in enumerate(prompts):
        prompt = (*other[number : number + context], *engine.text.encode(written))
        engine.config = dataclasses.replace(
            engine.config,
            tree=random_tree(draw),
            policy=random_switches(draw),
            dsi=dataclasses.replace(engine.config.dsi, lookahead=draw.choice(LOOKAHEADS)),
        )
        close = tolerance_of(engine)
        settings = engine.config.tree, engine.config.policy, engine.config.dsi
        about = f"{where} prompt {number} {settings}"
        sampled = (
            [{"temperature": 0.8, "top_p": 0.9, "seed": s} for s in (1, 2, 3)]
            if number % 4 == 0
            else []
        )
        for setting in [{"temperature": 0.0}, *sampled]:
            plain = list(engine.generate(prompt, method="ar", max_new_tokens=tokens, **setting))
            want, gaps = [t.id for t in plain], [t.gap for t in plain]
            if model is not None and setting["temperature"] == 0:
                proof.compare(
                    f"{about} transformers", generate(model, prompt, tokens), want, gaps, close
                )
            shared = SHARED if engine.topology.members > 1 else ()
            for method in (*SPECULATIVE, *SERVED, *shared):
                got = [
                    t.id
                    for t in engine.generate(
                        prompt, method=method, max_new_tokens=tokens, **setting
                    )
                ]
                proof.compare(f"{about} {method} {setting}", got, want, gaps, close)


@torch.inference_mode()
def generate(model, prompt: tuple[int, ...], tokens: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
    )
    return out[0, len(prompt) :].tolist()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--stages", type=int, nargs="*", default=list(STAGES))
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of each stage")
    parser.add_argument("--servers", type=int, default=1, help="targets, each with all stages")
    parser.add_argument("--seed", type=int, default=0, help="of the trees")
    parser.add_argument(
        "--model",
        type=Path,
        default=ROOT / "demo" / "target",
        help="one of the demo target's function and hidden size",
    )
    parser.add_argument("--dtype", choices=DTYPES[1:], default="float32")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="of all stages and of the drafter"
    )
    parser.add_argument(
        "--growth", type=int, help="rows by which caches grow (default: as in production)"
    )
    parser.add_argument("--context", type=int, default=0, help="tokens before each prompt")
    args = parser.parse_args()
    if args.growth is not None:
        RowCache.STEP, RowCache.SHARE = args.growth, 0.0
    prompts = read_prompts(str(ROOT / "demo" / "prompts.jsonl"))[: args.prompts]
    whole = args.dtype == "float32" and args.device == "cpu"
    model = (
        AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
        if whole
        else None
    )
    settings = (
        f"emulate: {TIMES}\nthreads: 1\ndevice: {args.device}\ndtype: "
        f"{args.dtype}\ndeterministic: {'false' if whole else 'true'}\n"
    )
    proof, draw = Proof(), random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        for stages, (drafter, kind) in itertools.product(args.stages, DRAFTERS.items()):
            begun, out, config = (
                time.monotonic(),
                Path(folder) / f"s{stages}",
                Path(folder) / "config.yaml",
            )
            if not out.exists():
                members = args.tensor_parallel
                split(str(args.model), stages, out, members=members, layers=STAGES[stages])
            servers = f"dsi: {{servers: {args.servers}}}"
            config.write_text(f"stages: {out}\ndrafter: {kind}\n{servers}\n{settings}")
            with Engine.from_config(config) as engine:
                prove(
                    engine,
                    prompts,
                    args.context,
                    args.tokens,
                    model,
                    proof,
                    draw,
                    f"S={stages} {drafter}",
                )
            print(
                f"S={stages} {drafter}: {proof.texts} texts so far, {proof.bugs} bugs, "
                f"{time.monotonic() - begun:.0f} s",
                flush=True,
            )
    same = proof.texts - proof.ties - proof.bugs
    over = f"{args.dtype}, {args.servers} servers, {args.tensor_parallel} ranks a stage"
    print(
        f"{proof.texts} texts, {proof.tokens} tokens ({over}, tree seed {args.seed}): {same} "
        f"identical, {proof.ties} parted at a tie, {proof.bugs} bugs"
    )
    return 1 if proof.bugs else 0


if __name__ == "__main__":
    sys.exit(main())
