"""OmniQuant's parts against their formulas, and what training promises, on real tiny blocks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from blocks import Workbench
from families import TINY, _config
from tiny import save_model, save_text
from torch import Tensor
from views import Linears

import lowbit
from lowbit.graph.anatomy import Norm
from lowbit.methods.equivalent import (
    FLOOR,
    Draft,
    Equivalence,
    Scaling,
    Scores,
    free_scores,
    input_ranges,
    preserves,
    starts,
)
from lowbit.methods.omniquant import LWC, OmniQuant, block_loss, fit, settle, student, weight_clips
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import E2M1, Int, Spec, per_channel, per_group
from lowbit.recipes import resolve

SIGMOID_4 = 0.98201379003


def bench(family: str, recipe: str, *settings: str) -> Workbench:
    return Workbench(family, resolve(recipe, settings=settings).recipe, batches=2, outliers=True)


def loss_on(original: Draft, draft: Draft, augmented: bool) -> Tensor:
    """The loss on the first micro-batch."""
    view = original.view
    return block_loss(original, draft, 0, view.inputs(0, "quantized"), view.target(0), augmented)


def disturb(maps: Sequence[Equivalence]) -> None:
    """Maps as training may leave them: scales of either sign, any shift."""
    for map in maps:
        for parameter in map.trained:
            with torch.no_grad():
                sign = torch.where(torch.rand_like(parameter) < 0.2, -1.0, 1.0)
                parameter.mul_(torch.exp(0.5 * torch.randn_like(parameter)) * sign)


# --- LWC --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [Int(3, "asymmetric"), Int(2, "asymmetric"), Int(4), E2M1], ids=str)
@pytest.mark.parametrize("group", [8, -1])
def test_clipping_is_the_formula(number: Int, group: int) -> None:
    """Every unit in plain loops: h = (σ(γ) max - σ(β) min)/(2^N - 1), z = -⌊σ(β) min / h⌉."""
    w, spec = torch.randn(5, 32), per_group(number, group, scale="float32")
    clip = LWC(w, spec, 4.0)
    width = 32 if group == -1 else group
    assert clip.beta.shape == clip.gamma.shape == (5, 32 // width)
    with torch.no_grad():
        clip.beta.copy_(4 * torch.randn_like(clip.beta))
        clip.gamma.copy_(4 * torch.randn_like(clip.gamma))
    result, grid = clip.quantize(w).detach(), clip.grid(w)
    assert torch.equal(result, grid.quantize(w))
    if number != Int(3, "asymmetric"):
        return
    for row in range(5):
        for g in range(32 // width):
            part = w[row, g * width : (g + 1) * width].double()
            low = float(part.min() * clip.beta.detach()[row, g].double().sigmoid())
            high = float(part.max() * clip.gamma.detach()[row, g].double().sigmoid())
            step = (high - low) / 7
            zero = round(-low / step)
            expected = ((part / step).round() + zero).clamp(0, 7).sub(zero) * step
            distance = (part / step - (part / step).floor() - 0.5).abs()
            clear = distance > 1e-4
            assert torch.allclose(result[row, g * width : (g + 1) * width].double()[clear], expected[clear], rtol=1e-5)


def test_logits_start_near_the_full_range() -> None:
    w, spec = torch.randn(5, 32), per_channel(Int(4, "asymmetric"), scale="float32")
    grid, full = LWC(w, spec, 4.0).grid(w), fit_range(w, spec)
    assert torch.allclose(grid.scale, full.scale * SIGMOID_4, rtol=1e-5)


@pytest.mark.parametrize(
    "spec", [per_group(Int(3, "asymmetric"), 16), per_group(Int(4), 16), per_channel(E2M1)], ids=str
)
def test_logits_at_infinity_are_plain_rounding(spec: Spec) -> None:
    """No epochs, no scales, ranges in full: the codes of RTN."""
    view = Linears([torch.randn(24, 32), torch.randn(8, 32)], [spec, None], torch.randn(2, 2, 8, 32))
    OmniQuant(let=False, epochs=0, logit=float("inf")).train(view)
    weight, grid = view.weights[0], view.grids["linear0"]
    assert view.grids.keys() == {"linear0"}
    assert torch.equal(grid.encode(weight), fit_range(weight, spec).encode(weight))


def test_both_logits_get_gradients() -> None:
    spec = per_group(Int(3, "asymmetric"), 16)
    view = Linears([torch.randn(24, 32)], [spec], torch.randn(1, 2, 8, 32))
    original = Draft.of(view)
    clips = weight_clips(view, original, 4.0)
    loss_on(original, student(original, [], clips), False).backward()
    for parameter in clips["linear0"].trained:
        assert (
            parameter.grad is not None and bool((parameter.grad != 0).all()) and bool(parameter.grad.isfinite().all())
        )


@pytest.mark.parametrize("number", [Int(2, "asymmetric"), Int(3, "asymmetric")], ids=str)
def test_clipping_alone_lowers_the_error(number: Int) -> None:
    x = torch.randn(4, 2, 16, 32) @ (torch.randn(32, 32) * torch.logspace(0, -1, 32))
    w = torch.randn(24, 32)
    w[:, ::9] *= 4
    view = Linears([w], [per_channel(number)], x)
    original = Draft.of(view)
    clips = weight_clips(view, original, 4.0)
    losses = fit(original, [], clips, rates=(5e-3, 1e-2), epochs=60, augmented=False)
    assert len(losses) == 60 and losses[-1] < 0.9 * losses[0]
    settle(view, [], clips)
    stored = sum(
        float(
            (view.forward(view.x[b], {"linear0": view.grids["linear0"].quantize(w)}) - view.target(b)).square().mean()
        )
        for b in range(4)
    )
    assert stored / 4 < losses[0]


def test_augmented_loss() -> None:
    """MSE to the original on the float stream, plus MSE to the original on the quantized stream."""
    spec, x = per_group(Int(2), 16), torch.randn(1, 2, 8, 32)
    view = Linears([torch.randn(24, 32)], [spec], x, floats=x + 0.1 * torch.randn_like(x))
    original = Draft.of(view)
    draft = student(original, [], {})
    output = x[0] @ fit_range(view.weights[0], spec).quantize(view.weights[0]).T
    plain = (output - view.target(0)).square().mean()
    extra = (output - x[0] @ view.weights[0].T).square().mean()
    assert torch.allclose(loss_on(original, draft, False), plain, rtol=1e-5)
    assert torch.allclose(loss_on(original, draft, True), plain + extra, rtol=1e-5)


class Poisoned(Linears):
    """A view whose block gives NaN from the n-th run on."""

    def run(self, *args: object, **kwargs: object) -> Tensor:  # type: ignore[override]
        self.losses.append(0.0)
        output = super().run(*args, **kwargs)  # type: ignore[arg-type]
        return output * float("nan") if len(self.losses) >= 4 else output


def test_nan_brings_back_the_last_finite_parameters() -> None:
    w, x = torch.randn(24, 32), torch.randn(2, 2, 8, 32)
    after = {}
    for kind, epochs in ((Poisoned, 5), (Linears, 1)):
        view = kind([w], [per_group(Int(3), 16)], x)
        original = Draft.of(view)
        clips = weight_clips(view, original, 4.0)
        if kind is Linears:  # steps 1 and 2 without the poison; the third loss was still finite
            fit(original, [], clips, rates=(5e-3, 1e-2), epochs=epochs, augmented=False)
        else:
            losses = fit(original, [], clips, rates=(5e-3, 1e-2), epochs=epochs, augmented=False)
            assert len(losses) == 1
        after[kind] = [p.detach().clone() for p in clips["linear0"].trained]
    for poisoned, clean in zip(after[Poisoned], after[Linears], strict=True):
        assert bool(poisoned.isfinite().all()) and torch.equal(poisoned, clean)


# --- LET --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shifts", "scores"),
    [
        ("opt", 3, "free"),
        ("llama", 0, None),
        ("llama-tied", 1, None),
        ("phi3", 0, None),
        ("qwen3", 0, None),
        ("gemma2", 0, None),
        ("mixtral", 0, None),
        ("gpt2", 3, None),
        ("deepseek_v3", 0, None),
    ],
)
def test_rewriting_preserves_the_block(family: str, shifts: int, scores: str | None) -> None:
    """Any scale and shift, without quantization; and once settled, the logits of the whole model."""
    work = bench(family, "omniquant-w4a8")
    view = work.student()
    original = Draft.of(view)
    maps: list[Equivalence] = [Scaling(*start) for start in starts(view, original, 0.5, shifts=True)]
    found = free_scores(view, original)
    assert (None if found is None else "tied" if found.tied else "free") == scores
    maps += [] if found is None else [found]
    assert sum(isinstance(map, Scaling) and map.shift is not None for map in maps) == shifts
    assert all(isinstance(map, Scores) or map.edge.kind in ("norm", "value") for map in maps)  # type: ignore[attr-defined]
    disturb(maps)
    for map in maps:
        assert preserves(view, original, map, 1e-5), map
    settle(view, maps, {})
    assert work.change() < 5e-5 and view.moved


def test_rotary_embeddings_tie_the_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without grouped queries Llama's s_a is one for j and j + h/2; untied, it is not an equivalence."""
    monkeypatch.setitem(TINY, "llama-mha", _config("llama", num_key_value_heads=4))
    view = bench("llama-mha", "omniquant-w4a8").student()
    original = Draft.of(view)
    found = free_scores(view, original)
    assert found is not None and found.tied and found.scale.shape == (4, 8)
    free = Scores(found.query, found.key, 4, tied=False)
    disturb([free, found])
    assert preserves(view, original, found, 1e-5) and not preserves(view, original, free, 1e-3)


