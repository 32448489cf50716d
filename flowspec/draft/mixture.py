"""Several drafters as one: each is asked for the same nodes, and what they propose is put together.

A candidate has a z by each member, and core/score.py finds a weight for each: a log-linear mixture (POLICY section 4). What a member
knows ends at its list, so a token that it lacks is taken to be half as likely as the last one there: no less in its favour than
what the list says, and a list of one still says something. Where a member cannot go on from a node, it says the same of all: nothing.
In an emulated run all members share one forward: `emulate.draft_ms` is taken once for what is asked of all of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flowspec.core.messages import Commit, Drafted
from flowspec.core.request import Request
from flowspec.draft.base import Asks, Drafter, Noise, Session

NOTHING = -1
"""where a list has no token"""


class MixtureSession(Session):
    """The members' sessions of a request."""

    def __init__(self, members: Sequence[Drafter], sessions: Sequence[Session]):
        self.sessions = sessions
        self._members = members

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        for member, session in zip(self._members, self.sessions, strict=True):
            session.commit(commit, features if member.features else None)

    def learn(self, features: Tensor) -> None:
        for member, session in zip(self._members, self.sessions, strict=True):
            if member.layers:
                session.learn(features)


class MixtureDrafter(Drafter):
    """Members that read features of the target read the same ones: `features` or `layers`."""

    def __init__(self, members: Sequence[Drafter]):
        self._members = members
        self.features = any(member.features for member in members)
        self.layers = next((member.layers for member in members if member.layers), ())

    def begin(
        self, request: Request, noise: Noise | None, features: Tensor | None = None
    ) -> MixtureSession:
        sessions = [
            member.begin(request, noise, features if member.features or member.layers else None)
            for member in self._members
        ]
        return MixtureSession(self._members, sessions)

    def propose(self, asks: Asks) -> list[Drafted]:
        answers = [
            member.propose([(session.sessions[k], nodes) for session, nodes in asks])
            for k, member in enumerate(self._members)
        ]
        return [
            united([node.id for node in nodes], [answer[k] for answer in answers])
            for k, (_, nodes) in enumerate(asks)
        ]


class _Lists(NamedTuple):
    """A member's answer with a row for each of n nodes; zeros where it has none."""

    tokens: np.ndarray
    """[n, k]"""
    z: np.ndarray
    """[n, k]"""
    rest: np.ndarray
    """[n]: z of what is not listed"""
    coverage: np.ndarray
    """[n]"""

    @classmethod
    def of(cls, answer: Drafted, ids: Sequence[int]) -> _Lists:
        n, k = len(ids), answer.tokens.shape[1]
        made = cls(np.full((n, k), NOTHING), np.zeros((n, k)), np.zeros(n), np.zeros(n))
        if answer.nodes:
            row = {id: k for k, id in enumerate(ids)}
            at, z = [row[id] for id in answer.nodes], answer.z[:, :, 0]
            there = z > -np.inf
            made.tokens[at] = np.where(there, answer.tokens, NOTHING)
            made.z[at] = np.where(there, z, 0.0)
            made.rest[at] = np.where(there, z, np.inf).min(1) - math.log(2)
            made.coverage[at] = answer.coverage
        return made

    def look_up(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these tokens [n, m] are listed, and z of each."""
        match = tokens[:, :, None] == self.tokens[:, None, :]  # at most one a token
        listed = match.any(2)
        return listed, np.where(listed, (match * self.z[:, None, :]).sum(2), self.rest[:, None])


def united(ids: Sequence[int], answers: Sequence[Drafted]) -> Drafted:
    """One answer for these nodes: all candidates that any drafter has, z by each, best first by its mean: with equal weights."""
    known = {id for answer in answers for id in answer.nodes}
    ids = [id for id in ids if id in known]
    members = [_Lists.of(answer, ids) for answer in answers]
    tokens = np.concatenate([member.tokens for member in members], 1)
    looked_up = [member.look_up(tokens) for member in members]
    z = np.stack([found for _, found in looked_up], 2)
    z[~_first(tokens, members, [listed for listed, _ in looked_up])] = -np.inf
    width = int((z[:, :, 0] > -np.inf).sum(1).max(initial=0))
    order = np.argsort(-z.mean(2), 1, kind="stable")[:, :width]
    coverage = np.max([member.coverage for member in members], 0)
    return Drafted(
        tuple(ids),
        np.take_along_axis(tokens, order, 1),
        np.take_along_axis(z, order[..., None], 1),
        any(answer.coupled for answer in answers),
        coverage,
    )


def _first(
    tokens: np.ndarray, members: Sequence[_Lists], listed: Sequence[np.ndarray]
) -> np.ndarray:
    """bool [n, m]: which tokens of all lists, put side by side, are in no list further left."""
    first = tokens != NOTHING
    begin = 0
    for d, member in enumerate(members):
        own = slice(begin, begin + member.tokens.shape[1])
        for other in listed[:d]:
            first[:, own] &= ~other[:, own]
        begin = own.stop
    return first
