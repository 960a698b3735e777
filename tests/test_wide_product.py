"""Codes times many tokens: the very source on a CPU (`emulated.cuh`), and compiled on a GPU, beside fp64."""

from __future__ import annotations

import ctypes
import itertools
import time
from pathlib import Path

import pytest
import torch
from test_kernels import (
    DEVICE,
    DTYPES,
    FORMATS,
    GPU,
    Emulated,
    close,
    everywhere,
    needs_gcc,
    quantized,
    times_scales,
    unwritten,
)
from test_kernels import folder as folder
from test_kernels import poisoned as poisoned
from torch import Tensor

from lowbit.kernels import compile as compiling
from lowbit.kernels import weight_only, wide_product
from lowbit.kernels.layout import prepare
from lowbit.kernels.tensor_map import TensorMap
from lowbit.kernels.wide_product import Plan
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import E2M1, Int, Spec, mx, per_group

FOLDED = [spec for spec in FORMATS if spec.number == E2M1 or spec.scale == "half"]
EVERY = list(zip(FOLDED, itertools.cycle(DTYPES)))
CASES = [
    (Plan(64, 1), 700, per_group(Int(4), -1)),
    (Plan(64, 2), 768, per_group(Int(4, "asymmetric"), 256)),
    (Plan(128, 3), 480, mx(E2M1)),
    (Plan(192, 2), 640, per_group(Int(3), 128)),
    (Plan(256, 1), 704, per_group(Int(8, "asymmetric"), 64)),
]
PLANS = [plan for plan, *_ in CASES]


def plain_map(x: Tensor, rows: int) -> TensorMap:
    """What the emulated copy engine knows of a matrix."""
    found = TensorMap()
    fields = (ctypes.c_longlong * 4).from_address(found.address)
    fields[:] = [x.data_ptr(), x.shape[1], x.shape[0], rows]
    return found


@pytest.fixture
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(name: str, constants: compiling.Constants, _device: object, shared: int = 0) -> Emulated:
        return Emulated(folder, name, constants, shared)

    monkeypatch.setattr(wide_product, "compiled", compiled)
    monkeypatch.setattr(wide_product, "tensor_map", plain_map)
    monkeypatch.setattr(wide_product.torch, "empty", unwritten)


def check(weight: QTensor, tokens: int, dtype: torch.dtype, plan: Plan | None, bias: bool = False) -> None:
    """One product beside fp64, under a plan or the rule's."""
    device = weight.codes.device
    x = torch.randn(tokens, weight.shape[1], device=device).to(dtype)
    added = torch.randn(weight.shape[0], device=device).to(dtype) if bias else None
    prepared = prepare(weight)
    assert wide_product.refusal(prepared) is None
    found = wide_product.product(x, prepared, added, plan or wide_product.plan(tokens, prepared))
    close(found, x, weight if prepared.factor is not None else times_scales(weight, dtype), added)


@pytest.mark.parametrize("processors", [132, 78])
def test_plans_fit_the_device(processors: int) -> None:
    """Shared memory within a Hopper's, no block without columns, and 16-byte vectors of every tile's unit."""
    units_of = {wide_product.unit_bytes(prepare(quantized(16, 128, spec))) for spec in FOLDED}
    assert all(unit % 16 == 0 for unit in units_of)
    for tokens, tiles, units in itertools.product((33, 64, 65, 200, 512, 4096), (1, 8, 43, 896, 8016), (1, 3, 32, 224)):
        plan = wide_product.plan_for(tokens, tiles, units, processors)
        assert plan.tokens in (64, 128, 192, 256) and 1 <= plan.splits <= units
        assert all(wide_product.shared_bytes(plan, unit) <= 227 * 1024 for unit in units_of)


def test_scales_that_do_not_fit_and_odd_outputs_are_refused() -> None:
    assert "scales" in (wide_product.refusal(prepare(quantized(16, 128, Spec(Int(8), (1, -1), "float32")))) or "")
    assert "20 outputs" in (wide_product.refusal(prepare(quantized(20, 128, per_group(Int(4), 128)))) or "")


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("plan", "columns", "spec"), CASES, ids=str)
def test_the_source_multiplies(plan: Plan, columns: int, spec: Spec) -> None:
    """Odd numbers of rows, columns and tokens; blocks with one unit of columns, and with more than there are stages."""
    check(quantized(136, columns, spec), 70, torch.bfloat16, plan, bias=True)


