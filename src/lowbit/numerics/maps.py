"""Invertible linear maps on a linear's input features, and the orthogonal matrices that rotations are made of.

Row-vector convention: inputs x [.., I] become x P, the weight W [O, I] becomes W P⁻ᵀ, and their product is what it was.
A map that stays in the model (an online transform) is a `Map`, never a dense I x I matrix: a Kronecker product of small
factors, applied one after the other, costs little beside the linear itself and stores next to nothing. A rotation that
is merged into weights is a plain tensor [n, n] in fp64, since it leaves no trace in the model.

Inputs are mapped in at least fp32 and rounded back once, whatever their dtype: 16-bit arithmetic would round after
every factor, and the factors too (1/√28), which no weight takes back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .hadamard import hadamard, hadamard_factor, hadamard_factors, has_hadamard

Factor = Tensor | int
"""A square factor of a Kronecker product; a number stands for the identity of that size."""


class Map(ABC):
    """An invertible linear map P [width, width] of input features."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of features."""

    @abstractmethod
    def apply(self, x: Tensor) -> Tensor:
        """x P for inputs [..., width], computed in at least fp32, in x's dtype."""

    @abstractmethod
    def inverse_weight(self, weight: Tensor) -> Tensor:
        """W P⁻ᵀ for a weight [O, width], computed in fp64, in W's dtype: apply(x) @ inverse_weight(W).T == x @ W.T."""

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What has to be stored beside `describe()`."""

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """The map but for its tensors, for JSON; `map_from` reads it back."""

    @abstractmethod
    def to(self, device: torch.device | str) -> Map:
        """The same on another device."""

    def matrix(self) -> Tensor:
        """P itself [width, width] in fp64."""
        return self.apply(torch.eye(self.width, dtype=torch.float64))


@dataclass(frozen=True)
class Hadamard(Map):
    """P = H_order ⊗ I_repeat / √order: a Hadamard transform over the slow index of features, stored as two numbers.

    `Hadamard(d)` mixes all d features; `Hadamard(heads, head_width)` mixes heads and leaves a head's channels alone.
    """

    order: int
    repeat: int = 1

    def __post_init__(self) -> None:
        if not has_hadamard(self.order):
            raise ValueError(f"There is no Hadamard transform of order {self.order}; use an orthogonal map there.")

    @property
    def width(self) -> int:
        return self.order * self.repeat

    def apply(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        orders = hadamard_factors(self.order)
        assert orders is not None
        factors = [_normalised(order, wide.dtype, wide.device) for order in orders]
        return kronecker(wide, [*factors, self.repeat]).to(x.dtype)

    def inverse_weight(self, weight: Tensor) -> Tensor:
        return self.apply(weight.double()).to(weight.dtype)  # P is orthogonal: P⁻ᵀ = P

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {"kind": "hadamard", "order": self.order, "repeat": self.repeat}

    def to(self, device: torch.device | str) -> Map:
        return self


@dataclass(frozen=True, eq=False)
class Kronecker(Map):
    """P = left ⊗ right for left [n1, n1] and right [n2, n2], None being the identity; `sizes` are (n1, n2).

    With features as a matrix X [n1, n2] this is leftᵀ X right (FlatQuant). Factors need not be orthogonal.
    """

    left: Tensor | None
    right: Tensor | None
    sizes: tuple[int, int]

    def __post_init__(self) -> None:
        for factor, size in zip((self.left, self.right), self.sizes, strict=True):
            assert factor is None or factor.shape == (size, size), "a factor is a square matrix of its size"

    @property
    def width(self) -> int:
        return self.sizes[0] * self.sizes[1]

    def apply(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return kronecker(wide, [f if isinstance(f, int) else f.to(wide.dtype) for f in self._factors()]).to(x.dtype)

    def inverse_weight(self, weight: Tensor) -> Tensor:
        factors = [f if isinstance(f, int) else torch.linalg.inv(f.double()).T for f in self._factors()]
        return kronecker(weight.double(), factors).to(weight.dtype)

    def _factors(self) -> list[Factor]:
        pairs = zip((self.left, self.right), self.sizes, strict=True)
        return [size if factor is None else factor for factor, size in pairs]

    def tensors(self) -> dict[str, Tensor]:
        named = {"left": self.left, "right": self.right}
        return {name: factor for name, factor in named.items() if factor is not None}

    def describe(self) -> dict[str, Any]:
        return {"kind": "kronecker", "sizes": list(self.sizes)}

    def to(self, device: torch.device | str) -> Map:
        left, right = (None if factor is None else factor.to(device) for factor in (self.left, self.right))
        return Kronecker(left, right, self.sizes)


@dataclass(frozen=True)
class Seeded(Map):
    """An orthogonal map that is drawn from a seed, which is all that a file holds of it; `back` makes it its inverse.

    Its numbers are drawn in fp64 on the CPU, so that every device has the same ones, and kept once they are drawn.
    """

    size: int
    seed: int
    back: bool = False
    _drawn: dict[tuple[torch.dtype, torch.device], Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    kind: ClassVar[str]

    @abstractmethod
    def _draw(self, dtype: torch.dtype, device: torch.device) -> Any:
        """What `_turn` works with."""

    @abstractmethod
    def _turn(self, x: Tensor, drawn: Any) -> Tensor:
        """x P in x's dtype."""

    @property
    def width(self) -> int:
        return self.size

    @property
    def inverse(self) -> Self:
        """P⁻¹ = Pᵀ as a map of its own."""
        return replace(self, back=not self.back)

    def apply(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        place = (wide.dtype, wide.device)
        if place not in self._drawn:
            self._drawn[place] = self._draw(*place)
        return self._turn(wide, self._drawn[place]).to(x.dtype)

    def inverse_weight(self, weight: Tensor) -> Tensor:
        return self.apply(weight.double()).to(weight.dtype)  # P is orthogonal: P⁻ᵀ = P

    def tensors(self) -> dict[str, Tensor]:
        return {}

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "size": self.size, "seed": self.seed, "back": self.back}

    def to(self, device: torch.device | str) -> Map:
        return replace(self)  # without what was drawn elsewhere


