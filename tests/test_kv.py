"""Quantized keys and values: formats against loops, the cache against decoding, attention against its formula."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import TINY, build, tokens
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from lowbit.graph import discover, unfuse_experts
from lowbit.modules.attend import (
    Int8Products,
    decode_kivi,
    quantize_probabilities,
    replace_products,
    restore_products,
)
from lowbit.modules.attention import LayerKV, as_cache, attach, attached, attention_modules, detach
from lowbit.numerics.kv import KV, Quantizer, decode, encode, fake_quantize, fit, kivi
from lowbit.numerics.maps import Hadamard, Kronecker, Map
from lowbit.runtime.cache import QuantizedLayer, quantized_cache, stored_bytes

B, H, T, W = 2, 3, 8, 16
DYNAMIC = [("token", 0, False), ("token", 0, True), ("group", 4, False), ("channel", 4, False)]
RULES = ("minimum", "zero-point", "symmetric")
FAMILIES = ["llama", "qwen2", "mixtral", "gemma2", "opt", "deepseek_v3", "mistral", "bloom", "falcon-7b", "gpt_oss"]
SMALL_KIVI = kivi(2, 2, group=4, residual=8)


def quantizer(bits: int, layout: tuple[str, int, bool], rule: str = "minimum") -> Quantizer:
    name, group, together = layout
    return Quantizer(bits, name, group, together, rule)  # type: ignore[arg-type]


def heads(tokens: int = T, *, mean: float = 0.5, batch: int = B, width: int = W) -> Tensor:
    return torch.randn(batch, H, tokens, width) + mean


def half(x: float) -> float:
    return torch.tensor(x, dtype=torch.float32).half().float().item()


def by_hand(values: list[float], bits: int, rule: str) -> list[float]:
    """One unit, one number at a time, in double precision with the scale and offset of 16-bit storage."""
    steps = 2**bits - 1
    low, high = min(values), max(values)
    if rule == "symmetric":
        amax = max(abs(low), abs(high))
        scale = half(2 * amax / steps)
        offset = -(2 ** (bits - 1)) * scale
    elif rule == "zero-point":
        low, high = min(low, 0.0), max(high, 0.0)
        scale = half((high - low) / steps)
        offset = -min(max(round(-low / scale), 0), steps) * scale
    else:
        scale, offset = half((high - low) / steps), half(low)
    return [min(max(round((x - offset) / scale), 0), steps) * scale + offset for x in values]


def units(layout: tuple[str, int, bool], shape: torch.Size) -> Iterator[list[tuple[int, ...]]]:
    """The indices of every unit of a tensor of `shape`."""
    name, group, together = layout
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for b, h, t, c in itertools.product(*map(range, shape)):
        key = {
            "token": (b, t) if together else (b, h, t),
            "group": (b, h, t, c // max(group, 1)),
            "channel": (b, h, t // max(group, 1), c),
            "head": (h,),
            "tensor": (),
        }[name]
        groups.setdefault(key, []).append((b, h, t, c))
    yield from groups.values()


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", [*DYNAMIC, ("head", 0, False), ("tensor", 0, False)])
def test_values_are_those_of_a_loop_over_units(layout: tuple[str, int, bool], rule: str, bits: int) -> None:
    x = heads(batch=1)
    part = quantizer(bits, layout, rule)
    affine = fit(*part.range(x), part) if part.static else None
    found = fake_quantize(x, part, affine=affine)
    for unit in units(layout, x.shape):
        expected = by_hand([x[i].item() for i in unit], bits, rule)
        torch.testing.assert_close(torch.stack([found[i] for i in unit]), torch.tensor(expected), rtol=0, atol=2e-6)


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", [*DYNAMIC, ("head", 0, False)])
def test_codes_are_what_training_saw(layout: tuple[str, int, bool], rule: str, bits: int) -> None:
    part, x = quantizer(bits, layout, rule), heads()
    affine = fit(*part.range(x), part) if part.static else None
    clip = None if part.static else torch.tensor([0.8, 0.9])
    encoded = encode(x, part, affine=affine, clip=clip)
    assert encoded.codes.dtype == torch.uint8 and encoded.codes.shape[-1] == -(-x.shape[-1] * bits // 8)
    assert torch.equal(
        decode(encoded, part, x.shape[-1], affine=affine), fake_quantize(x, part, affine=affine, clip=clip)
    )


@pytest.mark.parametrize("layout", DYNAMIC)
def test_extremes_of_every_unit_come_back(layout: tuple[str, int, bool]) -> None:
    x = heads().half().float()
    for bits in (2, 3, 4, 8):
        part = quantizer(bits, layout)
        (low, high), y = part.range(x), part.units(fake_quantize(x, part))
        shared = part._shared
        assert torch.equal(y.amin(shared, keepdim=True), low)
        # The scale has eleven significant bits, or the maximum would be exact too.
        assert ((y.amax(shared, keepdim=True) - high).abs() <= (high - low) * 2**-11 * 1.001).all()
    grid = torch.tensor([-0.5, 0.25, 1.0, 1.75]).repeat(B, H, T, W // 4)  # 2-bit numbers with an exact scale
    assert torch.equal(fake_quantize(grid, quantizer(2, ("token", 0, False))), grid)


@pytest.mark.parametrize("layout", DYNAMIC)
@pytest.mark.parametrize("rule", RULES)
def test_error_falls_with_bits(layout: tuple[str, int, bool], rule: str) -> None:
    x = heads(64)
    errors = [float((fake_quantize(x, quantizer(bits, layout, rule)) - x).square().mean()) for bits in (2, 3, 4, 8)]
    assert all(more > 3 * less for more, less in itertools.pairwise(errors)), errors


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("value", [0.0, 3.0, -2.5, 1e-9])
def test_constant_units_stay_finite(rule: str, value: float) -> None:
    part = quantizer(2, ("token", 0, False), rule)
    y = fake_quantize(torch.full((1, 1, 2, W), value), part)
    assert torch.isfinite(y).all()
    saturated = abs(value) / 3 if rule == "symmetric" else 0  # its codes -2 … 1 reach two thirds of +amax
    assert (y - value).abs().max() <= saturated + abs(value) * 2**-10 + 1e-8


def test_gradients_are_those_of_a_straight_through_quantizer() -> None:
    x = heads().requires_grad_()
    clip = torch.tensor([0.6, 0.7], requires_grad=True)
    part, weight = quantizer(3, ("token", 0, False)), torch.randn(B, H, T, W)
    (fake_quantize(x, part, clip=clip) * weight).sum().backward()
    assert x.grad is not None and clip.grad is not None

    # By hand: x̂ = s q + m. Inside the range dx̂ = dx + (q - y) ds, at its ends dx̂ = dm, or dm + 7 ds.
    bottom, top = x.detach().amin(-1, keepdim=True).clamp_max(0), x.detach().amax(-1, keepdim=True).clamp_min(0)
    low, high = 0.6 * bottom, 0.7 * top
    scale = ((high - low) / 7).half().float()
    y = (x.detach() - low.half().float()) / scale
    q = y.round().clamp(0, 7)
    by_scale = torch.where(y < 0, 0.0, torch.where(y > 7, 7.0, q - y)) * weight
    by_low = torch.where((y < 0) | (y > 7), 1.0, 0.0) * weight
    expected = torch.stack([(by_low * bottom - by_scale * bottom / 7).sum(), (by_scale * top / 7).sum()])
    torch.testing.assert_close(clip.grad, expected, rtol=1e-4, atol=1e-4)
    plain = (y > 0) & (y < 7) & (x != x.amin(-1, keepdim=True)) & (x != x.amax(-1, keepdim=True))
    torch.testing.assert_close(x.grad[plain], weight[plain])


def test_clips_cut_the_range_with_zero_in_it() -> None:
    x = torch.tensor([1.0, 4.0, 6.0, 8.0]).reshape(1, 1, 1, 4)
    y = fake_quantize(x, quantizer(2, ("token", 0, False)), clip=torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(y.flatten(), torch.tensor([4 / 3, 4.0, 4.0, 4.0]), rtol=0, atol=0.01)


def test_descriptions_travel_through_json() -> None:
    for kv in (KV(4, None), kivi(), KV(8, 8, "head"), KV(2, 3, "group", 8, rule="symmetric"), KV(4, 4, together=True)):
        assert KV.from_json(json.loads(json.dumps(kv.to_json()))) == kv
    assert kivi() == KV(2, 2, "channel", 32, 128)


@pytest.mark.parametrize(
    "arguments",
    [
        {"keys": 16},
        {"values": 0},
        {"layout": "group"},
        {"group": 8},
        {"layout": "channel", "group": 32},
        {"layout": "channel", "group": 32, "residual": 100},
        {"residual": 32},
        {"layout": "head", "together": True},
    ],
)
def test_impossible_descriptions_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        KV(**arguments)


def test_group_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="does not divide the head width"):
        encode(heads(width=12), quantizer(4, ("group", 8, False)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("layout", DYNAMIC)
def test_bits_are_counted_as_they_are_stored(layout: tuple[str, int, bool], rule: str) -> None:
    for bits, width in itertools.product((2, 3, 8), (16, 12)):
        part, x = quantizer(bits, layout, rule), heads(width=width)
        assert 8 * encode(x, part).bytes / x.numel() == pytest.approx(part.bits_per_element(width, H))
    assert KV(4, 4).bits_per_element(64) == 4.5
    assert kivi().bits_per_element(64) == 3.0  # b + 32/g
    assert KV(2, None, "head").bits_per_element(64) == 9.0


# --- keys with outliers -----------------------------------------------------------------------------------------------


def test_keys_per_channel_and_per_token_have_each_its_outliers() -> None:
    """What outliers do to all other values, which share a scale with them or do not."""
    per_channel, per_token = quantizer(2, ("channel", 32, False)), quantizer(2, ("token", 0, False))

    def error(x: Tensor, part: Quantizer, others: Tensor) -> float:
        return float((fake_quantize(x, part) - x)[others].square().mean())

    for axis, better, worse in ((3, per_channel, per_token), (2, per_token, per_channel)):
        x = torch.randn(1, 2, 64, 64)
        outlier = torch.zeros(64, dtype=torch.bool)
        outlier[[3, 30, 50]] = True
        shape = [64 if axis == a else 1 for a in range(4)]
        outlier = outlier.reshape(shape).expand_as(x)
        x = torch.where(outlier, 20 * x, x)
        assert error(x, better, ~outlier) < 0.2 * error(x, worse, ~outlier)


def test_attention_maps_suffer_in_the_published_order() -> None:
    """Three outlier channels: per token in groups of 128, 32, 8, then per channel; 2, 4 and 8 bits."""
    keys, queries = torch.randn(1, 4, 256, 128), torch.randn(1, 4, 256, 128)
    keys[..., [17, 60, 101]] = keys[..., [17, 60, 101]] + 8
    exact = (queries @ keys.mT / math.sqrt(128)).softmax(-1)
    layouts = [("token", 0, False), ("group", 32, False), ("group", 8, False), ("channel", 32, False)]
    for bits in (2, 4, 8):
        maps = [
            (queries @ fake_quantize(keys, quantizer(bits, layout)).mT / math.sqrt(128)).softmax(-1)
            for layout in layouts
        ]
        errors = [float((found - exact).abs().sum(-1).mean()) for found in maps]
        assert errors == sorted(errors, reverse=True), (bits, errors)
        assert errors[0] > 2 * errors[3]


# --- the cache --------------------------------------------------------------------------------------------------------


def feed(layer: QuantizedLayer, keys: Tensor, values: Tensor, chunks: list[int]) -> list[tuple[Tensor, Tensor]]:
    parts = zip(keys.split(chunks, 2), values.split(chunks, 2), strict=True)
    return [layer.update(k, v) for k, v in parts]


def exact_tokens(layer: QuantizedLayer, side: int) -> int:
    kept = layer.stores[side].exact
    assert kept is not None
    return kept.shape[2]


@pytest.mark.parametrize("kv", [KV(2, 2), KV(3, 4, "group", 4), KV(4, 8, together=True), KV(4, 4, rule="zero-point")])
def test_a_token_is_quantized_once_whatever_comes_later(kv: KV) -> None:
    keys, values = heads(), heads()
    whole, stepped = QuantizedLayer(LayerKV(kv)), QuantizedLayer(LayerKV(kv))
    seen = feed(whole, keys, values, [T])[0]
    steps = feed(stepped, keys, values, [1, 3, 1, 1, 2])
    for side, part in enumerate(whole.quantized.parts):
        assert part is not None
        one, other = whole.stores[side].encoded, stepped.stores[side].encoded
        assert one is not None and other is not None
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(steps[-1][side], seen[side])
        assert torch.equal(steps[0][side], seen[side][:, :, :1])
        assert torch.equal(seen[side], fake_quantize((keys, values)[side], part))


def test_the_newest_token_can_stay_exact_in_its_own_step() -> None:
    keys, values = heads(), heads()
    layer = QuantizedLayer(LayerKV(KV(2, 2)), newest_exact=True)
    steps = feed(layer, keys, values, [5, 1, 1, 1])
    assert torch.equal(steps[-1][0][:, :, -1], keys[:, :, -1])
    stored = fake_quantize(keys, Quantizer(2))
    assert torch.equal(steps[-1][0][:, :, :-1], stored[:, :, :-1])
    assert not torch.equal(stored[:, :, -1], keys[:, :, -1])


R, G = 8, 4


@pytest.mark.parametrize("length", [1, R - 1, R, R + 1, 3 * R + 5])
@pytest.mark.parametrize("prefill", [0, 1, R + 3, 10**6])
def test_kivi_keeps_the_windows_of_the_paper(length: int, prefill: int) -> None:
    keys, values = heads(length), heads(length)
    layer = QuantizedLayer(LayerKV(kivi(2, 2, group=G, residual=R)))
    first = min(prefill, length)
    chunks = ([first] if first else []) + [1] * (length - first)
    for t, (seen_keys, seen_values) in zip(
        itertools.accumulate(chunks), feed(layer, keys, values, chunks), strict=True
    ):
        before = t - (first if t == first else 1)
        old_keys, old_values = before // R * R, max(before - R, 0)
        for b, h, c in itertools.product(range(B), range(1, H), range(0, W, 11)):
            for start in range(0, old_keys, G):
                column = by_hand([keys[b, h, i, c].item() for i in range(start, start + G)], 2, "minimum")
                torch.testing.assert_close(
                    seen_keys[b, h, start : start + G, c], torch.tensor(column), rtol=0, atol=2e-6
                )
        coded = fake_quantize(values, Quantizer(2, "group", G))  # against a loop above
        assert torch.equal(seen_values[:, :, :old_values], coded[:, :, :old_values])
        assert torch.equal(seen_keys[:, :, old_keys:], keys[:, :, old_keys:t])
        assert torch.equal(seen_values[:, :, old_values:], values[:, :, old_values:t])
    assert exact_tokens(layer, 0) == length % R
    assert exact_tokens(layer, 1) == min(length, R)
    assert layer.stores[0].tokens == layer.stores[1].tokens == layer.get_seq_length() == length
    assert torch.equal(layer.stores[1].read()[:, :, -min(length, R) :], values[:, :, -min(length, R) :])


def test_an_empty_cache_holds_nothing() -> None:
    layer = QuantizedLayer(LayerKV(SMALL_KIVI))
    assert layer.get_seq_length() == 0 and all(store.tokens == 0 for store in layer.stores)
    assert layer.get_mask_sizes(3) == (3, 0)


def test_kivi_with_a_window_wider_than_the_text_is_exact() -> None:
    keys, values = heads(), heads()
    layer = QuantizedLayer(LayerKV(kivi(2, 2, group=G, residual=4 * T)))
    seen = feed(layer, keys, values, [2] + [1] * (T - 2))[-1]
    assert torch.equal(seen[0], keys) and torch.equal(seen[1], values)


@pytest.mark.parametrize("kv", [KV(4, 4), KV(4, 2, "group", 4), SMALL_KIVI, KV(None, 4)])
def test_batches_can_be_reordered_selected_and_repeated(kv: KV) -> None:
    keys, values = heads(20), heads(20)
    index = torch.tensor([1, 0, 1])
    moved, plain = QuantizedLayer(LayerKV(kv)), QuantizedLayer(LayerKV(kv))
    moved.update(keys[:, :, :17], values[:, :, :17])
    plain.update(keys[index][:, :, :17], values[index][:, :, :17])
    moved.batch_select_indices(index)
    after = [layer.update(keys[index][:, :, 17:], values[index][:, :, 17:]) for layer in (moved, plain)]
    assert torch.equal(after[0][0], after[1][0]) and torch.equal(after[0][1], after[1][1])
    moved.reorder_cache(torch.tensor([2, 2, 1]))
    assert torch.equal(moved.stores[0].read(), plain.stores[0].read()[[2, 2, 1]])
    moved.batch_repeat_interleave(2)
    assert torch.equal(moved.stores[1].read(), plain.stores[1].read()[[2, 2, 2, 2, 1, 1]])


def test_tokens_can_be_taken_back() -> None:
    keys, values = heads(), heads()
    layer = QuantizedLayer(LayerKV(KV(4, 4)))
    feed(layer, keys, values, [T])
    before = layer.stores[0].read()
    layer.crop(-3)
    assert layer.is_croppable and layer.get_seq_length() == T - 3
    again = layer.update(keys[:, :, T - 3 :], values[:, :, T - 3 :])[0]
    assert torch.equal(again, before)
    layer.crop(2)
    assert layer.get_seq_length() == layer.stores[0].tokens == 2
    layer.reset()
    assert layer.get_seq_length() == 0 and not layer.is_initialized and layer.stores[0].encoded is None


def test_what_was_quantized_or_dropped_cannot_be_taken_back() -> None:
    layer = QuantizedLayer(LayerKV(SMALL_KIVI))
    feed(layer, heads(6), heads(6), [6])
    layer.crop(-2)
    assert layer.get_seq_length() == 4
    feed(layer, heads(6), heads(6), [6])
    assert not layer.is_croppable
    with pytest.raises(ValueError, match="KIVI cache cannot be cropped"):
        layer.crop(-1)
    sliding = QuantizedLayer(LayerKV(KV(4, 4)), window=4)
    feed(sliding, heads(6), heads(6), [6])
    with pytest.raises(ValueError, match="sliding window"):
        sliding.crop(-1)


@pytest.mark.parametrize("kv", [KV(4, 4), SMALL_KIVI, kivi(2, 2, group=4, residual=4)])
def test_a_sliding_window_drops_what_it_passed(kv: KV) -> None:
    window, keys, values = 6, heads(40), heads(40)
    sliding, full = QuantizedLayer(LayerKV(kv), window), QuantizedLayer(LayerKV(kv))
    for start in range(0, 40, 2):
        length, offset = sliding.get_mask_sizes(2)
        new = (keys[:, :, start : start + 2], values[:, :, start : start + 2])
        seen, everything = sliding.update(*new), full.update(*new)
        assert seen[0].shape[2] == seen[1].shape[2] == length and offset == max(start - window + 1, 0)
        assert torch.equal(seen[0], everything[0][:, :, offset:])
        assert torch.equal(seen[1], everything[1][:, :, offset:])
    assert all(store.tokens <= window - 1 + G + kv.residual for store in sliding.stores)


# --- models -----------------------------------------------------------------------------------------------------------


def attentions(model: nn.Module) -> list[nn.Module]:
    return [module for _, module in attention_modules(model)]


def quantized(name: str, kv: KV, **options: Any) -> PreTrainedModel:
    """A tiny model in double precision, so that no rounding of k flips by the shape of a matrix product."""
    model = double(name)
    for module in attentions(model):
        attach(module, kv, **options)
    return model


@functools.cache
def _built(name: str) -> PreTrainedModel:
    """Experts as linears, since the grouped product knows no double precision; sdpa would leave a soft cap out."""
    model = build(name).double()
    unfuse_experts(model)
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")
    return model


def double(name: str) -> PreTrainedModel:
    """A tiny model whose modules may be changed."""
    return copy.deepcopy(_built(name))


@torch.no_grad()
def logits(model: PreTrainedModel, x: Tensor, **options: Any) -> Tensor:
    found: Tensor = model(x, **({"use_cache": False} | options)).logits
    return found


@torch.no_grad()
def decoded(model: PreTrainedModel, x: Tensor, cache: Any) -> Tensor:
    steps = [model(x[:, i : i + 1], **as_cache(model, cache), use_cache=True).logits for i in range(x.shape[1])]
    return torch.cat(steps, 1)


def close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= 1e-5)


@pytest.mark.parametrize(
    ("name", "kv"), [*((name, KV(4, 4)) for name in FAMILIES), ("llama", KV(2, 3, "group", 8)), ("opt", KV(None, 3))]
)
def test_no_cache_a_cache_and_decoding_agree(name: str, kv: KV) -> None:
    model, x = quantized(name, kv), tokens(2, 9)
    plain = logits(model, x)
    assert not close(plain, logits(double(name), x))
    assert torch.equal(plain, logits(model, x, **as_cache(model, quantized_cache(model)), use_cache=True))
    assert torch.equal(plain, logits(model, x, **as_cache(model, DynamicCache(config=model.config)), use_cache=True))
    cache = quantized_cache(model)
    logits(model, x[:, :4], **as_cache(model, cache), use_cache=True)
    cache.reset()
    assert close(decoded(model, x, cache), plain)


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek_v3", "bloom"])
def test_sixteen_bits_are_left_alone(name: str) -> None:
    x = tokens()
    plain = logits(double(name), x)
    model = quantized(name, KV(), key_map=Hadamard(16))
    assert torch.equal(logits(model, x), plain)
    assert torch.equal(logits(model, x, **as_cache(model, quantized_cache(model)), use_cache=True), plain)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_kivi_reads_in_full_precision_and_decodes_in_few_bits(name: str) -> None:
    model, x = quantized(name, SMALL_KIVI), tokens(2, 29)
    exact = logits(model, x)
    assert torch.equal(exact, logits(double(name), x))
    cache = quantized_cache(model)
    read = logits(model, x[:, :21], **as_cache(model, cache), use_cache=True)
    assert (read - exact[:, :21]).abs().max() < 1e-12, "but for the order of fp64 sums, which differs by processor"
    assert not close(logits(model, x[:, 21:22], **as_cache(model, cache), use_cache=True), exact[:, 21:22])
    wide = quantized(name, kivi(2, 2, group=4, residual=32))
    assert close(decoded(wide, x, quantized_cache(wide)), exact)


@pytest.mark.parametrize(
    ("name", "key_map"), [("llama", None), ("llama", Hadamard(16)), ("gemma2", None), ("opt", None), ("mistral", None)]
)
def test_kivi_can_be_scored_as_it_decodes(name: str, key_map: Map | None) -> None:
    model, x = quantized(name, SMALL_KIVI, key_map=key_map), tokens(2, 29)
    exact, expected = logits(model, x), decoded(model, x, quantized_cache(model))
    for module in attentions(model):
        decode_kivi(module)
    if name == "gemma2":  # its own eager function caps the scores, as ours does
        assert model.config.attn_logit_softcapping is not None
    assert close(logits(model, x), expected) and not close(expected, exact)
    assert close(decoded(model, x, quantized_cache(model)), expected)
    for module in attentions(model):
        restore_products(module)
    assert torch.equal(logits(model, x), exact)


def test_kivi_refuses_to_decode_through_another_cache() -> None:
    model, x = quantized("llama", SMALL_KIVI), tokens()
    cache = DynamicCache(config=model.config)
    logits(model, x, **as_cache(model, cache), use_cache=True)
    with pytest.raises(ValueError, match="own cache only"):
        logits(model, x[:, :1], **as_cache(model, cache), use_cache=True)
    with pytest.raises(ValueError, match="attach it first"):
        decode_kivi(attentions(quantized("llama", KV(4, 4)))[0])


def test_stored_are_the_heads_before_repetition_and_codes_only() -> None:
    model, x = quantized("llama", KV(4, 4)), tokens(2, 12)
    cache = quantized_cache(model)
    logits(model, x, **as_cache(model, cache), use_cache=True)
    encoded = cache.layers[0].stores[0].encoded
    assert encoded.codes.shape == (2, 2, 12, 8)  # two of four heads, sixteen 4-bit codes
    elements = 2 * 2 * 2 * 2 * 12 * 16
    assert 8 * stored_bytes(cache) == elements * KV(4, 4).bits_per_element(16)


def test_latents_are_quantized_where_latents_are_cached() -> None:
    model = quantized("deepseek_v3", KV(4, 4))
    cache = quantized_cache(model)
    logits(model, tokens(), **as_cache(model, cache), use_cache=True)
    widths = [store.read().shape[-1] for store in cache.layers[0].stores]
    assert widths == [model.config.kv_lora_rank, model.config.qk_rope_head_dim]


def test_later_tokens_change_nothing_before_them() -> None:
    model, x = quantized("llama", KV(2, 2)), tokens()
    changed = x.clone()
    changed[:, 8:] = changed[:, 8:].flip(1)
    assert torch.equal(logits(model, x)[:, :8], logits(model, changed)[:, :8])
    assert not close(logits(model, x)[:, 8:], logits(model, changed)[:, 8:])


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", [KV(3, 3), SMALL_KIVI], ids=["token", "kivi"])
@pytest.mark.parametrize("name", ["llama", "mistral", "opt", "bloom"])
@torch.no_grad()
def test_greedy_generation_is_a_loop_over_steps(name: str, kv: KV) -> None:
    model, x = quantized(name, kv), tokens(2, 11)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    found = model.generate(x, **as_cache(model, quantized_cache(model)), **options)
    cache, text = quantized_cache(model), x
    new = x
    for _ in range(12):
        new = model(new, **as_cache(model, cache), use_cache=True).logits[:, -1:].argmax(-1)
        text = torch.cat([text, new], 1)
    assert torch.equal(found, text)


@torch.no_grad()
def test_beam_search_finds_what_transformers_own_cache_finds() -> None:
    model, x = quantized("llama", KV(3, 3)), tokens(2, 7)
    options = {"max_new_tokens": 10, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(x, **as_cache(model, quantized_cache(model)), **options), model.generate(x, **options)
    )


def test_padding_on_the_left_is_masked_as_ever() -> None:
    model, x = quantized("llama", KV(4, 4)), tokens(1, 9)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), x], 1)
    mask = torch.tensor([[0] * 3 + [1] * 9])
    positions = torch.tensor([[0] * 3 + list(range(9))])
    options = {"attention_mask": mask, "position_ids": positions, "use_cache": True}
    found = logits(model, padded, **as_cache(model, quantized_cache(model)), **options)
    assert close(found[:, 3:], logits(model, x))


# --- maps, clips, static ranges ---------------------------------------------------------------------------------------


def test_a_key_map_changes_nothing_but_the_error() -> None:
    x = tokens()
    plain = logits(build("llama").double(), x)
    right = torch.eye(16) + 0.3 * torch.randn(16, 16)
    for key_map in (Hadamard(16), Kronecker(None, right, (1, 16))):
        fine, coarse = (
            quantized("llama", KV(8, None), key_map=key_map),
            quantized("llama", KV(3, None), key_map=key_map),
        )
        assert (logits(fine, x) - plain).norm() < 0.1 * (logits(coarse, x) - plain).norm()
        without = logits(quantized("llama", KV(3, None)), x)
        assert not close(logits(coarse, x), without)
        assert torch.equal(
            logits(coarse, x), logits(coarse, x, **as_cache(coarse, quantized_cache(coarse)), use_cache=True)
        )
        assert close(logits(coarse, x), decoded(coarse, x, quantized_cache(coarse)))


def test_keys_mapped_back_give_the_scores_of_mapped_queries() -> None:
    """(q P^-T) Q(k P)' is the definition; here P^-1 is on the keys."""
    right = (torch.eye(W) + 0.2 * torch.randn(W, W)).double()
    queries, keys = heads().double(), heads().double()
    layer = LayerKV(KV(3, None), Kronecker(None, right.float(), (1, W)))
    mapped = fake_quantize((keys.float() @ right.float()), Quantizer(3)).double()
    expected = (queries @ torch.linalg.inv(right).T) @ mapped.mT
    torch.testing.assert_close(queries @ layer.fake(keys, 0).mT, expected, rtol=1e-4, atol=1e-4)


