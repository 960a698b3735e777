"""LoRC (Yao et al. 2023, ZeroQuant-V2): add back the largest directions of what rounding lost.

E = W - Ŵ has the singular value decomposition U Σ Vᵀ; A = U_r Σ_r^½ and B = Σ_r^½ V_rᵀ are the best rank r can do, and
the weight becomes Ŵ + A B. It comes after any rounding and trains nothing. The error of rounding is nearly full-rank on
Gaussian weights, so what it finds is structure: outlier rows and columns, and most of it at 2 and 3 bits.

The data-aware variant (not in the paper) weighs errors by the inputs: with H = S Sᵀ the SVD is that of E S, and
B = Σ_r^½ V_rᵀ S⁻¹, which minimises ‖(E - A B) S‖, the error of the outputs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.feedback import inverse_factor
from ..numerics.grid import fit_range
from ..numerics.qtensor import LowRank, QTensor, QWeight
from ..numerics.spec import Int, per_channel
from .views import Need, Stats


@dataclass(frozen=True)
class LoRC:
    """Settings: rank; bits of the factors, 16 or 8 (codes per row); aware: weigh errors by the inputs' Gram matrix,
    damped by `damp` times its mean.
    """

    rank: int = 8
    bits: Literal[16, 8] = 16
    aware: bool = False
    damp: float = 0.01

    def __post_init__(self) -> None:
        if self.rank < 0 or self.damp <= 0:
            raise ValueError("the rank is not negative, and damp is positive")

    name: ClassVar[str] = "lorc"

    @staticmethod
    def named(argument: str) -> LoRC:
        """The method of a recipe's word: `lorc32` has rank 32."""
        if not argument.isdecimal():
            raise ValueError(f"lorc{argument}: the rank is a whole number, as in lorc32")
        return LoRC(rank=int(argument))

    @property
    def needs(self) -> frozenset[Need]:
        """The Gram matrix, where errors are weighed by it."""
        return frozenset({"gram"}) if self.aware else frozenset()

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes of the factors of a weight [O, I]; INT8 rows have a 16-bit scale each."""
        rows, columns = shape
        rank = min(self.rank, rows, columns)
        if self.bits == 16:
            return 2 * rank * (rows + columns)
        return rank * (rows + columns) + 2 * (rows + rank) if rank else 0

    def correct(self, weight: Tensor, rounded: QWeight, stats: Stats | None) -> QWeight:
        """Ŵ + A B for W [O, I]; inputs never seen (stats None) count all alike."""
        if self.rank == 0:
            return rounded
        error = weight - rounded.dequantize()
        if self.aware and stats is not None and stats.gram is not None:
            u = inverse_factor(stats.hessian(), self.damp)  # UᵀU = H⁻¹, hence S = U⁻¹
            left, right = self._factors(torch.linalg.solve_triangular(u, error, upper=True, left=False))
            right = right @ u
        else:
            left, right = self._factors(error)
        return replace(rounded, low_rank=LowRank(self._stored(left), self._stored(right)))

    def _factors(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """(U_r Σ_r^½ [O, r], Σ_r^½ V_rᵀ [r, I])."""
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        root = s[: self.rank].sqrt()
        return u[:, : self.rank] * root, root[:, None] * v[: self.rank]

    def _stored(self, factor: Tensor) -> Tensor | QTensor:
        if self.bits == 16:
            return factor.to(torch.float16)
        grid = fit_range(factor, per_channel(Int(8)))
        return QTensor(grid.encode(factor), grid)
