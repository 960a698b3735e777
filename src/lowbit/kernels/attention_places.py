"""Where the kernels of attention find the scales of a head."""

from __future__ import annotations

from torch import Tensor


def strides(scale: Tensor) -> tuple[int, ...]:
    """From one text, head and token (or group of tokens) to the next, 0 where they share a scale."""
    return tuple(0 if size == 1 else step for size, step in zip(scale.shape[:3], scale.stride()[:3], strict=True))
