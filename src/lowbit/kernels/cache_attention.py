"""Attention of one new token to keys and values that are held as codes: codes are read, once for a group's heads.

A cache of a quantized model that is dequantized for every token costs more than one of 16 bits. Here codes are unpacked
in registers, in CUDA C++ on a Hopper (`cache_attention.cu`) and in Triton on other GPUs. Triton's kernel multiplies
every code by its scale, rounded to fp16, as the definition does for queries in fp16; in CUDA C++ the scale of a token
multiplies its score or its probability instead, and no value is rounded. What belongs to bf16 has three bits more than
the definition either way. Queries are brought into fp16's range by a power of two; stored scales are within it.

A cache is told apart by `Held`: codes of older tokens as `numerics.kv` packs them, and, for KIVI, a ring of the newest
tokens as they came. Where a key map P stands before the codes (QuaRot, FlatQuant), the kernel turns the query instead
of every key, q (k̂ P^-1)' = (q P^-T) k̂', which is the same up to the rounding of the turned query to 16 bits.

What the kernel does not take (`refusal` says why) is dequantized by torch and attended to by `attention.attend`.

Shape letters: B texts, H heads, K key-value heads, L positions, h head width, R window, S slots of the ring.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics.kv import Affine, Encoded, Quantizer, decode
from . import attention

WIDTHS = (64, 128, 256)
"""Head widths of the kernels."""
BITS = (2, 4, 8)
"""Widths of codes of which a byte holds a whole number."""
LAYOUTS = {"token": 0, "head": 0, "tensor": 0, "group": 1, "channel": 2}
"""How the kernels tell where a scale belongs: to a token, to a group of its channels, to a channel of some tokens."""
RULES = {"minimum": 0, "zero-point": 1, "symmetric": 2, "e4m3": 3}


@dataclass(eq=False)
class Held:
    """Keys or values of a cache of fixed length, all in place: codes of older tokens, and the newest as they came.

    `codes` [B, K, L or more, bytes] and `affine` are what `numerics.kv.encode` makes of so many tokens, or the ranges
    of a static layout. Token t is in slot t mod S of `exact` [B, K, S, h]. Without a quantizer S is L, and all are
    there; with one, `exact` is None unless there is a `window` R: then keys (`whole`) become codes R at once, when the
    token behind them comes (S = R), and values one by one, when R newer ones are there and another comes (S = R + 1).
    """

    quantizer: Quantizer | None
    length: int
    width: int
    codes: Tensor | None = None
    affine: Affine | None = None
    exact: Tensor | None = None
    window: int = 0
    whole: bool = False

    @property
    def tensors(self) -> list[Tensor]:
        """All that is stored for these tokens; calibrated ranges belong to the model."""
        moving = () if self.quantizer is None or self.quantizer.static else self.affine or ()
        return [part for part in (self.codes, self.exact, *moving) if part is not None]

    def coded(self, count: Tensor) -> Tensor:
        """How many tokens, from the first on, a query sees as codes when `count` tokens are there, itself included."""
        if self.quantizer is None:
            return torch.zeros_like(count)
        if not self.window:
            return count
        return (count - 1) // self.window * self.window if self.whole else (count - 1 - self.window).clamp_min(0)

    def read(self, count: Tensor, dtype: torch.dtype, inverse: Tensor | None = None) -> Tensor:
        """The first `count` tokens and anything behind them, [B, K, L, h]: what attention sees, by definition.

        `inverse` [h, h] is what decoded values are multiplied by from the right.
        """
        if self.quantizer is None:
            assert self.exact is not None
            return self.exact
        assert self.codes is not None
        y = decode(Encoded(self.codes, self.affine), self.quantizer, self.width)
        y = (y if inverse is None else y @ inverse).to(dtype)[:, :, : self.length]
        if self.exact is None:
            return y
        position = torch.arange(self.length, device=y.device)
        newest = self.exact.index_select(2, position % self.exact.shape[2])
        return torch.where((position < self.coded(count))[:, None], y, newest)

    @property
    def format(self) -> list[int]:
        """What the kernels are compiled for: bits, layout, group, rule, window."""
        part = self.quantizer
        assert part is not None
        group = min(part.group, self.width) if part.layout == "group" else part.group
        return [part.bits, LAYOUTS[part.layout], group, RULES[part.rule], self.window]

    @property
    def operands(self) -> list[Tensor]:
        """What the kernels read: codes, scale, offset, ring; what does not exist is empty."""
        assert self.codes is not None and self.affine is not None
        parts = (self.codes, *self.affine, self.exact)
        return [self.codes.new_empty(0) if part is None else part for part in parts]


def attend(
    query: Tensor, keys: Held, values: Held, count: Tensor, mask: Tensor | None, scale: float, inverse: Tensor | None
) -> Tensor:
    """Queries [B, H, 1, h] of the newest of `count` tokens (a number on the device) over a cache: [B, H, 1, h].

    `mask` bool [B or 1, 1, 1, L] says which of these tokens are seen; every text sees at least one. `inverse` is P^-1
    of a key map.
    """
    if refusal(query, keys, values, mask) is not None:
        return reference(query, keys, values, count, mask, scale, inverse)
    turned = query if inverse is None else (query.float() @ inverse.T).to(query.dtype)
    return torch.ops.lowbit.attend_codes(
        query, turned, keys.operands, values.operands, count, mask, scale, keys.format, values.format
    )


def reference(
    query: Tensor, keys: Held, values: Held, count: Tensor, mask: Tensor | None, scale: float, inverse: Tensor | None
) -> Tensor:
    """The definition of `attend`."""
    there = (torch.arange(keys.length, device=query.device) < count)[None, None, None]
    seen = there if mask is None else there & mask
    k, v = keys.read(count, query.dtype, inverse), values.read(count, query.dtype)
    return attention.attend(query, k, v, seen, scale)


def refusal(query: Tensor, keys: Held, values: Held, mask: Tensor | None) -> str | None:
    """Why the kernel does not take these tensors, None where it does."""
    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return "the kernel computes on a GPU, in bf16 or fp16"
    if query.shape[2] != 1 or keys.width != values.width or keys.width not in WIDTHS:
        return f"the kernel takes one query and heads of {', '.join(map(str, WIDTHS))}"
    if mask is not None and (mask.dtype != torch.bool or mask.shape[1:3] != (1, 1)):
        return "the kernel takes masks of positions that all heads share"
    return format_refusal(keys) or format_refusal(values)


def format_refusal(held: Held) -> str | None:
    """Why the kernels do not unpack a format, None where they do."""
    part = held.quantizer
    if part is None:
        return "one side is kept in 16 bits: the other is dequantized"
    if part.bits not in BITS:
        return f"codes of {part.bits} bits straddle bytes: they are dequantized by torch"
    if part.group & (part.group - 1) or (part.layout == "channel" and part.group > 128):
        return f"groups of {part.group} are no power of two, or too many tokens for a program"
    if part.layout == "group" and part.group < 8 // part.bits:
        return f"a group of {part.group} {part.bits}-bit codes is less than a byte"
    return None


def _attend(
    query: Tensor, turned: Tensor, keys: list[Tensor], values: list[Tensor], count: Tensor, mask: Tensor | None,
    scale: float, key_format: list[int], value_format: list[int],
) -> Tensor:  # fmt: skip
    from . import cache_attention_cuda, cache_attention_triton

    fits = cache_attention_cuda.refusal(query, keys, key_format, value_format) is None
    fused = cache_attention_cuda.attend if fits else cache_attention_triton.attend
    return fused(query, turned, keys, values, count, mask, scale, key_format, value_format)


def _shape(query: Tensor, *_others: object) -> Tensor:
    return torch.empty_like(query, memory_format=torch.contiguous_format)


_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define(
    "attend_codes(Tensor query, Tensor turned, Tensor[] keys, Tensor[] values, Tensor count, Tensor? mask, "
    "float scale, int[] key_format, int[] value_format) -> Tensor"
)
_LIBRARY.impl("attend_codes", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::attend_codes", _shape, lib=_LIBRARY)
