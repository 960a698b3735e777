"""DB-LLM's two planes: their start against the paper's thresholds, their factors against a least-squares solver."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from binary_oracle import encoded, inverse_factor, loss, outlier_heavy, swept, weight_and_stats
from stored import loaded_as_stored
from tiny import save_model, save_text

import lowbit
from lowbit.formats import native
from lowbit.methods.dbllm import DBLLM, nearest, solved, start_of, values_of
from lowbit.numerics.qtensor import QLayer
from lowbit.numerics.spec import Int, per_group

G16 = per_group(Int(2), 16)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("llama")
    return save_model("llama", root / "model"), save_text(root / "text.txt")


def steps_of(weight, spec, importance):
    """s [O, G] by trying every part of the range on both sides, with loops; levels -s, 0, s, 2s, of signed s."""
    group, scales = spec.block[1], torch.empty(len(weight), weight.shape[1] // spec.block[1])
    for i, j in torch.cartesian_prod(torch.arange(len(weight)), torch.arange(scales.shape[1])).tolist():
        own = slice(j * group, (j + 1) * group)
        values, best = weight[i, own].double(), (float("inf"), 0.0)
        for sign in (1, -1):
            for part in range(80):
                amax = float(values.abs().max()) * (1 - part / 100)
                s = sign * float(torch.tensor(2 * amax / 3).bfloat16())
                levels = torch.tensor([-s, 0, s, 2 * s], dtype=torch.float64)
                error = (values[:, None] - levels).abs().min(1).values.square() @ importance[own].double()
                if float(error) < best[0] * (1 - 1e-9):
                    best = (float(error), s)
        scales[i, j] = best[1]
    return scales


def test_starts_from_the_quantizer_of_least_error():
    weight, stats = weight_and_stats(4, 48)
    h = stats.hessian().diagonal()
    first, second = start_of(weight, G16, h)
    expected = steps_of(weight, G16, h)
    assert torch.equal(first, 2 * expected)
    assert torch.equal(second, -expected)
    assert (expected < 0).any() and (expected > 0).any()


def test_bits_of_the_start_are_the_papers_and_its_values_the_nearest_levels():
    """b₁ = 1[w ≥ (α₁ + α₂)/2], b₂ = 1[w ≤ α₁b₁ + α₂/2] for α₁ = 2s, α₂ = -s, s > 0; mirrored for s < 0."""
    torch.manual_seed(0)
    weight, steps = torch.randn(32, 64), torch.cat([torch.full((16, 1), 0.7), torch.full((16, 1), -0.4)])
    bits = nearest(weight, torch.stack([2 * steps, -steps]))
    mirrored, s = weight * steps.sign(), steps.abs()
    first = (mirrored >= s / 2).float()
    second = (mirrored <= 2 * s * first - s / 2).float()
    assert torch.equal(bits.float(), torch.stack([first, second]))
    value = values_of(bits, torch.stack([2 * steps, -steps]))
    levels = torch.cat([-steps, 0 * steps, steps, 2 * steps], 1)
    assert torch.equal(value, levels.gather(1, (weight[..., None] - levels[:, None]).abs().argmin(-1)))


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_nearest_level_for_factors_of_any_sign(signs):
    torch.manual_seed(0)
    weight = torch.randn(64, 200)
    alphas = torch.rand(2, 64, 1).sort(0, descending=True).values * torch.tensor(signs)[:, None, None]
    levels = torch.cat([0 * alphas[0], alphas[0], alphas[1], alphas[0] + alphas[1]], 1)
    distance = (weight[..., None] - levels[:, None]).abs().min(-1).values
    assert torch.allclose((weight - values_of(nearest(weight, alphas), alphas)).abs(), distance, atol=1e-6)


def test_more_than_half_of_the_first_plane_and_half_of_the_second_is_zero():
    """The paper's sparsity, on Gaussian weights: what makes bitwise kernels cheap."""
    torch.manual_seed(0)
    weight = torch.randn(64, 1024)
    alphas = start_of(weight, per_group(Int(2), 128), torch.ones(1024))
    groups = [nearest(weight[:, i * 128 : i * 128 + 128], alphas[..., i, None]) for i in range(8)]
    zeros = 1 - torch.cat(groups, -1).float().mean((1, 2))
    assert zeros[0] > 0.6
    assert zeros[1] > 0.45


def test_factors_are_the_least_squares_solution():
    """One group: torch's own solver on Lᵀ Bᵀ, L Lᵀ = H, row by row."""
    _, stats = weight_and_stats(6, 32)
    weight, h = torch.randn(6, 32, generator=torch.Generator().manual_seed(0)), stats.hessian() + torch.eye(32)
    spec = per_group(Int(2), 32, scale="float32")
    alphas = start_of(weight, spec, h.diagonal())
    bits, found = solved(weight, nearest(weight, alphas), alphas, h, [slice(0, 32)], spec)
    root = torch.linalg.cholesky(h.double())
    for row in range(6):
        planes = bits[:, row].double()
        assert int(planes.sum(1).min()) > 0
        solution = torch.linalg.lstsq(root.T @ planes.T, root.T @ weight[row].double()[:, None]).solution[:, 0]
        assert torch.allclose(found[:, row, 0].double(), solution, rtol=1e-3)


