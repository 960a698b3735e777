"""Attention of one token by a kernel against its formula, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from attention_oracle import by_formula

from lowbit.kernels import attention

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
"""The interpreter takes the bits of bf16 operands for integers."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1, 50, 64), (2, 6, 2, 130, 64), (1, 8, 8, 64, 128)], ids=str)
@pytest.mark.parametrize("masked", [None, "shared", "each"], ids=str)
def test_one_token_attends(masked: str | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Lengths that fill no part, parts without a position, one and several texts; twice, for what is left behind."""
    from lowbit.kernels.attention_triton import attend

    texts, heads, shared, length, width = shape
    query = torch.randn(texts, heads, 1, width, device=DEVICE).to(dtype)
    keys, values = (torch.randn(texts, shared, length, width, device=DEVICE).to(dtype) for _ in range(2))
    mask = None
    if masked is not None:
        ends = torch.tensor([length // 3, length - 2])[: texts if masked == "each" else 1]
        mask = (torch.arange(length) <= ends[:, None])[:, None, None, :].to(DEVICE)
    for _ in range(2):
        found = attend(query, keys, values, mask, width**-0.5)
        expected = by_formula(query, keys, values, mask, width**-0.5)
        assert ((found.double() - expected).abs() <= 4 * torch.finfo(dtype).eps).all()
    if DEVICE == "cpu":
        assert not attention.fits(query, keys, values, mask)
        plain = attention.attend(query.float(), keys.float(), values.float(), mask, width**-0.5)
        torch.testing.assert_close(plain.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs CUDA")
def test_many_parts_meet_every_time() -> None:
    """The last program of a head combines what all others wrote: the same bits, a hundred times."""
    query = torch.randn(2, 32, 1, 128, device=DEVICE).bfloat16()
    keys, values = (torch.randn(2, 8, 4099, 128, device=DEVICE).bfloat16() for _ in range(2))
    mask = (torch.arange(4099, device=DEVICE) < 4000)[None, None, None]
    first = attention.attend(query, keys, values, mask, 0.1)
    expected = by_formula(query, keys, values, mask, 0.1)
    assert ((first.double() - expected).abs() <= 2**-8 * expected.abs() + 2**-10).all()
    for _ in range(100):
        assert torch.equal(attention.attend(query, keys, values, mask, 0.1), first)
