"""PB-LLM against its formulas, written out with loops in double precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from binary_oracle import (
    encoded,
    inverse_factor,
    loss,
    nearest,
    outlier_heavy,
    stored,
    swept,
    two_levels,
    weight_and_stats,
)
from tiny import save_model, save_text

import lowbit
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.methods.gptq import GPTQ
from lowbit.methods.pbllm import PBLLM
from lowbit.methods.rtn import MinMaxClip
from lowbit.numerics.binary import binary, fit_binary, largest
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QLayer
from lowbit.numerics.spec import Int, per_channel, per_group
from lowbit.recipes import parse


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    return save_model("llama", root / "model"), save_text(root / "text.txt")


def salient_of(weight, stats, part, group, saliency):
    """The round(r · size) largest scores of every group of columns, by sorting all of them."""
    u = inverse_factor(stats)
    scores = weight.double().abs() if saliency == "magnitude" else (weight.double() / u.diagonal()) ** 2
    chosen = torch.zeros(weight.shape, dtype=torch.bool)
    for start in range(0, weight.shape[1], group):
        places = [(i, j) for i in range(len(weight)) for j in range(start, start + group)]
        places.sort(key=lambda place: -float(scores[place]))
        for place in places[: round(part * len(places))]:
            chosen[place] = True
    return chosen


@pytest.mark.parametrize("saliency", ["hessian", "magnitude"])
@pytest.mark.parametrize("statistics", ["masked", "zeroed", "matrix"])
@pytest.mark.parametrize("group", [32, 16])
def test_against_loops(saliency, statistics, group):
    """Masks, ranges and every value, the 8 bits between each row's ends and the sweep through the columns included."""
    weight, stats = weight_and_stats()
    method = PBLLM(2.0, saliency, statistics)
    result = encoded(method, weight, stats, binary(group))
    weight[:, 3] = 0  # never excited
    salient = salient_of(weight, stats, 1 / 7, group, saliency)
    assert torch.equal(result.regions.mask(1), salient)

    def levels(i, j):
        start = j // group * group
        own = [float(weight[i, k]) for k in range(start, start + group) if not salient[i, k]]
        if statistics == "matrix":
            others = weight[~salient].abs().double()
            return stored(0.0, float(others.sum() / len(others)))
        return two_levels(own, group - len(own) if statistics == "zeroed" else 0)

    def quantize(i, j, value):
        if not salient[i, j]:
            return nearest(value, levels(i, j))
        low, high = min(0.0, float(weight[i].min())), max(0.0, float(weight[i].max()))
        scale = float(torch.tensor((high - low) / 255).bfloat16())
        zero = round(-low / scale)
        return scale * (min(max(round(value / scale) + zero, 0), 255) - zero)

    expected = swept(weight, inverse_factor(stats), quantize)
    assert torch.allclose(result.dequantize().double(), expected, atol=1e-7)


@pytest.mark.parametrize("part", [0.0, 0.03, 0.1, 1 / 7, 0.5, 1.0])
@pytest.mark.parametrize("group", [-1, 8])
def test_the_count_is_exact_whatever_the_scores(part, group):
    torch.manual_seed(0)
    for scores in (torch.randn(7, 24), torch.ones(7, 24), torch.randint(0, 3, (7, 24)).float()):
        mask = largest(scores, part, group)
        width = 24 if group == -1 else group
        for start in range(0, 24, width):
            own = slice(start, start + width)
            kept, left = scores[:, own][mask[:, own]], scores[:, own][~mask[:, own]]
            assert len(kept) == round(part * 7 * width)
            assert not len(kept) or not len(left) or kept.min() >= left.max()


def test_equal_scores_go_by_place():
    mask = largest(torch.tensor([[1.0, 2.0, 1.0], [1.0, 3.0, 1.0]]), 4 / 6, -1)
    assert mask.tolist() == [[True, True, True], [False, True, False]]


def test_binary_part_has_two_values_and_the_best_spread():
    """Of all α around the mean, mean |w - μ| has the least error, so 5 % to either side is worse in every row."""
    weight, _ = weight_and_stats(16, 128)
    result = encoded(PBLLM(), weight, None)
    others, value = ~result.regions.mask(1), result.dequantize()
    for row in range(16):
        own, w = value[row][others[row]], weight[row][others[row]]
        assert len(own.unique()) == 2
        mean, spread = own.unique().mean(), (own.max() - own.min()) / 2
        error = ((w - mean).abs() - spread).square().sum()
        assert torch.allclose(error, (w - own).square().sum(), rtol=1e-5)
        for factor in (0.95, 1.05):
            assert ((w - mean).abs() - factor * spread).square().sum() > error


def test_all_salient_is_eight_bit_rounding():
    """Without statistics RTN, with them GPTQ in natural order: to the last bit."""
    weight, stats = weight_and_stats(8, 64)
    eight = per_channel(Int(8, "asymmetric"))
    assert torch.equal(encoded(PBLLM(8.0), weight, None).dequantize(), fit_range(weight, eight).quantize(weight))
    gptq = GPTQ(act_order=False).round(weight, eight, MinMaxClip(), stats, scores=False)
    assert torch.equal(encoded(PBLLM(8.0), weight, stats).dequantize(), gptq.dequantize())


