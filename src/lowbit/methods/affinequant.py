"""AffineQuant (Ma et al. 2024): OmniQuant with whole matrices where it learns vectors, X A⁻¹ and W Aᵀ.

A starts as diag(s) and is let loose gradually: in epoch e of E it is A ⊙ M_e, with 1 on the diagonal of M_e, a small
`stability` on the ⌊(n-1)e/(E-1)⌋ nearest diagonals on either side, and 0 beyond. So A stays close to strict diagonal
dominance, which keeps it invertible. The last mask is a part of the result. Inverses are taken in fp64.

Between values and the attention's output projection A is one matrix per key-value head, merged into both. Behind a
norm nothing can take A⁻¹, so it stays in the model as an online map, which is worth its price for weight-only formats
alone: with quantized inputs, and where readers do not all see one tensor (mixtures), norms get OmniQuant's vectors.
Queries and keys get vectors too: a matrix would have to commute with the rotary embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..graph.anatomy import Edge, Heads, Norm, Tap
from ..numerics.maps import Kronecker
from .equivalent import Draft, Equivalence, Scaling, free_scores, preserves, settle_sites, starts
from .omniquant import fit, least_bits, settle, weight_clips
from .scheme import Scheme
from .views import BlockView, Need, to_readers


def gradual_mask(n: int, epoch: int, epochs: int, stability: float) -> Tensor:
    """M_e [n, n]; the identity for the first epoch (also if it is the only one), full for the last."""
    reach = (n - 1) * epoch // (epochs - 1) if epochs > 1 else 0
    distance = (torch.arange(n)[:, None] - torch.arange(n)).abs()
    return torch.eye(n) + stability * ((distance > 0) & (distance <= reach))


class Masked:
    """A ⊙ M_e, A [..., n, n] starting as diag(s)."""

    def __init__(self, scale: Tensor, stability: float) -> None:
        self.matrix = torch.diag_embed(scale).requires_grad_()
        self.stability = stability
        self.trained: tuple[Tensor, ...] = (self.matrix,)
        self.mask = torch.eye(scale.shape[-1], device=scale.device)

    def begin(self, epoch: int, epochs: int) -> None:
        """Widen the mask."""
        self.mask.copy_(gradual_mask(len(self.mask), epoch, epochs, self.stability))

    def value(self) -> tuple[Tensor, Tensor]:
        """(A ⊙ M_e, its inverse), fp32, computed in fp64."""
        masked = (self.matrix * self.mask).double()
        return masked.float(), torch.linalg.inv(masked).float()


class OnlineAffine(Masked):
    """X A⁻¹ in front of all linears of a tap, W Aᵀ in them."""

    def __init__(self, tap: Tap, scale: Tensor, stability: float) -> None:
        super().__init__(scale, stability)
        self.tap = tap

    def rewrite(self, draft: Draft) -> None:
        """Rewrite the tap's weights, and what happens to their inputs."""
        a, inverse = self.value()
        for site in self.tap.sites:
            draft.weights[site.name] = draft.weights[site.name] @ a.T
            draft.quantizers[site.name] = lambda x: (x.float() @ inverse).to(x.dtype)

    def settle(self, view: BlockView) -> None:
        """Map the tap's inputs by A⁻¹."""
        inverse = self.value()[1].detach()
        view.set_map(self.tap, Kronecker(None, inverse, (1, len(inverse))))


