"""y = x Ŵᵀ + b where both sides are codes of 8 bits: int8 with int32 sums, or E4M3 with fp32 sums (W8A8, and W4A4).

Inputs are encoded by one kernel (`dynamic.py`), multiplied as codes, and both scales and the bias are applied to the
sums before they are written once, in 16 bits. Weights of fewer bits take a byte each here: Hopper has no tensor cores
for them, so W4A4 computes on int8 operands, as fast as W8A8 and no faster.

Up to `FEW` tokens the weight's bytes are what takes the time, and `product.cu` reads them, from the same operand: 16
bytes of a lane are neighbours of a row, whatever the order of rows. Beyond it the Triton kernel has the larger tiles.

fp8 tensor cores add up with fewer bits than fp32 has (about 14), as the library's fast mode does: errors of 1e-3 of
the result, twenty times less than what rounding to E4M3 costs; for few tokens sums are fp32's. Sums of int8 are exact;
for few tokens, what warps have summed up is added in fp32, which is exact below 2^24 and rounds by 2^-24 beyond.

Shape letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.qtensor import QTensor
from ..numerics.spec import E4M3, Int, Number
from . import weight_only
from .compile import available
from .dynamic import encode
from .encoder import Encoder
from .encoder import reference as encode_reference
from .layout import COLUMNS, ROWS, settle
from .weight_only import Plan

MULTIPLE = 16
"""Inputs come in multiples of it: rows of operands begin where the copy engine can read."""
FEW = 32
"""Tokens up to which `product.cu` is faster: on an H200 at 64 the Triton kernel is, by 5 to 75 %."""


@dataclass(frozen=True, eq=False)
class Operand:
    """A weight [N, K] as an operand: codes int8 or E4M3, each row K after the other, and fp32 scales [N]."""

    codes: Tensor
    scale: Tensor

    def rows(self, start: int, stop: int) -> Operand:
        """Rows [start, stop) of it, a view."""
        return Operand(self.codes[start:stop], self.scale[start:stop])


def joined(parts: Sequence[Operand]) -> Operand:
    """Operands of one kind, one below the other."""
    codes = torch.cat([part.codes.view(torch.uint8) for part in parts]).view(parts[0].codes.dtype)
    settle(codes)
    return Operand(codes, torch.cat([part.scale for part in parts]))


def refusal(weight: QTensor, number: Number) -> str | None:
    """Why a weight behind inputs of a format is no operand, or None."""
    spec = weight.grid.spec
    if weight.grid.scale.shape[-1] != 1 or weight.grid.scale.shape[-2] not in (1, weight.shape[-2]):
        return "its scales are not one per row"
    if isinstance(spec.number, Int) and isinstance(number, Int):
        return None if spec.number.symmetric else "it has zero-points"
    return None if spec.number == number == E4M3 else f"{spec.number} is not multiplied by {number}"


def operand(weight: QTensor, number: Number) -> Operand:
    """A weight as an operand, on the device where it is. Raises ValueError where it is none."""
    reason = refusal(weight, number)
    if reason is not None:
        raise ValueError(f"no product of codes for this weight, since {reason}: use its dense copy")
    codes, form = weight.codes, weight.grid.spec.number
    if isinstance(form, Int):
        codes = codes if form.signed else (codes.view(torch.int8) - (1 << (form.bits - 1)))
    else:
        codes = codes.view(torch.float8_e4m3fn)
    codes = codes.contiguous()
    settle(codes)
    return Operand(codes, weight.grid.scale.float().expand(weight.shape[0], 1)[:, 0].contiguous())


def linear(x: Tensor, how: Encoder, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """Inputs [..., K] to outputs [..., N] of their dtype, which the bias [N] shares; there are no gradients."""
    flat = x.reshape(-1, x.shape[-1])
    codes, scale = encode(flat, how)
    return product(codes, scale, weight, bias, x.dtype).reshape(*x.shape[:-1], len(weight.scale))


def reference(x: Tensor, how: Encoder, weight: Operand, bias: Tensor | None = None) -> Tensor:
    """The definition of `linear`."""
    codes, scale = encode_reference(x.reshape(-1, x.shape[-1]), how)
    y = product_reference(codes, scale, weight, bias, x.dtype)
    return y.reshape(*x.shape[:-1], len(weight.scale))


def product(codes: Tensor, scale: Tensor, weight: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Codes [M, K] and scales [M] times a weight: [M, N] in `dtype`."""
    if not codes.is_cuda or not len(codes) or codes.shape[1] % MULTIPLE or dtype not in (torch.bfloat16, torch.float16):
        return product_reference(codes, scale, weight, bias, dtype)
    if len(codes) <= FEW and available(codes.device.index):
        tiles, units = -(-len(weight.scale) // ROWS), -(-codes.shape[1] // COLUMNS)
        how = weight_only.plan_for(len(codes), tiles, units, codes.device)
        return product_of_few(codes, scale, weight, bias, dtype, how)
    from .codes_product_triton import product as fused

    return fused(codes, scale, weight.codes, weight.scale, bias, dtype)


def product_of_few(
    codes: Tensor, scale: Tensor, weight: Operand, bias: Tensor | None, dtype: torch.dtype, how: Plan
) -> Tensor:
    """The same by `product.cu`, under a plan."""
    outputs, inputs = weight.codes.shape
    form = (("BYTES", 1), ("INTEGER", int(codes.dtype == torch.int8)), ("BFLOAT", int(dtype == torch.bfloat16)))
    y = torch.empty(len(codes), outputs, device=codes.device, dtype=dtype)
    bytes_, x = weight.codes, weight_only.aligned(codes)
    tensors = [bytes_, bytes_, bytes_, weight.scale, scale]  # no more of 3 bits, no scales of groups
    counts = [-(-inputs // COLUMNS), 0, 0]
    weight_only.start(form, tensors, x, bias, y, counts, -(-outputs // ROWS), how)
    return y


def product_reference(codes: Tensor, scale: Tensor, weight: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The definition of `product`: sums of integers are exact, of E4M3 in fp64."""
    sums = codes.double() @ weight.codes.double().T
    y = sums * (scale.double()[:, None] * weight.scale.double())
    return (y if bias is None else y + bias.double()).to(dtype)
