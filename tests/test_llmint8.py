"""LLM.int8() against its product written out: outlier columns in 16 bits, integers times scales for the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import recipes
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.gptq import GPTQ
from lowbit.methods.llmint8 import LLMInt8
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.modules.linear import QLinear
from lowbit.numerics.qtensor import QLayer
from lowbit.numerics.spec import Int, Spec, per_channel, per_token

WEIGHTS = per_channel(Int(8, "symmetric-restricted"), scale="float32")
INPUTS = per_token(Int(8, "symmetric-restricted"))


def example(tokens: int = 40, rows: int = 32, columns: int = 256) -> tuple[Tensor, Tensor]:
    """(a weight, inputs of which six channels are fifty times as large)."""
    torch.manual_seed(0)
    x = torch.randn(tokens, columns)
    x[:, [3, 50, 77, 120, 200, 255]] *= 50
    return torch.randn(rows, columns) / columns**0.5, x


def layer(weight: Tensor, **settings: object) -> QLayer:
    method = LLMInt8(**settings)
    made = method.encode(weight, WEIGHTS, RTN(), MinMaxClip(), None, scores=False, seed=0)
    return QLayer(made.weight, INPUTS, outliers=made.outliers)


def run(held: QLayer, x: Tensor) -> Tensor:
    return QLinear(held, None, torch.float32)(x)


def integers(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of x: absmax/127."""
    scale = x.abs().amax(1, keepdim=True) / 127
    return (x / scale).round().to(torch.int64), scale


def decomposed(weight: Tensor, x: Tensor, threshold: float) -> Tensor:
    """The paper's product: int8 over regular columns, with int accumulation, plus 16 bits over outlier columns."""
    outlier = torch.tensor([any(abs(float(v)) >= threshold for v in column) for column in x.T])
    weight_codes, weight_scale = integers(weight)
    regular = x[:, ~outlier]
    if not regular.shape[1]:
        return x @ weight.half().float().T
    codes, scale = integers(regular)
    product = (codes @ weight_codes[:, ~outlier].T).float() * scale * weight_scale.T
    return product + x[:, outlier] @ weight[:, outlier].half().float().T