class HeadAffine(Masked):
    """(V - δ) A⁻¹ within every key-value head, W Aᵀ and b + Wδ in the output projection; A [K, h, h]."""

    def __init__(self, edge: Edge, heads: Heads, scale: Tensor, shift: Tensor | None, stability: float) -> None:
        super().__init__(scale.reshape(heads.key_value, heads.width), stability)
        self.edge, self.heads = edge, heads
        self.shift = None if shift is None else shift.clone().requires_grad_()
        self.trained = (self.matrix,) if self.shift is None else (self.matrix, self.shift)

    def rewrite(self, draft: Draft) -> None:
        """Rewrite V's rows, and the columns that read them."""
        source, reader = self.edge.source, self.edge.readers[0]
        assert not isinstance(source, Norm), "values come out of a linear"
        a, inverse = self.value()
        rows = draft.rows(source.site, source.index)
        values = draft.weights[source.site.name]
        inside = values[rows].view(len(a), self.heads.width, -1)
        turned = (inverse.mT @ inside).reshape(len(rows), -1)
        draft.weights[source.site.name] = values.index_put((rows,), turned)
        if source.site.bias:
            bias = draft.parameter(f"{source.site.name}.bias")
            inside = bias[rows] if self.shift is None else bias[rows] - self.shift
            turned = (inverse.mT @ inside.view(len(a), -1, 1)).flatten()
            draft.parameters[f"{source.site.name}.bias"] = bias.index_put((rows,), turned)
        if self.shift is not None:
            draft.shift_readers(self.edge, self.shift)
        head = to_readers(self.edge, torch.arange(len(rows), device=a.device))[:: self.heads.width] // self.heads.width
        weight = draft.weights[reader.name]
        columns = weight.view(len(weight), -1, 1, self.heads.width)  # [O, H, 1, h]
        draft.weights[reader.name] = (columns @ a[head].mT).flatten(1)

    def settle(self, view: BlockView) -> None:
        """Write both linears down."""
        assert not isinstance(self.edge.source, Norm), "values come out of a linear"
        settle_sites(view, self, (self.edge.source.site, self.edge.readers[0]))


@dataclass(frozen=True)
class AffineQuant:
    """Settings: stability of the mask (None: 0.01, and 0.1 with quantized inputs; 1 for OPT); the others are
    OmniQuant's.
    """

    stability: float | None = None
    lwc: bool = True
    epochs: int = 20
    lwc_rate: float = 1e-2
    let_rate: float | None = None
    alpha: float | None = None
    logit: float = 4.0

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.lwc_rate <= 0 or (self.let_rate is not None and self.let_rate <= 0):
            raise ValueError("epochs are not negative, and rates are positive")
        if self.stability is not None and self.stability < 0:
            raise ValueError(f"stability is not negative, as {self.stability} is")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must be between 0 and 1, not {self.alpha}")

    name: ClassVar[str] = "affinequant"
    needs: ClassVar[frozenset[Need]] = frozenset()
    after: ClassVar[bool] = False

    def online(self, scheme: Scheme) -> bool:
        """Matrices behind norms, for weights alone."""
        return scheme.activations is None

    def train(self, view: BlockView) -> None:
        """Train a block; merge or map what was found, and set the grids of LWC."""
        bits, inputs = least_bits(view)
        original = Draft.of(view)
        maps = self.maps(view, original)
        clips = weight_clips(view, original, self.logit) if self.lwc else {}
        let_rate = self.let_rate or (1e-3 if max(bits, inputs) <= 4 else 5e-3)
        fit(original, maps, clips, rates=(let_rate, self.lwc_rate), epochs=self.epochs, augmented=bits <= 2)
        settle(view, maps, clips)

    def maps(self, view: BlockView, original: Draft) -> list[Equivalence]:
        """Matrices where they can go, vectors where they cannot; online maps last, since nothing is folded behind."""
        bits, inputs = least_bits(view)
        stability = self.stability if self.stability is not None else 1e-2 if inputs == 16 else 0.1
        alpha = self.alpha if self.alpha is not None else 0.75 if max(bits, inputs) <= 4 else 0.5
        taps = {frozenset(tap.sites): tap for tap in view.anatomy.taps}
        folded, online, heads = list[Equivalence](), list[Equivalence](), view.anatomy.heads
        for edge, scale, shift in starts(view, original, alpha, shifts=inputs < 16):
            tap = taps.get(frozenset(edge.readers))
            if edge.kind == "norm" and inputs == 16 and not edge.others and tap is not None:
                online.append(OnlineAffine(tap, scale, stability))
            elif edge.kind == "value" and heads is not None and _mixes(view, original, edge, heads):
                folded.append(HeadAffine(edge, heads, scale, shift, stability))
            else:
                folded.append(Scaling(edge, scale, shift))
        scores = free_scores(view, original)
        return [*folded, *([] if scores is None else [scores]), *online]


def _mixes(view: BlockView, original: Draft, edge: Edge, heads: Heads) -> bool:
    """Whether channels may be mixed within every head: tried with permutations, which only reorder sums."""
    trial = HeadAffine(edge, heads, torch.ones(heads.key_value * heads.width, device=view.device), None, 1.0)
    order = torch.randperm(heads.width, generator=view.generator).to(view.device)
    trial.begin(1, 2)
    trial.matrix = trial.matrix.detach()[:, order]
    return preserves(view, original, trial, 2e-3)
