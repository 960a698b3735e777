"""Grids against a scalar oracle written from the formulas, for every rule, width and granularity.

The oracle works on Python numbers, one unit at a time. fp32 arithmetic is exact arithmetic in fp64 rounded once to
fp32 (24 bits fit twice and more into 53), so its results are the same bits as torch's, and everything is compared with
equality. Python's round() is half to even.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

from lowbit.numerics.grid import _CHUNK, Grid, fit_range, grid_from_range, search_mse, search_range
from lowbit.numerics.scales import store_scale
from lowbit.numerics.spec import (
    E2M1,
    E2M3,
    E3M0,
    E3M2,
    E4M3,
    E5M2,
    PLAIN,
    Int,
    Number,
    Rule,
    ScaleDtype,
    Spec,
    per_block,
    per_channel,
    per_group,
    per_head,
    per_tensor,
    per_token,
)

RULES: tuple[Rule, ...] = get_args(Rule)
STORAGES = PLAIN
INTEGERS = [Int(b, r) for r in RULES for b in range(1, 9) if (b, r) != (1, "symmetric-restricted")]
SYMMETRIC = [number for number in INTEGERS if number.symmetric]
FLOATS = [E4M3, E5M2, E3M2, E2M3, E2M1, E3M0]
HALF_STEP = 0.5 + 256 * 2.0**-23
"""Half a step and what fp32 loses of a quotient of up to 256 steps."""


def f32(x: float) -> float:
    return float(struct.unpack("f", struct.pack("f", x))[0])


def stored(scale: float, storage: ScaleDtype) -> float:
    """The nearest number of 8 significant bits, itself a multiple of fp16's smallest step; or fp32 as it is."""
    if storage == "float32":
        return scale
    assert storage == "half"
    mantissa, exponent = math.frexp(min(max(scale, 2.0**-24), 65280.0))
    scale = math.ldexp(round(mantissa * 256), exponent - 8)
    return max(round(scale * 2**24), 1) / 2**24


def oracle(unit: list[float], number: Int, storage: ScaleDtype) -> tuple[list[int], list[float]]:
    """Codes and values of one unit."""
    b, low, high = number.bits, min(unit), max(unit)
    amax = max(abs(low), abs(high))
    signed = (-(2 ** (b - 1)), 2 ** (b - 1) - 1)
    unsigned = (0, 2**b - 1)
    if number.rule in ("asymmetric", "asymmetric-deepspeed"):
        low, high = min(low, 0.0), max(high, 0.0)
    scale, (qmin, qmax) = {
        "symmetric": lambda: (2 * amax / (2**b - 1), signed),
        "symmetric-restricted": lambda: (amax / (2 ** (b - 1) - 1), signed),
        "symmetric-full": lambda: (amax / 2 ** (b - 1), signed),
        "symmetric-unsigned": lambda: (2 * amax / (2**b - 1), unsigned),
        "asymmetric": lambda: (f32(high - low) / (2**b - 1), unsigned),
        "asymmetric-raw": lambda: (f32(high - low) / (2**b - 1), unsigned),
        "asymmetric-deepspeed": lambda: (f32(high - low) / 2**b, unsigned),
    }[number.rule]()
    s = stored(f32(scale), storage) if scale else 1.0
    z = 2 ** (b - 1) if number.rule == "symmetric-unsigned" else 0
    if not number.symmetric:
        z = round(f32(-low / s))
    if number.rule in ("asymmetric", "asymmetric-raw"):
        z = min(max(z, qmin), qmax)  # the former only where its scale was stored smaller than it was computed
    codes = [min(max(round(f32(x / s)) + z, qmin), qmax) for x in unit]
    return codes, [f32(s * (q - z)) for q in codes]


def agrees(x: Tensor, spec: Spec, units: list[list[int]]) -> None:
    """The grid fitted to x equals the oracle on every unit, a list of positions in x.flatten()."""
    assert isinstance(spec.number, Int)
    flat = x.flatten().tolist()
    codes, values = torch.empty(x.numel(), dtype=torch.int32), torch.empty(x.numel())
    for unit in units:
        q, v = oracle([flat[i] for i in unit], spec.number, spec.scale)
        codes[unit], values[unit] = torch.tensor(q, dtype=torch.int32), torch.tensor(v)
    grid = fit_range(x, spec)
    assert grid.scale.numel() == len(units)
    assert torch.equal(grid.encode(x).int(), codes.reshape(x.shape))
    assert torch.equal(grid.quantize(x), values.reshape(x.shape))
    assert torch.equal(grid.decode(grid.encode(x)), values.reshape(x.shape))


