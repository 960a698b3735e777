"""The inverse factor and the column sweep against the textbook, in fp64 and one column at a time.

The sweep does not care for the dtype, so it is compared in fp64, where no rounding tie is near enough to matter and
codes must be equal. Its oracle is the formula behind GPTQ, not GPTQ's algorithm: after each column the inverse Hessian
of the columns that remain is computed anew.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics.feedback import inverse_factor, sweep


def gram(tokens: int, width: int) -> Tensor:
    """H of correlated integer inputs, so that its fp32 entries are exact."""
    x = (3 * torch.randn(tokens, width) @ (torch.eye(width) + torch.randn(width, width) / width**0.5)).round()
    return x.T @ x


def textbook(h: Tensor, damping: float) -> Tensor:
    """H + λI -> H⁻¹ -> its upper Cholesky factor, fp64."""
    h = h.double() + damping * torch.eye(len(h), dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True)


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).abs().max() / truth.abs().max())


# --- inverse factor ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 7, 96, 200])
@pytest.mark.parametrize("damp", [0.01, 1.0])
def test_inverse_factor_is_the_textbooks(width: int, damp: float) -> None:
    h = gram(4 * width, width)
    before = h.clone()
    u = inverse_factor(h, damp)
    damping = damp * float(h.double().diagonal().mean())
    assert u.dtype == torch.float32 and torch.equal(u, u.triu())
    assert relative(u, textbook(h, damping)) < 2e-5
    product = u.double().T @ u.double() @ (h.double() + damping * torch.eye(width, dtype=torch.float64))
    assert float((product - torch.eye(width, dtype=torch.float64)).abs().max()) < 2e-4
    assert torch.equal(h, before)


def test_fewer_tokens_than_columns() -> None:
    h = gram(5, 60)
    assert relative(inverse_factor(h, 0.01), textbook(h, 0.01 * float(h.diagonal().double().mean()))) < 1e-4


def test_dead_columns_stand_alone() -> None:
    """A column that was never excited takes no correction and gives none; the others are as if it were not there."""
    h = gram(100, 12)
    dead = torch.zeros(12, dtype=torch.bool)
    dead[[0, 5, 11]] = True
    h[dead], h[:, dead] = 0.0, 0.0
    u = inverse_factor(h, 0.01)
    assert torch.equal(u[dead], torch.eye(12)[dead]) and torch.equal(u[:, dead], torch.eye(12)[:, dead])
    alive = textbook(h[~dead][:, ~dead], 0.01 * float(h.double().diagonal().mean()))
    assert relative(u[~dead][:, ~dead], alive) < 1e-5


def test_nothing_was_ever_seen() -> None:
    assert torch.equal(inverse_factor(torch.zeros(4, 4), 0.01), torch.eye(4))


def test_scaled_inputs_scale_the_factor() -> None:
    h = gram(100, 40)
    assert torch.equal(inverse_factor(1024 * h, 0.01) * 32, inverse_factor(h, 0.01))


@pytest.mark.parametrize("damp", [0.0001, 0.001, 0.01])
def test_damping_grows_until_the_factorization_succeeds(damp: float) -> None:
    """Eigenvalues 2.05 and -0.05: only a tenth of the mean diagonal makes them positive."""
    h = torch.tensor([[1.0, 1.05], [1.05, 1.0]])
    assert relative(inverse_factor(h, damp), textbook(h, 0.1)) < 1e-5
    with pytest.raises(ValueError, match="even with heavy damping"):
        inverse_factor(torch.tensor([[1.0, 11.5], [11.5, 1.0]]), damp)


def test_fp64_comes_before_more_damping() -> None:
    """Pairs of columns with integer entries and determinant 1: exact in fp32, singular to it, and harmless in fp64."""
    pairs = []
    for k in range(11, 41):
        m = torch.tensor([[1.0, k], [k + 7.0, k * (k + 7.0) + 1.0]])
        pairs.append(m @ m.T)
    h = torch.block_diag(*pairs)
    assert h.max() < 2**24 and torch.linalg.cholesky_ex(h.flip(0, 1))[1] > 0
    assert relative(inverse_factor(h, 0.0), textbook(h, 0.0)) < 1e-4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (9, 9), (3, 7)])
def test_inputs_that_are_not_finite_are_refused(bad: float, place: tuple[int, int]) -> None:
    h = gram(40, 10)
    h[place] = h[place[::-1]] = bad
    with pytest.raises(ValueError, match="not finite: look for NaN"):
        inverse_factor(h, 0.01)


# --- sweep ------------------------------------------------------------------------------------------------------------


def to_quarters(values: Tensor) -> Tensor:
    return (values * 4).round().clamp(-6, 5) / 4


def eliminate(weight: Tensor, h: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Optimal repair by the formula: δ = -(w_i - ŵ_i) [H_F⁻¹]_i / [H_F⁻¹]_ii over the columns F not yet rounded.

    Returns the rounded weight, and the weight as it was before each column.
    """
    working, before = weight.clone(), []
    for i in range(weight.shape[1]):
        before.append(working.clone())
        inverse = torch.linalg.inv(h[i:, i:])
        rounded = to_quarters(working[:, i])
        error = (working[:, i] - rounded) / inverse[0, 0]
        for j in range(i + 1, weight.shape[1]):
            working[:, j] -= error * inverse[0, j - i]
        working[:, i] = rounded
    return working, before


