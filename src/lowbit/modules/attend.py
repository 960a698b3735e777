"""Attention computed product by product, for what no fused kernel can be asked: int8 matrix products, KIVI as decoded.

A reference, not a fast path: whole score matrices, products in fp64 where integers must be exact. It takes the place of
one module's attention function through the interface by which transformers' model files choose theirs; the module gets
a copy of its configuration, so masks are built as before and no other module notices. Families that write attention
out in their own forward (Bloom, Falcon) are refused.

Shape letters: B batch, H query heads, K key-value heads, T tokens, S tokens seen, h head width.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .attention import LayerKV, attached

Weigh = Callable[[Tensor], Tensor]
"""q·k [B, H, T, S] -> probabilities in fp32: scaling, soft cap, mask and softmax, each exactly once."""

_NAME = "lowbit"
_STATE, _CONFIG = "lowbit_products", "lowbit_config"
LARGEST = 127
"""Of int8 codes and of probabilities, whose scale is 1/127 whatever the data."""


class Products(Protocol):
    """Both matrix products of an attention."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, weigh: Weigh) -> Tensor:
        """query [B, H, T, h], key and value [B, K, S, h] -> output [B, H, T, h]."""


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x.repeat_interleave(heads // x.shape[1], 1)


class Int8Products:
    """QK' and PV in int8 with int32 sums (ZeroQuant, SmoothQuant): static symmetric scales of q, k and v per tensor.

    Until `freeze` it computes exactly and remembers the largest values. `per_token` takes the scales of q and k from
    each token instead, the stricter simulation; v keeps its calibrated one, which has to leave the sum over tokens.
    """

    def __init__(self, *, per_token: bool = False) -> None:
        self.per_token = per_token
        self.watching = True
        self.amax = torch.zeros(3)

    def freeze(self) -> None:
        """Fixes the scales. Raises ValueError where nothing was seen."""
        if not self.amax.all():
            raise ValueError("8-bit attention needs calibration: run the model before freezing its scales")
        self.watching = False

    def _scale(self, x: Tensor, index: int) -> Tensor:
        if self.per_token and index < 2:
            largest = x.abs().amax(-1, keepdim=True).double()
            return torch.where(largest > 0, largest, 1.0) / LARGEST
        return self.amax[index].to(x.device).double() / LARGEST

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, weigh: Weigh) -> Tensor:
        heads = query.shape[1]
        if self.watching:
            largest = torch.stack([x.detach().abs().amax().float().cpu() for x in (query, key, value)])
            self.amax = torch.maximum(self.amax, largest)
            return weigh(query @ _repeat(key, heads).mT).to(value.dtype) @ _repeat(value, heads)
        scales = [self._scale(x, index) for index, x in enumerate((query, key, value))]
        q, k, v = (
            (x.double() / scale).round().clamp(-LARGEST, LARGEST)
            for x, scale in zip((query, key, value), scales, strict=True)
        )
        k_scale = scales[1] if scales[1].ndim == 0 else _repeat(scales[1], heads).mT
        probabilities = weigh((q @ _repeat(k, heads).mT) * (scales[0] * k_scale))
        output = quantize_probabilities(probabilities).double() @ _repeat(v, heads)
        return (output * (scales[2] / LARGEST)).to(value.dtype)


def quantize_probabilities(probabilities: Tensor) -> Tensor:
    """Codes 0 … 127 of the fixed scale 1/127, uint8; a row of S of them sums to 1 within S/254."""
    return (probabilities * LARGEST).round().to(torch.uint8)


class DecodedKIVI:
    """What token-by-token decoding through a KIVI cache computes, for all queries of one forward at once.

    Query i finds the keys before ⌊i/R⌋R and the values before i - R quantized, all others exact; so text can be scored
    without a cache. With a quantized cache the cache itself decides, and this stands aside.
    """

    def __init__(self, layer: LayerKV) -> None:
        self.layer = layer

    def _stored(self, x: Tensor, side: int) -> Tensor:
        """What the cache would hold of x once all whole groups are codes."""
        part = self.layer.parts[side]
        if part is None:
            return x
        whole = x.shape[2] // part.tokens * part.tokens
        return torch.cat([self.layer.stored(x[:, :, :whole], side), x[:, :, whole:]], 2)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, weigh: Weigh) -> Tensor:
        heads, residual = query.shape[1], self.layer.kv.residual
        exact = (_repeat(key, heads), _repeat(value, heads))
        if self.layer.cached:
            return weigh(query @ exact[0].mT).to(value.dtype) @ exact[1]
        coded = (_repeat(self._stored(key, 0), heads), _repeat(self._stored(value, 1), heads))
        i = torch.arange(query.shape[2], device=query.device)[:, None]
        j = torch.arange(key.shape[2], device=query.device)
        scores = torch.where(j < i // residual * residual, query @ coded[0].mT, query @ exact[0].mT)
        probabilities = weigh(scores).to(value.dtype)
        old = j < i - residual
        return (probabilities * old) @ coded[1] + (probabilities * ~old) @ exact[1]


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; returns [B, T, H, h]."""
    unknown = next((name for name in ("s_aux", "position_bias") if kwargs.get(name) is not None), None)
    if unknown:
        raise ValueError(f"{type(module).__name__} weighs attention with {unknown}, which only its own function knows")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    factor = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling

    def weigh(scores: Tensor) -> Tensor:
        scores = scores * factor
        if softcap is not None:
            scores = (scores / softcap).tanh() * softcap
        mask = attention_mask
        if mask is None and causal and scores.shape[2] > 1:
            mask = torch.ones(scores.shape[2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        probabilities = scores.softmax(-1, dtype=torch.promote_types(torch.float32, query.dtype))
        return nn.functional.dropout(probabilities, dropout, module.training)

    return getattr(module, _STATE)(query, key, value, weigh).transpose(1, 2).contiguous(), None


def replace_products(attention: nn.Module, products: Products) -> None:
    """Lets `products` compute both matrix products of one attention module.

    Raises ValueError for a family whose attention does not go through transformers' attention interface.
    """
    interface = getattr(sys.modules[type(attention).__module__], "ALL_ATTENTION_FUNCTIONS", None)
    if interface is None or not hasattr(attention, "config"):
        family = getattr(getattr(attention, "config", None), "model_type", type(attention).__name__)
        raise ValueError(f"{family} computes attention in its own code, where its matrix products cannot be replaced")
    restore_products(attention)
    interface.register(_NAME, _forward)
    setattr(attention, _STATE, products)
    setattr(attention, _CONFIG, attention.config)
    config: Any = copy.copy(attention.config)
    config._attn_implementation = _NAME
    attention.config = config


def restore_products(attention: nn.Module) -> None:
    """Undoes `replace_products`; does nothing where nothing was replaced."""
    if hasattr(attention, _STATE):
        attention.config = getattr(attention, _CONFIG)
        delattr(attention, _STATE)
        delattr(attention, _CONFIG)


def decode_kivi(attention: nn.Module) -> None:
    """Makes forwards without a cache compute what decoding with the attached KIVI would.

    Raises ValueError where no KIVI is attached, or the attention function cannot be replaced.
    """
    layer = attached(attention).get("")
    if layer is None or layer.kv.layout != "channel":
        raise ValueError("only the channel layout (KIVI) decodes otherwise than it reads: attach it first")
    replace_products(attention, DecodedKIVI(layer))
