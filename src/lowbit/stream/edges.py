"""What a transform sees of one edge, and how its answer is folded in.

Candidates are tried by calling the inspected module functionally with other weights: nothing is modified, so nothing
has to be restored. Where the inspected module is the one linear itself, its mean squared output change follows from
the Gram matrix, over all tokens and without a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..graph.anatomy import Edge, Norm
from ..graph.fold import source_rows
from ..methods.views import Stats, to_readers, to_source
from ..modules.linear import quantize_activation
from ..numerics.maps import Map
from ..numerics.precision import tensor_cores
from ..numerics.spec import Spec
from ..numerics.stats import AbsMean, MinMax
from .lanes import ALONE, Lanes


def first(output: Any) -> Tensor:
    """The hidden states among a module's outputs."""
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Sample:
    """One recorded call of an inspected module."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@dataclass
class BlockEdge:
    """An `EdgeView`: one edge of a loaded block with its statistics and recorded calls."""

    edge: Edge
    block: nn.Module
    weights: Sequence[Tensor]
    specs: Sequence[Spec | None]
    activations: Sequence[Spec | None]
    stats: Sequence[Stats]
    samples: Sequence[Sample]
    dtype: torch.dtype
    maps: Mapping[str, Map] = field(default_factory=dict)
    """Online maps of linears of the block, which none of the readers is behind."""
    lanes: Lanes = ALONE
    """The processes that have recorded a part of the calls each."""
    _base: dict[str, Tensor] = field(default_factory=dict)

    @property
    def absmean(self) -> Tensor:
        """Mean magnitude of the input channels over all readers' tokens, [I]."""
        merged = AbsMean()
        for stats in self._distinct():
            assert stats.absmean is not None
            merged.merge(stats.absmean)
        return merged.mean

    @property
    def amax(self) -> Tensor:
        """Largest magnitude of the input channels, [I]."""
        return self._range.amax

    @property
    def low(self) -> Tensor:
        """Smallest value of the input channels, [I]."""
        assert self._range.low is not None, "a transform is asked only where inputs were seen"
        return self._range.low

    @property
    def high(self) -> Tensor:
        """Largest value of the input channels, [I]."""
        assert self._range.high is not None, "a transform is asked only where inputs were seen"
        return self._range.high

    @property
    def _range(self) -> MinMax:
        merged = MinMax()
        for stats in self._distinct():
            assert stats.minmax is not None
            merged.merge(stats.minmax)
        return merged

    @cached_property
    def _hessian(self) -> Tensor:
        return self.stats[0].hessian()

    def _distinct(self) -> list[Stats]:
        return list({id(stats): stats for stats in self.stats}.values())

    def to_source(self, x: Tensor) -> Tensor:
        """Reduce reader channels [I] to source channels: the largest of those that read the same one."""
        return to_source(self.edge, x)

    def to_readers(self, scale: Tensor) -> Tensor:
        """Spread a scale over source channels to reader channels [I]."""
        return to_readers(self.edge, scale)

    def error(self, weights: Sequence[Tensor], scale: Tensor, shift: Tensor | None = None) -> float:
        """Mean squared change of the inspected output if the readers held `weights` (given for unscaled inputs)."""
        if inspects_reader(self.edge) and self.activations[0] is None and shift is None:
            difference = weights[0] - self.weights[0]
            tokens = max(1, self.stats[0].tokens)
            with tensor_cores():
                return float(((difference @ self._hessian) * difference).sum() / (tokens * len(difference)))
        return self._replayed_error(weights, scale, shift)

    def _replayed_error(self, weights: Sequence[Tensor], scale: Tensor, shift: Tensor | None) -> float:
        module = self.block.get_submodule(self.edge.inspect)
        if not self._base:
            self._base = {name: tensor.detach().to(self.dtype) for name, tensor in module.named_parameters()}
        candidate = dict(self._base)
        for site, weight, original in zip(self.edge.readers, weights, self.weights, strict=True):
            name = self._relative(site.name)
            candidate[f"{name}.weight".lstrip(".")] = (weight.T if site.transposed else weight).to(self.dtype)
            if shift is not None:  # what comes in is shifted back, and what is repaired is the original's W δ
                path = f"{name}.bias".lstrip(".")
                candidate[path] = (self._base[path].float() + (original - weight) @ shift).to(self.dtype)
        sums: list[Tensor] = []
        with ExitStack() as stack:
            self._quantize_inputs(stack, scale, shift)
            for name, map in self.maps.items():
                stack.callback(self.block.get_submodule(name).register_forward_pre_hook(_mapping(map)).remove)
            for sample in self.samples:
                output = first(functional_call(module, candidate, sample.args, sample.kwargs))
                sums.append((output.float() - sample.output.float()).square().sum())
        counts = [sample.output.numel() for sample in self.samples]
        mine = list(zip(torch.stack(sums).tolist(), counts, strict=True)) if sums else []
        total, count = 0.0, 0
        for error, size in chain.from_iterable(self.lanes.gathered(mine)):  # one by one, whoever has which
            total, count = total + error, count + size
        return total / max(1, count)

    def _relative(self, path: str) -> str:
        return path[len(self.edge.inspect) :].lstrip(".") if self.edge.inspect else path

    def _quantize_inputs(self, stack: ExitStack, scale: Tensor, shift: Tensor | None) -> None:
        """Let the readers see Q((x-δ)/s)·s + δ while the stack is open, where the scheme quantizes their inputs."""
        for site, spec in zip(self.edge.readers, self.activations, strict=True):
            if spec is not None:
                hook = _input_quantizer(spec, scale, torch.zeros_like(scale) if shift is None else shift)
                stack.callback(self.block.get_submodule(site.name).register_forward_pre_hook(hook).remove)


def _input_quantizer(
    spec: Spec, scale: Tensor, shift: Tensor
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = (args[0].float() - shift) / scale
        return ((quantize_activation(x, spec, None) * scale + shift).to(args[0].dtype), *args[1:])

    return hook


def _mapping(map: Map) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (map.apply(args[0]), *args[1:])

    return hook


def inspects_reader(edge: Edge) -> bool:
    """Whether the edge is judged by the output of its only reader, which the Gram matrix alone determines."""
    return len(edge.readers) == 1 and edge.inspect == edge.readers[0].name


def stored_scale(block: nn.Module, edge: Edge, scale: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The scale nearest to `scale` whose folded norm gain is exact in the checkpoint's dtype: folding changes nothing.

    `block` holds fp32 copies of the checkpoint's `tensors`. The gain is what stays in 16 bits; weights are folded in
    fp32 and quantized from there, so rows of a linear take any scale. Channels whose gain is zero keep scale 1.
    """
    if not isinstance(edge.source, Norm):
        return scale
    name, offset = f"{edge.source.name}.weight", edge.source.offset
    gain = block.get_parameter(name).detach() + offset
    stored = (gain / scale - offset).to(tensors[name].dtype).float() + offset
    exact = gain / stored
    return torch.where((stored != 0) & exact.isfinite() & (exact * scale > 0), exact, torch.ones_like(scale))


def stored_shift(block: nn.Module, edge: Edge, scale: Tensor, shift: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The shift nearest to `shift` whose folded source bias (b - δ) / s is exact in the checkpoint's dtype."""
    name = edge.source.name if isinstance(edge.source, Norm) else edge.source.site.name
    bias = block.get_parameter(f"{name}.bias").detach()
    if not isinstance(edge.source, Norm):
        bias = bias[source_rows(edge, bias)]
    stored = ((bias - shift) / scale).to(tensors[f"{name}.bias"].dtype).float()
    return bias - stored * scale
