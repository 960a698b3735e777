"""What happens to the inputs of a product of codes: an online map, the range of every token, and rounding.

Both kinds of transforms are one computation, X -> leftᵀ X right of a token's features as a matrix: H_4096 is
H_64 ⊗ H_64, so a fast Hadamard transform is two products of 64 x 64 on tensor cores.

`reference` is the definition: the map in fp32, rounded to the inputs' dtype, then the grid of `numerics.grid`. The
kernels multiply in fp16 with fp32 sums. Inputs are moved into fp16's range by a power of two, which is exact, and the
signs of a Hadamard matrix are exact too; learned factors, and what lies between both products, are rounded to eleven
bits. Behind inputs in bf16 that moves a result by up to 2.5 · 2^-12 of its token's largest value, a third of what
rounding that value to bf16 may; for fp16 inputs both are split into two fp16 numbers instead.

Shape letters: M tokens, K features, n1 x n2 = K.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate

import torch
from torch import Tensor

from ..numerics.bits import pack
from ..numerics.grid import amax_levels, grid_from_range, unit_range
from ..numerics.hadamard import hadamard_factor, hadamard_factors
from ..numerics.maps import Hadamard, Kronecker, Map
from ..numerics.spec import E4M3, Int, Number, per_token

_WIDEST = 1 << 15
"""Features of a token that a program transforms at once."""
_SIDE = 128
"""Largest factor of a transform that a program holds."""


@dataclass(frozen=True, eq=False)
class Factors:
    """A map x -> gain · leftᵀ X right as the kernel reads it; a side that is None stays as it is.

    `left` is transposed, and both are padded with zeros to powers of two and split into two fp16 parts [2, n, n].
    """

    left: Tensor | None
    right: Tensor | None
    sizes: tuple[int, int]
    gain: float


@dataclass(frozen=True, eq=False)
class Encoder:
    """What happens to the inputs of a linear: a map, the parts of a range that are covered, a format per token."""

    number: Number
    map: Map | None = None
    clip: Tensor | None = None
    factors: Factors | None = None
    """The map for the kernel; None where there is none, or none that the kernel knows."""

    @property
    def fused(self) -> bool:
        """Whether one kernel does all of it."""
        return self.map is None or self.factors is not None


def encoder(number: Number, map: Map | None, clip: Tensor | None, device: torch.device | str) -> Encoder:
    """An encoder on a device. Raises ValueError for formats that have no operands in hardware."""
    reason = refusal(number)
    if reason is not None:
        raise ValueError(f"inputs cannot be encoded: {reason}; use fake quantization")
    moved = None if map is None else map.to(device)
    return Encoder(number, moved, None if clip is None else clip.to(device), _factors(map, device))


def refusal(number: Number) -> str | None:
    """Why inputs of a format are no operands of a product, or None."""
    if number == E4M3 or (isinstance(number, Int) and number.signed):
        return None
    return f"{number} is neither symmetric integers nor fp8 e4m3"


def reference(x: Tensor, how: Encoder, *, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs [M, K] as codes and one fp32 scale per token [M], by the definition; see `dynamic.encode`."""
    mapped = x if how.map is None else how.map.apply(x)
    spec = per_token(how.number)
    low, high = unit_range(mapped, spec.block)
    if how.clip is not None:
        low, high = low * how.clip[0], high * how.clip[1]
    grid = grid_from_range(low, high, spec)
    codes = grid.encode(mapped)
    if how.number == E4M3:
        codes = codes.view(torch.float8_e4m3fn)
    return pack(codes, 4) if packed else codes, grid.scale[:, 0]


def outputs(x: Tensor, number: Number, packed: bool) -> tuple[Tensor, Tensor]:
    """Room for codes and scales."""
    kind = torch.uint8 if packed else torch.int8 if isinstance(number, Int) else torch.float8_e4m3fn
    width = x.shape[1] // 2 if packed else x.shape[1]
    return torch.empty(len(x), width, device=x.device, dtype=kind), torch.empty(len(x), device=x.device)


def reach(number: Number) -> tuple[float, float, float]:
    """How many scales make up the largest value, the lowest level and the highest one."""
    levels = amax_levels(number)
    low, high = (number.low, number.high) if isinstance(number, Int) else (-levels, levels)
    return levels, float(low), float(high)


def _factors(map: Map | None, device: torch.device | str) -> Factors | None:
    """The two sides of a map, where both are small enough."""
    if isinstance(map, Kronecker):
        sides, sizes, gain = (map.left, map.right), map.sizes, 1.0
    elif isinstance(map, Hadamard):
        found = _hadamard_sides(map)
        if found is None:
            return None
        sides, gain = found, 1 / math.sqrt(map.order)
        sizes = (found[0].shape[0], map.repeat if found[1] is None else found[1].shape[0])
    else:
        return None
    if max(sizes[0] if sides[0] is not None else 1, sizes[1] if sides[1] is not None else 1) > _SIDE:
        return None
    if map.width > _WIDEST or padded(sizes[0]) * padded(sizes[1]) > _WIDEST:
        return None
    left, right = (None if side is None else _split(side.to(device)) for side in sides)
    if left is not None:
        left = left.mT.contiguous()
    return Factors(left, right, sizes, gain)


def _hadamard_sides(map: Hadamard) -> tuple[Tensor, Tensor | None] | None:
    """A Hadamard matrix as the two of signs that take the fewest operations; None where one is too large."""
    orders = hadamard_factors(map.order)
    assert orders is not None
    if map.repeat > 1:
        return reduce(torch.kron, [hadamard_factor(order) for order in orders]).float(), None
    parts = [hadamard_factor(part) for order in orders for part in _halves(order)]
    sides = accumulate((len(part) for part in parts), operator.mul)
    fitting = [
        (_cost(side, map.order // side), cut)
        for cut, side in enumerate(sides, 1)
        if max(side, map.order // side) <= _SIDE
    ]
    if not fitting:
        return None
    cut = min(fitting)[1]
    left, right = (reduce(torch.kron, side, torch.ones(1, 1)).float() for side in (parts[:cut], parts[cut:]))
    return left, right


def _cost(n1: int, n2: int) -> int:
    """Operations of both products for a token, of sides as the kernel pads them."""
    return padded(n1) * padded(n2) * (padded(n1) + padded(n2))


def _halves(order: int) -> list[int]:
    """A power of two as twos, whose product it is; other orders as they are."""
    return [2] * (order.bit_length() - 1) if order & (order - 1) == 0 else [order]


def _split(side: Tensor) -> Tensor:
    """A factor [n, n] as two fp16 numbers per entry, padded to a power of two of at least 16: [2, p, p]."""
    short = padded(len(side)) - len(side)
    wide = torch.nn.functional.pad(side.float(), (0, short, 0, short))
    first = wide.half()
    return torch.stack([first, (wide - first.float()).half()])


def padded(n: int) -> int:
    """The power of two from 16 on that holds n."""
    return max(16, 1 << (n - 1).bit_length())
