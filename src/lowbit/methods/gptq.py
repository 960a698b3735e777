"""GPTQ (Frantar et al. 2022): round columns one by one and let the columns to come repair each error.

Minimises ‖X(W - Ŵ)ᵀ‖² row by row with H = Σ x xᵀ: column i is rounded, its error divided by U_ii is spread over the
columns behind it along U's row, U the upper Cholesky factor of H⁻¹. The sweep itself is `numerics.feedback`; this file
decides in which order columns go and when the scales of a group are fitted. A scale search inside GPTQ is any clip of
the recipe: it is called wherever scales are fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.feedback import RoundTile, sweep
from ..numerics.grid import Grid, fit_range, to_codes, to_levels, unit_shape
from ..numerics.qtensor import QTensor
from ..numerics.scales import relative_scale
from ..numerics.spec import Int, Spec
from ..numerics.stats import Gram
from .base import Clip
from .rtn import RTN
from .stacked import fitted, put_limits, sweep_stack
from .views import Need, Stats, factored

Fit = Callable[[Tensor, Spec, Stats], Grid]
"""(values [O, g], format of one group, statistics of those columns) -> their grid."""


@dataclass(frozen=True)
class GPTQ:
    """Settings.

    damp: added to H's diagonal, as a part of its mean. act_order: columns of large inputs first. groups: when scales
    are fitted: "static", all before the sweep on the original weights; "fresh", at the group's first column on
    corrected weights; "stale", as the reference does, on weights that lack the corrections of the current block of
    columns. Groups fitted on the way under act_order need a group index at inference. true_sequential: observe the
    inputs of each linear behind those rounded before it, which costs one forward in all. block: columns corrected at
    once.
    """

    damp: float = 0.01
    act_order: bool = True
    groups: Literal["static", "fresh", "stale"] = "static"
    true_sequential: bool = True
    block: int = 128

    def __post_init__(self) -> None:
        if self.damp <= 0 or self.block < 1:
            raise ValueError("damp must be positive and block at least 1")

    name: ClassVar[str] = "gptq"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def reorders(self, spec: Spec) -> bool:
        """Under act-order, groups fitted on the way are runs of the sweep's order."""
        return self.act_order and self.refits(spec)

    def refits(self, spec: Spec) -> bool:
        """Groups of a row may be fitted when the sweep comes to them."""
        fixed = spec.group == -1 or spec.scale in ("kquant", "integer", "bilevel")
        return self.groups != "static" and spec.block[0] == 1 and not fixed

    def round(self, weight: Tensor, spec: Spec, clip: Clip, stats: Stats | None, *, scores: bool) -> QTensor:
        """Codes for W [O, I]. Inputs never seen (stats None) fall back to rounding to nearest."""
        return self.swept(weight, spec, clip, stats, scores=scores)

    def stacks(self, spec: Spec) -> bool:
        """Ranges that are fitted on the way are fitted one by one."""
        return not self.refits(spec)

    def round_stack(
        self, weights: Sequence[Tensor], spec: Spec, clip: Clip, stats: Sequence[Stats], *, scores: bool
    ) -> list[QTensor]:
        """`round` for weights [O, I] of one shape, each behind inputs of its own."""
        factors, orders, dead = factored(stats, self.damp, self.act_order)
        weights = [weight.masked_fill(unseen, 0.0) for weight, unseen in zip(weights, dead, strict=True)]
        grids = fitted(clip, weights, spec, stats, scores=scores)
        natural = torch.arange(weights[0].shape[1], device=weights[0].device)
        columns = [natural if order is None else order for order in orders]
        return sweep_stack(weights, grids, factors, columns, self.block)

    def swept(
        self,
        weight: Tensor,
        spec: Spec,
        clip: Clip,
        stats: Stats | None,
        *,
        scores: bool,
        drift: Tensor | None = None,
        dropped: Tensor | None = None,
    ) -> QTensor:
        """`round`, with what columns take of those before them beside their errors, in the sweep's order (GPTAQ).

        Entries in `dropped` [O, I] become zero, whatever their codes: their errors spread as those of rounding do.
        """
        if stats is None:
            return RTN().round(_kept(weight, dropped), spec, clip, None, scores=scores)
        factor, order, dead = stats.factor(self.damp, self.act_order)
        weight = weight.masked_fill(dead, 0.0)
        if not self.refits(spec) or unit_shape(weight.shape, spec.block)[1] == weight.shape[1]:
            grid = clip.fit(_kept(weight, dropped), spec, stats, scores=scores)
            return self._sweep_static(weight, grid, factor, order, drift, dropped)
        return self._sweep_dynamic(weight, spec, partial(clip.fit, scores=scores), stats, factor, order, drift, dropped)

    def _sweep_static(
        self,
        weight: Tensor,
        grid: Grid,
        factor: Tensor,
        order: Tensor | None,
        drift: Tensor | None,
        dropped: Tensor | None,
    ) -> QTensor:
        """Every group's scale is known: columns may go in any order and keep their natural groups."""
        columns = torch.arange(weight.shape[1], device=weight.device) if order is None else order
        _, width = unit_shape(weight.shape, grid.spec.block)
        column = Columns(grid, weight.shape, (columns // width).tolist(), _turned(dropped, columns))
        sweep(weight[:, columns], factor, column.round, block=self.block, drift=drift, round_tile=column.round_tile)
        return QTensor(column.codes(columns), grid)

    def _sweep_dynamic(
        self,
        weight: Tensor,
        spec: Spec,
        fit: Fit,
        stats: Stats,
        factor: Tensor,
        order: Tensor | None,
        drift: Tensor | None,
        dropped: Tensor | None,
    ) -> QTensor:
        """Groups are runs of the sweep's own order, each fitted when the sweep comes to it.

        A sweep block that ends where every group ends makes the fit fresh; a longer one makes it stale.
        """
        total = weight.shape[1]
        _, width = unit_shape(weight.shape, spec.block)
        block = self.block
        if self.groups == "fresh":
            block = next(size for size in range(min(width, self.block), 0, -1) if width % size == 0)
        columns = torch.arange(total, device=weight.device) if order is None else order
        grid = fit_range(weight, spec)  # only what scales are stored relative to stays as it is
        column = Columns(grid, weight.shape, [i // width for i in range(total)], _turned(dropped, columns))
        of_group = replace(spec, block=(1, -1), scale="float32" if spec.relative else spec.scale)

        h = stats.hessian()

        def fit_groups(start: int, remaining: Tensor) -> None:
            for begin in range(-(-start // width) * width, min(start + block, total), width):
                values = remaining[begin - start : begin - start + width].T
                if column.dropped is not None:
                    values = _kept(values, column.dropped[begin : begin + width].T)
                chosen = columns[begin : begin + width]
                seen = Stats(gram=Gram.of(h[chosen][:, chosen], stats.tokens), tokens=stats.tokens)
                column.set(begin // width, fit(values, of_group, seen))

        sweep(
            weight[:, columns],
            factor,
            column.round,
            block=block,
            open_block=fit_groups,
            drift=drift,
            round_tile=column.round_tile,
        )
        return QTensor(column.codes(columns), column.grid(), order)


def _kept(weight: Tensor, dropped: Tensor | None) -> Tensor:
    """What ranges are fitted to: W [O, I] without the entries that become zero."""
    return weight if dropped is None else weight.masked_fill(dropped, 0.0)


def _turned(dropped: Tensor | None, columns: Tensor) -> Tensor | None:
    """A mask [O, I] as the sweep goes through it, [I, O]."""
    return None if dropped is None else dropped[:, columns].T.contiguous()


class Columns:
    """Rounds one column at a time with its group's scale, and remembers the levels.

    This runs once per column, so every view is made once, and the integer case spells `to_levels` out with the
    limits of each group worked out once. `dropped` [I, O] marks the values that become zero whatever their levels.
    """

    def __init__(self, grid: Grid, shape: torch.Size, groups: list[int], dropped: Tensor | None = None) -> None:
        rows, _ = unit_shape(shape, grid.spec.block)
        self.dropped = dropped
        self.spec, self.number, self.outer = grid.spec, grid.spec.number, grid.outer
        self.group = groups
        self.scale = grid.scale.repeat_interleave(rows, 0)[: shape[0]].T.contiguous()
        self.zero, self.offset, self.reach = (
            None if x is None else x.repeat_interleave(rows, 0)[: shape[0]].T.contiguous()
            for x in (grid.zero, grid.offset, grid.reach)
        )
        self.levels = torch.empty(shape[1], shape[0], device=grid.scale.device)
        self.limits = torch.empty(len(self.scale), 2, shape[0], device=grid.scale.device)
        self._limit(slice(None))

    @cached_property
    def _views(self) -> tuple[Sequence[Tensor], Sequence[Tensor], list[tuple[Tensor, ...]]]:
        """Levels by column, scales and limits by group, where columns are rounded one by one."""
        return self.levels.unbind(), self.scale.unbind(), [pair.unbind() for pair in self.limits]

    def _limit(self, groups: slice) -> None:
        if isinstance(self.number, Int):
            zero, reach = (None if x is None else x[groups] for x in (self.zero, self.reach))
            put_limits(self.limits[groups], self.number, zero, reach)

    def set(self, group: int, grid: Grid) -> None:
        """Take the one-group grid fitted for `group`."""
        self.scale[group] = grid.scale[:, 0]
        if self.outer is not None:
            self.scale[group] = relative_scale(self.scale.T.contiguous(), self.spec.scale, self.outer)[:, group]
        if self.zero is not None and grid.zero is not None:
            self.zero[group] = grid.zero[:, 0]
        if self.offset is not None and grid.offset is not None:
            self.offset[group] = grid.offset[:, 0]
        self._limit(slice(group, group + 1))

    def round(self, column: int, values: Tensor) -> Tensor:
        """Nearest levels of the column's values [O]; returns what they stand for."""
        rounded = self._nearest(column, values)
        return rounded if self.dropped is None else rounded.masked_fill_(self.dropped[column], 0.0)

    def _nearest(self, column: int, values: Tensor) -> Tensor:
        group, (columns, scales, limits) = self.group[column], self._views
        scale, levels = scales[group], columns[column]
        if self.offset is not None:
            torch.add(values, self.offset[group], out=levels).div_(scale).round_().clamp_(*limits[group])
            return (levels * scale).sub_(self.offset[group])
        if isinstance(self.number, Int):
            torch.div(values, scale, out=levels).round_().clamp_(*limits[group])
        else:
            levels.copy_(to_levels(values / scale, self.number))
        return levels * scale

    @property
    def round_tile(self) -> RoundTile | None:
        """Rounds many columns in one kernel, where that can be: integers, on a GPU, all of them kept."""
        if not (self.levels.is_cuda and isinstance(self.number, Int)) or self.dropped is not None:
            return None
        from ..numerics.feedback_kernel import round_tile

        group = torch.tensor(self.group, dtype=torch.int32, device=self.levels.device)

        def rounds(first: int, columns: Tensor, errors: Tensor, shares: Tensor) -> None:
            part = slice(first, first + len(columns))
            levels = self.levels[part]
            round_tile(columns, errors, shares, group[part], self.scale, self.limits, self.offset, levels)

        return rounds

    def grid(self) -> Grid:
        """The grid as the sweep left it."""
        zero, offset = (None if x is None else x.T.contiguous() for x in (self.zero, self.offset))
        return Grid(self.spec, self.scale.T.contiguous(), zero, self.outer, offset)

    def codes(self, columns: Tensor) -> Tensor:
        """Codes [O, I] in natural order; `columns` says which natural column the sweep's i-th was."""
        group = torch.tensor(self.group, device=columns.device)
        codes = to_codes(self.levels, self.number, None if self.zero is None else self.zero[group])
        natural = torch.empty_like(codes)
        natural[columns] = codes
        return natural.T.contiguous()
