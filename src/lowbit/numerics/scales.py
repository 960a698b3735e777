"""How scales are rounded and stored: what is rounded with a scale is rounded with the number in the file.

Some formats store a scale relative to an *outer* one: NVFP4's tensor scale, the row maximum of ZeroQuant-FP's M2, the
constants of double quantization, what DGQ's integers multiply. The outer is fixed from the full range of the whole
tensor (or row) before the first scale is stored, so that neither searching a unit's range nor fitting one group on the
way can move the others. What everybody computes with is the effective fp32 scale; the stored code is recovered from it
and the outer exactly, so no second copy of it is carried around.

Powers of two are made and read through the bits of fp32: logarithms err next to them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .spec import Float, Int, Number, ScaleDtype, Spec

HALF_LARGEST = 65280.0
"""The largest bf16 value below fp16's largest."""
HALF_SMALLEST = 2.0**-24
"""fp16's smallest positive value."""

M2_LARGEST = 8
"""v·2⁻ⁿ is an E4M3 number for every E2M1 value v up to this n: scales stay within 2⁻⁸ of their row's."""
DOUBLE_BLOCK = 256
"""Units that share a step in double quantization."""
INT8_LARGEST = 127
"""What a level times its unit's integer scale may reach."""

_PLAIN = {"half": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_PLAIN["float16-min"] = torch.float16
_MANTISSA = 23


def store_scale(scale: Tensor, dtype: ScaleDtype) -> Tensor:
    """Round positive fp32 scales to what a plain dtype holds; the result is fp32 again, exact in that dtype."""
    if dtype == "float32":
        return scale
    if dtype == "half":
        return scale.clamp(HALF_SMALLEST, HALF_LARGEST).bfloat16().half().float().clamp_min(HALF_SMALLEST)
    kind = _PLAIN[dtype]
    return scale.clamp(torch.finfo(kind).tiny, torch.finfo(kind).max).to(kind).float()


def symmetric_scale(amax: Tensor, levels: float, spec: Spec, outer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(scales, outer) of units [..., R/r, C/c] of largest magnitude `amax`, which is `levels` scales.

    `outer` None fixes it here: `amax` is then the full range of the whole tensor. A unit without range, or with one too
    small for an fp32 scale, gets a scale all the same: zeros come back as zeros, never NaN.
    """
    if spec.scale.startswith("e8m0"):
        return _shared_exponent(amax, levels, spec), None
    return stored_scale(divided(amax, levels), spec, outer)


def stored_scale(scale: Tensor, spec: Spec, outer: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """(scales, outer) as they can be stored for ideal ones [..., R/r, C/c]; see `symmetric_scale`."""
    if not spec.relative:
        return store_scale(torch.where(scale > 0, scale, 1.0), spec.scale), None
    outer = _outer(scale, spec) if outer is None else outer
    return relative_scale(scale, spec.scale, outer), outer


def divided(x: Tensor, number: float) -> Tensor:
    """x / number, correctly rounded everywhere: CUDA divides by a plain number through its reciprocal."""
    return x / torch.full_like(x, number)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^e in fp32 for int32 exponents from -127, which is subnormal, to 127."""
    return torch.where(exponent < -126, 2.0**-127, ((exponent + 127) << _MANTISSA).view(torch.float32))


def largest_exponent(number: Number) -> int:
    """⌊log2⌋ of the largest level: OCP's emax, for integers counted in steps (MXINT8's 6 is its implied 2⁻⁶)."""
    return number.bits - 2 if isinstance(number, Int) else math.frexp(number.largest)[1] - 1


def _shared_exponent(amax: Tensor, levels: float, spec: Spec) -> Tensor:
    """OCP MX's shared scales; beyond E8M0's range they saturate."""
    carry, below, source = 0, largest_exponent(spec.number), amax
    if spec.scale == "e8m0-even":
        mantissa = spec.number.mantissa if isinstance(spec.number, Float) else spec.bits - 2
        carry = 1 << (_MANTISSA - 1 - mantissa)
    elif spec.scale == "e8m0-rceil":
        below, source = 0, divided(amax, levels)
    exponent = ((source.view(torch.int32) + carry) >> _MANTISSA) - 127
    if spec.scale in ("e8m0-ceil", "e8m0-rceil"):
        exponent += power_of_two(exponent) < source
    return power_of_two((exponent - below).clamp(-127, 127))


# --- scales relative to others ----------------------------------------------------------------------------------------


def _outer(scale: Tensor, spec: Spec) -> Tensor:
    """What scales are stored relative to, fp32: [1, 1] or [R/r, 1], and [1, 1 + B] for double quantization.

    A format that is dynamic has one per token, so that what becomes of a token does not depend on its neighbours.
    """
    if spec.scale == "double":
        return _double_outer(scale)
    if spec.scale == "integer":  # the largest unit keeps all levels if they lie around zero
        return integer_outer(divided(scale.amax(-1, keepdim=True), max(1, INT8_LARGEST >> (spec.bits - 1))))
    if spec.scale == "e4m3":
        largest = scale.amax(-1, keepdim=True) if spec.dynamic else scale.amax((-2, -1), keepdim=True)
        outer = divided(largest, torch.finfo(torch.float8_e4m3fn).max)
    else:
        outer = scale.amax(-1, keepdim=True)
    outer = torch.where(outer > 0, outer, 1.0).clamp_min(2.0**-112)  # what is made of it must be normal
    if spec.scale == "e4m3":  # files hold its inverse, so it is the inverse of a number that fp32 has
        outer = outer.reciprocal().reciprocal()
    return outer


def integer_outer(outer: Tensor) -> Tensor:
    """Scales of rows under integer ones, as they are stored: in eight significant bits, so that products are exact."""
    return torch.where(outer > 0, outer, 1.0).clamp_min(2.0**-112).bfloat16().float()


def _double_outer(scale: Tensor) -> Tensor:
    """The mean scale, then the step of every 256 units in row-major order."""
    assert scale.dim() == 2, "double quantization is for weights"
    mean = scale.mean()
    distance = (scale - mean).abs().flatten()
    blocks = torch.nn.functional.pad(distance, (0, -len(distance) % DOUBLE_BLOCK)).reshape(-1, DOUBLE_BLOCK)
    step = blocks.amax(-1)
    step = divided(torch.where(step > 0, step, mean), 127)
    return torch.cat([mean[None], torch.where(step > 0, step, 1.0)])[None]


def _double(outer: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """(mean, step of every unit)."""
    steps = outer[0, 1:].repeat_interleave(DOUBLE_BLOCK)[: shape.numel()]
    return outer[0, 0], steps.reshape(shape)


def relative_scale(scale: Tensor, dtype: ScaleDtype, outer: Tensor) -> Tensor:
    """The effective scales of what can be stored for `scale` [R/r, C/c] relative to a fixed outer."""
    return scale_values(scale_codes(scale, dtype, outer), dtype, outer)


def scale_codes(scale: Tensor, dtype: ScaleDtype, outer: Tensor | None) -> Tensor:
    """Scales as files hold them: floats, E8M0 or M2's n as uint8, NVFP4's as E4M3, double quantization's as int8,
    DGQ's integers as uint8.

    For scales that went through here before this is exact, so `scale_values` is its inverse.
    """
    if dtype in _PLAIN:
        return scale.to(_PLAIN[dtype])
    if dtype.startswith("e8m0"):
        return (scale.view(torch.int32) >> _MANTISSA).to(torch.uint8)
    assert outer is not None, f"{dtype} scales have an outer scale"
    if dtype == "e4m3":
        return (scale / outer).clamp(2.0**-6, 448.0).to(torch.float8_e4m3fn)
    if dtype == "integer":
        return (scale / outer).round().clamp(1, INT8_LARGEST).to(torch.uint8)
    if dtype == "double":
        mean, step = _double(outer, scale.shape)
        least = (0.5 - mean / step).ceil().clamp_min(-127)  # scales are positive
        return ((scale - mean) / step).round().clamp_max(127).maximum(least).to(torch.int8)
    ours, theirs = scale.view(torch.int32), outer.view(torch.int32)
    n = -((ours - theirs) >> _MANTISSA) if dtype == "m2-ceil" else (theirs - ours) >> _MANTISSA
    return n.clamp(0, M2_LARGEST).to(torch.uint8)


def scale_values(codes: Tensor, dtype: ScaleDtype, outer: Tensor | None) -> Tensor:
    """Effective fp32 scales of what a file holds."""
    if dtype in _PLAIN:
        return codes.float()
    if dtype.startswith("e8m0"):
        return power_of_two(codes.to(torch.int32) - 127)
    assert outer is not None, f"{dtype} scales have an outer scale"
    if dtype in ("e4m3", "integer"):
        return codes.float() * outer
    if dtype == "double":
        mean, step = _double(outer, codes.shape)
        return mean + codes.float() * step
    return outer * power_of_two(-codes.to(torch.int32))


def scale_bytes(rows: int, columns: int, dtype: ScaleDtype) -> int:
    """Bytes of the scales of rows x columns units and of their outer."""
    units = rows * columns
    outer = {"e4m3": 1, "m2": rows, "m2-ceil": rows, "integer": rows, "double": 1 + -(-units // DOUBLE_BLOCK)}
    return units * (_PLAIN[dtype].itemsize if dtype in _PLAIN else 1) + 4 * outer.get(dtype, 0)


def narrowest(scale: Tensor) -> ScaleDtype:
    """The plain dtype of fewest bits that holds these scales exactly, "half" first: what scales read from files are."""
    kinds: tuple[ScaleDtype, ...] = ("half", "float16", "bfloat16")
    found = (kind for kind in kinds if not scale.is_meta and torch.equal(store_scale(scale, kind), scale))
    return next(found, "float32")
