"""The Triton kernel of `codes_product.py`, whose `product_reference` is its definition.

Operands come through Hopper's copy engine, which needs no addresses in registers, gives zeros beyond the ends, and
fetches the next steps while tensor cores work. Programs stay on their processor and take one tile after the other, so
that the first operands of a tile arrive while the last one is being written.

Shape letters: M tokens, K inputs, N outputs; a tile is BM x BN, made from steps of BK inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .compile import processors


class Tiles(NamedTuple):
    """How a product is cut up."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    apart: bool = False
    """Whether some warps only fetch."""


_BAND = 8
"""Tiles of rows that are gone through before the next columns, so that the cache holds what they share."""

_LARGE = 128 * 128
"""Values of a tile from which on a processor has room for one only."""


@triton.jit
def _product(
    a, b, by_row_at, by_column_at, bias_at, y_at, M, N, K,
    BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BAND: tl.constexpr, SUMS: tl.constexpr,
    PROGRAMS: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), down * across, PROGRAMS, flatten=True, warp_specialize=APART):
        band = tile // (BAND * across)
        height = tl.minimum(down - band * BAND, BAND)
        inside = tile % (BAND * across)
        top, left = (band * BAND + inside % height) * BM, inside // height * BN
        sums = tl.zeros((BM, BN), dtype=SUMS)
        for k in range(0, K, BK):
            sums = tl.dot(a.load([top, k]), b.load([left, k]).T, sums, out_dtype=SUMS)
        row, column = top + tl.arange(0, BM), left + tl.arange(0, BN)
        by_row = tl.load(by_row_at + row, mask=row < M, other=0.0)
        by_column = tl.load(by_column_at + column, mask=column < N, other=0.0)
        y = sums.to(tl.float32) * by_row[:, None] * by_column[None, :]
        if BIAS:
            y += tl.load(bias_at + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
        place = row.to(tl.int64)[:, None] * N + column[None, :]
        tl.store(y_at + place, y.to(y_at.dtype.element_ty), mask=(row < M)[:, None] & (column < N)[None, :])


def product(
    codes: Tensor, scale: Tensor, weight: Tensor, by_row: Tensor, bias: Tensor | None, dtype: torch.dtype,
    tiles: Tiles | None = None,
) -> Tensor:  # fmt: skip
    """See `codes_product.product`; a weight of codes [N, K] has scales [N]."""
    (tokens, inputs), outputs = codes.shape, len(weight)
    y = torch.empty(tokens, outputs, device=codes.device, dtype=dtype)
    how = tiles or plan(tokens)
    count = triton.cdiv(tokens, how.m) * triton.cdiv(outputs, how.n)
    programs = min(count, processors(codes.device)) if how.m * how.n >= _LARGE else count
    _product[(programs,)](
        TensorDescriptor.from_tensor(codes, [how.m, how.k]), TensorDescriptor.from_tensor(weight, [how.n, how.k]),
        scale, by_row, scale if bias is None else bias, y, tokens, outputs, inputs,
        BIAS=bias is not None, BM=how.m, BN=how.n, BK=how.k, BAND=_BAND, PROGRAMS=programs, APART=how.apart,
        SUMS=tl.int32 if codes.dtype == torch.int8 else tl.float32, num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    return y


def plan(tokens: int) -> Tiles:
    """Tiles for a number of tokens: rules read off searches on Hopper."""
    if tokens <= 16:
        return Tiles(16, 64, 256, 4, 4)
    if tokens <= 64:
        return Tiles(64, 32, 256, 4, 4)
    if tokens <= 256:
        return Tiles(64, 64, 128, 4, 5)
    if tokens <= 1024:
        return Tiles(128, 128, 128, 8, 4)
    return Tiles(128, 256, 128, 8, 3, True)
