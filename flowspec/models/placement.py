"""A placement says where a model's layers are kept and computed, if not all on one device.

It is made of what the command line asks (commands/placing.py) and carried out by offload.py. This
module imports no torch."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from flowspec.errors import UserError, need

KINDS = {
    "cpu": "layers in host memory",
    "disk": "layers in the checkpoint's own files",
    "deepspeed": "DeepSpeed's ZeRO-Inference: in host memory, or with --offload-nvme on a disk",
}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

Memory = Mapping[int | str, int]
"""This maps a GPU's number, or cpu, to how many bytes of it layers may take. `disk` is there, as
0, if the rest may stay on the disk."""


class Placement(NamedTuple):
    """Layers are offloaded by one of KINDS, or mapped to several devices by accelerate."""

    offload: str | None
    """None means that they are mapped."""
    memory: Memory | None = None
    """None means what is free, for a map."""
    nvme: Path | None = None
    """DeepSpeed keeps the layers in a folder of its own in this one."""
    gbps: float | None = None
    """The emulated link carries so many GB (10^9 bytes) a second; None means that there is none."""
    gb: float | None = None
    """All streamed layers together weigh so many GB on that link; None means as many as they do."""

    @property
    def emulated(self) -> bool:
        return self.gbps is not None

    @property
    def words(self) -> str:
        """Return what is asked, for the title of a table."""
        where = f"offload {self.offload}" if self.offload else "device map auto"
        weight = "" if self.gb is None else f", as if of {self.gb:g} GB"
        return where + (f" (emulated link of {self.gbps:g} GB/s{weight})" if self.gbps else "")

    def check(self) -> None:
        """Raise UserError, which names the flag, unless what it needs is installed."""
        flag = f"--offload {self.offload}" if self.offload else "--device-map auto"
        needed = {"accelerate": "offload"}
        needed |= {"deepspeed": "deepspeed"} if self.offload == "deepspeed" else {}
        for name, extra in needed.items():
            need(
                importlib.util.find_spec(name) is not None,
                f"{flag} needs {name}, which is not installed: .venv/bin/pip install -r "
                f"requirements_{extra}.txt (the extra `{extra}`)",
            )


def memory_of(text: str, flag: str) -> Memory:
    """Return what a list such as `0=10GiB,cpu=30GiB,disk` says. Raise UserError, which names the
    flag, for what it cannot mean."""
    found: dict[int | str, int] = {}
    for part in text.split(","):
        name, _, size = part.partition("=")
        device = int(name) if name.isdecimal() else name
        need(
            device in ("cpu", "disk") or isinstance(device, int),
            f"{flag}: {part!r} names no device: write GPU numbers, cpu and disk, such as "
            "0=10GiB,cpu=30GiB,disk",
        )
        need(device not in found, f"{flag} names {device} twice")
        need(device != "disk" or part == "disk", f"{flag}: {part!r}: disk takes whatever is left")
        found[device] = 0 if device == "disk" else _bytes(size, f"{flag}: {part!r}")
    return found


def _bytes(text: str, what: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]i?B)", text, re.IGNORECASE)
    if not match:
        raise UserError(f"{what}: a size is a number and one of KB, MB, GB, KiB, MiB, GiB")
    return int(float(match[1]) * UNITS[match[2].upper()])
