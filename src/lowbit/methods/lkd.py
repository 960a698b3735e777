"""LKD (Yao et al. 2022, ZeroQuant) and ZQ-Global, ZQ-Local (Yao et al. 2023, ZeroQuant-V2): distil one block at a time.

The original block is the teacher of its quantized copy: latent weights, whose codes the student computes with, descend
on the mean squared difference of the outputs, gradients passing through rounding as if it were not there. LKD and
ZQ-Global compare outputs of the block, ZQ-Local of every linear by itself: it minimises ‖WX - ŴX̂‖² over that linear's
own inputs X, quantized to X̂ where the scheme says so, which needs their second moments only, and so sees all tokens in
every step. Scales follow the latent weights; what a clip cut off stays cut off, as a part of the range.

Straight-through estimates oscillate. So the loss over the whole text is measured on the way, Round's own codes are the
first candidate, and the least is kept: the result is never worse than without training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..graph.anatomy import Site
from ..numerics.latent import Latent
from ..numerics.ste import straight_through
from .scheme import Scheme
from .views import BlockView, Need

MEASURED = 10
"""How often in a training run the loss over the whole text is measured."""


@dataclass(frozen=True)
class _Distillation:
    """Settings: steps of AdamW; rates, learning rates of which the best is kept for every block or linear (none given:
    5e-6 and 5e-6 · 2^(8-b) at b bits, by which the steps of the grid grow); decay of the weights; inputs, those of the
    original model or of the quantized blocks before this one.
    """

    steps: int = 100
    rates: tuple[float, ...] = ()
    decay: float = 0.0
    inputs: Literal["float", "quantized"] = "float"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.decay < 0:
            raise ValueError("steps and decay are not negative")
        if any(rate <= 0 for rate in self.rates):
            raise ValueError("learning rates are positive")

    needs: ClassVar[frozenset[Need]] = frozenset()
    after: ClassVar[bool] = True

    def online(self, scheme: Scheme) -> bool:
        """All is in weights and codes."""
        return False

    def _swept(self, bits: int) -> Sequence[float]:
        return self.rates or sorted({5e-6, 5e-6 * 2.0 ** (8 - bits)})

    def _fit(
        self,
        latents: Sequence[Latent],
        others: Sequence[Tensor],
        gradients: Callable[[], None],
        measure: Callable[[], float],
        least: float,
    ) -> bool:
        """Train, leave everything at the least loss measured, and say whether it is below `least`, Round's."""
        weights = [latent.value for latent in latents]
        parameters = [*weights, *others]
        origin, best = _copied(parameters), None
        every = max(1, self.steps // MEASURED)
        for rate in self._swept(min(latent.spec.bits for latent in latents)):
            _restore(parameters, origin)
            groups = [{"params": weights, "weight_decay": self.decay}, {"params": others, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=rate)
            for step in range(1, self.steps + 1):
                optimizer.zero_grad()
                gradients()
                optimizer.step()
                if step % every == 0 or step == self.steps:
                    with torch.no_grad():
                        loss = measure()
                    if loss < least:
                        best, least = _copied(parameters), loss
        _restore(parameters, best or origin)
        return best is not None


@dataclass(frozen=True)
class LKD(_Distillation):
    """Settings beyond those of every distillation: batch, sequences per step; others: train norms and biases too,
    without decay. The rate is the released one; the paper's tuned results sweep it.
    """

    rates: tuple[float, ...] = (5e-6,)
    batch: int = 32
    others: bool = True

    name: ClassVar[str] = "lkd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise ValueError("a batch has at least one sequence")

    def train(self, view: BlockView) -> None:
        """Minimise the mean squared error of the block's output."""
        sites = quantized_sites(view)
        if not sites:
            return
        latents = {site.name: Latent(view.weight(site), view.start(site)) for site in sites}
        others = {name: view.parameter(name).requires_grad_() for name in view.others} if self.others else {}

        def error(batch: int, weights: Mapping[str, Tensor]) -> Tensor:
            """Sum of squares over a micro-batch, with the other parameters as they would be stored."""
            kept = {name: straight_through(view.stored(name, x.detach()), x) for name, x in others.items()}
            output = view.run(batch, view.inputs(batch, self.inputs), weights, kept)
            return (output.float() - view.target(batch).float()).square().sum()

        def gradients() -> None:
            for batch in drawn(view, self.batch):
                loss = error(batch, {name: latent.weight() for name, latent in latents.items()})
                (loss / view.target(batch).numel()).backward()  # type: ignore[no-untyped-call]

        def measure() -> float:
            weights = {name: latent.weight() for name, latent in latents.items()}
            return sum(float(error(batch, weights)) for batch in range(view.batches))

        with torch.no_grad():
            rounded = {site.name: view.start(site).dequantize() for site in sites}
            least = sum(float(error(batch, rounded)) for batch in range(view.batches))
        if self._fit([*latents.values()], [*others.values()], gradients, measure, least):
            for site in sites:
                view.set_codes(site, latents[site.name].codes())
            for name, value in others.items():
                view.set_parameter(name, value.detach())


@dataclass(frozen=True)
class ZQGlobal(LKD):
    """LKD as the study of ZeroQuant-V2 has it: rates are swept. Settings are those of LKD."""

    rates: tuple[float, ...] = ()

    name: ClassVar[str] = "zqglobal"


@dataclass(frozen=True)
class ZQLocal(_Distillation):
    """Settings are those of every distillation."""

    name: ClassVar[str] = "zqlocal"

    def train(self, view: BlockView) -> None:
        """Minimise the mean squared error of every linear's output."""
        moments: dict[str, _Moments] = {tap.name: _Moments() for tap in view.anatomy.taps}
        for batch in range(view.batches):
            for name, (x, quantized) in view.site_inputs(batch, view.inputs(batch, self.inputs)).items():
                if name in moments:
                    moments[name].update(x, quantized)
        taps = {site.name: moments[tap.name] for tap in view.anatomy.taps for site in tap.sites}
        for site in quantized_sites(view):
            if taps[site.name].tokens:
                self._train_site(view, site, taps[site.name])

    def _train_site(self, view: BlockView, site: Site, moments: _Moments) -> None:
        weight, start = view.weight(site), view.start(site)
        latent, linear = Latent(weight, start), moments.linear(weight)

        def loss(rounded: Tensor) -> Tensor:
            """‖Wx - Ŵx̂‖² - ‖W(x - x̂)‖², the mean over tokens and rows: with D = Ŵ - W it is D H Dᵀ - 2 W E Dᵀ."""
            difference = rounded - weight
            terms = difference @ moments.gram if linear is None else difference @ moments.gram - 2 * linear
            return (terms * difference).sum() / (moments.tokens * len(weight))

        def gradients() -> None:
            loss(latent.weight()).backward()  # type: ignore[no-untyped-call]

        with torch.no_grad():
            least = float(loss(start.dequantize()))
        if self._fit([latent], [], gradients, lambda: float(loss(latent.weight())), least):
            view.set_codes(site, latent.codes())


class _Moments:
    """Second moments of one tap's inputs x and of x̂, what the linears see of them: H = Σ x̂ᵀx̂, E = Σ (x - x̂)ᵀx̂."""

    def __init__(self) -> None:
        self.gram, self.tokens = torch.zeros(()), 0
        self._shift: Tensor | None = None

    def update(self, x: Tensor, quantized: Tensor) -> None:
        """Add inputs [T, I]; one and the same tensor twice where they are not quantized."""
        seen = quantized.float()
        self.gram = self.gram.to(seen.device) + seen.T @ seen
        if quantized is not x:
            shift = (x.float() - seen).T @ seen
            self._shift = shift if self._shift is None else self._shift + shift
        self.tokens += len(seen)

    def linear(self, weight: Tensor) -> Tensor | None:
        """W E [O, I]."""
        return None if self._shift is None else weight @ self._shift


def drawn(view: BlockView, sequences: int) -> list[int]:
    """Random micro-batches that hold at least so many sequences, or all there are."""
    batches, count = [], 0
    for batch in torch.randperm(view.batches, generator=view.generator).tolist():
        if count >= sequences:
            break
        batches.append(batch)
        count += len(view.inputs(batch, "quantized"))
    return batches


def quantized_sites(view: BlockView) -> list[Site]:
    """The sites whose weights have codes."""
    return [site for site in view.anatomy.sites if view.formats[site.name][0] is not None]


def _copied(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
