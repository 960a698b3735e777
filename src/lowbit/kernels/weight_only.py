"""y = x Ŵᵀ + b for 16-bit inputs and weights in integers of 2, 3, 4 or 8 bits, NVFP4 or MXFP4 (W4A16 and its kin).

Up to `FEW` tokens, the weights' bytes are what takes the time, and `product.cu` reads them once, as codes. For more,
the library's product on a scratch copy in 16 bits is faster than anything that multiplies codes, and the copy costs a
few per cent of it. Elsewhere than on a GPU, `reference` is the whole story.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics.grid import to_values
from .compile import Constants, available, compiled, processors
from .layout import COLUMNS, Prepared, restore

FEW = 128
"""Tokens up to which codes are multiplied."""
MOST = 8
"""Tiles of tokens that a warp multiplies at once; more tokens read the weights again."""
SCALED = 5
"""Tiles of tokens from which on scales are cheaper in the values of integers than on their sums."""
_TOKENS = 8
"""Tokens of one tensor core operation."""
_SHARED = 200 * 1024
"""Bytes of shared memory that a plan may take."""
_WIDE = {2: (28, 1, 2), 3: (28, 1, 3), 4: (28, 1, 3), 5: (16, 2, 3), 6: (16, 1, 2), 7: (16, 1, 3), 8: (16, 1, 2)}
"""Most warps of a block, depth and stages, by tiles of tokens: where more than four tiles of rows share x."""
_NARROW = {2: (32, 1, 3), 3: (16, 1, 3), 4: (20, 2, 3), 5: (16, 2, 3), 6: (16, 1, 3), 7: (12, 2, 3), 8: (8, 2, 4)}
"""The same for fewer."""
_MEMORY = 512
"""Bytes of one operation's fp32 sums in shared memory, and of a block of its inputs."""


@dataclass(frozen=True)
class Plan:
    """How `product.cu` shares out the work; see there."""

    rows: int
    tokens: int
    row_warps: int
    k_warps: int
    cluster: int
    depth: int
    stages: int
    late: bool = False
    """Inputs are read when weights are unpacked, and not before."""

    @property
    def shared(self) -> int:
        """Bytes of shared memory of a block: inputs first, sums in their place afterwards."""
        return self.k_warps * self.tokens * max(4 * self.stages, self.row_warps * self.rows) * _MEMORY

    def constants(self) -> Constants:
        """What the source is compiled with."""
        return tuple((field.name.upper(), int(getattr(self, field.name))) for field in fields(self))


