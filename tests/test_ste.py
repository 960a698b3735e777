"""Quantization that gradients pass through: values of the grid to the last bit, gradients of the formula on a tape."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics.grid import fit_range, to_units
from lowbit.numerics.spec import E2M1, E4M3, Int, Spec, per_channel, per_group, per_tensor, per_token
from lowbit.numerics.ste import quantize_between, quantize_on, quantize_range

SPECS = [
    per_group(Int(4), 8),
    per_group(Int(2, "asymmetric"), 8),
    per_channel(Int(3, "symmetric-restricted")),
    per_channel(Int(8, "asymmetric-raw")),
    per_tensor(Int(4, "symmetric-unsigned")),
    per_token(Int(4)),
    per_group(E2M1, 8),
    per_channel(E4M3),
]


def ends(x: Tensor, spec: Spec) -> tuple[Tensor, Tensor]:
    units = to_units(x, spec.block)
    return units.amin((-3, -1)), units.amax((-3, -1))


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values_are_the_grids(spec: Spec) -> None:
    x = torch.randn(6, 32) * 3
    assert torch.equal(quantize_range(x, spec), fit_range(x, spec).quantize(x))
    half = fit_range(x / 2, spec)
    assert torch.equal(quantize_on(x, half), half.quantize(x))
    assert torch.equal(quantize_range(x, spec, 0.5, 0.5), half.quantize(x))


def taped(x: Tensor, low: Tensor, high: Tensor, offset: Tensor, spec: Spec) -> Tensor:
    """The formula on autograd's tape, rounding replaced by x + (round(x) - x)."""
    number = spec.number
    assert isinstance(number, Int)
    if number.symmetric:
        steps = 2 ** (number.bits - 1) - 1 if number.rule == "symmetric-restricted" else (2**number.bits - 1) / 2
        scale, zero = torch.maximum(low.abs(), high.abs()) / steps, torch.zeros_like(low)
    else:
        scale = (high - low) / (2**number.bits - 1)
        zero = -low / scale
        zero = zero + (zero.round() - zero).detach()
    scale, zero = scale[:, None, :, None], zero[:, None, :, None]
    y = to_units(x, spec.block) / scale + to_units(offset, spec.block)
    y = torch.clamp(y + (y.round() - y).detach(), number.low - zero, number.high - zero)
    return (y * scale).reshape(x.shape)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("rule", ["symmetric", "symmetric-restricted", "asymmetric-raw"])
def test_gradients_are_the_tapes(rule: str, bits: int) -> None:
    """On ranges cut to 0.7, so that a part of the values saturates; scales in fp32, so that nothing else rounds."""
    spec = per_group(Int(bits, rule), 8, scale="float32")  # type: ignore[arg-type]
    x, offset = torch.randn(6, 32), torch.rand(6, 32) - 0.5
    low, high = ends(x, spec)
    variables = [v.clone().requires_grad_() for v in (x, low * 0.7, high * 0.7, offset)]
    ours = [v.detach().clone().requires_grad_() for v in variables]
    weight = torch.randn(6, 32)
    expected = taped(variables[0], *variables[1:], spec)
    value = quantize_between(ours[0], ours[1], ours[2], spec, offset=ours[3])
    (expected * weight).sum().backward()
    (value * weight).sum().backward()
    assert torch.allclose(value, expected, atol=1e-5)
    for a, b in zip(ours, variables, strict=True):
        assert a.grad is not None and b.grad is not None
        assert torch.allclose(a.grad, b.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_stop_at_saturation_and_move_the_range(spec: Spec) -> None:
    x = (torch.randn(6, 32) * 3).requires_grad_()
    ratio = torch.tensor(0.4, requires_grad=True)
    quantize_range(x, spec, ratio, ratio).sum().backward()
    assert x.grad is not None and ratio.grad is not None
    grid = fit_range(x.detach() * 0.4, spec)
    low, high = ends(grid.quantize(x.detach() * 100), spec)
    units, grads = to_units(x.detach(), spec.block), to_units(x.grad, spec.block)
    step = grid.scale * (1.0 if isinstance(spec.number, Int) else 0.2 * spec.number.largest)
    low, high = ((end + side * step)[..., :, None, :, None] for end, side in ((low, -1), (high, 1)))
    beyond = (units > high) | (units < low)
    inner = (units != units.amax((-3, -1), keepdim=True)) & (units != units.amin((-3, -1), keepdim=True))
    assert (beyond & inner).any() and not grads[beyond & inner].any(), "only the ends of a range move it"
    assert float(ratio.grad.abs()) > 0


def test_an_empty_range_stays_finite() -> None:
    x = torch.zeros(2, 16, requires_grad=True)
    quantize_range(x, per_group(Int(4, "asymmetric"), 8)).sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())
