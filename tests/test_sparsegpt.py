"""SparseGPT against the paper's steps in fp64, one column at a time, no lazy updates; then what its paper promises."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_magnitude import PLAIN
from tiny import save_model, save_text
from torch import Tensor

import lowbit
import lowbit.recipes
from lowbit.methods.gptq import GPTQ
from lowbit.methods.magnitude import Magnitude
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.sparsegpt import SparseGPT
from lowbit.methods.sparsity import Pruning
from lowbit.methods.views import Stats
from lowbit.methods.wanda import Wanda
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import Int, Spec, per_channel, per_group
from lowbit.numerics.stats import Gram

F64 = torch.float64


def inputs(tokens: int = 400, width: int = 64, seed: int = 0) -> Tensor:
    """Correlated inputs with a spectrum that falls, some channels larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    x = torch.randn(tokens, width, generator=generator) * torch.logspace(0, -2, width) @ basis
    x[:, [3, 20]] *= 10
    return x


def weights(rows: int = 24, width: int = 64, seed: int = 1) -> Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).bfloat16().float()


def observed(x: Tensor | None) -> Stats | None:
    if x is None:
        return None
    stats = Stats.observing(frozenset({"square", "gram"}))
    stats.update(x)
    return stats


def pruned(method: Pruning, weight: Tensor, x: Tensor | None, spec: Spec = PLAIN, round: Any = None) -> Tensor:
    made = method.encode(weight, spec, round or RTN(), MinMaxClip(), observed(x), scores=False, seed=0)  # type: ignore[attr-defined]
    return made.weight.dequantize()


def error(found: Tensor, weight: Tensor, x: Tensor) -> float:
    """tr((W - Ŵ) H (W - Ŵ)ᵀ) relative to tr(W H Wᵀ)."""
    return float((x @ (found - weight).T).square().sum() / (x @ weight.T).square().sum())


def upper(x: Tensor, damp: float = 0.01) -> Tensor:
    """U with UᵀU = H⁻¹ by the textbook's steps; dead inputs have H_jj = 1."""
    h = x.double().T @ x.double()
    dead = h.diagonal() == 0
    h += damp * h.diagonal().mean() * torch.eye(len(h), dtype=F64)
    h[dead, dead] = 1
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


Store = Callable[[int, Tensor], Tensor]


