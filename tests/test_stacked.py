"""Experts rounded as a stack, against the same experts rounded one by one; and mixtures quantized either way."""

from __future__ import annotations

import hashlib
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit import recipes
from lowbit.graph.anatomy import Anatomy, BlockAnatomy, Heads, Site, Tap
from lowbit.methods.awq import AWQClip
from lowbit.methods.gptaq import GPTAQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import MinMaxClip
from lowbit.methods.stacked import _Columns
from lowbit.methods.views import Stats
from lowbit.numerics import feedback
from lowbit.numerics.feedback import inverse_factor, inverse_factors, sweep
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import E2M1, Int, Spec
from lowbit.stream import plan, rounding
from lowbit.stream.sweep import MICRO_BATCH, micro_batch

ENTRIES, ROWS, COLUMNS = 3, 24, 64


def inputs(entry: int, width: int = COLUMNS, tokens: int = 300) -> Tensor:
    """Correlated inputs [T, I] whose columns are of different sizes, one of them never excited."""
    generator = torch.Generator().manual_seed(entry)
    x = torch.randn(tokens, width, generator=generator) @ torch.randn(width, width, generator=generator)
    x = x * torch.rand(width, generator=generator)
    x[:, entry] = 0
    return x


def gram(entry: int, width: int = COLUMNS) -> Tensor:
    x = inputs(entry, width)
    return x.T @ x


@cache
def experts() -> tuple[list[Tensor], list[Stats]]:
    weights, stats = [], []
    for entry in range(ENTRIES):
        weights.append(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(100 + entry)))
        seen = Stats.observing(frozenset({"gram"}))
        seen.update(inputs(entry))
        stats.append(seen)
    return weights, stats


# --- factor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 40, 128, 300])
@pytest.mark.parametrize("ordered", [False, True])
def test_factors_of_a_stack_are_the_textbooks(width: int, ordered: bool) -> None:
    """H + λI in its order -> H⁻¹ -> its upper Cholesky factor, in fp64."""
    hs = [gram(entry, width).double().round().float() if width > 1 else torch.ones(1, 1) for entry in range(2)]
    orders = [h.diagonal().argsort(descending=True) if ordered else None for h in hs]
    factors = inverse_factors(hs, 0.01, orders)
    for u, h, order in zip(factors, hs, orders, strict=True):
        damped = h.double() + torch.diag(torch.where(h.diagonal() > 0, 0.01 * h.diagonal().double().mean(), 1.0))
        damped = damped if order is None else damped[order][:, order]
        truth = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
        assert torch.equal(u, u.triu())
        assert float((u - truth).abs().max() / truth.abs().max()) < 2e-5


def test_what_fails_is_factorized_by_itself() -> None:
    """Eigenvalues 2.05 and -0.05 take more damping; the others of the stack are as they would be without it."""
    bad, good = torch.tensor([[1.0, 1.05], [1.05, 1.0]]), torch.tensor([[2.0, 1.0], [1.0, 2.0]])
    factors = inverse_factors([good, bad, good], 0.01, [None] * 3)
    assert torch.equal(factors[1], inverse_factor(bad, 0.01))
    assert torch.equal(factors[0], factors[2]) and torch.allclose(factors[0], inverse_factor(good, 0.01))
    with pytest.raises(ValueError, match="even with heavy damping"):
        inverse_factors([good, torch.tensor([[1.0, 11.5], [11.5, 1.0]])], 0.01, [None] * 2)


def test_wide_ones_are_factorized_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit as `inverse_factor` does it, in every order."""
    monkeypatch.setattr(feedback, "_WIDE", 40)
    hs = [gram(entry, 40) for entry in range(3)]
    orders = [None, torch.randperm(40), hs[2].diagonal().argsort()]
    for u, h, order in zip(inverse_factors(hs, 0.01, orders), hs, orders, strict=True):
        assert torch.equal(u, inverse_factor(h, 0.01, order))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite: look for NaN"):
        inverse_factors([torch.eye(3), torch.full((3, 3), bad)], 0.01, [None] * 2)


# --- sweep ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [5, 32, 70, 128])
def test_a_sweep_over_a_stack_is_a_sweep_over_each(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64, where no tie is near: rounding to quarters, tile by tile."""
    monkeypatch.setattr(feedback, "_KERNEL_TILE", 16)
    weights = torch.randn(ENTRIES, 11, 70, dtype=torch.float64)
    factors = torch.stack([inverse_factor(gram(entry, 70), 0.01) for entry in range(ENTRIES)]).double()

    def to_quarters(_column: int, values: Tensor) -> Tensor:
        return (values * 4).round().clamp(-6, 5) / 4

    def round_tile(_first: int, columns: Tensor, errors: Tensor, shares: Tensor) -> None:
        for i in range(columns.shape[1]):
            value = columns[:, i] - torch.einsum("ei,eio->eo", shares[:, i, :i], errors[:, :i])
            columns[:, i] = to_quarters(i, value)
            errors[:, i] = value - columns[:, i]

    found = sweep(weights, factors, to_quarters, block=block, round_tile=round_tile)
    for entry in range(ENTRIES):
        assert torch.equal(found[entry], sweep(weights[entry], factors[entry], to_quarters, block=block))


