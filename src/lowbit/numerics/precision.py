"""What arithmetic a device may use for products of fp32 matrices, for the length of a block of code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def bf16_units(x: Tensor) -> Iterator[None]:
    """Let the CPU's bf16 units multiply widened bf16 values like x: products stay exact and sums fp32."""
    matmul = getattr(torch.backends.mkldnn, "matmul", None)
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or matmul is None:
        yield
        return
    with _set(matmul, "bf16"):
        yield


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Let a GPU's tensor cores multiply fp32 matrices with 10 bits of mantissa (TF32) and fp32 sums.

    For training, where the straight-through estimator is the coarser approximation by far; never for what is stored.
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
