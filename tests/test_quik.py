"""QUIK against the sweep written out in fp64, and its layer against the product written out channel by channel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from beside_oracle import TIE, Beside, example, observe
from gptq_oracle import least_error
from stored import loaded_as_stored
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import recipes
from lowbit.formats import native
from lowbit.methods.base import Clip, Encoded
from lowbit.methods.beside import round_beside
from lowbit.methods.gptq import GPTQ
from lowbit.methods.mse import MSEClip
from lowbit.methods.quik import QUIK
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.modules.linear import QLinear
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QLayer
from lowbit.numerics.spec import E2M1, Int, Spec, per_channel, per_group, per_token

OUTLIERS = [5, 17, 40]
"""The large channels of `example`."""
FOUR = per_channel(Int(4))


def encode(
    weight: Tensor, x: Tensor | None, spec: Spec = FOUR, clip: Clip | None = None, **settings: object
) -> Encoded:
    stats = None if x is None else observe(x)
    return QUIK(**settings).encode(weight, spec, RTN(), clip or MinMaxClip(), stats, scores=False, seed=0)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("spec", "clip"),
    [
        (FOUR, MSEClip()),
        (FOUR, MinMaxClip()),
        (per_group(Int(3, "asymmetric"), 16), MinMaxClip()),
        (per_channel(Int(8)), MinMaxClip()),
        (per_group(E2M1, 32), MinMaxClip()),
    ],
)
def test_codes_and_columns_are_the_oracles(spec, clip, act_order):
    weight, x = example()
    made = encode(weight, x, Spec(spec.number, spec.block, "float32"), clip, columns=3, act_order=act_order)
    assert made.outliers is not None and made.outliers.columns.tolist() == OUTLIERS
    fit = least_error(spec.number) if isinstance(clip, MSEClip) else None
    group = weight.shape[1] if spec.group == -1 else spec.group
    oracle = Beside(weight, x.T @ x, OUTLIERS, spec.number, group, act_order, fit)
    clear = oracle.tie > TIE
    assert clear.double().mean() > 0.5
    values = made.weight.dequantize().double()
    rounded = [j for j in range(weight.shape[1]) if j not in OUTLIERS]
    assert torch.allclose(values[clear][:, rounded], oracle.values[clear][:, rounded], rtol=1e-5, atol=1e-8)
    assert torch.allclose(values[clear][:, OUTLIERS], oracle.values[clear][:, OUTLIERS], rtol=1.1e-3, atol=1e-7)


def test_columns_that_stay_are_the_best_beside_the_codes():
    """No other values of theirs would lower tr((W-Ŵ) H (W-Ŵ)ᵀ): its gradient there is fp16's rounding."""
    weight, x = example()
    made = encode(weight, x, columns=3).weight.dequantize().double()
    h = x.double().T @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(len(h))
    gradient = ((weight - made) @ h)[:, OUTLIERS]
    assert (gradient.abs() <= 2.0**-11 * made[:, OUTLIERS].abs() @ h[OUTLIERS][:, OUTLIERS].abs() + 1).all()
    stale = torch.where(torch.isin(torch.arange(64), torch.tensor(OUTLIERS)), weight, made)
    assert ((weight - stale) @ h)[:, OUTLIERS].abs().mean() > 20 * gradient.abs().mean()


def test_without_outliers_it_is_gptq():
    weight, x = example()
    for settings in ({"columns": 0}, {"columns": 3, "threshold": float(x.abs().max())}):
        made = encode(weight, x, clip=MSEClip(), **settings)
        gptq = GPTQ(act_order=False).round(weight, FOUR, MSEClip(), observe(x), scores=False)
        assert made.outliers is None and made.weight.plain
        assert torch.equal(made.weight.parts[0].codes, gptq.codes)
    above = encode(weight, x, columns=3, threshold=float(x.abs().max()) - 1)
    assert above.outliers is not None and len(above.outliers.columns) == 3


def test_ranges_do_not_see_the_columns_that_stay():
    weight, x = example()
    plain = encode(weight, x, columns=3).weight.parts[0].grid.scale
    wide = weight.clone()
    wide[:, OUTLIERS] *= 100
    assert torch.equal(encode(wide, x, columns=3).weight.parts[0].grid.scale, plain)
    others = [j for j in range(64) if j not in OUTLIERS]
    assert torch.equal(plain, fit_range(weight[:, others], FOUR).scale)


def naive_layer(x: Tensor, weight: Tensor, bits: int) -> Tensor:
    """Outlier channels as they are, the others of every token between their least and largest value and 0."""
    rows = []
    for token in x:
        inside = [float(v) for j, v in enumerate(token) if j not in OUTLIERS]
        low, high = min(0.0, *inside), max(0.0, *inside)
        scale = torch.tensor((high - low) / (2**bits - 1))
        zero = -(torch.tensor(low) / scale).round()
        codes = ((token / scale).round() + zero).clamp(0, 2**bits - 1)
        seen = (codes - zero) * scale
        seen[OUTLIERS] = token[OUTLIERS]
        rows.append(seen)
    return torch.stack(rows) @ weight.T


