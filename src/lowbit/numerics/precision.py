"""What arithmetic a device may use for products of fp32 matrices, for the length of a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_WIDE_SUMS = "out_dtype" in (torch.mm.__doc__ or "")
"""Whether torch gives fp32 products of 16-bit matrices on a GPU (2.8 and later)."""


@contextmanager
def exact_products(x: Tensor) -> Iterator[Tensor]:
    """x as it is to be given to `add_product`: products of 16-bit values are exact then, and sums fp32.

    A GPU's tensor cores take 16-bit matrices as they are. A CPU's bf16 units multiply widened bf16 values.
    """
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and _WIDE_SUMS:
        yield x
    elif x.dtype == torch.bfloat16 and x.device.type == "cpu" and matmul is not None:
        with _set(matmul, "bf16"):
            yield x.float()
    else:
        yield x.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left · right to `total`, fp32; both are parts of what `exact_products` gave."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=torch.float32)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let a GPU's tensor cores multiply fp32 matrices with 10 bits of mantissa (TF32) and fp32 sums.

    For training, where the straight-through estimator is the coarser approximation by far, and for telling candidates
    apart; never for what is stored.
    """
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):  # before torch 2.9
        yield
        return
    with _set(matmul, "tf32"):
        yield


@contextmanager
def _set(matmul: Any, precision: str) -> Iterator[None]:
    before = matmul.fp32_precision
    matmul.fp32_precision = precision
    try:
        yield
    finally:
        matmul.fp32_precision = before
