"""A configuration is made of frozen dataclasses, from YAML and a.b=c overrides.

Most of these classes lie beside what they configure. This module imports no torch, so that
everything wrong with a configuration is said before anything heavy starts."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flowspec.core.cost import Emulate
from flowspec.core.policies import ALL_METHODS, check_method
from flowspec.core.policy import Dsi, PolicyConfig, TreeConfig
from flowspec.core.request import Sampling
from flowspec.core.topology import Topology
from flowspec.draft.config import HEAD, DrafterConfig
from flowspec.errors import UserError, need
from flowspec.schema import build, choice, parse, read_mapping

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8", "nf4")
QUANTISED = ("int8", "nf4")
"""These dtypes are made as a rank loads its weights; no unsplit model has them."""
VERIFY_ON = ("auto", "coordinator", "last")
BACKENDS = ("native", "deepspeed")
OWN = {
    "stages",
    "drafter",
    "sampling",
    "dtype",
    "device",
    "threads",
    "cache_mb",
    "trace",
    "folder",
    "name",
}
"""These keys may differ from rank to rank. They name places, what a rank computes on, and what only
rank 0 decides with each request. (The dtype that they name or stand for is compared by itself.)"""


@dataclass(frozen=True)
class TensorParallel:
    """This says how the ranks of a stage share its layers, where a stage has several."""

    backend: str = "native"
    """`native` is flowspec's own; `deepspeed` is DeepSpeed's AutoTP, over processes."""

    def __post_init__(self) -> None:
        choice("tensor_parallel.backend", self.backend, BACKENDS)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration says what to run and how.

    Paths are relative to the file in which they stand."""

    stages: str
    """This is the stages.yaml of a split model, or its folder."""
    method: str = "flowspec"
    drafter: DrafterConfig | tuple[DrafterConfig, ...] = field(default_factory=DrafterConfig)
    """This is one drafter, or a list of several that draft as one (a mixture)."""
    tree: TreeConfig = field(default_factory=TreeConfig)
    sampling: Sampling = field(default_factory=Sampling)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    emulate: Emulate = field(default_factory=Emulate)
    tensor_parallel: TensorParallel = field(default_factory=TensorParallel)
    dsi: Dsi = field(default_factory=Dsi)
    dtype: str | tuple[str, ...] = "auto"
    """This is the dtype of the weights: one for all ranks, or one for each stage (rank 0 then has
    that of the last). int8 has a scale for each output and runs on a CPU. nf4 is four bits, by
    bitsandbytes, for the matrices of layers; lm_head and drafters are `auto` beside it. `auto` is
    float32 on a CPU and the stored dtype elsewhere."""
    deterministic: bool = False
    """A token's logits do not depend on what else is in the batch, to the bit, in any dtype. Native
    layers on a CPU are like that anyway; others then compute one row at a time."""
    device: str | tuple[str, ...] = "cpu"
    """The device is cpu, cuda (the ranks of a host take its GPUs in turn) or cuda:N: one for all
    ranks, or one for each rank."""
    threads: int | None = None
    """Each rank has this many CPU threads. `auto` shares the cores of this host among its ranks."""
    cache_mb: float | None = None
    """On each stage, the keys and values of all requests have this much memory, in MB. `auto` is
    most of what is free there once its weights are loaded. Requests that do not fit together wait
    for each other."""
    verify_on: str = "auto"
    """Tokens are picked at the coordinator (features return to rank 0) or at the last stage (tokens
    return). `auto` is last."""
    trace: str | None = None
    """The timeline of all ranks goes to this file (Chrome trace JSON); null turns it off."""
    folder: Path = field(default=Path(), metadata={"internal": True})
    name: str = field(default="", metadata={"internal": True})
    """This is the name of the file from which the configuration came, without its suffix."""

    def __post_init__(self) -> None:
        choice("method", self.method, ALL_METHODS)
        for dtype in self.dtypes:
            choice("dtype", dtype, DTYPES)
        need(
            not self.many_dtypes or "auto" not in self.dtypes,
            "dtype lists auto, which each rank takes for what its device does: name the dtype",
        )
        choice("verify_on", self.verify_on, VERIFY_ON)
        need(len(self.drafters) > 0, "drafter is an empty list: name one at least, or kind: none")
        silent = [drafter.where for drafter in self.drafters if drafter.kind == "none"]
        need(
            len(self.drafters) == 1 or not silent,
            f"{''.join(silent[:1])}.kind is none: a list names drafters that draft",
        )
        both = {"eagle", "eagle3"} <= {drafter.kind for drafter in self.drafters}
        need(
            not both,
            "drafter lists an eagle and an eagle3 head: they read different features of the "
            "target, keep one of the two",
        )
        for device in [self.device] if isinstance(self.device, str) else self.device:
            need(
                re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None,
                f"device is {device}: it must be cpu, cuda or cuda:N",
            )
        need(
            self.threads is None or self.threads >= 1,
            f"threads is {self.threads}: it must be at least 1, or auto",
        )
        need(
            self.cache_mb is None or self.cache_mb > 0,
            f"cache_mb is {self.cache_mb}: it must be more than 0 MB, or auto",
        )

    @property
    def dtypes(self) -> tuple[str, ...]:
        return (self.dtype,) if isinstance(self.dtype, str) else self.dtype

    @property
    def many_dtypes(self) -> bool:
        """Return whether there is a dtype for each stage."""
        return not isinstance(self.dtype, str)

    def plain_dtype(self, rank: int, stored: str) -> str:
        """Return what `auto` is on a rank, for a split whose dtype is `stored`."""
        return plain_dtype(self.device_of(rank), stored)

    def dtype_of(self, topology: Topology, rank: int, stored: str) -> str:
        """Return the dtype of a rank's weights by its name, for a split whose dtype is `stored`."""
        stage = topology.stage(rank) or topology.stages
        name = self.dtypes[stage - 1 if self.many_dtypes else 0]
        return self.plain_dtype(rank, stored) if name == "auto" else name

    @property
    def stages_path(self) -> Path:
        return self.folder / self.stages

    @property
    def trace_path(self) -> Path:
        assert self.trace is not None
        return self.folder / self.trace

    @property
    def drafters(self) -> tuple[DrafterConfig, ...]:
        return self.drafter if isinstance(self.drafter, tuple) else (self.drafter,)

    def found(self) -> Config:
        """Return the configuration with the kinds of heads that its drafters name.

        Their files must be on this machine. Raise UserError if they cannot be read."""
        drafters = tuple(drafter.found(self.folder) for drafter in self.drafters)
        drafter = drafters if isinstance(self.drafter, tuple) else drafters[0]
        return dataclasses.replace(self, drafter=drafter)

    @property
    def drafter_kinds(self) -> str:
        return " + ".join(drafter.kind for drafter in self.drafters)

    @property
    def computes(self) -> bool:
        """Return whether a drafter is a model, so that what it drafts takes a forward."""
        return any(drafter.computes for drafter in self.drafters)

    @property
    def reads_features(self) -> bool:
        """Return whether a drafter reads the target's features."""
        return any(drafter.reads_features for drafter in self.drafters)

    @property
    def needs_lm_head(self) -> bool:
        """Return whether a drafter has no lm_head of its own, so that rank 0 needs the target's."""
        return any(drafter.needs_lm_head for drafter in self.drafters)

    @property
    def verifies_last(self) -> bool:
        return self.verify_on != "coordinator"

    def check_method(self, members: int, method: str | None = None) -> None:
        """Raise UserError unless stages of so many ranks can run a method (None: the own one)."""
        backend = self.tensor_parallel.backend
        check_method(method or self.method, members, backend, self.deterministic)

    def shares_by_autotp(self, topology: Topology) -> bool:
        """Return whether DeepSpeed shares the layers of a stage among its ranks."""
        return self.tensor_parallel.backend == "deepspeed" and topology.members > 1

    def read_by(self, topology: Topology, ranks: Sequence[int]) -> Sequence[int]:
        """Return the ranks whose files these ranks read; AutoTP reads those of a whole stage."""
        if not self.shares_by_autotp(topology):
            return ranks
        return sorted({member for rank in ranks for member in topology.group(rank)})

    def head_ranks(self, topology: Topology) -> list[int]:
        """Return the ranks that load lm_head.

        These are the rank that picks tokens, and rank 0 if its drafter needs it."""
        last = [*topology.group(topology.last)]
        picking = last if self.verifies_last else [topology.COORDINATOR]
        return sorted({*picking, topology.COORDINATOR}) if self.needs_lm_head else picking

    def shared(self) -> dict[str, str]:
        """Return what must be equal on all ranks of a run, as a map of keys to values as text."""
        # only where a head lies its kind is known
        kinds = (HEAD if drafter.head else drafter.kind for drafter in self.drafters)
        about = (
            f"{kind} on {drafter.ranks} ranks" if drafter.ranks else kind
            for kind, drafter in zip(kinds, self.drafters, strict=True)
        )
        found = {"drafter": ", ".join(about)}
        for key in (f.name for f in dataclasses.fields(self) if f.name not in OWN):
            value = getattr(self, key)
            inner = (
                {f"{key}.{name}": each for name, each in vars(value).items()}
                if dataclasses.is_dataclass(value)
                else {key: value}
            )
            found |= {name: "auto" if each is None else str(each) for name, each in inner.items()}
        return found

    def drafters_on(self, topology: Topology, rank: int) -> Sequence[DrafterConfig]:
        """Return the drafters that compute on a rank, which may be there for one alone."""
        if topology.drafts(rank):
            own = [drafter for drafter in self.drafters for _ in range(drafter.ranks)]
            return [own[topology.drafter_ranks.index(rank)]]
        return [d for d in self.drafters if not d.ranks] if rank == topology.COORDINATOR else []

    def device_of(self, rank: int) -> str:
        devices = (self.device,) if isinstance(self.device, str) else self.device
        return devices[rank] if len(devices) > 1 else devices[0]


