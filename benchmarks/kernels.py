"""Weight-only layers on one GPU: microseconds against torch in bf16 and torch's own int4, all in one run.

    python benchmarks/kernels.py [--bits 4 8] [--group 128] [--asymmetric] [--dtype float16] [--tokens 1 16] [--search]

The same tables as `lowbit speed` makes (`lowbit.kernels.speed`), for any format, with the error against fp64; how times
are taken is said in `lowbit.kernels.timing`. `--search` also tries other plans and prints those that beat the rule's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from lowbit.kernels import weight_only
from lowbit.kernels.layout import Prepared, prepare
from lowbit.kernels.speed import LLAMA_8B, copies, quantized, weight_only_row
from lowbit.kernels.timing import Call, limits, microseconds
from lowbit.kernels.weight_only import Plan
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import Int, per_group


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


def row(x: Tensor, weight: QTensor, rates: tuple[float, float], searching: bool) -> None:
    """One line of the table."""
    found = weight_only_row(x, weight, rates)
    expected = x.double() @ weight.dequantize().double().T
    error = float((weight_only.linear(x, prepare(weight)).double() - expected).norm() / expected.norm())
    library = "–" if found.library is None else f"{found.library:.1f}"
    print(
        f"| {found.work} | {found.tokens} | {found.limit:.1f} | {found.plain:.1f} | {library} | {found.lowbit:.1f} "
        f"| {found.times:.2f} | {error:.1e} |",
        flush=True,
    )
    if searching and found.tokens <= weight_only.FEW:
        assert found.lowbit is not None
        search(x, copies(prepare(weight)), found.lowbit)


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
    print("| | M | limit | torch 16-bit | torch int4 | lowbit | times 16-bit | error |")
    print("|---|---|---|---|---|---|---|---|")
    rule = "asymmetric" if arguments.asymmetric else "symmetric"
    for (inputs, outputs), bits in itertools.product(LLAMA_8B, arguments.bits):
        weight = quantized(outputs, inputs, per_group(Int(bits, rule), arguments.group))  # type: ignore[arg-type]
        for tokens in arguments.tokens:
            x = torch.randn(tokens, inputs, device="cuda").to(getattr(torch, arguments.dtype))
            row(x, weight, rates, arguments.search)


if __name__ == "__main__":
    main()
