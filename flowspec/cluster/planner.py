"""The planner: which host holds which layers, and where tokens are drafted and picked.

Pure: what a model weighs and what hosts can do come in (fleet.py), alternatives come out. For each
way to place rank 0, lm_head and groups, the layers are split exactly (core/partition.py): so that
the slowest stage is as quick as can be, and then, allowing it to be slower by CAPS, so that a round
trip is as short as can be, which leaves slow hosts out by and by. The likeliest of these are
simulated, and what the simulator says decides.

Times are weights over the host's measured speed, linear in rows: attention's context, rank 0's own
work and the embedding's look-up are left out, and all experts of a mixture count. What shares a
host (a stage, the drafter, lm_head beside it) shares its speed, as if all computed all the time.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from flowspec.core.cost import Emulate, Group
from flowspec.core.partition import least_sum, least_worst
from flowspec.models.split import layer_ranges

ROWS = 8
"""Layers are balanced for forwards over so many rows: about what a segment has."""
CAPS = (1.0, 1.2, 1.5, 2.0, 3.0, math.inf)
"""The slowest stage may take so many times the least that it can."""
KEPT = 3
"""Of each kind so many alternatives are simulated by each measure of `_likeliest`."""
ALIKE = 0.05
"""Of hosts whose speeds and memories differ by less only one is tried for rank 0."""
BALANCE = 0.01
"""A stage that takes c times the least costs so much more than it takes, times c."""
SAME = 0.01
"""A simulated rate must be better by this share to be preferred to a simpler alternative."""
LISTED, EQUAL, FEWER, UNEVEN = "as listed", "equal split", "fewer hosts", "uneven split"
GROUPS = "groups of"
KINDS = (LISTED, EQUAL, FEWER, UNEVEN)
"""These are kinds of alternatives, beside groups, the simplest first: the k-th rank's host of the
cluster file has the k-th of equal stages; equal stages anywhere; a host or more left out."""
COORDINATOR, LAST = "coordinator", "last"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model is how many weights its parts have."""

    layers: tuple[int, ...]
    embedding: int
    head: int
    hidden: int
    cache: int
    """The keys and values of a layer are so many numbers."""
    draft: int = 0
    """A drafter's forward multiplies with so many weights; 0 if no drafter computes."""
    drafter: int = 0
    """Rank 0 holds so many weights for drafting,"""
    draft_embedding: int = 0
    """and so many of embeddings."""

    @cached_property
    def before(self) -> np.ndarray:
        """Return how many weights stand before each layer, and in all."""
        return np.concatenate([np.zeros(1), np.cumsum(self.layers)])


@dataclass(frozen=True, kw_only=True)
class Box:
    """A box is what a host can do. Times are in seconds, sizes in bytes."""

    name: str
    base: float
    """A forward over no row takes this for each weight,"""
    slope: float
    """and this more for each row."""
    free: float
    """What may be taken of its memory."""
    program: int
    """Each rank takes this beside its weights and what is in `Model.cache`."""
    weight: float
    """The size of a weight that is multiplied with,"""
    looked_up: float
    """and of one of the embedding."""
    number: float
    """The size of a number of rows, keys and values."""

    def seconds(self, rows: float = ROWS) -> float:
        """Return the seconds for each weight of a forward."""
        return self.base + self.slope * rows

    def shared(self, by: int) -> Box:
        """Return what is left for each of so many that compute."""
        return replace(self, base=by * self.base, slope=by * self.slope)

    def is_like(self, other: Box) -> bool:
        pairs = [(self.seconds(), other.seconds()), (self.free, other.free)]
        return all(abs(a - b) <= ALIKE * max(a, b) for a, b in pairs)


class Way(NamedTuple):
    """A way is a link in one direction; no `mbps` means that bytes take no time."""

    ms: float
    mbps: float | None


