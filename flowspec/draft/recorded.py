"""The simulator's drafters are a real one's recorded proposals, a real one live, and a made-up one.

A tape is for drafters whose proposals depend only on the path (the tokens from the prompt to the
node), as a language model's do. It remembers each proposal the first time it is asked for, so that
a sweep over stages, links and methods runs the draft model once. What an EAGLE head or a look-up
proposes depends on what was text by then, so those are asked live, in each run.
"""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from flowspec.core.messages import Commit, Drafted, DraftNode, Proposal
from flowspec.core.request import Request, Sampling
from flowspec.draft.base import Drafter, Lineage, Noise, Session
from flowspec.errors import UserError
from flowspec.files import replacing

ABSENT, UNASKED = -1, -2
"""A tape's file has these instead of a number of candidates: ABSENT where the drafter could not go
on, UNASKED where nobody asked."""
FORMAT = 2


@dataclass
class Tape:
    """A tape is one request, the target's text for it, and a tree of token paths.

    After each path it holds what the drafter proposed."""

    request: Request
    text: list[int]
    """The text is the target's new tokens."""
    parents: list[int] = field(default_factory=lambda: [-1])
    """Each path has a parent, which is one token shorter; path 0 has -1."""
    tokens: list[int] = field(default_factory=lambda: [-1])
    """Each path has a last token; path 0 has -1."""
    proposals: dict[int, Proposal | None] = field(default_factory=dict)
    """The proposals map a path to what follows it; path 0 is the prompt. None means that the
    drafter could not go on."""

    def __post_init__(self) -> None:
        self._child = {
            (p, t): i for i, (p, t) in enumerate(zip(self.parents, self.tokens, strict=True))
        }

    def child(self, path: int, token: int) -> int:
        """Return the path that is this token longer; it is made if it is new."""
        if path == -1:  # the first root is the prompt itself
            return 0
        found = self._child.setdefault((path, token), len(self.parents))
        if found == len(self.parents):
            self.parents.append(path)
            self.tokens.append(token)
        return found


class _ByPath:
    """_ByPath keeps book of which node stands for which path, to look proposals up by path."""

    def __init__(self, child: Callable[[int, int], int], request: Request):
        self._child = child
        self._path = {-1: -1}  # node -> path
        self._lineage = Lineage.of(request)

    def enter(self, node: DraftNode) -> int:
        if node.id not in self._path:
            self._path[node.id] = self._child(self._path[node.parent], node.token)
        return self._path[node.id]

    def commit(self, commit: Commit) -> None:
        for node in self._lineage.path(commit):
            self.enter(node)
        self._lineage = self._lineage.after(commit)


class LiveDrafter:
    """A LiveDrafter is a real drafter in a simulated run, asked anew each time. It is begun here.

    `features` [prompt + text - 1, hidden] are the target's at each of their tokens but the last;
    None for a drafter that reads none. Only tokens of the text are ever committed, so a commit's
    features are the next rows of these."""

    def __init__(
        self, drafter: Drafter, request: Request, noise: Noise | None, features: Tensor | None
    ):
        self.features = drafter.features
        self._drafter, self._rows = drafter, features
        self._told = request.prompt_length - 1  # the drafter has so many of the rows
        self._session = drafter.begin(
            request, noise, features[: self._told] if features is not None and self._told else None
        )

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        return self._drafter.propose([(self._session, nodes)])[0]

    def commit(self, commit: Commit) -> None:
        begin, self._told = self._told, self._told + len(commit.path)
        self._session.commit(commit, None if self._rows is None else self._rows[begin : self._told])


