"""The Triton kernel of `cache_append.py`, whose `reference` is its definition.

Quotients are rounded as IEEE asks and no product is fused with a sum, so that codes and scales are those of
`numerics.kv` to the last bit. A window that is not full is left by a branch, which costs a step nothing.

Shape letters: K key-value heads, h head width, U units of a token, P codes to a byte, G group.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_places import strides


@triton.jit
def _round(x):
    """To the nearest whole number, ties to even; |x| < 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _half(x):
    """fp32 with the values of fp16."""
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16).to(tl.float32)


@triton.jit
def _fit(low, high, clip_at, CLIP: tl.constexpr, RULE: tl.constexpr, BITS: tl.constexpr):
    """Scale, offset, and the offset as it is stored, for units with these ranges."""
    steps = (1 << BITS) - 1.0
    if CLIP:
        low = tl.minimum(low, 0.0) * tl.load(clip_at).to(tl.float32)
        high = tl.maximum(high, 0.0) * tl.load(clip_at + 1).to(tl.float32)
    if RULE == 2:
        high = tl.maximum(tl.abs(low), tl.abs(high))
        low = -high
    if RULE == 1:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    scale = _half(tl.div_rn(high - low, tl.full(low.shape, steps, tl.float32)))
    scale = tl.where(scale > 0, scale, 1.0)
    if RULE == 0:
        low = _half(low)
        stored = low
    elif RULE == 1:
        stored = _round(tl.minimum(tl.maximum(tl.div_rn(-low, scale), 0.0), steps))
        low = -stored * scale
    else:
        low = scale * -(1 << (BITS - 1))
        stored = low
    return scale, low, stored


@triton.jit
def _codes(x, scale, low, BITS: tl.constexpr):
    """Codes of values, as bytes that hold one each."""
    level = tl.div_rn(x - low, scale + tl.zeros_like(x))
    return _round(tl.minimum(tl.maximum(level, 0.0), (1 << BITS) - 1.0)).to(tl.int32)


