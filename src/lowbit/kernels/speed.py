"""What this machine's kernels are worth: the tables of `lowbit speed`, and what they are held against.

Every figure stands beside the limit that the same run measured, a copy through memory or a large product in bf16, and
beside what torch itself offers for the same work. Where there are no kernels, as on a CPU, the limits are measured, and
torch's own operators on codes, which is what could be used instead.

Shape letters: M tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics.grid import fit_range
from ..numerics.maps import Hadamard, Kronecker, kronecker_sizes, random_orthogonal
from ..numerics.qtensor import QTensor
from ..numerics.spec import E2M1, E4M3, Int, Number, Spec, mx, nvfp4, per_channel, per_group
from . import codes_product, dynamic, weight_only
from .compile import available
from .encoder import Encoder, encoder
from .layout import Prepared, prepare
from .speed_table import Row, Speed
from .timing import Call, limits, microseconds, turns

LLAMA_8B = ((4096, 4096), (4096, 14336), (14336, 4096))
"""Inputs and outputs of o_proj, gate_proj, down_proj."""
WIDTHS = (4096, 14336)
"""Features of the inputs of its linears."""
MANY = 2048
"""Tokens of a prompt."""
_INT4_TOKENS = 128
"""Tokens up to which torch's own int4 operator is measured: it takes longer than 16-bit weights from 16 on."""
FLOATS = {"NVFP4": nvfp4(), "MXFP4": mx(E2M1)}
"""Formats of weights of 4-bit floats."""


def speed(device: torch.device, on_table: Callable[[str], None] = lambda _name: None) -> Speed:
    """Measure a machine; `on_table` hears the name of every table before it is made."""
    torch.manual_seed(0)
    if device.type != "cuda":
        from .speed_cpu import speed as on_cpu

        return on_cpu(on_table)
    rates = limits()
    found = Speed(torch.cuda.get_device_name(device), torch.__version__, rates[0] * 1e6, rates[1] * 1e6)
    if not available(device.index or 0):
        found.missing.append("the kernels know Hopper GPUs only, so models compute on dense copies here")
        return found
    for name, table in TABLES.items():
        on_table(name)
        found.tables[name] = list(table(rates))
    return found


# --- codes of weights -------------------------------------------------------------------------------------------------


def weight_only_rows(
    rates: tuple[float, float],
    shapes: Sequence[tuple[int, int]] = LLAMA_8B,
    widths: Sequence[int] = (4,),
    tokens: Sequence[int] = (1, 16, 64, 256, MANY),
    group: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Row]:
    """Products of 16-bit inputs with integer weights against products in 16 bits."""
    for inputs, outputs in shapes:
        for bits in widths:
            weight = quantized(outputs, inputs, per_group(Int(bits), group))
            for count in tokens:
                x = torch.randn(count, inputs, device="cuda").to(dtype)
                yield weight_only_row(x, weight, rates)


def float_rows(
    rates: tuple[float, float], shapes: Sequence[tuple[int, int]] = LLAMA_8B, tokens: Sequence[int] = (1, 16, 64)
) -> Iterator[Row]:
    """The same with weights of 4-bit floats, in bf16."""
    for inputs, outputs in shapes:
        for spec in FLOATS.values():
            weight = quantized(outputs, inputs, spec)
            for count in tokens:
                yield weight_only_row(torch.randn(count, inputs, device="cuda").bfloat16(), weight, rates)


def weight_only_row(x: Tensor, weight: QTensor, rates: tuple[float, float]) -> Row:
    """One of them, torch's own int4 operator beside it where it takes the format."""
    (count, inputs), outputs, spec = x.shape, weight.shape[0], weight.grid.spec
    weights = copies(prepare(weight))
    rivals: list[list[Call]] = [dense(x, outputs), [partial(weight_only.linear, x, each) for each in weights]]
    group = inputs // weight.grid.scale.shape[1]
    known = isinstance(spec.number, Int) and spec.bits == 4 and group in (32, 64, 128, 256)
    if known and x.dtype == torch.bfloat16 and count <= _INT4_TOKENS:
        rivals.append(torch_int4(x, outputs, group))
    plain, ours, *theirs = microseconds(*rivals)
    limit = max(size(weights[0]) / rates[0], 2 * count * outputs * inputs / rates[1])
    name = next((f"{name}A16" for name, each in FLOATS.items() if each == spec), f"W{spec.bits}A16")
    return Row(f"{name} {inputs}→{outputs}", count, limit, plain, theirs[0] if theirs else None, ours)


