"""Layers of few tokens on one GPU: microseconds against torch in bf16 and torch's own operators, all in one run.

    python benchmarks/kernels.py [--bits 4 8] [--group 128] [--asymmetric] [--dtype float16] [--tokens 1 16] [--search]
    python benchmarks/kernels.py --floats NVFP4 MXFP4 [--tokens 1 16] [--search]
    python benchmarks/kernels.py --codes [--tokens 1 16] [--search]

The same tables as `lowbit speed` makes (`lowbit.kernels.speed`), for any format, with the error against fp64; how times
are taken is said in `lowbit.kernels.timing`. `--codes` times W8A8 and FP8, encoding and product apart too, and the
Triton kernel beside `product.cu`: where these cross is `codes_product.FEW`. `--search` also tries other plans and
prints those that beat the rule's.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from lowbit.kernels import codes_product, codes_product_triton, dynamic, weight_only, wide_product
from lowbit.kernels.codes_product import Operand
from lowbit.kernels.encoder import encoder
from lowbit.kernels.layout import COLUMNS, ROWS, prepare
from lowbit.kernels.speed import FLOATS, LLAMA_8B, copies, dense, quantized, weight_only_row
from lowbit.kernels.timing import Call, limits, microseconds, turns
from lowbit.kernels.weight_only import Plan
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import E4M3, Int, Number, per_channel, per_group

AnyPlan = TypeVar("AnyPlan", Plan, wide_product.Plan)


def other_plans(tokens: int, tiles: int, units: int) -> Iterator[Plan]:
    """Plans worth trying: every way of sharing rows and columns among warps that fits the device."""
    each = min(-(-tokens // 8), weight_only.MOST)
    if each == 1:  # inputs stay in L1, and many warps with little to do each are best
        most, sharing, ahead = 32, ((1, 2), (4, 8, 16)), ((1, 0), (2, 0))
    else:
        most, sharing = (32, 16)[each > 4], ((1, 2, 3, 4, 7, 8), (1, 2, 3, 4, 8))
        ahead = ((1, 0), (1, 2), (1, 3), (1, 4), (2, 3))
    for rows, row_warps, k_warps, cluster in itertools.product((1, 2), *sharing, (1, 2)):
        warps = row_warps * k_warps
        if not 4 <= warps <= most or k_warps * cluster > units or rows * row_warps > tiles:
            continue
        for depth, stages in ahead:
            for resident in (0,) if stages else (0, most // warps if each == 1 else 1):
                plan = Plan(rows, each, row_warps, k_warps, cluster, depth, stages, resident)
                if plan.shared <= 200 * 1024:
                    yield plan


def other_wide_plans(tokens: int, units: int) -> Iterator[wide_product.Plan]:
    """The same for many tokens."""
    sizes = [size for size in (64, 128, 192, 256) if size < tokens + 64]
    return (wide_product.Plan(size, splits) for size in sizes for splits in range(1, min(8, units // 4) + 1))


def search(plans: Iterable[AnyPlan], calls: Callable[[AnyPlan], Sequence[Call]], taken: float) -> None:
    """Print the three best plans that beat the rule's by more than noise."""
    plans = list(plans)
    # compiling takes most of the time, and a thread has no context before it has asked torch for something
    with ThreadPoolExecutor(initializer=torch.cuda.mem_get_info) as pool:
        list(pool.map(lambda plan: calls(plan)[0](), plans))
    found = [(microseconds(calls(plan), repeats=7)[0], plan) for plan in plans]
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
    if not searching or found.tokens > wide_product.MOST:
        return
    assert found.lowbit is not None
    weights, few = copies(prepare(weight)), found.tokens <= weight_only.FEW

    def calls(plan: Plan | wide_product.Plan) -> list[Call]:
        product: Callable[..., Tensor] = weight_only.product if few else wide_product.product
        return [partial(product, x, each, None, plan) for each in weights]

    tiles, units = weights[0].low.shape[:2]
    if few:
        search(other_plans(len(x), tiles, units), calls, found.lowbit)
    else:
        search(other_wide_plans(len(x), units), calls, found.lowbit)