@triton.jit
def _pack(codes, N: tl.constexpr, BITS: tl.constexpr):
    """N codes in a row, as bytes [N / P]."""
    P: tl.constexpr = 8 // BITS
    shift = BITS * tl.arange(0, P)
    return tl.sum(tl.reshape(codes, (N // P, P)) << shift[None, :], 1).to(tl.uint8)


@triton.jit
def _token(
    x_at, code_at, scale_at, offset_at, clip_at, CLIP: tl.constexpr, BITS: tl.constexpr, UNIT: tl.constexpr,
    RULE: tl.constexpr, h: tl.constexpr,
):  # fmt: skip
    """Encode one token [h] in units of UNIT channels."""
    u = tl.arange(0, h // UNIT)
    x = tl.load(x_at + u[:, None] * UNIT + tl.arange(0, UNIT)[None, :]).to(tl.float32)
    scale, low, stored = _fit(tl.min(x, 1), tl.max(x, 1), clip_at, CLIP, RULE, BITS)
    code = _codes(x, scale[:, None], low[:, None], BITS)
    tl.store(code_at + tl.arange(0, h * BITS // 8), _pack(code, h, BITS))
    tl.store(scale_at + u, scale.to(tl.float16))
    if RULE != 2:
        tl.store(offset_at + u, stored.to(offset_at.dtype.element_ty))


@triton.jit
def _group(
    x_at, code_at, scale_at, offset_at, clip_at, CLIP: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr,
    RULE: tl.constexpr, h: tl.constexpr,
):  # fmt: skip
    """Encode G tokens [G, h] channel by channel."""
    d = tl.arange(0, h)
    x = tl.load(x_at + tl.arange(0, G)[:, None] * h + d[None, :]).to(tl.float32)
    scale, low, stored = _fit(tl.min(x, 0), tl.max(x, 0), clip_at, CLIP, RULE, BITS)
    code = _codes(x, scale[None, :], low[None, :], BITS)
    tl.store(code_at + tl.arange(0, G * h * BITS // 8), _pack(code, G * h, BITS))
    tl.store(scale_at + d, scale.to(tl.float16))
    if RULE != 2:
        tl.store(offset_at + d, stored.to(offset_at.dtype.element_ty))


@triton.jit
def _side(
    x_at, codes_at, scale_at, offset_at, exact_at, clip_at, text, head, shared, place, prompt, of_codes, of_text,
    of_head, of_token, s_text, s_head, h: tl.constexpr, CLIP: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, RULE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Token `place` of keys or values of one head."""
    UNIT: tl.constexpr = h if KIND == 0 else GROUP
    BYTES: tl.constexpr = h * BITS // 8
    x_at += text * of_text + head * of_head
    codes_at += shared * of_codes * BYTES
    scale_at += text * s_text + head * s_head
    offset_at += text * s_text + head * s_head
    if WINDOW == 0:
        _token(x_at, codes_at + place * BYTES, scale_at + place * of_token, offset_at + place * of_token, clip_at, CLIP,
               BITS, UNIT, RULE, h)  # fmt: skip
    else:
        SLOTS: tl.constexpr = WINDOW if KIND == 2 else WINDOW + 1
        exact_at += shared * (SLOTS * h)
        old, slot = place - SLOTS, place % SLOTS
        if KIND == 2:
            if (slot == 0) & (place > prompt):
                for group in range(WINDOW // GROUP):
                    unit = old // GROUP + group
                    _group(exact_at + group * (GROUP * h), codes_at + unit * (GROUP * BYTES),
                           scale_at + unit * of_token, offset_at + unit * of_token, clip_at, CLIP, BITS, GROUP, RULE,
                           h)  # fmt: skip
        else:
            if (old >= 0) & (place > prompt):
                _token(exact_at + slot * h, codes_at + old * BYTES, scale_at + old * of_token,
                       offset_at + old * of_token, clip_at, CLIP, BITS, UNIT, RULE, h)  # fmt: skip
        tl.debug_barrier()
        d = tl.arange(0, h)
        tl.store(exact_at + slot * h + d, tl.load(x_at + d))


@triton.jit
def _append(
    xk_at, xv_at, k_at, ks_at, ko_at, kx_at, v_at, vs_at, vo_at, vx_at, length_at, prompt_at, clip_at, of_codes,
    xk_text, xk_head, xv_text, xv_head, ks_text, ks_head, ks_token, vs_text, vs_head, vs_token, HEADS: tl.constexpr,
    h: tl.constexpr, CLIP: tl.constexpr, WINDOW: tl.constexpr, KB: tl.constexpr, KK: tl.constexpr, KG: tl.constexpr,
    KR: tl.constexpr, VB: tl.constexpr, VK: tl.constexpr, VG: tl.constexpr, VR: tl.constexpr,
):  # fmt: skip
    shared = tl.program_id(0).to(tl.int64)
    text, head = shared // HEADS, shared % HEADS
    place, prompt = tl.load(length_at).to(tl.int64), tl.load(prompt_at).to(tl.int64)
    if tl.program_id(1) == 0:
        _side(xk_at, k_at, ks_at, ko_at, kx_at, clip_at, text, head, shared, place, prompt, of_codes, xk_text, xk_head,
              ks_token, ks_text, ks_head, h, CLIP, KB, KK, KG, KR, WINDOW)  # fmt: skip
    else:
        _side(xv_at, v_at, vs_at, vo_at, vx_at, clip_at + 2, text, head, shared, place, prompt, of_codes, xv_text,
              xv_head, vs_token, vs_text, vs_head, h, CLIP, VB, VK, VG, VR, WINDOW)  # fmt: skip


def append(
    new_keys: Tensor, new_values: Tensor, keys: list[Tensor], values: list[Tensor], length: Tensor, prompt: Tensor,
    clips: Tensor | None, key_format: list[int], value_format: list[int],
) -> None:  # fmt: skip
    """See `cache_append.append`."""
    texts, heads, _, width = new_keys.shape
    new_keys, new_values = (x if x.stride(3) == 1 else x.contiguous() for x in (new_keys, new_values))
    clips = None if clips is None else clips.contiguous()
    _append[(texts * heads, 2)](
        new_keys, new_values, *keys, *values, length, prompt, keys[1] if clips is None else clips, keys[0].shape[2],
        *new_keys.stride()[:2], *new_values.stride()[:2], *strides(keys[1]), *strides(values[1]), HEADS=heads,
        h=width, CLIP=clips is not None, WINDOW=key_format[4], KB=key_format[0], KK=key_format[1], KG=key_format[2],
        KR=key_format[3], VB=value_format[0], VK=value_format[1], VG=value_format[2], VR=value_format[3],
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