def awkward(rows: int, columns: int) -> Tensor:
    """Gaussian rows of many magnitudes, then rows that are all zero, constant, of one sign, and one outlier."""
    x = torch.randn(rows, columns) * torch.logspace(-3, 3, rows)[:, None]
    x[0], x[1], x[2], x[3] = 0, -0.37, torch.rand(columns) + 5, -torch.rand(columns)
    x[4] = 1e-3 * torch.randn(columns)
    x[4, columns // 2] = -250.0
    return x


# --- the oracle, rule by rule and unit by unit ------------------------------------------------------------------------


@pytest.mark.parametrize("number", INTEGERS, ids=str)
def test_every_rule_and_width_equals_the_oracle(number: Int) -> None:
    x = awkward(12, 16)
    for storage in ("half", "float32"):
        agrees(x, per_group(number, 8, scale=storage), torch.arange(12 * 16).reshape(-1, 8).tolist())


Units = Callable[[Tensor], Iterator[Tensor]]
"""Positions [B, T, D] -> the positions of every unit."""
GRANULARITIES: dict[str, tuple[Callable[[Number], Spec], tuple[int, ...], Units]] = {
    "tensor": (per_tensor, (6, 12), lambda p: iter([p])),
    "channel": (per_channel, (6, 12), lambda p: iter(p)),
    "group": (lambda n: per_group(n, 4), (6, 12), lambda p: (row[i : i + 4] for row in p for i in (0, 4, 8))),
    "group of the whole row": (lambda n: per_group(n, -1), (6, 12), lambda p: iter(p)),
    "group wider than the row": (lambda n: per_group(n, 128), (6, 12), lambda p: iter(p)),
    "token": (per_token, (2, 5, 12), lambda p: (token for sequence in p for token in sequence)),
    "head, dynamic": (
        lambda n: per_head(n, 6),
        (2, 5, 12),
        lambda p: (token[i : i + 6] for sequence in p for token in sequence for i in (0, 6)),
    ),
    "head, static": (lambda n: per_head(n, 6, dynamic=False), (5, 12), lambda p: (p[:, i : i + 6] for i in (0, 6))),
    "block": (
        lambda n: per_block(n, 4),
        (6, 10),
        lambda p: (p[i : i + 4, j : j + 4] for i in (0, 4) for j in (0, 4, 8)),
    ),
    "block larger than the matrix": (lambda n: per_block(n, 128), (6, 10), lambda p: iter([p])),
}


@pytest.mark.parametrize("name", GRANULARITIES)
@pytest.mark.parametrize("number", [Int(4), Int(8, "asymmetric"), Int(3, "symmetric-unsigned")], ids=str)
def test_every_granularity_equals_the_oracle(name: str, number: Int) -> None:
    make, shape, units = GRANULARITIES[name]
    if "block" in name and not number.symmetric:
        with pytest.raises(ValueError, match="symmetric"):
            make(number)
        return
    x = torch.randn(shape) + 0.3
    positions = torch.arange(x.numel()).reshape(shape)
    agrees(x, make(number), [unit.flatten().tolist() for unit in units(positions)])


def test_granularities_that_are_the_same_thing() -> None:
    x = torch.randn(10, 24)
    for number in (Int(4), Int(5, "asymmetric"), E4M3, E2M1):
        by_channel = fit_range(x, per_channel(number)).quantize(x)
        assert torch.equal(fit_range(x, per_group(number, -1)).quantize(x), by_channel)
        by_token = fit_range(x, per_token(number)).quantize(x)
        assert torch.equal(fit_range(x, per_group(number, 24, scale="float32")).quantize(x), by_token)
        one_group = fit_range(x.reshape(1, -1), per_group(number, -1)).quantize(x.reshape(1, -1))
        assert torch.equal(fit_range(x, per_tensor(number)).quantize(x), one_group.reshape(10, 24))


@pytest.mark.parametrize("number", [Int(8), Int(8, "asymmetric"), E4M3], ids=str)
def test_static_range_of_seen_values_serves_unseen_ones(number: Number) -> None:
    """Statically one grid per tensor or head, fitted on calibration rows, is used on batches of any shape."""
    seen, unseen = torch.randn(40, 12), 2 * torch.randn(2, 7, 12)
    for spec in (per_tensor(number), per_head(number, 4, dynamic=False)):
        grid = fit_range(seen, spec)
        assert grid.scale.shape == ((1, 1) if spec.block == (-1, -1) else (1, 3))
        one_by_one = torch.stack([grid.quantize(row[None])[0] for row in unseen.reshape(-1, 12)])
        assert torch.equal(grid.quantize(unseen), one_by_one.reshape(2, 7, 12))
        inside = (unseen.amin(), unseen.amax())
        assert grid.quantize(unseen).abs().amax() <= 1.01 * seen.abs().amax() < max(-inside[0], inside[1])


def test_dynamic_range_follows_each_token() -> None:
    x = torch.randn(2, 3, 8)
    louder = x * torch.tensor([1.0, 4.0, 16.0])[:, None]
    spec = per_token(Int(8))
    assert spec.dynamic
    assert torch.equal(
        fit_range(louder, spec).quantize(louder),
        fit_range(x, spec).quantize(x) * torch.tensor([1.0, 4.0, 16.0])[:, None],
    )


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="a group of 128 does not divide 688 columns"):
        fit_range(torch.zeros(2, 688), per_group(Int(4), 128))


