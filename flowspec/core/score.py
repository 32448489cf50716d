"""How likely a candidate is to be the target's choice: a conditional logit, fitted while it is used. Pure.

    u(t) = sum_d w_d * z_d(t) + sum_m v_m * [t is what followed the last m tokens before]        p(t) = C * softmax(u)(t)

z_d is the log-probability by drafter d (there may be several, draft/mixture.py), above temperature 0 plus the target's own keyed
noise. If the target's logits are the one drafter's plus Gumbel error of scale 1/w, p is exact; so w says how good the drafter is.
C is the share of positions whose choice is among the candidates: what is claimed, times how far such claims have held. The
weights follow a damped Newton step at each decided position:

    g = x(chosen) - E_p[x],   H <- 0.995 H + Var_p[x],   w <- w + clip((H + I/2)^-1 g, +-0.3)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowspec.core.messages import Drafted
from flowspec.core.tree import Node, TokenTree

LENGTHS = (4, 3, 2)
"""lengths of the matches that an n-gram prediction may rest on; the longest counts"""


class Weights:
    """[w_1, ..., w_D, v_4, v_3, v_2], and how far claims of coverage hold, learnt from decided positions; started at w = 1/D, v = 0."""

    FORGET = 0.995
    STEP = 0.3
    MEMORY = 64.0
    """positions of a new text that all earlier ones together count as"""

    def __init__(self, drafters: int = 1, learns: bool = True):
        self.drafters, self.learns = drafters, learns
        self.values = np.zeros(drafters + len(LENGTHS))
        self.values[:drafters] = 1 / drafters
        self._curvature = np.eye(len(self.values))
        self._held, self._claimed = (
            (2.0, 3.0) if learns else (1.0, 1.0)
        )  # positions: a prior that few decisions outweigh

    def begin(self) -> None:
        """A new text: what others have taught counts as no more than MEMORY positions of it."""
        share = min(1.0, self.MEMORY / self._claimed)
        self._held, self._claimed = self._held * share, self._claimed * share
        eye = np.eye(len(self.values))
        self._curvature = eye + share * (self._curvature - eye)

    @property
    def trust(self) -> float:
        """How far claims of coverage have held."""
        return self._held / self._claimed

    def learn(self, x: np.ndarray, coverage: float, chosen: int | None) -> float:
        """One decided position: features [k, D + 3] and claim of its list, and which of it the target chose, if any. The probability
        that this had; 0 if there is nothing to learn from."""
        if not self.learns:
            return 0.0
        claim = min(0.999, coverage * self.trust)
        self._claimed += coverage
        if chosen is None:
            return 0.0
        self._held += 1
        u = x @ self.values
        p = np.exp(u - u.max())
        p /= p.sum()
        mean = p @ x
        spread = (x * p[:, None]).T @ x - np.outer(mean, mean)
        self._curvature = self.FORGET * self._curvature + spread
        step = np.linalg.solve(self._curvature + 0.5 * np.eye(len(self.values)), x[chosen] - mean)
        self.values += step.clip(-self.STEP, self.STEP)
        w = self.values[: self.drafters]
        np.maximum(w, 0.05, out=w)  # a drafter is never believed to be wrong on purpose
        return claim * float(p[chosen])


class Ngrams:
    """What followed the last few tokens before, in the text known so far."""

    def __init__(self, tokens: Sequence[int]):
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for n in LENGTHS:
                if len(self._text) >= n:
                    self._next[tuple(self._text[-n:])] = token
            self._text.append(token)

    def after(self, path: Sequence[int]) -> tuple[int, int] | None:
        """(token, index into LENGTHS) predicted after the text so far and `path`, by the longest match; None without one."""
        ending = (*self._text[-LENGTHS[0] :], *path)
        for k, n in enumerate(LENGTHS):
            token = self._next.get(ending[-n:]) if len(ending) >= n else None
            if token is not None:
                return token, k
        return None


class List(NamedTuple):
    """What was proposed after one node, kept until the target has chosen."""

    tokens: np.ndarray
    """[k]"""
    z: np.ndarray
    """[k, D]; -inf behind a list that is shorter"""
    coverage: float
    hint: tuple[int, int] | None
    """the n-gram prediction: a token, and an index into LENGTHS"""
    open: bool
    """a hint that is not in the list joins it: without noise the drafter gives it less than what it did list; with noise
    nobody knows"""

    def features(self) -> tuple[list[int], np.ndarray]:
        """Tokens and features [k, D + 3] of the candidates, the hint among them."""
        there = self.z[:, 0] > -np.inf
        tokens, z = self.tokens[there].tolist(), self.z[there]
        if self.hint and self.open and self.hint[0] not in tokens:
            tokens, z = [*tokens, self.hint[0]], np.concatenate([z, z[-1:]])
        x = np.zeros((len(tokens), z.shape[1] + len(LENGTHS)))
        x[:, : z.shape[1]] = z
        if self.hint and self.hint[0] in tokens:
            x[tokens.index(self.hint[0]), z.shape[1] + self.hint[1]] = 1
        return tokens, x


class Scorer:
    """Scores a drafter's proposals, and learns from what the target chose. One a request."""

    LATELY = 0.15
    UNKNOWN = 0.25
    """of one that does not learn"""

    def __init__(self, calibrate: bool, ngrams: bool):
        self._learns, self._uses_ngrams = calibrate, ngrams
        self._lists: dict[int, List] = {}  # by node
        self._judged = 0  # positions that `promise` rests on
        self.promise = None if calibrate else self.UNKNOWN
        """how much probability the target's choices had in the lists, of late; None before there was one"""

    def attach(
        self, tree: TokenTree, prompt: Sequence[int], learnt: dict[tuple[int, bool], Weights]
    ) -> None:
        """`learnt`: weights by the number of drafters and whether they are coupled; those that are missing are added."""
        self._tree, self._learnt = tree, learnt if self._learns else {}
        for weights in self._learnt.values():
            weights.begin()
        self._use(1, False)  # until an answer says otherwise
        self._ngrams = Ngrams(prompt) if self._uses_ngrams else None

    def scored(
        self, nodes: list[Node], drafted: Drafted, top_k: int
    ) -> list[tuple[Node, list[int], list[float]]]:
        """Each node with its best top_k candidates, best first: their tokens and their (absolute) scores.

        One pass over the batch without hints; a row that has one is mended by itself, since few do and numpy costs by the call."""
        if not nodes:
            return []
        tokens, z, u = self._ranked(drafted)
        claims = np.minimum(0.999, drafted.coverage * self.weights.trust)
        above = np.array([n.score for n in nodes]) + np.log(claims)
        u += (above - np.log(np.exp(u).sum(1)))[:, None]
        short = u[:, -1].min() == -np.inf
        hints = (
            [self._ngrams.after(self._below_root(n)) for n in nodes]
            if self._ngrams is not None
            else [None] * len(nodes)
        )
        scored = []
        for node, listed, scores, level, hint in zip(
            nodes, tokens.tolist(), u.tolist(), above.tolist(), hints, strict=True
        ):
            if short:
                k = sum(score > -math.inf for score in scores)
                del listed[k:], scores[k:]
            if hint is not None:
                self._mend(listed, scores, level, hint, not drafted.coupled)
            scored.append((node, listed[:top_k], scores[:top_k]))
        if self.weights.learns:
            lists = zip(
                tokens,
                z,
                drafted.coverage.tolist(),
                hints,
                [not drafted.coupled] * len(nodes),
                strict=True,
            )
            self._lists.update(
                (node.id, List(*facts)) for node, facts in zip(nodes, lists, strict=True)
            )
        return scored

    def _use(self, drafters: int, coupled: bool) -> None:
        self._kind = drafters, coupled
        self.weights = self._learnt.setdefault(self._kind, Weights(drafters, self._learns))

    def _ranked(self, drafted: Drafted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens [n, k], z [n, k, D] and u [n, k], best first; u of the best is 0."""
        tokens, z = drafted.tokens, drafted.z
        drafters = z.shape[2]
        if (drafters, drafted.coupled) != self._kind:
            self._use(drafters, drafted.coupled)
        u = z.dot(self.weights.values[:drafters])
        if drafters > 1:  # one drafter's order does not depend on its weight
            order = np.argsort(-u, 1, kind="stable")
            tokens, u = (np.take_along_axis(a, order, 1) for a in (tokens, u))
            z = np.take_along_axis(z, order[..., None], 1)
        return tokens, z, u - u[:, :1]

    def _mend(
        self,
        tokens: list[int],
        scores: list[float],
        level: float,
        hint: tuple[int, int],
        joins: bool,
    ) -> None:
        """Raise the hinted candidate's u by its weight, in place: log p of all others sinks by the log of what the sum grows by.

        `level`: the score that the list's candidates have together."""
        token, length = hint
        known = token in tokens
        if not known and not joins:
            return
        at = (
            tokens.index(token) if known else len(tokens) - 1
        )  # one that joins begins as the last of the list
        score, weight = scores[at], float(self.weights.values[self.weights.drafters + length])
        p = math.exp(score - level)
        grown = math.log(1 + p * (math.exp(weight) - known))
        if known:
            del tokens[at], scores[at]
        scores[:] = [other - grown for other in scores]
        score += weight - grown
        place = sum(other >= score for other in scores)
        tokens.insert(place, token)
        scores.insert(place, score)

    def judge_anew(self) -> None:
        """Let `promise` rest on positions from here on only."""
        if self._learns:
            self.promise, self._judged = None, 0

    def explain(self) -> list[str]:
        """What was learnt of the drafter; for people."""
        values, drafters = [f"{value:.2f}" for value in self.weights.values], self.weights.drafters
        hints = ", ".join(f"{n}: {v}" for n, v in zip(LENGTHS, values[drafters:], strict=True))
        weights = ", ".join(values[:drafters])
        return [
            f"weights: of each drafter {weights}, of its lists {self.weights.trust:.3f}, of n-gram hints by length of match {hints}"
        ]

    def _below_root(self, node: Node) -> list[int]:
        """The last tokens of the path from the root to the node, as many as an n-gram looks at."""
        path: list[int] = []
        while node is not self._tree.root and len(path) < LENGTHS[0]:
            path.append(node.token)
            node = self._tree.nodes[node.parent]
        return path[::-1]

    def decided(self, path: Sequence[int], tokens: Sequence[int]) -> None:
        """The target chose tokens[i] after the node path[i]."""
        for node, token in zip(path, tokens, strict=True):
            if node in self._lists:
                found = self._lists.pop(node)
                listed, x = found.features()
                p = self.weights.learn(
                    x, found.coverage, listed.index(token) if token in listed else None
                )
                self._judged += 1
                share = max(self.LATELY, 1 / self._judged)
                self.promise = (self.promise or 0.0) * (1 - share) + share * p
        if self._ngrams is not None:
            self._ngrams.extend(tokens)
        if len(self._lists) > 4 * len(self._tree) + 64:  # of nodes that died
            self._lists = {i: found for i, found in self._lists.items() if i in self._tree}
