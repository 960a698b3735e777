"""Quantized keys and values inside an attention module, wherever its cache stands, even where it has none.

Every decoder hands its keys and values to a cache in one call, `update`, and goes on with what it gets back. That call
is the seam: a hook puts a stand-in before the module's cache (or in the place of one that is not there), and what
passes through it is quantized. So one mechanism serves evaluation without a cache, training, transformers' own caches
and every family, whether or not its attention goes through transformers' attention interface; and what is quantized is
what is stored: keys after rotary embedding, the heads before repetition, the latents of multi-head latent attention.

A key map P (k P is quantized) needs no counterpart on the queries: q P^-T (k P)' = q ((k P) P^-1)', so keys are mapped
back after they are dequantized. The inverse is of head width, and the queries of all heads stay untouched.

Shape letters: B batch, H heads, K key-value heads, T tokens, h head width. Tensors are [B, K, T, h].
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.kv import KV, Affine, Encoded, Quantizer, decode, encode, fake_quantize, fit
from ..numerics.maps import Map

CACHE_ARGUMENTS = ("cache", "past_key_values", "past_key_value", "layer_past")
"""What models and attention modules call their cache; transformers 5.24 renamed it."""
_ATTACHED, _HANDLE = "lowbit_kv", "lowbit_kv_hook"


class LayerKV:
    """The key and value quantizers of one attention module, with what is learned or calibrated for them.

    `clips` [2, 2] are the parts of both ends of the range that keys (row 0) and values (row 1) keep. `affine` are the
    calibrated scales of a static layout, for keys and for values; without them it watches ranges, and quantizes
    nothing, until `freeze`. All tensors are on the module's device.
    """

    def __init__(
        self,
        kv: KV,
        key_map: Map | None = None,
        clips: Tensor | None = None,
        affine: Sequence[Affine | None] = (None, None),
    ) -> None:
        if clips is not None and kv.static:
            raise ValueError("clips belong to ranges that are read from each token: a static layout calibrates its own")
        self.kv, self.key_map, self.clips = kv, key_map, clips
        self.parts = (kv.key_quantizer, kv.value_quantizer)
        self.affine = list(affine)
        self._seen: list[tuple[Tensor, Tensor] | None] = [None, None]
        self.cached = False
        """Whether the module's last call came with a cache that stores codes itself."""
        self.held: Any = None
        """The layer of a cache that attention may ask for what its token sees, instead of taking keys and values."""
        self.key_width = 0
        """Width of the keys of the module's last call."""

    @property
    def watching(self) -> bool:
        """Whether ranges of a static layout are still being collected."""
        sides = zip(self.parts, self.affine, strict=True)
        return any(part is not None and part.static and affine is None for part, affine in sides)

    def freeze(self) -> None:
        """Fixes the ranges of a static layout to what was seen. Raises ValueError where nothing was."""
        for side, part in enumerate(self.parts):
            if part is None or not part.static:
                continue
            seen = self._seen[side]
            if seen is None:
                raise ValueError("static key-value ranges need calibration: run the model before freezing them")
            self.affine[side] = fit(*seen, part)

    def key_inverse(self, like: Tensor) -> Tensor | None:
        """P^-1 [h, h] in fp32, None without a key map."""
        if self.key_map is None or self.parts[0] is None:
            return None
        return self.key_map.inverse_weight(torch.eye(like.shape[-1], device=like.device)).T

    def _clip(self, side: int) -> Tensor | None:
        return None if self.clips is None else self.clips[side]

    def _mapped(self, x: Tensor, side: int) -> Tensor:
        if side or self.key_map is None:
            return x.float()
        if self.key_map.width != x.shape[-1]:
            raise ValueError(f"the key map has width {self.key_map.width}, the keys that are cached {x.shape[-1]}")
        return self.key_map.apply(x.float())

    def _watch(self, x: Tensor, side: int, part: Quantizer) -> Tensor:
        low, high = part.range(self._mapped(x.detach(), side))
        seen = self._seen[side]
        self._seen[side] = (low, high) if seen is None else (torch.minimum(low, seen[0]), torch.maximum(high, seen[1]))
        return x

    def fake(self, x: Tensor, side: int) -> Tensor:
        """Keys (side 0) or values (side 1) as attention sees them, in x's dtype; differentiable. 16 bits pass as is."""
        part = self.parts[side]
        if side == 0:
            self.key_width = x.shape[-1]
        if part is None or self.kv.layout == "channel":
            return x  # KIVI attends to exact values until it has stored them
        return self._watch(x, side, part) if self.watching else self.stored(x, side)

    def stored(self, x: Tensor, side: int) -> Tensor:
        """What a cache gives back of keys or values that it holds as codes, in x's dtype; differentiable."""
        part = self.parts[side]
        assert part is not None, "16-bit keys and values have no codes"
        y = fake_quantize(self._mapped(x, side), part, affine=self.affine[side], clip=self._clip(side))
        inverse = None if side else self.key_inverse(x)
        return (y if inverse is None else y @ inverse).to(x.dtype)

    def encode(self, x: Tensor, side: int) -> Encoded:
        """Codes of what `stored` returns."""
        part = self.parts[side]
        assert part is not None, "16-bit keys and values have no codes"
        return encode(self._mapped(x, side), part, affine=self.affine[side], clip=self._clip(side))

    def decode(self, encoded: Encoded, side: int, like: Tensor, inverse: Tensor | None) -> Tensor:
        """Values of codes in the width and dtype of `like`; `inverse` is `key_inverse`."""
        part = self.parts[side]
        assert part is not None, "16-bit keys and values have no codes"
        y = decode(encoded, part, like.shape[-1], affine=self.affine[side])
        return (y if inverse is None else y @ inverse).to(like.dtype)


