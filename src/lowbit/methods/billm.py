"""BiLLM (Huang et al. 2024): binary weights, of which a few salient columns get a second bit for what the first lost.

Blocks of 128 columns are done one after the other, on weights that have taken over the errors of earlier blocks. With
S = w²/U_jj², what dropping a weight would cost (U_jj² is what H⁻¹ leaves of column j once those before it are fixed):

1. Columns are ranked by ΣS. The first k are salient, k being where binarising both sides of the cut twice loses least.
2. The other weights are split into concentrated and tail, at the quantile where making each part binary loses least.
3. A part becomes μ ± α of its entries in a row; the salient part becomes so twice, the second time its own residual.
4. The block's error is fed back into the columns behind it.

Both searches measure how well S is approximated, not W, as the authors' code does: on W they take several times as many
salient columns and lose more. The paper counts 1 bit a weight and 1 more in salient columns; where the tail is, a bit a
weight, and the eight fp16 numbers of every row and block, another, come on top.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.binary import binary, fit_binary, mean_and_spread
from ..numerics.feedback import sweep
from ..numerics.grid import Grid, unit_shape
from ..numerics.places import Regions, regions_bytes
from ..numerics.qtensor import QTensor, QWeight
from ..numerics.spec import Spec
from .base import Clip, Encoded, Round
from .views import Need, Stats

CONCENTRATED, TAIL, SALIENT = range(3)
_PARTS = (CONCENTRATED, TAIL, SALIENT, SALIENT)
"""The region of every binary term."""
_QUANTILES = torch.linspace(0.1, 0.9, 81)
_MOST = {"saliency": 49, "weight": 12}
"""Salient columns tried: as many as in the authors' code, or a tenth of a block, since W's search takes what it can."""
_TYPICAL = 0.1
"""The part of salient columns in what is known as 1.1 bits, for estimates before any weight is seen."""


@dataclass(frozen=True)
class BiLLM:
    """Settings.

    searched: what both searches approximate. most: salient columns tried in a block (None: 49 on saliencies, 12 on
    weights). compensation: "paper" divides a column's error by its own U_jj alone; "exact" solves for what the whole
    block's errors ask for; "columns" also rounds the block column by column, each on what those before it left. damp:
    added to H's diagonal, as a part of its mean. true_sequential: observe the inputs of each linear behind those done
    before it.
    """

    searched: Literal["saliency", "weight"] = "saliency"
    most: int | None = None
    compensation: Literal["paper", "exact", "columns"] = "columns"
    damp: float = 0.01
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if self.damp <= 0 or (self.most is not None and self.most < 1):
            raise ValueError("damp must be positive and most at least 1")

    name: ClassVar[str] = "billm"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = binary(128)
    maps: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Weights are binary, whatever else the scheme says of them than its groups, which are the blocks."""
        if spec.bits != 1 or spec.block[0] != 1:
            raise ValueError(f"billm makes weights binary, and {spec} is not: write billm or billm-w1a16-g64")
        if unit_shape(torch.Size(shape), spec.block)[1] < 2:
            raise ValueError("billm divides blocks of columns: give the scheme groups of at least two")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Codes of one bit, a second in salient columns, a bit for the split, eight fp16 numbers a row and block."""
        rows, columns = shape
        blocks = columns // unit_shape(torch.Size(shape), spec.block)[1]
        second = rows * round(_TYPICAL * columns)
        return (rows * columns + second) // 8 + regions_bytes(shape, rows * columns // 2) + 16 * rows * blocks

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """1 + the part of salient columns, which only the searches know: 1.1 stands for it, as tables have it."""
        return 1 + _TYPICAL

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """The four binary terms of W [O, I]. Inputs never seen count all alike."""
        width = unit_shape(weight.shape, spec.block)[1]
        if stats is None:
            factor = torch.eye(weight.shape[1], device=weight.device)
        else:
            factor, _, dead = stats.factor(self.damp, act_order=False)
            weight = weight.masked_fill(dead, 0.0)
        working, blocks = weight.clone(), []
        for start in range(0, weight.shape[1], width):
            own, rest = slice(start, start + width), slice(start + width, None)
            u, columns = factor[own, own], working[:, own]
            block = _Block(columns, self._regions(columns, u.diagonal()))
            error = columns - block.round(columns, u if self.compensation == "columns" else None)
            if self.compensation == "paper":
                scaled = error / u.diagonal()
            else:
                scaled = torch.linalg.solve_triangular(u, error, upper=True, left=False)
            working[:, rest] -= scaled @ factor[own, rest]
            blocks.append(block)
        return Encoded(_joined(blocks, binary(spec.group)))

    def _regions(self, columns: Tensor, diagonal: Tensor) -> Tensor:
        """The region of every entry of a block of columns [O, g], uint8, whose factor has this diagonal [g]."""
        saliency = (columns / diagonal).square()
        order = saliency.sum(0).argsort(descending=True, stable=True)
        x = (saliency if self.searched == "saliency" else columns)[:, order]
        salient = self._cut(x)
        others = x[:, salient:].abs()
        tail = others >= _break_point(x[:, salient:], others)
        regions = torch.full(columns.shape, SALIENT, dtype=torch.uint8, device=columns.device)
        regions[:, order[salient:]] = torch.where(tail, TAIL, CONCENTRATED).to(torch.uint8)
        return regions

    def _cut(self, x: Tensor) -> int:
        """How many columns of x [O, g], sorted by rank, are salient."""
        most = min(self.most or _MOST[self.searched], x.shape[1] - 1)
        errors = [_twice(x[:, :salient]) + _twice(x[:, salient:]) for salient in range(1, most + 1)]
        return int(torch.stack(errors).argmin()) + 1


def _twice(x: Tensor) -> Tensor:
    """The squared error of the rows of x after two binary terms, the second of what the first leaves."""
    for _ in range(2):
        mean, spread = mean_and_spread(x)
        x = x - mean
        x = x - spread.copysign(x)
    return x.square().sum()


def _break_point(x: Tensor, magnitude: Tensor) -> Tensor:
    """The magnitude at which two binary parts of x [O, n], below and from there on, have the least squared error."""
    points = torch.quantile(magnitude.flatten(), _QUANTILES.to(x.device))
    errors = []
    for point in points:
        tail, error = magnitude >= point, x.new_zeros(())
        for part in (tail, ~tail):
            mean, spread = mean_and_spread(x, part)
            error = error + (((x - mean).abs() - spread) * part).square().sum()
        errors.append(error)
    return points[torch.stack(errors).argmin()]


class _Block:
    """A block of columns W [O, g]: the region of every entry and the levels of the four terms, fitted to W."""

    def __init__(self, weight: Tensor, regions: Tensor) -> None:
        self.regions, self.reached = regions, weight
        spec = binary(-1)
        self.grids = [fit_binary(weight, spec, regions == region) for region in range(3)]
        residual = weight - self.grids[SALIENT].quantize(weight)
        self.grids.append(fit_binary(residual, spec, regions == SALIENT))

    def round(self, weight: Tensor, factor: Tensor | None) -> Tensor:
        """The values of the block's codes, each entry rounded to nearest, or with feedback within the block."""
        if factor is None:
            return self._nearest(weight, self.regions)
        reached = torch.empty_like(weight)

        def round_column(column: int, values: Tensor) -> Tensor:
            reached[:, column] = values
            return self._nearest(values[:, None], self.regions[:, column, None])[:, 0]

        self.reached = reached
        return sweep(weight, factor, round_column, block=weight.shape[1])

    def _nearest(self, x: Tensor, regions: Tensor) -> Tensor:
        """The nearest values to x [O, n], whose entries lie in these regions."""
        concentrated, tail, first = (grid.quantize(x) for grid in self.grids[:3])
        second = self.grids[3].quantize(x - first)
        return torch.where(regions == SALIENT, first + second, torch.where(regions == TAIL, tail, concentrated))

    def codes(self) -> list[Tensor]:
        """The codes [O, g] of the four terms, zero outside their regions."""
        first = self.grids[SALIENT].quantize(self.reached)
        rounded = (*(self.reached,) * 3, self.reached - first)
        return [
            grid.encode(x).where(self.regions == region, 0)
            for grid, x, region in zip(self.grids, rounded, _PARTS, strict=True)
        ]


def _joined(blocks: list[_Block], spec: Spec) -> QWeight:
    """The weight whose blocks of columns these are."""
    codes = [torch.cat(parts, 1) for parts in zip(*(block.codes() for block in blocks), strict=True)]
    grids = []
    for parts in zip(*(block.grids for block in blocks), strict=True):
        offset = torch.cat([part.offset for part in parts if part.offset is not None], 1)
        grids.append(Grid(spec, torch.cat([part.scale for part in parts], 1), None, None, offset))
    terms = (QTensor(c, grid, region=region) for c, grid, region in zip(codes, grids, _PARTS, strict=True))
    return QWeight(tuple(terms), regions=Regions(torch.cat([block.regions for block in blocks], 1), 3))
