"""Trainable rewritings of a block that change its weights and not what it computes: OmniQuant's and AffineQuant's.

A `Draft` is a block being rewritten. It starts from the frozen originals at every step, each `Equivalence` rewrites it
in turn, differentiably, and the trained method quantizes what comes out; nothing is ever folded twice. When training is
over, each one settles: it asks the block's view to carry out for good what its rewriting did.

Row-vector convention: inputs x [.., I], y = x Wᵀ + b. Shape letters: O output rows, I input columns, S source channels,
H query heads, K key-value heads, h head width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..graph.anatomy import Edge, Norm, Site
from ..numerics.replay import index as places
from .views import BlockView, Fold, Quantizer, to_readers, to_source

FLOOR = 1e-2
"""Least magnitude of a trained scale: it is divided by."""


@dataclass
class Draft:
    """Weights [O, I] and other parameters of a block, and what happens to the inputs of its linears."""

    view: BlockView
    weights: dict[str, Tensor]
    parameters: dict[str, Tensor] = field(default_factory=dict)
    quantizers: dict[str, Quantizer] = field(default_factory=dict)

    @staticmethod
    def of(view: BlockView) -> Draft:
        """The block as it is."""
        return Draft(view, {site.name: view.weight(site) for site in view.anatomy.sites})

    def copy(self) -> Draft:
        """The same, to be rewritten."""
        return Draft(self.view, dict(self.weights), dict(self.parameters), dict(self.quantizers))

    def parameter(self, name: str) -> Tensor:
        """A parameter as it is now."""
        if name not in self.parameters:
            self.parameters[name] = self.view.parameter(name)
        return self.parameters[name]

    def shift_readers(self, edge: Edge, shift: Tensor) -> None:
        """b + Wδ for every reader: repairs inputs from which δ [S] was subtracted."""
        for site in edge.readers:
            name = f"{site.name}.bias"
            self.parameters[name] = self.parameter(name) + self.weights[site.name] @ to_readers(edge, shift)

    def scale_columns(self, edge: Edge, scale: Tensor) -> None:
        """W·s for every reader and router: repairs inputs that were divided by s [S]."""
        columns = to_readers(edge, scale)
        for site in edge.readers:
            self.weights[site.name] = self.weights[site.name] * columns
        for path in edge.others:
            self.parameters[f"{path}.weight"] = self.parameter(f"{path}.weight") * columns

    def rows(self, site: Site, index: tuple[int, ...] | None) -> Tensor:
        """Numbers of the rows that an index stands for."""
        rows = range(site.shape[0]) if index is None else index
        return places(tuple(rows), self.weights[site.name].device)

    def scale_rows(self, site: Site, scale: Tensor, index: tuple[int, ...] | None = None) -> None:
        """W/s and b/s in rows of a site."""
        divisor = torch.ones_like(self.weights[site.name][:, 0]).index_put((self.rows(site, index),), scale)
        self.weights[site.name] = self.weights[site.name] / divisor[:, None]
        if site.bias:
            self.parameters[f"{site.name}.bias"] = self.parameter(f"{site.name}.bias") / divisor

    def run(self, batch: int, hidden: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """The block's output with these weights, or with its own, in fp32."""
        given = self.weights if weights is None else weights
        return self.view.run(batch, hidden, given, self.parameters, self.quantizers).float()

    def exact(self, batch: int, hidden: Tensor) -> Tensor:
        """The block's output without any fake quantization of inputs, in fp32."""
        plain: dict[str, Quantizer] = {name: torch.clone for name in self.weights}
        plain |= {name: map.apply for name, map in self.view.maps.items()}
        return self.view.run(batch, hidden, self.weights, self.parameters, plain).float()


class Equivalence(Protocol):
    """One rewriting of a block, with parameters to train."""

    trained: tuple[Tensor, ...]

    def begin(self, epoch: int, epochs: int) -> None:
        """An epoch begins."""

    def rewrite(self, draft: Draft) -> None:
        """Rewrite the draft, with gradients to the trained parameters."""

    def settle(self, view: BlockView) -> None:
        """Carry it out for good."""


