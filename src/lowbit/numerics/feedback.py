"""The column sweep behind every error-feedback rounding: round a column, spread its error over the columns to come.

With H = Σ x xᵀ and U the upper Cholesky factor of H⁻¹ (UᵀU = H⁻¹), rounding column i with error e = w_i - ŵ_i is best
repaired by w_j -= e U_ij / U_ii for every j > i. The sweep is written column-major (Wᵀ, so that a column is a
contiguous row), computes each column's correction when it is reached (one matrix-vector product, instead of a rank-one
update of everything behind it), and corrects later columns tile by tile and block by block (one matrix product each).
On a CPU the time goes into starting small operations, so views are made once per tile and nothing is stored twice; on a
GPU a tile of an integer format is one kernel (`feedback_kernel.py`).

A mixture's experts are many weights of one shape, each behind inputs of its own, and none of them is large enough to
fill a GPU. Factor and sweep therefore also take a stack of E problems: the same steps, every operation of which works
on all of them.

Shape letters: O rows of the weight, I columns, E entries of a stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

RoundColumn = Callable[[int, Tensor], Tensor]
"""(column, corrected values [O]) -> rounded values [O] in a tensor of their own; remembers codes on the side."""
RoundTile = Callable[[int, Tensor, Tensor, Tensor], None]
"""(first column, columns [..., T, O], their errors [..., T, O], shares [..., T, T]): `_round_tile` in one kernel."""
OpenBlock = Callable[[int, Tensor], None]
"""(first column, columns from there on [I - first, O], corrected by all blocks before) -> None."""


_TILE = 32
"""Columns whose errors one matrix-vector product gathers, few enough to stay in cache."""
_KERNEL_TILE = 128
"""Columns that a kernel holds in registers."""
_PANEL = 128
"""Columns of a stack that are factorized at once: what lies behind them is products of matrices."""
_WIDE = 4096
"""Columns from which a matrix fills a GPU by itself, and is factorized so: by panels it takes more operations."""


def inverse_factor(h: Tensor, damp: float, order: Tensor | None = None, *, attempts: int = 4) -> Tensor:
    """U upper triangular with UᵀU = (H + damp·mean(diag H)·I)⁻¹, for H [I, I] positive semi-definite.

    `order` [I] takes H's columns and rows in that order. Columns never excited get a unit diagonal, and have no
    correlation. H's factor taken from the last column backwards is upper triangular, H = R Rᵀ, and then U = R⁻¹: one
    Cholesky factorization and one triangular inverse in place, instead of the textbook's three steps. Whenever the
    factorization fails it is tried in fp64, then with ten times the damping. Raises ValueError if H is not finite or
    beyond repair.
    """
    _check_finite([h])
    backwards = torch.arange(len(h), device=h.device).flip(0) if order is None else order.flip(0)
    for attempt in range(attempts):
        for dtype in (torch.float32, torch.float64):
            flipped = _turned(h, backwards, damp * 10**attempt, dtype)
            factor: Tensor
            factor, info = torch.linalg.cholesky_ex(flipped)
            del flipped  # matrices of a wide input are what peak memory is made of
            if info.item():
                continue
            _invert(factor)
            if bool(factor.isfinite().all()):
                return factor.flip(0, 1).float()
    raise ValueError("the inputs' Gram matrix cannot be factorized even with heavy damping: choose a larger one")


def inverse_factors(hs: Sequence[Tensor], damp: float, orders: Sequence[Tensor | None]) -> Tensor:
    """`inverse_factor` of every H [I, I] in its order, [E, I, I], as one batch; those that fail are tried again singly.

    A library's factorization of a batch is made for tiny matrices, so panels of columns are factorized by it, and the
    rest of the matrices is brought up to date by products. Wide ones are taken singly.
    """
    _check_finite(hs)
    stack = hs[0].new_empty(len(hs), *hs[0].shape)
    if stack.shape[-1] >= _WIDE:
        for place, h, order in zip(stack, hs, orders, strict=True):
            place.copy_(inverse_factor(h, damp, order))
        return stack
    for place, h, order in zip(stack, hs, orders, strict=True):
        backwards = torch.arange(len(h), device=h.device) if order is None else order
        place.copy_(_turned(h, backwards.flip(0), damp, torch.float32))
    _factorize(stack)
    _invert(stack, _PANEL)
    sound = stack.isfinite().flatten(1).all(1).tolist()
    factors = stack.flip(1, 2)
    for place, h, order, fine in zip(factors, hs, orders, sound, strict=True):
        if not fine:
            place.copy_(inverse_factor(h, damp, order))
    return factors


def _check_finite(hs: Sequence[Tensor]) -> None:
    if not bool(torch.stack([h.isfinite().all() for h in hs]).all()):
        raise ValueError("the inputs' Gram matrix is not finite: look for NaN, Inf or overflow in the activations")


def _turned(h: Tensor, backwards: Tensor, damp: float, dtype: torch.dtype) -> Tensor:
    """A damped copy of H with its columns and rows in the order `backwards`."""
    diagonal = h.diagonal()[backwards]
    turned = h[backwards].index_select(1, backwards).to(dtype)  # both at once takes an index for every entry
    turned.diagonal().add_(torch.where(diagonal <= 0, 1.0, damp * diagonal.mean()))
    return turned


def _factorize(stack: Tensor) -> None:
    """Put lower Cholesky factors in the place of a stack of matrices; NaN in that of a matrix that has none."""
    width = stack.shape[-1]
    identity = torch.eye(min(_PANEL, width), dtype=stack.dtype, device=stack.device)
    for start in range(0, width, _PANEL):
        own, rest = slice(start, start + _PANEL), slice(start + _PANEL, width)
        factor, info = torch.linalg.cholesky_ex(stack[:, own, own])
        factor = factor.masked_fill_((info != 0)[:, None, None], torch.nan)
        stack[:, own, own] = factor
        size = factor.shape[-1]
        inverse = torch.linalg.solve_triangular(factor, identity[:size, :size], upper=False)
        below = stack[:, rest, own] @ inverse.mT
        stack[:, rest, own] = below
        stack[:, rest, rest].baddbmm_(below, below.mT, alpha=-1)
    stack.tril_()


def _invert(lower: Tensor, step: int = 1024) -> None:
    """Put the inverses of lower triangular matrices [..., I, I] in their place, a block of columns at a time, from the
    last on.
    """
    for start in reversed(range(0, lower.shape[-1], step)):
        own, rest = slice(start, start + step), slice(start + step, None)
        diagonal, below = lower[..., own, own], lower[..., rest, own]
        identity = torch.eye(diagonal.shape[-1], dtype=lower.dtype, device=lower.device)
        inverse = torch.linalg.solve_triangular(diagonal, identity, upper=False)
        below.copy_((lower[..., rest, rest] @ below).neg_() @ inverse)
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
    `round_tile` takes the place of `round_column` where there is no drift. With it, W [E, O, I] and U [E, I, I] may be
    a stack.
    """
    working = weight.mT.clone(memory_format=torch.contiguous_format)
    errors = torch.empty_like(working[..., :block, :], memory_format=torch.contiguous_format)
    whole = round_tile if drift is None else None
    assert whole is not None or working.dim() == 2, "a stack is rounded by tiles, and has no drift"
    total, width = working.shape[-2], _TILE if whole is None else _KERNEL_TILE
    for start in range(0, total, block):
        stop = min(start + block, total)
        if open_block is not None:
            open_block(start, working[..., start:, :])
        u = factor[..., start:stop, start:stop]
        diagonal = u.diagonal(dim1=-2, dim2=-1)[..., None]
        shares = (u / diagonal).triu(1).mT.contiguous()  # [j, i]: what column j takes of column i's error
        pull = None if drift is None else drift[start:stop, start:stop].T.contiguous()
        if pull is not None:  # column i was rounded from ŵ_i + e_i: P acts on both
            shares -= pull
        for first in range(start, stop, width):
            last = min(first + width, stop)
            tile = slice(first - start, last - start)
            later = slice(last - start, stop - start)
            own = None if pull is None else pull[tile, tile]
            columns, made = working[..., first:last, :], errors[..., tile, :]
            if whole is None:
                _round_tile(first, columns, made, shares[tile, tile], round_column, own)
            else:
                whole(first, columns, made, shares[..., tile, tile])
            _subtract(working[..., last:stop, :], shares[..., later, tile], made)
            if pull is not None:
                working[last:stop].addmm_(pull[later, tile], columns)
        if drift is not None:
            working[stop:].addmm_(drift[start:stop, stop:].T, working[start:stop] + errors[: stop - start])
        scaled = errors[..., : stop - start, :].div_(diagonal)
        _subtract(working[..., stop:, :], factor[..., start:stop, stop:].mT, scaled)
    return working.mT


def _subtract(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract a product of matrices, or of stacks of them, in place."""
    if total.dim() == 2:
        total.addmm_(left, right, alpha=-1)
    elif total.shape[1]:
        total.baddbmm_(left, right, alpha=-1)


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