def test_none_salient_is_binary():
    weight, _ = weight_and_stats(8, 64)
    result = encoded(PBLLM(1.0), weight, None)
    assert torch.equal(result.dequantize(), fit_binary(weight, binary(-1)).quantize(weight))


def test_masked_statistics_are_better_than_the_codes():
    """Zeros in place of the salient weights shrink α, and one α for all rows ignores how large they are."""
    weight, stats = outlier_heavy()
    weight *= torch.linspace(0.5, 1.5, len(weight))[:, None]
    losses = [loss(weight, encoded(PBLLM(1.7, statistics=s), weight, stats).dequantize(), stats) for s in
              ("masked", "zeroed", "matrix")]  # fmt: skip
    assert losses[0] < losses[1] < losses[2]


def test_hessian_saliency_and_feedback_each_help():
    weight, stats = outlier_heavy()
    full = loss(weight, encoded(PBLLM(), weight, stats).dequantize(), stats)
    magnitude = loss(weight, encoded(PBLLM(saliency="magnitude"), weight, stats).dequantize(), stats)
    nothing = loss(weight, encoded(PBLLM(), weight, None).dequantize(), stats)
    assert full < magnitude < nothing


@pytest.mark.parametrize("bits", [1.0, 1.2, 1.7, 4.5, 7.9, 8.0])
def test_files_hold_the_same_weight_in_as_many_bytes_as_planned(bits):
    """Positions are a list of columns at 1.2 and 7.9 bits, where one part is rare, and a bitmap between."""
    weight, stats = weight_and_stats(256, 512)
    method = PBLLM(bits)
    layer = QLayer(encoded(method, weight, stats if bits == 1.7 else None))
    tensors = native.pack("x", layer)
    assert ("x.regions.index" in tensors) == (bits in (1.2, 7.9))
    back, rest = native.unpack(native.describe({"x": layer}), tensors)
    assert not rest
    assert torch.equal(back["x"].weight.dequantize(), layer.weight.dequantize())
    planned = method.stored_bytes((256, 512), method.own)
    assert sum(t.nbytes for t in tensors.values()) == pytest.approx(planned, rel=0.005)


def test_names_and_bits():
    assert parse("pbllm-1.7").encode == PBLLM(1.7)
    assert parse("pbllm-2").encode.salient == pytest.approx(1 / 7)
    assert parse("pbllm-1.7").encode.salient == pytest.approx(0.1)
    assert parse("pbllm1.7-w1a8-g128").scheme.weights.group == 128
    method = parse("pbllm-1.7").encode
    assert method.paper_bits((64, 128), method.own) == pytest.approx(8 * 0.1 + 0.9)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("pbllm-9", "bits are a number from 1 to 8"),
        ("pbllm1.7-w4a16", "pbllm makes weights binary"),
        ("pbllm+gptq-w1a16", "pbllm does not round by gptq"),
        ("pbllm1.7-w1a16-g48", "a group of 48 does not divide"),
    ],
)
def test_refusals(llama: tuple[Path, Path], tmp_path: Path, recipe, message):
    with pytest.raises(ValueError, match=message):
        lowbit.quantize(llama[0], recipe, tmp_path / "run", calibration=str(llama[1]))
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize("family", ["opt", "mixtral", "gpt2"])
def test_whole_runs(tmp_path: Path, family: str) -> None:
    """The loaded model holds what the files say, experts that saw few tokens included."""
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    run = lowbit.quantize(model, "pbllm-1.7", tmp_path / "run", calibration=str(text), samples=8, length=32)
    assert run.paper_bits == pytest.approx(1.7)
    assert all(0 < block["error_after"] < 1 for block in run.blocks)
    loaded, found = lowbit.load(run.path, dtype=torch.float32), 0
    for file in run.path.glob("*.safetensors"):
        layers, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        for name, layer in layers.items():
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight.dequantize())
            found += 1
    assert found


def test_groups_rank_and_range_for_themselves():
    weight, stats = weight_and_stats(8, 64)
    result = encoded(PBLLM(2.0), weight, stats, per_group(Int(1), 16))
    counts = result.regions.mask(1).view(8, 4, 16).sum((0, 2))
    assert counts.tolist() == [round(8 * 16 / 7)] * 4
    assert result.parts[0].grid.scale.shape == (8, 4)
    assert result.parts[1].grid.scale.shape == (8, 1)


def test_in_company(llama: tuple[Path, Path], tmp_path: Path) -> None:
    """Folds come before it, corrections behind it, and inputs are quantized beside it."""
    model, text = llama
    options = {"calibration": str(text), "samples": 8, "length": 32}
    plain = lowbit.quantize(model, "pbllm1.7-w1a8", tmp_path / "plain", **options)
    helped = lowbit.quantize(model, "smoothquant+pbllm1.7+lorc16-w1a8", tmp_path / "helped", **options)
    assert helped.blocks[0]["error_after"] < plain.blocks[0]["error_after"]
    layer = lowbit.load(helped.path).model.layers[0].mlp.down_proj.layer
    assert layer.activation.bits == 8
    assert layer.weight.low_rank is not None
    assert [part.region for part in layer.weight.parts] == [0, 1]
