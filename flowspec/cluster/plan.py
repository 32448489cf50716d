"""A plan says which layers of a model which host holds, and where tokens are drafted and picked.

`flowspec plan` writes it (YAML) and `split_models.py --plan` reads it. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from flowspec.core.cost import Emulate
from flowspec.core.topology import Topology
from flowspec.errors import need
from flowspec.files import replacing
from flowspec.schema import choice, plain, stored

FORMAT = 1
"""This is the version of a plan's format."""
PICKERS = ("last", "coordinator")
AGAIN = "run flowspec plan again"


@dataclass(frozen=True, kw_only=True)
class PlannedModel:
    """This is what a plan knows its model by: values of its config.json, under Llama's keys."""

    model_type: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> PlannedModel:
        """Return it of a config.json (families.read_config)."""
        return cls(**{key: config[key] for key in cls.__dataclass_fields__})


@dataclass(frozen=True, kw_only=True)
class PlannedStage:
    """A planned stage is layers [first, end) on a host, or on several that share them."""

    layers: tuple[int, int]
    hosts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """This is what the simulator makes of an alternative, in tokens per second."""

    alternative: str
    hosts: tuple[str, ...]
    """Rank 0's host, then those of the stages, in order."""
    layers: tuple[int, ...]
    """Of each stage."""
    verify_on: str
    ar: float
    flowspec: float | None = None
    """None if nothing drafts."""
    emulate: Emulate = field(default_factory=Emulate)
    """So long the ring's parts were taken to need; lm_head on rank 0 stands behind the stages."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A plan is a split of a model over hosts."""

    model: PlannedModel
    coordinator: str
    """Rank 0, with the drafters, is on this host."""
    stages: tuple[PlannedStage, ...]
    verify_on: str
    """lm_head is on the `last` stage's host, or on the `coordinator`'s."""
    chosen: str = ""
    """This is the alternative of `simulated` that it is."""
    simulated: tuple[Prediction, ...] = ()
    format: int = FORMAT

    def __post_init__(self) -> None:
        choice("verify_on", self.verify_on, PICKERS)
        need(bool(self.stages), "stages is an empty list: name one at least")
        at, names = 0, list[str]()
        for k, stage in enumerate(self.stages):
            first, end = stage.layers
            need(
                first == at and end > first,
                f"stages.{k}.layers is {[first, end]}: layers [{at}, more) must follow here",
            )
            need(
                len(stage.hosts) == self.members and self.members > 0,
                f"stages.{k}.hosts has {len(stage.hosts)} names: each stage has as many, one at "
                "least",
            )
            twice = [name for name in stage.hosts if name in names]
            need(not twice, f"stages.{k}.hosts: {''.join(twice[:1])} has a stage already")
            at, names = end, [*names, *stage.hosts]
        count = self.model.num_hidden_layers
        need(at == count, f"stages hold {at} layers, model.num_hidden_layers is {count}")

    @property
    def members(self) -> int:
        """Return how many ranks share each stage."""
        return len(self.stages[0].hosts)

    @property
    def layers(self) -> list[int]:
        """Return how many layers each stage has."""
        return [stage.layers[1] - stage.layers[0] for stage in self.stages]

    @property
    def ranks(self) -> dict[str, list[int]]:
        """Return the ranks of each host that has some."""
        topology, found = Topology(len(self.stages), self.members), {self.coordinator: [0]}
        for leader, stage in zip(topology.stage_ranks, self.stages, strict=True):
            for rank, name in zip(topology.group(leader), stage.hosts, strict=True):
                found.setdefault(name, []).append(rank)
        return found

    def check_model(self, config: Mapping[str, Any], where: str) -> None:
        """Raise UserError, by key, unless this is a plan for the model of a config.json.

        `where` names the plan's file."""
        found = PlannedModel.of(config)
        for key, planned in vars(self.model).items():
            theirs = getattr(found, key)
            need(
                planned == theirs,
                f"{where} is a plan of another model: its model.{key} is {planned}, this model's "
                f"is {theirs}: {AGAIN}",
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan, whole or not at all."""
        with replacing(path) as beside:
            beside.write_text(yaml.safe_dump(plain(self), sort_keys=False, width=1000))


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Return the plan that a file holds; raise UserError, which names the file and the key."""
    return stored(Plan, path, "a plan as `flowspec plan --out` writes it", AGAIN, FORMAT)
