"""Triton kernels of `dynamic.py`; `encoder.reference` is their definition.

What bounds these kernels is instructions, not memory, so a value gets as few as will do. Tokens are moved to the
neighbourhood of 1 by a power of two, which is exact and keeps what follows clear of overflow and of subnormal numbers.
A quotient is its product with the scale's inverse and one correction, which rounds it correctly (Markstein 1990), and
the bits of y + 1.5 · 2^23 are both the nearest integer and its conversion. The product behind may begin at once
(`NEXT`): it reads its weight while inputs are encoded, and waits for them then. Programs that transform stay on their
processor and take one token after the other, so that the factors are read once.

Shape letters: K features of a token, n1 x n2 = K; sides are padded to the powers of two B1 x B2.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from ..numerics.spec import Int
from .compile import available, processors
from .encoder import Encoder, outputs, padded, reach

_ROUND = tl.constexpr(12582912.0)
"""1.5 · 2^23: the lowest bits of its sum with y are y's nearest integer, ties to even, in two's complement."""
_BYTES, _NIBBLES, _E4M3 = (tl.constexpr(form) for form in range(3))
_AT_ONCE = 2048
"""Features that are read at once where a token is only rounded."""
_FEW, _WHOLE = 64, 1 << 15
"""Tokens too few to fill a device, and the features of one that a program then holds, so that nothing is read twice."""
_SMALL, _LARGE = (4, 4, None), (2, 8, 128)
"""Programs of a processor, warps of a program and registers of a thread, for matrices up to 64 x 64 and larger ones."""


@triton.jit
def _exponent(amax):
    """The exponent bits of an fp32 number, kept where the power of two and its inverse are normal numbers."""
    bits = amax.to(tl.int32, bitcast=True) & 0x7F800000
    return tl.minimum(tl.maximum(bits, 0x08000000), 0x77000000)


@triton.jit
def _power(exponent):
    return exponent.to(tl.float32, bitcast=True)


@triton.jit
def _scale_of(low, high, clip_at, LEVELS: tl.constexpr, CLIP: tl.constexpr):
    """A token's scale from its smallest and largest value; 0 where it has no range."""
    if CLIP:
        low *= tl.load(clip_at)
        high *= tl.load(clip_at + 1)
    amax = tl.maximum(tl.abs(low), tl.abs(high))
    return tl.div_rn(amax, amax * 0 + LEVELS)


@triton.jit
def _level(x, scale, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, FORM: tl.constexpr, FUSED: tl.constexpr):
    """The level nearest to x/scale: E4M3, else int32 whose lowest bits are the code."""
    if FUSED:
        inverse = tl.div_rn(scale * 0 + 1.0, scale)
        y = x * inverse
        y = tl.fma(tl.fma(-y, scale + tl.zeros_like(y), x), inverse + tl.zeros_like(y), y)
    else:  # the interpreter rounds between the two operations of an fma
        y = tl.div_rn(x, scale + tl.zeros_like(x))
    y = tl.minimum(tl.maximum(y, LOWEST), HIGHEST)
    level = y.to(tl.float8e4nv) if FORM == _E4M3 else (y + _ROUND).to(tl.int32, bitcast=True)
    return level


