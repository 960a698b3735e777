"""NormTweaking (Li et al. 2023): let the norms of a rounded block bring its output back to where it was.

Codes stay. Of every channel of the block's output, mean and variance over tokens are compared with what the block gave
before it was rounded, on the same inputs, those of the quantized blocks before it: the loss is the mean over channels
of |Δmean| + |Δvariance|. Gains and biases of norms descend on it by one pass of Adam over the text, few numbers and few
steps, since more of either learns the text; later blocks, whose inputs have drifted further, take longer steps:
1 + s·ℓ/L times the rate in block ℓ of L. The paper searches s over whole models, here every block takes the best of
`rates` and `slopes`, judged over the whole text by the values that are stored, or keeps its norms if none helps.

Stored gains have the checkpoint's 16 bits. In bf16 a gain changes by 1/256 of itself or not at all, and what the
paper's rate of 1e-5 sums up to in one pass is less: larger rates are tried beside it.

The paper's text is sampled from the model itself, which is a matter of calibration (`generated`). The variant of a
toolkit follows the original model's own stream by plain squared errors: targets=float, loss=mse, rates=[1e-6],
slopes=[0.001], epochs=50.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.ste import straight_through
from .lkd import quantized_sites
from .scheme import Scheme
from .views import BlockView, Need


@dataclass(frozen=True)
class NormTweak:
    """Settings: rates of Adam in the first block, and slopes, candidates for s; epochs over the text, a micro-batch a
    step; loss, that of channels' "moments" or "mse"; targets, the block before rounding on the "quantized" stream, or
    the original model's outputs ("float").
    """

    rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    slopes: tuple[float, ...] = (1.0,)
    epochs: int = 1
    loss: Literal["moments", "mse"] = "moments"
    targets: Literal["quantized", "float"] = "quantized"

    def __post_init__(self) -> None:
        if min(self.rates, default=-1) < 0 or min(self.slopes, default=-1) < 0 or self.epochs < 0:
            raise ValueError("rates, slopes and epochs are not negative, and there is a rate and a slope")

    name: ClassVar[str] = "normtweak"
    needs: ClassVar[frozenset[Need]] = frozenset()
    after: ClassVar[bool] = True
    recodes: ClassVar[bool] = False

    def online(self, scheme: Scheme) -> bool:
        """All is in the norms."""
        return False

    def train(self, view: BlockView) -> None:
        """Train the block's norms and set the best."""
        start = {name: view.parameter(name) for name in norms(view)}
        weights = {site.name: view.rounded(site) for site in quantized_sites(view)}
        if not start or not weights:
            return
        best, least = None, self._measure(view, weights, start)
        index, count = view.place
        for rate, slope in product(self.rates, self.slopes):
            tweaked = self._trained(view, weights, start, rate * (1 + slope * index / count))
            loss = self._measure(view, weights, tweaked)
            if loss < least:
                best, least = tweaked, loss
        for name, value in (best or {}).items():
            view.set_parameter(name, value)

    def _trained(
        self, view: BlockView, weights: Mapping[str, Tensor], start: Mapping[str, Tensor], rate: float
    ) -> dict[str, Tensor]:
        """The norms' parameters behind all steps of a rate."""
        trained = {name: value.clone().requires_grad_() for name, value in start.items()}
        optimizer = torch.optim.Adam(trained.values(), lr=rate)
        for _ in range(self.epochs):
            for batch in range(view.batches):
                optimizer.zero_grad()
                self._loss(view, batch, weights, trained).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return {name: value.detach() for name, value in trained.items()}

    @torch.no_grad()
    def _measure(self, view: BlockView, weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> float:
        """The mean loss over the text."""
        return sum(float(self._loss(view, batch, weights, norms)) for batch in range(view.batches)) / view.batches

    def _loss(self, view: BlockView, batch: int, weights: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> Tensor:
        """The loss of one micro-batch, with norms as they would be stored."""
        with torch.no_grad():
            target = view.target(batch, self.targets).float().flatten(0, 1)
        stored = {name: straight_through(view.stored(name, value.detach()), value) for name, value in norms.items()}
        output = view.run(batch, view.inputs(batch, "quantized"), weights, stored).float().flatten(0, 1)
        if self.loss == "mse":
            return (output - target).square().mean()
        mean, variance = (moment(output) - moment(target) for moment in (_mean, _variance))
        return (mean.abs() + variance.abs()).mean()


def norms(view: BlockView) -> list[str]:
    """The names of the block's gains and biases that belong to no linear."""
    linears = {site.name for site in view.anatomy.sites}
    owners = [name.rpartition(".") for name in view.others]
    return [f"{owner}.{leaf}" for owner, _, leaf in owners if owner not in linears and leaf in ("weight", "bias")]


def _mean(x: Tensor) -> Tensor:
    return x.mean(0)


def _variance(x: Tensor) -> Tensor:
    return x.var(0, correction=0)
