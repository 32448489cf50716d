"""A mixture is several drafters as one: all are asked for the same nodes and their lists united.

A candidate has a z by each member, and core/score.py finds a weight for each member: this is a
log-linear mixture (docs/policy.md, section 4). What a member knows ends at its list, so a token
that the list lacks is taken to be half as likely as the last one on it. That is no less in the
token's favour than what the list says, and a list of one token still says something. Where a member
cannot go on from a node, its z is the same for all candidates, so it prefers none. In an emulated
run all members share one forward: `emulate.draft_ms` is taken once for what is asked of all of
them.

Members that compute elsewhere are asked first and compute meanwhile. They are left out where they
cost more time than they save (core/pool.py, Patience).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from flowspec.core.messages import Commit, Drafted, DraftNode
from flowspec.core.pool import Patience
from flowspec.core.request import Request
from flowspec.draft.base import Asks, Drafter, Noise, Remote, Session

NOTHING = -1
"""This stands where a list has no token."""


class MixtureSession(Session):
    """A MixtureSession holds the members' sessions of one request."""

    def __init__(
        self, members: Sequence[Drafter], sessions: Sequence[Session], patience: Patience | None
    ):
        self.sessions = sessions
        self._members, self._patience = members, patience
        self.guesses: dict[int, dict[frozenset[int], int]] = {}
        """This maps a node to the token that each set of members would have guessed after it."""

    def commit(self, commit: Commit, features: Tensor | None = None) -> None:
        if self._patience:
            for node, token in zip(commit.path, commit.tokens, strict=True):
                for some, guess in self.guesses.get(node, {}).items():
                    self._patience.judged(some, guess == token)
            self.guesses = {id: of for id, of in self.guesses.items() if id >= commit.root}
        for member, session in zip(self._members, self.sessions, strict=True):
            session.commit(commit, features if member.features else None)

    def learn(self, features: Tensor) -> None:
        for member, session in zip(self._members, self.sessions, strict=True):
            if member.layers:
                session.learn(features)

    def end(self) -> None:
        for session in self.sessions:
            session.end()


class MixtureDrafter(Drafter):
    """A MixtureDrafter asks all its members.

    Members that read features of the target read the same ones: those of `features`, or those of
    `layers`."""

    def __init__(self, members: Sequence[Drafter]):
        self._members = members
        self.features = any(member.features for member in members)
        self.layers = next((member.layers for member in members if member.layers), ())
        self._elsewhere = {k: m for k, m in enumerate(members) if isinstance(m, Remote)}
        here = frozenset(k for k in range(len(members)) if k not in self._elsewhere)
        self._patience = Patience(len(members), here) if self._elsewhere else None

    def begin(
        self, request: Request, noise: Noise | None, features: Tensor | None = None
    ) -> MixtureSession:
        sessions = [
            member.begin(request, noise, features if member.features or member.layers else None)
            for member in self._members
        ]
        return MixtureSession(self._members, sessions, self._patience)

    def propose(self, asks: Asks) -> list[Drafted]:
        patience, asked = self._patience, frozenset(range(len(self._members)))
        if patience:
            asked = patience.chosen(self.lap, time.monotonic())
        answers, made = self._answers(asks, asked), list[Drafted]()
        for k, (session, nodes) in enumerate(asks):
            own = {member: answer[k] for member, answer in answers.items()}
            made.append(self._united(nodes, own))
            if len(asked) == len(self._members):
                self._note(session, nodes, own, made[-1])
        return made

    def _united(self, nodes: Sequence[DraftNode], answers: Mapping[int, Drafted]) -> Drafted:
        """Return one answer of all members; who was not asked is taken to agree with the others."""
        ids, asked = [node.id for node in nodes], sorted(answers)
        answer = united(ids, [answers[k] for k in asked])
        z = np.repeat(answer.z.mean(2, keepdims=True), len(self._members), 2)
        z[:, :, asked] = answer.z
        return dataclasses.replace(answer, z=z)

    def _answers(self, asks: Asks, asked: frozenset[int]) -> dict[int, list[Drafted]]:
        """Return the answers of each member that is asked."""
        own = {
            k: [(session.sessions[k], nodes) for session, nodes in asks]
            for k in range(len(self._members))
        }
        for k in self._elsewhere.keys() - asked:
            for session, nodes in own[k]:
                session.saw(nodes)
        waiting = {k: self._elsewhere[k].start(own[k]) for k in self._elsewhere.keys() & asked}
        begun = time.monotonic()
        here = [k for k in own if k not in self._elsewhere]
        answers = {k: self._members[k].propose(own[k]) for k in here}
        took = dict.fromkeys(here, time.monotonic() - begun)
        for k, wait in waiting.items():
            answers[k], took[k] = wait()
        if self._patience:
            for k, seconds in took.items():
                self._patience.took(k, seconds)
        return answers

    def _note(
        self,
        session: MixtureSession,
        nodes: Sequence[DraftNode],
        answers: Mapping[int, Drafted],
        whole: Drafted,
    ) -> None:
        """Note what each set of members that could have been asked guesses after these nodes.

        `whole` is the answer of all."""
        ids, sets = [node.id for node in nodes], self._patience.sets if self._patience else ()
        for some in sets:
            every = len(some) == len(answers)
            answer = whole if every else united(ids, [answers[k] for k in sorted(some)])
            guesses = dict.fromkeys(ids, NOTHING)
            guesses |= dict(zip(answer.nodes, answer.tokens[:, :1].ravel().tolist(), strict=False))
            for id, guess in guesses.items():
                session.guesses.setdefault(id, {})[some] = guess


class _Lists(NamedTuple):
    """_Lists are a member's answer with a row for each of n nodes.

    The row of a node that it cannot go on from has no tokens and is zero elsewhere."""

    tokens: np.ndarray
    """The tokens [n, k] are NOTHING behind a list that is shorter than k."""
    z: np.ndarray
    """These are the tokens' z [n, k]."""
    rest: np.ndarray
    """This is the z [n] of any token that is not listed."""
    coverage: np.ndarray
    """The coverage [n] is how often the target's choice is in the list."""

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
        """Return which of these tokens [n, m] are listed, and the z of each."""
        match = tokens[:, :, None] == self.tokens[:, None, :]  # a token matches at most once
        listed = match.any(2)
        return listed, np.where(listed, (match * self.z[:, None, :]).sum(2), self.rest[:, None])


def united(ids: Sequence[int], answers: Sequence[Drafted]) -> Drafted:
    """Return one answer for these nodes, with all candidates that any drafter has.

    A candidate has a z by each drafter. The best mean z (with equal weights) comes first."""
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
    """Return which tokens of all lists, put side by side, are in no list further left.

    It is a bool [n, m]."""
    first = tokens != NOTHING
    begin = 0
    for d, member in enumerate(members):
        own = slice(begin, begin + member.tokens.shape[1])
        for other in listed[:d]:
            first[:, own] &= ~other[:, own]
        begin = own.stop
    return first
