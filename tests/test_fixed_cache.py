"""The cache of fixed length against the one that grows: the same codes, and the same logits up to the order of sums."""

from __future__ import annotations

import copy
from functools import cache, partial
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor
from transformers import PreTrainedModel

from lowbit.graph import unfuse_experts
from lowbit.kernels import cache_append, cache_attention
from lowbit.kernels.cache_attention import Held
from lowbit.modules.attention import LayerKV, as_cache, attach, attention_modules
from lowbit.numerics.kv import KV, Encoded, kivi
from lowbit.numerics.maps import Hadamard
from lowbit.runtime.cache import QuantizedLayer, quantized_cache
from lowbit.runtime.decode import Decoder, decodable, one_token
from lowbit.runtime.fixed import Layer, agree, fixed_cache

B, K, W = 2, 2, 16
SMALL = kivi(2, 2, group=4, residual=8)
FORMATS = {
    "kv8": KV(8, 8),
    "k4v2": KV(4, 2),
    "kv3": KV(3, 3),
    "together": KV(4, 4, together=True),
    "group": KV(4, 4, "group", 8),
    "zero": KV(4, 4, rule="zero-point"),
    "symmetric": KV(8, 8, rule="symmetric"),
    "e4m3": KV(8, 8, rule="e4m3"),
    "values": KV(None, 4),
    "kivi2": SMALL,
    "kivi4": kivi(4, 4, group=8, residual=8),
    "kivi-keys": kivi(2, None, group=4, residual=8),  # type: ignore[arg-type]
}


