"""GPTQ beside whole columns that keep 16 bits (QUIK, OWQ): what rounding does to the others, those make up for.

The columns that stay come last in the sweep, where no error of their own is left to repair, so that they end as the
best that they can be beside the others' codes. They take no part in any range: a zero stands in their place when ranges
are fitted, which every grid has. With U split behind the rounded columns, their errors E come to e = E U_rr⁻¹ of the
sweep's, and the columns that stay become W_s - e U_rs.

Shape letters: O rows, I columns, r rounded, s that stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.bits import packed_length
from ..numerics.feedback import inverse_factor, sweep
from ..numerics.grid import unit_shape
from ..numerics.places import Regions, Sparse, sparse_bytes
from ..numerics.qtensor import QTensor, QWeight
from ..numerics.sizes import grid_bytes
from ..numerics.spec import Spec
from .base import Clip
from .gptq import GPTQ, Columns
from .views import Stats


def round_beside(
    weight: Tensor, stays: Tensor, spec: Spec, gptq: GPTQ, clip: Clip, stats: Stats, *, scores: bool
) -> QWeight:
    """W [O, I] with codes for the columns that are not in `stays`, bool [I], and fp16 for those that are."""
    if not bool(stays.any()):
        return QWeight((gptq.round(weight, spec, clip, stats, scores=scores),))
    h = stats.hessian()
    weight = weight.masked_fill((h.diagonal() <= 0) & ~stays, 0.0)
    rounded = (~stays).nonzero().flatten()
    if gptq.act_order:
        rounded = rounded[h.diagonal()[rounded].argsort(descending=True, stable=True)]
    order, count = torch.cat([rounded, stays.nonzero().flatten()]), len(rounded)
    factor = inverse_factor(h, gptq.damp, order)
    grid = clip.fit(weight.masked_fill(stays, 0.0), spec, stats, scores=scores)
    column = Columns(grid, weight.shape, (order // unit_shape(weight.shape, grid.spec.block)[1]).tolist())
    own, across = factor[:count, :count], factor[:count, count:]
    start = weight[:, rounded]
    values = sweep(start, own, column.round, block=gptq.block, round_tile=column.round_tile)
    spread = torch.linalg.solve_triangular(own, start - values, upper=True, left=False) @ across
    weight[:, stays] -= spread
    column.levels[count:] = 0.0
    codes = column.codes(order).masked_fill_(stays, 0)
    mask = stays.expand(weight.shape)
    sparse = Sparse.of(weight, mask.contiguous(), "columns")
    return QWeight((QTensor(codes, grid, region=0),), regions=Regions(mask.to(torch.uint8), 2), sparse=sparse)


def bytes_beside(shape: tuple[int, int], columns: int, spec: Spec) -> int:
    """Bytes of a weight [O, I] of which so many columns stay."""
    rows, total = shape
    if columns == 0:
        return rows * packed_length(total, spec.bits) + grid_bytes(shape, spec)
    codes = packed_length(rows * (total - columns), spec.bits) + grid_bytes(shape, spec)
    return codes + total + sparse_bytes(shape, rows * columns, "columns")  # a byte says where a column belongs


def bits_beside(shape: tuple[int, int], columns: int, spec: Spec) -> float:
    """Bits per weight as papers count them: of the codes, and 16 of the entries that stay; scales are left out."""
    return spec.bits + (16 - spec.bits) * columns / shape[1]
