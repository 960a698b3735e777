"""SpinQuant (Liu et al. 2024): QuaRot's rotations, learned: some are far better than others once rounding is there.

R1 [D, D] turns the residual stream and R2 [h, h] the values of each block's heads. Both are merged into the weights,
and minimise the causal language-model loss of the fake-quantized network over its text by SGD on orthogonal matrices
(`numerics.cayley`), weights frozen, gradients straight through rounding. Online Hadamard maps at the down projection
and behind the keys' position embedding stay fixed; the merged-only variant goes without them.

Weights enter rounded as they will be, unless rounding looks at the inputs (GPTQ): that repairs their errors later, and
matrices fitted to plain rounding would be fitted to errors that never happen. LayerNorm models learn within the
rotations that keep the mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from ..graph.anatomy import Anatomy
from ..numerics.cayley import CayleySGD, orthonormal
from ..numerics.maps import Map, around_mean, random_orthogonal
from .quarot import down_inputs, head_rotations, key_rotation, residual_rotation, whole_width
from .views import ModelView, Need

CPU_TOKENS = 1024
"""Tokens of a step on a CPU, where the paper's batch would take hours for the smallest of models."""


@dataclass(frozen=True)
class SpinQuant:
    """Settings: steps; rate, the first step's length, which falls to 0 as a cosine; batch, windows per step (None: 8,
    on a CPU about 1024 tokens); merged: no online maps; weights: rounded while learning, kept, or whatever suits Round.
    """

    steps: int = 100
    rate: float = 1.5
    batch: int | None = None
    merged: bool = False
    weights: Literal["auto", "rounded", "kept"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.batch is not None and self.batch < 1) or self.rate <= 0:
            raise ValueError("steps and batch are at least 1, and the rate is positive")

    name: ClassVar[str] = "spinquant"
    needs: ClassVar[frozenset[Need]] = frozenset()
    residual: ClassVar[bool] = True

    def online(self, anatomy: Anatomy, block: int) -> dict[str, Map]:
        """The Hadamard maps at the feed-forward's last linears."""
        if self.merged:
            return {}
        return {tap.name: whole_width(tap, self.seed + block) for tap in down_inputs(anatomy.blocks[block])}

    def key_map(self, anatomy: Anatomy, block: int) -> Map | None:
        """A Hadamard map of every key's channels."""
        return None if self.merged else key_rotation(anatomy, self.seed, block)

    def matrices(self, anatomy: Anatomy) -> dict[str, Tensor]:
        """Where learning starts: R1 a randomized Hadamard matrix, R2 plain ones."""
        start = {"residual": residual_rotation(anatomy, "hadamard", self.seed)}
        return start | head_rotations(anatomy, "hadamard", self.seed)

    def learn(self, view: ModelView) -> tuple[dict[str, Tensor], list[float]]:
        """R1 and every block's R2 in fp64, and the loss of every step."""
        mean = view.anatomy.rotations.residual == "mean-preserving"
        start = self.matrices(view.anatomy)
        if mean:  # a matrix over all but the mean is what is learned
            start["residual"] = random_orthogonal(start["residual"].shape[0] - 1, self.seed)
        learned = {name: nn.Parameter(matrix.float().to(view.device)) for name, matrix in start.items()}

        def used(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
            return {**matrices, "residual": around_mean(matrices["residual"])} if mean else matrices

        optimizer = CayleySGD(learned.values(), self.rate, seed=self.seed)
        rounded = self.weights == "rounded" or (self.weights == "auto" and not view.data_aware)
        windows, losses = self._batches(view), []
        for step in range(self.steps):
            for group in optimizer.param_groups:
                group["lr"] = self.rate * (1 + math.cos(math.pi * step / self.steps)) / 2
            losses.append(gradients(view, used({**learned}), next(windows), rounded))
            optimizer.step()
            optimizer.zero_grad()
        final = {name: orthonormal(matrix.detach().double()) for name, matrix in learned.items()}
        return used(final), losses

    def batch_of(self, window: int, device: torch.device) -> int:
        """Windows of a step, if none has more than that many tokens."""
        return self.batch or (8 if device.type != "cpu" else min(8, max(1, CPU_TOKENS // window)))

    def _batches(self, view: ModelView) -> Iterator[list[int]]:
        """The windows of every step, each window once before any comes again."""
        size = self.batch_of(max(view.windows), view.device)
        generator = torch.Generator().manual_seed(self.seed)
        waiting: list[int] = []
        while True:
            while len(waiting) < min(size, len(view.windows)):
                waiting += torch.randperm(len(view.windows), generator=generator).tolist()
            yield waiting[:size]
            waiting = waiting[size:]


def gradients(view: ModelView, matrices: dict[str, Tensor], windows: list[int], rounded: bool) -> float:
    """Accumulate the gradient of the mean loss over `windows` in what `matrices` are made of; returns that loss.

    Weights are merged once; each window's tape ends at them, so that only one is held at a time.
    """
    merged = {**view.merged(matrices, quantized=rounded), "residual": matrices["residual"]}
    leaves = {name: value.detach().requires_grad_() for name, value in merged.items()}
    total = 0.0
    for window in windows:
        given = {name: leaf for name, leaf in leaves.items() if name != "residual"}
        loss = view.loss(window, given, leaves["residual"]) / len(windows)
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    ends = [(value, leaves[name].grad) for name, value in merged.items() if leaves[name].grad is not None]
    torch.autograd.backward([value for value, _ in ends], [gradient for _, gradient in ends])
    return total