@pytest.mark.parametrize("bits", [4, 8])
def test_outlier_inputs_are_exact_and_widen_no_range(bits):
    weight, x = example()
    made = encode(weight, x, columns=3)
    inputs = per_token(Int(bits, "asymmetric"))
    layer = QLinear(QLayer(made.weight, inputs, outliers=made.outliers), None, torch.float32)
    x = x[:20] + torch.rand(20, 64)
    assert torch.allclose(layer(x), naive_layer(x, made.weight.dequantize(), bits), rtol=1e-4, atol=1e-3)
    alone = torch.zeros(7, 64)
    alone[:, OUTLIERS] = 1e3 * torch.randn(7, 3)
    assert torch.allclose(layer(alone), alone @ made.weight.dequantize().T, rtol=1e-5)
    assert not torch.allclose(QLinear(QLayer(made.weight, inputs), None, torch.float32)(x), layer(x), rtol=0.01)


def test_columns_come_back_to_their_places():
    """Files hold codes of the rounded columns and fp16 of the others, and every byte is planned."""
    weight, x = example()
    for settings in ({"columns": 3}, {"columns": 0.1}, {"columns": 0.1, "act_order": True}):
        made = encode(weight, x, **settings)
        count = QUIK(**settings).count(64)
        layer = QLayer(made.weight, per_token(Int(4)), outliers=made.outliers)
        tensors = native.pack("x", layer)
        layers, rest = native.unpack(native.describe({"x": layer}), tensors)
        assert not rest and torch.equal(layers["x"].weight.dequantize(), made.weight.dequantize())
        assert torch.equal(layers["x"].outliers.columns, made.outliers.columns)
        held = sum(t.nbytes for t in tensors.values())
        assert held == QUIK(**settings).stored_bytes((24, 64), FOUR)
        assert tensors["x.codes"].nbytes == 24 * (64 - count) // 2
    assert QUIK(columns=3).paper_bits((24, 64), FOUR) == pytest.approx((4 * 61 + 16 * 3) / 64)


def test_other_grids_stay_beside_too():
    """Codes that stand for nothing are zero, whatever the format."""
    weight, x = example()
    stays = torch.zeros(64, dtype=torch.bool).index_fill(0, torch.tensor(OUTLIERS), True)
    for spec in (
        Spec(Int(3, "asymmetric"), (1, 16), "bilevel"),
        per_group(Int(4, "asymmetric"), 16, scale="float16-min"),
    ):
        made = round_beside(weight, stays, spec, GPTQ(), MinMaxClip(), observe(x), scores=False)
        assert not made.parts[0].codes[:, stays].any()
        error = made.dequantize() - weight
        plain = fit_range(weight, spec).quantize(weight) - weight
        assert (error @ x.T).square().sum() < (plain @ x.T).square().sum()


def test_how_many_stay():
    assert [QUIK().count(n) for n in (4096, 14336, 512)] == [256, 896, 32]
    assert [QUIK(columns=256).count(n) for n in (4096, 14336)] == [256, 256]
    for wrong in (-1.0, 2.5):
        with pytest.raises(ValueError, match="whole number of channels"):
            QUIK(columns=wrong)
    with pytest.raises(ValueError, match="would keep all 64 input channels"):
        QUIK(columns=256).check((8, 64), FOUR, None)
    with pytest.raises(ValueError, match="drop -static"):
        QUIK().check((8, 64), FOUR, Spec(Int(8), (-1, -1), "float32"))


def test_inputs_never_seen_are_rounded_to_nearest():
    weight, _ = example()
    made = encode(weight, None)
    assert made.outliers is None
    assert torch.equal(made.weight.parts[0].codes, fit_range(weight, FOUR).encode(weight))


@pytest.mark.gpu
def test_a_gpu_makes_the_same():
    weight, x = example(64, 256)
    here, there = encode(weight, x), encode(weight.cuda(), x.cuda())
    assert there.weight.parts[0].codes.is_cuda and torch.equal(here.outliers.columns, there.outliers.columns.cpu())
    same = (here.weight.parts[0].codes == there.weight.parts[0].codes.cpu()).all(1)
    assert same.double().mean() > 0.8
    apart = (here.weight.dequantize() - there.weight.dequantize().cpu())[same].abs()
    assert apart.max() < 2e-3 * weight.abs().max()
    layer = QLayer(there.weight, per_token(Int(4, "asymmetric")), outliers=there.outliers)
    on = [QLinear(layer, None, torch.float32, device)(x[:9].to(device)).cpu() for device in ("cpu", "cuda")]
    assert torch.allclose(*on, rtol=1e-3, atol=1e-2 * float(on[0].abs().max()))


def test_a_name_means_asymmetric_inputs_and_searched_ranges():
    recipe = recipes.resolve("quik-w4a4", overrides=["*.down_proj=w8a8"]).recipe
    assert recipe.encode == QUIK() and recipe.clip == MSEClip()
    assert recipe.scheme.weights == FOUR and recipe.scheme.activations == per_token(Int(4, "asymmetric"))
    assert recipe.scheme.overrides[0].activations == per_token(Int(8, "asymmetric"))
    assert recipes.from_dict(recipes.to_dict(recipe)).recipe == recipe
    short = {"scheme": {"weights": {"format": "int4"}}, "encode": "quik"}
    assert recipes.from_dict(short).recipe.clip == MSEClip()


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_what_is_loaded_is_what_was_stored(tmp_path: Path, family):
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    result = lowbit.quantize(model, "quik-w4a4", tmp_path / "run", calibration=str(text), samples=8, length=32)
    layers = loaded_as_stored(tmp_path / "run")
    assert any(layer.outliers is not None and len(layer.outliers.columns) for layer in layers)
    assert all(block["error_after"] < block["error_before"] for block in result.blocks)
