"""A block between reading and writing: the weights that rounding starts from, and what has been decided about them.

`source` holds every parameter by name within the block: the checkpoint's tensors at first, fp32 copies with the folds
carried out once something is folded. Whatever installs the block to run it (to observe, to train, to propagate) asks
here what the block is made of.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ..graph.anatomy import BlockAnatomy, Edge, Site, Tap
from ..graph.fold import apply_scale, apply_shift
from ..methods.recipe import Recipe
from ..methods.views import Fold, Need, Stats
from ..modules.attention import attach, attached
from ..modules.linear import QLinear, install
from ..numerics.grid import Grid, fit_range, grid_from_range
from ..numerics.kv import Affine
from ..numerics.maps import Map
from ..numerics.qtensor import QAttention, QLayer, QTensor, QWeight
from ..numerics.spec import BF16, Spec
from .edges import stored_scale, stored_shift
from .lanes import ALONE

Formats = Mapping[str, tuple[Spec | None, Spec | None]]
"""Site name within the block -> (weight format, input format); None keeps 16 bits."""


@dataclass(frozen=True)
class FixedGrid:
    """A `Clip` whose answer is known: the grid that a trained method chose for one site."""

    grid: Grid
    name: ClassVar[str] = "fixed"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The grid for W [O, I]."""
        return self.grid


