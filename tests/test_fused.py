"""The kernels of fake quantization against their definition in torch, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics import fused
from lowbit.numerics.grid import grid_from_range
from lowbit.numerics.spec import Int, Spec

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(3, 5, 8), (2, 1, 300), (7, 33), (1, 130), (6, 2, 128)]
RULES = ["symmetric", "asymmetric", "symmetric-restricted"]


def case(shape: tuple[int, ...], rule: str, dtype: torch.dtype, clamp: bool) -> tuple[Tensor, Tensor, Spec, object]:
    x = (torch.randn(shape, device=DEVICE) * 3).to(dtype)
    spec = Spec(Int(4, rule), (1, -1), "float32")  # type: ignore[arg-type]
    low, high = 0.6 * x.amin(-1).float().clamp_max(0), 0.7 * x.amax(-1).float().clamp_min(0)
    grid = grid_from_range(low, high, spec)
    return x, torch.randn(shape, device=DEVICE).to(dtype), spec, (grid.scale, grid.zero, (low, high) if clamp else None)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_extremes(shape: tuple[int, ...]) -> None:
    from lowbit.numerics import kernels

    x = torch.randn(shape, device=DEVICE)
    for found, expected in zip(kernels.extremes(x), fused.extremes(x.cpu()), strict=True):
        assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clamp", [False, True], ids=["", "clamp"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients(shape: tuple[int, ...], rule: str, clamp: bool, dtype: torch.dtype) -> None:
    """Values to the last bit; sums over a unit in any order, against fp64."""
    from lowbit.numerics import kernels

    x, gradient, spec, (scale, zero, ends) = case(shape, rule, dtype, clamp)  # type: ignore[misc]
    number = spec.number
    assert isinstance(number, Int)
    here = [None if part is None else part.cpu() for part in (scale, zero)]
    limits = None if ends is None else tuple(end.cpu() for end in ends)
    for out in (torch.float32, torch.bfloat16):
        values = kernels.rounded(x, scale, zero, number, ends, out).cpu()
        expected_values = fused.rounded(x.cpu(), *here, number, limits, out)  # type: ignore[arg-type]
        if DEVICE == "cpu" and out == torch.bfloat16:  # the interpreter cuts bits off where a GPU rounds
            torch.testing.assert_close(values, expected_values, rtol=2**-7, atol=0)
        else:
            assert torch.equal(values, expected_values)
    found = kernels.gradients(gradient, x, scale, zero, number, ends)
    expected = fused.gradients(gradient.cpu(), x.cpu(), *here, number, limits)  # type: ignore[arg-type]
    assert torch.equal(found[0].cpu(), expected.by_value)
    for a, b in zip(found[1:], expected[1:], strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-4)


def test_halves_round_to_even_and_far_values_saturate() -> None:
    from lowbit.numerics import kernels

    x = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 1e30, -1e30, 7.5, -8.5]], device=DEVICE)
    one = torch.ones(1, device=DEVICE)
    found = kernels.rounded(x, one, None, Int(4), None, torch.float32)
    assert found.tolist() == [[0.0, 2.0, 2.0, 0.0, -2.0, -2.0, 7.0, -8.0, 7.0, -8.0]]


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
def test_the_gpu_takes_the_kernels_and_agrees_with_fp64() -> None:
    from lowbit.numerics.clipping import quantize_clipped

    spec = Spec(Int(4), (1, 128), "half")
    x = torch.randn(512, 4096, device=DEVICE, requires_grad=True)
    low, high = (torch.full((512, 32), part, device=DEVICE, requires_grad=True) for part in (0.8, 0.9))
    weight = torch.randn_like(x)
    gradients = []
    for widest in (fused.WIDEST, 0):
        fused.WIDEST = widest
        out = quantize_clipped(x, spec, low, high, clamp=True)
        gradients.append([out.detach(), *torch.autograd.grad((out * weight).sum(), (x, low, high))])
    fused.WIDEST = 16384
    assert torch.equal(gradients[0][0], gradients[1][0])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
