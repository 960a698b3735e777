"""The tensors of one linear in compressed-tensors files, spelled from stored codes and read back: nothing is rounded.

    pack-quantized        integer codes + 2^(b-1), as one little-endian bit stream per row in int32 words; zero-points
                          likewise, but packed down the rows
    int-quantized         integer codes as int8
    float-quantized       E4M3 codes as float8; naive-quantized is the same without quantized inputs; blocks pad nothing
    nvfp4-pack-quantized  E2M1 codes, two to a byte; scales as E4M3, to be divided by weight_global_scale
    mxfp4-pack-quantized  E2M1 codes, two to a byte; mxfp6: E2M3 codes, four to three bytes; mxfp8: E4M3 codes as
                          float8; scales as exponents in a byte

What a layer's tensors are called and made of tells these apart, so `unpack` goes by them and not by the format's name,
which older files leave out. Both directions work on the meta device. The package itself is not imported: it would only
be asked to round weights that are codes already. Tests hold this file to its reader. Shape letters: O output rows,
I input columns, G groups of columns, W 32-bit words.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..numerics import bits
from ..numerics.grid import Grid
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.scales import scale_codes, scale_values
from ..numerics.spec import E4M3, Int, ScaleDtype, Spec
from .ct_schemes import PACKED, completed, has_exponents, input_spec, is_local, number_of, weight_spec

FLOATS: dict[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_DTYPES = {name: dtype for dtype, name in FLOATS.items()}

PARTS = (
    "weight_packed",
    "weight_scale",
    "weight_global_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
"""What a quantized linear may own beside `weight` and `bias`."""

_DENSE_SINCE = (0, 18)
"""The release that began to pack codes without gaps: earlier ones leave what 32 bits have left over unused."""


# --- writing ----------------------------------------------------------------------------------------------------------


def pack_layer(name: str, layer: QLayer, scheme: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of the linear `name` of this scheme; scales that suit any dtype take the model's `dtype`."""
    part = layer.weight.parts[0]
    strategy = scheme["weights"]["strategy"]
    tensors = _codes(part, scheme["format"]) | _scales(part.grid, strategy, dtype)
    if not scheme["weights"]["symmetric"]:
        tensors["weight_zero_point"] = _zero_points(part.grid, scheme["format"] == PACKED, strategy)
    grid = layer.input_grid
    if grid is not None and is_local(grid.spec):
        tensors["input_global_scale"] = inverse(grid.scale)
    elif grid is not None:
        tensors["input_scale"] = _floats(grid, "tensor", dtype)
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def filled(layer: QLayer) -> QLayer:
    """A pruned layer with codes for its dropped entries too, zeros that they are; any other layer is given back."""
    weight = layer.weight
    if weight.regions is None or len(weight.parts) != 1 or weight.sparse is not None:
        return layer
    (part,) = weight.parts
    zeros = part.grid.encode(torch.zeros(part.shape))
    if part.region is None or part.order is not None or bool(part.grid.decode(zeros).any()):
        return layer
    codes = torch.where(weight.regions.mask(part.region), part.codes, zeros)
    return replace(layer, weight=replace(weight, parts=(QTensor(codes, part.grid),), regions=None))


def _codes(part: QTensor, form: str) -> dict[str, Tensor]:
    """The tensors that hold a weight's codes."""
    number, codes = part.grid.spec.number, part.codes
    if isinstance(number, Int):
        if form != PACKED:
            return {"weight": codes if number.signed else shift(codes, number.bits)}
        unsigned = shift(codes, number.bits) if number.signed else codes
        return {"weight_packed": to_words(unsigned, number.bits), "weight_shape": torch.tensor(part.shape)}
    if number.bits == 8:
        return {"weight": codes.view(torch.float8_e4m3fn)}
    return {"weight_packed": bits.pack(codes.contiguous(), number.bits)}


