"""Weights in vectors of eight: E8P, the codebook of QuIP# (Tseng et al. 2024), and E8's shortest vectors.

Points of a lattice fill a ball in eight dimensions better than a grid of scalars does, and a Gaussian lives in a ball:
at 2 bits a weight E8P leaves 0.09 of its variance, the best scalars 0.12. E8P is half-integer vectors of even sum, in
256 patterns of magnitudes under all signs, moved by a quarter to either side: 65 536 points that are told by 8 bits of
pattern, 7 signs (the eighth follows from the sum's parity) and the side. `points` is that definition, written out.

The nearest point is found without trying them all. For the signs of x (one turned over where the parity asks for it,
that which costs least) the best magnitudes of a pattern that may be permuted are the pattern sorted as |x| is: seven
such patterns make up 227 of the 256, and only the 29 others are tried as they stand.

Shape letters: N vectors, O rows, I columns, P patterns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal

import torch
from torch import Tensor

Book = Literal["e8p", "e8"]

WIDTH = 8
"""Weights of a vector."""
BITS: dict[Book, int] = {"e8p": 16, "e8": 8}
"""Of a code."""

_RUNS = (
    *((1.5,) * count + (0.5,) * (8 - count) for count in range(5)),
    (2.5, *(0.5,) * 7),
    (2.5, 1.5, *(0.5,) * 6),
    (*(1.5,) * 5, *(0.5,) * 3),
)
"""Magnitudes in falling order. All permutations are patterns, but of the last, of squared length 12, which have 56."""
_PADS = """
012 013 023 123 045 046 047 056 057 067 146 147 156 157 167 245 246 247 256 257 267 345 346 347 356 357 367 014 237
"""
"""The 29 of them that fill up the 256 patterns, by the places of their three 1/2 (appendix C.1 of the paper)."""
_CHUNK = {"cpu": 1 << 12, "cuda": 1 << 17}
"""Vectors searched at once: what is kept of each is some 500 numbers."""


def points(book: Book, device: torch.device | str = "cpu") -> Tensor:
    """The points of a codebook in the order of their codes, fp32 [65536 or 256, 8]. Shared: never write into them."""
    return _points(book, torch.device(device))


@lru_cache(maxsize=8)
def _points(book: Book, device: torch.device) -> Tensor:
    return (_e8p() if book == "e8p" else _e8()).to(device)


@lru_cache(maxsize=1)
def magnitudes() -> Tensor:
    """E8P's 256 patterns, fp32 [256, 8]: those of squared length up to 10 in lexicographic order, then the 29."""
    short = [each for each in product((0.5, 1.5, 2.5), repeat=WIDTH) if sum(x * x for x in each) <= 10]
    long = [[0.5 if str(place) in halves else 1.5 for place in range(WIDTH)] for halves in _PADS.split()]
    return torch.tensor([*short, *long])


def _e8p() -> Tensor:
    code = torch.arange(1 << 16)
    size = magnitudes()[code & 255]
    negative = code[:, None] >> torch.arange(8, 15) & 1
    last = (negative.sum(-1) + size.sum(-1).long()) & 1
    signs = 1 - 2 * torch.cat([negative, last[:, None]], -1)
    return signs * size + (0.25 - 0.5 * (code >> 15))[:, None]


def _e8() -> Tensor:
    """Zero, the 240 vectors of squared length 2, and 15 of squared length 4: twice an axis, all but one of the 16."""
    pairs = [v for v in product((-1, 0, 1), repeat=WIDTH) if sum(map(abs, v)) == 2]
    halves = [v for v in product((-0.5, 0.5), repeat=WIDTH) if sum(v) % 2 == 0]
    axes = torch.cat([2 * torch.eye(WIDTH), -2 * torch.eye(WIDTH)])[:15]
    return torch.cat([torch.zeros(1, WIDTH), torch.tensor(pairs), torch.tensor(halves), axes])


def nearest(x: Tensor, book: Book) -> Tensor:
    """Codes int32 [N] of the points nearest to vectors [N, 8], fp32."""
    search = _nearest_e8p if book == "e8p" else _nearest_of_all
    step = _CHUNK["cuda" if x.is_cuda else "cpu"]
    return torch.cat([search(x[start : start + step]) for start in range(0, max(1, len(x)), step)])


def _nearest_of_all(x: Tensor) -> Tensor:
    table = points("e8", x.device)
    return torch.addmm(-table.square().sum(-1) / 2, x, table.T).argmax(-1).int()


