"""Inputs to codes behind a map: microseconds of the CUDA C++, of Triton and of the steps in torch, in one run.

    python benchmarks/transforms.py [--tokens 1 16 2048] [--forms int8 int4 fp8] [--maps 112×128] [--search]

Inputs are in bf16. The limit is the bytes of inputs and codes over a copy's bandwidth; *differ* is the share of codes
in which both kernels disagree, and should be about what a last bit of the map decides: a percent of int8, less of int4.
`--search` also tries other plans of the CUDA C++, to int8 only.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from lowbit.kernels import transform_cuda
from lowbit.kernels.compile import processors
from lowbit.kernels.dynamic_triton import encode_mapped
from lowbit.kernels.encoder import encoder
from lowbit.kernels.speed import by_steps
from lowbit.kernels.timing import Call, limits, microseconds, turns
from lowbit.kernels.transform_cuda import Plan, plan, shared_bytes
from lowbit.numerics.maps import Hadamard, Kronecker, Map, random_orthogonal
from lowbit.numerics.spec import E4M3, Int, Number

FORMS: dict[str, tuple[Number, bool]] = {"int8": (Int(8), False), "int4": (Int(4), True), "fp8": (E4M3, False)}


def maps() -> dict[str, Map]:
    """The transforms of Llama-3-8B's inputs, and the largest one."""

    def side(n: int) -> Tensor:
        return random_orthogonal(n, n).float()

    return {
        "Kronecker 64×64": Kronecker(side(64), side(64), (64, 64)),
        "Hadamard 4096": Hadamard(4096),
        "heads 32×128": Kronecker(side(32), None, (32, 128)),
        "Kronecker 112×128": Kronecker(side(112), side(128), (112, 128)),
        "Hadamard 14336": Hadamard(14336),
        "heads 112×128": Kronecker(side(112), None, (112, 128)),
        "Kronecker 64×128": Kronecker(side(64), side(128), (64, 128)),
        "Kronecker 128×128": Kronecker(side(128), side(128), (128, 128)),
    }


def other_plans(n1: int, n2: int, sides: int, rule: Plan) -> list[Plan]:
    """More tokens at once and fewer, and twice as many warps to a token."""
    tries = [rule._replace(groups=rule.groups + more) for more in (-2, -1, 1, 2)]
    tries += [Plan(groups, tiles=1) for groups in (rule.groups, rule.groups // 2)]

    def fits(one: Plan) -> bool:
        room = shared_bytes(n1, n2, True, sides == 2, one)
        most = 65536 // (n1 // 4 * (2 + sides) + 40) // one.threads(n2)  # fewer registers are no plan at all
        return 1 <= one.groups <= min(most, 1024 // one.threads(n2)) and room <= 227 * 1024

    return [one for one in dict.fromkeys(tries) if fits(one) and one != rule]


def row(name: str, map: Map, form: str, count: int, bandwidth: float, searching: bool) -> None:
    """One line of the table, and those of other plans."""
    number, packed = FORMS[form]
    how = encoder(number, map, torch.tensor([0.9, 0.9]), "cuda")
    assert how.factors is not None
    sides = (how.factors.left is not None) + (how.factors.right is not None)
    xs = [torch.randn(count, map.width, device="cuda").bfloat16() for _ in range(turns(2 * count * map.width))]
    rule = plan(*how.factors.sizes, sides, count, processors(xs[0].device))
    tries = other_plans(*how.factors.sizes, sides, rule) if searching and form == "int8" else []

    def calls(work: Callable[[Tensor], object]) -> list[Call]:
        return [partial(work, x) for x in xs]

    def ours(chosen: Plan | None) -> list[Call]:
        return calls(lambda x: transform_cuda.encode(x, how, packed, chosen))

    # compiling takes most of the time, and a thread has no context before it has asked torch for something
    with ThreadPoolExecutor(initializer=torch.cuda.mem_get_info) as pool:
        list(pool.map(lambda chosen: ours(chosen)[0](), [None, *tries]))
    steps, triton, cuda, *others = microseconds(
        calls(lambda x: by_steps(x, how)), calls(lambda x: encode_mapped(x, how, packed)), ours(None),
        *(ours(chosen) for chosen in tries), repeats=9,
    )  # fmt: skip
    pair = [work(xs[0], how, packed)[0].view(torch.uint8) for work in (encode_mapped, transform_cuda.encode)]
    differ = float((pair[0] != pair[1]).double().mean())
    limit = (2 * map.width * count + pair[0].numel()) / bandwidth
    cells = (limit, steps, triton, cuda)
    print(
        f"| {name} to {form} | {count} | {' | '.join(f'{cell:.1f}' for cell in cells)} | {steps / cuda:.2f} "
        f"| {triton / cuda:.2f} | {differ:.1e} |",
        flush=True,
    )
    for chosen, time in zip(tries, others, strict=True):
        print(f"    {time:.1f} µs: {chosen}")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[2048])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    parser.add_argument("--maps", nargs="+", default=[""], help="parts of names")
    parser.add_argument("--search", action="store_true", help="try other plans")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    bandwidth = limits()[0]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {bandwidth / 1e6:.2f} TB/s\n")
    print("| | M | limit | steps in torch | Triton | CUDA C++ | times steps | times Triton | differ |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name, map in maps().items():
        if not any(part in name for part in arguments.maps):
            continue
        for form in arguments.forms:
            for count in arguments.tokens:
                row(name, map, form, count, bandwidth, arguments.search)


if __name__ == "__main__":
    main()
