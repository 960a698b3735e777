"""Gradient descent on orthogonal matrices: Cayley SGD with momentum (Li et al. 2020), SpinQuant's optimizer.

A step moves R along the Cayley transform of a skew matrix made from its gradient, so R stays orthogonal without being
projected back. The transform's inverse is never computed: five fixed-point iterations do, since the step is capped
where they contract. What rounding leaves behind is removed now and then by a QR decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

ITERATIONS = 5
RENEWAL = 1 / 101
"""Probability of a step to begin with a QR decomposition."""


def cayley_step(
    rotation: Tensor, gradient: Tensor, momentum: Tensor, rate: float, decay: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One step from an orthogonal matrix [n, n]: the new one, and the new momentum [n, n].

    Args:
        gradient: of the loss with respect to `rotation`.
        momentum: what the last step returned, zeros at first; `decay` is its weight, μ.
        rate: the learning rate, capped at 1/‖W‖₁ for the skew direction W, which makes any rate harmless.
    """
    momentum = decay * momentum - gradient.T
    product = momentum @ rotation
    half = product - 0.5 * rotation.T @ (rotation @ product)
    skew = half - half.T
    step = min(rate, 1.0 / (float(torch.linalg.matrix_norm(skew, ord=1)) + 1e-8))
    turned = rotation.T + step * momentum
    for _ in range(ITERATIONS):
        turned = rotation.T + 0.5 * step * skew @ (rotation.T + turned)
    return turned.T.contiguous(), skew @ rotation.T


def orthonormal(rotation: Tensor) -> Tensor:
    """The orthogonal matrix of a QR decomposition, with the signs that leave an orthogonal `rotation` what it was."""
    q, r = cast(tuple[Tensor, Tensor], torch.linalg.qr(rotation))
    return q * r.diagonal().sign()


class CayleySGD(torch.optim.Optimizer):
    """Optimizes square orthogonal parameters, in place; schedulers set `lr` as they do elsewhere."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.0, seed: int = 0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Turn every parameter that has a gradient. `closure` evaluates the loss anew, with gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in cast(list[Tensor], group["params"]):
                if parameter.grad is not None:
                    self._turn(parameter, parameter.grad, group)
        return loss

    def _turn(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        rotation = parameter / parameter.norm(dim=1, keepdim=True)
        if float(torch.rand((), generator=self.generator)) < RENEWAL:
            rotation = orthonormal(rotation)
        state = self.state[parameter]
        momentum = state.get("momentum", torch.zeros_like(parameter))
        turned, state["momentum"] = cayley_step(rotation, gradient, momentum, group["lr"], group["momentum"])
        parameter.copy_(turned)
