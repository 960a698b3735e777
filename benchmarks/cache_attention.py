"""Microseconds of attention of one token, by how keys and values are kept: 16 bits against codes, in one run.

    python benchmarks/cache_attention.py [--lengths 256 1024 8192 32768] [--batches 1 16]
                                         [--formats kv8 kv4 kivi2] [--search]

What is measured, and how, is `lowbit.kernels.speed_caches`; rows of one batch and length take turns. The last column is
what writing a token costs.
`--search` tries other plans of the CUDA C++ instead and prints their microseconds.
"""

from __future__ import annotations

import argparse

import torch
from decoding import CACHES

from lowbit.kernels import cache_attention_cuda
from lowbit.kernels.cache_attention_cuda import Plan
from lowbit.kernels.speed_caches import codes, sixteen
from lowbit.kernels.timing import limits, microseconds


def search(formats: list[str]) -> None:
    """Print the times of plans for a few shapes."""
    shapes = [(1, 256), (1, 1024), (1, 8192), (16, 8192)]
    names = " | ".join(f"{batch} x {length}" for batch, length in shapes)
    print(f"| | tile | warps | resident | {names} |\n" + "|---" * (4 + len(shapes)) + "|")
    of_codes = [Plan(16, 16, 1), Plan(16, 8, 1), Plan(32, 12, 1), Plan(32, 8, 1)]
    of_16_bits = [Plan(16, 16, 1), Plan(16, 12, 1), Plan(16, 8, 1), Plan(32, 8, 1)]
    found: dict[tuple[str, Plan], list[float]] = {}
    for batch, length in shapes:
        rivals = {"16 bits": sixteen(batch, length)[0][1]}
        rivals |= {name: codes(CACHES[name], batch, length)[0][0] for name in formats}
        for name, calls in rivals.items():
            for plan in of_16_bits if name == "16 bits" else of_codes:
                cache_attention_cuda.plan = lambda *_, plan=plan: plan
                found.setdefault((name, plan), []).append(microseconds(calls, repeats=5)[0])
    for (name, plan), times in found.items():
        print(f"| {name} | {' | '.join(map(str, plan))} | {' | '.join(f'{time:.1f}' for time in times)} |", flush=True)


def main() -> None:
    """Print a row for every batch, length and format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 8192, 32768])
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
    (library, ours), size = sixteen(batch, length)
    rivals, sizes = [library, ours], [size, size]
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
