"""QUIK (Ashkboos et al. 2023): 4-bit weights and inputs, but for the few input channels that hold the outliers.

The channels of the largest inputs seen in calibration are known beforehand, keep 16 bits in the inputs and in the
weights' columns alike, and widen no range: neither that of the tokens nor that of the rows. GPTQ comes to those columns
last, so that all its errors end in them. The paper's layers keep 256 of 4096 channels, and as large a part of wider
inputs; the down projection, whose inputs have no such channels, takes 8 bits (`--override '*.down_proj=w8a8'`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.qtensor import Outliers, QWeight
from ..numerics.spec import Spec
from .base import Clip, Encoded, Round
from .beside import bits_beside, bytes_beside, round_beside
from .gptq import GPTQ
from .rtn import RTN
from .views import Need, Stats


@dataclass(frozen=True)
class QUIK:
    """Settings. columns: how many channels keep 16 bits: from 1 on a number of them, below it a part of the input's
    width. threshold: linears whose inputs do not exceed it keep none. damp, act_order: GPTQ's. true_sequential: observe
    the inputs of each linear behind those done before it.
    """

    columns: float = 0.0625
    threshold: float = 0.0
    damp: float = 0.01
    act_order: bool = False
    true_sequential: bool = True

    def __post_init__(self) -> None:
        if self.columns < 0 or (self.columns >= 1 and self.columns != int(self.columns)):
            raise ValueError("columns is a whole number of channels, or below 1 a part of them, and not negative")
        if self.threshold < 0 or self.damp <= 0:
            raise ValueError("the threshold is not negative, and damp is positive")

    name: ClassVar[str] = "quik"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram", "minmax"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = None
    maps: ClassVar[bool] = False

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def count(self, inputs: int) -> int:
        """How many of so many channels keep 16 bits."""
        return int(self.columns) if self.columns >= 1 else round(self.columns * inputs)

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Raise ValueError where all channels would stay, or where their range is calibrated with the others'."""
        if self.count(shape[1]) >= shape[1]:
            raise ValueError(
                f"quik would keep all {shape[1]} input channels: set quik.columns to a part such as 0.0625"
            )
        if activation is not None and not activation.dynamic:
            raise ValueError("quik leaves channels out of every token's range, and a static one has them: drop -static")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Bytes of a weight [O, I] whose inputs exceed the threshold."""
        count = self.count(shape[1])
        return bytes_beside(shape, count, spec) + 4 * count

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Bits of the codes, and 16 of the columns that stay."""
        return bits_beside(shape, self.count(shape[1]), spec)

    def outliers(self, stats: Stats) -> Tensor:
        """The channels of the largest inputs, bool [I]."""
        assert stats.minmax is not None
        amax = stats.minmax.amax
        stays = torch.zeros_like(amax, dtype=torch.bool)
        if float(amax.max()) > self.threshold:
            stays[amax.argsort(descending=True, stable=True)[: self.count(len(amax))]] = True
        return stays

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """W [O, I] in codes and fp16 columns; inputs never seen (stats None) are rounded to nearest, all of them."""
        if stats is None:
            return Encoded(QWeight((RTN().round(weight, spec, clip, None, scores=scores),)))
        stays = self.outliers(stats)
        gptq = GPTQ(damp=self.damp, act_order=self.act_order)
        rounded = round_beside(weight, stays, spec, gptq, clip, stats, scores=scores)
        columns = stays.nonzero().flatten().int()
        return Encoded(rounded, outliers=Outliers(columns) if len(columns) else None)