@dataclass(frozen=True)
class PermutedKronecker(Seeded):
    """P = Π (left ⊗ right) Π', two Haar-distributed factors near √size between two random permutations (QuIP)."""

    kind: ClassVar[str] = "permuted-kronecker"

    def _draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Factor], Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        first, last = (torch.randperm(self.size, generator=generator) for _ in range(2))
        factors = [random_orthogonal(n, generator) for n in kronecker_sizes(self.size)]
        if self.back:
            first, last, factors = last.argsort(), first.argsort(), [factor.T.contiguous() for factor in factors]
        return first.to(device), [factor.to(device, dtype) for factor in factors], last.to(device)

    def _turn(self, x: Tensor, drawn: tuple[Tensor, list[Factor], Tensor]) -> Tensor:
        first, factors, last = drawn
        return kronecker(x.index_select(-1, first), factors).index_select(-1, last)


@dataclass(frozen=True)
class SignedHadamard(Seeded):
    """P = D H / √size, D random signs (QuIP#). Raises ValueError where there is no Hadamard transform."""

    kind: ClassVar[str] = "signed-hadamard"

    def __post_init__(self) -> None:
        if not has_hadamard(self.size):
            raise ValueError(f"There is no Hadamard transform of order {self.size}; use an orthogonal map there.")

    def _draw(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, list[Tensor]]:
        orders = hadamard_factors(self.size)
        assert orders is not None
        factors = [_normalised(order, dtype, device) for order in orders]
        return signs(self.size, self.seed).to(device, dtype), [f.T if self.back else f for f in factors]

    def _turn(self, x: Tensor, drawn: tuple[Tensor, list[Tensor]]) -> Tensor:
        signs, factors = drawn
        return kronecker(x, factors) * signs if self.back else kronecker(x * signs, factors)


