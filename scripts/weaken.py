"""Make a draft model that agrees with a target as often as asked, for benchmarks with good and bad
drafters.

    python scripts/weaken.py --draft demo/draft --target demo/target --agree 0.3 --output build/weak
    python scripts/weaken.py --draft demo/target --target demo/target --agree 0.8 --vocab 32000
    --positions 16384 --output build/good

Agreement: how often the draft's first choice is the target's, at each token of the target's own
greedy continuations of the demo prompts. The draft's lm_head becomes a mixture of its own and of
noise of the same size, so that logits stay as large as they were and the draft as sure of itself;
how much noise is found by bisection. The output has a head of its own (untied); all else is the
draft's.

With --vocab it gets tokens that lose against all others, for a target that was inflated to that
vocabulary (scripts/inflate.py), with
--positions room for longer texts. New tokens need a place of the stream that is always the same:
  the stream becomes PLACES wider,
and norms are scaled by what that adds to their width. (inflate.py keeps the function exactly and
doubles the stream for it; a draft model may differ in the last digits, and should stay small.)
"""

from __future__ import annotations

import copy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec.errors import UserError, need
from flowspec.files import ROOT
from flowspec.models.split import COORDINATOR_FILES, Source, read_bytes, staged_folder
from flowspec.output import Parser, command
from flowspec.preflight import read_prompts
from flowspec.text import check_same_tokens, load_tokenizer

PROMPTS, NEW_TOKENS = 16, 48
STEPS = 24
CLOSE = 0.01
"""An agreement so near the wanted one will do."""
PLACES = 32
"""A stream with room for a constant is wider by this: one place is the constant, the others keep
whole vectors (zeros)."""
CONSTANT = 1e-3
"""The constant is this share of the embedding's size."""
LOST = 30.0
"""New tokens lie at least this many logits below 0."""


