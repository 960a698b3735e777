"""GPTQ beside columns that keep 16 bits, from the papers' words: fp64, H⁻¹ by `inv`, the columns that stay come last.

As GPTQ's own oracle it reports how close each row came to a rounding tie, where fp32 may fall either way.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from gptq_oracle import F64, Fit, min_max, nearest
from torch import Tensor

from lowbit.methods.views import Stats
from lowbit.numerics.spec import Number

TIE = 2e-6
"""Distance to a rounding tie, as a part of the largest level, that fp32 noise cannot bridge."""


@dataclass
class Beside:
    """W [O, I] with the columns in `stays` in fp16: values in natural order, and every row's distance to a tie."""

    weight: Tensor
    h: Tensor
    stays: list[int]
    number: Number
    group: int
    act_order: bool = False
    fit: Fit | None = None
    damp: float = 0.01
    values: Tensor = field(init=False)
    tie: Tensor = field(init=False)

    def __post_init__(self) -> None:
        w, h = self.weight.double().clone(), self.h.double()
        fit = self.fit or min_max(self.number)
        columns = [j for j in range(w.shape[1]) if j not in self.stays]
        scale, zero = torch.empty_like(w), torch.empty_like(w)
        self.tie = torch.ones(len(w), dtype=F64)
        for first in range(0, w.shape[1], self.group):
            values = w[:, first : first + self.group].clone()
            values[:, [j - first for j in self.stays if first <= j < first + self.group]] = 0.0
            s, z, tie = fit(values)
            scale[:, first : first + self.group], zero[:, first : first + self.group] = s[:, None], z[:, None]
            self.tie = torch.minimum(self.tie, tie)
        if self.act_order:
            columns.sort(key=lambda j: -float(h[j, j]))
        order = columns + self.stays
        damped = h[order][:, order] + self.damp * h.diagonal().mean() * torch.eye(len(h), dtype=F64)
        u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        w = w[:, order]
        self.values = torch.empty_like(w)
        for i, j in enumerate(order):
            if j in self.stays:
                self.values[:, j] = w[:, i].half().double()
                continue
            levels, tie = nearest(w[:, i] / scale[:, j], self.number, zero[:, j])
            self.tie = torch.minimum(self.tie, tie)
            self.values[:, j] = levels * scale[:, j]
            w[:, i + 1 :] -= ((w[:, i] - self.values[:, j]) / u[i, i])[:, None] * u[i, i + 1 :]


def example(rows: int = 24, columns: int = 64, outliers: tuple[int, ...] = (5, 17, 40)) -> tuple[Tensor, Tensor]:
    """(a weight, correlated integer inputs of which some channels are large)."""
    torch.manual_seed(0)
    weight = 0.05 * torch.randn(rows, columns)
    mix = torch.eye(columns) + 0.7 * torch.randn(columns, columns) / columns**0.5
    x = (6 * torch.randn(300, columns) @ mix).round()
    x[:, outliers] *= 20
    return weight, x


def observe(x: Tensor) -> Stats:
    """What QUIK and OWQ know of inputs [T, I]."""
    stats = Stats.observing(frozenset({"gram", "minmax"}))
    stats.update(x)
    return stats
