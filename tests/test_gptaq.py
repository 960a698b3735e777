"""GPTAQ against its formulas in fp64, one column at a time, and what the spec promises of any run.

Codes must be equal in every row that kept away from rounding ties (see `gptq_oracle`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from gptq_oracle import Oracle, nearest
from test_gptq import assert_oracle, inputs, same
from tiny import save_model, save_text
from torch import Tensor, nn

import lowbit
from lowbit.graph.anatomy import Site, Tap
from lowbit.methods.gptaq import GPTAQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.recipe import Recipe
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics.feedback import sweep
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import E2M1, Int, Number, Spec, per_channel, per_group
from lowbit.recipes import parse, resolve
from lowbit.stream.observe import observe

F64 = torch.float64
NEEDS = GPTAQ().needs


def seen(x: Tensor, original: Tensor, parts: int = 1) -> Stats:
    stats = Stats.observing(NEEDS)
    for mine, theirs in zip(x.chunk(parts), original.chunk(parts), strict=True):
        stats.update(mine, theirs)
    return stats


def drifted(x: Tensor) -> Tensor:
    """X̃: what quantized blocks have made X of, mixed across channels and with noise of its own; integers like X."""
    return (x + 0.2 * x @ torch.randn(x.shape[1], x.shape[1]) / x.shape[1] ** 0.5 + torch.randn_like(x)).round()


def loss(w: Tensor, q: QTensor, x: Tensor, original: Tensor) -> float:
    """‖W X̃ - Ŵ X‖²."""
    return float((original.double() @ w.double().T - x.double() @ q.dequantize().double().T).square().sum())


def quantize(method: GPTAQ | GPTQ, w: Tensor, spec: Spec, stats: Stats) -> QTensor:
    return method.round(w, spec, MinMaxClip(), stats, scores=False)


@dataclass
class Drifting(Oracle):
    """`Oracle` with P = α triu(D Uᵀ, 1) U, and w_i P_ij added to every later column beside GPTQ's correction."""

    cross: Tensor = field(default_factory=lambda: torch.empty(0))
    alpha: float = 0.25

    def _sweep(self, w: Tensor, u: Tensor) -> None:
        d = self.cross.double()[self.order][:, self.order]
        dead = self.h.double().diagonal()[self.order] == 0
        d[dead], d[:, dead] = 0.0, 0.0
        p = self.alpha * (d @ u.T).triu(1) @ u
        assert torch.equal(p, p.triu(1))
        lagging = w.clone()
        for i in range(w.shape[1]):
            if i % 128 == 0:
                lagging = w.clone()
            if self.groups != "static" and i % self.group == 0:
                self._fit(
                    self.order[i : i + self.group], (w if self.groups == "fresh" else lagging)[:, i : i + self.group]
                )
            c = int(self.order[i])
            self.levels[:, c], tie = nearest(w[:, i] / self.scale[:, c], self.number, self.zero[:, c])
            self.tie = torch.minimum(self.tie, tie)
            error = (w[:, i] - self.levels[:, c] * self.scale[:, c]) / u[i, i]
            w[:, i + 1 :] += w[:, i, None] * p[i, i + 1 :] - error[:, None] * u[i, i + 1 :]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
@pytest.mark.parametrize("number", [Int(4), Int(2, "asymmetric"), E2M1], ids=str)
def test_codes_are_the_formulas(number: Number, groups: Any, act_order: bool) -> None:
    w, x = torch.randn(24, 160), inputs()
    x[:, 17] = 0.0
    original = drifted(x)
    method = GPTAQ(act_order=act_order, groups=groups)
    q = quantize(method, w, per_group(number, 32, scale="float32"), seen(x, original))
    h, d = x.T @ x, (original - x).T @ x
    assert_oracle(q, Drifting(w, h, number, 32, act_order, groups, cross=d))
    plain = quantize(GPTQ(act_order=act_order, groups=groups), w, q.grid.spec, seen(x, original))
    assert not torch.equal(q.codes, plain.codes)