@needs_gcc
@pytest.mark.usefixtures("emulated")
def test_sums_do_not_depend_on_which_block_comes_last() -> None:
    """The first and the last third of the columns cancel, so that another order would leave other sums.

    Every product finds the counters as the one before left them.
    """
    weight = quantized(136, 384, per_group(Int(4), 128))
    weight.codes[:, 256:], weight.grid.scale[:, 2] = weight.codes[:, :128], weight.grid.scale[:, 0]
    x = torch.randn(9, 384).bfloat16()
    x[:, :128] *= 2**16
    x[:, 256:] = -x[:, :128]
    found, *others = (wide_product.product(x, prepare(weight), None, Plan(64, 3)) for _ in range(4))
    assert all(torch.equal(found, other) for other in others)
    close(found, x, times_scales(weight, x.dtype))


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("spec", "dtype"), EVERY, ids=str)
def test_the_source_multiplies_every_format(spec: Spec, dtype: torch.dtype) -> None:
    check(quantized(48, 384, spec), 9, dtype, Plan(64, 1), bias=True)


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(("spec", "dtype"), [case for case in EVERY if case[0].bits == 3], ids=str)
def test_three_bits_are_found_in_every_place(spec: Spec, dtype: torch.dtype) -> None:
    """Each token has one input, which is 1: its outputs are a column of weights, to the last bit."""
    weight, x = everywhere(spec), torch.eye(128).to(dtype)
    found = wide_product.product(x, prepare(weight), torch.zeros(weight.shape[0]).to(dtype), Plan(64, 1))
    assert torch.equal(found.T, times_scales(weight, dtype))


on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU that the kernels know")


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", FOLDED, ids=str)
def test_the_gpu_agrees_with_fp64(spec: Spec, dtype: torch.dtype) -> None:
    for rows, columns in ((8, 128), (2056, 1152 if spec.group == -1 else 1280), (4096, 4096)):
        weight = quantized(rows, columns, spec, DEVICE)
        for tokens in (33, 100, 200, 300):
            check(weight, tokens, dtype, None, bias=tokens != 33)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("plan", [*PLANS, Plan(64, 8), Plan(128, 8), Plan(192, 5), Plan(256, 3)], ids=str)
def test_the_gpu_shares_out_the_work_in_every_way(plan: Plan) -> None:
    for rows, columns, tokens in ((136, 1024, 70), (1032, 4096, 513)):
        check(quantized(rows, columns, per_group(Int(4), 128), DEVICE), tokens, torch.bfloat16, plan)


@pytest.mark.gpu
@on_gpu
def test_products_in_a_queue_all_end_and_end_alike() -> None:
    """One behind the other without a pause, where each begins while the one before it ends."""
    weight = prepare(quantized(1032, 4096, per_group(Int(4), 128), DEVICE))
    x = torch.randn(513, 4096, device=DEVICE).bfloat16()
    expected = wide_product.product(x, weight, None, Plan(64, 8))
    torch.cuda._sleep(10**7)
    found = [wide_product.product(x, weight, None, Plan(64, 8)) for _ in range(100)]
    done, begun = torch.cuda.Event(), time.monotonic()
    done.record()
    while not done.query():
        assert time.monotonic() < begun + 30, "a block waits for ever"
    assert all(torch.equal(each, expected) for each in found)


@pytest.mark.gpu
@on_gpu
def test_linear_takes_the_kernel_for_many_tokens() -> None:
    weight = prepare(quantized(1024, 2040, per_group(Int(4, "asymmetric"), -1), DEVICE))
    x = torch.randn(2, 50, 2040, device=DEVICE).bfloat16()
    expected = wide_product.product(x.flatten(0, 1), weight, None, wide_product.plan(100, weight))
    assert torch.equal(weight_only.linear(x, weight).flatten(0, 1), expected)
