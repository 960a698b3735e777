"""`lowbit speed` where there is no GPU: the limits of the machine, and torch's own operators on codes.

lowbit's linears compute on a dense copy there. What torch offers instead is measured beside it, so that one can see
what there would be to gain.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from .speed_table import Row, Speed
from .timing import Call

SHAPE = (4096, 4096)
"""Inputs and outputs; weights of 32 MB and more, which no cache of one core holds."""


def speed(on_table: Callable[[str], None]) -> Speed:
    """Measure a CPU."""
    bandwidth, rate = limits()
    name = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    found = Speed(name, torch.__version__, bandwidth * 1e6, rate * 1e6)
    table = "products on this CPU"
    on_table(table)
    found.tables[table] = list(rows(bandwidth, rate))
    found.missing.append("there is no CUDA device, so linears compute on dense copies, and no kernel was measured")
    return found


def limits() -> tuple[float, float]:
    """Bytes per microsecond of a copy, operations per microsecond of a product in bf16."""
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    a, b = (torch.randn(1024, 1024).bfloat16() for _ in range(2))
    return 8 * source.numel() / microseconds(lambda: target.copy_(source)), 2 * 1024**3 / microseconds(lambda: a @ b)


def rows(bandwidth: float, rate: float) -> Iterator[Row]:
    """bf16 against torch's operators for weights of 8 and 4 bits, for one token and some."""
    inputs, outputs = SHAPE
    weight = torch.randn(outputs, inputs).bfloat16()
    for bits, make in ((8, int8), (4, int4)):
        for tokens in (1, 16):
            x = torch.randn(tokens, inputs).bfloat16()
            call = make(x, outputs)
            plain = microseconds(lambda x=x: F.linear(x, weight))  # type: ignore[misc]
            theirs = None if call is None else microseconds(call)
            limit = max(inputs * outputs * bits / 8 / bandwidth, 2 * tokens * inputs * outputs / rate)
            yield Row(f"W{bits}A16 {inputs}→{outputs}", tokens, limit, plain, theirs, None)


def int8(x: torch.Tensor, outputs: int) -> Call | None:
    """torch's product with int8 weights, one scale per row."""
    if not hasattr(torch.ops.aten, "_weight_int8pack_mm"):
        return None
    codes = torch.randint(-128, 128, (outputs, x.shape[1]), dtype=torch.int8)
    scale = torch.rand(outputs).bfloat16()
    return runs(lambda: torch.ops.aten._weight_int8pack_mm(x, codes, scale))


def int4(x: torch.Tensor, outputs: int) -> Call | None:
    """torch's product with int4 weights in groups of 128."""
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return None
    codes = torch.randint(0, 16, (outputs, x.shape[1]), dtype=torch.int32)
    scale = torch.rand(x.shape[1] // 128, outputs, 2).bfloat16()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return runs(lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, 128, scale))


def runs(call: Call) -> Call | None:
    """A call, or None where this build of torch has no code for it on a CPU, which it says by a RuntimeError."""
    try:
        call()
    except RuntimeError:
        return None
    return call


def microseconds(call: Call, repeats: int = 5) -> float:
    """The median time of a call."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - began))
    return statistics.median(times)
