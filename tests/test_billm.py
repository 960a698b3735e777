"""BiLLM against its formulas, written out with loops in double precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from binary_oracle import encoded, inverse_factor, loss, nearest, outlier_heavy, swept, two_levels, weight_and_stats
from stored import loaded_as_stored
from tiny import save_model, save_text

import lowbit
from lowbit.data.calibrate import load_calibration
from lowbit.formats import native
from lowbit.methods.billm import CONCENTRATED, SALIENT, TAIL, BiLLM
from lowbit.methods.views import Stats
from lowbit.numerics.binary import binary
from lowbit.numerics.qtensor import QLayer
from lowbit.runtime.load import load_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    return save_model("llama", root / "model"), save_text(root / "text.txt")


def once(values):
    """What one bit makes of the values of a row: μ ± mean |v - μ|, exactly."""
    if not len(values):
        return values
    mean = values.mean()
    spread = (values - mean).abs().mean()
    return torch.stack([mean + spread if v > mean else mean - spread for v in values])


def twice(values):
    first = once(values)
    return first + once(values - first)


def squared_error(matrix, mask, binarise):
    """Σ (m - m̂)² over the rows of a matrix, of the entries in a mask."""
    rows = [(row[own], binarise(row[own])) for row, own in zip(matrix, mask, strict=True)]
    return float(sum(((values - made) ** 2).sum() for values, made in rows))


def regions_of(weight, diagonal, searched, most):
    """The partition of a block by trying every cut and every break-point, as the paper's steps 1 to 3 say."""
    saliency = (weight / diagonal) ** 2
    x = saliency if searched == "saliency" else weight
    rank = sorted(range(weight.shape[1]), key=lambda j: -float(saliency[:, j].sum()))
    errors = []
    for k in range(1, min(most, weight.shape[1] - 1) + 1):
        mask = torch.zeros(weight.shape, dtype=torch.bool)
        mask[:, rank[:k]] = True
        errors.append(squared_error(x, mask, twice) + squared_error(x, ~mask, twice))
    salient = torch.zeros(weight.shape, dtype=torch.bool)
    salient[:, rank[: errors.index(min(errors)) + 1]] = True
    magnitudes = sorted(x[~salient].abs().tolist())
    best, chosen = float("inf"), None
    for index in range(81):
        place = (0.1 + 0.01 * index) * (len(magnitudes) - 1)
        low = magnitudes[int(place)]
        point = low + (place - int(place)) * (magnitudes[min(int(place) + 1, len(magnitudes) - 1)] - low)
        tail = ~salient & (x.abs() >= point)
        error = squared_error(x, tail, once) + squared_error(x, ~salient & ~tail, once)
        if error < best:
            best, chosen = error, tail
    return torch.where(salient, SALIENT, torch.where(chosen, TAIL, CONCENTRATED))


def terms_of(weight, regions):
    """A rule for single entries, from the levels that the entries of every row and region have."""

    def levels(i, region):
        return two_levels([float(w) for w, r in zip(weight[i], regions[i], strict=True) if r == region])

    def residual_levels(i):
        first = levels(i, SALIENT)
        own = [float(w) for w, r in zip(weight[i], regions[i], strict=True) if r == SALIENT]
        return two_levels([w - nearest(w, first) for w in own])

    def quantize(i, j, value):
        if regions[i, j] != SALIENT:
            return nearest(value, levels(i, regions[i, j]))
        first = nearest(value, levels(i, SALIENT))
        return first + nearest(value - first, residual_levels(i))

    return quantize


def billm(weight, stats, group, searched, compensation, most):
    """All blocks, one after the other: (values, regions)."""
    u = inverse_factor(stats)
    w, values, regions = weight.double().clone(), [], []
    for start in range(0, weight.shape[1], group):
        own, rest = slice(start, start + group), slice(start + group, None)
        block, ub = w[:, own].clone(), u[own, own]
        regions.append(regions_of(block, ub.diagonal(), searched, most))
        rule = terms_of(block, regions[-1])
        inside = ub if compensation == "columns" else ub.diagonal().diag()
        values.append(swept(block, inside, rule))
        error = block - values[-1]
        error = error / ub.diagonal() if compensation == "paper" else error @ torch.linalg.inv(ub)
        w[:, rest] -= error @ u[own, rest]
    return torch.cat(values, 1), torch.cat(regions, 1)


@pytest.mark.parametrize("compensation", ["paper", "exact", "columns"])
@pytest.mark.parametrize("searched", ["saliency", "weight"])
def test_against_loops(searched, compensation):
    """The partition and every value, on three blocks of which later ones have taken over earlier ones' errors."""
    weight, stats = weight_and_stats(5, 48)
    result = encoded(BiLLM(searched, 5, compensation), weight, stats, binary(16))
    weight[:, 3] = 0  # never excited
    values, regions = billm(weight, stats, 16, searched, compensation, 5)
    assert torch.equal(result.regions.map.long(), regions)
    difference = (result.dequantize().double() - values).abs()
    assert difference.max() <= 2**-10 * values.abs().max()  # levels fall on the same fp16 numbers, or on neighbours
    assert difference.mean() <= 1e-6


def test_masks_are_disjoint_cover_all_and_are_salient_by_columns():
    weight, stats = outlier_heavy()
    result = encoded(BiLLM(), weight, stats)
    masks = [result.regions.mask(region) for region in (CONCENTRATED, TAIL, SALIENT)]
    assert torch.equal(sum(mask.int() for mask in masks), torch.ones_like(weight, dtype=torch.int32))
    assert torch.equal(masks[SALIENT], masks[SALIENT][:1].expand_as(weight))
    assert all(mask[:, start : start + 128].any() for mask in masks for start in (0, 128))


