"""What a weight takes in lowbit's own files, told by its shape and format: plans are made of these numbers."""

from __future__ import annotations

import torch

from . import bilevel, kquant
from .bits import packed_length
from .grid import unit_shape
from .scales import scale_bytes
from .spec import Spec


def stored_bytes(shape: tuple[int, int], spec: Spec) -> int:
    """Bytes of codes, scales and zero-points of a weight [O, I] in lowbit's own files."""
    return shape[0] * packed_length(shape[1], spec.bits) + grid_bytes(shape, spec)


def grid_bytes(shape: tuple[int, int], spec: Spec) -> int:
    """Bytes of the scales and zero-points alone: what a weight [O, I] takes beside its codes, however few those are."""
    if spec.scale == "kquant":
        return kquant.scale_bytes(*shape, spec)
    r, c = unit_shape(torch.Size(shape), spec.block)
    rows, columns = -(-shape[0] // r), -(-shape[1] // c)
    if spec.scale == "bilevel":
        return bilevel.scale_bytes(rows, columns)
    rule = getattr(spec.number, "rule", "symmetric")
    zero = 2 * rows * columns if spec.minima else 0
    if rule == "symmetric-unsigned" or (rule.startswith("asymmetric") and not spec.minima):
        zero = 4 * rows * columns if rule == "asymmetric-deepspeed" else packed_length(rows * columns, spec.bits)
    return scale_bytes(rows, columns, spec.scale) + zero
