"""What PB-LLM and BiLLM are made of, in double precision and plain loops: saliency, two levels, error feedback."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics.qtensor import QWeight

Levels = tuple[float, float]
"""The two values that one bit chooses from, the lower one first."""


def weight_and_stats(rows: int = 6, columns: int = 32, seed: int = 0) -> tuple[Tensor, Stats]:
    """W with a few large entries, and statistics of correlated inputs of which channel 3 is never excited."""
    generator = torch.Generator().manual_seed(seed)
    weight = 0.02 * torch.randn(rows, columns, generator=generator)
    weight *= 1 + 9 * (torch.rand(rows, columns, generator=generator) < 0.05)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(8 * columns, columns, generator=generator) @ mix
    x[:, 3] = 0
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return weight, stats


def outlier_heavy(rows: int = 128, columns: int = 256, seed: int = 0) -> tuple[Tensor, Stats]:
    """W and inputs with a few strong channels, and weights of which some are ten times the others."""
    generator = torch.Generator().manual_seed(seed)
    weight = (
        torch.randn(rows, columns, generator=generator) * (1 + 0.3 * torch.randn(columns, generator=generator)).abs()
    )
    weight *= 1 + 9 * (torch.rand(rows, columns, generator=generator) < 0.005)
    x = torch.randn(2048, 48, generator=generator) @ torch.randn(48, columns, generator=generator)
    x += torch.randn(2048, columns, generator=generator)
    x[:, torch.randperm(columns, generator=generator)[:6]] *= 12
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return 0.02 * weight, stats


def encoded(method, weight: Tensor, stats: Stats | None, spec=None) -> QWeight:
    """What a method that needs no Round and no Clip makes of W."""
    spec = method.own if spec is None else spec
    with torch.no_grad():
        return method.encode(weight, spec, RTN(), MinMaxClip(), stats, scores=False, seed=0).weight


def loss(weight: Tensor, value: Tensor, stats: Stats) -> float:
    """tr(E H Eᵀ) / tr(W H Wᵀ)."""
    h, error = stats.hessian().double(), (weight - value).double()
    return float((error @ h @ error.T).trace() / (weight.double() @ h @ weight.double().T).trace())


def inverse_factor(stats: Stats, damp: float = 0.01, order: list[int] | None = None) -> Tensor:
    """U upper triangular with UᵀU = (H + damp)⁻¹, H_jj = 1 for inputs that are never there, columns in this order."""
    h = stats.hessian().double().clone()
    dead = h.diagonal() == 0
    added = torch.where(dead, 1.0, damp * h.diagonal().mean())
    damped = h + added.diag()
    if order is not None:
        damped = damped[order][:, order]
    return torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)


def half(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float().half())


def two_levels(values: list[float], zeros: int = 0) -> Levels:
    """Mean ± mean distance of the values, and of as many zeros, as two fp16 numbers hold them."""
    values = values + [0.0] * zeros
    if not values:
        return stored(0.0, 0.0)
    mean = sum(values) / len(values)
    return stored(mean, sum(abs(v - mean) for v in values) / len(values))


def stored(mean: float, spread: float) -> Levels:
    """The levels around a mean that a file's scale 2α and offset α - μ give."""
    scale = max(half(2 * spread), 2.0**-24)
    low = -half(scale / 2 - mean)
    return low, low + scale


def nearest(value: float, levels: Levels) -> float:
    low, high = levels
    return high if value - low > high - value else low


def swept(weight: Tensor, u: Tensor, quantize: Callable[[int, int, float], float]) -> Tensor:
    """W column by column, every error spread over the columns behind it."""
    w = weight.double().clone()
    for j in range(w.shape[1]):
        for i in range(w.shape[0]):
            value = quantize(i, j, float(w[i, j]))
            error = (float(w[i, j]) - value) / float(u[j, j])
            w[i, j] = value
            w[i, j + 1 :] -= error * u[j, j + 1 :]
    return w
