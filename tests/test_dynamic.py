"""Inputs encoded by a kernel against their definition in torch, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lowbit.kernels import dynamic
from lowbit.kernels.encoder import Encoder, encoder, reference
from lowbit.numerics.bits import unpack
from lowbit.numerics.hadamard import hadamard
from lowbit.numerics.maps import Hadamard, Kronecker, Map, random_orthogonal
from lowbit.numerics.spec import E4M3, E5M2, Int, Number

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NUMBERS: list[Number] = [Int(8), Int(4), Int(8, "symmetric-restricted"), Int(3, "symmetric-full"), E4M3]
DTYPES = [torch.bfloat16, torch.float16]
Encode = Callable[[Tensor, Encoder, bool], tuple[Tensor, Tensor]]


def mixing(n1: int, n2: int, left: bool = True, right: bool = True) -> Kronecker:
    """A learned transform: well-conditioned, but neither orthogonal nor of round numbers."""

    def factor(n: int) -> Tensor:
        return (random_orthogonal(n, n) * torch.linspace(0.7, 1.6, n, dtype=torch.float64)).float()

    return Kronecker(factor(n1) if left else None, factor(n2) if right else None, (n1, n2))


MAPS: dict[str, Map] = {
    "kronecker 8x12": mixing(8, 12),
    "kronecker 16x32": mixing(16, 32),
    "kronecker 20x33": mixing(20, 33),
    "left 6x24": mixing(6, 24, right=False),
    "right 5x40": mixing(5, 40, left=False),
    "hadamard 64": Hadamard(64),
    "hadamard 448": Hadamard(448),
    "heads 8x16": Hadamard(8, 16),
}


def tokens(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Inputs with outliers, tokens of very different sizes, and one of zeros."""
    x = torch.randn(count, width, device=DEVICE) * torch.logspace(-3, 2, count, device=DEVICE)[:, None]
    x[:, width // 3] *= 30
    x[count // 2] = 0
    return x.to(dtype)


def mapped(x: Tensor, map: Map | None, dtype: torch.dtype) -> Tensor:
    """x P in fp64, from the matrix itself where that is small, rounded to `dtype` once."""
    if map is None:
        return x.double().cpu()
    wide = x.double()
    y = wide.cpu() @ map.matrix() if map.width < 1000 else map.to(x.device).apply(wide).cpu()
    return y.to(dtype).double()


def expected_levels(z: Tensor, number: Number, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """(levels, scales) token by token, from what the formats are: fp32 scales, correctly rounded divisions."""
    levels, scales = torch.zeros_like(z), torch.ones(len(z))
    for row, values in enumerate(z.float()):
        low, high = values.min(), values.max()
        if clip is not None:
            low, high = low * clip[0], high * clip[1]
        amax = torch.maximum(low.abs(), high.abs())
        if amax == 0:
            continue
        if isinstance(number, Int):
            steps = {"symmetric": (2**number.bits - 1) / 2, "symmetric-restricted": 2 ** (number.bits - 1) - 1}
            scales[row] = amax / torch.tensor(float(steps.get(number.rule, 2 ** (number.bits - 1))))
            levels[row] = (values / scales[row]).round().clamp(number.low, number.high)
        else:
            scales[row] = amax / torch.tensor(448.0)
            levels[row] = (values / scales[row]).clamp(-448, 448).to(torch.float8_e4m3fn).double()
    return levels, scales.double()


def kernel(x: Tensor, how: Encoder, packed: bool = False) -> tuple[Tensor, Tensor]:
    from lowbit.kernels.dynamic_triton import encode_mapped, encode_rows

    return encode_rows(x, how, packed) if how.map is None else encode_mapped(x, how, packed)


def chosen(x: Tensor, how: Encoder, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Whichever kernel is for these inputs."""
    return dynamic.encode(x, how, packed=packed)


def levels_of(codes: Tensor, number: Number, width: int, packed: bool) -> Tensor:
    if packed:
        codes = unpack(codes.cpu(), 4, width, signed=True)
    return codes.cpu().to(torch.float32).double()


def check(
    x: Tensor, number: Number, map: Map | None, clip: Tensor | None, packed: bool = False, by: Encode = kernel
) -> None:
    how = encoder(number, map, clip, DEVICE)
    assert how.fused
    z = mapped(x, map, x.dtype)
    levels, scales = expected_levels(z, number, clip)
    for codes, scale in (by(x, how, packed), reference(x, how, packed=packed)):
        found, size = levels_of(codes, number, x.shape[1], packed), scale.double().cpu()
        interpreted = number == E4M3 and DEVICE == "cpu" and by is kernel
        if interpreted:  # it rounds ties up, and halves what rounding up makes a power of two
            found = torch.where((2 * found - levels).abs() < (found - levels).abs(), 2 * found, found)
        # the map's last bits decide on which side of a border a value falls, and what the largest one is
        near = 2e-7 if map is None else torch.finfo(x.dtype).eps
        torch.testing.assert_close(size, scales, rtol=near, atol=0)
        share = (0.02 if interpreted else 0.0) if map is None else 0.02 if number == Int(4) else 0.06
        assert (found != levels).double().mean() <= share
        step = size[:, None] if isinstance(number, Int) else levels.abs().clamp_min(2**-6) * size[:, None] / 8
        inexact = 0.0 if map is None or x.dtype == torch.float16 else 3 * 2**-12  # operands of eleven bits
        room = 1.01 * step + inexact * z.abs().amax(1, keepdim=True) + (near if map else 0.0) * z.abs()
        assert ((found * size[:, None] - levels * scales[:, None]).abs() <= room).all()


@pytest.mark.parametrize("number", NUMBERS, ids=str)
@pytest.mark.parametrize(("width", "dtype"), [(1, DTYPES[0]), (130, DTYPES[1]), (2500, DTYPES[0])], ids=str)
def test_rows(width: int, number: Number, dtype: torch.dtype) -> None:
    """A program holds all of a token."""
    check(tokens(3, width, dtype), number, None, torch.tensor([0.7, 0.8]) if width > 1 else None)


@pytest.mark.parametrize("number", [Int(8), E4M3], ids=str)
def test_rows_of_many_tokens_are_read_twice(number: Number, monkeypatch: pytest.MonkeyPatch) -> None:
    from lowbit.kernels import dynamic_triton

    monkeypatch.setattr(dynamic_triton, "_FEW", 2)
    for width in (130, 2500):
        check(tokens(3, width, DTYPES[0]), number, None, torch.tensor([0.7, 0.8]))


@pytest.mark.parametrize("number", [Int(8), Int(4), E4M3], ids=str)
@pytest.mark.parametrize("map", MAPS.values(), ids=MAPS)
def test_maps(map: Map, number: Number) -> None:
    check(tokens(3, map.width, DTYPES[0]), number, map, torch.tensor([0.9, 0.8]))


@pytest.mark.parametrize("name", ["", "kronecker 8x12", "hadamard 64", "left 6x24"])
def test_two_codes_of_four_bits_share_a_byte(name: str) -> None:
    map = MAPS.get(name)
    x = tokens(4, 48 if map is None else map.width, torch.bfloat16)
    check(x, Int(4), map, None, packed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "map", [MAPS[name] for name in ("kronecker 20x33", "hadamard 448", "left 6x24")], ids=lambda map: type(map).__name__
)
def test_transforms_are_as_exact_as_their_rounding(map: Map, dtype: torch.dtype) -> None:
    """With 8 bits of an input that has no outliers left: half a step, and the last bit of the inputs' dtype."""
    x = torch.randn(4, map.width, device=DEVICE).to(dtype)
    codes, scale = kernel(x, encoder(Int(8), map, None, DEVICE))
    values = codes.double().cpu() * scale.double().cpu()[:, None]
    exact = x.double().cpu() @ map.matrix()
    operands = (2**-12 if dtype == torch.bfloat16 else 2**-20) * exact.abs().amax(1, keepdim=True)
    room = 0.5 * scale.double().cpu()[:, None] + torch.finfo(dtype).eps / 2 * exact.abs() + operands
    below_top = exact < 127.4 * scale.double().cpu()[:, None]  # the largest value saturates by half a step
    assert (((values - exact).abs() <= room) | ~below_top).all()


def test_a_hadamard_matrix_is_two_smaller_ones() -> None:
    for order, sizes in ((4096, (64, 64)), (14336, (112, 128)), (2, (2, 1)), (448, (28, 16))):
        factors = encoder(Int(8), Hadamard(order), None, "cpu").factors
        assert factors is not None and factors.gain == 1 / math.sqrt(order)
        assert factors.sizes == sizes
        if order < 1000:
            n1, n2 = factors.sizes
            assert factors.left is not None
            left = factors.left[0].T[:n1, :n1].double().contiguous()
            right = (
                torch.ones(1, 1).double() if factors.right is None else factors.right[0][:n2, :n2].double().contiguous()
            )
            assert torch.equal(torch.kron(left, right), hadamard(order).double())


def test_what_has_no_operand_is_refused_and_what_is_too_large_is_left_to_torch() -> None:
    for number in (E5M2, Int(8, "asymmetric"), Int(4, "symmetric-unsigned")):
        with pytest.raises(ValueError, match="use fake quantization"):
            encoder(number, None, None, "cpu")
    large = encoder(Int(8), Kronecker(torch.eye(160), None, (160, 2)), None, "cpu")
    assert not large.fused
    x = torch.randn(2, 320).bfloat16()
    assert torch.equal(dynamic.encode(x, large)[0], reference(x, large)[0])


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE != "cuda", reason="needs CUDA")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [Int(8), Int(4), E4M3], ids=str)
def test_the_gpu_encodes_wide_tokens(number: Number, dtype: torch.dtype) -> None:
    for width, map in ((4096, None), (14336, None), (4096, Hadamard(4096)), (14336, Hadamard(14336)),
                       (4096, mixing(64, 64)), (14336, mixing(112, 128)), (4096, mixing(32, 128, right=False)),
                       (4096, Hadamard(32, 128))):  # fmt: skip
        for count in (5, 67):
            check(tokens(count, width, dtype), number, map, torch.tensor([0.9, 0.8]))
            if encoder(number, map, None, DEVICE).factors is not None:  # perhaps by another kernel
                check(tokens(count, width, dtype), number, map, torch.tensor([0.9, 0.8]), by=chosen)
        if number == Int(4):
            check(tokens(7, width, dtype), number, map, None, packed=True)
