"""Products of codes against exact sums, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowbit.kernels import codes_product
from lowbit.kernels.codes_product import Operand, operand
from lowbit.kernels.encoder import encoder
from lowbit.modules.linear import QLinear
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QLayer, QTensor, QWeight
from lowbit.numerics.spec import E4M3, E5M2, Int, Number, Spec, per_channel, per_group, per_tensor, per_token

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
FORMATS: list[tuple[Spec, Number]] = [
    (per_channel(Int(8), scale="float32"), Int(8)),
    (per_channel(Int(4)), Int(4)),
    (per_channel(Int(4, "symmetric-unsigned")), Int(8, "symmetric-restricted")),
    (per_tensor(Int(8), scale="float32"), Int(8)),
    (per_channel(E4M3, scale="float32"), E4M3),
]


def quantized(rows: int, columns: int, spec: Spec) -> QTensor:
    weight = torch.randn(rows, columns, device=DEVICE) * torch.rand(rows, 1, device=DEVICE)
    grid = fit_range(weight, spec)
    return QTensor(grid.encode(weight), grid)


def codes_of(tokens: int, width: int, number: Number) -> tuple[Tensor, Tensor]:
    how = encoder(number, None, None, DEVICE)
    return codes_product.encode(torch.randn(tokens, width, device=DEVICE).bfloat16(), how)


def multiplied(codes: Tensor, scale: Tensor, weight: Operand, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    from lowbit.kernels.codes_product_triton import Tiles, product

    return product(codes, scale, weight.codes, weight.scale, bias, dtype, None if GPU else Tiles(32, 32, 32, 4, 2))


def close(found: Tensor, codes: Tensor, scale: Tensor, weight: QTensor, bias: Tensor | None, number: Number) -> None:
    """Integers are exact but for the last rounding; fp8 tensor cores keep 14 bits of a sum."""
    x = codes.double() * scale.double()[:, None]
    values = weight.dequantize().double()
    expected, added = x @ values.T, x.abs() @ values.abs().T
    expected = expected if bias is None else expected + bias.double()
    unit = torch.finfo(found.dtype).eps / (2 if GPU or found.dtype == torch.float16 else 1)  # bf16 is cut off there
    room = unit * expected.abs() + (1e-6 if isinstance(number, Int) or not GPU else 1e-3) * added + 1e-7
    assert torch.isfinite(found).all()
    assert ((found.double() - expected).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_products_of_odd_shapes(form: tuple[Spec, Number], dtype: torch.dtype) -> None:
    spec, number = form
    for tokens, rows, columns in ((1, 5, 16), (7, 33, 48), (33, 65, 80), (70, 31, 64)):
        weight = quantized(rows, columns, spec)
        codes, scale = codes_of(tokens, columns, number)
        bias = torch.randn(rows, device=DEVICE).to(dtype)
        ready = operand(weight, number)
        close(multiplied(codes, scale, ready, bias, dtype), codes, scale, weight, bias, number)
        close(multiplied(codes, scale, ready, None, dtype), codes, scale, weight, None, number)
        exact = codes_product.product_reference(codes, scale, ready, bias, dtype)
        close(exact, codes, scale, weight, bias, number)


@pytest.mark.skipif(GPU, reason="the plans of a GPU have such tiles")
def test_programs_that_stay_take_one_tile_after_the_other() -> None:
    """Six large tiles for the interpreter's two programs."""
    from lowbit.kernels.codes_product_triton import Tiles, product

    spec, number = FORMATS[0]
    weight = quantized(290, 48, spec)
    codes, scale = codes_of(150, 48, number)
    ready = operand(weight, number)
    found = product(codes, scale, ready.codes, ready.scale, None, torch.float16, Tiles(128, 128, 32, 4, 2))
    close(found, codes, scale, weight, None, number)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_reference_computes_what_qlinear_does(form: tuple[Spec, Number]) -> None:
    """On fake-quantized inputs and a dense copy, but for sums in fp32."""
    spec, number = form
    weight = quantized(24, 40, spec)
    x, bias = torch.randn(3, 5, 40, device=DEVICE), torch.randn(24, device=DEVICE)
    layer = QLayer(QWeight((weight,)), per_token(number))
    expected = QLinear(layer, bias, torch.float32, DEVICE)(x)
    found = codes_product.reference(x, encoder(number, None, None, DEVICE), operand(weight, number), bias)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_is_no_operand_says_why() -> None:
    grouped = quantized(4, 64, per_group(Int(8), 32))
    assert "not one per row" in str(codes_product.refusal(grouped, Int(8)))
    assert "zero-points" in str(codes_product.refusal(quantized(4, 64, per_channel(Int(8, "asymmetric"))), Int(8)))
    assert "not multiplied by" in str(codes_product.refusal(quantized(4, 64, per_channel(E5M2)), E4M3))
    assert "not multiplied by" in str(codes_product.refusal(quantized(4, 64, per_channel(Int(8))), E4M3))
    with pytest.raises(ValueError, match="use its dense copy"):
        operand(grouped, Int(8))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_gpu_agrees_with_fp64(form: tuple[Spec, Number], dtype: torch.dtype) -> None:
    """Both kernels, every plan, whole tiles and others."""
    spec, number = form
    for rows, columns in ((1040, 1072), (2048, 4096), (6144, 4096)):
        weight = quantized(rows, columns, spec)
        ready, bias = operand(weight, number), torch.randn(rows, device=DEVICE).to(dtype)
        for tokens in (1, 2, 8, 9, 16, 17, 64, 65, 300, 513, 2048):
            codes, scale = codes_of(tokens, columns, number)
            close(codes_product.product(codes, scale, ready, bias, dtype), codes, scale, weight, bias, number)
