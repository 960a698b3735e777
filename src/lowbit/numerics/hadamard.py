"""Hadamard matrices of any order that Sylvester, Paley and Kronecker products reach, built on demand.

Quadratic residues of a finite field make a Hadamard matrix in a few lines (Paley 1933), so no tables are shipped: an
order p^k + 1 or 2(p^k + 1) covers the odd part of nearly every feed-forward width in use, powers of two do the rest.
The orders between (92, 116, 172, 188 …) would take Williamson's or stored matrices; whoever needs one of them falls
back on a random orthogonal matrix (see `maps.py`), which serves quantization as well.

A matrix is kept as the Kronecker product of its factors, H_K ⊗ H_a ⊗ H_b, K the part that is no power of two: applied
one after the other they are the fast transform, multiplied out they are the dense matrix, and both come from here.
"""

from __future__ import annotations

from functools import cache, reduce

import torch
from torch import Tensor

LARGEST = 4096
"""Of a factor that is no power of two: beyond it the product with it would cost what a dense matrix costs."""
RADIX = 128
"""Of a factor that is a power of two: few small matrix products go through memory less often than many butterflies."""


def has_hadamard(n: int) -> bool:
    """Whether `hadamard(n)` can be built."""
    return hadamard_factors(n) is not None


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix [n, n] of ±1 in int8: H Hᵀ = n I. It need not be symmetric.

    Raises ValueError where none can be built: n must be 1, 2, or a multiple of 4 that the constructions reach.
    """
    factors = hadamard_factors(n)
    if factors is None:
        raise ValueError(f"No Hadamard matrix of order {n} can be built; use a random orthogonal matrix instead.")
    return reduce(torch.kron, (hadamard_factor(order) for order in factors), torch.ones(1, 1, dtype=torch.int8))


@cache
def hadamard_factors(n: int) -> tuple[int, ...] | None:
    """Orders whose Kronecker product, in this order, is `hadamard(n)`; None where there are none.

    The largest power of two is split off, times the smallest order K that can be built.
    """
    odd = n // (n & -n) if n > 0 else 0
    if odd == 0:
        return None
    order = odd
    while n % order == 0:
        if (factors := _odd_factors(order)) is not None:
            return (*factors, *_powers_of_two(n // order))
        order *= 2
    return None


def _odd_factors(n: int) -> tuple[int, ...] | None:
    """Paley orders whose product is n; of several such products the cheapest to multiply by."""
    if n == 1:
        return ()
    if n > 2 and n <= LARGEST and _paley_field(n):
        return (n,)
    pairs = [(a, n // a) for a in range(12, int(n**0.5) + 1, 4) if n % a == 0 and n // a % 4 == 0]
    found = [(*left, *right) for a, b in pairs if (left := _odd_factors(a)) and (right := _odd_factors(b))]
    return min(found, key=sum, default=None)


def _powers_of_two(n: int) -> tuple[int, ...]:
    """n = 2^m as factors of about equal size, none larger than RADIX."""
    bits = n.bit_length() - 1
    count = -(-bits // (RADIX.bit_length() - 1))
    return tuple(2 ** ((bits + i) // count) for i in range(count))


@cache
def hadamard_factor(n: int) -> Tensor:
    """The matrix [n, n] of one of the orders that `hadamard_factors` names. It is shared: never write into it."""
    if n & (n - 1) == 0:
        two = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        return reduce(torch.kron, [two] * (n.bit_length() - 1), torch.ones(1, 1, dtype=torch.int8))
    return _paley(n)


# --- Paley's constructions --------------------------------------------------------------------------------------------


def _paley_field(n: int) -> tuple[int, int] | None:
    """(p, k) of the field of q = p^k elements from which an order n is made: q + 1, or 2(q + 1); None if neither."""
    for q, remainder in ((n - 1, 3), (n // 2 - 1, 1)):
        if n % 4 == 0 and q % 4 == remainder and (field := _prime_power(q)):
            return field
    return None


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with p^k = q and p prime."""
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q > 1 and q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 and k else None


def _paley(n: int) -> Tensor:
    """Paley's matrix: I + S for a skew S, else S ⊗ [[1, 1], [1, -1]] + I ⊗ [[1, -1], [-1, -1]] for a symmetric one."""
    field = _paley_field(n)
    assert field is not None
    residues = _jacobsthal(*field)
    q = residues.shape[0]
    skew = q % 4 == 3
    conference = torch.zeros(q + 1, q + 1, dtype=torch.int8)
    conference[0, 1:], conference[1:, 0] = 1, -1 if skew else 1
    conference[1:, 1:] = residues
    unit = torch.eye(q + 1, dtype=torch.int8)
    if skew:
        return conference + unit
    double, single = ([[1, 1], [1, -1]], [[1, -1], [-1, -1]])
    return torch.kron(conference, torch.tensor(double, dtype=torch.int8)) + torch.kron(
        unit, torch.tensor(single, dtype=torch.int8)
    )


def _jacobsthal(p: int, k: int) -> Tensor:
    """χ(a - b) [q, q] over all pairs of the field's elements: 1 for a square, -1 for none, 0 for 0."""
    q = p**k
    powers = p ** torch.arange(k)
    digits = torch.arange(q)[:, None] // powers % p
    character = torch.full((q,), -1, dtype=torch.int8)
    character[_squares(p, k, digits) @ powers] = 1
    character[0] = 0
    return torch.stack([character[(row - digits) % p @ powers] for row in digits])


def _squares(p: int, k: int, digits: Tensor) -> Tensor:
    """Every element's square [q, k]; elements are polynomials over GF(p), lowest coefficient first, modulo some f.

    Modulo an irreducible f of degree k two elements have equal squares only if they are x and -x. Modulo any other f
    there are more (nilpotent elements, or roots of 1 besides ±1), so f is found by counting.
    """
    q = len(digits)
    product = torch.zeros(q, 2 * k - 1, dtype=torch.int64)
    for i in range(k):
        product[:, i : i + k] += digits[:, i : i + 1] * digits
    for tail in digits:  # f = x^k - tail
        squares = product % p
        for i in range(2 * k - 2, k - 1, -1):
            squares[:, i - k : i] += squares[:, i : i + 1] * tail
            squares %= p
        if len(torch.unique(squares[:, :k], dim=0)) == (q + 1) // 2:
            return squares[:, :k]
    raise AssertionError("an irreducible polynomial of every degree exists")
