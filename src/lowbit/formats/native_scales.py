"""Scales, least values and what they are relative to, as lowbit's own files hold them, format by format.

Every effective scale is made again exactly of what is stored: `unpack_scales` is the inverse of `pack_scales`, on the
meta device too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..numerics import bilevel, bits, kquant
from ..numerics.grid import Grid
from ..numerics.scales import scale_codes, scale_values
from ..numerics.spec import Spec


def pack_scales(grid: Grid) -> dict[str, Tensor]:
    """Scales, what they are relative to, and least values, as the spec stores them."""
    spec, outer = grid.spec, grid.outer
    if spec.scale == "kquant":
        assert outer is not None
        width = kquant.layout(spec).bits
        tensors = {
            "scale": bits.pack(kquant.to_scale_codes(grid.scale, outer, spec), width),
            "outer": outer.half(),
        }
        if grid.offset is not None:
            tensors["offset"] = bits.pack(kquant.to_offset_codes(grid.offset, outer, spec), width)
        return tensors
    if spec.scale == "bilevel":
        assert outer is not None and grid.offset is not None
        scale, zero = bilevel.codes(grid.scale, grid.offset, outer)
        packed = (bits.pack(each.flatten(), bilevel.BITS) for each in (scale, zero))
        return dict(zip(("scale", "offset", "outer"), (*packed, outer.half()), strict=True))
    tensors = {"scale": scale_codes(grid.scale, spec.scale, outer)}
    if outer is not None:
        tensors["outer"] = outer
    if grid.offset is not None:
        tensors["offset"] = grid.offset.half()
    return tensors


def unpack_scales(
    spec: Spec, shape: torch.Size, held: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The inverse of `pack_scales` for a weight of `shape`: (scale, offset, outer)."""
    scale, offset, outer = held["scale"], held.get("offset"), held.get("outer")
    if spec.scale == "bilevel":
        assert outer is not None and offset is not None
        shape = torch.Size((shape[0], outer.shape[1]))
        c, z = (bits.unpack(each, bilevel.BITS, shape.numel(), signed=False).view(shape) for each in (scale, offset))
        return *bilevel.effective(c, z, outer.float()), outer.float()
    if spec.scale != "kquant":
        return scale_values(scale, spec.scale, outer), None if offset is None else offset.float(), outer
    assert outer is not None
    form, outer = kquant.layout(spec), outer.float()
    units = shape[-1] // form.width
    scale = bits.unpack(scale, form.bits, units, signed=not form.minima)
    if offset is not None:
        offset = kquant.effective(bits.unpack(offset, form.bits, units, signed=False), outer[..., 1])
    return kquant.effective(scale, outer[..., 0]), offset, outer
