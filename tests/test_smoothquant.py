"""SmoothQuant's scale against its formula in plain loops, and what it does to a layer with outlier channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from lowbit.graph.anatomy import Edge, Norm, Rows, Site
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.methods.views import EdgeView
from lowbit.numerics.grid import fit_range
from lowbit.numerics.spec import Int, Spec, per_channel, per_token

NORM = Norm("norm")


@dataclass
class Linears:
    """An `EdgeView` of plain linears behind one explicit input."""

    x: Tensor
    weights: Sequence[Tensor]
    source: Norm | Rows = NORM
    channels: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        readers = tuple(Site(f"reader{i}", (len(w), w.shape[1])) for i, w in enumerate(self.weights))
        self.edge = Edge("edge", self.source, readers, channels=self.channels)
        self.specs: Sequence[Spec | None] = [per_channel(Int(8))] * len(readers)
        self.activations: Sequence[Spec | None] = [per_token(Int(8))] * len(readers)

    @property
    def absmean(self) -> Tensor:
        raise AssertionError("SmoothQuant does not read it")

    @property
    def amax(self) -> Tensor:
        return self.x.abs().amax(0)

    def to_source(self, x: Tensor) -> Tensor:
        if self.channels is None:
            return x
        count = max(self.channels) + 1
        return torch.stack([x[[i for i, c in enumerate(self.channels) if c == j]].amax() for j in range(count)])

    def to_readers(self, scale: Tensor) -> Tensor:
        return scale if self.channels is None else scale[list(self.channels)]

    def error(self, weights: Sequence[Tensor], scale: Tensor) -> float:
        raise AssertionError("SmoothQuant searches nothing")


def inputs(tokens: int = 50, width: int = 32) -> Tensor:
    """Activations whose channels 3 and 20 are fifty times the others."""
    x = torch.randn(tokens, width)
    x[:, [3, 20]] *= 50
    return x


def smooth(view: EdgeView, alpha: float = 0.5) -> Tensor:
    scale = SmoothQuant(alpha).fold(view).scale
    assert scale is not None
    return scale


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_the_scale_is_the_formulas(alpha: float) -> None:
    x, weights = inputs(), [torch.randn(6, 32), 3 * torch.randn(4, 32)]
    scale = smooth(Linears(x, weights), alpha)
    for j in range(32):
        amax_x = max(abs(float(row[j])) for row in x)
        amax_w = max(abs(float(row[j])) for w in weights for row in w)
        assert float(scale[j]) == pytest.approx(amax_x**alpha / amax_w ** (1 - alpha), rel=1e-5)


def test_half_way_gives_both_sides_one_range() -> None:
    x, weights = inputs(), [torch.randn(6, 32), torch.randn(4, 32)]
    scale = smooth(Linears(x, weights))
    assert torch.allclose((x / scale).abs().amax(0), (torch.cat(weights) * scale).abs().amax(0), rtol=1e-5)


def test_all_the_way_flattens_the_inputs() -> None:
    x = inputs()
    scale = smooth(Linears(x, [torch.randn(6, 32)]), 1.0)
    assert torch.allclose((x / scale).abs().amax(0), torch.ones(32), rtol=1e-6)


def test_no_way_flattens_the_weights() -> None:
    x, w = inputs(), torch.randn(6, 32)
    assert torch.allclose((w * smooth(Linears(x, [w]), 0.0)).abs().amax(0), torch.ones(32), rtol=1e-6)


def test_the_fold_preserves_the_output() -> None:
    x, w = inputs().double(), torch.randn(6, 32).double()
    scale = smooth(Linears(x.float(), [w.float()])).double()
    assert torch.allclose((x / scale) @ (w * scale).T, x @ w.T, rtol=1e-12)


def w8a8(x: Tensor, w: Tensor) -> Tensor:
    """Weights per channel, inputs per token, both symmetric 8 bits."""
    weight, activation = per_channel(Int(8), scale="float32"), per_token(Int(8))
    return fit_range(x, activation).quantize(x) @ fit_range(w, weight).quantize(w).T


def test_outlier_channels_hurt_less() -> None:
    """Two channels at fifty times the rest; smoothed, a sixth of the squared error is left."""
    x, w = inputs(200, 64), torch.randn(48, 64)
    truth = x @ w.T
    scale = smooth(Linears(x, [w]))
    plain = float((w8a8(x, w) - truth).square().sum())
    assert float((w8a8(x / scale, w * scale) - truth).square().sum()) < 0.2 * plain


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_are_left_alone(alpha: float) -> None:
    """Dead inputs keep scale 1, dead weights any finite positive one; the other channels do not notice."""
    x, w = inputs(), torch.randn(6, 32)
    alive = smooth(Linears(x, [w]), alpha)
    x[:, [0, 5]] = 0.0
    w[:, [5, 9]] = 0.0
    scale = smooth(Linears(x, [w]), alpha)
    assert torch.equal(scale[[0, 5]], torch.ones(2))
    assert scale.isfinite().all() and (scale > 0).all()
    others = [j for j in range(32) if j not in (0, 5, 9)]
    assert torch.equal(scale[others], alive[others])
    assert float(scale[9]) == pytest.approx(float(x[:, 9].abs().max()) ** alpha / 1e-5 ** (1 - alpha), rel=1e-4)


def test_tiny_channels_stop_at_the_floor() -> None:
    x, w = torch.full((1, 3), 1e-20), torch.full((1, 3), 10.0)
    assert torch.equal(smooth(Linears(x, [w])), torch.full((3,), 1e-5))


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_inputs_that_are_not_finite_are_left_alone(bad: float) -> None:
    x, w = inputs(), torch.randn(6, 32)
    x[4, 7] = bad
    scale = smooth(Linears(x, [w]))
    assert float(scale[7]) == 1.0 and scale.isfinite().all()


def test_only_norms_are_smoothed_unless_all_edges() -> None:
    x, w = inputs(), torch.randn(6, 32)
    rows = Linears(x, [w], Rows(Site("up", (32, 8))))
    assert SmoothQuant().fold(rows) is None
    everywhere = SmoothQuant(all_edges=True).fold(rows).scale
    assert everywhere is not None and torch.equal(everywhere, smooth(Linears(x, [w])))


def test_grouped_queries_share_a_scale() -> None:
    """Six reader channels read three source channels: ranges are pooled on both sides before the formula."""
    channels, x, w = (0, 1, 0, 1, 2, 2), inputs(width=32)[:, :6], torch.randn(5, 6)
    scale = SmoothQuant(0.7, all_edges=True).fold(Linears(x, [w], Rows(Site("v", (3, 8))), channels)).scale
    pools = [[0, 2], [1, 3], [4, 5]]
    expected = torch.stack([x[:, p].abs().max() ** 0.7 / w[:, p].abs().max() ** 0.3 for p in pools])
    assert scale is not None and torch.allclose(scale, expected, rtol=1e-6)


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_a_strength_beyond_the_ends_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        SmoothQuant(alpha)


@pytest.mark.parametrize(("part", "count"), [(0.005, 1), (0.1, 3), (1.0, 32)])
def test_in_front_of_down_projections_the_loudest_channels_alone_are_smoothed(part: float, count: int) -> None:
    """DGQ's choice: the formula's scale where inputs are largest, and nothing elsewhere."""
    x, w = inputs(), torch.randn(6, 32)
    rows = Linears(x, [w], Rows(Site("up", (32, 8))))
    assert SmoothQuant(down_part=part).fold(rows) is None  # values in front of the attention's output
    rows.edge = replace(rows.edge, kind="up")
    assert SmoothQuant().fold(rows) is None
    fold = SmoothQuant(down_part=part).fold(rows)
    everywhere, loudest = smooth(Linears(x, [w])), sorted(range(32), key=lambda j: -float(x[:, j].abs().max()))
    assert fold is not None
    for place, j in enumerate(loudest):
        assert float(fold.scale[j]) == (float(everywhere[j]) if place < count else 1.0)
    behind = SmoothQuant(down_part=part).fold(Linears(x, [w]))
    assert behind is not None and torch.equal(behind.scale, everywhere)
    with pytest.raises(ValueError, match="down_part must be between 0 and 1"):
        SmoothQuant(down_part=1.5)
