"""Train an EAGLE-1 head for a target: one decoder layer that guesses the target's next feature
(arXiv 2401.15077).

    python scripts/train_eagle.py --target demo/target --out demo/eagle --minutes 60
    python scripts/train_eagle.py --target DIR --out HEAD --text book.txt notes/ --steps 5000
    python scripts/train_eagle.py --target DIR --out HEAD --text notes/ --steps 5000 --on-policy 999

The target is any local checkpoint of a supported family; the text is any files or folders of .txt,
.md and .py, by default the Python standard library's own sources. A twentieth is held out. The loss
is the papers': smooth L1 between predicted and true features, plus a share of the cross entropy
between the distributions that the target's lm_head makes of them. In use, the features that go in
below the root are the head's own guesses: so they carry noise here, and with --levels above 1
guesses go in again, as many levels deep (110 steps for the demo target: first choice one level
deeper .15, .23, .25 with 1, 2, 3 levels; at the root .26, .26, .27). --levels 1 is the paper's
recipe. With --on-policy N it learns from N texts that the target writes first, going on from pieces
of the given text (--prompt-tokens), at --temperature, by the sampling of a run (keyed by --seed, so
--resume has the same texts written again). Where the target ends a text, another piece follows.
Whether that helps was not to be seen on the demo target after 250 steps (docs/measured.md).
Interrupt it at any time: what was learnt is kept in OUT (config.json and model.safetensors,
float16) and in OUT.state.pt, from which --resume goes on. config.json tells by a hash of the
target's embedding which target the head was made for, so that a run with another one refuses it.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from flowspec.core.request import Sampling
from flowspec.models.fingerprint import CARD, embedding_hash
from flowspec.models.weights import Checkpoint
from flowspec.sampling import noise_for, pick
from scripts.train_demo import Muon, sources, tokens_of

SUFFIXES = {".txt", ".md", ".py"}
SAVE_EVERY = 120.0  # seconds
TOGETHER = 32  # texts that the target writes in one batch
HELD_OUT = 16  # texts that it writes to be measured on


class Target:
    """A target is the frozen model whose features the head learns."""

    def __init__(self, folder: Path, device: str):
        self.model = (
            AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto" if device != "cpu" else torch.float32
            )
            .to(device)
            .eval()
        )
        self.config, self.device = self.model.config, device
        self.tied = bool(self.config.tie_word_embeddings)
        self.name = embedding_hash(Checkpoint(folder))

    @torch.no_grad()
    def features(self, ids: Tensor) -> Tensor:
        """Return the hidden rows behind the final norm, [batch, n, hidden], of tokens [batch,
        n]."""
        return self.model.base_model(ids, use_cache=False).last_hidden_state.float()

    def embedding(self, ids: Tensor) -> Tensor:
        return self.model.get_input_embeddings()(ids).float()

    def logits(self, features: Tensor) -> Tensor:
        return F.linear(features, self.model.get_output_embeddings().weight.float())

    @torch.no_grad()
    def write(self, piece: Callable[[], list[int]], n: int, samplings: list[Sampling]) -> Tensor:
        """Return a text of n tokens for each sampling, [texts, n].

        Each begins with a piece of tokens, and so does what follows on an end token."""
        ends, vocabulary = end_tokens(self.config), self.config.vocab_size
        noises = [noise_for(sampling, vocabulary) for sampling in samplings]
        given = [piece() for _ in samplings]
        texts = torch.empty(len(samplings), n, dtype=torch.long)
        cache, logits = None, torch.empty(len(samplings), vocabulary)
        for position in range(n):
            for k, sampling in enumerate(samplings):
                if given[k]:
                    texts[k, position] = given[k].pop(0)
                    continue
                token = pick(logits[k], sampling, noises[k], position).token
                texts[k, position] = token
                given[k] = piece() if token in ends else []
            rows = texts[:, position : position + 1].to(self.device)
            out = self.model(rows, past_key_values=cache, use_cache=True)
            cache, logits = out.past_key_values, out.logits[:, -1].float().cpu()
        return texts


class Eagle(nn.Module):
    """An Eagle is fc and a decoder layer like the target's, without the norm before attention.

    Its parts are named as those of published heads."""

    def __init__(self, config):
        super().__init__()
        hidden = config.hidden_size
        whole = AutoModel.from_config(
            type(config).from_dict(
                {**config.to_dict(), "num_hidden_layers": 1, "layer_types": None}
            )
        )
        whole.layers[0].input_layernorm = whole.norm = nn.Identity()
        whole.embed_tokens = None
        self.config, self.whole = whole.config, whole.float()
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)

    def forward(self, embedded: Tensor, features: Tensor) -> Tensor:
        """Return the features predicted at n tokens [batch, n, hidden], from their embeddings and
        the features before them."""
        return self.whole(
            inputs_embeds=self.fc(torch.cat([embedded, features], -1)), use_cache=False
        ).last_hidden_state

    def published(self) -> dict[str, Tensor]:
        """Return its weights by their published names."""
        return {name.removeprefix("whole."): tensor for name, tensor in self.state_dict().items()}


# ---- text ----------------------------------------------------------------------------------------
def texts(paths: list[Path]) -> tuple[list[str], list[str]]:
    """Return (texts to learn from, held-out texts).

    Held out is a file in twenty by the hash of its name, or of a few files the last twentieth of
    each."""
    if not paths:
        return sources()
    files = [
        file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])
    ]
    kept = {
        str(f): f.read_text(errors="ignore")
        for f in files
        if f.is_file() and (f in paths or f.suffix in SUFFIXES)
    }
    if len(kept) < 60:
        cuts = {name: len(text) - len(text) // 20 for name, text in kept.items()}
        return [text[: cuts[name]] for name, text in kept.items()], [
            text[cuts[name] :] for name, text in kept.items()
        ]
    held = {name for name in kept if hashlib.sha256(name.encode()).digest()[0] % 20 == 0}
    return [text for name, text in kept.items() if name not in held], [
        kept[name] for name in sorted(held)
    ]


def first_token(config) -> int | None:
    """Return what stands before each text: the first of the target's begin and end tokens that it
    has."""
    marks = [config.bos_token_id, config.eos_token_id]
    return next(
        (mark[0] if isinstance(mark, list) else mark for mark in marks if mark is not None), None
    )


def end_tokens(config) -> set[int]:
    """Return the target's end tokens."""
    ends = config.eos_token_id
    return set() if ends is None else set(ends) if isinstance(ends, list) else {ends}


