"""Where the kernels of attention find what belongs to a head: the parts of it that are done, and its scales."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def arrived(device: torch.device, count: int) -> Tensor:
    """How many splits of a head are done: zeros, between two calls of one stream. Made before anything is recorded."""
    return torch.zeros(count, dtype=torch.int32, device=device)


def strides(scale: Tensor) -> tuple[int, ...]:
    """From one text, head and token (or group of tokens) to the next, 0 where they share a scale."""
    return tuple(0 if size == 1 else step for size, step in zip(scale.shape[:3], scale.stride()[:3], strict=True))
