"""The decoding loop against `generate` of transformers, on a CPU and, with recorded steps, on a GPU."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from torch import Tensor
from transformers import PreTrainedModel

import lowbit
from lowbit.modules.attention import as_cache, attach, attention_modules
from lowbit.numerics.kv import KV
from lowbit.runtime import decode
from lowbit.runtime.cache import quantized_cache
from lowbit.runtime.decode import Decoder, decodable, end_tokens, likeliest

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FAMILIES = ["llama", "qwen3", "opt", "gpt2", "gpt_neox", "mixtral", "deepseek_v3", "stablelm"]
FAMILIES += ["bloom", "falcon-7b", "falcon-40b", "falcon-rw"]  # attention of their own, with ALiBi or without


def model_of(family: str) -> PreTrainedModel:
    return build(family).to(DEVICE).eval()


def prompts(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    return torch.randint(4, model.config.vocab_size, (batch, length), device=DEVICE)


def by_transformers(model: PreTrainedModel, ids: Tensor, tokens: int, cache: Any = None) -> Tensor:
    return model.generate(  # type: ignore[no-any-return]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, eos_token_id=None,
        pad_token_id=0, **as_cache(model, cache),
    )  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_it_says_what_generate_says(family: str) -> None:
    """Twice with one decoder, for recorded steps and an old cache; then another batch, and a prompt of one token."""
    model = model_of(family)
    assert decodable(model)
    decoder = Decoder(model, 32)
    for batch, length, tokens in ((2, 7, 20), (2, 5, 12), (1, 1, 9)):
        ids = prompts(model, batch, length)
        assert torch.equal(decoder(ids, tokens), by_transformers(model, ids, tokens))


def test_a_compiled_step_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch traces it; what its compiler makes of that is its own affair."""
    monkeypatch.setattr(decode.torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    model = model_of("llama")
    ids = prompts(model, 2, 5)
    assert torch.equal(Decoder(model, 16, compiled=True)(ids, 11), by_transformers(model, ids, 11))


@pytest.mark.parametrize("words", [1, 511, 512, 1000, 1537])
def test_the_likeliest_word_is_the_first_of_the_largest(words: int) -> None:
    scores = torch.randn(7, words).bfloat16().float()  # many are equal
    scores[0] = -torch.inf
    scores[0, words // 2] = -1e30
    assert torch.equal(likeliest(scores), scores.argmax(1, keepdim=True))


def test_a_text_that_ended_waits_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "LOOK", 3)
    model = model_of("llama")
    ids = prompts(model, 2, 4)
    free = by_transformers(model, ids, 12)
    end = int(free[0, 6])
    found = Decoder(model, 32)(ids, 12, [end])
    for row, text in zip(found, free, strict=True):
        expected = text.tolist()
        stop = expected.index(end, 4) if end in expected[4:] else len(expected) - 1
        expected = (expected[: stop + 1] + [end] * len(expected))[: found.shape[1]]
        assert row.tolist() == expected
    alone = Decoder(model, 32)(ids[:1], 12, [end])
    assert alone.shape[1] < 16 and (alone.shape[1] - 4) % 3 == 0


def test_temperature_draws_from_the_softmax() -> None:
    """Of a hundred texts' first words; a cold draw is the likeliest word."""
    model = model_of("llama")
    ids = prompts(model, 1, 6).expand(400, -1).contiguous()
    torch.manual_seed(0)
    drawn = Decoder(model, 8, temperature=2.0)(ids, 2)[:, 6]
    with torch.no_grad():
        shares = (model(ids[:1]).logits[0, -1].float() / 2).softmax(-1)
    counts = torch.bincount(drawn, minlength=len(shares)).double() / 400
    assert (counts - shares).abs().max() < 5 * float((shares.max() / 400).sqrt())
    assert len(drawn.unique()) > 20
    cold = Decoder(model, 8, temperature=1e-4)(ids[:1], 2)
    assert torch.equal(cold, by_transformers(model, ids[:1], 2))


def test_what_does_not_fit_is_refused() -> None:
    model = model_of("llama")
    with pytest.raises(ValueError, match="7 and 6 tokens are more than 12: ask for fewer"):
        Decoder(model, 12)(prompts(model, 1, 7), 6)
    assert not decodable(model_of("gemma3"))  # slides


@pytest.mark.parametrize("family", ["bloom", "falcon-7b", "llama"])
def test_codes_of_every_kind_of_attention(family: str) -> None:
    model = model_of(family)
    for _, module in list(attention_modules(model)):
        attach(module, KV(8, 8))
    ids = prompts(model, 2, 5)
    assert torch.equal(Decoder(model, 24)(ids, 9), by_transformers(model, ids, 9, quantized_cache(model)))


def test_a_loaded_models_codes_are_decodable(tmp_path: Path) -> None:
    lowbit.quantize("demo", "rtn-w4a16k4v4", tmp_path / "kv")
    model = lowbit.load(tmp_path / "kv", device=DEVICE, dtype=torch.float32)
    assert decodable(model)
    ids = prompts(model, 2, 5)
    assert torch.equal(Decoder(model, 16)(ids, 11), by_transformers(model, ids, 11, quantized_cache(model)))


def test_end_tokens() -> None:
    model = model_of("llama")
    for given, expected in ((None, []), (7, [7]), ([1, 2], [1, 2])):
        model.generation_config.eos_token_id = given
        assert end_tokens(model) == expected
