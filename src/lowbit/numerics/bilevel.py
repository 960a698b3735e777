"""Scales of two levels: the scale and zero of a unit in 3 bits each, on grids of fp16 numbers over 16 rows (SpQR).

A value is s (q - z). The scales of 16 consecutive rows' units in the same columns lie on one grid, s = d·c + e, their
zeros on another: four fp16 numbers for 16 x g weights, d and e of both. What rounding has to know is the *effective*
scale and offset s·z of a unit, and both codes are recovered from them exactly: no step is so small beside what it is
added to that fp32 could lose it.

The range of a unit includes 0, so a zero is never negative. Shape letters: R rows, G units of a row, B = R/16 bands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .bits import packed_length

BITS = 3
"""Bits of a unit's scale, and of its zero."""
ROWS = 16
"""Rows whose units share two grids."""

_LARGEST = (1 << BITS) - 1
_FP16 = 65504.0
_SMALLEST = 2.0**-24
"""fp16's smallest positive value."""
_FINEST = 2.0**-11
"""The smallest step, as a part of what it is added to."""


def stored(scale: Tensor, zero: Tensor, outer: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(scales, offsets, outer) as they can be stored for ideal scales and zeros [R, G]; units without range have 0s.

    `outer` [B, G, 4] are the steps and least values of scales and zeros, exact in fp16; None fixes them here.
    """
    if outer is None:
        outer = torch.cat([_grid(scale, scale > 0, _SMALLEST), _grid(zero, zero >= 0, 0.0)], -1)
    scales, offsets = effective(_nearest(scale, outer[..., :2]), _nearest(zero, outer[..., 2:]), outer)
    return scales, offsets, outer


def codes(scale: Tensor, offset: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of scales and zeros that were stored, both uint8 [R, G], from effective scales and offsets."""
    return _nearest(scale, outer[..., :2]), _nearest(offset / scale, outer[..., 2:])


def effective(scale: Tensor, zero: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets, fp32 [R, G], of their codes [R, G]."""
    step, least, zero_step, zero_least = _spread(outer, len(scale)).unbind(-1)
    scales = scale.float() * step + least
    return scales, scales * (zero.float() * zero_step + zero_least)


def scale_bytes(rows: int, units: int) -> int:
    """Bytes of all that is stored beside the codes of `rows` rows with `units` units each."""
    return 2 * packed_length(rows * units, BITS) + 2 * 4 * -(-rows // ROWS) * units


def _grid(x: Tensor, live: Tensor, floor: float) -> Tensor:
    """Step and least value [B, G, 2] of a grid over the `live` ones of x [R, G] in every band."""
    last = torch.arange(-(-len(x) // ROWS) * ROWS, device=x.device).clamp_max(len(x) - 1)  # the last band may be short
    bands, alive = (each[last].reshape(-1, ROWS, x.shape[-1]) for each in (x, live))
    low = torch.where(alive, bands, torch.inf).amin(1)
    low = torch.where(low.isfinite(), low, 1.0).clamp(floor, _FP16).half().float()
    step = (torch.where(alive, bands, 0.0).amax(1) - low) / _LARGEST
    step = step.maximum(_FINEST * low).clamp(floor or _FINEST, _FP16).half().float()
    return torch.stack([step, low], -1)


def _nearest(x: Tensor, grid: Tensor) -> Tensor:
    step, least = _spread(grid, len(x)).unbind(-1)
    return ((x - least) / step).round().clamp(0, _LARGEST).to(torch.uint8)


def _spread(outer: Tensor, rows: int) -> Tensor:
    """What bands have, for every row."""
    return outer.repeat_interleave(ROWS, 0)[:rows]