def own_texts(target: Target, data: Tensor, numbers: range, args: argparse.Namespace) -> Tensor:
    """Return texts [.., --context] of these numbers, which the target writes.

    Each begins with a piece of `data` (tokens); its number and --seed are its key."""
    draw = torch.Generator().manual_seed(args.seed)

    def piece() -> list[int]:
        start = int(torch.randint(0, len(data) - args.prompt_tokens + 1, (), generator=draw))
        return data[start : start + args.prompt_tokens].tolist()

    batches = []
    for first in numbers[::TOGETHER]:
        some = range(first, min(first + TOGETHER, numbers.stop))
        samplings = [
            Sampling(temperature=args.temperature, seed=(args.seed << 32) + k) for k in some
        ]
        batches.append(target.write(piece, args.context, samplings))
        print(f"the target has written texts {first} to {some.stop - 1}", flush=True)
    return torch.cat(batches)


def windows(data: Tensor, context: int, n: int = 60) -> Tensor:
    """Return up to n windows [n, context] of a text (tokens), at equal distances."""
    starts = torch.linspace(0, len(data) - context, n).long().unique()
    return data.unfold(0, context, 1)[starts]


# ---- learning ------------------------------------------------------------------------------------
def loss_of(eagle: Eagle, target: Target, ids: Tensor, args: argparse.Namespace) -> Tensor:
    """Return the loss of tokens [batch, n], the mean over --levels.

    First the target's features with noise go in, then what was predicted from them."""
    features, embedded = target.features(ids), target.embedding(ids[:, 1:])
    before, after = features[:, :-1], features[:, 1:]
    soft = target.logits(after).softmax(-1)
    before = before + args.noise * before.square().mean().sqrt() * (2 * torch.rand_like(before) - 1)
    losses = []
    for level in range(args.levels):
        guess = eagle(embedded[:, level:], before)
        logits = target.logits(guess).flatten(0, 1)
        cross_entropy = F.cross_entropy(logits, soft[:, level:].flatten(0, 1))
        losses.append(F.smooth_l1_loss(guess, after[:, level:]) + args.ce_weight * cross_entropy)
        before = guess[:, :-1]
    return torch.stack(losses).mean()