class BlockWork:
    """One block, its anatomy and formats, and the state of the work on it."""

    def __init__(
        self,
        block: nn.Module,
        anatomy: BlockAnatomy,
        recipe: Recipe,
        formats: Formats,
        tensors: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block, self.anatomy, self.recipe, self.formats = block, anatomy, recipe, formats
        self.tensors, self.dtype, self.device = tensors, dtype, device
        self.source: dict[str, Tensor] = dict(tensors)
        self.place = (0, 1)
        """The block's number and how many blocks there are."""
        self.lanes = ALONE
        """The processes that share the work."""
        self.stack_bytes = 0
        """What working on experts as one stack may take; if that is too little for two, it is one by one."""
        self.maps: dict[str, Map] = {}
        self.clips: dict[str, Tensor] = {}
        self.grids: dict[str, Grid] = {}
        self.turned = False
        """Whether a rotation of the whole model has been carried out on the block."""
        self.residual: Tensor | None = None
        """The orthogonal matrix by which the residual stream is turned; None where it is as it was."""
        self._born = {site.name: block.get_submodule(site.name) for site in anatomy.sites}
        self.key_map: Map | None = None
        self.kv_clips: Tensor | None = None
        self.kv_affine: tuple[Affine | None, Affine | None] = (None, None)

    # --- what it is made of -------------------------------------------------------------------------------------------

    def weight(self, site: Site) -> Tensor:
        """The site's weight [O, I] in fp32, everything folded in."""
        weight = self.source[f"{site.name}.weight"].to(self.device)
        return (weight.T if site.transposed else weight).float()

    @property
    def nbytes(self) -> int:
        """Bytes of the block in the checkpoint."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def quantized(self) -> Iterator[tuple[Site, Spec]]:
        """The sites whose weights get a format, and which."""
        for site in self.anatomy.sites:
            spec = self.formats[site.name][0]
            if spec is not None:
                yield site, spec

    def layer(self, site: Site, weight: QWeight, input_grid: Grid | None) -> QLayer:
        """What is stored of a site with this weight."""
        inputs = self.formats[site.name][1]
        return QLayer(weight, inputs, input_grid, self.maps.get(site.name), self.clips.get(site.name))

    def input_grid(self, site: Site, stats: Mapping[str, Stats]) -> Grid | None:
        """The calibrated grid of a site's inputs; None where they are kept or quantized as they come."""
        spec = self.formats[site.name][1]
        return None if spec is None or spec.dynamic else static_grid(spec, stats.get(site.name))

    def kept(self) -> dict[str, QLayer]:
        """Sites that keep 16-bit weights and yet are more than a plain linear: their inputs are mapped or quantized."""
        layers = {}
        for site in self.anatomy.sites:
            weights, inputs = self.formats[site.name]
            if weights is None and (inputs is not None or site.name in self.maps):
                stored = self.weight(site).to("cpu", self.tensors[f"{site.name}.weight"].dtype)
                layers[site.name] = self.layer(site, QWeight((), dense=stored), None)
        return layers

    def attention(self) -> dict[str, QAttention]:
        """The block's quantized keys and values, by the path of its attention; empty where the scheme keeps 16 bits."""
        kv = self.recipe.scheme.kv
        if kv is None:
            return {}
        return {self.anatomy.attention: QAttention(kv, self.key_map, self.kv_clips, self.kv_affine)}

    def rest(self) -> dict[str, Tensor]:
        """Every tensor of the block that no quantized or mapped linear holds, in its checkpoint dtype."""
        held = {f"{site.name}.weight" for site, _ in self.quantized()}
        held |= {f"{name}.weight" for name in self.kept()}
        return {
            name: self.source.get(name, tensor).detach().to("cpu", tensor.dtype)
            for name, tensor in self.tensors.items()
            if name not in held
        }

    # --- changes ------------------------------------------------------------------------------------------------------

    def widen(self) -> None:
        """Hold fp32 copies of the parameters in the block itself, in plain linears: from here on they can be changed.

        Online maps are not in those: whoever runs the block puts them in front.
        """
        self.restore_linears()
        for name, tensor in self.source.items():
            if tensor is self.tensors.get(name) and tensor.is_floating_point():
                self.source[name] = tensor.to(self.device, torch.float32, copy=True)
        install(self.block, {}, self.source, torch.float32, self.device)
        self.source = {**self.source, **dict(self.block.named_parameters())}

    def restore_linears(self) -> None:
        """Put the block's own linears back where quantized or mapped ones stand, to be filled anew."""
        for name, module in self._born.items():
            if isinstance(self.block.get_submodule(name), QLinear):
                path, _, leaf = name.rpartition(".")
                setattr(self.block.get_submodule(path), leaf, module)

    def store(self, name: str, value: Tensor) -> None:
        """Let a parameter of the widened block have this value."""
        self.source[name].copy_(value)

    def store_weight(self, site: Site, weight: Tensor) -> None:
        """Let a site of the widened block have this weight [O, I]."""
        self.store(f"{site.name}.weight", weight.T if site.transposed else weight)

    def fold(self, edge: Edge, fold: Fold) -> Fold:
        """Fold a map into an edge of the widened block; returns it as it could be stored. Online maps come later."""
        assert not any(site.name in self.maps for site in edge.readers), "folds come before online maps"
        scale = stored_scale(self.block, edge, fold.scale, self.tensors)
        shift = fold.shift
        if shift is not None:
            shift = stored_shift(self.block, edge, scale, shift, self.tensors)
            apply_shift(self.block, edge, shift)
        apply_scale(self.block, edge, scale)
        return Fold(scale, shift)

    def set_map(self, tap: Tap, map: Map) -> None:
        """Map the inputs of all linears of a tap online, and their weights so that nothing changes."""
        for site in tap.sites:
            self.store_weight(site, map.inverse_weight(self.weight(site).double()).float())
            self.maps[site.name] = map

    def unturned(self) -> BlockWork:
        """The same block with nothing done to it; once the checkpoint's tensors are installed it computes so."""
        work = BlockWork(self.block, self.anatomy, self.recipe, self.formats, self.tensors, self.dtype, self.device)
        work._born = self._born
        return work

    # --- running ------------------------------------------------------------------------------------------------------

    def install_dense(self) -> None:
        """Make the block compute what it computes before rounding, in the working dtype, online maps included."""
        mapped = {
            site.name: QLayer(QWeight((), dense=self.weight(site)), input_map=self.maps[site.name])
            for site in self.anatomy.sites
            if site.name in self.maps
        }
        held = {f"{name}.weight" for name in mapped}
        install(self.block, mapped, {n: t for n, t in self.source.items() if n not in held}, self.dtype, self.device)

    def watch_keys_and_values(self) -> None:
        """Let the attention note the ranges of what it caches, where the scheme calibrates them."""
        kv = self.recipe.scheme.kv
        if kv is not None and kv.static:
            attach(self.block.get_submodule(self.anatomy.attention), kv, self.key_map)

    def quantize_keys_and_values(self) -> None:
        """Let the attention quantize what it caches from here on, on the ranges it noted if they are static."""
        for layer in attached(self.block).values():
            layer.freeze()
            self.kv_affine = (layer.affine[0], layer.affine[1])
        install(self.block, self.attention(), {}, self.dtype, self.device)

    def plain_layers(self, inputs: Mapping[str, Grid | None]) -> dict[str, QLayer]:
        """Every quantized site rounded to nearest on its min-max grid: the yardstick of `error_before`."""
        layers = {}
        for site, spec in self.quantized():
            weight = QWeight((), dense=self.weight(site))
            if spec.number != BF16:
                grid = fit_range(self.weight(site), spec)
                weight = QWeight((QTensor(grid.encode(self.weight(site)), grid),))
            layers[site.name] = self.layer(site, weight, inputs.get(site.name))
        return layers

    def weight_error(self, layers: Mapping[str, QLayer]) -> float:
        """Relative squared error of the quantized weights, all together."""
        error, total = 0.0, 1e-30
        for site, _ in self.quantized():
            weight = self.weight(site)
            error += float((layers[site.name].weight.to(weight.device).dequantize() - weight).square().sum())
            total += float(weight.square().sum())
        return error / total


def static_grid(spec: Spec, stats: Stats | None) -> Grid:
    """The calibrated grid of a static per-tensor input format; an input never seen gets the range of a unit.

    Of NVFP4 it is the tensor scale that is calibrated: the grid has that one alone (see `modules.linear.local_grid`).
    """
    low, high = torch.full((1, 1), -1.0), torch.full((1, 1), 1.0)
    if stats is not None and stats.minmax is not None and stats.minmax.low is not None:
        assert stats.minmax.high is not None
        low, high = stats.minmax.low.min().reshape(1, 1), stats.minmax.high.max().reshape(1, 1)
    grid = grid_from_range(low, high, spec)
    return grid if grid.outer is None else Grid(spec, grid.outer)
