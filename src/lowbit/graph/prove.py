"""Proves an anatomy: a random function-preserving map on an edge must leave the logits of the whole model unchanged.

The test knows nothing of how the edge was found; it folds with `fold.py`, which is what methods fold with, and compares
logits. The same map without its counterpart must change them, or the test would prove nothing. All edges of one kind
carry a map at once: random maps do not cancel, and an edge that fails is then looked for on its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Edge, Norm
from .fold import apply_scale, apply_shift, shift_source
from .probe import DoublePrecision

Fold = Callable[[nn.Module, Edge, Tensor], None]
Place = tuple[nn.Module, Edge]
"""A block and an edge in it."""

UNCHANGED = 1e-9
"""Largest relative change of float64 logits that counts as none; folding alone rounds at about 1e-15."""


def source_channels(block: nn.Module, edge: Edge) -> int:
    """Number S of channels that a map on the edge has."""
    if isinstance(edge.source, Norm):
        return cast(Tensor, block.get_submodule(edge.source.name).weight).shape[0]
    return len(edge.source.index) if edge.source.index is not None else edge.source.site.shape[0]


def may_shift(edge: Edge) -> bool:
    """Whether there are biases to absorb a shift and to repair it; whether it is lawful is for the proof to say."""
    biased = edge.source.bias if isinstance(edge.source, Norm) else edge.source.site.bias
    return biased and not edge.others and all(reader.bias for reader in edge.readers)


class Prover:
    """A model, its logits, and random maps put on its edges for the time of one forward pass."""

    def __init__(self, model: nn.Module, tokens: Tensor, seed: int = 0) -> None:
        self.model, self.tokens = model, tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.logits = self._forward()

    @torch.no_grad()
    def _forward(self) -> Tensor:
        return cast(Tensor, self.model(input_ids=self.tokens, use_cache=False).logits)

    def change(self, places: Iterable[Place], fold: Fold) -> float:
        """Largest change of the logits, relative to the largest logit, with a random map folded into every place."""
        places = list(places)
        with _restored(places):
            for block, edge in places:
                noise = torch.randn(source_channels(block, edge), generator=self.generator, dtype=torch.float64)
                weight = next(block.parameters())
                shifts = fold in (apply_shift, shift_source)
                fold(block, edge, (noise if shifts else torch.exp(0.5 * noise)).to(weight))
            return float((self._forward() - self.logits).abs().max() / self.logits.abs().max())


@contextmanager
def _restored(places: list[Place]) -> Iterator[None]:
    touched: dict[int, tuple[Tensor, Tensor]] = {}
    for block, edge in places:
        source = edge.source.name if isinstance(edge.source, Norm) else edge.source.site.name
        for path in (source, *(reader.name for reader in edge.readers), *edge.others):
            for held in block.get_submodule(path).parameters(recurse=False):
                touched.setdefault(id(held), (held, held.detach().clone()))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in touched.values():
                parameter.copy_(value)


def prove(model: nn.Module, anatomy: Anatomy, tokens: Tensor, *, seed: int = 0) -> dict[str, float]:
    """Largest relative change of a model's logits by kind of map, on token ids [B, T].

    Kinds are those of `Edge.kind`, with " shift" appended for shifts. Weights are folded in their own dtype and put
    back exactly; unfuse a mixture's experts first.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(anatomy.layers))
    places = [(block, edge) for block, part in zip(blocks, anatomy.blocks, strict=True) for edge in part.edges]
    double = next(model.parameters()).dtype == torch.float64
    with DoublePrecision() if double else nullcontext():
        prover = Prover(model, tokens, seed)
        return {name: prover.change(those, fold) for name, those, fold in by_kind(places)}


def by_kind(places: list[Place]) -> Iterator[tuple[str, list[Place], Fold]]:
    """Places to be scaled together, then those to be shifted together, each with its name."""
    for kind in dict.fromkeys(edge.kind for _, edge in places):
        those = [(block, edge) for block, edge in places if edge.kind == kind]
        yield kind, those, apply_scale
        if shifted := [(block, edge) for block, edge in those if edge.shift]:
            yield f"{kind} shift", shifted, apply_shift
