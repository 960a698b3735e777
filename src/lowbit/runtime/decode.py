"""Text token by token, with nothing but the GPU's own work between two of them.

At batch 1 a step is a thousand small operations, and starting them from Python takes longer than doing them; so does
what `generate` of transformers does between two steps. Here the cache has its full length from the beginning, the next
token is chosen on the device, and a step is recorded as one CUDA graph at its third call (`numerics.replay`), which the
following ones replay. Whether a text has ended is looked at every few tokens only. What cannot be recorded runs
operation by operation, on a CPU everything does, and the text is the same. Keys and values of few bits are kept as
codes (`fixed`), and attention reads those.

`compiled` also lets torch.compile fuse what lies between the products: more tokens per second, after a minute or so.

Shape letters: B texts, T tokens of a prompt, V words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from ..kernels.attention import attend, fits
from ..modules.attention import as_cache, attached, attached_to
from ..numerics.replay import Replayed
from .fixed import Layer, fixed_cache
from .siblings import merge

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTENTION = "lowbit-one-token"
"""The name of our attention among transformers'."""
PART = 512
"""Words among which the likeliest is found at once."""
LOOK = 16
"""Tokens after which it is looked whether all texts have ended."""


def decodable(model: PreTrainedModel) -> bool:
    """Whether a model's keys and values fit a cache of fixed length: full attention, with ranges that are known."""
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    plain = StaticCache(config=model.config.get_text_config(), max_cache_len=1)
    known = not any(layer.watching for layer in attached(model).values())
    return known and all(type(layer) is StaticLayer for layer in plain.layers)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The tokens that end a text."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


class Decoder:
    """Continues texts of a model that is `decodable`; the recorded step is kept from one call to the next.

    `length` is how many tokens prompt and answer may have together. `temperature` 0 takes the likeliest token.
    """

    def __init__(
        self, model: PreTrainedModel, length: int, *, temperature: float = 0.0, compiled: bool = False
    ) -> None:
        self.model, self.length, self.temperature = model, length, temperature
        self._one = torch.compile(self._next, dynamic=False, options=_options()) if compiled else self._next
        self._batch, self._merged = 0, False
        # some versions of transformers make ALiBi for the tokens so far, where a cache shows its full length
        self._alibi = getattr(model.config, "alibi", False) or any(
            hasattr(module, "build_alibi_tensor") for module in model.modules()
        )
        self._cache: Any = None

    @torch.no_grad()
    def __call__(self, ids: Tensor, tokens: int, stop: Collection[int] = ()) -> Tensor:
        """Prompts [B, T] of one length, and up to `tokens` new ones: [B, T + new]. A text that ended repeats its last.

        Raises ValueError where they do not fit into `length`.
        """
        if ids.shape[1] + tokens > self.length:
            raise ValueError(f"{ids.shape[1]} and {tokens} tokens are more than {self.length}: ask for fewer")
        ends = torch.tensor(sorted(stop), device=ids.device)
        text = torch.cat([ids, ids.new_zeros(len(ids), tokens)], 1)
        token = self._begin(ids)
        ended = torch.zeros(len(ids), 1, dtype=torch.bool, device=ids.device)
        for place in range(ids.shape[1], ids.shape[1] + tokens):
            last = text[:, place - 1 : place]
            text[:, place : place + 1] = torch.where(ended, last, token)
            ended |= torch.isin(token, ends)
            if (place - ids.shape[1]) % LOOK == LOOK - 1 and len(ends) and bool(ended.all()):
                return text[:, : place + 1]
            if place + 1 < text.shape[1]:
                token = self._step("step", token)[0]
        return text

    def _begin(self, ids: Tensor) -> Tensor:
        """The token behind the prompts, which fill an empty cache."""
        if len(ids) == self._batch:
            self._cache.reset()
        else:
            self._batch, self._cache = len(ids), _cache(self.model, self.length)
            self._step = Replayed(self._decode, self.model.device)
        if not self._merged:
            self._merged = True
            return merge(self.model, lambda: self._read(ids))
        return self._read(ids)

    def _read(self, ids: Tensor) -> Tensor:
        """The token behind a prompt."""
        if not attached(self.model):
            return self._next(ids)
        with one_token(self.model, self._cache):  # lets the cache see how it is attended to
            return self._next(ids)

    def _decode(self, _kind: object, token: Tensor) -> tuple[Tensor]:
        """The step that is recorded."""
        with one_token(self.model, self._cache):
            return (self._one(token),)

    def _next(self, ids: Tensor) -> Tensor:
        """The next token [B, 1] behind `ids` and all that the cache holds."""
        mask = {}
        if self._alibi:
            mask["attention_mask"] = ids.new_ones(len(ids), self._cache.get_mask_sizes(ids.shape[1], 0)[0])
        output = self.model(input_ids=ids, use_cache=True, **mask, **as_cache(self.model, self._cache))
        scores = output.logits[:, -1].float()
        if self.temperature > 0:
            return torch.multinomial((scores / self.temperature).softmax(-1), 1)
        return likeliest(scores) if torch.compiler.is_compiling() else scores.argmax(-1, keepdim=True)


