"""Train the demo models: a byte-level BPE tokenizer, a small Llama target and a draft distilled
from it.

    python scripts/train_demo.py --out demo                 # everything, about two hours on two
    cores
    python scripts/train_demo.py --out demo --only draft    # one step again: tokenizer, target,
    draft or card

The text is the Python standard library's own sources as installed beside the interpreter; nothing
of it is stored. One file in twenty is held out for validation. The draft learns the target's
distributions (cross entropy against its soft outputs), because how often the two agree is what
speculation lives on. Every step writes beside and renames, so an interrupted run keeps the last
save.
"""

import argparse
import hashlib
import json
import math
import os
import platform
import shutil
import sysconfig
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

END = "<|endoftext|>"
VOCAB = 4096
CONTEXT = 512
SHAPES = {
    "target": dict(hidden_size=256, num_hidden_layers=8, intermediate_size=704, num_attention_heads=8, num_key_value_heads=4),
    "draft": dict(hidden_size=128, num_hidden_layers=2, intermediate_size=384, num_attention_heads=4, num_key_value_heads=4),
}  # fmt: skip


# ---- text ----------------------------------------------------------------------------------------
def sources() -> tuple[list[str], list[str]]:
    """Return (training files, held-out files): every .py of the standard library but tables and
    other people's packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "encodings", "pydoc_data", "data", "__pycache__"}
    train, held = [], []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if skip & set(name.parts) or not 200 < path.stat().st_size < 400_000:
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore")
        (held if hashlib.sha256(str(name).encode()).digest()[0] % 20 == 0 else train).append(text)
    return train, held


def tokens_of(
    tokenizer: Tokenizer, files: list[str], seed: int, mark: int | None = None
) -> torch.Tensor:
    """Return all files, in random order, as one row of tokens.

    `mark` stands before each; None means END, or nothing where that is unknown."""
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    mark = tokenizer.token_to_id(END) if mark is None else mark
    out: list[int] = []
    for encoding in tokenizer.encode_batch([files[k] for k in order], add_special_tokens=False):
        out += [*([] if mark is None else [mark]), *encoding.ids]
    return torch.tensor(out, dtype=torch.long)


def train_tokenizer(out: Path, files: list[str]) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        files,
        trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=[END], initial_alphabet=alphabet),
    )
    for role in SHAPES:
        (out / role).mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / role / "tokenizer.json"))
        settings = dict(
            tokenizer_class="PreTrainedTokenizerFast", eos_token=END, model_max_length=2 * CONTEXT
        )
        (out / role / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


# ---- optimiser -----------------------------------------------------------------------------------
class Muon(torch.optim.Optimizer):
    """Muon is momentum whose update is orthogonalised by five Newton-Schulz steps (Jordan et al.
    2024).

    torch's own Muon works in bfloat16, which CPUs without AMX run 70 times slower than float32."""

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.02):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                m = state.setdefault("m", torch.zeros_like(p))
                m.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(m, group["momentum"])  # Nesterov
                x = x.T if x.shape[0] > x.shape[1] else x
                x = x / (x.norm() + 1e-7)
                for _ in range(5):
                    a = x @ x.T
                    x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
                x = x.T if p.shape[0] > p.shape[1] else x
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(
                    x, alpha=-0.2 * group["lr"] * math.sqrt(max(p.shape))
                )  # update RMS 0.2, as AdamW's