def test_a_rotation_spreads_an_outlier_channel() -> None:
    keys = heads(mean=0.0)
    keys[..., 3] *= 30
    errors = [
        float((LayerKV(KV(4, None), key_map).fake(keys, 0) - keys).square().mean()) for key_map in (None, Hadamard(W))
    ]
    assert errors[1] < 0.5 * errors[0]


def test_a_key_map_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match="key map has width 8"):
        logits(quantized("llama", KV(4, 4), key_map=Hadamard(8)), tokens())


def test_clips_reach_attention_and_cache_alike() -> None:
    x, clips = tokens(), torch.tensor([[0.8, 0.9], [0.7, 0.95]])
    model = quantized("llama", KV(4, 4), clips=clips)
    assert not close(logits(model, x), logits(quantized("llama", KV(4, 4)), x))
    assert torch.equal(logits(model, x), logits(model, x, **as_cache(model, quantized_cache(model)), use_cache=True))
    values = heads()
    expected = fake_quantize(values, Quantizer(4), clip=clips[1])
    assert torch.equal(LayerKV(KV(4, 4), clips=clips).fake(values, 1), expected)
    with pytest.raises(ValueError, match="static layout calibrates its own"):
        LayerKV(KV(4, 4, "head"), clips=clips)


@pytest.mark.parametrize("layout", ["head", "tensor"])
def test_static_ranges_are_those_of_calibration(layout: Any) -> None:
    model, calibration, x = quantized("llama", KV(4, 8, layout)), [tokens(seed=1), tokens(seed=2)], tokens()
    exact = logits(build("llama").double(), x)
    with pytest.raises(ValueError, match="run the model"):
        attached(model)["model.layers.0.self_attn"].freeze()
    assert torch.equal(logits(model, x), exact)  # watching changes nothing
    with pytest.raises(ValueError, match="not calibrated yet"):
        quantized_cache(model)

    model = quantized("llama", KV(4, 8, layout))
    seen: list[list[Tensor]] = [[], []]
    layer = attached(model)["model.layers.1.self_attn"]
    watch = layer.fake

    def remember(y: Tensor, side: int) -> Tensor:
        seen[side].append(y)
        return watch(y, side)

    layer.fake = remember  # type: ignore[method-assign]
    for batch in calibration:
        logits(model, batch)
    layer.fake = watch  # type: ignore[method-assign]
    for other in attached(model).values():
        other.freeze()
    for side, bits in enumerate((4, 8)):
        both = torch.cat(seen[side]).float()
        axes = (0, 2, 3) if layout == "head" else (0, 1, 2, 3)
        low, high = both.amin(axes), both.amax(axes)
        affine = layer.affine[side]
        assert affine is not None and affine.offset is not None
        assert torch.equal(affine.scale.flatten(), ((high - low) / (2**bits - 1)).half().flatten())
        assert torch.equal(affine.offset.flatten(), low.half().flatten())
        assert (layer.fake(100 * both, side) - high.reshape(1, -1, 1, 1)).max() < 0.01  # what lies beyond saturates
    frozen = logits(model, x)
    assert not close(frozen, exact)
    assert torch.equal(frozen, logits(model, x, **as_cache(model, quantized_cache(model)), use_cache=True))
    cache = quantized_cache(model)
    assert close(frozen, decoded(model, x, cache))
    elements = 2 * 2 * 2 * 12 * 16
    assert 8 * stored_bytes(cache) == elements * (4 + 8)  # scales belong to the model

    again = build("llama").double()
    for old, module in zip(attached(model).values(), attentions(again), strict=True):
        attach(module, old.kv, affine=old.affine)
    assert torch.equal(logits(again, x), frozen)


