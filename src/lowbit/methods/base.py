"""The slots that every method fills; what it is given there is in `views`.

A method is a frozen dataclass whose fields are its settings and whose one function is its paper. It never sees a model
class, a file or a device: it gets weights, statistics and a number format, and returns scales, grids or codes. What it
needs to know of the inputs it declares in `needs`, and the pipeline observes exactly that.

Shape letters: O output rows, I input columns, T tokens, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from ..graph.anatomy import Anatomy
from ..numerics.grid import Grid
from ..numerics.maps import Map
from ..numerics.qtensor import Outliers, QTensor, QWeight
from ..numerics.spec import Spec
from .scheme import Scheme
from .views import BlockView, EdgeStack, EdgeView, Fold, ModelView, Need, Stats


@runtime_checkable
class Rotation(Protocol):
    """Turns the whole model before anything is observed: merged into weights, or applied online where nothing takes it.

    It stands first among the transforms. A matrix that is merged is named "residual", Q [D, D], by which the residual
    stream is multiplied, or "heads.i", [h, h], for the values within every head of block i.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    @property
    def residual(self) -> bool:
        """Whether the residual stream is turned, which every norm and table of the model must allow."""

    def online(self, anatomy: Anatomy, block: int) -> Mapping[str, Map]:
        """The maps of inputs that stay in the block, by the name of their tap."""

    def key_map(self, anatomy: Anatomy, block: int) -> Map | None:
        """What turns keys behind their position embedding, where a cache quantizes them."""

    def matrices(self, anatomy: Anatomy) -> dict[str, Tensor]:
        """The merged matrices in fp64; of a rotation that learns, those that it starts from."""


@runtime_checkable
class LearnedRotation(Rotation, Protocol):
    """A rotation whose matrices are learned on the text, with the whole model in memory."""

    def batch_of(self, window: int, device: torch.device) -> int:
        """Windows of a step, if none has more than that many tokens."""

    def learn(self, view: ModelView) -> tuple[dict[str, Tensor], list[float]]:
        """The merged matrices in fp64, and the loss of every step."""


@runtime_checkable
class Transform(Protocol):
    """Finds a function-preserving map for an edge."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    replays: ClassVar[bool]
    """Whether `EdgeView.error` is used, so that the inspected modules' inputs must be kept."""

    def fold(self, view: EdgeView) -> Fold | None:
        """The map, its scale positive, or None to leave the edge alone."""


@runtime_checkable
class StackingTransform(Transform, Protocol):
    """A transform that takes a mixture's edges between an expert's linears as one batch, where that pays."""

    def fold_stack(self, stack: EdgeStack) -> list[Fold | None]:
        """`fold` for every edge."""


@runtime_checkable
class Clip(Protocol):
    """Chooses the range that codes cover."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        """The grid for W [O, I]. `scores`: the rows make queries or keys, whose error passes through a softmax."""


@runtime_checkable
class StackingClip(Clip, Protocol):
    """A clip that searches the ranges of many weights at once, where that pays: those of a mixture's experts."""

    def fit_stack(self, weights: Sequence[Tensor], spec: Spec, stats: Sequence[Stats], *, scores: bool) -> list[Grid]:
        """`fit` for weights [O, I] of one shape, each behind inputs of its own, which were all seen."""


@runtime_checkable
class Particular(Clip, Protocol):
    """A clip whose ranges not every format can hold, or that decides something of every linear as a whole."""

    alone: ClassVar[bool]
    """Whether linears behind one input come to it one by one, and not as one matrix."""

    def outcomes(self, spec: Spec) -> tuple[Spec, ...]:
        """The formats in which weights of this one may come out.

        Raises ValueError, in one sentence with advice, where it is not a format for this clip.
        """


