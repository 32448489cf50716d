"""Between the host and a GPU: copies that do not wait, and the one wait of a forward. On a CPU nothing happens."""

from __future__ import annotations

import torch
from torch import Tensor


def placed(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. Pinned memory lets the host go on at once; torch keeps that memory until the GPU has read it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def on_host(rows: Tensor) -> Tensor:
    """`rows` on the host and complete. A non-blocking copy to the CPU is pinned, and may be read only after the wait."""
    if rows.device.type == "cpu":
        return rows
    copy = rows.to("cpu", non_blocking=True)
    torch.cuda.current_stream(rows.device).synchronize()
    return copy
