"""DGQ (Zhang et al. 2023): 4-bit groups whose scales are integers of one scale per row, for int8 matrix products.

With scales s_g = n_g·S, n_g from 1 to 127, a weight is ŵ = S·n_g(q - z): what stands behind S is an int8 number as long
as |q - z| ≤ ⌊127/n_g⌋, so a kernel unpacks 4 bits to int8 and multiplies W4A8 on 8-bit tensor cores, with one rescaling
per row behind the sum. The format (`integer` scales) keeps every level below that bound, whoever rounds.

Two grids are searched, both for the least error of the outputs: of every group's ranges 1.02 to 0.80 times the full
one, as if scales were real numbers; then of every row's S = r·max|W|/127, r from 0.2 to 1.02, whose integers come
nearest to those scales. A group's error is (ŵ - w) H (ŵ - w)ᵀ with its block of the Gram matrix, as in AWQ's clip, or
plainly squared where inputs were not seen. Outliers of the inputs are the business of `smoothquant`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.grid import Grid, UnitError, search_range, to_units
from ..numerics.scales import INT8_LARGEST, integer_outer, relative_scale
from ..numerics.spec import Spec
from .awq import group_error
from .views import Need, Stats

_ROWS = 256
"""Rows whose S is searched at once: the temporaries stay small."""


@dataclass(frozen=True)
class DGQ:
    """Settings: groups, candidates of a group's range between `wide` and `narrow` times the full one; rows, candidates
    r of a row's scale between `least` and `most`.
    """

    groups: int = 20
    wide: float = 1.02
    narrow: float = 0.8
    rows: int = 80
    least: float = 0.2
    most: float = 1.02

    def __post_init__(self) -> None:
        if min(self.groups, self.rows) < 2:
            raise ValueError("both searches need two candidates or more")
        if not (0 < self.narrow < self.wide and 0 < self.least < self.most):
            raise ValueError("narrow lies between 0 and wide, least between 0 and most")

    name: ClassVar[str] = "dgq"
    alone: ClassVar[bool] = False
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    def outcomes(self, spec: Spec) -> tuple[Spec, ...]:
        """The same format, which must be one of groups with integer scales."""
        if spec.scale != "integer" or spec.block[0] != 1:
            raise ValueError(f"dgq is for groups of a row with integer scales, not {spec}: write scale: integer")
        return (spec,)

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The two-level grid of W [O, I]."""
        error = _squared if stats is None else group_error(weight.shape, spec, stats)
        ranges = torch.linspace(self.wide, self.narrow, self.groups).tolist()
        real = search_range(weight, replace(spec, scale="float32"), ranges, error)
        chunks = (slice(start, start + _ROWS) for start in range(0, len(weight), _ROWS))
        parts = [self._of_rows(weight[rows], replace(real.rows(rows), spec=spec), rows, error) for rows in chunks]
        scale, outer = (torch.cat(each) for each in zip(*parts, strict=True))
        return Grid(spec, scale, real.zero, outer)

    def _of_rows(self, weight: Tensor, real: Grid, rows: slice, error: UnitError) -> tuple[Tensor, Tensor]:
        """(scales [O, G], S [O, 1]) of least error for real scales and their zero-points."""
        units, amax = to_units(weight.float(), real.spec.block), weight.abs().amax(1, keepdim=True).float()
        least = torch.full_like(amax, torch.inf)
        best = real.scale, torch.ones_like(amax)
        for ratio in torch.linspace(self.least, self.most, self.rows).tolist():
            outer = integer_outer(amax * (ratio / INT8_LARGEST))
            grid = replace(real, scale=relative_scale(real.scale, real.spec.scale, outer), outer=outer)
            difference = to_units(grid.quantize(weight), real.spec.block) - units
            loss = error(difference, rows).sum(1, keepdim=True)
            better = loss < least
            best = torch.where(better, grid.scale, best[0]), torch.where(better, outer, best[1])
            least = torch.minimum(least, loss)
        return best


def _squared(difference: Tensor, rows: slice) -> Tensor:
    return difference.square().sum((1, 3))
