"""The flags that say where a model's layers are kept and computed, if not all on one device."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from flowspec.commands.options import number
from flowspec.errors import need
from flowspec.models.placement import KINDS, Placement, memory_of


def add_offload(parser: argparse.ArgumentParser) -> None:
    """Add what `placement_of` reads."""
    kinds = "; ".join(f"{name}: {what}" for name, what in KINDS.items())
    for flag, name, what in (
        (
            "--offload",
            "KIND",
            f"for a target that does not fit: the next layer is fetched while one computes. {kinds}",
        ),
        ("--offload-nvme", "DIR", "for --offload deepspeed: layers in a folder of their own there"),
        ("--offload-gbps", "N", "emulate a link that carries N GB/s of layers"),
        ("--offload-gb", "N", "on it the layers weigh N GB together (default: what they do)"),
        ("--device-map", "auto", "spread the target's layers over devices, by accelerate"),
        ("--max-memory", "LIST", "what they may take there, such as 0=10GiB,cpu=30GiB,disk"),
    ):
        parser.add_argument(flag, metavar=name, help=what)


def placement_of(options: argparse.Namespace) -> Placement | None:
    """Return where the target's layers go; None if nothing is asked.

    Raise UserError, which names the flag, for what is wrong or not installed."""
    kind, spread = options.offload, options.device_map
    need(kind in (None, *KINDS), f"--offload is {kind}: choose one of {', '.join(KINDS)}")
    need(spread in (None, "auto"), f"--device-map is {spread}: it must be auto")
    need(not (kind and spread), "--offload and --device-map exclude each other: leave one out")
    need(
        options.offload_nvme is None or kind == "deepspeed",
        "--offload-nvme is for --offload deepspeed",
    )
    need(options.max_memory is None or bool(spread), "--max-memory needs --device-map auto")
    need(
        options.offload_gbps is None or bool(kind or spread),
        "--offload-gbps needs --offload KIND: it emulates the link of offloaded layers",
    )
    need(
        options.offload_gb is None or options.offload_gbps is not None,
        "--offload-gb needs --offload-gbps: it is what the emulated link carries a forward",
    )
    gbps, gb = (_above_0(options, name) for name in ("offload_gbps", "offload_gb"))
    if not (kind or spread):
        return None
    placement = Placement(
        kind,
        memory_of(options.max_memory, "--max-memory") if options.max_memory is not None else None,
        _folder(options.offload_nvme),
        gbps,
        gb,
    )
    placement.check()
    return placement


def _above_0(options: argparse.Namespace, name: str) -> float | None:
    text, flag = getattr(options, name), "--" + name.replace("_", "-")
    if text is None:
        return None
    found = float(number(text, float, flag))
    need(0 < found < math.inf, f"{flag} is {text}: it must be above 0")
    return found


def _folder(text: str | None) -> Path | None:
    if text is None:
        return None
    need(Path(text).is_dir(), f"--offload-nvme: no folder {text}")
    return Path(text)


def in_runs(places: Sequence[str]) -> str:
    """Return which layers are at which place: `0..3 on cuda:0, 4..7 on cuda:0 from disk`."""
    runs = [(where, [*run]) for where, run in groupby(range(len(places)), places.__getitem__)]
    return ", ".join(f"{run[0]}..{run[-1]} on {where}" for where, run in runs)
