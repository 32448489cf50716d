"""DeepSpeed's AutoTP shards decoder layers, for `tensor_parallel.backend: deepspeed`.

It takes whole layers of transformers and leaves each member its part of every linear layer
(https://www.deepspeed.ai/tutorials/automatic-tensor-parallelism), with an all-reduce behind
`o_proj` and `down_proj`. The files hold shards, so each layer is put together from those of all
members, cut again by AutoTP, and let go before the next one. AutoTP is used without DeepSpeed's
engine, which would have all ranks of the run in one group.

Where all members share a host, DeepSpeed adds up in shared memory. Its code for that knows no
groups of ranks, but a number of ranks and this one's, which are set to those of the stage here. If
LOCAL_SIZE is not the number of ranks it dies with SIGSEGV.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowspec.comm.base import Links
from flowspec.comm.group import ProcessLinks
from flowspec.comm.heartbeat import machine
from flowspec.core.topology import Shard
from flowspec.errors import need
from flowspec.models.families import layer_of
from flowspec.models.shard import Cut, cut
from flowspec.models.weights import TensorFile, TensorInfo, torch_dtype

SUMMED = ["self_attn.o_proj", "mlp.down_proj"]
"""Behind these products the members' results are added up."""


class JoinedFile:
    """A JoinedFile is the files of all members of a stage, read as one of whole layers.

    What is not of a layer (the embedding) is that of one member."""

    def __init__(self, files: Sequence[TensorFile], member: int, config: dict):
        self._files, self._own, self._config = files, files[member], config

    @property
    def names(self) -> list[str]:
        return self._own.names

    def info(self, name: str) -> TensorInfo:
        """Return the dtype and the shape of the whole tensor; it lies in no one place."""
        dtype, shape, *_ = self._files[0].info(name)
        cuts = self._cuts(name)
        return TensorInfo(dtype, _whole(shape, cuts[0]) if cuts else shape, 0, 0)

    def read(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the whole tensor."""
        if layer_of(name) is None:
            return self._own.read(name, dtype)
        cuts, info = self._cuts(name), self.info(name)
        if not cuts:  # of what is added, the first has all
            return self._files[0].read(name, dtype)
        whole = torch.empty(info.shape, dtype=dtype or torch_dtype(info.dtype))
        for file, part in zip(self._files, cuts, strict=True):
            index = torch.tensor([k for some in part.ranges for k in some])
            whole.index_copy_(part.dim, index, file.read(name, dtype))
        return whole

    def read_into(self, name: str, out: Tensor) -> None:
        out.copy_(self.read(name, out.dtype).view(out.shape))

    def _cuts(self, name: str) -> list[Cut]:
        """Return how each member's file holds the tensor; nothing if they hold it whole."""
        members = range(len(self._files))
        cuts = (cut(name, self._config, Shard(k, len(self._files))) for k in members)
        return [each for each in cuts if each]


def _whole(shape: Sequence[int], part: Cut) -> tuple[int, ...]:
    """Return the shape of the tensor of which a part has this shape."""
    return (*shape[: part.dim], part.size, *shape[part.dim + 1 :])


def sharer(links: Links | None, config: Any, device: str) -> Callable[[nn.Module], nn.Module]:
    """Return what makes a whole decoder layer this member's shard of it.

    `config` is transformers' configuration of the layer."""
    need(
        isinstance(links, ProcessLinks),
        "tensor_parallel.backend is deepspeed, which needs a process for each rank: start the run "
        "by `flowspec run` or torchrun, or set it to native",
    )
    assert isinstance(links, ProcessLinks)
    _begin(links, device)
    from deepspeed.module_inject.auto_tp import AutoTP

    def share(layer: nn.Module) -> nn.Module:
        shards = AutoTP(layer, SUMMED, "", None, None, type(layer), model_config=config)
        shards.set_tensor_parallel_config(links.size, links.group)
        shards.update_linear_policies()
        return shards._replace_module(layer)  # as DeepSpeed's replace_transformer_layer does

    return share


def _begin(links: ProcessLinks, device: str) -> None:
    """Start DeepSpeed's communication for the members of this stage."""
    here = zlib.crc32("".join(machine()).encode())
    one_host = len({int(theirs) for theirs in links.gathered(torch.tensor([here]))}) == 1
    os.environ["LOCAL_SIZE"] = str(links.size)
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if device == "cpu" else "cuda")
    import deepspeed
    from deepspeed.comm import comm
    from deepspeed.comm.torch import build_shm_op

    shared = build_shm_op() if one_host and device == "cpu" else None
    if shared is not None:
        port = os.environ.get("MASTER_PORT", "0")
        os.environ["MASTER_PORT"] = f"{port}_{links.first}"  # names the memory: one for each stage
        shared.initialize(links.size, links.index)
        links.gathered(torch.zeros(1))  # all have opened what each has made, and it may go
        for left in Path("/dev/shm").glob(f"deepspeed_*_{os.environ['MASTER_PORT']}_{links.index}"):
            left.unlink(missing_ok=True)
        os.environ["MASTER_PORT"] = port
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    if shared is None:
        comm.cdb.shm_vector_kernel_level = 0  # torch adds up