@torch.no_grad()
def measure(eagle: Eagle, target: Target, texts: Tensor) -> dict[str, float]:
    """Return how often the head is right on held-out texts [texts, n].

    That is how often its first choice is the target's, how often the target's is among its best 4
    and 16, and the first again one level deeper, where the feature that goes in is the head's own
    guess."""
    found = dict.fromkeys(
        ("first_choice_agreement", "in_top_4", "in_top_16", "first_choice_one_deeper"), 0.0
    )
    eagle.eval()
    for text in texts:
        ids = text[None].to(target.device)
        features, embedded = target.features(ids), target.embedding(ids[:, 1:])
        guess = eagle(embedded, features[:, :-1])
        deeper = eagle(embedded[:, 1:], guess[:, :-1])
        choice = target.logits(features[0, 1:]).argmax(-1)
        best = target.logits(guess[0]).topk(16).indices == choice[:, None]
        for name, k in (("first_choice_agreement", 1), ("in_top_4", 4), ("in_top_16", 16)):
            found[name] += best[:, :k].any(-1).float().mean().item()
        found["first_choice_one_deeper"] += (
            (target.logits(deeper[0]).argmax(-1) == choice[1:]).float().mean().item()
        )
    eagle.train()
    return {name: round(total / len(texts), 4) for name, total in found.items()}


