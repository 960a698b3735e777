"""One decoder block from 16 bits to codes: observe, transform, train, round, correct. No file is touched here.

The order is fixed by the slots of a recipe: statistics on the block as it arrived; for every edge the transforms' maps,
folded into fp32 copies and carried over to the statistics; what is trained before rounding; every tap rounded, linears
behind one input as one batch; what is trained afterwards; corrections. What comes out is what is stored, and what is
stored is what makes the next block's inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..graph.anatomy import Edge
from ..methods.base import StackingTransform, Transform
from ..methods.views import Fold, Stats
from ..modules.linear import install
from ..numerics.grid import Grid
from ..numerics.qtensor import QAttention, QLayer
from .edge_stack import ExpertEdges, together
from .edges import BlockEdge, inspects_reader
from .memory import release_memory
from .observe import Observed, observe
from .rounding import STARVED, corrected, rounded
from .stages import Layout, Passes, stages
from .student import Student
from .text import Text
from .work import BlockWork

LARGE = 32 << 20
"""Bytes of a block from which freed memory is given back between its stages; for a small one it takes too long."""


@dataclass(frozen=True)
class Outcome:
    """A finished block: quantized layers and every other tensor, by name within the block, and what to report."""

    layers: dict[str, QLayer | QAttention]
    rest: dict[str, Tensor]
    error_before: float
    """Error of rounding every weight to nearest, without the recipe's steps."""
    error_after: float
    measure: str
    """What the errors are: "output", relative squared error of the block's output, or "weight", of its weights."""
    experts: dict[str, int] = field(default_factory=dict)
    """Tokens that each expert's linears saw."""
    advanced: bool = False
    """Whether the text's inputs have become this block's outputs, made on the way by what is stored."""

    @property
    def starved(self) -> list[str]:
        """Experts' linears that were rounded to nearest for want of tokens."""
        return [name for name, tokens in self.experts.items() if tokens < STARVED]


@torch.no_grad()
def quantize_block(work: BlockWork, text: Text | None, seed: int = 0) -> Outcome:
    """Quantize a block.

    `text` is None for a recipe that needs none. Otherwise the next block's inputs have been made already (`advanced`),
    or the block is left holding the quantized layers, computing in the working dtype, ready to make them. `seed` is
    this block's own.
    """
    recipe = work.recipe
    if text is None:
        layers = rounded(work, work.anatomy.taps, {}, seed)
        finished: dict[str, QLayer | QAttention] = {**layers, **work.kept(), **work.attention()}
        return Outcome(finished, work.rest(), *_weight_errors(work, layers), "weight")
    work.install_dense()
    work.watch_keys_and_values()
    layout, start = Layout(), text.inputs[0]
    observed = _observe(work, text, recipe.folds, outputs=(0,), layout=layout)
    text.fill_targets(work.block)
    target = observed.outputs[0] if text.targets is None else text.targets[0].to(work.device)
    plain_inputs = {site.name: work.input_grid(site, observed.stats) for site in work.anatomy.sites}
    experts = _tokens_of_experts(work, observed.stats)
    observed = _transform(work, observed, text)
    _quantize_cache(work, text, moved=bool(recipe.folds))
    observed = _train(work, observed, text, seed)
    if recipe.sequential:
        layers, experts = _round_in_order(work, text, layout, seed)
    else:
        layers = rounded(work, work.anatomy.taps, observed.stats, seed)
    advanced = recipe.sequential and text.onward and not recipe.retrains
    layers = _train_codes(work, layers, observed, text, seed)
    if recipe.retrains:
        layers = corrected(work, layers, observed.stats)
    finished, rest = {**layers, **work.kept(), **work.attention()}, work.rest()
    before = _plain_error(work, plain_inputs, text, start, target)
    if advanced:
        output = text.inputs[0].to(work.device)
    else:
        install(work.block, finished, rest, work.dtype, work.device)
        output = text.call(work.block, 0, start)
    return Outcome(finished, rest, before, relative_error(output, target), "output", experts, advanced)


def relative_error(value: Tensor, target: Tensor) -> float:
    """‖value - target‖² / ‖target‖²."""
    target = target.float()
    return float((value.float() - target).square().sum() / target.square().sum().clamp_min(1e-30))


def _plain_error(
    work: BlockWork, inputs: Mapping[str, Grid | None], text: Text, start: Tensor, target: Tensor
) -> float:
    """Error of plain rounding. It comes last: fp32 copies and Gram matrices are gone, and their memory is free.

    What is rounded is the block as the checkpoint has it, before any rotation, on the same text turned back.
    """
    plain = work.unturned()
    plain.restore_linears()
    work.source = {}
    if work.residual is not None:
        start, target = (turned_back(states, work.residual) for states in (start, target))
    if work.turned and any(grid is not None for grid in inputs.values()):
        inputs = _plain_inputs(plain, text, start)
    install(work.block, plain.plain_layers(inputs), plain.rest(), work.dtype, work.device)
    return relative_error(text.call(work.block, 0, start), target)