def _scales(grid: Grid, strategy: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors that hold a weight's scales."""
    kind = grid.spec.scale
    if has_exponents(grid.spec):
        return {"weight_scale": scale_codes(grid.scale, kind, None)}
    if kind == "e4m3":
        assert grid.outer is not None, "e4m3 scales have an outer scale"
        return {
            "weight_scale": scale_codes(grid.scale, kind, grid.outer),
            "weight_global_scale": inverse(grid.outer),
        }
    return {"weight_scale": _floats(grid, strategy, dtype)}


def _floats(grid: Grid, strategy: str, dtype: torch.dtype) -> Tensor:
    """A grid's scales in the dtype that holds them exactly, [1] where there is one for the whole tensor."""
    scale = grid.scale.to(_DTYPES.get(grid.spec.scale, dtype))
    return scale.reshape(1) if strategy == "tensor" else scale


def _zero_points(grid: Grid, packed: bool, strategy: str) -> Tensor:
    assert grid.zero is not None, "what is not symmetric has zero-points"
    zero, width = grid.zero.to(torch.uint8), grid.spec.bits
    if packed:
        return to_words(zero.T, width).T
    return shift(zero, width).reshape(1) if strategy == "tensor" else shift(zero, width)


def inverse(outer: Tensor) -> Tensor:
    """What scales are divided by in files, [1], for one they are multiplied with; and the other way round.

    Raises ValueError where that would round: NVFP4's outer scales are chosen so that it does not (`numerics.scales`).
    """
    found = outer.reshape(1).float().reciprocal()
    if not found.is_meta and not torch.equal(found.reciprocal(), outer.reshape(1)):
        raise ValueError("an earlier lowbit made these NVFP4 scales, whose inverse rounds: quantize the model again")
    return found


# --- reading ----------------------------------------------------------------------------------------------------------


def unpack_layer(
    name: str, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any], version: tuple[int, ...] = _DENSE_SINCE
) -> QLayer:
    """The inverse of `pack_layer`: codes, scales and zero-points bit for bit, described in the scheme's own terms.

    `version` is the release that wrote the tensors. Raises ValueError for what lowbit does not know.
    """
    given = {key: tensors[f"{name}.{key}"] for key in (*PARTS, "weight") if f"{name}.{key}" in tensors}
    arguments = completed(scheme.get("weights"))
    if arguments is None or "weight_scale" not in given:
        raise ValueError(f"{name} has scales and no scheme, or the other way round: convert the model again")
    spec = weight_spec(arguments, _stored_as(given["weight_scale"]))
    codes = _read_codes(name, given, arguments, version)
    grid = _read_grid(given, spec, codes.shape)
    order = None
    if "weight_g_idx" in given and spec.block[0] == 1 and (given["weight_g_idx"] >= 0).all():
        order = torch.argsort(given["weight_g_idx"], stable=True)
        order = None if torch.equal(order, torch.arange(len(order), device=order.device)) else order
    weight = QWeight((QTensor(codes, grid, order),))
    inputs = completed(scheme.get("input_activations"))
    if inputs is None:
        return QLayer(weight)
    return QLayer(weight, *_read_inputs(inputs, given))


def _stored_as(scale: Tensor) -> ScaleDtype:
    """The storage of scales, from their dtype."""
    if scale.dtype == torch.uint8:
        return "e8m0"
    return "e4m3" if scale.dtype == torch.float8_e4m3fn else FLOATS[scale.dtype]