def test_start_is_the_formula() -> None:
    work = bench("opt", "omniquant-w4a8")
    view = work.student(drift=0.1)
    original = Draft.of(view)
    seen: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in range(view.batches):
            for name, (x, _) in view.site_inputs(batch, view.inputs(batch, "quantized")).items():
                seen.setdefault(name, []).append(x)
    for edge, scale, shift in starts(view, original, 0.75, shifts=True):
        x = seen[edge.readers[0].name]
        w = torch.cat([view.weight(site) for site in edge.readers])
        truth = torch.cat(x).abs().amax(0) ** 0.75 / w.abs().amax(0) ** 0.25
        assert torch.allclose(scale, truth.clamp_min(FLOOR), rtol=1e-4)
        middles = [(part.amax(0) + part.amin(0)) / 2 for part in x]
        assert shift is not None and torch.allclose(shift, 0.99 * middles[0] + 0.01 * middles[1], atol=1e-5)
    assert input_ranges(view).keys() == {site.name for site in view.anatomy.sites}


def test_scales_are_floored_with_their_sign() -> None:
    edge = next(edge for edge in bench("llama", "omniquant-w4a8").work.anatomy.edges if isinstance(edge.source, Norm))
    scaling = Scaling(edge, torch.tensor([1.0, 1e-3, 0.0, -1e-3, -2.0]))
    assert torch.equal(scaling.floored(), torch.tensor([1.0, 0.01, 0.01, -0.01, -2.0]))


