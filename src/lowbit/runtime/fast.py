"""Linears that compute on codes, for models that run on a GPU: what `load` puts where `QLinear` would stand.

A fast layer holds its codes as the kernels read them and no dense copy, so a 4-bit model takes a quarter of the memory
too. Each is held to the reference: `modules.linear.QLinear` on the same `QLayer` gives the same numbers but for the
order of sums. What no kernel takes (a format, a dtype, a device) stays a QLinear that says why (`extra_repr`).

Whole layers are one operator to `torch.compile`, which cannot look into launches through the driver: it gets a layer's
number and the shape of the result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import fields
from itertools import count
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ..kernels import codes_product, encoder, layout, weight_only
from ..kernels.compile import available
from ..modules.linear import QLinear, install
from ..numerics.qtensor import QAttention, QLayer
from ..numerics.spec import per_token

_KNOWN = ("weight", "activation", "input_grid", "input_map", "input_clip")
"""What of a QLayer the fast layers know how to compute."""
_NUMBERS = count()
_LAYERS: WeakValueDictionary[int, FastLinear | Merged] = WeakValueDictionary()


class FastLinear(nn.Module):
    """y = Q(xP) Ŵᵀ + b on codes, without gradients; see `QLinear`, which is its definition."""

    bias: Tensor | None

    def __init__(self, layer: QLayer, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.out_features, self.in_features = layer.weight.shape
        self.formats = f"weight {layer.weight.parts[0].grid.spec}"
        if layer.activation is not None:
            self.formats += f", input {layer.activation}"
        if layer.input_map is not None:
            self.formats += f", input map {layer.input_map.describe()}"
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype), persistent=False)
        self.dtype = dtype
        self.merged: Merged | None = None
        self.index = 0
        self.number = next(_NUMBERS)
        _LAYERS[self.number] = self

    @abstractmethod
    def compute(self, x: Tensor) -> Tensor:
        """Inputs [..., I] to outputs [..., O]."""

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., I] to outputs [..., O]."""
        return _run(self, x) if self.merged is None else self.merged.part(self.index, x)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """A dense copy of Ŵ, made anew, for code that looks at a linear's weight."""

    def extra_repr(self) -> str:
        """Shape and formats, for printing a model."""
        return f"{self.in_features} -> {self.out_features}, {self.formats}"


class Merged:
    """Linears that share an input as one (`siblings`): the first that is called computes for all."""

    def __init__(self, compute: Callable[[Tensor], Tensor], sizes: list[int]) -> None:
        self.compute, self.sizes = compute, sizes
        """Inputs [..., I] to the outputs of all, side by side, and how many are whose."""
        self.number, self.out_features = next(_NUMBERS), sum(sizes)
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()
        _LAYERS[self.number] = self

    def part(self, index: int, x: Tensor) -> Tensor:
        """The outputs of one for inputs that it has in common with the others, as far as it was called after them."""
        if self._input is not x:
            self._input, self._parts = x, _run(self, x).split(self.sizes, -1)
        found = self._parts[index]
        if index == len(self.sizes) - 1:
            self._input, self._parts = None, ()
        return found


