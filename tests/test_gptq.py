"""GPTQ against a naive oracle: fp64, H⁻¹ by `inv`, its Cholesky factor, one column at a time, no lazy blocks.

Codes must be equal. A weight that sits on a rounding tie may fall either way in fp32, and then the rest of its row
differs too, so the oracle also reports how close each row ever came to a tie: every row that kept away must agree in
every code, and most rows must have kept away. (The default symmetric rule makes ties of its own: a group whose largest
magnitude is negative has it at -7.5 steps exactly.) Inputs are integers, so that both sides start from the same H.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import pytest
import torch
from gptq_oracle import Oracle, fit_ends, least_error
from torch import Tensor

from lowbit.methods.base import Clip
from lowbit.methods.gptq import GPTQ
from lowbit.methods.mse import MSEClip
from lowbit.methods.rtn import RTN, MinMaxClip
from lowbit.methods.views import Stats
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import E2M1, E4M3, Int, Number, Spec, per_block, per_channel, per_group, per_tensor

ROWS, COLUMNS, TOKENS = 24, 160, 400
"""Output rows, input columns (a full block of 128 and a ragged one) and tokens."""
TIE = 2e-6
"""Distance to a rounding tie, as a part of the largest level, that fp32 noise cannot bridge."""

# --- helpers ----------------------------------------------------------------------------------------------------------


def inputs(tokens: int = TOKENS, width: int = COLUMNS) -> Tensor:
    """Correlated integer activations with channels of unequal size."""
    mix = torch.eye(width) + 0.7 * torch.randn(width, width) / width**0.5
    return (6 * torch.randn(tokens, width) @ mix * torch.linspace(0.5, 2, width)[torch.randperm(width)]).round()


def observe(x: Tensor) -> Stats:
    stats = Stats.observing(frozenset({"gram"}))
    stats.update(x)
    return stats


def quantize(method: GPTQ, w: Tensor, spec: Spec, x: Tensor, clip: Clip | None = None) -> QTensor:
    return method.round(w, spec, clip or MinMaxClip(), observe(x), scores=False)


def output_loss(w: Tensor, q: QTensor, x: Tensor) -> float:
    return float((x.double() @ (w.double() - q.dequantize().double()).T).square().sum())


def per_weight(q: QTensor) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of every weight [O, I], natural order, from the group index of every column."""
    count = q.grid.scale.shape[1]
    index = torch.arange(q.shape[1]) // (q.shape[1] // count) if q.group_index is None else q.group_index.long()
    return q.grid.scale[:, index], None if q.grid.zero is None else q.grid.zero[:, index]


def assert_oracle(q: QTensor, oracle: Oracle) -> None:
    """Equal codes, zeros and (to fp32) scales in every row that kept away from ties, which must be most rows."""
    clear = oracle.tie > TIE
    assert clear.double().mean() > 0.5
    scale, zero = per_weight(q)
    assert torch.allclose(scale[clear].double(), oracle.scale[clear], rtol=1e-5, atol=0)
    if zero is not None:
        assert torch.equal(zero[clear].double(), oracle.zero[clear])
    if isinstance(oracle.number, Int):
        codes = oracle.levels if zero is None else oracle.levels + oracle.zero
        assert torch.equal(q.codes[clear].double(), codes[clear])
    values = q.dequantize().double()[clear]
    assert torch.allclose(values, oracle.values[clear], rtol=1e-5, atol=0)


def same(a: QTensor, b: QTensor) -> bool:
    zeros = (a.grid.zero is None and b.grid.zero is None) or (
        a.grid.zero is not None and b.grid.zero is not None and torch.equal(a.grid.zero, b.grid.zero)
    )
    return torch.equal(a.codes, b.codes) and torch.equal(a.grid.scale, b.grid.scale) and zeros


NUMBERS: list[Number] = [
    Int(4),
    Int(2),
    Int(4, "symmetric-unsigned"),
    Int(3, "asymmetric"),
    Int(2, "asymmetric"),
    E4M3,
    E2M1,
]