class Ways:
    """The ways between hosts. One that was not measured counts as the slowest that was."""

    def __init__(self, measured: Mapping[tuple[str, str], Way]):
        self._measured = measured
        self._worst = _joined(measured.values(), max) if measured else Way(0.0, None)

    def along(self, names: Sequence[str]) -> Way:
        """Return the mean delay of a message that goes from host to host, and the least rate."""
        return _joined((self._way(*pair) for pair in itertools.pairwise(names)), statistics.mean)

    def among(self, names: Sequence[str]) -> Way:
        """Return the slowest way among some hosts."""
        return _joined((self._way(*pair) for pair in itertools.permutations(names, 2)), max)

    def _way(self, source: str, target: str) -> Way:
        if source == target:
            return Way(0.0, None)
        return self._measured.get((source, target), self._worst)


def _joined(ways: Iterable[Way], delay: Callable[[list[float]], float]) -> Way:
    ways = list(ways)
    rates = [way.mbps for way in ways if way.mbps is not None]
    return Way(delay([way.ms for way in ways]), min(rates, default=None))


@dataclass(frozen=True)
class Room:
    """A room is one host, or several that share a stage."""

    boxes: tuple[Box, ...]
    exchange: tuple[float, float] = (0.0, 0.0)
    """What its ranks exchange takes so many seconds for each layer, and more for each row."""

    @property
    def members(self) -> int:
        return len(self.boxes)

    @property
    def slowest(self) -> Box:
        return max(self.boxes, key=Box.seconds)

    @property
    def free(self) -> float:
        return min(box.free for box in self.boxes)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(box.name for box in self.boxes)


