"""Keys and values out of a cache that holds codes, in the registers of a Triton program.

A byte holds P codes of neighbouring channels, and unpacking them side by side would move every one of them between
threads. So a tile of bytes is taken apart into P planes, channels i, P + i, 2P + i, …: each is shifted out of the bytes
where they are.

How many instructions a code takes decides over speed, not memory. A code becomes the low bits of an fp16 number between
1024 and 2048, two at once by one instruction, and scale and offset are applied in fp16, to two at once as well: a
product and a sum that are rounded once, as in `numerics.kv` and its rounding to fp16. Triton's own operations would go
by way of fp32, one code after the other. Where kernels are interpreted (not `NATIVE`), they do.

Shape letters: h head width, P planes, W = h/P.
"""

from __future__ import annotations

import triton
import triton.language as tl

UNPACK_8 = tl.constexpr("""{
    .reg .b32 x;
    mov.b32 x, $2;
    prmt.b32 $0, x, 0x64646464, 0x4140;
    prmt.b32 $1, x, 0x64646464, 0x4342;
    }""")
UNPACK_4 = tl.constexpr("""{
    .reg .b32 w, x;
    mov.b32 x, $4;
    and.b32 w, x, 0x0f0f0f0f;
    prmt.b32 $0, w, 0x64646464, 0x4140;
    prmt.b32 $1, w, 0x64646464, 0x4342;
    shr.b32 w, x, 4;
    and.b32 w, w, 0x0f0f0f0f;
    prmt.b32 $2, w, 0x64646464, 0x4140;
    prmt.b32 $3, w, 0x64646464, 0x4342;
    }""")
UNPACK_2 = tl.constexpr("""{
    .reg .b32 w, x;
    mov.b32 x, $8;
    and.b32 w, x, 0x03030303;
    prmt.b32 $0, w, 0x64646464, 0x4140;
    prmt.b32 $1, w, 0x64646464, 0x4342;
    shr.b32 w, x, 2;
    and.b32 w, w, 0x03030303;
    prmt.b32 $2, w, 0x64646464, 0x4140;
    prmt.b32 $3, w, 0x64646464, 0x4342;
    shr.b32 w, x, 4;
    and.b32 w, w, 0x03030303;
    prmt.b32 $4, w, 0x64646464, 0x4140;
    prmt.b32 $5, w, 0x64646464, 0x4342;
    shr.b32 w, x, 6;
    and.b32 w, w, 0x03030303;
    prmt.b32 $6, w, 0x64646464, 0x4140;
    prmt.b32 $7, w, 0x64646464, 0x4342;
    }""")


