"""A key-value cache that holds codes, for `generate` and plain forwards of any model.

A token is quantized once, when it comes, and its codes are never touched again: re-quantizing a growing cache would
drift. Attention gets a dequantized copy that lives as long as the call. transformers' `Cache` is a list of layers, so
only the layer is ours; it is registered as a virtual subclass of transformers' own when a cache is made, which keeps
the import lazy.

Shape letters: B batch, K key-value heads, T tokens, h head width. Tensors are [B, K, T, h].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..modules.attention import LayerKV, attached
from ..numerics.kv import KV, Encoded

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedConfig, PreTrainedModel

KEYS, VALUES = 0, 1


class _Store:
    """Keys or values of one layer: codes of older tokens, then the tokens that are still exact."""

    def __init__(self, layer: LayerKV, side: int) -> None:
        self.layer, self.side = layer, side
        part = layer.parts[side]
        self.exists, self.group = part is not None, part.tokens if part else 1
        self.encoded: Encoded | None = None
        self.exact: Tensor | None = None
        self._inverse: Tensor | None = None

    @property
    def tokens(self) -> int:
        return (self.encoded.tokens if self.encoded else 0) + (0 if self.exact is None else self.exact.shape[2])

    def append(self, x: Tensor) -> None:
        if self.exact is None:
            self._inverse = self.layer.key_inverse(x) if self.side == KEYS else None
        self.exact = x if self.exact is None else torch.cat([self.exact, x], 2)

    def read(self) -> Tensor:
        """All tokens [B, K, T, h], in order."""
        assert self.exact is not None, "nothing was stored"
        if self.encoded is None or not self.encoded.tokens:
            return self.exact
        return torch.cat([self.layer.decode(self.encoded, self.side, self.exact, self._inverse), self.exact], 2)

    def quantize(self, tokens: int) -> None:
        """Turns the oldest exact tokens into codes."""
        if tokens <= 0 or not self.exists:
            return
        assert self.exact is not None, "nothing was stored"
        new = self.layer.encode(self.exact[:, :, :tokens], self.side)
        self.encoded = new if self.encoded is None else self.encoded.append(new)
        self.exact = self.exact[:, :, tokens:].clone()

    def slide(self, width: int) -> None:
        """Drops what lies before the newest `width` tokens; what still waits to become codes stays, so that windows and
        groups begin at the same tokens as without sliding.
        """
        start = max(self.tokens - width, 0)
        if self.exists:
            start = min(start, self.encoded.tokens if self.encoded else 0)
        self.keep(start, self.tokens)

    def keep(self, start: int, stop: int) -> None:
        """Drops all tokens but [start, stop); codes go by whole groups, so up to a group more may stay in front."""
        coded = self.encoded.tokens if self.encoded else 0
        if self.encoded is not None:
            first = min(start, coded) // self.group * self.group
            self.encoded = self.encoded.span(first, min(stop, coded), self.group)
        if self.exact is not None:
            self.exact = self.exact[:, :, max(start - coded, 0) : max(stop - coded, 0)].clone()

    def select(self, index: Tensor) -> None:
        """The sequences `index` of the batch."""
        self.encoded = None if self.encoded is None else self.encoded.batch(index)
        self.exact = None if self.exact is None else self.exact[index.to(self.exact.device)]

    @property
    def bytes(self) -> int:
        exact = 0 if self.exact is None else self.exact.numel() * self.exact.element_size()
        return exact + (self.encoded.bytes if self.encoded else 0)


class QuantizedLayer:
    """One layer of a cache, with the methods that transformers asks of a layer.

    `window` is the width of a sliding attention, whose older tokens are dropped. `newest_exact` lets a token attend to
    itself in full precision in its own step, as some toolkits do; decoding then differs from prefill.
    """

    is_compileable = False
    supports_early_init = False
    keys: Tensor | None = None
    values: Tensor | None = None

    def __init__(self, quantized: LayerKV, window: int | None = None, newest_exact: bool = False) -> None:
        if quantized.watching:
            raise ValueError("static key-value ranges are not calibrated yet: run the model, then freeze them")
        self.quantized, self.window, self.newest_exact = quantized, window, newest_exact
        self.is_sliding = window is not None
        self.reset()

    def reset(self) -> None:
        """Forgets all tokens; calibrated ranges stay."""
        self.stores = (_Store(self.quantized, KEYS), _Store(self.quantized, VALUES))
        self.length = 0
        self.is_initialized = False

    def update(self, keys: Tensor, values: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Stores new tokens and returns all that the new queries may see, in the dtype of what came."""
        self.is_initialized = True
        self.length += keys.shape[2]
        return self._update(self.stores[KEYS], keys), self._update(self.stores[VALUES], values)

    def _update(self, store: _Store, new: Tensor) -> Tensor:
        store.append(new)
        assert store.exact is not None
        waiting, residual = store.exact.shape[2], self.quantized.kv.residual
        if residual:  # KIVI: attend first, quantize afterwards
            seen = store.read()
            store.quantize(waiting // residual * residual if store.side == KEYS else waiting - residual)
        else:
            store.quantize(waiting)
            seen = store.read()
            if self.newest_exact:
                seen = torch.cat([seen[:, :, :-1], new[:, :, -1:]], 2)
        if self.window is not None:
            store.slide(self.window - 1)
            seen = seen[:, :, -(self.window - 1 + new.shape[2]) :]
        return seen

    def get_seq_length(self) -> int:
        """Tokens that passed, dropped ones included."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens that the next `query_length` queries will be given, position of the first of them)."""
        dropped = 0 if self.window is None else max(self.length - self.window + 1, 0)
        return self.length - dropped + query_length, dropped

    def get_max_length(self) -> int:
        """The window of a sliding attention, -1 for no limit."""
        return -1 if self.window is None else self.window

    @property
    def is_croppable(self) -> bool:
        return self.window is None and not self.quantized.kv.residual

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last -`tokens_to_remove` tokens; a positive number (transformers 5.15) is what to keep.

        Raises ValueError where older tokens would have to come back: behind a sliding window, or out of KIVI's codes.
        """
        remove = min(
            -tokens_to_remove if tokens_to_remove <= 0 else max(self.length - tokens_to_remove, 0), self.length
        )
        if not remove:
            return
        if self.window is not None and self.length >= self.window:
            raise ValueError("a sliding window that is full cannot be cropped: its older tokens are gone")
        if self.quantized.kv.residual and any(store.encoded is not None for store in self.stores):
            raise ValueError("a KIVI cache cannot be cropped once it has quantized tokens: generate without assistant")
        self.length -= remove
        for store in self.stores:
            store.keep(0, store.tokens - remove)

    def _select(self, index: Callable[[Tensor], Tensor]) -> None:
        for store in self.stores:
            if store.exact is not None:
                store.select(index(torch.arange(store.exact.shape[0])))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Beam search: sequence i continues what was sequence `beam_idx[i]`."""
        self._select(lambda rows: rows[beam_idx.cpu()])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these sequences only."""
        self._select(lambda rows: rows[indices.cpu()])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        self._select(lambda rows: rows.repeat_interleave(repeats))

    def offload(self) -> None:
        """Codes are small and stay where they are."""

    prefetch = offload


def _windows(config: PreTrainedConfig) -> list[int | None]:
    """Width of every layer's sliding attention, None for full attention. Raises ValueError for other kinds."""
    config = config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    plain = "sliding_attention" if window is not None else "full_attention"
    kinds = getattr(config, "layer_types", None) or [plain] * config.num_hidden_layers
    other = sorted(set(kinds) - {"sliding_attention", "full_attention"})
    if other:
        raise ValueError(f"{config.model_type} has layers of {other[0]}, whose state is no cache of keys and values")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def quantized_cache(
    model: PreTrainedModel, layers: KV | Sequence[LayerKV] | None = None, *, newest_exact: bool = False
) -> Cache:
    """An empty cache for `model(cache=…)` and `model.generate(cache=…)` (`past_key_values=…` before transformers 5.24).

    Args:
        layers: one format for all layers, or the quantizers of each. None takes what `modules.attention.attach` put on
            the model's attention modules; layers without keep 16 bits.
        newest_exact: see `QuantizedLayer`.
    """
    from transformers.cache_utils import Cache, CacheLayerMixin

    CacheLayerMixin.register(QuantizedLayer)
    windows = _windows(model.config)
    if layers is None:
        found = {model.get_submodule(path).layer_idx: layer for path, layer in attached(model).items()}
        layers = [found.get(index) or LayerKV(KV()) for index in range(len(windows))]
    elif isinstance(layers, KV):
        layers = [LayerKV(layers) for _ in windows]
    if len(layers) != len(windows):
        raise ValueError(f"the model has {len(windows)} layers, and {len(layers)} quantizers were given")
    return Cache(
        layers=[QuantizedLayer(layer, window, newest_exact) for layer, window in zip(layers, windows, strict=True)]
    )


def stored_bytes(cache: Cache) -> int:
    """Bytes that the tokens of a quantized cache take now."""
    return sum(store.bytes for layer in cache.layers for store in layer.stores)
