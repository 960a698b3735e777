"""AffineQuant's mask and matrices against their definitions, and what training promises, on real tiny blocks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blocks import Workbench
from tiny import save_model, save_text

import lowbit
from lowbit.methods.affinequant import AffineQuant, HeadAffine, OnlineAffine, gradual_mask
from lowbit.methods.equivalent import Draft, Scaling, preserves, starts
from lowbit.methods.omniquant import fit, settle, student, weight_clips
from lowbit.recipes import resolve


def bench(family: str, recipe: str, *settings: str) -> Workbench:
    return Workbench(family, resolve(recipe, settings=settings).recipe, batches=2, outliers=True)


def disturb(maps: list[object], epochs: int = 4) -> None:
    """Matrices as training may leave them, under their last mask."""
    for map in maps:
        map.begin(epochs - 1, epochs)  # type: ignore[attr-defined]
        for parameter in map.trained:  # type: ignore[attr-defined]
            with torch.no_grad():
                parameter.mul_(torch.exp(0.3 * torch.randn_like(parameter)))
                parameter.add_(0.3 * torch.randn_like(parameter))


# --- the mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "epochs"), [(5, 3), (16, 20), (7, 7), (8, 2)])
def test_the_mask_is_the_definition(n: int, epochs: int) -> None:
    for epoch in range(epochs):
        mask, reach = gradual_mask(n, epoch, epochs, 0.25), int((n - 1) * epoch / (epochs - 1) + 1e-9)
        for i in range(n):
            for j in range(n):
                assert float(mask[i, j]) == (1 if i == j else 0.25 if abs(i - j) <= reach else 0)
    assert torch.equal(gradual_mask(n, 0, epochs, 0.25), torch.eye(n))
    assert bool((gradual_mask(n, epochs - 1, epochs, 0.25) != 0).all())


def test_one_epoch_is_diagonal() -> None:
    assert torch.equal(gradual_mask(6, 0, 1, 0.25), torch.eye(6))


def test_heads_have_masks_of_their_own() -> None:
    view = bench("llama", "affinequant-w4a16").student()
    heads = [map for map in AffineQuant(stability=0.5).maps(view, Draft.of(view)) if isinstance(map, HeadAffine)]
    assert [map.matrix.shape for map in heads] == [(2, 16, 16)]
    heads[0].begin(1, 2)
    assert torch.equal(heads[0].mask, gradual_mask(16, 1, 2, 0.5))


# --- the matrices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "recipe", "online", "heads"),
    [
        ("llama", "affinequant-w3a16-g16", 2, 1),
        ("llama", "affinequant-w4a4", 0, 1),
        ("llama-tied", "affinequant-w4a4", 0, 1),
        ("opt", "affinequant-w4a4", 0, 1),
        ("opt", "affinequant-w4a16", 2, 1),
        ("phi3", "affinequant-w4a16", 2, 1),
        ("bloom", "affinequant-w4a16", 2, 1),
        ("gpt2", "affinequant-w4a8", 0, 1),
        ("mixtral", "affinequant-w4a16", 1, 1),
    ],
)
def test_rewriting_preserves_the_block(family: str, recipe: str, online: int, heads: int) -> None:
    """Any matrices, without quantization; and once settled, the logits of the whole model, up to their condition."""
    work = bench(family, recipe)
    view = work.student()
    original = Draft.of(view)
    maps = AffineQuant().maps(view, original)
    assert sum(isinstance(map, OnlineAffine) for map in maps) == online
    assert sum(isinstance(map, HeadAffine) for map in maps) == heads
    disturb(list(maps))
    condition = 1.0
    for map in maps:
        if isinstance(map, OnlineAffine | HeadAffine):
            condition = max(condition, float(torch.linalg.cond(map.value()[0].detach()).max()))
    for map in maps:
        if not isinstance(map, OnlineAffine):  # `exact` takes inputs as they are
            assert preserves(view, original, map, 1e-6 * condition), map
    settle(view, maps, {})
    assert work.change() < 3e-6 * condition
    assert view.moved and len(work.work.maps) == sum(len(m.tap.sites) for m in maps if isinstance(m, OnlineAffine))


def test_the_online_draft_is_what_is_settled() -> None:
    work = bench("llama", "affinequant-w4a16")
    view = work.student()
    original = Draft.of(view)
    maps = AffineQuant(stability=0.3).maps(view, original)
    disturb(list(maps))
    draft = original.copy()
    with torch.no_grad():
        for map in maps:
            map.rewrite(draft)
        hidden = view.inputs(0, "quantized")
        assert torch.allclose(draft.run(0, hidden), original.exact(0, hidden), rtol=1e-3, atol=1e-3)
        settle(view, maps, {})
    for site in view.anatomy.sites:
        assert torch.allclose(view.weight(site), draft.weights[site.name], rtol=1e-4, atol=1e-5), site.name


@pytest.mark.parametrize("recipe", ["affinequant-w4a16", "affinequant-w4a8"])
def test_a_diagonal_mask_is_let(recipe: str) -> None:
    """Before the mask opens, what is rounded is what OmniQuant's vectors make of the weights."""
    view = bench("opt", recipe).student()
    original = Draft.of(view)
    matrices = AffineQuant(stability=0.0).maps(view, original)
    vectors = [Scaling(*start) for start in starts(view, original, 0.5, shifts=recipe.endswith("a8"))]
    for map in matrices:
        map.begin(19, 20)
    drafts = [original.copy(), original.copy()]
    with torch.no_grad():
        for draft, maps in zip(drafts, (matrices, vectors), strict=True):
            for map in maps:
                map.rewrite(draft)
    for name, weight in drafts[0].weights.items():
        assert torch.allclose(weight, drafts[1].weights[name], rtol=1e-4, atol=1e-6), name
    for name in ("self_attn.v_proj.bias", "self_attn.out_proj.bias"):
        assert torch.allclose(drafts[0].parameter(name), drafts[1].parameter(name), rtol=1e-4, atol=1e-5), name


