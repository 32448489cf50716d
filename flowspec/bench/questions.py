"""Questions are read here: a JSON object a line, in the form of Spec-Bench.

A question has an id, a category and one or more turns, which are what a person says. This module
imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flowspec.errors import UserError, need
from flowspec.files import SHIPPED

DATASETS = ("mt_bench", "humaneval", "gsm8k", "alpaca", "cnn_dm", "nq")
"""These are the paper's, and the names of files."""
DATA = SHIPPED / "configs" / "eval"
"""This folder has a file of each, of our own writing: as many questions as a small model can
take."""


class Question(NamedTuple):
    """A question is a conversation's side of the person who asks."""

    dataset: str
    id: str
    category: str
    turns: tuple[str, ...]
    place: int
    """It stands at this place in its file, from 0."""


def chosen(folder: Path, datasets: Sequence[str], span: str) -> list[Question]:
    """Return the questions of these datasets that `span` selects in each file.

    `span` is A:B, from A (from 0) to before B, each of which may be left out, or N, the first N.
    Raise UserError, which names the file or --questions, for what cannot be read or is not
    there."""
    part, found = _slice(span), list[Question]()
    for dataset in datasets:
        held = read(folder / f"{dataset}.jsonl", dataset)
        here = held[part]
        need(
            bool(here),
            f"--questions {span} selects none of the {len(held)} questions of "
            f"{folder / dataset}.jsonl",
        )
        found += here
    return found


def _slice(span: str) -> slice:
    first, sign, last = span.partition(":")
    try:
        bounds = [int(text) if text else None for text in (first, last)]
    except ValueError:
        bounds = [-1]
    need(
        all(bound is None or bound >= 0 for bound in bounds) and (bool(sign) or bool(first)),
        f"--questions {span}: it is written A:B (from A, counted from 0, to before B) or N",
    )
    return slice(*bounds) if sign else slice(bounds[0])


def read(path: Path, dataset: str) -> list[Question]:
    """Return the questions of a file; raise UserError, with the line, if it holds others."""
    try:
        lines = path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; --data names a folder with a file NAME.jsonl "
            "for each dataset (scripts/fetch_datasets.py makes one where there is a network)"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    found = [
        _question(line, dataset, k, f"{path} line {n}") for k, (n, line) in enumerate(numbered)
    ]
    need(bool(found), f"{path} holds no question")
    ids = [question.id for question in found]
    twice = [question for question in ids if ids.count(question) > 1]
    need(not twice, f"{path} has question_id {''.join(twice[:1])} twice")
    return found


def _question(line: str, dataset: str, place: int, where: str) -> Question:
    try:
        held = json.loads(line)
        name, category, turns = held["question_id"], held.get("category", dataset), held["turns"]
    except (ValueError, KeyError, TypeError, AttributeError):
        name, category, turns = None, "", None
    good = isinstance(turns, list) and all(isinstance(turn, str) and turn for turn in turns)
    if name is None or not good or not turns:
        raise UserError(f"{where}: expected an object with question_id, category and turns (texts)")
    return Question(dataset, str(name), str(category), tuple(turns), place)


def fingerprints(questions: Sequence[Question]) -> dict[str, str]:
    """Return for each dataset how many questions are asked of it, and a hash of them."""
    return {
        dataset: _fingerprint([q for q in questions if q.dataset == dataset])
        for dataset in dict.fromkeys(question.dataset for question in questions)
    }


def _fingerprint(questions: Sequence[Question]) -> str:
    text = json.dumps([(q.id, q.turns, q.place) for q in questions])
    return f"{len(questions)} questions, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"
