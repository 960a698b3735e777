"""Matrices as the copy engine of a Hopper knows them: a description that a kernel is started with."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

COLUMNS = 64
"""Of a box: 128 bytes, whose vectors of 16 trade places so that no bank of shared memory meets twice."""
_ALIGNED = 64
_BYTES = 128
_TYPES = {torch.float16: 6, torch.bfloat16: 9}
"""CUtensorMapDataType."""
_SWIZZLE_128, _PROMOTE_256 = 3, 3
"""CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B."""


class TensorMap:
    """CUtensorMap: bytes, at an address that the driver can write them to."""

    def __init__(self) -> None:
        self._memory = ctypes.create_string_buffer(_BYTES + _ALIGNED)
        start = ctypes.addressof(self._memory)
        self.address = start + -start % _ALIGNED


def tensor_map(x: Tensor, rows: int) -> TensorMap:
    """The map of a contiguous x [M, K] in 16 bits that is fetched in boxes of so many rows and 64 columns.

    What a box has beyond M and K is zeros. x begins at a multiple of 16 bytes, and so does every row.
    """
    from torch.cuda._utils import _check_cuda, _get_gpu_runtime_library

    found = TensorMap()
    (count, width), size = x.shape, x.element_size()
    _check_cuda(
        _get_gpu_runtime_library().cuTensorMapEncodeTiled(
            ctypes.c_void_p(found.address), _TYPES[x.dtype], 2, ctypes.c_void_p(x.data_ptr()),
            (ctypes.c_uint64 * 2)(width, count), (ctypes.c_uint64 * 1)(width * size),
            (ctypes.c_uint32 * 2)(COLUMNS, rows), (ctypes.c_uint32 * 2)(1, 1),
            0, _SWIZZLE_128, _PROMOTE_256, 0,
        )
    )  # fmt: skip
    return found
