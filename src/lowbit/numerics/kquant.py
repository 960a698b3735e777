"""The K-quants' grid: scales and least values of a unit as small integers times two fp16 numbers of its super-block.

A value is d·c·q - e·m: q the code, c and m the unit's integers of 4 to 8 bits, d and e fp16 numbers of 256 columns.
Products of these are exact in fp32, so the *effective* scale d·c and least value -e·m of a unit are all that rounding
has to know, and c and m are recovered from them exactly. Rounding thus sees ordinary units with odd scales, and any
method that rounds onto a grid rounds onto this one.

An integer c = 0 is never made: 1 gives the same values and more. Shape letters: R rows, S super-blocks of a row, U
units of a super-block, w columns of a unit, C = S·U·w.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .bits import packed_length
from .spec import SUPER, Int, Spec

_LARGEST = 65504.0
_SMALLEST = 2.0**-24


@dataclass(frozen=True)
class Layout:
    """How one K-quant holds its units: `width` columns each, integers of `bits` bits, with least values or without."""

    width: int
    bits: int
    minima: bool

    @property
    def units(self) -> int:
        """Units of a super-block."""
        return SUPER // self.width

    @property
    def largest(self) -> int:
        """The largest integer; those of formats without least values are signed."""
        return (1 << (self.bits - (not self.minima))) - 1


LAYOUTS = {2: Layout(16, 4, True), 3: Layout(16, 6, False), 4: Layout(32, 6, True), 5: Layout(32, 6, True)}
LAYOUTS[6] = Layout(16, 8, False)


def layout(spec: Spec) -> Layout:
    """The layout of a K-quant's format."""
    assert spec.scale == "kquant" and isinstance(spec.number, Int)
    return LAYOUTS[spec.bits]


def check_columns(columns: int) -> None:
    """Raises ValueError where rows are no whole super-blocks."""
    if columns % SUPER:
        raise ValueError(
            f"K-quants are super-blocks of {SUPER} columns, no divisor of {columns}: choose for instance w4a16-g32"
        )


def outer_of(scale: Tensor, offset: Tensor | None, spec: Spec) -> Tensor:
    """(d, e) that let the largest ideal scale and offset of every super-block be stored, fp32 [R, S, 1 or 2].

    `scale` and `offset` are [R, S·U]; values are s q - offset.
    """
    form = layout(spec)
    grouped = by_super(scale, form.units).abs().amax(-1) / form.largest
    d = store_outer(torch.where(grouped > 0, grouped, 1.0)).clamp_min(_SMALLEST)
    if offset is None:
        return d[..., None]
    e = by_super(offset, form.units).amax(-1) / form.largest
    return torch.stack([d, store_outer(e)], -1)


def by_super(x: Tensor, units: int) -> Tensor:
    """What the units of rows have [R, S·U] as [R, S, U]."""
    return x.reshape(*x.shape[:-1], x.shape[-1] // units, units)


def store_outer(x: Tensor) -> Tensor:
    """Round to fp16, the result in fp32."""
    return x.clamp(-_LARGEST, _LARGEST).half().float()


def integers(x: Tensor, outer: Tensor) -> Tensor:
    """x [R, S·U] in steps of `outer` [R, S], unrounded; zero where that is zero."""
    wide = outer.repeat_interleave(x.shape[-1] // outer.shape[-1], -1)
    return torch.where(wide == 0, 0.0, x / wide)


def to_scale_codes(scale: Tensor, outer: Tensor, spec: Spec) -> Tensor:
    """The integers c of scales [R, S·U]: int8 where signed, else uint8. Exact for scales that were stored."""
    form = layout(spec)
    c = integers(scale, outer[..., 0]).round()
    if form.minima:
        return c.clamp(0, form.largest).to(torch.uint8)
    return c.clamp(-form.largest - 1, form.largest).to(torch.int8)


def to_offset_codes(offset: Tensor, outer: Tensor, spec: Spec) -> Tensor:
    """The integers m of offsets [R, S·U], uint8."""
    return integers(offset, outer[..., 1]).round().clamp(0, layout(spec).largest).to(torch.uint8)


def effective(codes: Tensor, outer: Tensor) -> Tensor:
    """Integers [R, S·U] times their super-block's number [R, S], exact in fp32."""
    return codes.float() * outer.repeat_interleave(codes.shape[-1] // outer.shape[-1], -1)


def stored(
    scale: Tensor, offset: Tensor | None, spec: Spec, outer: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(scales, offsets, outer) as they can be stored for ideal ones [R, S·U]; `outer` None fixes it here."""
    check_columns(scale.shape[-1] * layout(spec).width)
    outer = outer_of(scale, offset, spec) if outer is None else outer
    c = to_scale_codes(scale, outer, spec).float()
    scale = effective(torch.where(c == 0, 1.0, c), outer[..., 0])
    if offset is not None:
        offset = effective(to_offset_codes(offset, outer, spec), outer[..., 1])
    return scale, offset, outer


def scale_bytes(rows: int, columns: int, spec: Spec) -> int:
    """Bytes of all that is stored beside the codes of a weight [rows, columns]."""
    form = layout(spec)
    of_units = packed_length(form.units, form.bits)
    return rows * (columns // SUPER) * (2 + of_units) * (1 + form.minima)
