"""Perplexity as the GPTQ family defines it: exp of the mean loss of windows that do not overlap.

Here are the definition and its result; the pass over a text that feeds it is ``text.py``. T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Perplexity:
    """Perplexity over ``windows`` windows of ``window`` tokens; ``tokens`` of them were predicted and scored."""

    perplexity: float
    windows: int
    window: int
    tokens: int


def token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats of fp32 ``logits`` [T, V] against the ids ``labels`` [T]: [T]."""
    return F.cross_entropy(logits, labels, reduction="none")


def perplexity_of(window_losses: Sequence[float], window: int) -> Perplexity:
    """The perplexity of windows of ``window`` tokens, each given by the mean loss of its ``window`` - 1 predictions."""
    mean = math.fsum(window_losses) / len(window_losses)
    value = math.exp(mean) if mean < 700 else math.inf
    return Perplexity(value, len(window_losses), window, len(window_losses) * (window - 1))
