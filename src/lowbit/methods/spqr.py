"""SpQR (Dettmers et al. 2023): tiny groups whose scales are quantized too, and single weights that keep 16 bits.

GPTQ's sweep, whose columns come in groups of 16. A weight is an outlier where quantizing it costs more than
τ = tau · mean_j Var(W_j) / U_jj² of the output's error, which is e² / U_jj² for an error e in the sweep's column j.
That is asked twice: when a group is opened, of every weight whether the others would gain as much if it did not widen
their range (those are left out of the fit, the mean of the others in their places); and when a column is rounded, of
the error made. Only what the second finds is stored, in fp16. Under "bilevel" scales (`numerics.bilevel`) the scales
and zeros of 16 rows are quantized to 3 bits. H is damped a hundred times as much as in GPTQ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.feedback import sweep
from ..numerics.grid import Grid, fit_range, grid_from_range, unit_shape
from ..numerics.places import Sparse, sparse_bytes
from ..numerics.qtensor import QTensor, QWeight
from ..numerics.sizes import stored_bytes
from ..numerics.spec import Spec
from ..numerics.stats import Gram
from .base import Clip, Encoded, Round
from .gptq import Columns
from .rtn import RTN
from .views import Need, Stats

_EXPECTED = 0.01
"""The part of weights that usually are outliers at the paper's τ: what a plan counts, and the paper's own example."""


@dataclass(frozen=True)
class SpQR:
    """Settings. tau: the threshold of an outlier, relative to the weights' own cost. damp: added to H's diagonal, as a
    part of its mean. act_order: columns of large inputs first; groups are then runs of that order. true_sequential:
    observe the inputs of each linear behind those done before it.
    """

    tau: float = 0.2
    damp: float = 1.0
    act_order: bool = True
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if self.tau <= 0 or self.damp <= 0:
            raise ValueError("tau and damp must be positive: a tau of 1e9 leaves no outliers")

    name: ClassVar[str] = "spqr"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = None
    maps: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Raise ValueError where groups cannot be fitted one after another, or are too small to leave a weight out."""
        rows, width = unit_shape(torch.Size(shape), spec.block)
        if rows > 1 or (spec.relative and spec.scale != "bilevel"):
            raise ValueError(f"spqr fits the groups of a row one by one, and {spec} relates them: write w3a16-g16")
        if width < 2:
            raise ValueError(f"spqr leaves single weights out of a group's range: groups of {width} are too small")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Bytes of codes, scales, the order of columns, and as many outliers as are usual."""
        outliers = round(_EXPECTED * shape[0] * shape[1])
        order = 4 * shape[1] if self.act_order else 0
        return stored_bytes(shape, spec) + order + sparse_bytes(shape, outliers, "index")

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """b + (3 + 3)/g + 64/(16 g) + 32 r bits for groups of g and the usual r = 1% of outliers."""
        width = unit_shape(torch.Size(shape), spec.block)[1]
        return spec.bits + 6 / width + 64 / (16 * width) + 32 * _EXPECTED

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """Codes of W [O, I] and its outliers; inputs never seen (stats None) fall back to rounding to nearest."""
        if stats is None:
            return Encoded(QWeight((RTN().round(weight, spec, clip, None, scores=scores),)))
        factor, order, dead = stats.factor(self.damp, self.act_order)
        columns = torch.arange(weight.shape[1], device=weight.device) if order is None else order
        weight = weight.masked_fill(dead, 0.0)[:, columns]
        cost = factor.diagonal().square().reciprocal()
        h = stats.hessian()  # made whole at every call
        threshold = self.tau * float((weight.var(0, correction=0) * cost).mean())

        def fit(first: int, values: Tensor, of_group: Spec) -> Grid:
            members = columns[first : first + values.shape[1]]
            gram = Gram.of(h[members][:, members], stats.tokens)
            return clip.fit(values, of_group, Stats(gram=gram, tokens=stats.tokens), scores=scores)

        groups = _Groups(weight, spec, fit, cost, threshold)
        values = sweep(weight, factor, groups.round, block=groups.width, open_block=groups.open)
        part = QTensor(groups.columns.codes(columns), groups.grid(), order)
        natural = columns.argsort()
        outlier = groups.outlier.T[:, natural]
        sparse = Sparse.of(values[:, natural], outlier, "index") if bool(outlier.any()) else None
        return Encoded(QWeight((part,), sparse=sparse))


Fit = Callable[[int, Tensor, Spec], Grid]
"""(first column in the sweep's order, values [O, g], format of one group) -> their grid."""


class _Groups:
    """Fits a group when the sweep comes to it, rounds its columns, and remembers outliers and grids."""

    def __init__(self, weight: Tensor, spec: Spec, fit: Fit, cost: Tensor, threshold: float) -> None:
        self.fit, self.cost, self.threshold = fit, cost, threshold
        self.width = unit_shape(weight.shape, spec.block)[1]
        self.of_group = replace(spec, block=(1, -1))
        grid = replace(fit_range(weight, spec), outer=None)  # every group brings its own
        self.columns = Columns(grid, weight.shape, [i // self.width for i in range(weight.shape[1])])
        self.outer: list[Tensor | None] = []
        self.outlier = torch.zeros_like(weight.T, dtype=torch.bool, memory_format=torch.contiguous_format)

    def open(self, first: int, remaining: Tensor) -> None:
        """Fit the group that begins at `first` without the weights that the others are better off without."""
        values = remaining[: self.width].T
        inlier = gains(values, self.cost[first : first + self.width], self.of_group) <= self.threshold
        mean = (values * inlier).sum(1, keepdim=True) / inlier.sum(1, keepdim=True).clamp_min(1)
        grid = self.fit(first, torch.where(inlier, values, mean), self.of_group)
        self.columns.set(first // self.width, grid)
        self.outer.append(grid.outer)

    def round(self, column: int, values: Tensor) -> Tensor:
        """What the column's values [O] are stored as."""
        rounded = self.columns.round(column, values)
        outlier = (values - rounded).square_().mul_(self.cost[column]) > self.threshold
        self.outlier[column] = outlier
        return torch.where(outlier, values.half().float(), rounded)

    def grid(self) -> Grid:
        """The grids of all groups as one, in the sweep's order."""
        outer = [each for each in self.outer if each is not None]
        return replace(self.columns.grid(), outer=torch.cat(outer, 1) if outer else None)


def gains(values: Tensor, cost: Tensor, spec: Spec) -> Tensor:
    """By how much the cost of groups [O, g] falls if one weight is left out and the range fitted to the others, [O, g].

    `cost` [g] is that of a unit error. Only two weights of a group carry its range: leaving out any other one saves
    its own error and changes nothing else.
    """
    (lows, at_low), (highs, at_high) = values.topk(2, largest=False), values.topk(2)
    low, high = lows[:, :1], highs[:, :1]

    def errors(low: Tensor, high: Tensor) -> Tensor:
        return (_tried(low, high, spec).quantize(values) - values).square() * cost

    gain = errors(low, high)
    total = gain.sum(1, keepdim=True)
    for place, others in ((at_low[:, :1], (lows[:, 1:], high)), (at_high[:, :1], (low, highs[:, 1:]))):
        without = errors(*others)
        gain.scatter_(1, place, total - without.sum(1, keepdim=True) + without.gather(1, place))
    return gain


def _tried(low: Tensor, high: Tensor, spec: Spec) -> Grid:
    """The grid of groups in these ranges [O, 1]; bilevel scales are those before rows are fitted together."""
    if spec.scale != "bilevel":
        return grid_from_range(low, high, spec)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = (high - low) / ((1 << spec.bits) - 1)
    return Grid(spec, torch.where(scale > 0, scale, 1.0), offset=-low)