@pytest.mark.parametrize("rule", ["symmetric", "asymmetric"])
def test_the_kernel_rounds_a_stack_as_torch_does(rule: str) -> None:
    """A tile with every entry's own groups, as act-order mixes them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    from lowbit.numerics.feedback_kernel import round_tile

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weights = torch.randn(ENTRIES, 40, 32, device=device)
    spec = Spec(Int(3, rule), (1, 8), "float32")  # type: ignore[arg-type]
    orders = [torch.randperm(32, device=device) for _ in range(ENTRIES)]
    grids = [fit_range(weight, spec) for weight in weights]
    shares = (0.1 * torch.randn(ENTRIES, 32, 32, device=device)).tril(-1)
    turned = torch.stack([weight.T[order] for weight, order in zip(weights, orders, strict=True)])
    torchs, kernels = _Columns(grids, weights[0].shape, orders), _Columns(grids, weights[0].shape, orders)
    expected, errors = turned.clone(), torch.zeros(ENTRIES, 48, 40, device=device)[:, :32]
    for i in range(32):
        value = expected[:, i] - torch.einsum("ei,eio->eo", shares[:, i, :i], errors[:, :i])
        expected[:, i] = torchs.round(i, value)
        errors[:, i] = value - expected[:, i]
    found, left = turned.clone(), torch.zeros(ENTRIES, 48, 40, device=device)[:, :32]
    round_tile(found, left, shares, kernels.group, kernels.scale, kernels.limits, kernels.offset, kernels.levels)
    equal = (kernels.levels == torchs.levels).all(1)
    assert equal.float().mean() > 0.95
    torch.testing.assert_close(found.mT[equal], expected.mT[equal], rtol=0, atol=1e-5)
    torch.testing.assert_close(left.mT[equal], errors.mT[equal], rtol=0, atol=1e-5)


# --- rounding ---------------------------------------------------------------------------------------------------------


FORMATS = {
    "int4": Spec(Int(4), (1, 16), "half"),
    "asymmetric": Spec(Int(3, "asymmetric"), (1, 16), "half"),
    "by row": Spec(Int(4), (1, -1), "float32"),
    "squares": Spec(Int(4), (8, 8), "float32"),
    "fp4": Spec(E2M1, (1, 16), "e4m3"),
}


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_is_rounded_as_its_weights_are(name: str, act_order: bool) -> None:
    """The same grids, all codes but those that a last bit decides, and what such a one leads to; no larger error."""
    weights, stats = experts()
    method = GPTQ(act_order=act_order, block=32)
    clip = AWQClip() if FORMATS[name].block[0] == 1 else MinMaxClip()
    found = method.round_stack(weights, FORMATS[name], clip, stats, scores=False)
    for weight, seen, codes in zip(weights, stats, found, strict=True):
        single = method.round(weight, FORMATS[name], clip, seen, scores=False)
        assert torch.equal(codes.grid.scale, single.grid.scale) and codes.codes.dtype == single.codes.dtype
        assert (codes.codes == single.codes).float().mean() > 0.98
        errors = []
        for each in (codes, single):
            difference = each.dequantize() - weight
            errors.append(float(((difference @ seen.hessian()) * difference).sum()))
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_gptaq_rounds_experts_as_gptq_does() -> None:
    weights, stats = experts()
    clip, spec = MinMaxClip(), FORMATS["int4"]
    pairs = zip(
        GPTAQ(block=32).round_stack(weights, spec, clip, stats, scores=False),
        GPTQ(block=32).round_stack(weights, spec, clip, stats, scores=False),
        strict=True,
    )
    assert all(torch.equal(ours.codes, theirs.codes) for ours, theirs in pairs)


def test_groups_fitted_on_the_way_are_not_stacked() -> None:
    assert GPTQ().stacks(FORMATS["int4"]) and not GPTQ(groups="fresh").stacks(FORMATS["int4"])


# --- whole mixtures ---------------------------------------------------------------------------------------------------

RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "gptq-w4a16-g32", {}),
    "natural order": ("mixtral", "gptq-w4a16-g32", {"settings": ["gptq.act_order=false"]}),
    "at once": ("mixtral", "awq+gptq-w4a16-g32", {"settings": ["gptq.true_sequential=false"]}),
    "qwen3": ("qwen3_moe", "awq+gptq-w3a16-g32-asym", {}),
    "deepseek": ("deepseek_v3", "gptq+lorc4-w4a16-g32", {}),
    "gptaq": ("qwen2_moe", "gptaq-w4a16-g16", {}),
    "rtn": ("mixtral", "rtn-w4a16-g32", {}),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mixtures")
    for family in {family for family, _, _ in RECIPES.values()}:
        save_model(family, path / family)
    save_text(path / "text.txt")
    return path


def quantize(root: Path, name: str, output: Path, **options: Any) -> lowbit.api.Result:  # type: ignore[name-defined]
    family, recipe, asked = RECIPES[name]
    return lowbit.quantize(
        root / family, recipe, output, calibration=str(root / "text.txt"), samples=12, length=16, **asked, **options
    )


def stored(directory: Path) -> dict[str, Tensor]:
    shards = sorted(directory.glob("model-*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def checksums(directory: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.glob("*.safetensors")}


@pytest.fixture
def stacking(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Experts are stacked on the CPU too, three at a time, and those of the fewest tokens starve; the jobs' sizes."""
    sizes: list[int] = []
    original = rounding._rounded_stack

    def noted(work: Any, taps: Any, stats: Any) -> Any:
        sizes.append(len(taps))
        return original(work, taps, stats)

    monkeypatch.setattr(rounding, "STACKED", ("cpu",))
    monkeypatch.setattr(rounding, "entry_bytes", lambda _shape: 1)
    monkeypatch.setattr(plan, "stack_bytes", lambda *_: 3)
    monkeypatch.setattr(rounding, "_rounded_stack", noted)
    monkeypatch.setattr(rounding, "STARVED", 48)
    return sizes