def turned_back(states: Tensor, residual: Tensor) -> Tensor:
    """Hidden states [b, T, D] of a rotated model as the original has them."""
    return (states.to(residual.device, torch.float64) @ residual.T).to(states.dtype)


def _plain_inputs(plain: BlockWork, text: Text, start: Tensor) -> dict[str, Grid | None]:
    """Static input ranges of the block before its rotation, over the very text that plain rounding is judged on."""

    def forward(block: nn.Module, batch: int) -> Tensor:
        return text.call(block, batch, start)

    install(plain.block, {}, plain.source, plain.dtype, plain.device)
    observed = observe(plain.block, plain.anatomy.taps, frozenset({"minmax"}), forward, 1)
    return {site.name: plain.input_grid(site, observed.stats) for site in plain.anatomy.sites}


def _tokens_of_experts(work: BlockWork, stats: Mapping[str, Stats]) -> dict[str, int]:
    experts = [site.name for site in work.anatomy.sites if site.expert is not None]
    return {name: stats[name].tokens for name in experts if name in stats}


# --- observing --------------------------------------------------------------------------------------------------------


def _observe(
    work: BlockWork,
    text: Text,
    transforms: Sequence[Transform],
    outputs: Sequence[int] = (),
    layout: Layout | None = None,
) -> Observed:
    """Statistics, recorded calls of what the transforms inspect, and outputs, on the block as it is installed.

    The first micro-batch, if it is among the outputs, also fills `layout`.
    """
    needs, kv = work.recipe.arrival_needs, work.recipe.scheme.kv
    if kv is not None and kv.static:
        needs |= {"minmax"}  # keys and values are watched in the same pass, which must be over all text then

    def forward(block: nn.Module, batch: int) -> Tensor:
        if layout is None or batch:
            return text.forward(block, batch)
        with layout.watching(block, work.anatomy.sites):
            return text.forward(block, batch)

    inspect = set()
    if any(transform.replays for transform in transforms):
        inspect = {edge.inspect for edge in work.anatomy.edges if _replays(work, edge)}
    return observe(
        work.block,
        work.anatomy.taps,
        needs,
        forward,
        text.batches,
        inspect=inspect,
        recorded=text.replayed(work.lanes) if inspect else (),
        outputs=outputs,
        original=text.forward_clean if "cross" in needs else None,
        lanes=work.lanes,
    )


def _again(work: BlockWork, text: Text, transforms: Sequence[Transform] = ()) -> Observed:
    """Observe the block as it is now, because maps changed what the linears see; `transforms` are those to come."""
    work.install_dense()
    return _observe(work, text, transforms)


def _replays(work: BlockWork, edge: Edge) -> bool:
    """Whether trying candidates on this edge takes calls of the inspected module (see `BlockEdge.error`)."""
    return not inspects_reader(edge) or edge.shift or work.formats[edge.readers[0].name][1] is not None


# --- transforming -----------------------------------------------------------------------------------------------------


def _transform(work: BlockWork, observed: Observed, text: Text) -> Observed:
    """Fold every transform's maps into fp32 weights; statistics follow a scale, and are taken again after a shift.

    Recorded calls follow neither: they are taken again where a later transform wants them.
    """
    if work.recipe.folds:
        work.widen()
    for index, transform in enumerate(work.recipe.folds):
        asked = [edge for edge in work.anatomy.edges if _asked(work, edge, observed.stats)]
        folds = [fold for run in together(work, asked) for fold in _transform_edges(work, transform, run, observed)]
        later = work.recipe.folds[index + 1 :]
        made = [fold for fold in folds if fold is not None]
        if any(fold.shift is not None for fold in made) or (made and any(other.replays for other in later)):
            observed = _again(work, text, later)
            work.widen()
    observed.samples.clear()
    return observed


def _asked(work: BlockWork, edge: Edge, stats: Mapping[str, Stats]) -> bool:
    """Whether some reader of the edge is quantized and has seen tokens, as channels that a scale still reaches."""
    if all(work.formats[site.name][0] is None for site in edge.readers):
        return False
    if any(site.name in work.maps for site in edge.readers):
        return False  # channels are mixed before they are quantized: no scale of one of them reaches its neighbours
    return any(stats[site.name].tokens for site in edge.readers)


