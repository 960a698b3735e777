"""DGQ's two searches against naive ones in fp64, and the int8 bound of its format, whoever rounds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit.formats import base, native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.dgq import DGQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics.grid import Grid, fit_range, grid_range
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.spec import E2M1, Int, Spec, per_group
from lowbit.recipes import parse
from lowbit.stream.plan import stored_bytes

F64 = torch.float64


def form(group: int = 16, bits: int = 4) -> Spec:
    return Spec(Int(bits, "asymmetric"), (1, group), "integer")


def heavy(rows: int = 12, columns: int = 64) -> Tensor:
    """Weights whose groups differ widely in range, some of them to one side."""
    weight = torch.randn(rows, columns) * torch.rand(rows, columns // 16).mul(2).exp().repeat_interleave(16, 1)
    return torch.where(torch.rand_like(weight) < 0.03, 5 * weight, weight) * 0.01


def seen(width: int = 64) -> tuple[Stats, Tensor]:
    x = torch.randn(200, width) @ torch.randn(width, width)
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return stats, x


def int8_of(part: QTensor) -> tuple[Tensor, Tensor, Tensor]:
    """((q - z) n, n per column, S per row): what a kernel has before it multiplies."""
    grid = part.grid
    assert grid.zero is not None and grid.outer is not None
    width = part.codes.shape[1] // grid.scale.shape[1]
    integers = (grid.scale.double() / grid.outer.double()).repeat_interleave(width, 1)
    levels = part.codes.double() - grid.zero.double().repeat_interleave(width, 1)
    return levels * integers, integers, grid.outer.double()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("clip", [DGQ(), MinMaxClip()])
@pytest.mark.parametrize("round", [RTN(), GPTQ()])
def test_values_are_int8_numbers_times_a_scale_per_row(bits: int, clip: DGQ | MinMaxClip, round: RTN | GPTQ) -> None:
    weight, (stats, _) = heavy(), seen()
    part = round.round(weight, form(16, bits), clip, stats, scores=False)
    values, integers, scale = int8_of(part)
    assert torch.equal(integers, integers.round()) and integers.min() >= 1 and integers.max() <= 127
    assert values.abs().max() <= 127
    assert torch.equal(part.dequantize().double(), values * scale)  # no rounding on the way: fp32 holds all products
    assert torch.equal(scale.bfloat16().double(), scale)


def test_levels_end_where_the_integers_say() -> None:
    """The bound is felt, and codes stop right at ⌊127/n⌋ steps from zero."""
    weight, (stats, _) = heavy(64), seen()
    part = RTN().round(weight, form(), DGQ(), stats, scores=False)
    values, integers, _ = int8_of(part)
    limit, levels = (127 / integers).floor(), values / integers
    free = torch.clamp((weight / part.grid.scale.repeat_interleave(16, 1)).round(), -15, 15)
    zero = part.grid.zero.repeat_interleave(16, 1)
    expected = torch.minimum(torch.maximum(free.double(), -zero.double()), 15 - zero.double()).clamp(-limit, limit)
    assert torch.equal(levels, expected)
    assert ((levels.abs() == limit) & (free.abs() > limit)).any()


def oracle(weight: Tensor, h: Tensor, group: int, ratios: list[float], rows: list[float]) -> list[tuple[Tensor, float]]:
    """(scales of groups, S) of every row: both searches by loops."""
    found = []
    for row in weight.double():
        real, zeros = [], []
        for start in range(0, len(row), group):
            w, block = row[start : start + group], h[start : start + group, start : start + group]
            tried = []
            for ratio in ratios:
                low, high = min(float(w.min()) * ratio, 0.0), max(float(w.max()) * ratio, 0.0)
                s = (high - low) / 15
                z = min(max(round(-low / s), 0), 15)
                d = s * ((w / s).round().clamp(-z, 15 - z)) - w
                tried.append((float(d @ block @ d), s, z))
            _, s, z = min(tried, key=lambda each: each[0])
            real.append(s)
            zeros.append(z)
        tried = []
        for ratio in rows:
            outer = float(torch.tensor(float(row.abs().max()) * ratio / 127).bfloat16())
            n = [min(max(round(s / outer), 1), 127) for s in real]
            loss = 0.0
            for i, (k, z) in enumerate(zip(n, zeros, strict=True)):
                part = slice(i * group, (i + 1) * group)
                limit = 127 // k
                levels = (row[part] / (k * outer)).round().clamp(max(-z, -limit), min(15 - z, limit))
                d = levels * k * outer - row[part]
                loss += float(d @ h[part, part] @ d)
            tried.append((loss, torch.tensor([k * outer for k in n], dtype=F64), outer))
        found.append(min(tried, key=lambda each: each[0])[1:])
    return found


@pytest.mark.parametrize("aware", [True, False])
def test_both_searches_find_what_loops_find(aware: bool) -> None:
    weight, (stats, _) = heavy(6), seen()
    h = stats.hessian().double() if aware else torch.eye(64, dtype=F64)
    grid = DGQ().fit(weight, form(), stats if aware else None, scores=False)
    ratios, rows = torch.linspace(1.02, 0.8, 20).tolist(), torch.linspace(0.2, 1.02, 80).tolist()
    for row, (scales, outer) in enumerate(oracle(weight, h, 16, ratios, rows)):
        assert float(grid.outer[row, 0]) == outer
        assert torch.equal(grid.scale[row].double(), scales)


def test_where_scales_are_integers_of_one_it_is_the_group_quantizer() -> None:
    """Integer scales then lose nothing: every weight is a level of its group's real-valued grid, and of this one."""
    integers = torch.tensor([[3, 5, 12, 7], [8, 1, 9, 2]]).repeat_interleave(16, 1)
    codes = torch.randint(0, 16, (2, 64)).view(2, 4, 16)
    codes[..., 0], codes[..., 1] = 0, 15
    weight = 2.0**-9 * (integers * (codes.view(2, 64) - 7)).float()
    exact = [2.0**-9 * 127 / float(row.abs().max()) for row in weight]
    for row, ratio in zip(weight, exact, strict=True):
        dgq = DGQ(groups=2, wide=1.0, narrow=0.8, rows=2, least=ratio, most=2 * ratio)
        grid = dgq.fit(row[None], form(), None, scores=False)
        plain = fit_range(row[None], Spec(Int(4, "asymmetric"), (1, 16), "float32"))
        assert torch.equal(grid.quantize(row[None]), row[None])
        assert torch.equal(grid.scale, plain.scale) and torch.equal(grid.encode(row[None]), plain.encode(row[None]))


