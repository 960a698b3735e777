"""Attention of one new token to a cache: 16 bits against codes, the last table of `lowbit speed`.

Heads are Llama-3-8B's, and caches are full. Every rival goes through so many of them that none is met again while it
lies in the processor's own cache; queries and the number of tokens, which a model has just made, lie there. Limit: the
bytes of all keys and values, with their scales, over a copy's bandwidth.

Shape letters: B texts, H heads, K key-value heads, L positions, h head width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics.kv import KV, Encoded, encode, kivi
from . import attention, cache_append, cache_attention
from .cache_attention import Held
from .speed_table import Row
from .timing import Call, microseconds, turns

HEADS, SHARED, WIDTH = 32, 8, 128
"""Heads of queries, of keys and values, and their width."""
FORMATS: dict[str, KV] = {"8 bits": KV(8, 8), "4 bits": KV(4, 4), "KIVI 2 bits": kivi(2, 2)}
"""Caches of the table, beside 16 bits."""


def rows(
    rates: tuple[float, float],
    batches: Sequence[int] = (1, 16),
    lengths: Sequence[int] = (1024, 8192),
    formats: Mapping[str, KV] = FORMATS,
) -> Iterator[Row]:
    """A row for every number of texts, positions and format; torch's attention to 16 bits stands beside all."""
    for batch in batches:
        for length in lengths:
            (library, ours), size = sixteen(batch, length)
            names, rivals, sizes = ["16 bits"], [library, ours], [size]
            for name, kv in formats.items():
                (calls, _), size = codes(kv, batch, length)
                names, rivals, sizes = [*names, name], [*rivals, calls], [*sizes, size]
            plain, *times = microseconds(*rivals)
            for name, size, time in zip(names, sizes, times, strict=True):
                yield Row(f"cache of {name}, {length} positions", batch, size / rates[0], plain, None, time)


def sixteen(batch: int, length: int) -> tuple[tuple[list[Call], list[Call]], int]:
    """Calls of torch's attention and of ours on caches of 16 bits, and the bytes of one."""
    size = 4 * batch * SHARED * length * WIDTH
    library: list[Call] = []
    ours: list[Call] = []
    query = torch.randn(batch, HEADS, 1, WIDTH, device="cuda").bfloat16()
    for _ in range(turns(size)):
        keys, values = (torch.randn(batch, SHARED, length, WIDTH, device="cuda").bfloat16() for _ in range(2))
        library.append(partial(F.scaled_dot_product_attention, query, keys, values, enable_gqa=True))
        ours.append(partial(attention.attend, query, keys, values, None, WIDTH**-0.5))
    return (library, ours), size


def codes(kv: KV, batch: int, length: int) -> tuple[tuple[list[Call], list[Call]], int]:
    """Calls of attention on full caches of codes, and of what writes a token into one; the bytes of one cache."""
    attends: list[Call] = []
    writes: list[Call] = []
    size = 0
    query = torch.randn(batch, HEADS, 1, WIDTH, device="cuda").bfloat16()
    count, last = (torch.tensor(number, device="cuda") for number in (length, length - 1))
    while not attends or len(attends) < turns(size):
        new = torch.randn(2, batch, SHARED, 1, WIDTH, device="cuda").bfloat16()
        sides: list[Held] = []
        encoders: list[Callable[[Tensor], Encoded]] = []
        for side, part in enumerate((kv.key_quantizer, kv.value_quantizer)):
            assert part is not None
            make = partial(encode, quantizer=part)
            held = cache_append.empty(new[side], part, make, length, window=kv.residual, whole=side == 0)
            randomize(held.tensors)
            sides.append(held)
            encoders.append(make)
        keys, values = sides
        assert cache_attention.refusal(query, keys, values, None) is None
        attends.append(partial(cache_attention.attend, query, keys, values, count, None, WIDTH**-0.5, None))
        parts = (new[0], new[1]), last, torch.zeros_like(last), (encoders[0], encoders[1]), None, False
        writes.append(partial(cache_append.append, keys, values, *parts))
        size = sum(part.nbytes for held in sides for part in held.tensors)
    return (attends, writes), size


def randomize(tensors: list[Tensor]) -> None:
    """Random codes, scales and rings; speed does not depend on them."""
    for part in tensors:
        part.random_(0, 256) if part.dtype == torch.uint8 else part.copy_(torch.rand_like(part) / 16)