@pytest.mark.parametrize("spec", [per_channel(Int(3)), per_group(Int(4, "asymmetric"), 32)], ids=str)
def test_without_drift_it_is_gptq(spec: Spec) -> None:
    w, x = torch.randn(24, 160), inputs()
    for method in (GPTAQ(), GPTAQ(closed_form=True), GPTAQ(groups="fresh")):
        plain = GPTQ(groups=method.groups)
        assert same(quantize(method, w, spec, seen(x, x)), quantize(plain, w, spec, seen(x, x)))
    assert same(quantize(GPTAQ(alpha=0), w, spec, seen(x, drifted(x))), quantize(GPTQ(), w, spec, seen(x, x)))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(
    "spec", [per_channel(Int(3)), per_group(Int(4), 32), per_group(Int(2, "asymmetric"), 32)], ids=str
)
def test_the_original_outputs_are_nearer(spec: Spec, act_order: bool) -> None:
    w, x = torch.randn(48, 160), inputs()
    original = drifted(x)
    stats = seen(x, original)
    plain = loss(w, quantize(GPTQ(act_order=act_order), w, spec, stats), x, original)
    assert loss(w, quantize(GPTAQ(act_order=act_order), w, spec, stats), x, original) < plain
    assert loss(w, quantize(GPTAQ(1.0, act_order=act_order), w, spec, stats), x, original) < plain
    assert plain < loss(w, RTN().round(w, spec, MinMaxClip(), None, scores=False), x, original)


def test_block_sizes_agree() -> None:
    w, x = torch.randn(24, 160), inputs()
    original = drifted(x)
    first, *others = (
        quantize(GPTAQ(block=block), w, per_channel(Int(4)), seen(x, original)).codes for block in (32, 128, 256)
    )
    for other in others:
        assert float((first == other).double().mean()) > 0.999  # ties apart


def test_the_sweep_without_rounding_is_the_product() -> None:
    """Nothing is rounded, so nothing is corrected, and W becomes W (I - P)⁻¹: column j gets w_i P_ij of final w_i."""
    w = torch.randn(5, 70, dtype=F64)
    p = 0.1 * torch.randn(70, 70, dtype=F64).triu(1)
    u = (torch.eye(70, dtype=F64) + 0.1 * torch.randn(70, 70, dtype=F64)).triu()
    for block in (16, 40, 128):
        result = sweep(w, u, lambda _, values: values.clone(), block=block, drift=p)
        assert torch.allclose(result, w @ torch.linalg.inv(torch.eye(70, dtype=F64) - p), rtol=1e-10)


def test_closed_form_is_least_squares() -> None:
    """α = 1: GPTQ on the W* that brings W* X nearest to W X̃, solved by `lstsq`."""
    w, x = torch.randn(24, 160), inputs(2000)
    original = drifted(x)
    stats = seen(x, original)
    best = torch.linalg.lstsq(x.double(), original.double() @ w.double().T).solution.T
    spec = per_channel(Int(8), scale="float32")
    q = quantize(GPTAQ(1.0, closed_form=True, damp=1e-6), w, spec, stats)
    expected = quantize(GPTQ(damp=1e-6), best.float(), spec, stats)
    assert float((q.codes == expected.codes).double().mean()) > 0.99
    assert float((q.dequantize() - expected.dequantize()).abs().max()) < 1.01 * float(q.grid.scale.max())
    assert loss(w, q, x, original) < 0.5 * loss(w, quantize(GPTQ(), w, spec, stats), x, original)


def test_batches_do_not_matter_and_folds_carry_over() -> None:
    x = inputs()
    original, scale = drifted(x), torch.exp2(torch.randint(-3, 4, (160,)).float())
    truth = (original - x).double().T @ x.double()
    for stats in (seen(x, original), seen(x, original, 4)):
        assert stats.cross is not None and torch.equal(stats.cross.matrix.double(), truth)
    stats.transport(scale)
    moved = seen(x / scale, original / scale).cross
    assert stats.cross is not None and moved is not None and torch.equal(stats.cross.matrix, moved.matrix)


