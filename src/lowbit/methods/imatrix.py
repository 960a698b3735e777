"""Imatrix: fit a K-quant's scales and least values with an importance matrix, as llama.cpp's quantizer does, and on.

The error of a weight counts as much as its input channel: Σ_i h_i (ŵ_i - w_i)², h the Gram matrix's diagonal. Units
are fitted alone first: for a row of candidate step sizes codes are rounded, and the scale and least value that fit
those codes best are the solution of a 2 x 2 system. Then the super-block's two fp16 numbers are what the units' results
need, and from there on two half steps repeat, neither of which can make the error larger: the two numbers that fit all
codes and integers of the super-block best, and for every unit the best neighbouring integers with codes rounded anew.
llama.cpp stops after the first. Formats other than K-quants get AWQ's clip.

Shape letters: R rows, S super-blocks, U units of one, w columns of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.grid import Grid
from ..numerics.kquant import by_super, check_columns, layout, store_outer, stored, to_offset_codes, to_scale_codes
from ..numerics.spec import SUPER, Int, Spec
from .awq import AWQClip
from .views import Need, Stats

_CHUNK = 1 << 20
"""Weights fitted at once."""


@dataclass(frozen=True)
class Imatrix:
    """Settings. candidates: step sizes tried for every unit. rounds: repetitions of the two half steps."""

    candidates: int = 16
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.rounds < 0:
            raise ValueError("candidates must be at least 1 and rounds at least 0")

    name: ClassVar[str] = "imatrix"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The grid for W [O, I]; inputs never seen count alike."""
        if spec.scale != "kquant":
            return AWQClip().fit(weight, spec, stats, scores=scores)
        importance = torch.ones(weight.shape[1], device=weight.device)
        if stats is not None:
            importance = stats.hessian().diagonal() / max(1, stats.tokens)
        return fit_kquant(weight, spec, importance, candidates=self.candidates, rounds=self.rounds)


