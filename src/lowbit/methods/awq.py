"""AWQ (Lin et al. 2023): scale input channels that carry large activations up before rounding, then clip.

Scales: with a = mean|X| per channel, s = a^r for r on a grid, normalised by √(max s · min s); the r whose rounded
weights change the inspected output least is taken. The difference is averaged over all batches for every r, and r = 0
is plain rounding, so the result is never worse than that on the calibration text.

Clipping: the paper compares sampled group products x(w - ŵ). Their sum of squares over tokens is (w - ŵ) H (w - ŵ)ᵀ
with H the group's diagonal block of the Gram matrix, so here every token counts and no samples are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.grid import Grid, UnitError, fit_range, from_units, search_range, to_units, unit_shape
from ..numerics.spec import Spec
from .views import EdgeView, Fold, Need, Stats


@dataclass(frozen=True)
class AWQ:
    """Settings. grid: candidates r = k/grid, k < grid. duo: also divide by the weights' mean share, m^(1-r)."""

    grid: int = 20
    duo: bool = False

    def __post_init__(self) -> None:
        if self.grid < 1:
            raise ValueError(f"grid must be at least 1, not {self.grid}")

    name: ClassVar[str] = "awq"
    needs: ClassVar[frozenset[Need]] = frozenset({"absmean", "gram"})
    replays: ClassVar[bool] = True

    def fold(self, view: EdgeView) -> Fold | None:
        """The best s over the edge's source channels."""
        activation = view.to_source(view.absmean)
        share = view.to_source(mean_share(view.weights, view.specs)) if self.duo else None
        best, least = None, float("inf")
        for k in range(self.grid):
            scale = candidate(activation, share, k / self.grid)
            spread = view.to_readers(scale)
            rounded = [
                weight if spec is None else fit_range(weight * spread, spec).quantize(weight * spread) / spread
                for weight, spec in zip(view.weights, view.specs, strict=True)
            ]
            loss = view.error(rounded, spread)
            if loss < least:
                best, least = scale, loss
        return None if best is None else Fold(best)


def candidate(activation: Tensor, share: Tensor | None, r: float) -> Tensor:
    """s = a^r, or a^r / m^(1-r) with the weights' share m, normalised so that √(max s · min s) = 1."""
    if share is None:
        scale = activation.pow(r).clamp_min(1e-4)
    else:
        scale = (activation.pow(r) / (share.pow(1 - r) + 1e-4)).clamp_min(1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


def mean_share(weights: Sequence[Tensor], specs: Sequence[Spec | None]) -> Tensor:
    """m [I]: mean over all rows of |W| as a part of the largest |W| that shares its scale."""
    shares = []
    for weight, spec in zip(weights, specs, strict=True):
        units = to_units(weight.abs(), (1, -1) if spec is None else spec.block)
        share = units / units.amax((-3, -1), keepdim=True).clamp_min(1e-12)
        shares.append(from_units(share, weight.shape))
    return torch.cat(shares).mean(0)


@dataclass(frozen=True)
class AWQClip:
    """Settings: ranges 1 - i/grid times the full one, i < maxshrink·grid."""

    grid: int = 20
    maxshrink: float = 0.5

    def __post_init__(self) -> None:
        if self.grid < 1 or not 0 < self.maxshrink <= 1 or int(self.maxshrink * self.grid) < 1:
            raise ValueError("grid must be at least 1, and maxshrink in (0, 1] leave one step of it")

    name: ClassVar[str] = "awqclip"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The grid of least output error per (row, group); queries and keys, and unseen inputs, stay unclipped."""
        if scores or stats is None or spec.block[0] != 1:
            return fit_range(weight, spec)
        ratios = (1 - i / self.grid for i in range(int(self.maxshrink * self.grid)))
        return search_range(weight, spec, ratios, group_error(weight.shape, spec, stats))


def group_error(shape: torch.Size, spec: Spec, stats: Stats) -> UnitError:
    """The output error of every group of a row of a weight of `shape` [O, I]: d H dᵀ with the group's block of H."""
    _, width = unit_shape(shape, spec.block)
    h = stats.hessian().view(shape[1] // width, width, -1, width)
    blocks = h.diagonal(dim1=0, dim2=2).permute(2, 0, 1).contiguous()  # [G, g, g]

    def error(difference: Tensor, rows: slice) -> Tensor:
        d = difference[:, 0].transpose(0, 1)  # [G, R, g]
        total: Tensor = ((d @ blocks) * d).sum(-1)
        return total.T

    return error
