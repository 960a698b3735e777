"""Folds a per-channel map into the two ends of an edge, in place: the one place where weights change for a transform.

Everything is computed in at least fp32 and stored in the parameter's own dtype. Folding into bf16 weights therefore
rounds (about 1e-2 of relative logit noise on real models); whoever needs exactness folds into fp32 copies. Scales that
are zero or not finite are the caller's to guard.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from .anatomy import Edge, Norm


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _parameter(block: nn.Module, path: str, name: str) -> Tensor:
    return cast(Tensor, getattr(block.get_submodule(path), name))


def reader_channels(edge: Edge, values: Tensor) -> Tensor:
    """Values over source channels [S], repeated for the reader's input channels [I]."""
    if edge.channels is None:
        return values
    return values[torch.tensor(edge.channels, device=values.device)]


def source_rows(edge: Edge, tensor: Tensor) -> Tensor | slice:
    """Index of the source's rows in its weight or bias."""
    assert not isinstance(edge.source, Norm)
    index = edge.source.index
    return slice(None) if index is None else torch.tensor(index, device=tensor.device)


@torch.no_grad()
def apply_scale(block: nn.Module, edge: Edge, scale: Tensor) -> None:
    """Divides the source's output by `scale` [S source channels] and multiplies what reads it by the same.

    Changes, in place: a norm's gain and bias, or a site's rows and their bias; the columns of every reader and router.
    """
    scale_source(block, edge, scale)
    columns = reader_channels(edge, scale)
    readers = [reader.weight(block) for reader in edge.readers]
    routers = [_parameter(block, path, "weight") for path in edge.others]
    for weight in readers + routers:
        weight.copy_(_wide(weight) * columns.to(weight.device))


@torch.no_grad()
def scale_source(block: nn.Module, edge: Edge, scale: Tensor) -> None:
    """The first half of `apply_scale`: divides the source's output by `scale` [S] and repairs nothing."""
    source = edge.source
    if isinstance(source, Norm):
        gain = _parameter(block, source.name, "weight")
        gain.copy_((_wide(gain) + source.offset) / scale.to(gain.device) - source.offset)
        if source.bias:
            bias = _parameter(block, source.name, "bias")
            bias.copy_(_wide(bias) / scale.to(bias.device))
        return
    weight = source.site.weight(block)
    rows, divisor = source_rows(edge, weight), scale.to(weight.device)
    weight[rows] = (_wide(weight[rows]) / divisor[:, None]).to(weight.dtype)
    if source.site.bias:
        bias = _parameter(block, source.site.name, "bias")
        bias[rows] = (_wide(bias[rows]) / divisor).to(bias.dtype)


@torch.no_grad()
def apply_shift(block: nn.Module, edge: Edge, shift: Tensor) -> None:
    """Subtracts `shift` [S source channels] from the source's output and adds its effect to the readers' biases.

    Lawful where `edge.shift` says so (Outlier Suppression+'s X' = X - δ, b' = b + Wδ).
    """
    shift_source(block, edge, shift)
    columns = reader_channels(edge, shift)
    for reader in edge.readers:
        weight, bias = reader.weight(block), _parameter(block, reader.name, "bias")
        bias.copy_(_wide(bias) + _wide(weight) @ columns.to(weight.device, _wide(weight).dtype))


@torch.no_grad()
def shift_source(block: nn.Module, edge: Edge, shift: Tensor) -> None:
    """The first half of `apply_shift`: subtracts `shift` [S] from the source's output and repairs nothing."""
    source = edge.source
    name = source.name if isinstance(source, Norm) else source.site.name
    bias = _parameter(block, name, "bias")
    rows = slice(None) if isinstance(source, Norm) else source_rows(edge, bias)
    bias[rows] = (_wide(bias[rows]) - shift.to(bias.device)).to(bias.dtype)