def _transform_edges(
    work: BlockWork, transform: Transform, edges: Sequence[Edge], observed: Observed
) -> list[Fold | None]:
    """A map for each of some edges, folded in; several are experts', whose maps know nothing of each other."""
    views = [_view(work, edge, observed) for edge in edges]
    if len(views) > 1 and isinstance(transform, StackingTransform):
        found = transform.fold_stack(ExpertEdges(views))
    else:
        found = [transform.fold(view) for view in views]
    folds = zip(views, work.lanes.agreed(found), strict=True)
    return [None if fold is None else _folded(work, view, fold) for view, fold in folds]


def _view(work: BlockWork, edge: Edge, observed: Observed) -> BlockEdge:
    formats = [work.formats[site.name] for site in edge.readers]
    return BlockEdge(
        edge=edge,
        block=work.block,
        weights=[work.weight(site) for site in edge.readers],
        specs=[weights for weights, _ in formats],
        activations=[inputs for _, inputs in formats],
        stats=[observed.stats[site.name] for site in edge.readers],
        samples=observed.samples.get(edge.inspect, ()),
        dtype=work.dtype,
        maps=work.maps,
        lanes=work.lanes,
    )


def _folded(work: BlockWork, view: BlockEdge, fold: Fold) -> Fold:
    """The map as it is stored, carried out on the weights and on what is known of the inputs."""
    fold = work.fold(view.edge, fold)
    for stat in {id(stat): stat for stat in view.stats}.values():
        stat.transport(view.to_readers(fold.scale))
    return fold


# --- training ---------------------------------------------------------------------------------------------------------


def _train(work: BlockWork, observed: Observed, text: Text, seed: int) -> Observed:
    """Run the trained methods that come before rounding, and observe again what they changed."""
    for method in work.recipe.reconstruct:
        if not method.after:
            student = Student(work, text, observed.stats, {}, seed)
            with torch.enable_grad():
                method.train(student)
            if student.moved:
                _quantize_cache(work, text, moved=True)
            if student.moved and work.recipe.arrival_needs:
                observed = _again(work, text)
    return observed


def _train_codes(
    work: BlockWork, layers: dict[str, QLayer], observed: Observed, text: Text, seed: int
) -> dict[str, QLayer]:
    """Run the trained methods that come after rounding: their codes take the place of those in `layers`."""
    for method in work.recipe.reconstruct:
        if method.after:
            student = Student(work, text, observed.stats, layers, seed)
            with torch.enable_grad():
                method.train(student)
            layers = student.layers
    return layers


def _quantize_cache(work: BlockWork, text: Text, moved: bool) -> None:
    """Quantize keys and values from here on; static ranges are taken again where anything has `moved` since."""
    kv = work.recipe.scheme.kv
    if moved and kv is not None and kv.static:
        work.install_dense()
        work.watch_keys_and_values()
        for batch in range(text.batches):
            text.forward(work.block, batch)
    work.quantize_keys_and_values()


# --- rounding ---------------------------------------------------------------------------------------------------------


def _round_in_order(work: BlockWork, text: Text, layout: Layout, seed: int) -> tuple[dict[str, QLayer], dict[str, int]]:
    """True-sequential: every stage is rounded on what the rounded stages before it give; also the tokens of experts.

    The block computes from the start with all else as it will be stored, and corrections are made at once, unless the
    codes are trained afterwards: so what comes out behind the last stage are the next block's inputs.
    """
    recipe, rest = work.recipe, work.rest()
    work.install_dense()
    install(work.block, {**work.kept(), **work.attention()}, rest, work.dtype, work.device)
    wanted = {site.name for site, _ in work.quantized()}
    order = [s for s in stages(work.anatomy.taps) if any(site.name in wanted for tap in s for site in tap.sites)]
    sites, edges = work.anatomy.sites, work.anatomy.edges
    passes = Passes(work.block, sites, edges, order, layout, text.forward, text.batches, text.budget, work.lanes)
    layers: dict[str, QLayer] = {}
    experts: dict[str, int] = {}
    for index, stage in enumerate(order):
        stats = passes.observe(index, recipe.rounding_needs)
        experts.update(_tokens_of_experts(work, stats))
        fresh = rounded(work, stage, stats, seed)
        install(work.block, fresh, rest, work.dtype, work.device)
        layers.update(fresh)
        if work.nbytes > LARGE:
            release_memory()
    if text.onward and not recipe.retrains:
        for batch, output in enumerate(passes.outputs()):
            text.inputs[batch] = output
    return layers, experts


def _weight_errors(work: BlockWork, layers: Mapping[str, QLayer]) -> tuple[float, float]:
    """Relative squared error of the block's weights: plainly rounded before any rotation, and as they are."""
    plain = work.unturned()
    return plain.weight_error(plain.plain_layers({})), work.weight_error(layers)
