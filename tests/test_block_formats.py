"""Block formats, codebooks and constrained scales against loops over Python numbers and torch's own float8 types.

An oracle takes one block at a time and enumerates the values an element can take, decoded from their bit patterns. fp32
arithmetic is fp64 arithmetic rounded once, so results are the same bits as torch's and compared with equality.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

from lowbit.formats import native
from lowbit.formats.compressed_tensors import refuse
from lowbit.methods.gptq import GPTQ
from lowbit.methods.mse import MSEClip
from lowbit.methods.rtn import MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics.grid import _CHUNK, cast_float, fit_range, grid_from_range, grid_range, search_mse, to_values
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.scales import scale_codes, scale_values
from lowbit.numerics.spec import (
    E2M1,
    E2M3,
    E3M0,
    E3M2,
    E4M3,
    E5M2,
    NF4,
    Float,
    Int,
    Number,
    ScaleDtype,
    Spec,
    mx,
    nvfp4,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)
from lowbit.numerics.ste import quantize_range
from lowbit.stream.plan import stored_bytes

EMAX = {E2M1: 2, E2M3: 2, E3M2: 4, E4M3: 8, E5M2: 15, Int(8): 6}
"""Of MX elements: OCP's, but that int8 counts steps, whose implied 2^-6 moves to the scale."""
MX_RULES: tuple[ScaleDtype, ...] = ("e8m0", "e8m0-rceil", "e8m0-ceil", "e8m0-even")
FORMATS: dict[str, Spec] = {
    **{f"mx {number} {rule}": mx(number, scale=rule) for number in EMAX for rule in MX_RULES[:2]},
    "mxfp4 ceil": mx(E2M1, scale="e8m0-ceil"),
    "mxfp8 even": mx(E4M3, scale="e8m0-even"),
    "nvfp4": nvfp4(),
    "int4 with e4m3 scales": per_group(Int(4), 16, scale="e4m3"),
    "nf4": per_group(NF4, 64),
    "nf4 double": per_group(NF4, 32, scale="double"),
    "int3 double": per_group(Int(3), 32, scale="double"),
    "fp4 m2": per_group(E2M1, 32, scale="m2"),
    "fp4 m2-ceil": per_group(E2M1, 32, scale="m2-ceil"),
    "int8 unsigned m2": per_group(Int(8, "symmetric-unsigned"), 16, scale="m2"),
    "fp6 e3m2": per_group(E3M2, 32),
    "fp6 e2m3": per_channel(E2M3),
    "fp4 e3m0": per_group(E3M0, 16, scale="float32"),
    "row chunks": Spec(Int(4), (8, -1)),
}
SPECS = pytest.mark.parametrize("spec", FORMATS.values(), ids=FORMATS)


def f32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


@cache
def levels(number: Number) -> list[tuple[float, int]]:
    """(value, bit pattern) of everything non-negative that an element can be, from its bit patterns."""
    if isinstance(number, Int):
        return [(float(i), i) for i in range(number.high + 1)]
    assert isinstance(number, Float)
    found = []
    for code in range(1 << (number.bits - 1)):
        exponent, mantissa = divmod(code, 1 << number.mantissa)
        fraction = mantissa / (1 << number.mantissa) + (exponent > 0)
        value = math.ldexp(fraction, max(exponent, 1) - number.bias)
        if value <= number.largest:
            found.append((value, code))
    return found


def nearest(y: float, number: Number) -> float:
    """The nearest level of y, of two the one with the even pattern; beyond the largest, the largest."""
    if isinstance(number, Int):
        return float(min(max(round(y), number.low), number.high))
    size = min(abs(y), levels(number)[-1][0])
    value = min(levels(number), key=lambda level: (abs(level[0] - size), level[1] % 2))[0]
    return math.copysign(value, y)


def log2_floor(x: float) -> int:
    return math.frexp(x)[1] - 1


def blocks(x: Tensor, size: int) -> list[list[float]]:
    return x.reshape(-1, size).tolist()


