"""A world in virtual time for the heart: a made-up target, stages that only keep books, links with random delays.

Every link is first in, first out; prunes travel beside the ring, late or never. Each attention row that a stage would
read is checked against the true context, and the text against plain decoding.
"""

import heapq
import itertools
import random
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from flowspec.core.curve import Curve
from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    Move,
    Pass,
    Settled,
    StageMachine,
    Tell,
)
from flowspec.core.messages import (
    Commit,
    Cost,
    Draft,
    Drafted,
    Finish,
    Idle,
    Proposal,
    Prune,
    Returned,
    Segment,
    Wake,
    Woke,
)
from flowspec.core.policies import make_policy
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.scheduler import Scheduler
from flowspec.core.stage import StageState
from flowspec.core.topology import Topology
from flowspec.models.cache import Caches
from flowspec.models.stage import Cached

VOCABULARY = 40
REQUEST = 1


def target(context: tuple[int, ...]) -> int:
    """The made-up target: its next token is a function of the whole context."""
    return hash(context) % VOCABULARY


def greedy(request: Request) -> list[int]:
    """Plain decoding: the oracle."""
    context, out = tuple(request.prompt), []
    while len(out) < request.sampling.max_new_tokens:
        out.append(target((*context, *out)))
        if out[-1] in request.eos:
            break
    return out


class ToyModel:
    """In a model's place: each layer keeps (token, position + 1) of a row in the production cache, and each row reads what it may see."""

    LAYERS = 2
    alone = False

    def __init__(self):
        self.seen: list[np.ndarray] = []
        """of each row of the last forward: what it attends to in the last layer, int64 [k, 2] in the order of the cache"""

    def __call__(self, rows, parts, taps, needed):
        caches = Caches(parts)
        positions = np.concatenate([part.admitted.positions for part in parts])
        made = torch.stack([rows, torch.from_numpy(positions) + 1], -1)[
            None, None
        ]  # so that rows never written are (0, 0)
        for layer in range(self.LAYERS):
            if layer and not needed():
                return None, None
            keys, _ = caches.update(made, made, layer)
        self.seen = [
            np.concatenate([held[: admitted.base], held[np.array(seen, dtype=int)]])
            for (admitted, _), held in zip(parts, (k[0, 0].numpy() for k in keys), strict=True)
            for seen in admitted.behind
        ]
        return rows, rows[:, None] if taps else None


class Stage:
    """The production machine and cache around a toy model; hands over the token of each node that became text."""

    STATE = StageState
    COMPACT = StageState.COMPACT

    def __init__(self, rank: int, topology: Topology):
        self.model, self.rows, self.handed, self.abandoned = ToyModel(), [], [], 0
        self.cached = Cached(self.model, taps=[0])
        self.machine = StageMachine(rank, topology, self._books)

    def _books(self) -> StageState:
        state = self.STATE()
        state.COMPACT = self.COMPACT
        return state

    @property
    def state(self) -> StageState:
        return self.machine.books(REQUEST)

    def perform(self, event, tokens=(), between=lambda: None, walk=None):
        """What an event leads to outside this stage: [Tell or Pass], and of a forward that was not abandoned for each of its nodes the
        tokens it attends to in order of position. `between` its layers something may happen; `walk`: a last stage's choices."""
        told, seen = [], {}
        for action in self.machine.handle(event):
            if isinstance(action, Compute):
                more, seen = self._compute(action, torch.tensor(tokens), between, walk)
                told += more
            else:
                told += self._perform(action)
        self.validate()
        return told, seen

    def _compute(self, action, tokens, between, walk):
        def needed() -> bool:
            between()
            return self.machine.wanted()

        segment, kept = action.segment, action.admitted.kept
        out = self.cached.forward(tokens[kept], action.admitted, needed, segment and segment.ids)
        if out is None:
            self.abandoned += 1
        elif segment is None:
            self.handed += tokens.tolist()
        elif walk:
            self.machine.walk(walk)
        told = [
            t for a in self.machine.handle(Computed(0.5, out is not None)) for t in self._perform(a)
        ]
        return told, {
            i: path(s) for i, s in zip(segment.ids, self.model.seen, strict=True)
        } if segment and out is not None else {}

    def _perform(self, action):
        if isinstance(action, Move):
            self.cached.cache.gather(action.gather)
        elif isinstance(action, Settled):
            assert action.at == len(self.handed), (
                "something of the text was left out, or handed over twice"
            )
            tapped = self.cached.settle(action.at, action.text, self.state.row)
            self.handed += tapped.rows[:, 0].tolist() if tapped else []
        else:
            return [action]
        return []

    def validate(self) -> None:
        self.state.validate()
        moved = self.machine.running is None  # else a move of rows may be due
        assert (
            not moved or self.cached.cache.length == self.state.length <= self.cached.cache.capacity
        )


