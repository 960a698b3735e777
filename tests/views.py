"""The smallest block that a trained method can be given: linears side by side behind explicit inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.graph.anatomy import BlockAnatomy, Site, Tap
from lowbit.methods.views import Stats
from lowbit.modules.linear import quantize_activation
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.maps import Map
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import Spec


@dataclass
class Linears:
    """A `BlockView` whose block is y = [x W₁ᵀ, x W₂ᵀ, …] for inputs [batches, b, T, I]; it remembers what is set."""

    weights: Sequence[Tensor]
    specs: Sequence[Spec | None]
    x: Tensor
    floats: Tensor | None = None
    """Inputs of the float stream, where they are not the same."""
    activations: Spec | None = None
    seed: int = 0
    codes: dict[str, QTensor] = field(default_factory=dict)
    grids: dict[str, Grid] = field(default_factory=dict)
    starts: dict[str, QTensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    """Other parameters, for blocks that have some; they are stored in fp32."""

    def __post_init__(self) -> None:
        sites = tuple(Site(f"linear{i}", (w.shape[0], w.shape[1])) for i, w in enumerate(self.weights))
        self.anatomy = BlockAnatomy((Tap(sites),), ())
        self.formats = {s.name: (spec, self.activations) for s, spec in zip(sites, self.specs, strict=True)}
        self.stats: Mapping[str, Stats] = {}
        self.maps: Mapping[str, Map] = {}
        self.batches, self.device = len(self.x), torch.device("cpu")
        self.generator = torch.Generator().manual_seed(self.seed)

    def weight(self, site: Site) -> Tensor:
        return self.weights[self.anatomy.sites.index(site)].clone()

    def joined(self, batches: Sequence[int]) -> list[int]:
        return list(batches)

    def kind(self, batch: int) -> tuple[int, int]:
        return batch, 1

    def inputs(self, batch: int, stream: str) -> Tensor:
        return self.x[batch] if stream == "quantized" or self.floats is None else self.floats[batch]

    def target(self, batch: int) -> Tensor:
        return self.forward(self.inputs(batch, "float"), {s.name: self.weight(s) for s in self.anatomy.sites})

    def forward(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([x @ weights[site.name].T for site in self.anatomy.sites], -1)

    @property
    def others(self) -> list[str]:
        return list(self.parameters)

    def parameter(self, name: str) -> Tensor:
        return self.parameters[name].clone()

    def stored(self, name: str, value: Tensor) -> Tensor:
        return value

    def set_parameter(self, name: str, value: Tensor) -> None:
        self.parameters[name] = value

    def site_inputs(self, batch: int, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        flat = hidden.reshape(-1, hidden.shape[-1])
        seen = flat if self.activations is None else quantize_activation(flat, self.activations, None)
        return {site.name: (flat, seen) for site in self.anatomy.sites}

    def run(
        self,
        batch: int,
        hidden: Tensor,
        weights: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        quantizers: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> Tensor:
        quantizer = (quantizers or {}).get(self.anatomy.sites[0].name)
        own = {site.name: self.weight(site) for site in self.anatomy.sites}
        return self.forward(hidden if quantizer is None else quantizer(hidden), own | dict(weights))

    def start(self, site: Site) -> QTensor:
        if site.name not in self.starts:
            spec = self.formats[site.name][0]
            assert spec is not None
            grid = fit_range(self.weight(site), spec)
            self.starts[site.name] = QTensor(grid.encode(self.weight(site)), grid)
        return self.starts[site.name]

    def set_codes(self, site: Site, codes: QTensor) -> None:
        self.codes[site.name] = codes

    def set_grid(self, site: Site, grid: Grid) -> None:
        self.grids[site.name] = grid

    def error(self, codes: Mapping[str, QTensor]) -> float:
        """Mean squared error over the whole text, of these codes."""
        weights = {
            s.name: codes[s.name].dequantize() if s.name in codes else self.weight(s) for s in self.anatomy.sites
        }
        pairs = [(self.forward(self.inputs(b, "quantized"), weights), self.target(b)) for b in range(self.batches)]
        return sum(float((a - b).square().mean()) for a, b in pairs) / self.batches
