"""Attention to codes, and a token's way into them, by kernels: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from attention_oracle import by_formula
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lowbit.kernels import cache_append, cache_attention
from lowbit.kernels.cache_append import empty, fill
from lowbit.kernels.cache_attention import Held, format_refusal
from lowbit.kernels.compile import available
from lowbit.modules.attention import as_cache, attach, attention_modules
from lowbit.numerics.kv import KV, Quantizer, decode, encode, fit, kivi
from lowbit.runtime.decode import Decoder, one_token
from lowbit.runtime.fixed import fixed_cache

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
FORMATS = {
    "kv8": KV(8, 8),
    "kv4": KV(4, 4),
    "k8v2": KV(8, 2),
    "k2v4": KV(2, 4, "group", 16),
    "group": KV(4, 8, "group", 32),
    "zero": KV(4, 4, rule="zero-point"),
    "symmetric": KV(8, 2, rule="symmetric"),
    "together": KV(4, 4, together=True),
    "e4m3": KV(8, 8, rule="e4m3"),
    "static": KV(8, 8, "head"),
    "kivi2": kivi(2, 2, group=32, residual=32),
    "kivi4": kivi(4, 4, group=16, residual=16),
    "kivi8": kivi(8, 2, group=8, residual=16),
    "kivi-wide": kivi(2, 2, group=128, residual=128),
}
SLOW = () if GPU else ("kivi2", "kivi-wide")
"""Windows that the interpreter takes long to fill, by the code of smaller ones."""
WRITTEN = [name for name in FORMATS if name not in ("together", "e4m3", "static", *SLOW)]
DTYPES = [(name, torch.float16) for name in FORMATS] + [
    (name, torch.bfloat16) for name in FORMATS if GPU or name in ("kv4", "group")
]
"""The interpreter takes the bits of bf16 operands for integers, and a ring's keys are such."""
KERNELS = ["triton", *(["cuda"] if GPU and available(torch.cuda.current_device()) else [])]
"""`test_cache_attention_cuda.py` runs the other one's source where there is no GPU."""
SHAPES = [(1, 4, 1, 64), (1, 6, 2, 64), (1, 7, 1, 128), *([(2, 12, 1, 128), (3, 16, 2, 256)] if GPU else [])]
LENGTHS = [1, 15, 63, 64, 65, 1000, 4097] if GPU else [1, 100]


class Cache:
    """A filled cache of two sides, and the exact values that its codes stand for."""

    def __init__(self, kv: KV, keys: Tensor, values: Tensor, room: int) -> None:
        self.parts = (kv.key_quantizer, kv.value_quantizer)
        self.count = torch.tensor(keys.shape[2], device=keys.device)
        sides, seen = [], []
        for side, (x, part) in enumerate(zip((keys, values), self.parts, strict=True)):
            assert part is not None
            affine = fit(*part.range(x), part) if part.static else None
            make = partial(encode, quantizer=part, affine=affine)
            held = empty(x, part, make, room, window=kv.residual, whole=side == 0, affine=affine)
            poison(held)
            coded = int(held.coded(self.count))
            coded = coded // part.tokens * part.tokens
            encoded = make(x[:, :, :coded]) if coded else None
            exact = x[:, :, coded:]
            fill(held, encoded, exact[:, :, -held.exact.shape[2] :] if held.exact is not None else None)
            old = decode(encoded, part, x.shape[-1], affine=affine) if encoded else x[:, :, :0].float()
            seen.append(torch.cat([old, exact.float()], 2))
            sides.append(held)
        self.sides, self.seen = (sides[0], sides[1]), (seen[0], seen[1])


def poison(held: Held) -> None:
    """What was not written is not read: NaN in scales and rings, ones in codes."""
    assert held.codes is not None and held.affine is not None and held.quantizer is not None
    held.codes.fill_(255)
    scales = () if held.quantizer.static else held.affine
    for part in (*scales, held.exact):
        if part is not None:
            part.fill_(float("nan") if part.is_floating_point() else 255)


def attend(
    kernel: str, query: Tensor, cache: Cache, mask: Tensor | None, scale: float, turned: Tensor | None = None,
    much: bool = False,
) -> Tensor:  # fmt: skip
    """A kernel, wherever it runs; the CUDA C++ by its plan for much work or for little."""
    from lowbit.kernels import cache_attention_cuda, cache_attention_triton

    keys, values = cache.sides
    operands = (
        query, query if turned is None else turned, keys.operands, values.operands, cache.count, mask, scale,
        keys.format, values.format,
    )  # fmt: skip
    if kernel == "triton":
        return cache_attention_triton.attend(*operands)
    group, bits = query.shape[1] // cache.seen[0].shape[1], max(keys.format[0], values.format[0])
    plan = cache_attention_cuda.plan(query.shape[-1], group, bits, 1e6 if much else 1.0)
    return cache_attention_cuda.attend(*operands, plan)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("name", "dtype"), DTYPES, ids=str)