def outcomes(clip: Clip, spec: Spec) -> tuple[Spec, ...]:
    """The formats in which weights of this one may come out, whatever the clip. Raises ValueError as clips do."""
    return clip.outcomes(spec) if isinstance(clip, Particular) else (spec,)


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

    def refits(self, spec: Spec) -> bool:
        """Whether ranges of this format are fitted on the way, to what errors have made of the weights by then."""

    def round(self, weight: Tensor, spec: Spec, clip: Clip, stats: Stats | None, *, scores: bool) -> QTensor:
        """Codes for W [O, I], fp32. `stats` is None where the inputs were never seen (starved experts)."""


@runtime_checkable
class Stacking(Round, Protocol):
    """A Round that takes a mixture's experts as one batch, where that pays."""

    def stacks(self, spec: Spec) -> bool:
        """Whether it does so in this format."""

    def round_stack(
        self, weights: Sequence[Tensor], spec: Spec, clip: Clip, stats: Sequence[Stats], *, scores: bool
    ) -> list[QTensor]:
        """`round` for weights [O, I] of one shape, each behind inputs of its own, which were all seen."""


@dataclass(frozen=True)
class Encoded:
    """What an `Encode` makes of a linear: its weight, the maps around it and the channels that are not quantized."""

    weight: QWeight
    input_map: Map | None = None
    output_map: Map | None = None
    outliers: Outliers | None = None

    def to(self, device: torch.device | str) -> Encoded:
        """The same on another device."""
        before, behind = (None if map is None else map.to(device) for map in (self.input_map, self.output_map))
        outliers = None if self.outliers is None else self.outliers.to(device)
        return Encoded(self.weight.to(device), before, behind, outliers)


@runtime_checkable
class Encode(Protocol):
    """Chooses what a weight is made of, where that is more than codes on one grid: entries that are dropped, binary or
    kept in 16 bits, codes behind maps of the layer's own, vectors of codes.

    It is given one linear at a time, and the recipe's Round and Clip for the part of the work that is theirs.
    """

    name: ClassVar[str]
    rounds: ClassVar[frozenset[str]]
    """Names of the Rounds that it works through; of a recipe that names none it is given RTN."""
    own: ClassVar[Spec | None]
    """The weight format of a recipe that names none; None where one has to be named."""
    maps: ClassVar[bool]
    """Whether it puts maps around the linear, beside which no other online map or static range is possible."""

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics it reads, under its settings."""

    @property
    def sequential(self) -> bool:
        """Whether inputs are observed again after every encoded linear of a block."""

    def check(self, shape: tuple[int, int], spec: Spec, activation: Spec | None) -> None:
        """Raise ValueError, in one sentence with advice, where a weight [O, I] cannot be encoded in these formats."""

    def stored_bytes(self, shape: tuple[int, int], spec: Spec) -> int:
        """Bytes of a weight [O, I] in lowbit's own files, as far as shapes tell."""

    def paper_bits(self, shape: tuple[int, int], spec: Spec) -> float:
        """Bits per weight as the method's paper counts them, which is often without masks and scales."""

    def encode(
        self, weight: Tensor, spec: Spec, round: Round, clip: Clip, stats: Stats | None, *, scores: bool, seed: int
    ) -> Encoded:
        """The terms of W [O, I], fp32. `stats` is None where the inputs were never seen (starved experts)."""


@runtime_checkable
class Reconstruct(Protocol):
    """Trains maps, ranges or weights of a block before they are rounded, or codes afterwards."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    after: ClassVar[bool]
    """Whether it comes after Round, starts from its codes and sets the final ones."""

    def online(self, scheme: Scheme) -> bool:
        """Whether the inputs of linears get maps or clips that stay in the model."""

    def train(self, view: BlockView) -> None:
        """Train, and set the results on the view."""


@runtime_checkable
class Correct(Protocol):
    """Adds to a rounded weight what makes up for a part of its error."""

    name: ClassVar[str]

    @property
    def needs(self) -> frozenset[Need]:
        """The statistics it reads, under its settings."""

    def stored_bytes(self, shape: tuple[int, int]) -> int:
        """Bytes that it adds to the file of a weight [O, I]."""

    def correct(self, weight: Tensor, rounded: QWeight, stats: Stats | None) -> QWeight:
        """The corrected weight for W [O, I] in fp32 and what became of it."""
