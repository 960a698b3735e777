"""FlatQuant: its transforms against dense matrices in fp64, what it promises of real blocks, and what it may cost."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import Workbench
from tiny import save_model, save_text, tokenizer
from torch import Tensor

import lowbit
from lowbit.graph.anatomy import Rows
from lowbit.methods import flat_block, flat_maps, flatquant
from lowbit.methods.flat_block import Live
from lowbit.methods.flat_maps import Group, InputMap, Matrices, find_groups, inverse_weight, turn_values
from lowbit.methods.flatquant import FlatQuant, Training
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.scheme import Scheme
from lowbit.modules.attention import attach
from lowbit.numerics.clipping import clamped, quantize_clipped
from lowbit.numerics.grid import fit_range, from_units, grid_from_range, to_units, unit_range
from lowbit.numerics.kv import KV
from lowbit.numerics.maps import Kronecker, kronecker_sizes
from lowbit.numerics.spec import E2M1, NF4, Int, Spec, mx, nvfp4, per_channel, per_group, per_tensor, per_token
from lowbit.numerics.ste import quantize_between
from lowbit.recipes import resolve
from lowbit.stream.checkpoint import Checkpoint

F64 = torch.float64
FAMILIES = ["llama", "qwen2", "opt", "mixtral"]
KV4 = KV(keys=4, values=4, rule="zero-point")
W4A4 = Scheme(per_channel(Int(4)), per_token(Int(4)))


def bench(family: str, settings: FlatQuant, scheme: Scheme = W4A4, **options: Any) -> Workbench:
    return Workbench(family, Recipe(scheme, RTN(), MinMaxClip(), reconstruct=(settings,)), **options)


def disturb(flat: Training, by: float = 0.1) -> None:
    """Move everything that is trained: nothing in a test may hold because a parameter has its initial value."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameters in flat.trained:
            for parameter in parameters:
                parameter.add_(by * torch.randn(parameter.shape, generator=generator))


def outputs(flat: Training) -> Tensor:
    """Outputs in training mode, one behind the other."""
    with torch.no_grad():
        live = flat.live(torch.float32, flat.matrices.pairs())
        return torch.cat([forward(flat, batch, live) for batch in range(flat.view.batches)])


def forward(flat: Training, batch: int, live: Live) -> Tensor:
    return flat.forward(batch, flat.view.inputs(batch, "float"), live)


def error(flat: Training) -> float:
    target = torch.cat([flat.view.target(batch) for batch in range(flat.view.batches)])
    return float((outputs(flat) - target).square().mean())


# --- quantization with thresholds -------------------------------------------------------------------------------------

SPECS = [
    *(per_channel(Int(4)), per_group(Int(3, "asymmetric"), 8), per_group(E2M1, 16), per_group(NF4, 8), mx(E2M1)),
    *(nvfp4(), per_token(Int(4)), per_tensor(Int(4, "asymmetric")), Spec(Int(4), (4, -1))),
    per_group(Int(4), 8, scale="m2"),
]


@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_clipped_quantization_is_the_chain_it_replaces(spec: Spec, clamp: bool) -> None:
    """Values to the last bit, gradients of x and of both thresholds to rounding, against autograd of small steps."""
    x = torch.randn(12, 32, requires_grad=True)
    shape = unit_range(x, spec.block)[0].shape
    low, high = ((0.5 + 0.5 * torch.rand(shape)).requires_grad_() for _ in range(2))
    quantized = quantize_clipped(x, spec, low, high, clamp=clamp)
    units = to_units(x, spec.block)
    bottom, top = units.amin((-3, -1)), units.amax((-3, -1))
    bottom, top = (bottom.clamp_max(0), top.clamp_min(0)) if clamp else (bottom, top)
    spread = [end[:, None, :, None] for end in (bottom * low, top * high)]
    inside = from_units(torch.minimum(torch.maximum(units, spread[0]), spread[1]), x.shape) if clamp else x
    chain = quantize_between(inside, bottom * low, top * high, spec)
    assert torch.equal(quantized, chain)
    assert torch.equal(quantized, grid_from_range(bottom * low, top * high, spec).quantize(inside))
    weight = torch.randn(12, 32)
    wanted = torch.autograd.grad((chain * weight).sum(), (x, low, high), allow_unused=True)
    for ours, theirs in zip(torch.autograd.grad((quantized * weight).sum(), (x, low, high)), wanted, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max()) + 1e-7


