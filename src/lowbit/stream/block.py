"""One decoder block from 16 bits to codes: observe, transform, round. No file is touched here.

The order is fixed by the slots of a recipe: statistics on the block as it arrived; for every edge the transforms' maps,
folded into fp32 copies and carried over to the statistics; then every tap is rounded, linears behind one input as one
batch. What comes out is what is stored, and what is stored is what makes the next block's inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..graph.anatomy import BlockAnatomy, Edge, Site, Tap
from ..graph.fold import apply_scale
from ..methods.base import Recipe, Stats, Transform
from ..modules.linear import install
from ..numerics.grid import Grid, fit_range, grid_from_range
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.spec import Spec
from .edges import BlockEdge, inspects_reader, stored_scale
from .observe import Forward, Observed, observe

STARVED = 32
"""An expert that saw fewer tokens than this is rounded to nearest: its statistics would be noise."""
REPLAYED_TOKENS = 16384
"""Transforms that try candidates by running the inspected modules do so on about this many tokens, evenly spread."""

Formats = Mapping[str, tuple[Spec | None, Spec | None]]
"""Site name within the block -> (weight format, input format); None keeps 16 bits."""


@dataclass(frozen=True)
class Text:
    """The calibration text as a block sees it: how to run a micro-batch, how many there are, of how many tokens."""

    forward: Forward
    batches: int
    tokens_per_batch: int

    def replayed(self) -> tuple[int, ...]:
        """Evenly spread micro-batches that hold about REPLAYED_TOKENS tokens."""
        count = min(self.batches, max(1, REPLAYED_TOKENS // self.tokens_per_batch))
        return tuple(index * self.batches // count for index in range(count))


@dataclass(frozen=True)
class Outcome:
    """A finished block: quantized linears and every other tensor, by name within the block, and what to report."""

    layers: dict[str, QLayer]
    rest: dict[str, Tensor]
    error_before: float
    """Error of rounding every weight to nearest, without the recipe's steps."""
    error_after: float
    measure: str
    """What the errors are: "output", relative squared error of the block's output, or "weight", of its weights."""
    experts: dict[str, int] = field(default_factory=dict)
    """Tokens that each expert's linears saw."""

    @property
    def starved(self) -> list[str]:
        """Experts' linears that were rounded to nearest for want of tokens."""
        return [name for name, tokens in self.experts.items() if tokens < STARVED]


