"""The slots that every method fills, and the recipe and scheme that put them together.

A method is a frozen dataclass whose fields are its settings and whose one function is its paper. It never sees a model
class, a file or a device: it gets weights, statistics and a number format, and returns scales, grids or codes. What it
needs to know of the inputs it declares in `needs`, and the pipeline observes exactly that.

Shape letters: O output rows, I input columns, T tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import ClassVar, Literal, Protocol, runtime_checkable

from torch import Tensor

from ..graph.anatomy import Edge
from ..numerics.feedback import inverse_factor
from ..numerics.grid import Grid
from ..numerics.qtensor import QTensor
from ..numerics.spec import Spec
from ..numerics.stats import AbsMean, Gram, MinMax

Need = Literal["gram", "absmean", "minmax"]


@dataclass
class Stats:
    """Statistics of one linear's inputs; only what some part of the recipe needs is there."""

    gram: Gram | None = None
    absmean: AbsMean | None = None
    minmax: MinMax | None = None
    tokens: int = 0
    _factors: dict[tuple[float, bool], tuple[Tensor, Tensor | None, Tensor]] = field(default_factory=dict, repr=False)

    @staticmethod
    def observing(needs: frozenset[Need]) -> Stats:
        """Empty statistics of the kinds in `needs`."""
        return Stats(
            Gram() if "gram" in needs else None,
            AbsMean() if "absmean" in needs else None,
            MinMax() if "minmax" in needs else None,
        )

    def update(self, x: Tensor) -> None:
        """Add inputs [T, I]."""
        self._factors.clear()
        self.tokens += x.shape[0]
        for statistic in (self.gram, self.absmean, self.minmax):
            if statistic is not None:
                statistic.update(x)

    def transport(self, scale: Tensor) -> None:
        """Follow a fold that divides the inputs by `scale` [I]."""
        self._factors.clear()
        for statistic in (self.gram, self.absmean, self.minmax):
            if statistic is not None:
                statistic.transport(scale)

    def release(self) -> None:
        """Drop what only rounding needs, the Gram matrix and its factors; ranges and counts stay."""
        self.gram = None
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
            h = self.hessian()
            dead, order = h.diagonal() <= 0, None
            if act_order:
                order = h.diagonal().argsort(descending=True, stable=True)
            self._factors[key] = (inverse_factor(h, damp, order), order, dead)
        return self._factors[key]


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

    def to_source(self, x: Tensor) -> Tensor:
        """Reduce reader channels [I] to source channels: the largest of those that read the same one."""

    def to_readers(self, scale: Tensor) -> Tensor:
        """Spread a scale over source channels to reader channels [I]."""

    def error(self, weights: Sequence[Tensor], scale: Tensor) -> float:
        """Mean squared change of the inspected output if the readers held `weights` (given for unscaled inputs).

        `scale` [I] is what inputs would be divided by before they are quantized, where the scheme quantizes them.
        """


@runtime_checkable
class Transform(Protocol):
    """Finds a function-preserving map for an edge."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    replays: ClassVar[bool]
    """Whether `EdgeView.error` is used, so that the inspected modules' inputs must be kept."""

    def scale(self, view: EdgeView) -> Tensor | None:
        """Positive scale over the edge's source channels, or None to leave the edge alone."""


@runtime_checkable
class Clip(Protocol):
    """Chooses the range that codes cover."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The grid for W [O, I]. `scores`: the rows make queries or keys, whose error passes through a softmax."""


@runtime_checkable
class Round(Protocol):
    """Chooses the codes."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed again after every rounded linear of a block."""

    def reorders(self, spec: Spec) -> bool:
        """Whether groups of this format come out in another order of the columns, with a group index."""

    def round(self, weight: Tensor, spec: Spec, clip: Clip, stats: Stats | None, *, scores: bool) -> QTensor:
        """Codes for W [O, I], fp32. `stats` is None where the inputs were never seen (starved experts)."""


@dataclass(frozen=True)
class Override:
    """Formats for the sites whose full name matches `pattern` (shell wildcards); None keeps 16 bits."""

    pattern: str
    weights: Spec | None = None
    activations: Spec | None = None


@dataclass(frozen=True)
class Scheme:
    """What the result is: number formats of weights and of the activations in front of them."""

    weights: Spec | None
    activations: Spec | None = None
    overrides: tuple[Override, ...] = ()

    def formats(self, name: str) -> tuple[Spec | None, Spec | None]:
        """(weight, activation) formats of the site of this full name; the last matching override wins."""
        for override in reversed(self.overrides):
            if fnmatchcase(name, override.pattern):
                return override.weights, override.activations
        return self.weights, self.activations


@dataclass(frozen=True)
class Recipe:
    """A scheme and the steps that reach it. Frozen: compose with `dataclasses.replace`."""

    scheme: Scheme
    round: Round
    clip: Clip
    transforms: tuple[Transform, ...] = ()
    name: str = ""

    @property
    def needs(self) -> frozenset[Need]:
        """Every statistic that some part needs; static activation ranges need the inputs' extremes."""
        static = any(spec is not None and not spec.dynamic for spec in self._activations())
        parts: tuple[Transform | Clip | Round, ...] = (*self.transforms, self.clip, self.round)
        return frozenset().union(*(part.needs for part in parts), {"minmax"} if static else ())

    @property
    def calibrated(self) -> bool:
        """Whether any text is needed."""
        return bool(self.needs)

    def _activations(self) -> tuple[Spec | None, ...]:
        return (self.scheme.activations, *(override.activations for override in self.scheme.overrides))

    def ignoring(self, patterns: Sequence[str]) -> Recipe:
        """The same recipe with sites matching any of `patterns` kept in 16 bits."""
        kept = tuple(Override(pattern) for pattern in patterns)
        return replace(self, scheme=replace(self.scheme, overrides=self.scheme.overrides + kept))
