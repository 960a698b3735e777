"""Codes of any width from 1 to 8 bits, packed without gaps.

The last axis is one little-endian bit stream: code i fills bits [i*b, (i+1)*b), so at 4 bits the even index is the low
nibble and at 8 bits packing is the identity. Eight codes always make b whole bytes, which is the only unit of work:
a 64-bit word gathers eight codes and its low b bytes are the result. Rows are padded with zero codes to a multiple of
eight (8-bit codes need no padding); `unpack` needs the length to drop them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS = 1 << 18
"""Words worked on at once: the 64-bit intermediates stay within a few MB whatever the tensor's size."""


def packed_length(length: int, bits: int) -> int:
    """Bytes that `length` codes of `bits` bits occupy."""
    return length if bits == 8 else -(-length // 8) * bits


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack integer codes [..., n] into bytes [..., ceil(n/8)*bits]; negative codes become two's complement."""
    assert 1 <= bits <= 8
    if bits == 8:
        return codes.contiguous().view(torch.uint8)
    length = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -length % 8)) if length % 8 else codes
    groups = padded.reshape(-1, 8)
    shift = torch.arange(8, device=codes.device) * bits
    byte = torch.arange(bits, device=codes.device) * 8
    packed = torch.empty(len(groups), bits, dtype=torch.uint8, device=codes.device)
    for start in range(0, len(groups), _ROWS):
        words = ((groups[start : start + _ROWS].long() & ((1 << bits) - 1)) << shift).sum(-1, keepdim=True)
        packed[start : start + _ROWS] = ((words >> byte) & 255).to(torch.uint8)
    return packed.reshape(*codes.shape[:-1], packed_length(length, bits))


def to_words(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes [..., n] as int32 [..., W], W = ceil(n bits/32): one little-endian bit stream per row.

    A width that does not divide 32 lets codes straddle words: 32 codes of 3 bits make exactly three of them.
    """
    words = -(-codes.shape[-1] * bits // 32)
    packed = pack(codes.contiguous(), bits)
    filled = torch.nn.functional.pad(packed, (0, 4 * words - packed.shape[-1]))
    # a lone row may have any stride, which its bytes cannot be viewed through
    return filled.reshape(-1).view(torch.int32).reshape(*codes.shape[:-1], words)


def from_words(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of `to_words`: uint8 [..., length]."""
    packed = words.reshape(-1).view(torch.uint8).reshape(*words.shape[:-1], 4 * words.shape[-1])
    size = packed_length(length, bits)
    return unpack(torch.nn.functional.pad(packed, (0, size - packed.shape[-1])), bits, length, signed=False)


def unpack(packed: Tensor, bits: int, length: int, *, signed: bool) -> Tensor:
    """The inverse of `pack`: codes [..., length], int8 when signed, else uint8."""
    dtype = torch.int8 if signed else torch.uint8
    if bits == 8:
        return packed.contiguous().view(dtype)
    groups = packed.reshape(-1, bits)
    shift = torch.arange(8, device=packed.device) * bits
    byte = torch.arange(bits, device=packed.device) * 8
    codes = torch.empty(len(groups), 8, dtype=dtype, device=packed.device)
    for start in range(0, len(groups), _ROWS):
        words = (groups[start : start + _ROWS].long() << byte).sum(-1, keepdim=True)
        values = (words >> shift) & ((1 << bits) - 1)
        if signed:
            values -= (values >> (bits - 1)) << bits
        codes[start : start + _ROWS] = values.to(dtype)
    return codes.reshape(*packed.shape[:-1], -1)[..., :length]
