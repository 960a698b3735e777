"""HQQ (Badri & Shaji 2023): move every unit's zero-point, a real number, until large errors are few; no text.

A unit's scale s is that of its whole range and stays. Values are s q - o, the offset o any number (the paper's z s),
and what is minimised is Σ|w - ŵ|^p with p < 1, which forgives outliers. Half-quadratic splitting gives both steps of
every iteration in closed form: the error's part that p lets stand, e = sign(d) max(|d| - |d|^(p-1)/β, 0) with
d = w - ŵ, and the offset that fits all the rest, the mean of s q - (w - e).

Offsets are rounded to the 16 bits of the file in every iteration. Once the mean |d| of the matrix stops falling the
iteration ends, with the offsets of the least one. Rows or units must not end by themselves: they would stay with
offsets under which errors are small but lie to one side, which at 2 bits costs the outputs more than the weights gain.
So every linear comes alone.

It is a choice of ranges and not of codes: with `rtn` it is the paper's method, with `gptq` error feedback runs on its
grid.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.grid import Grid, to_units, unit_range
from ..numerics.scales import divided, store_scale
from ..numerics.spec import Int, Spec
from .views import Need, Stats

_CHUNK = 1 << 19
"""Elements worked on at once: their temporaries stay in a CPU's cache."""


@dataclass(frozen=True)
class HQQ:
    """Settings: iterations; norm p; beta, the first β, and growth, its factor per iteration; cap, the largest 1/s."""

    iterations: int = 20
    norm: float = 0.7
    beta: float = 10.0
    growth: float = 1.01
    cap: float = 2e4

    def __post_init__(self) -> None:
        if self.iterations < 0 or not 0 < self.norm < 1 or min(self.beta, self.growth, self.cap) <= 0:
            raise ValueError("iterations are not negative, the norm lies between 0 and 1, beta, growth, cap above 0")

    name: ClassVar[str] = "hqq"
    alone: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset()

    def outcomes(self, spec: Spec) -> tuple[Spec, ...]:
        """The same format, which must have room for an offset."""
        if spec.scale != "float16-min":
            raise ValueError(
                f"hqq moves the least value of a unit, and {spec} stores none: write rule: asymmetric, scale: "
                "float16-min"
            )
        return (spec,)

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The grid of W [O, I] with the offsets found."""
        low, high = unit_range(weight, spec.block)
        number = spec.number
        assert isinstance(number, Int)
        scale = store_scale(divided(high - low, number.high).clamp_min(1 / self.cap), "float16")
        units = to_units(weight.float(), spec.block)
        step = max(1, _CHUNK // units[0].numel())
        chunks = [slice(start, start + step) for start in range(0, len(units), step)]
        offset, least, beta = (-low).half().float(), float("inf"), self.beta
        best = offset
        for _ in range(self.iterations + 1):
            moved = [self._moved(units[c], scale[c], offset[c], number, beta) for c in chunks]
            loss = float(torch.stack([total for total, _ in moved]).sum())
            if loss >= least:
                break
            best, least = offset, loss
            offset, beta = torch.cat([found for _, found in moved]), beta * self.growth
        return Grid(spec, scale, offset=best)

    def _moved(self, w: Tensor, scale: Tensor, offset: Tensor, number: Int, beta: float) -> tuple[Tensor, Tensor]:
        """(Σ|d| under the offsets [R/r, C/c] of units w [R/r, r, C/c, c], what one iteration makes of the offsets)."""
        s, o = scale[:, None, :, None], offset[:, None, :, None]
        values = ((w + o) / s).round_().clamp_(0, number.high).mul_(s)
        error = w + o - values
        size = error.abs()
        kept = (size - size.clamp_min(1e-30).pow(self.norm - 1) / beta).clamp_min_(0).copysign(error)
        return size.sum(), (values - w + kept).mean((1, 3)).half().float()
