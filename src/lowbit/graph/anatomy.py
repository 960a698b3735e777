"""The parts of a decoder, named once, so that no method ever mentions a model class.

Everything here is plain data about module paths, rows and shapes: it holds no tensors of the model and costs nothing
to build on the meta device. `discover.py` fills it in, `prove.py` shows that it is true, methods only read it.
Paths inside a block are relative to the block ("self_attn.q_proj"); `Anatomy.full_name` makes them absolute.

Shape letters: O output features, I input features, D model width, H query heads, K key-value heads, h head width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn


@dataclass(frozen=True)
class Site:
    """One weight matrix [O, I], seen as output rows by input columns whatever its storage.

    A mixture's experts are unfused into ordinary linears when the skeleton is built, so every site is the `weight` of
    one module. `transposed` says that the module stores [I, O] (GPT-2's Conv1D).
    """

    name: str
    shape: tuple[int, int]
    transposed: bool = False
    bias: bool = False
    expert: int | None = None

    def weight(self, block: nn.Module) -> Tensor:
        """The site's weight as an [O, I] view that shares memory with the block's parameter."""
        weight = cast(Tensor, block.get_submodule(self.name).weight)
        return weight.T if self.transposed else weight


@dataclass(frozen=True)
class Norm:
    """A normalisation whose gain (and bias) multiplies every channel: the effective gain is weight + offset."""

    name: str
    offset: float = 0.0
    bias: bool = False


@dataclass(frozen=True)
class Rows:
    """Output rows of a site, in the order in which a reader sees them: all, V's rows of a fused QKV, up's half …"""

    site: Site
    index: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Edge:
    """A proved place where a per-channel map costs nothing: the source's output is divided, the readers multiplied.

    Reader channel j reads source channel `channels[j]` (None: the same); under grouped-query attention several query
    heads read one key-value head, so a scale belongs to source channels and is repeated for the readers.
    """

    name: str
    source: Norm | Rows
    readers: tuple[Site, ...]
    others: tuple[str, ...] = ()
    """Modules that read the same tensor, must be scaled along, and are never quantized (routers): their paths."""
    channels: tuple[int, ...] | None = None
    inspect: str = ""
    """The smallest module whose output shows the effect on the block (attention, feed-forward), AWQ's yardstick."""
    shift: bool = False
    """True where the source can also absorb a per-channel shift and every reader has a bias to repair it."""
    kind: str = ""
    """"norm" (norm → linears), "value" (V → attention output, mixing tokens), "up" (up or fc1 → down or fc2)."""


@dataclass(frozen=True)
class Tap:
    """Sites that read one and the same tensor: they share statistics and one factorization."""

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        return self.sites[0].name


@dataclass(frozen=True)
class Heads:
    """Attention geometry: H query heads, K key-value heads, width h of a head."""

    query: int
    key_value: int
    width: int


@dataclass(frozen=True)
class BlockAnatomy:
    """What one decoder block is made of. Taps are in order of execution."""

    taps: tuple[Tap, ...]
    edges: tuple[Edge, ...]
    refused: tuple[tuple[str, str], ...] = ()
    """(place, reason) for every edge that methods may look for and must not use here."""
    reads: tuple[Norm, ...] = ()
    """Norms that read the residual stream."""
    writes: tuple[str, ...] = ()
    """Modules whose output is added to the residual stream (a site, or a post-norm)."""
    scores: tuple[str, ...] = ()
    """Sites with rows that make queries or keys: their error passes through a softmax."""
    attention: str = ""
    """The module that hands keys and values to a cache; "" where there is none, or more than one."""
    head_width: int = 0
    """Width h of a head, where V may be multiplied within every head by any invertible matrix; 0 where it may not."""
    heads: Heads | None = None
    """Head geometry of the values, where a "value" edge shows it."""

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(site for tap in self.taps for site in tap.sites)


@dataclass(frozen=True)
class Rotations:
    """Which orthogonal maps, mixing channels, may be merged into the model: found by doing them to its double."""

    residual: str = ""
    """What the residual stream may be multiplied by once norms are folded: any "orthogonal" matrix; only one that is
    "mean-preserving", since norms subtract the mean; nothing ("")."""
    refused: str = "the residual stream was not proved to be free to rotate"
    """Why `residual` is empty."""
    embeddings: tuple[str, ...] = ()
    """Tables [N, D] outside the blocks whose rows are added to the residual stream: tokens, perhaps positions."""
    heads: bool = False
    """Whether V may be rotated within every head and the attention's output projection take it back."""


@dataclass(frozen=True)
class Anatomy:
    """The whole decoder."""

    family: str
    layers: str
    """Path of the list of decoder blocks, for instance "model.layers"."""
    embedding: str
    head: str
    final_norm: Norm | None
    """None where no norm with a gain stands before the head (OPT-350m, OLMo)."""
    tied: bool
    heads: Heads
    blocks: tuple[BlockAnatomy, ...]
    rotations: Rotations = Rotations()
    proofs: dict[str, float] = field(default_factory=dict, compare=False)
    """Edge kind -> largest relative change of the logits seen when a random map was put on it."""

    def full_name(self, block: int, path: str) -> str:
        return f"{self.layers}.{block}.{path}" if path else f"{self.layers}.{block}"
