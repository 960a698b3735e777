"""CUDA C++ beside this file, compiled for the constants of one use when it is first needed.

torch brings the run-time compiler and the driver's library. Its own way of starting a kernel has no launch attributes,
of which one matters here: a kernel that may begin while the one before it ends (`meet_neighbours` in `ptx.cuh`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .tensor_map import TensorMap

Constants = tuple[tuple[str, int], ...]
"""Names and values that the host puts in front of a source."""

_WEIGHTS = ("ptx.cuh", "codes.cuh", "bytes.cuh")
_CACHES = ("ptx.cuh", "cache_attention_codes.cuh", "cache_attention_sums.cuh")
PRELUDE = {
    "product": _WEIGHTS,
    "wide_product": _WEIGHTS,
    "dequantize": _WEIGHTS,
    "cache_attention": _CACHES,
    "transform": ("ptx.cuh",),
}
"""What stands before each kernel."""
_UNASKED = 48 * 1024
"""Bytes of shared memory from which on a block has to ask for it."""
_HOPPER = "90a"
"""The one architecture that kernels are for, with the instructions that no other has."""
_OVERLAPS = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""


Argument = Tensor | TensorMap | int
"""What a kernel is given: pointers, descriptions of matrices, and numbers."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, of which a number is used."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Launch(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


Plain = ctypes.c_void_p | ctypes.c_int | TensorMap


def plain(value: Argument) -> Plain:
    """An argument as the driver wants it."""
    if isinstance(value, TensorMap):
        return value
    return ctypes.c_void_p(value.data_ptr()) if isinstance(value, Tensor) else ctypes.c_int(value)


def place(value: Plain) -> int:
    """Where it lies."""
    return value.address if isinstance(value, TensorMap) else ctypes.addressof(value)


class Kernel:
    """A compiled kernel on one device."""

    def __init__(self, name: str, constants: Constants, device: int, shared: int) -> None:
        from torch.cuda._utils import _check_cuda, _get_gpu_runtime_library

        self.device, self.shared = device, shared
        self._check, self._driver = _check_cuda, _get_gpu_runtime_library()
        with torch.cuda.device(device):
            self._compiled = torch.cuda._compile_kernel(source(name, constants), name, compute_capability=_HOPPER)
            if shared >= _UNASKED:
                self._compiled.set_shared_memory_config(shared)
        self._attributes = (_Attribute * 1)(_Attribute(id=_OVERLAPS, value=1))

    def __call__(self, grid: tuple[int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """Start grid[0] x grid[1] blocks of `threads` on the current stream."""
        values = [plain(value) for value in arguments]
        places = (ctypes.c_void_p * len(values))(*map(place, values))
        launch = _Launch(
            (ctypes.c_uint * 3)(*grid, 1),
            (ctypes.c_uint * 3)(threads, 1, 1),
            self.shared,
            torch.cuda.current_stream(self.device).cuda_stream,
            self._attributes,
            len(self._attributes),
        )
        with torch.cuda.device(self.device):
            self._check(self._driver.cuLaunchKernelEx(ctypes.byref(launch), self._compiled.func, places, None))


@cache
def source(name: str, constants: Constants) -> str:
    """The whole text of a kernel: constants, what it shares with others, and NAME.cu."""
    folder = Path(__file__).parent
    parts = [f"#define {key} {value}" for key, value in constants]
    parts += _listed(dict(constants).get("SUMS", 0))
    parts += [(folder / part).read_text("utf8") for part in (*PRELUDE[name], f"{name}.cu")]
    return "\n".join(parts)


def _listed(sums: int) -> list[str]:
    """What wgmma is told one by one: so many sums of a lane, and the operands behind them."""
    names = ",".join(f"%{i}" for i in range(sums))
    registers = ",".join(f'"+f"(s[{i}])' for i in range(sums))
    lists = {"SUM_COLUMNS": f'"{2 * sums}"', "SUM_NAMES": f'"{names}"', "SUM_REGISTERS": registers}
    behind = {f"BEHIND_{i}": f'"%{sums + i}"' for i in range(6)}
    return [f"#define {key} {value}" for key, value in (lists | behind).items()] if sums else []


@cache
def compiled(name: str, constants: Constants, device: int, shared: int = 0) -> Kernel:
    """The kernel NAME on a device, started with `shared` bytes of shared memory."""
    return Kernel(name, constants, device, shared)


@cache
def available(device: int) -> bool:
    """Whether kernels can be compiled for a device: a Hopper, for which plans were found, in a torch that can."""
    capable = torch.version.hip is None and torch.cuda.get_device_capability(device) == (9, 0)
    able = hasattr(torch.cuda, "_compile_kernel") and hasattr(torch.cuda._utils, "_get_gpu_runtime_library")
    return capable and able


@cache
def processors(device: torch.device) -> int:
    """How many processors a GPU has; two where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@cache
def arrived(device: torch.device, count: int) -> Tensor:
    """How many blocks that share a sum are done: zeros, between two calls of one stream. Made before a recording."""
    return torch.zeros(count, dtype=torch.int32, device=device)
