"""This module makes text into tokens and back, by the tokenizer in rank 0's folder.

It needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from flowspec.errors import UserError


def load_tokenizer(folder: Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint's `tokenizer.json`.

    Raise UserError, which names the file, if it cannot be read."""
    path = folder / "tokenizer.json"
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain Exception
        raise UserError(f"cannot read the tokenizer {path}: {error}") from None


def check_same_tokens(target: Tokenizer, draft: Tokenizer, where: str) -> None:
    """Raise UserError unless the draft model means the same token by the same number.

    `where` names the draft model. Padding beyond the vocabulary may differ."""
    ours, theirs = target.get_vocab(), draft.get_vocab()
    differs = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
    if differs:
        worst = min(differs, key=lambda t: (ours.get(t, theirs.get(t)), t))
        number, other = (each.get(worst, "missing") for each in (ours, theirs))
        raise UserError(
            f"{where} has another vocabulary than the target: of {len(theirs)} and {len(ours)} "
            f"tokens {len(differs)} differ, such as {worst!r}, which is {number} in the target and "
            f"{other} in the draft; give a draft model with the target's tokenizer"
        )


class Text:
    """A Text is the target's tokenizer with its end tokens and chat template."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.tokenizer = load_tokenizer(folder)
        self.eos = frozenset(_end_tokens(folder))

    def encode(self, prompt: str) -> tuple[int, ...]:
        """Return the prompt's tokens, with the special ones that the tokenizer adds by itself."""
        return tuple(self.tokenizer.encode(prompt).ids)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True)

    def encode_chat(self, turns: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """Return the tokens of the turns [{role, content}, ...].

        They follow the chat template, or are plain lines where there is none."""
        if not self.has_template:
            lines = "".join(f"{turn['role'].capitalize()}: {turn['content']}\n" for turn in turns)
            return self.encode(lines + "Assistant:")
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.folder)
        return tuple(
            tokenizer.apply_chat_template(
                list(turns), add_generation_prompt=True, return_dict=False
            )
        )

    @property
    def chat_stops(self) -> list[str]:
        """Return the texts at which an answer of a conversation ends, beside the end tokens."""
        return [] if self.has_template else ["\nUser:"]

    @property
    def has_template(self) -> bool:
        return (self.folder / "chat_template.jinja").exists() or bool(
            _json(self.folder / "tokenizer_config.json").get("chat_template")
        )


class TextStream:
    """A TextStream takes tokens in and gives text out as soon as it is certain.

    It gives out whole characters only, and nothing at or after a stop text. A token's text depends
    on its neighbours (spaces, bytes of one character). So each token is decoded behind what was
    decoded before it (at first the prompt's last tokens), and what is new is given out once it ends
    in a whole character."""

    BEFORE = 6
    """So many of the prompt's last tokens may matter to the first new one."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self._tokenizer, self._stop, self._held = tokenizer, [s for s in stop if s], ""
        # tokens behind which the next are decoded, then undecided ones
        self._window = list(prompt[-self.BEFORE :])
        self._decided = len(self._window)
        self.text = ""
        """This is everything given out so far."""
        self.stopped = False
        """A stop text was met."""

    def push(self, token: int) -> str:
        """Return the text that this token makes certain."""
        self._held += self._decode(token)
        cuts = [at for s in self._stop if (at := self._held.find(s)) >= 0]
        if cuts:
            self.stopped = True
            return self._give(min(cuts))
        doubtful = max((_overlap(self._held, s) for s in self._stop), default=0)
        return self._give(len(self._held) - doubtful)

    def _decode(self, token: int) -> str:
        self._window.append(token)
        before = self._tokenizer.decode(self._window[: self._decided], skip_special_tokens=True)
        now = self._tokenizer.decode(self._window, skip_special_tokens=True)
        # there is nothing new, or an unfinished character
        if len(now) <= len(before) or now.endswith("\ufffd"):
            return ""
        del self._window[: self._decided]
        self._decided = len(self._window)
        return now[len(before) :]

    def flush(self) -> str:
        """Return what was held back for a stop text that never came."""
        return "" if self.stopped else self._give(len(self._held))

    def _give(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Return the length in characters of the longest end of `text` that begins `stop`."""
    return next(
        (n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0
    )


def _end_tokens(folder: Path) -> list[int]:
    """Return the eos_token_id of generation_config.json, else of config.json, as a list.

    The files hold a number, a list, or nothing."""
    for name in ("generation_config.json", "config.json"):
        eos = _json(folder / name).get("eos_token_id")
        if eos is not None:
            return eos if isinstance(eos, list) else [eos]
    return []


def _json(path: Path) -> dict:
    """Return a file's JSON object; it is empty where there is no such file.

    Raise UserError if the file is damaged."""
    try:
        found = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found