def test_a_stored_clamped_weight_has_the_grid_of_training() -> None:
    """Clamped values reach their thresholds, so plain min-max rounding of what is stored is what training saw."""
    x, spec = torch.randn(12, 32), per_channel(Int(4))
    low, high = torch.rand(12, 1), torch.rand(12, 1)
    stored = clamped(x, spec, x.amin(1, keepdim=True) * low, x.amax(1, keepdim=True) * high)
    assert torch.equal(fit_range(stored, spec).quantize(stored), quantize_clipped(x, spec, low, high, clamp=True))


# --- matrices ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["svd", "inverse"])
def test_matrices_start_orthogonal_and_stay_invertible(form: Any) -> None:
    sizes = (6, 4, 6, 1, 5)
    matrices = Matrices(sizes, form, torch.Generator().manual_seed(0), torch.device("cpu"))
    pairs = matrices.pairs(F64)
    assert [len(p) for p, _ in pairs] == list(sizes) and not torch.allclose(pairs[0][0], pairs[2][0])
    for p, _ in pairs:
        assert torch.allclose(p @ p.T, torch.eye(len(p), dtype=F64), atol=1e-6)
        assert len(p) == 1 or not torch.allclose(p, torch.eye(len(p), dtype=F64), atol=0.1)
    with torch.no_grad():
        for parameter in matrices.parameters:
            parameter.add_(0.3 * torch.randn_like(parameter))
    for p, inverse in matrices.pairs(F64):
        assert torch.allclose(p @ inverse.T, torch.eye(len(p), dtype=F64), atol=1e-9)
    conditions = [1 / torch.linalg.cond(p) for p, _ in matrices.pairs(F64)]
    assert float(matrices.balance()) == pytest.approx(float(min(conditions).detach()), rel=1e-4)


def test_svd_form_is_its_definition() -> None:
    """P = U₀ C(A) diag(σ) (V₀ C(B))ᵀ with C(A) = (I - A/2)⁻¹(I + A/2) for the skew A of a lower triangle."""
    matrices = Matrices((5,), "svd", torch.Generator().manual_seed(0), torch.device("cpu"))
    u0, v0 = matrices._bases[5].double()
    with torch.no_grad():
        matrices._skews[5].normal_()
        matrices._sigmas[5].uniform_(0.5, 2)
    one = torch.eye(5, dtype=F64)
    skews = [x.tril(-1) - x.tril(-1).T for x in matrices._skews[5].detach().double()]
    c = [torch.linalg.inv(one - a / 2) @ (one + a / 2) for a in skews]
    expected = u0 @ c[0] @ torch.diag(matrices._sigmas[5][0].detach().double()) @ (v0 @ c[1]).T
    assert torch.allclose(matrices.pairs(F64)[0][0], expected, atol=1e-12)
    assert torch.allclose(matrices.pairs()[0][0].double(), expected, atol=1e-5)


@pytest.mark.parametrize("width", [6, 12, 86 * 128, 23])
def test_every_width_has_a_transform(width: int) -> None:
    """x P (W P⁻ᵀ)ᵀ = x Wᵀ, against the dense Kronecker product in fp64 where that is small; 23 is 1·23."""
    sizes = kronecker_sizes(width)
    matrices = Matrices(sizes, "svd", torch.Generator().manual_seed(0), torch.device("cpu"))
    with torch.no_grad():
        for parameter in matrices.parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, w = torch.randn(3, width, dtype=F64), torch.randn(4, width, dtype=F64)
    pairs = matrices.pairs(F64)
    mapped = Kronecker(pairs[0][0], pairs[1][0], sizes).apply(x)
    weight = inverse_weight(w, Group((), sizes, None, 0, 1), [inverse for _, inverse in pairs])
    assert torch.allclose(mapped @ weight.T, x @ w.T, rtol=1e-9, atol=1e-7)
    if width < 100:
        dense = torch.kron(pairs[0][0], pairs[1][0])
        assert torch.allclose(mapped, x @ dense, atol=1e-10)
        assert torch.allclose(weight, w @ torch.linalg.inv(dense).T, atol=1e-9)


