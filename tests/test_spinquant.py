"""SpinQuant: merged weights against the rotation done in place, learning against its promises, and runs end to end."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import build, tokens
from safetensors.torch import load_file
from test_quarot import anatomy_of, change, checksums, logits_of, lossless, outliers, quantize, saved
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.graph import unfuse_experts
from lowbit.graph.rotate import absorb, fold_model, rotate_heads, rotate_model
from lowbit.methods.base import LearnedRotation
from lowbit.methods.gptq import GPTQ
from lowbit.methods.mse import MSEClip
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.scheme import Scheme
from lowbit.methods.spinquant import CPU_TOKENS, SpinQuant, gradients
from lowbit.numerics.grid import fit_range
from lowbit.numerics.maps import mean_preserving, random_orthogonal
from lowbit.numerics.spec import Int, Spec, per_channel, per_token
from lowbit.stream.learning import WholeModel
from lowbit.stream.plan import make_plan

__all__ = ["outliers", "saved"]  # fixtures of the other file

CPU = torch.device("cpu")
FAMILIES = ["llama", "llama-tied", "qwen2", "mixtral", "opt", "gpt2", "deepseek_v3", "phi3"]
W4, A4 = per_channel(Int(4)), per_token(Int(4))


class Held:
    """A checkpoint whose tensors are in memory already."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}

    def names(self) -> list[str]:
        return list(self.tensors)

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}


def model_of(family: str) -> nn.Module:
    model = build(family)
    unfuse_experts(model)
    return model


def whole(
    family: str,
    rotation: SpinQuant,
    weights: Spec | None = None,
    inputs: Spec | None = None,
    recipe: Recipe | None = None,
    windows: int = 2,
) -> WholeModel:
    anatomy, model = anatomy_of(family), model_of(family)
    recipe = recipe or Recipe(Scheme(weights, inputs), RTN(), MinMaxClip(), (rotation,))
    formats = [{site.name: (weights, inputs) for site in block.sites} for block in anatomy.blocks]
    text = [tokens(1, 12, seed)[0] for seed in range(windows)]
    return WholeModel(model, anatomy, recipe, formats, Held(model), text, CPU)  # type: ignore[arg-type]


@cache
def matrices_of(family: str) -> dict[str, Tensor]:
    """Random matrices of the kind that the family allows, not those that learning starts from."""
    draw = mean_preserving if anatomy_of(family).rotations.residual == "mean-preserving" else random_orthogonal
    heads = {name: random_orthogonal(16, 3 + i) for i, name in enumerate(SpinQuant().matrices(anatomy_of(family)))}
    return {name: matrix.float() for name, matrix in (heads | {"residual": draw(64, 9)}).items()}


def cross_entropy(model: nn.Module, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids[None], use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], ids[1:]).detach()


# --- the network that is learned on -----------------------------------------------------------------------------------


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_any_matrices_keep_the_loss_of_the_original_model(family: str, merged: bool) -> None:
    view = whole(family, SpinQuant(merged=merged))
    ids = tokens(1, 12, 0)[0]
    with torch.no_grad():
        expected = cross_entropy(model_of(family), ids)
        values = view.merged(matrices_of(family), quantized=False)
        found = view.loss(0, values, matrices_of(family)["residual"])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        worse = view.loss(0, values, torch.eye(64))
    assert abs(float(worse - expected)) > 1e-3, "the tables were not turned"


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_on_the_fly_is_merged_in_place(family: str) -> None:
    rotation, anatomy, model = SpinQuant(), anatomy_of(family), model_of(family).double()
    matrices = matrices_of(family)
    found = whole(family, rotation).merged(matrices, quantized=False)
    fold_model(model, anatomy)
    rotate_model(model, anatomy, matrices["residual"].double())
    for index, part in enumerate(anatomy.blocks):
        block = model.get_submodule(anatomy.full_name(index, ""))
        rotate_heads(block, part, matrices[f"heads.{index}"].double())
        for tap, map in rotation.online(anatomy, index).items():
            absorb(block, next(each for each in part.taps if each.name == tap).sites[0], map)
    assert len(found) >= 4 * len(anatomy.blocks)
    for name, value in found.items():
        torch.testing.assert_close(value, model.get_parameter(name).float(), rtol=0, atol=1e-5)


def test_weights_are_rounded_as_the_clip_says() -> None:
    matrices = matrices_of("llama")
    plain = whole("llama", SpinQuant()).merged(matrices, quantized=False)
    for clip in (MinMaxClip(), MSEClip()):
        recipe = Recipe(Scheme(W4), RTN(), clip, (SpinQuant(),))
        rounded = whole("llama", SpinQuant(), W4, recipe=recipe).merged(matrices, quantized=True)
        for name in ("model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"):
            expected = clip.fit(plain[name], W4, None, scores=False).quantize(plain[name])
            assert torch.equal(rounded[name], expected) and not torch.equal(expected, plain[name])