class RecordedDrafter:
    """A RecordedDrafter plays a tape.

    What the tape lacks is asked of the real drafter and remembered, or, without one, counted in
    `lacked`."""

    features = False

    def __init__(self, tape: Tape, drafter: Drafter | None = None, noise: Noise | None = None):
        self._tape, self._drafter, self._noise = tape, drafter, noise
        self._paths = _ByPath(tape.child, tape.request)
        self._session: Session | None = None
        self._held: set[int] = set()  # paths that the real drafter has been asked for in this run
        self.lacked = 0

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        paths = [self._paths.enter(n) for n in nodes]
        missing = [p for p in paths if p not in self._tape.proposals]
        if missing and self._drafter:
            self._ask(self._drafter, missing)
        self.lacked += len(missing) if not self._drafter else 0
        return Drafted.pack([n.id for n in nodes], [self._tape.proposals.get(p) for p in paths])

    def commit(self, commit: Commit) -> None:
        self._paths.commit(commit)

    def _ask(self, drafter: Drafter, missing: list[int]) -> None:
        """Ask the real drafter for these paths, which are its nodes, and remember its proposals.

        Nothing is ever committed to it, so that every path can still be asked for."""
        tape = self._tape
        if self._session is None:
            self._session = drafter.begin(tape.request, self._noise)
        wanted = set()
        for path in missing:
            while path not in self._held and path not in wanted and path >= 0:
                wanted.add(path)
                path = tape.parents[path]
        batch = sorted(wanted)  # parents before children
        last = tape.request.prompt[-1]
        nodes = [DraftNode(p, tape.parents[p], tape.tokens[p] if p else last) for p in batch]
        self._held |= wanted
        [answer] = drafter.propose([(self._session, nodes)])
        tape.proposals.update((p, _single(answer.proposal(p))) for p in batch)


def _single(proposal: Proposal | None) -> Proposal | None:
    """Return the proposal with z in single precision, as it will be read from the file."""
    if proposal is None:
        return None
    return dataclasses.replace(proposal, z=proposal.z.astype(np.float32).astype(float))


class SyntheticDrafter:
    """A SyntheticDrafter makes its proposals up from a profile of acceptance.

    The target's token is candidate k (counted from 0) with probability profile[k], independently at
    each position. A node that is asked for again gets the same answer."""

    features = False

    def __init__(
        self, request: Request, text: Sequence[int], profile: Sequence[float], seed: int = 0
    ):
        self._text, self._profile = text, np.array(profile)
        self._seed = seed
        self._made: dict[int, Proposal] = {}  # by node
        self._paths = _ByPath(self._longer, request)
        shares = np.maximum(self._profile, 1e-9)
        self._logq, self._coverage = np.log(shares / shares.sum()), min(0.999, float(shares.sum()))

    def propose(self, nodes: Sequence[DraftNode]) -> Drafted:
        for node in nodes:
            if node.id not in self._made:
                self._made[node.id] = self._proposal(self._paths.enter(node))
        return Drafted.pack([n.id for n in nodes], [self._made[n.id] for n in nodes])

    def commit(self, commit: Commit) -> None:
        self._paths.commit(commit)

    def _longer(self, path: int, token: int) -> int:
        """Return the path that is this token longer.

        Paths on the text are numbered by how many of its tokens they hold; OFF are all others."""
        if path == -1:
            return 0
        return (
            path + 1 if path >= 0 and path < len(self._text) and self._text[path] == token else OFF
        )

    def _proposal(self, path: int) -> Proposal:
        # tokens of the text are below 2^30 (see `made_up_text`), wrong guesses above
        k = len(self._profile)
        wrong = np.arange(k) + (1 << 30) + k * len(self._made)
        if 0 <= path < len(self._text):
            draw = np.random.default_rng((self._seed, path)).random()
            rank = int(np.searchsorted(self._profile.cumsum(), draw, side="right"))
            if rank < len(wrong):
                wrong[rank] = self._text[path]
        return Proposal(wrong, self._logq, coverage=self._coverage)


OFF = -3


def made_up_text(tokens: int) -> list[int]:
    """Return a text for a synthetic drafter: tokens below 2^30; what it says does not matter."""
    return list(range(1, tokens + 1))