def path(rows: np.ndarray) -> tuple[int, ...]:
    """The tokens of cache rows [k, 2] by position."""
    rows = rows[rows[:, 1].argsort(kind="stable")]
    assert (rows[:, 1] == np.arange(1, len(rows) + 1)).all(), "rows that are not one path"
    return tuple(rows[:, 0].tolist())


@dataclass
class Case:
    """One random run."""

    seed: int
    method: str = "flowspec"
    lost: float = 0.0
    """share of prunes that never arrive"""

    def __post_init__(self):
        self.random = r = random.Random(self.seed)
        self.stages = r.randint(1, 6)
        self.accuracy = r.random()
        self.slow_prunes = r.choice([0.1, 1.0, 8.0])
        prompt = tuple(r.randrange(VOCABULARY) for _ in range(r.randint(1, 9)))
        eos = frozenset(r.sample(range(VOCABULARY), r.choice([0, 0, 1, 2])))
        self.request = Request(
            id=REQUEST, prompt=prompt, sampling=Sampling(max_new_tokens=r.randint(1, 70)), eos=eos
        )
        self.tree = TreeConfig(
            budget=r.choice([None, 1, 2, 5, 30, 200]),
            top_k=r.choice([None, 1, 2, 4]),
            depth=r.choice([None, 1, 3, 8]),
            segment=r.choice([None, 1, 2, 7, 64]),
        )
        switches = ("just_in_time", "calibrate", "ngram_feature", "refresh", "drop_dead", "abort")
        self.switches = PolicyConfig(**{name: r.random() < 0.7 for name in switches})
        self.features = r.random() < 0.5
        self.drafts = r.random() < 0.95
        self.verify_last = r.random() < 0.8


