"""The three honest sizes of a model, so that no figure can flatter by leaving something out."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..formats import native
from ..modules.linear import QLinear
from ..numerics.qtensor import QLayer

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


def bits_per_weight(stored_bytes: int, weights: int) -> float:
    """Bits of everything stored for the quantized sites over the weights they had.

    Args:
        stored_bytes: codes, scales, zeros, masks, outliers, low rank and online maps of the quantized sites.
        weights: the number of weights of those sites in the original.
    """
    return 8 * stored_bytes / weights


def bits_per_parameter(file_bytes: int, parameters: int) -> float:
    """Bits of the whole weight files over all parameters of the original model, embeddings and norms included."""
    return 8 * file_bytes / parameters


def stored_for(model: nn.Module) -> tuple[int, int]:
    """(bytes, weights) of the quantized linears of a loaded model, whatever files it came from.

    Bytes are those of lowbit's own layout, so that models of all formats are counted alike.
    """
    stored = weights = 0
    for module in model.modules():
        if isinstance(module, QLinear) and module.layer.weight.dense is None:
            weight = module.layer.weight
            masked = weight.regions is not None or weight.sparse is not None  # how many bytes is for the masks to say
            tensors = native.pack("", module.layer if masked else on_meta(module.layer)).values()
            stored += sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
            weights += weight.shape.numel()
    return stored, weights


def parameters_of(model: nn.Module) -> int:
    """Parameters of a loaded model, those of quantized linears among them; shared ones count once."""
    linears = [module for module in model.modules() if isinstance(module, QLinear)]
    held = sum(module.weight.numel() + (0 if module.bias is None else module.bias.numel()) for module in linears)
    return held + sum(parameter.numel() for parameter in model.parameters())


def on_meta(layer: QLayer) -> QLayer:
    """A layer's shapes without its values."""
    terms = (layer.input_grid, layer.input_map, layer.input_clip, layer.output_map, layer.outliers)
    grid, map, clip, back, outliers = (None if term is None else term.to("meta") for term in terms)
    return QLayer(layer.weight.to("meta"), layer.activation, grid, map, clip, back, outliers)  # type: ignore[arg-type]


def size_on_disk(directory: str | Path) -> int:
    """Bytes of a model's weight files; tokenizer, configuration and reports are not counted."""
    if Path(directory).is_file():
        return Path(directory).stat().st_size
    return sum(path.stat().st_size for pattern in WEIGHT_FILES for path in Path(directory).glob(pattern))
