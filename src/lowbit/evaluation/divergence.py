"""How far a model's predictions are from the original's: KL divergence, top-1 agreement, cosine of the outputs.

Perplexity hides errors that cancel; these do not, and they need far fewer tokens to tell two good models apart. They
are sums over positions, so logits are compared piece by piece and never kept. T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """Distance from the original model over the predicted positions of windows.

    kl: mean of KL(original || model) in nats, over the whole vocabulary.
    top1: share of positions where both models' first choice is the same token.
    cosine: of the two models' logits, each window flattened to one vector; mean over windows.
    """

    kl: float
    top1: float
    cosine: float


@dataclass
class WindowDivergence:
    """Sums over the positions of one window, to which pieces of logits are added."""

    kl: float = 0.0
    same: int = 0
    positions: int = 0
    products: list[tuple[float, float, float]] = field(default_factory=list)

    def add(self, logits: Tensor, reference: Tensor) -> None:
        """Add positions: fp32 logits of the model and of the original, both [T, V]."""
        expected = reference.log_softmax(-1)
        log_ratio = expected - logits.log_softmax(-1)
        log_ratio.masked_fill_(expected == -math.inf, 0.0)  # a token the original rules out adds nothing, not 0 * nan
        self.kl += float((expected.exp_() * log_ratio).sum(-1).sum(dtype=torch.float64))
        self.same += int((logits.argmax(-1) == reference.argmax(-1)).sum())
        self.positions += logits.shape[0]
        x, y = logits.flatten(), reference.flatten()
        self.products.append((float(x @ y), float(x @ x), float(y @ y)))

    def cosine(self) -> float:
        """Cosine of everything added so far."""
        dot, mine, other = (math.fsum(parts) for parts in zip(*self.products, strict=True))
        return dot / math.sqrt(mine * other) if mine and other else 0.0


def divergence_of(windows: Iterable[WindowDivergence]) -> Divergence:
    """The mean over windows; every predicted position counts the same. Rounding below zero is cut off KL."""
    found = list(windows)
    positions = sum(window.positions for window in found)
    return Divergence(
        kl=max(0.0, math.fsum(window.kl for window in found) / positions),
        top1=sum(window.same for window in found) / positions,
        cosine=math.fsum(window.cosine() for window in found) / len(found),
    )


def divergence_over(texts: Sequence[tuple[Divergence, int]]) -> Divergence:
    """One figure for several texts scored with the same window length: (divergence, number of windows) of each."""
    total = sum(windows for _, windows in texts)

    def mean(values: Iterable[float]) -> float:
        return math.fsum(value * windows for value, (_, windows) in zip(values, texts, strict=True)) / total

    return Divergence(
        kl=mean(found.kl for found, _ in texts),
        top1=mean(found.top1 for found, _ in texts),
        cosine=mean(found.cosine for found, _ in texts),
    )
