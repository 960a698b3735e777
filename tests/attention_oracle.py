"""Attention of single queries by its formula, for kernels to be held to."""

from __future__ import annotations

import torch
from torch import Tensor


def by_formula(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax of q kᵀ, head by head, in fp64."""
    out = torch.zeros_like(query, dtype=torch.float64)
    group = query.shape[1] // keys.shape[1]
    for text in range(len(query)):
        for head in range(query.shape[1]):
            scores = keys[text, head // group].double() @ query[text, head, 0].double() * scale
            if mask is not None:
                scores[~mask[text % len(mask), 0, 0, : len(scores)]] = -torch.inf
            out[text, head, 0] = scores.softmax(0) @ values[text, head // group].double()
    return out
