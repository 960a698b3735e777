"""AdaDim: which direction it takes is judged by the error written out, and groups along columns hold end to end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import tokens
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import api
from lowbit.formats import base, native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.adadim import AdaDim
from lowbit.methods.base import Clip
from lowbit.methods.gptq import GPTQ
from lowbit.methods.hqq import HQQ
from lowbit.methods.mse import MSEClip
from lowbit.methods.rtn import MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import E2M1, Int, Number, Spec, mx, nvfp4, per_channel, per_group
from lowbit.recipes import parse, resolve
from lowbit.stream.plan import stored_bytes

ALONG = per_group(Int(3), 8)
ACROSS = replace(ALONG, block=(8, 1))


def seen(width: int = 32, loud: int | None = None) -> Stats:
    x = torch.randn(300, width) @ (torch.eye(width) + torch.randn(width, width) / 8)
    if loud is not None:
        x[:, loud] *= 30
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return stats


def weights(rows: int = 16, columns: int = 32) -> Tensor:
    return torch.randn(rows, columns)


def columnar(rows: int = 16, columns: int = 32) -> Tensor:
    """Weights of one size within a column, and of many from column to column."""
    return (2 * torch.rand(rows, columns) - 1) * torch.logspace(-0.6, 0.6, columns)[torch.randperm(columns)]


def error(weight: Tensor, spec: Spec, h: Tensor) -> float:
    """tr(D H Dᵀ), D that of rounding to nearest in units of `spec`, one unit after the other."""
    high, wide = spec.block
    rounded, top = torch.empty_like(weight, dtype=torch.float64), 2**spec.bits - 1
    for i in range(0, len(weight), high):
        for j in range(0, weight.shape[1], wide):
            unit = weight[i : i + high, j : j + wide].double()
            s = float((2 * unit.abs().max() / top).bfloat16())
            rounded[i : i + high, j : j + wide] = s * (unit / s).round().clamp(-(2 ** (spec.bits - 1)), top // 2)
    d = rounded - weight.double()
    return float(torch.trace(d @ h.double() @ d.T))


@pytest.mark.parametrize("seed", range(6))
def test_the_direction_of_least_output_error_is_taken(seed: int) -> None:
    torch.manual_seed(seed)
    weight, stats = weights(), seen(loud=3 if seed % 2 else None)
    if seed % 3 == 0:
        weight[5] *= 8
    errors = {spec: error(weight, spec, stats.hessian()) for spec in (ALONG, ACROSS)}
    grid = AdaDim("minmax").fit(weight, ALONG, stats, scores=False)
    assert grid.spec == min(errors, key=lambda spec: errors[spec])
    assert torch.equal(grid.scale, fit_range(weight, grid.spec).scale)


def test_outlier_columns_and_rows_pull_it_apart() -> None:
    """A loud input whose weights are small wants scales of its own; rows of different sizes want theirs."""
    loud, rows = weights(), weights()
    loud[:, 3] /= 20
    rows *= torch.logspace(-1, 1, 16)[:, None]
    assert AdaDim().fit(loud, ALONG, seen(loud=3), scores=False).spec == ACROSS
    assert AdaDim().fit(rows, ALONG, seen(), scores=False).spec == ALONG


def test_without_statistics_weights_are_compared() -> None:
    weight = columnar()
    assert error(weight, ACROSS, torch.eye(32)) < error(weight, ALONG, torch.eye(32))
    assert AdaDim().fit(weight, ALONG, None, scores=False).spec == ACROSS


def test_rows_that_groups_do_not_divide_stay_as_they_are() -> None:
    weight = columnar(12)
    assert AdaDim().fit(weight, ALONG, None, scores=False).spec == ALONG


@pytest.mark.parametrize(
    ("ranges", "clip", "spec"),
    [
        ("minmax", MinMaxClip(), ALONG),
        ("mse", MSEClip(), ALONG),
        ("hqq", HQQ(), per_group(Int(3, "asymmetric"), 8, scale="float16-min")),
        ("minmax", MinMaxClip(), per_group(Int(2, "asymmetric"), 16)),
        ("mse", MSEClip(), per_group(Int(4), 8)),
    ],
)
def test_both_directions_have_the_ranges_of_its_clip(ranges: str, clip: Clip, spec: Spec) -> None:
    weight = columnar()
    across = replace(spec, block=(spec.block[1], 1))
    grid = AdaDim(ranges).fit(weight, spec, None, scores=False)  # type: ignore[arg-type]
    expected = clip.fit(weight, across, None, scores=False)
    assert grid.spec == across and torch.equal(grid.scale, expected.scale)
    assert torch.equal(grid.quantize(weight), expected.quantize(weight))


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("number", [Int(3), Int(3, "asymmetric")])
def test_gptq_in_groups_along_columns(act_order: bool, number: Number) -> None:
    """Column by column in fp64: error / U_ii goes to the columns behind, every entry rounds in its own unit."""
    weight, stats = columnar(), seen()
    spec = per_group(number, 8)
    part = GPTQ(act_order=act_order).round(weight, spec, AdaDim("minmax"), stats, scores=False)
    assert part.grid.spec.block == (8, 1) and part.order is None
    h = stats.hessian().double()
    order = h.diagonal().argsort(descending=True) if act_order else torch.arange(32)
    h = h[order][:, order] + 0.01 * h.diagonal().mean() * torch.eye(32)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    scale = part.grid.scale.double().repeat_interleave(8, 0)[:, order]
    zero = (
        torch.zeros_like(scale) if part.grid.zero is None else part.grid.zero.double().repeat_interleave(8, 0)[:, order]
    )
    w, rounded = weight.double()[:, order].clone(), torch.empty(16, 32, dtype=torch.float64)
    for i in range(32):
        levels = (w[:, i] / scale[:, i]).round().clamp(number.low - zero[:, i], number.high - zero[:, i])
        rounded[:, i] = levels * scale[:, i]
        w[:, i + 1 :] -= ((w[:, i] - rounded[:, i]) / u[i, i])[:, None] * u[i, i + 1 :]
    assert torch.allclose(part.dequantize()[:, order].double(), rounded, atol=1e-6)


# --- recipes, files and what is refused -------------------------------------------------------------------------------


def plant(model: Path) -> None:
    """Make some linears want groups along columns, whose columns or rows have sizes of their own."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(model / "model.safetensors")
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        weight = tensors[f"model.layers.0.{name}.weight"]
        weight.copy_(columnar(*weight.shape) / 8)
    tensors["model.layers.0.self_attn.k_proj.weight"] *= torch.logspace(-1, 1, 32)[:, None]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(model, text, run) of a recipe that takes both directions."""
    root = tmp_path_factory.mktemp("adadim")
    model, text = save_model("llama", root / "model"), save_text(root / "text.txt")
    plant(model)
    lowbit.quantize(model, "adadim+gptq-w3a16-g16", root / "out", calibration=str(text), samples=8, length=32)
    return model, text, root / "out"


def test_linears_choose_for_themselves(quantized: tuple[Path, Path, Path]) -> None:
    """Queries and keys see the same inputs and yet are rounded apart; what is loaded computes with the codes."""
    model, _, run = quantized
    original, blocks = lowbit.load(model, dtype=torch.float32), {}
    for file in sorted(run.glob("*.safetensors")):
        for name, layer in native.unpack(shard_header(file).metadata, read_shard(file))[0].items():
            (part,) = layer.weight.parts
            blocks[name] = part.grid.spec.block
            original.get_submodule(name).weight.data.copy_(part.dequantize())
    assert blocks["model.layers.0.self_attn.q_proj"] == (16, 1)
    assert blocks["model.layers.0.self_attn.k_proj"] == (1, 16)
    assert {*blocks.values()} == {(1, 16), (16, 1)}
    with torch.no_grad():
        ids = tokens()
        expected, found = (
            each(ids, use_cache=False).logits for each in (original, lowbit.load(run, dtype=torch.float32))
        )
    assert (expected - found).abs().max() <= 1e-5 * expected.abs().max()


def test_both_directions_take_the_same_room() -> None:
    assert stored_bytes((64, 96), per_group(Int(4, "asymmetric"), 16)) == stored_bytes(
        (64, 96), Spec(Int(4, "asymmetric"), (16, 1))
    )


def test_other_files_refuse_groups_along_columns(quantized: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """At plan time, where nothing is known yet but that they may come out so; of a spec; and of a finished model."""
    model, text, run = quantized
    for name, each in base.modules():
        for bits in (4, 8):
            reason = each.refuse(Spec(Int(bits), (32, 1)), None, shape=(64, 64))
            assert reason is not None and "\n" not in reason, name
        with pytest.raises(ValueError) as error:
            lowbit.export(run, tmp_path / name, format=name)
        assert "\n" not in str(error.value), name
        request = api.Request(str(model), "adadim-w4a16-g32", target=name, calibration=str(text), samples=4, length=32)
        with pytest.raises(ValueError):
            api.prepare(request)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("adadim-w4a16", [], "q_proj: adadim turns groups of columns into groups of rows, and int4, per row has none"),
        ("adadim-nvfp4a16", [], "adadim turns groups of columns"),
        ("adadim+gptq-w4a16-g32", ["gptq.groups=fresh"], "gptq would fit again the ranges that adadim chooses"),
        ("adadim+signround-w4a16-g32", [], "signround needs to know which weights share a scale: drop adadim"),
        ("adadim-w4a16-g32", ["adadim.ranges=hqq"], "hqq moves the least value of a unit"),
        ("adadim-w4a16-g32", ["adadim.ranges=awq"], "minmax"),
    ],
)
def test_what_it_cannot_do_is_refused(
    quantized: tuple[Path, Path, Path], name: str, settings: list[str], words: str
) -> None:
    model, text, _ = quantized
    request = api.Request(str(model), name, settings=settings, calibration=str(text), samples=4, length=32)
    with pytest.raises(ValueError, match=words) as error:
        api.prepare(request)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "spec", [per_channel(Int(4)), mx(E2M1), nvfp4(), Spec(Int(4), (16, -1)), Spec(Int(4), (-1, -1))]
)
def test_formats_without_groups_to_turn(spec: Spec) -> None:
    with pytest.raises(ValueError, match="adadim turns groups"):
        AdaDim().outcomes(spec)


def test_names() -> None:
    recipe = parse("adadim+gptq-w4a16-g128")
    assert recipe.clip == AdaDim() and recipe.round == GPTQ() and recipe.scheme.weights == per_group(Int(4), 128)
    changed = resolve(
        "adadim-w4a16-g64",
        settings=["adadim.ranges=hqq", "scheme.weights.rule=asymmetric", "scheme.weights.scale=float16-min"],
    ).recipe
    assert changed.clip == AdaDim("hqq")