def fit_kquant(weight: Tensor, spec: Spec, importance: Tensor, *, candidates: int, rounds: int) -> Grid:
    """The grid of least Σ h (ŵ - w)² for W [O, I] with h [I], a K-quant. Raises ValueError unless 256 divides I."""
    check_columns(weight.shape[1])
    step = max(1, _CHUNK // weight.shape[1])
    h = importance.float().clamp_min(importance.mean() * 1e-6 + 1e-30)
    fits = [_Fit(weight[i : i + step], spec, h) for i in range(0, len(weight), step)]
    for fit in fits:
        fit.start(candidates)
        for _ in range(rounds):
            fit.refit_outer()
            fit.refit_units()
    scale, offset = (torch.cat([getattr(fit, name) for fit in fits]) for name in ("scale", "offset"))
    outer = torch.cat([fit.outer for fit in fits])
    return Grid(spec, scale, None, outer, offset if layout(spec).minima else None)


class _Fit:
    """The fit of some rows; `scale` and `offset` [R, S·U] and `outer` [R, S, 1 or 2] are its state, as stored."""

    scale: Tensor
    offset: Tensor
    outer: Tensor

    def __init__(self, weight: Tensor, spec: Spec, importance: Tensor) -> None:
        self.spec, self.form, self.low, self.high = spec, layout(spec), *_limits(spec)
        self.x = by_super(weight.float(), self.form.width)
        self.h = by_super(importance, self.form.width).expand_as(self.x)

    def start(self, candidates: int) -> None:
        """Units alone, then what of them can be stored."""
        fit = self._unit_with_minimum if self.form.minima else self._unit
        scale, offset = fit(candidates)
        self._store(scale, offset, None)

    def _store(self, scale: Tensor, offset: Tensor, outer: Tensor | None) -> None:
        self.scale, least, self.outer = stored(scale, offset if self.form.minima else None, self.spec, outer)
        self.offset = torch.zeros_like(self.scale) if least is None else least

    def levels(self, scale: Tensor, offset: Tensor) -> Tensor:
        """Codes [R, S·U, w], as floats."""
        levels: Tensor = ((self.x + offset[..., None]) / scale[..., None]).round_().clamp_(self.low, self.high)
        return levels

    def error(self, scale: Tensor, offset: Tensor, levels: Tensor) -> Tensor:
        """Σ h (ŵ - w)² of every unit [R, S·U]."""
        difference = (levels * scale[..., None]).sub_(offset[..., None]).sub_(self.x)
        total: Tensor = (difference.square_() * self.h).sum(-1)
        return total

    # --- units alone --------------------------------------------------------------------------------------------------

    def _unit_with_minimum(self, candidates: int) -> tuple[Tensor, Tensor]:
        """Ideal (scale, offset): the best of some step sizes around that of the full range."""
        low, top = self.x.amin(-1).clamp_max(0), self.x.amax(-1)
        span = (top - low).clamp_min(1e-30)
        best = span / self.high, -low
        least = self.error(*best, self.levels(*best))
        for k in range(candidates):
            q = self.levels(span / self._steps(self.high, k, candidates), -low)
            scale, offset = self._solve(q)
            loss = self.error(scale, offset, self.levels(scale, offset))
            better = loss < least
            least = torch.where(better, loss, least)
            best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
        return best

    @staticmethod
    def _steps(largest: int, k: int, candidates: int) -> float:
        """Steps that the k-th candidate divides the range into: from one more than there are codes to 15 % fewer."""
        return largest + 0.9 - (0.9 + max(1.0, 0.15 * largest)) * k / max(1, candidates - 1)

    def _solve(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """The scale and the offset, not negative, that fit codes best."""
        h, x = self.h, self.x
        hq = h * q
        s0, s1, s2 = h.sum(-1), hq.sum(-1), (hq * q).sum(-1)
        t0, t1 = (h * x).sum(-1), (hq * x).sum(-1)
        determinant = s0 * s2 - s1 * s1
        sound = determinant > 1e-12 * s0 * s2
        scale = torch.where(sound, (s0 * t1 - s1 * t0) / determinant, 0.0)
        offset = torch.where(sound, (s1 * t1 - s2 * t0) / determinant, -1.0)
        alone = torch.where(s2 > 0, t1 / s2, 0.0)
        scale = torch.where(offset < 0, alone, scale).clamp_min(1e-30)
        return scale, offset.clamp_min(0)

    def _unit(self, candidates: int) -> tuple[Tensor, Tensor]:
        """Ideal scales of either sign: the end of the range that has a code more takes the larger magnitude."""
        place = self.x.abs().argmax(-1, keepdim=True)
        extreme = self.x.gather(-1, place)[..., 0]
        extreme = torch.where(extreme == 0, 1e-30, extreme)
        offset = torch.zeros_like(extreme)
        best, least = extreme / self.low, torch.full_like(extreme, torch.inf)
        for k in range(candidates):
            for sign in (1, -1):
                q = self.levels(sign * extreme / self._steps(-self.low, k, candidates), offset)
                hq = self.h * q
                scale = (hq * self.x).sum(-1) / (hq * q).sum(-1).clamp_min(1e-30)
                scale = torch.where(scale == 0, extreme / self.low, scale)
                loss = self.error(scale, offset, self.levels(scale, offset))
                better = loss < least
                least, best = torch.where(better, loss, least), torch.where(better, scale, best)
        return best, offset

    # --- half steps ---------------------------------------------------------------------------------------------------

    def refit_outer(self) -> None:
        """The super-blocks' fp16 numbers that fit the present integers and codes best, where they are better."""
        c = to_scale_codes(self.scale, self.outer, self.spec).float()
        m = to_offset_codes(self.offset, self.outer, self.spec).float() if self.form.minima else torch.zeros_like(c)
        q = self.levels(self.scale, self.offset)
        a, b = self._by_super(q * c[..., None]), self._by_super(m[..., None].expand_as(q))
        x, h = self._by_super(self.x), self._by_super(self.h)
        aa, ab, bb = ((h * u * v).sum(-1) for u, v in ((a, a), (a, b), (b, b)))
        ax, bx = (h * a * x).sum(-1), (h * b * x).sum(-1)
        determinant = aa * bb - ab * ab
        both = determinant > 1e-9 * aa * bb
        d = torch.where(both, (bb * ax - ab * bx) / determinant, ax / aa.clamp_min(1e-30))
        e = torch.where(both, (ab * ax - aa * bx) / determinant, 0.0)
        sound = (d > 0) & (e >= 0)
        d = store_outer(torch.where(sound, d, self.outer[..., 0])).clamp_min(2.0**-24)
        outer = d[..., None]
        if self.form.minima:
            outer = torch.stack([d, torch.where(sound, store_outer(e), self.outer[..., 1])], -1)
        before = self.scale, self.offset, self.outer
        error = self.error(self.scale, self.offset, q)
        u = self.form.units
        self.scale, self.offset = c * d.repeat_interleave(u, -1), m * outer[..., -1].repeat_interleave(u, -1)
        if not self.form.minima:
            self.offset = before[1]
        after = self.error(self.scale, self.offset, self.levels(self.scale, self.offset))
        better = by_super(after, u).sum(-1) < by_super(error, u).sum(-1)
        wide = better.repeat_interleave(u, -1)
        self.scale = torch.where(wide, self.scale, before[0])
        self.offset = torch.where(wide, self.offset, before[1])
        self.outer = torch.where(better[..., None], outer, before[2])

    def _by_super(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), -1, SUPER)

    def refit_units(self) -> None:
        """For every unit the best integers near the present ones."""
        u = self.form.units
        d = self.outer[..., 0].repeat_interleave(u, -1)
        e = self.outer[..., -1].repeat_interleave(u, -1)
        c = to_scale_codes(self.scale, self.outer, self.spec).float()
        best = self.scale, self.offset
        least = self.error(*best, self.levels(*best))
        total = self.h.sum(-1)
        for change in (-2, -1, 0, 1, 2):
            scale, offset = self._nearby(c + change, d), self.offset
            for _ in range(2 if self.form.minima else 1):
                q = self.levels(scale, offset)
                if self.form.minima:
                    ideal = ((q * scale[..., None] - self.x) * self.h).sum(-1) / total
                    m = torch.where(e > 0, ideal / e, 0.0).round().clamp(0, self.form.largest)
                    offset = m * e
                    q = self.levels(scale, offset)
                loss = self.error(scale, offset, q)
                better = loss < least
                least = torch.where(better, loss, least)
                best = torch.where(better, scale, best[0]), torch.where(better, offset, best[1])
        self.scale, self.offset = best

    def _nearby(self, c: Tensor, d: Tensor) -> Tensor:
        """Scales of integers that are not zero and can be stored."""
        c = c.clamp(1 if self.form.minima else -self.form.largest - 1, self.form.largest)
        return torch.where(c == 0, 1.0, c) * d


def _limits(spec: Spec) -> tuple[int, int]:
    assert isinstance(spec.number, Int)
    return spec.number.low, spec.number.high
