"""The kernels against their definition: their very sources on a CPU (`emulated.cuh`), and compiled on a GPU.

On a CPU, the host's code is the real one too, down to the grid and the arguments of a kernel; only the compiler, and
the functions of `ptx.cuh`, are others.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from lowbit.kernels import codes_product, dynamic, layout, weight_only
from lowbit.kernels import compile as compiling
from lowbit.kernels.encoder import encoder
from lowbit.kernels.layout import Prepared, prepare, refusal, restore
from lowbit.kernels.weight_only import Plan
from lowbit.numerics.grid import Grid, fit_range
from lowbit.numerics.qtensor import QTensor
from lowbit.numerics.spec import (
    E2M1,
    E2M3,
    E4M3,
    NF4,
    Int,
    Number,
    Spec,
    kquant,
    mx,
    nvfp4,
    per_channel,
    per_group,
    per_tensor,
)

HERE = Path(__file__).parent
GPU = torch.cuda.is_available() and weight_only.available(torch.cuda.current_device())
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16]
FORMATS = [
    Spec(Int(4), (1, 128)),
    Spec(Int(4, "asymmetric"), (1, 32)),
    Spec(Int(4, "symmetric-unsigned"), (1, -1)),
    Spec(Int(4, "asymmetric"), (1, 64), "float32"),
    Spec(Int(8), (1, -1), "float32"),
    Spec(Int(8, "asymmetric"), (1, 64)),
    Spec(Int(3), (1, 32)),
    Spec(Int(3, "asymmetric"), (1, 128)),
    Spec(Int(2, "asymmetric"), (1, 64)),
    Spec(Int(2), (1, -1), "bfloat16"),
    nvfp4(),
    mx(E2M1),
]


def quantized(rows: int, columns: int, spec: Spec, device: str = "cpu") -> QTensor:
    """Random codes that use the whole range of a format, on a grid of uneven scales."""
    weight = torch.randn(rows, columns, device=device) * torch.rand(rows, 1, device=device)
    grid, number = fit_range(weight, spec), spec.number
    if not isinstance(number, Int):
        return QTensor(torch.randint(0, 1 << spec.bits, weight.shape, device=device).to(torch.uint8), grid)
    codes = torch.randint(number.low, number.high + 1, weight.shape, device=device)
    codes = codes.to(torch.int8 if number.signed else torch.uint8)
    if grid.zero is not None and not number.symmetric:
        grid = replace(grid, zero=torch.randint_like(grid.zero, 0, min(1 << spec.bits, 255) + 1))
    return QTensor(codes, grid)


def everywhere(spec: Spec) -> QTensor:
    """Every code in every place of a tile's unit, beside every zero-point; of 8 bits, each of both in every place."""
    number, levels = spec.number, 1 << spec.bits
    zeros = min(levels, 255) + 1
    moved = isinstance(number, Int) and not number.symmetric
    tiles = levels * zeros if moved and spec.bits < 8 else levels
    weight, tile = quantized(16 * tiles, 128, spec), torch.arange(tiles)[:, None, None]
    codes = (tile + torch.randint(levels, (16, 128))) % levels + (number.low if isinstance(number, Int) else 0)
    grid = weight.grid
    if moved:
        zero = (tile * zeros // tiles + torch.randint(zeros, (16, grid.scale.shape[1]))) % zeros
        grid = replace(grid, zero=zero.flatten(0, 1).float())
    return QTensor(codes.flatten(0, 1).to(weight.codes.dtype), grid)


def exact(x: Tensor, dense: Tensor, bias: Tensor | None) -> Tensor:
    y = x.double() @ dense.double().T
    return y if bias is None else y + bias.double()


def times_scales(weight: QTensor, dtype: torch.dtype) -> Tensor:
    """Integers times their scales, rounded to a format that holds the integers."""
    levels = QTensor(weight.codes, replace(weight.grid, scale=torch.ones_like(weight.grid.scale))).dequantize(dtype)
    groups = levels.unflatten(1, (weight.grid.scale.shape[1], -1))
    return (groups * weight.grid.scale.to(dtype)[..., None]).flatten(1)


def close(found: Tensor, x: Tensor, weight: QTensor | Tensor, bias: Tensor | None = None) -> None:
    """One rounding to the output's format, and fp32 sums: errors of 1e-5 of what was added up."""
    dense = weight.dequantize() if isinstance(weight, QTensor) else weight
    expected = exact(x, dense, bias)
    added = x.double().abs() @ dense.double().abs().T
    unit = torch.finfo(found.dtype).eps / 2
    assert torch.isfinite(found).all()
    assert ((found.double() - expected).abs() <= unit * expected.abs() + 1e-5 * added + 1e-7).all()


# --- the layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(16, 128), (1, 96), (33, 192), (40, 640)], ids=str)
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_prepare_keeps_every_code_and_scale(spec: Spec, shape: tuple[int, int]) -> None:
    if shape[1] % spec.group and spec.group != -1:
        spec = replace(spec, block=(1, 32))
    weight = quantized(*shape, spec)
    codes, scale, zero = restore(prepare(weight))
    low, middle = (spec.number.low, 1 << (spec.bits - 1)) if isinstance(spec.number, Int) else (0, 0)
    assert torch.equal(codes, (weight.codes.int() - low).to(torch.uint8))
    assert torch.equal(scale, weight.grid.scale)
    assert torch.equal(zero, torch.full_like(scale, middle) if weight.grid.zero is None else weight.grid.zero)


def test_prepared_codes_take_their_bits_and_no_more() -> None:
    for bits in layout.WIDTHS:
        prepared = prepare(quantized(32, 256, per_group(Int(bits), 128)))
        parts = [part for part in (prepared.low, prepared.high) if part is not None]
        assert sum(part.numel() * 32 for part in parts) == 32 * 256 * bits
        assert prepared.scale.dtype == torch.float16 and prepared.scale.numel() == 64
    assert prepare(quantized(32, 256, per_group(Int(4, "symmetric-unsigned"), 128))).zero is None
    for spec in (nvfp4(), mx(E2M1)):
        prepared = prepare(quantized(32, 256, spec))
        assert prepared.low.numel() * 32 == 32 * 256 * 4 and prepared.high is None
        assert prepared.scale.dtype == torch.uint8 and prepared.scale.numel() == 32 * 256 // spec.group


def test_a_scale_for_the_whole_tensor_is_one_for_every_row() -> None:
    weight = quantized(20, 100, per_tensor(Int(4)))
    x = torch.randn(3, 100).bfloat16()
    close(weight_only.linear(x, prepare(weight)), x, weight)


@pytest.mark.parametrize(
    ("weight", "words"),
    [
        (QTensor(torch.zeros(4, 64, dtype=torch.uint8), Grid(Spec(NF4, (1, 64)), torch.ones(4, 1))), "codes are nf4"),
        (quantized(4, 64, mx(E2M3)), "codes are fp6 e2m3"),
        (quantized(4, 128, per_group(E2M1, 64)), "groups of E2M1 have 64 columns"),
        (quantized(4, 64, per_group(E2M1, 16)), "neither E4M3 nor powers of two"),
        (quantized(4, 64, per_group(Int(5), 32)), "codes are int5"),
        (quantized(4, 96, per_group(Int(4), 48)), "groups have 48 columns"),
        (quantized(4, 768, per_group(Int(4), 384)), "groups have 384 columns"),
        (quantized(4, 256, kquant(4)), "least value"),
        (quantized(8, 64, Spec(Int(4), (4, 64))), "several rows"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_no_kernel_knows_is_refused(weight: QTensor, words: str) -> None:
    assert words in (refusal(weight) or "")
    with pytest.raises(ValueError, match=rf"no kernel for this weight, since .*{words}.*: use its dense copy"):
        prepare(weight)


@pytest.mark.parametrize(("bits", "most"), [(2, 4), (3, 8), (4, 16), (8, 255)])
def test_zero_points_far_outside_are_refused(bits: int, most: int) -> None:
    """The power of two above all levels is taken: DeepSpeed's rule gives it to units without positive weights."""
    weight = quantized(9, 128, per_group(Int(bits, "asymmetric"), 32))
    assert weight.grid.zero is not None
    for zero in (0, most):
        weight.grid.zero[1, 1] = zero
        assert refusal(weight) is None
    for zero in (-1, most + 1):
        weight.grid.zero[1, 1] = zero
        assert refusal(weight) == f"zero-points lie outside of 0 to {most}"


def floats(spec: Spec, scale: Tensor, outer: Tensor | None = None) -> QTensor:
    """E2M1 codes, all of them in every group, on a grid of given scales [N, G]."""
    codes = torch.arange(spec.group).expand(*scale.shape, -1).flatten(1).to(torch.uint8) % 16
    return QTensor(codes, Grid(spec, scale, None, outer))


def all_sizes(rows: int) -> QTensor:
    """NVFP4 whose scales are numbers of E4M3 from 0 to 448, subnormal ones too, as foreign files may have them."""
    scales = torch.arange(0, 127, 3).to(torch.uint8).view(torch.float8_e4m3fn).float().repeat(rows, 1)
    return floats(nvfp4(), scales * 0.37, torch.tensor([[0.37]]))


def every_power(rows: int, least: int, most: int) -> QTensor:
    """MXFP4 with all scales that a row may have, whose largest are from 2^least to 2^most."""
    exponent = torch.linspace(least, most, rows).int()[:, None] - torch.arange(25)
    return floats(mx(E2M1), torch.exp2(exponent.double()).float())


def test_every_scale_of_floats_is_kept() -> None:
    for weight in (all_sizes(3), every_power(5, -90, 90)):
        assert torch.equal(restore(prepare(weight))[1], weight.grid.scale)
        assert torch.equal(weight_only.values(prepare(weight)), weight.dequantize())


def test_powers_of_two_far_from_a_rows_are_refused_unless_they_scale_zeros() -> None:
    weight = every_power(2, 0, 3)
    weight.grid.scale[1, 3] = 2.0**60
    assert "about one size" in (refusal(weight) or "")
    weight.grid.scale[1, 3] = 2.0**-127
    assert "about one size" in (refusal(weight) or "")
    weight.codes[1, 3 * 32 : 4 * 32] = 8  # -0
    assert torch.equal(weight_only.values(prepare(weight)), weight.dequantize())


@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_weights_are_joined_and_parted(spec: Spec) -> None:
    one, other = quantized(32, 256, spec), quantized(48, 256, spec)
    joined = layout.joined([prepare(one), prepare(other)])
    assert joined.shape == (80, 256)
    assert torch.equal(weight_only.values(joined), torch.cat([one.dequantize(), other.dequantize()]))
    assert torch.equal(weight_only.values(joined.rows(32, 80)), other.dequantize())
    assert joined.rows(32, 80).low.untyped_storage().data_ptr() == joined.low.untyped_storage().data_ptr()


# --- the definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_definition_is_the_dequantized_weight(spec: Spec, dtype: torch.dtype) -> None:
    weight = quantized(17, 256, spec)
    x, bias = torch.randn(2, 3, 256).to(dtype), torch.randn(17).to(dtype)
    found = weight_only.reference(x, prepare(weight), bias)
    assert found.shape == (2, 3, 17)
    close(found.flatten(0, 1), x.flatten(0, 1), weight, bias)


def test_columns_may_be_sorted_by_group() -> None:
    weight = replace(quantized(9, 128, per_group(Int(4), 32)), order=torch.randperm(128))
    x = torch.randn(5, 128).half()
    close(weight_only.linear(x, prepare(weight)), x, weight)


def test_inputs_that_no_kernel_takes_go_to_the_definition() -> None:
    weight = quantized(9, 128, per_group(Int(4), 32)), torch.randn(0, 128).bfloat16()
    assert weight_only.linear(weight[1], prepare(weight[0])).shape == (0, 9)
    x = torch.randn(5, 128, device=DEVICE)
    found = weight_only.linear(x, prepare(QTensor(weight[0].codes.to(DEVICE), weight[0].grid.to(DEVICE))))
    torch.testing.assert_close(found.cpu(), (x.cpu() @ weight[0].dequantize().T), rtol=1e-5, atol=1e-4)


def test_gradients_pass() -> None:
    weight = quantized(9, 128, per_group(Int(4), 32))
    x = torch.randn(3, 128, device=DEVICE).bfloat16().requires_grad_()
    prepared = prepare(QTensor(weight.codes.to(DEVICE), weight.grid.to(DEVICE)))
    (gradient,) = torch.autograd.grad(weight_only.linear(x, prepared).sum(), x)
    torch.testing.assert_close(gradient[1].float().cpu(), weight.dequantize().sum(0), rtol=2**-7, atol=1e-2)


# --- plans ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("processors", [132, 78])
def test_plans_fit_the_device(processors: int) -> None:
    """Threads, shared memory, barriers and clusters within limits, no warp without a unit, every tile owned."""
    for tokens in range(1, 17):
        for tiles in (1, 2, 43, 64, 256, 384, 896, 1792, 8016):
            for units in (1, 2, 3, 6, 32, 112, 224):
                plan = weight_only._plan(tokens, tiles, units, processors)
                assert 32 * plan.row_warps * plan.k_warps * max(1, plan.resident) <= 1024
                assert plan.shared <= 200 * 1024
                assert plan.k_warps * plan.cluster <= units and plan.cluster in (1, 2)
                assert plan.stages != 1 and plan.depth >= 1 and 1 <= plan.tokens <= weight_only.MOST
                assert plan.stages == 0 or plan.row_warps == 1 or plan.k_warps < 16


def test_loads_keep_their_place() -> None:
    """The assembler moves loads of constants behind the wait for the kernel before, where they cost all their time."""
    sources = [path.read_text("utf8") for path in Path(compiling.__file__).parent.glob("*.cu*")]
    assert sources and not any("ld.global.nc" in text for text in sources)


# --- the sources on a CPU ---------------------------------------------------------------------------------------------

needs_gcc = pytest.mark.skipif(shutil.which("g++") is None or GPU, reason="needs g++, and runs where there is no GPU")


FLAGS = ["-std=c++17", "-O1", "-w", "-Wno-psabi", "-fno-strict-aliasing", "-fPIC"]


def headers(folder: Path) -> tuple[Path, Path]:
    """The emulator's header, as the compiler has read it, and the emulator, compiled: both once for all test files."""
    header, emulator = (folder.parent / f"emulator.{kind}" for kind in ("h", "o"))
    if not emulator.exists():
        shutil.copy(HERE / "emulator.h", header)
        reading = ["g++", *FLAGS, "-x", "c++-header", header, "-o", f"{header}.gch"]
        making = ["g++", *FLAGS, "-c", HERE / "emulator.cpp", "-o", emulator]
        begun = [subprocess.Popen(reading), subprocess.Popen(making)]
        assert [each.wait() for each in begun] == [0, 0]
    return header, emulator


class Fenced:
    """Tensors that a kernel is given, moved to where the first byte behind them may not be touched."""

    def __init__(self) -> None:
        self._moved: dict[int, tuple[int, int, mmap.mmap]] = {}  # a storage's address: its size, where it went

    def pointer(self, tensor: Tensor) -> ctypes.c_void_p:
        storage = tensor.untyped_storage()
        old, size = storage.data_ptr(), storage.nbytes()
        if old not in self._moved:
            room = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
            memory = mmap.mmap(-1, room + mmap.PAGESIZE)
            end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(end), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
            self._moved[old] = (size, end - -(-size // 16) * 16, memory)
            ctypes.memmove(self._moved[old][1], old, size)
        return ctypes.c_void_p(self._moved[old][1] + tensor.data_ptr() - old)

    def give_back(self) -> None:
        for old, (size, new, _) in self._moved.items():
            ctypes.memmove(old, new, size)


class Emulated:
    """A kernel's source, compiled for the CPU; called like `compile.Kernel`."""

    def __init__(self, folder: Path, name: str, constants: compiling.Constants, shared: int) -> None:
        text = compiling.source(name, constants)
        prelude = (Path(compiling.__file__).parent / "ptx.cuh").read_text("utf8")
        assert prelude in text
        text = text.replace(prelude, f'#include "{HERE / "emulated.cuh"}"\n')
        text = re.sub(r"extern __shared__ .*float4 shared\[\];", "float4* shared = block_memory();", text)
        text += f"""
            extern "C" void launch(void** arguments, const u32* grid, int threads, int cluster, size_t bytes) {{
                run([](void** given) {{ call({name}, given); }}, arguments, grid, threads, cluster, bytes);
            }}"""
        library = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.so"
        if not library.exists():
            header, emulator = headers(folder)
            given = ["-include", header, "-shared", "-x", "c++", "-", "-x", "none", emulator]
            subprocess.run(["g++", *FLAGS, *given, "-o", library], input=text.encode(), check=True)
        self._launch = ctypes.CDLL(str(library)).launch
        self._cluster, self._shared = dict(constants).get("CLUSTER", 1), shared

    def __call__(self, grid: tuple[int, int], threads: int, arguments: Sequence[compiling.Argument]) -> None:
        fenced = Fenced()
        values = [fenced.pointer(each) if isinstance(each, Tensor) else compiling.plain(each) for each in arguments]
        places = (ctypes.c_void_p * len(values))(*map(compiling.place, values))
        size = ctypes.c_size_t(self._shared)
        self._launch(places, (ctypes.c_uint * 2)(*grid), threads, self._cluster, size)
        fenced.give_back()


@contextmanager
def compiled_ahead(folder: Path, host: ModuleType, ask: Callable[[], None]) -> Iterator[Callable[..., Emulated]]:
    """What `compiled` of a host is to be, where two of the kernels that `ask` asks for are compiled at a time."""
    wanted: dict[tuple[str, compiling.Constants, int], None] = {}

    def note(name: str, constants: compiling.Constants, _device: object, shared: int = 0) -> Callable[..., None]:
        wanted[name, constants, shared] = None
        return lambda *_arguments: None

    headers(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "compiled", note)
        patch.setattr(host, "processors", lambda _device: 1)
        ask()
    with ThreadPoolExecutor(2) as pool:
        begun = {key: pool.submit(Emulated, folder, *key) for key in wanted}
        yield lambda name, constants, _device, shared=0: begun[name, constants, shared].result()
        pool.shutdown(cancel_futures=True)


def unwritten(*shape: int, **options: object) -> Tensor:
    """`torch.empty`, of NaN."""
    return torch.full(shape, float("nan"), **options)  # type: ignore[call-overload,no-any-return]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kernels")


@pytest.fixture
def emulated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real host code starts emulated kernels, and memory that nobody wrote is NaN."""

    def compiled(name: str, constants: compiling.Constants, _device: object, shared: int = 0) -> Emulated:
        return Emulated(folder, name, constants, shared)

    monkeypatch.setattr(weight_only, "compiled", compiled)
    monkeypatch.setattr(weight_only.torch, "empty", unwritten)


ALONE = Plan(1, 1, 1, 4, 1, 2, 0)
PLANS = [
    Plan(2, 2, 1, 2, 1, 1, 0),
    Plan(1, 2, 3, 2, 2, 1, 3),
    Plan(1, 3, 2, 1, 2, 2, 2),
    Plan(1, 1, 1, 2, 4, 1, 2),
    Plan(1, 4, 4, 1, 1, 2, 3),
]


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_the_source_multiplies_every_format(spec: Spec, dtype: torch.dtype) -> None:
    """Under a plan that shares nothing out, and under the one that an H100 takes for a token and many rows."""
    weight = quantized(35, 640, spec)
    prepared = prepare(weight)
    for tokens, plan in ((1, weight_only._plan(1, 896, 5, 132)), (5, ALONE)):
        x = torch.randn(tokens, 640).to(dtype)
        close(weight_only.product(x, prepared, None, plan), x, weight)


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_source_shares_out_the_work_in_every_way(plan: Plan) -> None:
    """Odd numbers of outputs, inputs and tokens; fewer units than warps."""
    for rows, columns, group, counts in ((65, 700, -1, (1, 17)), (16, 128, 64, (9,)), (49, 1056, 32, (16,))):
        weight = quantized(rows, columns, per_group(Int(4, "asymmetric"), group))
        prepared = prepare(weight)
        for tokens in counts:
            x, bias = torch.randn(tokens, columns).bfloat16(), torch.randn(rows).bfloat16()
            close(weight_only.product(x, prepared, bias, plan), x, weight, bias)


@needs_gcc
@pytest.mark.usefixtures("emulated")
def test_inputs_may_lie_anywhere() -> None:
    """Rows of a larger tensor, transposed ones, and such as begin between two multiples of 16 bytes."""
    weight = quantized(35, 640, per_group(Int(4), 128))
    prepared = prepare(weight)
    for x in (torch.randn(3, 700)[:, 7:647], torch.randn(640, 3).T, torch.randn(3 * 640 + 1)[1:].view(3, 640)):
        # `.bfloat16()` makes a tensor of its own, so these are views of a 16-bit one
        whole = torch.empty(3 * 700 + 8).bfloat16()
        view = torch.as_strided(whole, x.shape, x.stride(), x.storage_offset())
        view.copy_(x)
        close(weight_only.product(view, prepared, None, ALONE), view, weight)


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_the_source_dequantizes_to_the_last_bit(spec: Spec) -> None:
    for weight in (quantized(35, 448 if spec.group != 128 else 384, spec), everywhere(spec)):
        for dtype in DTYPES:
            assert torch.equal(weight_only.dequantized(prepare(weight), dtype), weight.dequantize(dtype))


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_source_takes_every_scale_of_floats(dtype: torch.dtype) -> None:
    """Alone: a group's columns are the only ones that are not zero."""
    for weight in (all_sizes(16), every_power(16, 8, 12)):
        assert torch.equal(weight_only.dequantized(prepare(weight), dtype), weight.dequantize(dtype))
        groups = weight.grid.scale.shape[1]
        x = torch.zeros(groups, groups, weight.shape[1] // groups).to(dtype)
        x[range(groups), range(groups)] = 2.0**-6 * torch.randn(groups, x.shape[2]).to(dtype)
        close(weight_only.product(x.flatten(1), prepare(weight), None, ALONE), x.flatten(1), weight)


@needs_gcc
@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [Int(8), E4M3], ids=str)
def test_the_source_multiplies_codes_by_codes(number: Number, dtype: torch.dtype) -> None:
    """Odd shapes; behind the weight lies what is no number."""
    for plan in (ALONE, PLANS[1]):
        for tokens, rows, columns in ((1, 35, 640), (17, 65, 80), (9, 16, 1040)):
            weight = quantized(rows, columns, per_channel(number, scale="float32"))
            if number == E4M3:
                weight.codes[weight.codes & 127 == 127] = 0
            memory = torch.full((rows * columns + columns // 2,), 127, dtype=torch.uint8)  # no row more
            memory[: rows * columns] = weight.codes.view(torch.uint8).flatten()
            operand = codes_product.operand(weight, number)
            codes = memory[: rows * columns].view(rows, columns).view(operand.codes.dtype)
            x, scale = dynamic.encode(torch.randn(tokens, columns), encoder(number, None, None, "cpu"))
            bias = torch.randn(rows).to(dtype)
            found = codes_product.product_of_few(x, scale, replace(operand, codes=codes), bias, dtype, plan)
            close(found, x.double() * scale.double()[:, None], weight, bias)


# --- on a GPU ---------------------------------------------------------------------------------------------------------

on_gpu = pytest.mark.skipif(not GPU, reason="needs a GPU that the kernels know")


def on_device(weight: QTensor, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Prepared, Tensor]:
    rows, columns = weight.shape
    x = torch.randn(tokens, columns, device=DEVICE).to(dtype)
    return x, prepare(weight), torch.randn(rows, device=DEVICE).to(dtype)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch fills new memory with NaN while it is deterministic."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spec", FORMATS, ids=str)
def test_the_gpu_agrees_with_fp64(spec: Spec, dtype: torch.dtype) -> None:
    wide = 1152 if spec.group == -1 else 1280
    cases = {
        (35, 640): (*range(1, 18), 0),
        (1, 128): (1, 7),
        (2051, wide): (2, 16, 24, 31, 32),
        (6144, 4096): (1, 16, 32),
    }
    for (rows, columns), counts in cases.items():
        weight = quantized(rows, columns, spec, DEVICE)
        for tokens in counts:
            x, prepared, bias = on_device(weight, dtype, tokens)
            close(weight_only.linear(x, prepared, bias), x, weight, bias)
        assert torch.equal(weight_only.dequantized(prepared, dtype), weight.dequantize(dtype))
    close(weight_only.linear(x, prepared), x, weight)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("number", [Int(8), E4M3], ids=str)
def test_codes_times_codes_on_a_gpu(number: Number, dtype: torch.dtype) -> None:
    """Under the rule's plans and under others; E4M3 with sums of fp32 too, since its codes are multiplied as fp16."""
    for rows, columns in ((5, 16), (35, 640), (2051, 1296), (4096, 14336)):
        weight = quantized(rows, columns, per_channel(number, scale="float32"), DEVICE)
        if number == E4M3:
            weight.codes[weight.codes & 127 == 127] = 0
        operand = codes_product.operand(weight, number)
        bias = torch.randn(rows, device=DEVICE).to(dtype)
        for tokens in (1, 3, 8, 9, 16):
            how = encoder(number, None, None, DEVICE)
            codes, scale = dynamic.encode(torch.randn(tokens, columns, device=DEVICE).to(dtype), how)
            x = codes.double() * scale.double()[:, None]
            close(codes_product.product(codes, scale, operand, bias, dtype), x, weight, bias)
            for plan in (ALONE, *PLANS):
                close(codes_product.product_of_few(codes, scale, operand, bias, dtype, plan), x, weight, bias)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gpu_takes_every_scale_of_floats(dtype: torch.dtype) -> None:
    for weight in (all_sizes(16).to(DEVICE), every_power(16, 8, 12).to(DEVICE)):
        assert torch.equal(weight_only.dequantized(prepare(weight), dtype), weight.dequantize(dtype))
        groups = weight.grid.scale.shape[1]
        x = torch.zeros(groups, groups, weight.shape[1] // groups, device=DEVICE).to(dtype)
        x[range(groups), range(groups)] = 2.0**-6 * torch.randn(groups, x.shape[2], device=DEVICE).to(dtype)
        close(weight_only.linear(x.flatten(1), prepare(weight)), x.flatten(1), weight)


@pytest.mark.gpu
@on_gpu
@pytest.mark.usefixtures("poisoned")
def test_many_tokens_take_the_library_and_odd_columns_are_padded() -> None:
    weight = quantized(515, 700, per_group(Int(4, "asymmetric"), -1), DEVICE)
    for dtype in DTYPES:
        for tokens in (3, 300):
            x, prepared, bias = on_device(weight, dtype, tokens)
            found, expected = weight_only.linear(x, prepared, bias).double(), exact(x, weight.dequantize(), bias)
            assert (found - expected).norm() < 4e-3 * expected.norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("encoded", "tokens"), [(False, 4), (False, 64), (False, 300), (True, 4)])
def test_kernels_in_a_row_see_each_others_results(encoded: bool, tokens: int) -> None:
    """A kernel may begin before the one ahead of it ends: its inputs must be there all the same, a hundred times."""
    spec = per_channel(Int(8), scale="float32") if encoded else per_group(Int(4), 128)
    weight = quantized(4096, 4096, spec, DEVICE)
    weight.grid.scale.mul_(2.0**-3)
    x = torch.randn(tokens, 4096, device=DEVICE).bfloat16()
    if encoded:
        how = encoder(Int(8), None, None, DEVICE)
        linear = partial(codes_product.linear, how=how, weight=codes_product.operand(weight, Int(8)))
    else:
        linear = partial(weight_only.linear, weight=prepare(weight))

    def chain(x: Tensor) -> list[Tensor]:
        outputs = []
        for _ in range(4):
            x = linear(x) * 2.0**-2
            x = linear(linear(x))
            outputs.append(x)
        return outputs

    first = chain(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = chain(x)
    for _ in range(100):
        for output in recorded:
            output.fill_(float("nan"))
        graph.replay()
        for found, expected in zip(recorded, first, strict=True):
            assert torch.equal(found, expected)