def test_inputs_are_rounded_behind_their_maps() -> None:
    """The loss is that of the model with rounded inputs, computed by hooks of this test on the rotated model."""
    family, rotation = "llama", SpinQuant()
    view, matrices, anatomy = whole(family, rotation, None, A4), matrices_of(family), anatomy_of(family)
    values = view.merged(matrices, quantized=False)
    found = view.loss(0, values, matrices["residual"]).detach()
    model = model_of(family)
    fold_model(model, anatomy)
    for name, value in values.items():  # the same weights to the last bit, lest inputs fall on other codes
        model.get_parameter(name).data.copy_(value)
    q = matrices["residual"]
    model.get_submodule(anatomy.embedding).register_forward_hook(lambda _m, _a, output: output @ q)
    model.get_submodule(anatomy.head).register_forward_pre_hook(lambda _m, args: (args[0] @ q.T,))
    for index, part in enumerate(anatomy.blocks):
        block = model.get_submodule(anatomy.full_name(index, ""))
        maps = rotation.online(anatomy, index)
        for site in part.sites:
            map = maps.get(site.name)

            def rounded(_module, args, map=map):
                x = args[0].reshape(-1, args[0].shape[-1])
                x = x if map is None else map.apply(x)
                return fit_range(x, A4).quantize(x).reshape(args[0].shape)

            block.get_submodule(site.name).register_forward_pre_hook(rounded)
    ids = tokens(1, 12, 0)[0]
    torch.testing.assert_close(found, cross_entropy(model, ids), rtol=1e-6, atol=0)
    assert abs(float(found - cross_entropy(model_of(family), ids))) > 0.02


def test_gradients_are_those_of_finite_differences() -> None:
    view, family = whole("qwen2", SpinQuant()), "qwen2"
    start = {name: matrix.clone() for name, matrix in matrices_of(family).items()}

    def loss(matrices: dict[str, Tensor]) -> Tensor:  # a stretched matrix changes the function, so gradients are not 0
        return view.loss(0, view.merged(matrices, quantized=False), matrices["residual"])

    leaves = {name: matrix.clone().requires_grad_() for name, matrix in start.items()}
    total = gradients(view, leaves, [0], rounded=False)
    assert total == pytest.approx(float(loss(start).detach()), rel=1e-6)
    for name in ("residual", "heads.0"):
        turn = torch.randn(start[name].shape, generator=torch.Generator().manual_seed(0))
        up, down = ({**start, name: start[name] + sign * 1e-3 * turn} for sign in (1, -1))
        slope = float((loss(up) - loss(down)).detach()) / 2e-3
        assert float((leaves[name].grad * turn).sum()) == pytest.approx(slope, rel=0.02, abs=2e-4)


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_loss_on_the_training_batch_falls(family: str) -> None:
    view = whole(family, SpinQuant(), W4, A4, windows=2)
    matrices, losses = SpinQuant(steps=12, batch=2).learn(view)
    with torch.no_grad():
        merged, q = view.merged(floats(matrices), quantized=True), matrices["residual"].float()
        after = [float(view.loss(window, merged, q)) for window in range(2)]
    assert sum(after) / 2 < losses[0] and len(losses) == 12
    for name, matrix in matrices.items():
        eye = torch.eye(len(matrix), dtype=torch.float64)
        torch.testing.assert_close(matrix @ matrix.T, eye, rtol=0, atol=1e-12)
        assert float((matrix - SpinQuant().matrices(anatomy_of(family))[name]).abs().max()) > 1e-3
    ones = torch.ones(64, dtype=torch.float64)
    assert torch.allclose(matrices["residual"] @ ones, ones, atol=1e-9) == (family == "opt")


def floats(matrices: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: matrix.float() for name, matrix in matrices.items()}


def test_weights_stay_as_they_are_where_rounding_will_look_at_the_inputs() -> None:
    asked: list[bool] = []

    def learn(view: WholeModel, rotation: SpinQuant) -> bool:
        merge = view.merged

        def merged(matrices, *, quantized):
            asked.append(quantized)
            return merge(matrices, quantized=quantized)

        view.merged = merged  # type: ignore[method-assign]
        rotation.learn(view)
        return asked[-1]

    one = SpinQuant(steps=1)
    gptq = Recipe(Scheme(W4, A4), GPTQ(), MinMaxClip(), (one,))
    assert learn(whole("llama", one, W4, A4), one)
    assert not learn(whole("llama", one, W4, A4, gptq), one)
    assert learn(whole("llama", one, W4, A4, gptq), SpinQuant(steps=1, weights="rounded"))
    assert not learn(whole("llama", one, W4, A4), SpinQuant(steps=1, weights="kept"))
    # without quantized inputs there would be nothing to learn from
    assert learn(whole("llama", one, W4, None, Recipe(Scheme(W4), GPTQ(), MinMaxClip(), (one,))), one)


