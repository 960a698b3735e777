"""AWQ's scale search and clip search against naive searches written from the paper, in fp64 and over every token.

The edge here is the smallest that the protocol allows: linears behind one input that is held explicitly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lowbit.graph.anatomy import Edge, Norm, Site
from lowbit.methods.awq import AWQ, AWQClip, candidate, mean_share
from lowbit.methods.views import EdgeView, Stats
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.spec import E4M3, Int, Number, Spec, per_block, per_channel, per_group, per_tensor

F64 = torch.float64


@dataclass
class Linears:
    """An `EdgeView` of plain linears; it remembers every candidate and its error."""

    x: Tensor
    weights: Sequence[Tensor]
    specs: Sequence[Spec | None]
    channels: tuple[int, ...] | None = None
    tried: list[tuple[list[Tensor], Tensor, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        readers = tuple(Site(f"reader{i}", (len(w), w.shape[1])) for i, w in enumerate(self.weights))
        self.edge = Edge("edge", Norm("norm"), readers, channels=self.channels)
        self.activations: Sequence[Spec | None] = [None] * len(self.weights)

    @property
    def absmean(self) -> Tensor:
        return self.x.abs().mean(0)

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
        changes = [self.x.double() @ (a - b).double().T for a, b in zip(weights, self.weights, strict=True)]
        loss = float(torch.cat(changes, 1).square().mean())
        self.tried.append((list(weights), scale, loss))
        return loss


def inputs(tokens: int, width: int) -> Tensor:
    """Activations with a few large channels."""
    sizes = torch.ones(width)
    sizes[:: max(2, width // 4)] = 20.0
    return torch.randn(tokens, width) * sizes * (0.5 + torch.rand(width))


def fit(low: float, high: float, number: Int) -> tuple[float, float]:
    """(scale, zero) for the ends of a unit, by the rule's formula."""
    if number.symmetric:
        steps = 2 ** (number.bits - 1) - 1 if number.rule == "symmetric-restricted" else (2**number.bits - 1) / 2
        return max(-low, high) / steps, 0.0
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / (2**number.bits - 1)
    return scale, float(round(-low / scale))


def rounded(w: Tensor, scale: float, zero: float, number: Int) -> Tensor:
    """s (clamp(round(w/s) + z) - z)."""
    return ((w / scale).round() + zero).clamp(number.low, number.high).sub(zero) * scale


def rtn(w: Tensor, number: Int, group: int) -> Tensor:
    """Plain rounding, row by row and group by group, fp64."""
    out = torch.empty_like(w)
    for row in range(len(w)):
        for a in range(0, w.shape[1], group):
            part = w[row, a : a + group]
            scale, zero = fit(float(part.min()), float(part.max()), number)
            out[row, a : a + group] = rounded(part, scale, zero, number)
    return out


# --- scale search -----------------------------------------------------------------------------------------------------


def naive_search(view: Linears, number: Int, group: int, duo: bool) -> tuple[list[float], list[Tensor]]:
    """Loss and scale of each of the twenty candidates, from the formulas."""
    x, weights = view.x.double(), [w.double() for w in view.weights]
    a = x.abs().mean(0)
    shares = []
    for w in weights:
        for row in w:
            shares.append(torch.cat([part.abs() / part.abs().max() for part in row.split(group)]))
    m = torch.stack(shares).mean(0)
    losses, scales = [], []
    for k in range(20):
        r = k / 20
        s = (a**r / (m ** (1 - r) + 1e-4) if duo else a**r).clamp(min=1e-4)
        s = s / (s.max() * s.min()).sqrt()
        changes = [x @ (rtn(w * s, number, group) / s - w).T for w in weights]
        losses.append(float(torch.cat(changes, 1).square().mean()))
        scales.append(s)
    return losses, scales


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize(
    "number", [Int(4, "symmetric-restricted"), Int(3, "asymmetric"), Int(2, "asymmetric")], ids=str
)
@pytest.mark.parametrize("group", [16, 32])
def test_the_search_is_the_papers(number: Int, group: int, duo: bool) -> None:
    """The default symmetric rule is left out: it puts -amax on a tie, -7.5 steps, where fp32 and fp64 may part."""
    view = Linears(
        inputs(60, 32), [torch.randn(6, 32), torch.randn(4, 32)], [per_group(number, group, scale="float32")] * 2
    )
    scale = AWQ(duo=duo).fold(view).scale
    losses, scales = naive_search(view, number, group, duo)
    assert len(view.tried) == 20
    agree = [abs(tried[2] - loss) < 1e-4 * loss for tried, loss in zip(view.tried, losses, strict=True)]
    assert sum(agree) >= 18  # the others met a tie
    assert scale is not None
    taken = [k for k in range(20) if torch.allclose(scale.double(), scales[k], rtol=1e-5)]
    assert len(taken) == 1 and losses[taken[0]] <= (1 + 1e-4) * min(losses) < losses[0]


