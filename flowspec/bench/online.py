"""Decoding alone, SI and DSI on the wall clock: the same drafts for all, in shuffled order.

Forwards are waits (sim/online.py): every figure is simulated."""

from __future__ import annotations

import random
from typing import NamedTuple

from flowspec.core.policies import make_policy
from flowspec.core.policy import Dsi, PolicyConfig, TreeConfig
from flowspec.core.request import Request, Sampling
from flowspec.core.topology import Topology
from flowspec.draft.recorded import SyntheticDrafter, made_up_text
from flowspec.sim.online import Latencies, Online, Written, online
from flowspec.sim.world import Job


class Way(NamedTuple):
    """This is a way to write a text."""

    method: str
    """The name of its policy."""
    lookahead: int | None
    servers: int


class Chance(NamedTuple):
    """This is what is written, and how well it is drafted."""

    tokens: int
    """The length of a text."""
    acceptance: float
    """A draft is right with this probability, independently at each position."""


def measure(
    ways: dict[str, Way], chance: Chance, latencies: Latencies, repeats: int, seed: int
) -> dict[str, list[Written]]:
    """Write `repeats` texts in each way, by its name.

    The n-th texts of all ways (from 0) are drafted alike: which drafts are right depends on seed +
    n. The ways take turns in an order that is shuffled each time."""
    done: dict[str, list[Written]] = {name: [] for name in ways}
    order = random.Random(seed)
    with online(max(way.servers for way in ways.values()), latencies) as ring:
        for n in range(repeats):
            for name in order.sample([*ways], len(ways)):
                done[name].append(write(ring, ways[name], chance, seed + n))
    return done


def write(ring: Online, way: Way, chance: Chance, seed: int) -> Written:
    """Write a text in one way; `seed` is that of the drafts."""
    text = made_up_text(chance.tokens)
    request = Request(id=0, prompt=(0,), sampling=Sampling(max_new_tokens=chance.tokens))
    switches, topology = PolicyConfig(), Topology(1, servers=way.servers)
    asked = Dsi(servers=way.servers, lookahead=way.lookahead)
    policy = make_policy(way.method, TreeConfig(), switches, topology, dsi=asked)
    guesser = SyntheticDrafter(request, text, [chance.acceptance], seed) if policy.drafts else None
    written = ring.write(Job(request, text, policy, guesser, switches), way.servers)
    assert written.tokens == text, "a text depends on nothing but the target"
    return written
