"""A token's way into a cache that holds codes: encoded and written where it belongs, in place, at a place that only the
device knows.

Encoding one token takes some thirty operations in torch, each on a few hundred numbers; for keys and values of all
layers starting them costs a step more than attention. One kernel does both sides of a layer, with the arithmetic of
`numerics.kv` to the last bit.

With a window (KIVI) the newest token first finds its slot: if its predecessors fill the ring, they become codes now, at
the beginning of the step whose token needs their place, rather than at the end of the last one. What a query sees is
the same. `length` and `prompt` are numbers on the device; tokens before `prompt` came as codes (`fill`), and are not
encoded again.

Shape letters: B texts, K key-value heads, T tokens, L positions, h head width, G group, R window, S slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..numerics.kv import Affine, Encoded, Quantizer
from .cache_attention import WIDTHS, Held, format_refusal

if TYPE_CHECKING:
    Encode = Callable[[Tensor], Encoded]


def empty(
    like: Tensor, quantizer: Quantizer | None, encode: Encode, length: int, *, window: int = 0, whole: bool = False,
    affine: Affine | None = None,
) -> Held:  # fmt: skip
    """A cache without tokens for keys or values such as `like` [B, K, T, h], of which `encode` makes codes.

    `window`, `whole`: see `Held`. `affine` are the ranges of a static layout.
    """
    held = Held(quantizer, length, like.shape[-1], window=0 if quantizer is None else window, whole=whole)
    slots = length if quantizer is None else window + (not whole) if window else 0
    if slots:
        held.exact = like.new_zeros(*like.shape[:2], slots, like.shape[3])
    if quantizer is None:
        return held
    one = encode(like.new_zeros(*like.shape[:2], quantizer.tokens, like.shape[3]))
    whole_groups = -(-length // max(window, 1)) * max(window, 1)

    def long(part: Tensor) -> Tensor:
        return part.new_zeros(*part.shape[:2], whole_groups // quantizer.tokens * part.shape[2], *part.shape[3:])

    held.codes, held.affine = long(one.codes), affine
    if one.affine is not None:
        offset = one.affine.offset
        held.affine = Affine(long(one.affine.scale), None if offset is None else long(offset))
    return held


def fill(held: Held, encoded: Encoded | None, exact: Tensor | None) -> None:
    """Put a prompt's tokens into an empty cache: codes from the first token on, and those behind them as they came."""
    coded = 0
    if encoded is not None:
        coded = encoded.tokens
        for into, part in _parts(held, encoded):
            into[:, :, : part.shape[2]] = part
    if held.exact is not None and exact is not None:
        slots = torch.arange(coded, coded + exact.shape[2], device=exact.device) % held.exact.shape[2]
        held.exact.index_copy_(2, slots, exact)


def append(
    keys: Held, values: Held, new: tuple[Tensor, Tensor], length: Tensor, prompt: Tensor,
    encode: tuple[Encode, Encode], clips: Tensor | None, mapped: bool,
) -> None:  # fmt: skip
    """Write token number `length`, keys and values [B, K, 1, h], into a cache; `length` stays as it is.

    Args:
        encode: what makes codes of keys and of values.
        clips: the parts [2, 2] of both ends of keys' and values' ranges that are kept, where they are clipped.
        mapped: whether `encode` maps the keys first.
    """
    if refusal(keys, values, new, mapped) is None:
        torch.ops.lowbit.append_codes(
            *new, keys.operands, values.operands, length, prompt, clips, keys.format, values.format
        )
        return
    for held, x, make in zip((keys, values), new, encode, strict=True):
        reference(held, x, length, prompt, make)


def reference(held: Held, new: Tensor, length: Tensor, prompt: Tensor, encode: Encode) -> None:
    """The definition of `append` for one side."""
    place = length.reshape(1)
    if held.quantizer is None:
        assert held.exact is not None
        held.exact.index_copy_(2, place, new)
    elif held.exact is None:
        _write(held, encode(new), place)
    else:
        slots = held.exact.shape[2]
        first = place - slots
        if held.whole:
            due, waiting = length % slots == 0, held.exact
            tokens = first + torch.arange(slots, device=new.device)
        else:
            due, waiting = first[0] >= 0, held.exact.index_select(2, place % slots)
            tokens = first
        _write(held, encode(waiting), tokens.clamp_min(0), due & (length > prompt))
        held.exact.index_copy_(2, place % slots, new)


def refusal(keys: Held, values: Held, new: tuple[Tensor, Tensor], mapped: bool) -> str | None:
    """Why the kernel does not write these tokens, None where it does."""
    x = new[0]
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return "the kernel computes on a GPU, in bf16 or fp16"
    if mapped:
        return "keys are mapped before they become codes"
    for held in (keys, values):
        part = held.quantizer
        reason = format_refusal(held)
        if reason is not None or part is None:
            return reason
        if held.width not in WIDTHS or keys.width != values.width:
            return f"the kernel takes heads of {', '.join(map(str, WIDTHS))}"
        if part.together or part.static or part.rule == "e4m3":
            return "one scale for all heads, calibrated ranges and E4M3 codes are made by torch"
    return None


def _parts(held: Held, encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
    """What is stored beside what is new."""
    assert held.codes is not None
    parts = [(held.codes, encoded.codes)]
    if encoded.affine is not None and held.affine is not None:
        pairs = zip(held.affine, encoded.affine, strict=True)
        parts += [(into, part) for into, part in pairs if into is not None and part is not None]
    return parts


def _write(held: Held, encoded: Encoded, tokens: Tensor, due: Tensor | None = None) -> None:
    """Store codes of these tokens, or, where they are not `due`, write again what is there."""
    for into, part in _parts(held, encoded):
        group = len(tokens) // part.shape[2]  # a group of tokens shares a scale
        rows = tokens[::group] // group
        into.index_copy_(2, rows, part if due is None else torch.where(due, part, into.index_select(2, rows)))


def _append(
    new_keys: Tensor, new_values: Tensor, keys: list[Tensor], values: list[Tensor], length: Tensor, prompt: Tensor,
    clips: Tensor | None, key_format: list[int], value_format: list[int],
) -> None:  # fmt: skip
    from .cache_append_triton import append as fused

    fused(new_keys, new_values, keys, values, length, prompt, clips, key_format, value_format)


_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define(
    "append_codes(Tensor new_keys, Tensor new_values, Tensor(a!)[] keys, Tensor(b!)[] values, Tensor length, "
    "Tensor prompt, Tensor? clips, int[] key_format, int[] value_format) -> ()"
)
_LIBRARY.impl("append_codes", _append, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::append_codes", lambda *_tensors: None, lib=_LIBRARY)
