"""What a method is given: statistics of a linear's inputs, and views of an edge, a block or a whole model.

The views are protocols that the pipeline fulfils; a method needs to know nothing else of it. What a view lets a method
set is carried out there too.

Shape letters: O output rows, I input columns, T tokens, D width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..graph.anatomy import Anatomy, BlockAnatomy, Edge, Site, Tap
from ..numerics.feedback import inverse_factor, inverse_factors
from ..numerics.grid import Grid
from ..numerics.kv import KV
from ..numerics.maps import Map
from ..numerics.qtensor import QAttention, QTensor
from ..numerics.replay import index
from ..numerics.spec import Spec
from ..numerics.stats import AbsMean, Cross, Gram, MinMax, Square

Need = Literal["gram", "absmean", "minmax", "cross", "square"]


@dataclass
class Stats:
    """Statistics of one linear's inputs; only what some part of the recipe needs is there."""

    gram: Gram | None = None
    absmean: AbsMean | None = None
    minmax: MinMax | None = None
    cross: Cross | None = None
    square: Square | None = None
    tokens: int = 0
    _factors: dict[tuple[float, bool], tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def observing(needs: frozenset[Need]) -> Stats:
        """Empty statistics of the kinds in `needs`."""
        return Stats(
            Gram() if "gram" in needs else None,
            AbsMean() if "absmean" in needs else None,
            MinMax() if "minmax" in needs else None,
            Cross() if "cross" in needs else None,
            Square() if "square" in needs else None,
        )

    def update(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add inputs [T, I]; `original` is what the original model has in their place, if that is observed."""
        self._factors.clear()
        self.tokens += x.shape[0]
        for statistic in (self.gram, self.absmean, self.minmax, self.square):
            if statistic is not None:
                statistic.update(x)
        if self.cross is not None and original is not None:
            self.cross.update(x, original)

    def merge(self, other: Stats) -> None:
        """Add statistics of the same kinds over other inputs, which are not to be used by themselves any more."""
        self._factors.clear()
        self.tokens += other.tokens
        for kind in ("gram", "absmean", "minmax", "cross", "square"):
            mine, theirs = getattr(self, kind), getattr(other, kind)
            if mine is not None and theirs is not None:
                mine.merge(theirs)

    def transport(self, scale: Tensor) -> None:
        """Follow a fold that divides the inputs by `scale` [I]."""
        self._factors.clear()
        for statistic in (self.gram, self.absmean, self.minmax, self.cross, self.square):
            if statistic is not None:
                statistic.transport(scale)

    def release(self) -> None:
        """Drop what only rounding needs, the Gram matrix, its factors and the drift; ranges and counts stay."""
        self.gram = self.cross = None
        self._factors.clear()

    def hessian(self) -> Tensor:
        """The Gram matrix [I, I], Σ x xᵀ."""
        assert self.gram is not None, "the method did not declare that it needs the Gram matrix"
        return self.gram.matrix

    def factor(self, damp: float, act_order: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        """(U, order, dead): the inverse factor of the Gram matrix, columns sorted by falling diagonal if `act_order`.

        `dead` [I] marks the columns that were never excited, in natural order. Kept, since all linears behind one input
        share it.
        """
        key = (damp, act_order)
        if key not in self._factors:
            order, dead = self.order(act_order)
            self._factors[key] = (inverse_factor(self.hessian(), damp, order), order, dead)
        return self._factors[key]

    def order(self, act_order: bool) -> tuple[Tensor | None, Tensor]:
        """(order, dead) of `factor`."""
        diagonal = self.hessian().diagonal()
        order = diagonal.argsort(descending=True, stable=True) if act_order else None
        return order, diagonal <= 0


def factored(stats: Sequence[Stats], damp: float, act_order: bool) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
    """`Stats.factor` of inputs of one width [I], factorized as one batch: U [E, I, I], their orders, and their dead."""
    orders, dead = zip(*(seen.order(act_order) for seen in stats), strict=True)
    return inverse_factors([seen.hessian() for seen in stats], damp, orders), list(orders), list(dead)


def to_source(edge: Edge, x: Tensor) -> Tensor:
    """Reduce reader channels [I] of an edge to its source channels: the largest of those that read the same one."""
    if edge.channels is None:
        return x
    channels = index(edge.channels, x.device)
    reduced = x.new_zeros(int(channels.max()) + 1)
    return reduced.scatter_reduce(0, channels, x, "amax", include_self=False)


def to_readers(edge: Edge, x: Tensor) -> Tensor:
    """Spread values over an edge's source channels to its reader channels [I]."""
    return x if edge.channels is None else x[index(edge.channels, x.device)]


class EdgeView(Protocol):
    """What a transform may know about one edge: its readers' weights, formats and inputs, and a way to try weights."""

    edge: Edge
    weights: Sequence[Tensor]
    """fp32 [O, I] of every reader that is quantized, in the order of `edge.readers`."""
    specs: Sequence[Spec | None]
    activations: Sequence[Spec | None]

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude of the input channels over all readers' tokens, [I]."""

    @property
    def amax(self) -> Tensor:
        """Largest magnitude of the input channels, [I]."""

    @property
    def low(self) -> Tensor:
        """Smallest value of the input channels, [I]."""

    @property
    def high(self) -> Tensor:
        """Largest value of the input channels, [I]."""

    def to_source(self, x: Tensor) -> Tensor:
        """Reduce reader channels [I] to source channels: the largest of those that read the same one."""

    def to_readers(self, scale: Tensor) -> Tensor:
        """Spread a scale over source channels to reader channels [I]."""

    def error(self, weights: Sequence[Tensor], scale: Tensor, shift: Tensor | None = None) -> float:
        """Mean squared change of the inspected output if the readers held `weights` (given for unscaled inputs).

        `scale` and `shift` [I] are what inputs would be divided by, after the shift was subtracted, before they are
        quantized, where the scheme quantizes them. The readers' biases repair the shift as the original weights would.
        """


class EdgeStack(Protocol):
    """E edges like one another, each with one reader, by whose output alone it is judged; nothing else is quantized.

    Channels of the source are those of the reader.
    """

    @property
    def weights(self) -> Tensor:
        """The readers' weights, fp32 [E, O, I]."""

    @property
    def spec(self) -> Spec:
        """The format of every reader."""

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude of the input channels, [E, I]."""

    def errors(self, weights: Tensor) -> Tensor:
        """`EdgeView.error` of every edge [E], if the readers held `weights` [E, O, I] (given for unscaled inputs)."""


@dataclass(frozen=True)
class Fold:
    """A function-preserving map for an edge: the source's output x becomes (x - shift) / scale, both [S] over its
    channels; readers and their biases make up for it. Shifts are lawful where `edge.shift` says so.
    """

    scale: Tensor
    shift: Tensor | None = None


class ModelView(Protocol):
    """The whole model in memory, as a learned rotation sees it: weights as functions of the matrices, and the loss."""

    anatomy: Anatomy
    windows: list[int]
    """Tokens of every window of the text."""
    device: torch.device
    data_aware: bool
    """Whether rounding will look at the inputs."""

    def merged(self, matrices: Mapping[str, Tensor], *, quantized: bool) -> dict[str, Tensor]:
        """The parameters that matrices [n, n] change, by full name, weights fake-quantized if `quantized`; with
        gradients. The tables and the head are left to `loss`.
        """

    def loss(self, window: int, merged: Mapping[str, Tensor], residual: Tensor | None) -> Tensor:
        """Mean cross-entropy of the next token, inputs fake-quantized as the scheme says, with gradients."""


Batch = int | tuple[int, ...]
"""A micro-batch, or some that are run in one call (`BlockView.joined`)."""
Quantizer = Callable[[Tensor], Tensor]
"""What happens to a linear's inputs [..., I] in training: maps, clipping, fake quantization; gradients pass."""


class BlockView(Protocol):
    """One block as a trained method sees it: its weights and text, its original's outputs, and where results go.

    There are two streams of inputs: "quantized", what the quantized blocks before this one give, and "float", what the
    original model has here. Targets are the original block's outputs on the float stream. Whatever is set here is
    carried out by the pipeline: maps are folded into weights, and statistics observed again where Round needs them.
    """

    anatomy: BlockAnatomy
    place: tuple[int, int]
    """The block's number, from 0, and how many blocks there are."""
    formats: Mapping[str, tuple[Spec | None, Spec | None]]
    stats: Mapping[str, Stats]
    """Statistics of the block's inputs by site name, on the quantized stream, transforms folded in."""
    batches: int
    """Micro-batches of the text, each of about the same number of tokens."""
    generator: torch.Generator
    """Random numbers of this seed and block (on the CPU, so that every device draws the same)."""
    device: torch.device
    others: Sequence[str]
    """Names of the parameters beside the weights of sites that are vectors: gains and biases."""
    kv: KV | None
    """What the scheme caches of this block's attention; None where that keeps 16 bits."""
    maps: Mapping[str, Map]
    """Online maps that were decided before, by site name: nothing more is folded into such inputs."""

    def weight(self, site: Site) -> Tensor:
        """W [O, I] in fp32 as rounding would take it, transforms folded in."""

    def parameter(self, name: str) -> Tensor:
        """Any other parameter of the block in fp32: a bias, a norm's gain."""

    def stored(self, name: str, value: Tensor) -> Tensor:
        """What a file would hold of this value of such a parameter, in fp32."""

    def joined(self, batches: Sequence[int]) -> list[Batch]:
        """The micro-batches in as few calls of the block as the device and their shapes allow."""

    def kind(self, batch: Batch) -> tuple[int, int]:
        """The same for micro-batches whose calls of the block differ in their hidden states alone (`Replayed`)."""

    def inputs(self, batch: Batch, stream: Literal["float", "quantized"]) -> Tensor:
        """The block's input hidden states [b, T, D] for one micro-batch, or some."""

    def site_inputs(self, batch: int, hidden: Tensor) -> Mapping[str, tuple[Tensor, Tensor]]:
        """What the block's linears see of the micro-batch while their weights are not rounded, by site name.

        Inputs [T, I] in front of the scheme's quantization, behind online maps, and behind it: the same tensor twice
        where inputs are not quantized. Experts that no token was routed to are not there.
        """

    def target(self, batch: Batch, stream: Literal["float", "quantized"] = "float") -> Tensor:
        """The original block's output for the micro-batch, or some, of the float stream, [b, T, D]; of the quantized
        stream it is computed anew, by the block as it is before it is rounded.
        """

    def run(
        self,
        batch: Batch,
        hidden: Tensor,
        weights: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        quantizers: Mapping[str, Quantizer] | None = None,
        attention: QAttention | None = None,
    ) -> Tensor:
        """The block's output if its sites held `weights` [O, I] (by site name) and its other parameters `parameters`.

        Inputs pass the scheme's fake quantization, or what `quantizers` says by site name. Keys and values are kept in
        16 bits, or quantized as `attention` says. Differentiable in all.
        """

    def key_width(self) -> int:
        """Width of the keys that the attention hands to its cache; 0 where there is none."""

    def start(self, site: Site) -> QTensor:
        """The codes that Round chose; only for methods that come after it."""

    def rounded(self, site: Site) -> Tensor:
        """What the site holds by now, codes and all that is added to them, in fp32 [O, I]; only after Round."""

    def fold(self, edge: Edge, fold: Fold) -> None:
        """Fold a map into the edge."""

    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Round this weight [O, I] instead; for linears whose inputs are mapped, the weight for mapped inputs."""

    def set_parameter(self, name: str, value: Tensor) -> None:
        """Store this value of a parameter that is not quantized."""

    def set_map(self, tap: Tap, map: Map) -> None:
        """Apply an online map to the inputs of all linears of the tap, which then hold W P⁻ᵀ."""

    def set_grid(self, site: Site, grid: Grid) -> None:
        """Round onto this grid, whatever the clip would choose."""

    def set_key_map(self, map: Map) -> None:
        """Apply a map of head width to the keys behind the rotary embedding, before they are quantized."""

    def set_kv_clips(self, clips: Tensor) -> None:
        """Ranges of keys (row 0) and values (row 1) cover these parts [2, 2] of their smallest and largest value."""

    def set_input_clip(self, site: Site, clip: Tensor) -> None:
        """Dynamic ranges of the inputs cover these parts [2] of their smallest and largest value."""

    def set_codes(self, site: Site, codes: QTensor) -> None:
        """These are the site's codes; only for methods that come after Round."""