class Training:
    """A training is the head, its optimisers, and how far they are; on disk it is OUT.state.pt."""

    def __init__(self, eagle: Eagle, out: Path, lr: float, target: str):
        """`target` is the hash of the target's embedding, for the head's card."""
        matrices = [p for p in eagle.parameters() if p.ndim == 2]
        others = [p for p in eagle.parameters() if p.ndim != 2]
        self.eagle, self.out, self.lr, self.target = eagle, out, lr, target
        self.optims = [
            Muon(matrices, lr=lr),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.steps, self.seconds = 0, 0.0
        self.state_path = out.with_name(out.name + ".state.pt")

    def step(self, loss: Tensor, progress: float) -> None:
        """Make one update; `progress` in [0, 1] is the share of the limit that is behind us."""
        loss.backward()
        nn.utils.clip_grad_norm_(self.eagle.parameters(), 1.0)
        scale = min(1.0, (self.steps + 1) / 100) * min(1.0, 1.5 * (1 - progress) + 0.02)
        for optim in self.optims:
            for group in optim.param_groups:
                group["lr"] = self.lr * scale
            optim.step()
            optim.zero_grad(set_to_none=True)
        self.steps += 1

    def resume(self) -> None:
        state = torch.load(self.state_path, map_location="cpu", weights_only=True)
        self.eagle.load_state_dict(state["eagle"])
        for optim, kept in zip(self.optims, state["optims"], strict=True):
            optim.load_state_dict(kept)
        self.steps, self.seconds = state["steps"], state["seconds"]

    def save(self, embedding: Tensor | None, **facts) -> None:
        """Save the head as published, `facts` in training.json, and the state; each is written
        beside and renamed."""
        self.out.mkdir(parents=True, exist_ok=True)
        tensors = self.eagle.published() | (
            {} if embedding is None else {"embed_tokens.weight": embedding}
        )
        half = {name: tensor.detach().half().cpu().contiguous() for name, tensor in tensors.items()}
        config = self.eagle.config.to_dict() | {
            "architectures": ["EagleModel"],
            "dtype": "float16",
            CARD: self.target,
        }
        config.pop("_name_or_path", None)
        replace(
            self.out / "model.safetensors",
            lambda path: save_file(half, path, metadata={"format": "pt"}),
        )
        replace(
            self.out / "config.json",
            lambda path: path.write_text(json.dumps(config, indent=1) + "\n"),
        )
        replace(
            self.out / "training.json",
            lambda path: path.write_text(json.dumps(facts, indent=1) + "\n"),
        )
        state = {"eagle": self.eagle.state_dict(), "optims": [o.state_dict() for o in self.optims]}
        replace(
            self.state_path,
            lambda path: torch.save(state | {"steps": self.steps, "seconds": self.seconds}, path),
        )


def replace(path: Path, write) -> None:
    beside = path.with_name(path.name + ".partial")
    write(beside)
    os.replace(beside, path)


def train(
    training: Training,
    target: Target,
    texts: Tensor,
    held: dict[str, Tensor],
    args: argparse.Namespace,
) -> None:
    """Train on texts [.., n] until a limit is reached or somebody interrupts; save on the way and
    at the end, with what is measured on the `held` ones."""
    begun, before, mean, saved = time.monotonic(), training.seconds, None, time.monotonic()
    embedding = None if target.tied else target.model.get_input_embeddings().weight
    while (
        progress := max(training.steps / args.steps, training.seconds / (60 * args.minutes))
    ) < 1:
        draw = torch.Generator().manual_seed(training.steps)
        ids = texts[torch.randint(0, len(texts), (args.batch,), generator=draw)].to(target.device)
        with torch.autocast(target.device.split(":")[0], torch.bfloat16, enabled=args.bfloat16):
            loss = loss_of(training.eagle, target, ids, args)
        training.step(loss, progress)
        training.seconds = before + time.monotonic() - begun
        mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
        if training.steps % 50 == 0:
            print(
                f"step {training.steps} loss {mean:.4f} {training.seconds / 60:.1f} min, "
                f"{progress:.0%}",
                flush=True,
            )
        if time.monotonic() - saved > SAVE_EVERY:
            saved = time.monotonic()
            training.save(embedding, steps=training.steps, interrupted=True)
    found = {name: measure(training.eagle, target, some) for name, some in held.items()}
    tokens = training.steps * args.batch * args.context
    settings = {
        name: getattr(args, name)
        for name in ("noise", "ce_weight", "levels", "lr", "batch", "context", *own_settings(args))
    }
    about = dict(
        steps=training.steps,
        tokens=tokens,
        minutes=round(training.seconds / 60, 1),
        settings=settings,
    )
    training.save(embedding, **about, **found)
    for name, each in found.items():
        print(f"{name}: {each}", flush=True)


def own_settings(args: argparse.Namespace) -> tuple[str, ...]:
    """Return the settings that count if the target writes the texts."""
    return ("on_policy", "temperature", "seed", "prompt_tokens") if args.on_policy else ()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target",
        type=Path,
        required=True,
        metavar="DIR",
        help="the target's checkpoint, with tokenizer.json",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where the head goes"
    )
    parser.add_argument(
        "--text",
        type=Path,
        nargs="*",
        default=[],
        help="files and folders (default: the standard library's sources)",
    )
    parser.add_argument("--steps", type=float, default=float("inf"), help="stop after so many")
    parser.add_argument(
        "--minutes",
        type=float,
        default=float("inf"),
        help="stop after so many; give one of the two, or both",
    )
    parser.add_argument("--batch", type=int, default=4, help="texts a step")
    parser.add_argument("--context", type=int, default=512, help="tokens a text")
    parser.add_argument(
        "--on-policy",
        type=int,
        default=0,
        metavar="N",
        help="learn from N texts that the target writes itself (default: from the given text)",
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="at which it writes them; 0 is greedy"
    )
    parser.add_argument("--seed", type=int, default=1, help="of the texts that it writes")
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=64,
        help="so many tokens of the given text stand before what it writes",
    )
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument(
        "--noise",
        type=float,
        default=0.1,
        help="on the features that go in, as a share of their RMS",
    )
    parser.add_argument(
        "--ce-weight", type=float, default=0.1, help="of the cross entropy beside smooth L1"
    )
    parser.add_argument(
        "--levels",
        type=int,
        default=2,
        help="learn from its own guesses too, so many levels deep (1: not)",
    )
    parser.add_argument(
        "--bfloat16",
        action="store_true",
        help="multiply in bfloat16: twice as fast where the processor can",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--resume", action="store_true", help="go on from OUT.state.pt")
    args = parser.parse_args()
    if min(args.steps, args.minutes) == float("inf"):
        parser.error("say when to stop: --steps N or --minutes N")
    if args.on_policy and not 0 < args.prompt_tokens < args.context:
        parser.error(
            f"--prompt-tokens is {args.prompt_tokens}: it must be between 0 and --context "
            f"{args.context}"
        )
    return args


def main() -> None:
    args = arguments()
    target = Target(args.target, args.device)
    tokenizer = Tokenizer.from_file(str(args.target / "tokenizer.json"))
    learn, held_out = texts(args.text)
    data, held = (
        tokens_of(tokenizer, some, 0, first_token(target.config)) for some in (learn, held_out)
    )
    if min(len(data), len(held)) <= args.context:
        sys.exit(
            f"{len(data)} tokens to learn from and {len(held)} held out: too few for --context "
            f"{args.context}"
        )
    print(f"{len(data):,} tokens to learn from, {len(held):,} held out", flush=True)
    rows, told = data.unfold(0, args.context, 1), {"held_out": windows(held, args.context)}
    if own := args.on_policy:
        rows = own_texts(target, data, range(own), args)
        told |= {"held_out_own": own_texts(target, held, range(own, own + HELD_OUT), args)}
    torch.manual_seed(0)
    training = Training(Eagle(target.config).to(args.device), args.out, args.lr, target.name)
    if args.resume:
        training.resume()
    try:
        train(training, target, rows, told, args)
    except KeyboardInterrupt:
        embedding = None if target.tied else target.model.get_input_embeddings().weight
        training.save(embedding, steps=training.steps, interrupted=True)
        print(f"interrupted after {training.steps} steps; --resume goes on", flush=True)


if __name__ == "__main__":
    main()
