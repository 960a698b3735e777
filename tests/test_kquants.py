"""K-quants as a weight format of recipes: grids against loops over Python numbers, fits, rounding, refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from gguf_models import save_wide
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import recipes
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.awq import AWQClip
from lowbit.methods.gptq import GPTQ
from lowbit.methods.imatrix import Imatrix, fit_kquant
from lowbit.methods.mse import MSEClip
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics import kquant as k
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import Int, Spec, kquant, per_group
from lowbit.numerics.stats import Gram
from lowbit.stream.plan import stored_bytes

BITS = range(2, 7)
every = pytest.mark.parametrize("bits", BITS)


def weights(rows: int = 6, columns: int = 512, seed: int = 0) -> Tensor:
    """Rows of different sizes, some units far from zero, one super-block of zeros, one unit without range."""
    draw = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=draw) * torch.logspace(-3, 1, rows)[:, None]
    w[1, 32:64] = w[1, 32:64].abs() + 0.1
    w[2, :256] = 0
    w[3, 64:96] = 0.25
    return w


def statistics(columns: int = 512, seed: int = 1) -> Stats:
    """Inputs whose channels differ in size and go together in pairs."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2048, columns, generator=draw) * torch.logspace(-1, 1, columns)
    x[:, 1::2] += 0.7 * x[:, ::2]
    return Stats(gram=Gram.of(x.T @ x, len(x)), tokens=len(x))


def importance(stats: Stats) -> Tensor:
    return stats.hessian().diagonal() / stats.tokens


def weighted(grid: Grid, w: Tensor, h: Tensor) -> float:
    return float(((grid.quantize(w) - w).square() * h).sum())


def check_stored(grid: Grid) -> None:
    """Scales and offsets are small integers times fp16 numbers of their super-block, no scale's integer 0."""
    form = k.layout(grid.spec)
    assert grid.outer is not None and torch.equal(grid.outer.half().float(), grid.outer)
    c = k.to_scale_codes(grid.scale, grid.outer, grid.spec)
    assert torch.equal(k.effective(c, grid.outer[..., 0]), grid.scale) and bool((c != 0).all())
    assert grid.outer.shape[-1] == 1 + form.minima
    if form.minima:
        assert grid.offset is not None and bool((grid.scale > 0).all() & (grid.offset >= 0).all())
        m = k.to_offset_codes(grid.offset, grid.outer, grid.spec)
        assert torch.equal(k.effective(m, grid.outer[..., 1]), grid.offset)


@every
def test_the_plain_grid_of_every_unit(bits: int) -> None:
    """Against one unit at a time in Python's floats, rounded to fp16 and fp32 where the format does."""
    w, spec = weights(), kquant(bits)
    grid = fit_range(w, spec)
    check_stored(grid)
    form = k.layout(spec)
    for row in range(len(w)):
        for block in range(2):
            units = w[row, 256 * block : 256 * (block + 1)].reshape(form.units, form.width)
            if form.minima:
                least = [max(0.0, -float(u.min())) for u in units]
                ideal = [_f32((float(u.max()) + m) / (2**bits - 1)) for u, m in zip(units, least, strict=True)]
                e = _f16(max(least) / form.largest)
            else:
                least, e = [0.0] * form.units, 0.0
                ideal = [_f32(float(u.abs().max()) / ((2**bits - 1) / 2)) for u in units]
            d = _f16(max(ideal) / form.largest) if max(ideal) else 1.0
            place = slice(form.units * block, form.units * (block + 1))
            expected = [min(max(1, round(_f32(s / d))), form.largest) * d for s in ideal]
            assert grid.scale[row, place].tolist() == expected
            if grid.offset is not None:
                assert grid.offset[row, place].tolist() == [round(_f32(m / e)) * e if e else 0.0 for m in least]


def _f32(x: float) -> float:
    return float(torch.tensor(x, dtype=torch.float64).float())


def _f16(x: float) -> float:
    return float(torch.tensor(_f32(x)).half())