def likeliest(scores: Tensor) -> Tensor:
    """The first of the largest scores [B, V] as [B, 1], in two steps: torch.compile gives one step to one processor."""
    parts = functional.pad(scores, (0, -scores.shape[1] % PART), value=float("-inf")).unflatten(1, (-1, PART))
    part = parts.amax(2).argmax(1, keepdim=True)
    return part * PART + parts.argmax(2).gather(1, part)


def _options() -> dict[str, Any]:
    """What torch.compile is told: kernels may begin while those before them end, where a GPU and torch can do that."""
    from torch._inductor import config

    return {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}


@contextmanager
def one_token(model: PreTrainedModel, cache: Any) -> Iterator[None]:
    """Let attention of single tokens read keys and values once for all heads, where it would otherwise be `sdpa` of
    transformers' own choosing, which Falcon's is not; and let it read the codes of a cache that has them.
    """
    from transformers import AttentionInterface, AttentionMaskInterface

    config = model.config.get_text_config()
    before = config._attn_implementation
    layers = attached(model)
    for path, layer in layers.items():
        layer.held = cache.layers[model.get_submodule(path).layer_idx]
    if before == "sdpa" and getattr(model, "_supports_attention_backend", False):
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, _mask)
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = before
        for layer in layers.values():
            layer.held = None


def _mask(*arguments: Any, **options: Any) -> Tensor | None:
    """transformers' mask for `sdpa`. torch.compile would make it anew in every block, out of what makes it up."""
    from transformers.masking_utils import sdpa_mask

    mask: Tensor | None = sdpa_mask(*arguments, **options)
    return mask if mask is None or not torch.compiler.is_compiling() else torch.ops.lowbit.kept(mask)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' interface of attention: outputs [B, T, H, h]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    scale = options.get("scaling")
    plain = not any(options.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    layer = attached_to(module)
    held: Layer | None = None if layer is None else layer.held
    if held is not None and held.meets(key, value):
        if plain and scale is not None:
            return held.attend(query, mask, scale).transpose(1, 2), None
        key, value = held.read(key.dtype)
    if not plain or scale is None or not fits(query, key, value, mask):
        return sdpa_attention_forward(module, query, key, value, mask, **options)  # type: ignore[no-any-return]
    return attend(query, key, value, mask, scale).transpose(1, 2), None


def _cache(model: PreTrainedModel, length: int) -> Any:
    """A cache that holds so many tokens from the beginning."""
    from transformers import StaticCache

    if attached(model):
        return fixed_cache(model, length)
    return StaticCache(config=model.config.get_text_config(), max_cache_len=length)


_LIBRARY = torch.library.Library("lowbit", "FRAGMENT")
_LIBRARY.define("kept(Tensor x) -> Tensor")
_LIBRARY.impl("kept", lambda x: x.clone(memory_format=torch.contiguous_format), "CompositeExplicitAutograd")
torch.library.register_fake("lowbit::kept", lambda x: x.new_empty(x.shape), lib=_LIBRARY)