def awkward(columns: int = 64) -> Tensor:
    """Gaussian rows of many magnitudes; powers of two; just below them; zeros; one sign; an outlier; the extremes."""
    torch.manual_seed(0)
    x = torch.randn(16, columns) * torch.logspace(-4, 3, 16)[:, None]
    x[0], x[1] = 0, torch.linspace(5, 6, columns)
    x[2, ::32], x[3, ::32] = 64.0, torch.tensor(64.0).nextafter(torch.tensor(0.0))
    x[4, 5], x[5, :40] = 1e4, 0
    return x


# --- minifloats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [E4M3, E5M2, E3M2, E2M3, E2M1, E3M0], ids=str)
def test_cast_equals_frexp_on_every_exponent(number: Float) -> None:
    """Every sign, exponent and leading mantissa bit of fp32, each with four endings: zero, infinity, NaN included."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    x = torch.cat([upper | ending for ending in (0, 1, 0x8000, 0xFFFF)]).view(torch.float32)
    exponent = (torch.frexp(x).exponent - 1).clamp_min(1 - number.bias)
    step = torch.exp2((exponent - number.mantissa).double())
    expected = ((x / step).round() * step).clamp(-number.largest, number.largest).float()
    found = cast_float(x, number)
    assert torch.equal(found.isnan(), x.isnan())
    assert torch.equal(found[~x.isnan()].view(torch.int32), expected[~x.isnan()].view(torch.int32))


def test_e3m0_switches_half_way() -> None:
    edges = torch.tensor([0.375, 0.75, 1.5, 3.0, 6.0, 12.0])
    assert cast_float(edges, E3M0).tolist() == [0.5, 1, 2, 4, 8, 16]
    assert cast_float(edges.nextafter(torch.zeros(6)), E3M0).tolist() == [0.25, 0.5, 1, 2, 4, 8]


# --- MX ---------------------------------------------------------------------------------------------------------------


def mx_exponent(amax: float, number: Number, rule: str) -> int:
    if amax == 0:
        return -127
    if rule == "e8m0-rceil":
        largest = 127.5 if isinstance(number, Int) else number.largest
        scale = f32(amax / largest)
        exponent = log2_floor(scale) + (math.frexp(scale)[0] != 0.5) if scale else -127
    else:
        mantissa = 6 if isinstance(number, Int) else number.mantissa
        if rule == "e8m0-even":
            ulp = math.ldexp(1.0, log2_floor(amax) - mantissa)
            amax = ulp * (round(amax / ulp) if mantissa else math.floor(amax / ulp + 0.5))
        exponent = log2_floor(amax) + (rule == "e8m0-ceil" and math.frexp(amax)[0] != 0.5) - EMAX[number]
    return min(max(exponent, -127), 127)


@pytest.mark.parametrize("rule", MX_RULES)
@pytest.mark.parametrize("number", EMAX, ids=str)
def test_mx_equals_a_loop_over_blocks(number: Number, rule: ScaleDtype) -> None:
    x = torch.cat([awkward(), torch.tensor([[1e-38], [2.0**-125], [3e38], [-1.7e38]]) * torch.rand(4, 64)])
    grid = fit_range(x, mx(number, scale=rule))
    scales, values = [], []
    for block in blocks(x, 32):
        scale = math.ldexp(1.0, mx_exponent(max(map(abs, block)), number, rule))
        scales.append(scale)
        values += [nearest(f32(v / scale), number) * scale for v in block]
    assert grid.scale.flatten().tolist() == scales
    assert grid.quantize(x).flatten().tolist() == values
    assert torch.equal(grid.decode(grid.encode(x)), grid.quantize(x))
    assert scale_codes(grid.scale, rule, None).flatten().tolist() == [log2_floor(scale) + 127 for scale in scales]


def test_mx_saturates_by_the_floor_rule_only() -> None:
    x = torch.randn(512, 32)
    amax = x.abs().amax(-1, keepdim=True)
    floor, rceil = (fit_range(x, mx(E2M1, scale=rule)) for rule in ("e8m0", "e8m0-rceil"))
    reach = amax / floor.scale
    beyond = (reach > 6).squeeze()
    assert ((reach >= 4) & (reach < 8)).all() and 0.1 < beyond.float().mean() < 0.6
    assert torch.equal(floor.quantize(x).abs().amax(-1, keepdim=True)[beyond], 6 * floor.scale[beyond])
    assert (amax <= 6 * rceil.scale).all() and (amax > 3 * rceil.scale).all()


@pytest.mark.parametrize(
    ("scale", "published"), [("float32", 0.0103), ("e8m0", 0.0133), ("e8m0-rceil", 0.0133), ("e8m0-ceil", 0.0207)]
)
def test_published_gaussian_error_of_mxfp4(scale: ScaleDtype, published: float) -> None:
    torch.manual_seed(1)
    assert relative_error(torch.randn(65536, 32), mx(E2M1, scale=scale)) == pytest.approx(published, rel=0.01)


def relative_error(x: Tensor, spec: Spec) -> float:
    return ((fit_range(x, spec).quantize(x) - x).square().sum() / x.square().sum()).item()


# --- NVFP4 ------------------------------------------------------------------------------------------------------------


def nvfp4_oracle(x: Tensor) -> Tensor:
    """x̂ = t g E2M1(x/(t g)) with one g for all of x."""
    g = f32(f32(x.abs().max().item() / 6) / 448) or 1.0
    g = f32(1 / f32(1 / g))  # what the inverse in a file stands for
    values = []
    for block in blocks(x, 16):
        free = f32(f32(max(map(abs, block)) / 6) / g)
        t = torch.tensor(min(max(free, 2.0**-6), 448.0)).to(torch.float8_e4m3fn).item()
        scale = f32(t * g)
        values += [f32(nearest(f32(v / scale), E2M1) * scale) for v in block]
    return torch.tensor(values).reshape(x.shape)


def test_nvfp4_equals_a_loop_over_blocks() -> None:
    for x in (torch.randn(8, 64), awkward(), 1e-6 * torch.randn(4, 32), torch.zeros(2, 16)):
        assert torch.equal(fit_range(x, nvfp4()).quantize(x), nvfp4_oracle(x))


def test_nvfp4_inputs_have_a_tensor_scale_per_token() -> None:
    x = torch.randn(2, 5, 64) * torch.logspace(-3, 3, 5)[:, None]
    found = fit_range(x, nvfp4(dynamic=True)).quantize(x)
    for i in range(2):
        for j in range(5):
            assert torch.equal(found[i, j], nvfp4_oracle(x[i, j]))


def test_the_tensor_scale_keeps_small_tensors_from_underflow() -> None:
    x = torch.randn(16, 64)
    small = 2.0**-30 * x  # E4M3 alone ends at 2^-9
    assert torch.equal(fit_range(small, nvfp4()).quantize(small), 2.0**-30 * fit_range(x, nvfp4()).quantize(x))
    assert relative_error(small, nvfp4()) < 0.01


# --- NF4 --------------------------------------------------------------------------------------------------------------


def test_nf4_table_is_gaussian_quantiles() -> None:
    inverse, p = NormalDist().inv_cdf, 0.9677083
    below = [-inverse(p + (0.5 - p) * i / 7) for i in range(7)]
    above = [inverse(p + (0.5 - p) * i / 8) for i in range(8)]
    table = sorted([*above, 0.0, *below])
    largest = max(map(abs, table))
    assert [v / largest for v in table] == pytest.approx(NF4.levels, abs=1e-5)
    assert {-1.0, 0.0, 1.0} < {*NF4.levels} and len(NF4.levels) == 16 and sorted(NF4.levels) == [*NF4.levels]
    assert torch.equal(to_values(torch.arange(16, dtype=torch.uint8), NF4), torch.tensor(NF4.levels))


def test_nf4_finds_the_nearest_entry() -> None:
    x = awkward(128)
    grid = fit_range(x, per_group(NF4, 64, scale="float32"))
    for block, codes in zip(blocks(x, 64), blocks(grid.encode(x), 64), strict=True):
        scale = max(map(abs, block)) or 1.0
        for value, code in zip(block, codes, strict=True):
            distances = [abs(value / scale - entry) for entry in NF4.levels]
            assert distances[int(code)] <= min(distances) + 1e-7
        assert max(map(abs, block)) == 0 or {0, 15} & {*codes}
    assert torch.equal(grid.quantize(x)[0], torch.zeros(128))


def test_double_quantization_equals_a_loop_over_blocks() -> None:
    x = torch.randn(30, 32 * 20) * (1 + torch.rand(30, 1))
    x[3, 32:64] = 0
    grid = fit_range(x, per_group(NF4, 32, scale="double"))
    scales = x.reshape(-1, 32).abs().amax(-1)
    mean, outer = scales.mean(), [scales.mean().item()]
    expected = []
    for block in scales.split(256):
        step = f32((block - mean).abs().max().item() / 127)
        outer.append(step)
        for scale in (block - mean).tolist():
            code = max(min(round(f32(scale / step)), 127), -127, math.ceil(0.5 - f32(mean.item() / step)))
            expected.append(f32(mean.item() + f32(code * step)))
    assert grid.outer is not None and grid.outer.tolist() == [outer]
    assert grid.scale.flatten().tolist() == expected
    assert (grid.scale > 0).all()
    plain = grid.scale.flatten()[scales > 0] / scales[scales > 0]
    assert (plain - 1).abs().max() < 0.02


def test_double_quantization_costs_next_to_nothing() -> None:
    x = torch.randn(256, 4096)
    single, double = (per_group(NF4, 64, scale=scale) for scale in ("float32", "double"))
    assert relative_error(x, double) == pytest.approx(relative_error(x, single), rel=1e-3)
    assert 8 * stored_bytes((256, 4096), double) / x.numel() == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert 8 * stored_bytes((256, 4096), single) / x.numel() == 4.5


@pytest.mark.parametrize("x", [torch.ones(4, 64), torch.zeros(4, 64), 1e-42 * torch.ones(4, 64)], ids=str)
def test_double_quantization_of_scales_that_are_all_the_same(x: Tensor) -> None:
    values = fit_range(x, per_group(NF4, 32, scale="double")).quantize(x)
    assert values.isfinite().all()
    if x.max() in (0, 1):
        assert torch.equal(values, x)


# --- powers of two of ZeroQuant-FP ------------------------------------------------------------------------------------


def grouped(scale: ScaleDtype, size: int = 256) -> Spec:
    return per_group(E2M1, size, scale=scale)


@pytest.fixture(scope="module")
def gaussian() -> Tensor:
    return torch.randn(512, 4096, generator=torch.Generator().manual_seed(2))


def test_m1_takes_the_next_power_of_two(gaussian: Tensor) -> None:
    x = gaussian[:64]
    free, found = (fit_range(x, grouped(scale)).scale for scale in ("float32", "e8m0-rceil"))
    assert (torch.frexp(found).mantissa == 0.5).all()
    assert (found >= free).all() and (found < 2 * free).all()


@pytest.mark.parametrize("rule", ["m2", "m2-ceil"])
def test_m2_divides_the_rows_largest_scale_by_powers_of_two(rule: ScaleDtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 1024) * torch.logspace(-2.2, 0, 16).repeat_interleave(64)
    x[0] = torch.tensor(1.0).div(torch.tensor(2.0).pow(torch.arange(16) % 8)).repeat_interleave(64)  # exact powers
    free, grid = fit_range(x, grouped("float32", 64)).scale, fit_range(x, grouped(rule, 64))
    assert grid.outer is not None and torch.equal(grid.outer, free.amax(-1, keepdim=True))
    n = (grid.outer / grid.scale).log2()
    assert torch.equal(n, n.round()) and torch.equal(grid.scale, grid.outer * torch.exp2(-n))
    assert torch.equal(grid.scale[free == grid.outer], free[free == grid.outer])
    ratio = grid.scale.double() / free.double()
    inside = n < 8
    assert (ratio[inside] >= 1).all() and (ratio[inside] < 2).all() if rule == "m2" else (ratio[inside] <= 1).all()
    assert (ratio > 0.5).all() and torch.equal(ratio[0], torch.ones(16).double())


def test_m2_stays_within_what_fp8_holds_exactly() -> None:
    """Groups smaller than 2^-8 of their row's largest keep its scale; zero groups have one as well."""
    x = torch.ones(1, 64) * torch.tensor([1.0, 2.0**-8, 2.0**-12, 0.0]).repeat_interleave(16)
    for rule in ("m2", "m2-ceil"):
        grid = fit_range(x, grouped(rule, 16))
        assert scale_codes(grid.scale, rule, grid.outer).tolist() == [[0, 8, 8, 8]]
        assert grid.quantize(x).isfinite().all()
    assert torch.equal(fit_range(0 * x, grouped("m2", 16)).quantize(0 * x), 0 * x)