@every
def test_codes_are_the_nearest_and_values_are_s_q_minus_m(bits: int) -> None:
    w, spec = weights(), kquant(bits)
    grid = fit_kquant(w, spec, torch.ones(512), candidates=4, rounds=1)
    codes, values = grid.encode(w), grid.quantize(w)
    number = spec.number
    assert isinstance(number, Int)
    assert torch.equal(grid.decode(codes), values) and torch.equal(grid.levels(w), codes.float())
    width = k.layout(spec).width
    scale = grid.scale.repeat_interleave(width, 1)
    offset = torch.zeros_like(scale) if grid.offset is None else grid.offset.repeat_interleave(width, 1)
    assert torch.equal(values, scale * codes.float() - offset)
    levels = torch.arange(number.low, number.high + 1.0)
    distance = (scale[..., None] * levels - offset[..., None] - w[..., None]).abs().amin(-1)
    assert torch.allclose((values - w).abs(), distance, atol=1e-6, rtol=1e-4)


@every
def test_zeros_come_back_as_zeros(bits: int) -> None:
    for grid in (
        fit_range(weights(), kquant(bits)),
        Imatrix().fit(weights(), kquant(bits), statistics(), scores=False),
    ):
        assert bool((grid.quantize(weights())[2, :256] == 0).all())
        assert bool(grid.scale.isfinite().all())
    nothing = fit_kquant(torch.zeros(2, 256), kquant(bits), torch.zeros(256), candidates=4, rounds=2)
    assert bool((nothing.quantize(torch.zeros(2, 256)) == 0).all())


@every
def test_each_half_step_of_the_fit_helps_and_leaves_what_can_be_stored(bits: int) -> None:
    w, stats, spec = weights(12), statistics(), kquant(bits)
    h = importance(stats)
    errors = []
    for candidates, rounds in ((1, 0), (16, 0), (16, 1), (16, 3)):
        grid = fit_kquant(w, spec, h, candidates=candidates, rounds=rounds)
        check_stored(grid)
        errors.append(weighted(grid, w, h))
    assert errors[3] <= errors[2] < errors[1] < weighted(fit_range(w, spec), w, h)
    searched = AWQClip().fit(w, spec, stats, scores=False)
    check_stored(searched)
    check_stored(MSEClip().fit(w, spec, stats, scores=False))


@every
def test_the_fit_of_one_unit_is_as_good_as_a_fine_search(bits: int) -> None:
    """One super-block of equal units: what is stored limits nothing, so the fit must reach a search of both numbers."""
    spec, form = kquant(bits), k.layout(kquant(bits))
    draw = torch.Generator().manual_seed(3)
    unit, h = torch.randn(form.width, generator=draw), torch.rand(form.width, generator=draw) + 0.1
    grid = fit_kquant(unit.repeat(form.units)[None], spec, h.repeat(form.units), candidates=64, rounds=3)
    found = weighted(grid, unit.repeat(form.units)[None], h.repeat(form.units)) / form.units
    number = spec.number
    assert isinstance(number, Int)
    span = float(unit.max() - unit.min())
    offsets = torch.linspace(0, 1.5 * -float(unit.min()), 200) if form.minima else torch.zeros(1)
    scales = torch.linspace(0.3, 1.5, 400) * (
        span / number.high if form.minima else float(unit.abs().max()) / -number.low
    )
    scales = scales if form.minima else torch.cat([scales, -scales])
    s, m = scales[:, None, None], offsets[None, :, None]
    q = ((unit + m) / s).round().clamp(number.low, number.high)
    best = float(((s * q - m - unit).square() * h).sum(-1).min())
    assert found <= 1.05 * best


@every
def test_gptq_rounds_onto_the_grid_and_loses_less(bits: int) -> None:
    w, stats, spec = weights(12), statistics(), kquant(bits)
    clip = Imatrix(candidates=8, rounds=1)
    plain = RTN().round(w, spec, clip, stats, scores=False)
    swept = GPTQ().round(w, spec, clip, stats, scores=False)
    assert torch.equal(swept.grid.scale, plain.grid.scale)
    assert torch.equal(swept.codes, swept.grid.encode(swept.dequantize()))

    def loss(part: QTensor) -> float:
        d = (part.dequantize() - w).double()
        return float(((d @ stats.hessian().double()) * d).sum())

    assert loss(swept) < loss(plain)
    fresh = GPTQ(groups="fresh")
    assert not fresh.refits(spec) and not fresh.reorders(spec)
    assert torch.equal(fresh.round(w, spec, clip, stats, scores=False).codes, swept.codes)


