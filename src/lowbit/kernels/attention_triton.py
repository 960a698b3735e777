"""The Triton kernel of `attention.py`, whose `reference` is its definition.

Shape letters: B texts, H heads in groups of G that share keys and values, L positions, S parts of them, h head width.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

PART = 64
"""Positions of a program."""


@triton.jit
def _attend(
    q_at, k_at, v_at, mask_at, out_at, sums_at, sizes_at, arrived_at, L, scale, of_text, of_head, of_position,
    of_mask, HEADS: tl.constexpr, G: tl.constexpr, ROWS: tl.constexpr, h: tl.constexpr, PART: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    shared, part, parts = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    text, head = shared // HEADS, shared % HEADS
    g, d, position = tl.arange(0, ROWS), tl.arange(0, h), part * PART + tl.arange(0, PART)
    first = text.to(tl.int64) * of_text + head.to(tl.int64) * of_head
    place = first + position[:, None].to(tl.int64) * of_position + d[None, :]
    there = position < L
    k = tl.load(k_at + place, mask=there[:, None], other=0.0)
    v = tl.load(v_at + place, mask=there[:, None], other=0.0)
    row = shared * G + g
    q = tl.load(q_at + row[:, None] * h + d[None, :], mask=(g < G)[:, None], other=0.0)
    if MASK:
        there = there & (tl.load(mask_at + text * of_mask + position, mask=there, other=0) != 0)
    score = tl.where(there[None, :], tl.dot(q, tl.trans(k)) * (scale * 1.4426950408889634), float("-inf"))
    largest = tl.maximum(tl.max(score, 1), -1e30)
    share = tl.exp2(score - largest[:, None])
    total = tl.sum(share, 1)
    sums = tl.dot(share.to(v.dtype), v)
    mine = (shared * parts + part) * ROWS + g
    tl.store(sums_at + mine[:, None] * h + d[None, :], sums)
    tl.store(sizes_at + 2 * mine, largest)
    tl.store(sizes_at + 2 * mine + 1, total)
    tl.debug_barrier()
    if tl.atomic_add(arrived_at + shared, 1) == parts - 1:
        tl.debug_barrier()
        largest = tl.full((ROWS,), -1e30, tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        sums = tl.zeros((ROWS, h), tl.float32)
        for other in range(parts):
            theirs = (shared * parts + other) * ROWS + g
            size = tl.load(sizes_at + 2 * theirs, cache_modifier=".cg")
            top = tl.maximum(largest, size)
            ours, others = tl.exp2(largest - top), tl.exp2(size - top)
            added = tl.load(sums_at + theirs[:, None] * h + d[None, :], cache_modifier=".cg")
            sums = sums * ours[:, None] + added * others[:, None]
            total = total * ours + tl.load(sizes_at + 2 * theirs + 1, cache_modifier=".cg") * others
            largest = top
        y = sums / total[:, None]
        tl.store(out_at + row[:, None] * h + d[None, :], y.to(out_at.dtype.element_ty), mask=(g < G)[:, None])
        tl.store(arrived_at + shared, 0)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `attention.attend`."""
    query = query.contiguous()
    (texts, heads, length, width), group = keys.shape, query.shape[1] // keys.shape[1]
    out = torch.empty_like(query)
    rows, parts = max(16, triton.next_power_of_2(group)), triton.cdiv(length, PART)
    sums = torch.empty(texts * heads * parts * rows, width, device=query.device)
    sizes = torch.empty(texts * heads * parts * rows, 2, device=query.device)
    mask = None if mask is None else mask.contiguous()
    _attend[(texts * heads, parts)](
        query, keys, values, out if mask is None else mask.view(torch.uint8), out, sums, sizes,
        _arrived(query.device, texts * heads), length, scale, *keys.stride()[:3],
        0 if mask is None or len(mask) == 1 else mask.stride(0),
        HEADS=heads, G=group, ROWS=rows, h=width, PART=PART, MASK=mask is not None, num_warps=4,
    )  # fmt: skip
    return out


@cache
def _arrived(device: torch.device, count: int) -> Tensor:
    """How many parts of a head are done: zeros, between two calls of one stream. Made before anything is recorded."""
    return torch.zeros(count, dtype=torch.int32, device=device)
