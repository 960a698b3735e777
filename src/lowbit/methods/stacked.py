"""Many weights of one shape, each behind inputs of its own, rounded by one column sweep: a mixture's experts.

An expert's weight has too few rows to fill a GPU, and a sweep over it is some hundred launches, each behind the other.
Rows of different experts know nothing of each other, so a stack of experts goes through the sweep together, column by
column, and each brings its own factor, order of columns and grid. What is done to every weight is what `gptq.Columns`
does to one.

A stack is as many experts as memory allows, and who calls decides that (`stream/rounding.py`). In fp32, beside the
weight as the model has it and its Gram matrix, an expert takes one [O, I] for that weight in fp32, and while its factor
is made three [I, I], of which one stays. Then the weight once more with its dead columns at zero, and either five more
[O, I] for the ranges that are searched, or three for the sweep: the columns as they are taken, as they are worked on,
and their levels. Codes, a byte each, come out one expert after the other.

Shape letters: E weights, O output rows, I input columns, G groups, T columns of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics.feedback import sweep
from ..numerics.grid import Grid, to_codes, to_levels, unit_shape
from ..numerics.qtensor import QTensor
from ..numerics.spec import Int, Spec
from .base import Clip, StackingClip
from .views import Stats


def fitted(clip: Clip, weights: Sequence[Tensor], spec: Spec, stats: Sequence[Stats], *, scores: bool) -> list[Grid]:
    """The clip's grid of every W [O, I], of as many at once as it takes."""
    if isinstance(clip, StackingClip):
        return clip.fit_stack(weights, spec, stats, scores=scores)
    return [clip.fit(weight, spec, seen, scores=scores) for weight, seen in zip(weights, stats, strict=True)]


def put_limits(limits: Tensor, number: Int, zero: Tensor | None, reach: Tensor | None) -> None:
    """Fill `limits` [..., 2, O] with the least and the largest level of units that have `zero` and `reach` [..., O]."""
    for place, end in enumerate((number.low, number.high)):
        limits[..., place, :] = end if zero is None else end - zero
    if reach is not None:
        limits.clamp_(-reach[..., None, :], reach[..., None, :])


def sweep_stack(
    weights: Sequence[Tensor], grids: Sequence[Grid], factors: Tensor, orders: Sequence[Tensor], block: int
) -> list[QTensor]:
    """Codes of every W [O, I] on its grid; its columns go in its order [I], in which its factor [I, I] is."""
    columns = _Columns(grids, weights[0].shape, orders)
    turned = torch.stack([weight.T[order] for weight, order in zip(weights, orders, strict=True)])
    sweep(turned.mT, factors, columns.round, block=block, round_tile=columns.round_tile)
    return [QTensor(columns.codes(entry, order), grids[entry]) for entry, order in enumerate(orders)]


class _Columns:
    """Rounds the columns of a stack, each with the scale of its group, and remembers the levels."""

    def __init__(self, grids: Sequence[Grid], shape: torch.Size, orders: Sequence[Tensor]) -> None:
        rows, width = unit_shape(shape, grids[0].spec.block)

        def spread(parts: Sequence[Tensor | None]) -> Tensor | None:
            """[O/r, G] of every weight as one tensor [E, G, O]."""
            known = [part.repeat_interleave(rows, 0)[: shape[0]].T for part in parts if part is not None]
            return torch.stack(known) if known else None

        scale = spread([grid.scale for grid in grids])
        assert scale is not None
        self.number, self.scale = grids[0].spec.number, scale
        self.zero, self.offset, reach = (
            spread([getattr(grid, name) for grid in grids]) for name in ("zero", "offset", "reach")
        )
        self.group = torch.stack([order // width for order in orders]).int()
        self.levels = scale.new_empty(len(grids), shape[1], shape[0])
        self.limits = scale.new_empty(*scale.shape[:2], 2, shape[0])
        if isinstance(self.number, Int):
            put_limits(self.limits, self.number, self.zero, reach)
        self._entries = torch.arange(len(grids), device=scale.device)

    def round_tile(self, first: int, columns: Tensor, errors: Tensor, shares: Tensor) -> None:
        """Round columns [E, T, O] in place, corrected by the tile's earlier errors, and leave their own in `errors`."""
        here = slice(first, first + columns.shape[1])
        if columns.is_cuda and isinstance(self.number, Int):
            from ..numerics.feedback_kernel import round_tile

            group, levels = self.group[:, here], self.levels[:, here]
            round_tile(columns, errors, shares, group, self.scale, self.limits, self.offset, levels)
            return
        for i in range(columns.shape[1]):
            column = columns[:, i] - (shares[:, i : i + 1, :i] @ errors[:, :i])[:, 0]
            rounded = self.round(first + i, column)
            torch.sub(column, rounded, out=errors[:, i])
            columns[:, i] = rounded

    def round(self, column: int, values: Tensor) -> Tensor:
        """Nearest levels of the column's values [E, O]; returns what they stand for."""
        place = (self._entries, self.group[:, column])
        scale = self.scale[place]
        offset = None if self.offset is None else self.offset[place]
        y = (values if offset is None else values + offset) / scale
        if isinstance(self.number, Int):
            low, high = self.limits[place].unbind(1)
            levels = y.round_().clamp_(low, high)
        else:
            levels = to_levels(y, self.number)
        self.levels[:, column] = levels
        return levels * scale if offset is None else levels * scale - offset

    def codes(self, entry: int, order: Tensor) -> Tensor:
        """Codes [O, I] of one weight, in natural order."""
        zero = None if self.zero is None else self.zero[entry][self.group[entry]]
        codes = to_codes(self.levels[entry], self.number, zero)
        natural = torch.empty_like(codes)
        natural[order] = codes
        return natural.T.contiguous()
