"""FlatQuant's transforms: trainable invertible matrices, and which linears of a block share which.

A linear's inputs [.., n] are multiplied by P = P₁ ⊗ P₂ with n₁ n₂ = n and n₁ + n₂ smallest, so that a transform costs
little beside the linear. Linears that read one norm share one P, the experts of a mixture too, whose router goes on
reading what it always read. In front of the attention's output projection P is P_o ⊗ P_v: P_o mixes heads online, P_v
mixes a head's channels and is merged into V's rows, where the anatomy says that it passes through attention; elsewhere
that projection gets an online pair like any other.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from ..graph.anatomy import BlockAnatomy, Edge, Rows, Tap
from ..numerics.maps import Kronecker, kronecker, kronecker_sizes, random_orthogonal
from ..numerics.replay import index

Form = Literal["svd", "inverse"]


class Matrices:
    """Trainable matrices P_i [n_i, n_i], random orthogonal ones at first; those of one size are computed as one batch.

    "svd": P = U diag(σ) Vᵀ with U = U₀ (I - A/2)⁻¹(I + A/2), A skew (Cayley), V likewise; the inverse costs nothing.
    "inverse": P itself, inverted in fp64. Neither keeps P from becoming singular: watch `balance`.
    """

    def __init__(self, sizes: Sequence[int], form: Form, generator: torch.Generator, device: torch.device) -> None:
        self._form, self._sizes = form, tuple(sizes)
        self._bases: dict[int, Tensor] = {}
        self._skews: dict[int, Tensor] = {}
        self._sigmas: dict[int, Tensor] = {}
        for n in sorted(set(sizes)):
            count = 2 * self._sizes.count(n) if form == "svd" else self._sizes.count(n)
            seeds = torch.randint(2**31, (count,), generator=generator).tolist()
            self._bases[n] = torch.stack([random_orthogonal(n, seed) for seed in seeds]).to(device)
            if form == "svd":
                self._skews[n] = torch.zeros(count, n, n, device=device, requires_grad=True)
                self._sigmas[n] = torch.ones(count // 2, n, device=device, requires_grad=True)
            else:
                self._bases[n] = self._bases[n].float().requires_grad_()

    @property
    def parameters(self) -> list[Tensor]:
        """What is trained."""
        return [x for x in (*self._bases.values(), *self._skews.values(), *self._sigmas.values()) if x.requires_grad]

    def pairs(self, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
        """(P, P⁻ᵀ) of every matrix, in the order of `sizes`, with gradients."""
        made = {n: self._made(n, dtype) for n in self._bases}
        seen = dict.fromkeys(made, 0)
        result = []
        for n in self._sizes:
            result.append((made[n][0][seen[n]], made[n][1][seen[n]]))
            seen[n] += 1
        return result

    def _made(self, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        bases = self._bases[n].to(dtype)
        if self._form == "inverse":
            inverse = torch.linalg.inv_ex(bases.double())[0]  # inv itself would wait for the device
            return bases, inverse.mT.to(dtype)
        lower = self._skews[n].to(dtype).tril(-1)
        half = (lower - lower.mT) / 2
        one = torch.eye(n, dtype=dtype, device=bases.device)
        u, v = (bases @ torch.linalg.solve_ex(one - half, one + half)[0]).chunk(2)
        sigma = self._sigmas[n].to(dtype)[:, None]
        return (u * sigma) @ v.mT, (u / sigma) @ v.mT

    @torch.no_grad()
    def balance(self) -> Tensor:
        """Smallest singular value of a matrix as a part of its largest, the least of all: 1/cond(P)."""
        values = self._sigmas.values() if self._form == "svd" else map(torch.linalg.svdvals, self._bases.values())
        parts = [(s.abs().amin(-1) / s.abs().amax(-1)).amin() for s in values]
        return torch.stack(parts).amin() if parts else torch.ones(())


@dataclass(frozen=True)
class Group:
    """Taps that share a transform and an input quantizer. Factors are numbers of matrices, None where there is none."""

    taps: tuple[Tap, ...]
    sizes: tuple[int, int]
    value: Edge | None = None
    """The edge from V to the attention's output projection, if this is that one."""
    left: int | None = None
    right: int | None = None
    """P₁ and P₂; under `value` P_o and P_v, the latter merged into V."""

    @property
    def factors(self) -> tuple[int | None, int | None]:
        return self.left, self.right

    @property
    def online(self) -> tuple[int | None, int | None]:
        """The factors that stay in front of the linears."""
        return (self.left, None) if self.value else self.factors