@pytest.mark.parametrize("make", [lambda: Int(0), lambda: Int(9), lambda: Int(1, "symmetric-restricted")])
def test_impossible_integers_are_refused(make: Callable[[], Int]) -> None:
    with pytest.raises(ValueError, match="bits"):
        make()


@pytest.mark.parametrize("block", [(0, 1), (1, 0), (-2, 4)])
def test_impossible_units_are_refused(block: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="a unit is at least 1 x 1"):
        Spec(Int(4), block)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "expected"),
    [("symmetric-restricted", (0.517, 0.064, 0.0117)), ("symmetric", (0.263, 0.049, 0.0106))],
)
def test_published_error_of_gaussian_groups_of_64(rule: Rule, expected: tuple[float, ...]) -> None:
    """Relative squared error at 2, 3 and 4 bits; the published figures carry 1 % of sampling noise, all upwards."""
    x = torch.randn(16384, 64)
    for bits, published in zip((2, 3, 4), expected, strict=True):
        grid = fit_range(x, per_channel(Int(bits, rule), scale="float32"))
        error = ((grid.quantize(x) - x).square().sum() / x.square().sum()).item()
        assert 0.984 * published < error < published


def test_slide_vector_of_zeroquant() -> None:
    x = torch.tensor([[-0.4, -0.3, -0.2, -0.1, -0.001, 0, 0.001, 0.1, 0.2, 0.3, 0.4, 0.5, 1, 10, 100]])
    values = fit_range(x, per_tensor(Int(8, "asymmetric"), scale="float32")).quantize(x)[0]
    expected = [-0.394] * 3 + [0.0] * 5 + [0.394] * 4 + [1.181, 9.843, 100.006]
    assert [round(v, 3) for v in values.tolist()] == expected


def test_a_one_signed_row_uses_the_mirrored_range() -> None:
    """The pitfall of unsigned codes with a mid-grid zero: a scale from half the range clips at 7/15 of the maximum."""
    x = torch.rand(4, 32)
    unsigned = fit_range(x, per_channel(Int(4, "symmetric-unsigned"))).quantize(x)
    assert torch.equal(unsigned, fit_range(x, per_channel(Int(4))).quantize(x))
    assert torch.all(unsigned.amax(-1) >= 0.92 * x.amax(-1))


def test_raw_asymmetry_saturates_where_including_zero_does_not() -> None:
    x = torch.linspace(5, 6, 16)[None]
    raw = fit_range(x, per_channel(Int(4, "asymmetric-raw"), scale="float32")).quantize(x)
    assert torch.equal(raw, torch.ones(1, 16))
    included = fit_range(x, per_channel(Int(4, "asymmetric"), scale="float32"))
    assert ((included.quantize(x) - x).abs() <= included.scale * HALF_STEP).all()


def test_ties_are_rounded_before_an_odd_zero_point_is_added() -> None:
    spec = per_channel(Int(4, "asymmetric"), scale="float32")
    grid = Grid(spec, torch.ones(1, 1), torch.full((1, 1), 3.0))
    x = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]])
    assert grid.encode(x).tolist() == [[1, 3, 3, 5, 5]]  # rne(x + 3) would be 2, 2, 4, 4, 6
    assert grid.quantize(x).tolist() == [[-2.0, 0.0, 0.0, 2.0, 2.0]]


def test_zero_points_are_rounded_half_to_even() -> None:
    low, high = torch.tensor([[-0.5], [-1.5], [-2.5]]), torch.tensor([[14.5], [13.5], [12.5]])
    grid = grid_from_range(low, high, per_channel(Int(4, "asymmetric"), scale="float32"))
    assert grid.scale.tolist() == [[1.0]] * 3 and grid.zero is not None
    assert grid.zero.tolist() == [[0.0], [2.0], [2.0]]


