"""Speculative decoding in one process: a draft model guesses a tree, the target checks it at once.

What is guessed is a grower's matter (trees.py), what of it is kept a rule's (rules.py). Several
texts go on in step: a forward of a model holds the rows of all that ask for some, and each advances
by what of its own tree is kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from flowspec.core.messages import Commit, DraftNode
from flowspec.core.past import past_of
from flowspec.core.request import Request
from flowspec.draft.base import Alike
from flowspec.draft.lm import LmSession
from flowspec.host.reader import Reader, Rows, Whole
from flowspec.host.rules import Keyed, Rejection, Rule
from flowspec.host.trees import Grower, Tree
from flowspec.models.logits import TreeLogits
from flowspec.sampling import Logprobs, adjusted, logprobs_of

ORIGINS = ("draft", "resampled", "bonus", "plain")
"""A token was accepted from the draft, drawn by the target in the place of rejected ones, drawn by
the target behind a draft of which all was accepted, or drawn where nothing was guessed."""


class Written(NamedTuple):
    """A token of the output."""

    token: int
    origin: str
    """It is one of ORIGINS."""
    logprobs: Logprobs | None = None
    """None unless the request asks for them."""


class Block(NamedTuple):
    """A block is the tokens that a forward of the target brings to one text."""

    text: int
    """It is this one of the texts that are written together."""
    written: list[Written]
    nodes: int
    """So many tokens were guessed, """
    height: int
    """in so many levels, """
    asked: int
    """in so many forwards of the draft model."""


class Ask(NamedTuple):
    """An ask is for the logits of some rows."""

    model: str
    """It is target or draft."""
    rows: Rows


Step = Generator[Ask, TreeLogits, tuple[list[Written], Tree]]


class Text:
    """A text goes on step by step, each a forward of the target and those of the draft before."""

    def __init__(
        self,
        request: Request,
        rule: Rule,
        grower: Grower,
        target: LmSession,
        draft: LmSession | None,
    ):
        self._request, self._rule, self._grower = request, rule, grower
        self._target, self._draft = target, draft
        self._ids = itertools.count(1)
        self._root = DraftNode(0, -1, request.prompt[-1])
        self._position = request.prompt_length - 1
        self._alike = Alike(request)
        self._past = past_of(request.sampling, request.prompt, request.known)
        self.left = request.sampling.max_new_tokens
        """So many tokens are still to come."""

    def step(self) -> Step:
        """Ask for what is needed for the next tokens, and return them and what was guessed."""
        tree = yield from self._guess()
        logits = yield Ask("target", Rows(self._target, tree.nodes))
        path, token = self._walk(tree, logits)
        origin = "plain" if len(tree.nodes) == 1 else "bonus"
        origin = "resampled" if tree.children.get(path[-1].id) else origin
        tokens = [*(node.token for node in path[1:]), token]
        origins = ["draft"] * (len(path) - 1) + [origin]
        told = self._told(path, tokens, logits)
        written = [Written(*each) for each in zip(tokens, origins, told, strict=True)]
        self._commit(path, token)
        ends = [k for k, each in enumerate(written, 1) if each.token in self._request.eos]
        written = written[: min(ends, default=len(written))]
        self.left = 0 if ends else self.left - len(written)
        return written, tree

    def _guess(self) -> Generator[Ask, TreeLogits, Tree]:
        if self._draft is None:
            return Tree(self._root)
        growing = self._grower.grow(
            self._root, self._ids, self._rule, self._position, self.left - 1
        )
        logits: Tensor | None = None
        for asked in itertools.count():
            try:
                nodes = growing.send(logits)  # type: ignore[arg-type]  # None begins it
            except StopIteration as ended:
                tree: Tree = ended.value
                tree.asked = asked
                return tree
            made = yield Ask("draft", Rows(self._draft, nodes))
            logits = self._alike(nodes, made.all())
        raise AssertionError("a grower comes to an end")

    def _walk(self, tree: Tree, logits: TreeLogits) -> tuple[list[DraftNode], int]:
        """Return the nodes that are text, the root first, and the token that follows them."""
        path = tree.nodes[:1]
        while True:
            node, position = path[-1], self._position + len(path)
            children = tree.children.get(node.id, [])
            if self._past is not None:
                self._past.reach(position - 1, node.token)
            which, token = self._rule.judge(
                adjusted(logits[node.id], self._request.sampling, self._past),
                position,
                [child.token for child in children],
                tree.q.get(node.id),
            )
            if which is None:
                return path, token
            path.append(children[which])

    def _told(
        self, path: list[DraftNode], tokens: list[int], logits: TreeLogits
    ) -> list[Logprobs | None]:
        """Return what is told of the tokens behind the nodes of a path."""
        top = self._request.sampling.logprobs
        if top is None:
            return [None] * len(path)
        pairs = zip(path, tokens, strict=True)
        return [logprobs_of(logits[node.id], token, top) for node, token in pairs]

    def _commit(self, path: list[DraftNode], token: int) -> None:
        """Make the path and the token behind it text, in all books."""
        root = DraftNode(next(self._ids), path[-1].id, token)
        tokens = (*(node.token for node in path[1:]), token)
        guessed = (*[True] * (len(path) - 1), False)
        commit = Commit(tuple(node.id for node in path), tokens, guessed, root.id)
        for session in (self._target, self._draft) if self._draft else (self._target,):
            session.commit(commit)
        self._alike.commit(path, root.id)
        self._root, self._position = root, self._position + len(path)


class InStep:
    """Texts are in step: they are written together to their ends.

    While any asks for rows of the draft model, these go first, so that the target's forwards hold
    rows of as many texts as may be."""

    def __init__(self, texts: Sequence[Text], readers: Mapping[str, Reader]):
        self._texts, self._readers = texts, readers
        self._steps: dict[int, Step] = {}
        self._asks: dict[int, Ask] = {}

    def blocks(self) -> Iterator[Block]:
        """Yield the texts' tokens as they come."""
        for k in range(len(self._texts)):
            self._begin(k)
        while self._asks:
            model = min(ask.model for ask in self._asks.values())  # draft before target
            some = [k for k, ask in self._asks.items() if ask.model == model]
            answers = self._readers[model].read([self._asks.pop(k).rows for k in some])
            for k, logits in zip(some, answers, strict=True):
                if block := self._go_on(k, logits):
                    yield block
                    self._begin(k)

    def _begin(self, k: int) -> None:
        if self._texts[k].left:
            self._steps[k] = self._texts[k].step()
            self._go_on(k, None)

    def _go_on(self, k: int, logits: TreeLogits | None) -> Block | None:
        """Answer a text; return the block that its step has come to, if it has."""
        try:
            self._asks[k] = self._steps[k].send(logits)  # type: ignore[arg-type]  # None begins it
        except StopIteration as ended:
            written, tree = ended.value
            return Block(k, written, len(tree.nodes) - 1, tree.height, tree.asked)
        return None