@pytest.mark.parametrize("threshold", [6.0, 3.5, 1e6])
def test_the_layer_is_the_papers_product(threshold):
    weight, x = example()
    y = run(layer(weight, threshold=threshold), x)
    assert torch.allclose(y, decomposed(weight, x, threshold), rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_threshold_zero_and_none_reached_are_pure_vector_wise():
    weight, x = example()
    off, far = layer(weight, threshold=0.0), layer(weight, threshold=1e6)
    assert off.outliers is None
    pure = decomposed(weight, x, float("inf"))
    for held in (off, far):
        assert torch.allclose(run(held, x), pure, rtol=1e-5, atol=1e-5 * float(pure.abs().max()))


def test_outliers_everywhere_are_sixteen_bits():
    weight, x = example()
    y = run(layer(weight, threshold=1e-9), x)
    assert torch.allclose(y, x @ weight.half().float().T, rtol=1e-5, atol=1e-5)


def test_outliers_are_those_of_the_call():
    weight, x = example()
    held = layer(weight)
    calm = x.clamp(-5, 5)
    assert not torch.equal(run(held, calm), run(held, x))
    assert torch.allclose(run(held, calm), decomposed(weight, calm, float("inf")), rtol=1e-4, atol=1e-4)
    kept = held.outliers.of(x)
    assert kept.nonzero().flatten().tolist() == [3, 50, 77, 120, 200, 255]


def test_both_parts_add_up():
    """Every column is in one part: where int8 loses nothing of the regular inputs, the sum is the product, exactly."""
    weight, _ = example()
    x = 0.04 * torch.randint(-127, 128, (40, 256)).float()
    x[:, 0] = 5.08  # 127 steps of 0.04 for every token
    x[:, [9, 99]] *= 10
    held = layer(weight)
    kept = held.outliers.of(x)
    mixed = torch.where(kept, weight.half().float(), held.weight.dequantize())
    assert kept.nonzero().flatten().tolist() == [9, 99]
    assert torch.allclose(run(held, x), x @ mixed.T, rtol=1e-5, atol=1e-4)


def test_a_tenth_of_the_error_where_channels_are_large():
    weight, x = example(200)
    exact = x @ weight.T
    error = [float((run(layer(weight, threshold=t), x) - exact).norm() / exact.norm()) for t in (0.0, 6.0)]
    assert error[1] < 0.1 * error[0]


def test_dequantized_columns_store_a_third():
    weight, x = example()
    sixteen, eight = layer(weight), layer(weight, weights="int8")
    assert eight.outliers.weight is None
    kept = eight.outliers.of(x)
    inside, outside = x.masked_fill(kept, 0), x.masked_fill(~kept, 0)
    codes, scale = integers(inside)
    expected = (codes * scale + outside) @ eight.weight.dequantize().T
    assert torch.allclose(run(eight, x), expected, rtol=1e-4, atol=1e-3)
    for held, settings in (
        (sixteen, {}),
        (eight, {"weights": "int8"}),
        (layer(weight, threshold=0.0), {"threshold": 0.0}),
    ):
        tensors = native.pack("x", held)
        layers, rest = native.unpack(native.describe({"x": held}), tensors)
        assert not rest and torch.equal(run(layers["x"], x), run(held, x))
        assert sum(t.nbytes for t in tensors.values()) == LLMInt8(**settings).stored_bytes((32, 256), WEIGHTS)
    assert LLMInt8().stored_bytes((32, 256), WEIGHTS) == 32 * (256 * 3 + 4)
    assert LLMInt8().paper_bits((32, 256), WEIGHTS) == 8


@pytest.mark.gpu
def test_a_gpu_makes_the_same():
    weight, x = example()
    made = LLMInt8().encode(weight.cuda(), WEIGHTS, RTN(), MinMaxClip(), None, scores=False, seed=0)
    held = QLayer(made.weight, INPUTS, outliers=made.outliers)
    there = QLinear(held, None, torch.float32, "cuda")(x.cuda()).cpu()
    assert torch.allclose(there, run(layer(weight), x), rtol=1e-3, atol=1e-2)


def test_codes_may_be_gptqs():
    recipe = recipes.parse("llmint8+gptq-w8a8")
    assert isinstance(recipe.round, GPTQ) and recipe.encode == LLMInt8() and "gram" in recipe.needs


def test_a_name_means_absmax_over_127():
    recipe = recipes.resolve("llmint8-w8a8").recipe
    assert recipe.scheme.weights == WEIGHTS and recipe.scheme.activations == INPUTS
    assert not recipe.calibrated
    assert recipes.resolve("llmint8-w8a8", settings=["llmint8.weights=int8"]).recipe.encode == LLMInt8(weights="int8")


def test_what_makes_no_sense_is_refused():
    with pytest.raises(ValueError, match="write w8a8"):
        LLMInt8().check((8, 8), WEIGHTS, None)
    with pytest.raises(ValueError, match="drop -static"):
        LLMInt8().check((8, 8), WEIGHTS, Spec(Int(8), (-1, -1), "float32"))
    with pytest.raises(ValueError, match="not negative"):
        LLMInt8(threshold=-1)


@pytest.mark.parametrize("family", ["llama", "mixtral", "opt"])
def test_what_is_loaded_is_what_was_stored(tmp_path: Path, family):
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    result = lowbit.quantize(
        model,
        "llmint8-w8a8",
        tmp_path / "run",
        calibration=str(text),
        samples=4,
        length=32,
        settings=["llmint8.threshold=1"],
    )
    assert result.bits_per_weight == pytest.approx(24 + 32 / 64, abs=0.2)
    loaded = dict(lowbit.load(tmp_path / "run", dtype=torch.float32).named_modules())
    seen = 0
    for file in (tmp_path / "run").glob("*.safetensors"):
        layers, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        for name, held in layers.items():
            x = 2 * torch.randn(3, held.weight.shape[1])
            got = loaded[name](x) - (0 if loaded[name].bias is None else loaded[name].bias)
            assert torch.allclose(got, run(held, x), atol=1e-5)
            assert held.outliers.of(x).any() and not held.outliers.of(x).all()
            seen += 1
    assert seen
