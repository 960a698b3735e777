"""SmoothQuant (Xiao et al. 2022): move activation outliers into the weights, half-way by default.

Per input channel, s = amax|X|^α / amax|W|^(1-α); inputs are divided by s and weights multiplied, so that at α = 0.5
both end up with the same range. The paper folds s into norms only (queries, keys, values; gate and up); `all_edges`
extends it to o_proj and down_proj, which helps at 4-bit weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..graph.anatomy import Norm
from .base import EdgeView, Fold, Need


@dataclass(frozen=True)
class SmoothQuant:
    """Settings: migration strength α in [0, 1], and whether linears not behind a norm are smoothed too."""

    alpha: float = 0.5
    all_edges: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")

    name: ClassVar[str] = "smoothquant"
    needs: ClassVar[frozenset[Need]] = frozenset({"minmax"})
    replays: ClassVar[bool] = False

    def fold(self, view: EdgeView) -> Fold | None:
        """s over the edge's source channels; 1 where the inputs are always zero, or not finite."""
        if not self.all_edges and not isinstance(view.edge.source, Norm):
            return None
        amax_x = view.to_source(view.amax)
        amax_w = view.to_source(torch.stack([weight.abs().amax(0) for weight in view.weights]).amax(0))
        scale = amax_x.pow(self.alpha) / amax_w.clamp_min(1e-5).pow(1 - self.alpha)
        return Fold(torch.where((amax_x > 0) & scale.isfinite(), scale.clamp_min(1e-5), 1.0))