def test_few_values_in_every_row_and_block():
    """Two concentrated, two in the tail, four salient ones."""
    weight, stats = outlier_heavy()
    result = encoded(BiLLM("weight"), weight, stats)
    value = result.dequantize()
    for start in (0, 128):
        own = slice(start, start + 128)
        for region, most in ((CONCENTRATED, 2), (TAIL, 2), (SALIENT, 4)):
            mask = result.regions.mask(region)[:, own]
            counts = [len(value[row, own][mask[row]].unique()) for row in range(len(weight))]
            assert max(counts) == most


def test_a_second_order_never_errs_more_than_one():
    torch.manual_seed(0)
    for _ in range(20):
        values = torch.randn(12).double() ** 3
        assert ((values - twice(values)) ** 2).sum() <= ((values - once(values)) ** 2).sum()
    weight, _ = outlier_heavy()
    result = encoded(BiLLM("weight"), weight, None)
    salient, first = result.regions.mask(SALIENT), result.parts[2].dequantize()
    both = result.dequantize()
    for row in range(len(weight)):
        own = salient[row]
        assert (weight - both)[row][own].square().sum() <= (weight - first)[row][own].square().sum() * (1 + 1e-3)


def test_bits_as_the_paper_counts_on_a_trained_model():
    """1 + the part of salient columns is at most 1.1."""
    model = lowbit.load("demo", dtype=torch.float32)
    text = torch.stack(load_calibration("demo", load_tokenizer("demo"), 8, 128, 0))
    block, seen = model.model.layers[3], {}
    linears = {name: module for name, module in block.named_modules() if isinstance(module, torch.nn.Linear)}
    for name, module in linears.items():
        stats = seen[name] = Stats.observing(frozenset({"gram"}))
        module.register_forward_pre_hook(lambda _, args, stats=stats: stats.update(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(text)
    method = BiLLM(compensation="exact")
    salient = sum(encoded(method, m.weight, seen[n]).regions.mask(SALIENT).sum() for n, m in linears.items())
    assert 1 < 1 + salient / sum(module.weight.numel() for module in linears.values()) <= 1.1


def test_searching_weights_takes_more_columns_and_still_loses_more():
    weight, stats = outlier_heavy()
    settings = {"s": BiLLM(), "w": BiLLM("weight"), "few": BiLLM("weight", 3)}
    found = {name: encoded(method, weight, stats) for name, method in settings.items()}
    columns = {name: int(each.regions.mask(SALIENT)[0].sum()) for name, each in found.items()}
    assert columns["w"] >= 3 * columns["s"]
    assert columns["few"] == 2 * 3
    losses = {name: loss(weight, each.dequantize(), stats) for name, each in found.items()}
    assert losses["w"] > 1.5 * losses["s"]


def test_every_step_of_compensation_helps():
    """Dividing by U_jj, solving for the block, and rounding column by column: as the spec's order, on average."""
    total = {}
    for seed in range(3):
        weight, stats = outlier_heavy(64, seed=seed)
        for compensation in ("paper", "exact", "columns"):
            value = encoded(BiLLM(compensation=compensation), weight, stats).dequantize()
            total[compensation] = total.get(compensation, 0) + loss(weight, value, stats)
        total["none"] = total.get("none", 0) + loss(weight, encoded(BiLLM(), weight, None).dequantize(), stats)
    assert total["columns"] < total["exact"] < total["paper"] < total["none"]


def test_files_hold_the_same_weight_in_about_as_many_bytes_as_planned():
    """Salient columns are stored by number: they take no part in the map of the others."""
    weight, stats = outlier_heavy(256, 512)
    method = BiLLM()
    layer = QLayer(encoded(method, weight, stats))
    tensors = native.pack("x", layer)
    salient = int(layer.weight.regions.mask(SALIENT)[0].sum())
    assert tensors["x.regions.map"].nbytes <= 256 * (512 - salient) // 8
    assert [tensors[f"x.part{part}.codes"].nbytes for part in (2, 3)] == [256 * salient // 8] * 2
    assert sum(tensors[f"x{part}.codes"].nbytes for part in ("", ".part1")) <= 256 * (512 - salient) // 8 + 1
    back, rest = native.unpack(native.describe({"x": layer}), tensors)
    assert not rest
    assert torch.equal(back["x"].weight.dequantize(), layer.weight.dequantize())
    planned = method.stored_bytes((256, 512), method.own)
    assert sum(t.nbytes for t in tensors.values()) == pytest.approx(planned, rel=0.05)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("billm-w4a16", "billm makes weights binary"),
        ("billm-w1a16-g48", "a group of 48 does not divide"),
        ("billm-w1a16-g1", "groups of at least two"),
        ("billm+gptq-w1a16", "billm does not round by gptq"),
    ],
)
def test_refusals(llama: tuple[Path, Path], tmp_path: Path, recipe, message):
    with pytest.raises(ValueError, match=message):
        lowbit.quantize(llama[0], recipe, tmp_path / "run", calibration=str(llama[1]))
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_whole_runs(tmp_path: Path, family: str) -> None:
    """The loaded model holds what the files say, experts that saw few tokens included."""
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 8, "length": 32, "settings": ["billm.most=4"]}
    run = lowbit.quantize(model, "billm-w1a16-g32", tmp_path / "run", **options)
    assert run.paper_bits == pytest.approx(1.1)
    assert all(0 < block["error_after"] < 1 for block in run.blocks)
    loaded_as_stored(run.path)
