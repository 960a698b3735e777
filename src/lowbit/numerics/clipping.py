"""Fake quantization with learnable thresholds in as few passes over memory as a trained range allows.

FlatQuant quantizes every weight of a block in every step and every input in every micro-batch, which makes elementwise
passes over weights, not products, what a step waits for. `quantize_clipped` therefore keeps nothing but its input
and computes the rest again when gradients arrive; written as a chain of differentiable operations (`ste.py`) it would
read and write some thirty tensors of the weight's size. Values and gradients are those of that chain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import fused
from .grid import from_units, to_units, unit_range
from .spec import Spec
from .ste import _grid, quantize_between


def quantize_clipped(
    x: Tensor, spec: Spec, low: Tensor, high: Tensor, *, clamp: bool = False, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fake-quantize x [R, C] on the grid of `low` and `high` times every unit's range, trainable in all three.

    `low` and `high` broadcast against the units [R/r, C/c]. With `clamp`, ranges include zero and what lies beyond them
    is moved to their ends first; a symmetric grid alone reaches as far on its shorter side as on its longer.
    """
    if spec.block[0] == 1:
        quantized: Tensor = _Clipped.apply(x, low, high, spec, clamp, dtype)  # type: ignore[no-untyped-call]
        return quantized
    ends = clipped_range(x, spec, low, high) if clamp else _scaled(*unit_range(x, spec.block), low, high)
    return quantize_between(clamped(x, spec, *ends) if clamp else x, *ends, spec).to(dtype)


def clipped_range(x: Tensor, spec: Spec, low: Tensor | float, high: Tensor | float) -> tuple[Tensor, Tensor]:
    """`low` and `high` times both ends of every unit's range with zero in it, [R/r, C/c]."""
    bottom, top = unit_range(x, spec.block)
    return bottom.clamp_max(0) * low, top.clamp_min(0) * high


def clamped(x: Tensor, spec: Spec, low: Tensor, high: Tensor) -> Tensor:
    """Values x [R, C] moved into [low, high] of their units [R/r, C/c]; trainable in all."""
    units = to_units(x, spec.block)
    return from_units(torch.clamp(units, low[..., :, None, :, None], high[..., :, None, :, None]), x.shape)


def _scaled(bottom: Tensor, top: Tensor, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    return bottom * low, top * high


class _Clipped(torch.autograd.Function):
    """`quantize_clipped` where a unit lies in one row: units [R, G, c] of groups of c."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Tensor, high: Tensor, spec: Spec, clamp: bool, dtype: torch.dtype) -> Tensor:
        units = to_units(x, spec.block).squeeze(-3)
        bottom, top, at_bottom, at_top = fused.extremes(units)
        if clamp:
            bottom, top = bottom.clamp_max(0), top.clamp_min(0)
        ends = _scaled(bottom, top, low, high)
        scale, zero = _grid(*ends, spec, None)
        ctx.save_for_backward(x, low, high, bottom, top, at_bottom, at_top, scale, zero)
        ctx.spec, ctx.clamp = spec, clamp
        return fused.rounded(units, scale, zero, spec.number, ends if clamp else None, dtype).reshape(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, low, high, bottom, top, at_bottom, at_top, scale, zero = ctx.saved_tensors
        units = to_units(x, ctx.spec.block).squeeze(-3)
        ends = [part.detach().requires_grad_() for part in _scaled(bottom, top, low, high)]
        limits = (ends[0].detach(), ends[1].detach()) if ctx.clamp else None
        found = fused.gradients(gradient.reshape(units.shape), units, scale, zero, ctx.spec.number, limits)
        with torch.enable_grad():
            grid = [part for part in _grid(ends[0], ends[1], ctx.spec, None) if part is not None]
        by_grid = [part for part in (found.by_scale, found.by_zero) if part is not None]
        pairs = [(part, grad) for part, grad in zip(grid, by_grid, strict=True) if part.requires_grad]
        by_low, by_high = torch.autograd.grad([p for p, _ in pairs], ends, [g for _, g in pairs], allow_unused=True)
        by_low = found.below if by_low is None else by_low + found.below
        by_high = found.above if by_high is None else by_high + found.above
        if ctx.needs_input_grad[0]:
            by_bottom, by_top = by_low * low, by_high * high
            if ctx.clamp:
                by_bottom, by_top = by_bottom * (bottom < 0), by_top * (top > 0)
            found.by_value.scatter_add_(-1, at_bottom[..., None], by_bottom[..., None].to(x.dtype))
            found.by_value.scatter_add_(-1, at_top[..., None], by_top[..., None].to(x.dtype))
        return (
            found.by_value.reshape(x.shape) if ctx.needs_input_grad[0] else None,
            (by_low * bottom).sum_to_size(low.shape) if ctx.needs_input_grad[1] else None,
            (by_high * top).sum_to_size(high.shape) if ctx.needs_input_grad[2] else None,
            *(None, None, None),
        )
