"""The Triton kernel behind `feedback.sweep`: a tile of columns rounded one after the other in one launch.

Column by column a sweep is tens of thousands of tiny operations, and a GPU spends it waiting for their launches. Rows
of the weight know nothing of each other, so a program keeps some rows' tile in registers and goes through its columns
by itself. `feedback._round_tile` with a column rounded in plain torch is the definition; sums are added in another
order, so a value may differ in its last bits. Of a stack of weights every entry has programs of its own.

Shape letters: O rows of the weight, T columns of the tile, G groups, E entries of a stack.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: added and taken away again it rounds |y| < 2^22 to the nearest integer, ties to even."""
_ROWS = 32
"""Rows of a program: one per thread of a warp, so that picking out a column needs few of them to talk."""


@triton.jit
def _tile(
    columns_at, errors_at, shares_at, group_at, scale_at, limits_at, offset_at, levels_at, rows, count, row_of_shares,
    columns_apart, errors_apart, shares_apart, group_apart, scale_apart, levels_apart,
    OFFSET: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    entry = tl.program_id(1).to(tl.int64)
    columns_at += entry * columns_apart
    errors_at += entry * errors_apart
    shares_at += entry * shares_apart
    group_at += entry * group_apart
    scale_at += entry * scale_apart
    limits_at += entry * 2 * scale_apart
    offset_at += entry * scale_apart
    levels_at += entry * levels_apart
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    here = row < rows
    there = (column < count)[:, None] & here[None, :]
    values = tl.load(columns_at + column[:, None] * rows + row[None, :], mask=there, other=0.0)
    for step in range(count):
        x = tl.sum(tl.where((column == step)[:, None], values, 0.0), 0)
        group = tl.load(group_at + step)
        scale = tl.load(scale_at + group * rows + row, mask=here, other=1.0)
        low = tl.load(limits_at + 2 * group * rows + row, mask=here, other=0.0)
        high = tl.load(limits_at + (2 * group + 1) * rows + row, mask=here, other=0.0)
        offset = tl.load(offset_at + group * rows + row, mask=here, other=0.0) if OFFSET else tl.zeros_like(scale)
        y = tl.div_rn(x + offset, scale)
        nearest = (tl.minimum(tl.maximum(y, low - 1), high + 1) + _ROUND) - _ROUND
        level = tl.minimum(tl.maximum(nearest, low), high)
        rounded = level * scale - offset
        error = x - rounded
        tl.store(levels_at + step * rows + row, level, mask=here)
        tl.store(columns_at + step * rows + row, rounded, mask=here)
        tl.store(errors_at + step * rows + row, error, mask=here)
        share = tl.load(shares_at + column * row_of_shares + step, mask=column < count, other=0.0)
        values -= share[:, None] * error[None, :]


def round_tile(
    columns: Tensor,
    errors: Tensor,
    shares: Tensor,
    group: Tensor,
    scale: Tensor,
    limits: Tensor,
    offset: Tensor | None,
    levels: Tensor,
) -> None:
    """Round columns [T, O] in place to integers between `limits` [G, 2, O] times `scale` [G, O], less `offset` [G, O].

    Column j takes `shares` [j, i] of every earlier column i's error, `group` [T] int32 is a column's group. Leaves the
    errors and the levels, both [T, O]. All else is fp32, and contiguous but for `shares`; of a stack, where all have E
    in front, every entry is.
    """
    if columns.dim() == 2:
        columns, errors, shares, group = (x[None] for x in (columns, errors, shares, group))
        scale, limits, levels = (x[None] for x in (scale, limits, levels))
    entries, count, rows = columns.shape
    _tile[(triton.cdiv(rows, _ROWS), entries)](
        columns, errors, shares, group, scale, limits, scale if offset is None else offset, levels, rows, count,
        shares.stride(1), columns.stride(0), errors.stride(0), shares.stride(0), group.stride(0), scale.stride(0),
        levels.stride(0), OFFSET=offset is not None, COLUMNS=triton.next_power_of_2(count), ROWS=_ROWS, num_warps=1,
    )  # fmt: skip
