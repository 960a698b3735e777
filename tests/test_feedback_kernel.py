"""The kernel that rounds a tile of columns, against the columns rounded one by one in torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.methods.gptq import GPTQ, Columns
from lowbit.numerics import feedback
from lowbit.numerics.grid import Grid, fit_range, unit_shape
from lowbit.numerics.spec import Int, Spec

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(5, 32), (33, 80), (20, 144)]
"""Rows and columns of the weight."""


def case(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight [O, I] and the inverse factor [I, I] of correlated inputs."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return weight.to(DEVICE), feedback.inverse_factor((x.T @ x).to(DEVICE), 0.01)


def swept(weight: Tensor, factor: Tensor, grid: Grid, kernel: bool) -> tuple[Tensor, Tensor]:
    """(values, levels) of a sweep by the kernel, or column by column."""
    from lowbit.numerics.feedback_kernel import round_tile

    _, width = unit_shape(weight.shape, grid.spec.block)
    columns = Columns(grid, weight.shape, [i // width for i in range(weight.shape[1])])
    group = torch.tensor(columns.group, dtype=torch.int32, device=weight.device)

    def rounds(first: int, values: Tensor, errors: Tensor, shares: Tensor) -> None:
        part = slice(first, first + len(values))
        levels = columns.levels[part]
        round_tile(values, errors, shares, group[part], columns.scale, columns.limits, columns.offset, levels)

    values = feedback.sweep(weight, factor, columns.round, block=64, round_tile=rounds if kernel else None)
    return values, columns.levels


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("rule", "group"), [("symmetric", 16), ("asymmetric", 16), ("asymmetric", -1), ("symmetric-restricted", -1)]
)
def test_a_tile_rounds_as_its_columns_do(shape: tuple[int, int], rule: str, group: int) -> None:
    weight, factor = case(*shape)
    grid = fit_range(weight, Spec(Int(3, rule), (1, group), "float32"))  # type: ignore[arg-type]
    expected, levels = swept(weight, factor, grid, kernel=False)
    found, found_levels = swept(weight, factor, grid, kernel=True)
    # One value at a border may fall to its other side where sums are added in another order, and takes a row with it.
    equal = (found_levels == levels).all(0)
    assert equal.float().mean() > 0.95
    torch.testing.assert_close(found[equal], expected[equal], rtol=0, atol=1e-5)


def test_grids_with_an_offset() -> None:
    weight, factor = case(33, 64)
    grid = fit_range(weight, Spec(Int(4, "asymmetric"), (1, 32), "float32"))
    moved = Grid(grid.spec, grid.scale, None, None, torch.rand_like(grid.scale))
    assert torch.equal(swept(weight, factor, moved, kernel=True)[1], swept(weight, factor, moved, kernel=False)[1])


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("groups", ["static", "fresh", "stale"])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_on_a_gpu_gives_what_it_gives_on_a_cpu(groups: str, act_order: bool) -> None:
    from lowbit.methods.base import Stats
    from lowbit.methods.rtn import MinMaxClip

    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 256, generator=generator)
    x = torch.randn(2048, 256, generator=generator).bfloat16()
    codes = []
    for device in ("cpu", "cuda"):
        stats = Stats.observing(GPTQ.needs)
        stats.update(x.to(device))
        method = GPTQ(groups=groups, act_order=act_order)  # type: ignore[arg-type]
        spec = Spec(Int(4, "symmetric"), (1, 64), "float32")
        codes.append(method.round(weight.to(device), spec, MinMaxClip(), stats, scores=False).codes.cpu())
    assert (codes[0] == codes[1]).float().mean() > 0.99
