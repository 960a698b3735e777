"""DB-LLM's flexible dual binarization (Chen et al. 2024): two bits a weight as two bit-planes with a factor each.

ŵ = α₁b₁ + α₂b₂, b in {0, 1}, for every group of columns of a row. It starts from a 2-bit quantizer of step s, α₁ = 2s
and α₂ = -s: the levels are -s, 0, s, 2s, of which b₁ = 1[w ≥ (α₁ + α₂)/2] and b₂ = 1[w ≤ α₁b₁ + α₂/2] take the nearest.
From there both factors move freely, so that the levels need not be evenly spaced, and both planes are mostly zeros.

The paper learns the factors by gradients through a distillation of the whole model that weighs ambiguous tokens more
(DAD). That is not done here: DAD belongs to training. Instead the factors of a group are the least-squares solution
for the loss of the linear's output, tr((W - Ŵ) H (W - Ŵ)ᵀ), under fixed bits, one group after the other; bits are then
chosen again under fixed factors, column by column with error feedback; and so on in turn. The best pair is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.feedback import sweep
from ..numerics.grid import Grid, search_mse, to_units, unit_shape
from ..numerics.qtensor import QTensor, QWeight
from ..numerics.scales import scale_bytes, store_scale
from ..numerics.spec import PLAIN, Int, Spec, per_group
from .base import Clip, Encoded, Round
from .views import Need, Stats

_PLANE = Int(1, "asymmetric")
"""A plane's codes. The zero-point is the factor's sign: s (c - z) is s b for z = 0, c = b; -s b for z = 1, c = 1-b."""
_RIDGE = 1e-5
"""Keeps factors of planes that are empty or alike from growing without bound, above the noise of fp32."""


@dataclass(frozen=True)
class DBLLM:
    """Settings.

    passes: times that factors are solved for and bits chosen again; 0 keeps the quantizer that it starts from.
    feedback: whether bits are chosen with error feedback, or each by the nearest level, as the paper has it.
    act_order: columns of large inputs first. damp: added to H's diagonal, as a part of its mean. true_sequential:
    observe the inputs of each linear behind those done before it.
    """

    passes: int = 4
    feedback: bool = True
    act_order: bool = True
    damp: float = 0.01
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if self.passes < 0 or self.damp <= 0:
            raise ValueError("passes are not negative, and damp is positive")

    name: ClassVar[str] = "dbllm"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = per_group(Int(2), 128)
    maps: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Two bits, in groups of a row, under plain scales."""
        if not isinstance(spec.number, Int) or spec.bits != 2 or spec.block[0] != 1 or spec.scale not in PLAIN:
            raise ValueError(f"dbllm has two planes of one bit with plain factors, not {spec}: write dbllm-w2a16-g128")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Two planes, each with a factor and its sign for every group."""
        rows, columns = shape
        groups = columns // unit_shape(torch.Size(shape), spec.block)[1]
        plane = rows * -(-columns // 8) + scale_bytes(rows, groups, spec.scale) + -(-rows * groups // 8)
        return 2 * plane

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Two, and the factors are not counted."""
        return 2.0

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """The two planes of W [O, I]. Inputs never seen count all alike."""
        if stats is None:
            h = factor = torch.eye(weight.shape[1], device=weight.device)
            order = None
        else:
            factor, order, dead = stats.factor(self.damp, self.act_order)
            weight = weight.masked_fill(dead, 0.0)
            h = stats.hessian()
        width = unit_shape(weight.shape, spec.block)[1]
        groups = [slice(start, start + width) for start in range(0, weight.shape[1], width)]
        columns = torch.arange(weight.shape[1], device=weight.device) if order is None else order
        tried = self._planes(weight, spec, h, (factor, columns), groups)
        planes = min(tried, key=lambda each: _loss(weight - values_of(*each), h))
        return Encoded(QWeight(tuple(_plane(bits, alpha, spec) for bits, alpha in zip(*planes, strict=True))))

    def _planes(
        self, weight: Tensor, spec: Spec, h: Tensor, factor: tuple[Tensor, Tensor], groups: list[slice]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Bits [2, O, I] and factors [2, O, G] as they change."""
        alphas = start_of(weight, spec, h.diagonal())
        bits = self._bits(weight, alphas, factor, groups)
        yield bits, alphas
        for _ in range(self.passes):
            bits, alphas = solved(weight, bits, alphas, h, groups, spec)
            yield bits, alphas
            bits = self._bits(weight, alphas, factor, groups)
            yield bits, alphas

    def _bits(self, weight: Tensor, alphas: Tensor, factor: tuple[Tensor, Tensor], groups: list[slice]) -> Tensor:
        """Both planes [2, O, I] of W under factors [2, O, G]; `factor` is U, and the columns as it orders them."""
        bits = torch.empty(2, *weight.shape, dtype=torch.bool, device=weight.device)
        if not self.feedback:
            for group, own in enumerate(groups):
                bits[..., own] = nearest(weight[:, own], alphas[..., group, None])
            return bits
        (u, order), width = factor, groups[0].stop
        columns = order.tolist()

        def round_column(place: int, values: Tensor) -> Tensor:
            column = columns[place]
            factors = alphas[..., column // width, None]
            bits[..., column, None] = chosen = nearest(values[:, None], factors)
            return (chosen * factors).sum(0)[:, 0]

        sweep(weight[:, order], u, round_column)
        return bits


def start_of(weight: Tensor, spec: Spec, importance: Tensor) -> Tensor:
    """α₁ = 2s and α₂ = -s [2, O, G] of W [O, I]: s of least squared error, each column's weighed by `importance` [I].

    s may be negative, for groups whose long tail lies below zero.
    """
    plain = replace(spec, number=Int(2))  # levels -2s to s, hence what mirrors W comes first
    above, below = (search_mse(sign * weight, plain, norm=2, weight=importance) for sign in (-1, 1))
    errors = [
        to_units((sign * weight - grid.quantize(sign * weight)).square() * importance, spec.block).sum((-3, -1))
        for sign, grid in ((-1, above), (1, below))
    ]
    step = torch.where(errors[0] <= errors[1], above.scale, -below.scale)
    return torch.stack([2 * step, -step])


def nearest(x: Tensor, alphas: Tensor) -> Tensor:
    """The bits [2, O, n] whose level is nearest to x [O, n] under factors [2, O, 1], |α₁| ≥ |α₂| of any sign."""
    first, second = alphas
    upper = (x - (first + second) / 2) * first >= 0
    return torch.stack([upper, (x - first * upper - second / 2) * second >= 0])


def values_of(bits: Tensor, alphas: Tensor) -> Tensor:
    """α₁b₁ + α₂b₂ [O, I] of bits [2, O, I] and factors [2, O, G]."""
    return (bits * alphas.repeat_interleave(bits.shape[-1] // alphas.shape[-1], -1)).sum(0)


def solved(
    weight: Tensor, bits: Tensor, alphas: Tensor, h: Tensor, groups: list[slice], spec: Spec
) -> tuple[Tensor, Tensor]:
    """The factors [2, O, G], as they can be stored, of least loss under fixed bits, one group's after the other's; the
    plane of the larger one comes first.

    With e = w - ŵ and a group's planes B [2, g], its own factors solve B H_gg Bᵀ α = B (H e)_g + B H_gg ŵ_g.
    """
    alphas, values = alphas.clone(), values_of(bits, alphas)
    error = weight - values
    for group, own in enumerate(groups):
        planes, part = bits[..., own].float(), h[own, own]
        target = (planes * (error @ h[:, own] + values[:, own] @ part)).sum(-1)
        first, second = planes @ part
        both = (first * planes[1]).sum(-1)
        square = torch.stack([(first * planes[0]).sum(-1), (second * planes[1]).sum(-1)])
        square = square + (_RIDGE * square.sum(0)).clamp_min(1e-12)
        solution = (square.flip(0) * target - both * target.flip(0)) / (square.prod(0) - both.square())
        alphas[..., group] = store_scale(solution.abs(), spec.scale).copysign(solution)
        better = (planes * alphas[..., group, None]).sum(0)
        error[:, own] += values[:, own] - better
        values[:, own] = better
    swapped = alphas[1].abs() > alphas[0].abs()
    bits = torch.where(swapped.repeat_interleave(groups[0].stop, -1), bits.flip(0), bits)
    return bits, torch.where(swapped, alphas.flip(0), alphas)


def _loss(error: Tensor, h: Tensor) -> float:
    """tr(E H Eᵀ)."""
    return float(((error @ h) * error).sum())


def _plane(bits: Tensor, alphas: Tensor, spec: Spec) -> QTensor:
    """α b as codes of one bit, for bits [O, I] and factors [O, G]."""
    negative = alphas < 0
    grid = Grid(replace(spec, number=_PLANE), alphas.abs(), negative.float())
    width = bits.shape[1] // alphas.shape[1]
    return QTensor((bits ^ negative.repeat_interleave(width, 1)).to(torch.uint8), grid)