def test_groups_take_turns_to_the_common_minimum():
    """Each group's factors lower the loss of the whole row, and many rounds end where all groups solved at once are."""
    weight, stats = weight_and_stats(4, 48)
    h = stats.hessian() + torch.eye(48)
    spec = per_group(Int(2), 16, scale="float32")
    groups = [slice(start, start + 16) for start in (0, 16, 32)]
    alphas = start_of(weight, spec, h.diagonal())
    bits = torch.cat([nearest(weight[:, own], alphas[..., i, None]) for i, own in enumerate(groups)], -1)
    losses = []
    for _ in range(200):
        error = (weight - values_of(bits, alphas)).double()
        losses.append(float((error @ h.double() @ error.T).trace()))
        bits, alphas = solved(weight, bits, alphas, h, groups, spec)
    assert all(after <= before * (1 + 1e-4) for before, after in pairwise(losses))
    root, least = torch.linalg.cholesky(h.double()), 0.0
    for row in range(4):
        planes = torch.zeros(6, 48, dtype=torch.float64)
        for i, own in enumerate(groups):
            planes[2 * i : 2 * i + 2, own] = bits[:, row, own].double()
        target = root.T @ weight[row].double()[:, None]
        least += float(
            (target - root.T @ planes.T @ torch.linalg.lstsq(root.T @ planes.T, target).solution).square().sum()
        )
    assert losses[-1] == pytest.approx(least, rel=1e-3)


@pytest.mark.parametrize("act_order", [False, True])
def test_feedback_chooses_bits_as_the_loops_do(act_order):
    """No passes: the start's four levels, column by column, every error spread over the columns to come."""
    weight, stats = weight_and_stats(5, 48)
    value = encoded(DBLLM(passes=0, act_order=act_order), weight, stats, G16).dequantize()
    weight[:, 3] = 0  # never excited
    h = stats.hessian().diagonal()
    steps = steps_of(weight, G16, h)
    order = sorted(range(48), key=lambda column: -float(h[column])) if act_order else list(range(48))

    def quantize(i, place, x):
        s = float(steps[i, order[place] // 16])
        return min((-s, 0.0, s, 2 * s), key=lambda level: abs(level - x))

    expected = torch.empty(5, 48, dtype=torch.float64)
    expected[:, order] = swept(weight[:, order], inverse_factor(stats, order=order), quantize)
    assert torch.allclose(value.double(), expected, atol=1e-7)


def test_four_values_in_every_group_and_signs_in_the_zero_points():
    weight, stats = outlier_heavy(32)
    result = encoded(DBLLM(), weight, stats)
    assert len(result.parts) == 2
    value, planes = result.dequantize(), []
    for part in result.parts:
        plane = part.dequantize()
        factor = torch.where(part.grid.zero == 1, -part.grid.scale, part.grid.scale).repeat_interleave(128, 1)
        assert torch.equal(plane, torch.where(part.codes != part.grid.zero.repeat_interleave(128, 1), factor, 0.0))
        planes.append(plane)
    assert torch.equal(value, planes[0] + planes[1])
    for row, group in torch.cartesian_prod(torch.arange(32), torch.arange(2)).tolist():
        assert len(value[row, group * 128 : group * 128 + 128].unique()) <= 4


def test_solving_and_feedback_each_help():
    weight, stats = outlier_heavy(64)
    losses = {
        (passes, feedback): loss(weight, encoded(DBLLM(passes, feedback), weight, stats).dequantize(), stats)
        for passes in (0, 1, 4)
        for feedback in (False, True)
    }
    for feedback in (False, True):
        assert losses[4, feedback] <= losses[1, feedback] < losses[0, feedback]
    assert losses[4, True] < losses[4, False]


def test_without_statistics_it_is_the_weights_that_are_fitted():
    weight, _ = outlier_heavy(32)
    errors = [float((weight - encoded(DBLLM(passes), weight, None).dequantize()).square().sum()) for passes in (0, 4)]
    assert errors[1] < errors[0]


def test_files_hold_the_same_weight_in_as_many_bytes_as_planned():
    weight, stats = outlier_heavy(48, 384)
    layer = QLayer(encoded(DBLLM(), weight, stats))
    tensors = native.pack("x", layer)
    back, rest = native.unpack(native.describe({"x": layer}), tensors)
    assert not rest
    assert torch.equal(back["x"].weight.dequantize(), layer.weight.dequantize())
    assert sum(t.nbytes for t in tensors.values()) == DBLLM().stored_bytes((48, 384), DBLLM.own)


@pytest.mark.parametrize("recipe", ["dbllm-w3a16-g128", "dbllm-w2a16-g128-pow2", "dbllm-w2a16-g16-row", "dbllm-nf4"])
def test_refusals(llama: tuple[Path, Path], tmp_path: Path, recipe):
    with pytest.raises(ValueError, match="dbllm has two planes of one bit with plain factors"):
        lowbit.quantize(llama[0], recipe, tmp_path / "run", calibration=str(llama[1]))
    assert not list(tmp_path.glob("run/*.safetensors"))


@pytest.mark.parametrize("family", ["opt", "mixtral"])
def test_whole_runs(tmp_path: Path, family: str) -> None:
    """The loaded model holds what the files say, experts that saw few tokens included."""
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 8, "length": 32, "settings": ["dbllm.passes=1"]}
    run = lowbit.quantize(model, "dbllm-w2a16-g32", tmp_path / "run", **options)
    assert run.paper_bits == pytest.approx(2)
    assert all(0 < block["error_after"] < block["error_before"] for block in run.blocks)
    loaded_as_stored(run.path)
