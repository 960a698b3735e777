"""The column sweep behind every error-feedback rounding: round a column, spread its error over the columns to come.

With H = Σ x xᵀ and U the upper Cholesky factor of H⁻¹ (UᵀU = H⁻¹), rounding column i with error e = w_i - ŵ_i is best
repaired by w_j -= e U_ij / U_ii for every j > i. The sweep is written column-major (Wᵀ, so that a column is a
contiguous row), computes each column's correction when it is reached (one matrix-vector product, instead of a rank-one
update of everything behind it), and corrects later columns tile by tile and block by block (one matrix product each).
On a CPU the time goes into starting small operations, so views are made once per tile and nothing is stored twice; on a
GPU a tile of an integer format is one kernel (`feedback_kernel.py`).

Shape letters: O rows of the weight, I columns.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

RoundColumn = Callable[[int, Tensor], Tensor]
"""(column, corrected values [O]) -> rounded values [O] in a tensor of their own; remembers codes on the side."""
RoundTile = Callable[[int, Tensor, Tensor, Tensor], None]
"""(first column, columns [T, O], their errors [T, O], shares [T, T]): what `_round_tile` does, in one kernel."""
OpenBlock = Callable[[int, Tensor], None]
"""(first column, columns from there on [I - first, O], corrected by all blocks before) -> None."""


_TILE = 32
"""Columns whose errors one matrix-vector product gathers, few enough to stay in cache."""
_KERNEL_TILE = 128
"""Columns that a kernel holds in registers."""


def inverse_factor(h: Tensor, damp: float, order: Tensor | None = None, *, attempts: int = 4) -> Tensor:
    """U upper triangular with UᵀU = (H + damp·mean(diag H)·I)⁻¹, for H [I, I] positive semi-definite.

    `order` [I] takes H's columns and rows in that order. Columns never excited get a unit diagonal, and have no
    correlation. H's factor taken from the last column backwards is upper triangular, H = R Rᵀ, and then U = R⁻¹: one
    Cholesky factorization and one triangular inverse in place, instead of the textbook's three steps. Whenever the
    factorization fails it is tried in fp64, then with ten times the damping. Raises ValueError if H is not finite or
    beyond repair.
    """
    if not bool(h.isfinite().all()):
        raise ValueError("the inputs' Gram matrix is not finite: look for NaN, Inf or overflow in the activations")
    backwards = torch.arange(len(h), device=h.device).flip(0) if order is None else order.flip(0)
    diagonal = h.diagonal()[backwards]
    for attempt in range(attempts):
        added = torch.where(diagonal <= 0, 1.0, damp * 10**attempt * diagonal.mean())
        for dtype in (torch.float32, torch.float64):
            flipped = h[backwards].index_select(1, backwards).to(dtype)  # both at once takes an index for every entry
            flipped.diagonal().add_(added)
            factor: Tensor
            factor, info = torch.linalg.cholesky_ex(flipped)
            del flipped  # matrices of a wide input are what peak memory is made of
            if info.item():
                continue
            _invert(factor)
            if bool(factor.isfinite().all()):
                return factor.flip(0, 1).float()
    raise ValueError("the inputs' Gram matrix cannot be factorized even with heavy damping: choose a larger one")


def _invert(lower: Tensor, step: int = 1024) -> None:
    """Put the inverse of a lower triangular matrix in its place, a block of columns at a time, from the last on."""
    for start in reversed(range(0, len(lower), step)):
        own = slice(start, start + step)
        diagonal, below = lower[own, own], lower[start + step :, own]
        identity = torch.eye(len(diagonal), dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(diagonal, identity, upper=False)
        below.copy_((lower[start + step :, start + step :] @ below).neg_() @ inverse)
        diagonal.copy_(inverse)


def sweep(
    weight: Tensor,
    factor: Tensor,
    round_column: RoundColumn,
    *,
    block: int = 128,
    open_block: OpenBlock | None = None,
    drift: Tensor | None = None,
    round_tile: RoundTile | None = None,
) -> Tensor:
    """Round W [O, I] column by column with error feedback through U [I, I]; returns the rounded values [O, I], fp32.

    `open_block` sees every block of columns before it is rounded, with all earlier errors spread into it. `drift` P
    [I, I], strictly upper triangular, adds w_i P_ij to column j, w_i being what column i was rounded from (GPTAQ).
    `round_tile` takes the place of `round_column` where there is no drift.
    """
    working = weight.T.clone(memory_format=torch.contiguous_format)
    errors = torch.empty_like(working[:block])
    whole = round_tile if drift is None else None
    width = _TILE if whole is None else _KERNEL_TILE
    for start in range(0, len(working), block):
        stop = min(start + block, len(working))
        if open_block is not None:
            open_block(start, working[start:])
        u = factor[start:stop, start:stop]
        shares = (u / u.diagonal()[:, None]).triu(1).T.contiguous()  # [j, i]: what column j takes of column i's error
        pull = None if drift is None else drift[start:stop, start:stop].T.contiguous()
        if pull is not None:  # column i was rounded from ŵ_i + e_i: P acts on both
            shares -= pull
        for first in range(start, stop, width):
            last = min(first + width, stop)
            tile = slice(first - start, last - start)
            later = slice(last - start, stop - start)
            own = None if pull is None else pull[tile, tile]
            if whole is None:
                _round_tile(first, working[first:last], errors[tile], shares[tile, tile], round_column, own)
            else:
                whole(first, working[first:last], errors[tile], shares[tile, tile])
            working[last:stop].addmm_(shares[later, tile], errors[tile], alpha=-1)
            if pull is not None:
                working[last:stop].addmm_(pull[later, tile], working[first:last])
        if drift is not None:
            working[stop:].addmm_(drift[start:stop, stop:].T, working[start:stop] + errors[: stop - start])
        scaled = errors[: stop - start].div_(u.diagonal()[:, None])
        working[stop:].addmm_(factor[start:stop, stop:].T, scaled, alpha=-1)
    return working.T


def _round_tile(
    first: int, columns: Tensor, errors: Tensor, shares: Tensor, round_column: RoundColumn, pull: Tensor | None
) -> None:
    """Round the tile's columns in place, corrected by the tile's earlier errors, and leave their own in `errors`.

    `pull` [j, i], zero unless i < j, is what column j takes of the rounded column i beside its share of the error.
    """
    gather = errors.zero_().T  # a column's own error and those to come are still zero when it is reached
    for i, (column, error, share) in enumerate(zip(columns.unbind(), errors.unbind(), shares.unbind(), strict=True)):
        if pull is not None:
            column.addmv_(columns[:i].T, pull[i, :i])
        value = round_column(first + i, column.addmv_(gather, share, alpha=-1))
        torch.sub(column, value, out=error)
        column.copy_(value)
