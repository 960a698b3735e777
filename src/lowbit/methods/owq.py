"""OWQ (Lee et al. 2023): the few weak columns of a weight keep 16 bits, and GPTQ rounds the others beside them.

Columns whose inputs are large make much of every error: λ_j = H_jj ‖ΔW_:,j‖² is what plain rounding of column j costs,
ΔW its error. The columns of the largest λ stay. A hundredth of a bit per weight buys one column in 1300 at 3 bits, and
is what the paper's 3.01 bits are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.qtensor import QWeight
from ..numerics.spec import Spec
from .base import Clip, Encoded, Round
from .beside import bits_beside, bytes_beside, round_beside
from .gptq import GPTQ
from .rtn import RTN
from .views import Need, Stats

_EXTRA = 0.01
"""Bits per weight that weak columns cost where nothing is said."""


@dataclass(frozen=True)
class OWQ:
    """Settings. bits: bits per weight to spend on codes and weak columns together, scales apart: 3.01 for instance;
    None for a hundredth more than the codes. columns: so many weak columns instead. At least one stays unless columns
    is 0. damp, act_order: GPTQ's. true_sequential: observe the inputs of each linear behind those done before it.
    """

    bits: float | None = None
    columns: int | None = None
    damp: float = 0.01
    act_order: bool = True
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if self.bits is not None and self.columns is not None:
            raise ValueError("bits and columns both say how many columns stay: keep one of them")
        if (self.columns or 0) < 0 or (self.bits or 1) <= 0 or self.damp <= 0:
            raise ValueError("columns is not negative, and bits and damp are positive")

    name: ClassVar[str] = "owq"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = None
    maps: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def count(self, inputs: int, spec: Spec) -> int:
        """How many of so many columns stay: b + (16 - b) k/I bits are not more than there are, but for the first."""
        if self.columns is not None:
            return self.columns
        extra = _EXTRA if self.bits is None else self.bits - spec.bits
        return max(1, int(inputs * extra / (16 - spec.bits) + 1e-6))

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Raise ValueError where the codes alone are more than `bits`, or all columns would stay."""
        if self.bits is not None and self.bits < spec.bits:
            raise ValueError(
                f"{spec.bits}-bit codes are more than owq.bits={self.bits:g}: raise it, or take fewer bits"
            )
        if self.count(shape[1], spec) >= shape[1]:
            raise ValueError(f"owq would keep all {shape[1]} columns: lower owq.bits or owq.columns")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Bytes of a weight [O, I] and its weak columns."""
        return bytes_beside(shape, self.count(shape[1], spec), spec)

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Bits of the codes, and 16 of the weak columns."""
        return bits_beside(shape, self.count(shape[1], spec), spec)

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """W [O, I] in codes and fp16 columns; inputs never seen (stats None) are rounded to nearest, all of them."""
        if stats is None:
            return Encoded(QWeight((RTN().round(weight, spec, clip, None, scores=scores),)))
        change = clip.fit(weight, spec, stats, scores=scores).quantize(weight) - weight
        weak = sensitivity(change, stats.hessian()).argsort(descending=True, stable=True)
        stays = torch.zeros(weight.shape[1], dtype=torch.bool, device=weight.device)
        stays[weak[: self.count(weight.shape[1], spec)]] = True
        gptq = GPTQ(damp=self.damp, act_order=self.act_order)
        return Encoded(round_beside(weight, stays, spec, gptq, clip, stats, scores=scores))


def sensitivity(change: Tensor, h: Tensor) -> Tensor:
    """λ_j = H_jj ‖ΔW_:,j‖² [I] of a change ΔW [O, I] of a weight."""
    return h.diagonal() * change.square().sum(0)
