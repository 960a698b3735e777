"""GGUF's blocks against the `gguf` package's own reader, and packing against its inverse, bit for bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.formats import gguf_blocks as blocks
from lowbit.formats import native
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.spec import E2M1, Int, Spec, kquant, mx, per_channel, per_group

gguf = pytest.importorskip("gguf", reason="needs pip install 'lowbit[gguf]'")

ROWS, COLUMNS = 3, 512


def dequantized(kind: str, data: Tensor) -> Tensor:
    """What the `gguf` package makes of a weight's bytes."""
    return torch.from_numpy(gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))


def random_blocks(kind: str, seed: int = 0) -> Tensor:
    """Any bytes, but that numbers are finite: [R, B]."""
    draw = torch.Generator().manual_seed(seed)
    form = blocks.KINDS[kind]
    data = torch.randint(256, (ROWS * COLUMNS // form.columns, form.bytes), generator=draw, dtype=torch.uint8)
    fields = blocks.take_apart(kind, data)
    for name in ("d", "e", "m"):
        if name in fields and fields[name].dtype == torch.float16:
            fields[name] = torch.randn(fields[name].shape, generator=draw).half()
    if kind == "MXFP4":
        fields["e"] = fields["e"] // 2 + 64
    return blocks.assemble(kind, fields).reshape(ROWS, -1)


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_any_blocks_are_what_the_gguf_package_reads(kind: str) -> None:
    data = random_blocks(kind)
    assert torch.equal(blocks.unpack(kind, data, COLUMNS).dequantize(), dequantized(kind, data))


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_assembling_is_the_inverse_of_taking_apart(kind: str) -> None:
    form = blocks.KINDS[kind]
    data = torch.randint(256, (257, form.bytes), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(blocks.assemble(kind, blocks.take_apart(kind, data)), data)


@pytest.mark.parametrize("kind", blocks.KINDS)
def test_blocks_come_back_bit_for_bit_through_codes_and_native_files(kind: str) -> None:
    data = random_blocks(kind)
    part = blocks.unpack(kind, data, COLUMNS)
    again, packed = blocks.pack(part)
    assert again == kind and torch.equal(packed, data)
    layer = QLayer(QWeight((part,)))
    read, _ = native.unpack(native.describe({"w": layer}), native.pack("w", layer))
    restored = read["w"].weight.parts[0]
    assert torch.equal(restored.codes, part.codes) and torch.equal(restored.dequantize(), part.dequantize())
    assert blocks.pack(restored)[1].tolist() == data.tolist()


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (per_group(Int(4), 32), "Q4_0"),
        (per_group(Int(3), 64), "Q4_0"),
        (per_channel(Int(4)), "Q4_0"),
        (Spec(Int(4), (2, -1)), "Q4_0"),
        (per_group(Int(4, "symmetric-unsigned"), 32), "Q4_0"),
        (per_group(Int(5), 32), "Q5_0"),
        (per_group(Int(8), 128), "Q8_0"),
        (per_group(Int(6), 32), "Q8_0"),
        (per_group(Int(4, "asymmetric"), 32, scale="float16-min"), "Q4_1"),
        (per_group(Int(2, "asymmetric"), 64, scale="float16-min"), "Q4_1"),
        (per_group(Int(5, "asymmetric"), 32, scale="float16-min"), "Q5_1"),
        (mx(E2M1), "MXFP4"),
        *((kquant(bits), f"Q{bits}_K") for bits in range(2, 7)),
    ],
    ids=str,
)
def test_stored_codes_are_carried_exactly(spec: Spec, kind: str) -> None:
    weight = torch.randn(6, COLUMNS, generator=torch.Generator().manual_seed(2)) * torch.rand(6, 1) + 0.01
    grid = fit_range(weight, spec)
    part = QTensor(grid.encode(weight), grid)
    named, data = blocks.pack(part)
    assert named == kind
    assert data.numel() == blocks.bytes_of((6, COLUMNS), kind)
    assert torch.equal(dequantized(kind, data), part.dequantize())
    assert torch.equal(blocks.unpack(kind, data, COLUMNS).dequantize(), part.dequantize())
    meta = QTensor(part.codes.to("meta"), grid.to("meta"))
    assert blocks.pack(meta)[1].shape == data.shape


def test_zero_points_are_carried_where_fp16_holds_their_values_and_refused_where_not() -> None:
    spec = per_group(Int(4, "asymmetric"), 32)
    codes = torch.arange(64, dtype=torch.uint8).reshape(1, 64) % 16
    exact = QTensor(codes, Grid(spec, torch.tensor([[0.5, 0.25]]), torch.tensor([[3.0, 15.0]])))
    kind, data = blocks.pack(exact)
    assert torch.equal(dequantized(kind, data), exact.dequantize())
    scale = torch.tensor([[255 / 128, 0.25]])  # 255 · 15 has twelve significant bits
    with pytest.raises(ValueError, match="quantize again with --target gguf"):
        blocks.pack(QTensor(codes, Grid(spec, scale, torch.tensor([[15.0, 15.0]]))))


def test_a_naive_reading_of_one_block_of_every_k_quant() -> None:
    """Written from ggml's struct declarations, one element at a time."""
    for kind, oracle in {"Q2_K": _q2, "Q3_K": _q3, "Q4_K": _q4, "Q5_K": _q5, "Q6_K": _q6}.items():
        row = random_blocks(kind, 7)[0, : blocks.KINDS[kind].bytes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            expected = [oracle(bytes(row.tolist()), i) for i in range(256)]
        assert blocks.unpack(kind, row[None], 256).dequantize()[0].tolist() == [float(x) for x in expected], kind


def _f16(block: bytes, at: int) -> np.float32:
    return np.float32(np.frombuffer(block[at : at + 2], np.float16)[0])


def _q2(block: bytes, i: int) -> np.float32:
    half, shift, lane = i // 128, i % 128 // 32, i % 32
    q = block[16 + 32 * half + lane] >> (2 * shift) & 3
    c = block[i // 16]
    return _f16(block, 80) * np.float32(c & 15) * np.float32(q) - _f16(block, 82) * np.float32(c >> 4)


def _q3(block: bytes, i: int) -> np.float32:
    half, shift, lane, unit = i // 128, i % 128 // 32, i % 32, i // 16
    q = block[32 + 32 * half + lane] >> (2 * shift) & 3
    q -= 0 if block[lane] >> (4 * half + shift) & 1 else 4
    low = block[96 + unit % 8] >> (4 * (unit // 8)) & 15
    high = block[104 + unit % 4] >> (2 * (unit // 4)) & 3
    return _f16(block, 108) * np.float32((low | high << 4) - 32) * np.float32(q)


def _six_bits(scales: bytes, unit: int) -> tuple[int, int]:
    if unit < 4:
        return scales[unit] & 63, scales[unit + 4] & 63
    last = scales[unit + 4]
    return last & 15 | scales[unit - 4] >> 6 << 4, last >> 4 | scales[unit] >> 6 << 4


def _q4(block: bytes, i: int) -> np.float32:
    c, m = _six_bits(block[4:16], i // 32)
    q = block[16 + 32 * (i // 64) + i % 32] >> (4 * (i % 64 // 32)) & 15
    return _f16(block, 0) * np.float32(c) * np.float32(q) - _f16(block, 2) * np.float32(m)


def _q5(block: bytes, i: int) -> np.float32:
    c, m = _six_bits(block[4:16], i // 32)
    q = block[48 + 32 * (i // 64) + i % 32] >> (4 * (i % 64 // 32)) & 15
    q |= (block[16 + i % 32] >> (i // 32) & 1) << 4
    return _f16(block, 0) * np.float32(c) * np.float32(q) - _f16(block, 2) * np.float32(m)


def _q6(block: bytes, i: int) -> np.float32:
    half, part, lane = i // 128, i % 128 // 32, i % 32
    low = block[64 * half + 32 * (part % 2) + lane] >> (4 * (part // 2)) & 15
    high = block[128 + 32 * half + lane] >> (2 * part) & 3
    c = np.frombuffer(block[192 + i // 16 : 193 + i // 16], np.int8)[0]
    return _f16(block, 208) * np.float32(c) * np.float32((low | high << 4) - 32)
