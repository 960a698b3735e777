"""What all pruning shares: how much is dropped, exact counts by index, and how the entries that stay are stored.

Pruned weights are stored as what is kept and a bit for every entry: 16-bit values, or, where the recipe has a weight
format, codes for the kept entries alone. Dropped entries have no code, so zeros are exact whatever the grid.

Shape letters: O output rows, I input columns; M consecutive inputs of a row (N:M leaves N of every M out).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from ..numerics.bits import packed_length
from ..numerics.places import Regions, Sparse, regions_bytes, sparse_bytes
from ..numerics.qtensor import QTensor, QWeight
from ..numerics.sizes import grid_bytes
from ..numerics.spec import BF16, Spec
from .base import Clip, Encoded, Round
from .gptq import GPTQ
from .views import Stats

_PATTERN = re.compile(r"(?P<percent>[0-9]+(\.[0-9]+)?)|(?P<zeros>[0-9]+):(?P<among>[1-9][0-9]*)")


@dataclass(frozen=True)
class Pruning:
    """Settings of every pruning method: sparsity, the part of the entries that is dropped; among: M, to drop that part
    of every M consecutive inputs of a row (2:4 is sparsity 0.5 among 4), or 0.
    """

    sparsity: float = 0.5
    among: int = 0

    rounds: ClassVar[frozenset[str]] = frozenset({"gptq"})
    own: ClassVar[Spec | None] = Spec(BF16)
    maps: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity <= 1:
            raise ValueError(f"sparsity is the part that is dropped, from 0 to 1, not {self.sparsity}")
        if self.among < 0 or abs(self.sparsity * self.among - round(self.sparsity * self.among)) > 1e-6:
            raise ValueError(f"{self.sparsity} of {self.among} inputs is no whole number: for 2:4 take 0.5 among 4")

    @classmethod
    def named(cls, argument: str) -> Self:
        """The method of a recipe's word: `wanda50` drops 50 per cent, `wanda2:4` two of every four inputs."""
        match = _PATTERN.fullmatch(argument)
        if match is None:
            raise ValueError(f"cannot read {argument!r}: write per cent as in 50, or N:M zeros as in 2:4")
        if match["among"] is None:
            return cls(float(match["percent"]) / 100)
        return cls(int(match["zeros"]) / int(match["among"]), int(match["among"]))

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Raise ValueError where M does not divide the rows of a weight [O, I]."""
        if self.among and shape[1] % self.among:
            raise ValueError(
                f"{round(self.sparsity * self.among)}:{self.among} does not divide {shape[1]} inputs: "
                f"choose a divisor, or a part such as {100 * self.sparsity:g} per cent"
            )

    def kept(self, shape: tuple[int, int]) -> int:
        """How many entries of a weight [O, I] stay: exact where rows are compared, else to within rounding."""
        rows, columns = shape
        return rows * (columns - count(self.sparsity, columns))

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Bytes of the kept entries of a weight [O, I], their scales, and a bit for every entry."""
        kept = self.kept(shape)
        if spec.number == BF16:
            return sparse_bytes(shape, kept, "bitmap")
        places = regions_bytes(shape, min(kept, shape[0] * shape[1] - kept))
        return packed_length(kept, spec.bits) + grid_bytes(shape, spec) + places

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Bits per weight as SparseGPT counts them: those of the kept entries, and a bit mask; scales are left out."""
        return (1 - self.sparsity) * spec.bits + 1


# --- which entries go -------------------------------------------------------------------------------------------------


def count(sparsity: float, size: int) -> int:
    """⌊s·n⌋, with s as it was written: 0.29 of 100 are 29, whatever binary fractions say."""
    return int(sparsity * size + 1e-6)


def least(scores: Tensor, number: int) -> Tensor:
    """The `number` smallest of every row of scores [G, n], bool [G, n]; of equals the first. Thresholds miscount."""
    chosen = torch.sort(scores, dim=-1, stable=True).indices[:, :number]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, chosen, True)


def dropped(scores: Tensor, sparsity: float, size: int) -> Tensor:
    """The part `sparsity` of the smallest scores [O, I] within every `size` consecutive ones in row-major order."""
    groups = scores.reshape(-1, size)
    return least(groups, count(sparsity, size)).view(scores.shape)


# --- what stays -------------------------------------------------------------------------------------------------------


def storage_dtype(weight: Tensor) -> torch.dtype:
    """The 16-bit floats that hold W best: exactly the checkpoint's, where nothing was folded into it."""
    kinds = (torch.bfloat16, torch.float16)
    losses = [float((weight.to(kind).float() - weight).square().sum()) for kind in kinds]
    return kinds[losses.index(min(losses))]


def values(weight: Tensor, dropped: Tensor, dtype: torch.dtype) -> Encoded:
    """The entries of W [O, I] that are not dropped, in 16 bits."""
    return Encoded(QWeight((), sparse=Sparse.of(weight, ~dropped, "bitmap", dtype)))


def codes(part: QTensor, dropped: Tensor) -> Encoded:
    """Codes [O, I] for the entries that are not dropped: region 0; nothing covers region 1."""
    kept = QTensor(part.codes.masked_fill(dropped, 0), part.grid, part.order, region=0)
    return Encoded(QWeight((kept,), regions=Regions(dropped.to(torch.uint8), 2)))


def rounded(
    weight: Tensor, dropped: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool
) -> Encoded:
    """W [O, I] without what is dropped, in the recipe's format; GPTQ makes up for that as it does for rounding."""
    if spec.number == BF16:
        return values(weight, dropped, storage_dtype(weight))
    if isinstance(round, GPTQ):
        part = round.swept(weight, spec, clip, stats, scores=scores, dropped=dropped)
    else:
        part = round.round(weight.masked_fill(dropped, 0.0), spec, clip, stats, scores=scores)
    return codes(part, dropped)
