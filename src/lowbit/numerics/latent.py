"""A trainable weight behind codes: what straight-through training of weights descends on.

Methods that train weights through their rounding differ in the loss, not in this: where the weight starts when codes
exist already, how the grid follows it, and which codes it stands for in the end. The arithmetic is that of `ste.py`,
so what was trained is what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .grid import Grid, grid_from_range, grid_range, unit_range
from .qtensor import QTensor
from .spec import Int
from .ste import quantize_between


class Latent:
    """The trainable weight behind one site's codes, on a grid that follows its range.

    It is W itself where the codes are those nearest to W, and what the codes stand for where error feedback chose them.
    What the grid leaves out of the weight's range, or covers beyond it, stays the same part of that range: nothing for
    plain ranges. Columns lie in the order of the groups.
    """

    def __init__(self, weight: Tensor, start: QTensor) -> None:
        self.spec, self._order = start.grid.spec, start.order
        number = self.spec.number
        self._symmetric = not isinstance(number, Int) or number.symmetric
        grouped = self._grouped(weight)
        if not torch.equal(start.grid.encode(grouped), self._grouped(start.codes)):
            grouped = self._grouped(start.dequantize())
        self.value = grouped.clone().requires_grad_()
        self._below, self._above = self._beyond(start.grid)

    def weight(self) -> Tensor:
        """Ŵ [O, I] with gradients."""
        return self._natural(quantize_between(self.value, *self._ends(), self.spec))

    def codes(self) -> QTensor:
        """The codes of Ŵ."""
        low, high = self._ends()
        grid = grid_from_range(low.detach(), high.detach(), self.spec)
        return QTensor(self._natural(grid.encode(self.value.detach())), grid, self._order)

    def _ends(self) -> tuple[Tensor, Tensor]:
        """The range [..., O/r, I/c] that the grid covers."""
        low, high, reach = self._reach()
        return low - self._below * reach, high + self._above * reach

    def _reach(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ends of every unit's range and its size: the span, or under symmetric rules the magnitude."""
        low, high = unit_range(self.value, self.spec.block)
        if self._symmetric:
            amax = torch.maximum(low.abs(), high.abs())
            return -amax, amax, amax
        return low, high, high - low

    def _beyond(self, grid: Grid) -> tuple[Tensor, Tensor]:
        """How far the grid reaches beyond the weight's own range on both sides, as parts of it."""
        low, high, reach = (x.detach() for x in self._reach())
        plain = grid_from_range(low, high, self.spec)
        same = (plain.scale == grid.scale) | (reach == 0)
        if plain.zero is not None and grid.zero is not None:
            same &= plain.zero == grid.zero
        bottom, top = grid_range(grid)
        return torch.where(same, 0.0, (low - bottom) / reach), torch.where(same, 0.0, (top - high) / reach)

    def _grouped(self, x: Tensor) -> Tensor:
        return x if self._order is None else x[:, self._order]

    def _natural(self, x: Tensor) -> Tensor:
        return x if self._order is None else x[:, self._order.argsort()]