class _Through:
    """Stands in for a module's cache: quantizes what passes, then asks the real cache where there is one."""

    def __init__(self, layer: LayerKV, cache: Any) -> None:
        self._layer, self._cache = layer, cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self._layer.kv.layout == "channel" and self._cache is not None and self._cache.get_seq_length(*args[:1]):
            raise ValueError("KIVI decodes with its own cache only: pass quantized_cache(model)")
        keys, values = self._layer.fake(keys, 0), self._layer.fake(values, 1)
        return (keys, values) if self._cache is None else self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def cache_argument(module: nn.Module) -> tuple[str, int] | None:
    """Name and position of the argument by which a module takes its cache, None where it takes none.

    Its class is asked, since a module's own `forward` may be somebody's wrapper.
    """
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return next(((name, names.index(name)) for name in CACHE_ARGUMENTS if name in names), None)


def as_cache(module: nn.Module, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a model, or its `generate`, is called with a cache."""
    found = cache_argument(module)
    assert found is not None, "a decoder takes a cache"
    return {found[0]: cache}


def attention_modules(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every attention below a block or model: what takes a cache and passes it no further."""
    takers = {path: child for path, child in module.named_modules() if path and cache_argument(child)}
    for path, child in takers.items():
        if not any(other.startswith(f"{path}.") for other in takers):
            yield path, child


def _quantizes(cache: Any, module: nn.Module) -> bool:
    """Whether a cache stores codes itself (`runtime.cache`)."""
    layers = getattr(cache, "layers", None) or ()
    index = getattr(module, "layer_idx", None)
    return isinstance(index, int) and index < len(layers) and hasattr(layers[index], "quantized")


def _put_stand_in(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    name, index = cache_argument(module) or ("", 0)
    kwargs = dict(kwargs)
    named = [kwargs.pop(other) for other in CACHE_ARGUMENTS if other in kwargs]
    given = args[index] if len(args) > index else next((cache for cache in named if cache is not None), None)
    layer: LayerKV = getattr(module, _ATTACHED)
    layer.cached = _quantizes(given, module)
    if layer.cached:
        return (args, kwargs) if len(args) > index else (args, kwargs | {name: given})
    through = _Through(layer, given)
    if len(args) > index:
        return (*args[:index], through, *args[index + 1 :]), kwargs
    return args, kwargs | {name: through}


def attach(
    attention: nn.Module,
    kv: KV,
    key_map: Map | None = None,
    clips: Tensor | None = None,
    affine: Sequence[Affine | None] = (None, None),
) -> LayerKV:
    """Quantizes the keys and values of one attention module from now on; what was attached before is replaced.

    The arguments are those of `LayerKV`, which is returned so that static ranges can be frozen. Raises ValueError for a
    module that takes no cache.
    """
    if cache_argument(attention) is None:
        raise ValueError(f"{type(attention).__name__} takes no key-value cache, so there is nothing to quantize in it")
    layer = LayerKV(kv, key_map, clips, affine)
    detach(attention)
    setattr(attention, _ATTACHED, layer)
    setattr(attention, _HANDLE, attention.register_forward_pre_hook(_put_stand_in, with_kwargs=True))
    return layer


def detach(attention: nn.Module) -> None:
    """Undoes `attach`; does nothing where nothing is attached."""
    if hasattr(attention, _ATTACHED):
        getattr(attention, _HANDLE).remove()
        delattr(attention, _ATTACHED)
        delattr(attention, _HANDLE)


def attached_to(attention: nn.Module) -> LayerKV | None:
    """The quantizers of one attention module, None where it has none."""
    return getattr(attention, _ATTACHED, None)


def attached(module: nn.Module) -> dict[str, LayerKV]:
    """Path -> quantizers, for every attention module at or below `module` that has them."""
    return {path: getattr(child, _ATTACHED) for path, child in module.named_modules() if hasattr(child, _ATTACHED)}
