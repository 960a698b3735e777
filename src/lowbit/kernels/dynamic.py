"""Inputs to codes in one pass over memory.

In front of a quantized product stand a Hadamard or Kronecker transform, a clipped range and a division: a dozen
operations in torch, each of which goes through memory. They are one kernel here, since a token fits into a processor's
registers: `transform.cu` on Hopper behind the maps that it takes, else `dynamic_triton.py`; where neither can be,
`encoder.reference` defines what they do.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from . import transform_cuda
from .encoder import Encoder, reference


def encode(x: Tensor, how: Encoder, *, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Inputs [M, K] as codes and one fp32 scale per token [M].

    Codes are int8 [M, K], E4M3 [M, K], or with `packed` two of at most four bits to a byte, uint8 [M, K/2], the earlier
    one in the lower half.
    """
    fits = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.numel()
    if fits and transform_cuda.refusal(x, how) is None:
        return transform_cuda.encode(x, how, packed)
    odd = x.shape[1] if how.factors is None else how.factors.sizes[1]
    if not fits or not _has_triton() or (packed and odd % 2):
        return reference(x, how, packed=packed)
    from .dynamic_triton import encode_mapped, encode_rows

    if how.factors is not None:
        return encode_mapped(x, how, packed)
    return encode_rows(x if how.map is None else how.map.apply(x), how, packed)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
