"""A mixture's edges between the linears of its experts, given to a transform as one.

Every expert has such an edge, and on a GPU each of them is too little work: what a transform tries on all of them are
the same few operations on a stack. Which edges may be taken together follows from their shapes and formats, and how
many from what the plan leaves to a stack (`rounding.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor

from ..graph.anatomy import Edge
from ..numerics.precision import tensor_cores
from ..numerics.spec import Spec
from .edges import BlockEdge, inspects_reader
from .memory import in_parts
from .rounding import entry_bytes, stacks_on
from .work import BlockWork


@dataclass
class ExpertEdges:
    """An `EdgeStack`: the edges of some experts of a loaded block."""

    views: Sequence[BlockEdge]

    @property
    def spec(self) -> Spec:
        """The format of every reader."""
        spec = self.views[0].specs[0]
        assert spec is not None, "experts that keep 16 bits are not stacked"
        return spec

    @cached_property
    def weights(self) -> Tensor:
        """The readers' weights, fp32 [E, O, I]."""
        return torch.stack([view.weights[0] for view in self.views])

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude of the input channels, [E, I]."""
        return torch.stack([view.absmean for view in self.views])

    def errors(self, weights: Tensor) -> Tensor:
        """Mean squared change of every reader's output [E] if the readers held `weights` [E, O, I]."""
        difference = weights - self.weights
        with tensor_cores():
            return ((difference @ self._hessians) * difference).flatten(1).sum(1) / self._outputs

    @cached_property
    def _hessians(self) -> Tensor:
        return torch.stack([view.stats[0].hessian() for view in self.views])

    @cached_property
    def _outputs(self) -> Tensor:
        """How many numbers each reader put out, [E]."""
        counts = [view.stats[0].tokens * self.weights.shape[1] for view in self.views]
        return torch.tensor(counts, dtype=torch.float32, device=self.weights.device)


def together(work: BlockWork, edges: Sequence[Edge]) -> Iterator[Sequence[Edge]]:
    """The edges in their order, those that may be taken as a stack together."""

    def kind(numbered: tuple[int, Edge]) -> object:
        place, edge = numbered
        return (edge.readers[0].shape, work.formats[edge.readers[0].name][0]) if _stacks(work, edge) else place

    for _, numbered in groupby(enumerate(edges), kind):
        run = [edge for _, edge in numbered]
        yield from in_parts(run, entry_bytes(run[0].readers[0].shape), work.stack_bytes)


def _stacks(work: BlockWork, edge: Edge) -> bool:
    """Whether an edge belongs to an expert, and its reader's weight alone tells how good a candidate is."""
    reader = edge.readers[0]
    weights, inputs = work.formats[reader.name]
    if not stacks_on(work.device) or reader.expert is None or weights is None or weights.relative:
        return False
    return inspects_reader(edge) and inputs is None and not edge.shift and edge.channels is None