@pytest.mark.parametrize(
    "spec", [per_channel(Int(4)), per_group(Int(2, "asymmetric"), 16), per_group(E4M3, 16)], ids=str
)
def test_r_of_zero_is_plain_rounding_and_nothing_taken_is_worse(spec: Spec) -> None:
    view = Linears(inputs(50, 64), [torch.randn(8, 64), torch.randn(3, 64)], [spec, spec])
    scale = AWQ().fold(view).scale
    weights, spread, least = view.tried[0]
    assert torch.equal(spread, torch.ones(64))
    assert all(torch.equal(a, fit_range(b, spec).quantize(b)) for a, b in zip(weights, view.weights, strict=True))
    losses = [loss for _, _, loss in view.tried]
    assert len(losses) == 20 and min(losses) <= least
    assert scale is not None and torch.equal(scale, view.tried[losses.index(min(losses))][1])


def test_the_stub_is_an_edge_view() -> None:
    view: EdgeView = Linears(inputs(8, 4), [torch.randn(2, 4)], [per_channel(Int(4))])
    assert view.to_readers(view.to_source(view.amax)).shape == (4,)


def test_grouped_queries_share_a_scale() -> None:
    """Eight reader channels read four source channels: the largest activation decides, the scale is repeated."""
    channels = (0, 1, 0, 1, 2, 3, 2, 3)
    view = Linears(inputs(40, 8), [torch.randn(5, 8)], [per_channel(Int(3))], channels)
    scale = AWQ().fold(view).scale
    assert scale is not None and scale.shape == (4,)
    pooled = torch.maximum(view.absmean[[0, 1, 4, 5]], view.absmean[[2, 3, 6, 7]])
    for k, (_, spread, _) in enumerate(view.tried):
        assert torch.equal(spread, candidate(pooled, None, k / 20)[list(channels)])


def test_readers_kept_in_16_bits_stay_as_they_are() -> None:
    view = Linears(inputs(40, 32), [torch.randn(4, 32), torch.randn(4, 32)], [None, per_channel(Int(3))])
    AWQ(duo=True).fold(view)
    assert all(weights[0] is view.weights[0] for weights, _, _ in view.tried)
    view = Linears(inputs(40, 32), [torch.randn(4, 32)], [None])
    scale = AWQ().fold(view).scale
    assert scale is not None and torch.equal(scale, torch.ones(32))


def test_finer_grids_try_more_candidates() -> None:
    view = Linears(inputs(40, 16), [torch.randn(4, 16)], [per_channel(Int(3))])
    AWQ(grid=5).fold(view)
    activation = view.absmean
    assert [torch.equal(s, candidate(activation, None, k / 5)) for k, (_, s, _) in enumerate(view.tried)] == [True] * 5


