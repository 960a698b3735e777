"""SmoothQuant (Xiao et al. 2022): move activation outliers into the weights, half-way by default.

Per input channel, s = amax|X|^α / amax|W|^(1-α); inputs are divided by s and weights multiplied, so that at α = 0.5
both end up with the same range. The paper folds s into norms only (queries, keys, values; gate and up); `all_edges`
extends it to o_proj and down_proj, which helps at 4-bit weights. DGQ smooths in front of down_proj the few channels of
the largest inputs only (`down_part`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..graph.anatomy import Norm
from .views import EdgeView, Fold, Need


@dataclass(frozen=True)
class SmoothQuant:
    """Settings: migration strength α in [0, 1]; all_edges, whether linears not behind a norm are smoothed too, or
    down_part, which part of the channels in front of the feed-forward's last linear is, those of the largest inputs.
    """

    alpha: float = 0.5
    all_edges: bool = False
    down_part: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha", "down_part"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, not {getattr(self, name)}")

    name: ClassVar[str] = "smoothquant"
    needs: ClassVar[frozenset[Need]] = frozenset({"minmax"})
    replays: ClassVar[bool] = False

    def fold(self, view: EdgeView) -> Fold | None:
        """s over the edge's source channels; 1 where the inputs are always zero, or not finite."""
        whole = self.all_edges or isinstance(view.edge.source, Norm)
        if not whole and not (self.down_part and view.edge.kind == "up"):
            return None
        amax_x = view.to_source(view.amax)
        amax_w = view.to_source(torch.stack([weight.abs().amax(0) for weight in view.weights]).amax(0))
        scale = amax_x.pow(self.alpha) / amax_w.clamp_min(1e-5).pow(1 - self.alpha)
        scale = torch.where((amax_x > 0) & scale.isfinite(), scale.clamp_min(1e-5), 1.0)
        if not whole:
            others = amax_x.argsort(descending=True, stable=True)[max(1, round(self.down_part * len(scale))) :]
            scale[others] = 1.0
        return Fold(scale)
