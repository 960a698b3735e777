"""OS+'s shift and threshold search against a naive search from the formulas, and what its maps do to real blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from blocks import Workbench
from tiny import save_model, save_text
from torch import Tensor

import lowbit
from lowbit.graph.anatomy import Edge, Norm, Rows, Site
from lowbit.methods.osplus import OSPlus
from lowbit.methods.views import Fold, to_readers, to_source
from lowbit.modules.linear import quantize_activation
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import Int, Spec, per_channel, per_token
from lowbit.recipes import resolve
from lowbit.stream.block import _transform
from lowbit.stream.edges import BlockEdge

F64 = torch.float64
NORM = Norm("norm", bias=True)


@dataclass
class Linears:
    """An `EdgeView` of linears behind one explicit input; it remembers every candidate and its error."""

    x: Tensor
    weights: Sequence[Tensor]
    bits: int = 8
    shifts: bool = True
    channels: tuple[int, ...] | None = None
    source: Norm | Rows = NORM
    tried: list[tuple[Tensor, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        readers = tuple(Site(f"reader{i}", (len(w), w.shape[1]), bias=True) for i, w in enumerate(self.weights))
        self.edge = Edge("edge", self.source, readers, channels=self.channels, shift=self.shifts)
        number = Int(self.bits, "symmetric-restricted")  # the default rule has ties of its own, at -amax
        self.specs: Sequence[Spec | None] = [per_channel(number, scale="float32")] * len(readers)
        self.activations: Sequence[Spec | None] = [per_token(number)] * len(readers)

    low = property(lambda self: self.x.amin(0))
    high = property(lambda self: self.x.amax(0))
    amax = property(lambda self: self.x.abs().amax(0))

    @property
    def absmean(self) -> Tensor:
        raise AssertionError("OS+ does not read it")

    def to_source(self, x: Tensor) -> Tensor:
        return to_source(self.edge, x)

    def to_readers(self, scale: Tensor) -> Tensor:
        return to_readers(self.edge, scale)

    def error(self, weights: Sequence[Tensor], scale: Tensor, shift: Tensor | None = None) -> float:
        x = self.x if shift is None else self.x - shift
        spec = self.activations[0]
        assert spec is not None
        seen = quantize_activation(x / scale, spec, None) * scale
        changes = [
            seen.double() @ a.double().T - x.double() @ b.double().T for a, b in zip(weights, self.weights, strict=True)
        ]
        loss = float(torch.cat(changes, 1).square().mean())
        self.tried.append((scale, loss))
        return loss


def inputs(tokens: int = 60, width: int = 24) -> Tensor:
    """Activations with channels that are large, off centre, or both."""
    x = torch.randn(tokens, width)
    x[:, 3] *= 15
    x[:, 7] += 40
    x[:, 11] = 10 * x[:, 11] - 30
    return x


def rounded(x: Tensor, bits: int) -> Tensor:
    """Every row on its own symmetric grid, amax at 2^(b-1) - 1 steps, fp64."""
    step = x.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (x / step).round() * step


def naive(x: Tensor, weights: Sequence[Tensor], bits: int, shifts: bool) -> tuple[Tensor, list[float], list[Tensor]]:
    """δ, and loss and scale of every threshold, written from the formulas in loops."""
    x = x.double()
    shift = (x.amax(0) + x.amin(0)) / 2 if shifts else torch.zeros(x.shape[1], dtype=F64)
    x = x - shift
    amax = float(x.abs().max())
    steps = max(100, int(amax / 0.5))
    losses, scales = [], []
    for k in range(steps + 1):
        t = amax - (amax - 1.0) * k / steps
        scale = torch.tensor([max(1.0, float(column.max()) / t, float(column.min()) / -t) for column in x.T], dtype=F64)
        seen = rounded(x / scale, bits)
        changes = [seen @ rounded(w.double() * scale, bits).T - x @ w.double().T for w in weights]
        losses.append(float(torch.cat(changes, 1).square().mean()))
        scales.append(scale)
    return shift, losses, scales


@pytest.mark.parametrize("shifts", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_search_is_the_papers(bits: int, shifts: bool) -> None:
    view = Linears(inputs(), [torch.randn(6, 24), torch.randn(4, 24)], bits, shifts)
    fold = OSPlus().fold(view)
    shift, losses, scales = naive(view.x, view.weights, bits, shifts)
    assert fold is not None and (fold.shift is not None) == shifts
    if fold.shift is not None:
        assert torch.allclose(fold.shift.double(), shift, rtol=1e-6, atol=1e-6)
    assert len(view.tried) == len(losses) > 100
    for (scale, _), truth in zip(view.tried, scales, strict=True):
        assert torch.allclose(scale.double(), truth, rtol=1e-5)
    near = [abs(loss - truth) < 1e-2 * truth for (_, loss), truth in zip(view.tried, losses, strict=True)]
    assert sum(near) > 0.9 * len(near)  # the others met a tie of rounding
    own = [loss for _, loss in view.tried]
    assert torch.equal(fold.scale, view.tried[own.index(min(own))][0])
    assert losses[own.index(min(own))] < 1.02 * min(losses) and min(losses) < 0.9 * losses[0]


def test_what_a_threshold_means() -> None:
    """s >= 1; channels inside ±t keep 1; nothing reaches beyond t; t = amax is the identity."""
    view = Linears(inputs(), [torch.randn(6, 24)])
    fold = OSPlus().fold(view)
    assert fold is not None and fold.shift is not None
    x = view.x - fold.shift
    amax = float(x.abs().max())
    assert torch.equal(view.tried[0][0], torch.ones(24))
    for t, (scale, _) in zip(OSPlus().thresholds(amax), view.tried, strict=True):
        assert float(scale.min()) >= 1
        inside = x.abs().amax(0) <= t
        assert torch.equal(scale[inside], torch.ones(int(inside.sum())))
        assert float((x / scale).abs().max()) <= t * (1 + 1e-6)
    assert min(loss for _, loss in view.tried) <= view.tried[0][1]
    chosen = next(loss for scale, loss in view.tried if torch.equal(scale, fold.scale))
    shifted = (rounded(x, 8) @ rounded(view.weights[0], 8).T - x @ view.weights[0].T).square().mean()
    assert chosen <= float(shifted) * (1 + 1e-4)


def test_steps() -> None:
    assert OSPlus().thresholds(30.0) == pytest.approx([30 - 0.29 * k for k in range(101)])
    assert len(OSPlus().thresholds(200.0)) == 401
    assert OSPlus(floor=0.1, steps=10).thresholds(1.1) == pytest.approx([1.1 - 0.1 * k for k in range(11)])
    assert OSPlus().thresholds(0.99) == [] == OSPlus().thresholds(float("inf"))


def test_small_inputs_and_ties_leave_the_scale_alone() -> None:
    view = Linears(0.1 * torch.randn(40, 24).clamp(-3, 3), [torch.randn(6, 24)])
    fold = OSPlus().fold(view)
    assert fold is not None and torch.equal(fold.scale, torch.ones(24)) and not view.tried
    flat = Linears(inputs(), [torch.zeros(6, 24)])
    fold = OSPlus().fold(flat)
    assert fold is not None and torch.equal(fold.scale, torch.ones(24)) and flat.tried[-1][1] == flat.tried[0][1]


def test_grouped_queries_share_scale_and_shift() -> None:
    channels, x = (0, 1, 0, 1, 2, 2), inputs()[:, [3, 7, 5, 11, 2, 9]]
    view = Linears(x, [torch.randn(5, 6)], channels=channels, source=Rows(Site("v", (3, 8), bias=True)))
    fold = OSPlus().fold(view)
    pools = [x[:, p] for p in ([0, 2], [1, 3], [4, 5])]
    assert fold is not None and fold.shift is not None
    assert torch.allclose(fold.shift, torch.stack([(p.max() + p.min()) / 2 for p in pools]))
    assert fold.scale.shape == (3,)
    assert OSPlus(all_edges=False).fold(view) is None


@pytest.mark.parametrize("changes", [{"floor": 0.0}, {"steps": 0}, {"stride": 0.0}])
def test_settings_without_meaning_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive, and steps at least 1"):
        OSPlus(**changes)


# --- on real blocks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "shifts", "scheme"),
    [
        ("opt", 3, "w8a8"),
        ("opt", 3, "w4a16-g16"),
        ("opt", 3, "w6a6-static"),
        ("llama", 0, "w8a8"),
        ("llama-tied", 1, "w8a8"),
        ("mixtral", 0, "w4a16-g16"),
    ],
)
def test_folding_preserves_the_logits(family: str, shifts: int, scheme: str) -> None:
    bench = Workbench(
        family, resolve(f"osplus-{scheme}", settings=["osplus.steps=8", "osplus.stride=50"]).recipe, 1, outliers=True
    )
    text = bench.text()
    folds: list[Fold] = []
    real = bench.work.fold
    bench.work.fold = lambda edge, fold: folds.append(real(edge, fold)) or folds[-1]  # type: ignore[method-assign]
    with torch.no_grad():
        observed = _transform(bench.work, bench.observed(text), text)
    assert sum(fold.shift is not None for fold in folds) == shifts
    assert all(float(fold.shift.abs().max()) > 0.05 for fold in folds if fold.shift is not None)
    assert bench.change() < 2e-5
    changed = [name for name, old in bench.work.tensors.items() if not torch.equal(old, bench.work.source[name])]
    assert any("norm" in name for name in changed)
    for site in bench.work.anatomy.taps[0].sites:  # statistics are those of what the linears see now
        seen = bench.observed(text).stats[site.name].minmax
        mine = observed.stats[site.name].minmax
        assert seen is not None and mine is not None
        assert seen.high is not None and mine.high is not None
        assert torch.allclose(mine.high, seen.high, rtol=1e-4, atol=1e-4)
        if shifts == 3:
            assert seen.low is not None
            middle = (seen.high + seen.low).abs() / (seen.high - seen.low)
            assert float(middle.max()) < 1e-4


def test_shifted_candidates_are_judged_as_they_will_be_folded() -> None:
    """`BlockEdge.error` of a shifted candidate is the change after really folding and rounding it."""
    bench = Workbench("opt", resolve("osplus-w4a4").recipe, outliers=True)
    bench.work.widen()
    text = bench.text()
    observed = bench.observed(text)
    edge = next(edge for edge in bench.work.anatomy.edges if edge.inspect == "fc1")
    sample = observed.samples["fc1"]
    site = edge.readers[0]
    spec, activation = bench.work.formats["fc1"]
    assert spec is not None and activation is not None
    view = BlockEdge(
        edge,
        bench.block,
        [bench.work.weight(site)],
        [spec],
        [activation],
        [observed.stats["fc1"]],
        sample,
        torch.float32,
    )
    w, b = view.weights[0], bench.work.source["fc1.bias"]
    shift, scale = (view.low + view.high) / 2, 0.5 + torch.rand(w.shape[1])
    folded = fit_range(w * scale, spec).quantize(w * scale)
    change = count = 0.0
    for call in sample:
        x = call.args[0]
        y = quantize_activation((x - shift) / scale, activation, None) @ folded.T + b + w @ shift
        change, count = change + float((y - call.output).square().sum()), count + y.numel()
    assert view.error([folded / scale], scale, shift) == pytest.approx(change / count, rel=1e-4)


@pytest.mark.parametrize("recipe", ["osplus+awq-w4a16-g16", "osplus+smoothquant-w8a8", "awq+osplus-w4a8-g16"])
def test_transforms_behind_each_other(recipe: str) -> None:
    """A later transform tries its candidates on calls that were recorded behind the earlier one's folds."""
    settings = ["osplus.steps=20", "osplus.stride=50"]
    bench = Workbench("opt", resolve(recipe, settings=settings).recipe, 1, outliers=True)
    before, after = bench.quantize()
    assert 0 < after < before


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_end_to_end(family: str, tmp_path: Path) -> None:
    model, text = save_model(family, tmp_path / "model"), save_text(tmp_path / "text.txt")
    options = {"calibration": str(text), "samples": 8, "length": 32}
    run = lowbit.quantize(model, "osplus-w8a8", tmp_path / "out", settings=["osplus.steps=20"], **options)
    assert all(block["error_after"] < 1.1 * block["error_before"] for block in run.blocks)
    ids = torch.arange(4, 20)[None]
    original, loaded = (lowbit.load(path, dtype=torch.float32)(ids).logits for path in (model, tmp_path / "out"))
    assert float(((loaded - original).norm() / original.norm()).detach()) < 0.05
