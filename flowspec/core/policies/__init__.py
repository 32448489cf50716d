"""These are the methods by name: three shapes of policy, and how the methods of a shape differ.

This module is pure (no torch, clock or I/O)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from flowspec.core.policies.chain import Chain
from flowspec.core.policies.continuous import Continuous
from flowspec.core.policies.lookahead import Lookahead
from flowspec.core.policies.pipedec import PipeDec
from flowspec.core.policies.rounds import Rounds
from flowspec.core.policy import Dsi, Policy, PolicyConfig, TreeConfig
from flowspec.core.topology import Topology
from flowspec.errors import need


class _About(NamedTuple):
    """This is what a policy may be made from."""

    tree: TreeConfig
    switches: PolicyConfig
    topology: Topology
    features: bool
    dsi: Dsi


_MAKERS: dict[str, Callable[[_About], Policy]] = {
    "ar": lambda of: Rounds(dataclasses.replace(of.tree, budget=1), pieces=1),
    "serial": lambda of: Rounds(of.tree, pieces=1),
    "naive": lambda of: Rounds(of.tree, pieces=of.topology.hops),
    "pruned": lambda of: Rounds(of.tree, pieces=of.topology.hops, pruning=True),
    "pipedec": lambda of: PipeDec(of.tree, of.topology, of.switches.just_in_time),
    "flowspec": lambda of: Continuous(of.tree, of.topology, of.switches, of.features),
}
METHODS = tuple(_MAKERS)
"""These methods run over any ring."""
SHARED = ("tp", "galaxy")
"""These are serial tree speculation by the names of how the members of a stage share its layers:
Megatron's way (arXiv 1909.08053) and Galaxy's (arXiv 2405.17245), which spreads the rows. Over
stages of several members the other methods share them in Megatron's way."""
_MAKERS |= dict.fromkeys(SHARED, _MAKERS["serial"])
_MAKERS |= {
    "si": lambda of: Chain(of.tree, of.topology, of.dsi.lookahead),
    "dsi": lambda of: Lookahead(of.tree, of.topology, of.dsi.lookahead),
}
SERVED = ("si", "dsi")
"""These are at home over several target servers (dsi.servers), and run over one."""
ALL_METHODS = tuple(_MAKERS)


def spreads(method: str) -> bool:
    """Return whether a method spreads rows over the members of a stage."""
    return method == "galaxy"


def check_method(
    method: str, members: int, backend: str = "native", deterministic: bool = False
) -> None:
    """Raise UserError unless a ring whose stages have so many members can run a method.

    `backend` is what lets them share the layers. If it has to be `deterministic`, a sum must not
    depend on the batch: two numbers have one sum, of more it depends on the order."""
    need(
        not deterministic or members <= 2 or (backend == "native" and not spreads(method)),
        f"deterministic is true: method {method} over {members} members of a stage, backend "
        f"{backend}, adds up in an order that depends on the batch; two members, or method tp over "
        "native, do not",
    )
    need(
        backend == "native" or not spreads(method),
        f"method is {method}, which tensor_parallel.backend {backend} cannot do: set it to native",
    )
    need(
        members > 1 or method not in SHARED,
        f"method is {method}: the model is split into stages of one rank each, split it with "
        "--tensor-parallel",
    )


ONE = Dsi()
"""This is one server, and the lookahead of the method."""


def make_policy(
    method: str,
    tree: TreeConfig,
    switches: PolicyConfig,
    topology: Topology,
    features: bool = False,
    dsi: Dsi = ONE,
) -> Policy:
    """Return the policy of a method for one request.

    `features` is True if its drafter reads the target's features."""
    return _MAKERS[method](_About(tree, switches, topology, features, dsi))
