"""AWQ (Lin et al. 2023): scale input channels that carry large activations up before rounding, then clip.

Scales: with a = mean|X| per channel, s = a^r for r on a grid, normalised by √(max s · min s); the r whose rounded
weights change the inspected output least is taken. The difference is averaged over all batches for every r, and r = 0
is plain rounding, so the result is never worse than that on the calibration text.

Clipping: the paper compares sampled group products x(w - ŵ). Their sum of squares over tokens is (w - ŵ) H (w - ŵ)ᵀ
with H the group's diagonal block of the Gram matrix, so here every token counts and no samples are kept.

Both searches try some candidates by some dozen operations each, which a mixture's experts would start by the thousand.
So whatever has one shape and one format is tried at once, as far as that is work for the device: weights behind one
edge, the edges between the linears of experts, and the ranges of their weights. Every weight keeps a choice of its own.

Shape letters: O output rows, I input columns, E weights or edges, S channels of a source, G groups of g columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.grid import Grid, UnitError, fit_range, from_units, search_range, to_units, unit_shape
from ..numerics.spec import Spec
from .views import EdgeStack, EdgeView, Fold, Need, Stats

_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 25}
"""Elements of weights that are tried at once: beyond that, starting an operation is nothing against doing it."""


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

        def error(scale: Tensor) -> Tensor:
            spread = view.to_readers(scale[0])
            return scale.new_tensor([view.error(rounded(view.weights, view.specs, spread), spread)], dtype=torch.double)

        return self._best(activation[None], None if share is None else share[None], error)[0]

    def fold_stack(self, stack: EdgeStack) -> list[Fold | None]:
        """`fold` for every edge of a mixture's experts."""
        share = mean_share([stack.weights], [stack.spec]) if self.duo else None

        def error(scale: Tensor) -> Tensor:
            return stack.errors(requantized(stack.weights, stack.spec, scale[:, None]))

        return self._best(stack.absmean, share, error)

    def _best(self, a: Tensor, m: Tensor | None, error: Callable[[Tensor], Tensor]) -> list[Fold | None]:
        """Every edge's s [S] of least error out of those that its a and m, of [E, S], give; the first wins ties."""
        best, least = a, a.new_full(a.shape[:1], torch.inf, dtype=torch.double)
        for k in range(self.grid):
            scale = candidate(a, m, k / self.grid)
            loss = error(scale).double()
            best = torch.where((loss < least)[:, None], scale, best)
            least = torch.where(loss < least, loss, least)
        return [Fold(scale) if found else None for scale, found in zip(best, least.isfinite().tolist(), strict=True)]


def rounded(weights: Sequence[Tensor], specs: Sequence[Spec | None], spread: Tensor) -> list[Tensor]:
    """What every W [O, I] would come to if its columns were multiplied by `spread` [I]; those of spec None stay."""
    made = list(weights)
    alike: dict[tuple[Spec, torch.Size], list[int]] = defaultdict(list)
    for place, (weight, spec) in enumerate(zip(weights, specs, strict=True)):
        if spec is not None:
            alike[spec, weight.shape].append(place)
    for (spec, _), places in alike.items():
        size = 1 if spec.relative else _together(weights[places[0]])
        for part in (places[start : start + size] for start in range(0, len(places), size)):
            if len(part) == 1:
                made[part[0]] = requantized(weights[part[0]], spec, spread)
                continue
            stack = torch.stack([weights[place] for place in part])
            for place, weight in zip(part, requantized(stack, spec, spread), strict=True):
                made[place] = weight
    return made


def requantized(weights: Tensor, spec: Spec, spread: Tensor) -> Tensor:
    """What weights [..., O, I] come to if their columns are multiplied by `spread`, which broadcasts against them."""
    scaled = weights * spread
    return fit_range(scaled, spec).quantize(scaled) / spread


def _together(weight: Tensor) -> int:
    """How many weights of this one's shape are tried at once."""
    return max(1, _AT_ONCE["cuda" if weight.is_cuda else "cpu"] // weight.numel())


def candidate(activation: Tensor, share: Tensor | None, r: float) -> Tensor:
    """s = a^r, or a^r / m^(1-r) with the weights' share m, normalised so that √(max s · min s) = 1; all [..., S]."""
    if share is None:
        scale = activation.pow(r).clamp_min(1e-4)
    else:
        scale = (activation.pow(r) / (share.pow(1 - r) + 1e-4)).clamp_min(1e-4)
    return scale / (scale.amax(-1, keepdim=True) * scale.amin(-1, keepdim=True)).sqrt()


def mean_share(weights: Sequence[Tensor], specs: Sequence[Spec | None]) -> Tensor:
    """m [..., I]: mean over all rows of |W| [..., O, I] as a part of the largest |W| that shares its scale."""
    shares = []
    for weight, spec in zip(weights, specs, strict=True):
        units = to_units(weight.abs(), (1, -1) if spec is None else spec.block)
        share = units / units.amax((-3, -1), keepdim=True).clamp_min(1e-12)
        shares.append(from_units(share, weight.shape))
    return torch.cat(shares, -2).mean(-2)


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
        return search_range(weight, spec, self._ratios(), group_error(weight.shape, spec, stats))

    def fit_stack(self, weights: Sequence[Tensor], spec: Spec, stats: Sequence[Stats], *, scores: bool) -> list[Grid]:
        """`fit` for weights of one shape, each behind inputs of its own: some of them at once, as one matrix."""
        size, rows, grids = _together(weights[0]), len(weights[0]), []
        if size == 1 or scores or spec.block[0] != 1 or spec.relative:
            return [self.fit(weight, spec, seen, scores=scores) for weight, seen in zip(weights, stats, strict=True)]
        for start in range(0, len(weights), size):
            part = slice(start, start + size)
            error = group_error(weights[0].shape, spec, *stats[part])
            found = search_range(torch.cat(list(weights[part])), spec, self._ratios(), error, at_once=size * rows)
            grids += [found.rows(slice(first, first + rows)) for first in range(0, len(found.scale), rows)]
        return grids

    def _ratios(self) -> list[float]:
        return [1 - i / self.grid for i in range(int(self.maxshrink * self.grid))]


def group_error(shape: torch.Size, spec: Spec, *stats: Stats) -> UnitError:
    """The output error of every group of a row of a weight of `shape` [O, I]: d H dᵀ with the group's block of H.

    Of several statistics each is that of one weight; all rows of all of them are then to come at once.
    """
    _, width = unit_shape(shape, spec.block)
    blocks = torch.stack([_diagonal_blocks(seen.hessian(), width) for seen in stats])  # [E, G, g, g]

    def error(difference: Tensor, rows: slice) -> Tensor:
        d = difference.view(len(blocks), -1, *difference.shape[2:]).transpose(1, 2)  # [E, G, R, g]
        total: Tensor = ((d @ blocks) * d).sum(-1)
        return total.transpose(1, 2).flatten(0, 1)

    return error


def _diagonal_blocks(h: Tensor, width: int) -> Tensor:
    """The blocks [G, g, g] on the diagonal of H."""
    return h.view(len(h) // width, width, -1, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
