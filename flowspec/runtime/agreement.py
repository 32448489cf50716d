"""Before anything is computed, ranks check that all run the same model, configuration and code.

Each rank writes what it will run to torch's store and reads what the others wrote, so all of them
find the same first difference. Without this check, stages that hold layers of two different splits
would produce a wrong text without any other sign.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import metadata

import torch.distributed as dist

from flowspec.comm.seal import Sealed
from flowspec.core.topology import Topology
from flowspec.errors import UserError, need
from flowspec.models.manifest import Manifest, RankEntry
from flowspec.runtime.wire import FORMAT
from flowspec.version import __version__

Facts = Mapping[str, Mapping[str, str | None]]
"""Facts map what is compared (a key of WORDS) to names and their values as text.

A value of None means that the rank has no say in it, so it agrees with any value."""
WORDS = {
    "version": "runs another {name}: {mine}, {other} runs {theirs}",
    "split": "has another split of the model: its stages.yaml says {name} {mine}, "
    "{other}'s says {theirs}",
    "configuration": "has another configuration: its {name} is {mine}, {other}'s is {theirs}",
    "dtype": "computes in {mine}, {other} in {theirs}: set dtype in the configuration",
}
"""This maps each kind of fact to the message that reports a difference.

Kinds are compared in this order: where the code differs, all the rest may differ as well."""
PATIENCE = timedelta(seconds=30)
"""A rank waits this long for another's facts, which are written right after joining."""
READING = timedelta(seconds=5)
"""Once a run will not be, the ranks have this time to read why."""
LONGEST = 1 << 20
"""No rank's facts are longer, in bytes."""
SHORT = 12
"""This many hex digits of a hash are compared and shown: enough to tell files apart."""


def facts_of(configuration: Mapping[str, str], manifest: Manifest, dtype: str | None) -> Facts:
    """Return the facts of what this rank would run.

    `configuration` maps the keys that must be equal on all ranks to their values. `dtype` is what
    this rank computes the target in; None means that it computes nothing of the target."""
    # the local part of a version (after "+") names a wheel's CUDA, which may differ
    versions = {
        name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers")
    }
    names = (
        "model_type",
        "num_layers",
        "hidden_size",
        "vocab_size",
        "max_positions",
        "tied",
        "embedding",
    )
    split: dict[str, str | None] = {
        "layers": ",".join(str(rank.num_layers) for rank in manifest.ranks[1:])
    }
    split |= {
        name: None if (value := getattr(manifest, name)) is None else str(value) for name in names
    }
    split |= {f"files of rank {rank.rank}": _digest(rank) for rank in manifest.ranks}
    version = {"flowspec": __version__, **versions, "wire format": str(FORMAT)}
    return {
        "version": version,
        "split": split,
        "configuration": dict(configuration),
        "dtype": {"dtype": dtype},
    }


def _digest(rank: RankEntry) -> str:
    """Return a hash of the names, sizes and hashes that the manifest lists for a rank's files."""
    files = [rank.weights, *([rank.lm_head] if rank.lm_head else []), *rank.extra]
    return hashlib.sha256(repr([(f.file, f.bytes, f.sha256) for f in files]).encode()).hexdigest()[
        :SHORT
    ]


def agree(
    store: dist.Store | Sealed,
    topology: Topology,
    rank: int,
    facts: Facts,
    name: Callable[[int], str],
) -> None:
    """Raise UserError, the same on every rank, unless all ranks of the run tell the same facts.

    `name(rank)` is how the message calls a rank. UserError is also raised if a rank tells no facts
    within PATIENCE, or something that is none."""
    store.set(str(rank), json.dumps(facts))
    told: list[Facts] = []
    for other in topology.ranks:
        try:
            store.wait([str(other)], PATIENCE)
        except RuntimeError:  # DistStoreError is one
            need(
                False,
                f"{name(other)} does not tell which model and which code it runs: "
                "does it run an older flowspec?",
            )
        told.append(_read(store.get(str(other)), name(other)))
    difference = first_difference(told, name)
    if difference is None:
        return
    part(store, topology, rank)
    raise UserError(difference)


def part(store: dist.Store | Sealed, topology: Topology, rank: int) -> None:
    """Leave a run that will not be; rank 0, who may host the store, once all have read it all."""
    store.set(f"heard/{rank}", "")
    if rank == 0:
        with contextlib.suppress(RuntimeError):
            store.wait([f"heard/{other}" for other in topology.ranks], READING)


def _read(text: bytes, who: str) -> Facts:
    """Parse the facts that a rank told.

    Text that is not of this form raises UserError."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        told = json.loads(text if len(text) <= LONGEST else b"")
        if all(
            value is None or type(value) is str
            for facts in told.values()
            for value in facts.values()
        ):
            return told
    raise UserError(f"{who} tells something else than which model and which code it runs")


def first_difference(told: list[Facts], name: Callable[[int], str]) -> str | None:
    """Return a line that names the first difference, or None if all ranks agree.

    `told` holds the facts by rank. Each value is compared with that of the first rank for which it
    is not None."""
    for kind, words in WORDS.items():
        for each in dict.fromkeys(each for facts in told for each in facts.get(kind, {})):
            values = [facts.get(kind, {}).get(each) for facts in told]
            first = next((rank for rank, value in enumerate(values) if value is not None), 0)
            for rank, value in enumerate(values):
                if value is not None and value != values[first]:
                    other = f"rank {first}"
                    said = words.format(name=each, mine=value, theirs=values[first], other=other)
                    line = f"{name(rank)} {said}"
                    return "".join(c if c.isprintable() else "?" for c in line)
    return None
