"""QuIP# (Tseng et al. 2024): QuIP in vectors of eight weights, which a lattice rounds better than any scalar can.

Hadamard transforms behind random signs turn W and H (a random orthogonal matrix where a size has no such transform).
LDLQ then goes by blocks of eight columns: with H's inverse factor U, block b of the rows is rounded to the nearest
point of E8P as a vector, and its error e_b spreads over the columns behind it as e_b U_bb⁻¹ U_b. Afterwards every
block is given once more, ten times over, the point that is best for it now. The points are scaled so that E8P fits a
Gaussian of the weights' root mean square. 3 and 4 bits are E8P and a second code for what that leaves, of E8's 256
shortest vectors or of E8P again.

The paper's fine-tuning of sign vectors and layers is not part of this.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.feedback import inverse_factor, sweep
from ..numerics.lattice import WIDTH, Book, Lattice, lattice_bytes, nearest, points
from ..numerics.qtensor import QWeight
from ..numerics.spec import PLAIN, Int, Spec, per_channel
from .base import Clip, Encoded, Round
from .incoherence import Descent, alive, damped, diagonal_blocks, incoherence_maps, turned_gram, turned_weight
from .views import Need, Stats

_STAGES: dict[int, tuple[float, tuple[tuple[Book, float], ...]]] = {
    2: (1.03, (("e8p", 1.0),)),
    3: (0.98, (("e8p", 1.0), ("e8", 2.04))),
    4: (1.03, (("e8p", 1.0), ("e8p", 3.45))),
}
"""Bits -> (the root mean square that weights are brought to, codebooks, each for the rest magnified so)."""


@dataclass(frozen=True)
class QuIPSharp:
    """Settings.

    sweeps: of coordinate descent over blocks of eight. incoherence: "hadamard", or "kronecker" as QuIP has it. rescale:
    by QuIP's D first, which its authors leave off by default. feedback: LDLQ; without it blocks are rounded to the
    nearest point. damp: added to H's diagonal as a part of its mean. true_sequential: observe the inputs of each linear
    behind those before it.
    """

    sweeps: int = 10
    incoherence: Literal["hadamard", "kronecker"] = "hadamard"
    rescale: bool = False
    feedback: bool = True
    damp: float = 0.01
    true_sequential: bool = False

    def __post_init__(self) -> None:
        if self.damp <= 0 or self.sweeps < 0:
            raise ValueError("damp must be positive, and sweeps not negative")

    name: ClassVar[str] = "quipsharp"
    needs: ClassVar[frozenset[Need]] = frozenset({"gram"})
    rounds: ClassVar[frozenset[str]] = frozenset()
    own: ClassVar[Spec | None] = None
    maps: ClassVar[bool] = True
    ranged: ClassVar[bool] = False
    """Whether ranges are chosen for it, by the recipe's clip: its scale follows from the weight."""

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """2 to 4 bits, a number of columns that eight divides, and no format with more than one scale."""
        if spec.bits not in _STAGES:
            raise ValueError(f"quipsharp has codebooks of 2, 3 and 4 bits, not {spec.bits}: write w2, w3 or w4")
        if spec.scale not in PLAIN or spec != per_channel(Int(spec.bits), scale=spec.scale):
            raise ValueError(f"quipsharp has one scale for a whole weight: write w{spec.bits} without an option")
        if shape[1] % WIDTH:
            raise ValueError(f"quipsharp takes eight columns at once, and {shape[1]} is no multiple: take quip there")

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Codes, scales, and D in fp16; the other maps are seeds."""
        codes = sum(lattice_bytes(shape, book) for book, _ in _STAGES[spec.bits][1])
        return codes + (2 * shape[1] if self.rescale else 0)

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Those of the codes."""
        return float(spec.bits)

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """W [O, I] as points of a lattice behind maps; inputs never seen (stats None) count all alike."""
        weight, h = alive(weight, stats)
        before, behind = incoherence_maps(weight, h, seed, kind=self.incoherence, rescale=self.rescale)
        assert behind is not None
        turned = turned_weight(weight, before, behind)
        spread, stages = _STAGES[spec.bits]
        scale = turned.square().mean().sqrt().reshape(1) / spread
        blocks = _Blocks(turned.shape, stages, turned.device)
        target = turned / torch.where(scale > 0, scale, 1.0)  # no point is zero, but a scale can be
        if h is None:
            blocks.round(0, target.T)
        else:
            self._round(target, turned_gram(h, before), blocks)
        codes = zip(blocks.codes, stages, strict=True)
        lattices = tuple(Lattice(each.T.contiguous(), scale / by, book) for each, (book, by) in codes)
        return Encoded(QWeight((), lattices=lattices), before, behind.inverse)

    def _round(self, target: Tensor, h: Tensor, blocks: _Blocks) -> None:
        if self.feedback:
            factor = block_factor(inverse_factor(h.float(), self.damp))
            sweep(target, factor, blocks.column, block=WIDTH, open_block=blocks.open)
        else:
            blocks.round(0, target.T)
        if self.sweeps:
            descent = Descent.towards(target, damped(h, self.damp), WIDTH)
        for _ in range(self.sweeps):
            descent.step(blocks.values.T, blocks.column, blocks.open)


class _Blocks:
    """Rounds eight columns of all rows at a time, and remembers the points and their codes."""

    def __init__(self, shape: torch.Size, stages: tuple[tuple[Book, float], ...], device: torch.device) -> None:
        rows, columns = shape
        self.stages = stages
        self.values = torch.empty(columns, rows, device=device)
        self.codes = [torch.empty(columns // WIDTH, rows, dtype=torch.int32, device=device) for _ in stages]

    def open(self, start: int, remaining: Tensor) -> None:
        """Round the first block of the columns [I - start, O] that are left."""
        self.round(start, remaining[:WIDTH])

    def round(self, start: int, columns: Tensor) -> None:
        """Round columns [C, O], C a multiple of eight, of which the first is number `start`."""
        count, rows = columns.shape
        vectors = columns.reshape(-1, WIDTH, rows).transpose(1, 2).reshape(-1, WIDTH)
        found = torch.zeros_like(vectors)
        for codes, (book, by) in zip(self.codes, self.stages, strict=True):
            code = nearest((vectors - found) * by, book)
            found += points(book, code.device).index_select(0, code) / by
            codes[start // WIDTH : (start + count) // WIDTH] = code.view(-1, rows)
        self.values[start : start + count] = found.view(-1, rows, WIDTH).transpose(1, 2).reshape(count, rows)

    def column(self, column: int, values: Tensor) -> Tensor:
        """The column [O] of a block that has been rounded."""
        return self.values[column]


def block_factor(factor: Tensor) -> Tensor:
    """U [I, I], upper triangular, with every stripe of eight rows multiplied by U_bb⁻¹: ones in its diagonal blocks."""
    stripes = factor.view(-1, WIDTH, len(factor))
    solved: Tensor = torch.linalg.solve_triangular(diagonal_blocks(factor, WIDTH), stripes, upper=True)
    return solved.reshape(factor.shape)