@pytest.mark.parametrize(
    ("scale", "published"), [("float32", 0.0124), ("e8m0-rceil", 0.0182), ("m2", 0.0142), ("m2-ceil", 0.0236)]
)
def test_published_gaussian_error_of_constrained_scales(gaussian: Tensor, scale: ScaleDtype, published: float) -> None:
    """Half of all M1 scales are twice the others, which carries 2 % of sampling noise into the published figures."""
    assert relative_error(gaussian, grouped(scale)) == pytest.approx(published, rel=0.025)


def test_constraints_cost_in_this_order(gaussian: Tensor) -> None:
    free, m2, m1 = (relative_error(gaussian, grouped(scale)) for scale in ("float32", "m2", "e8m0-rceil"))
    assert free < m2 < m1
    one, same = (fit_range(gaussian[:9], per_channel(E2M1, scale=scale)) for scale in ("m2", "float32"))
    assert torch.equal(one.scale, same.scale)
    heavy = torch.distributions.StudentT(4.0).sample((256, 4096))
    assert relative_error(heavy, grouped("m2-ceil")) < relative_error(heavy, grouped("m2"))


def test_a_range_search_chooses_floor_or_ceiling_per_group(gaussian: Tensor) -> None:
    x = gaussian[:32] ** 3

    def loss(grid: object) -> Tensor:
        return (grid.quantize(x) - x).abs().pow(2.4).unflatten(-1, (-1, 256)).sum(-1)  # type: ignore[attr-defined]

    floor, ceil = (fit_range(x, grouped(rule)) for rule in ("m2", "m2-ceil"))
    searched = search_mse(x, grouped("m2"))
    best = torch.minimum(loss(floor), loss(ceil))
    assert (loss(searched) <= best * (1 + 1e-5)).all()
    assert (loss(ceil) < loss(floor)).any() and (loss(floor) < loss(ceil)).any()
    assert searched.outer is not None and torch.equal(searched.outer, floor.outer)


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [(torch.float8_e4m3fn, -8, 6), (torch.float8_e5m2, -15, 13)], ids=["e4m3", "e5m2"]
)
def test_fp8_holds_shifted_fp4_exactly(dtype: torch.dtype, low: int, high: int) -> None:
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    for k in range(low, high + 1):
        shifted = values * 2.0**k
        assert torch.equal(shifted.to(dtype).float(), shifted)
    for k in (low - 1, high + 1):
        shifted = values * 2.0**k
        assert not torch.equal(shifted.to(dtype).float(), shifted)