@pytest.mark.parametrize("name", RECIPES)
def test_a_mixture_is_what_it_is_one_by_one(root: Path, tmp_path: Path, name: str, stacking: list[int]) -> None:
    done = quantize(root, name, tmp_path / "stacked")
    assert (not stacking) == (name == "rtn") and max(stacking, default=0) <= 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rounding, "STACKED", ())
        single = quantize(root, name, tmp_path / "single")
    ours, theirs = stored(tmp_path / "stacked"), stored(tmp_path / "single")
    assert ours.keys() == theirs.keys()
    rounded = [key for key in ours if ".experts." in key and "low_rank" not in key]  # one code changes whole factors
    same = [float((ours[key] == theirs[key]).float().mean()) for key in rounded]
    assert sum(same) / len(same) > 0.97
    for mine, other in zip(done.blocks, single.blocks, strict=True):
        assert mine["error_after"] == pytest.approx(other["error_after"], rel=0.05)
        assert mine.get("experts") == other.get("experts")


def test_starved_experts_are_no_part_of_a_stack(root: Path, tmp_path: Path, stacking: list[int]) -> None:
    """They are rounded to nearest, as ever."""
    blocks = quantize(root, "deepseek", tmp_path / "out").blocks[1:]
    tokens = [count for block in blocks for count in block["experts"]["tokens"].values()]
    fed = sum(count >= rounding.STARVED for count in tokens)
    assert 0 < fed < len(tokens) and sum(stacking) <= fed


def test_a_killed_run_goes_on_in_stacks(root: Path, tmp_path: Path, stacking: list[int]) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quantize(root, "mixtral", whole)
    shutil.copytree(whole, cut)
    for name in ("model-00003-of-00003.safetensors", "reports/block-00001.json", "model.safetensors.index.json"):
        (cut / name).unlink()
    before = len(stacking)
    quantize(root, "mixtral", cut)
    assert len(stacking) > before and checksums(cut) == checksums(whole)


def test_more_tokens_at_once_for_more_experts() -> None:
    """On a GPU, and unless a method trains by micro-batches."""
    recipe, trained = (recipes.resolve(name).recipe for name in ("gptq-w4a16-g32", "omniquant-w4a16-g32"))

    def times(experts: int, device: str = "cuda", recipe: Recipe = recipe) -> float:
        dense = Tap((Site("q", (8, 8)),))
        taps = [Tap((Site(f"experts.{index}.up", (8, 8), expert=index),)) for index in range(experts)]
        blocks = (BlockAnatomy((dense,), ()), BlockAnatomy((dense, *taps), ()))
        anatomy = Anatomy("some", "layers", "embedding", "head", None, False, Heads(1, 1, 8), blocks)
        return micro_batch(anatomy, recipe, torch.device(device)) / MICRO_BATCH

    assert [times(experts) for experts in (0, 4, 8, 16, 64, 256)] == [1, 1, 2, 4, 4, 4]
    assert times(64, "cpu") == times(64, recipe=trained) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_a_stack_on_a_gpu_is_what_it_is_on_a_cpu(name: str, act_order: bool) -> None:
    rows, columns = 96, 256
    weights = [torch.randn(rows, columns) for _ in range(5)]
    found = []
    for device in ("cpu", "cuda"):
        stats = [Stats.observing(GPTQ.needs) for _ in weights]
        for entry, seen in enumerate(stats):
            seen.update(inputs(entry, columns, 2048).bfloat16().to(device))
        moved = [weight.to(device) for weight in weights]
        method = GPTQ(act_order=act_order)
        found.append(method.round_stack(moved, FORMATS[name], MinMaxClip(), stats, scores=False))
    for ours, theirs in zip(*found, strict=True):
        assert (ours.codes == theirs.codes.cpu()).float().mean() > 0.98
