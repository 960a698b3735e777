"""The MSE clip against a naive search in fp64, unit by unit, and against no clip at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.methods.mse import MSEClip
from lowbit.numerics.grid import Grid, fit_range, to_units
from lowbit.numerics.spec import E2M1, E4M3, Int, Number, Spec, per_block, per_channel, per_group, per_tensor

NUMBERS: list[Number] = [Int(8), Int(4), Int(3), Int(2), Int(4, "symmetric-unsigned"), Int(3, "asymmetric"),
                         Int(2, "asymmetric"), E4M3, E2M1]  # fmt: skip


def weight() -> Tensor:
    """Rows from well-behaved to heavy-tailed."""
    w = torch.randn(24, 64)
    w[8:16] = w[8:16] ** 3
    w[16:, ::21] *= 8
    return w


def search(w: Tensor, spec: Spec, method: MSEClip | None = None) -> Grid:
    return (method or MSEClip()).fit(w, spec, None, scores=False)


def unit_errors(w: Tensor, grid: Grid, norm: float) -> Tensor:
    """Σ|ŵ - w|^norm of every unit, fp64, from the codes that would be stored."""
    difference = grid.decode(grid.encode(w)).double() - w.double()
    return to_units(difference, grid.spec.block).abs().pow(norm).sum((-3, -1))


SPECS: list[Spec] = [
    *(per_channel(number) for number in NUMBERS),
    *(per_group(number, 16) for number in NUMBERS),
    *(per_tensor(number) for number in NUMBERS),
    *(per_block(number, 10) for number in (Int(4), Int(2), E4M3)),
]


@pytest.mark.parametrize("norm", [2.4, 2.0])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_unit_is_worse_than_unclipped(spec: Spec, norm: float) -> None:
    w = weight()
    searched, plain = search(w, spec, MSEClip(norm=norm)), fit_range(w, spec)
    ours, theirs = unit_errors(w, searched, norm), unit_errors(w, plain, norm)
    assert (ours <= theirs * (1 + 1e-5)).all()
    assert (ours < theirs)[searched.scale != plain.scale].all()
    if isinstance(spec.number, Int) and spec.bits <= 4 and len(ours) > 1:
        assert float((ours < 0.95 * theirs).double().mean()) > 0.15, "the search finds next to nothing"


def naive(values: list[float], number: Int) -> tuple[float, float, float]:
    """(scale, zero, how clear the choice was) of one unit: Σ|ŵ - w|^2.4 over 1, 0.99, … 0.21 times the range."""
    tried = []
    for i in range(80):
        low, high = min(values) * (1 - i / 100), max(values) * (1 - i / 100)
        if number.symmetric:
            scale, zero = 2 * max(-low, high) / (2**number.bits - 1), 0
        else:
            low, high = min(low, 0.0), max(high, 0.0)
            scale = (high - low) / (2**number.bits - 1)
            zero = round(-low / scale)
        loss = 0.0
        for w in values:
            level = min(max(round(w / scale), number.low - zero), number.high - zero)
            loss += abs(level * scale - w) ** 2.4
        tried.append((loss, i, scale, zero))
    best, second = sorted(tried)[:2]
    return best[2], best[3], second[0] / best[0] - 1


@pytest.mark.parametrize("number", [Int(4), Int(2), Int(3, "asymmetric")], ids=str)
def test_the_search_is_the_references(number: Int) -> None:
    w = weight()[::2].abs() - 0.4  # the default symmetric rule puts -amax on a tie, where fp32 and fp64 may part
    grid = search(w, per_group(number, 16, scale="float32"))
    sure = 0
    for row in range(len(w)):
        for g in range(4):
            scale, zero, clear = naive(w[row, 16 * g : 16 * g + 16].double().tolist(), number)
            if clear > 1e-4:
                sure += 1
                assert float(grid.scale[row, g]) == pytest.approx(scale, rel=1e-5)
                assert grid.zero is None or float(grid.zero[row, g]) == zero
    assert sure > 42


def test_an_outlier_is_given_up_where_that_pays() -> None:
    """One weight of 3 among 15 of ±1: two bits spend their levels on the many, eight bits keep the whole range."""
    row = torch.tensor([[3.0] + [1.0, -1.0] * 7 + [1.0]])
    for bits, least, most in ((2, 0.2, 0.7), (8, 0.95, 1.0)):
        spec = per_channel(Int(bits), scale="float32")
        assert least < float(search(row, spec).scale / fit_range(row, spec).scale) <= most


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_units_that_are_exact_already_keep_their_range(number: Number) -> None:
    """The first of equal errors wins, and that is the whole range; a unit of zeros stays zeros."""
    w = torch.zeros(3, 32)
    grid = search(w, per_group(number, 16))
    assert torch.equal(grid.scale, torch.ones(3, 2)) and not grid.decode(grid.encode(w)).any()


def test_how_far_a_range_may_shrink() -> None:
    """Every choice is one of 1, 1 - 1/grid, …, and above 1 - maxshrink."""
    w, spec = weight(), per_group(Int(2), 16, scale="float32")
    plain = fit_range(w, spec).scale
    coarse = search(w, spec, MSEClip(grid=10, maxshrink=0.4)).scale / plain
    assert set((coarse * 1000).round().flatten().tolist()) == {1000.0, 900.0, 800.0, 700.0}
    fine = 100 * search(w, spec).scale / plain
    assert float((fine - fine.round()).abs().max()) < 1e-3 and 20.5 < float(fine.min()) < 70


def test_inputs_do_not_matter() -> None:
    w, spec = weight(), per_group(Int(3), 16)
    assert torch.equal(MSEClip().fit(w, spec, None, scores=True).scale, search(w, spec).scale)


@pytest.mark.parametrize(
    "settings", [{"grid": 0}, {"norm": 0.0}, {"maxshrink": 0.0}, {"maxshrink": 1.1}, {"maxshrink": 0.001}]
)
def test_settings_without_meaning_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="norm must be positive"):
        MSEClip(**settings)  # type: ignore[arg-type]
