"""FlatQuant (Sun et al. 2024): learn, block by block, the transforms under which weights and inputs are flat.

Inputs x become x diag(c) P and weights W diag(c)⁻¹ P⁻ᵀ, which changes nothing until both are quantized. Three parts are
learned together, and each can be left out: the transforms P (`lt`: P_a, P_o, P_v, P_h, P_ug, P_d, see `flat_maps`), the
scale c per channel (`ps`), and clipping thresholds (`lct`). The thresholds lie behind P: every row of W P⁻ᵀ is clamped
to [σ(γ₋) min, σ(γ₊) max], every token's range of inputs is multiplied by two such parts, and so are those of keys and
values. They minimise the squared error of the block's output on the original model's inputs (`flat_block`).

c is merged as it is trained: into the gain of a norm, or the rows of an up projection. It is kept positive by training
its logarithm, since activation functions let nothing else pass. A loss that is not finite, or a P about to become
singular, ends a block's training with the parameters of the last epoch that was sound.

Per step everything is made from the parameters once, and the micro-batches see detached copies; their summed gradients
go through it once more. Nothing waits for the device within an epoch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..numerics.precision import tensor_cores
from ..numerics.replay import Replayed, assign, gradients
from .flat_block import FlatBlock
from .flat_maps import Form
from .scheme import Scheme
from .views import BlockView, Need

LEAST_RATE = 5e-6
"""What learning rates fall to, along a cosine."""
SOUND = 1e-4
"""Training of a block ends where the singular values of a P are further apart than this."""


@dataclass(frozen=True)
class FlatQuant:
    """Settings: lt, ps, lct: which parts are learned; before: weights are clamped in front of P instead, and inputs not
    at all (ablation); alpha: c starts from amax|W|^(1-α) / amax|X|^α; form of P; epochs; batch, sequences per step;
    rate of P and c, clip_rate of thresholds, decay; warmup: steps over which rates rise from 1 %.
    """

    lt: bool = True
    ps: bool = True
    lct: bool = True
    before: bool = False
    alpha: float = 0.3
    form: Form = "svd"
    epochs: int = 15
    batch: int = 4
    rate: float = 5e-3
    clip_rate: float = 5e-2
    decay: float = 0.01
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.batch < 1 or self.warmup < 0:
            raise ValueError("epochs and warmup are not negative, and batch is at least 1")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")

    name: ClassVar[str] = "flatquant"
    needs: ClassVar[frozenset[Need]] = frozenset({"minmax"})
    after: ClassVar[bool] = False

    def online(self, scheme: Scheme) -> bool:
        """P, and thresholds of inputs."""
        return self.lt or (self.lct and scheme.activations is not None)

    def train(self, view: BlockView) -> None:
        """Train the block's transforms, scales and thresholds, and set them on the view."""
        if self.lt or self.ps or self.lct:
            flat = Training(view, self)
            with tensor_cores():
                flat.fit()
            flat.finish()