# --- against the oracle -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_static_groups(number: Number, group: int, act_order: bool) -> None:
    w, x = torch.randn(ROWS, COLUMNS), inputs()
    q = quantize(GPTQ(act_order=act_order), w, per_group(number, group, scale="float32"), x)
    assert q.order is None
    assert_oracle(q, Oracle(w, x.T @ x, number, COLUMNS if group == -1 else group, act_order))


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groups", ["fresh", "stale"])
@pytest.mark.parametrize("number", [Int(4), Int(2, "asymmetric"), E4M3], ids=str)
@pytest.mark.parametrize("group", [32, 40])
def test_groups_fitted_on_the_way(
    number: Number, group: int, groups: Literal["fresh", "stale"], act_order: bool
) -> None:
    """A group of 40 straddles the end of the first block of 128."""
    w, x = torch.randn(ROWS, COLUMNS), inputs()
    q = quantize(GPTQ(act_order=act_order, groups=groups), w, per_group(number, group, scale="float32"), x)
    oracle = Oracle(w, x.T @ x, number, group, act_order, groups)
    assert (q.order is None) != act_order
    if q.order is not None:
        assert torch.equal(q.order, oracle.order)
    assert_oracle(q, oracle)


@pytest.mark.parametrize("groups", ["static", "fresh"])
@pytest.mark.parametrize("number", [Int(4), Int(3, "asymmetric")], ids=str)
def test_scales_searched_wherever_they_are_fitted(number: Number, groups: Literal["static", "fresh"]) -> None:
    w, x = torch.randn(ROWS, 96), inputs(width=96)
    w[:, ::19] *= 3
    method = GPTQ(groups=groups, act_order=False)
    q = quantize(method, w, per_group(number, 48, scale="float32"), x, MSEClip())
    assert not same(q, quantize(method, w, per_group(number, 48, scale="float32"), x))
    assert_oracle(q, Oracle(w, x.T @ x, number, 48, False, groups, least_error(number)))


