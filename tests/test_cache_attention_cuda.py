"""The CUDA C++ of attention to codes and to 16 bits: its very source on a CPU (`emulated.cuh`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from attention_oracle import by_formula
from test_cache_attention import FORMATS, Cache
from test_kernels import compiled_ahead, needs_gcc
from torch import Tensor

from lowbit.kernels import cache_attention_cuda
from lowbit.kernels.cache_attention_cuda import Plan

pytestmark = needs_gcc
Compile = Callable[..., Any]


class Case(NamedTuple):
    """A kernel to compile, and what it is given; without a name of a format, numbers of 16 bits."""

    name: str | None
    heads: int
    group: int
    width: int
    dtype: torch.dtype
    plan: Plan = Plan(16, 2, 66)
    masked: bool = False

    def query(self, texts: int) -> Tensor:
        """Random queries."""
        return (torch.randn(texts, self.heads * self.group, 1, self.width) * 2).to(self.dtype)

    def tokens(self, texts: int, length: int) -> tuple[Tensor, Tensor]:
        """Random keys and values."""
        keys, values = torch.randn(2, texts, self.heads, length, self.width) + 0.3
        return keys.to(self.dtype), values.to(self.dtype)


CASES = [
    Case("kv8", 2, 2, 64, torch.bfloat16),
    Case("zero", 2, 2, 64, torch.bfloat16),
    Case("static", 2, 2, 64, torch.bfloat16),
    Case("kv4", 1, 4, 64, torch.float16, Plan(32, 3, 1), masked=True),
    Case("together", 1, 4, 64, torch.float16, Plan(32, 3, 1), masked=True),
    Case("k2v4", 2, 11, 128, torch.bfloat16),
    Case("group", 1, 3, 256, torch.bfloat16),
    Case("symmetric", 2, 7, 64, torch.bfloat16),
    Case("e4m3", 2, 3, 128, torch.bfloat16),
    Case("kivi2", 1, 4, 64, torch.float16, Plan(16, 5, 9), masked=True),
    Case("kivi4", 1, 7, 64, torch.bfloat16, Plan(32, 1, 3)),
    Case("kivi8", 1, 8, 128, torch.float16),
    Case(None, 2, 3, 128, torch.bfloat16),
    Case(None, 1, 7, 64, torch.float16, Plan(16, 5, 9), masked=True),
]
"""Every format, width and state of a plan once; some share their source."""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compile]:
    """Emulated kernels, of which two are compiled at a time from the beginning: that is what takes longest."""

    def ask() -> None:
        for case in CASES:
            mask = torch.ones(1, 1, 1, 8, dtype=torch.bool) if case.masked else None
            found(case, case.query(1), *case.tokens(1, 1), mask)

    with compiled_ahead(tmp_path_factory.mktemp("kernels"), cache_attention_cuda, ask) as ready:
        yield ready


@pytest.fixture(autouse=True)
def emulated(kernels: Compile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real host code starts emulated kernels, and memory that nobody wrote is NaN."""
    new = torch.empty

    def empty(*shape: int, **options: Any) -> Tensor:
        made = new(*shape, **options)
        return made.fill_(float("nan") if made.is_floating_point() else 0x55)

    monkeypatch.setattr(cache_attention_cuda, "compiled", kernels)
    monkeypatch.setattr(cache_attention_cuda.torch, "empty", empty)
    monkeypatch.setattr(cache_attention_cuda.torch, "empty_like", lambda x: empty(*x.shape, dtype=x.dtype))
    monkeypatch.setattr(cache_attention_cuda, "processors", lambda _device: 1)


def found(
    case: Case, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float = 0.125
) -> tuple[Tensor, Tensor, Tensor]:
    """What the kernel finds in a cache that has room for more, and the keys and values that this holds."""
    if case.name is None:
        longer = [torch.cat([x, torch.full_like(x[:, :, :1], torch.nan)], 2)[:, :, :-1] for x in (keys, values)]
        assert cache_attention_cuda.shape_refusal(query, *longer) is None
        mask = None if mask is None else mask[..., : keys.shape[2]]
        return cache_attention_cuda.attend_plain(query, *longer, mask, scale, case.plan), keys, values
    cache = Cache(FORMATS[case.name], keys, values, keys.shape[2] + 7)
    sides = [side.operands for side in cache.sides], [side.format for side in cache.sides]
    assert cache_attention_cuda.format_refusal(query, sides[0][0], *sides[1]) is None
    out = cache_attention_cuda.attend(query, query, *sides[0], cache.count, mask, scale, *sides[1], case.plan)
    return out, *cache.seen


