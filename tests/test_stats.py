"""Streamed statistics against the same thing computed at once in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.numerics.stats import AbsMean, Gram, MinMax

WIDTHS = [7, 512, 1100]
"""Below, at and above the tile: the last has a ragged third tile."""


def within_fp32(h: Tensor, x: Tensor, steps: int = 0) -> bool:
    """Whether h is XᵀX up to what fp32 sums of that many terms, and `steps` more roundings, may lose."""
    x = x.double()
    bound = (len(x) + 4 + steps) * 2.0**-24 * (x.abs().T @ x.abs())
    return bool(((h.double() - x.T @ x).abs() <= bound).all())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gram_is_the_matrix_of_all_batches(width: int, dtype: torch.dtype) -> None:
    batches = [torch.randn(t, width).to(dtype) for t in (3, 40, 1, 20)]
    gram = Gram()
    for batch in batches:
        gram.update(batch)
    h = gram.matrix
    assert gram.count == 64 and h.dtype == torch.float32
    assert torch.equal(h, h.T)
    assert within_fp32(h, torch.cat(batches))


def test_reading_a_gram_changes_nothing() -> None:
    read, unread = Gram(), Gram()
    for part in torch.randn(6, 5, 1100):
        read.update(part)
        unread.update(part)
        assert torch.equal(read.matrix, read.matrix.T)
    assert torch.equal(read.matrix, unread.matrix)


@pytest.mark.parametrize("width", WIDTHS)
def test_gram_follows_a_fold(width: int) -> None:
    """Dividing the inputs afterwards equals observing divided inputs, and both go on with divided ones."""
    x, scale = torch.randn(30, width), torch.rand(width) + 0.1
    gram = Gram()
    gram.update(x)
    gram.transport(scale)
    divided = x.double() / scale
    assert within_fp32(gram.matrix, divided, steps=2)
    assert torch.equal(gram.matrix, gram.matrix.T)
    gram.update(x / scale)
    assert within_fp32(gram.matrix, torch.cat([divided, divided]), steps=4)


def test_gram_follows_powers_of_two_exactly() -> None:
    x, scale = torch.randn(30, 24), torch.exp2(torch.randint(-4, 4, (24,)).float())
    moved, seen = Gram(), Gram()
    moved.update(x)
    moved.transport(scale)
    seen.update(x / scale)
    assert torch.equal(moved.matrix, seen.matrix)


def test_abs_mean() -> None:
    batches = [torch.randn(t, 9) for t in (3, 40, 1)]
    stat, scale = AbsMean(), torch.linspace(-3, 2, 9)
    for batch in batches:
        stat.update(batch)
    x = torch.cat(batches).double()
    assert torch.allclose(stat.mean.double(), x.abs().mean(0), rtol=1e-6, atol=0)
    stat.transport(scale)
    assert torch.allclose(stat.mean.double(), (x / scale).abs().mean(0), rtol=1e-6, atol=0)


def test_abs_mean_of_bf16_does_not_stall() -> None:
    stat = AbsMean()
    for _ in range(3):
        stat.update(-torch.ones(1003, 2, dtype=torch.bfloat16))  # bf16 holds 1000 and 1004
    assert stat.mean.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_min_max(dtype: torch.dtype) -> None:
    batches = [torch.randn(t, 9).to(dtype) for t in (3, 40, 1)]
    stat, scale = MinMax(), torch.rand(9) + 0.1
    for batch in batches:
        stat.update(batch)
    x = torch.cat(batches).float()
    assert stat.low is not None and stat.high is not None
    assert torch.equal(stat.low, x.amin(0)) and torch.equal(stat.high, x.amax(0))
    assert torch.equal(stat.amax, x.abs().amax(0))
    stat.transport(scale)
    assert torch.equal(stat.low, (x / scale).amin(0)) and torch.equal(stat.high, (x / scale).amax(0))


@pytest.mark.parametrize("kind", [AbsMean, MinMax])
@pytest.mark.parametrize("sizes", [(5, 8), (0, 8), (5, 0)])
def test_merging_equals_seeing_everything(kind: type[AbsMean] | type[MinMax], sizes: tuple[int, int]) -> None:
    parts, both = [kind(), kind()], kind()
    for part, size in zip(parts, sizes, strict=True):
        x = torch.randn(size, 6)
        if size:
            part.update(x)
            both.update(x)
    first, second = parts
    first.merge(second)  # type: ignore[arg-type]
    result = first.mean if isinstance(first, AbsMean) else first.amax
    expected = both.mean if isinstance(both, AbsMean) else both.amax
    assert torch.equal(result, expected)
    kept = result.clone()
    second.update(100 * torch.ones(3, 6))
    assert torch.equal(first.mean if isinstance(first, AbsMean) else first.amax, kept)


def test_nothing_seen_is_our_own_mistake() -> None:
    for read in (lambda: Gram().matrix, lambda: AbsMean().mean, lambda: MinMax().amax):
        with pytest.raises(AssertionError, match="no inputs were observed"):
            read()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gram_of_half_inputs_is_exact_to_fp32(dtype: torch.dtype) -> None:
    """Products of 8-bit significands are exact in fp32, whatever units multiply them; only the sums round."""
    x = torch.randn(3000, 700, dtype=dtype)
    gram = Gram()
    for part in x.split(1000):
        gram.update(part)
    truth = x.double().T @ x.double()
    scale = (x.double().square().sum(0)[:, None] * x.double().square().sum(0)).sqrt()
    assert float(((gram.matrix.double() - truth).abs() / scale).max()) < 2e-6
    assert torch.backends.mkldnn.matmul.fp32_precision != "bf16" if hasattr(torch.backends.mkldnn, "matmul") else True