# --- attaching --------------------------------------------------------------------------------------------------------


def test_what_is_detached_leaves_no_trace() -> None:
    x = tokens()
    plain, model = logits(build("llama").double(), x), quantized("llama", KV(2, 2))
    for module in attentions(model):
        attach(module, KV(4, 4))
    other = quantized("llama", KV(4, 4))
    assert torch.equal(logits(model, x), logits(other, x))  # attached twice is quantized once
    twin = copy.deepcopy(model)
    for module in attentions(model):
        detach(module)
        detach(module)
    assert torch.equal(logits(model, x), plain) and not attached(model)
    assert torch.equal(logits(twin, x), logits(other, x))
    for module in attentions(twin):
        detach(module)
    assert torch.equal(logits(twin, x), plain)


@pytest.mark.parametrize(("name", "path"), [("llama", "self_attn"), ("gpt_neox", "attention")])
def test_the_anatomy_names_the_attention(name: str, path: str) -> None:
    anatomy = discover(TINY[name]())
    assert [part.attention for part in anatomy.blocks] == [path] * 2
    model = build(name)
    found = [f"{anatomy.layers}.{index}.{path}" for index in range(2)]
    assert [taker for taker, _ in attention_modules(model)] == found


def test_only_attention_can_be_attached_to() -> None:
    with pytest.raises(ValueError, match="Linear takes no key-value cache"):
        attach(nn.Linear(2, 2), KV(4, 4))


