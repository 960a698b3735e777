"""PB-LLM (Shang et al. 2023): keep the few salient weights at 8 bits and make all others binary.

Salient are the part r of the weights with the largest |w|, or the largest w²/U_jj², U_jj² being what H⁻¹ leaves of
column j once the columns before it are fixed: the loss that dropping the weight would cost. They are rounded to 8 bits
between the smallest and largest value of their row; the others become μ ± α, the mean and the mean distance from it of
the others in their row. Masks and ranges come from the weights as they are. Then columns are rounded one by one, and
later columns repair the error as in GPTQ. The paper counts 8r + (1 - r) bits: where the salient weights are, one bit a
weight or a list of columns, comes on top, and so do the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.binary import binary, binary_grid, by_group, fit_binary, largest
from ..numerics.feedback import sweep
from ..numerics.grid import Grid, fit_range, unit_shape
from ..numerics.places import Regions, regions_bytes
from ..numerics.qtensor import QTensor, QWeight
from ..numerics.spec import Int, Spec, per_channel
from .base import Clip, Encoded, Round
from .views import Need, Stats

SALIENT = per_channel(Int(8, "asymmetric"))
"""The format of the salient part; its ranges are those of whole rows."""


@dataclass(frozen=True)
class PBLLM:
    """Settings.

    bits: of the average weight as the paper counts them. saliency: what weights are ranked by, within the scheme's
    groups of columns (whole matrices where it has none). statistics: over what μ and α are taken: "masked", the
    weights that become binary; "zeroed", the whole row with zeros for the salient ones, as the authors' code does;
    "matrix", one α = mean |w| for all, and no μ, as their code for training does. damp: added to H's diagonal, as a
    part of its mean. true_sequential: observe the inputs of each linear behind those done before it.
    """

    bits: float = 1.7
    saliency: Literal["hessian", "magnitude"] = "hessian"
    statistics: Literal["masked", "zeroed", "matrix"] = "masked"
    damp: float = 0.01
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"pbllm mixes 1 and 8 bits, so that bits lie between, not at {self.bits}")
        if self.damp <= 0:
            raise ValueError("damp must be positive")

    name: ClassVar[str] = "pbllm"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = binary(-1)
    maps: ClassVar[bool] = False

    @staticmethod
    def named(argument: str) -> PBLLM:
        """The method of a recipe's word: `pbllm-1.7` has 1.7 bits as the paper counts."""
        try:
            return PBLLM(bits=float(argument))
        except ValueError:
            raise ValueError(f"pbllm-{argument}: bits are a number from 1 to 8, as in pbllm-1.7") from None

    @property
    def salient(self) -> float:
        """r, the part of the weights that keep 8 bits."""
        return (self.bits - 1) / 7

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Weights are binary beside the salient ones, whatever else the scheme says of them than its groups."""
        if spec.bits != 1 or spec.block[0] != 1:
            raise ValueError(f"pbllm makes weights binary, and {spec} is not: write pbllm-1.7 or pbllm1.7-w1a16-g128")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Bits of one part, bytes of the other, which is which, and every row's scales."""
        rows, columns = shape
        groups = columns // unit_shape(torch.Size(shape), spec.block)[1]
        salient = round(self.salient * rows * columns)
        others = rows * columns - salient
        codes = -(-others // 8) + salient
        return codes + regions_bytes(shape, min(salient, others)) + 4 * rows * groups + 3 * rows

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """8r + (1 - r): codes alone."""
        return self.bits

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """The two parts of W [O, I]. Inputs never seen: ranked by magnitude, every weight rounded to nearest."""
        factor = None
        if stats is not None:
            factor, _, dead = stats.factor(self.damp, act_order=False)
            weight = weight.masked_fill(dead, 0.0)
        saliency = weight.abs()
        if factor is not None and self.saliency == "hessian":
            saliency = (weight / factor.diagonal()).square()
        salient = largest(saliency, self.salient, spec.group)
        eight, two = fit_range(weight, SALIENT), self._binary(weight, ~salient, binary(spec.group))
        reached = weight if factor is None else _swept(weight, factor, salient, eight, two)
        parts = (
            QTensor(two.encode(reached).where(~salient, 0), two, region=0),
            QTensor(eight.encode(reached).where(salient, 0), eight, region=1),
        )
        return Encoded(QWeight(parts, regions=Regions(salient.to(torch.uint8), 2)))

    def _binary(self, weight: Tensor, others: Tensor, spec: Spec) -> Grid:
        """The levels μ ± α of the weights that are not salient."""
        if self.statistics == "masked":
            return fit_binary(weight, spec, others)
        zeroed = weight.where(others, 0.0)
        grid = fit_binary(zeroed, spec)
        if self.statistics == "zeroed":
            return grid
        spread = zeroed.abs().sum() / others.sum().clamp_min(1)
        return binary_grid(torch.zeros_like(grid.scale), spread.expand_as(grid.scale), spec)


def _swept(weight: Tensor, factor: Tensor, salient: Tensor, eight: Grid, two: Grid) -> Tensor:
    """What every weight of W [O, I] was when its column came to be rounded, errors before it fed back."""
    reached, groups = torch.empty_like(weight), by_group(two)
    width = weight.shape[1] // len(groups)

    def round_column(column: int, values: Tensor) -> Tensor:
        reached[:, column] = values
        values = values[:, None]
        binary = groups[column // width].quantize(values)
        return torch.where(salient[:, column, None], eight.quantize(values), binary)[:, 0]

    sweep(weight, factor, round_column)
    return reached
