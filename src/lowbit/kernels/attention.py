"""Attention of one new token to a cache, for decoding: keys and values are read once, by all heads that share them.

The library's kernels want keys and values repeated for every head of a group, in memory; for a token that copy costs
more than attention itself. Here a program takes some of a head's positions for the whole group, and the last one to
finish puts the parts together, always in the same order. It is written in CUDA C++ for a Hopper, by the way of codes
(`cache_attention.cu`), and in Triton for others.

Shape letters: B texts, H heads, K key-value heads, L positions, h head width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_WIDTHS = (64, 128, 256)


def attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Queries [B, H, 1, h] over keys and values [B, K, L, h]: [B, H, 1, h].

    `mask` bool [B or 1, 1, 1, L] says which positions there are; every text has at least one.
    """
    if not fits(query, keys, values, mask):
        return reference(query, keys, values, mask, scale)
    return torch.ops.lowbit.attend(query, keys, values, mask, scale)


def fits(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels take these tensors."""
    shaped = query.shape[2] == 1 and query.shape[3] in _WIDTHS and keys.shape == values.shape
    dense = keys.stride() == values.stride() and keys.stride(3) == 1
    known = mask is None or (mask.dtype == torch.bool and mask.shape[1:3] == (1, 1))
    return query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and shaped and dense and known


def reference(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The definition of `attend`."""
    return F.scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=True)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    from . import attention_triton, cache_attention_cuda

    fits = cache_attention_cuda.plain_refusal(query, keys, values) is None
    fused = cache_attention_cuda.attend_plain if fits else attention_triton.attend
    return fused(query, keys, values, mask, scale)


def _shape(query: Tensor, _keys: Tensor, _values: Tensor, _mask: Tensor | None, _scale: float) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define("attend(Tensor query, Tensor keys, Tensor values, Tensor? mask, float scale) -> Tensor")
_LIBRARY.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::attend", _shape, lib=_LIBRARY)