class Begun(NamedTuple):
    """Texts are begun."""

    blocks: Iterator[Block]
    """Their tokens come as a forward of the target brings them."""
    readers: Mapping[str, Reader]
    """These read for them: the target and, if there is one, the draft."""


class Pair:
    """A pair is a target and a draft model, by these names, and what is made of guesses."""

    def __init__(
        self, models: Mapping[str, Whole], grower: Grower, rule: str, coupled: bool = True
    ):
        """`rule` is rejection or keyed; a greedy text is the same by both.

        `coupled` is as for `Keyed`."""
        self._models, self._grower, self._rule = models, grower, rule
        self._coupled = coupled

    def begin(self, requests: Sequence[Request], drafter: str | None) -> Begun:
        """Begin texts. What guesses is the draft model, the target itself or nothing (None)."""
        readers = {"target": Reader(self._models["target"])}
        if drafter:
            readers["draft"] = Reader(self._models[drafter])
        texts = [
            Text(
                request,
                self._judging(request, drafter),
                self._grower,
                readers["target"].begin(request),
                readers["draft"].begin(request) if drafter else None,
            )
            for request in requests
        ]
        return Begun(InStep(texts, readers).blocks(), readers)

    def _judging(self, request: Request, drafter: str | None) -> Rule:
        sampling = request.sampling
        if self._rule == "keyed" or drafter is None or sampling.temperature == 0:
            return Keyed(sampling, self._models["target"].vocabulary, self._coupled)
        return Rejection(sampling)
