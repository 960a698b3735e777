"""Attention of one token by kernels against its formula, in Triton's interpreter where there is no GPU.

There the CUDA C++ is run by `test_cache_attention_cuda.py`.
"""

from __future__ import annotations

import pytest
import torch
from attention_oracle import by_formula
from torch import Tensor

from lowbit.kernels import attention
from lowbit.kernels.compile import available

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if GPU else [torch.float16]
"""The interpreter takes the bits of bf16 operands for integers."""
KERNELS = ["triton", *(["cuda"] if GPU and available(torch.cuda.current_device()) else [])]
GPU_SHAPES = [(2, 6, 2, 64), (1, 7, 1, 128), (2, 12, 1, 128), (1, 32, 8, 128), (3, 16, 2, 256)]
"""Texts, heads, heads of keys, width."""


def attend(kernel: str, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """A kernel, wherever it runs."""
    from lowbit.kernels import attention_triton, cache_attention_cuda

    fused = attention_triton.attend if kernel == "triton" else cache_attention_cuda.attend_plain
    return fused(query, keys, values, mask, scale)


@pytest.fixture
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody wrote is NaN."""
    empty, like = torch.empty, torch.empty_like
    nan = float("nan")
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(nan))
    monkeypatch.setattr(torch, "empty_like", lambda x: like(x).fill_(nan))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 4, 1, 50, 64), (2, 6, 2, 130, 64), (1, 8, 8, 64, 128)], ids=str)
@pytest.mark.parametrize("masked", [None, "shared", "each"], ids=str)
def test_one_token_attends(masked: str | None, shape: tuple[int, ...], dtype: torch.dtype, kernel: str) -> None:
    """Lengths that fill no part, parts without a position, one and several texts; twice, for what is left behind."""
    texts, heads, shared, length, width = shape
    query = torch.randn(texts, heads, 1, width, device=DEVICE).to(dtype)
    keys, values = (torch.randn(texts, shared, length, width, device=DEVICE).to(dtype) for _ in range(2))
    mask = None
    if masked is not None:
        ends = torch.tensor([length // 3, length - 2])[: texts if masked == "each" else 1]
        mask = (torch.arange(length) <= ends[:, None])[:, None, None, :].to(DEVICE)
    for _ in range(2):
        found = attend(kernel, query, keys, values, mask, width**-0.5)
        expected = by_formula(query, keys, values, mask, width**-0.5)
        assert ((found.double() - expected).abs() <= 4 * torch.finfo(dtype).eps).all()
    if DEVICE == "cpu":
        assert not attention.fits(query, keys, values, mask)
        plain = attention.attend(query.float(), keys.float(), values.float(), mask, width**-0.5)
        torch.testing.assert_close(plain.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif("cuda" not in KERNELS, reason="needs a Hopper")
@pytest.mark.usefixtures("_poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_all_that_lies_in_a_longer_cache(masked: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Every length of tiles, warps and blocks; behind it NaN; masks that differ from text to text."""
    texts, heads, shared, width = shape
    for length in (1, 15, 16, 17, 63, 256, 257, 1000, 4097):
        query = torch.randn(texts, heads, 1, width, device=DEVICE).to(dtype)
        whole = torch.full((2, texts, shared, length + 30, width), torch.nan, device=DEVICE, dtype=dtype)
        keys, values = whole[:, :, :, :length]
        keys.normal_(0.3), values.normal_(0.3)
        mask = None
        if masked:
            ends = torch.arange(1, texts + 1, device=DEVICE)[:, None] * length // (texts + 1)
            mask = (torch.arange(length, device=DEVICE) >= ends) & (torch.rand(texts, length, device=DEVICE) < 0.5)
            mask[:, -1] = True
            mask = mask[:, None, None]
        expected = by_formula(query, keys, values, mask, width**-0.5)
        for _ in range(2):
            found = attend("cuda", query, keys, values, mask, width**-0.5)
            assert ((found.double() - expected).abs() <= torch.finfo(dtype).eps * (1 + expected.abs())).all()
        assert torch.equal(attention.attend(query, keys, values, mask, width**-0.5), found)


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
