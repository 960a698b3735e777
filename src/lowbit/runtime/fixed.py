"""A key-value cache of fixed length that holds codes, for the decoder that records its steps.

`QuantizedLayer` grows, and gives attention a dequantized copy of all it holds; a recorded step can do neither. Here all
tensors have their full length from the beginning, a token is written where a number on the device says, and attention
reads the codes themselves. A prompt goes through a `QuantizedLayer` that lives as long as that call, and its codes are
copied; a token behind it is encoded as that layer would. So both caches hold the same codes, and see the same.

The kernels have instructions written by hand and go through whatever Triton is installed, and wrong numbers would make
fluent nonsense. So each format is tried once on each GPU before its kernels are used (`proved`); where they do not
compute what they should, their definitions do.

Whether a module's attention passes keys and values straight on to the decoder's attention function is seen in the
prompt. Where it does, single tokens get no keys and values at all, and attend to `Layer.attend`. Where it does not
(latents that are expanded first, families with code of their own), they get the dequantized cache.

Shape letters: B texts, H heads, K key-value heads, T tokens, L positions, h head width.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from ..kernels import cache_append, cache_attention
from ..kernels.cache_append import empty, fill
from ..kernels.cache_attention import Held
from ..modules.attention import LayerKV, attached
from ..numerics.kv import KV
from .cache import KEYS, VALUES, QuantizedLayer

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class Layer:
    """One layer of a cache of `length` tokens: one prompt, and then single tokens, until it is reset.

    `kernels` says whether kernels may write and read codes; None leaves it to `proved`.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, quantized: LayerKV, length: int, kernels: bool | None = None) -> None:
        self.quantized, self.length, self.kernels = quantized, length, kernels
        self.held: tuple[Held, Held] | None = None
        self.direct = False
        """Whether attention asks this layer itself."""
        self.is_initialized = False
        self._given: tuple[ref[Tensor], ref[Tensor]] | None = None

    @property
    def is_compileable(self) -> bool:
        """A prompt fills all that it gets, so it needs no mask; a token behind it always does."""
        return self.is_initialized

    def reset(self) -> None:
        """Forgets all tokens, and keeps its tensors."""
        self.is_initialized = False

    def update(self, keys: Tensor, values: Tensor, *_args: object, **_kwargs: object) -> tuple[Tensor, Tensor]:
        """Stores a prompt, or one token behind it, and returns what its queries may see (see `direct`)."""
        if not self.is_initialized:
            return self._begin(keys, values)
        assert self.held is not None and keys.shape[2] == 1, "a prompt is followed by single tokens"
        encode = (partial(self.quantized.encode, side=KEYS), partial(self.quantized.encode, side=VALUES))
        if self.kernels:
            mapped = self.inverse is not None
            cache_append.append(*self.held, (keys, values), self.count, self.prompt, encode, self.clips, mapped)
        else:
            for held, new, make in zip(self.held, (keys, values), encode, strict=True):
                cache_append.reference(held, new, self.count, self.prompt, make)
        self.count.add_(1)
        return (keys, values) if self.direct else self.read(keys.dtype)

    def _begin(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        growing = QuantizedLayer(self.quantized)
        seen = growing.update(keys, values)
        if self.held is None:
            self._make(keys, values)
        assert self.held is not None
        for held, store in zip(self.held, growing.stores, strict=True):
            fill(held, store.encoded, store.exact)
        self.count.fill_(keys.shape[2])
        self.prompt.fill_(keys.shape[2])
        self.is_initialized = True
        self._given = ref(seen[0]), ref(seen[1])
        return seen

    def _make(self, keys: Tensor, values: Tensor) -> None:
        layer, window = self.quantized, self.quantized.kv.residual
        self.inverse, self.clips = layer.key_inverse(keys), layer.clips
        self.count, self.prompt = (torch.zeros((), dtype=torch.long, device=keys.device) for _ in range(2))
        sides = [
            empty(
                x, part, partial(layer.encode, side=side), self.length,
                window=window, whole=side == KEYS, affine=layer.affine[side],
            )
            for side, (x, part) in enumerate(zip((keys, values), layer.parts, strict=True))
        ]  # fmt: skip
        self.held = (sides[KEYS], sides[VALUES])
        if self.kernels is None:
            self.kernels = proved(layer.kv, keys.shape[3], keys.dtype, keys.device)

    def meets(self, keys: Tensor, values: Tensor) -> bool:
        """Attention tells with which keys and values it was called, and hears whether to ask this layer instead."""
        if self._given is None:
            return self.direct
        self.direct = self._given[0]() is keys and self._given[1]() is values  # a prompt's
        self._given = None
        return False

    def read(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [B, K, L, h] of all positions; those that were not written yet hold anything."""
        assert self.held is not None, "nothing was stored"
        keys, values = self.held
        return keys.read(self.count, dtype, self.inverse), values.read(self.count, dtype)

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """What the newest token's query [B, H, 1, h] finds: [B, H, 1, h]."""
        assert self.held is not None, "nothing was stored"
        find = cache_attention.attend if self.kernels else cache_attention.reference
        return find(query, *self.held, self.count, mask, scale, self.inverse)

    def get_seq_length(self) -> Any:
        """Tokens that are stored: a number on the device, behind a prompt."""
        return self.count if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys and values that the next `query_length` queries are given, position of the first of them)."""
        return (self.length if self.is_initialized else query_length), 0

    def get_max_length(self) -> int:
        """Tokens that there is room for."""
        return self.length

    @property
    def bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(part.nbytes for held in self.held or () for part in held.tensors)


@cache
def proved(kv: KV, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels for a format may be used on a device: warns where they may not."""
    if device.type != "cuda" or agree(kv, width, dtype, device):
        return True
    warnings.warn(
        f"the kernels for {kv} do not compute on {torch.cuda.get_device_name(device)} what they should: such caches "
        "are read and written by torch instead, which is slower; please report it",
        stacklevel=2,
    )
    return False


@torch.no_grad()
def agree(kv: KV, width: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether kernels write into a small cache what their definitions do, and find in it what those find."""
    plain = replace(kv, layout="token") if kv.static else kv  # to the kernels, a scale that all tokens share
    prompt, steps = 2 * kv.residual + 70, kv.residual + 2
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2, 1, 2, prompt + steps, width, generator=generator, device=device).to(dtype)
    query = torch.randn(1, 8, 1, width, generator=generator, device=device).to(dtype)
    tried, definition = (Layer(LayerKV(plain), prompt + steps, kernels) for kernels in (True, False))
    for layer in (tried, definition):
        for part in x.split([prompt, *[1] * steps], 3):
            layer.update(*part)
    assert tried.held is not None and definition.held is not None
    found, wanted = (layer.attend(query, None, width**-0.5).float() for layer in (tried, definition))
    near = (found - wanted).abs() <= 0.02 * wanted.abs().max()
    sides = zip(tried.held, definition.held, strict=True)
    same = all(torch.equal(a, b) for one, other in sides for a, b in zip(one.tensors, other.tensors, strict=True))
    return same and bool(near.all())


def fixed_cache(model: PreTrainedModel, length: int) -> Cache:
    """An empty cache for `length` tokens of a model with quantized keys and values, all of full attention."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(Layer)
    found = {model.get_submodule(path).layer_idx: layer for path, layer in attached(model).items()}
    count = model.config.get_text_config().num_hidden_layers
    return Cache(layers=[Layer(found.get(index) or LayerKV(KV()), length) for index in range(count)])
