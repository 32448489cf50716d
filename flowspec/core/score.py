"""The scorer estimates how likely a candidate is to be the target's choice.

The model is a conditional logit, fitted while it is used:

    u(t) = sum_d w_d * z_d(t) + sum_m v_m * [t is what followed the last m tokens before]
    p(t) = C * softmax(u)(t)

z_d is the log-probability by drafter d (there may be several, draft/mixture.py); above temperature
0 it may include the target's own keyed noise. If the target's logits are a single drafter's plus
Gumbel errors of scale 1/w, p is exact; so w says how good the drafter is. C is the share of
positions whose choice is among the candidates: what the drafter claims, times how far such claims
have held. At each decided position the weights take a damped Newton step:

    g = x(chosen) - E_p[x],   H <- 0.995 H + Var_p[x],   w <- w + clip((H + I/2)^-1 g, +-0.3)

This module is pure (no torch, clock or I/O).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from flowspec.core.messages import Drafted
from flowspec.core.tree import Node, TokenTree

LENGTHS = (4, 3, 2)
"""An n-gram prediction may rest on matches of these lengths; the longest match counts."""


class Weights:
    """These are the weights [w_1, ..., w_D, v_4, v_3, v_2] and how far claims of coverage hold.

    Both are learnt from decided positions. The weights start at w = 1/D and v = 0."""

    FORGET = 0.995
    """The curvature H is multiplied by this at each decided position."""
    STEP = 0.3
    """A Newton step changes a weight by at most this."""
    MEMORY = 64.0
    """All earlier positions together count as at most this many positions of a new text."""

    def __init__(self, drafters: int = 1, learns: bool = True):
        self.drafters, self.learns = drafters, learns
        self.values = np.zeros(drafters + len(LENGTHS))
        self.values[:drafters] = 1 / drafters
        self._curvature = np.eye(len(self.values))
        # positions: a prior that few decisions outweigh
        self._held, self._claimed = (2.0, 3.0) if learns else (1.0, 1.0)

    def begin(self) -> None:
        """Begin a new text, in which what others have taught counts as at most MEMORY positions."""
        share = min(1.0, self.MEMORY / self._claimed)
        self._held, self._claimed = self._held * share, self._claimed * share
        eye = np.eye(len(self.values))
        self._curvature = eye + share * (self._curvature - eye)

    @property
    def trust(self) -> float:
        """Return the share of the claimed coverage that has held."""
        return self._held / self._claimed

    def learn(self, x: np.ndarray, coverage: float, chosen: int | None) -> float:
        """Learn from one decided position; return the probability that the target's choice had.

        `x` [k, D + 3] are the features of the position's candidates, `coverage` is what their list
        claimed, and `chosen` is the index of the target's choice (None: it was not among them).
        Return 0 if there is nothing to learn from."""
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
    """The n-grams predict a token: what followed the last few tokens earlier in the text so far."""

    def __init__(self, tokens: Sequence[int]):
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append tokens to the text."""
        for token in tokens:
            for n in LENGTHS:
                if len(self._text) >= n:
                    self._next[tuple(self._text[-n:])] = token
            self._text.append(token)

    def after(self, path: Sequence[int]) -> tuple[int, int] | None:
        """Return the prediction (token, index into LENGTHS) after the text so far and `path`.

        The longest match counts; the prediction is None without one."""
        ending = (*self._text[-LENGTHS[0] :], *path)
        for k, n in enumerate(LENGTHS):
            token = self._next.get(ending[-n:]) if len(ending) >= n else None
            if token is not None:
                return token, k
        return None


