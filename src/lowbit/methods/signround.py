"""SignRound (Cheng et al. 2023, auto-round): learn whether each weight is rounded up or down, and how far ranges reach.

Ŵ = s·clip(round(W/s + V)), V in [-1/2, 1/2] per weight, s from the range cut to parts α, β in [0, 1] of what the clip
chose. V, α and β minimise the mean squared error of the block's output by signed gradient steps of falling length: the
sign alone decides, so every weight has the same few hundred half-steps to cross its rounding border. The parameters of
the least loss seen are kept.

It starts from any Round's codes. Where error feedback moved a weight to another level (GPTQ), V counts from the nearest
point that rounds there, so the first iterate is exactly what Round gave.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from ..graph.anatomy import Site
from ..numerics.grid import Grid, from_units, grid_from_range, grid_range, to_levels, to_units
from ..numerics.qtensor import QTensor
from ..numerics.replay import Replayed, assign, gradients
from ..numerics.spec import Spec
from ..numerics.ste import quantize_between, shifted
from .scheme import Scheme
from .views import BlockView, Need


@dataclass(frozen=True)
class SignRound:
    """Settings: iterations; batch, sequences per step; rate, the first step's length (None: 1/iterations) for V, and
    range_rate that for α and β (None: the same); ranges: whether α and β are trained.
    """

    iterations: int = 200
    batch: int = 8
    rate: float | None = None
    range_rate: float | None = None
    ranges: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.batch < 1:
            raise ValueError("iterations and batch are at least 1")

    name: ClassVar[str] = "signround"
    needs: ClassVar[frozenset[Need]] = frozenset()
    after: ClassVar[bool] = True

    def online(self, scheme: Scheme) -> bool:
        """All is in weights and codes."""
        return False

    def train(self, view: BlockView) -> None:
        """Train the block's rounding and set the codes of the best iterate."""
        parts = [_Rounding(view, sites) for sites in _alike(view)]
        if not parts:
            return
        best, least = [part.state() for part in parts], float("inf")
        replayed = Replayed(partial(self._step, view, parts), view.device)
        for step in range(self.iterations):
            loss = self._gradients(view, parts, replayed)
            if loss < least:
                best, least = [part.state() for part in parts], loss
            left = 1 - step / self.iterations
            rate = self.rate or 1 / self.iterations
            for part in parts:
                part.descend(rate * left, (self.range_rate or rate) * left if self.ranges else 0.0)
        for part, state in zip(parts, best, strict=True):
            for site, codes in part.codes(state):
                view.set_codes(site, codes)

    def _gradients(self, view: BlockView, parts: Sequence[_Rounding], replayed: Replayed) -> float:
        """Leave the gradient of the squared error over a drawn batch in the parameters; returns the mean error."""
        drawn, sequences = list[int](), 0
        for batch in torch.randperm(view.batches, generator=view.generator).tolist():
            drawn.append(batch)
            sequences += len(view.inputs(batch, "quantized"))
            if sequences >= self.batch:
                break
        groups = view.joined(drawn)
        text = [states for group in groups for states in (view.inputs(group, "quantized"), view.target(group))]
        loss, *found = replayed(tuple(view.kind(group) for group in groups), *text)
        assign([parameter for part in parts for parameter in part.trained], found)
        return float(loss) / sum(target.numel() for target in text[1::2])

    def _step(
        self, view: BlockView, parts: Sequence[_Rounding], kind: tuple[tuple[int, int], ...], *text: Tensor
    ) -> list[Tensor]:
        """The squared error over groups of micro-batches (their inputs and targets in turn), and its gradients."""
        rounded = [part.weight() for part in parts]
        leaves = [weight.detach().requires_grad_() for weight in rounded]
        weights = {site.name: rows for part, leaf in zip(parts, leaves, strict=True) for site, rows in part.split(leaf)}
        total = torch.zeros((), device=view.device)
        for (batch, _), hidden, target in zip(kind, text[::2], text[1::2], strict=True):
            loss = (view.run(batch, hidden, weights).float() - target.float()).square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        trained = [parameter for part in parts for parameter in part.trained]
        return [total, *gradients(rounded, trained, [leaf.grad for leaf in leaves if leaf.grad is not None])]