def codes_row(x: Tensor, weight: QTensor, number: Number, searching: bool) -> None:
    """One line of the table of `--codes`: 16 bits, the encoding, both kernels, the layer, and the error of its sums."""
    operand, how = codes_product.operand(weight, number), encoder(number, None, None, "cuda")
    codes, scale = dynamic.encode(x, how)
    weights = [replace(operand, codes=operand.codes.clone()) for _ in range(turns(operand.codes.numel()))]
    tiles, units = -(-len(operand.scale) // ROWS), -(-x.shape[1] // COLUMNS)
    plan = weight_only.plan_for(len(x), tiles, units, x.device)

    def few(plan: Plan) -> Callable[[Operand], Tensor]:
        return lambda each: codes_product.product_of_few(codes, scale, each, None, x.dtype, plan)

    def calls(work: Callable[[Operand], object]) -> list[Call]:
        return [partial(work, each) for each in weights]

    plain, encoding, taken, triton, layer = microseconds(
        dense(x, weight.shape[0]),
        [partial(dynamic.encode, x, how)],
        calls(few(plan)),
        calls(lambda each: codes_product_triton.product(codes, scale, each.codes, each.scale, None, x.dtype)),
        calls(lambda each: codes_product.linear(x, how, each)),
    )
    expected = (codes.double() @ operand.codes.double().T) * scale.double()[:, None] * operand.scale.double()
    error = float((few(plan)(operand).double() - expected).norm() / expected.norm())
    print(
        f"| {number} {x.shape[1]}→{weight.shape[0]} | {len(x)} | {plain:.1f} | {encoding:.1f} | {taken:.1f} "
        f"| {triton:.1f} | {layer:.1f} | {plain / layer:.2f} | {error:.1e} |",
        flush=True,
    )
    if searching:
        search(other_plans(len(x), tiles, units), lambda plan: calls(few(plan)), taken)


def codes_table(
    shapes: Sequence[tuple[int, int]], inputs_of: Callable[..., Tensor], counts: Sequence[int], searching: bool
) -> None:
    """W8A8 and FP8."""
    print("| | M | torch 16-bit | encoding | product.cu | Triton | layer | times 16-bit | error |")
    print("|---|---|---|---|---|---|---|---|---|")
    numbers: tuple[Number, ...] = (Int(8), E4M3)
    for (inputs, outputs), number in itertools.product(shapes, numbers):
        weight = quantized(outputs, inputs, per_channel(number, scale="float32"))
        for tokens in counts:
            codes_row(inputs_of(tokens, inputs), weight, number, searching)


def main() -> None:
    """Measure the limits, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floats", nargs="+", choices=[*FLOATS], default=[])
    parser.add_argument("--codes", action="store_true")
    parser.add_argument("--bits", nargs="+", type=int, default=[4])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 32, 64, 2048, 4096])
    parser.add_argument("--shape", nargs=2, type=int, metavar=("INPUTS", "OUTPUTS"), help="only this one")
    parser.add_argument("--search", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rates = limits()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, group {arguments.group}, {arguments.dtype}")
    print(f"copy {rates[0] / 1e6:.2f} TB/s, bf16 product {rates[1] / 1e6:.0f} TFLOP/s\n")
    rule = "asymmetric" if arguments.asymmetric else "symmetric"
    integers = [per_group(Int(bits, rule), arguments.group) for bits in arguments.bits]  # type: ignore[arg-type]
    specs = [FLOATS[name] for name in arguments.floats] or integers
    shapes = [tuple(arguments.shape)] if arguments.shape else LLAMA_8B
    inputs_of = partial(torch.randn, device="cuda", dtype=getattr(torch, arguments.dtype))
    if arguments.codes:
        codes_table(shapes, inputs_of, arguments.tokens, arguments.search)
        return
    print("| | M | limit | torch 16-bit | torch int4 | lowbit | times 16-bit | error |")
    print("|---|---|---|---|---|---|---|---|")
    for (inputs, outputs), spec in itertools.product(shapes, specs):
        weight = quantized(outputs, inputs, spec)
        for tokens in arguments.tokens:
            row(inputs_of(tokens, inputs), weight, rates, arguments.search)


if __name__ == "__main__":
    main()