def test_one_token_attends_to_codes(name: str, dtype: torch.dtype, kernel: str) -> None:
    """Lengths that fill no block, splits without a position, odd groups of heads, room for more; twice each."""
    behind = [150] if FORMATS[name].residual >= 100 else []
    for index, length in enumerate(LENGTHS + behind):
        number = (index + 1) % len(SHAPES)
        texts, heads, shared, width = SHAPES[number]
        much = (number % 2 == 0) == (dtype == torch.float16)
        query = torch.randn(texts, heads, 1, width, device=DEVICE).to(dtype)
        keys, values = ((torch.randn(texts, shared, length, width, device=DEVICE) + 0.3).to(dtype) for _ in range(2))
        cache = Cache(FORMATS[name], keys, values, length + 70)
        expected = by_formula(query, *cache.seen, None, width**-0.5)
        for _ in range(2):
            found = attend(kernel, query, cache, None, width**-0.5, much=much)
            assert ((found.double() - expected).abs() <= 4 * torch.finfo(dtype).eps * (1 + expected.abs())).all()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["kv4", "kivi2"])
@pytest.mark.parametrize("each", [False, True])
def test_masked_positions_are_not_seen(each: bool, name: str, kernel: str) -> None:
    texts, length = 2, 120
    query = torch.randn(texts, 4, 1, 64, device=DEVICE).half()
    keys, values = (torch.randn(texts, 2, length, 64, device=DEVICE).half() for _ in range(2))
    cache = Cache(FORMATS[name], keys, values, length + 3)
    starts = torch.tensor([70, 3])[: texts if each else 1]
    mask = (torch.arange(length + 3) >= starts[:, None])[:, None, None].to(DEVICE)
    found = attend(kernel, query, cache, mask, 0.125)
    expected = by_formula(query, *cache.seen, mask, 0.125)
    assert ((found.double() - expected).abs() <= 2**-8 * (1 + expected.abs())).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_key_map_turns_the_query_for_codes_only(kernel: str) -> None:
    """Rotated keys in codes, keys as they came in the ring."""
    turn = torch.linalg.qr(torch.randn(64, 64))[0]
    query = torch.randn(1, 4, 1, 64).half().to(DEVICE)
    keys, values = (torch.randn(1, 1, 70, 64).half().to(DEVICE) for _ in range(2))
    part = kivi(4, 4, group=16, residual=32)
    coded = 64
    cache = Cache(part, keys, values, 80)
    turned_keys = (keys.float() @ turn.to(DEVICE)).half()
    key_part = part.key_quantizer
    assert key_part is not None
    encoded = encode(turned_keys[:, :, :coded].float(), key_part)
    fill(cache.sides[0], encoded, None)
    seen = torch.cat([decode(encoded, key_part, 64) @ turn.T.to(DEVICE), keys[:, :, coded:].float()], 2)
    found = attend(kernel, query, cache, None, 0.125, (query.float() @ turn.to(DEVICE)).half())
    expected = by_formula(query, seen, cache.seen[1], None, 0.125)
    assert ((found.double() - expected).abs() <= 2**-8 * (1 + expected.abs())).all()


@pytest.mark.parametrize(
    ("name", "clipped"), [*((name, False) for name in WRITTEN), ("zero", True), ("group", True), ("kivi8", True)]
)
def test_tokens_are_written_as_torch_writes_them(name: str, clipped: bool) -> None:
    """Bit for bit, over two windows and from prompts within one; what is written nowhere stays."""
    from lowbit.kernels.cache_append_triton import append as fused

    kv, clips = FORMATS[name], torch.tensor([[0.83, 0.91], [0.77, 1.0]], device=DEVICE) if clipped else None
    first, steps = (kv.residual - 2, kv.residual + 5) if kv.residual else (5, 3)
    keys, values = ((torch.randn(1, 2, first + steps, 64) * 3 + 0.5).half().to(DEVICE) for _ in range(2))
    keys[0, 0, first + 1], values[0, 1, first + 2] = 0, 2.5
    rivals = []
    for _ in range(2):
        sides, encoders = [], []
        for side, part in enumerate((kv.key_quantizer, kv.value_quantizer)):
            assert part is not None
            make = partial(encode, quantizer=part, clip=None if clips is None else clips[side])
            sides.append(empty(keys, part, make, first + steps, window=kv.residual, whole=side == 0))
            exact = (keys, values)[side][:, :, :first]
            fill(sides[-1], None if kv.residual else make(exact), exact)
            encoders.append(make)
        rivals.append((sides, encoders))
    prompt = torch.tensor(first, device=DEVICE)
    (mine, _), (theirs, encoders) = rivals
    for place in range(first, first + steps):
        length = torch.tensor(place, device=DEVICE)
        new = keys[:, :, place : place + 1], values[:, :, place : place + 1]
        fused(*new, mine[0].operands, mine[1].operands, length, prompt, clips, mine[0].format, mine[1].format)
        for held, x, make in zip(theirs, new, encoders, strict=True):
            cache_append.reference(held, x, length, prompt, make)
    for ours, other in zip(mine, theirs, strict=True):
        for found, expected in zip(ours.tensors, other.tensors, strict=True):
            assert torch.equal(found, expected)


