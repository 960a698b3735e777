"""QuIP (Chee et al. 2023): two bits by incoherence: turn W and H until nothing stands out, then round with feedback.

Columns are first rescaled by D_j = (H_jj / ‖W_:j‖²)^¼, which balances what a column weighs and what it is weighed by;
then W D is multiplied by random orthogonal matrices from both sides, H from one. What remains is close to Gaussian, so
one scalar range of ρ times its root mean square clips little, and no group has a scale of its own: the 2^b levels lie
symmetrically around zero, ±s, ±s/3 at 2 bits. D and the two seeds stay in the layer as its maps.

LDLQ, the paper's rounding, takes H = (L + I) diag (L + I)ᵀ and rounds column i of W + (W - Ŵ)L. That is what is best
for column i given those before it, whatever they were rounded to; and so is GPTQ's update: seen in the other direction
they are one algorithm, so it is GPTQ's sweep that runs here. The direction is of no account behind a random rotation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..numerics.grid import Grid, grid_from_range
from ..numerics.qtensor import QTensor, QWeight
from ..numerics.sizes import stored_bytes
from ..numerics.spec import PLAIN, Int, Spec, per_channel
from ..numerics.stats import Gram
from .base import Clip, Encoded, Round
from .gptq import GPTQ
from .incoherence import Descent, alive, damped, incoherence_maps, turned_gram, turned_weight
from .rtn import RTN
from .views import Need, Stats


@dataclass(frozen=True)
class RMSRange:
    """A range of ±ρ times the root mean square of what is in it."""

    rho: float
    name: ClassVar[str] = "rms"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The one-unit grid for W [O, I]."""
        reach = self.rho * weight.square().mean().sqrt().reshape(1, 1)
        return grid_from_range(-reach, reach, spec)


@dataclass(frozen=True)
class QuIP:
    """Settings.

    rescale: by D. incoherence: what W and H are turned by, permuted Kronecker products of random orthogonal matrices,
    the faster Hadamard transforms behind random signs, or nothing. rounding: "ldlq"; "rg", which takes columns of large
    H_ii first; or "nearest". passes: of coordinate descent afterwards (5 to 10 go with "rg"). rho: the range in root
    mean squares; a clip that the recipe names finds another one. damp: added to H's diagonal, before it is turned and
    again in the sweep, as parts of its mean. true_sequential: observe the inputs of each linear behind those before it.
    """

    rescale: bool = True
    incoherence: Literal["kronecker", "hadamard", "none"] = "kronecker"
    rounding: Literal["ldlq", "rg", "nearest"] = "ldlq"
    passes: int = 0
    rho: float = 2.4
    damp: float = 0.01
    true_sequential: bool = False

    def __post_init__(self) -> None:
        if self.damp <= 0 or self.rho <= 0 or self.passes < 0:
            raise ValueError("damp and rho must be positive, and passes not negative")

    name: ClassVar[str] = "quip"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = None
    maps: ClassVar[bool] = True

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """One scale for the whole weight: formats with more than that are refused."""
        if spec.scale not in PLAIN or spec != per_channel(Int(spec.bits), scale=spec.scale):
            raise ValueError(f"quip has one range for a whole weight, symmetric: write w{spec.bits} without an option")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Codes, one range, and D in fp16."""
        return stored_bytes(shape, levels(spec)) + (2 * shape[1] if self.rescale else 0)

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Those of the codes: D and the range are not counted."""
        return float(spec.bits)

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """W [O, I] behind maps; inputs never seen (stats None) leave rounding to nearest behind the rotations alone."""
        weight, h = alive(weight, stats)
        before, behind = incoherence_maps(weight, h, seed, kind=self.incoherence, rescale=self.rescale)
        turned = turned_weight(weight, before, behind)
        ranges = RMSRange(self.rho) if clip.name == "minmax" else clip
        if h is None or stats is None:
            codes = RTN().round(turned, levels(spec), ranges, None, scores=scores)
        else:
            h = damped(turned_gram(h, before), self.damp)
            seen = Stats(gram=Gram.of(h.float(), stats.tokens), tokens=stats.tokens)
            rounds: Round = RTN() if self.rounding == "nearest" else GPTQ(self.damp, act_order=self.rounding == "rg")
            codes = rounds.round(turned, levels(spec), ranges, seen, scores=scores)
            codes = self._descended(turned, codes, damped(h, self.damp))
        return Encoded(QWeight((codes,)), before, None if behind is None else behind.inverse)

    def _descended(self, weight: Tensor, codes: QTensor, h: Tensor) -> QTensor:
        """The codes after the passes of coordinate descent."""
        if self.passes == 0:
            return codes
        grid, values, descent = codes.grid, codes.dequantize(), Descent.towards(weight, h, 1)
        for _ in range(self.passes):
            values = descent.step(values, lambda _, column: grid.quantize(column[None])[0])
        return QTensor(grid.encode(values), grid)


def levels(spec: Spec) -> Spec:
    """QuIP's own grid of as many bits: one step and one least value for a whole weight, minus the largest."""
    return Spec(Int(spec.bits, "asymmetric"), (-1, -1), "float16-min")