@dataclass(frozen=True)
class Setting:
    """A setting is who does what, before layers are given out: at most one stage a room.

    Its arrays are [rooms, layers + 1, layers + 1], about layers [start, stop) in a room."""

    model: Model
    ways: Ways
    coordinator: Box
    """Rank 0's host, with what its parts share of it already taken off its speed."""
    lacking: float
    """So many bytes rank 0 lacks there."""
    rooms: tuple[Room, ...]
    verify_on: str

    @cached_property
    def _weights(self) -> np.ndarray:
        """Return the weights with which a stage multiplies, [layers + 1, layers + 1]."""
        weights = self.model.before[None, :] - self.model.before[:, None]
        weights[:-1, -1] += self.model.head if self.verify_on == LAST else 0
        return weights

    def _each(self, of: Callable[[Room], float]) -> np.ndarray:
        """Return a number of each room, [rooms, 1, 1]."""
        return np.array([of(room) for room in self.rooms])[:, None, None]

    @cached_property
    def lack(self) -> np.ndarray:
        """Return how many bytes a rank of a stage lacks, at the fullest host."""
        many = _spans(self.model)
        held = self._each(lambda room: room.slowest.weight) * self._weights
        held += self._each(lambda room: room.slowest.number) * self.model.cache * many
        embedding = self._each(lambda room: room.slowest.looked_up) * self.model.embedding
        held[:, :1, 1:] += embedding
        held /= self._each(lambda room: room.members)
        held += self._each(lambda room: room.slowest.program)
        lack = np.maximum(0.0, held - self._each(lambda room: room.free))
        return np.where(many > 0, lack, np.where(many == 0, 0.0, np.inf))

    @cached_property
    def forwards(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the seconds of a stage's forward over no row, and of each row."""
        many = _spans(self.model)
        each = self._weights / self._each(lambda room: room.members)
        base = each * self._each(lambda room: room.slowest.base)
        slope = each * self._each(lambda room: room.slowest.slope)
        base = base + many * self._each(lambda room: room.exchange[0])
        return base, slope + many * self._each(lambda room: room.exchange[1])

    @cached_property
    def costs(self) -> np.ndarray:
        """Return the seconds of a stage's forward; infinite if it does not fit."""
        base, slope = self.forwards
        fits = self.lack == 0 if not self.lacking else np.zeros_like(self.lack, bool)
        return np.where(fits, base + ROWS * slope, np.inf)


def _spans(model: Model) -> np.ndarray:
    """Return stop - start, by start and stop."""
    ends = np.arange(len(model.layers) + 1)
    return ends[None, :] - ends[:, None]


@dataclass(frozen=True)
class Candidate:
    """A candidate is a split of the layers in a setting; rooms may hold none."""

    kind: str
    setting: Setting
    counts: tuple[int, ...]

    @property
    def stages(self) -> list[tuple[Room, int, int]]:
        """Return the room and the layers [first, end) of each stage."""
        return [(self.setting.rooms[k], start, stop) for k, start, stop in self._placed]

    @property
    def _placed(self) -> list[tuple[int, int, int]]:
        ends = list(itertools.accumulate(self.counts, initial=0))
        spans = zip(itertools.count(), ends, ends[1:], strict=False)
        return [(k, start, stop) for k, start, stop in spans if stop > start]

    @property
    def hosts(self) -> tuple[str, ...]:
        """Return rank 0's host and those of the stages, in order."""
        names = (name for room, _, _ in self.stages for name in room.names)
        return self.setting.coordinator.name, *names

    @property
    def layers(self) -> tuple[int, ...]:
        """Return how many layers each stage has."""
        return tuple(stop - start for _, start, stop in self.stages)

    @property
    def lacks(self) -> dict[str, float]:
        """Return the bytes that hosts lack."""
        setting = self.setting
        found = {setting.coordinator.name: setting.lacking} if setting.lacking else {}
        for placed in self._placed:
            room, lack = setting.rooms[placed[0]], float(setting.lack[placed])
            for box in room.boxes:
                own = lack - (box.free - room.free)
                found |= {box.name: found.get(box.name, 0.0) + own} if own > 0 else {}
        return found

    @cached_property
    def ring(self) -> tuple[Emulate, int]:
        """Return the ring's times, for the simulator, and its number of stages.

        lm_head on rank 0 counts as one stage more, on rank 0's host."""
        setting, model = self.setting, self.setting.model
        base, slope = setting.forwards
        times = [(float(base[placed]), float(slope[placed])) for placed in self._placed]
        box = setting.coordinator
        names = [box.name, *_leaders(room for room, _, _ in self.stages)]
        if setting.verify_on == COORDINATOR:
            times.append((model.head * box.base, model.head * box.slope))
            names.append(box.name)
        way = setting.ways.along([*names, box.name])
        emulate = Emulate(
            stage_ms=tuple(_ms(base) for base, _ in times),
            token_ms=tuple(_ms(slope) for _, slope in times),
            draft_ms=_ms(model.draft * box.seconds()),
            link_ms=round(way.ms, 4),
            link_mbps=way.mbps,
            hidden_scale=box.number / 2,
        )
        return emulate, len(times)

    @cached_property
    def measures(self) -> tuple[float, float]:
        """Return the seconds of the slowest stage, and of a round trip with a draft."""
        emulate, count = self.ring
        each = [emulate.stage_seconds(k, ROWS) for k in range(1, 1 + count)]
        hops = 1e-3 * emulate.link_ms * (1 + count)
        return max(each), sum(each) + hops + 1e-3 * emulate.draft_ms


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 4)


Rates = tuple[float, float | None]
"""Tokens/s of plain decoding, and of flowspec if something drafts."""
Predict = Callable[[Emulate, int], Rates]
"""The simulator: a ring's times and number of stages in, rates out."""


class Alternative(NamedTuple):
    """An alternative is the best candidate of its kind."""

    best: Candidate
    rates: Rates

    @property
    def worth(self) -> float:
        ar, flowspec = self.rates
        return ar if flowspec is None else flowspec


def alternatives(candidates: Sequence[Candidate], predict: Predict) -> list[Alternative]:
    """Return the best candidate of each kind by what the simulator says, the simplest first."""
    found: dict[str, Alternative] = {}
    for one in _likeliest([one for one in candidates if not one.lacks]):
        told = Alternative(one, predict(*one.ring))
        known = found.get(one.kind)
        if known is None or told.worth > (1 + SAME) * known.worth:
            found[one.kind] = told
    return sorted(found.values(), key=lambda each: _order(each.best.kind))


