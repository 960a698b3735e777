"""Magnitude pruning (Han et al. 2015): the smallest weights of a matrix go, or of every M inputs of a row.

It looks at no inputs and repairs nothing, which is what makes it the baseline: language models have a few input
channels a hundred times larger than the others, and small weights behind those matter most.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..numerics.spec import Spec
from .base import Clip, Encoded, Round
from .sparsity import Pruning, count, dropped, rounded
from .views import Need, Stats


@dataclass(frozen=True)
class Magnitude(Pruning):
    """Settings: as for all pruning."""

    name: ClassVar[str] = "magnitude"
    needs: ClassVar[frozenset[Need]] = frozenset()
    sequential: ClassVar[bool] = False

    def kept(self, shape: tuple[int, int]) -> int:
        """How many entries of a weight [O, I] stay."""
        if self.among:
            return super().kept(shape)
        return shape[0] * shape[1] - count(self.sparsity, shape[0] * shape[1])

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """W [O, I] without its smallest entries."""
        mask = dropped(weight.abs(), self.sparsity, self.among or weight.numel())
        return rounded(weight, mask, spec, round, clip, stats, scores=scores)