def same_codes(held: Held, encoded: Encoded | None, later: Held, count: int) -> None:
    """A cache of `count` tokens holds these codes, `later`, with a token more, at the latest: a window that is full is
    encoded by the token behind it.
    """
    coded = encoded.tokens if encoded else 0
    if held.quantizer is None or encoded is None:
        assert held.quantizer is None or int(held.coded(torch.tensor(count + 1))) == 0
        return
    assert held.codes is not None and later.codes is not None
    assert int(later.coded(torch.tensor(count + 1))) == coded + (not held.window)
    assert torch.equal(later.codes[:, :, :coded], encoded.codes)
    for mine, theirs in zip(later.affine or (), encoded.affine or (), strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None and theirs is not None:
            assert torch.equal(mine[:, :, : theirs.shape[2]], theirs)


@pytest.mark.parametrize(
    ("name", "prompt"), [*((name, 7) for name in FORMATS), *(("kivi2", prompt) for prompt in (1, 8, 9, 21))]
)
def test_codes_are_those_of_the_growing_cache(name: str, prompt: int) -> None:
    """After every step, twice, the second time behind another text's codes; steps see what they see there."""
    layer = LayerKV(FORMATS[name], clips=torch.tensor([[0.8, 0.9], [1.0, 0.7]]) if name == "group" else None)
    fixed = Layer(layer, 40)
    for _ in range(2):
        keys, values = torch.randn(2, B, K, 27, W) + 0.5
        growing = QuantizedLayer(layer)
        fixed.reset()
        for start, stop in [(0, prompt), *((t, t + 1) for t in range(prompt, 27))]:
            new = keys[:, :, start:stop], values[:, :, start:stop]
            expected, seen = growing.update(*new), fixed.update(*new)
            assert fixed.held is not None
            for mine, theirs in zip(seen, expected, strict=True):
                assert torch.equal(mine[:, :, :stop], theirs)
            later = copy.deepcopy(fixed)
            later.update(*(x[:, :, :1] for x in (keys, values)))
            assert later.held is not None
            for held, store, after in zip(fixed.held, growing.stores, later.held, strict=True):
                same_codes(held, store.encoded, after, stop)


def test_calibrated_ranges_belong_to_the_model() -> None:
    layer = LayerKV(KV(8, 4, "head"))
    keys, values = torch.randn(2, B, K, 12, W)
    for side, x in enumerate((keys, values)):
        layer.fake(x, side)
    layer.freeze()
    fixed, growing = Layer(layer, 12), QuantizedLayer(layer)
    for start, stop in ((0, 5), *((t, t + 1) for t in range(5, 12))):
        new = keys[:, :, start:stop], values[:, :, start:stop]
        seen, expected = fixed.update(*new), growing.update(*new)
        assert all(torch.equal(a[:, :, :stop], b) for a, b in zip(seen, expected, strict=True))
    assert fixed.bytes == B * K * 12 * (W + W // 2)


def test_tensors_stay_where_they_are() -> None:
    """Where a recorded step writes, in the next text too; the bytes are those of a full cache."""
    fixed = Layer(LayerKV(KV(4, 4)), 16)
    fixed.update(*torch.randn(2, B, K, 5, W))
    held = [part for side in fixed.held or () for part in side.tensors]
    places = [part.data_ptr() for part in held]
    for _ in range(2):
        for _ in range(11):
            fixed.update(*torch.randn(2, B, K, 1, W))
        fixed.reset()
        fixed.update(*torch.randn(2, B, K, 5, W))
    assert [part.data_ptr() for side in fixed.held or () for part in side.tensors] == places
    assert 8 * fixed.bytes == 2 * B * K * 16 * W * KV(4, 4).bits_per_element(W)


# --- models -----------------------------------------------------------------------------------------------------------


@cache
def _built(family: str) -> PreTrainedModel:
    model = build(family).eval()
    unfuse_experts(model)  # the grouped product knows no double precision
    return model


def model_of(family: str, kv: KV, dtype: torch.dtype = torch.float64, **options: Any) -> PreTrainedModel:
    model = copy.deepcopy(_built(family)).to(dtype)
    for _, module in attention_modules(model):
        attach(module, kv, **options)
    return model


def prompts(batch: int, length: int) -> Tensor:
    return torch.randint(4, 128, (batch, length))


@torch.no_grad()
def steps(model: PreTrainedModel, ids: Tensor, prompt: int, held: Any, step: Any) -> Tensor:
    """Logits of every token from the prompt's last on."""
    found = []
    for part in (ids[:, :prompt], *ids[:, prompt:].split(1, 1)):
        shown = {}
        if model.config.model_type == "bloom":  # as `Decoder` does for ALiBi
            shown = {"attention_mask": ids.new_ones(len(ids), held.get_mask_sizes(part.shape[1], 0)[0])}
        with step():
            found.append(model(input_ids=part, use_cache=True, **shown, **as_cache(model, held)).logits[:, -1:])
    return torch.cat(found, 1)


class Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


CASES = [
    *((family, "kv8", 7, torch.float64) for family in ("llama", "qwen2", "opt", "gpt2", "bloom", "falcon-7b")),
    ("deepseek_v3", "kv8", 7, torch.float64),
    *(("llama", name, 7, torch.float64) for name in ("kv3", "together", "group", "e4m3", "values", "kivi-keys")),
    ("llama", "kivi2", 16, torch.float64),
    ("qwen2", "kivi2", 1, torch.float64),
    ("qwen2", "kivi4", 16, torch.bfloat16),
    ("llama", "kv8", 9, torch.bfloat16),
    ("llama", "kv8", 9, torch.float32),
]


@pytest.mark.parametrize(("family", "name", "prompt", "dtype"), CASES, ids=str)
def test_logits_are_those_of_the_growing_cache(family: str, name: str, prompt: int, dtype: torch.dtype) -> None:
    """Each within 1e-6 of the largest in double precision, where no code flips by the order of sums in a layer before.
    In fp32 a code may, and in bf16 some do: there the norm of all differences is small.
    """
    model, ids = model_of(family, FORMATS[name], dtype), prompts(2, 22)
    expected = steps(model, ids, prompt, quantized_cache(model), Nothing)
    held = fixed_cache(model, 23)
    found = steps(model, ids, prompt, held, partial(one_token, model, held))
    if dtype == torch.float64:
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()
    else:
        bound = 1e-4 if dtype == torch.float32 else 2**-6
        assert (found - expected).float().norm() <= bound * expected.float().norm()
    direct = family not in ("bloom", "falcon-7b", "deepseek_v3")
    assert [layer.direct for layer in held.layers] == [direct] * len(held.layers)


def test_mapped_keys_are_read_through_the_query_or_mapped_back() -> None:
    for kv in (KV(4, 4), SMALL):
        model, ids = model_of("llama", kv, key_map=Hadamard(16)), prompts(2, 24)
        expected = steps(model, ids, 5, quantized_cache(model), Nothing)
        held = fixed_cache(model, 24)
        found = steps(model, ids, 5, held, partial(one_token, model, held))
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_padding_on_the_left_is_masked_as_ever() -> None:
    model, x = model_of("llama", SMALL), prompts(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :3] = 0
    texts = []
    for held, step in ((quantized_cache(model), Nothing), (fixed_cache(model, 20), None)):
        call = partial(model, use_cache=True, **as_cache(model, held))
        with torch.no_grad(), step() if step else one_token(model, held):
            call(input_ids=x[:, :11], attention_mask=mask[:, :11])
            texts.append(
                torch.cat(
                    [call(input_ids=x[:, t : t + 1], attention_mask=mask[:, : t + 1]).logits for t in range(11, 20)], 1
                )
            )
    assert (texts[0] - texts[1]).abs().max() <= 1e-6 * texts[0].abs().max()


@pytest.mark.parametrize("kv", [KV(4, 4), SMALL], ids=["token", "kivi"])
def test_a_decoder_says_what_generate_says(kv: KV) -> None:
    model = model_of("llama", kv)
    assert decodable(model)
    decoder = Decoder(model, 40)
    for batch, length, tokens in ((2, 7, 25), (2, 9, 12), (1, 1, 9)):
        ids = prompts(batch, length)
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
            pad_token_id=0, **as_cache(model, quantized_cache(model)),
        )  # fmt: skip
        assert torch.equal(decoder(ids, tokens), expected)
    assert all(module.lowbit_kv.held is None for _, module in attention_modules(model))


def test_ranges_that_are_not_calibrated_are_not_decodable() -> None:
    assert not decodable(model_of("llama", KV(8, 8, "head")))
    assert not decodable(model_of("mistral", KV(4, 4)))  # slides


@pytest.mark.parametrize("broken", ["attend", "append"])
def test_kernels_that_compute_something_else_are_found_out(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they are used: a wrong sum, or codes in the wrong place."""
    trial = partial(agree, SMALL, W, torch.float32, torch.device("cpu"))
    assert trial()
    if broken == "attend":
        right = cache_attention.attend
        monkeypatch.setattr(cache_attention, "attend", lambda *args: right(*args) * 1.1)
    else:
        write = cache_append.append
        monkeypatch.setattr(cache_append, "append", lambda k, v, new, *rest: write(k, v, (new[1], new[1]), *rest))
    assert not trial()
