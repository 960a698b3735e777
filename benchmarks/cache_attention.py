"""Microseconds of attention of one token, by how keys and values are kept: 16 bits against codes, in one run.

    python benchmarks/cache_attention.py [--lengths 1024 8192 32768] [--batches 1 16] [--formats kv8 kv4 kivi2]
                                         [--search]

Heads are Llama-3-8B's: 32 queries to 8 keys and values of width 128, in bf16. All rivals of a row take turns, each on
so many caches that none is met again while it lies in the processor's own. Limit: the bytes of all keys and values,
with their scales, over the bandwidth of a copy in the same run. The last column is what writing a token costs.
`--search` tries other plans of the kernel instead and prints their microseconds.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from decoding import CACHES
from torch import Tensor
from torch.nn import functional as F

from lowbit.kernels import attention, cache_append, cache_attention, cache_attention_triton
from lowbit.kernels.cache_attention import Held
from lowbit.kernels.cache_attention_triton import Plan
from lowbit.kernels.timing import limits, microseconds, turns
from lowbit.numerics.kv import KV, encode

HEADS, SHARED, WIDTH = 32, 8, 128
Calls = list[Callable[[], object]]


def sixteen(batch: int, length: int) -> tuple[list[Calls], int]:
    """Calls of torch's attention and of ours on caches of 16 bits, and the bytes of one."""
    size = 4 * batch * SHARED * length * WIDTH
    library: Calls = []
    ours: Calls = []
    for _ in range(turns(size)):
        query = torch.randn(batch, HEADS, 1, WIDTH, device="cuda").bfloat16()
        keys, values = (torch.randn(batch, SHARED, length, WIDTH, device="cuda").bfloat16() for _ in range(2))
        library.append(partial(F.scaled_dot_product_attention, query, keys, values, enable_gqa=True))
        ours.append(partial(attention.attend, query, keys, values, None, WIDTH**-0.5))
    return [library, ours], size


def codes(kv: KV, batch: int, length: int) -> tuple[list[Calls], int]:
    """Calls of attention on full caches of codes, and of what writes a token into one; the bytes of one cache."""
    attends: Calls = []
    writes: Calls = []
    size = 0
    while not attends or len(attends) < turns(size):
        query = torch.randn(batch, HEADS, 1, WIDTH, device="cuda").bfloat16()
        new = torch.randn(2, batch, SHARED, 1, WIDTH, device="cuda").bfloat16()
        sides: list[Held] = []
        encoders = []
        for side, part in enumerate((kv.key_quantizer, kv.value_quantizer)):
            assert part is not None
            make = partial(encode, quantizer=part)
            held = cache_append.empty(new[side], part, make, length, window=kv.residual, whole=side == 0)
            randomize([*held.tensors])
            sides.append(held)
            encoders.append(make)
        keys, values = sides
        count, last = (torch.tensor(number, device="cuda") for number in (length, length - 1))
        call = partial(cache_attention.attend, query, keys, values, count, None, WIDTH**-0.5, None)
        assert cache_attention.refusal(query, keys, values, None) is None
        attends.append(call)
        parts = (new[0], new[1]), last, torch.zeros_like(last), (encoders[0], encoders[1]), None, False
        writes.append(partial(cache_append.append, keys, values, *parts))
        size = sum(part.nbytes for held in sides for part in held.tensors)
    return [attends, writes], size


def randomize(tensors: list[Tensor]) -> None:
    """Random codes, scales and rings; speed does not depend on them."""
    for part in tensors:
        part.random_(0, 256) if part.dtype == torch.uint8 else part.copy_(torch.rand_like(part) / 16)


def search(formats: list[str]) -> None:
    """Print the times of plans for a few shapes."""
    shapes = [(1, 1024), (1, 8192), (16, 8192)]
    names = " | ".join(f"{batch} x {length}" for batch, length in shapes)
    print(f"| | block | programs | warps | {names} |\n" + "|---" * 7 + "|")
    found: dict[tuple[str, Plan], list[float]] = {}
    plans = [Plan(block, programs, warps) for block in (64, 128) for programs in (264, 396, 528) for warps in (4, 8)]
    for name in formats:
        for batch, length in shapes:
            calls = codes(CACHES[name], batch, length)[0][0]
            for plan in plans:
                cache_attention_triton.PLAN = plan
                found.setdefault((name, plan), []).append(microseconds(calls, repeats=7)[0])
    for (name, plan), times in found.items():
        print(f"| {name} | {' | '.join(map(str, plan))} | {' | '.join(f'{time:.1f}' for time in times)} |", flush=True)


def main() -> None:
    """Print a row for every batch, length and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 32768])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--formats", nargs="+", default=["kv8", "kv4", "kivi2"], choices=CACHES)
    parser.add_argument("--search", action="store_true", help="try other plans of the kernel")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = limits()[0]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e6:.2f} TB/s\n")
    if arguments.search:
        search(arguments.formats)
        return
    print("| texts | positions | | µs | times torch | limit µs | MB | a token written µs |\n" + "|---" * 8 + "|")
    for batch in arguments.batches:
        for length in arguments.lengths:
            rows(batch, length, arguments.formats, bandwidth)


def rows(batch: int, length: int, formats: list[str], bandwidth: float) -> None:
    """Print the rows of one batch and length, whose rivals take turns."""
    rivals, size = sixteen(batch, length)
    sizes = [size, size]
    for name in formats:
        calls, size = codes(CACHES[name], batch, length)
        rivals += calls
        sizes += [size]
    times = microseconds(*rivals)
    names = ["torch, 16 bits", "lowbit, 16 bits", *formats]
    attends = [*times[:2], *times[2::2]]
    writes = ["", "", *(f"{time:.1f}" for time in times[3::2])]
    for name, time, write, size in zip(names, attends, writes, sizes, strict=True):
        limit, gain = size / bandwidth, times[0] / time
        row = (batch, length, name, f"{time:.1f}", f"{gain:.2f}", f"{limit:.1f}", f"{size / 1e6:.1f}", write)
        print(f"| {' | '.join(map(str, row))} |", flush=True)


if __name__ == "__main__":
    main()