def test_an_fp8_product_computes_what_m2_means() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(16, 512), torch.randn(24, 512) * torch.logspace(-1.5, 0, 8).repeat_interleave(64)
    inputs, grid = fit_range(x, per_token(E4M3)), fit_range(w, grouped("m2", 64))
    assert grid.outer is not None
    n = scale_codes(grid.scale, "m2", grid.outer)
    shift = torch.exp2(-n.float()).repeat_interleave(64, -1)
    operand = (grid.levels(w) * shift).to(torch.float8_e4m3fn)
    assert n.max() > 2
    assert torch.equal(operand.float() * grid.outer, grid.quantize(w))
    product = inputs.levels(x).to(torch.float8_e4m3fn).double() @ operand.double().T
    expected = inputs.quantize(x).double() @ grid.quantize(w).double().T
    assert torch.allclose(product * inputs.scale * grid.outer.T, expected, rtol=1e-5, atol=1e-6 * expected.abs().max())


def test_fp8_serves_small_inputs_beside_outliers_better_than_int8() -> None:
    x = torch.tensor([[-0.4, -0.3, -0.2, -0.1, -0.001, 0, 0.001, 0.1, 0.2, 0.3, 0.4, 0.5, 1, 10, 100]])
    small = (x.abs() > 0) & (x.abs() <= 0.5)
    fp8, int8 = (((fit_range(x, per_token(n)).quantize(x) - x).abs() / x.abs())[small].mean() for n in (E4M3, Int(8)))
    assert fp8 < 0.2 * int8


