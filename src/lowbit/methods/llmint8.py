"""LLM.int8() (Dettmers et al. 2022): int8 products, but for the input channels that hold an outlier at that moment.

A channel in which some input of the call reaches the threshold is multiplied in 16 bits; what is left of every token
and every row of the weight is scaled by its largest magnitude over 127, multiplied as integers, scaled back and added.
Ranges of tokens are those of the channels that are left. The columns that meet outliers are taken from a 16-bit copy of
the weight, which makes the file three times as large as the codes; `weights: int8` stores none, and dequantizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.qtensor import Outliers, QWeight
from ..numerics.sizes import stored_bytes
from ..numerics.spec import Spec
from .base import Clip, Encoded, Round
from .views import Need, Stats


@dataclass(frozen=True)
class LLMInt8:
    """Settings. threshold: the magnitude from which an input is an outlier; 0 for none at all. weights: what outliers
    are multiplied with, the weight in fp16, or its codes ("int8").
    """

    threshold: float = 6.0
    weights: Literal["fp16", "int8"] = "fp16"

    def __post_init__(self) -> None:
        if self.threshold < 0:
            raise ValueError("the threshold is not negative: 0 is for no outliers")

    name: ClassVar[str] = "llmint8"
    needs: ClassVar[frozenset[Need]] = frozenset()
    rounds: ClassVar[frozenset[str]] = frozenset({"gptq"})
    own: ClassVar[Spec | None] = None
    maps: ClassVar[bool] = False
    sequential: ClassVar[bool] = False

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Raise ValueError where inputs are not quantized as they come."""
        if activation is None:
            raise ValueError("llmint8 takes outliers out of quantized inputs, and these are kept: write w8a8")
        if not activation.dynamic:
            raise ValueError("llmint8 ranges tokens without their outliers, and a static range has them: drop -static")

    def _copies(self) -> bool:
        return self.threshold > 0 and self.weights == "fp16"

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Bytes of codes and scales, and of the fp16 copy."""
        return stored_bytes(shape, spec) + (2 * shape[0] * shape[1] if self._copies() else 0)

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Bits of the codes: where outliers' columns come from is not counted."""
        return float(spec.bits)

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """Codes of W [O, I], and what tells and multiplies outliers."""
        rounded = QWeight((round.round(weight, spec, clip, stats, scores=scores),))
        if self.threshold == 0:
            return Encoded(rounded)
        copy = weight.to(torch.float16) if self._copies() else None
        return Encoded(rounded, outliers=Outliers(threshold=self.threshold, weight=copy))
