"""MSE clip: shrink every unit's range until the rounding error is least (the search in GPTQ's reference quantizer)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..numerics.grid import Grid, search_mse
from ..numerics.spec import Spec
from .views import Need, Stats


@dataclass(frozen=True)
class MSEClip:
    """Least Σ|ŵ - w|^norm over ranges shrunk in steps of 1/grid by at most `maxshrink`."""

    grid: int = 100
    maxshrink: float = 0.8
    norm: float = 2.4

    def __post_init__(self) -> None:
        if self.norm <= 0 or self.grid < 1 or not 0 < self.maxshrink <= 1 or int(self.maxshrink * self.grid) < 1:
            raise ValueError("norm must be positive, grid at least 1, and maxshrink in (0, 1] leave one step of it")

    name: ClassVar[str] = "mse"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The searched grid of W [O, I]."""
        return search_mse(weight, spec, grid=self.grid, maxshrink=self.maxshrink, norm=self.norm)