def test_integers_cost_little_beside_real_scales() -> None:
    weight, (stats, x) = heavy(64), seen()

    def loss(grid: Grid) -> float:
        return float((x @ (grid.quantize(weight) - weight).T).square().sum())

    found, plain = (loss(clip.fit(weight, form(), stats, scores=False)) for clip in (DGQ(), MinMaxClip()))
    assert found < plain
    assert found < 1.25 * loss(fit_range(weight, per_group(Int(4, "asymmetric"), 16)))


def test_rows_do_not_depend_on_each_other() -> None:
    weight, (stats, _) = heavy(300), seen()
    whole = DGQ().fit(weight, form(), stats, scores=False)
    alone = DGQ().fit(weight[290:], form(), stats, scores=False)
    assert torch.equal(whole.rows(slice(290, 300)).scale, alone.scale)


# --- the format -------------------------------------------------------------------------------------------------------


def test_the_plain_grid_keeps_every_level_of_its_largest_unit() -> None:
    weight = heavy(32)
    grid = fit_range(weight, form())
    integers = (grid.scale / grid.outer).round()
    assert (integers.amax(1) == 15).all()
    low, high = grid_range(grid)
    assert torch.equal(high - low, 15 * grid.scale)
    zeros = fit_range(torch.zeros(2, 32), form())
    assert torch.equal(zeros.quantize(torch.zeros(2, 32)), torch.zeros(2, 32))


@pytest.mark.parametrize("shape", [(12, 64), (5, 48), (1, 16)])
def test_files_hold_one_byte_a_group_and_a_scale_a_row(shape: tuple[int, int]) -> None:
    part = RTN().round(heavy(*shape), form(), DGQ(), None, scores=False)
    layers = {"x": QLayer(QWeight((part,)))}
    tensors = native.pack("x", layers["x"])
    assert tensors["x.scale"].dtype == torch.uint8 and tensors["x.outer"].shape == (shape[0], 1)
    assert sum(tensor.nbytes for tensor in tensors.values()) == stored_bytes(shape, form())
    back = native.unpack(native.describe(layers), tensors)[0]["x"].weight.parts[0]
    assert torch.equal(back.codes, part.codes) and back.grid.spec == part.grid.spec
    for name in ("scale", "zero", "outer"):
        assert torch.equal(getattr(back.grid, name), getattr(part.grid, name))
    assert torch.equal(back.dequantize(), part.dequantize())


def test_names_mean_integer_scales() -> None:
    recipe = parse("dgq-w4a8-g128")
    assert recipe.scheme.weights == form(128) and recipe.clip == DGQ()
    assert recipe.scheme.activations == Spec(Int(8), (1, -1), "float32", dynamic=True)
    assert parse("smoothquant+dgq+gptq-w4a8-g128").scheme == recipe.scheme


def test_other_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dgq is for groups of a row with integer scales"):
        DGQ().outcomes(per_group(Int(4, "asymmetric"), 128))
    with pytest.raises(ValueError, match="integer scales make smaller integers int8, and fp4"):
        Spec(E2M1, (1, 16), "integer")
    model = save_model("llama", tmp_path / "model")
    text = {"calibration": str(save_text(tmp_path / "text.txt")), "samples": 4, "length": 32}
    for name, words in {
        "dgq-nf4-g32": "dgq is for groups",
        "dgq+lkd-w4a8-g32": "lkd trains through plain scales",
    }.items():
        with pytest.raises(ValueError, match=words):
            lowbit.quantize(model, name, tmp_path / "out", **text)


def test_other_files_refuse_it_with_a_reason() -> None:
    for name, each in base.modules():
        reason = each.refuse(form(32), None, shape=(64, 64))
        assert reason is not None and "\n" not in reason, name


@pytest.mark.parametrize("settings", [{"rows": 1}, {"narrow": 2.0}, {"least": 0.0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"candidates|narrow lies"):
        DGQ(**settings)


def test_end_to_end(tmp_path: Path) -> None:
    """What is loaded keeps the bound, and W4A8 stays close to W4A16."""
    model, text = save_model("llama", tmp_path / "model"), str(save_text(tmp_path / "text.txt"))
    recipe = "smoothquant+dgq-w4a8-g32"
    result = lowbit.quantize(
        model, recipe, tmp_path / "out", calibration=text, samples=8, length=32, settings=["smoothquant.down_part=0.05"]
    )
    assert all(block["error_after"] < block["error_before"] for block in result.blocks)
    for file in result.path.glob("*.safetensors"):
        for layer in native.unpack(shard_header(file).metadata, read_shard(file))[0].values():
            values, integers, _ = int8_of(layer.weight.parts[0])
            assert values.abs().max() <= 127 and torch.equal(integers, integers.round())