@pytest.mark.parametrize("recipe", ["affinequant-w3a16-g16-asym", "affinequant-w4a4"])
def test_training_opens_the_mask_and_stays_invertible(recipe: str) -> None:
    """The loss falls; masks widen epoch by epoch; no condition number grows beyond fp32."""
    work = Workbench("llama", resolve(recipe).recipe, batches=4, outliers=True)
    view = work.student(drift=0.01)
    original = Draft.of(view)
    maps = AffineQuant(stability=0.1).maps(view, original)
    clips = weight_clips(view, original, 4.0)
    watched = next(map for map in maps if isinstance(map, HeadAffine))
    begin, conditions, widths = watched.begin, [], []

    def recorded(epoch: int, epochs: int) -> None:
        begin(epoch, epochs)
        conditions.append(float(torch.linalg.cond(watched.value()[0].detach()).max()))
        widths.append(int((watched.mask != 0).sum()))

    watched.begin = recorded  # type: ignore[method-assign]
    losses = fit(original, maps, clips, rates=(5e-3, 1e-2), epochs=16, augmented=False)
    assert len(conditions) == 16 and all(c < 1e4 for c in conditions)
    assert widths[0] == 16 and widths[-1] == 256 and widths == sorted(widths)
    off = watched.matrix.detach() - torch.diag_embed(watched.matrix.detach().diagonal(dim1=1, dim2=2))
    assert float(off.abs().max()) > 0
    assert sum(losses[-4:]) / 4 < losses[0]
    with torch.no_grad():
        trained = student(original, maps, clips)
        settle(view, maps, clips)
        for site in view.anatomy.sites:
            stored = work.work.grids[site.name].quantize(view.weight(site))
            same = torch.isclose(stored, trained.weights[site.name], rtol=1e-3, atol=1e-5)
            assert float(same.double().mean()) > 0.97, site.name  # scales in 16 bits and ties of rounding apart


@pytest.mark.parametrize(
    ("family", "recipe"),
    [("llama", "affinequant-w4a4"), ("opt", "affinequant+gptq-w3a16-g16"), ("qwen3_moe", "affinequant-w3a16-g16")],
)
def test_training_beats_plain_rounding(family: str, recipe: str) -> None:
    before, after = bench(family, recipe, "affinequant.epochs=20").quantize(drift=0.01)
    assert after < before


@pytest.mark.parametrize("changes", [{"epochs": -1}, {"lwc_rate": 0.0}, {"stability": -1.0}, {"alpha": 2.0}])
def test_settings_without_meaning_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"not negative|between 0 and 1"):
        AffineQuant(**changes)  # type: ignore[arg-type]


def test_end_to_end(tmp_path: Path) -> None:
    """Online maps survive saving and loading: 8-bit weights behind them give the model's logits."""
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    settings = ["affinequant.epochs=2", "affinequant.stability=0.2"]
    options = {"calibration": str(text), "samples": 8, "length": 32, "settings": settings}
    run = lowbit.quantize(model, "affinequant-w8a16", tmp_path / "out", **options)
    assert all(block["error_after"] < 1e-3 for block in run.blocks)
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        original, loaded = (lowbit.load(path, dtype=torch.float32)(ids).logits for path in (model, tmp_path / "out"))
    assert float((loaded - original).norm() / original.norm()) < 0.05