def naive(weight: Tensor, u: Tensor, number: float, among: int, block: int, store: Store) -> tuple[Tensor, Tensor]:
    """(values, dropped): every column's error is spread over all columns behind it at once.

    `among` > 0: at every M-th column the `number` least of the next M of each row; otherwise at every `block`-th column
    the part `number` of all entries of the block.
    """
    w, mask = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.bool)
    for j in range(weight.shape[1]):
        if among and j % among == 0:
            cost = w[:, j : j + among] ** 2 / u.diagonal()[j : j + among] ** 2
            for row in range(len(w)):
                for place in sorted(range(among), key=lambda k: float(cost[row, k]))[: int(number)]:
                    mask[row, j + place] = True
        if not among and j % block == 0:
            cost = w[:, j : j + block] ** 2 / u.diagonal()[j : j + block] ** 2
            flat = cost.flatten().tolist()
            width = cost.shape[1]
            for place in sorted(range(len(flat)), key=lambda k: flat[k])[: int(number * len(flat) + 1e-9)]:
                mask[place // width, j + place % width] = True
        value = store(j, w[:, j]).masked_fill(mask[:, j], 0.0)
        w[:, j + 1 :] -= ((w[:, j] - value) / u[j, j])[:, None] * u[j, j + 1 :]
        w[:, j] = value
    return w, mask


def halves(_: int, column: Tensor) -> Tensor:
    return column.bfloat16().double()


# --- the oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.7])
def test_blocks_are_chosen_on_weights_as_they_are_by_then(sparsity: float) -> None:
    weight, x = weights(), inputs()
    expected, mask = naive(weight, upper(x), sparsity, 0, 16, halves)
    found = pruned(SparseGPT(sparsity, block=16), weight, x)
    assert torch.equal(found == 0, mask)
    assert torch.allclose(found.double(), expected, atol=2**-6)  # a few bf16 roundings may fall the other way
    assert float((found.double() == expected).double().mean()) > 0.97
    per_block = (found == 0).view(24, 4, 16).sum((0, 2))
    assert per_block.tolist() == [int(sparsity * 24 * 16 + 1e-9)] * 4


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
def test_n_of_m_are_chosen_when_the_sweep_comes_to_them(pattern: str) -> None:
    weight, x = weights(), inputs()
    zeros, among = map(int, pattern.split(":"))
    expected, mask = naive(weight, upper(x), zeros, among, 0, halves)
    found = pruned(SparseGPT.named(pattern), weight, x)
    assert torch.equal(found == 0, mask)
    assert (found.view(-1, among) == 0).sum(1).eq(zeros).all()
    assert torch.allclose(found.double(), expected, atol=2**-6)
    assert torch.equal(found, pruned(SparseGPT(zeros / among, among, block=16), weight, x))


@pytest.mark.parametrize(
    "spec", [per_group(Int(4), 16), per_channel(Int(3)), per_group(Int(4, "asymmetric"), 32)], ids=str
)
@pytest.mark.parametrize("among", [0, 4])
def test_dropping_and_rounding_at_once(spec: Spec, among: int) -> None:
    """Ranges are those of W before the sweep; the errors of both spread together."""
    weight, x = weights(), inputs()
    grid = fit_range(weight, spec)
    width = 64 // grid.scale.shape[1]
    number = spec.number
    assert isinstance(number, Int)

    def nearest(column: int, values: Tensor) -> Tensor:
        scale = grid.scale[:, column // width].double()
        zero = 0.0 if grid.zero is None else grid.zero[:, column // width].double()
        return ((values / scale).round() + zero).clamp(number.low, number.high).sub(zero) * scale

    expected, mask = naive(weight, upper(x), 2 if among else 0.5, among, 16, nearest)
    made = SparseGPT(0.5, among, block=16).encode(weight, spec, RTN(), MinMaxClip(), observed(x), scores=False, seed=0)
    found, regions = made.weight.dequantize(), made.weight.regions
    assert regions is not None and torch.equal(regions.mask(1), mask)
    assert not found[mask].any()
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_gptq_named_rounds_in_a_sweep_of_its_own() -> None:
    """What SparseGPT leaves, unrounded, is what GPTQ starts from, and the mask stays."""
    weight, x, spec, round = weights(), inputs(), per_group(Int(4), 16), GPTQ()
    left, mask = naive(weight, upper(x), 0.5, 0, 16, lambda _, column: column)
    found = pruned(SparseGPT(block=16), weight, x, spec, round)
    assert not found[mask].any()
    part = round.swept(left.float(), spec, MinMaxClip(), observed(x), scores=False, dropped=mask)
    assert torch.allclose(found, part.dequantize().masked_fill(mask, 0.0), atol=1e-5)


# --- properties -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("among", [0, 4])
def test_uncorrelated_inputs_leave_magnitudes_within_blocks_and_change_nothing(among: int) -> None:
    order = torch.randperm(24 * 64, generator=torch.Generator().manual_seed(2))
    weight = (order + 1.0).view(24, 64) / 1024  # no two alike
    stats = Stats(gram=Gram.of(torch.eye(64), 64), tokens=64)
    method = SparseGPT(0.5, among, block=16)
    made = method.encode(weight, PLAIN, RTN(), MinMaxClip(), stats, scores=False, seed=0)
    expected = torch.cat([pruned(Magnitude(0.5, among), part, None) for part in weight.split(16, 1)], 1)
    assert torch.equal(made.weight.dequantize(), expected)
    assert torch.equal(pruned(method, weight, None), expected), "inputs never seen count alike"


def test_counts_are_exact_whatever_is_equal() -> None:
    stats = Stats(gram=Gram.of(torch.eye(256), 256), tokens=256)
    made = SparseGPT().encode(torch.ones(256, 256), PLAIN, RTN(), MinMaxClip(), stats, scores=False, seed=0)
    gone = made.weight.dequantize() == 0
    assert [int(gone[:, :128].sum()), int(gone[:, 128:].sum())] == [16384, 16384]


def test_nothing_and_everything() -> None:
    weight, x = weights(), inputs()
    assert torch.equal(pruned(SparseGPT(0.0), weight, x), weight)
    assert not pruned(SparseGPT(1.0), weight, x).any()
    assert not pruned(SparseGPT(1.0, 4), weight, x, per_channel(Int(4))).any()


@pytest.mark.parametrize("pattern", ["50", "2:4", "25"])
def test_the_better_it_knows_the_inputs_the_smaller_the_error(pattern: str) -> None:
    weight, x = weights(96, 128), inputs(2000, 128)
    errors = [error(pruned(kind.named(pattern), weight, x), weight, x) for kind in (SparseGPT, Wanda, Magnitude)]
    assert errors[0] < errors[1] < errors[2]


def test_rounding_at_once_is_better_than_rounding_afterwards_without_looking() -> None:
    weight, x, spec = weights(96, 128), inputs(2000, 128), per_group(Int(4), 32)
    left = pruned(SparseGPT(), weight, x)
    apart = fit_range(left, spec).quantize(left).masked_fill(left == 0, 0.0)
    assert error(pruned(SparseGPT(), weight, x, spec), weight, x) < error(apart, weight, x)


def test_dead_inputs_are_dropped_and_disturb_nothing() -> None:
    weight, x = weights(), inputs()
    x[:, 10:20] = 0
    found = pruned(SparseGPT(0.5, block=64), weight, x)
    assert not found[:, 10:20].any() and found.isfinite().all()
    alive = [j for j in range(64) if not 10 <= j < 20]
    expected, mask = naive(weight.masked_fill(x.abs().sum(0) == 0, 0.0), upper(x), 0.5, 0, 64, halves)
    assert torch.equal(found[:, alive] == 0, mask[:, alive])
    assert torch.allclose(found.double(), expected, atol=2**-6)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [PLAIN, per_group(Int(4), 16)], ids=str)
@pytest.mark.parametrize("pattern", ["50", "2:4"])
@pytest.mark.parametrize("kind", [SparseGPT, Wanda, Magnitude])
@pytest.mark.parametrize("round", [RTN(), GPTQ()])
def test_a_gpu_drops_the_same(spec: Spec, pattern: str, kind: type[Pruning], round: Any) -> None:
    weight, x, method = weights(), inputs(), kind.named(pattern)
    here, there = (
        method.encode(weight.to(d), spec, round, MinMaxClip(), observed(x.to(d)), scores=False, seed=0)  # type: ignore[attr-defined]
        for d in ("cpu", "cuda")
    )
    one, two = here.weight.dequantize(), there.weight.to("cpu").dequantize()
    assert torch.equal(one == 0, two == 0) or float(((one == 0) != (two == 0)).float().mean()) < 0.01
    assert error(two, weight, x) == pytest.approx(error(one, weight, x), rel=0.02)


# --- settings and models ----------------------------------------------------------------------------------------------


def test_words_and_settings() -> None:
    parse = lowbit.recipes.parse
    assert parse("sparsegpt50").encode == SparseGPT() and parse("sparsegpt4:8").encode == SparseGPT(0.5, 8)
    joint = parse("sparsegpt2:4-w4a16-g128")
    assert joint.encode == SparseGPT(0.5, 4) and joint.round == RTN() and joint.needs == {"gram"}
    assert parse("sparsegpt50+gptq-w3a16-g128").round == GPTQ()
    for settings in ({"damp": 0.0}, {"block": 0}):
        with pytest.raises(ValueError, match="damp must be positive and block at least 1"):
            SparseGPT(**settings)


@pytest.mark.parametrize("recipe", ["sparsegpt50", "sparsegpt2:4-w4a16-g16"])
def test_a_run_twice_is_the_same_bytes(recipe: str, tmp_path: Path) -> None:
    model, text = save_model("llama", tmp_path / "model", dtype=torch.bfloat16), save_text(tmp_path / "text.txt")
    for name in ("one", "two"):
        lowbit.quantize(model, recipe, tmp_path / name, calibration=str(text), samples=8, length=32)
    files = sorted((tmp_path / "one").glob("*.safetensors"))
    assert files and all(file.read_bytes() == (tmp_path / "two" / file.name).read_bytes() for file in files)


def test_linears_may_be_observed_behind_those_pruned_before(tmp_path: Path) -> None:
    """The first linears of a block see the same inputs either way, the last ones those of pruned weights."""
    model, text = save_model("llama", tmp_path / "model", dtype=torch.bfloat16), save_text(tmp_path / "text.txt")
    for value in ("true", "false"):
        settings = [f"sparsegpt.true_sequential={value}"]
        lowbit.quantize(
            model, "sparsegpt50", tmp_path / value, calibration=str(text), samples=8, length=32, settings=settings
        )
    first, second = (lowbit.load(tmp_path / value).model.layers[0] for value in ("true", "false"))
    assert torch.equal(first.self_attn.q_proj.weight, second.self_attn.q_proj.weight)
    assert not torch.equal(first.mlp.down_proj.weight, second.mlp.down_proj.weight)