def linear(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """Inputs [..., K] to outputs [..., N] of their dtype, which the bias [N] shares.

    Kernels take bf16 and fp16 on a device that they know, and have no gradients; all else goes to `reference`.
    """
    learning = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if learning or not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or not available(x.device.index):
        return reference(x, weight, bias)
    assert weight.low.device == x.device, "a weight is prepared where its inputs are"
    flat = x.reshape(-1, x.shape[-1])
    if weight.order is not None:
        flat = flat[:, weight.order]
    if not len(flat):
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    if len(flat) > FEW:
        y = F.linear(flat, dequantized(weight, x.dtype), bias)
    else:
        y = product(flat, weight, bias, plan(len(flat), weight))
    return y.reshape(*x.shape[:-1], weight.shape[0])


def reference(x: Tensor, weight: Prepared, bias: Tensor | None = None) -> Tensor:
    """The definition of `linear`, from the prepared codes: exact weights, sums in fp32, rounded once."""
    inputs = x if weight.order is None else x[..., weight.order]
    return F.linear(inputs.float(), values(weight), None if bias is None else bias.float()).to(x.dtype)


def values(weight: Prepared) -> Tensor:
    """Ŵ [N, K] in fp32, columns in the order in which they are prepared."""
    codes, scale, zero = restore(weight)
    levels = to_values(codes.unflatten(1, (scale.shape[1], -1)), weight.number, zero[..., None])
    return (levels * scale[..., None]).flatten(1)


def dequantized(weight: Prepared, dtype: torch.dtype) -> Tensor:
    """Ŵ [N, K] in bf16 or fp16, columns in the order in which they are prepared."""
    outputs, inputs = weight.shape
    out = torch.empty(outputs, inputs + -inputs % 8, device=weight.low.device, dtype=dtype)
    tiles, units = weight.low.shape[:2]
    kernel = compiled("dequantize", _format(weight, dtype), weight.low.device.index)
    arguments: list[Tensor | int] = [*_tensors(weight), out, outputs, out.shape[1] // 8, *_counts(weight)]
    kernel((-(-tiles * units // 8), 1), 256, arguments)
    return out[:, :inputs]


def plan(tokens: int, weight: Prepared) -> Plan:
    """How to share out a product of a number of tokens on the weight's device."""
    (tiles, units), device = weight.low.shape[:2], weight.low.device
    if tokens > _TOKENS * (SCALED - 1) and _folds(weight):
        return _plan_of_many(-(-tokens // _TOKENS), tiles, units, processors(device))
    return plan_for(tokens, tiles, units, device, thick=weight.factor is not None)


def plan_for(tokens: int, tiles: int, units: int, device: torch.device, *, thick: bool) -> Plan:
    """The same for a weight of so many tiles of rows and units of columns, whose codes take more registers or not."""
    return _plan(-(-tokens // _TOKENS), tiles, units, processors(device), thick)


def product(x: Tensor, weight: Prepared, bias: Tensor | None, how: Plan) -> Tensor:
    """x [M, K] Ŵᵀ + b on codes, under a plan."""
    inputs = x.shape[1]
    x = aligned(F.pad(x, (0, -inputs % 8)) if inputs % 8 else x)
    y = torch.empty(len(x), weight.shape[0], device=x.device, dtype=x.dtype)
    tensors = [*_tensors(weight), weight.low]  # no factor per token
    form = (*_format(weight, x.dtype), ("SCALED", int(scaled(how, weight))))
    start(form, tensors, x, bias, y, _counts(weight), weight.low.shape[0], how)
    return y


def scaled(how: Plan, weight: Prepared) -> bool:
    """Whether integers are multiplied by their scales before they are used, and rounded: for many tokens."""
    return how.tokens >= SCALED and weight.factor is None and _folds(weight)


def _folds(weight: Prepared) -> bool:
    """Whether scales can be in the values that are multiplied, so that no group needs a sum of its own."""
    return weight.factor is not None or weight.scale.dtype == torch.float16


def aligned(x: Tensor) -> Tensor:
    """The same contiguous tensor, where it can be read 16 bytes at a time."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def start(
    form: Constants,
    weight: list[Tensor],
    x: Tensor,
    bias: Tensor | None,
    y: Tensor,
    counts: list[int],
    tiles: int,
    how: Plan,
) -> None:
    """Start `product.cu` on the pointers and counts of a weight of so many tiles of rows."""
    constants = (*form, ("BIAS", int(bias is not None)), *how.constants())
    kernel = compiled("product", constants, x.device.index, how.shared)
    (tokens, outputs), vectors = y.shape, x.shape[1] * x.element_size() // 16
    kernel(
        (-(-tiles // (how.rows * how.row_warps)) * how.cluster, -(-tokens // (how.tokens * _TOKENS))),
        32 * how.row_warps * how.k_warps,
        [*weight, x, x if bias is None else bias, y, tokens, outputs, vectors, *counts],
    )


@cache
def _plan(tokens: int, tiles: int, units: int, processors: int, thick: bool) -> Plan:
    """The plan for tiles of eight tokens, tiles of rows and units of columns: rules read off searches on Hopper.

    One tile of tokens: many warps, each with little to wait for; what they read of x stays in L1. Two blocks of 16
    warps with `thick` codes have no room on a processor beside each other, and one of 32 has. More of them: warps of
    several tiles of rows share what they read of x, and the blocks fill the processors once, as evenly as they can.
    """
    if tokens == 1:
        few = 2 * tiles < 7 * processors
        row_warps = 2 if thick and processors < tiles <= 2 * processors else 1
        return Plan(1, 1, row_warps, min(units, 16 if few else 8), 1, 1, 0, late=not few and not thick)
    short = units <= 64
    if tokens == 2 and not short and tiles <= 2 * processors:
        return Plan(2, 2, 2, min(units // 2, 8), 2, 1, 3)
    if tokens == 2 and short and processors < tiles <= 2 * processors:
        return Plan(2, 2, 1, min(units, 16), 1, 1, 0)
    tokens = min(tokens, MOST)
    cluster = 2 if 2 * tiles < 5 * processors and units > 1 and (tokens > 5 or not short) else 1
    share = tiles * cluster / processors
    row_warps = math.ceil(share / math.ceil(share / 8))
    warps, depth, stages = (_WIDE if row_warps > 4 else _NARROW)[tokens]
    fitting = min(8, units // cluster, warps // row_warps, _SHARED // (tokens * 4 * stages * _MEMORY))
    return Plan(1, tokens, row_warps, fitting, cluster, depth, stages)


@cache
def _plan_of_many(tokens: int, tiles: int, units: int, processors: int) -> Plan:
    """The plan from `SCALED` tiles of tokens on, where no group has a sum of its own.

    That leaves registers for two tiles of rows to a warp, which share what it reads of x. Blocks are of up to four such
    warps times four that share columns, in the cluster that leaves the fewest processors without work.
    """
    pairs = math.ceil(tiles / 2)

    def row_warps(cluster: int) -> int:
        share = pairs * cluster / processors
        return math.ceil(share / math.ceil(share / 4))

    def busy(cluster: int) -> float:
        blocks = math.ceil(pairs / row_warps(cluster)) * cluster
        return pairs * cluster / (row_warps(cluster) * math.ceil(blocks / processors))

    clusters = (1, 2) if units > 1 else (1,)
    cluster = max(clusters, key=lambda each: (busy(each), row_warps(each), -each))
    return Plan(2, min(tokens, MOST), row_warps(cluster), min(4, units // cluster), cluster, 1, 2, late=True)


def _format(weight: Prepared, dtype: torch.dtype) -> Constants:
    """What both kernels are compiled with."""
    return (
        ("BYTES", 0),
        ("BITS", weight.bits),
        ("E2M1", int(weight.factor is not None)),
        ("BFLOAT", int(dtype == torch.bfloat16)),
        ("ZERO", int(weight.zero is not None)),
        ("WIDE", int(weight.scale.dtype == torch.float32)),
        ("GROUPS", 1 if weight.group == -1 else max(1, COLUMNS // weight.group)),
    )


def _tensors(weight: Prepared) -> list[Tensor]:
    """Pointers of a weight; the codes stand for what is not there and not looked at."""
    parts = (weight.high, weight.scale, weight.zero, weight.factor)
    return [weight.low, *(weight.low if part is None else part for part in parts)]


def _counts(weight: Prepared) -> list[int]:
    """Units and scales of a tile, log2 of the units that share a scale (all of them: more than there are)."""
    shift = 30 if weight.group == -1 else max(0, (weight.group // COLUMNS).bit_length() - 1)
    return [weight.low.shape[1], weight.scale.shape[1], shift]