def _read_codes(
    name: str, given: Mapping[str, Tensor], arguments: Mapping[str, Any], version: tuple[int, ...]
) -> Tensor:
    """Codes [O, I]: int8 for symmetric integers, uint8 for all else."""
    number = number_of(arguments)
    if "weight_packed" not in given:
        stored = given["weight"]
        if stored.dtype not in (torch.int8, torch.float8_e4m3fn):
            raise ValueError(f"{name} is stored as {stored.dtype} with scales beside it: save the model compressed")
        if number == E4M3:
            return stored.view(torch.uint8)
        return stored if arguments["symmetric"] else shift(stored, number.bits)
    packed = given["weight_packed"]
    if packed.dtype == torch.uint8:
        return bits.unpack(packed, number.bits, packed.shape[-1] * 8 // number.bits, signed=False)
    columns = int(given["weight_shape"][-1]) if not given["weight_shape"].is_meta else _columns(given, arguments)
    codes = from_words(packed, number.bits, columns, gaps=_has_gaps(packed, number.bits, columns, version))
    return shift(codes, number.bits) if arguments["symmetric"] else codes


def _columns(given: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> int:
    """Input columns, where the tensor that says them has no data: those of the groups, or as many as fit."""
    if arguments["strategy"] == "group":
        return int(given["weight_scale"].shape[-1] * arguments["group_size"])
    return int(given["weight_packed"].shape[-1] * 32 // arguments["num_bits"])


def _has_gaps(packed: Tensor, width: int, columns: int, version: tuple[int, ...]) -> bool:
    """Whether every word holds whole codes only. The number of words says it, where both ways do not agree."""
    with_gaps, without = -(-columns // (32 // width)), -(-columns * width // 32)
    return packed.shape[-1] == with_gaps and (with_gaps != without or version < _DENSE_SINCE)


def _read_grid(given: Mapping[str, Tensor], spec: Spec, shape: torch.Size) -> Grid:
    """A weight's grid: scales as they are used, in fp32, and zero-points that count codes from 0."""
    stored, zero, outer = given["weight_scale"], given.get("weight_zero_point"), None
    if "weight_global_scale" in given:
        outer = given["weight_global_scale"].float().reshape(1, 1).reciprocal()
    scale = scale_values(stored.reshape(-1, stored.shape[-1] if stored.dim() else 1), spec.scale, outer)
    if has_no_zero(spec) or zero is None:
        return Grid(spec, scale, None, outer)
    if zero.dtype == torch.int32:
        zero = from_words(zero.T, spec.bits, shape[0], gaps=_has_gaps(zero.T, spec.bits, shape[0], _DENSE_SINCE)).T
    else:
        zero = shift(zero.to(torch.int8), spec.bits)
    return Grid(spec, scale, zero.float().reshape(scale.shape), outer)


def has_no_zero(spec: Spec) -> bool:
    """Whether a zero-point beside such a weight says nothing: older releases store zeros with symmetric ones."""
    return not isinstance(spec.number, Int) or spec.number.symmetric


def _read_inputs(arguments: Mapping[str, Any], given: Mapping[str, Tensor]) -> tuple[Spec, Grid | None]:
    """The format of a linear's inputs, and its calibrated grid where it has one."""
    if "input_global_scale" in given:
        spec = input_spec(arguments, "e4m3")
        return spec, Grid(spec, given["input_global_scale"].float().reshape(1, 1).reciprocal())
    stored = given.get("input_scale")
    spec = input_spec(arguments, "float32" if stored is None else FLOATS[stored.dtype])
    if spec.dynamic:
        return spec, None
    if stored is None:
        raise ValueError("the model's inputs are static and have no input_scale: calibrate it again")
    zero = None
    if not has_no_zero(spec):
        stored_zero = given.get("input_zero_point", torch.zeros_like(stored, dtype=torch.int8))
        zero = shift(stored_zero.to(torch.int8), spec.bits).float().reshape(1, 1)
    return spec, Grid(spec, stored.float().reshape(1, 1), zero)


# --- codes ------------------------------------------------------------------------------------------------------------


def shift(codes: Tensor, width: int) -> Tensor:
    """Signed codes q (int8) as unsigned q + 2^(b-1) (uint8), and unsigned ones as signed."""
    half = 1 << (width - 1)
    return codes.view(torch.uint8) + half if codes.dtype == torch.int8 else (codes - half).view(torch.int8)


def to_words(codes: Tensor, width: int) -> Tensor:
    """Unsigned codes [..., n] as int32 [..., W] of one bit stream per row, W = ceil(n b/32)."""
    words = -(-codes.shape[-1] * width // 32)
    packed = bits.pack(codes.contiguous(), width)
    return pad(packed, (0, 4 * words - packed.shape[-1])).contiguous().view(torch.int32)


def from_words(words: Tensor, width: int, length: int, *, gaps: bool = False) -> Tensor:
    """The inverse of `to_words`: uint8 [..., length]. With `gaps`, 32 // b codes to a word, from its lowest bit."""
    if gaps:
        shifts = torch.arange(32 // width, dtype=torch.int32, device=words.device) * width
        codes = (words[..., None] >> shifts) & ((1 << width) - 1)
        return codes.flatten(-2)[..., :length].to(torch.uint8)
    packed = words.contiguous().view(torch.uint8)
    size = bits.packed_length(length, width)
    return bits.unpack(pad(packed, (0, size - packed.shape[-1])), width, length, signed=False)
