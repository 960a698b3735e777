"""Wanda against its formula in loops: who goes in every group, who stays as it was, and what GPTQ makes of the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_magnitude import PLAIN, smallest
from tiny import save_model, save_text, tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
import lowbit.recipes
from lowbit.data.calibrate import load_calibration
from lowbit.methods.gptq import GPTQ
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.sparsity import count
from lowbit.methods.views import Stats
from lowbit.methods.wanda import Wanda
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import Int, Spec, per_channel, per_group
from lowbit.numerics.stats import Gram, Square

F64 = torch.float64


def inputs(tokens: int = 200, width: int = 48, seed: int = 0) -> Tensor:
    """Correlated inputs, some channels much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5 + torch.eye(width)
    x = torch.randn(tokens, width, generator=generator) @ mix
    x[:, [3, 20]] *= 20
    return x


def weights(rows: int = 16, width: int = 48, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def observed(x: Tensor, *needs: Any) -> Stats:
    stats = Stats.observing(frozenset(needs or ("square", "gram")))
    for part in x.split(64):
        stats.update(part)
    return stats


def pruned(method: Wanda, weight: Tensor, x: Tensor | None, spec: Spec = PLAIN, round: Any = None) -> Tensor:
    stats = None if x is None else observed(x)
    made = method.encode(weight, spec, round or RTN(), MinMaxClip(), stats, scores=False, seed=0)
    return made.weight.dequantize()


def score(weight: Tensor, x: Tensor) -> list[list[float]]:
    """|W_ij| · ‖X_j‖₂ by loops in fp64."""
    norms = [sum(float(value) ** 2 for value in x[:, j]) ** 0.5 for j in range(x.shape[1])]
    return [[abs(float(w)) * norms[j] for j, w in enumerate(row)] for row in weight]


# --- the statistic ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_the_gram_matrixs_diagonal(dtype: torch.dtype) -> None:
    x = inputs().to(dtype)
    square, gram = Square(), Gram()
    for part in x.split(37):
        square.update(part)
        gram.update(part)
    assert torch.allclose(square.norm.double(), x.double().norm(dim=0), rtol=1e-6)
    assert torch.allclose(square.norm.square(), gram.matrix.diagonal(), rtol=1e-4)


def test_norms_follow_a_fold() -> None:
    x, scale = inputs(), torch.rand(48) + 0.1
    stats = observed(x, "square")
    stats.transport(scale)
    assert stats.square is not None
    assert torch.allclose(stats.square.norm, observed(x / scale, "square").square.norm, rtol=1e-5)  # type: ignore[union-attr]


# --- who goes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65, 0.75])
def test_in_every_row_the_least_go_and_the_others_stay_bit_for_bit(sparsity: float) -> None:
    weight, x = weights(), inputs()
    found = pruned(Wanda(sparsity), weight, x)
    for row, values in enumerate(score(weight, x)):
        gone = smallest(values, int(sparsity * 48 + 1e-9))
        assert [found[row, j] == (0 if j in gone else weight[row, j]) for j in range(48)] == [True] * 48
        assert int((found[row] == 0).sum()) == count(sparsity, 48)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_of_every_m_inputs_n_go(pattern: str) -> None:
    weight, x = weights(), inputs()
    found = pruned(Wanda.named(pattern), weight, x)
    zeros, among = map(int, pattern.split(":"))
    for row, values in enumerate(score(weight, x)):
        for start in range(0, 48, among):
            gone = {start + j for j in smallest(values[start : start + among], zeros)}
            assert {j for j in range(start, start + among) if found[row, j] == 0} == gone


def test_inputs_of_one_norm_leave_the_magnitude() -> None:
    generator, x = torch.Generator().manual_seed(2), inputs()
    weight = torch.stack([torch.randperm(48, generator=generator) + 1.0 for _ in range(16)]) / 64
    x /= x.norm(dim=0)
    found = pruned(Wanda(), weight, x)
    for row in range(16):
        gone = smallest(weight[row].abs().tolist(), 24)
        assert {j for j in range(48) if found[row, j] == 0} == gone
    assert torch.equal(found, pruned(Wanda(), weight, None)), "inputs never seen count alike"
    assert torch.equal(found, pruned(Wanda(score="magnitude"), weight, inputs()))


def test_a_larger_input_never_loses_more_and_a_common_factor_changes_nothing() -> None:
    weight, x = weights(), inputs()
    before = pruned(Wanda(), weight, x) == 0
    for channel in (0, 7, 20):
        larger = x.clone()
        larger[:, channel] *= 3
        after = pruned(Wanda(), weight, larger) == 0
        assert int(after[:, channel].sum()) <= int(before[:, channel].sum())
        assert not (after[:, channel] & ~before[:, channel]).any()
    assert torch.equal(pruned(Wanda(), weight, 1024 * x) == 0, before)


def test_dead_inputs_go_first() -> None:
    weight, x = weights(), inputs()
    x[:, :20] = 0
    assert not pruned(Wanda(), weight, x)[:, :20].any()
    assert not pruned(Wanda(score="obs"), weight, x)[:, :20].any()


@pytest.mark.parametrize("group", ["matrix", "column", "block"])
def test_other_groups(group: str) -> None:
    weight, x = weights(6, 300), inputs(width=300)
    found = pruned(Wanda(0.3, group=group), weight, x)  # type: ignore[arg-type]
    flat = score(weight, x)
    spans = {
        "matrix": [(0, 300)],
        "column": [(j, j + 1) for j in range(300)],
        "block": [(0, 128), (128, 256), (256, 300)],
    }
    expected = weight.clone()
    for start, stop in spans[group]:
        places = [(i, j) for i in range(6) for j in range(start, stop)]
        for place in smallest([flat[i][j] for i, j in places], int(0.3 * len(places) + 1e-9)):
            expected[places[place]] = 0
    assert torch.equal(found, expected)


def test_obs_is_what_one_entry_costs_when_all_others_answer() -> None:
    weight, x = weights(), inputs()
    h = x.double().T @ x.double()
    h += 0.01 * h.diagonal().mean() * torch.eye(48, dtype=F64)
    inverse = torch.linalg.inv(h)
    found = pruned(Wanda(score="obs"), weight, x)
    for row in range(16):
        gone = smallest([float(weight[row, j]) ** 2 / float(inverse[j, j]) for j in range(48)], 24)
        assert {j for j in range(48) if found[row, j] == 0} == gone


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_variant_drops_a_common_part_of_every_rows_scores(sparsity: float) -> None:
    weight, x = weights(64, 200), inputs(width=200)
    weight[::2] **= 3  # rows whose scores are spread differently
    mask = pruned(Wanda(sparsity, cumulative=True), weight.bfloat16().float(), x) == 0
    assert abs(float(mask.float().mean()) - sparsity) <= 0.001
    taken, left = [], []
    for row, values in enumerate(score(weight.bfloat16().float(), x)):
        order = sorted(range(200), key=lambda j: values[j])
        number = int(mask[row].sum())
        assert {j for j in range(200) if mask[row, j]} == set(order[:number])
        taken.append(sum(values[j] for j in order[:number]) / sum(values))
        left.append(sum(values[j] for j in order[: number + 1]) / sum(values))
    assert max(taken) <= min(left) + 1e-6, "no row could drop more below the part that another drops"
    if sparsity == 0.5:
        assert len(set(mask.sum(1).tolist())) > 1


# --- with a weight format ---------------------------------------------------------------------------------------------


def naive_gptq(weight: Tensor, mask: Tensor, x: Tensor, spec: Spec, damp: float) -> tuple[Tensor, Tensor]:
    """(values, how near any row came to a tie): GPTQ in fp64, column by column, dropped entries rounding to zero."""
    h = x.double().T @ x.double()
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=F64)
    u = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    scale = fit_range(weight.masked_fill(mask, 0.0), spec).scale.double()
    scale = scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1)
    w, values, tie = weight.double().clone(), torch.zeros_like(weight, dtype=F64), torch.ones(len(weight), dtype=F64)
    assert isinstance(spec.number, Int)
    for j in range(len(h)):
        level = w[:, j] / scale[:, j]
        near = ((level - level.floor()) - 0.5).abs()
        tie = torch.where(mask[:, j], tie, torch.minimum(tie, near))
        rounded = level.round().clamp(spec.number.low, spec.number.high) * scale[:, j]
        values[:, j] = rounded.masked_fill(mask[:, j], 0.0)
        w[:, j:] -= ((w[:, j] - values[:, j]) / u[j, j])[:, None] * u[j, j:]
    return values, tie


