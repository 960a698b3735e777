"""Passes over a large tensor that fake quantization is made of, where a unit is a run of one row's columns.

What a rule makes of a unit's range is arithmetic on one number per unit and stays in plain torch. What is left are
three passes over all values: to find the ranges, to round, and to pass gradients. The functions here are their
definition; on a GPU, for integer formats, each is one kernel (`kernels.py`) that reads every value once.

Units are [..., c]; what there is one of per unit is [...].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .grid import to_levels
from .spec import Int, Number

WIDEST = 16384
"""Values of a unit that a kernel holds at once."""

Ends = tuple[Tensor, Tensor]
"""Smallest and largest value of every unit, or what is made of them."""


class Gradients(NamedTuple):
    """What one pass over a unit's values finds out, for x̂ = s l and levels l = round(x/s) kept in their range."""

    by_value: Tensor
    """The gradient that passes rounding and clamping, [..., c]."""
    by_scale: Tensor
    by_zero: Tensor | None
    below: Tensor
    """The gradient of all values below the lower end, which stand for that end."""
    above: Tensor


def extremes(units: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(smallest, largest, place of one smallest, place of one largest) of every unit, fp32 and int64."""
    if _fused(units, None):
        from .kernels import extremes as fused

        return fused(units)
    bottom, at_bottom = units.min(-1)
    top, at_top = units.max(-1)
    return bottom.float(), top.float(), at_bottom, at_top


def rounded(
    units: Tensor, scale: Tensor, zero: Tensor | None, number: Number, ends: Ends | None, dtype: torch.dtype
) -> Tensor:
    """What the nearest levels of x/s stand for, values moved into [low, high] first where `ends` are given."""
    if _fused(units, number):
        from .kernels import rounded as fused

        assert isinstance(number, Int)
        return fused(units, scale, zero, number, ends, dtype)
    y = _steps(units, scale, ends)
    return to_levels(y, number, None if zero is None else zero[..., None]).mul_(scale[..., None]).to(dtype)


def gradients(
    gradient: Tensor, units: Tensor, scale: Tensor, zero: Tensor | None, number: Number, ends: Ends | None
) -> Gradients:
    """The derivatives of `rounded`, rounding taken for the identity (the straight-through estimator)."""
    if _fused(units, number):
        from .kernels import gradients as fused

        assert isinstance(number, Int)
        return Gradients(*fused(gradient, units, scale, zero, number, ends))
    values, gradient = units.float(), gradient.float()
    y = _steps(units, scale, ends)
    levels = to_levels(y, number, None if zero is None else zero[..., None])
    inside = y.round() == levels if isinstance(number, Int) else y.abs() <= number.largest
    through = gradient * inside
    by_scale = (gradient * levels).sum(-1) - (through * y).sum(-1)
    by_zero = None if zero is None else (through - gradient).sum(-1) * scale
    below = above = torch.zeros_like(scale)
    if ends is not None:
        lower, upper = values < ends[0][..., None], values > ends[1][..., None]
        below, above = (through * lower).sum(-1), (through * upper).sum(-1)
        through = through.masked_fill_(lower.logical_or_(upper), 0)
    return Gradients(through.to(units.dtype), by_scale, by_zero, below, above)


def _steps(units: Tensor, scale: Tensor, ends: Ends | None) -> Tensor:
    """x/s in fp32."""
    if ends is None:
        return units.float() / scale[..., None]
    return units.float().clamp(ends[0][..., None], ends[1][..., None]).div_(scale[..., None])


def _fused(units: Tensor, number: Number | None) -> bool:
    """Whether a kernel takes these units; integers only, and no unit wider than it can hold."""
    return units.is_cuda and units.shape[-1] <= WIDEST and (number is None or isinstance(number, Int))