class WeightOnlyLinear(FastLinear):
    """Codes of the weight times 16-bit inputs (`kernels.weight_only`)."""

    def __init__(self, layer: QLayer, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(layer, bias, dtype, device)
        self.codes = layout.prepare(layer.weight.parts[0].to(device))
        self.input_map = None if layer.input_map is None else layer.input_map.to(device)

    def compute(self, x: Tensor) -> Tensor:
        return weight_only.linear(x if self.input_map is None else self.input_map.apply(x), self.codes, self.bias)

    @property
    def weight(self) -> Tensor:
        values = weight_only.values(self.codes).to(self.dtype)
        if self.codes.order is None:
            return values
        natural = torch.empty_like(values)
        natural[:, self.codes.order] = values
        return natural


class CodesLinear(FastLinear):
    """Codes of the weight times codes of the inputs (`kernels.codes_product`)."""

    def __init__(self, layer: QLayer, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__(layer, bias, dtype, device)
        assert layer.activation is not None
        self.encoder = encoder.encoder(layer.activation.number, layer.input_map, layer.input_clip, device)
        self.codes = codes_product.operand(layer.weight.parts[0].to(device), layer.activation.number)

    def compute(self, x: Tensor) -> Tensor:
        return multiplied(x, self.encoder, self.codes, self.bias)

    @property
    def weight(self) -> Tensor:
        return (self.codes.codes.float() * self.codes.scale[:, None]).to(self.dtype)


def multiplied(x: Tensor, how: encoder.Encoder, codes: codes_product.Operand, bias: Tensor | None) -> Tensor:
    """`codes_product.linear`, which has no gradients. Raises ValueError where one is asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise ValueError("codes have no gradients: load the model with fast=False to differentiate through it")
    return codes_product.linear(x, how, codes, bias)


class ReferenceLinear(QLinear):
    """A QLinear among fast layers, and why it is one."""

    def __init__(
        self, reason: str, layer: QLayer, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        super().__init__(layer, bias, dtype, device)
        self.reason = reason

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dense since {self.reason}"


def refusal(layer: QLayer, dtype: torch.dtype, device: torch.device | str) -> str | None:
    """Why a layer cannot be a fast one there, or None."""
    place = torch.device(device)
    if place.type != "cuda" or not available(place.index or 0):
        return "the kernels know Hopper GPUs only"
    if dtype not in (torch.bfloat16, torch.float16):
        return "the kernels compute in 16 bits only"
    if not layer.weight.plain or layer.weight.parts[0].region is not None:
        return "the weight is more than one set of codes"
    if (unknown := _unknown(layer)) is not None:
        return f"no kernel knows its {unknown}"
    if layer.activation is None:
        return layout.refusal(layer.weight.parts[0])
    if layer.activation != per_token(layer.activation.number) or layer.input_grid is not None:
        return f"inputs are {layer.activation}, not dynamic per token"
    if layer.weight.shape[1] % codes_product.MULTIPLE:
        return f"its inputs are no multiple of {codes_product.MULTIPLE}"
    number = layer.activation.number
    return encoder.refusal(number) or codes_product.refusal(layer.weight.parts[0], number)


def install_fast(
    module: nn.Module,
    layers: Mapping[str, QLayer | QAttention],
    rest: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """What `modules.linear.install` does, with fast layers wherever there are any."""
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, QLayer)}
    biases = {f"{name}.bias" for name in linears}
    others = {name: layer for name, layer in layers.items() if name not in linears}
    install(module, others, {name: part for name, part in rest.items() if name not in biases}, dtype, device)
    for name, layer in linears.items():
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, build(layer, rest.get(f"{name}.bias"), dtype, device))


def build(layer: QLayer, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str) -> nn.Module:
    """The fastest layer there is for a QLayer."""
    reason = refusal(layer, dtype, device)
    if reason is not None:
        return ReferenceLinear(reason, layer, bias, dtype, device)
    kind = WeightOnlyLinear if layer.activation is None else CodesLinear
    return kind(layer, bias, dtype, device)


def slow(model: nn.Module) -> dict[str, int]:
    """Why linears of a model are dense ones, and how many each reason holds back."""
    return dict(Counter(module.reason for module in model.modules() if isinstance(module, ReferenceLinear)))


def _unknown(layer: QLayer) -> str | None:
    """What a layer has that no kernel computes, whatever will be added to it one day."""
    names = (field.name for field in fields(layer) if field.name not in _KNOWN)
    return next((name.replace("_", " ") for name in names if getattr(layer, name) is not None), None)


_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define("fast_linear(Tensor x, int layer, int outputs) -> Tensor")


def _run(layer: FastLinear | Merged, x: Tensor) -> Tensor:
    """A layer's outputs, as one operator where something looks on that cannot look inside."""
    if torch.compiler.is_compiling():
        return torch.ops.lowbit.fast_linear(x, layer.number, layer.out_features)
    return layer.compute(x)


def _call(x: Tensor, layer: int, outputs: int) -> Tensor:
    return _LAYERS[layer].compute(x)


def _shape(x: Tensor, layer: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


_LIBRARY.impl("fast_linear", _call, "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::fast_linear", _shape, lib=_LIBRARY)