def test_least_values_in_fp16_are_rounded_before_anything_else() -> None:
    spec = per_group(Int(4, "asymmetric"), 32, scale="float16-min")
    w = weights()
    grid = fit_range(w, spec)
    assert grid.offset is not None and grid.zero is None
    assert torch.equal(grid.offset.half().float(), grid.offset) and torch.equal(grid.scale.half().float(), grid.scale)
    least = w.reshape(6, 16, 32).amin(-1).clamp_max(0)
    assert torch.equal(
        grid.offset, (-least).clamp_min(torch.finfo(torch.half).tiny).half().float().where(least < 0, 0.0)
    )
    assert torch.equal(grid.decode(grid.encode(w)), grid.quantize(w))
    fresh = GPTQ(groups="fresh", act_order=False).round(w, spec, MinMaxClip(), statistics(), scores=False)
    assert fresh.grid.offset is not None and torch.equal(fresh.codes, fresh.grid.encode(fresh.dequantize()))
    again = fit_range(fresh.dequantize(), spec)
    assert math.isclose(float(again.scale.sum()), float(fresh.grid.scale.sum()), rel_tol=0.2)


@every
def test_the_plan_counts_the_bytes_of_blocks(bits: int) -> None:
    expected = {2: 84, 3: 110, 4: 144, 5: 176, 6: 210}[bits]
    assert stored_bytes((3, 512), kquant(bits)) == 3 * 2 * expected


@every
def test_names_yaml_and_formats(bits: int) -> None:
    recipe = recipes.resolve(f"gptq-q{bits}k").recipe
    assert recipe.scheme.weights == kquant(bits) and recipe.scheme.activations is None
    assert recipe.clip == Imatrix() and "gram" in recipe.needs
    assert recipes.from_dict(recipes.to_dict(recipe)).recipe == recipe
    assert recipes.resolve(f"minmax+rtn-q{bits}k").recipe.clip == MinMaxClip()
    with pytest.raises(ValueError, match="is a whole format"):
        recipes.resolve(f"gptq-q{bits}k-g32")
    with pytest.raises(ValueError, match=f"write q{bits}k"):
        Spec(Int(bits, "asymmetric"), (1, 64), "kquant")


def test_formats_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="2 to 6 bits"):
        Spec(Int(8), (1, 16), "kquant")
    with pytest.raises(ValueError, match="no least value"):
        Spec(Int(4), (1, 32), "float16-min")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("model")
    return save_wide("llama", directory / "llama"), save_text(directory / "text.txt")


def test_a_run_stores_what_it_evaluates_at_the_formats_size(llama: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = llama
    options = {"calibration": str(text), "samples": 4, "length": 32, "overrides": ["*.down_proj=q6k"]}
    result = lowbit.quantize(model, "gptq-q4k", tmp_path / "q", **options)
    sites = native.sizes(tmp_path / "q")
    down = 256 * 512
    assert sites.stored_bytes == (sites.quantized_weights - down) * 144 // 256 + down * 210 // 256
    assert result.bits_per_weight == 8 * sites.stored_bytes / sites.quantized_weights
    loaded = lowbit.load(tmp_path / "q", dtype=torch.float32)
    for file in sorted((tmp_path / "q").glob("*.safetensors")):
        for name, layer in native.unpack(shard_header(file).metadata, read_shard(file))[0].items():
            part = layer.weight.parts[0]  # type: ignore[union-attr]
            check_stored(part.grid)
            assert torch.equal(loaded.get_submodule(name).weight, part.dequantize())


def test_rows_that_are_no_super_blocks_and_trained_methods_are_refused(tmp_path: Path) -> None:
    model = save_model("llama", tmp_path / "llama")
    with pytest.raises(ValueError, match=r"super-blocks of 256 columns.*choose"):
        lowbit.quantize(model, "minmax+rtn-q4k", tmp_path / "q")
    with pytest.raises(ValueError, match="signround trains through plain scales"):
        lowbit.quantize(model, "minmax+rtn+signround-q4k", tmp_path / "q")