@pytest.mark.parametrize("number", [*INTEGERS, *FLOATS], ids=str)
def test_idempotent_finite_and_within_half_a_step(number: Number) -> None:
    x = awkward(12, 16)
    for storage in STORAGES:
        grid = fit_range(x, per_group(number, 8, scale=storage))
        values = grid.quantize(x)
        assert values.isfinite().all()
        assert torch.equal(values[0], torch.zeros(16))
        assert torch.equal(grid.quantize(values), values)
        if isinstance(number, Int):
            scale = grid.scale.repeat_interleave(8, -1)
            zero = 0 if grid.zero is None else grid.zero.repeat_interleave(8, -1)
            inside = (x >= scale * (number.low - zero)) & (x <= scale * (number.high - zero))
            assert inside.float().mean() > (0.3 if number.bits > 1 else 0)
            assert ((values - x).abs() <= HALF_STEP * scale)[inside].all()


@pytest.mark.parametrize("number", INTEGERS, ids=str)
def test_error_over_the_whole_range(number: Int) -> None:
    """Half a step, where a rule covers its whole range; one step more at the end that a rule gives away."""
    x = torch.randn(200, 16)
    x = x[(x.amin(-1) < 0) & (x.amax(-1) > 0)]  # the raw rule covers only such rows
    grid = fit_range(x, per_channel(number, scale="float32"))
    given_away = {"symmetric-full": 0.5, "asymmetric-deepspeed": 1.0}.get(number.rule, 0.0)
    assert ((grid.quantize(x) - x).abs() / grid.scale).amax() <= HALF_STEP + given_away


@pytest.mark.parametrize("number", [*INTEGERS, *FLOATS], ids=str)
def test_extreme_magnitudes_stay_finite_and_zeros_stay_zero(number: Number) -> None:
    x = torch.tensor([[1.0, 0.0, -0.5, 0.25], [1.0, 1.0, 1.0, 0.0]])
    for storage in STORAGES:
        for magnitude in (1e-45, 1e-38, 1e-20, 1e-7, 1e4, 1e37):
            values = fit_range(magnitude * x, per_channel(number, scale=storage)).quantize(magnitude * x)
            assert values.isfinite().all(), (storage, magnitude)
            if magnitude <= 1e4:  # beyond, a half scale itself saturates
                assert torch.equal(values[x == 0], torch.zeros(2)), (storage, magnitude)


@pytest.mark.parametrize("number", [*INTEGERS, *FLOATS], ids=str)
def test_powers_of_two_pass_through(number: Number) -> None:
    x = 100 * torch.randn(8, 32)
    for storage in ("half", "float32"):
        spec = per_group(number, 16, scale=storage)
        values = fit_range(x, spec).quantize(x)
        for factor in (2.0**-3, 2.0, 2.0**5):
            assert torch.equal(fit_range(x * factor, spec).quantize(x * factor), values * factor)


@pytest.mark.parametrize("number", [*SYMMETRIC, *FLOATS], ids=str)
def test_symmetric_formats_are_odd_but_for_the_extra_negative_code(number: Number) -> None:
    x = torch.randn(16, 64)
    grid = fit_range(x, per_group(number, 16))
    positive, negative = grid.quantize(x), fit_range(-x, per_group(number, 16)).quantize(-x)
    lowest = torch.zeros_like(x, dtype=torch.bool)
    if isinstance(number, Int) and number.rule != "symmetric-restricted":
        level = -(2 ** (number.bits - 1))
        lowest = (grid.levels(x) == level) | (grid.levels(-x) == level)
        assert lowest.float().mean() < (0.3 if number.bits > 1 else 1.01)
    assert torch.equal(positive[~lowest], -negative[~lowest])


# --- scales in storage dtype ------------------------------------------------------------------------------------------


def magnitudes_of_every_size() -> Tensor:
    dense = torch.logspace(-44, 38, 20000, dtype=torch.float64).float()
    edges = torch.tensor([2.0**-25, 2.0**-24, 1.5 * 2.0**-24, 2.0**-14, 65280.0, 65504.0, 65536.0, 3e38, 1e-45])
    return torch.cat([dense, edges])


@pytest.mark.parametrize("storage", STORAGES)
def test_stored_scales_are_exact_in_their_dtype(storage: ScaleDtype) -> None:
    scale = magnitudes_of_every_size()
    kept = store_scale(scale, storage)
    for dtype in (torch.bfloat16, torch.float16) if storage == "half" else (getattr(torch, storage),):
        assert torch.equal(kept.to(dtype).float(), kept)
    assert (kept > 0).all() and kept.isfinite().all()
    assert torch.equal(store_scale(kept, storage), kept)


