"""What QuIP and QuIP# do around the sweep: turn W and H until nothing stands out, and descend from its result.

A weight that is multiplied by random orthogonal matrices from both sides has entries of one size, whatever it had
before; so a range can be a small multiple of their root mean square, and error feedback has no outliers to fight.
The maps stay in the layer: y = ((x P) Ŵ'ᵀ) R with W' = R W P⁻ᵀ and R orthogonal.

Shape letters: O output rows, I input columns, B blocks of columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.feedback import OpenBlock, RoundColumn, sweep
from ..numerics.maps import Kronecker, Map, Rescaled, Seeded, incoherent
from .views import Stats

_LEAST = 1e-8
"""Of both sides of the quotient in D."""


def alive(weight: Tensor, stats: Stats | None) -> tuple[Tensor, Tensor | None]:
    """(W [O, I] without the columns that were never excited, H [I, I] in fp64 with ones there, None if none was seen).

    Both have to be set right here: a rotation spreads a dead input over all others, where it cannot be told any more.
    """
    if stats is None:
        return weight, None
    h = stats.hessian().double()
    dead = h.diagonal() <= 0
    h.diagonal()[dead] = 1.0
    return weight.masked_fill(dead, 0.0), h


def incoherence_maps(
    weight: Tensor, h: Tensor | None, seed: int, *, kind: str, rescale: bool
) -> tuple[Map | None, Seeded | None]:
    """(what inputs of W [O, I] pass, the inverse of what its outputs pass).

    `kind` is "kronecker", "hadamard" (where there is one) or "none"; `rescale` divides the inputs by D in front of it.
    """
    before: Map | None = None
    behind: Seeded | None = None
    rows, columns = weight.shape
    if kind != "none":
        fast = kind == "hadamard"
        before, behind = incoherent(columns, seed, fast=fast), incoherent(rows, seed + 1, fast=fast)
    if rescale and h is not None:
        before = Rescaled(inverse_scale(weight, h), before or Kronecker(None, None, (columns, 1)))
    return before, behind


def inverse_scale(weight: Tensor, h: Tensor) -> Tensor:
    """1/D [I] as fp16 holds it, D_j = (H_jj / ‖W_:j‖²)^¼ up to a factor that makes its geometric mean one."""
    own = (h.diagonal() / h.abs().max()).clamp_min(_LEAST)
    scale = (weight.double().square().sum(0).clamp_min(_LEAST) / own).pow(0.25)
    return (scale / scale.log().mean().exp()).clamp(2.0**-14, 2.0**15).half()


def turned_weight(weight: Tensor, before: Map | None, behind: Seeded | None) -> Tensor:
    """R W P⁻ᵀ for W [O, I], fp32: the maps P of the inputs and R, whose inverse W's rows are turned by."""
    weight = weight if before is None else before.inverse_weight(weight)
    return weight if behind is None else behind.inverse_weight(weight.T).T.contiguous()


def turned_gram(h: Tensor, before: Map | None) -> Tensor:
    """The Gram matrix PᵀHP of mapped inputs [I, I] in fp64, its mean diagonal made one."""
    if before is not None:
        h = before.apply(before.apply(h).T)
    return h * (len(h) / h.trace())


def damped(h: Tensor, damp: float) -> Tensor:
    """H with a part of its mean diagonal added to it."""
    return h + damp * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)


def diagonal_blocks(x: Tensor, width: int) -> Tensor:
    """The diagonal blocks [B, width, width] of a matrix [I, I]."""
    places = torch.arange(len(x), device=x.device).view(-1, 1, width)
    return x.reshape(-1, width, len(x)).gather(-1, places.expand(-1, width, -1))


@dataclass(frozen=True)
class Descent:
    """Cyclic coordinate descent on tr(E H Eᵀ), E = Ŵ - W, over all rows at once, `width` columns at a time.

    Block b is given what is best for it, the others being what they are: w_b - Σ_{a≠b} e_a H_ab H_bb⁻¹. With
    M = H diag(H_bb)⁻¹, whose diagonal blocks are ones, that is (W M)_b - Σ_{a>b} ŵ_a M_ab of the last pass, which is
    known, minus Σ_{a<b} ŵ_a M_ab of this one: a column sweep that spreads not errors but the rounded values.
    """

    width: int
    goal: Tensor
    """W M [O, I]."""
    above: Tensor
    below: Tensor
    """The blocks of M [I, I] on either side of the diagonal ones."""

    @staticmethod
    def towards(weight: Tensor, h: Tensor, width: int) -> Descent:
        """For W [O, I] and H [I, I] whose diagonal blocks are positive definite; `width` divides I."""
        solved: Tensor = torch.linalg.solve(diagonal_blocks(h, width), h.reshape(-1, width, len(h)))
        mixed = solved.reshape(h.shape).T.to(weight.dtype)
        block = torch.arange(len(h), device=h.device) // width
        above, below = block[:, None] < block, block[:, None] > block
        return Descent(width, weight @ mixed, mixed.where(above, 0.0), mixed.where(below, 0.0))

    def step(self, rounded: Tensor, round_column: RoundColumn, open_block: OpenBlock | None = None) -> Tensor:
        """One pass from rounded values [O, I] to better ones, as `round_column` makes them.

        Blocks of more than one column are rounded by `open_block`; `round_column` then tells their columns.
        """
        factor = torch.eye(len(self.above), dtype=self.above.dtype, device=self.above.device) - self.above
        start = self.goal - rounded @ self.below
        block = 128 if open_block is None else self.width
        return sweep(start, factor, round_column, block=block, open_block=open_block, drift=-self.above)
