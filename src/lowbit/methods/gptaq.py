"""GPTAQ (Li et al. 2025, GPTQv2): GPTQ that aims at the original model's outputs, not at those on drifted inputs.

X are the inputs that the quantized blocks in front give, X̃ those of the original model; ‖W X̃ - Ŵ X‖² is minimised
instead of ‖W X - Ŵ X‖². With D = Σ (x̃ - x) xᵀ and UᵀU = H⁻¹, column j takes, beside GPTQ's share of earlier errors,
w_i P_ij of every earlier column i, where P = α · triu(D Uᵀ, 1) U. The strict upper triangle is the paper's: a column
may only answer for those already rounded.

Without that mask and with α = 1 the objective is plain GPTQ's on W* = W (I + D H⁻¹), by least squares; `closed_form`
does that. It trusts D entirely, and overfits where the text is short: that is what α = 1/4 is for.

A mixture's experts see other tokens in each of the two streams, so nothing is known of their drift: they get GPTQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..numerics.qtensor import QTensor
from ..numerics.spec import Spec
from .base import Clip
from .gptq import GPTQ
from .views import Need, Stats


@dataclass(frozen=True)
class GPTAQ:
    """Settings: alpha, how much of the drift is made up for; closed_form, see above; the others are GPTQ's."""

    alpha: float = 0.25
    closed_form: bool = False
    damp: float = 0.01
    act_order: bool = True
    groups: Literal["static", "fresh", "stale"] = "static"
    block: int = 128

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")
        self._gptq()

    name: ClassVar[str] = "gptaq"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram", "cross"})
    sequential: ClassVar[bool] = False

    def _gptq(self) -> GPTQ:
        return GPTQ(self.damp, self.act_order, self.groups, true_sequential=False, block=self.block)

    def reorders(self, spec: Spec) -> bool:
        """As GPTQ does."""
        return self._gptq().reorders(spec)

    def refits(self, spec: Spec) -> bool:
        """As GPTQ does."""
        return self._gptq().refits(spec)

    def stacks(self, spec: Spec) -> bool:
        """As GPTQ does: it is a mixture's experts that come as a stack."""
        return self._gptq().stacks(spec)

    def round_stack(
        self, weights: Sequence[Tensor], spec: Spec, clip: Clip, stats: Sequence[Stats], *, scores: bool
    ) -> list[QTensor]:
        """`round` for weights [O, I] of one shape, each behind inputs of its own, of whose drift nothing is known."""
        assert not any(seen.cross is not None and seen.cross.seen for seen in stats), "experts' inputs are not compared"
        return self._gptq().round_stack(weights, spec, clip, stats, scores=scores)

    def round(self, weight: Tensor, spec: Spec, clip: Clip, stats: Stats | None, *, scores: bool) -> QTensor:
        """Codes for W [O, I]. Inputs never seen (stats None) fall back to rounding to nearest."""
        if stats is None or stats.cross is None or not stats.cross.seen:
            return self._gptq().round(weight, spec, clip, stats, scores=scores)
        u, order, dead = stats.factor(self.damp, self.act_order)
        d = stats.cross.matrix.masked_fill(dead[:, None] | dead, 0.0)
        if order is not None:
            d = d[order][:, order]
        drift = self.alpha * (d @ u.T if self.closed_form else (d @ u.T).triu(1)) @ u
        if not self.closed_form:
            return self._gptq().swept(weight, spec, clip, stats, scores=scores, drift=drift)
        natural = slice(None) if order is None else order.argsort()
        moved = weight + weight @ drift[natural][:, natural]
        return self._gptq().round(moved, spec, clip, stats, scores=scores)
