"""The host of `wide_product.cu`: weights as codes, multiplied by so many tokens that tensor cores are what is scarce.

It takes 4-bit floats, and integers whose scales are stored in fp16, in layers of whole vectors; all else stays with
`product.cu` or a copy in 16 bits.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .compile import Argument, Constants, arrived, compiled, processors
from .layout import Prepared
from .tensor_map import tensor_map

MOST = 4096
"""Tokens beyond which a scratch copy costs nothing beside the library's product."""
ROWS = 128
"""Rows of a block."""
WARPS = ROWS // 16
"""That multiply, each 16 rows."""
_SET = 64
"""Tokens of one tensor core operation."""
_STAGES = 4
"""Units of codes in shared memory, and of inputs; half as many of inputs for more than two sets of tokens."""
_MICROSECONDS = (0.53, 0.74, 1.0, 1.25)
"""Of a unit of columns, by sets of tokens of a block, on an H200; more sums do not fit in registers."""
_START = 2
"""Microseconds of a block beside them."""
_ADDING = 3.2e-4
"""Microseconds in which the sums of a block of one token go to memory and back, where many do."""
_SPLITS, _LEAST = (1, 2, 3, 4, 6, 8), 4
"""How many blocks may share columns, each a kernel of its own, and least units of each."""
_COUNTERS = 1 << 16
"""Room for what blocks that share columns count by."""


class Plan(NamedTuple):
    """How `wide_product.cu` shares out the work: tokens of a block, and blocks that share columns."""

    tokens: int
    splits: int

    @property
    def threads(self) -> int:
        """Of a block: the warps that multiply, and one that fetches or four that lend their registers too."""
        return 32 * (WARPS + (4 if self.tokens > _SET else 1))

    def constants(self) -> Constants:
        """What the source is compiled with."""
        return ("TOKENS", self.tokens), ("SPLITS", self.splits), ("SUMS", _SET // 2)


def refusal(weight: Prepared) -> str | None:
    """Why products of a weight are left to others, None where they are not."""
    if weight.factor is None and weight.scale.dtype != torch.float16:
        return "scales are no fp16 numbers"
    return f"{weight.shape[0]} outputs are no whole vectors of 16 bytes" if weight.shape[0] % 8 else None


def plan(tokens: int, weight: Prepared) -> Plan:
    """How to share out a product of a number of tokens on the weight's device."""
    tiles, units = weight.low.shape[:2]
    return plan_for(tokens, tiles, units, processors(weight.low.device))


@cache
def plan_for(tokens: int, tiles: int, units: int, processors: int) -> Plan:
    """The same for tiles of rows and units of columns: the cheapest by what was measured of blocks."""
    rows = math.ceil(tiles / WARPS)

    def cost(how: Plan) -> float:
        blocks = rows * math.ceil(tokens / how.tokens) * how.splits
        block = math.ceil(units / how.splits) * _MICROSECONDS[how.tokens // _SET - 1] + _START
        adding = blocks * how.tokens * _ADDING if how.splits > 1 else 0
        return math.ceil(blocks / processors) * block + adding

    sizes = range(1, min(len(_MICROSECONDS), math.ceil(tokens / _SET)) + 1)
    splits = [each for each in _SPLITS if each == 1 or each * _LEAST <= units]
    return min((Plan(sets * _SET, each) for sets in sizes for each in splits), key=cost)


def unit_bytes(weight: Prepared) -> int:
    """Codes, scales and zero-points of 16 rows and a unit of columns."""
    scales = 16 if weight.factor is not None else 32 if weight.zero is None else 64
    return 256 * weight.bits + scales * weight.groups


def shared_bytes(how: Plan, unit: int) -> int:
    """Shared memory of a block: inputs and their barriers, and a ring of codes for every warp."""
    halves = _STAGES if how.tokens > 2 * _SET else 2 * _STAGES
    return halves * (128 * how.tokens + 16) + WARPS * _STAGES * unit


def product(x: Tensor, weight: Prepared, bias: Tensor | None, how: Plan) -> Tensor:
    """x [M, K] Ŵᵀ + b under a plan; x is of whole vectors of 16 bytes."""
    y = torch.empty(len(x), weight.shape[0], device=x.device, dtype=x.dtype)
    constants = (*weight.constants(x.dtype), ("BIAS", int(bias is not None)), *how.constants())
    kernel = compiled("wide_product", constants, x.device.index, shared_bytes(how, unit_bytes(weight)))
    rows, columns = math.ceil(weight.shape[0] / ROWS), math.ceil(len(x) / how.tokens)
    parts, done = y, y  # not looked at
    if how.splits > 1:
        parts = torch.empty(rows * columns * how.splits, how.tokens * ROWS, device=x.device)
        done = arrived(x.device, _COUNTERS)
    pointers = [*weight.pointers(), x if bias is None else bias, y, parts, done]
    arguments: list[Argument] = [tensor_map(x, how.tokens), *pointers, *y.shape, *weight.counts()]
    kernel((rows * how.splits, columns), how.threads, arguments)
    return y