def plain_dtype(device: str, stored: str) -> str:
    """Return what dtype `auto` is on a device, for a split whose dtype is `stored`.

    float32 on a CPU is exact, and no slower on small models."""
    return "float32" if device == "cpu" else stored


def load_config(path: str | os.PathLike[str], overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (c is YAML) and check everything.

    Raise UserError, which names the key, if something is wrong."""
    path = Path(path)
    tree = read_mapping(path, "a YAML mapping with at least `stages`")
    for override in overrides:
        _apply(tree, override)
    return build(Config, tree, folder=path.resolve().parent, name=path.stem)


def _apply(tree: dict, override: str) -> None:
    key, sign, text = override.partition("=")
    need(
        bool(sign) and bool(key),
        f"{override!r} is not understood: overrides are written key=value, such as tree.budget=64",
    )
    try:
        value = parse(text)
    except ValueError as error:
        raise UserError(f"{override!r}: {error}") from None
    *parents, leaf = key.split(".")
    for name in parents:
        inner = tree.get(name)
        need(
            not isinstance(inner, list),
            f"{override!r}: {name} is a list, which can only be given anew as a whole: "
            f"{name}=[..., ...]",
        )
        tree[name] = tree = dict(inner) if isinstance(inner, dict) else {}
    tree[leaf] = value
