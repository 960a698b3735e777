"""Wanda (Sun et al. 2023): drop the weights that matter least to the outputs, row by row, and change no other.

S_ij = |W_ij| · ‖X_j‖₂ is what the outputs would lose with the one entry; every output is one row, so entries compete
within their row: across rows, the scale of an output would decide. What is kept is bit for bit the checkpoint's. With
GPTQ behind it, kept entries are rounded and make up for each other and for those dropped.

The other groups and scores are the paper's ablation: OBS is w² / [H⁻¹]_jj, SparseGPT's score. Its variant drops of
every row as much as a common part of the row's scores adds up to, so that rows differ; the part is found by bisection.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.spec import Spec
from .base import Clip, Encoded, Round
from .sparsity import Pruning, count, dropped, rounded
from .views import Need, Stats

_BISECTIONS = 40


@dataclass(frozen=True)
class Wanda(Pruning):
    """Settings, beside those of all pruning.

    group: who competes: a "row", the whole "matrix", an input's "column", or a "block" of 128 inputs of all rows.
    score: what is compared. cumulative: the variant whose rows differ. damp: for OBS, a part of H's mean diagonal.
    true_sequential: observe the inputs of each linear behind those pruned before it.
    """

    group: Literal["row", "matrix", "column", "block"] = "row"
    score: Literal["wanda", "magnitude", "obs"] = "wanda"
    cumulative: bool = False
    damp: float = 0.01
    true_sequential: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group != "row" and (self.among or self.cumulative):
            what = "N:M" if self.among else "the cumulative variant"
            raise ValueError(f"{what} compares entries of a row: leave group=row")
        if self.among and self.cumulative:
            raise ValueError("N:M drops as many of every row, and the cumulative variant does not: keep one of them")
        if self.damp <= 0:
            raise ValueError("damp must be positive")

    name: ClassVar[str] = "wanda"

    @property
    def needs(self) -> frozenset[Need]:
        """The norms of the inputs, or what the score takes instead."""
        kinds: dict[str, frozenset[Need]] = {"wanda": frozenset({"square"}), "obs": frozenset({"gram"})}
        return kinds.get(self.score, frozenset())

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed linear by linear."""
        return self.true_sequential

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """W [O, I] without what matters least; inputs never seen (stats None) count alike."""
        mask = self.mask(self._scores(weight, stats))
        return rounded(weight, mask, spec, round, clip, stats, scores=scores)

    def mask(self, scores: Tensor) -> Tensor:
        """What is dropped for scores [O, I], bool [O, I]."""
        if self.cumulative:
            return self._of_a_part(scores)
        if self.group == "block":
            blocks = [scores[:, start : start + 128] for start in range(0, scores.shape[1], 128)]
            return torch.cat([dropped(block, self.sparsity, block.numel()) for block in blocks], 1)
        if self.group == "column":
            return dropped(scores.T, self.sparsity, len(scores)).T
        size = scores.numel() if self.group == "matrix" else self.among or scores.shape[1]
        return dropped(scores, self.sparsity, size)

    def _scores(self, weight: Tensor, stats: Stats | None) -> Tensor:
        if stats is None or self.score == "magnitude":
            return weight.abs()
        if self.score == "wanda":
            assert stats.square is not None, "wanda declares that it needs the inputs' norms"
            return weight.abs() * stats.square.norm
        u, _, dead = stats.factor(self.damp, act_order=False)
        return (weight.square() / u.square().sum(0)).masked_fill(dead, 0.0)  # UᵀU = H⁻¹

    def _of_a_part(self, scores: Tensor) -> Tensor:
        """The variant: of every row the most entries whose scores add up to less than one part a of the row's total."""
        ordered, places = scores.double().sort(dim=-1, stable=True)
        sums = ordered.cumsum(-1)
        parts = sums / sums[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
        wanted = count(self.sparsity, scores.numel())
        low, high = 0.0, 0.8
        if int((parts <= high).sum()) < wanted:
            high = 1.0  # beyond the paper's range, for sparsities that it does not reach
        for _ in range(_BISECTIONS):
            part = (low + high) / 2
            found = int((parts <= part).sum())
            if abs(found - wanted) <= 0.001 * scores.numel():
                break
            low, high = (part, high) if found < wanted else (low, part)
        else:
            part = high  # a matrix too small for the tolerance: the least that is enough
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, places, parts <= part)