def _alike(view: BlockView) -> Iterator[tuple[Site, ...]]:
    """Quantized sites behind one input and of one format, which train as one matrix: fewer, larger operations."""
    for tap in view.anatomy.taps:
        kinds: dict[tuple[Spec, str], list[Site]] = {}
        for site in tap.sites:
            spec = view.formats[site.name][0]
            if spec is not None:
                start = view.start(site)
                whole = spec.block[0] == 1 and start.grid.outer is None and start.order is None
                kinds.setdefault((spec, "" if whole else site.name), []).append(site)
        yield from map(tuple, kinds.values())


State = tuple[Tensor, Tensor, Tensor]
"""V [O, I] and the parts α, β of every unit's range."""


class _Rounding:
    """The trainable rounding of sites one below the other in one weight [O, I], columns as groups order them."""

    def __init__(self, view: BlockView, sites: Sequence[Site]) -> None:
        starts = [view.start(site) for site in sites]
        self.sites, self.spec = tuple(sites), starts[0].grid.spec
        self.outer, self._order = starts[0].grid.outer, starts[0].order
        ranges = [grid_range(start.grid) for start in starts]
        self.low, self.high = (torch.cat(ends) for ends in zip(*ranges, strict=True))
        self.latent = torch.cat([_rounds_to(view.weight(s), x) for s, x in zip(sites, starts, strict=True)])
        self.offset = torch.zeros_like(self.latent, requires_grad=True)
        self.bottom = torch.ones_like(self.low, requires_grad=True)
        self.top = torch.ones_like(self.high, requires_grad=True)

    @property
    def trained(self) -> tuple[Tensor, Tensor, Tensor]:
        """V, α and β."""
        return self.offset, self.bottom, self.top

    def split(self, matrix: Tensor) -> Iterator[tuple[Site, Tensor]]:
        """Every site with its rows of a matrix like W."""
        rows: tuple[Tensor, ...] = torch.split(matrix, [site.shape[0] for site in self.sites])  # type: ignore[no-untyped-call]
        return zip(self.sites, rows, strict=True)

    def weight(self) -> Tensor:
        """Ŵ [O, I] with gradients."""
        low, high = self.low * self.bottom, self.high * self.top
        rounded = quantize_between(self.latent, low, high, self.spec, offset=self.offset, outer=self.outer)
        return self._natural(rounded)

    @torch.no_grad()
    def descend(self, rate: float, range_rate: float) -> None:
        """One signed gradient step."""
        for parameter, length, ends in (
            (self.offset, rate, (-0.5, 0.5)),
            (self.bottom, range_rate, (0.0, 1.0)),
            (self.top, range_rate, (0.0, 1.0)),
        ):
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign_(), alpha=length).clamp_(*ends)
                parameter.grad = None

    def state(self) -> State:
        """A copy of the parameters."""
        return self.offset.detach().clone(), self.bottom.detach().clone(), self.top.detach().clone()

    def codes(self, state: State) -> Iterator[tuple[Site, QTensor]]:
        """The codes of every site that parameters stand for."""
        offset, bottom, top = state
        grid: Grid = grid_from_range(self.low * bottom, self.high * top, self.spec, self.outer)
        units = to_units(self.latent, self.spec.block) / grid.scale[..., :, None, :, None]
        units = shifted(units, to_units(offset, self.spec.block), self.spec)
        levels = to_levels(units, self.spec.number, grid._spread(grid.zero))
        whole = QTensor(self._natural(grid.spell(from_units(levels, self.latent.shape))), grid, self._order)
        start = 0
        for site in self.sites:
            yield site, whole.rows(start, start + site.shape[0])
            start += site.shape[0]

    def _natural(self, x: Tensor) -> Tensor:
        return x if self._order is None else x[:, self._order.argsort()]


def _rounds_to(weight: Tensor, start: QTensor) -> Tensor:
    """The weight nearest to W [O, I] that rounds to `start`: W itself wherever that was rounded to nearest. Columns of
    both come as the groups order them.
    """
    chosen = start.dequantize()
    if start.order is not None:
        weight, chosen = weight[:, start.order], chosen[:, start.order]
    nearest = start.grid.quantize(weight)
    step = from_units(
        start.grid.scale[:, None, :, None].expand_as(to_units(weight, start.grid.spec.block)), weight.shape
    )
    inside = torch.clamp(weight, chosen - 0.499 * step, chosen + 0.499 * step)
    return torch.where(nearest == chosen, weight, inside)