@triton.jit
def unpack(packed, BITS: tl.constexpr, NATIVE: tl.constexpr):
    """1024 + code in fp16, exact, of each plane of a tile of bytes; planes that are not there repeat the first."""
    if BITS == 8:
        if NATIVE:
            p0 = tl.inline_asm_elementwise(UNPACK_8, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
        else:
            p0 = (packed.to(tl.int32) + 1024).to(tl.float16)
        p1, p2, p3 = p0, p0, p0
    elif BITS == 4:
        if NATIVE:
            p0, p1 = tl.inline_asm_elementwise(
                UNPACK_4, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
            )
        else:
            p0 = ((packed & 15).to(tl.int32) + 1024).to(tl.float16)
            p1 = ((packed >> 4).to(tl.int32) + 1024).to(tl.float16)
        p2, p3 = p0, p0
    else:
        if NATIVE:
            p0, p1, p2, p3 = tl.inline_asm_elementwise(
                UNPACK_2, "=r,=r,=r,=r,=r,=r,=r,=r,r", [packed],
                dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            p0 = ((packed & 3).to(tl.int32) + 1024).to(tl.float16)
            p1 = (((packed >> 2) & 3).to(tl.int32) + 1024).to(tl.float16)
            p2 = (((packed >> 4) & 3).to(tl.int32) + 1024).to(tl.float16)
            p3 = ((packed >> 6).to(tl.int32) + 1024).to(tl.float16)
    return p0, p1, p2, p3


@triton.jit
def _offset(offset_at, place, there, BITS: tl.constexpr, RULE: tl.constexpr):
    """What becomes of 1024 + code before or behind the scale, in fp16: see `_value`."""
    if RULE == 0:
        y = tl.load(offset_at + place, mask=there, other=0.0)
    elif RULE == 1:
        y = (tl.load(offset_at + place, mask=there, other=0).to(tl.int32) + 1024).to(tl.float16)
    else:
        y = tl.full(place.shape, 1024.0 + (1 << (BITS - 1)), tl.float16)
    return y


@triton.jit
def _value(level, scale, offset, RULE: tl.constexpr, NATIVE: tl.constexpr):
    """scale (level - 1024) + offset, or scale (level - offset), in fp16, rounded once."""
    if RULE == 0:
        if NATIVE:
            y = tl.inline_asm_elementwise(
                """{
                .reg .b32 t;
                mov.b32 t, 0x64006400;
                sub.rn.f16x2 t, $1, t;
                fma.rn.f16x2 $0, t, $2, $3;
                }""", "=r,r,r,r", [level, scale, offset], dtype=tl.float16, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            y = ((level.to(tl.float32) - 1024.0) * scale.to(tl.float32) + offset.to(tl.float32)).to(tl.float16)
    else:
        y = (level - offset) * scale
    return y


@triton.jit
def _pick(x, PLANE: tl.constexpr, P: tl.constexpr, UNITS: tl.constexpr, W: tl.constexpr):
    """One plane [UNITS, W] of [UNITS, h], without going through memory again."""
    y = x
    if P == 2:
        even, odd = tl.split(tl.reshape(x, (UNITS, W, 2)))
        y = even if PLANE == 0 else odd
    if P == 4:
        even, odd = tl.split(tl.reshape(x, (UNITS, W, 2, 2)))
        half = even if PLANE % 2 == 0 else odd
        low, high = tl.split(half)
        y = low if PLANE < 2 else high
    return y


@triton.jit
def plane(
    level, packed, scale_at, offset_at, of_token, first, coded, PLANE: tl.constexpr, BITS: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """Values [BLOCK, W] of one plane of the tokens from `first` on, in fp16; scales are those of this text and head."""
    P: tl.constexpr = 8 // BITS
    UNITS: tl.constexpr = BLOCK // GROUP if KIND == 2 else W * P // GROUP if KIND == 1 else 1
    here = (first // GROUP if KIND == 2 else first).to(tl.int64) * of_token
    scale_at += here
    offset_at += here
    if KIND == 2:
        unit = tl.arange(0, UNITS)
        place = unit[:, None] * of_token + tl.arange(0, W * P)[None, :]
        there = (unit * GROUP < coded - first)[:, None]
    elif KIND == 1:
        place = tl.arange(0, BLOCK)[:, None] * of_token + tl.arange(0, UNITS)[None, :]
        there = (tl.arange(0, BLOCK) < coded - first)[:, None]
    else:
        place = tl.arange(0, BLOCK) * of_token
        there = tl.arange(0, BLOCK) < coded - first
    scale = tl.load(scale_at + place, mask=there, other=0.0)
    offset = _offset(offset_at, place, there, BITS, RULE)
    if RULE == 3:
        y = packed.to(tl.float8e4nv, bitcast=True).to(tl.float16)
        level, offset = y, offset * 0.0
    if KIND == 2:
        scale = _pick(scale, PLANE, P, UNITS, W)[:, None, :]
        offset = _pick(offset, PLANE, P, UNITS, W)[:, None, :]
        y = tl.reshape(_value(tl.reshape(level, (UNITS, GROUP, W)), scale, offset, RULE, NATIVE), (BLOCK, W))
    elif KIND == 1:
        y = _value(tl.reshape(level, (BLOCK, UNITS, GROUP // P)), scale[:, :, None], offset[:, :, None], RULE, NATIVE)
        y = tl.reshape(y, (BLOCK, W))
    else:
        y = _value(level, scale[:, None], offset[:, None], RULE, NATIVE)
    return y


@triton.jit
def ring(
    exact_at, first, coded, count, SLOTS: tl.constexpr, PLANE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr,
    P: tl.constexpr,
):  # fmt: skip
    """One plane [BLOCK, W] of the tokens that are kept as they came; zeros for others."""
    position = first + tl.arange(0, BLOCK)
    place = (position % SLOTS)[:, None] * (W * P) + PLANE + P * tl.arange(0, W)[None, :]
    return tl.load(exact_at + place, mask=((position >= coded) & (position < count))[:, None], other=0.0)


@triton.jit
def bytes_of(at, first, coded, BLOCK: tl.constexpr, W: tl.constexpr):
    """The bytes [BLOCK, W] of the codes of the tokens from `first` on; zeros for tokens that have none."""
    row = tl.arange(0, BLOCK)
    place = row[:, None] * W + tl.arange(0, W)[None, :]
    return tl.load(at + first.to(tl.int64) * W + place, mask=(row < coded - first)[:, None], other=0)