@pytest.mark.parametrize("spec", [per_group(Int(4), 16), per_channel(Int(3))], ids=str)
def test_gptq_keeps_the_mask_and_makes_up_for_it(spec: Spec) -> None:
    weight, x = weights(), inputs()
    mask = pruned(Wanda(), weight, x) == 0
    expected, tie = naive_gptq(weight, mask, x, spec, 0.01)
    found = pruned(Wanda(), weight, x, spec, GPTQ(act_order=False))
    sure = tie > 1e-4
    assert sure.sum() > 8
    assert torch.allclose(found[sure].double(), expected[sure], atol=1e-6)
    assert not found[mask].any()


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
def test_compensation_beats_none_under_every_setting_of_gptq(act_order: bool, groups: Any) -> None:
    weight, x, spec = weights(), inputs(), per_group(Int(4), 16)
    mask = pruned(Wanda(), weight, x) == 0
    found = pruned(Wanda(), weight, x, spec, GPTQ(act_order=act_order, groups=groups))
    plain = pruned(Wanda(), weight, x, spec)
    assert not found[mask].any() and not plain[mask].any()
    error, without = (float((x @ (each - weight).T).square().sum()) for each in (found, plain))
    assert error < without


def test_fresh_groups_are_fitted_to_kept_entries_alone() -> None:
    """A dropped weight, however large the corrections make it, is no part of any range."""
    weight, x = weights(), torch.randn(500, 48, generator=torch.Generator().manual_seed(3))
    mask = torch.zeros(16, 48, dtype=torch.bool)
    mask[:, 16:24] = True
    weight[:, 16:24] = 100.0
    stats = observed(x, "gram")
    part = GPTQ(act_order=False, groups="fresh").swept(
        weight, per_group(Int(4), 16), MinMaxClip(), stats, scores=False, dropped=mask
    )
    assert float(part.grid.scale[:, 1].max()) * 8 < 60