@pytest.mark.parametrize("duo", [False, True])
@pytest.mark.parametrize("dead", [0, 1, 16])
@pytest.mark.parametrize("r", [0.0, 0.05, 0.5, 0.95])
def test_candidates_are_normalised_and_finite(r: float, dead: int, duo: bool) -> None:
    activation = 10 * torch.rand(16)
    activation[:dead] = 0.0
    share = torch.rand(16)
    share[3] = 0.0
    scale = candidate(activation, share if duo else None, r)
    assert scale.isfinite().all() and (scale > 0).all()
    assert float((scale.max() * scale.min()).sqrt()) == pytest.approx(1.0, rel=1e-5)


def test_dead_channels_take_the_floor() -> None:
    activation = torch.tensor([0.0, 1.0, 16.0])
    expected = torch.tensor([1e-4, 1.0, 4.0], dtype=F64) / (1e-4 * 4.0) ** 0.5
    assert torch.allclose(candidate(activation, None, 0.5).double(), expected, rtol=1e-6)
    view = Linears(inputs(40, 32), [torch.randn(4, 32)], [per_group(Int(3), 16)])
    view.x[:, :5] = 0.0
    scale = AWQ().fold(view).scale
    assert scale is not None and scale.isfinite().all()
    assert all(loss == loss and loss < float("inf") for _, _, loss in view.tried)


def test_duo_by_hand() -> None:
    """a = (1, 4, 9), m = (1/4, 1, 4/9), r = 1/2: √a/(√m + 1e-4) = 2, 2, 4.5 but for the 1e-4."""
    scale = candidate(torch.tensor([1.0, 4.0, 9.0]), torch.tensor([0.25, 1.0, 4 / 9]), 0.5).double()
    raw = torch.tensor([1 / 0.5001, 2 / 1.0001, 3 / (2 / 3 + 1e-4)], dtype=F64)
    assert torch.allclose(scale, raw / (raw.max() * raw.min()).sqrt(), rtol=1e-6)
    scale = candidate(torch.ones(3), torch.tensor([0.25, 1.0, 0.5]), 0.0).double()
    raw = torch.tensor([1 / 0.2501, 1 / 1.0001, 1 / 0.5001], dtype=F64)
    assert torch.allclose(scale, raw / (raw.max() * raw.min()).sqrt(), rtol=1e-6)


def test_mean_share_by_hand() -> None:
    """Rows of all readers count alike; each is taken as a part of its own group's largest."""
    a = torch.tensor([[1.0, -2.0, 3.0, 12.0], [0.0, 0.0, -5.0, 1.0]])
    b = torch.tensor([[4.0, 1.0, 1.0, -2.0]])
    grouped = mean_share([a, b], [per_group(Int(4), 2)] * 2)
    assert torch.allclose(
        grouped, torch.tensor([(0.5 + 0 + 1) / 3, (1 + 0 + 0.25) / 3, (0.25 + 1 + 0.5) / 3, (1 + 0.2 + 1) / 3])
    )
    mixed = mean_share([a, b], [None, per_channel(Int(4))])
    assert torch.allclose(
        mixed, torch.tensor([(1 / 12 + 0 + 1) / 3, (2 / 12 + 0 + 0.25) / 3, (0.25 + 1 + 0.25) / 3, (1 + 0.2 + 0.5) / 3])
    )
    whole = mean_share([a], [per_tensor(Int(8))])
    assert torch.allclose(whole, a.abs().mean(0) / 12)
    squares = mean_share([torch.ones(5, 7)], [per_block(E4M3, 4)])
    assert torch.equal(squares, torch.ones(7))


# --- clip search ------------------------------------------------------------------------------------------------------


def observe(x: Tensor) -> Stats:
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return stats


def clip(w: Tensor, spec: Spec, x: Tensor, method: AWQClip | None = None) -> Grid:
    return (method or AWQClip()).fit(w, spec, observe(x), scores=False)