# --- ZeroQuant's row chunks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [Int(4), Int(8, "symmetric-full"), Int(4, "asymmetric"), E2M1], ids=str)
def test_row_chunks(number: Number) -> None:
    """G groups of out/G whole rows: G = out is per row, G = 1 per tensor, in between a loop over chunks agrees."""
    x = torch.randn(24, 16) * torch.logspace(-2, 1, 24)[:, None]
    values = {g: fit_range(x, Spec(number, (24 // g, -1))).quantize(x) for g in (24, 6, 1)}
    assert torch.equal(values[24], fit_range(x, per_channel(number)).quantize(x))
    assert torch.equal(values[1], fit_range(x, per_tensor(number)).quantize(x))
    for chunk, found in zip(x.split(4), values[6].split(4), strict=True):
        flat = chunk.reshape(1, -1)
        assert torch.equal(fit_range(flat, per_channel(number)).quantize(flat).reshape(4, 16), found)


# --- every format -----------------------------------------------------------------------------------------------------


@SPECS
def test_codes_mean_the_rounded_values(spec: Spec) -> None:
    x = awkward()
    grid = fit_range(x, spec)
    values = grid.quantize(x)
    assert values.isfinite().all() and torch.equal(values[0] if spec.block[0] == 1 else 0 * x[0], torch.zeros(64))
    assert torch.equal(grid.decode(grid.encode(x)), values)
    assert torch.equal(grid.quantize(values), values)
    assert torch.equal(grid.decode(grid.spell(grid.levels(x))), values)


@SPECS
def test_extreme_magnitudes_stay_finite(spec: Spec) -> None:
    x = torch.tensor([1.0, 0.0, -0.5, 0.25]).repeat(16, 16)
    for magnitude in (1e-45, 1e-38, 1e-20, 1e-7, 1e4, 1e37):
        values = fit_range(magnitude * x, spec).quantize(magnitude * x)
        assert values.isfinite().all(), magnitude
        assert spec.scale == "half" or torch.equal(values[x == 0], torch.zeros(256)), magnitude


@SPECS
def test_powers_of_two_pass_through(spec: Spec) -> None:
    x = torch.randn(16, 64) * torch.logspace(-1, 1, 16)[:, None]
    values = fit_range(x, spec).quantize(x)
    for factor in (2.0**-3, 2.0**5):
        assert torch.equal(fit_range(x * factor, spec).quantize(x * factor), values * factor)


@SPECS
def test_symmetric_formats_are_odd(spec: Spec) -> None:
    if spec.number == NF4:
        pytest.skip("the table of NF4 is not symmetric")
    x = torch.randn(16, 64)
    there, back = fit_range(x, spec).quantize(x), fit_range(-x, spec).quantize(-x)
    lowest = torch.zeros(16, 64, dtype=torch.bool)
    if isinstance(spec.number, Int):
        limit = -(2 ** (spec.bits - 1))
        lowest = (fit_range(x, spec).levels(x) == limit) | (fit_range(-x, spec).levels(-x) == limit)
    assert lowest.float().mean() < 0.2
    assert torch.equal(there[~lowest], -back[~lowest])


@SPECS
def test_search_keeps_what_scales_are_relative_to(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """A searched grid is never worse than the plain one, unit by unit, has the same outer, and can be stored."""
    torch.manual_seed(0)
    x = torch.randn(16, 128) ** 3
    plain, searched = fit_range(x, spec), search_mse(x, spec)

    def loss(values: Tensor) -> Tensor:
        a, b = searched.scale.shape
        return (values - x).abs().pow(2.4).reshape(a, 16 // a, b, 128 // b).sum((1, 3))

    assert (loss(searched.quantize(x)) <= loss(plain.quantize(x)) * (1 + 1e-5)).all()
    assert (searched.outer is None) == (plain.outer is None) == (not spec.relative)
    if plain.outer is not None:
        assert searched.outer is not None and torch.equal(searched.outer, plain.outer)
    assert torch.equal(restored(searched), searched.scale)
    monkeypatch.setitem(_CHUNK, "cpu", 3 * 128)
    pieces = search_mse(x, spec)
    assert torch.equal(pieces.scale, searched.scale)


def restored(grid: object) -> Tensor:
    """The scales that come back from what a file holds of them."""
    kind, outer = grid.spec.scale, grid.outer  # type: ignore[attr-defined]
    return scale_values(scale_codes(grid.scale, kind, outer), kind, outer)  # type: ignore[attr-defined]


@SPECS
def test_a_grid_covers_its_own_range(spec: Spec) -> None:
    if spec.scale in ("m2-ceil", "double"):
        pytest.skip("which ranges were fitted is lost in these scales")
    grid = fit_range(torch.randn(16, 64), spec)
    assert torch.allclose(grid_from_range(*grid_range(grid), spec).scale, grid.scale, rtol=1e-6, atol=0)


@SPECS
def test_gradients_pass_and_values_are_the_grids(spec: Spec) -> None:
    x = torch.randn(16, 64, requires_grad=True)
    values = quantize_range(x, spec)
    assert torch.equal(values, fit_range(x.detach(), spec).quantize(x.detach()))
    values.sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0


# --- files ------------------------------------------------------------------------------------------------------------

STORED: dict[str, torch.dtype] = {
    "e8m0": torch.uint8,
    "e8m0-rceil": torch.uint8,
    "e8m0-ceil": torch.uint8,
    "e8m0-even": torch.uint8,
    "e4m3": torch.float8_e4m3fn,
    "m2": torch.uint8,
    "m2-ceil": torch.uint8,
    "double": torch.int8,
    "half": torch.float16,
    "float32": torch.float32,
}


@SPECS
@pytest.mark.parametrize("make", [awkward, lambda: torch.randn(64, 24).T[:, ::1]], ids=["awkward", "transposed"])
def test_files_hold_the_same_numbers(spec: Spec, make: Callable[[], Tensor]) -> None:
    x = make()
    if spec.group > 0 and x.shape[1] % min(spec.group, x.shape[1]):
        pytest.skip("groups do not divide")
    grid = fit_range(x, spec)
    weight = QWeight((QTensor(grid.encode(x), grid),))
    layers = {"a": QLayer(weight)}
    tensors = native.pack("a", layers["a"])
    assert tensors["a.scale"].dtype == STORED[spec.scale]
    assert ("a.outer" in tensors) == spec.relative
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored_bytes((x.shape[0], x.shape[1]), spec)
    found, rest = native.unpack(native.describe(layers), tensors)
    assert not rest
    (part,) = found["a"].weight.parts
    assert part.grid.spec == spec
    assert torch.equal(part.grid.scale, grid.scale) and torch.equal(part.codes, weight.parts[0].codes)
    assert torch.equal(part.dequantize(), grid.quantize(x))
    assert (part.grid.outer is None) == (grid.outer is None)
    on_meta = native.pack("a", QLayer(weight.to("meta")))
    assert {k: (t.shape, t.dtype) for k, t in on_meta.items()} == {k: (t.shape, t.dtype) for k, t in tensors.items()}


@SPECS
def test_stacked_weights_are_cut_apart(spec: Spec) -> None:
    x = torch.randn(16, 64)
    grid = fit_range(x, spec)
    whole = QTensor(grid.encode(x), grid)
    if spec.scale == "double":
        assert not spec.by_row
        with pytest.raises(AssertionError):
            whole.rows(0, 8)
        return
    for cut in (slice(0, 8), slice(8, 16)):
        part = whole.rows(cut.start, cut.stop)
        assert torch.equal(part.dequantize(), whole.dequantize()[cut])
        tensors = native.pack("a", QLayer(QWeight((part,))))
        assert sum(t.numel() * t.element_size() for t in tensors.values()) == stored_bytes((8, 64), spec)


def test_bits_per_value() -> None:
    for spec, bits in ((mx(E2M1), 4.25), (mx(E3M2), 6.25), (mx(E4M3), 8.25), (nvfp4(), 4.5)):
        assert 8 * stored_bytes((4096, 4096), spec) / 4096**2 == pytest.approx(bits, abs=1e-5)


# --- GPTQ -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
@pytest.mark.parametrize("name", ["mx fp4 e2m1 e8m0", "nvfp4", "nf4 double", "fp4 m2", "fp6 e3m2", "fp4 e3m0"])
def test_gptq_fits_groups_under_a_fixed_outer(name: str, groups: str) -> None:
    """What scales are relative to is that of the whole original weight, even for groups fitted on the way."""
    torch.manual_seed(0)
    spec = FORMATS[name]
    mix = torch.randn(128, 128) / 11
    weight, inputs = torch.randn(24, 128), torch.randn(512, 128) @ (torch.eye(128) + mix)
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(inputs)
    for clip in (MinMaxClip(), MSEClip(grid=20)):
        found = GPTQ(groups=groups, block=32).round(weight, spec, clip, stats, scores=False)  # type: ignore[arg-type]
        plain = fit_range(weight, spec)
        if plain.outer is not None:
            assert found.grid.outer is not None and torch.equal(found.grid.outer, plain.outer)
        assert torch.equal(restored(found.grid), found.grid.scale)
        errors = [(inputs @ (w - weight).T).square().sum() for w in (found.dequantize(), plain.quantize(weight))]
        assert errors[0] < 0.8 * errors[1]


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_impossible_specs_are_refused() -> None:
    for scale in ("e8m0", "e4m3", "m2", "double"):
        with pytest.raises(ValueError, match=r"scales have no zero-points: drop the asymmetric rule"):
            per_group(Int(4, "asymmetric"), 32, scale=scale)  # type: ignore[arg-type]
    for scale in ("m2", "m2-ceil", "double"):
        with pytest.raises(ValueError, match=r"relate the groups of a weight: inputs take e8m0 or e4m3 instead"):
            Spec(E4M3, (1, 32), scale, dynamic=True)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("weights", "inputs", "reason"),
    [
        (mx(E2M1), None, None),
        (nvfp4(), nvfp4(), None),
        (
            nvfp4(),
            nvfp4(dynamic=True),
            "compressed-tensors clients need a calibrated tensor scale of NVFP4 inputs, where lowbit finds one for "
            "every token: use nvfp4-static, or nvfp4a16",
        ),
        (
            per_group(NF4, 64),
            None,
            "compressed-tensors export carries E4M3 float weights, not nf4: use fp8, nvfp4 or mxfp4",
        ),
        (
            mx(Int(8)),
            None,
            "compressed-tensors export carries e8m0 scales for fp4 e2m1, fp6 e2m3 and fp8 e4m3 in groups of 32, not "
            "int8, group 32, e8m0 scales: use mxfp4 or mxfp8, or half scales",
        ),
        (
            per_group(Int(4), 32, scale="m2"),
            None,
            "compressed-tensors export carries plain floating-point scales, not m2: use native, or half",
        ),
        (
            per_channel(E4M3),
            mx(E4M3, dynamic=True),
            "compressed-tensors clients multiply MX weights by inputs of the same kind, not fp8 e4m3 by fp8 e4m3, "
            "group 32, e8m0 scales, dynamic: use the same kind, or 16 bits",
        ),
    ],
)
def test_compressed_tensors_refuses(weights: Spec, inputs: Spec | None, reason: str | None) -> None:
    assert refuse(weights, inputs) == reason


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@SPECS
def test_cuda_makes_the_same_numbers(spec: Spec) -> None:
    x = awkward()
    here, there = fit_range(x, spec), fit_range(x.cuda(), spec)
    if spec.scale != "double":  # whose mean is a sum in another order
        assert torch.equal(there.scale.cpu(), here.scale)
        assert torch.equal(there.encode(x.cuda()).cpu(), here.encode(x))
    assert torch.equal(there.quantize(x.cuda()), there.decode(there.encode(x.cuda())))
    assert torch.equal(there.to("cpu").quantize(x), there.quantize(x.cuda()).cpu())
    assert torch.equal(restored(there), there.scale)