def test_codes_are_those_of_nearest_rounding_where_nothing_compensates() -> None:
    weight, x, spec = weights(), inputs(), per_group(Int(4), 16)
    mask = pruned(Wanda(), weight, x) == 0
    kept = weight.masked_fill(mask, 0.0)
    assert torch.equal(pruned(Wanda(), weight, x, spec), fit_range(kept, spec).quantize(kept).masked_fill(mask, 0.0))
    starved = pruned(Wanda(), weight, None, spec, GPTQ())
    assert torch.equal(starved, pruned(Wanda(), weight, None, spec)), "without inputs GPTQ rounds to nearest"


# --- settings and models ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group": "matrix", "among": 4}, "N:M compares entries of a row: leave group=row"),
        ({"group": "block", "cumulative": True}, "the cumulative variant compares entries of a row"),
        ({"among": 4, "cumulative": True}, "keep one of them"),
        ({"damp": 0.0}, "damp must be positive"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wanda(**settings)


def test_statistics_are_those_that_the_score_reads() -> None:
    assert Wanda().needs == {"square"} and Wanda(score="obs").needs == {"gram"}
    parse = lowbit.recipes.parse
    assert parse("wanda50").needs == {"square"} and parse("wanda50+gptq-w4a16").needs == {"square", "gram"}
    assert not parse("wanda50").sequential and parse("wanda50").calibrated
    chosen = lowbit.recipes.resolve("wanda50", settings=["wanda.true_sequential=true", "wanda.score=obs"]).recipe
    assert chosen.sequential and chosen.encode == Wanda(score="obs", true_sequential=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_text(tmp_path_factory.mktemp("text") / "text.txt")


def first_inputs(model: Any, ids: Tensor, path: str) -> Tensor:
    seen = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(ids)
    handle.remove()
    return seen[0].flatten(0, -2)


@torch.no_grad()
def test_experts_are_pruned_by_the_tokens_routed_to_them(tmp_path: Path, text: Path) -> None:
    """Every expert's mask from transformers' own model: its router's two choices of every token."""
    path = save_model("mixtral", tmp_path / "model")
    lowbit.quantize(path, "wanda50", tmp_path / "run", calibration=str(text), samples=16, length=32)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    ids = torch.stack(load_calibration(str(text), tokenizer(model.config.vocab_size), 16, 32, 0))
    block = model.model.layers[0].mlp
    x = first_inputs(model, ids, "model.layers.0.mlp")
    routed = (x @ block.gate.weight.T).topk(2).indices
    loaded = lowbit.load(tmp_path / "run").model.layers[0].mlp.experts
    for expert in range(4):
        tokens = x[(routed == expert).any(1)]
        assert 32 <= len(tokens) < len(x)
        found = loaded.get_submodule(f"{expert}.gate_up_proj").layer.weight.dequantize()
        original = block.experts.gate_up_proj[expert]
        norms = tokens.double().norm(dim=0)
        for row in range(len(original)):
            gone = smallest((original[row].abs().double() * norms).tolist(), 32)
            assert {j for j in range(64) if found[row, j] == 0} == gone


def test_a_run_twice_is_the_same_bytes_and_transforms_are_carried_over(tmp_path: Path, text: Path) -> None:
    path = save_model("llama", tmp_path / "model", dtype=torch.bfloat16)
    for recipe in ("wanda50", "smoothquant+wanda2:4+gptq-w8a8"):
        for name in ("one", "two"):
            target = tmp_path / f"{name}-{recipe[:5]}"
            lowbit.quantize(path, recipe, target, calibration=str(text), samples=8, length=32)
        files = sorted(target.glob("*.safetensors"))
        assert files
        twin = tmp_path / f"one-{recipe[:5]}"
        assert all(file.read_bytes() == (twin / file.name).read_bytes() for file in files)
