"""The host of `transform.cu`: what it takes, how a device's processors are filled, and its start.

It takes inputs in bf16 behind maps of whole tiles. fp16 inputs need every operand in two parts, which leaves no
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
_SHARED = 227 * 1024
"""Bytes of shared memory that a block may ask for."""
_REGISTERS = 1 << 16
"""Of a processor, shared by all threads that it holds."""
_NEEDED = 32
"""Registers of a thread beside a token's sums, but for a few that are spilled before the first product."""
_MOST = 15
"""Groups of a block: each meets at a barrier of its own, and the whole block at another."""


class Plan(NamedTuple):
    """How a processor is filled: tokens that a block works on at once, 16 columns or 32 to a warp, blocks at once."""

    groups: int
    tiles: int = 2
    resident: int = 1

    def threads(self, n2: int) -> int:
        """Threads of a group."""
        return 2 * n2 // self.tiles


def refusal(x: Tensor, how: Encoder, packed: bool) -> str | None:
    """Why inputs behind a map are left to the kernel in Triton, None where they are not."""
    if not x.is_cuda or not available(x.device.index):
        return "the kernel is for Hopper"
    return shape_refusal(x, how, packed)


def shape_refusal(x: Tensor, how: Encoder, packed: bool) -> str | None:
    """The same for what does not depend on the device."""
    if x.dtype != torch.bfloat16:
        return "operands of other inputs are in two parts"
    if how.factors is None:
        return "there is no map of two factors"
    n1, n2 = how.factors.sizes
    if n1 % 16 or n2 % (32 if packed else 16):
        return f"{n1} x {n2} are no whole tiles"
    return None


@cache
def plan(n1: int, n2: int, sides: int, tokens: int, places: int) -> Plan:
    """The plan for sizes, a number of factors, tokens and processors.

    A token that has a processor to itself gets all the warps there are for it. Of more, as many are worked on at once
    as registers and shared memory hold.
    """
    if tokens <= places or n2 % 32:
        return Plan(1, tiles=1)
    needed = n1 * (3 if sides == 2 else 2) // 2 + _NEEDED  # what lies between two products takes half of its sums
    warps = min(_REGISTERS // (32 * needed) // 4 * 4, 32)  # a processor's four parts hold equally many
    groups = min(warps // (n2 // 32), _MOST)
    while groups > 1 and shared_bytes(n1, n2, True, sides == 2, groups) > _SHARED:
        groups -= 1
    return Plan(groups)


def shared_bytes(n1: int, n2: int, left: bool, right: bool, groups: int) -> int:
    """Shared memory of a block: factors, and for every group two tokens and three numbers of eight warps."""
    rows = n2 // 8 | 1
    factors = left * n1 * (n1 // 8 | 1) + right * n2 * rows
    return _VECTOR * (factors + groups * (2 * n1 * rows + 6))


def encode(x: Tensor, how: Encoder, packed: bool, chosen: Plan | None = None) -> tuple[Tensor, Tensor]:
    """See `dynamic.encode`; under a plan of one's own if there is one."""
    factors = how.factors
    assert factors is not None
    n1, n2 = factors.sizes
    x = aligned(x.contiguous())
    codes, scale = outputs(x, how.number, packed)
    left, right = factors.left is not None, factors.right is not None
    places = processors(x.device)
    chosen = chosen or plan(n1, n2, left + right, len(x), places)
    room = shared_bytes(n1, n2, left, right, chosen.groups)
    kernel = compiled("transform", _constants(how, factors, packed, chosen), x.device.index, room)
    blocks = min(len(x), chosen.resident * places)
    clip = scale if how.clip is None else how.clip.float()
    sides = (scale if side is None else side for side in (factors.left, factors.right))
    gain = struct.unpack("i", struct.pack("f", factors.gain))[0]
    kernel((blocks, 1), chosen.groups * chosen.threads(n2), [x, *sides, clip, codes, scale, len(x), gain])
    return codes, scale


def _constants(how: Encoder, factors: Factors, packed: bool, chosen: Plan) -> Constants:
    """What the source is compiled for."""
    (n1, n2), (levels, low, high) = factors.sizes, reach(how.number)
    return (
        ("BFLOAT", 0), ("N1", n1), ("N2", n2), ("P1", padded(n1)), ("P2", padded(n2)),
        ("LEFT", int(factors.left is not None)), ("RIGHT", int(factors.right is not None)),
        ("GAIN", int(factors.gain != 1)), ("FORM", 1 if packed else 0 if isinstance(how.number, Int) else 2),
        ("TILES", chosen.tiles), ("GROUPS", chosen.groups), ("RESIDENT", chosen.resident),
        ("LOWEST", int(low)), ("HIGHEST", int(high)), ("TWICE_LEVELS", int(2 * levels)),
        ("CLIP", int(how.clip is not None)),
    )  # fmt: skip
