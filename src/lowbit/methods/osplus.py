"""Outlier Suppression+ (Wei et al. 2023): centre every channel, then shrink the ones that reach beyond a threshold.

Shift: δ = (max + min)/2 per channel makes outlier channels symmetric, X' = X - δ; the biases of the readers take Wδ.
Scale: one threshold t for all channels, s_j = max(1, max_j/t, min_j/(-t)), so channels within ±t are left alone. t is
searched from the largest magnitude of X' down to `floor`, and the one whose quantized inputs and weights change the
inspected output least is taken. t = amax is plain rounding of X', so the result is never worse than that here.

Shifts go where the anatomy proves that they are lawful, which takes biases: nowhere in Llama. The output compared is
that of the edge's inspected module, over the recorded calls: attention and feed-forward whole, or the linear itself,
where the paper takes the product just before the next linear and the first batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..graph.anatomy import Norm
from .awq import rounded
from .views import EdgeView, Fold, Need


@dataclass(frozen=True)
class OSPlus:
    """Settings.

    shift: centre channels where that is lawful. floor: the smallest threshold tried (0.1 in the authors' code for
    Llama). steps, stride: at least so many thresholds, and as many as keep them no further apart than about the stride.
    all_edges: also linears that do not stand behind a norm.
    """

    shift: bool = True
    floor: float = 1.0
    steps: int = 100
    stride: float = 0.5
    all_edges: bool = True

    def __post_init__(self) -> None:
        if self.floor <= 0 or self.steps < 1 or self.stride <= 0:
            raise ValueError("floor and stride must be positive, and steps at least 1")

    name: ClassVar[str] = "osplus"
    needs: ClassVar[frozenset[Need]] = frozenset({"minmax", "gram"})
    replays: ClassVar[bool] = True

    def fold(self, view: EdgeView) -> Fold | None:
        """δ and the best s over the edge's source channels."""
        if not self.all_edges and not isinstance(view.edge.source, Norm):
            return None
        low, high = -view.to_source(-view.low), view.to_source(view.high)
        shift = (high + low) / 2 if self.shift and view.edge.shift else None
        if shift is not None:
            low, high = low - shift, high - shift
        best, least = torch.ones_like(low), float("inf")
        for t in self.thresholds(float(torch.maximum(high, -low).max())):
            scale = torch.stack([high / t, low / -t]).amax(0).clamp_min(1.0)
            loss = self._loss(view, scale, shift)
            if loss < least:
                best, least = scale, loss
        return Fold(best, shift)

    def thresholds(self, amax: float) -> list[float]:
        """t from amax down to the floor; none where there is nothing to shrink."""
        if not self.floor <= amax < float("inf"):
            return []
        steps = max(self.steps, int(amax / self.stride))
        return [amax + (self.floor - amax) * k / steps for k in range(steps + 1)]

    def _loss(self, view: EdgeView, scale: Tensor, shift: Tensor | None) -> float:
        spread = view.to_readers(scale)
        weights = rounded(view.weights, view.specs, spread)
        return view.error(weights, spread, None if shift is None else view.to_readers(shift))
