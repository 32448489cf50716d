"""Packed products against torch's in float64, and rows that do not depend on the batch they are in."""

import pytest
import torch

from flowspec.models import jit, kernels
from flowspec.models.kernels import PackedLinear

if not jit.available():
    pytest.skip("no llvmlite, or a processor without fused multiply-add", allow_module_level=True)

DTYPES = list(kernels.KINDS)
SHAPES = [(1, 1), (15, 7), (16, 64), (17, 65), (96, 130), (250, 300)]
"""outputs, inputs"""


def linear(outputs, inputs, dtype, bias=False):
    torch.manual_seed(outputs * inputs)
    weight = torch.randn(outputs, inputs)
    bias = torch.nn.Parameter(torch.randn(outputs), requires_grad=False) if bias else None
    return PackedLinear(weight, bias, dtype), weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("outputs, inputs", SHAPES)
def test_it_is_the_product(outputs, inputs, dtype):
    layer, weight = linear(outputs, inputs, dtype, bias=True)
    held = kernels.unpacked(layer.packed, outputs).double()
    if dtype == torch.int8:
        held *= layer.scale.double()[:, None]
        assert (held - weight).abs().max() <= (weight.abs().amax(1) / 254).max() * 1.001, (
            "no more than half a step of the scale"
        )
    else:
        assert torch.equal(held.to(dtype), weight.to(dtype))
    for n in (1, 2, 3, 5, 6, 7, 11, 12, 13, 40):
        x = torch.randn(n, inputs)
        torch.testing.assert_close(
            layer(x).double(), x.double() @ held.T + layer.bias.double(), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_is_the_same_in_every_batch(dtype):
    layer, _ = linear(250, 300, dtype)
    x = torch.randn(40, 300)
    alone = torch.cat([layer(row[None]) for row in x])
    for n in range(1, 41):
        assert torch.equal(layer(x[:n]), alone[:n])
        assert torch.equal(layer(x[-n:]), alone[-n:])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_the_outputs(dtype, monkeypatch):
    monkeypatch.setattr(kernels, "THREADED", 1)
    layer, _ = linear(250, 300, dtype)
    x, threads = torch.randn(7, 300), torch.get_num_threads()
    alone = layer(x)
    try:
        for n in (2, 3, 5):
            torch.set_num_threads(n)
            assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(threads)


def test_rows_of_any_layout():
    """Leading dimensions, strided rows, halves."""
    layer, weight = linear(17, 65, torch.float32)
    x = torch.randn(2, 3, 65)
    torch.testing.assert_close(layer(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    wide = torch.randn(4, 130)
    torch.testing.assert_close(layer(wide[:, 65:]), wide[:, 65:] @ weight.T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer(wide[:, ::2]), wide[:, ::2] @ weight.T, rtol=1e-4, atol=1e-4)
    half = x.bfloat16()
    torch.testing.assert_close(layer(half), half.float() @ weight.T, rtol=1e-4, atol=1e-4)
    assert layer(x[:, :0]).shape == (2, 0, 17)
