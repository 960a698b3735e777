"""FP8 as DeepSeek-V3 and its kin are released: read, not written (compressed-tensors carries the same codes further).

    weight            E4M3 codes [O, I]
    weight_scale_inv  one factor per square of `weight_block_size`, despite its name what a code is multiplied by
    weight_scale      one factor for the whole tensor, or one per row, where there are no squares
    input_scale       one factor of all inputs, where they are static

Squares belong to inputs that are quantized as the kernels do, per token and as many columns as a square is wide.
Without squares, inputs have one range per token or one that was calibrated. Where factors are said to be powers of two
(`scale_fmt: ue8m0`), those of inputs are rounded up to one. A linear is quantized if it has a factor, whatever
config.json lists as left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..numerics.grid import Grid
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.spec import E4M3, ScaleDtype, Spec, per_channel, per_tensor

METHOD = "fp8"
_FACTORS = ("weight_scale_inv", "weight_scale")
_INPUT = ("input_scale", "activation_scale")
_STORED: dict[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e8m0fnu: "e8m0",
}


def recognizes(config: Mapping[str, Any]) -> bool:
    """Whether a directory with this config.json holds FP8 weights of this kind."""
    return (config.get("quantization_config") or {}).get("quant_method") == METHOD


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(quantized linears by module name, every other tensor) of whole modules' tensors, by their file names.

    Raises ValueError, in one sentence, for layouts that are not described above.
    """
    stated = config["quantization_config"]
    rest, found = dict(tensors), {}
    for name in [tensor.removesuffix(".weight") for tensor in tensors if tensor.endswith(".weight")]:
        factor = next((rest.pop(f"{name}.{key}") for key in _FACTORS if f"{name}.{key}" in rest), None)
        if factor is None:
            continue
        calibrated = next((rest.pop(f"{name}.{key}") for key in _INPUT if f"{name}.{key}" in rest), None)
        found[name] = _layer(name, rest.pop(f"{name}.weight"), factor, calibrated, stated)
    return found, rest


def _layer(name: str, weight: Tensor, factor: Tensor, calibrated: Tensor | None, stated: Mapping[str, Any]) -> QLayer:
    if weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name} is stored as {weight.dtype}, and lowbit reads FP8 models of E4M3 weights only")
    spec = _weights(name, weight, factor, stated)
    square = spec.square
    scale = factor.float().reshape(factor.shape if square else (-1, 1))
    part = QTensor(weight.view(torch.uint8), Grid(spec, scale))
    if stated.get("activation_scheme", "dynamic") == "static" and calibrated is not None:
        inputs = per_tensor(E4M3, scale="float32")
        return QLayer(QWeight((part,)), inputs, Grid(inputs, calibrated.float().reshape(1, 1)))
    rounded: ScaleDtype = "e8m0-rceil" if stated.get("scale_fmt") == "ue8m0" else "float32"
    inputs = Spec(E4M3, (1, spec.group if square else -1), rounded, dynamic=True)
    return QLayer(QWeight((part,)), inputs)


def _weights(name: str, weight: Tensor, factor: Tensor, stated: Mapping[str, Any]) -> Spec:
    """The format of a weight, from the shape of its factors."""
    rows, columns = weight.shape
    size, kind = stated.get("weight_block_size"), _STORED[factor.dtype]
    if size:
        block = int(size[0]), int(size[1])
        if factor.shape == (-(-rows // block[0]), -(-columns // block[1])):
            return Spec(E4M3, block, kind)
    elif factor.numel() == 1:
        return per_tensor(E4M3, scale=kind)
    elif factor.numel() == rows:
        return per_channel(E4M3, scale=kind)
    raise ValueError(
        f"{name} has factors of shape {list(factor.shape)} for a weight of {rows} x {columns}, which "
        f"weight_block_size {size} does not explain: take config.json and weights from the same model"
    )
