"""GPTQ from the paper's formulas: fp64, H⁻¹ by `inv`, its Cholesky factor, one column at a time, no lazy blocks.

Beside its result it reports how close each row ever came to a rounding tie, where fp32 may fall either way.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from lowbit.numerics.spec import Float, Int, Number

F64 = torch.float64

Fit = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Columns of one group [O, g] -> scale [O], zero [O], and how close each row's choice came to a tie [O]."""


def float_values(number: Float) -> list[float]:
    """All values of a minifloat, from the definition ±2^(max(e,1)-bias) (m/2^M + [e>0])."""
    found = set()
    for e in range(2**number.exponent):
        for m in range(2**number.mantissa):
            value = 2.0 ** (max(e, 1) - number.bias) * (m / 2**number.mantissa + (e > 0))
            if value <= number.largest:
                found |= {value, -value}
    return sorted(found)


@cache
def levels_of(number: Number) -> Tensor:
    values = float_values(number) if isinstance(number, Float) else range(number.low, number.high + 1)
    return torch.tensor([float(value) for value in values], dtype=F64)


def nearest(values: Tensor, number: Number, zero: Tensor) -> tuple[Tensor, Tensor]:
    """(nearest level, distance to the tie as a part of the largest level) of values in units of the scale."""
    levels, shifted = levels_of(number), values + zero
    index = torch.searchsorted(levels, shifted).clamp(1, len(levels) - 1)
    low, high = levels[index - 1], levels[index]
    above = (shifted - low) - (high - shifted)
    return torch.where(above > 0, high, low) - zero, above.abs() / levels.abs().max()


def fit_ends(low: Tensor, high: Tensor, number: Number) -> tuple[Tensor, Tensor, Tensor]:
    """Scale and zero by the rule's formula from a unit's ends."""
    if isinstance(number, Int) and number.rule == "asymmetric":
        low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (2**number.bits - 1)
        zero = -low / scale
        return scale, zero.round(), (zero - zero.floor() - 0.5).abs() / number.high
    steps = number.largest if isinstance(number, Float) else (2**number.bits - 1) / 2
    unsigned = isinstance(number, Int) and number.rule == "symmetric-unsigned"
    scale = torch.maximum(high.abs(), low.abs()) / steps
    return scale, torch.full_like(scale, 2.0 ** (number.bits - 1) if unsigned else 0.0), torch.ones_like(scale)


def min_max(number: Number) -> Fit:
    return lambda values: fit_ends(values.amin(1), values.amax(1), number)


def least_error(number: Number) -> Fit:
    """The range search: p = 1, 0.99, … 0.21 times the ends, least Σ|ŵ - w|^2.4, the first wins."""

    def fit(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tried = []
        for i in range(80):
            p = 1 - i / 100
            scale, zero, tie = fit_ends(p * values.amin(1), p * values.amax(1), number)
            levels, _ = nearest(values / scale[:, None], number, zero[:, None])
            tried.append((scale, zero, tie, (levels * scale[:, None] - values).abs().pow(2.4).sum(1)))
        loss = torch.stack([t[3] for t in tried])
        best = loss.argmin(0)
        scale, zero, tie = (torch.stack([t[k] for t in tried]).gather(0, best[None])[0] for k in range(3))
        two = loss.topk(2, 0, largest=False).values
        return scale, zero, torch.minimum(tie, (two[1] - two[0]) / two[1])

    return fit


@dataclass
class Oracle:
    """What GPTQ makes of W [O, I]: levels, and scale and zero of every weight, in natural order."""

    weight: Tensor
    h: Tensor
    number: Number
    group: int
    act_order: bool = False
    groups: Literal["static", "fresh", "stale"] = "static"
    fit: Fit | None = None
    damp: float = 0.01
    scale: Tensor = field(init=False)
    zero: Tensor = field(init=False)
    levels: Tensor = field(init=False)
    tie: Tensor = field(init=False)
    order: Tensor = field(init=False)

    def __post_init__(self) -> None:
        w, h = self.weight.double(), self.h.double()
        dead = h.diagonal() == 0
        w[:, dead], h[dead, dead] = 0.0, 1.0
        self.fit = self.fit or min_max(self.number)
        self.scale, self.zero, self.levels = torch.empty_like(w), torch.empty_like(w), torch.empty_like(w)
        self.tie = torch.ones(len(w), dtype=F64)
        if self.groups == "static":
            for a in range(0, w.shape[1], self.group):
                self._fit(slice(a, a + self.group), w[:, a : a + self.group])
        key = h.diagonal().masked_fill(dead, 0.0)
        self.order = key.argsort(descending=True, stable=True) if self.act_order else torch.arange(w.shape[1])
        damping = self.damp * (h.diagonal() * ~dead).mean()
        damped = h[self.order][:, self.order] + damping * torch.eye(len(h), dtype=F64)
        u = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        self._sweep(w[:, self.order], u)

    def _fit(self, columns: slice | Tensor, values: Tensor) -> None:
        assert self.fit is not None
        scale, zero, tie = self.fit(values)
        self.scale[:, columns], self.zero[:, columns] = scale[:, None], zero[:, None]
        self.tie = torch.minimum(self.tie, tie)

    def _sweep(self, w: Tensor, u: Tensor) -> None:
        count = w.shape[1]
        lagging = w.clone()
        for i in range(count):
            if i % 128 == 0:
                lagging = w.clone()  # the reference's W, which gets the corrections of a block when it is done
            if self.groups != "static" and i % self.group == 0:
                members = self.order[i : i + self.group]
                self._fit(members, (w if self.groups == "fresh" else lagging)[:, i : i + self.group])
            c = int(self.order[i])
            self.levels[:, c], tie = nearest(w[:, i] / self.scale[:, c], self.number, self.zero[:, c])
            self.tie = torch.minimum(self.tie, tie)
            error = (w[:, i] - self.levels[:, c] * self.scale[:, c]) / u[i, i]
            w[:, i + 1 :] -= error[:, None] * u[i, i + 1 :]

    @property
    def values(self) -> Tensor:
        return self.levels * self.scale
