"""Before anything is computed: do all ranks run the same model, the same configuration and the same code?

Each rank tells what it will run in torch's store, hears the others', and all of them find the same first difference. Stages that hold
layers of two splits would write a wrong text without any other sign.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import timedelta
from importlib import metadata

import torch.distributed as dist

from flowspec.core.topology import Topology
from flowspec.errors import UserError, need
from flowspec.models.manifest import Manifest, RankEntry
from flowspec.runtime.wire import FORMAT
from flowspec.version import __version__

Facts = Mapping[str, Mapping[str, str | None]]
"""what is compared (a key of WORDS) -> name -> value as text; None: nothing that this rank would have to share"""
WORDS = {
    "version": "runs another {name}: {mine}, {other} runs {theirs}",
    "split": "has another split of the model: its stages.yaml says {name} {mine}, {other}'s says {theirs}",
    "configuration": "has another configuration: its {name} is {mine}, {other}'s is {theirs}",
    "dtype": "computes in {mine}, {other} in {theirs}: set dtype in the configuration",
}
"""in the order in which differences are named: where the code differs, so may all the rest"""
PATIENCE = timedelta(seconds=30)
"""for what a rank tells right after it has joined"""
SHORT = 12
"""digits of a hash: enough to tell files apart, and to read"""


def facts_of(configuration: Mapping[str, str], manifest: Manifest, dtype: str | None) -> Facts:
    """What this rank would run. `configuration`: what must be equal of it; `dtype`: what it computes of the target in, None: nothing."""
    versions = {
        name: metadata.version(name).partition("+")[0] for name in ("torch", "transformers")
    }  # a wheel's CUDA may differ
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
    """Of all that the manifest says of this rank's files."""
    files = [rank.weights, *([rank.lm_head] if rank.lm_head else []), *rank.extra]
    return hashlib.sha256(repr([(f.file, f.bytes, f.sha256) for f in files]).encode()).hexdigest()[
        :SHORT
    ]


def agree(
    store: dist.Store, topology: Topology, rank: int, facts: Facts, name: Callable[[int], str]
) -> None:
    """UserError, the same on every rank, unless all ranks of the run tell the same facts. `name` is how a rank is called in it."""
    store = dist.PrefixStore("flowspec/agreement", store)
    store.set(str(rank), json.dumps(facts))
    told: list[Facts] = []
    for other in topology.ranks:
        try:
            store.wait([str(other)], PATIENCE)
        except RuntimeError:  # DistStoreError is one
            need(
                False,
                f"{name(other)} does not tell which model and which code it runs: does it run an older flowspec?",
            )
        told.append(_read(store.get(str(other)), name(other)))
    difference = first_difference(told, name)
    if difference is None:
        return
    store.set(f"heard/{rank}", "")
    if rank == 0:  # the store may live as long as this process: the others are to hear all of it
        with contextlib.suppress(RuntimeError):
            store.wait([f"heard/{other}" for other in topology.ranks], PATIENCE)
    raise UserError(difference)


def _read(text: bytes, who: str) -> Facts:
    """What a rank told. The store asks nobody who he is: UserError for what no rank of ours tells."""
    with contextlib.suppress(ValueError, RecursionError, AttributeError):
        told = json.loads(text)
        if all(
            value is None or type(value) is str
            for facts in told.values()
            for value in facts.values()
        ):
            return told
    raise UserError(f"{who} tells something else than which model and which code it runs")


def first_difference(told: list[Facts], name: Callable[[int], str]) -> str | None:
    """The first thing in which a rank differs from the first rank that has a say in it; None if there is none."""
    for kind, words in WORDS.items():
        for each in dict.fromkeys(each for facts in told for each in facts.get(kind, {})):
            values = [facts.get(kind, {}).get(each) for facts in told]
            first = next((rank for rank, value in enumerate(values) if value is not None), 0)
            for rank, value in enumerate(values):
                if value is not None and value != values[first]:
                    line = f"{name(rank)} {words.format(name=each, mine=value, theirs=values[first], other=f'rank {first}')}"
                    return "".join(c if c.isprintable() else "?" for c in line)
    return None
