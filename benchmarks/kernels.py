"""Weight-only layers on one GPU: microseconds against torch in bf16 and torch's own int4, all in one run.

    python benchmarks/kernels.py [--bits 4 8] [--group 128] [--asymmetric] [--dtype float16] [--tokens 1 16] [--search]

Times are medians of a CUDA graph of 32 calls or more that takes its weights in turn from so many copies that no cache
holds them. `limit` is what reading codes and scales once takes at the bandwidth of a copy measured in the same run or,
where that is more, what the product takes at the rate of a large bf16 product. `--search` also tries other plans and
prints those that beat the rule's.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from lowbit.kernels import weight_only
from lowbit.kernels.layout import Prepared, prepare
from lowbit.kernels.weight_only import Plan
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import Int, per_group

LLAMA_8B = [(4096, 4096), (4096, 14336), (14336, 4096)]
"""Inputs and outputs of o_proj, gate_proj, down_proj."""
CACHE = 150e6
"""Bytes of weights that are gone through before one is met again: three times the cache of an H100."""
Call = Callable[[], object]


def recorded(calls: list[Call]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of 32 calls or more, made in turn, and how many they are."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph, rounds = torch.cuda.CUDAGraph(), -(-32 // len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for call in calls * rounds:
            call()
    return graph, len(calls) * rounds


def microseconds(*rivals: list[Call], repeats: int = 21) -> list[float]:
    """The median time of one call of each rival; they take turns, so that all meet the same clocks and temperatures."""
    graphs = [recorded(calls) for calls in rivals]
    times: list[list[float]] = [[] for _ in rivals]
    for repeat in range(repeats + 3):
        for (graph, count), into in zip(graphs, times, strict=True):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if repeat >= 3:
                into.append(1000 * begin.elapsed_time(end) / count)
    return [statistics.median(into) for into in times]


def limits() -> tuple[float, float]:
    """Bytes per microsecond that a copy reads and writes, and operations per microsecond of a large bf16 product."""
    source = torch.ones(1 << 28, device="cuda")
    target = torch.empty_like(source)  # a kernel copies: in a graph, `copy_` is left to a slower engine
    bandwidth = 8 * source.numel() / microseconds([partial(torch.add, source, 1, out=target)])[0]
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    return bandwidth, 2 * 8192**3 / microseconds([lambda: a @ b])[0]


def copies(weight: Prepared) -> list[Prepared]:
    """So many equal weights that no cache holds them."""

    def copy(part: Tensor | None) -> Tensor | None:
        return None if part is None else part.clone()

    def again() -> Prepared:
        low, scale = weight.low.clone(), weight.scale.clone()
        return replace(weight, low=low, high=copy(weight.high), scale=scale, zero=copy(weight.zero))

    return [again() for _ in range(turns(size(weight)))]


def size(weight: Prepared) -> int:
    """Bytes of a weight."""
    parts = (weight.low, weight.high, weight.scale, weight.zero)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def turns(size: int) -> int:
    """How many weights of a size to go through."""
    return max(2, -(-int(CACHE) // size))


def torch_int4(x: Tensor, outputs: int, group: int) -> list[Call]:
    """torch's own int4 layer (tinygemm) on random codes, for bf16."""
    inputs = x.shape[1]
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(inputs // group, outputs, 2, device="cuda").bfloat16()
    weights = [packed.clone() for _ in range(turns(codes.numel()))]
    return [partial(torch.ops.aten._weight_int4pack_mm, x, w, group, scales) for w in weights]


def other_plans(tokens: int, weight: Prepared) -> Iterator[Plan]:
    """Plans worth trying: every way of sharing rows and columns among warps that fits the device."""
    units, tiles = weight.low.shape[1], weight.low.shape[0]
    for rows, row_warps, k_warps, cluster in itertools.product((1, 2), (1, 2, 3, 4, 7, 8), (1, 2, 4, 8, 16), (1, 2, 4)):
        for depth, stages in ((1, 0), (2, 0), (1, 2), (1, 3), (2, 3)):
            plan = Plan(rows, min(-(-tokens // 8), weight_only.MOST), row_warps, k_warps, cluster, depth, stages)
            warps = row_warps * k_warps
            sensible = 4 <= warps <= 32 and k_warps * cluster <= units and rows * row_warps <= tiles
            if sensible and plan.shared <= 200 * 1024 and (not stages or row_warps == 1 or k_warps < 16):
                yield plan


def search(x: Tensor, weights: list[Prepared], taken: float) -> None:
    """Print the three best plans that beat the rule's by more than noise."""
    found = []
    for plan in other_plans(len(x), weights[0]):
        calls: list[Call] = [partial(weight_only.product, x, w, None, plan) for w in weights]
        found.append((microseconds(calls, repeats=7)[0], plan))
    for time, plan in sorted(found, key=lambda pair: pair[0])[:3]:
        if time < 0.97 * taken:
            print(f"    {time:.1f} µs: {plan}")


def row(x: Tensor, outputs: int, bits: int, arguments: argparse.Namespace, rates: tuple[float, float]) -> None:
    """One line of the table."""
    tokens, inputs = x.shape
    rule = "asymmetric" if arguments.asymmetric else "symmetric"
    dense = [torch.randn(outputs, inputs, device="cuda").to(x.dtype) for _ in range(turns(2 * outputs * inputs))]
    values = dense[0].float()
    grid = fit_range(values, per_group(Int(bits, rule), arguments.group))  # type: ignore[arg-type]
    weight = QTensor(grid.encode(values), grid)
    weights = copies(prepare(weight))
    rivals: list[list[Call]] = [[partial(F.linear, x, w) for w in dense]]
    rivals.append([partial(weight_only.linear, x, w) for w in weights])
    if bits == 4 and x.dtype == torch.bfloat16 and arguments.group in (32, 64, 128, 256) and tokens <= weight_only.FEW:
        rivals.append(torch_int4(x, outputs, arguments.group))
    plain, ours, *theirs = microseconds(*rivals)
    expected = x.double() @ weight.dequantize().double().T
    error = float((weight_only.linear(x, weights[0]).double() - expected).norm() / expected.norm())
    limit = max(size(weights[0]) / rates[0], 2 * tokens * outputs * inputs / rates[1])
    print(
        f"| {inputs}→{outputs} | {bits} | {tokens} | {limit:.1f} | {plain:.1f} | {theirs[0] if theirs else 0:.1f} "
        f"| {ours:.1f} | {plain / ours:.2f} | {error:.1e} |".replace(" 0.0 ", " – "),
        flush=True,
    )
    if arguments.search and tokens <= weight_only.FEW:
        search(x, weights, ours)


def main() -> None:
    """Measure the limits, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 32, 64, 2048, 4096])
    parser.add_argument("--search", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rates = limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, group {arguments.group}, {arguments.dtype}")
    print(f"copy {rates[0] / 1e6:.2f} TB/s, bf16 product {rates[1] / 1e6:.0f} TFLOP/s\n")
    print("| K→N | bits | M | limit | torch 16-bit | torch int4 | lowbit | times 16-bit | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    for (inputs, outputs), bits, tokens in itertools.product(LLAMA_8B, arguments.bits, arguments.tokens):
        x = torch.randn(tokens, inputs, device="cuda").to(getattr(torch, arguments.dtype))
        row(x, outputs, bits, arguments, rates)


if __name__ == "__main__":
    main()
