"""What people and other runs wrote (YAML, JSON) becomes frozen dataclasses here, checked by key.

A class says what its file may hold: the names, types and defaults of its fields. What else must be
true of the values it checks in `__post_init__`. Pure but for reading the file."""

from __future__ import annotations

import dataclasses
import difflib
import os
import types
import typing
from pathlib import Path
from typing import Any

import yaml

from flowspec.errors import UserError, need


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


def parse(text: str | bytes) -> Any:
    """Return the plain values of a YAML (or JSON) text; raise ValueError, which says what is wrong.

    The numbers of lines count from 1."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        at = getattr(error, "problem_mark", None)
        what = error.problem if isinstance(error, _Duplicate) else "not valid YAML"
        raise ValueError(f"{what}{f' (line {at.line + 1})' if at else ''}") from None


def read_mapping(path: Path, what: str) -> dict:
    """Return the mapping that a YAML file holds.

    Raise UserError, which says that the file must be `what`, if it holds none."""
    values = read_values(path, what)
    need(isinstance(values, dict), f"{path}: no mapping; it must be {what}")
    return values


def read_values(path: Path, what: str) -> Any:
    """Return what a YAML file holds; raise UserError, as `read_mapping` does, if it has none."""
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}; it must be {what}") from None


def choice(name: str, value: str, allowed: tuple[str, ...], note: str = "") -> None:
    """Raise UserError, with `note` or the likeliest name meant, unless the value is allowed."""
    near = difflib.get_close_matches(str(value), allowed, 1)
    hint = f"did you mean {near[0]}? " if near and not note else ""
    need(value in allowed, f"{name} is {value}: {note}{hint}choose one of {', '.join(allowed)}")


def stored(cls: type, path: str | os.PathLike[str], what: str, again: str, format: int) -> Any:
    """Return the dataclass that one of our own files holds, as `what` is and in this `format`.

    Raise UserError, which names the file and the key, and says how to make it `again`."""
    values = read_mapping(Path(path), what)
    try:
        found = build(cls, values)
    except UserError as error:
        raise UserError(f"{path}: {error}: {again}") from None
    need(found.format == format, f"{path} has format {found.format}, this flowspec reads {format}")
    return found


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


def plain(value: Any) -> Any:
    """Return what `build` makes such a dataclass (or a field's value) from."""
    if dataclasses.is_dataclass(value):
        fields = (f.name for f in dataclasses.fields(value) if not f.metadata.get("internal"))
        return {name: plain(getattr(value, name)) for name in fields}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Return `value` as the field's type.

    A dataclass comes from a mapping, a tuple from a list, one of pairs also from a mapping, None
    from auto, and a float from an int or from a text that is a number."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if type(None) in options and (value is None or value == "auto"):
        return None
    inner = next((option for option in options if dataclasses.is_dataclass(option)), None)
    if isinstance(inner, type) and not (len(options) > 1 and isinstance(value, list)):
        return build(inner, {} if value is None else value, name)
    for option in options:
        if _is_pairs(option) and isinstance(value, dict):
            key, held = typing.get_args(typing.get_args(option)[0])
            return tuple(
                (_convert(key, k, f"a key of {name}"), _convert(held, v, f"{name}.{k}"))
                for k, v in value.items()
            )
        if typing.get_origin(option) is tuple and isinstance(value, list):
            kinds = typing.get_args(option)
            if kinds[-1] is Ellipsis:
                kinds = kinds[:1] * len(value)
            if len(kinds) == len(value):
                items = enumerate(zip(kinds, value, strict=True))
                return tuple(_convert(kind, item, f"{name}.{k}") for k, (kind, item) in items)
        if option is float and type(value) is int:
            return float(value)
        if option is float and isinstance(value, str) and (number := _number(value)) is not None:
            return number  # YAML 1.1 takes 1e-1 for a text
        if type(value) is option:
            return value
    raise UserError(f"{name} is {value!r}: expected {' or '.join(map(_named, options))}")


def _is_pairs(hint: Any) -> bool:
    """Return whether values of this type are tuples of pairs."""
    kinds = typing.get_args(hint)
    return typing.get_origin(hint) is tuple and len(typing.get_args(kinds[0])) == 2


def _named(hint: Any) -> str:
    """Return what a value of this type is called in a message."""
    if _is_pairs(hint):
        return "a mapping"
    kinds = typing.get_args(hint)
    if kinds:
        return "a list" if kinds[-1] is Ellipsis else f"a list of {len(kinds)}"
    return "auto" if hint is type(None) else hint.__name__


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
