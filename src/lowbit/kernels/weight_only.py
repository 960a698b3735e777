"""y = x Ŵᵀ + b for 16-bit inputs and weights in integers of 2, 3, 4 or 8 bits, NVFP4 or MXFP4 (W4A16 and its kin).

Up to `FEW` tokens, the weights' bytes are what takes the time, and `product.cu` reads them once, as codes. For more,
`wide_product.cu` keeps the tensor cores busy while it unpacks. What it does not take, and so many tokens that a copy
costs nothing beside them, is left to the library's product on a scratch copy in 16 bits. Elsewhere than on a GPU,
`reference` is the whole story.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics.grid import to_values
from . import wide_product
from .compile import Constants, available, compiled, processors
from .layout import COLUMNS, Prepared, restore

FEW = 32
"""Tokens up to which every weight is read for all of them at once."""
MOST = 4
"""Tiles of tokens that a warp multiplies at once; more tokens read the weights again."""
_TOKENS = 8
"""Tokens of one tensor core operation."""
_SHARED = 200 * 1024
"""Bytes of shared memory that a plan may take."""
_WIDE = {2: (28, 1, 4), 3: (28, 1, 3), 4: (28, 1, 3)}
"""Most warps of a block, depth and stages, by tiles of tokens: where more than four tiles of rows share x."""
_NARROW = {2: (32, 1, 3), 3: (16, 1, 3), 4: (20, 2, 3)}
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
    resident: int = 0
    """Blocks for which a processor has registers; 0 leaves it to the compiler."""

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
    if len(flat) <= FEW:
        y = product(flat, weight, bias, plan(len(flat), weight))
    elif len(flat) <= wide_product.MOST and wide_product.refusal(weight) is None:
        y = wide_product.product(whole_vectors(flat), weight, bias, wide_product.plan(len(flat), weight))
    else:
        y = F.linear(flat, dequantized(weight, x.dtype), bias)
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
    kernel = compiled("dequantize", weight.constants(dtype), weight.low.device.index)
    arguments: list[Tensor | int] = [*weight.pointers(), out, outputs, out.shape[1] // 8, *weight.counts()]
    kernel((-(-tiles * units // 8), 1), 256, arguments)
    return out[:, :inputs]


def plan(tokens: int, weight: Prepared) -> Plan:
    """How to share out a product of a number of tokens on the weight's device."""
    tiles, units = weight.low.shape[:2]
    return plan_for(tokens, tiles, units, weight.low.device)


def plan_for(tokens: int, tiles: int, units: int, device: torch.device) -> Plan:
    """The same for a weight of so many tiles of rows and units of columns."""
    return _plan(-(-tokens // _TOKENS), tiles, units, processors(device))


def product(x: Tensor, weight: Prepared, bias: Tensor | None, how: Plan) -> Tensor:
    """x [M, K] Ŵᵀ + b on codes, under a plan."""
    x = whole_vectors(x)
    y = torch.empty(len(x), weight.shape[0], device=x.device, dtype=x.dtype)
    tensors = [*weight.pointers(), weight.low]  # no factor per token
    start(weight.constants(x.dtype), tensors, x, bias, y, weight.counts(), weight.low.shape[0], how)
    return y


def aligned(x: Tensor) -> Tensor:
    """The same contiguous tensor, where it can be read 16 bytes at a time."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def whole_vectors(x: Tensor) -> Tensor:
    """The same inputs, with columns of zeros where there are no eight more of them."""
    inputs = x.shape[1]
    return aligned(F.pad(x, (0, -inputs % 8)) if inputs % 8 else x)


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
    whole = ("WHOLE", int(x.shape[1] % COLUMNS == 0))
    constants = (*form, ("BIAS", int(bias is not None)), whole, *how.constants())
    kernel = compiled("product", constants, x.device.index, how.shared)
    (tokens, outputs), vectors = y.shape, x.shape[1] * x.element_size() // 16
    kernel(
        (-(-tiles // (how.rows * how.row_warps)) * how.cluster, -(-tokens // (how.tokens * _TOKENS))),
        32 * how.row_warps * how.k_warps,
        [*weight, x, x if bias is None else bias, y, tokens, outputs, vectors, *counts],
    )


@cache
def _plan(tokens: int, tiles: int, units: int, processors: int) -> Plan:
    """The plan for tiles of eight tokens, tiles of rows and units of columns: rules read off searches on Hopper.

    One tile of tokens: 32 warps of 64 registers on a processor, each with little to wait for; what they read of x stays
    in L1. More of them: warps of several tiles of rows share what they read of x, and the blocks fill the processors
    once, as evenly as they can.
    """
    short = units <= 64
    if tokens == 1:
        warps = 16 if 2 * tiles < 7 * processors else 8
        return Plan(1, 1, 1, min(units, warps), 1, 1, 0, resident=32 // warps)
    if tokens == 2 and not short and tiles <= 2 * processors:
        return Plan(2, 2, 2, min(units // 2, 8), 2, 1, 2)
    if tokens == 2 and short and processors < tiles <= 2 * processors:
        return Plan(1, 2, 2, min(units, 8), 1, 1, 0, resident=1)
    tokens = min(tokens, MOST)
    cluster = 2 if 2 * tiles < 5 * processors and units > 1 and (tokens > 5 or not short) else 1
    share = tiles * cluster / processors
    row_warps = math.ceil(share / math.ceil(share / 8))
    warps, depth, stages = (_WIDE if row_warps > 4 else _NARROW)[tokens]
    fitting = min(8, units // cluster, warps // row_warps, _SHARED // (tokens * 4 * stages * _MEMORY))
    return Plan(1, tokens, row_warps, fitting, cluster, depth, stages)