def group_errors(w: Tensor, what: Tensor, x: Tensor, group: int) -> Tensor:
    """Σ over tokens of (x_g · (w - ŵ)_g)² for every row and group [O, G], fp64."""
    parts = zip(x.double().split(group, 1), (w.double() - what.double()).split(group, 1), strict=True)
    return torch.stack([(xg @ dg.T).square().sum(0) for xg, dg in parts], 1)


def naive_clip(w: Tensor, x: Tensor, number: Int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """(scale, zero, how clear the choice was) of every row and group: ten ratios, the first of the least errors."""
    w, x = w.double(), x.double()
    scale, zero, clear = (torch.empty(len(w), w.shape[1] // group, dtype=F64) for _ in range(3))
    for row in range(len(w)):
        for g in range(w.shape[1] // group):
            span = slice(g * group, (g + 1) * group)
            tried = []
            for i in range(10):
                ratio = 1 - i / 20
                s, z = fit(float(w[row, span].min()) * ratio, float(w[row, span].max()) * ratio, number)
                change = x[:, span] @ (rounded(w[row, span], s, z, number) - w[row, span])
                tried.append((float(change.square().sum()), i, s, z))
            best, second = sorted(tried)[:2]
            scale[row, g], zero[row, g], clear[row, g] = best[2], best[3], second[0] / best[0] - 1
    return scale, zero, clear


@pytest.mark.parametrize("group", [16, 48])
@pytest.mark.parametrize("number", [Int(4), Int(2), Int(3, "asymmetric"), Int(2, "asymmetric")], ids=str)
def test_the_clip_is_the_papers(number: Int, group: int) -> None:
    w, x = torch.randn(7, 48), inputs(90, 48)
    parts = w.unflatten(1, (-1, group))
    w = (parts * parts.gather(2, parts.abs().argmax(2, keepdim=True)).sign()).flatten(1)  # no -amax, which is a tie
    grid = clip(w, per_group(number, group if group < 48 else -1, scale="float32"), x)
    scale, zero, clear = naive_clip(w, x, number, group)
    sure = clear > 1e-3
    assert sure.double().mean() > 0.7
    assert torch.allclose(grid.scale[sure].double(), scale[sure], rtol=1e-5, atol=0)
    assert not torch.equal(grid.scale, fit_range(w, grid.spec).scale)
    if not number.symmetric:
        assert grid.zero is not None and torch.equal(grid.zero[sure].double(), zero[sure])


NUMBERS: list[Number] = [Int(4), Int(2), Int(2, "asymmetric"), Int(3, "symmetric-unsigned"), E4M3]


@pytest.mark.parametrize("group", [16, -1])
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_no_row_or_group_is_worse_than_unclipped(number: Number, group: int) -> None:
    w, x, spec = torch.randn(20, 64), inputs(100, 64), per_group(number, group)
    clipped, plain = clip(w, spec, x), fit_range(w, spec)
    errors = [group_errors(w, grid.quantize(w), x, 64 if group == -1 else group) for grid in (clipped, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-5)).all()
    moved = clipped.scale != plain.scale
    assert (errors[0] < errors[1])[moved].all() and (moved.any() or number is E4M3)
    ratio = clipped.scale / plain.scale
    assert float(ratio.min()) > 0.54 and float(ratio.max()) <= 1


def test_rows_are_searched_in_chunks_for_speed_only() -> None:
    """Half a million weights at once, in several chunks; the rows on both sides of a border and at the end."""
    w, x, spec = torch.randn(33001, 16), inputs(100, 16), per_channel(Int(3, "asymmetric"))
    whole = clip(w, spec, x)
    assert whole.scale.shape == (33001, 1) and whole.zero is not None
    for rows in (slice(32700, 32800), slice(32901, 33001)):
        part = clip(w[rows], spec, x)
        assert float((part.scale == whole.scale[rows]).double().mean()) > 0.98
        assert part.zero is not None and float((part.zero == whole.zero[rows]).double().mean()) > 0.98


def test_batches_of_inputs_do_not_matter() -> None:
    w, x, spec = torch.randn(9, 64), (8 * inputs(101, 64)).round(), per_group(Int(3), 16)
    stats = Stats.observing(frozenset({"gram"}))
    for part in x.split([1, 40, 60]):
        stats.update(part)
    assert torch.equal(AWQClip().fit(w, spec, stats, scores=False).scale, clip(w, spec, x).scale)


def test_a_fold_carries_over_to_the_clip() -> None:
    """Statistics transported through a fold give the clip of the folded weight on the divided inputs."""
    w, x, spec = torch.randn(9, 64), (8 * inputs(101, 64)).round(), per_group(Int(3), 16)
    scale = torch.exp2(torch.randint(-3, 4, (64,)).float())
    stats = observe(x)
    stats.transport(scale)
    folded = AWQClip().fit(w * scale, spec, stats, scores=False)
    assert torch.equal(folded.scale, clip(w * scale, spec, x / scale).scale)
    assert not torch.equal(folded.scale, clip(w * scale, spec, x).scale)


def test_two_bits_want_the_asymmetric_clip_on_asymmetric_weights() -> None:
    """Groups of 64 off centre: each quantizer with the clip of its own kind."""
    w, x = torch.randn(32, 256) + 1.5 * torch.randn(32, 4).repeat_interleave(64, 1), inputs(200, 256)
    mean = {}
    for number in (Int(2), Int(2, "asymmetric")):
        grid = clip(w, per_group(number, 64), x)
        mean[number.symmetric] = float(group_errors(w, grid.quantize(w), x, 64).mean())
    assert mean[False] < 0.7 * mean[True]


@pytest.mark.parametrize("group", [16, -1])
def test_queries_and_keys_and_unseen_inputs_stay_unclipped(group: int) -> None:
    w, x, spec = torch.randn(8, 64), inputs(50, 64), per_group(Int(2), group)
    plain = fit_range(w, spec).scale
    assert torch.equal(AWQClip().fit(w, spec, observe(x), scores=True).scale, plain)
    assert torch.equal(AWQClip().fit(w, spec, None, scores=False).scale, plain)
    assert not torch.equal(clip(w, spec, x).scale, plain)


@pytest.mark.parametrize("spec", [per_tensor(Int(4)), per_block(E4M3, 16)], ids=str)
def test_units_of_several_rows_stay_unclipped(spec: Spec) -> None:
    w = torch.randn(20, 40)
    assert torch.equal(clip(w, spec, inputs(50, 40)).scale, fit_range(w, spec).scale)


def test_groups_without_inputs_stay_unclipped() -> None:
    w, x, spec = torch.randn(8, 64), inputs(50, 64), per_group(Int(2), 16)
    x[:, 16:32] = 0.0
    grid, plain = clip(w, spec, x), fit_range(w, spec)
    assert torch.equal(grid.scale[:, 1], plain.scale[:, 1])
    assert not torch.equal(grid.scale[:, 0], plain.scale[:, 0])


def test_fewer_steps_of_shrinkage() -> None:
    """One step is no clipping; two are the full range and 0.95 of it."""
    w, x, spec = torch.randn(30, 64), inputs(50, 64), per_group(Int(2), 16, scale="float32")
    plain = fit_range(w, spec).scale
    assert torch.equal(clip(w, spec, x, AWQClip(maxshrink=0.05)).scale, plain)
    ratio = clip(w, spec, x, AWQClip(maxshrink=0.1)).scale / plain
    assert set((ratio * 1000).round().flatten().tolist()) == {950.0, 1000.0}


@pytest.mark.parametrize(("grid", "maxshrink"), [(0, 0.5), (20, 0.0), (20, 1.5), (20, 0.01)])
def test_settings_without_meaning_are_refused(grid: int, maxshrink: float) -> None:
    with pytest.raises(ValueError, match="grid must be at least 1"):
        AWQClip(grid, maxshrink)
    with pytest.raises(ValueError, match="grid must be at least 1, not 0"):
        AWQ(grid=0)