def check(case: Case, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> None:
    """One rounding to the output's format; values, or probabilities, are rounded before, to fp16 or as they came."""
    out, k, v = found(case, query, keys, values, mask, scale)
    expected = by_formula(query, k, v, mask, scale)
    size = by_formula(query, k, v.abs().amax(-1, keepdim=True).expand_as(v), mask, scale)
    product = torch.finfo(torch.float16 if case.name else case.dtype).eps / 2
    assert ((out.double() - expected).abs() <= torch.finfo(case.dtype).eps / 2 * expected.abs() + product * size).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_format_shape_and_plan(case: Case) -> None:
    """Lengths around a tile, more tiles than warps, more blocks than one, and every state of a window.

    Masks are for each text, or one for all; there are up to ten tiles to a warp. Counters are used again and again.
    """
    for length, texts in ((33, 2), (97, 1), (600, 2)) if case.masked else ((1, 1), (16, 2), (17, 1), (31, 2), (150, 1)):
        mask = None
        if case.masked:
            starts = torch.tensor([min(70, length - 1), 3])[:texts]
            mask = (torch.arange(length + 7) >= starts[:, None])[:, None, None]
        check(case, case.query(2), *case.tokens(2, length), mask, case.width**-0.5)


@pytest.mark.parametrize("case", CASES[:2], ids=str)
def test_large_scores_and_values_come_first_or_last(case: Case) -> None:
    """Scores in powers of two from 0 to 80, scales of values over 2^14; queries beyond fp16's range."""
    query = case.query(1) * 2.0**19
    for falling in (False, True):
        growth = torch.linspace(0, 1, 150).sort(descending=falling).values[:, None]
        keys = growth * query[0, ::2] / query[0, ::2].norm() * 7.8 + torch.randn(1, 2, 150, 64) / 16
        values = torch.randn(1, 2, 150, 64) * (14 * growth - 10).exp2()
        scale = 10 / float(query[0, 0].norm())
        check(case, query, keys.bfloat16(), values.bfloat16(), None, scale)


def test_a_key_map_turns_the_query_for_codes_only() -> None:
    """Codes see one query, the ring another."""
    case = next(case for case in CASES if case.name == "kivi4")
    query, turned = case.query(1), case.query(1)
    keys, values = case.tokens(1, 60)
    cache = Cache(FORMATS["kivi4"], keys, values, 64)
    coded = int(cache.sides[0].coded(cache.count))
    sides = [side.operands for side in cache.sides], [side.format for side in cache.sides]
    out = cache_attention_cuda.attend(query, turned, *sides[0], cache.count, None, 0.125, *sides[1], case.plan)
    scores = torch.cat(
        [turned.float() @ cache.seen[0][..., :coded, :].mT, query.float() @ keys[..., coded:, :].float().mT], -1
    )
    expected = (scores * 0.125).softmax(-1) @ cache.seen[1]
    assert ((out.float() - expected).abs() <= 2**-8 * expected.abs() + 2**-11).all()


def test_positions_of_16_bits_may_lie_apart() -> None:
    """All heads of a token together, as a projection makes them; what cannot be read by 16 bytes is refused."""
    case = CASES[-2]
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in case.tokens(2, 40))
    assert not keys.is_contiguous()
    check(case, case.query(2), keys, values, None, 0.1)
    wide = torch.zeros(1, 2, 9, 132, dtype=case.dtype)
    for refused in (wide[..., :128], wide.flatten()[4 : 4 + 2 * 9 * 128].view(1, 2, 9, 128)):
        assert "16 bytes" in str(cache_attention_cuda.shape_refusal(case.query(1), refused, refused))
    many = torch.zeros(1, 34, 1, 128)
    assert "share" in str(cache_attention_cuda.shape_refusal(many, wide, wide))
    assert "one format" in str(cache_attention_cuda.shape_refusal(case.query(1).half(), keys, values))


@pytest.mark.parametrize("places", [1, 100, 132, 264, 528])
def test_blocks_fill_the_places(places: int) -> None:
    """Never more than there is work for, and no more than a twentieth worse than the best number."""
    for shared in (1, 3, 8, 40, 128, 133, 200, 1024):
        for most in (1, 2, 40, 1000):
            splits = cache_attention_cuda._splits(shared, most, places)
            assert 1 <= splits <= most
            full = [shared * n / places / -(-shared * n // places) for n in range(1, min(most, 4) + 1)]
            assert shared * splits / places / -(-shared * splits // places) > max(full) - 0.05
