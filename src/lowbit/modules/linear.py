"""The reference quantized linear: what it computes is the definition that fast layers and exports are held to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..numerics.grid import Grid, fit_range, unit_range
from ..numerics.qtensor import Outliers, QAttention, QLayer
from ..numerics.scales import divided
from ..numerics.spec import E4M3, Spec
from ..numerics.ste import quantize_on, quantize_range
from .attention import attach


def quantize_activation(x: Tensor, spec: Spec, grid: Grid | None, clip: Tensor | None = None) -> Tensor:
    """Fake-quantize inputs [..., I] in fp32 and return them in their own dtype.

    `grid` is the calibrated range of a static format, for static NVFP4 its tensor scale alone; a dynamic format takes
    its range from x itself, of which `clip` [2] may cut a part off both ends. Gradients pass (see `numerics.ste`).
    """
    flat = x.reshape(-1, x.shape[-1])
    if grid is not None:
        quantized = quantize_on(flat, local_grid(flat, grid) if spec.relative else grid)
    elif clip is not None:
        quantized = quantize_range(flat, spec, clip[0], clip[1])
    elif torch.is_grad_enabled() and x.requires_grad:
        quantized = quantize_range(flat, spec)
    else:
        quantized = fit_range(flat, spec).quantize(flat)
    return quantized.to(x.dtype).reshape(x.shape)


def local_grid(x: Tensor, tensor: Grid) -> Grid:
    """The grid of NVFP4 inputs x [T, I] whose tensor scale is calibrated: every group finds its own E4M3 scale.

    It is the arithmetic of those who serve NVFP4, unlike a weight's: the tensor scale comes as its inverse, E4M3's
    subnormal numbers are scales too, and a group that is too small even for them comes out as zeros.
    """
    low, high = unit_range(x, tensor.spec.block)
    inverse = tensor.scale.reciprocal()
    wanted = divided(torch.maximum(low.abs(), high.abs()), tensor.spec.number.largest) * inverse  # type: ignore[union-attr]
    scale = wanted.clamp_max(E4M3.largest).to(torch.float8_e4m3fn).float() / inverse
    return Grid(tensor.spec, torch.where(scale > 0, scale, torch.finfo(torch.float32).max))


class QLinear(nn.Module):
    """y = Q(xP) Ŵᵀ R + b: Ŵ the dequantized weight [O, I], P and R online maps and Q the input format, where there are.

    `weight` is a dense copy of Ŵ in `dtype`, so that code which looks at a linear's weight keeps working.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self, layer: QLayer, bias: Tensor | None, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.layer = layer
        self.out_features, self.in_features = layer.weight.shape
        self.input_grid = None if layer.input_grid is None else layer.input_grid.to(device)
        self.input_map = None if layer.input_map is None else layer.input_map.to(device)
        self.input_clip = None if layer.input_clip is None else layer.input_clip.to(device)
        self.output_map = None if layer.output_map is None else layer.output_map.to(device)
        self.outliers = None if layer.outliers is None else layer.outliers.to(device)
        self.register_buffer("weight", layer.weight.to(device).dequantize(dtype), persistent=False)
        self.register_buffer("bias", None if bias is None else bias.to(device, dtype), persistent=False)

    def mapped(self, x: Tensor) -> Tensor:
        """Inputs [..., I] as the weight expects them, before they are quantized."""
        return x if self.input_map is None else self.input_map.apply(x)

    def quantized(self, x: Tensor) -> Tensor:
        """Mapped inputs [..., I] in the input format."""
        if self.layer.activation is None:
            return x
        return quantize_activation(x, self.layer.activation, self.input_grid, self.input_clip)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., I] to outputs [..., O]."""
        x = self.mapped(x)
        if self.outliers is not None:
            return self._beside_outliers(x, self.outliers)
        if self.output_map is None:
            return F.linear(self.quantized(x), self.weight, self.bias)
        return self._mapped_back(F.linear(self.quantized(x), self.weight))

    def _beside_outliers(self, x: Tensor, outliers: Outliers) -> Tensor:
        """The product where some channels are not quantized: their values are no part of any range either."""
        kept = outliers.of(x)
        inside = self.quantized(x.masked_fill(kept, 0))
        if outliers.weight is None:
            return self._mapped_back(F.linear(torch.where(kept, x, inside), self.weight))
        outside = F.linear(x.masked_fill(~kept, 0), outliers.weight.to(x.dtype))
        return self._mapped_back(F.linear(inside.masked_fill(kept, 0), self.weight) + outside)

    def _mapped_back(self, y: Tensor) -> Tensor:
        y = y if self.output_map is None else self.output_map.apply(y)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shape and formats, for printing a model."""
        parts, lattices, inputs = self.layer.weight.parts, self.layer.weight.lattices, self.layer.activation
        formats = [f"weight {parts[0].grid.spec}"] if parts else []
        formats += [f"weight {' + '.join(lattice.book for lattice in lattices)}"] if lattices else []
        formats += [f"input {inputs}"] if inputs else []
        formats += [f"input map {self.input_map}"] if self.input_map else []
        formats += [f"output map {self.output_map}"] if self.output_map else []
        return ", ".join([f"{self.in_features} -> {self.out_features}", *formats])


def install(
    module: nn.Module,
    layers: Mapping[str, QLayer | QAttention],
    rest: Mapping[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> None:
    """Fill `module` (a block or a model born on meta) with quantized layers and plain parameters, by relative name.

    A sweep, a restart and a load all build quantized blocks here, so each propagates exactly what the others do.
    """
    biases = {f"{name}.bias" for name in layers}
    for name, tensor in rest.items():
        if name in biases:
            continue
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if leaf in owner._buffers:
            born = owner._buffers[leaf]
            owner._buffers[leaf] = tensor.to(device, tensor.dtype if born is None else born.dtype)
        else:
            kind = dtype if tensor.is_floating_point() else tensor.dtype
            setattr(owner, leaf, nn.Parameter(tensor.to(device, kind), requires_grad=False))
    for name, layer in layers.items():
        if isinstance(layer, QAttention):
            moved = layer.to(device)
            attach(module.get_submodule(name), moved.kv, moved.key_map, moved.clips, moved.affine)
            continue
        path, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(path), leaf, QLinear(layer, rest.get(f"{name}.bias"), dtype, device))
