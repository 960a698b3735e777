"""OmniQuant (Shao et al. 2023): learn the ranges of weights, and scales and shifts that move outliers out of inputs.

LWC, learnable weight clipping: every row or group covers [σ(β)·min, σ(γ)·max], β and γ starting at 4.
LET, learnable equivalent transformation: (X - δ)/s, s ⊙ W, b + Wδ between norms and linears and between values and the
attention's output projection; Q/s_a and K·s_a where position embeddings and norms let a scale pass.

Both are trained block by block to minimise the mean squared error between the quantized block on quantized inputs and
the original block on the original's. Every step rebuilds the weights from the frozen originals. They are rounded once,
at the end, by the recipe's Round on the learned grids.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..modules.linear import quantize_activation
from ..numerics.grid import Grid, fit_range, grid_from_range, unit_range
from ..numerics.replay import Replayed, assign, gradients
from ..numerics.spec import Spec
from ..numerics.ste import quantize_range
from .equivalent import Draft, Equivalence, Scaling, free_scores, starts
from .scheme import Scheme
from .views import BlockView, Need


class LWC:
    """Learned parts σ(β) and σ(γ) of the smallest and largest weight of every unit."""

    def __init__(self, weight: Tensor, spec: Spec, logit: float) -> None:
        low, high = unit_range(weight, spec.block)
        self.spec = spec
        self.beta = torch.full_like(low, logit, requires_grad=True)
        self.gamma = torch.full_like(high, logit, requires_grad=True)
        self.trained = (self.beta, self.gamma)

    def quantize(self, weight: Tensor) -> Tensor:
        """Ŵ [O, I] with gradients."""
        return quantize_range(weight, self.spec, self.beta.sigmoid(), self.gamma.sigmoid())

    def grid(self, weight: Tensor) -> Grid:
        """The grid on which `quantize` rounds W [O, I]."""
        low, high = unit_range(weight, self.spec.block)
        outer = fit_range(weight, self.spec).outer
        low, high = low * self.beta.detach().sigmoid(), high * self.gamma.detach().sigmoid()
        return grid_from_range(low, high, self.spec, outer)


@dataclass(frozen=True)
class OmniQuant:
    """Settings.

    lwc, let: either part alone. epochs over the text (None: 20, and 40 at 2 bits). lwc_rate, let_rate: AdamW's steps
    (let_rate None: 5e-3, and 1e-3 at w4a4). alpha: how much of the outliers s starts with (None: 1/2, and 3/4 at w4a4).
    logit: start of β and γ. augmented: add the error against the original block on quantized inputs (None: at 2 bits).
    """

    lwc: bool = True
    let: bool = True
    epochs: int | None = None
    lwc_rate: float = 1e-2
    let_rate: float | None = None
    alpha: float | None = None
    logit: float = 4.0
    augmented: bool | None = None

    def __post_init__(self) -> None:
        if not (self.lwc or self.let):
            raise ValueError("lwc and let are both off: keep at least one of them")
        if (self.epochs or 0) < 0 or self.lwc_rate <= 0 or (self.let_rate is not None and self.let_rate <= 0):
            raise ValueError("epochs are not negative, and rates are positive")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")

    name: ClassVar[str] = "omniquant"
    needs: ClassVar[frozenset[Need]] = frozenset()
    after: ClassVar[bool] = False

    def online(self, scheme: Scheme) -> bool:
        """All is in weights and codes."""
        return False

    def train(self, view: BlockView) -> None:
        """Train a block; fold what LET found, and set the grids of LWC."""
        bits, inputs = least_bits(view)
        original, maps = Draft.of(view), list[Equivalence]()
        if self.let:
            alpha = self.alpha if self.alpha is not None else 0.75 if max(bits, inputs) <= 4 else 0.5
            maps += [Scaling(*start) for start in starts(view, original, alpha, shifts=inputs < 16)]
            scores = free_scores(view, original)
            maps += [] if scores is None else [scores]
        clips = weight_clips(view, original, self.logit) if self.lwc else {}
        let_rate = self.let_rate or (1e-3 if max(bits, inputs) <= 4 else 5e-3)
        fit(
            original,
            maps,
            clips,
            rates=(let_rate, self.lwc_rate),
            epochs=self.epochs if self.epochs is not None else 40 if bits <= 2 else 20,
            augmented=self.augmented if self.augmented is not None else bits <= 2,
        )
        settle(view, maps, clips)


def least_bits(view: BlockView) -> tuple[int, int]:
    """Fewest bits of the block's weights and of its inputs; 16 where there is no format."""
    weights, inputs = zip(*view.formats.values(), strict=True)
    return min(16 if s is None else s.bits for s in weights), min(16 if s is None else s.bits for s in inputs)