def test_unseen_inputs_are_rounded_to_nearest_and_unpaired_ones_get_gptq() -> None:
    w, x, spec = torch.randn(8, 64), inputs(width=64), per_group(Int(3), 16)
    nearest_codes = RTN().round(w, spec, MinMaxClip(), None, scores=False)
    assert same(GPTAQ().round(w, spec, MinMaxClip(), None, scores=False), nearest_codes)
    alone = Stats.observing(NEEDS)
    alone.update(x)
    assert same(quantize(GPTAQ(), w, spec, alone), quantize(GPTQ(), w, spec, alone))


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


def test_both_streams_are_observed_side_by_side() -> None:
    block = Pair()
    x, clean = torch.randn(3, 2, 7, 6), torch.randn(3, 2, 7, 6)
    taps = [Tap((Site("a", (5, 6)),)), Tap((Site("b", (4, 5)),))]
    calls = [lambda block, batch, of=of: block(of[batch]) for of in (x, clean)]
    stats = observe(block, taps, NEEDS, calls[0], 3, outputs=(1,), original=calls[1]).stats
    a = [of.reshape(-1, 6) for of in (x, clean)]
    b = [torch.tanh(block.a(of)).detach() for of in a]
    for name, (mine, theirs) in {"a": a, "b": b}.items():
        cross = stats[name].cross
        assert stats[name].tokens == 42 and cross is not None
        assert torch.allclose(cross.matrix, (theirs - mine).T @ mine, rtol=1e-4, atol=1e-5)
        assert torch.allclose(stats[name].hessian(), mine.T @ mine, rtol=1e-4, atol=1e-5)


def test_experts_are_not_compared() -> None:
    block = Pair()
    taps = [Tap((Site("a", (5, 6)),)), Tap((Site("b", (4, 5), expert=0),))]
    x = torch.randn(1, 2, 7, 6)
    stats = observe(block, taps, NEEDS, lambda m, i: m(x[i]), 1, original=lambda m, i: m(x[i] + 1)).stats
    crosses = stats["a"].cross, stats["b"].cross
    assert crosses[0] is not None and crosses[0].seen and crosses[1] is not None and not crosses[1].seen


def test_the_recipe_asks_for_both_streams() -> None:
    recipe = parse("gptaq-w4a16-g128")
    assert isinstance(recipe, Recipe) and recipe.float_stream and recipe.calibrated
    changed = resolve("gptaq-w3a16", settings=["gptaq.alpha=0.5", "gptaq.closed_form=true"]).recipe.round
    assert changed == GPTAQ(0.5, closed_form=True)
    for alpha in (-0.1, 1.1):
        with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
            GPTAQ(alpha)
    with pytest.raises(ValueError, match="damp must be positive"):
        GPTAQ(damp=0)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_end_to_end(family: str, tmp_path: Path) -> None:
    """The first block, whose inputs have not drifted, is GPTQ's; the second is not."""
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 16, "length": 32}
    run = lowbit.quantize(model, "gptaq-w3a16-g16", tmp_path / "out", **options)
    settings = ["gptq.true_sequential=false"]
    plain = lowbit.quantize(model, "gptq-w3a16-g16", tmp_path / "gptq", settings=settings, **options)
    assert run.blocks[0]["error_after"] == plain.blocks[0]["error_after"]
    assert run.blocks[1]["error_after"] != plain.blocks[1]["error_after"]
    assert all(block["error_after"] < block["error_before"] for block in run.blocks)
    ids = torch.arange(4, 20)[None]
    logits = [lowbit.load(tmp_path / "out", dtype=torch.float32)(ids).logits for _ in range(2)]
    assert torch.isfinite(logits[0]).all() and torch.equal(*logits)