def test_a_cache_needs_no_attached_model() -> None:
    model, x = build("llama").double(), tokens()
    expected = logits(quantized("llama", KV(4, 2)), x)
    assert torch.equal(logits(model, x, **as_cache(model, quantized_cache(model, KV(4, 2))), use_cache=True), expected)
    with pytest.raises(ValueError, match="2 layers, and 1"):
        quantized_cache(model, [LayerKV(KV(4, 4))])


def test_models_with_other_state_are_refused() -> None:
    model = build("gemma3")
    model.config.layer_types = ["linear_attention", "full_attention"]
    with pytest.raises(ValueError, match="linear_attention"):
        quantized_cache(model)


def test_gradients_pass_to_weights_maps_and_clips() -> None:
    model = build("llama")
    factor = (torch.eye(16) + 0.01 * torch.randn(16, 16)).requires_grad_()
    clips = torch.full((2, 2), 0.9, requires_grad=True)
    for module in attentions(model):
        attach(module, KV(4, 4), Kronecker(None, factor, (1, 16)), clips)
    model(tokens(), use_cache=False).logits.square().mean().backward()
    weights = [p.grad for name, p in model.named_parameters() if "q_proj" in name or "k_proj" in name]
    for gradient in (factor.grad, clips.grad, *weights):
        assert gradient is not None and torch.isfinite(gradient).all() and (gradient != 0).all(-1).any()


