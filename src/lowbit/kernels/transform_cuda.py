"""The host of `transform.cu`: what it takes, how a device's processors are filled, and its start.

It takes inputs in bf16 behind maps of whole steps. fp16 inputs need every operand in two parts, which leaves no
registers for this way of working: they, and sides of other sizes, stay with the kernel in Triton.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics.spec import Int
from .compile import Constants, available, compiled, processors
from .encoder import Encoder, Factors, outputs, padded, reach
from .weight_only import aligned

_VECTOR = 16
"""Bytes that are read at once."""
_REGISTERS = 1 << 16
"""Of a processor, shared by all threads that it holds."""
_NEEDED = 40
"""Registers of a thread beside a token's numbers."""
_TEAM, _COLUMNS = 128, 64
"""Threads that multiply together, and rows of an operand: columns of the result."""
_THREADS = 1024
"""Most of a block."""
_LARGEST = 128, 512
"""Sides beyond which a token has no room."""


class Plan(NamedTuple):
    """How a processor is filled: tokens that a block works on at once, and 16 columns or 32 to a warp."""

    groups: int
    tiles: int = 2

    def teams(self, n2: int) -> int:
        """Of a group."""
        return -(-n2 // (_COLUMNS * self.tiles))

    def threads(self, n2: int) -> int:
        """Of a group."""
        return _TEAM * self.teams(n2)


def refusal(x: Tensor, how: Encoder) -> str | None:
    """Why inputs behind a map are left to the kernel in Triton, None where they are not."""
    if not x.is_cuda or not available(x.device.index):
        return "the kernel is for Hopper"
    return shape_refusal(x, how)


def shape_refusal(x: Tensor, how: Encoder) -> str | None:
    """The same for what does not depend on the device."""
    if x.dtype != torch.bfloat16:
        return "operands of other inputs are in two parts"
    if how.factors is None:
        return "there is no map of two factors"
    n1, n2 = how.factors.sizes
    if n1 % 16 or n2 % 16:
        return f"{n1} x {n2} are no whole steps"
    return f"{n1} x {n2} are too many" if n1 > _LARGEST[0] or n2 > _LARGEST[1] else None


@cache
def plan(n1: int, n2: int, sides: int, tokens: int, places: int) -> Plan:
    """The plan for sizes, a number of factors, tokens and processors.

    A token that has a processor to itself gets all the warps there are for it. Of more, as many are worked on at once
    as registers hold, or a few less where fewer places are empty in the last round. Shared memory holds more.
    """
    if tokens <= places:
        return Plan(1, tiles=1)
    one = Plan(1, tiles=1 if n2 <= _COLUMNS else 2)
    needed = n1 // 4 * (2 * one.tiles + (sides == 2)) + _NEEDED  # sums of every tile, and what lies between products
    most = max(1, min(_REGISTERS // needed, _THREADS) // one.threads(n2))
    return one._replace(groups=min(range(most, (2 * most - 1) // 3, -1), key=lambda n: -(-tokens // (places * n)) * n))


def shared_bytes(n1: int, n2: int, left: bool, right: bool, how: Plan) -> int:
    """Shared memory of a block: factors, and for every group a token and three numbers of its warps."""
    chunks = how.teams(n2) * how.tiles
    factors = left * -(-n1 // _COLUMNS) * n1 + right * chunks * n2
    told = -(-12 * how.threads(n2) // 32)
    return 8 * _VECTOR * (factors + how.groups * chunks * n1) + -(-how.groups * told // _VECTOR) * _VECTOR


def encode(x: Tensor, how: Encoder, packed: bool, chosen: Plan | None = None) -> tuple[Tensor, Tensor]:
    """See `dynamic.encode`; under a plan of one's own if there is one."""
    factors = how.factors
    assert factors is not None
    n1, n2 = factors.sizes
    x = aligned(x)
    codes, scale = outputs(x, how.number, packed)
    left, right = factors.left is not None, factors.right is not None
    places = processors(x.device)
    chosen = chosen or plan(n1, n2, left + right, len(x), places)
    room = shared_bytes(n1, n2, left, right, chosen)
    kernel = compiled("transform", _constants(how, factors, packed, chosen), x.device.index, room)
    clip = scale if how.clip is None else how.clip.float()
    sides = (scale if side is None else side for side in (factors.left, factors.right))
    gain = struct.unpack("i", struct.pack("f", factors.gain))[0]
    arguments = [x, *sides, clip, codes, scale, len(x), gain]
    kernel((min(len(x), places), 1), chosen.groups * chosen.threads(n2), arguments)
    return codes, scale


def _constants(how: Encoder, factors: Factors, packed: bool, chosen: Plan) -> Constants:
    """What the source is compiled for."""
    (n1, n2), (levels, low, high) = factors.sizes, reach(how.number)
    return (
        ("BFLOAT", 0), ("N1", n1), ("N2", n2), ("P1", padded(n1)), ("P2", padded(n2)),
        ("LEFT", int(factors.left is not None)), ("RIGHT", int(factors.right is not None)),
        ("GAIN", int(factors.gain != 1)), ("FORM", 1 if packed else 0 if isinstance(how.number, Int) else 2),
        ("TILES", chosen.tiles), ("GROUPS", chosen.groups), ("SUMS", n1 // 2),
        ("LOWEST", int(low)), ("HIGHEST", int(high)), ("TWICE_LEVELS", int(2 * levels)),
        ("CLIP", int(how.clip is not None)),
    )  # fmt: skip