@torch.no_grad()
def quantize_block(
    block: nn.Module,
    anatomy: BlockAnatomy,
    tensors: Mapping[str, Tensor],
    recipe: Recipe,
    formats: Formats,
    text: Text | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Outcome:
    """Quantize a skeleton's block from its checkpoint `tensors` (names within the block).

    `text` is None for a recipe that needs none. Otherwise the block is left holding the quantized layers, computing in
    `dtype`, ready to make the next block's inputs.
    """
    work = _BlockWork(block, anatomy, recipe, formats, tensors, dtype, device)
    if text is None:
        layers = work.round_taps(anatomy.taps, {})
        return Outcome(layers, work.rest(), *work.weight_errors(layers), "weight")
    install(block, {}, tensors, dtype, device)
    observed = work.observe(text)
    target = observed.outputs[0]
    plain_inputs = {site.name: work.input_grid(site, observed.stats) for site in anatomy.sites}
    experts = {s.name: observed.stats[s.name].tokens for s in anatomy.sites if s.expert is not None and observed.stats}
    work.transform(observed)
    observed.samples.clear()
    layers = work.round_in_order(text) if recipe.round.sequential else work.round_taps(anatomy.taps, observed.stats)
    rest = work.rest()
    work.source = tensors  # fp32 copies go, and the Gram matrices went: the yardstick may use their memory
    install(block, work.plain_layers(plain_inputs), work.rest(), dtype, device)
    before = relative_error(text.forward(block, 0), target)
    install(block, layers, rest, dtype, device)
    return Outcome(layers, rest, before, relative_error(text.forward(block, 0), target), "output", experts)


def relative_error(value: Tensor, target: Tensor) -> float:
    """‖value - target‖² / ‖target‖²."""
    target = target.float()
    return float((value.float() - target).square().sum() / target.square().sum().clamp_min(1e-30))


class _BlockWork:
    """The state of one block between reading and writing: `source` holds the weights that rounding starts from."""

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
        self.source: Mapping[str, Tensor] = tensors

    def weight(self, site: Site) -> Tensor:
        """The site's weight [O, I] in fp32, transforms folded in."""
        weight = self.source[f"{site.name}.weight"].to(self.device)
        return (weight.T if site.transposed else weight).float()

    def rest(self) -> dict[str, Tensor]:
        """Every tensor of the block that is not a quantized weight, in its checkpoint dtype."""
        quantized = {f"{site.name}.weight" for site in self.anatomy.sites if self.formats[site.name][0] is not None}
        return {
            name: self.source.get(name, tensor).detach().to("cpu", tensor.dtype)
            for name, tensor in self.tensors.items()
            if name not in quantized
        }

    # --- observing ----------------------------------------------------------------------------------------------------

    def observe(self, text: Text) -> Observed:
        """Statistics and recorded calls on the block as it arrived, and its output for the first micro-batch."""
        inspect = {edge.inspect for edge in self.anatomy.edges if self._replays(edge)}
        recorded = text.replayed() if inspect else ()
        needs = self.recipe.needs
        return observe(
            self.block,
            self.anatomy.taps,
            needs,
            text.forward,
            text.batches,
            inspect=inspect,
            recorded=recorded,
            outputs=(0,),
        )

    def _replays(self, edge: Edge) -> bool:
        """Whether trying candidates on this edge takes calls of the inspected module (see `BlockEdge.error`)."""
        if not any(transform.replays for transform in self.recipe.transforms):
            return False
        return not inspects_reader(edge) or self.formats[edge.readers[0].name][1] is not None

    def plain_layers(self, inputs: Mapping[str, Grid | None]) -> dict[str, QLayer]:
        """Every quantized site rounded to nearest on its min-max grid: the yardstick of `error_before`."""
        layers = {}
        for site in self.anatomy.sites:
            weights, activations = self.formats[site.name]
            if weights is not None:
                grid = fit_range(self.weight(site), weights)
                codes = QTensor(grid.encode(self.weight(site)), grid)
                layers[site.name] = QLayer(QWeight((codes,)), activations, inputs.get(site.name))
        return layers

    # --- transforming -------------------------------------------------------------------------------------------------

    def transform(self, observed: Observed) -> None:
        """Fold every transform's scales into fp32 weights and carry the statistics over."""
        if not self.recipe.transforms:
            return
        install(self.block, {}, self.tensors, torch.float32, self.device)
        self.source = dict(self.block.named_parameters())
        for transform in self.recipe.transforms:
            for edge in self.anatomy.edges:
                self._transform_edge(transform, edge, observed)

    def _transform_edge(self, transform: Transform, edge: Edge, observed: Observed) -> None:
        formats = [self.formats[site.name] for site in edge.readers]
        stats = [observed.stats[site.name] for site in edge.readers]
        if all(weights is None for weights, _ in formats) or not any(stat.tokens for stat in stats):
            return
        view = BlockEdge(
            edge=edge,
            block=self.block,
            weights=[self.weight(site) for site in edge.readers],
            specs=[weights for weights, _ in formats],
            activations=[inputs for _, inputs in formats],
            stats=stats,
            samples=observed.samples.get(edge.inspect, ()),
            dtype=self.dtype,
        )
        scale = transform.scale(view)
        if scale is None:
            return
        scale = stored_scale(self.block, edge, scale, self.tensors)
        apply_scale(self.block, edge, scale)
        for stat in {id(stat): stat for stat in stats}.values():
            stat.transport(view.to_readers(scale))

    # --- rounding -----------------------------------------------------------------------------------------------------

    def round_taps(self, taps: Sequence[Tap], stats: Mapping[str, Stats]) -> dict[str, QLayer]:
        """Round the quantized sites of `taps`, linears of one tap and format as one matrix."""
        layers = {}
        for tap in taps:
            for sites, spec, scores in self._batches(tap):
                seen = stats.get(tap.name)
                if seen is not None and sites[0].expert is not None and seen.tokens < STARVED:
                    seen = None
                stacked = torch.cat([self.weight(site) for site in sites])
                rounded = self.recipe.round.round(stacked, spec, self.recipe.clip, seen, scores=scores)
                start = 0
                for site in sites:
                    part = rounded.rows(start, start + site.shape[0])
                    inputs = self.formats[site.name][1]
                    layers[site.name] = QLayer(QWeight((part.to("cpu"),)), inputs, self.input_grid(site, stats))
                    start += site.shape[0]
            if tap.name in stats:
                stats[tap.name].release()
        return layers

    def _batches(self, tap: Tap) -> Iterator[tuple[list[Site], Spec, bool]]:
        """The tap's quantized sites in batches that share format and treatment; units must not span two linears."""
        batches: dict[tuple[Spec, bool, str], list[Site]] = {}
        for site in tap.sites:
            spec = self.formats[site.name][0]
            if spec is not None:
                alone = "" if spec.block[0] == 1 else site.name
                batches.setdefault((spec, site.name in self.anatomy.scores, alone), []).append(site)
        for (spec, scores, _), sites in batches.items():
            yield sites, spec, scores

    def round_in_order(self, text: Text) -> dict[str, QLayer]:
        """True-sequential: observe again behind every rounded tap. Experts of one projection count as one tap."""
        stages: dict[str, list[Tap]] = {}
        for tap in self.anatomy.taps:
            site = tap.sites[0]
            key = site.name if site.expert is None else site.name.replace(f".{site.expert}.", ".*.")
            stages.setdefault(key, []).append(tap)
        install(self.block, {}, self.source, self.dtype, self.device)
        layers: dict[str, QLayer] = {}
        for taps in stages.values():
            seen = observe(self.block, taps, self.recipe.needs, text.forward, text.batches)
            fresh = self.round_taps(taps, seen.stats)
            install(self.block, fresh, self.source, self.dtype, self.device)
            layers.update(fresh)
        return layers

    def input_grid(self, site: Site, stats: Mapping[str, Stats]) -> Grid | None:
        """The calibrated grid of a site's inputs; None where they are kept or quantized as they come."""
        spec = self.formats[site.name][1]
        return None if spec is None or spec.dynamic else static_grid(spec, stats.get(site.name))

    def weight_errors(self, layers: Mapping[str, QLayer]) -> tuple[float, float]:
        """Relative squared error of the block's weights: plainly rounded, and as they are."""
        plain = self.plain_layers({})
        sums = [0.0, 0.0, 1e-30]
        for site in self.anatomy.sites:
            if site.name in layers:
                weight = self.weight(site)
                for index, chosen in enumerate((plain, layers)):
                    rounded = chosen[site.name].weight.to(weight.device).dequantize()
                    sums[index] += float((rounded - weight).square().sum())
                sums[2] += float(weight.square().sum())
        return sums[0] / sums[2], sums[1] / sums[2]


def static_grid(spec: Spec, stats: Stats | None) -> Grid:
    """The calibrated grid of a static per-tensor input format; an input never seen gets the range of a unit."""
    if stats is None or stats.minmax is None or stats.minmax.low is None or stats.minmax.high is None:
        return grid_from_range(torch.full((1, 1), -1.0), torch.full((1, 1), 1.0), spec)
    return grid_from_range(stats.minmax.low.min().reshape(1, 1), stats.minmax.high.max().reshape(1, 1), spec)