def weight_clips(view: BlockView, original: Draft, logit: float) -> dict[str, LWC]:
    """LWC for every quantized site."""
    specs = {site.name: view.formats[site.name][0] for site in view.anatomy.sites}
    return {name: LWC(original.weights[name], spec, logit) for name, spec in specs.items() if spec is not None}


def student(original: Draft, maps: Sequence[Equivalence], clips: Mapping[str, LWC]) -> Draft:
    """The block rewritten and its weights fake-quantized, with gradients."""
    draft = original.copy()
    for map in maps:
        map.rewrite(draft)
    for name, weight in draft.weights.items():
        spec = original.view.formats[name][0]
        if spec is not None:
            draft.weights[name] = clips[name].quantize(weight) if name in clips else quantize_range(weight, spec)
    for name, (_, spec) in original.view.formats.items():
        if maps and spec is not None and not spec.dynamic and name not in original.view.maps:
            draft.quantizers[name] = partial(_ranged_anew, spec)
    return draft


def _ranged_anew(spec: Spec, x: Tensor) -> Tensor:
    """Inputs of a static format on their own range: the calibrated one is not that of rewritten inputs."""
    return quantize_activation(x, spec, None)


def fit(
    original: Draft,
    maps: Sequence[Equivalence],
    clips: Mapping[str, LWC],
    *,
    rates: tuple[float, float],
    epochs: int,
    augmented: bool,
) -> list[float]:
    """Train maps and clips at their `rates`, one micro-batch a step; returns the mean loss of every epoch.

    A loss that is not finite ends the training, and brings back the parameters of the last one that was.
    """
    view, losses = original.view, list[float]()
    learned = [p for map in maps for p in map.trained], [p for clip in clips.values() for p in clip.trained]
    groups = [{"params": p, "lr": rate} for p, rate in zip(learned, rates, strict=True) if p]
    every = [*learned[0], *learned[1]]
    if not every:
        return losses
    step = Replayed(partial(_step, original, maps, clips, every, augmented), view.device)
    optimizer, good = torch.optim.AdamW(groups, weight_decay=0.0), [p.detach().clone() for p in every]
    for epoch in range(epochs):
        total = 0.0
        for map in maps:
            map.begin(epoch, epochs)
        for batch in range(view.batches):
            loss, *found = step(view.kind(batch), view.inputs(batch, "quantized"), view.target(batch))
            value = float(loss)
            if not math.isfinite(value):
                _restore(every, good)
                return losses
            torch._foreach_copy_(good, [p.detach() for p in every])
            assign(every, found)
            optimizer.step()
            total += value
        losses.append(total / view.batches)
    if not all(bool(p.isfinite().all()) for p in every):
        _restore(every, good)
    return losses


def _step(
    original: Draft,
    maps: Sequence[Equivalence],
    clips: Mapping[str, LWC],
    every: Sequence[Tensor],
    augmented: bool,
    kind: tuple[int, int],
    hidden: Tensor,
    target: Tensor,
) -> list[Tensor]:
    """The loss on one micro-batch, and its gradients by everything that is trained."""
    loss = block_loss(original, student(original, maps, clips), kind[0], hidden, target, augmented)
    return [loss.detach(), *gradients([loss], every)]


def block_loss(original: Draft, draft: Draft, batch: int, hidden: Tensor, target: Tensor, augmented: bool) -> Tensor:
    """Mean squared error of the quantized block on quantized inputs; `augmented`, that to the original there too.

    `batch` is a micro-batch that is called as this one.
    """
    output = draft.run(batch, hidden)
    loss = (output - target.float()).square().mean()
    if augmented:
        with torch.no_grad():
            same = original.exact(batch, hidden)
        loss = loss + (output - same).square().mean()
    return loss


@torch.no_grad()
def _restore(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def settle(view: BlockView, maps: Sequence[Equivalence], clips: Mapping[str, LWC]) -> None:
    """Carry out what was learned; ranges are parts of those of the weights as they are then."""
    for map in maps:
        map.settle(view)
    for site in view.anatomy.sites:
        if site.name in clips:
            view.set_grid(site, clips[site.name].grid(view.weight(site)))