def test_values_are_turned_in_every_head() -> None:
    from lowbit.graph.anatomy import Site

    p, w, bias = torch.randn(4, 4, dtype=F64), torch.randn(24, 5, dtype=F64), torch.randn(24, dtype=F64)
    rows = tuple(range(12, 24))
    x = torch.randn(7, 5, dtype=F64)
    v = (x @ w.T + bias)[:, 12:].reshape(7, 3, 4) @ p
    source = Rows(Site("qkv", (24, 5)), rows)
    turned = x @ turn_values(source, w, p).T + turn_values(source, bias, p)
    assert torch.allclose(turned[:, 12:], v.reshape(7, 12)) and torch.allclose(turned[:, :12], (x @ w.T + bias)[:, :12])


# --- which linears share what -----------------------------------------------------------------------------------------


def test_groups_of_a_mixture() -> None:
    """One P_a, one P_o, one P_ug for all experts, one P_d for all experts; the router is no part of any."""
    part = bench("mixtral", FlatQuant()).work.anatomy
    groups = find_groups(part, {site.name for site in part.sites}, transforms=True, values=False)
    assert [len(group.taps) for group in groups] == [1, 1, 4, 4]
    assert groups[1].value is not None and groups[1].sizes == (4, 16) and groups[1].online == (2, None)
    assert [group.factors for group in groups] == [(0, 1), (2, 3), (4, 5), (6, 7)]
    assert "mlp.gate" not in {site.name for group in groups for tap in group.taps for site in tap.sites}


def test_only_what_is_quantized_is_transformed() -> None:
    part = bench("llama", FlatQuant()).work.anatomy
    groups = find_groups(part, {"mlp.down_proj"}, transforms=True, values=False)
    assert [group.taps[0].name for group in groups] == ["mlp.down_proj"]
    groups = find_groups(part, set(), transforms=True, values=True)
    assert [(group.taps[0].name, group.factors) for group in groups] == [("self_attn.o_proj", (None, 0))]
    assert find_groups(part, set(), transforms=False, values=True) == []


def test_without_proof_for_heads_the_output_projection_gets_a_pair() -> None:
    part = replace(bench("llama", FlatQuant()).work.anatomy, head_width=0)
    group = find_groups(part, {"self_attn.o_proj"}, transforms=True, values=True)[0]
    assert group.value is None and group.sizes == (8, 8) and group.online == (0, 1)


# --- the function is preserved ----------------------------------------------------------------------------------------


def unquantized(x: Tensor, *_: Any, dtype: torch.dtype, **__: Any) -> Tensor:
    return x.to(dtype)


