"""SparseGPT (Frantar and Alistarh 2023): drop weights in GPTQ's sweep, and let those to come make up for each.

Dropping w_ij costs w² / U_jj² once the columns behind it have answered as well as they can, U the upper Cholesky factor
of H⁻¹. Which go is decided on the way, on weights that hold the corrections for all that went before: block by block of
columns, where rows and columns may lose more or less, or N of every M inputs of a row. The sweep is
`numerics.feedback`; N:M makes its blocks M wide, so that weights are up to date wherever a choice is made.

With a weight format, the sweep drops and rounds at once, on ranges fixed before it begins; the errors of both are
repaired together. Where the recipe names GPTQ, that rounds in a sweep of its own, with its own settings, what this one
has left, and what is dropped stays so. What spreads is always the error of what is stored: 16-bit values, or codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.feedback import sweep
from ..numerics.grid import unit_shape
from ..numerics.qtensor import QTensor
from ..numerics.spec import BF16, Spec
from .base import Clip, Encoded, Round
from .gptq import GPTQ, Columns
from .sparsity import Pruning, codes, dropped, rounded, storage_dtype, values
from .views import Need, Stats


@dataclass(frozen=True)
class SparseGPT(Pruning):
    """Settings, beside those of all pruning: damp: added to H's diagonal, as a part of its mean. block: columns whose
    entries, of all rows, are compared with each other, where it is not N:M. true_sequential: observe the inputs of each
    linear behind those pruned before it.
    """

    damp: float = 0.01
    block: int = 128
    true_sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp <= 0 or self.block < 1:
            raise ValueError("damp must be positive and block at least 1")

    name: ClassVar[str] = "sparsegpt"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """W [O, I] pruned; inputs never seen (stats None) count alike, and nothing is made up for."""
        dtype = storage_dtype(weight)
        factor = torch.eye(weight.shape[1], device=weight.device)
        if stats is not None:
            factor, _, dead = stats.factor(self.damp, act_order=False)
            weight = weight.masked_fill(dead, 0.0)
        mask = torch.zeros(weight.T.shape, dtype=torch.bool, device=weight.device)
        if spec.number == BF16:
            swept = self._sweep(weight, factor, mask, lambda _, column: column.to(dtype).float())
            return values(swept, mask.T, dtype)
        if isinstance(round, GPTQ):
            swept = self._sweep(weight, factor, mask, lambda _, column: column.clone())
            return rounded(swept, mask.T, spec, round, clip, stats, scores=scores)
        grid = clip.fit(weight, spec, stats, scores=scores)
        _, width = unit_shape(weight.shape, spec.block)
        column = Columns(grid, weight.shape, [i // width for i in range(weight.shape[1])])
        self._sweep(weight, factor, mask, column.round)
        natural = torch.arange(weight.shape[1], device=weight.device)
        return codes(QTensor(column.codes(natural), grid), mask.T)

    def _sweep(self, weight: Tensor, factor: Tensor, mask: Tensor, store: Callable[[int, Tensor], Tensor]) -> Tensor:
        """Prune W [O, I] with error feedback through U [I, I]; `mask` [I, O] is filled with what is dropped.

        `store` gives what a column's values become where they are kept, in a tensor of their own.
        """
        width = self.among or self.block
        costs = factor.diagonal().square()

        def choose(start: int, remaining: Tensor) -> None:
            part = remaining[:width]
            cost = part.square() / costs[start : start + len(part), None]
            if self.among:
                mask[start : start + len(part)] = dropped(cost.T, self.sparsity, self.among).T
            else:
                mask[start : start + len(part)] = dropped(cost, self.sparsity, cost.numel())

        def column(index: int, value: Tensor) -> Tensor:
            return store(index, value).masked_fill_(mask[index], 0.0)

        return sweep(weight, factor, column, block=width, open_block=choose)
