"""TesseraQ (Li & Panda 2024): decide the rounding of a block bit by bit, the surest weights first, and tune its scales.

Every weight lies between two levels, ŵ = s·2σ(v)·(below + α (above - below)). The rounding α = h(ν) is soft and starts
at W itself; h is the sigmoid stretched to [-0.1, 1.1] and cut to [0, 1], as in AdaRound. Progressive adaptive rounding
needs no regulariser to make it hard: in every stage the weights whose score HS = |α - 1/2| is highest are set to 0 or 1
for good, and the rest is trained to make up for it, on the mean squared error of the block's output. v, one per unit,
tunes the scale that codes are multiplied by; which levels a weight lies between stays what the original scale says.

It comes after Round, in the paper after AWQ's scales and clip, and a weight's choice includes the level Round gave it.
The paper keeps the last iterate; here Round's own codes are kept where they are better on the whole text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..numerics.grid import Grid, entries, from_units, magnitudes, to_codes, to_units, to_values
from ..numerics.qtensor import QTensor
from ..numerics.scales import store_scale
from ..numerics.spec import PLAIN, Float, Int, Number
from ..numerics.ste import straight_through
from .lkd import drawn, quantized_sites
from .scheme import Scheme
from .views import BlockView, Need

SCHEDULE = (
    *(0.8, 0.65, 0.5, 0.43, 0.38, 0.34, 0.3, 0.27, 0.24, 0.21),
    *(0.18, 0.15, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02, 0.01, 0.005),
)
"""The released schedule, made by hand: the part of the weights that is still soft in every stage."""
DECAY = 1e-4
"""Weight decay of v."""


@dataclass(frozen=True)
class TesseraQ:
    """Settings: schedule, the part of the weights that is still soft in every stage; iterations of every stage; batch,
    sequences per iteration; rate of Adam for ν, scale_rate for v; scales: whether v is trained
    (scales that are no plain floating-point numbers never are); inputs, of which stream.
    """

    schedule: tuple[float, ...] = SCHEDULE
    iterations: int = 250
    batch: int = 4
    rate: float = 1e-3
    scale_rate: float = 1e-3
    scales: bool = True
    inputs: Literal["float", "quantized"] = "quantized"

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.batch < 1 or self.rate <= 0 or self.scale_rate <= 0:
            raise ValueError("iterations are not negative, batches have a sequence, and rates are positive")
        if any(not 0 <= after <= before for before, after in zip((1.0, *self.schedule), self.schedule, strict=False)):
            raise ValueError("the schedule falls from 1 to 0: it is the part of the weights that is still soft")

    name: ClassVar[str] = "tesseraq"
    needs: ClassVar[frozenset[Need]] = frozenset()
    after: ClassVar[bool] = True

    def online(self, scheme: Scheme) -> bool:
        """All is in weights and codes."""
        return False

    def train(self, view: BlockView) -> None:
        """Train the block's rounding and scales stage by stage and set the codes that come out."""
        sites = quantized_sites(view)
        if not sites:
            return
        roundings = {site.name: _Rounding(view.weight(site), view.start(site), self.scales) for site in sites}
        least = self._whole(view, {site.name: view.start(site).dequantize() for site in sites})
        for part in self.schedule:
            for rounding in roundings.values():
                rounding.harden(part)
            self._stage(view, roundings)
        codes = {}
        for name, rounding in roundings.items():
            rounding.harden(0.0)
            codes[name] = rounding.codes()
        if self._whole(view, {name: each.dequantize() for name, each in codes.items()}) < least:
            for site in sites:
                view.set_codes(site, codes[site.name])

    def _stage(self, view: BlockView, roundings: Mapping[str, _Rounding]) -> None:
        """Train what is soft, and the scales, with a fresh Adam: hard weights get no gradient and do not move."""
        groups = [{"params": [rounding.nu for rounding in roundings.values()], "lr": self.rate}]
        tuned = [rounding.v for rounding in roundings.values() if rounding.v is not None]
        if tuned:
            groups.append({"params": tuned, "lr": self.scale_rate, "weight_decay": DECAY})
        optimizer = torch.optim.Adam(groups)
        for _ in range(self.iterations):
            optimizer.zero_grad()
            for batch in drawn(view, self.batch):
                loss = self._error(view, batch, {name: rounding.weight() for name, rounding in roundings.items()})
                (loss / view.target(batch).numel()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _error(self, view: BlockView, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        output = view.run(batch, view.inputs(batch, self.inputs), weights)
        return (output.float() - view.target(batch).float()).square().sum()

    @torch.no_grad()
    def _whole(self, view: BlockView, weights: Mapping[str, Tensor]) -> float:
        return sum(float(self._error(view, batch, weights)) for batch in range(view.batches))


class _Rounding:
    """The rounding of one weight [O, I]: all is in the layout of units [O/r, r, I/c, c], in the order of the groups."""

    def __init__(self, weight: Tensor, start: QTensor, tune: bool) -> None:
        self.start, grid = start, start.grid
        number, zero = grid.spec.number, _spread(grid.zero)
        codes, weight = (x if start.order is None else x[:, start.order] for x in (start.codes, weight))
        chosen = to_values(to_units(codes, grid.spec.block), number, zero)
        y = to_units(weight, grid.spec.block) / grid.scale[:, None, :, None]
        previous, following = neighbours(chosen, number, zero)
        up = y > chosen
        self.below, self.above = torch.where(up, chosen, previous), torch.where(up, following, chosen)
        alpha = ((y - self.below) / (self.above - self.below)).clamp(0, 1)
        alpha = torch.where(up, alpha.clamp_max(0.499), alpha.clamp_min(0.501))  # hard at once, it is Round's code
        alpha = torch.where(self.below == self.above, 1.0, alpha)
        self.nu = ((alpha + 0.1) / 1.2).logit().requires_grad_()
        self.soft = torch.ones_like(self.nu, dtype=torch.bool)
        self.v = torch.zeros_like(grid.scale, requires_grad=True) if tune and grid.spec.scale in PLAIN else None

    def weight(self) -> Tensor:
        """Ŵ [O, I] with gradients."""
        alpha = torch.where(self.soft, rectified(self.nu), (self.nu > 0).float())
        levels = self.below + alpha * (self.above - self.below)
        return self._natural(levels * self._scale()[:, None, :, None])

    @torch.no_grad()
    def harden(self, part: float) -> None:
        """Leave the least sure `part` of all weights soft."""
        score = torch.where(self.soft, (rectified(self.nu) - 0.5).abs(), torch.inf).flatten()
        left = ceil(part * len(score))
        if left:
            self.soft &= (score <= score.kthvalue(left).values).view_as(self.soft)
        else:
            self.soft.zero_()

    def codes(self) -> QTensor:
        """The codes of the hard weights, on the tuned grid."""
        grid = self.start.grid
        grid = Grid(grid.spec, self._scale().detach(), grid.zero, grid.outer)
        levels = torch.where(self.nu > 0, self.above, self.below).detach()
        return QTensor(self._natural(to_codes(levels, grid.spec.number, _spread(grid.zero))), grid, self.start.order)

    def _scale(self) -> Tensor:
        """s·2σ(v) as it is stored."""
        grid = self.start.grid
        if self.v is None:
            return grid.scale
        tuned = grid.scale * (2 * self.v.sigmoid())
        return straight_through(store_scale(tuned.detach(), grid.spec.scale), tuned)

    def _natural(self, units: Tensor) -> Tensor:
        x = from_units(units, self.start.shape)
        return x if self.start.order is None else x[:, self.start.order.argsort()]


def rectified(nu: Tensor) -> Tensor:
    """h(ν)."""
    return (1.2 * nu.sigmoid() - 0.1).clamp(0, 1)


def neighbours(levels: Tensor, number: Number, zero: Tensor | None) -> tuple[Tensor, Tensor]:
    """The levels next to levels below and above, themselves at the ends. `zero` broadcasts against them."""
    if isinstance(number, Int):
        low, high = (end if zero is None else end - zero for end in (number.low, number.high))
        return torch.clamp(levels - 1, min=low), torch.clamp(levels + 1, max=high)
    if isinstance(number, Float):
        table = torch.cat([-magnitudes(number).flip(0)[:-1], magnitudes(number)]).to(levels.device)
    else:
        table = entries(number).to(levels.device)
    index = torch.searchsorted(table, levels.contiguous())
    return table[(index - 1).clamp_min(0)], table[(index + 1).clamp_max(len(table) - 1)]


def _spread(zero: Tensor | None) -> Tensor | None:
    return None if zero is None else zero[:, None, :, None]