def test_half_scales_keep_eight_bits_of_fp16s_range() -> None:
    scale = magnitudes_of_every_size()
    kept = store_scale(scale, "half")
    assert kept.tolist() == [stored(s, "half") for s in scale.tolist()]
    normal = (scale >= 2.0**-14) & (scale <= 65280)
    assert torch.equal(kept[normal], scale[normal].bfloat16().float())
    assert kept.amin() == 2.0**-24 and kept.amax() == 65280


# --- the search -------------------------------------------------------------------------------------------------------


def loss(x: Tensor, values: Tensor, weight: Tensor | None = None) -> Tensor:
    """Σ|x̂ - x|^2.4 of every group of 8, in fp64."""
    power = (values.double() - x.double()).abs() ** 2.4
    return (power if weight is None else power * weight).unflatten(-1, (-1, 8)).sum(-1)


@pytest.mark.parametrize("number", [Int(2), Int(4), Int(3, "asymmetric"), Int(4, "asymmetric-raw"), E2M1], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_search_finds_the_best_of_all_candidates(number: Number, weighted: bool) -> None:
    """The oracle fits every shrunken range on its own; of every unit the search must return the best of them."""
    x = torch.randn(12, 32) ** 3
    weight = torch.rand(32) ** 2 if weighted else None
    spec = per_group(number, 8)
    found = loss(x, search_mse(x, spec, weight=weight).quantize(x), weight)
    groups = x.unflatten(-1, (-1, 8))
    low, high = groups.amin(-1), groups.amax(-1)
    candidates = [
        loss(x, grid_from_range((1 - i / 100) * low, (1 - i / 100) * high, spec).quantize(x), weight) for i in range(80)
    ]
    best = torch.stack(candidates).amin(0)
    assert torch.allclose(found, best, rtol=1e-5, atol=0)
    assert (found <= candidates[0] * (1 + 1e-6)).all()
    assert (found < 0.9 * candidates[0]).any()


@pytest.mark.parametrize("spec", [per_channel(Int(3)), per_tensor(Int(3)), per_block(Int(3), 8)], ids=str)
def test_mse_search_never_exceeds_the_plain_range(spec: Spec) -> None:
    x = torch.randn(16, 24) ** 3
    searched, plain = search_mse(x, spec), fit_range(x, spec)
    assert searched.scale.shape == plain.scale.shape
    assert ((searched.quantize(x) - x).abs() ** 2.4).sum() <= ((plain.quantize(x) - x).abs() ** 2.4).sum()
    assert (searched.scale <= plain.scale).all() and (searched.scale < plain.scale).any()


def test_search_reads_large_weights_in_pieces_with_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, 16)
    whole = search_mse(x, per_group(Int(3, "asymmetric"), 8))
    monkeypatch.setitem(_CHUNK, "cpu", 3 * 16)
    pieces = search_mse(x, per_group(Int(3, "asymmetric"), 8))
    assert torch.equal(pieces.scale, whole.scale)
    assert pieces.zero is not None and whole.zero is not None and torch.equal(pieces.zero, whole.zero)
    target = torch.arange(10.0)  # row r's error is least where its scale has shrunk by r/10

    def error(difference: Tensor, rows: slice) -> Tensor:
        seen.append(rows)
        return (next(shrunk) - target[rows]).abs()[:, None]

    seen: list[slice] = []
    shrunk = iter(k for _ in range(4) for k in range(10))
    grid = search_range(x, per_channel(Int(4), scale="float32"), [1 - k / 10 for k in range(10)], error)
    ratios = grid.scale / fit_range(x, per_channel(Int(4), scale="float32")).scale
    assert torch.allclose(ratios[:, 0], 1 - target / 10)
    assert {(rows.start, rows.stop) for rows in seen} == {(0, 3), (3, 6), (6, 9), (9, 12)}


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("number", [*INTEGERS, *FLOATS], ids=str)
def test_cuda_makes_the_same_grids_and_codes(number: Number) -> None:
    x = torch.randn(64, 128)
    for storage in STORAGES:
        spec = per_group(number, 32, scale=storage)
        here, there = fit_range(x, spec), fit_range(x.cuda(), spec)
        assert torch.equal(there.scale.cpu(), here.scale)
        assert torch.equal(there.encode(x.cuda()).cpu(), here.encode(x))
        assert torch.equal(there.quantize(x.cuda()).cpu(), here.quantize(x))
