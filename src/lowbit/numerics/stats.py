"""What methods need to know of a linear's inputs, streamed: nothing here grows with the number of tokens.

Every statistic is over the rows of X [T, I] (T tokens, I input features), accumulates in fp32, and can be transported
through a diagonal map: where a fold divides the inputs by s, the statistics of the new inputs follow from the old ones
exactly, so a block need not be replayed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .precision import add_product, exact_products

_TILE = {"cpu": 512, "cuda": 2048}
"""Columns of a Gram tile. Only tiles on and above the diagonal are computed, 5/8 of the work at four tiles a side."""


class Gram:
    """The Gram matrix H = Σ x xᵀ [I, I], fp32, and the number of tokens behind it."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None
        self._whole = False
        """Whether the lower triangle is that of the upper one."""

    def update(self, x: Tensor) -> None:
        """Add inputs [T, I]. Whatever their dtype, products of bf16 inputs are exact and sums are fp32."""
        width = x.shape[-1]
        if self._sum is None:
            self._sum = torch.zeros(width, width, device=x.device)
        self._whole = False
        with exact_products(x) as x:
            for tile in self._tiles(width):
                add_product(self._sum[tile, tile.start :], x[:, tile].T, x[:, tile.start :])
        self.count += x.shape[0]

    @property
    def matrix(self) -> Tensor:
        """The full symmetric matrix Σ x xᵀ (not divided by the count), to be read only: it is the statistic itself."""
        assert self._sum is not None, "no inputs were observed"
        for tile in () if self._whole else self._tiles(len(self._sum)):
            upper = self._sum[tile, tile.start :].triu()
            upper[:, : len(upper)] += upper[:, : len(upper)].triu(1).T
            self._sum[tile, tile.start :] = upper
            self._sum[tile.start :, tile] = upper.T
        self._whole = True
        return self._sum

    def _tiles(self, width: int) -> Iterator[slice]:
        assert self._sum is not None
        step = _TILE["cuda" if self._sum.is_cuda else "cpu"]
        return (slice(start, start + step) for start in range(0, width, step))

    def merge(self, other: Gram) -> None:
        """Add what another has seen, for instance in another part of the text."""
        self._sum, self._whole = _added(self._sum, other._sum), False
        self.count += other.count

    @staticmethod
    def of(matrix: Tensor, count: int) -> Gram:
        """The statistic whose matrix is known already, for instance that of some columns alone."""
        gram = Gram()
        gram._sum, gram.count = matrix, count
        return gram

    def transport(self, scale: Tensor) -> None:
        """Inputs become x / scale, [I]."""
        if self._sum is not None:
            self._sum.div_(scale[:, None]).div_(scale)
            self._whole = False  # rounding is not the same on both sides


class AbsMean:
    """The mean magnitude of every input channel, [I]."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add inputs [T, I]; the sum is in fp32, since bf16 sums stall."""
        total = x.abs().sum(0, dtype=torch.float32)
        self._sum = total if self._sum is None else self._sum + total
        self.count += x.shape[0]

    @property
    def mean(self) -> Tensor:
        assert self._sum is not None, "no inputs were observed"
        return self._sum / self.count

    def merge(self, other: AbsMean) -> None:
        """Add what another has seen, for instance another expert behind the same norm."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
            self.count += other.count

    def transport(self, scale: Tensor) -> None:
        """Inputs become x / scale, [I]."""
        if self._sum is not None:
            self._sum = self._sum / scale.abs()


class Square:
    """The sum of squares of every input channel, [I]: the diagonal of a Gram matrix, at the price of a mean (Wanda)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add inputs [T, I]."""
        total = x.float().square().sum(0)
        self._sum = total if self._sum is None else self._sum + total

    def merge(self, other: Square) -> None:
        """Add what another has seen."""
        self._sum = _added(self._sum, other._sum)

    @property
    def norm(self) -> Tensor:
        """The Euclidean norm of every channel over all tokens, [I]."""
        assert self._sum is not None, "no inputs were observed"
        return self._sum.sqrt()

    def transport(self, scale: Tensor) -> None:
        """Inputs become x / scale, [I]."""
        if self._sum is not None:
            self._sum = self._sum / scale.square()


class MinMax:
    """The smallest and largest value of every input channel, [I] each."""

    def __init__(self) -> None:
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Add inputs [T, I]."""
        low, high = x.amin(0).float(), x.amax(0).float()
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)

    @property
    def amax(self) -> Tensor:
        """The largest magnitude of every channel."""
        assert self.low is not None and self.high is not None, "no inputs were observed"
        return torch.maximum(-self.low, self.high)

    def merge(self, other: MinMax) -> None:
        """Widen to cover what another has seen."""
        if other.low is not None and other.high is not None:
            self.low = other.low if self.low is None else torch.minimum(self.low, other.low)
            self.high = other.high if self.high is None else torch.maximum(self.high, other.high)

    def transport(self, scale: Tensor) -> None:
        """Inputs become x / scale, [I], scale positive."""
        if self.low is not None and self.high is not None:
            self.low, self.high = self.low / scale, self.high / scale


class Cross:
    """How far the inputs have drifted from the original model's: D = Σ (x̃ - x) xᵀ [I, I], fp32 (GPTAQ)."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None

    def update(self, x: Tensor, original: Tensor) -> None:
        """Add inputs x [T, I] and what the original model has in their place, x̃ [T, I]."""
        x = x.float()
        product = (original.float() - x).T @ x
        self._sum = product if self._sum is None else self._sum.add_(product)

    def merge(self, other: Cross) -> None:
        """Add what another has seen."""
        self._sum = _added(self._sum, other._sum)

    @property
    def seen(self) -> bool:
        """Whether both streams' inputs were ever observed together."""
        return self._sum is not None

    @property
    def matrix(self) -> Tensor:
        """D, to be read only: it is the statistic itself."""
        assert self._sum is not None, "no inputs were observed"
        return self._sum

    def transport(self, scale: Tensor) -> None:
        """Inputs of both models become x / scale, [I]."""
        if self._sum is not None:
            self._sum.div_(scale[:, None]).div_(scale)


def _added(total: Tensor | None, more: Tensor | None) -> Tensor | None:
    """The sum of two, in the place of the first; None where nothing was seen."""
    if total is None or more is None:
        return more if total is None else total
    return total.add_(more)


Statistic = Gram | AbsMean | Square | MinMax | Cross
