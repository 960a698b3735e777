"""QuaRot (Ashkboos et al. 2024): rotate the model so that no channel carries an outlier, without changing its function.

With gains folded into their readers, the residual stream may be multiplied by any orthogonal Q: what reads it becomes
W Q, what writes into it Qᵀ W. Values are turned by H within every head, which the output projection takes back. All of
this is merged and free. Two maps cannot be merged, since a nonlinearity or the attention's weights stand before them,
and are applied online: H over the heads at the output projection's input, which makes the map of all its channels
H_heads ⊗ H_width, and H over all channels at the down projection's. Keys, if a cache quantizes them, are turned behind
their position embedding.

Q = D H / √d with random signs D; the other places take H itself. An order without a Hadamard matrix gets a seeded
random orthogonal one, as a Kronecker product where it would be a whole feed-forward's width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from ..graph.anatomy import Anatomy, BlockAnatomy, Tap
from ..numerics.hadamard import has_hadamard
from ..numerics.maps import (
    Hadamard,
    Kronecker,
    Map,
    hadamard_or_orthogonal,
    kronecker_sizes,
    mean_preserving,
    random_hadamard,
    random_orthogonal,
)
from .views import Need

Kind = Literal["hadamard", "orthogonal"]


@dataclass(frozen=True)
class QuaRot:
    """Settings: which parts are rotated. residual: the residual stream; heads: values within heads; across: over the
    heads, and down: over the feed-forward's channels, both online; keys: for a quantized cache. kind: of the merged
    matrices, randomized Hadamard or random orthogonal (LayerNorm models take the latter always, around their mean).
    """

    residual: bool = True
    heads: bool = True
    across: bool = True
    down: bool = True
    keys: bool = True
    kind: Kind = "hadamard"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.residual or self.heads or self.across or self.down or self.keys):
            raise ValueError("nothing is rotated: switch one of residual, heads, across, down and keys on")

    name: ClassVar[str] = "quarot"
    needs: ClassVar[frozenset[Need]] = frozenset()

    def online(self, anatomy: Anatomy, block: int) -> dict[str, Map]:
        """The Hadamard maps of inputs that stay in the block, by the name of their tap."""
        part, maps = anatomy.blocks[block], {}
        if self.across:
            for tap in attention_outputs(part):
                width = tap.sites[0].shape[1] // anatomy.heads.query
                maps[tap.name] = hadamard_or_orthogonal(anatomy.heads.query, width, self.seed + block)
        if self.down:
            maps |= {tap.name: whole_width(tap, self.seed + block) for tap in down_inputs(part)}
        return maps

    def key_map(self, anatomy: Anatomy, block: int) -> Map | None:
        """H over the channels of every key."""
        return key_rotation(anatomy, self.seed, block) if self.keys else None

    def matrices(self, anatomy: Anatomy) -> dict[str, Tensor]:
        """The residual stream's rotation and those of all blocks' heads."""
        found = {"residual": residual_rotation(anatomy, self.kind, self.seed)} if self.residual else {}
        return found | (head_rotations(anatomy, self.kind, self.seed) if self.heads else {})


# --- matrices ---------------------------------------------------------------------------------------------------------


def residual_rotation(anatomy: Anatomy, kind: Kind, seed: int) -> Tensor:
    """A random Q [D, D] in fp64 of the kind that the model's norms allow."""
    width = anatomy.blocks[0].taps[0].sites[0].shape[1]
    if anatomy.rotations.residual == "mean-preserving":
        return mean_preserving(width, seed)
    return random_hadamard(width, seed) if kind == "hadamard" else random_orthogonal(width, seed)


def head_rotations(anatomy: Anatomy, kind: Kind, seed: int) -> dict[str, Tensor]:
    """A matrix [h, h] in fp64, named heads.i, for the values of every block whose values may be rotated."""
    found = {}
    for block, part in enumerate(anatomy.blocks if anatomy.rotations.heads else ()):
        for tap in attention_outputs(part):
            width = tap.sites[0].shape[1] // anatomy.heads.query
            fixed = kind == "hadamard" and has_hadamard(width)
            found[f"heads.{block}"] = Hadamard(width).matrix() if fixed else random_orthogonal(width, seed + block + 1)
    return found


def key_rotation(anatomy: Anatomy, seed: int, block: int) -> Map | None:
    """H for keys; None where no linear shows that they are as wide as values (latent attention)."""
    heads, part = anatomy.heads, anatomy.blocks[block]
    alone, fused = heads.key_value * heads.width, (heads.query + 2 * heads.key_value) * heads.width
    if not any(site.name in part.scores and site.shape[0] in (alone, fused) for site in part.sites):
        return None
    return hadamard_or_orthogonal(heads.width, 1, seed + block)


# --- places -----------------------------------------------------------------------------------------------------------


def attention_outputs(part: BlockAnatomy) -> Iterator[Tap]:
    """The inputs of the attention's output projection: what reads the values."""
    readers = {site for edge in part.edges if edge.kind == "value" for site in edge.readers}
    return (tap for tap in part.taps if not readers.isdisjoint(tap.sites))


def down_inputs(part: BlockAnatomy) -> Iterator[Tap]:
    """The inputs of the feed-forward's last linears, experts' too: of all that writes into the residual stream, less
    the attention's, and of what reads a feed-forward's inner channels.
    """
    attention = {tap.name for tap in attention_outputs(part)}
    inner = {site.name for edge in part.edges if edge.kind == "up" for site in edge.readers}
    for tap in part.taps:
        if tap.name not in attention and any(site.name in inner or site.name in part.writes for site in tap.sites):
            yield tap


def whole_width(tap: Tap, seed: int) -> Map:
    """An orthogonal map of all channels of a tap's input, cheap to apply and to store."""
    width = tap.sites[0].shape[1]
    if has_hadamard(width):
        return Hadamard(width)
    first, second = kronecker_sizes(width)
    return Kronecker(random_orthogonal(first, seed).float(), random_orthogonal(second, seed).float(), (first, second))