@pytest.mark.parametrize("form", ["svd", "inverse"])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_changes_while_nothing_is_quantized(family: str, form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantizers and clamps off: before merging and after, with grouped queries, biases and experts."""
    monkeypatch.setattr(flat_block, "quantize_clipped", unquantized)
    work = bench(family, FlatQuant(lct=False, form=form), outliers=True)
    view = work.student()
    flat = Training(view, FlatQuant(lct=False, form=form))
    disturb(flat)
    target = torch.cat([view.target(batch) for batch in range(view.batches)])
    assert float((outputs(flat) - target).abs().max() / target.abs().max()) < 1e-4
    before = {site.name: view.weight(site) for site in view.anatomy.sites}
    flat.finish()
    assert all(not torch.allclose(view.weight(site), before[site.name], rtol=0.1) for site in view.anatomy.sites)
    assert work.change() < 1e-4


def test_joined_micro_batches_give_the_gradients_of_single_ones() -> None:
    """As on a GPU: three micro-batches in one call of the block, and a fourth that is called differently alone."""
    found = []
    for joins in (False, True):
        flat = Training(bench("llama", FlatQuant(), batches=4).student(), FlatQuant())
        flat.view.joins = joins  # type: ignore[attr-defined]
        text = flat.view._text  # type: ignore[attr-defined]
        flat.view._text = replace(text, alike=lambda a, b: max(a, b) < 3)  # type: ignore[attr-defined]
        disturb(flat, 0.3)
        assert flat.view.joined(range(4)) == ([(0, 1, 2), 3] if joins else [0, 1, 2, 3])
        loss = flat.gradients([0, 1, 2, 3])
        found.append([loss, *(p.grad for group in flat.trained for p in group if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_keys_are_mapped_back() -> None:
    """With P_h and 8-bit keys the output stays near; with another matrix for the inverse it does not."""
    scheme = Scheme(None, None, kv=KV(keys=8, values=8, rule="zero-point"))
    flat = Training(bench("llama", FlatQuant(), scheme).student(), FlatQuant())
    disturb(flat, 0.3)
    assert flat.key is not None and len(flat.matrices.pairs()[flat.key][0]) == 16
    assert error(flat) < 1e-3
    flat.key = 0
    assert error(flat) < 1e-3  # P_v is as good a map as any
    monkey = flat.live(torch.float32, flat.matrices.pairs())
    monkey["inverse", "0"] = monkey["matrix", "0"].flip(0)
    with torch.no_grad():
        difference = forward(flat, 0, monkey) - flat.view.target(0)
    assert float(difference.square().mean()) > 1e-3


# --- training is what is stored ---------------------------------------------------------------------------------------

STORED = [
    ("llama", "flatquant-w4a4kv4", ()),
    ("qwen2", "flatquant-w3a3kv3", ()),
    ("opt", "flatquant-w4a4", ("flatquant.form=inverse", "flatquant.epochs=5")),
    ("mixtral", "flatquant-w4a4", ("flatquant.epochs=2",)),
    ("llama", "flatquant-w4a16-g16-asym", ("flatquant.epochs=3",)),
    ("llama", "flatquant-w16a16kv4", ("flatquant.epochs=3",)),
    ("llama", "flatquant-w4a16", ("flatquant.before=true", "flatquant.epochs=3")),
]


@pytest.mark.parametrize(("family", "recipe", "settings"), STORED, ids=lambda x: x if isinstance(x, str) else "")
def test_the_loaded_block_computes_what_training_computed(
    family: str, recipe: str, settings: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bits on. Between the two lie fp64 inverses and other orders of sums: a rare value rounds to the other side.

    (Without thresholds it is not rare: -amax lies in the middle between -7 and -8 under the default rule of inputs.)
    """
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda self: tokenizer(self.config.vocab_size))
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    finish = Training.finish

    def watched(flat: Training) -> None:
        if not seen:
            with torch.no_grad():
                trained = forward(flat, 0, flat.live(torch.float32, flat.matrices.pairs()))
            seen.append((flat.view.inputs(0, "float"), trained, flat.view.target(0)))
        finish(flat)

    monkeypatch.setattr(Training, "finish", watched)
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    options: dict[str, Any] = {"calibration": str(text), "samples": 16, "length": 32}
    run = lowbit.quantize(model, recipe, tmp_path / "out", settings=list(settings), **options)
    loaded = lowbit.load(tmp_path / "out", dtype=torch.float32)
    hidden, trained, target = seen[0]
    block = loaded.get_submodule("model.decoder.layers.0" if family == "opt" else "model.layers.0")
    block.register_forward_pre_hook(_replaced(hidden), with_kwargs=True)
    outputs: list[Tensor] = []
    block.register_forward_hook(lambda _m, _a, y: outputs.append(y[0] if isinstance(y, tuple) else y))
    with torch.no_grad():
        loaded(torch.full(hidden.shape[:2], 5), use_cache=False)
    lost = float((trained - target).square().mean())
    assert lost > 0
    assert float((outputs[0] - trained).square().mean()) < 0.02 * lost
    assert float(((outputs[0] - trained).abs() > 1e-3 * trained.abs().max()).any(-1).float().mean()) < 0.2
    assert all(block["error_after"] < block["error_before"] for block in run.blocks) or "w16" in recipe


def _replaced(hidden: Tensor) -> Any:
    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

    return hook


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["opt"])
def test_planted_outliers(family: str) -> None:
    """Block error: trained < initial < plain rounding, on a block whose norms have a few large gains."""
    plain = bench(family, FlatQuant(lt=False, ps=False, lct=False), outliers=True)
    rtn = Training(plain.student(), FlatQuant(lt=False, ps=False, lct=False))
    work = bench(family, FlatQuant(), outliers=True)
    flat = Training(work.student(), replace(FlatQuant(), batch=2))
    initial = error(flat)
    flat.fit()
    assert error(flat) < 0.9 * initial < initial < 0.9 * error(rtn)