@triton.jit
def _pairs(level, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Two codes to a byte [ROWS, COLUMNS / 2], the earlier one in the lower half."""
    even, odd = tl.split(tl.reshape(level, [ROWS, COLUMNS // 2, 2]))
    return ((even & 15) | (odd << 4)).to(tl.uint8)


@triton.jit
def _rows(
    x_at, clip_at, codes_at, scale_at, K,
    LEVELS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, CLIP: tl.constexpr, FORM: tl.constexpr,
    FUSED: tl.constexpr, NEXT: tl.constexpr, WHOLE: tl.constexpr, ONCE: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    if NEXT:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    x_at += token * K
    low = tl.full((COLUMNS,), float("inf"), tl.float32)
    high = tl.full((COLUMNS,), float("-inf"), tl.float32)
    x = low
    for start in range(0, K, COLUMNS):
        if WHOLE:
            x = tl.load(x_at + start + column).to(tl.float32)
            low, high = tl.minimum(low, x), tl.maximum(high, x)
        else:
            there = column < K - start
            x = tl.load(x_at + start + column, mask=there, other=0.0).to(tl.float32)
            low = tl.minimum(low, tl.where(there, x, float("inf")))
            high = tl.maximum(high, tl.where(there, x, float("-inf")))
    low, high = tl.min(low, 0), tl.max(high, 0)
    exponent = _exponent(tl.maximum(tl.abs(low), tl.abs(high)))
    small = _power(0x7F000000 - exponent)
    scale = _scale_of(low * small, high * small, clip_at, LEVELS, CLIP)
    tl.store(scale_at + token, tl.where(scale > 0, scale * _power(exponent), 1.0))
    scale = tl.where(scale > 0, scale, small)
    for start in range(0, K, COLUMNS):
        there = column < K - start
        if not ONCE:
            x = tl.load(x_at + start + column, mask=there, other=0.0).to(tl.float32)
        level = _level(x * small, scale, LOWEST, HIGHEST, FORM, FUSED)
        if FORM == _NIBBLES:
            half = tl.arange(0, COLUMNS // 2)[None, :]
            at = codes_at + (token * K + start) // 2 + half
            tl.store(at, _pairs(level, 1, COLUMNS), mask=half < (K - start) // 2)
        else:
            at = codes_at + token * K + start + column
            tl.store(at, level.to(codes_at.dtype.element_ty), mask=there)


@triton.jit
def _as_stored(z, BFLOAT: tl.constexpr, FUSED: tl.constexpr):
    """fp32 values rounded to bf16 or fp16."""
    if not BFLOAT:
        z = z.to(tl.float16).to(tl.float32)
    elif FUSED:
        z = z.to(tl.bfloat16).to(tl.float32)
    else:  # the interpreter cuts bits off
        bits = z.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        z = bits.to(tl.float32, bitcast=True)
    return z


@triton.jit
def _from_left(left, rest_at, z, PRECISE: tl.constexpr):
    """left z for fp32 z; what its fp16 operands leave of both is added where that is asked for."""
    y = z.to(tl.float16)
    out = tl.dot(left, y)
    if PRECISE:
        out = tl.dot(left, (z - y.to(tl.float32)).to(tl.float16), out)
        out = tl.dot(tl.load(rest_at), y, out)
    return out


@triton.jit
def _ends(z, there, WHOLE: tl.constexpr):
    """The smallest and the largest value of a token."""
    low = z if WHOLE else tl.where(there, z, float("inf"))
    high = z if WHOLE else tl.where(there, z, float("-inf"))
    return tl.min(tl.min(low, 1), 0), tl.max(tl.max(high, 1), 0)


@triton.jit
def _mapped(
    x_at, left_at, right_at, clip_at, codes_at, scale_at, tokens, gain,
    N1: tl.constexpr, N2: tl.constexpr, B1: tl.constexpr, B2: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    PRECISE: tl.constexpr, BFLOAT: tl.constexpr, LEVELS: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    CLIP: tl.constexpr, FORM: tl.constexpr, FUSED: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    if NEXT:
        gdc_launch_dependents()
    i, j = tl.arange(0, B1), tl.arange(0, B2)
    there = (i < N1)[:, None] & (j < N2)[None, :]
    place = i[:, None] * N2 + j[None, :]
    WHOLE: tl.constexpr = B1 == N1 and B2 == N2
    left_place, right_place = i[:, None] * B1 + i[None, :], j[:, None] * B2 + j[None, :]
    if LEFT:
        left = tl.load(left_at + left_place)
    if RIGHT:
        right = tl.load(right_at + right_place)
    for token in tl.range(tl.program_id(0), tokens, tl.num_programs(0), num_stages=1):
        first = (tl.zeros((), dtype=tl.int64) + token) * (N1 * N2)
        if WHOLE:
            x = tl.load(x_at + first + place).to(tl.float32)
        else:
            x = tl.load(x_at + first + place, mask=there, other=0.0).to(tl.float32)
        exponent = _exponent(tl.max(tl.max(tl.abs(x), 1), 0))
        operand = (x * _power(0x7F000000 - exponent)).to(tl.float16)
        if RIGHT:
            z = tl.dot(operand, right)
            if PRECISE:
                z = tl.dot(operand, tl.load(right_at + B2 * B2 + right_place), z)
        else:
            z = operand.to(tl.float32)
        if LEFT:
            z = _from_left(left, left_at + B1 * B1 + left_place, z, PRECISE)
        if BFLOAT:  # rounds alike at every power of two
            size = _power(exponent)
            z *= gain
        else:
            size = 1.0
            z *= gain * _power(exponent)
        z = _as_stored(z, BFLOAT, FUSED)
        low, high = _ends(z, there, WHOLE)
        scale = _scale_of(low, high, clip_at, LEVELS, CLIP)
        tl.store(scale_at + token, tl.where(scale > 0, scale * size, 1.0))
        scale = tl.where(scale > 0, scale, 1.0 / size)
        level = _level(z, scale, LOWEST, HIGHEST, FORM, FUSED)
        if FORM == _NIBBLES:
            half = tl.arange(0, B2 // 2)[None, :]
            at = codes_at + first // 2 + i[:, None] * (N2 // 2) + half
            tl.store(at, _pairs(level, B1, B2), mask=(i < N1)[:, None] & (half < N2 // 2))
        else:
            tl.store(codes_at + first + place, level.to(codes_at.dtype.element_ty), mask=there)


def encode_rows(x: Tensor, how: Encoder, packed: bool) -> tuple[Tensor, Tensor]:
    """See `dynamic.encode`; x [M, K] is mapped already."""
    x = x.contiguous()
    codes, scale = outputs(x, how.number, packed)
    width = x.shape[1]
    columns = min(_WHOLE if len(x) <= _FEW else _AT_ONCE, triton.next_power_of_2(max(2, width)))
    warps = 8 if width > 8192 else 4
    _rows[(len(x),)](
        x, scale if how.clip is None else how.clip.float(), codes, scale, width, COLUMNS=columns,
        WHOLE=width % columns == 0, ONCE=width <= columns, num_warps=min(32, max(warps, columns // 512)),
        **_format(how, packed, x.device),
    )  # fmt: skip
    return codes, scale


def encode_mapped(x: Tensor, how: Encoder, packed: bool) -> tuple[Tensor, Tensor]:
    """See `dynamic.encode`."""
    factors = how.factors
    assert factors is not None
    x = x.contiguous()
    codes, scale = outputs(x, how.number, packed)
    b1, b2 = (padded(size) for size in factors.sizes)
    programs, warps, registers = _SMALL if b1 * b2 <= 4096 else _LARGE
    left, right = (scale if side is None else side for side in (factors.left, factors.right))
    _mapped[(min(len(x), programs * processors(x.device)),)](
        x, left, right, scale if how.clip is None else how.clip.float(), codes, scale, len(x), factors.gain,
        N1=factors.sizes[0], N2=factors.sizes[1], B1=b1, B2=b2, LEFT=factors.left is not None,
        RIGHT=factors.right is not None, PRECISE=x.dtype == torch.float16, BFLOAT=x.dtype == torch.bfloat16,
        num_warps=warps, maxnreg=registers, **_format(how, packed, x.device),
    )  # fmt: skip
    return codes, scale


def _format(how: Encoder, packed: bool, device: torch.device) -> dict[str, Any]:
    """A format as a kernel's constants."""
    levels, low, high = reach(how.number)
    return {
        "LEVELS": levels,
        "LOWEST": low,
        "HIGHEST": high,
        "CLIP": how.clip is not None,
        "FORM": (_NIBBLES if packed else _BYTES if isinstance(how.number, Int) else _E4M3).value,
        "FUSED": device.type == "cuda",
        "NEXT": device.type == "cuda" and available(device.index),
    }
