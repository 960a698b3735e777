"""Linears behind one input, computed as one: q, k and v, or gate and up.

For a token, a product of few rows leaves most of a GPU idle, and each has a beginning and an end in which nothing is
read. Which linears share an input is seen by running the model: they are called with the same tensor, one after the
other. Their codes are joined, and each keeps its part as a view, so nothing is held twice and each can still compute
alone. Behind quantized inputs that become the same codes, one encoding is enough for all too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import codes_product, layout, weight_only
from ..kernels.encoder import Encoder
from ..kernels.layout import ROWS
from .fast import CodesLinear, FastLinear, Merged, WeightOnlyLinear, multiplied

Result = TypeVar("Result")


def merge(model: nn.Module, run: Callable[[], Result]) -> Result:
    """Run a model once, and join what turned out to share its input; returns what `run` does."""
    groups: list[list[FastLinear]] = []
    last: Tensor | None = None  # the only input that is kept: those of a long prompt are large

    def called(module: nn.Module, args: tuple[Any, ...]) -> None:
        nonlocal last
        assert isinstance(module, FastLinear)
        if args[0] is not last:
            groups.append([])
            last = args[0]
        groups[-1].append(module)

    linears = [module for module in model.modules() if isinstance(module, FastLinear)]
    handles = [module.register_forward_pre_hook(called) for module in linears]
    try:
        result = run()
    finally:
        last = None
        for handle in handles:
            handle.remove()
    for group in groups:
        members = list(dict.fromkeys(group))
        if len(members) > 1 and all(_alike(members[0], member) for member in members):
            _join(members)
    return result


def _alike(one: FastLinear, other: FastLinear) -> bool:
    """Whether linears of one input compute alike, so that their rows can be those of one weight."""
    if one.merged is not None or other.merged is not None or (one.bias is None) != (other.bias is None):
        return False
    if isinstance(one, WeightOnlyLinear) and isinstance(other, WeightOnlyLinear):
        return _format(one) is not None and _format(one) == _format(other)
    if isinstance(one, CodesLinear) and isinstance(other, CodesLinear):
        return _same_encoder(one.encoder, other.encoder)
    return False


def _format(linear: WeightOnlyLinear) -> object:
    """What weights must have in common to be joined; None where one never can be."""
    codes = linear.codes
    if linear.input_map is not None or codes.order is not None or codes.shape[0] % ROWS:
        return None
    return codes.shape[1], codes.number, codes.group, codes.scale.dtype, codes.zero is None


def _same_encoder(one: Encoder, other: Encoder) -> bool:
    """Whether inputs become the same codes."""
    if one.number != other.number or (one.map is None) != (other.map is None):
        return False
    if one.map is not None and other.map is not None:
        ours, theirs = one.map.tensors(), other.map.tensors()
        if one.map.describe() != other.map.describe() or not all(map(torch.equal, ours.values(), theirs.values())):
            return False
    if one.clip is None or other.clip is None:
        return one.clip is other.clip
    return torch.equal(one.clip, other.clip)


def _join(members: Sequence[FastLinear]) -> None:
    """Join codes along the rows, and let each member hold its part of them."""
    sizes = [member.out_features for member in members]
    biases = [member.bias for member in members if member.bias is not None]
    bias = torch.cat(biases) if biases else None
    weights = [member for member in members if isinstance(member, WeightOnlyLinear)]
    operands = [member for member in members if isinstance(member, CodesLinear)]
    if weights:
        codes = layout.joined([member.codes for member in weights])
        merged = Merged(partial(weight_only.linear, weight=codes, bias=bias), sizes)
        for weight, end in zip(weights, accumulate(sizes), strict=True):
            weight.codes = codes.rows(end - weight.out_features, end)
    else:
        operand = codes_product.joined([member.codes for member in operands])
        merged = Merged(partial(multiplied, how=operands[0].encoder, codes=operand, bias=bias), sizes)
        for each, end in zip(operands, accumulate(sizes), strict=True):
            each.codes = operand.rows(end - each.out_features, end)
    for index, member in enumerate(members):
        member.merged, member.index = merged, index