@pytest.mark.parametrize("family", ["opt", "llama-tied", "mixtral"])
def test_gradients_reach_every_parameter(family: str) -> None:
    view = bench(family, "omniquant-w4a4").student()
    original = Draft.of(view)
    maps = [Scaling(*start) for start in starts(view, original, 0.75, shifts=True)]
    loss_on(original, student(original, maps, {}), True).backward()
    for map in maps:
        for parameter in map.trained:
            assert parameter.grad is not None and float(parameter.grad.abs().max()) > 0


@pytest.mark.parametrize(
    ("family", "recipe", "settings"),
    [
        ("opt", "omniquant-w4a4", []),
        ("llama", "omniquant-w4a4", []),
        ("llama", "omniquant-w2a16-g16-asym", ["omniquant.epochs=15"]),
        ("llama", "omniquant+gptq-w3a16-g16", ["omniquant.lwc=false", "omniquant.epochs=3"]),
        ("opt", "omniquant-w6a6-static", ["omniquant.let=false", "omniquant.epochs=3"]),
        ("opt", "omniquant-w6a6-static", ["omniquant.lwc=false", "omniquant.epochs=3"]),
    ],
)
def test_training_beats_plain_rounding(family: str, recipe: str, settings: list[str]) -> None:
    before, after = bench(family, recipe, *settings).quantize(drift=0.01)
    assert after < before


def test_the_loss_falls_and_what_was_trained_is_what_is_stored() -> None:
    work = bench("llama", "omniquant-w4a4")
    view = work.student(drift=0.01)
    original = Draft.of(view)
    maps = [Scaling(*start) for start in starts(view, original, 0.75, shifts=True)]
    clips = weight_clips(view, original, 4.0)
    losses = fit(original, maps, clips, rates=(1e-3, 1e-2), epochs=16, augmented=False)
    assert sum(losses[-4:]) / 4 < 0.97 * losses[0]
    with torch.no_grad():
        trained = student(original, maps, clips)
        settle(view, maps, clips)
        for site in view.anatomy.sites:
            stored = work.work.grids[site.name].quantize(view.weight(site))
            same = torch.isclose(stored, trained.weights[site.name], rtol=1e-3, atol=1e-5)
            assert float(same.double().mean()) > 0.98, site.name  # half scales and ties of rounding apart


@pytest.mark.parametrize(
    "changes", [{"lwc": False, "let": False}, {"epochs": -1}, {"lwc_rate": 0.0}, {"let_rate": 0.0}, {"alpha": 2.0}]
)
def test_settings_without_meaning_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"keep at least one|are positive|between 0 and 1"):
        OmniQuant(**changes)  # type: ignore[arg-type]


def test_end_to_end(tmp_path: Path) -> None:
    model, text = save_model("opt", tmp_path / "model"), save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 8, "length": 32, "settings": ["omniquant.epochs=2"]}
    lowbit.quantize(model, "omniquant-w8a8", tmp_path / "out", **options)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        original, loaded = (lowbit.load(path, dtype=torch.float32)(ids).logits for path in (model, tmp_path / "out"))
    assert float((loaded - original).norm() / original.norm()) < 0.05