class Proposed(NamedTuple):
    """A list is what was proposed after one node, kept until the target has chosen."""

    tokens: np.ndarray
    """The candidates have shape [k]."""
    z: np.ndarray
    """Their log-probabilities have shape [k, D] and are -inf past the end of a shorter list."""
    coverage: float
    """The drafter claims this probability that the target's choice is in the list."""
    hint: tuple[int, int] | None
    """This is the n-gram prediction (token, index into LENGTHS), if there is one."""
    open: bool
    """A hint that is not in the list joins it. Without noise, the drafter gives the hint less than
    what it did list; with noise, its z is unknown, so the list is not open."""

    def features(self) -> tuple[list[int], np.ndarray]:
        """Return the tokens and the features [k, D + 3] of the candidates, the hint among them."""
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
    """A scorer scores a drafter's proposals and learns from the target's choices.

    Each request has its own."""

    LATELY = 0.15
    """A new position has at least this weight in the running mean `promise`."""
    UNKNOWN = 0.25
    """This is the promise of a scorer that does not learn."""

    def __init__(self, calibrate: bool, ngrams: bool):
        self._learns, self._uses_ngrams = calibrate, ngrams
        self._lists: dict[int, Proposed] = {}  # by node id
        self._judged = 0  # positions that `promise` rests on
        self.promise = None if calibrate else self.UNKNOWN
        """This is the probability that recent lists gave to the target's choices (a running mean);
        None before the first was judged."""

    def attach(
        self, tree: TokenTree, prompt: Sequence[int], learnt: dict[tuple[int, bool], Weights]
    ) -> None:
        """Begin a request whose tree is `tree`.

        `learnt` maps (number of drafters, whether they are coupled) to weights; missing ones are
        added."""
        self._tree, self._learnt = tree, learnt if self._learns else {}
        for weights in self._learnt.values():
            weights.begin()
        self._use(1, False)  # until an answer says otherwise
        self._ngrams = Ngrams(prompt) if self._uses_ngrams else None

    def scored(
        self, nodes: list[Node], drafted: Drafted, top_k: int
    ) -> list[tuple[Node, list[int], list[float]]]:
        """Return each node with the tokens and absolute scores of its top_k candidates, best first.

        One pass scores the batch without hints. A row with a hint is then mended by itself, since
        few rows have one and numpy costs by the call."""
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
                (node.id, Proposed(*facts)) for node, facts in zip(nodes, lists, strict=True)
            )
        return scored

    def _use(self, drafters: int, coupled: bool) -> None:
        """Use the weights of this kind of answer, new ones if there are none."""
        self._kind = drafters, coupled
        self.weights = self._learnt.setdefault(self._kind, Weights(drafters, self._learns))

    def _ranked(self, drafted: Drafted) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return tokens [n, k], z [n, k, D] and u [n, k], best first; the best one's u is 0."""
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
        """Raise the hinted candidate's u by its weight, in place.

        The softmax's sum grows by a factor, and all log p fall by its log. `level` is the score
        that the list's candidates have together. A hint that is not in the list is added with the
        u of the last candidate if `joins`, else it is ignored."""
        token, length = hint
        known = token in tokens
        if not known and not joins:
            return
        at = tokens.index(token) if known else len(tokens) - 1  # one that joins begins as the last
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
        """Let `promise` rest only on positions from here on."""
        if self._learns:
            self.promise, self._judged = None, 0

    def explain(self) -> list[str]:
        """Return lines that tell people what was learnt of the drafter."""
        values, drafters = [f"{value:.2f}" for value in self.weights.values], self.weights.drafters
        hints = ", ".join(f"{n}: {v}" for n, v in zip(LENGTHS, values[drafters:], strict=True))
        weights = ", ".join(values[:drafters])
        return [
            f"weights: of each drafter {weights}, of its lists {self.weights.trust:.3f}, "
            f"of n-gram hints by length of match {hints}"
        ]

    def _below_root(self, node: Node) -> list[int]:
        """Return the last tokens of the path from below the root to the node.

        They are as many as an n-gram looks at, or fewer."""
        path: list[int] = []
        while node is not self._tree.root and len(path) < LENGTHS[0]:
            path.append(node.token)
            node = self._tree.nodes[node.parent]
        return path[::-1]

    def decided(self, path: Sequence[int], tokens: Sequence[int]) -> None:
        """Learn that the target chose tokens[i] after the node path[i]."""
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
        if len(self._lists) > 4 * len(self._tree) + 64:  # drop those of dead nodes
            self._lists = {i: found for i, found in self._lists.items() if i in self._tree}
