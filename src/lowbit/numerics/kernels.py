"""Triton kernels of `fused.py`, whose functions are their definition.

A program takes some whole units, so that each value is read once and a sum over a unit never leaves the program.
Divisions are correctly rounded and ties go to even, as in torch: forward values are the same to the last bit.

Shape letters: U units, C columns of a unit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .spec import Int

_VALUES = 4096
"""Values of a program where units are shorter than that."""
_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: added and taken away again it rounds |y| < 2^22 to the nearest integer, ties to even."""


@triton.jit
def _extremes(x_at, low_at, high_at, low_place_at, high_place_at, units, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    there = (unit < units)[:, None] & (column < C)[None, :]
    place = unit.to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
    low, low_place = tl.min(tl.where(there, x, float("inf")), 1, return_indices=True)
    high, high_place = tl.max(tl.where(there, x, float("-inf")), 1, return_indices=True)
    mask = unit < units
    tl.store(low_at + unit, low, mask=mask)
    tl.store(high_at + unit, high, mask=mask)
    tl.store(low_place_at + unit, low_place.to(tl.int64), mask=mask)
    tl.store(high_place_at + unit, high_place.to(tl.int64), mask=mask)


@triton.jit
def _levels(x, scale, zero, low, high, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, CLAMP: tl.constexpr):
    """(x/s, its nearest integer one step beyond the levels at most, that kept among the levels)."""
    if CLAMP:
        x = tl.minimum(tl.maximum(x, low), high)
    y = tl.div_rn(x, scale + tl.zeros_like(x))
    bottom, top = LOWEST - zero, HIGHEST - zero
    nearest = (tl.minimum(tl.maximum(y, bottom - 1), top + 1) + _ROUND) - _ROUND
    return y, nearest, tl.minimum(tl.maximum(nearest, bottom), top)


@triton.jit
def _rounded(
    x_at, scale_at, zero_at, low_at, high_at, out_at, units, C,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, ZERO: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = unit < units
    there = mask[:, None] & (column < C)[None, :]
    place = unit.to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(scale_at + unit, mask=mask, other=1.0)[:, None]
    zero = tl.load(zero_at + unit, mask=mask, other=0.0)[:, None] if ZERO else tl.zeros_like(scale)
    low = tl.load(low_at + unit, mask=mask, other=0.0)[:, None] if CLAMP else scale
    high = tl.load(high_at + unit, mask=mask, other=0.0)[:, None] if CLAMP else scale
    _, _, levels = _levels(x, scale, zero, low, high, LOWEST, HIGHEST, CLAMP)
    tl.store(out_at + place, (levels * scale).to(out_at.dtype.element_ty), mask=there)


@triton.jit
def _gradients(
    g_at, x_at, scale_at, zero_at, low_at, high_at, out_at, by_scale_at, by_zero_at, below_at, above_at, units, C,
    LOWEST: tl.constexpr, HIGHEST: tl.constexpr, ZERO: tl.constexpr, CLAMP: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = unit < units
    there = mask[:, None] & (column < C)[None, :]
    place = unit.to(tl.int64)[:, None] * C + column[None, :]
    x = tl.load(x_at + place, mask=there, other=0.0).to(tl.float32)
    gradient = tl.load(g_at + place, mask=there, other=0.0).to(tl.float32)
    scale = tl.load(scale_at + unit, mask=mask, other=1.0)[:, None]
    zero = tl.load(zero_at + unit, mask=mask, other=0.0)[:, None] if ZERO else tl.zeros_like(scale)
    low = tl.load(low_at + unit, mask=mask, other=0.0)[:, None] if CLAMP else scale
    high = tl.load(high_at + unit, mask=mask, other=0.0)[:, None] if CLAMP else scale
    y, nearest, levels = _levels(x, scale, zero, low, high, LOWEST, HIGHEST, CLAMP)
    through = tl.where(nearest == levels, gradient, 0.0)
    tl.store(by_scale_at + unit, tl.sum(gradient * levels - through * y, 1), mask=mask)
    if ZERO:
        tl.store(by_zero_at + unit, tl.sum((through - gradient) * scale, 1), mask=mask)
    if CLAMP:
        tl.store(below_at + unit, tl.sum(tl.where(x < low, through, 0.0), 1), mask=mask)
        tl.store(above_at + unit, tl.sum(tl.where(x > high, through, 0.0), 1), mask=mask)
        through = tl.where((x < low) | (x > high), 0.0, through)
    tl.store(out_at + place, through.to(out_at.dtype.element_ty), mask=there)


def extremes(units: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See `fused.extremes`."""
    units = units.contiguous()
    shape = units.shape[:-1]
    low, high = (torch.empty(shape, device=units.device) for _ in range(2))
    places = [torch.empty(shape, device=units.device, dtype=torch.int64) for _ in range(2)]
    count, launch = _launch(units)
    _extremes[launch.pop("grid")](units, low, high, *places, count, units.shape[-1], **launch)
    return low, high, places[0], places[1]


def rounded(
    units: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    number: Int,
    ends: tuple[Tensor, Tensor] | None,
    dtype: torch.dtype,
) -> Tensor:
    """See `fused.rounded`."""
    units = units.contiguous()
    out = torch.empty(units.shape, device=units.device, dtype=dtype)
    count, launch = _launch(units)
    _rounded[launch.pop("grid")](
        units,
        *_per_unit(units, scale, zero, ends),
        out,
        count,
        units.shape[-1],
        **_format(number, zero, ends),
        **launch,
    )
    return out


def gradients(
    gradient: Tensor,
    units: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    number: Int,
    ends: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """See `fused.gradients`."""
    gradient, units = gradient.contiguous(), units.contiguous()
    out = torch.empty_like(units)
    by_scale, by_zero, below, above = torch.zeros(4, *units.shape[:-1], device=units.device).unbind()
    count, launch = _launch(units)
    _gradients[launch.pop("grid")](
        gradient, units, *_per_unit(units, scale, zero, ends), out, by_scale, by_zero, below, above, count,
        units.shape[-1], **_format(number, zero, ends), **launch,
    )  # fmt: skip
    return out, by_scale, None if zero is None else by_zero, below, above


def _per_unit(
    units: Tensor, scale: Tensor, zero: Tensor | None, ends: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, ...]:
    """Scale, zero-point and ends of every unit, fp32; the scale stands for what is not there and not looked at."""
    given = (scale, scale if zero is None else zero, *((scale, scale) if ends is None else ends))
    return tuple(part.float().expand(units.shape[:-1]).contiguous() for part in given)


def _format(number: Int, zero: Tensor | None, ends: tuple[Tensor, Tensor] | None) -> dict[str, Any]:
    return {"LOWEST": number.low, "HIGHEST": number.high, "ZERO": zero is not None, "CLAMP": ends is not None}


def _launch(units: Tensor) -> tuple[int, dict[str, Any]]:
    """Number of units, and how many of them a program takes."""
    width = units.shape[-1]
    count, columns = units.numel() // width, triton.next_power_of_2(width)
    rows = max(1, _VALUES // columns)
    warps = min(16, max(4, rows * columns // 1024))
    return count, {"grid": (triton.cdiv(count, rows),), "ROWS": rows, "COLUMNS": columns, "num_warps": warps}
