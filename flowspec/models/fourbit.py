"""A FourBitLinear multiplies with a matrix that is held in four bits a weight, by bitsandbytes.

The format is NF4 (QLoRA, arXiv 2305.14314). Of each BLOCK weights of a row the largest magnitude is
kept as a scale, and each weight becomes the nearest of 16 levels, which are quantiles of a normal
distribution.

On a CPU the library's kernel rounds rows and results to bfloat16 and sums in float32, for each row
by itself: a row's result is the same, to the bit, in a batch of any shape. It needs AVX512-BF16;
elsewhere the library would make the whole matrix plain for every product. On a GPU one row and
several take different kernels, as everywhere on a GPU.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from flowspec.errors import UserError, need

BLOCK = 64
"""So many weights of a row share a scale."""
OUTPUTS = 32
"""The kernel on a CPU takes so many outputs at a time."""


SUMS_ON_CPU = "bfloat16"
"""The kernel on a CPU rounds to this dtype."""


_LOADING = threading.Lock()


def fits(weight: Tensor) -> bool:
    """Return whether a matrix [outputs, inputs] is of whole blocks; others stay as they are."""
    return weight.shape[0] % OUTPUTS == 0 and weight.shape[1] % BLOCK == 0


@cache
def library() -> ModuleType:
    """Return bitsandbytes (preflight has seen that it is installed).

    While it is imported on a CPU, the package `kernels` is hidden from it: through that it would
    load code from the Hugging Face hub, and compute otherwise than on a host without."""
    hub = "kernels"
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    with _LOADING:  # ranks may be threads
        hidden = {name: sys.modules[name] for name in [hub] if name in sys.modules}
        sys.modules[hub] = None  # type: ignore[assignment]
        try:
            import bitsandbytes
        finally:
            del sys.modules[hub]
            sys.modules.update(hidden)
    return bitsandbytes


def check(device: str) -> None:
    """Raise UserError, which says why, unless bitsandbytes can compute with NF4 on this device."""
    bnb = library()
    need(
        device != "cpu" or bool(bnb.functional.has_avx512bf16()),
        "dtype nf4 on a CPU works on x86 with AVX512-BF16 (Zen 4, Cooper Lake, Sapphire Rapids and "
        "newer): set dtype to int8 here, or device to cuda",
    )
    try:
        FourBitLinear(torch.zeros(OUTPUTS, BLOCK), None, torch.float32, device)
    except RuntimeError as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"dtype nf4: bitsandbytes {bnb.__version__} cannot compute on {device} ({why}): install "
            "a build for this GPU's CUDA (on a Jetson: docs/jetson.md), or set another dtype"
        ) from None


class FourBitLinear(nn.Module):
    """A FourBitLinear is an `nn.Linear` over NF4 weights.

    It maps rows [.., inputs] to [.., outputs] of the same dtype."""

    scales: Tensor

    def __init__(self, weight: Tensor, bias: nn.Parameter | None, dtype: torch.dtype, device: str):
        """Keep `weight` [outputs, inputs], for which `fits` holds, to multiply rows of `dtype`."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias  # it may come after the weights
        form: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": False}
        modules = library().nn
        inner = modules.Linear4bit(self.in_features, self.out_features, bias=False, device="meta")
        inner.compute_dtype, inner.compute_type_is_set = dtype, True
        inner.weight = modules.Params4bit(weight, requires_grad=False, blocksize=BLOCK, **form)
        self.inner = inner.to(device).eval()
        with torch.no_grad():  # the first product packs the weights for the kernel
            self.inner(torch.zeros(1, self.in_features, dtype=dtype, device=device))
        # what is in no state_dict, but counts as memory
        self.register_buffer("scales", self.inner.weight.quant_state.absmax, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x.reshape(-1, self.in_features)).view(*x.shape[:-1], -1)

    def products(self, rows: Tensor) -> Tensor:
        """Return the products [n, outputs] of rows [n, inputs], a tensor of its own."""
        if not len(rows):
            return rows.new_empty(0, self.out_features)
        out = self.inner(rows.contiguous())
        return out if self.bias is None else out + self.bias


class Beside(nn.Module):
    """These are linear layers of the same inputs whose outputs lie side by side."""

    def __init__(self, layers: Sequence[Any]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def products(self, rows: Tensor) -> Tensor:
        """Return the products [n, all outputs] of rows [n, inputs]."""
        return torch.cat([layer.products(rows) for layer in self.layers], 1)  # type: ignore[operator]
