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
from flowspec.core.decoding import Decoding
from flowspec.core.learnt import Learnt
from flowspec.core.machine import (
    Arrived,
    Begin,
    Chunk,
    Compute,
    Computed,
    Decided,
    End,
    Move,
    Pass,
    Settled,
    StageMachine,
    Tell,
)
from flowspec.core.messages import (
    Answered,
    Back,
    Batch,
    Cost,
    Decision,
    Draft,
    Drafted,
    Idle,
    Proposal,
    Prunes,
    Read,
    Returned,
    Wake,
    Woke,
)
from flowspec.core.policies import make_policy
from flowspec.core.policy import Dsi, PolicyConfig, TreeConfig
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

    def __call__(self, rows, parts, taps, needed, sharing):
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


class Kept:
    """What a stage holds of a request: its rows, and the token of each node that became text, as it was handed over."""

    def __init__(self, model):
        self.cached, self.handed = Cached(model, taps=[0]), []


class Stage:
    """The production machine and caches around a toy model."""

    STATE = StageState
    COMPACT = StageState.COMPACT

    def __init__(self, rank: int, topology: Topology):
        self.model, self.abandoned, self.shared = ToyModel(), 0, 0
        self.machine = StageMachine(rank, topology, self._books)
        self.kept: dict[int, Kept] = {}

    def _books(self) -> StageState:
        state = self.STATE()
        state.COMPACT = self.COMPACT
        return state

    def begin(self, begin: Begin) -> None:
        self.machine.handle(begin)
        self.kept[begin.request] = Kept(self.model)

    def end(self, request: int) -> None:
        self.machine.handle(End(request))
        self.kept.pop(request)

    def perform(self, event, tokens=(), between=lambda: None, walk=None):
        """What an event leads to outside this stage: [Tell or Pass], and of a forward that was not abandoned for each of its nodes the
        tokens it attends to in order of position: {(request, node): tokens}. `between` its layers something may happen; `walk`: a
        last stage's choices."""
        told, seen = [], {}
        for action in self.machine.handle(event):
            if isinstance(action, Compute):
                more, seen = self._compute(action, torch.tensor(tokens), between, walk)
                told += more
            else:
                told += self._perform(action)
        self.validate()
        return told, seen

    def _compute(self, forward, tokens, between, walk):
        self.shared += len(forward.parts) > 1

        def needed() -> bool:
            between()
            return self.machine.wanted()

        seen, whole = {}, True
        for part in forward.parts:
            whole = self._part(part, tokens[part.rows], needed, seen) and whole
        self.abandoned += not whole
        for part in forward.parts if whole else ():
            if walk and part.segment:
                self.machine.walk(part, lambda j, part=part: walk(part, j))
        told = [t for a in self.machine.handle(Computed(0.5, whole)) for t in self._perform(a)]
        return told, seen if whole else {}

    def _part(self, part, tokens, needed, seen) -> bool:
        """A part's rows through the model, unless its request is over."""
        if part.request not in self.kept:
            return True
        ids, kept = part.segment and part.segment.ids, self.kept[part.request]
        out = kept.cached.forward(tokens, part.admitted, needed, ids)
        if out is None:
            return False
        if ids is None:
            kept.handed += tokens.tolist()
        else:
            paths = map(path, self.model.seen)
            seen.update(zip(((part.request, i) for i in ids), paths, strict=True))
        return True

    def _perform(self, action):
        if isinstance(action, Move):
            self.kept[action.request].cached.cache.gather(action.gather)
        elif isinstance(action, Settled):
            kept, books = self.kept[action.request], self.machine.books(action.request)
            assert action.at == len(kept.handed), (
                "something of the text was left out, or handed over twice"
            )
            tapped = kept.cached.settle(action.at, action.text, books.row)
            kept.handed += tapped.rows[:, 0].tolist() if tapped else []
        else:
            return [action]
        return []

    def validate(self) -> None:
        for request, kept in self.kept.items():
            books = self.machine.books(request)
            books.validate()
            moved = self.machine.running is None  # else a move of rows may be due
            cache = kept.cached.cache
            assert not moved or cache.length == books.length <= cache.capacity


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
    number: int = REQUEST
    """the request's id"""
    servers: int = 1
    die: int = 0
    """so many servers die on the way, at least one lives"""

    def __post_init__(self):
        self.random = r = random.Random(self.seed)
        self.stages = r.randint(1, 6)
        self.accuracy = r.random()
        self.slow_prunes = r.choice([0.1, 1.0, 8.0])
        prompt = tuple(r.randrange(VOCABULARY) for _ in range(r.randint(1, 9)))
        eos = frozenset(r.sample(range(VOCABULARY), r.choice([0, 0, 1, 2])))
        self.request = Request(
            id=self.number,
            prompt=prompt,
            sampling=Sampling(max_new_tokens=r.randint(1, 70)),
            eos=eos,
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
        self.at = r.choice([0.0, 20.0 * r.random()])
        """when it arrives, where there are others"""
        self.cancelled = 100.0 * r.random() if r.random() < 0.2 else None
        """when its reader leaves, where there are others"""
        self.dsi = Dsi(servers=self.servers, lookahead=r.choice([None, 1, 2, 5, 16]))


class Asked:
    """A request in the world, from rank 0's side."""

    def __init__(self, case: Case, learnt: Learnt, ring: Topology):
        policy = make_policy(case.method, case.tree, case.switches, ring, case.features, case.dsi)
        self.case, self.decoding = case, Decoding(case.request, policy, learnt, case.drafts)
        self.context = {-1: case.request.prompt[:-1]}
        """node -> the text up to it, for the drafter"""
        self.sent = [dict(self.context) for _ in range(ring.servers)]
        """of each server: what a node that was sent is called there -> the text up to it"""
        self.out, self.reason = [], None
        self.text_nodes = set()
        """what the last stage takes to be text"""


class World:
    """Runs cases in one ring, whose shape and delays are those of the first. `stage` may be a mutant's class."""

    def __init__(self, case: Case, stage=Stage, others=()):
        self.case, self.random, self.cases = case, case.random, [case, *others]
        self.topology = Topology(case.stages, servers=case.servers)
        self.scheduler = Scheduler(self.topology)
        self.stages = [stage(rank, self.topology) for rank in self.topology.stage_ranks]
        self.asked: dict[int, Asked] = {}
        self.heap, self.tick, self.last = [], itertools.count(), {}
        self.prunes = [deque() for _ in self.stages]  # on their way to each
        self.dead: set[int] = set()

    @property
    def out(self) -> list[int]:
        return self.asked[self.case.number].out

    @property
    def reason(self):
        return self.asked[self.case.number].reason

    def run(self) -> list[int]:
        """The text of the first case, once all texts are complete or given up."""
        self.begin()
        for server in self.random.sample(range(self.case.servers), self.case.die):
            self._post("death", 0.0, 60.0 * self.random.random(), ("death", server))
        for case in self.cases[1:]:
            self._post(f"arrival{case.number}", 0.0, case.at, ("arrival", case))
            if case.cancelled is not None:
                self._post("cancel", 0.0, case.at + case.cancelled, ("cancel", case.number))
        while len(self.asked) < len(self.cases) or any(
            a.reason is None for a in self.asked.values()
        ):
            now, _, event = heapq.heappop(self.heap)
            self.happens(now, event)
        return self.out

    def begin(self, now: float = 0.0) -> None:
        self._on_arrival(now, self.case)

    def _on_arrival(self, now, case) -> None:
        asked = self.asked[case.number] = Asked(case, self.scheduler.learnt, self.topology)
        for each in self.stages:
            each.begin(Begin(case.number, case.switches.drop_dead, case.switches.abort))
        for ring in self.topology.rings:
            for chunk in self._chunks(case):
                self._hop(now, ring[0], ("prefill", case.number, chunk))
        if case.drafts:
            self._post("draft", now, self.random.random(), ("news", Read(case.number)))
        self._perform(self.scheduler.admit(asked.decoding, now), now)

    def _on_death(self, now, server) -> None:
        """Nothing reaches a server any more, nor comes from it; rank 0 hears of it later."""
        self.dead.add(server)
        self._post("death", now, 3.0 * self.random.random(), ("loss", server))

    def _on_loss(self, now, server) -> None:
        self._perform(self.scheduler.lost(server, now), now)

    def _on_cancel(self, now, number) -> None:
        if self.asked[number].reason is None:
            self.asked[number].reason = "cancelled"
            self._end(number)
            self._perform(self.scheduler.cancel(number, now), now)

    def _end(self, number) -> None:
        for stage in self.stages:
            stage.end(number)

    def happens(self, now, event) -> None:
        """One event, and what must hold after each."""
        kind, *what = event
        getattr(self, "_on_" + kind)(now, *what)
        self.scheduler.validate()
        for number, asked in self.asked.items():
            whole = [*asked.case.request.prompt, *asked.out]
            for stage in self.stages:
                handed = stage.kept[number].handed if number in stage.kept else []
                assert handed == whole[: len(handed)], "what was handed over is not the text"

    def interrupted(self) -> bool:
        """Does a prune come between two layers of a forward?"""
        return self.random.random() < 0.3

    def _chunks(self, case):
        prompt, k = case.request.prompt[:-1], 0
        while k < len(prompt):
            n = self.random.randint(1, 4)
            yield prompt[k : k + n]
            k += n

    def _post(self, link, now, delay, event):
        self.last[link] = at = max(self.last.get(link, 0.0) + 1e-6, now + delay)
        heapq.heappush(self.heap, (at, next(self.tick), event))

    def _perform(self, actions, now):
        for action in actions:
            if isinstance(action, Batch):
                for request, segment in action.pieces:
                    context = self.asked[request].sent[action.server]
                    nodes = segment.ids, segment.parents, segment.tokens
                    for i, p, t in zip(*nodes, strict=True):
                        assert context.setdefault(i, (*context[p], t))[-1] == t
                self._hop(now, self.topology.next(0)[action.server], ("batch", action))
            elif isinstance(action, Prunes):
                for k in self.topology.ring(action.server):
                    self._prune(now, k - 1, action.prunes)
            elif isinstance(action, Decision):
                self._decide(action)
            elif isinstance(action, Draft):
                self._post("draft", now, self.random.random(), ("draft", action))
            else:
                assert isinstance(action, Wake)
                self._post("wake", now, max(0.0, action.at - now), ("wake",))

    def _hop(self, now, rank, event, least=0.0) -> None:
        """Send something round a ring to the stage of this rank."""
        kind, *what = event
        self._post(f"hop{rank}", now, least + self.random.random(), (kind, rank - 1, *what))

    def _prune(self, now, k, prunes) -> None:
        for request, prune in prunes:
            if self.random.random() >= self.case.lost:
                self.prunes[k].append(Decided(request, prune))
                delay = self.random.random() * self.case.slow_prunes
                self._post(f"prune{k}", now, delay, ("prune", k))

    def _decide(self, decision):
        asked, commit = self.asked[decision.request], decision.commit
        asked.out += commit.tokens
        walked = asked.text_nodes.issuperset(commit.path) or not self.case.verify_last
        assert walked, "a node became text that no last stage took for it"
        if decision.finish:
            asked.reason = decision.finish.reason
            self._end(decision.request)

    def _on_prefill(self, now, k, request, tokens):
        if self.topology.server(k + 1) in self.dead:
            return
        told, _ = self.stages[k].perform(Chunk(request, len(tokens)), tokens)
        self._tell(now, told)
        if not self.topology.is_last(k + 1):
            self._hop(now, k + 2, ("prefill", request, tokens))

    def _on_batch(self, now, k, batch):
        stage, choices = self.stages[k], {}
        last, server = self.topology.is_last(k + 1), self.topology.server(k + 1)
        if server in self.dead:
            return

        def between() -> None:
            if self.interrupted():
                self._on_prune(now, k)

        def walk(part, j) -> int:
            node = part.request, part.segment.ids[j]
            context = self.asked[part.request].sent[server]
            return choices.setdefault(node, target(context[node[1]]))

        told, seen = stage.perform(
            Arrived(batch, self.random.random(), self.random.random()),
            [token for _, segment in batch.pieces for token in segment.tokens],
            between,
            walk if last and self.case.verify_last else None,
        )
        for (request, i), tokens in seen.items():
            asked, books = self.asked[request], stage.machine.books(request)
            dead_weight = books is None or not (i in books.row or asked.case.switches.drop_dead)
            assert tokens == asked.sent[server][i] or dead_weight, (
                "a stage attended to the wrong rows"
            )
        self._tell(now, told)
        for action in told:
            if isinstance(action, Pass):
                self._pass(now, k, batch, action.batch, choices)

    def _pass(self, now, k, came, goes, choices):
        for piece in came.pieces:
            switches = self.asked[piece.request].case.switches
            over = self.asked[piece.request].reason is not None
            assert switches.drop_dead or over or piece in goes.pieces, "a row was dropped"
        if not self.topology.is_last(k + 1):
            self._hop(now, k + 2, ("batch", goes), 0.5)
        else:
            server, delay = self.topology.server(k + 1), 0.5 + self.random.random()
            self._post(f"return{server}", now, delay, ("return", server, goes, choices))

    def _on_return(self, now, server, batch, choices):
        """What comes back, from a last stage that walks, or all rows where rank 0 picks."""
        self._on_news(now, Back(tuple(self._answer(p, choices, server) for p in batch.pieces)))

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

    def _answer(self, piece, choices, server):
        request, segment = piece
        asked = self.asked[request]
        names = [i for i in segment.ids if (request, i) in choices or not self.case.verify_last]
        nodes = self.scheduler.nodes(server, request, segment.number, names)
        known = dict(zip(nodes, names, strict=False))
        for node, name in known.items():
            context = asked.sent[server][name]
            assert asked.context.setdefault(node, context) == context, "two nodes of one name"
        if self.case.verify_last:
            asked.text_nodes.update(known)
        return Returned(
            request, segment.number, (*known,), lambda i, path: target(asked.context[i])
        )

    def _on_prune(self, now, k):
        if self.prunes[k]:
            told, _ = self.stages[k].perform(self.prunes[k].popleft())
            assert not told

    def _on_draft(self, now, draft):
        answers = [
            (request, self._propose(self.asked[request], nodes)) for request, nodes in draft.asks
        ]
        self._on_news(now, Answered(tuple(answers)))

    def _propose(self, asked, nodes):
        proposals = []
        for id, parent, token in nodes:
            context = asked.context.setdefault(id, (*asked.context[parent], token))
            k = self.random.randint(1, 4)
            tokens = self.random.sample(range(VOCABULARY), k)
            if self.random.random() < asked.case.accuracy and target(context) not in tokens:
                tokens[0] = target(context)
            logq = np.sort(np.log(np.array([self.random.random() + 1e-3 for _ in tokens])))[::-1]
            proposals.append(
                None if self.random.random() < 0.02 else Proposal(np.array(tokens), logq)
            )
        return Drafted.pack([n.id for n in nodes], proposals)

    def _on_news(self, now, event):
        self._perform(self.scheduler.handle(event, now), now)

    def _on_wake(self, now):
        self._perform(self.scheduler.handle(Woke(), now), now)
