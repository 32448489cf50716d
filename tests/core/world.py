"""A world in virtual time for the heart: a made-up target, stages that only keep books, links with random delays.

Every link is first in, first out; prunes travel beside the ring, late or never. Each attention row that a stage would
read is checked against the true context, and the text against plain decoding.
"""

import heapq
import itertools
import random
from dataclasses import dataclass

import numpy as np

from flowspec.core.curve import Curve
from flowspec.core.messages import Commit, Cost, Draft, Drafted, Finish, Idle, Proposal, Prune, Returned, Segment, Started, Wake, Woke
from flowspec.core.policy import PolicyConfig, TreeConfig, make_policy
from flowspec.core.request import Request, Sampling
from flowspec.core.scheduler import Scheduler
from flowspec.core.stage import Accepted, StageState, Waiting

VOCABULARY = 40
LOST = (-1, -1)
"""a cache row that nobody may read"""


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


class ToyStage:
    """A stage whose cache rows hold (position, token), and which hands over the token of each node that became text."""

    def __init__(self):
        self.state, self.cache, self.computed = StageState(), [], 0
        self.waiting, self.handed = Waiting(), []

    def prefill(self, tokens):
        admitted = self.state.extend(len(tokens))
        self.handed += tokens
        self.cache += [(int(p), t) for p, t in zip(admitted.positions, tokens, strict=True)]

    def prune(self, prune):
        at, text = self.state.context, self.state.decided(prune)
        gather = self.state.prune(prune)
        assert at == len(self.handed), "something of the text was left out, or handed over twice"
        self.handed += self.waiting.settle(text, self.state.row)
        if gather:
            self.cache[gather.base :] = [self.cache[r] for r in gather.rows]
        needed = {*range(self.state.base), *self.state.tail, *self.state.row.values()}
        self.cache = [row if r in needed else LOST for r, row in enumerate(self.cache)]  # as an abandoned forward leaves them

    def forward(self, segment, drop=True):
        """The segment's surviving part and, for each row, the tokens it attends to in order of position."""
        admitted = self.state.admit(segment.ids, segment.parents, drop)
        kept = [segment.tokens[k] for k in admitted.kept]
        self.cache += [(int(p), t) for p, t in zip(admitted.positions, kept, strict=True)]
        self.waiting.hold((segment.ids[k] for k in admitted.kept), kept)
        self.computed += len(kept)
        assert len(self.cache) == self.state.length
        seen = {}
        for row, k in enumerate(admitted.kept):
            rows = sorted(self.cache[r] for r in admitted.sees(row))
            assert [p for p, _ in rows] == list(range(len(rows))), "rows that are not one path"
            seen[segment.ids[k]] = tuple(t for _, t in rows)
        return only(segment, admitted.kept), seen


def only(segment: Segment, kept) -> Segment:
    return Segment(segment.number, *(tuple(field[k] for k in kept) for field in segment[1:]))


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
        self.request = Request(id=1, prompt=prompt, sampling=Sampling(max_new_tokens=r.randint(1, 70)), eos=eos)
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


class World:
    """Runs one case. `stage` may be a mutant's class."""

    def __init__(self, case: Case, stage=ToyStage):
        self.case, self.random = case, case.random
        policy = make_policy(case.method, case.tree, case.switches, case.stages, case.features)
        self.scheduler = Scheduler(case.request, policy, drafts=case.drafts)
        self.stages = [stage() for _ in range(case.stages)]
        self.context = {-1: case.request.prompt[:-1]}  # node -> the text up to it, for the drafter and the checks
        self.out, self.reason = [], None
        self.heap, self.tick, self.last = [], itertools.count(), {}
        self.busy = 0.0
        self.accepted, self.text_nodes = Accepted(), set()  # what the last stage takes to be text

    def run(self) -> list[int]:
        now = 0.0
        for chunk in self._chunks():
            self._post("hop0", now, self.random.random(), ("prefill", 0, chunk))
        self._perform(self.scheduler.start(now), now)
        while self.reason is None:
            now, _, (kind, *what) = heapq.heappop(self.heap)
            getattr(self, "_on_" + kind)(now, *what)
            self.scheduler.validate()
        whole = [*self.case.request.prompt, *self.out]
        assert all(stage.handed == whole[: len(stage.handed)] for stage in self.stages), "what was handed over is not the text"
        return self.out

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
                        self._post(f"prune{k}", now, self.random.random() * self.case.slow_prunes, ("prune", k, action))
            elif isinstance(action, Draft):
                self._post("draft", now, self.random.random(), ("draft", action))
            elif isinstance(action, Commit):
                self.out += action.tokens
                assert self.text_nodes.issuperset(action.path), "a node became text that the last stage did not take for it"
            elif isinstance(action, Wake):
                self._post("wake", now, max(0.0, action.at - now), ("wake",))
            elif isinstance(action, Finish):
                self.reason = action.reason

    def _on_prefill(self, now, k, tokens):
        self.stages[k].prefill(tokens)
        if k + 1 < len(self.stages):
            self._post(f"hop{k + 1}", now, self.random.random(), ("prefill", k + 1, tokens))

    def _on_segment(self, now, k, segment):
        drop = self.case.switches.drop_dead
        kept, seen = self.stages[k].forward(segment, drop)
        assert drop or kept == segment, "a row was dropped"
        for i, tokens in seen.items():
            live = i in self.stages[k].state.row
            assert tokens == self.context[i] or not (live or drop), "a stage attended to the wrong rows"
        if k == 0:
            started = Started(segment.number, len(kept.ids), 0.5 if kept.ids else 0.0, 0.0)
            self._post("control", now, self.random.random(), ("news", started))
            if self.random.random() < 0.1:
                self._post("control", now, self.random.random(), ("news", Idle()))
        if self.random.random() < 0.3:
            curve = Curve.line(self.random.random(), 0.1 * self.random.random())
            cost = Cost(k + 1, curve, 0.1 * self.random.random())
            self._post("control", now, self.random.random(), ("news", cost))
        if not kept.ids:
            return
        if k + 1 < len(self.stages):
            self._post(f"hop{k + 1}", now, 0.5 + self.random.random(), ("segment", k + 1, kept))
        else:
            choices = {i: target(self.context[i]) for i in kept.ids}
            found = self.accepted.among(kept.ids, kept.parents, kept.tokens, list(choices.values()))
            self.text_nodes.update(kept.ids[j] for j in found)
            assert all(target(self.context[kept.parents[j]]) == kept.tokens[j] for j in found if kept.parents[j] != -1)
            self._post("return", now, 0.5 + self.random.random(), ("returned", Returned(segment.number, kept.ids, choices)))

    def _on_prune(self, now, k, prune):
        self.stages[k].prune(prune)

    def _on_draft(self, now, draft):
        proposals = []
        for id, parent, token in draft.nodes:
            context = self.context.setdefault(id, (*self.context[parent], token))
            k = self.random.randint(1, 4)
            tokens = self.random.sample(range(VOCABULARY), k)
            if self.random.random() < self.case.accuracy and target(context) not in tokens:
                tokens[0] = target(context)
            logq = np.sort(np.log(np.array([self.random.random() + 1e-3 for _ in tokens])))[::-1]
            proposals.append(None if self.random.random() < 0.02 else Proposal(np.array(tokens), logq))
        self._perform(self.scheduler.handle(Drafted.pack([n.id for n in draft.nodes], proposals), now), now)

    def _on_news(self, now, event):
        self._perform(self.scheduler.handle(event, now), now)

    _on_returned = _on_news

    def _on_wake(self, now):
        self._perform(self.scheduler.handle(Woke(), now), now)