# ---- files ---------------------------------------------------------------------------------------
def save(path: str | os.PathLike[str], tapes: Iterable[Tape], source: str) -> None:
    """Write the tapes as an .npz file of plain arrays, under another name that is then renamed.

    `source` names the models with which they were made."""
    arrays: dict[str, np.ndarray] = {}
    heads = []
    for k, tape in enumerate(tapes):
        request = tape.request
        sampling = dataclasses.asdict(request.sampling)
        about = {
            "prompt": request.prompt,
            "sampling": sampling,
            "eos": sorted(request.eos),
            "text": tape.text,
        }
        heads.append(
            about | {"coupled": any(p.coupled for p in tape.proposals.values() if p is not None)}
        )
        arrays |= {f"{k}.{name}": array for name, array in _columns(tape).items()}
    head = json.dumps({"format": FORMAT, "source": source, "tapes": heads})
    with replacing(path) as beside, open(beside, "wb") as file:
        np.savez_compressed(file, head=np.frombuffer(head.encode(), np.uint8), **arrays)  # type: ignore[arg-type]


def _columns(tape: Tape) -> dict[str, np.ndarray]:
    asked = [tape.proposals.get(p) for p in range(len(tape.parents))]
    counts = [
        UNASKED if p not in tape.proposals else ABSENT if a is None else len(a.tokens)
        for p, a in enumerate(asked)
    ]
    there = [a for a in asked if a is not None]
    return {
        "parents": np.array(tape.parents, np.int32),
        "tokens": np.array(tape.tokens, np.int32),
        "counts": np.array(counts, np.int32),
        "candidates": np.concatenate([np.zeros(0), *(a.tokens for a in there)]).astype(np.int32),
        "z": np.concatenate([a.z for a in there] or [np.zeros((0, 1))]).astype(np.float32),
        "coverage": np.array([a.coverage for a in there], np.float32),
    }


def load(path: str | os.PathLike[str]) -> tuple[list[Tape], str]:
    """Return the tapes of a file and its `source`.

    Raise UserError, which says what is wrong, if the file cannot be read."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            head = json.loads(bytes(arrays["head"]))
            if head["format"] > FORMAT:
                raise UserError(
                    f"{path} is of format {head['format']}, this version reads up to {FORMAT}"
                )
            return [_tape(k, facts, arrays) for k, facts in enumerate(head["tapes"])], head[
                "source"
            ]
    except OSError as error:
        raise UserError(
            f"cannot read the recorded drafts {path}: {error.strerror or error}"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile):
        raise UserError(
            f"{path} holds no recorded drafts: give a file that simulate --drafts wrote"
        ) from None


def _tape(k: int, facts: dict, arrays) -> Tape:
    request = Request(
        id=k,
        prompt=tuple(facts["prompt"]),
        sampling=Sampling(**facts["sampling"]),
        eos=frozenset(facts["eos"]),
    )
    get = {
        name.partition(".")[2]: arrays[name] for name in arrays.files if name.startswith(f"{k}.")
    }
    tape = Tape(request, facts["text"], get["parents"].tolist(), get["tokens"].tolist())
    z, coupled = (get["z"].astype(float), facts["coupled"]) if "z" in get else _of_format_1(get)
    begin = number = 0
    for path, count in enumerate(get["counts"].tolist()):
        if count == ABSENT:
            tape.proposals[path] = None
        elif count != UNASKED:
            part = slice(begin, begin + count)
            coverage = float(get["coverage"][number])
            tape.proposals[path] = Proposal(
                get["candidates"][part].astype(np.int64), z[part], coverage, coupled
            )
            begin, number = begin + count, number + 1
    return tape


def _of_format_1(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, bool]:
    """Return the z [k, 1] of a file of format 1, and whether z has noise in it.

    Format 1 kept one drafter's log-probabilities and the noise apart."""
    coupled = "noise" in columns
    z = columns["logq"].astype(float) + (columns["noise"] if coupled else 0.0)
    return z[:, None], coupled
