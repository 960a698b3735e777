"""The three honest sizes of a model, so that no figure can flatter by leaving something out."""

from __future__ import annotations

from pathlib import Path

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


def size_on_disk(directory: str | Path) -> int:
    """Bytes of a model's weight files; tokenizer, configuration and reports are not counted."""
    return sum(path.stat().st_size for pattern in WEIGHT_FILES for path in Path(directory).glob(pattern))