@dataclass(frozen=True, eq=False)
class Rescaled(Map):
    """P = diag(scale) Q: every feature times its number in `scale` [n], and then the map Q."""

    scale: Tensor
    then: Map

    @property
    def width(self) -> int:
        return self.then.width

    def apply(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.then.apply(wide * self.scale.to(wide.dtype)).to(x.dtype)

    def inverse_weight(self, weight: Tensor) -> Tensor:
        return self.then.inverse_weight(weight.double() / self.scale.double()).to(weight.dtype)

    def tensors(self) -> dict[str, Tensor]:
        return {"scale": self.scale, **self.then.tensors()}

    def describe(self) -> dict[str, Any]:
        return {"kind": "rescaled", "then": self.then.describe()}

    def to(self, device: torch.device | str) -> Map:
        return Rescaled(self.scale.to(device), self.then.to(device))


_SEEDED: dict[str, type[Seeded]] = {each.kind: each for each in (PermutedKronecker, SignedHadamard)}


def map_from(description: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Map:
    """The map that `describe()` and `tensors()` of one wrote down. Raises ValueError for an unknown kind."""
    kind = description["kind"]
    if kind == "hadamard":
        return Hadamard(description["order"], description["repeat"])
    if kind == "kronecker":
        first, second = description["sizes"]
        return Kronecker(tensors.get("left"), tensors.get("right"), (first, second))
    if kind == "rescaled":
        return Rescaled(tensors["scale"], map_from(description["then"], tensors))
    if kind in _SEEDED:
        return _SEEDED[kind](description["size"], description["seed"], description["back"])
    known = ", ".join(("hadamard", "kronecker", "rescaled", *_SEEDED))
    raise ValueError(f"{kind!r} is no map that this version knows: it knows {known}.")


def kronecker(x: Tensor, factors: Sequence[Factor]) -> Tensor:
    """x [..., n] times the Kronecker product of the factors, whose sizes multiply to n, one factor after the other."""
    shape, after = x.shape, x.shape[-1]
    for factor in factors:
        size = factor if isinstance(factor, int) else factor.shape[0]
        after //= size
        if not isinstance(factor, int):
            x = x.reshape(-1, size) @ factor if after == 1 else _from_left(factor, x.reshape(-1, size, after))
    assert after == 1, "the factors' sizes must multiply to the number of features"
    return x.reshape(shape)


def _from_left(factor: Tensor, x: Tensor) -> Tensor:
    """factorᵀ X for every matrix X [n, m] of a batch; written so that a GPU need not transpose what it multiplies."""
    return torch.bmm(factor.T.expand(len(x), -1, -1), x) if x.is_cuda else factor.T @ x


@lru_cache(maxsize=64)
def _normalised(order: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return hadamard_factor(order).to(device, dtype) / math.sqrt(order)


# --- which map --------------------------------------------------------------------------------------------------------


def hadamard_or_orthogonal(n: int, repeat: int = 1, seed: int = 0) -> Map:
    """The Hadamard transform over n with `repeat` channels each; where there is none, a random orthogonal stand-in."""
    if has_hadamard(n):
        return Hadamard(n, repeat)
    return Kronecker(random_orthogonal(n, seed).float(), None, (n, repeat))


def incoherent(n: int, seed: int, *, fast: bool) -> Seeded:
    """A random orthogonal map that mixes all of n features: `fast` by a Hadamard transform, where there is one."""
    return SignedHadamard(n, seed) if fast and has_hadamard(n) else PermutedKronecker(n, seed)


def kronecker_sizes(n: int) -> tuple[int, int]:
    """(n1, n2) with n1 n2 = n, n1 <= n2 and n1 + n2 smallest: the factor pair nearest √n."""
    first = max(d for d in range(1, int(n**0.5) + 1) if n % d == 0)
    return first, n // first


# --- rotations to be merged -------------------------------------------------------------------------------------------


def random_orthogonal(n: int, seed: int | torch.Generator) -> Tensor:
    """A Haar-distributed orthogonal matrix [n, n] in fp64: QR of a Gaussian, columns times sign(diag R)."""
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    gaussian = torch.randn(n, n, dtype=torch.float64, generator=generator)
    q, r = cast(tuple[Tensor, Tensor], torch.linalg.qr(gaussian))
    return q * r.diagonal().sign()


def random_hadamard(n: int, seed: int) -> Tensor:
    """QuaRot's Q = D H / √n [n, n] in fp64, D random signs; `random_orthogonal` where no Hadamard matrix is known."""
    if not has_hadamard(n):
        return random_orthogonal(n, seed)
    return (hadamard(n) * signs(n, seed)[:, None]).double() / math.sqrt(n)


def signs(n: int, seed: int) -> Tensor:
    """Random signs [n], ±1."""
    return torch.randint(0, 2, (n,), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def mean_preserving(n: int, seed: int) -> Tensor:
    """A random orthogonal Q [n, n] in fp64 with Q 1 = 1 and 1ᵀQ = 1ᵀ, under which LayerNorm itself commutes.

    It turns what is orthogonal to the vector of ones and leaves that vector alone, so x and xQ have one mean and one
    variance, and LN(xQ) = LN(x)Q for a LayerNorm without gain: a model of LayerNorms (OPT, GPT-2, Falcon) is rotated in
    its own classes. QuaRot instead centres every writer and puts RMSNorms in place of LayerNorms, which no stock model
    class loads. The price is one direction of n that stays put: an outlier in the mean itself is not spread.
    """
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    return around_mean(random_orthogonal(n - 1, seed))


def around_mean(inner: Tensor) -> Tensor:
    """U diag(1, Q') U for an orthogonal Q' [n - 1, n - 1]: every orthogonal matrix that keeps the mean, once.

    U is the Householder reflection that swaps the first axis and the direction of the mean. Gradients pass.
    """
    n = inner.shape[0] + 1
    normal = torch.full((n,), 1 / math.sqrt(n), dtype=inner.dtype, device=inner.device)
    normal[0] -= 1
    normal = normal / normal.norm()
    padded = F.pad(inner, (1, 0, 1, 0)) + F.pad(inner.new_ones(1, 1), (0, n - 1, 0, n - 1))
    padded = padded - 2 * torch.outer(normal, normal @ padded)
    return padded - 2 * torch.outer(padded @ normal, normal)