@lru_cache(maxsize=4)
def _patterns(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(runs [8, 8], the 29 [29, 8], the number of every pattern by its digits [6561])."""
    number = torch.zeros(3**WIDTH, dtype=torch.int32)
    number[_digits(magnitudes())] = torch.arange(256, dtype=torch.int32)
    runs, pads = torch.tensor(_RUNS), magnitudes()[-len(_PADS.split()) :]
    return runs.to(device), pads.to(device), number.to(device)


def _digits(size: Tensor) -> Tensor:
    """Magnitudes [..., 8] as numbers of eight digits to the base of three."""
    return ((size - 0.5).long() * 3 ** torch.arange(WIDTH, device=size.device)).sum(-1)


def _nearest_e8p(x: Tensor) -> Tensor:
    _, _, number = _patterns(x.device)
    y = torch.cat([x - 0.25, x + 0.25])  # around zero for either side
    found, gain = _best_magnitudes(y)
    side = torch.argmax(gain.view(2, -1) - y.square().sum(-1).view(2, -1) / 2, 0)
    chosen = side * len(x) + torch.arange(len(x), device=x.device)
    found, y = found[chosen], y[chosen]
    negative = (y < 0).int()
    odd = (negative.sum(-1, keepdim=True) + found.sum(-1, keepdim=True).long()) & 1
    negative.scatter_add_(-1, (found * y.abs()).argmin(-1, keepdim=True), odd.int())  # 2 is turned over twice
    places = torch.arange(8, 15, device=x.device, dtype=torch.int32)
    signs = ((negative[:, :7] & 1) << places).sum(-1, dtype=torch.int32)
    return number[_digits(found)] | signs | (side.int() << 15)


def _best_magnitudes(y: Tensor) -> tuple[Tensor, Tensor]:
    """(magnitudes [N, 8] of the even point p nearest to every y [N, 8], half of |y|² - |y - p|² [N])."""
    runs, pads, _ = _patterns(y.device)
    size, odd = y.abs(), (y < 0).sum(-1, keepdim=True) & 1
    ordered, order = size.sort(-1, descending=True)
    gain = _gain(ordered @ runs.T, ordered[:, -1:] / 2, runs, odd)
    best, run = gain[:, :-1].max(-1)
    found = torch.empty_like(size).scatter_(-1, order, runs[run])
    long = (gain[:, -1] > best).nonzero().flatten()  # where one of the 29 may be nearer
    size, odd = size[long], odd[long]
    gain = _gain(size @ pads.T, (pads * size[:, None]).amin(-1), pads, odd)
    better, pad = gain.max(-1)
    nearer = better > best[long]
    found[long[nearer]] = pads[pad[nearer]]
    best[long] = torch.maximum(better, best[long])
    return found, best


def _gain(product: Tensor, least: Tensor, patterns: Tensor, odd: Tensor) -> Tensor:
    """Half of |y|² - |y - p|² for every pattern [N, P], a sign turned over where the pattern has the other parity.

    `product` [N, P] is that of magnitudes, `least` [N, P] the part of it that costs least to turn over.
    """
    turned = (patterns.sum(-1).long() & 1) != odd
    return product - patterns.square().sum(-1) / 2 - 2 * least * turned


@dataclass(frozen=True)
class Lattice:
    """A weight [O, I] in vectors of eight columns: codes int32 [O, I/8] of a codebook, times `scale` fp32 [1]."""

    codes: Tensor
    scale: Tensor
    book: Book

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.codes.shape[0], WIDTH * self.codes.shape[1]))

    def to(self, device: torch.device | str) -> Lattice:
        """The same on another device."""
        return Lattice(self.codes.to(device), self.scale.to(device), self.book)

    def dequantize(self) -> Tensor:
        """Values [O, I] in fp32."""
        table = points(self.book, self.codes.device)
        return (table.index_select(0, self.codes.flatten()) * self.scale).reshape(self.shape)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: codes in 16 bits (as their two's complement) or 8."""
        kind = torch.int16 if BITS[self.book] == 16 else torch.uint8
        return {"codes": self.codes.to(kind), "scale": self.scale}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], book: Book) -> Lattice:
        """The inverse of `tensors`."""
        return Lattice(tensors["codes"].int() & ((1 << BITS[book]) - 1), tensors["scale"], book)


def lattice_bytes(shape: tuple[int, int], book: Book) -> int:
    """Bytes of a weight [O, I] in lowbit's own files."""
    return shape[0] * shape[1] // WIDTH * BITS[book] // 8 + 4