def test_every_window_is_used_before_any_comes_again() -> None:
    view = SimpleNamespace(windows=[12] * 5, device=CPU)
    steps = SpinQuant(batch=2)._batches(view)  # type: ignore[arg-type]
    drawn = [next(steps) for _ in range(5)]
    assert all(len(batch) == 2 for batch in drawn)
    flat = [window for batch in drawn for window in batch]
    assert sorted(flat[:5]) == sorted(flat[5:]) == list(range(5))


def test_a_step_on_a_cpu_is_smaller_unless_asked_for() -> None:
    assert SpinQuant().batch_of(2048, torch.device("cuda")) == 8
    assert SpinQuant().batch_of(2048, CPU) == 1 and SpinQuant().batch_of(CPU_TOKENS // 4, CPU) == 4
    assert SpinQuant().batch_of(1, CPU) == 8 and SpinQuant(batch=3).batch_of(2048, CPU) == 3


@pytest.mark.parametrize("settings", [{"steps": 0}, {"batch": 0}, {"rate": 0.0}])
def test_settings_without_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        SpinQuant(**settings)  # type: ignore[arg-type]


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_any_learned_matrices_keep_the_logits(
    saved: Callable[[str], Path],
    outliers: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
) -> None:
    monkeypatch.setattr(SpinQuant, "learn", lambda *_: (matrices_of(family), [0.0]))
    quantize((saved(family), outliers[1]), lossless(family, SpinQuant()), tmp_path / "out")
    assert change(tmp_path / "out", saved(family)) < 2e-5
    found = load_file(tmp_path / "out" / "reports" / "rotation.safetensors")
    assert all(torch.equal(found[name], matrix) for name, matrix in matrices_of(family).items())


def test_a_run_learns_once_tells_so_and_rounds_better(
    outliers: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    settings = ["spinquant.steps=4", "spinquant.merged=true"]
    options = {"settings": settings, "notice": told.append}
    done = quantize(outliers, "spinquant-w4a4", tmp_path / "out", **options)
    assert any("holds the whole model in memory" in line and "spinquant.batch=8" in line for line in told)
    assert all(block["error_after"] < block["error_before"] for block in done.blocks)
    journal = [json.loads(line) for line in (tmp_path / "out" / "journal.jsonl").read_text().splitlines()]
    (entry,) = [line for line in journal if "rotation" in line]
    assert entry["rotation"] == "spinquant" and len(entry["losses"]) == 4
    before = checksums(tmp_path / "out")
    for file in ("model.safetensors.index.json", "model-00003-of-00003.safetensors"):
        (tmp_path / "out" / file).unlink()

    def never(*_: object) -> None:
        raise AssertionError("what was learned is read again")

    monkeypatch.setattr(SpinQuant, "learn", never)
    quantize(outliers, "spinquant-w4a4", tmp_path / "out", **options)
    assert checksums(tmp_path / "out") == before


def test_merged_only_models_export(saved: Callable[[str], Path], outliers: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    material = (saved("llama"), outliers[1])
    with pytest.raises(ValueError, match="online maps"):
        quantize(material, "spinquant-w8a16", tmp_path / "out", target="compressed-tensors")
    settings = ["spinquant.merged=true", "spinquant.steps=1"]
    quantize(material, "spinquant-w8a16", tmp_path / "out", target="compressed-tensors", settings=settings)
    exported = lowbit.export(tmp_path / "out", tmp_path / "export")
    ours, theirs = (logits_of(lowbit.load(path)) for path in (tmp_path / "out", exported.path))
    assert float((ours - theirs).abs().max()) < 1e-4 * float(ours.abs().max())


def test_the_plan_counts_the_whole_model() -> None:
    assert isinstance(SpinQuant(), LearnedRotation)
    anatomy = anatomy_of("llama")
    checkpoint = SimpleNamespace(names=lambda prefix="": ("a",), nbytes=lambda names: 10**9)

    def peak(rotation: tuple[SpinQuant, ...]) -> int:
        recipe = Recipe(Scheme(W4, A4), RTN(), MinMaxClip(), rotation)
        return make_plan(checkpoint, anatomy, recipe, tokens=64, dtype=torch.float32, window=32).learning_bytes  # type: ignore[arg-type]

    assert peak(()) == 0 and peak((SpinQuant(),)) > 8 * 10**9