class Case:
    """W [11, 70] with its H in fp64, and what elimination makes of them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.h = gram(300, 70).double()
        self.weight = torch.randn(11, 70, dtype=torch.float64)
        self.factor = textbook(self.h, 0.0)
        self.rounded, self.before = eliminate(self.weight, self.h)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case()


@pytest.mark.parametrize("block", [1, 5, 32, 33, 64, 70, 128])
def test_sweep_is_elimination(case: Case, block: int) -> None:
    result = sweep(case.weight, case.factor, lambda _, values: to_quarters(values), block=block)
    assert torch.equal(result, case.rounded)
    assert not torch.equal(result, to_quarters(case.weight))


@pytest.mark.parametrize("block", [16, 40, 128])
def test_columns_come_once_and_in_order(case: Case, block: int) -> None:
    seen: list[int] = []

    def look(column: int, values: Tensor) -> Tensor:
        seen.append(column)
        assert torch.allclose(values, case.before[column][:, column], rtol=0, atol=1e-12)
        return to_quarters(values)

    sweep(case.weight, case.factor, look, block=block)
    assert seen == list(range(70))


@pytest.mark.parametrize("block", [16, 40, 128])
def test_a_block_opens_with_every_earlier_error_in_it(case: Case, block: int) -> None:
    opened: list[int] = []

    def look(start: int, remaining: Tensor) -> None:
        opened.append(start)
        assert torch.allclose(remaining.T, case.before[start][:, start:], rtol=0, atol=1e-12)

    sweep(case.weight, case.factor, lambda _, values: to_quarters(values), block=block, open_block=look)
    assert opened == list(range(0, 70, block))


def test_the_error_of_the_output_is_the_errors_of_the_columns(case: Case) -> None:
    """Σ ((w_i - ŵ_i)/U_ii)² over corrected w_i is exactly (W - Ŵ) H (W - Ŵ)ᵀ, GPTQ's loss."""
    steps = torch.zeros_like(case.weight)

    def look(column: int, values: Tensor) -> Tensor:
        steps[:, column] = (values - to_quarters(values)) / case.factor[column, column]
        return to_quarters(values)

    difference = case.weight - sweep(case.weight, case.factor, look)
    loss = ((difference @ case.h) * difference).sum(1)
    assert torch.allclose(steps.square().sum(1), loss, rtol=1e-9)


def test_exact_columns_correct_nothing(case: Case) -> None:
    assert torch.equal(sweep(case.weight, case.factor, lambda _, values: values.clone()), case.weight)


@pytest.mark.parametrize("shape", [(1, 70), (11, 70)])
def test_the_weight_itself_is_left_alone(case: Case, shape: tuple[int, int]) -> None:
    """Neither one row nor a transposed view, both column-major already, may be worked on in place."""
    for weight in (case.weight[: shape[0]].clone(), case.weight[: shape[0]].T.contiguous().T):
        before = weight.clone()
        result = sweep(weight, case.factor, lambda _, values: to_quarters(values))
        assert torch.equal(weight, before)
        assert torch.equal(result, case.rounded[: shape[0]])
