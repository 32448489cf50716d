"""This module copies between the host and a GPU: copies that do not wait, and a forward's one wait.

On a CPU nothing happens.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor


def free_bytes(device: torch.device) -> float:
    """Return the bytes of memory that are free on the device's side; infinity where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    said = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", said.read_text()) if said.exists() else None
    return int(found[1]) * 1024 if found else math.inf


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """Return `tensor` on `device`.

    Pinned memory lets the host go on at once; torch keeps that memory until the GPU has read it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_host(rows: Tensor) -> Tensor:
    """Return `rows` on the host and complete.

    A non-blocking copy to the CPU is pinned, and may be read only after the wait."""
    if rows.device.type == "cpu":
        return rows
    copy = rows.to("cpu", non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return copy
