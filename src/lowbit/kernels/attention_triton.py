"""The Triton kernel of `attention.py`, whose `reference` is its definition.

A program takes some blocks of a head's positions, one after the other, so that there are as many programs as a GPU has
room for; the last one of a head that finishes adds up what all of them found, in their order.

Shape letters: B texts, H heads in groups of G that share keys and values, L positions, S splits of them, h head width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .compile import arrived

PROGRAMS = 264
"""Programs to keep a GPU busy: two for each processor."""
BLOCK = 64
"""Positions that a program holds at once."""


@triton.jit
def combine(
    sums_at, sizes_at, out_at, shared, active, SPLITS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr,
    h: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Outputs [G, h] of one group of heads from the sums, largest scores and totals of its `active` splits."""
    g, d = tl.arange(0, ROWS), tl.arange(0, h)
    split = tl.arange(0, SPAN)
    mine = (shared * SPLITS + split[:, None]) * G + g[None, :]
    there = (split < active)[:, None] & (g < G)[None, :]
    size = tl.load(sizes_at + 2 * mine, mask=there, other=-1e30, cache_modifier=".cg")
    top = tl.max(size, 0)
    total = tl.sum(tl.load(sizes_at + 2 * mine + 1, mask=there, other=0.0, cache_modifier=".cg")
                   * tl.exp2(size - top[None, :]), 0)  # fmt: skip
    y = tl.zeros((ROWS, h), tl.float32)
    for chunk in tl.static_range((SPLITS + CHUNK - 1) // CHUNK):
        some = chunk * CHUNK + tl.arange(0, CHUNK)
        at = (shared * SPLITS + some[:, None]) * G + g[None, :]
        real = (some < active)[:, None] & (g < G)[None, :]
        size = tl.load(sizes_at + 2 * at, mask=real, other=-1e30, cache_modifier=".cg")
        weight = tl.where(real, tl.exp2(size - top[None, :]), 0.0)
        place = at[:, :, None] * h + d[None, None, :]
        y += tl.sum(tl.load(sums_at + place, mask=real[:, :, None], other=0.0, cache_modifier=".cg")
                    * weight[:, :, None], 0)  # fmt: skip
    y = y / tl.where(g < G, total, 1.0)[:, None]
    place = (shared * G + g)[:, None] * h + d[None, :]
    tl.store(out_at + place, y.to(out_at.dtype.element_ty), mask=(g < G)[:, None])


@triton.jit
def _attend(
    q_at, k_at, v_at, mask_at, out_at, sums_at, sizes_at, arrived_at, L, scale, per, of_text, of_head, of_position,
    of_mask, HEADS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, FEW: tl.constexpr, h: tl.constexpr,
    BLOCK: tl.constexpr, SPLITS: tl.constexpr, SPAN: tl.constexpr, CHUNK: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    shared, split = tl.program_id(0), tl.program_id(1)
    text, head = shared // HEADS, shared % HEADS
    g, d = tl.arange(0, ROWS), tl.arange(0, h)
    first = text.to(tl.int64) * of_text + head.to(tl.int64) * of_head
    row, inside = shared * G + g, (g < G)[:, None]
    q = tl.load(q_at + row[:, None] * h + d[None, :], mask=inside, other=0.0)
    largest = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, h), tl.float32)
    for block in range(split * per, tl.minimum((split + 1) * per, (L + BLOCK - 1) // BLOCK)):
        position = block * BLOCK + tl.arange(0, BLOCK)
        place = first + position[:, None].to(tl.int64) * of_position + d[None, :]
        there = position < L
        k = tl.load(k_at + place, mask=there[:, None], other=0.0)
        v = tl.load(v_at + place, mask=there[:, None], other=0.0)
        if MASK:
            there = there & (tl.load(mask_at + text * of_mask + position, mask=there, other=0) != 0)
        score = tl.where(there[None, :], tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))
        top = tl.maximum(largest, tl.max(score, 1))
        before = tl.exp2(largest - top)
        share = tl.exp2(score - top[:, None])
        total = total * before + tl.sum(share, 1)
        y = tl.dot(share.to(v.dtype), v, y * before[:, None])
        largest = top
    mine = (shared * SPLITS + split) * G + g
    tl.store(sums_at + mine[:, None] * h + d[None, :], y, mask=inside)
    tl.store(sizes_at + 2 * mine, largest, mask=g < G)
    tl.store(sizes_at + 2 * mine + 1, total, mask=g < G)
    tl.debug_barrier()
    if tl.atomic_add(arrived_at + shared, 1) == SPLITS - 1:
        tl.debug_barrier()
        combine(sums_at, sizes_at, out_at, shared, SPLITS, SPLITS, G, FEW, h, SPAN, CHUNK)
        tl.store(arrived_at + shared, 0)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `attention.attend`."""
    query = query.contiguous()
    (texts, heads, length, width), group = keys.shape, query.shape[1] // keys.shape[1]
    out, shared, few = torch.empty_like(query), texts * heads, triton.next_power_of_2(group)
    blocks = triton.cdiv(length, BLOCK)
    per = triton.cdiv(blocks, max(1, PROGRAMS // shared))
    splits = triton.cdiv(blocks, per)
    sums = torch.empty(shared * splits * group, width, device=query.device)
    sizes = torch.empty(shared * splits * group, 2, device=query.device)
    mask = None if mask is None else mask.contiguous()
    _attend[(shared, splits)](
        query, keys, values, out if mask is None else mask.view(torch.uint8), out, sums, sizes,
        arrived(query.device, shared), length, scale, per, *keys.stride()[:3],
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        HEADS=heads, G=group, ROWS=max(16, few), FEW=few, h=width, BLOCK=BLOCK, SPLITS=splits,
        SPAN=triton.next_power_of_2(splits), CHUNK=max(1, 4096 // (few * width)), MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    return out