# ---- training ------------------------------------------------------------------------------------
def new_model(role: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    common = dict(
        vocab_size=VOCAB,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
    )
    ends = dict(bos_token_id=0, eos_token_id=0, pad_token_id=0)
    return LlamaForCausalLM(LlamaConfig(**SHAPES[role], **common, **ends))


def save(model: LlamaForCausalLM, folder: Path) -> None:
    """Save the model as float16 safetensors, written beside and renamed file by file."""
    beside = folder.with_name(folder.name + ".new")
    half = {k: v.half() for k, v in model.state_dict().items()}
    twin = LlamaForCausalLM(model.config).half()
    twin.load_state_dict(half)
    twin.save_pretrained(beside)
    folder.mkdir(parents=True, exist_ok=True)
    for file in beside.iterdir():
        os.replace(file, folder / file.name)
    shutil.rmtree(beside)


def load(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(
    role: str, out: Path, data: torch.Tensor, held: torch.Tensor, steps: int, batch: int, lr: float
) -> None:
    model, teacher = new_model(role), load(out / "target").eval() if role == "draft" else None
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "layers" in n]
    others = [p for n, p in model.named_parameters() if not (p.ndim == 2 and "layers" in n)]
    optims = [
        Muon(matrices, lr=lr),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    draw = torch.Generator().manual_seed(1)
    rows = len(data) // CONTEXT
    order = torch.cat(
        [torch.randperm(rows - 1, generator=draw) for _ in range(steps * batch // (rows - 1) + 1)]
    )
    begun, mean = time.time(), None
    for step in range(steps):
        start = (order[step * batch : (step + 1) * batch] * CONTEXT).tolist()
        ids = torch.stack([data[s : s + CONTEXT + 1] for s in start])
        loss = loss_of(model, teacher, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scale = min(1.0, (step + 1) / 100) * min(1.0, 1.5 * (1 - step / steps) + 0.02)
        for optim in optims:
            for group in optim.param_groups:
                group["lr"] = lr * scale
            optim.step()
            optim.zero_grad(set_to_none=True)
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            spent = time.time() - begun
            rate = (step + 1) * batch * CONTEXT / spent
            print(
                f"{role} step {step + 1}/{steps} loss {mean:.3f} {rate:.0f} tok/s "
                f"{spent / 60:.1f} min",
                flush=True,
            )
        if (step + 1) % 1000 == 0 or step + 1 == steps:
            save(model, out / role)
    note(
        out,
        role,
        steps=steps,
        tokens=steps * batch * CONTEXT,
        minutes=round((time.time() - begun) / 60, 1),
    )


def loss_of(model, teacher, ids: torch.Tensor) -> torch.Tensor:
    logits = model(ids[:, :-1], use_cache=False).logits.flatten(0, 1)
    if teacher is None:
        return F.cross_entropy(logits, ids[:, 1:].flatten())
    with torch.no_grad():
        soft = teacher(ids[:, :-1], use_cache=False).logits.flatten(0, 1).softmax(-1)
    return F.cross_entropy(logits, soft)


# ---- the card ------------------------------------------------------------------------------------
def note(out: Path, role: str, **facts) -> None:
    path = out / "training.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**known, role: {**known.get(role, {}), **facts}}, indent=1) + "\n")


@torch.no_grad()
def measure(out: Path, held: torch.Tensor, rows: int = 120) -> dict:
    """Return the validation loss (nats a token) of both, and how often the draft's first choice is
    the target's, on held-out text."""
    target, draft = load(out / "target").eval(), load(out / "draft").eval()
    total = dict(target=0.0, draft=0.0, agree=0, right=0, count=0)
    starts = torch.linspace(0, len(held) - CONTEXT - 2, rows).long().tolist()
    for s in starts:
        ids = held[s : s + CONTEXT + 1][None]
        t, d = (m(ids[:, :-1], use_cache=False).logits[0] for m in (target, draft))
        y = ids[0, 1:]
        total["target"] += F.cross_entropy(t, y, reduction="sum").item()
        total["draft"] += F.cross_entropy(d, y, reduction="sum").item()
        total["agree"] += (t.argmax(-1) == d.argmax(-1)).sum().item()
        total["right"] += (t.argmax(-1) == y).sum().item()
        total["count"] += len(y)
    n = total["count"]
    return dict(positions=n, target_loss=round(total["target"] / n, 3), draft_loss=round(total["draft"] / n, 3),
                first_choice_agreement=round(total["agree"] / n, 4), target_accuracy=round(total["right"] / n, 4))  # fmt: skip


def about_head(folder: Path) -> list[str]:
    """Return the card's lines on the EAGLE head, which scripts/train_eagle.py makes and measures.

    There are none without a head."""
    if not folder.exists():
        return []
    facts = json.loads((folder / "training.json").read_text())
    held, size = (
        facts["held_out"],
        sum(tensor.numel() for tensor in load_file(folder / "model.safetensors").values()),
    )
    return [
        f"- EAGLE head: {size:,} parameters (a layer of the target's width; it uses the target's "
        "embedding and lm_head),",
        f"  {facts['steps']} steps, {facts['tokens']:,} tokens, {facts['minutes']} minutes on "
        "two shared cores. Held out: its first choice",
        f"  is the target's at **{held['first_choice_agreement']:.1%}** of positions, one of its "
        f"best four at {held['in_top_4']:.1%},",
        "  and one level deeper, on a feature that it guessed itself, the first again at "
        f"{held['first_choice_one_deeper']:.1%}.",
        "  Its config.json names the target by a hash of the embedding.",
    ]


def write_card(out: Path, files: list[str], data: torch.Tensor, held: torch.Tensor) -> None:
    facts = measure(out, held)
    note(out, "validation", **facts)
    known = json.loads((out / "training.json").read_text())
    params = {role: sum(p.numel() for p in load(out / role).parameters()) for role in SHAPES}
    size = sum(f.stat().st_size for f in out.rglob("*") if f.is_file()) / 1e6
    lines = [
        "# The demo models",
        "",
        "A Llama-shaped target, a draft model a fraction of its size and an EAGLE head, small "
        "enough to ship. Both write",
        "Python-like text; neither knows anything else, and neither is meant for more than "
        "showing and testing",
        "flowspec without a download.",
        "",
        f"- Text: the sources of the Python {platform.python_version()} standard library as "
        f"installed ({len(files)} files,",
        f"  {len(data):,} tokens; {len(held):,} more held out, one file in twenty by the hash of "
        "its name). None of it is stored here.",
        f"- Tokenizer: byte-level BPE, {VOCAB} entries, one special token `{END}` (start and end "
        "of a text).",
    ]
    for role in SHAPES:
        t, shape = known[role], SHAPES[role]
        how = (
            "next-token loss"
            if role == "target"
            else "cross entropy against the target's distributions"
        )
        size_of = (
            f"{params[role]:,} parameters ({shape['num_hidden_layers']} layers, width "
            f"{shape['hidden_size']})"
        )
        lines.append(f"- {role.capitalize()}: {size_of}, {how},")
        lines.append(
            f"  {t['steps']} steps, {t['tokens']:,} tokens, {t['minutes']} minutes on two shared "
            "cores."
        )
    lines += [
        f"- Held out ({facts['positions']:,} positions): target loss {facts['target_loss']} nats "
        "a token, its first choice right at",
        f"  {facts['target_accuracy']:.1%}; draft loss {facts['draft_loss']}; the draft's first "
        "choice is the target's at",
        f"  **{facts['first_choice_agreement']:.1%}** of positions.",
        *about_head(out / "eagle"),
        f"- Files: safetensors in float16, {size:.1f} MB in all.",
        "",
        "Made by `python scripts/train_demo.py --out demo` (one run, one seed: no spread is "
        "known), the head by `python",
        "scripts/train_eagle.py --target demo/target --out demo/eagle --minutes 62 --lr 1e-2 "
        "--ce-weight 0.5 --bfloat16`. The figures",
        "are in `training.json`; `--only card` measures the first two models again.",
        "",
        "Licence: the weights are ours, Apache-2.0; the text they were trained on is under the "
        "PSF licence.",
    ]  # fmt: skip
    (out / "README.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--only", choices=["tokenizer", "target", "draft", "card"])
    parser.add_argument("--target-steps", type=int, default=4400)
    parser.add_argument("--draft-steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4, help=f"rows of {CONTEXT} tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    args = parser.parse_args()

    files, held_files = sources()
    if args.only in (None, "tokenizer"):
        train_tokenizer(args.out, files)
    tokenizer = Tokenizer.from_file(str(args.out / "target" / "tokenizer.json"))
    data, held = tokens_of(tokenizer, files, 0), tokens_of(tokenizer, held_files, 0)
    print(
        f"{len(files)} files, {len(data):,} tokens to learn from, {len(held):,} held out",
        flush=True,
    )
    for role, steps in (("target", args.target_steps), ("draft", args.draft_steps)):
        if args.only in (None, role):
            train(role, args.out, data, held, steps, args.batch, args.lr)
    if args.only in (None, "card"):
        write_card(args.out, files, data, held)


if __name__ == "__main__":
    main()