class Scaling:
    """X' = (X - δ)/s behind an edge's source, W' = W·s and b' = b + Wδ in its readers; s and δ [S]."""

    def __init__(self, edge: Edge, scale: Tensor, shift: Tensor | None = None) -> None:
        self.edge = edge
        self.scale = scale.clone().requires_grad_()
        self.shift = None if shift is None else shift.clone().requires_grad_()
        self.trained: tuple[Tensor, ...] = (self.scale,) if self.shift is None else (self.scale, self.shift)

    def begin(self, epoch: int, epochs: int) -> None:
        """Nothing changes with the epochs."""

    def floored(self) -> Tensor:
        """s with |s| at least FLOOR and its sign kept; gradients pass where it was not floored."""
        return torch.where(self.scale < 0, self.scale.clamp_max(-FLOOR), self.scale.clamp_min(FLOOR))

    def rewrite(self, draft: Draft) -> None:
        """Rewrite source and readers."""
        edge, scale, source = self.edge, self.floored(), self.edge.source
        name = source.name if isinstance(source, Norm) else source.site.name
        if self.shift is not None:
            draft.shift_readers(edge, self.shift)
            bias = draft.parameter(f"{name}.bias")
            rows = slice(None) if isinstance(source, Norm) else draft.rows(source.site, source.index)
            moved = torch.zeros_like(bias)
            moved[rows] = self.shift
            draft.parameters[f"{name}.bias"] = bias - moved
        draft.scale_columns(edge, scale)
        if not isinstance(source, Norm):
            draft.scale_rows(source.site, scale, source.index)
            return
        gain = draft.parameter(f"{name}.weight")
        draft.parameters[f"{name}.weight"] = (gain + source.offset) / scale - source.offset
        if source.bias:
            draft.parameters[f"{name}.bias"] = draft.parameter(f"{name}.bias") / scale

    def settle(self, view: BlockView) -> None:
        """Fold it."""
        view.fold(self.edge, Fold(self.floored().detach(), None if self.shift is None else self.shift.detach()))


