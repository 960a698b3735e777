"""The Triton kernel of `cache_attention.py`, whose `reference` is its definition.

Queries are multiplied with planes of keys (`cache_codes_triton`), probabilities with planes of values, in fp16 with
fp32 sums; queries in bf16 are brought into fp16's range by a power of two, which is exact.

The number of positions is on the device: the splits share what is there, and the last one of a head that finishes adds
all of them up in their order. So a step's sums depend on its length and on nothing else.

Shape letters: B texts, H heads in groups of G that share keys and values, L positions, S splits of them, h head width,
P planes, W = h/P.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_places import strides
from .attention_triton import combine
from .cache_codes_triton import bytes_of, plane, ring, unpack
from .compile import arrived


class Plan(NamedTuple):
    """How work is shared: positions that a program holds at once, programs, warps of each."""

    block: int
    programs: int
    warps: int


PLAN = Plan(64, 396, 4)
"""Three programs for each processor of an H100, by registers."""


@triton.jit
def _rows(at, row, inside, PLANE: tl.constexpr, P: tl.constexpr, W: tl.constexpr):
    """One plane [ROWS, W] of the queries; planes that are not there repeat others."""
    place = row[:, None] * (W * P) + PLANE % P + P * tl.arange(0, W)[None, :]
    return tl.load(at + place, mask=inside[:, None], other=0.0)


@triton.jit
def _size(q):
    """The largest magnitude of every row."""
    return tl.max(tl.abs(q.to(tl.float32)), 1)


@triton.jit
def _moved(q, power):
    """Rows in fp16: exact, but for what is 2^-24 of its row's largest or less."""
    return (q.to(tl.float32) * power[:, None]).to(tl.float16)