def test_what_kernels_do_not_take_has_a_reason() -> None:
    like = torch.zeros(1, 1, 8, 64)
    held = {
        "bits": Quantizer(3), "group": Quantizer(4, "group", 24), "byte": Quantizer(2, "group", 2),
        "good": Quantizer(2, "channel", 8),
    }  # fmt: skip
    found = {}
    for name, part in held.items():
        shape = like[..., :48] if name == "group" else like
        side = empty(shape, part, partial(encode, quantizer=part), 8, window=8 * (name == "good"))
        found[name] = format_refusal(side)
    assert "straddle" in str(found["bits"]) and "power of two" in str(found["group"])
    assert "less than a byte" in str(found["byte"]) and found["good"] is None
    assert "16 bits" in str(format_refusal(empty(like, None, lambda x: pytest.fail("encoded"), 8)))
    side = empty(like, Quantizer(4), partial(encode, quantizer=Quantizer(4)), 8)
    reason = cache_attention.refusal(torch.zeros(1, 1, 1, 64), side, side, None)
    assert reason is not None and "bf16" in reason


@pytest.mark.parametrize("kv", [KV(4, 2), kivi(2, 4, group=8, residual=8)], ids=["token", "kivi"])
def test_a_model_decodes_by_kernels_as_by_torch(kv: KV, monkeypatch: pytest.MonkeyPatch) -> None:
    """All codes, bit for bit, and the logits up to what a few roundings to 16 bits do; by way of the operators."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).half().to(DEVICE).eval()
    for _, module in attention_modules(model):
        attach(module, kv)
    ids, logits, caches = torch.randint(64, (1, 11), device=DEVICE), [], []
    for reason in ("torch is wanted", None):
        for kernels in (cache_attention, cache_append):
            monkeypatch.setattr(kernels, "refusal", partial(lambda reason, *_: reason, reason))
        cache = fixed_cache(model, 14)
        call = partial(model, **as_cache(model, cache), use_cache=True)
        with torch.no_grad(), one_token(model, cache):
            found = [call(input_ids=ids[:, :6]).logits[:, -1:]]
            found += [call(input_ids=ids[:, place : place + 1]).logits for place in range(6, 11)]
        logits.append(torch.cat(found, 1).float())
        caches.append(cache.layers[0])
    for one, other in zip(*(layer.held for layer in caches), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))
    assert (logits[0] - logits[1]).norm() <= 2**-8 * logits[0].norm()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs CUDA")
@pytest.mark.parametrize("kv", [KV(8, 8), KV(4, 4, rule="zero-point"), KV(3, 3), kivi(2, 2, group=32, residual=32)])
def test_recorded_steps_say_what_they_say_eagerly(kv: KV) -> None:
    """Past a window's end, in a second text too; with formats that torch dequantizes as well."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().to(DEVICE).eval()
    for _, module in attention_modules(model):
        attach(module, kv)
    recorded, eager = Decoder(model, 150), Decoder(model, 150)
    for length in (17, 60):
        ids = torch.randint(256, (3, length), device=DEVICE)
        eager._begin(ids)  # makes its step
        eager._step._records = False
        assert torch.equal(recorded(ids, 80), eager(ids, 80))
    assert recorded._step._graphs and not eager._step._graphs


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs CUDA")
@pytest.mark.parametrize("name", ["kv8", "kivi2"])
def test_splits_meet_every_time(name: str) -> None:
    """The same bits, a hundred times, by the operator that models call; and what it says is its definition's."""
    query = torch.randn(2, 32, 1, 128, device=DEVICE).bfloat16()
    keys, values = (torch.randn(2, 8, 4099, 128, device=DEVICE).bfloat16() for _ in range(2))
    cache = Cache(FORMATS[name], keys, values, 4200)
    call = partial(cache_attention.attend, query, *cache.sides, cache.count, None, 0.1, None)
    assert cache_attention.refusal(query, *cache.sides, None) is None
    first = call()
    expected = by_formula(query, *cache.seen, None, 0.1)
    assert ((first.double() - expected).abs() <= 2**-8 * expected.abs() + 2**-10).all()
    for _ in range(100):
        assert torch.equal(call(), first)
