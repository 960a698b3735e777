"""Two values for a part of every row, mean ± mean distance: how methods near one bit (PB-LLM, BiLLM) store weights.

For values w of mean μ and b = sign(w - μ) the best μ + α b has α = mean |w - μ|; both are taken over the entries of a
mask, since parts of a row are treated differently. A unit is a `Grid` of one bit whose levels are μ - α and μ + α:
scale 2α and least value μ - α, as fp16 holds them before anything is rounded, so that the nearest level is b again.

Shape letters: O output rows, I input columns, G groups, g columns of one group.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .grid import Grid, from_units, to_units, unit_shape
from .scales import HALF_SMALLEST
from .spec import Int, Spec


def binary(group: int) -> Spec:
    """The format: one bit, and two fp16 numbers for `group` columns of a row (-1: the whole row)."""
    return Spec(Int(1, "asymmetric"), (1, group), "float16-min")


def binary_grid(mean: Tensor, spread: Tensor, spec: Spec) -> Grid:
    """The grid {μ - α, μ + α} of μ and α [O, G] as it can be stored. Where α is 0 the levels all but coincide."""
    largest = torch.finfo(torch.float16).max
    scale = (2 * spread).clamp(HALF_SMALLEST, largest).half().float()
    return Grid(spec, scale, None, None, (scale / 2 - mean).clamp(-largest, largest).half().float())


def mean_and_spread(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(μ, α) [..., 1] over the last axis of x, of the entries in `mask`; both are 0 where there are none."""
    if mask is None:
        mean = x.mean(-1, keepdim=True)
        return mean, (x - mean).abs().mean(-1, keepdim=True)
    ones = mask.to(x.dtype)  # a product takes a fraction of a selection's time on a CPU
    entries = ones.sum(-1, keepdim=True).clamp_min(1)
    mean = (x * ones).sum(-1, keepdim=True) / entries
    return mean, ((x - mean).abs() * ones).sum(-1, keepdim=True) / entries


def fit_binary(x: Tensor, spec: Spec, mask: Tensor | None = None) -> Grid:
    """The binary grid of every unit of x [O, I], fitted to the entries in `mask`, bool [O, I]."""
    mean, spread = mean_and_spread(
        to_units(x.float(), spec.block), None if mask is None else to_units(mask, spec.block)
    )
    return binary_grid(mean[:, 0, :, 0], spread[:, 0, :, 0], spec)


def by_group(grid: Grid) -> list[Grid]:
    """The grids of the single groups of columns of a grid with groups by row, each for any columns of its group."""
    spec = replace(grid.spec, block=(1, -1))
    columns = [slice(group, group + 1) for group in range(grid.scale.shape[1])]
    return [
        Grid(spec, grid.scale[:, c], *(None if x is None else x[:, c] for x in (grid.zero, grid.outer, grid.offset)))
        for c in columns
    ]


def largest(scores: Tensor, part: float, group: int) -> Tensor:
    """The largest `part` of the scores [O, I] of every `group` columns, all rows together, as a bool mask.

    It is round(part · entries) of them to the last one: of equal scores those that come first, row by row, are taken.
    """
    width = unit_shape(scores.shape, (1, group))[1]
    units = to_units(scores, (-1, width))
    masks = [_largest(units[0, :, index], round(part * scores.shape[0] * width)) for index in range(units.shape[2])]
    return from_units(torch.stack(masks, 1)[None], scores.shape)


def _largest(scores: Tensor, count: int) -> Tensor:
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = flat.kthvalue(flat.numel() - count + 1).values
    above, equal = flat > least, flat == least
    return (above | (equal & (equal.cumsum(0) <= count - above.sum()))).view(scores.shape)
