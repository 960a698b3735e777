"""RTN: round to nearest. The baseline of every table, and what a data-free run does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..numerics.grid import Grid, fit_range
from ..numerics.qtensor import QTensor
from ..numerics.spec import Spec
from .base import Clip
from .stacked import fitted
from .views import Need, Stats


@dataclass(frozen=True)
class MinMaxClip:
    """No clipping: codes cover the whole range of every unit."""

    name: ClassVar[str] = "minmax"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The min-max grid of W [O, I]."""
        return fit_range(weight, spec)


@dataclass(frozen=True)
class RTN:
    """Round every weight to the nearest level of its grid."""

    name: ClassVar[str] = "rtn"
    needs: ClassVar[frozenset[Need]] = frozenset()
    sequential: ClassVar[bool] = False

    def reorders(self, spec: Spec) -> bool:
        """Columns stay where they are."""
        return False

    def refits(self, spec: Spec) -> bool:
        """Ranges are those of the weights."""
        return False

    def round(self, weight: Tensor, spec: Spec, clip: Clip, stats: Stats | None, *, scores: bool) -> QTensor:
        """Codes for W [O, I] on the clip's grid."""
        grid = clip.fit(weight, spec, stats, scores=scores)
        return QTensor(grid.encode(weight), grid)

    def stacks(self, spec: Spec) -> bool:
        """For the sake of clips that search the ranges of many weights at once."""
        return True

    def round_stack(
        self, weights: Sequence[Tensor], spec: Spec, clip: Clip, stats: Sequence[Stats], *, scores: bool
    ) -> list[QTensor]:
        """`round` for weights [O, I] of one shape, each behind inputs of its own."""
        grids = fitted(clip, weights, spec, stats, scores=scores)
        return [QTensor(grid.encode(weight), grid) for weight, grid in zip(weights, grids, strict=True)]