def test_gradients_are_those_of_one_loss_divided_by_itself() -> None:
    """Leaves, micro-batches and the late division against plain autograd through everything."""
    scheme = replace(W4A4, kv=KV4)
    flat = Training(bench("llama", FlatQuant(), scheme).student(), FlatQuant())
    disturb(flat)
    flat.gradients([2, 0])
    parameters = [p for group in flat.trained for p in group]
    ours = [p.grad for p in parameters]
    live = flat.live(torch.float32, flat.matrices.pairs())
    loss = sum((forward(flat, batch, live) - flat.view.target(batch)).square().mean() for batch in (2, 0))
    assert isinstance(loss, Tensor)
    wanted = torch.autograd.grad(loss / loss.detach(), parameters)
    for mine, theirs in zip(ours, wanted, strict=True):
        assert mine is not None
        assert float((mine - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
        assert float(theirs.abs().max()) > 0


def test_a_loss_that_is_not_finite_leaves_the_block_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Training(bench("llama", FlatQuant()).student(), FlatQuant(epochs=4, batch=2))
    gradients, steps, saved = Training.gradients, Counter[str](), []

    def poisoned(flat: Training, batches: list[int]) -> Tensor:
        loss = gradients(flat, batches)
        steps["taken"] += 1
        if steps["taken"] == 3:  # the last step of the first epoch has three batches of two
            saved.extend(p.detach().clone() for group in flat.trained for p in group)
        return loss * float("nan") if steps["taken"] > 3 else loss

    monkeypatch.setattr(Training, "gradients", poisoned)
    flat.fit()
    assert steps["taken"] == 6
    after = [p for group in flat.trained for p in group]
    assert all(bool(p.isfinite().all()) for p in after)
    assert any(not torch.equal(p, old) for p, old in zip(after, saved, strict=True))  # the step after `saved` is kept
    assert all(torch.allclose(p, old, rtol=0, atol=0.06) for p, old in zip(after, saved, strict=True))


def test_a_singular_transform_ends_training(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = Training(bench("llama", FlatQuant()).student(), FlatQuant(epochs=3, batch=6))
    start = [p.detach().clone() for group in flat.trained for p in group]
    gradients, steps = Training.gradients, Counter[str]()

    def shrinking(flat: Training, batches: list[int]) -> Tensor:
        steps["taken"] += 1
        with torch.no_grad():
            flat.matrices._sigmas[8][0, 0] = 1e-9
        return gradients(flat, batches)

    monkeypatch.setattr(Training, "gradients", shrinking)
    monkeypatch.setattr(flatquant, "SOUND", 0.1)
    flat.fit()
    assert steps["taken"] == 1
    after = [p for group in flat.trained for p in group]
    assert all(torch.equal(p, old) for p, old in zip(after, start, strict=True))


def test_rates_follow_a_cosine() -> None:
    flat = Training(bench("llama", FlatQuant()).student(), FlatQuant(warmup=10))
    rates = [flat._rate(5e-3, step, 100) for step in range(101)]
    assert rates[0] == pytest.approx(5e-5) and rates[100] == pytest.approx(5e-6)
    assert rates[50] == pytest.approx((5e-3 + 5e-6) / 2) and rates[10] > rates[9] > rates[0]


# --- cost -------------------------------------------------------------------------------------------------------------


def test_a_step_computes_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights once per step, inputs once per tap and micro-batch, no matrix inverse at all in the SVD form."""
    counts: Counter[str] = Counter()
    monkeypatch.setattr(flat_block, "quantize_clipped", _counting(counts, "quantized", flat_block.quantize_clipped))
    monkeypatch.setattr(flat_block, "inverse_weight", _counting(counts, "weights", flat_block.inverse_weight))
    monkeypatch.setattr(InputMap, "apply", _counting(counts, "mapped", InputMap.apply))
    monkeypatch.setattr(torch.linalg, "solve_ex", _counting(counts, "solved", torch.linalg.solve_ex))
    for name in ("inv", "inv_ex"):
        monkeypatch.setattr(torch.linalg, name, _counting(counts, "inverted", getattr(torch.linalg, name)))
    flat = Training(bench("llama", FlatQuant()).student(), FlatQuant())
    counts.clear()
    flat.gradients([0, 1, 2])
    taps, sites, batches = 4, 7, 3
    assert counts == {
        "quantized": sites + taps * batches,
        "weights": sites,
        "mapped": taps * batches,
        "solved": len({8, 4, 16, 12}),
    }


def _counting(counts: Counter[str], name: str, function: Any) -> Any:
    def counted(*args: Any, **kwargs: Any) -> Any:
        counts[name] += 1
        return function(*args, **kwargs)

    return counted


# --- as a recipe ------------------------------------------------------------------------------------------------------


def test_recipes_by_name() -> None:
    recipe = resolve("flatquant+gptq-w4a4kv4").recipe
    assert recipe.reconstruct == (FlatQuant(),) and recipe.round.name == "gptq" and recipe.scheme.kv is not None
    settings = ["flatquant.lt=false", "flatquant.ps=false", "flatquant.lct=false", "flatquant.form=inverse"]
    changed = resolve("flatquant-w4a4", settings=settings).recipe.reconstruct[0]
    assert changed == FlatQuant(lt=False, ps=False, lct=False, form="inverse")
    with pytest.raises(ValueError, match="epochs"):
        FlatQuant(epochs=-1)


def test_the_ablation() -> None:
    """On planted outliers every part lowers the block's error by itself, and so do P and c where the others are.

    By a quarter or more each, for any seed; what thresholds add to P and c is less here than seeds differ.
    """

    def trained(*parts: str) -> float:
        settings = FlatQuant(batch=2, epochs=15, **{part: part in parts for part in ("lt", "ps", "lct")})
        flat = Training(bench("llama", settings, outliers=True, batches=4).student(), settings)
        flat.fit()
        return error(flat)

    assert max(trained("lt"), trained("ps"), trained("lct")) < trained()
    assert trained("lt", "ps", "lct") < min(trained("ps", "lct"), trained("lt", "lct"))


def test_nothing_learned_is_plain_rounding() -> None:
    before, after = bench("llama", FlatQuant(lt=False, ps=False, lct=False), outliers=True).quantize()
    assert before == after


def test_same_seed_same_result() -> None:
    results = [bench("llama", FlatQuant(epochs=2)).quantize() for _ in range(2)]
    assert results[0] == results[1]


@pytest.mark.parametrize("recipe", ["flatquant+gptq-w4a4kv4", "flatquant+gptq-w3a16"])
def test_rounding_after_it_takes_its_grid(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPTQ finds no thresholds of its own: its scales are those of the clamped weights."""
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    scales: dict[str, Tensor] = {}

    def keep(student: Any, site: Any, grid: Any) -> None:
        scales.setdefault(site.name, grid.scale)
        student._work.grids[site.name] = grid

    monkeypatch.setattr("lowbit.stream.student.Student.set_grid", keep)
    options: dict[str, Any] = {"calibration": str(text), "samples": 16, "length": 32}
    run = lowbit.quantize(model, recipe, tmp_path / "out", settings=["flatquant.epochs=4"], **options)
    assert all(block["error_after"] < block["error_before"] for block in run.blocks)
    loaded = lowbit.load(tmp_path / "out", dtype=torch.float32)
    assert len(scales) == 7
    for name, scale in scales.items():
        layer = loaded.get_submodule(f"model.layers.0.{name}").layer
        assert torch.equal(layer.weight.parts[0].grid.scale, scale) and layer.input_map is not None


def test_attention_is_left_as_it_was_found() -> None:
    """Training attaches quantizers to the attention and takes them away again."""
    view = bench("llama", FlatQuant(), replace(W4A4, kv=KV4)).student()
    flat = Training(view, FlatQuant())
    module = view._work.block.get_submodule(view.anatomy.attention)
    hooks = len(module._forward_pre_hooks)
    assert view.key_width() == 16 and error(flat) > 0
    assert len(module._forward_pre_hooks) == hooks and not hasattr(module, "lowbit_kv")
    assert attach(module, KV4).key_width == 0
    assert flat_maps.sizes_of(flat.groups) == [8, 8, 4, 16, 8, 8, 8, 12]
