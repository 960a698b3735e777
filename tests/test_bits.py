"""Packing against a packer that writes bits into one large Python integer, and codes against what they stand for."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from lowbit.numerics.bits import pack, packed_length, unpack
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.qtensor import QTensor, QWeight
from lowbit.numerics.spec import (
    E2M1,
    E4M3,
    E5M2,
    Int,
    Number,
    Rule,
    Spec,
    per_block,
    per_channel,
    per_group,
    per_tensor,
)

NUMBERS: list[Number] = [
    *(Int(b, r) for r in get_args(Rule) for b in range(1, 9) if (b, r) != (1, "symmetric-restricted")),
    *(E4M3, E5M2, E2M1),
]


def bit_stream(codes: list[int], bits: int) -> bytes:
    """Code i at bits [i·b, (i+1)·b) of a little-endian integer, rounded up to whole groups of eight codes."""
    number = sum((code & ((1 << bits) - 1)) << (i * bits) for i, code in enumerate(codes))
    return number.to_bytes(-(-len(codes) // 8) * bits, "little")


def random_codes(shape: tuple[int, ...], bits: int, signed: bool) -> Tensor:
    low = -(1 << (bits - 1)) if signed else 0
    return torch.randint(low, low + (1 << bits), shape).to(torch.int8 if signed else torch.uint8)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [False, True])
def test_pack_writes_the_bit_stream_and_unpack_reads_it(bits: int, signed: bool) -> None:
    for length in (1, 2, 7, 8, 9, 31, 64):
        codes = random_codes((3, 2, length), bits, signed)
        packed = pack(codes, bits)
        width = packed_length(length, bits) if bits < 8 else length
        assert packed.dtype == torch.uint8 and packed.shape == (3, 2, width)
        if bits < 8 or length % 8 == 0:
            rows = codes.reshape(-1, length).tolist()
            assert [bytes(row) for row in packed.reshape(-1, width).tolist()] == [bit_stream(r, bits) for r in rows]
        back = unpack(packed, bits, length, signed=signed)
        assert back.dtype == codes.dtype and torch.equal(back, codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_non_contiguous_codes_and_bytes(bits: int) -> None:
    codes = random_codes((24, 10), bits, True).T
    assert not codes.is_contiguous()
    packed = pack(codes, bits)
    assert packed.is_contiguous() and torch.equal(packed, pack(codes.contiguous(), bits))
    strided = torch.stack([packed, packed], -1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(unpack(strided, bits, 24, signed=True), codes)


def test_int4_puts_the_even_index_in_the_low_nibble_as_twos_complement() -> None:
    codes = torch.tensor([[1, -2, 7, -8, -1, 0, 3, 5]], dtype=torch.int8)
    assert pack(codes, 4).tolist() == [[0xE1, 0x87, 0x0F, 0x53]]
    assert unpack(torch.tensor([[0xE1, 0x87, 0x0F, 0x53]], dtype=torch.uint8), 4, 8, signed=True).equal(codes)


def test_wide_integers_pack_like_narrow_ones() -> None:
    codes = random_codes((4, 16), 3, True)
    assert torch.equal(pack(codes.long(), 3), pack(codes, 3))


def test_large_tensors_are_worked_on_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes((50, 40), 3, True)
    whole = pack(codes, 3)
    monkeypatch.setattr("lowbit.numerics.bits._ROWS", 7)
    assert torch.equal(pack(codes, 3), whole)
    assert torch.equal(unpack(whole, 3, 40, signed=True), codes)


# --- codes with their grid --------------------------------------------------------------------------------------------


def stored_and_loaded(codes: Tensor, bits: int) -> Tensor:
    signed = codes.dtype == torch.int8
    return unpack(pack(codes, bits), bits, codes.shape[-1], signed=signed)


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_dequantize_is_fake_quantization(number: Number) -> None:
    """Real codes, packed and unpacked, give what rounding in place gives: the same fp32 numbers."""
    x = torch.randn(10, 24)
    x[0] = 0
    for spec in (per_channel(number), per_group(number, 8, scale="float32"), per_tensor(number, scale="bfloat16")):
        grid = fit_range(x, spec)
        tensor = QTensor(stored_and_loaded(grid.encode(x), number.bits), grid)
        assert torch.equal(tensor.dequantize(), grid.quantize(x))
        assert torch.equal(tensor.dequantize(torch.bfloat16), grid.quantize(x).bfloat16())
        assert tensor.shape == x.shape and tensor.group_index is None


@pytest.mark.parametrize("number", [Int(4), Int(3, "asymmetric"), E4M3], ids=str)
def test_dequantize_with_groups_of_permuted_columns(number: Number) -> None:
    """Column order[j] belongs to group j // 8; codes stay in natural order."""
    x, order = torch.randn(6, 32), torch.randperm(32)
    grid = fit_range(x[:, order], per_group(number, 8))
    expected, codes = torch.empty_like(x), torch.empty(6, 32, dtype=grid.encode(x).dtype)
    expected[:, order] = grid.quantize(x[:, order])
    codes[:, order] = grid.encode(x[:, order])
    tensor = QTensor(codes, grid, order)
    assert torch.equal(tensor.dequantize(), expected)
    assert not torch.equal(QTensor(codes, grid).dequantize(), expected)
    assert tensor.group_index is not None
    assert tensor.group_index.dtype == torch.int32
    assert tensor.group_index.tolist() == [order.tolist().index(column) // 8 for column in range(32)]
    scale = grid.scale[:, tensor.group_index.long()]
    assert torch.equal(grid.decode(codes[:, order])[:, order.argsort()], expected)
    if grid.zero is None:
        levels = codes.float() if isinstance(number, Int) else codes.view(torch.float8_e4m3fn).float()
        assert torch.equal(levels * scale, expected)


@pytest.mark.parametrize("spec", [per_channel(Int(4)), per_group(Int(4, "asymmetric"), 8), per_block(E4M3, 4)], ids=str)
def test_rows_of_a_fused_weight(spec: Spec) -> None:
    x = torch.randn(12, 16)
    grid = fit_range(x, spec)
    tensor = QTensor(grid.encode(x), grid)
    for start, stop in ((0, 4), (4, 12), (8, 12)):
        part = tensor.rows(start, stop)
        assert part.grid.scale.numel() < grid.scale.numel()
        assert torch.equal(part.dequantize(), tensor.dequantize()[start:stop])


def test_rows_under_one_scale() -> None:
    x = torch.randn(12, 16)
    grid = fit_range(x, per_tensor(Int(8)))
    tensor = QTensor(grid.encode(x), grid)
    assert torch.equal(tensor.rows(3, 7).dequantize(), tensor.dequantize()[3:7])


def test_rows_do_not_cut_a_unit() -> None:
    x = torch.randn(12, 16)
    grid = fit_range(x, per_block(E4M3, 4))
    with pytest.raises(AssertionError, match="straddles"):
        QTensor(grid.encode(x), grid).rows(2, 6)


def test_a_weight_is_the_sum_of_its_parts_in_fp32() -> None:
    x = torch.randn(5, 16)
    first = fit_range(x, per_channel(Int(2)))
    rest = x - first.quantize(x)
    second = fit_range(rest, per_group(Int(3, "asymmetric"), 8))
    weight = QWeight((QTensor(first.encode(x), first), QTensor(second.encode(rest), second)))
    total = first.quantize(x) + second.quantize(rest)
    assert weight.shape == (5, 16)
    assert torch.equal(weight.dequantize(), total)
    assert torch.equal(weight.dequantize(torch.float16), total.half())
    assert (weight.dequantize() - x).square().mean() < 0.2 * rest.square().mean()


def test_levels_are_values_over_their_scale() -> None:
    x = torch.randn(7, 9)
    for spec in (per_channel(Int(4)), per_channel(Int(4, "asymmetric")), per_channel(E4M3), per_block(Int(4), 4)):
        grid = fit_range(x, spec)
        scale = grid.scale.expand(7, 1) if not spec.square else grid.scale.repeat_interleave(4, 0)[:7]
        scale = scale if not spec.square else scale.repeat_interleave(4, 1)[:, :9]
        assert torch.equal(grid.levels(x) * scale, grid.quantize(x))


def test_moving_takes_everything_along() -> None:
    grid = Grid(per_channel(Int(4, "asymmetric")), torch.ones(2, 1), torch.ones(2, 1))
    moved = QTensor(torch.zeros(2, 4, dtype=torch.uint8), grid, torch.arange(4)).to("meta")
    assert moved.grid.zero is not None and moved.order is not None
    assert {t.device.type for t in (moved.codes, moved.grid.scale, moved.grid.zero, moved.order)} == {"meta"}