def find_groups(
    anatomy: BlockAnatomy, quantized: Collection[str], *, transforms: bool, values: bool, mapped: Collection[str] = ()
) -> list[Group]:
    """The groups of a block's taps of which any site is `quantized`, with their transforms if there are to be some.

    `values`: cached values are quantized, so that P_v is of use even where the output projection keeps 16 bits.
    `mapped`: sites whose inputs pass another map already, which is left alone.
    """
    shared: dict[tuple[str, int], list[Tap]] = {}
    for tap in anatomy.taps:
        shared.setdefault((_shares(anatomy, tap), tap.sites[0].shape[1]), []).append(tap)
    groups, count = [], 0
    for (_, width), taps in shared.items():
        active = any(site.name in quantized for tap in taps for site in tap.sites)
        free = transforms and not any(site.name in mapped for tap in taps for site in tap.sites)
        value = _value_edge(anatomy, taps) if free else None
        if not active and not (value and values):
            continue
        if not free:
            groups.append(Group(tuple(taps), (1, width)))
            continue
        sizes = (width // anatomy.head_width, anatomy.head_width) if value else kronecker_sizes(width)
        left = count if active and sizes[0] > 1 else None
        right = count + (left is not None)
        count = right + 1
        groups.append(Group(tuple(taps), sizes, value, left, right))
    return groups


def sizes_of(groups: Sequence[Group]) -> list[int]:
    """Sizes of the matrices that the groups number."""
    pairs = [(i, n) for group in groups for i, n in zip(group.factors, group.sizes, strict=True) if i is not None]
    return [n for _, n in sorted(pairs)]


def _shares(anatomy: BlockAnatomy, tap: Tap) -> str:
    """What taps of one group have in common: the norm they read, or what they are among the experts."""
    site = tap.sites[0]
    for edge in anatomy.edges:
        if edge.kind == "norm" and site in edge.readers:
            return edge.name
    return site.name if site.expert is None else site.name.replace(f".{site.expert}.", ".*.", 1)


def _value_edge(anatomy: BlockAnatomy, taps: Sequence[Tap]) -> Edge | None:
    width = anatomy.head_width
    for edge in anatomy.edges:
        if edge.kind == "value" and width and len(taps) == 1 and taps[0].sites == edge.readers:
            assert all(c % width == j % width for j, c in enumerate(edge.channels or ())), "heads are not whole"
            return edge
    return None


def factors_of(numbers: tuple[int | None, int | None], sizes: tuple[int, int], made: Sequence[Tensor]) -> Kronecker:
    """The map of numbered matrices."""
    left, right = (None if number is None else made[number] for number in numbers)
    return Kronecker(left, right, sizes)


def inverse_weight(weight: Tensor, group: Group, inverses: Sequence[Tensor]) -> Tensor:
    """W P⁻ᵀ [O, I], from P₁⁻ᵀ and P₂⁻ᵀ, with gradients."""
    pairs = zip(group.factors, group.sizes, strict=True)
    return kronecker(weight, [size if number is None else inverses[number] for number, size in pairs])


def turn_values(rows: Rows, tensor: Tensor, p: Tensor) -> Tensor:
    """A weight [O, I] or bias [O] whose rows that make V give v P_v in every head, for P_v [h, h]; with gradients."""
    places = None if rows.index is None else index(rows.index, tensor.device)
    values = tensor if places is None else tensor[places]
    turned = (p.T @ values.reshape(-1, p.shape[0], values[0].numel())).reshape(values.shape)
    return turned if places is None else tensor.index_copy(0, places, turned)


@dataclass(frozen=True, eq=False)
class InputMap(Kronecker):
    """P in training: in the working dtype, as mixed precision has it, since what follows rounds far more coarsely."""

    def apply(self, x: Tensor) -> Tensor:
        """x P."""
        pairs = zip((self.left, self.right), self.sizes, strict=True)
        return kronecker(x, [size if factor is None else factor.to(x.dtype) for factor, size in pairs])


@dataclass(frozen=True, eq=False)
class KeyMap(Kronecker):
    """P_h in training, with the inverse at hand: P_h⁻ᵀ [h, h]."""

    inverse: Tensor | None = None

    def inverse_weight(self, weight: Tensor) -> Tensor:
        """W P_h⁻ᵀ."""
        return weight @ cast(Tensor, self.inverse).to(weight.dtype)