class Scores:
    """Q/s_a and K·s_a: what both meet in, their product, stays. s_a [H, h], or [H, h/2] for both halves of a head.

    A rotary embedding turns channels j and j + h/2 into each other, so these two share a scale there.
    """

    def __init__(self, query: Site, key: Site, heads: int, tied: bool) -> None:
        self.query, self.key, self.tied = query, key, tied
        width = query.shape[0] // heads
        self.scale = torch.ones(heads, width // 2 if tied else width, requires_grad=True)
        self.trained: tuple[Tensor, ...] = (self.scale,)

    def begin(self, epoch: int, epochs: int) -> None:
        """Nothing changes with the epochs."""

    def spread(self) -> Tensor:
        """s_a over the rows of Q and K."""
        scale = torch.where(self.scale < 0, self.scale.clamp_max(-FLOOR), self.scale.clamp_min(FLOOR))
        return (torch.cat([scale, scale], 1) if self.tied else scale).flatten()

    def rewrite(self, draft: Draft) -> None:
        """Rewrite both projections."""
        draft.scale_rows(self.query, self.spread())
        draft.scale_rows(self.key, 1 / self.spread())

    def settle(self, view: BlockView) -> None:
        """Write both projections down."""
        settle_sites(view, self, (self.query, self.key))


def settle_sites(view: BlockView, map: Equivalence, sites: tuple[Site, ...]) -> None:
    """Write down what a rewriting makes of the weights and biases of these sites."""
    with torch.no_grad():
        draft = Draft.of(view)
        map.rewrite(draft)
    for site in sites:
        view.set_weight(site, draft.weights[site.name])
    for name, value in draft.parameters.items():
        view.set_parameter(name, value)


def preserves(view: BlockView, original: Draft, map: Equivalence, tolerance: float) -> bool:
    """Whether the block's output without quantization stays the same under a rewriting, up to a relative change."""
    with torch.no_grad():
        draft, hidden = original.copy(), view.inputs(0, "quantized")
        map.rewrite(draft)
        before, after = original.exact(0, hidden), draft.exact(0, hidden)
        return float((after - before).norm()) <= tolerance * float(before.norm())


def free_scores(view: BlockView, original: Draft) -> Scores | None:
    """s_a = 1 for the block's queries and keys with as much freedom as leaves the block's output alone, if any does.

    Whether scales pass what stands between (rotary embeddings of any layout, norms of queries and keys) is tried out
    with powers of two, whose products are exact. Grouped queries, whose keys meet several of them, have none.
    """
    sites = [site for site in view.anatomy.sites if site.name in view.anatomy.scores]
    heads = view.anatomy.heads
    if len(sites) != 2 or heads is None or heads.query != heads.key_value or sites[0].shape[0] != sites[1].shape[0]:
        return None
    for tied in (False, True):
        width = sites[0].shape[0] // heads.query
        if sites[0].shape[0] % heads.query or (tied and width % 2):
            continue
        scores = Scores(sites[0], sites[1], heads.query, tied)
        draw = torch.randint(-1, 2, scores.scale.shape, generator=view.generator)
        scores.scale = torch.exp2(draw.float()).to(view.device)
        if preserves(view, original, scores, 1e-6):
            scores.scale = torch.ones_like(scores.scale, requires_grad=True)
            scores.trained = (scores.scale,)
            return scores
    return None


@dataclass(frozen=True)
class Range:
    """What a linear's inputs reach: largest magnitudes over the text, and moving averages of both ends, [I] each."""

    amax: Tensor
    low: Tensor
    high: Tensor


def input_ranges(view: BlockView, decay: float = 0.99) -> dict[str, Range]:
    """Ranges of the inputs of every linear that saw any, on the quantized stream."""
    ranges: dict[str, Range] = {}
    for batch in range(view.batches):
        for name, (x, _) in view.site_inputs(batch, view.inputs(batch, "quantized")).items():
            amax, low, high = (end.float() for end in (x.abs().amax(0), x.amin(0), x.amax(0)))
            old = ranges.get(name)
            if old is not None:
                amax = torch.maximum(amax, old.amax)
                low, high = old.low.lerp(low, 1 - decay), old.high.lerp(high, 1 - decay)
            ranges[name] = Range(amax, low, high)
    return ranges


def starts(view: BlockView, original: Draft, alpha: float, shifts: bool) -> list[tuple[Edge, Tensor, Tensor | None]]:
    """(edge, s, δ) to start from, for norms and values: s = amax|X|^α / amax|W|^(1-α), δ the middle of the range.

    Left out are edges whose readers' inputs are mapped, keep 16 bits altogether, or were never seen.
    """
    ranges, found = input_ranges(view), []
    for edge in view.anatomy.edges:
        seen = [ranges[site.name] for site in edge.readers if site.name in ranges]
        plain = all(view.formats[site.name][0] is None for site in edge.readers)
        if edge.kind == "up" or plain or not seen or any(site.name in view.maps for site in edge.readers):
            continue
        amax_x = to_source(edge, torch.stack([each.amax for each in seen]).amax(0))
        amax_w = to_source(edge, torch.stack([original.weights[s.name].abs().amax(0) for s in edge.readers]).amax(0))
        scale = amax_x.pow(alpha) / amax_w.clamp_min(1e-5).pow(1 - alpha)
        scale = torch.where((amax_x > 0) & scale.isfinite(), scale.clamp_min(FLOOR), 1.0)
        shift = None
        if shifts and edge.shift:
            low = -to_source(edge, torch.stack([-each.low for each in seen]).amax(0))
            shift = (low + to_source(edge, torch.stack([each.high for each in seen]).amax(0))) / 2
        found.append((edge, scale, shift))
    return found