class World:
    """Runs one case. `stage` may be a mutant's class."""

    def __init__(self, case: Case, stage=Stage):
        self.case, self.random = case, case.random
        policy = make_policy(
            case.method, case.tree, case.switches, Topology(case.stages), case.features
        )
        self.scheduler = Scheduler(case.request, policy, drafts=case.drafts)
        self.topology = Topology(case.stages)
        self.stages = [stage(rank, self.topology) for rank in self.topology.stage_ranks]
        for each in self.stages:
            each.machine.handle(Begin(REQUEST, case.switches.drop_dead, case.switches.abort))
        self.context = {
            -1: case.request.prompt[:-1]
        }  # node -> the text up to it, for the drafter and the checks
        self.out, self.reason = [], None
        self.heap, self.tick, self.last = [], itertools.count(), {}
        self.prunes = [deque() for _ in self.stages]  # on their way to each
        self.busy = 0.0
        self.text_nodes = set()  # what the last stage takes to be text

    def run(self) -> list[int]:
        self.begin()
        while self.reason is None:
            now, _, event = heapq.heappop(self.heap)
            self.happens(now, event)
        return self.out

    def begin(self, now: float = 0.0) -> None:
        for chunk in self._chunks():
            self._post("hop0", now, self.random.random(), ("prefill", 0, chunk))
        self._perform(self.scheduler.start(now), now)

    def happens(self, now, event) -> None:
        """One event, and what must hold after each."""
        kind, *what = event
        getattr(self, "_on_" + kind)(now, *what)
        self.scheduler.validate()
        whole = [*self.case.request.prompt, *self.out]
        assert all(stage.handed == whole[: len(stage.handed)] for stage in self.stages), (
            "what was handed over is not the text"
        )

    def interrupted(self) -> bool:
        """Does a prune come between two layers of a forward?"""
        return self.random.random() < 0.3

    def _chunks(self):
        prompt, k = self.case.request.prompt[:-1], 0
        while k < len(prompt):
            n = self.random.randint(1, 4)
            yield prompt[k : k + n]
            k += n

    def _post(self, link, now, delay, event):
        self.last[link] = at = max(self.last.get(link, 0.0) + 1e-6, now + delay)
        heapq.heappush(self.heap, (at, next(self.tick), event))

    def _perform(self, actions, now):
        for action in actions:
            if isinstance(action, Segment):
                for i, p, t in zip(action.ids, action.parents, action.tokens, strict=True):
                    assert self.context.setdefault(i, (*self.context[p], t))[-1] == t
                self._post("hop0", now, self.random.random(), ("segment", 0, action))
            elif isinstance(action, Prune):
                for k in range(len(self.stages)):
                    if self.random.random() >= self.case.lost:
                        self.prunes[k].append(action)
                        self._post(
                            f"prune{k}",
                            now,
                            self.random.random() * self.case.slow_prunes,
                            ("prune", k),
                        )
            elif isinstance(action, Draft):
                self._post("draft", now, self.random.random(), ("draft", action))
            elif isinstance(action, Commit):
                self.out += action.tokens
                walked = self.text_nodes.issuperset(action.path) or not self.case.verify_last
                assert walked, "a node became text that the last stage did not take for it"
            elif isinstance(action, Wake):
                self._post("wake", now, max(0.0, action.at - now), ("wake",))
            elif isinstance(action, Finish):
                self.reason = action.reason

    def _on_prefill(self, now, k, tokens):
        told, _ = self.stages[k].perform(Chunk(REQUEST, len(tokens)), tokens)
        self._tell(now, told)
        if k + 1 < len(self.stages):
            self._post(f"hop{k + 1}", now, self.random.random(), ("prefill", k + 1, tokens))

    def _on_segment(self, now, k, segment):
        case, stage, choices = self.case, self.stages[k], {}
        last = k + 1 == len(self.stages)

        def between() -> None:
            if self.interrupted():
                self._on_prune(now, k)

        def walk(j) -> int:
            node = stage.machine.running.segment.ids[j]
            return choices.setdefault(node, target(self.context[node]))

        arrived = Arrived(REQUEST, segment, self.random.random(), self.random.random())
        told, seen = stage.perform(
            arrived, segment.tokens, between, walk if last and case.verify_last else None
        )
        for i, tokens in seen.items():
            assert tokens == self.context[i] or not (
                i in stage.state.row or case.switches.drop_dead
            ), "a stage attended to the wrong rows"
        self._tell(now, told)
        for action in told:
            if isinstance(action, Pass):
                assert case.switches.drop_dead or action.segment == segment, "a row was dropped"
                answer = (
                    ("returned", self._answer(action.segment, choices))
                    if last
                    else ("segment", k + 1, action.segment)
                )
                self._post(
                    "return" if last else f"hop{k + 1}", now, 0.5 + self.random.random(), answer
                )

    def _tell(self, now, told) -> None:
        """What stages say beside the ring; now and then they say that one is free, or that forwards cost something else."""
        events = [action.event for action in told if isinstance(action, Tell)]
        events += [Idle()] if self.random.random() < 0.1 else []
        if self.random.random() < 0.3:
            curve = Curve.line(self.random.random(), 0.1 * self.random.random())
            events.append(
                Cost(
                    self.random.choice(self.topology.stage_ranks), curve, 0.1 * self.random.random()
                )
            )
        for event in events:
            self._post("control", now, self.random.random(), ("news", event))

    def _answer(self, segment, choices):
        """Of a last stage that walks, or of all rows where rank 0 picks: it looks at those it walks over."""
        if not self.case.verify_last:
            return Returned(segment.number, segment.ids, lambda i, path: target(self.context[i]))
        self.text_nodes.update(choices)
        return Returned(segment.number, tuple(choices), lambda i, path: choices[i])

    def _on_prune(self, now, k):
        if self.prunes[k]:
            told, _ = self.stages[k].perform(Decided(REQUEST, self.prunes[k].popleft()))
            assert not told

    def _on_draft(self, now, draft):
        proposals = []
        for id, parent, token in draft.nodes:
            context = self.context.setdefault(id, (*self.context[parent], token))
            k = self.random.randint(1, 4)
            tokens = self.random.sample(range(VOCABULARY), k)
            if self.random.random() < self.case.accuracy and target(context) not in tokens:
                tokens[0] = target(context)
            logq = np.sort(np.log(np.array([self.random.random() + 1e-3 for _ in tokens])))[::-1]
            proposals.append(
                None if self.random.random() < 0.02 else Proposal(np.array(tokens), logq)
            )
        self._perform(
            self.scheduler.handle(Drafted.pack([n.id for n in draft.nodes], proposals), now), now
        )

    def _on_news(self, now, event):
        self._perform(self.scheduler.handle(event, now), now)

    _on_returned = _on_news

    def _on_wake(self, now):
        self._perform(self.scheduler.handle(Woke(), now), now)