@triton.jit
def _queries(at, row, inside, P: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    """The planes of the queries in fp16, and what their products are to be multiplied with: rows in bf16 are brought to
    a size between 16 and 32 by a power of two.
    """
    q0, q1 = _rows(at, row, inside, 0, P, W), _rows(at, row, inside, 1, P, W)
    q2, q3 = _rows(at, row, inside, 2, P, W), _rows(at, row, inside, 3, P, W)
    unit = tl.full((ROWS,), 1.0, tl.float32)
    if at.dtype.element_ty == tl.bfloat16:
        size = tl.maximum(tl.maximum(_size(q0), _size(q1)), tl.maximum(_size(q2), _size(q3)))
        exponent = tl.maximum(size, 1e-30).to(tl.int32, bitcast=True) >> 23
        power = ((258 - exponent) << 23).to(tl.float32, bitcast=True)
        unit = ((exponent - 4) << 23).to(tl.float32, bitcast=True)
        q0, q1, q2, q3 = _moved(q0, power), _moved(q1, power), _moved(q2, power), _moved(q3, power)
    return q0, q1, q2, q3, unit


@triton.jit
def _scores(
    q0, q1, q2, q3, packed, scale_at, offset_at, of_token, first, coded, BITS: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, RULE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """Products [ROWS, BLOCK] of queries and keys in codes."""
    c0, c1, c2, c3 = unpack(packed, BITS, NATIVE)
    x = plane(c0, packed, scale_at, offset_at, of_token, first, coded, 0, BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)
    y = tl.dot(q0, tl.trans(x))
    if BITS < 8:
        x = plane(c1, packed, scale_at, offset_at, of_token, first, coded, 1, BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)
        y = tl.dot(q1, tl.trans(x), y)
    if BITS < 4:
        x = plane(c2, packed, scale_at, offset_at, of_token, first, coded, 2, BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)
        y = tl.dot(q2, tl.trans(x), y)
        x = plane(c3, packed, scale_at, offset_at, of_token, first, coded, 3, BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)
        y = tl.dot(q3, tl.trans(x), y)
    return y


@triton.jit
def _sum(
    y, share, level, packed, scale_at, offset_at, exact_at, of_token, first, coded, count, EXACT: tl.constexpr,
    SLOTS: tl.constexpr, PLANE: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    RULE: tl.constexpr, BLOCK: tl.constexpr, W: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """y [ROWS, W] and one plane of the values, weighed."""
    x = plane(level, packed, scale_at, offset_at, of_token, first, coded, PLANE, BITS, KIND, GROUP, RULE, BLOCK, W,
               NATIVE)  # fmt: skip
    if EXACT:
        newest = ring(exact_at, first, coded, count, SLOTS, PLANE, BLOCK, W, 8 // BITS)
        x = tl.where((first + tl.arange(0, BLOCK) < coded)[:, None], x, newest.to(tl.float16))
    return tl.dot(share, x, y)


@triton.jit
def _sums(
    y0, y1, y2, y3, share, packed, scale_at, offset_at, exact_at, of_token, first, coded, count, EXACT: tl.constexpr,
    SLOTS: tl.constexpr, BITS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, RULE: tl.constexpr,
    BLOCK: tl.constexpr, W: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """All planes' sums [ROWS, W], and the values of a block, weighed."""
    c0, c1, c2, c3 = unpack(packed, BITS, NATIVE)
    y0 = _sum(y0, share, c0, packed, scale_at, offset_at, exact_at, of_token, first, coded, count, EXACT, SLOTS, 0,
              BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)  # fmt: skip
    if BITS < 8:
        y1 = _sum(y1, share, c1, packed, scale_at, offset_at, exact_at, of_token, first, coded, count, EXACT, SLOTS, 1,
                  BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)  # fmt: skip
    if BITS < 4:
        y2 = _sum(y2, share, c2, packed, scale_at, offset_at, exact_at, of_token, first, coded, count, EXACT, SLOTS, 2,
                  BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)  # fmt: skip
        y3 = _sum(y3, share, c3, packed, scale_at, offset_at, exact_at, of_token, first, coded, count, EXACT, SLOTS, 3,
                  BITS, KIND, GROUP, RULE, BLOCK, W, NATIVE)  # fmt: skip
    return y0, y1, y2, y3


@triton.jit
def _share(y0, y1, y2, y3, factor):
    """All sums, times a factor for every row."""
    return y0 * factor[:, None], y1 * factor[:, None], y2 * factor[:, None], y3 * factor[:, None]


@triton.jit
def _publish(y0, y1, y2, y3, largest, total, sums_at, sizes_at, mine, inside, P: tl.constexpr, W: tl.constexpr):
    """Store what a split found."""
    at = sums_at + mine[:, None] * (W * P) + P * tl.arange(0, W)[None, :]
    tl.store(at, y0, mask=inside[:, None])
    if P > 1:
        tl.store(at + 1, y1, mask=inside[:, None])
    if P > 2:
        tl.store(at + 2, y2, mask=inside[:, None])
        tl.store(at + 3, y3, mask=inside[:, None])
    tl.store(sizes_at + 2 * mine, largest, mask=inside)
    tl.store(sizes_at + 2 * mine + 1, total, mask=inside)


@triton.jit
def _attend(
    q_at, turned_at, k_at, ks_at, ko_at, kx_at, v_at, vs_at, vo_at, vx_at, mask_at, out_at, sums_at, sizes_at,
    arrived_at, count_at, scale, of_codes, ks_text, ks_head, ks_token, vs_text, vs_head, vs_token, of_mask,
    HEADS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, h: tl.constexpr, BLOCK: tl.constexpr,
    SPLITS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, MASK: tl.constexpr, WINDOW: tl.constexpr,
    KB: tl.constexpr, KK: tl.constexpr, KG: tl.constexpr, KR: tl.constexpr, VB: tl.constexpr, VK: tl.constexpr,
    VG: tl.constexpr, VR: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    KW: tl.constexpr = h * KB // 8
    VW: tl.constexpr = h * VB // 8
    shared, split = tl.program_id(0), tl.program_id(1)
    count = tl.load(count_at).to(tl.int32)
    blocks = (count + BLOCK - 1) // BLOCK
    per = (blocks + SPLITS - 1) // SPLITS
    active = (blocks + per - 1) // per
    if split < active:
        text, head, wide = (shared // HEADS).to(tl.int64), (shared % HEADS).to(tl.int64), shared.to(tl.int64)
        g = tl.arange(0, ROWS)
        row, inside, mine = shared * G + g, g < G, (shared * SPLITS + split) * G + g
        k_of, v_of = text * ks_text + head * ks_head, text * vs_text + head * vs_head
        q0, q1, q2, q3, unit = _queries(turned_at, row, inside, 8 // KB, KW, ROWS)
        largest, total = tl.full((ROWS,), -1e30, tl.float32), tl.zeros((ROWS,), tl.float32)
        y0, y1 = tl.zeros((ROWS, VW), tl.float32), tl.zeros((ROWS, VW), tl.float32)
        y2, y3 = tl.zeros((ROWS, VW), tl.float32), tl.zeros((ROWS, VW), tl.float32)
        coded_k, coded_v = count, count
        if WINDOW:
            coded_k, coded_v = (count - 1) // WINDOW * WINDOW, tl.maximum(count - 1 - WINDOW, 0)
        only_codes = tl.minimum(coded_k, coded_v) // BLOCK
        for EXACT in tl.static_range(2 if WINDOW else 1):
            begin, end = split * per, tl.minimum((split + 1) * per, blocks)
            if WINDOW:
                if EXACT:
                    begin = tl.maximum(begin, only_codes)
                else:
                    end = tl.minimum(end, only_codes)
            for block in range(begin, end):
                first = block * BLOCK
                position = first + tl.arange(0, BLOCK)
                there = position < count
                if MASK:
                    there = there & (tl.load(mask_at + text * of_mask + position, mask=there, other=0) != 0)
                k = bytes_of(k_at + wide * of_codes * KW, first, coded_k, BLOCK, KW)
                v = bytes_of(v_at + wide * of_codes * VW, first, coded_v, BLOCK, VW)
                score = _scores(q0, q1, q2, q3, k, ks_at + k_of, ko_at + k_of, ks_token, first, coded_k, KB, KK, KG, KR,
                                BLOCK, KW, NATIVE) * unit[:, None]  # fmt: skip
                if EXACT:
                    newest = tl.dot(_rows(q_at, row, inside, 0, 1, h), tl.trans(
                        ring(kx_at + wide * (WINDOW * h), first, coded_k, count, WINDOW, 0, BLOCK, h, 1)))  # fmt: skip
                    score = tl.where((position < coded_k)[None, :], score, newest)
                score = tl.where(there[None, :], score * (scale * 1.4426950408889634), float("-inf"))
                top = tl.maximum(largest, tl.max(score, 1))
                before, share = tl.exp2(largest - top), tl.exp2(score - top[:, None])
                total, largest, share = total * before + tl.sum(share, 1), top, share.to(tl.float16)
                y0, y1, y2, y3 = _share(y0, y1, y2, y3, before)
                y0, y1, y2, y3 = _sums(
                    y0, y1, y2, y3, share, v, vs_at + v_of, vo_at + v_of, vx_at + wide * ((WINDOW + 1) * h), vs_token,
                    first, coded_v, count, EXACT, WINDOW + 1, VB, VK, VG, VR, BLOCK, VW, NATIVE,
                )  # fmt: skip
        _publish(y0, y1, y2, y3, largest, total, sums_at, sizes_at, mine, inside, 8 // VB, VW)
        tl.debug_barrier()
        if tl.atomic_add(arrived_at + shared, 1) == active - 1:
            tl.debug_barrier()
            combine(sums_at, sizes_at, out_at, shared, active, SPLITS, G, FEW, h, SPAN, CHUNK)
            tl.store(arrived_at + shared, 0)


def attend(
    query: Tensor, turned: Tensor, keys: list[Tensor], values: list[Tensor], count: Tensor, mask: Tensor | None,
    scale: float, key_format: list[int], value_format: list[int],
) -> Tensor:  # fmt: skip
    """See `cache_attention.attend`."""
    query, turned = query.contiguous(), turned.contiguous()
    (texts, heads, rows), width = keys[0].shape[:3], query.shape[-1]
    group, shared = query.shape[1] // heads, texts * heads
    out = torch.empty_like(query)
    few = triton.next_power_of_2(group)
    block = max(PLAN.block, *(form[2] for form in (key_format, value_format) if form[1] == 2), 0)
    splits = max(1, min(triton.cdiv(rows, block), PLAN.programs // shared))
    sums = torch.empty(shared * splits * group, width, device=query.device)
    sizes = torch.empty(shared * splits * group, 2, device=query.device)
    mask = None if mask is None else mask.contiguous()
    _attend[(shared, splits)](
        query, turned, *keys, *values, out if mask is None else mask.view(torch.uint8), out, sums, sizes,
        arrived(query.device, shared), count, scale, rows, *strides(keys[1]), *strides(values[1]),
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        HEADS=heads, G=group, ROWS=max(16, few), FEW=few, h=width, BLOCK=block, SPLITS=splits,
        SPAN=triton.next_power_of_2(splits), CHUNK=max(1, 4096 // (few * width)), MASK=mask is not None,
        WINDOW=key_format[4], KB=key_format[0], KK=key_format[1], KG=key_format[2], KR=key_format[3],
        VB=value_format[0], VK=value_format[1], VG=value_format[2], VR=value_format[3],
        NATIVE=query.is_cuda, num_warps=PLAN.warps,
    )  # fmt: skip
    return out
