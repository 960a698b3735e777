"""Linears behind one input, computed as one: q, k and v, or gate and up.

For a token, a product of few rows leaves most of a GPU idle, and each has a beginning and an end in which nothing is
read. Which linears share an input is seen by running the model: they are called with the same tensor, one after the
other. Their codes are joined, and each keeps its part as a view, so nothing is held twice and each can still compute
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..kernels.layout import ROWS, Prepared
from .fast import Merged, WeightOnlyLinear

Result = TypeVar("Result")


def merge(model: nn.Module, run: Callable[[], Result]) -> Result:
    """Run a model once, and join what turned out to share its input; returns what `run` does."""
    calls: list[tuple[WeightOnlyLinear, Tensor]] = []

    def called(module: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(module, WeightOnlyLinear)
        calls.append((module, args[0]))

    linears = [module for module in model.modules() if isinstance(module, WeightOnlyLinear)]
    handles = [module.register_forward_pre_hook(called) for module in linears]
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    for _, group in groupby(calls, lambda call: id(call[1])):
        members = list(dict.fromkeys(module for module, _ in group))
        if len(members) > 1 and len({_kind(module) for module in members}) == 1 and _kind(members[0]) is not None:
            _join(members)
    return result


def _kind(linear: WeightOnlyLinear) -> object:
    """What linears must have in common to be joined; None where one never can be."""
    codes = linear.codes
    if linear.merged is not None or linear.input_map is not None or codes.order is not None:
        return None
    if codes.shape[0] % ROWS:
        return None
    return codes.shape[1], codes.bits, codes.group, codes.scale.dtype, codes.zero is None, linear.bias is None


def _join(members: list[WeightOnlyLinear]) -> None:
    """Join codes along the rows, and let each member hold its part of them."""
    parts = [module.codes for module in members]
    joined = Prepared(
        torch.cat([part.low for part in parts]),
        None if parts[0].high is None else torch.cat([part.high for part in parts if part.high is not None]),
        torch.cat([part.scale for part in parts]),
        None if parts[0].zero is None else torch.cat([part.zero for part in parts if part.zero is not None]),
        None,
        (sum(part.shape[0] for part in parts), parts[0].shape[1]),
        parts[0].bits,
        parts[0].group,
    )
    biases = [module.bias for module in members if module.bias is not None]
    merged = Merged(joined, torch.cat(biases) if biases else None, [part.shape[0] for part in parts])
    first = 0
    for index, (module, part) in enumerate(zip(members, parts, strict=True)):
        rows = slice(first, first + part.shape[0] // ROWS)
        module.codes = Prepared(
            joined.low[rows],
            None if joined.high is None else joined.high[rows],
            joined.scale[rows],
            None if joined.zero is None else joined.zero[rows],
            None,
            part.shape,
            part.bits,
            part.group,
        )
        module.merged, module.index = merged, index
        first = rows.stop
    if joined.low.is_cuda:
        torch.cuda.synchronize(joined.low.device)  # kernels read weights before the work ahead of them has ended
