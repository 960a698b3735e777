"""The host of `cache_attention.cu`: what it takes, how its work is shared out, and its start.

A kernel is compiled for a format, a head width, the queries to a group and a plan. How many codes there are is on the
device, so the grid is made for a full cache, and blocks that have nothing to do leave at once. Keys and values of 16
bits (`PLAIN`), of which all are there, go the same way: what makes it short is not how a number is unpacked.
"""

from __future__ import annotations

import struct
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_places import strides
from .compile import Constants, arrived, available, compiled, processors
from .weight_only import aligned

HEADS = 16
"""Most queries of a group."""
PLAIN = [16, 3, 0, 2, 0]
"""The format of numbers that are what they are."""
_CHANNEL, _ZERO_POINT = 2, 1
_VECTOR = 16
"""Bytes of four fp32 sums."""
_LONGEST = 2**31
"""Bytes within a head, and numbers from a text to the next, that no longer fit the kernel's integers."""
_FEW = 1024
"""Positions to a processor up to which a head's blocks meet sooner if they are small."""


class Plan(NamedTuple):
    """How work is shared: positions of a tile (16 or 32), warps of a block, blocks that a processor holds at once."""

    tile: int
    warps: int
    resident: int


def refusal(query: Tensor, keys: list[Tensor], key_format: list[int], value_format: list[int]) -> str | None:
    """Why tensors that the kernels for codes take are left to the one in Triton, None where they are not."""
    if not query.is_cuda or not available(query.device.index):
        return "the kernel is for Hopper"
    return format_refusal(query, keys, key_format, value_format)


def format_refusal(query: Tensor, keys: list[Tensor], key_format: list[int], value_format: list[int]) -> str | None:
    """The same for what does not depend on the device."""
    if query.shape[1] > HEADS * keys[0].shape[1]:
        return f"more than {HEADS} queries share a key"
    if value_format[1] == _CHANNEL or (key_format[1] == _CHANNEL and key_format[3] == _ZERO_POINT):
        return "values by channel and zero-points of channels are not unpacked"
    return None


def plain_refusal(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """Why keys and values of 16 bits, which `attention.fits` takes, are left to the kernel in Triton."""
    if not query.is_cuda or not available(query.device.index):
        return "the kernel is for Hopper"
    return shape_refusal(query, keys, values)


def shape_refusal(query: Tensor, keys: Tensor, values: Tensor) -> str | None:
    """The same for what does not depend on the device."""
    if query.shape[1] > HEADS * keys.shape[1]:
        return f"more than {HEADS} queries share a key"
    for side in (keys, values):
        if side.dtype != query.dtype:
            return "queries, keys and values are of one format"
        if side.data_ptr() % 16 or any(step % 8 for step in side.stride()[:3]):
            return "rows are read by 16 bytes"
        if 2 * side.shape[2] * side.stride(2) >= _LONGEST or max(side.stride()) >= _LONGEST:
            return "keys lie too far apart"
    return None


def plan(width: int, group: int, bits: int, share: float) -> Plan:
    """The plan for a head width, a number of queries, the wider side's bits and so many positions to a processor.

    What an H200 liked best of codes (`benchmarks/cache_attention.py --search`): those of 8 bits keep the memory busy,
    so as many warps as there is room for; fewer bits keep the warps busy, which do better on longer tiles. Numbers of
    16 bits want so many registers that warps are few.
    """
    if width > 128 or group > 8 or bits == 16:
        return Plan(16, 8, 1)
    if share <= _FEW:
        return Plan(32, 8, 1)
    return Plan(16, 16, 1) if bits == 8 else Plan(32, 12, 1)


def attend(
    query: Tensor, turned: Tensor, keys: list[Tensor], values: list[Tensor], count: Tensor, mask: Tensor | None,
    scale: float, key_format: list[int], value_format: list[int], how: Plan | None = None,
) -> Tensor:  # fmt: skip
    """See `cache_attention.attend`; under a plan of one's own if there is one."""
    steps = (*strides(keys[1]), *strides(values[1]))
    return _attend(query, turned, (keys, values), count, mask, scale, (key_format, value_format), steps, how)


def attend_plain(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float, how: Plan | None = None
) -> Tensor:
    """See `attention.attend`; under a plan of one's own if there is one."""
    none = [query.new_empty(0)] * 3
    steps = (*keys.stride()[:3], *values.stride()[:3])
    return _attend(
        query, query, ([keys, *none], [values, *none]), none[0], mask, scale, (PLAIN, PLAIN), steps, how
    )  # fmt: skip


def _attend(
    query: Tensor, turned: Tensor, sides: tuple[list[Tensor], list[Tensor]], count: Tensor, mask: Tensor | None,
    scale: float, formats: tuple[list[int], list[int]], steps: tuple[int, ...], how: Plan | None,
) -> Tensor:  # fmt: skip
    """Starts the kernel; `steps` lead from one text, head and token to the next, in keys and in values."""
    query, turned = aligned(query), aligned(turned)
    (texts, heads, rows), width = sides[0][0].shape[:3], query.shape[-1]
    group, shared, bits = query.shape[1] // heads, texts * heads, max(form[0] for form in formats)
    how = how or plan(width, group, bits, shared * rows / processors(query.device))
    window, bfloat = formats[0][4], int(query.dtype == torch.bfloat16)
    pairs = -(-group // 2)
    entries = width // 2 * pairs
    constants: Constants = (
        ("BFLOAT", bfloat if bits == 16 else 0), ("QUERY_BFLOAT", bfloat), ("WIDTH", width), ("HEADS", group),
        ("MASK", int(mask is not None)), ("WINDOW", window), *_named("K", formats[0]), *_named("V", formats[1]),
        ("TILE", how.tile), ("WARPS", how.warps), ("RESIDENT", how.resident),
    )  # fmt: skip
    room = _VECTOR * how.warps * (entries + pairs)
    kernel = compiled("cache_attention", constants, query.device.index, room)
    tiles = -(-rows // how.tile) + (window // 16 + 2 if window else 0)
    splits = _splits(shared, -(-tiles // how.warps), processors(query.device) * how.resident)
    out = torch.empty_like(query)
    parts = (torch.empty(shared * splits * many, 4, device=query.device) for many in (entries, pairs))
    mask = None if mask is None else mask.contiguous().view(torch.uint8)
    kernel(
        (shared, splits),
        32 * how.warps,
        [
            query, turned, *sides[0], *sides[1], out if mask is None else mask, out, *parts,
            arrived(query.device, shared), count, struct.unpack("i", struct.pack("f", scale))[0], heads, rows, *steps,
            0 if mask is None or len(mask) == 1 else mask.stride(0),
        ],
    )  # fmt: skip
    return out


def _named(side: str, form: list[int]) -> Constants:
    return tuple(zip((f"{side}B", f"{side}K", f"{side}G", f"{side}R"), form[:4], strict=True))


@cache
def _splits(shared: int, most: int, places: int) -> int:
    """Into how many blocks each head's positions go: as few as fill the places of a device in whole rounds, nearly."""

    def full(splits: int) -> float:
        rounds = shared * splits / places
        return rounds / -(-shared * splits // places)

    choices = range(1, max(1, min(most, max(places // shared, 4))) + 1)
    best = max(map(full, choices))
    return next(splits for splits in choices if full(splits) > best - 0.05)
