"""A shard is what one of the T members of a stage holds of its layers (tensor parallelism).

The cuts are Megatron's (arXiv 1909.08053). The matrices that a norm feeds (queries, keys, values,
gate, up) are cut by their outputs, and those behind them (o, down) by their inputs. So each member
computes its own heads and its own part of the MLP, and the sum of all members' outputs is the
layer's. The embedding and lm_head are cut by the vocabulary. With more members than key/value
heads, some members hold the same head.

This module is pure: it knows names, shapes and configurations. models/split.py cuts the files, and
models/stage.py makes layers of a shard's size.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from flowspec.core.topology import Shard
from flowspec.errors import need
from flowspec.models.families import EMBEDDING, HEAD, family_of

OPTION = "--tensor-parallel"
INNER = ("intermediate_size", "moe_intermediate_size")
"""So many numbers of a token are between the matrices of an MLP, and in one of a mixture's
experts."""


class Cut(NamedTuple):
    """A cut says what of a tensor a shard holds: along `dim` it has `ranges`, one after another."""

    dim: int
    ranges: Sequence[range]
    size: int
    """The whole tensor has this size along `dim`."""

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the shard of a tensor of this shape."""
        kept = sum(map(len, self.ranges))
        return (*shape[: self.dim], kept, *shape[self.dim + 1 :])

    def spans(self, shape: Sequence[int], itemsize: int) -> Iterator[tuple[int, int]]:
        """Yield the bytes [start, end) of the tensor that the shard holds, in order."""
        row = itemsize * math.prod(shape[self.dim + 1 :])
        for outer in range(math.prod(shape[: self.dim])):
            first = outer * shape[self.dim]
            for part in self.ranges:
                yield (first + part.start) * row, (first + part.stop) * row


def heads(config: dict) -> tuple[int, int, int]:
    """Return how many query heads and key/value heads a layer has, and how wide a head is."""
    count = config["num_attention_heads"]
    groups = config.get("num_key_value_heads") or count
    return count, groups, config.get("head_dim") or config["hidden_size"] // count


def check_members(config: dict, members: int) -> None:
    """Raise UserError, by name, unless the layers of a model can be cut into so many shards."""
    need(members >= 1, f"{OPTION} is {members}, it must be at least 1")
    if members == 1:
        return
    need(
        family_of(config).halves,
        f"{OPTION} is {members}, but layers of model_type {config['model_type']} are not cut into "
        "shards: leave it out",
    )
    inner = config.get("intermediate_size")
    need(type(inner) is int, f"{OPTION} needs intermediate_size in config.json, it is {inner!r}")
    assert isinstance(inner, int)
    count, groups, _ = heads(config)
    need(
        count % members == 0,
        f"{OPTION} is {members}, it must divide the {count} attention heads of the model",
    )
    need(
        groups % members == 0 or members % groups == 0,
        f"{OPTION} is {members}, it must divide the {groups} key/value heads of the model, or be a "
        "multiple of them",
    )
    for key in INNER:
        need(
            config.get(key, members) % members == 0,
            f"{OPTION} is {members}, it must divide the model's {key} {config.get(key)}",
        )


def copies(config: dict, members: int) -> int:
    """Return how many members hold the same key/value head."""
    return max(1, members // heads(config)[1])


def narrowed(config: dict, members: int) -> dict:
    """Return the configuration of a layer of a shard's size."""
    if members == 1:
        return config
    count, groups, width = heads(config)
    return config | {
        "head_dim": width,
        "num_attention_heads": count // members,
        "num_key_value_heads": max(1, groups // members),
        **{key: config[key] // members for key in INNER if key in config},
    }


_BY_OUTPUTS = re.compile(r".*\.(gate_proj|up_proj|w1|w3)\.(weight|bias)")
_BY_INPUTS = re.compile(r".*\.(down_proj|w2)\.weight")
_SUMMED = re.compile(r".*\.(o_proj|down_proj)\.bias")


def is_added(name: str) -> bool:
    """Return whether a tensor is added to the sum of the shards: only the first of them adds it."""
    return _SUMMED.fullmatch(name) is not None


def cut(name: str, config: dict, shard: Shard) -> Cut | None:
    """Return how a shard holds this tensor of a checkpoint; None means whole."""
    if shard.members == 1:
        return None
    if name in (EMBEDDING, HEAD):
        return Cut(0, [shard.of(config["vocab_size"])], config["vocab_size"])
    count, groups, width = heads(config)
    leaf = name.rpartition(".self_attn.")[2]
    if leaf in ("q_proj.weight", "q_proj.bias"):
        return Cut(0, [_scaled(shard.of(count), width)], count * width)
    if leaf in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        return Cut(0, [_scaled(_key_heads(groups, shard), width)], groups * width)
    if leaf == "o_proj.weight":
        return Cut(1, [_scaled(shard.of(count), width)], count * width)
    inner = config["intermediate_size"]
    if ".experts." in name:
        inner = config.get("moe_intermediate_size", inner)
    own = shard.of(inner)
    if _BY_OUTPUTS.fullmatch(name):
        return Cut(0, [own], inner)
    if _BY_INPUTS.fullmatch(name):
        return Cut(1, [own], inner)
    if name.endswith(".experts.gate_up_proj"):  # [experts, 2 * inner, hidden]: gates above ups
        return Cut(1, [own, range(inner + own.start, inner + own.stop)], 2 * inner)
    if name.endswith(".experts.down_proj"):  # [experts, hidden, inner]
        return Cut(2, [own], inner)
    return None


def _key_heads(groups: int, shard: Shard) -> range:
    """Return the key/value heads that the query heads of a shard read."""
    if shard.members <= groups:
        return shard.of(groups)
    own = shard.member * groups // shard.members
    return range(own, own + 1)


def _scaled(heads: range, width: int) -> range:
    return range(heads.start * width, heads.stop * width)
