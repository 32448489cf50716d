"""How likely a candidate is to be the target's choice: a conditional logit, fitted while it is used. Pure.

    u(t) = w * z(t) + sum_m v_m * [t is what followed the last m tokens before]        p(t) = C * softmax(u)(t)

z is the drafter's log-probability, above temperature 0 plus the target's own keyed noise. If the target's logits are
the drafter's plus Gumbel error of scale 1/w, p is exact; so w says how good the drafter is. C is the share of positions
whose choice is among the candidates: what the drafter claims, times how far such claims have held. The weights
follow a damped Newton step at each decided position:

    g = x(chosen) - E_p[x],   H <- 0.995 H + Var_p[x],   w <- w + clip((H + I/2)^-1 g, +-0.3)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowspec.core.messages import Drafted
from flowspec.core.tree import Node, TokenTree

LENGTHS = (4, 3, 2)
"""lengths of the matches that an n-gram prediction may rest on; the longest counts"""
FEATURES = 1 + len(LENGTHS)


class Weights:
    """[w, v_4, v_3, v_2], and how far claims of coverage hold, learnt from decided positions; started at w = 1, v = 0."""

    FORGET = 0.995
    STEP = 0.3

    def __init__(self, learns: bool = True):
        self.values = np.zeros(FEATURES)
        self.values[0] = 1.0
        self.learns = learns
        self._curvature = np.eye(FEATURES)
        self._held = self._claimed = 20.0  # positions: a prior

    def score(self, x: np.ndarray, coverage: np.ndarray) -> np.ndarray:
        """log p [n, k] of candidates with features x [n, k, FEATURES], lists that claim `coverage` [n]; -inf where x[..., 0] is."""
        u = x[..., 0] * self.values[0] + x[..., 1:] @ self.values[1:]
        u -= u.max(1, keepdims=True)
        return u + np.log(np.minimum(0.999, coverage * self._held / self._claimed) / np.exp(u).sum(1))[:, None]

    def learn(self, x: np.ndarray, coverage: float, chosen: int | None) -> None:
        """One decided position: features [k, FEATURES] and claim of its list, and which of it the target chose, if any."""
        if not self.learns:
            return
        self._claimed += coverage
        if chosen is None:
            return
        self._held += 1
        u = x @ self.values
        p = np.exp(u - u.max())
        p /= p.sum()
        mean = p @ x
        spread = (x * p[:, None]).T @ x - np.outer(mean, mean)
        self._curvature = self.FORGET * self._curvature + spread
        step = np.linalg.solve(self._curvature + 0.5 * np.eye(FEATURES), x[chosen] - mean)
        self.values += step.clip(-self.STEP, self.STEP)


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


class Scorer:
    """Scores a drafter's proposals, and learns from what the target chose. One a request."""

    def __init__(self, calibrate: bool, ngrams: bool):
        self.weights = Weights(learns=calibrate)
        self._uses_ngrams = ngrams
        self._candidates: dict[int, tuple[np.ndarray, np.ndarray, float]] = {}  # node -> tokens [k], features [k, FEATURES], coverage

    def attach(self, tree: TokenTree, prompt: Sequence[int]) -> None:
        self._tree = tree
        self._ngrams = Ngrams(prompt) if self._uses_ngrams else None

    def scored(self, nodes: list[Node], drafted: Drafted, top_k: int) -> list[tuple[Node, list[int], list[float]]]:
        """Each node with its best top_k candidates, best first: their tokens and their (absolute) scores."""
        if not nodes:
            return []
        tokens, x = self._features(nodes, drafted)
        scores = self.weights.score(x, drafted.coverage)
        if self._ngrams is not None:  # the best may not come first any more
            order = np.argsort(-scores, 1)[:, :top_k]
            best, scores = np.take_along_axis(tokens, order, 1), np.take_along_axis(scores, order, 1)
        else:
            best, scores = tokens[:, :top_k], scores[:, :top_k]
        scores = scores + np.array([n.score for n in nodes])[:, None]
        counts = (scores > -np.inf).sum(1).tolist()
        if self.weights.learns:
            lists = zip(tokens, x, drafted.coverage.tolist(), strict=True)
            self._candidates.update(zip((n.id for n in nodes), lists, strict=True))
        rows = zip(nodes, best.tolist(), scores.tolist(), counts, strict=True)
        return [(node, t[:n], s[:n]) for node, t, s, n in rows]

    def _features(self, nodes: list[Node], drafted: Drafted) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [n, k] and features [n, k, FEATURES]; with n-grams the list is one longer, for a prediction that it lacks."""
        z = drafted.logq if drafted.noise is None else drafted.logq + drafted.noise
        tokens = drafted.tokens
        if self._ngrams is None:
            x = np.zeros((*z.shape, FEATURES))
            x[..., 0] = z
            return tokens, x
        predicted = [self._ngrams.after(self._below_root(n)) or (-1, 0) for n in nodes]
        said = np.array(predicted)
        hit = tokens == said[:, :1]
        # the drafter gives a token that it did not list less than those it did; with noise its place is unknown
        lacking = (said[:, 0] >= 0) & ~hit.any(1) & (drafted.noise is None)
        cut = np.where(lacking, np.where(z > -np.inf, z, np.inf).min(1), -np.inf)
        x = np.zeros((len(nodes), z.shape[1] + 1, FEATURES))
        x[:, :-1, 0], x[:, -1, 0] = z, cut
        hit = np.hstack([hit, lacking[:, None]])
        rows, columns = hit.nonzero()
        x[rows, columns, 1 + said[rows, 1]] = 1
        return np.hstack([tokens, said[:, :1]]), x

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
            if node in self._candidates:
                listed, x, coverage = self._candidates.pop(node)
                there = x[:, 0] > -np.inf
                at = np.flatnonzero(listed[there] == token)
                self.weights.learn(x[there], coverage, int(at[0]) if len(at) else None)
        if self._ngrams is not None:
            self._ngrams.extend(tokens)
        if len(self._candidates) > 4 * len(self._tree) + 64:  # of nodes that died
            self._candidates = {i: c for i, c in self._candidates.items() if i in self._tree}