def quantized(outputs: int, inputs: int, spec: Spec) -> QTensor:
    """A random weight [N, K]."""
    values = torch.randn(outputs, inputs, device="cuda")
    grid = fit_range(values, spec)
    return QTensor(grid.encode(values), grid)


def dense(x: Tensor, outputs: int) -> list[Call]:
    """Products with weights in the inputs' dtype, of which no cache holds all."""
    count = turns(2 * outputs * x.shape[1])
    weights = [torch.randn(outputs, x.shape[1], device="cuda").to(x.dtype) for _ in range(count)]
    return [partial(F.linear, x, weight) for weight in weights]


def copies(weight: Prepared) -> list[Prepared]:
    """So many equal weights that no cache holds them."""

    def again() -> Prepared:
        high = None if weight.high is None else weight.high.clone()
        return replace(weight, low=weight.low.clone(), high=high, scale=weight.scale.clone())

    return [again() for _ in range(turns(size(weight)))]


def size(weight: Prepared) -> int:
    """Bytes of a weight."""
    parts = (weight.low, weight.high, weight.scale, weight.factor)
    return sum(part.numel() * part.element_size() for part in parts if part is not None)


def torch_int4(x: Tensor, outputs: int, group: int) -> list[Call]:
    """torch's own int4 layer (tinygemm) on random codes, for bf16."""
    inputs = x.shape[1]
    codes = torch.randint(0, 256, (outputs, inputs // 2), dtype=torch.uint8, device="cuda")
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(inputs // group, outputs, 2, device="cuda").bfloat16()
    weights = [packed.clone() for _ in range(turns(codes.numel()))]
    return [partial(torch.ops.aten._weight_int4pack_mm, x, weight, group, scales) for weight in weights]


# --- codes on both sides ----------------------------------------------------------------------------------------------


def codes_rows(
    rates: tuple[float, float],
    shapes: Sequence[tuple[int, int]] = LLAMA_8B[1:],
    tokens: Sequence[int] = (1, 16, 128, MANY),
) -> Iterator[Row]:
    """W8A8, encoding of the inputs included: torch's own product stands beside it with our encoding added to it."""
    for inputs, outputs in shapes:
        for number in (Int(8), E4M3):
            weight = codes_product.operand(quantized(outputs, inputs, per_channel(number, scale="float32")), number)
            for count in tokens:
                yield codes_row(torch.randn(count, inputs, device="cuda").bfloat16(), weight, number, rates)


def codes_row(x: Tensor, weight: codes_product.Operand, number: Number, rates: tuple[float, float]) -> Row:
    """One of them."""
    (count, inputs), outputs = x.shape, len(weight.scale)
    how = encoder(number, None, None, x.device)
    again = [replace(weight, codes=weight.codes.clone()) for _ in range(turns(weight.codes.numel()))]
    codes, scale = dynamic.encode(x, how)
    calls: list[Call] = [partial(codes_product.linear, x, how, each) for each in again]
    rivals: list[list[Call]] = [
        dense(x, outputs),
        calls,
        library_product(codes, scale, again),
        [partial(dynamic.encode, x, how)],
    ]
    plain, ours, *theirs = microseconds(*[rival for rival in rivals if rival])
    read = weight.codes.numel() + 2 * x.numel() + 2 * count * outputs
    limit = max(read / rates[0], count * outputs * inputs / rates[1])  # 8 bits at twice the rate of 16
    name = f"{'int8' if isinstance(number, Int) else 'fp8'} W8A8 {inputs}→{outputs}"
    return Row(name, count, limit, plain, sum(theirs) if len(theirs) > 1 else None, ours)


def library_product(codes: Tensor, scale: Tensor, weights: list[codes_product.Operand]) -> list[Call]:
    """torch's product of the same codes: int8 without scales, fp8 with them; nothing where it takes no so few rows."""
    if codes.dtype == torch.int8:
        return [partial(torch._int_mm, codes, each.codes.T) for each in weights] if len(codes) > 16 else []
    options: dict[str, Any] = {"out_dtype": torch.bfloat16, "use_fast_accum": True}
    scales = [(scale[:, None], each.scale[None]) for each in weights]
    if len(codes) < 16:
        return []
    return [
        partial(torch._scaled_mm, codes, each.codes.T, *pair, **options)
        for each, pair in zip(weights, scales, strict=True)
    ]


# --- inputs to codes --------------------------------------------------------------------------------------------------


def encoding_rows(
    rates: tuple[float, float], widths: Sequence[int] = WIDTHS, tokens: Sequence[int] = (MANY,)
) -> Iterator[Row]:
    """Transform, clipped range and rounding in one kernel against the steps in torch, in bf16 and unclipped."""
    for width in widths:
        (n1, n2), heads = kronecker_sizes(width), width // 128
        sides = (random_orthogonal(n1, 1).float(), random_orthogonal(n2, 2).float())
        maps = {
            "": None,
            f"Hadamard {width} ": Hadamard(width),
            f"Kronecker {n1}×{n2} ": Kronecker(*sides, (n1, n2)),
            f"heads {heads}×128 ": Kronecker(random_orthogonal(heads, 3).float(), None, (heads, 128)),
        }
        clip = torch.tensor([0.9, 0.9], device="cuda")
        for count in tokens:
            xs = [torch.randn(count, width, device="cuda").bfloat16() for _ in range(turns(2 * count * width))]
            for name, map in maps.items():
                for form, number, packed in (("int8", Int(8), False), ("int4", Int(4), True), ("fp8", E4M3, False)):
                    how = encoder(number, map, clip, "cuda")
                    calls: list[Call] = [partial(dynamic.encode, x, how, packed=packed) for x in xs]
                    plain, ours = microseconds([partial(by_steps, x, how) for x in xs], calls, repeats=9)
                    bytes_out = width * count * (1 if not packed else 0.5)
                    limit = (2 * width * count + bytes_out) / rates[0]
                    yield Row(f"{name or f'{width} '}to {form}", count, limit, plain, None, ours)


def by_steps(x: Tensor, how: Encoder) -> tuple[Tensor, Tensor]:
    """What a model written in torch does: factors in the inputs' dtype, every step through memory, a code to a byte."""
    if how.factors is not None:
        n1, n2 = how.factors.sizes
        x = x.view(-1, n1, n2)
        if how.factors.right is not None:
            x = x @ how.factors.right[0, :n2, :n2].to(x.dtype)
        if how.factors.left is not None:
            x = how.factors.left[0, :n1, :n1].to(x.dtype) @ x
        x = x.reshape(-1, n1 * n2)
    amax = x.abs().amax(-1, keepdim=True)
    if isinstance(how.number, Int):
        scale = amax / ((1 << how.number.bits) - 1) * 2
        return (x / scale).round().clamp(how.number.low, how.number.high).to(torch.int8), scale
    scale = amax / 448
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


# --- attention to caches ----------------------------------------------------------------------------------------------


def cache_rows(rates: tuple[float, float]) -> Iterator[Row]:
    """One new token's attention to keys and values in 16 bits and in codes."""
    from .speed_caches import rows

    return rows(rates)


TABLES: dict[str, Callable[[tuple[float, float]], Iterator[Row]]] = {
    "weights in codes, inputs in 16 bits": weight_only_rows,
    "weights in floats of 4 bits, inputs in 16 bits": float_rows,
    "weights and inputs in codes": codes_rows,
    "inputs to codes": encoding_rows,
    "attention of one token to a cache (M: texts)": cache_rows,
}