class Training(FlatBlock):
    """The descent of one block's parameters."""

    def __init__(self, view: BlockView, settings: FlatQuant) -> None:
        super().__init__(view, settings)
        self._replayed = Replayed(self._step, view.device)

    def fit(self) -> None:
        """Train for all epochs, or until one is not sound."""
        slow, fast = self.trained
        rates = [rate for rate, group in ((self.settings.rate, slow), (self.settings.clip_rate, fast)) if group]
        groups = [{"params": group} for group in (slow, fast) if group]
        if not groups:
            return
        optimizer = torch.optim.AdamW(groups, weight_decay=self.settings.decay)
        epochs = [list(self._steps()) for _ in range(self.settings.epochs)]
        done, count = 0, sum(map(len, epochs))
        kept = [parameter.detach().clone() for parameter in (*slow, *fast)]
        for epoch in epochs:
            loss = torch.zeros((), device=self.view.device)
            for batches in epoch:
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = self._rate(rate, done, count)
                optimizer.zero_grad()
                loss += self.gradients(batches)
                optimizer.step()
                done += 1
            if not self._sound(loss):
                with torch.no_grad():
                    torch._foreach_copy_([*slow, *fast], kept)
                break
            torch._foreach_copy_(kept, [parameter.detach() for parameter in (*slow, *fast)])

    def gradients(self, batches: list[int]) -> Tensor:
        """Leave the gradients of the loss, divided by its own value, in the parameters; returns that value."""
        groups = self.view.joined(batches)
        text = [states for group in groups for states in (self.view.inputs(group, "float"), self.view.target(group))]
        matrices = [matrix for pair in self.matrices.pairs() for matrix in pair]
        kind = tuple(self.view.kind(group) for group in groups)
        loss, *found = self._replayed(kind, *text, *matrices)
        slow, fast = self.trained
        reached = [(matrix, gradient) for matrix, gradient in zip(matrices, found, strict=False) if gradient.numel()]
        if reached:
            torch.autograd.backward([matrix for matrix, _ in reached], [gradient for _, gradient in reached])
        assign(self._merged(slow, fast), found[len(matrices) :])
        return loss

    def _merged(self, slow: list[Tensor], fast: list[Tensor]) -> list[Tensor]:
        """What is trained beside the matrices: c and thresholds."""
        return [*slow[len(self.matrices.parameters) :], *fast]

    def _step(self, kind: tuple[tuple[int, int], ...], *tensors: Tensor) -> list[Tensor]:
        """The loss, and its gradients by matrices and all else that is trained, divided by it; empty where none.

        `tensors` are hidden states and targets of every group of micro-batches, then P and P⁻ᵀ of every matrix.
        """
        text, matrices = tensors[: 2 * len(kind)], [x.detach().requires_grad_() for x in tensors[2 * len(kind) :]]
        live = self.live(self.dtype, list(zip(matrices[::2], matrices[1::2], strict=True)))
        leaves = {key: value.detach().requires_grad_(value.requires_grad) for key, value in live.items()}
        total = first = torch.zeros((), device=self.view.device)
        for place, ((batch, count), hidden, target) in enumerate(zip(kind, text[::2], text[1::2], strict=True)):
            error = count * (self.forward(batch, hidden, leaves).float() - target.float()).square().mean()
            total = total + error.detach()
            first = total.clamp_min(torch.finfo(torch.float32).tiny) if place == 0 else first
            (error / first).backward()  # type: ignore[no-untyped-call]
        reached = {key: by for key in live if (by := leaves[key].grad) is not None}
        wanted = [*matrices, *self._merged(*self.trained)]
        found = gradients([live[key] for key in reached], wanted, list(reached.values()))
        scale = first / total.clamp_min(first)
        return [total / sum(count for _, count in kind), *(gradient * scale for gradient in found)]

    def _steps(self) -> Iterator[list[int]]:
        """One epoch's micro-batches, those of one step together."""
        batches: list[int] = []
        sequences = 0
        for batch in torch.randperm(self.view.batches, generator=self.view.generator).tolist():
            batches.append(batch)
            sequences += self.lengths[batch]
            if sequences >= self.settings.batch:
                yield batches
                batches, sequences = [], 0
        if batches:
            yield batches

    def _rate(self, rate: float, step: int, count: int) -> float:
        warm = min(1.0, 0.01 + 0.99 * step / self.settings.warmup) if self.settings.warmup else 1.0
        return warm * (LEAST_RATE + (rate - LEAST_RATE) * (1 + math.cos(math.pi * step / count)) / 2)

    @torch.no_grad()
    def _sound(self, loss: Tensor) -> bool:
        """Whether the loss and all parameters are finite, and no P is nearly singular."""
        finite = torch.stack([loss, *(p.sum() for group in self.trained for p in group)]).isfinite().all()
        return bool(finite & (self.matrices.balance().to(finite.device) > SOUND))
