"""SignRound against its update written out element by element, and what the spec promises of any run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from tiny import save_model, save_text
from torch import Tensor
from views import Linears

import lowbit
from lowbit.methods.gptq import GPTQ
from lowbit.methods.rtn import MinMaxClip
from lowbit.methods.signround import SignRound, _Rounding, _rounds_to
from lowbit.methods.views import Stats
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import E2M1, Int, Spec, per_channel, per_group


def correlated(batches: int = 4, sequences: int = 2, tokens: int = 16, width: int = 32) -> Tensor:
    mix = torch.randn(width, width) * torch.logspace(0, -1, width)
    return torch.randn(batches, sequences, tokens, width) @ mix


SPECS = [
    per_group(Int(2, "asymmetric"), 16),
    per_group(Int(3), 16),
    per_channel(Int(4, "asymmetric")),
    per_group(E2M1, 16),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_error_falls_and_codes_stay_beside_the_weights(spec: Spec) -> None:
    view = Linears([torch.randn(24, 32), torch.randn(8, 32)], [spec, spec], correlated())
    SignRound(iterations=120, batch=8).train(view)
    starts = {site.name: view.start(site) for site in view.anatomy.sites}
    assert view.error(view.codes) < 0.9 * view.error(starts)
    for site in view.anatomy.sites:
        codes = view.codes[site.name]
        step = codes.grid.scale.repeat_interleave(32 // codes.grid.scale.shape[1], 1)
        if isinstance(spec.number, Int):
            inside = codes.grid.quantize(view.weight(site)) != codes.grid.quantize(view.weight(site) * 0.9)
            assert inside.any()
            distance = (codes.dequantize() - view.weight(site)).abs() / step
            clipped = codes.grid.quantize(view.weight(site)).sub(view.weight(site)).abs() / step > 0.5 + 1e-5
            assert float(distance[~clipped].max()) <= 1 + 1e-4


def test_one_step_is_the_formula() -> None:
    """V ← clip(V - η sign(∂L/∂V)) with ∂L/∂Ŵ = 2 (Ŵ - W) XᵀX and ∂Ŵ/∂V = s where the code is not saturated."""
    spec, w, x = per_channel(Int(3)), torch.randn(6, 16), correlated(1, 2, 16, 16)
    start, view = fit_range(w, spec), Linears([w], [spec], x)
    rounding = _Rounding(view, view.anatomy.sites)
    method = SignRound(batch=2)
    method._gradients(view, [rounding], partial(method._step, view, [rounding]))
    h = x.reshape(-1, 16).T.double() @ x.reshape(-1, 16).double()
    gradient = 2 * (start.quantize(w) - w).double() @ h * start.scale.double()
    level = (w / start.scale).round()
    gradient[(level > 3) | (level < -4)] = 0
    assert rounding.offset.grad is not None
    assert torch.allclose(rounding.offset.grad.double(), gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))
    rounding.descend(0.25, 0.0)
    assert torch.equal(rounding.offset.detach(), -0.25 * gradient.sign().float())


@pytest.mark.parametrize("groups", ["static", "fresh"])
@pytest.mark.parametrize("spec", SPECS[:3], ids=str)
def test_it_starts_from_the_codes_it_is_given(spec: Spec, groups: str) -> None:
    w, x = torch.randn(24, 32), correlated()
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x.reshape(-1, 32))
    start = GPTQ(groups=groups).round(w, spec, MinMaxClip(), stats, scores=False)  # type: ignore[arg-type]
    assert not torch.equal(start.codes, fit_range(w, spec).encode(w))
    view = Linears([w, w], [spec, spec], x, starts={"linear0": start, "linear1": start})
    rounding = _Rounding(view, view.anatomy.sites)
    chosen = dict(rounding.codes(rounding.state()))
    for site in view.anatomy.sites:
        assert torch.equal(dict(rounding.split(rounding.weight().detach()))[site], view.start(site).dequantize())
        assert torch.equal(chosen[site].codes, view.start(site).codes)
    if start.order is None:
        latent, same = _rounds_to(w, start), start.dequantize() == start.grid.quantize(w)
        assert torch.equal(latent[same], w[same])


def test_the_best_iterate_is_kept() -> None:
    """With steps so long that training diverges, the result is the best that was seen: no worse than the start."""
    spec = per_group(Int(4), 16)
    view = Linears([torch.randn(24, 32)], [spec], correlated(batches=1))
    SignRound(iterations=20, rate=0.5, range_rate=0.5).train(view)
    assert view.error(view.codes) <= view.error({"linear0": view.start(view.anatomy.sites[0])})


def test_same_seed_same_codes() -> None:
    results = []
    w, x = torch.randn(24, 32), correlated(8)
    for _ in range(2):
        view = Linears([w], [SPECS[0]], x, seed=3)
        SignRound(iterations=10, batch=2).train(view)
        results.append(view.codes["linear0"].codes)
    assert torch.equal(*results)


@pytest.mark.parametrize("recipe", ["signround-w2a16-g16-asym", "awq+gptq+signround-w3a16-g16", "signround-w4a8-g16"])
def test_end_to_end(recipe: str, tmp_path: Path) -> None:
    model, text = save_model("llama", tmp_path / "model"), save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 16, "length": 32}
    settings = ["signround.iterations=50"]
    run = lowbit.quantize(model, recipe, tmp_path / "out", settings=settings, **options)
    rtn = lowbit.quantize(model, "rtn-" + recipe.rpartition("+")[2].partition("-")[2], tmp_path / "rtn", **options)
    assert all(block["error_after"] < block["error_before"] for block in run.blocks)
    assert run.bits_per_weight == rtn.bits_per_weight
    loaded = lowbit.load(tmp_path / "out", dtype=torch.float32)
    ids = torch.arange(4, 20)[None]
    assert torch.isfinite(loaded(ids).logits).all()