def test_scales_are_stored_before_they_are_used() -> None:
    """With bf16-exact scales the codes are those of the rounded scale, not the exact one."""
    w, x = torch.randn(ROWS, COLUMNS), inputs()

    def stored(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero, tie = fit_ends(values.amin(1), values.amax(1), Int(4))
        return scale.float().bfloat16().double(), zero, tie

    q = quantize(GPTQ(), w, per_group(Int(4), 32), x)
    assert_oracle(q, Oracle(w, x.T @ x, Int(4), 32, True, fit=stored))
    assert not torch.equal(q.codes, quantize(GPTQ(), w, per_group(Int(4), 32, scale="float32"), x).codes)


@pytest.mark.parametrize("spec", [per_tensor(Int(4), scale="float32"), per_block(E4M3, 50)], ids=str)
def test_units_of_several_rows(spec: Spec) -> None:
    """One scale for all, and squares that stick out below and on the right."""
    w, x = torch.randn(ROWS, 120), inputs(width=120)
    q = quantize(GPTQ(), w, spec, x)
    edge = 120 if spec.block[0] == -1 else 50

    def fit(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        assert len(values) <= 50
        scale, zero, tie = fit_ends(values.min()[None], values.max()[None], spec.number)
        return tuple(part.expand(ROWS) for part in (scale, zero, tie))  # type: ignore[return-value]

    oracle = Oracle(w, x.T @ x, spec.number, edge, True, fit=fit)
    clear = oracle.tie > TIE
    assert clear.double().mean() > 0.5
    assert torch.allclose(q.dequantize()[clear].double(), oracle.values[clear], rtol=1e-5, atol=0)


@pytest.mark.parametrize("damp", [0.001, 0.1])
def test_damping(damp: float) -> None:
    w, x = torch.randn(ROWS, COLUMNS), inputs()
    q = quantize(GPTQ(damp=damp), w, per_channel(Int(3), scale="float32"), x)
    assert_oracle(q, Oracle(w, x.T @ x, Int(3), COLUMNS, True, damp=damp))
    assert not torch.equal(q.codes, quantize(GPTQ(), w, per_channel(Int(3), scale="float32"), x).codes)


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_uncorrelated_inputs_are_plain_rounding(
    number: Number, group: int, groups: Literal["static", "fresh", "stale"], act_order: bool
) -> None:
    """H = c I leaves nothing to repair, and equal columns keep their order."""
    w, spec = torch.randn(ROWS, COLUMNS), per_group(number, group)
    q = quantize(GPTQ(groups=groups, act_order=act_order), w, spec, 3 * torch.eye(COLUMNS))
    assert same(q, RTN().round(w, spec, MinMaxClip(), None, scores=False))


@pytest.mark.parametrize("groups", ["static", "fresh"])
@pytest.mark.parametrize("group", [-1, 48])
def test_the_size_of_a_block_does_not_matter(group: int, groups: Literal["static", "fresh"]) -> None:
    w, x, spec = torch.randn(ROWS, 192), inputs(width=192), per_group(Int(3), group, scale="float32")
    oracle = Oracle(w, x.T @ x, Int(3), 192 if group == -1 else group, True, groups if group > 0 else "static")
    for block in (7, 32, 128, 256):
        assert_oracle(quantize(GPTQ(groups=groups, block=block), w, spec, x), oracle)


def test_stale_and_fresh_differ_only_inside_a_block() -> None:
    w, x = torch.randn(ROWS, 128), inputs(width=128)
    small = [quantize(GPTQ(groups=g), w, per_group(Int(2), 32), x) for g in ("fresh", "stale")]
    whole = [quantize(GPTQ(groups=g, block=32), w, per_group(Int(2), 32), x) for g in ("fresh", "stale")]
    assert not torch.equal(small[0].grid.scale, small[1].grid.scale)
    assert same(whole[0], whole[1]) and same(whole[0], small[0])


@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
def test_the_size_of_the_inputs_does_not_matter(groups: Literal["static", "fresh", "stale"]) -> None:
    w, x, spec = torch.randn(ROWS, COLUMNS), inputs(), per_group(Int(3, "asymmetric"), 32, scale="float32")
    x[:, 7] = 0.0
    method = GPTQ(groups=groups)
    assert same(quantize(method, w, spec, x), quantize(method, w, spec, 64 * x))
    assert_oracle(quantize(method, w, spec, 3 * x), Oracle(w, x.T @ x, Int(3, "asymmetric"), 32, True, groups))


def test_batches_of_inputs_do_not_matter() -> None:
    w, x, spec = torch.randn(ROWS, COLUMNS), inputs(), per_group(Int(3), 32)
    stats = Stats.observing(frozenset({"gram"}))
    for part in x.split([1, 99, 200, 100]):
        stats.update(part)
    assert same(GPTQ().round(w, spec, MinMaxClip(), stats, scores=False), quantize(GPTQ(), w, spec, x))


def test_rows_do_not_matter_to_each_other() -> None:
    """Linears behind one input may be rounded as one batch."""
    w, x, spec = torch.randn(ROWS, COLUMNS), inputs(), per_group(Int(3, "asymmetric"), 32, scale="float32")
    oracle = Oracle(w[:9], x.T @ x, Int(3, "asymmetric"), 32, True)
    assert_oracle(quantize(GPTQ(), w[:9], spec, x), oracle)
    batch = quantize(GPTQ(), w, spec, x)
    clear = oracle.tie > TIE
    assert torch.equal(batch.codes[:9][clear].double(), (oracle.levels + oracle.zero)[clear])


def test_the_order_of_the_columns_does_not_matter_to_act_order() -> None:
    """Shuffled inputs give shuffled codes, so results come back in natural order."""
    w, x, spec = torch.randn(ROWS, COLUMNS), inputs(), per_channel(Int(4))
    assert len((x.T @ x).diagonal().unique()) == COLUMNS  # equal columns would keep the order they came in
    shuffle = torch.randperm(COLUMNS)
    q = quantize(GPTQ(), w, spec, x)
    assert torch.equal(quantize(GPTQ(), w[:, shuffle], spec, x[:, shuffle]).codes, q.codes[:, shuffle])
    assert not torch.equal(q.codes, quantize(GPTQ(act_order=False), w, spec, x).codes)


@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
def test_one_group_of_the_whole_row_is_per_channel(groups: Literal["static", "fresh", "stale"]) -> None:
    w, x = torch.randn(ROWS, COLUMNS), inputs()
    truth = quantize(GPTQ(), w, per_channel(Int(4)), x)
    for size in (-1, COLUMNS, 2 * COLUMNS):
        q = quantize(GPTQ(groups=groups), w, per_group(Int(4), size), x)
        assert q.order is None and same(q, truth)


# --- edges ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_dead_columns_are_zero(number: Number, groups: Literal["static", "fresh", "stale"]) -> None:
    """What stood in them changes nothing, least of all the scales."""
    w, x, dead = torch.randn(ROWS, COLUMNS), inputs(), [0, 33, 34, COLUMNS - 1]
    x[:, dead] = 0.0
    w[:, dead] = 0.5
    spec, method = per_group(number, 32), GPTQ(groups=groups)
    q = quantize(method, w, spec, x)
    _, zero = per_weight(q)
    assert not q.dequantize()[:, dead].any()
    assert torch.equal(q.codes[:, dead].float(), torch.zeros(ROWS, len(dead)) if zero is None else zero[:, dead])
    w[:, dead] = 100.0
    assert same(quantize(method, w, spec, x), q)
    if groups == "fresh" and number in (Int(4), E4M3):
        plain = per_group(number, 32, scale="float32")
        assert_oracle(quantize(method, w, plain, x), Oracle(w, x.T @ x, number, 32, True, "fresh"))


@pytest.mark.parametrize("clip", [MinMaxClip(), MSEClip()])
@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
def test_inputs_never_seen_are_plain_rounding(groups: Literal["static", "fresh", "stale"], clip: Clip) -> None:
    w, spec = torch.randn(ROWS, COLUMNS), per_group(Int(4), 32)
    q = GPTQ(groups=groups).round(w, spec, clip, None, scores=False)
    assert same(q, RTN().round(w, spec, clip, None, scores=False))


@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("kind", ["few tokens", "one token", "one direction"])
def test_inputs_that_span_little(kind: str, groups: Literal["static", "fresh", "stale"], act_order: bool) -> None:
    """Rank-deficient and nearly singular Gram matrices give finite results, better than plain rounding."""
    x = inputs({"few tokens": 20, "one token": 1, "one direction": TOKENS}[kind])
    if kind == "one direction":
        x = 1e4 * x[:, :1] @ torch.randn(1, COLUMNS) + 1e-3 * x
    w, spec = torch.randn(ROWS, COLUMNS), per_group(Int(3), 32)
    q = quantize(GPTQ(act_order=act_order, groups=groups), w, spec, x)
    assert q.dequantize().isfinite().all() and q.grid.scale.isfinite().all()
    plain = RTN().round(w, spec, MinMaxClip(), None, scores=False)
    assert output_loss(w, q, x) < 0.2 * output_loss(w, plain, x)


@pytest.mark.parametrize("kind", ["few tokens", "one direction"])
def test_hardly_any_damping(kind: str) -> None:
    """A damping below the noise of H leaves a matrix that fp32 cannot factorize."""
    x = inputs(20) if kind == "few tokens" else torch.randn(TOKENS, 1).round() @ torch.ones(1, COLUMNS)
    q = quantize(GPTQ(damp=1e-9), torch.randn(ROWS, COLUMNS), per_group(Int(3), 32), x)
    assert q.dequantize().isfinite().all()


@pytest.mark.parametrize("settings", [{"damp": 0.0}, {"damp": -1.0}, {"block": 0}])
def test_settings_without_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="damp must be positive and block at least 1"):
        GPTQ(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_not_finite_are_refused(bad: float) -> None:
    x = inputs()
    x[3, 5] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(GPTQ(), torch.randn(ROWS, COLUMNS), per_channel(Int(4)), x)


@pytest.mark.parametrize(("bits", "part"), [(4, 0.15), (3, 0.15), (2, 0.4)])
def test_correlated_inputs_several_fold_better_than_plain_rounding(bits: int, part: float) -> None:
    w, x = (
        torch.randn(64, COLUMNS),
        torch.randn(TOKENS, 24) @ torch.randn(24, COLUMNS) + 0.3 * torch.randn(TOKENS, COLUMNS),
    )
    for group in (-1, 32):
        spec = per_group(Int(bits), group)
        plain = output_loss(w, RTN().round(w, spec, MinMaxClip(), None, scores=False), x)
        for groups in ("static", "fresh", "stale"):
            assert output_loss(w, quantize(GPTQ(groups=groups), w, spec, x), x) < part * plain


# --- the seams --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recorder(MinMaxClip):
    """A clip that notes what it was given."""

    calls: list[tuple[tuple[int, ...], bool, bool]] = field(default_factory=list)

    def fit(self, weight: Tensor, spec: Spec, stats: Stats | None, *, scores: bool) -> Grid:
        self.calls.append((tuple(weight.shape), stats is not None, scores))
        return super().fit(weight, spec, stats, scores=scores)


def test_the_clip_gets_the_whole_weight_and_its_statistics() -> None:
    clip, x = Recorder(), inputs()
    GPTQ().round(torch.randn(ROWS, COLUMNS), per_group(Int(4), 32), clip, observe(x), scores=True)
    assert clip.calls == [((ROWS, COLUMNS), True, True)]


def test_a_clip_is_asked_once_for_every_group_fitted_on_the_way() -> None:
    clip, x = Recorder(), inputs()
    GPTQ(groups="fresh").round(torch.randn(ROWS, COLUMNS), per_group(Int(4), 32), clip, observe(x), scores=False)
    assert [shape for shape, _, _ in clip.calls] == [(ROWS, 32)] * 5


@pytest.mark.parametrize("groups", ["fresh", "stale"])
def test_a_clip_sees_the_statistics_of_the_moving_group_alone(groups: Literal["fresh", "stale"]) -> None:
    seen: list[torch.Tensor] = []

    class Watching(MinMaxClip):
        def fit(self, weight, spec, stats, *, scores):
            seen.append(stats.hessian())
            return super().fit(weight, spec, stats, scores=scores)

    x = inputs()
    stats = observe(x)
    method = GPTQ(groups=groups)
    method.round(torch.randn(ROWS, COLUMNS), per_group(Int(4), 32), Watching(), stats, scores=False)
    _, order, _ = stats.factor(method.damp, True)
    for h, columns in zip(seen, order.split(32), strict=True):
        part = x[:, columns].double()
        assert torch.allclose(h.double(), part.T @ part, rtol=1e-5, atol=1e-4)


def test_the_factor_is_shared_until_more_is_seen() -> None:
    x = inputs()
    stats = observe(x)
    first = stats.factor(0.01, True)
    assert stats.factor(0.01, True)[0] is first[0] and stats.factor(0.01, False)[0] is not first[0]
    stats.update(2 * x)
    assert torch.allclose(stats.factor(0.01, True)[0], first[0] / 5**0.5, rtol=1e-4, atol=1e-7)
    stats.transport(torch.full((COLUMNS,), 0.5))
    assert torch.allclose(stats.factor(0.01, True)[0], first[0] / 20**0.5, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("groups", ["static", "fresh"])
def test_the_weight_itself_is_left_alone(groups: Literal["static", "fresh"]) -> None:
    w, x = torch.randn(COLUMNS, ROWS).T, inputs()
    x[:, 3] = 0.0
    before = w.clone()
    quantize(GPTQ(groups=groups), w, per_group(Int(4), 32), x)
    quantize(GPTQ(groups=groups), w[:1], per_group(Int(4), 32), x)
    assert torch.equal(w, before)


def test_codes_of_one_group_lie_side_by_side_in_the_order() -> None:
    """What a file's g_idx says is what dequantization does: ŵ = s[g_idx] (q - z[g_idx])."""
    w, x = torch.randn(ROWS, COLUMNS), inputs()
    q = quantize(GPTQ(groups="fresh"), w, per_group(Int(4, "asymmetric"), 32), x)
    assert q.order is not None and q.group_index is not None and q.grid.zero is not None
    assert torch.equal(q.group_index[q.order], torch.arange(COLUMNS, dtype=torch.int32) // 32)
    scale, zero = q.grid.scale[:, q.group_index.long()], q.grid.zero[:, q.group_index.long()]
    assert torch.equal(q.dequantize(), (q.codes.float() - zero) * scale)
    diagonal = (x.T @ x).diagonal()[q.order]
    assert torch.equal(diagonal, diagonal.sort(descending=True).values)


def test_only_true_sequential_observes_again() -> None:
    assert GPTQ().sequential and not GPTQ(true_sequential=False).sequential


def test_the_oracle_itself_knows_the_grids() -> None:
    """The oracle's formulas and the package's grids are written twice; they must mean the same."""
    w = torch.randn(ROWS, 16)
    for number in NUMBERS:
        scale, zero, _ = fit_ends(w.double().amin(1), w.double().amax(1), number)
        grid = fit_range(w, per_channel(number, scale="float32"))
        assert torch.allclose(grid.scale[:, 0].double(), scale, rtol=1e-6, atol=0)
        assert torch.equal(zero, torch.zeros_like(zero) if grid.zero is None else grid.zero[:, 0].double())