def _order(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else len(KINDS)


def unfit(candidates: Sequence[Candidate]) -> dict[str, dict[str, float]]:
    """Return the kinds of which no candidate fits, with the bytes that hosts lack at least."""
    found: dict[str, list[dict[str, float]]] = {}
    for one in candidates:
        found.setdefault(one.kind, []).append(one.lacks)
    return {kind: _least(lacks) for kind, lacks in found.items() if all(lacks)}


def _least(lacks: Iterable[dict[str, float]]) -> dict[str, float]:
    return min(lacks, key=lambda each: sum(each.values()))


def chosen(found: Sequence[Alternative]) -> Alternative:
    """Return the best alternative; the first of those that are as good."""
    best = max(each.worth for each in found)
    return next(each for each in found if each.worth * (1 + SAME) >= best)


def _likeliest(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates of each kind with the quickest slowest stage, the shortest round trip,
    and the least of both together."""
    measures: list[Callable[[Candidate], float]] = [
        lambda one: one.measures[0],
        lambda one: one.measures[1],
        lambda one: math.prod(one.measures),
    ]
    kept: dict[Candidate, None] = {}
    for kind in dict.fromkeys(one.kind for one in candidates):
        same = [one for one in candidates if one.kind == kind]
        for measure in measures:
            kept |= dict.fromkeys(sorted(same, key=measure)[:KEPT])
    return list(kept)


# ---- what is tried -------------------------------------------------------------------------------
def candidates(
    model: Model,
    boxes: Sequence[Box],
    ways: Ways,
    members: Sequence[int] = (1,),
    listed: Sequence[str] = (),
) -> list[Candidate]:
    """Return what is worth a look, of stages of so many `members` each; some may not fit.

    `listed` are the hosts of the ranks as the cluster file has them."""
    found: dict[tuple, Candidate] = {}
    for count in members:
        for setting in _settings(model, boxes, ways, count):
            for counts in _splits(setting):
                one = Candidate(_kind(setting, counts, len(boxes)), setting, counts)
                found.setdefault((one.hosts, one.layers, setting.verify_on), one)
    return [*_as_listed(model, boxes, ways, listed), *found.values()]


def _kind(setting: Setting, counts: tuple[int, ...], hosts: int) -> str:
    used = Candidate("", setting, counts)
    if setting.rooms[0].members > 1:
        return f"{GROUPS} {setting.rooms[0].members}"
    if len(set(used.hosts)) < hosts:
        return FEWER
    return EQUAL if max(used.layers) - min(used.layers) <= 1 else UNEVEN


def _as_listed(
    model: Model, boxes: Sequence[Box], ways: Ways, listed: Sequence[str]
) -> Iterator[Candidate]:
    """Yield equal stages on the hosts of the ranks, if each is there and has one stage at most."""
    known, stages = {box.name: box for box in boxes}, listed[1:]
    once = len(set(stages)) == len(stages)
    if not (once and stages and known.keys() >= set(listed) and len(stages) <= len(model.layers)):
        return
    start = _Start(model, known[listed[0]], listed[0] in stages, picks=False)
    rooms = _rooms([start.left(known[name]) for name in stages], ways, 1, model.hidden)
    yield Candidate(LISTED, start.setting(ways, rooms), _even(len(model.layers), len(rooms)))


def shortage(model: Model, boxes: Sequence[Box], ways: Ways) -> dict[str, float]:
    """Return the bytes that hosts lack where the one that lacks most lacks least."""

    def least(setting: Setting) -> dict[str, float]:
        counts = least_sum(setting.lack, least_worst(setting.lack))
        return Candidate("", setting, counts or ()).lacks

    return _least(least(setting) for setting in _settings(model, boxes, ways, 1))


def _splits(setting: Setting) -> Iterator[tuple[int, ...]]:
    """Yield the splits of a setting's layers that are worth a look."""
    rooms, layers = len(setting.rooms), len(setting.model.layers)
    if rooms <= layers:
        yield _even(layers, rooms)
    least = least_worst(setting.costs)
    if not math.isfinite(least):
        return
    # each stage is a hop more; of equal round trips the one of equal stages is wanted
    hop = 1e-3 * setting.ways.along([setting.coordinator.name, *_leaders(setting.rooms)]).ms
    trip = np.where(_spans(setting.model) > 0, hop, 0) + setting.costs
    trip = trip + BALANCE * setting.costs**2 / least
    for cap in CAPS:
        # rounding must not take away what is just allowed
        allowed = setting.costs <= cap * least * (1 + 1e-9)
        counts = least_sum(np.where(allowed, trip, np.inf))
        assert counts is not None
        yield counts


def _leaders(rooms: Iterable[Room]) -> list[str]:
    return [room.boxes[0].name for room in rooms]


def _even(layers: int, rooms: int) -> tuple[int, ...]:
    return tuple(stop - start for start, stop in layer_ranges(layers, rooms))


class _Start(NamedTuple):
    """A start says what rank 0 does, and where. It has a host of its own or is beside a stage."""

    model: Model
    box: Box
    beside: bool
    picks: bool
    """lm_head is there."""

    @property
    def _held(self) -> float:
        model, box = self.model, self.box
        weights = model.drafter + (model.head if self.picks else 0)
        return box.program + box.weight * weights + box.looked_up * model.draft_embedding

    @property
    def _here(self) -> Box:
        # ranks share a host's cores even where rank 0 does nothing with them
        return self.box.shared(self.beside + max(1, (self.model.draft > 0) + self.picks))

    def left(self, box: Box) -> Box:
        """Return what a stage has of a host."""
        if box is not self.box:
            return box
        return replace(self._here, free=max(0.0, box.free - self._held))

    def setting(self, ways: Ways, rooms: Sequence[Room]) -> Setting:
        lacking = max(0.0, self._held - self.box.free)
        verify_on = COORDINATOR if self.picks else LAST
        return Setting(self.model, ways, self._here, lacking, tuple(rooms), verify_on)


def _settings(model: Model, boxes: Sequence[Box], ways: Ways, members: int) -> Iterator[Setting]:
    """Yield every way to place rank 0, lm_head and the last stage, over stages of so many hosts."""
    for box, beside, picks in itertools.product(_unlike(boxes), (False, True), (False, True)):
        start = _Start(model, box, beside, picks)
        others = [start.left(each) for each in boxes if beside or each is not box]
        rooms = _rooms(others, ways, members, model.hidden)
        for end in _ends(rooms, picks):
            yield start.setting(ways, [*(room for room in rooms if room is not end), end])


def _unlike(boxes: Sequence[Box]) -> list[Box]:
    """Return the first of the boxes that are alike each."""
    found: list[Box] = []
    for box in boxes:
        if not any(box.is_like(other) for other in found):
            found.append(box)
    return found


def _ends(rooms: list[Room], picks: bool) -> list[Room]:
    """Return which rooms are tried as the last stage's: any but the last only if lm_head is there,
    and then the quickest, the slowest and the last."""
    if picks or not rooms:
        return rooms[-1:]
    some = [*sorted(rooms, key=lambda room: room.slowest.seconds()), rooms[-1]]
    return list(dict.fromkeys((some[-1], some[0], some[-2])))


def _rooms(boxes: Sequence[Box], ways: Ways, members: int, hidden: int) -> list[Room]:
    """Return rooms of so many hosts of similar speed each, without the slowest that are over."""
    if members == 1:
        return [Room((box,)) for box in boxes]
    quickest = sorted(boxes, key=Box.seconds)[: len(boxes) - len(boxes) % members]
    starts = range(0, len(quickest), members)
    groups = [tuple(quickest[start : start + members]) for start in starts]
    return [Room(group, _exchange(group, ways, hidden)) for group in groups]


def _exchange(boxes: Sequence[Box], ways: Ways, hidden: int) -> tuple[float, float]:
    """Return the seconds that a group's exchanges add to each layer, and to each of its rows."""
    way, group = ways.among([box.name for box in boxes]), Group(len(boxes))
    scale = max(box.number for box in boxes) / 2
    emulate = Emulate(link_ms=way.ms, link_mbps=way.mbps, hidden_scale=scale)
    size, layers = emulate.row_bytes(hidden), Emulate.LAYERS * group.members
    none, one = (emulate.group_seconds(1, rows, group, size) / layers for rows in (0, 1))
    return none, one - none
