"""Quantization that gradients pass through: what block-trained methods put in a forward pass.

Rounding has no useful derivative, so it is treated as the identity (the straight-through estimator); ranges, scales and
saturation keep their true derivatives. Values are those of `Grid.quantize` to the last bit, so that what was trained is
what is stored.

With y = x/s + V and levels l = round(y) clipped to [a - z, b - z], x̂ = s l has the gradients
∂V = s·inside, ∂x = inside, ∂s = l - inside·x/s, ∂z = -s·outside, inside saying where round(y) was not clipped. They are
written out in one autograd function: a tape of small operations would hold a dozen copies of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .grid import Grid, float_spacing, from_units, grid_from_range, to_levels, to_units, unit_range
from .spec import Float, Int, Spec


def straight_through(rounded: Tensor, x: Tensor) -> Tensor:
    """The value of `rounded`, exactly, with the gradient of x."""
    return rounded.detach() + (x - x.detach())


def quantize_on(x: Tensor, grid: Grid) -> Tensor:
    """Fake-quantize x [..., R, C] on a grid that is fixed; values beyond its range get no gradient."""
    return _quantize(x, grid.scale, grid.zero, grid.spec, None)


def quantize_range(x: Tensor, spec: Spec, low: Tensor | float = 1.0, high: Tensor | float = 1.0) -> Tensor:
    """Fake-quantize x [..., R, C] on the grid of `low` and `high` times every unit's range, trainable in all three.

    `low` and `high` broadcast against the units [..., R/r, C/c]. Symmetric formats cover the larger of both ends.
    """
    bottom, top = unit_range(x, spec.block)
    return quantize_between(x, bottom * low, top * high, spec)


def quantize_between(
    x: Tensor, low: Tensor, high: Tensor, spec: Spec, *, offset: Tensor | None = None, outer: Tensor | None = None
) -> Tensor:
    """Fake-quantize x [..., R, C] on the grid that covers [low, high] of every unit [..., R/r, C/c].

    `offset` [..., R, C], in steps of the grid there, is added before rounding (SignRound's V). Trainable in all.
    `outer` fixes the outer scale of formats that have one.
    """
    scale, zero = _grid(low, high, spec, outer)
    return _quantize(x, scale, zero, spec, offset)


def shifted(y: Tensor, offset: Tensor, spec: Spec) -> Tensor:
    """Scaled values y moved by `offset` steps of the format: minifloats lie the wider apart, the larger they are."""
    if isinstance(spec.number, Float):
        offset = offset * float_spacing(y, spec.number)
    return y + offset


def _grid(low: Tensor, high: Tensor, spec: Spec, outer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The scale and zero-point of a range, with their derivatives by it.

    The scale is proportional to the range's span, whatever the rule; the zero-point lies -low/s steps above the bottom.
    """
    grid = grid_from_range(low.detach(), high.detach(), spec, outer)
    asymmetric = isinstance(spec.number, Int) and not spec.number.symmetric
    if asymmetric and spec.number != Int(spec.bits, "asymmetric-raw"):
        low, high = low.clamp_max(0), high.clamp_min(0)
    span = high - low if asymmetric else torch.maximum(high.abs(), low.abs())
    reached = span.detach()
    scale = torch.where(reached > 0, grid.scale * (span / reached.clamp_min(torch.finfo(torch.float32).tiny)), 0.0)
    scale = straight_through(grid.scale, scale)
    zero = grid.zero
    if asymmetric and zero is not None:
        zero = straight_through(zero, -low / scale)
    return scale, zero


def _quantize(x: Tensor, scale: Tensor, zero: Tensor | None, spec: Spec, offset: Tensor | None) -> Tensor:
    units = to_units(x.float(), spec.block)
    spread = [None if part is None else part[..., :, None, :, None] for part in (scale, zero)]
    moved = None if offset is None else to_units(offset, spec.block)
    quantized: Tensor = _Quantize.apply(units, *spread, moved, spec)  # type: ignore[no-untyped-call]
    return from_units(quantized, x.shape)


class _Quantize(torch.autograd.Function):
    """x̂ = s l in units view, with the gradients of the module's docstring."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, spec: Spec) -> Tensor:
        y = x / scale
        moved = y if offset is None else shifted(y, offset, spec)
        levels = to_levels(moved, spec.number, zero)
        number = spec.number
        inside = moved.round() == levels if isinstance(number, Int) else moved.abs() <= number.largest
        ctx.save_for_backward(x, scale, levels, inside)
        ctx.spec, ctx.shape_of_zero = spec, None if zero is None else zero.shape
        return levels * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, levels, inside = ctx.saved_tensors
        by_x, by_scale, by_zero, by_offset = ctx.needs_input_grad[:4]
        through = gradient * inside
        grads: list[Tensor | None] = [through if by_x else None, None, None, None, None]
        if by_scale:
            grads[1] = (gradient * levels - through * (x / scale)).sum_to_size(scale.shape)
        if by_zero:
            grads[2] = ((through - gradient) * scale).sum_to_size(ctx.shape_of_zero)
        if by_offset:
            by_step = through * scale
            step = float_spacing(x / scale, ctx.spec.number) if isinstance(ctx.spec.number, Float) else 1.0
            grads[3] = by_step * step
        return tuple(grads)
