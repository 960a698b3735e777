"""AdaDim (Heo et al. 2023): let the weights that share a scale lie along a row or along a column, linear by linear.

An outlier channel of the inputs makes one column of W sensitive. In groups along a row (1 x g) it shares its scales
with g - 1 others, in groups along a column (g x 1) it has scales of its own; outlier rows ask for the opposite. Both
are tried with plain rounding, and the one of least output error tr((W-Ŵ)H(W-Ŵ)ᵀ) is kept: of least weight error where
inputs were not seen.

It is a choice of ranges, so that any Round follows: under `gptq` a column's scale is known when the sweep comes to it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from ..numerics.grid import Grid
from ..numerics.spec import PLAIN, Spec
from .base import Clip, outcomes
from .hqq import HQQ
from .mse import MSEClip
from .rtn import MinMaxClip
from .views import Need, Stats

_RANGES: dict[str, Clip] = {"minmax": MinMaxClip(), "mse": MSEClip(), "hqq": HQQ()}


@dataclass(frozen=True)
class AdaDim:
    """Settings: ranges, the clip of both directions, with its own defaults ("minmax" is the paper's)."""

    ranges: Literal["minmax", "mse", "hqq"] = "mse"

    name: ClassVar[str] = "adadim"
    alone: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    def outcomes(self, spec: Spec) -> tuple[Spec, ...]:
        """Groups along rows and along columns, in this order."""
        if spec.block[0] != 1 or spec.block[1] < 2 or spec.scale not in (*PLAIN, "float16-min"):
            raise ValueError(f"adadim turns groups of columns into groups of rows, and {spec} has none: write -g128")
        (along,) = outcomes(_RANGES[self.ranges], spec)
        return along, replace(along, block=(along.block[1], 1))

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The grid of W [O, I] in the better direction; along rows on ties, and where O is no multiple of g."""
        clip = _RANGES[self.ranges]
        along, across = self.outcomes(spec)
        grid = clip.fit(weight, along, stats, scores=scores)
        if len(weight) % across.block[0]:
            return grid
        other = clip.fit(weight, across, stats, scores=scores)
        return other if _error(weight, other, stats) < _error(weight, grid, stats) else grid


def _error(weight: Tensor, grid: Grid, stats: Stats | None) -> float:
    """tr(D H Dᵀ) with D = Ŵ - W; H the identity where there is none."""
    difference = grid.quantize(weight) - weight
    return float(((difference if stats is None else difference @ stats.hessian()) * difference).sum())
