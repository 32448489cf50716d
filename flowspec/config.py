"""A configuration is made of frozen dataclasses, from YAML and a.b=c overrides.

Most of these classes lie beside what they configure. This module imports no torch, so that
everything wrong with a configuration is said before anything heavy starts."""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flowspec.core.cost import Emulate
from flowspec.core.policies import METHODS
from flowspec.core.policy import PolicyConfig, TreeConfig
from flowspec.core.request import Sampling
from flowspec.core.topology import Topology
from flowspec.draft.config import DrafterConfig
from flowspec.errors import UserError, need

DTYPES = ("auto", "float32", "float16", "bfloat16", "int8")
VERIFY_ON = ("auto", "coordinator", "last")
LATER = ("tp", "galaxy", "dsi", "si")
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
    dtype: str = "auto"
    """This is the dtype of the weights (int8 has a scale for each output and runs on a CPU). `auto`
    is float32 on a CPU and the stored dtype elsewhere."""
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
        later = f"{self.method} comes later; " if self.method in LATER else ""
        _choice("method", self.method, METHODS, later)
        _choice("dtype", self.dtype, DTYPES)
        _choice("verify_on", self.verify_on, VERIFY_ON)
        need(len(self.drafters) > 0, "drafter is an empty list: name one at least, or kind: none")
        silent = [drafter.where for drafter in self.drafters if drafter.kind == "none"]
        need(
            len(self.drafters) == 1 or not silent,
            f"{''.join(silent[:1])}.kind is none: a list names drafters that draft",
        )
        both = {"eagle", "eagle3"} <= {drafter.kind for drafter in self.drafters}
        need(
            not both,
            "drafter lists an eagle and an eagle3 head: they read different features of the target, keep one of the two",
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
    def stages_path(self) -> Path:
        return self.folder / self.stages

    @property
    def trace_path(self) -> Path:
        assert self.trace is not None
        return self.folder / self.trace

    @property
    def drafters(self) -> tuple[DrafterConfig, ...]:
        return self.drafter if isinstance(self.drafter, tuple) else (self.drafter,)

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

    def head_ranks(self, topology: Topology) -> list[int]:
        """Return the ranks that load lm_head.

        These are the rank that picks tokens, and rank 0 if its drafter needs it."""
        picking = topology.last if self.verifies_last else topology.COORDINATOR
        return sorted({picking, topology.COORDINATOR}) if self.needs_lm_head else [picking]

    def shared(self) -> dict[str, str]:
        """Return what must be equal on all ranks of a run, as a map of keys to values as text."""
        found = {"drafter": ", ".join(drafter.kind for drafter in self.drafters)}
        for key in (f.name for f in dataclasses.fields(self) if f.name not in OWN):
            value = getattr(self, key)
            inner = (
                {f"{key}.{name}": each for name, each in vars(value).items()}
                if dataclasses.is_dataclass(value)
                else {key: value}
            )
            found |= {name: "auto" if each is None else str(each) for name, each in inner.items()}
        return found

    def device_of(self, rank: int) -> str:
        devices = (self.device,) if isinstance(self.device, str) else self.device
        return devices[rank] if len(devices) > 1 else devices[0]


class _Duplicate(yaml.MarkedYAMLError):
    """A key stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """This loader refuses what YAML forbids and PyYAML takes: a second value for a key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise _Duplicate(
                    problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _choice(name: str, value: str, allowed: tuple[str, ...], note: str = "") -> None:
    near = difflib.get_close_matches(str(value), allowed, 1)
    hint = f"did you mean {near[0]}? " if near and not note else ""
    need(value in allowed, f"{name} is {value}: {note}{hint}choose one of {', '.join(allowed)}")


def load_config(path: str | os.PathLike[str], overrides: typing.Iterable[str] = ()) -> Config:
    """Read a YAML file, apply `a.b=c` overrides (c is YAML) and check everything.

    Raise UserError, which names the key, if something is wrong."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text(), _Loader)
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError) as error:
        at = getattr(error, "problem_mark", None)
        what = f": {error.problem}" if isinstance(error, _Duplicate) else " is not valid YAML"
        raise UserError(f"{path}{what}{f' (line {at.line + 1})' if at else ''}") from None
    need(
        isinstance(tree, dict),
        f"{path} holds no configuration: it must be a YAML mapping with at least `stages`",
    )
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
        value = yaml.load(text, _Loader)
    except _Duplicate as error:
        raise UserError(f"{override!r}: {error.problem}") from None
    except (yaml.YAMLError, ValueError):
        raise UserError(f"{override!r}: the value is not valid YAML") from None
    *parents, leaf = key.split(".")
    for name in parents:
        inner = tree.get(name)
        need(
            not isinstance(inner, list),
            f"{override!r}: {name} is a list, which can only be given anew as a whole: {name}=[..., ...]",
        )
        tree[name] = tree = dict(inner) if isinstance(inner, dict) else {}
    tree[leaf] = value


def build(cls: type, values: Any, where: str = "", **internal: Any) -> Any:
    """Return a dataclass made from plain values.

    Raise UserError with the key's full name for an unknown key, a wrong type or a missing key."""
    need(
        isinstance(values, dict),
        f"{where or 'the configuration'} must be a mapping, it is {values!r}",
    )
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls) if not f.metadata.get("internal")}
    made = dict(internal)
    if "where" in hints:
        made["where"] = where
    for key, value in values.items():
        name = f"{where}.{key}" if where else str(key)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, 1)
            hint = (
                f"did you mean {name.removesuffix(str(key))}{near[0]}?"
                if near
                else f"known here: {', '.join(fields)}"
            )
            raise UserError(f"unknown key {name}: {hint}")
        made[key] = _convert(hints[key], value, name)
    for f in fields.values():
        required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        need(f.name in made or not required, f"{where}.{f.name}".lstrip(".") + " is missing")
    return cls(**made)


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Return `value` as the field's type.

    A dataclass comes from a mapping, a tuple from a list, None from auto, and a float from an int
    or from a text that is a number."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    inner = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if isinstance(inner, type) and not (len(options) > 1 and isinstance(value, list)):
        return build(inner, {} if value is None else value, name)
    if type(None) in options and (value is None or value == "auto"):
        return None
    for option in options:
        if typing.get_origin(option) is tuple and isinstance(value, list):
            return tuple(
                _convert(typing.get_args(option)[0], item, f"{name}.{k}")
                for k, item in enumerate(value)
            )
        if option is float and type(value) is int:
            return float(value)
        if option is float and isinstance(value, str) and (number := _number(value)) is not None:
            return number  # YAML 1.1 takes 1e-1 for a text
        if type(value) is option:
            return value
    wanted = " or ".join(
        "a list"
        if typing.get_origin(o)
        else {type(None): "auto"}.get(o, getattr(o, "__name__", "?"))
        for o in options
    )
    raise UserError(f"{name} is {value!r}: expected {wanted}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