# --- 8-bit attention --------------------------------------------------------------------------------------------------


def test_int8_attention_is_the_formula() -> None:
    """One head after the other, one row after the other, integers as integers."""
    query, key, value = torch.randn(1, 4, 5, W), torch.randn(1, 2, 5, W), torch.randn(1, 2, 5, W)
    products = Int8Products()

    def weigh(scores: Tensor) -> Tensor:
        mask = torch.ones(5, 5, dtype=torch.bool).tril()
        return (scores / math.sqrt(W)).float().masked_fill(~mask, -torch.inf).softmax(-1)

    exact = products(query, key, value, weigh)
    products.freeze()
    found = products(query, key, value, weigh)
    scales = [float(x.abs().max()) / 127 for x in (query, key, value)]
    for h, i in itertools.product(range(4), range(5)):
        q = [round(float(x) / scales[0]) for x in query[0, h, i]]
        scores = []
        for j in range(i + 1):
            k = [round(float(x) / scales[1]) for x in key[0, h // 2, j]]
            scores.append(sum(a * b for a, b in zip(q, k, strict=True)) * scales[0] * scales[1] / math.sqrt(W))
        weights = [round(127 * p) for p in torch.tensor(scores).softmax(0).tolist()]
        for c in range(W):
            total = sum(
                p * round(float(value[0, h // 2, j, c]) / scales[2]) for j, p in zip(range(i + 1), weights, strict=True)
            )
            assert found[0, h, i, c].item() == pytest.approx(total * scales[2] / 127, abs=1e-6)
    assert 0 < (found - exact).abs().max() < 0.1


def test_int8_probabilities_sum_to_one_within_their_steps() -> None:
    for length in (1, 7, 64, 500):
        probabilities = (3 * torch.randn(50, length)).softmax(-1)
        codes = quantize_probabilities(probabilities)
        assert codes.dtype == torch.uint8 and codes.max() <= 127
        assert ((codes.double().sum(-1) / 127 - 1).abs() <= length / 254 + 1e-6).all()


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "deepseek_v3", "mistral"])
def test_int8_attention_in_models(name: str, per_token: bool) -> None:
    model, x = double(name), tokens()
    exact = logits(model, x)
    for module in attentions(model):
        replace_products(module, Int8Products(per_token=per_token))
    assert close(logits(model, x), exact)  # calibrating computes as before
    for module in attentions(model):
        module.lowbit_products.freeze()
    found = logits(model, x)
    assert 1e-5 < (found - exact).abs().median() < 0.05 * exact.abs().median()  # a router may flip for some tokens
    changed = x.clone()
    changed[:, 8:] = changed[:, 8:].flip(1)
    assert torch.equal(logits(model, changed)[:, :8], found[:, :8])
    assert close(decoded(model, x, DynamicCache(config=model.config)), found)
    for module in attentions(model):
        restore_products(module)
    assert torch.equal(logits(model, x), exact)


@pytest.mark.parametrize("name", ["bloom", "falcon-7b", "falcon-rw"])
def test_attention_written_out_cannot_be_replaced(name: str) -> None:
    with pytest.raises(ValueError, match=r"(?i)^(bloom|falcon)\w* computes attention in its own code"):
        replace_products(attentions(build(name))[0], Int8Products())


def test_attention_with_sinks_is_refused() -> None:
    model = build("gpt_oss")
    replace_products(attentions(model)[0], Int8Products())
    with pytest.raises(ValueError, match="s_aux"):
        logits(model, tokens())


def test_int8_attention_needs_calibration() -> None:
    with pytest.raises(ValueError, match="needs calibration"):
        Int8Products().freeze()
