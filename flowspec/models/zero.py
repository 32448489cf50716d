"""DeepSpeed's ZeRO-Inference keeps layers in host memory or on a disk, for `--offload deepspeed`.

ZeRO's third stage takes the parameters out of a module and brings them back around each submodule's
forward, the next ones ahead of time (arXiv 2207.00032, section 6). The module is the StageModel,
without what stays on the device. DeepSpeed wants a process group; that of this one process is in
memory, and listens on loopback only.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flowspec.errors import UserError, need
from flowspec.models.stage import StageModel

STAY = ("embed_tokens", "norm", "rotary")
"""These parts of a StageModel stay on the device."""


def partition(model: StageModel, device: torch.device, nvme: Path | None) -> None:
    """Give the layers of a model, which are in host memory, to DeepSpeed.

    It keeps them in host memory, or in a folder of its own in `nvme`, which goes with the model.
    Raise UserError if the disk cannot be used."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    with contextlib.redirect_stdout(sys.stderr):  # it tells there what it builds
        import deepspeed

        if not dist.is_initialized():
            backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        settings = _settings(model, device, nvme)
        stays = {name: getattr(model, name) for name in STAY}
        for name in STAY:
            setattr(model, name, None)
        where = settings["zero_optimization"]["offload_param"]
        # initialize() would do this, too, but on a CPU takes any dtype for bfloat16 (0.19.8)
        deepspeed.zero.Init(
            module=model,
            config_dict_or_path=settings,
            remote_device=where["device"],
            pin_memory=where["pin_memory"],
        )
        deepspeed.initialize(model=model, config=settings)
        for name, module in stays.items():
            setattr(model, name, module)
    model.eval()


def _settings(model: StageModel, device: torch.device, nvme: Path | None) -> dict[str, Any]:
    offload: dict[str, Any] = {"device": "cpu", "pin_memory": device.type == "cuda"}
    settings: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "fp16": {"enabled": model.dtype == torch.float16},
        "bf16": {"enabled": model.dtype == torch.bfloat16},
        "zero_optimization": {
            "stage": 3,
            "offload_param": offload,
            "stage3_param_persistence_threshold": 0,
        },
    }
    if nvme is not None:
        _check_async_io()
        offload |= {"device": "nvme", "nvme_path": _folder_in(nvme, model)} | _buffers(model.layers)
        settings["aio"] = {"block_size": 1 << 18, "queue_depth": 8, "thread_count": 1}
    return settings


def _buffers(layers: nn.ModuleList) -> dict[str, int]:
    """Return how many parameters are in memory at a time, those of two layers, and of what size."""
    sizes = [p.numel() for p in layers[0].parameters()]
    return {"buffer_count": 2 * len(sizes), "buffer_size": max(sizes)}


def _check_async_io() -> None:
    from deepspeed.ops.op_builder import AsyncIOBuilder

    need(
        AsyncIOBuilder().is_compatible(verbose=False),
        "--offload-nvme: DeepSpeed cannot build async_io, which needs libaio's headers and a C++ "
        "compiler (Debian: apt-get install libaio-dev g++)",
    )


def _folder_in(nvme: Path, model: StageModel) -> str:
    """Return a new folder in this one with room for the layers; it goes with the model."""
    size = sum(p.nbytes for p in model.layers.parameters())
    free = shutil.disk_usage(nvme).free
    need(
        free > size,
        f"--offload-nvme: no space left in {nvme}: the layers need {size / 1e6:,.0f} MB, "
        f"{free / 1e6:,.0f} MB are free",
    )
    try:
        folder = tempfile.mkdtemp(prefix="flowspec-", dir=nvme)
    except OSError as error:
        raise UserError(f"--offload-nvme: cannot write to {nvme}: {error.strerror}") from None
    weakref.finalize(model, shutil.rmtree, folder, True)
    return folder