@torch.inference_mode()
def seen(draft, target, prompts: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Return the draft's features before every token of the target's continuations [n, hidden], and
    the tokens [n]."""
    features, chosen = [], []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        text = target.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False
        )
        features.append(draft.model(text[:, :-1]).last_hidden_state[0, len(prompt) - 1 :])
        chosen.append(text[0, len(prompt) :])
    return torch.cat(features), torch.cat(chosen)


def mixed(head: Tensor, noise: float) -> Tensor:
    """Return a head [vocabulary, hidden] of which `noise` (0 to 1) is noise; it is always the same
    one."""
    other = torch.randn(head.shape, generator=torch.Generator().manual_seed(1)) * head.std()
    return (1 - noise) * head + noise * other


@torch.inference_mode()
def rms(model, prompts: list[list[int]]) -> float:
    """Return the largest root mean square of what enters the final norm at the tokens of the
    prompts, twice over to be safe."""
    seen: list[float] = []
    hook = model.model.norm.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].square().mean(-1).sqrt().max().item())
    )
    for prompt in prompts:
        model(torch.tensor([prompt]))
    hook.remove()
    return 2 * max(seen)


def agreement(head: Tensor, features: Tensor, chosen: Tensor) -> float:
    return (features @ head.T).argmax(-1).eq(chosen).float().mean().item()


def weakened(head: Tensor, features: Tensor, chosen: Tensor, wanted: float) -> tuple[Tensor, float]:
    """Return the head that agrees so often, and how often it really does.

    Raise UserError if the draft is no better itself."""
    own = agreement(head, features, chosen)
    if own < wanted - CLOSE:
        raise UserError(f"--agree {wanted:g}: the draft agrees at {own:.2f} as it is")
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        noise = (low + high) / 2
        found = agreement(mixed(head, noise), features, chosen)
        if abs(found - wanted) < CLOSE:
            return mixed(head, noise), found
        low, high = (noise, high) if found > wanted else (low, noise)
    return mixed(head, high), agreement(mixed(head, high), features, chosen)


@torch.inference_mode()
def with_room(small, vocabulary: int, positions: int, largest: float):
    """Return a Llama of the same function but for rounding, with more tokens and positions.

    `largest` is the rms of a stream before the final norm."""
    config = copy.deepcopy(small.config)
    width = config.hidden_size
    config.head_dim = config.head_dim or width // config.num_attention_heads
    config.hidden_size, config.vocab_size, config.max_position_embeddings = (
        width + PLACES,
        vocabulary,
        positions,
    )
    made = type(small)(config)
    constant = CONSTANT * small.model.embed_tokens.weight.abs().mean()
    scale = (width / (width + PLACES)) ** 0.5  # what wider norms divide by is smaller by that
    ours = dict(made.named_parameters())
    for name, tensor in small.named_parameters():
        target = ours[name]
        target.fill_(0.0)
        target[tuple(slice(n) for n in tensor.shape)] = tensor * (
            scale if "norm" in name else 1.0
        )  # a bias is a vector as well
    made.model.embed_tokens.weight[:, width] = constant
    made.model.norm.weight[width] = 1.0
    made.lm_head.weight[len(small.lm_head.weight) :, width] = -LOST * largest / constant
    return made.eval()


def weaken(
    draft: Path,
    target: Path,
    wanted: float,
    output: Path,
    vocabulary: int | None = None,
    positions: int | None = None,
) -> float:
    """Write the draft and return its agreement; raise UserError for bad input."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not 0 <= wanted <= 1:
        raise UserError(f"--agree is {wanted:g}: it must be between 0 and 1")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output} exists and is not an empty folder")
    for folder in (draft, target):
        Source.open(folder)  # a UserError for what is no checkpoint
    tokenizer = load_tokenizer(target)
    check_same_tokens(tokenizer, load_tokenizer(draft), f"--draft {draft}")
    small, large = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (draft, target)
    )
    prompts = [
        tokenizer.encode(prompt).ids
        for prompt in read_prompts(str(ROOT / "demo" / "prompts.jsonl"))[:PROMPTS]
    ]
    with torch.inference_mode():
        head, found = weakened(small.lm_head.weight.clone(), *seen(small, large, prompts), wanted)
    small.config.tie_word_embeddings = False
    small.lm_head.weight = torch.nn.Parameter(head.clone(), requires_grad=False)
    config = small.config
    if vocabulary or positions:
        need(
            config.model_type == "llama",
            f"{draft} is no Llama: it cannot be given more tokens or positions",
        )
        wider = vocabulary or config.vocab_size, positions or config.max_position_embeddings
        needed = config.vocab_size, config.max_position_embeddings
        need(
            all(n >= least for n, least in zip(wider, needed, strict=True)),
            f"--vocab and --positions: not below {needed}, the draft's",
        )
        small = with_room(small, *wider, largest=rms(small, prompts))
    with staged_folder(
        output.resolve(), sum(weight.nbytes for weight in small.parameters())
    ) as folder:
        small.save_pretrained(folder)
        for name in COORDINATOR_FILES:
            if (draft / name).is_file():
                (folder / name).write_bytes(read_bytes(draft / name))
    return found


@command
def main(argv: Sequence[str]) -> int:
    """Return the exit code: 0, 2 for bad input (one line on stderr), 130 if interrupted."""
    each = Parser(
        prog="weaken.py",
        description="Make a draft model that agrees with a target as often as asked.",
    )
    each.add_argument("--draft", required=True, type=Path, metavar="DIR")
    each.add_argument("--target", required=True, type=Path, metavar="DIR")
    each.add_argument(
        "--agree",
        required=True,
        type=float,
        metavar="RATE",
        help="0 to 1: first choice is the target's",
    )
    each.add_argument(
        "--vocab", type=int, metavar="N", help="tokens (default: the draft's); new ones never win"
    )
    each.add_argument(
        "--positions", type=int, metavar="N", help="the longest text (default: the draft's)"
    )
    each.add_argument("--output", required=True, type=Path, metavar="DIR")
    args = each.parse_args(argv)
    found = weaken(args.draft, args.target, args.agree, args.output, args.vocab, args.positions)
    print(f"{args.output}: agrees at {found:.3f}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a plain kill cleans up like Ctrl-C does
    sys.exit(main())
