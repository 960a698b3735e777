"""GGUF's blocks: codes, scales and least values of 32 or 256 columns as the bytes that ggml reads.

    Q4_0 Q5_0 Q8_0     s q, fp16 s for 32 columns, q signed                  symmetric integers
    Q4_1 Q5_1          s q + m, fp16 s and m                                 asymmetric integers
    MXFP4              2^(e-127) q, q of E2M1                                MXFP4
    Q2_K Q4_K Q5_K     d c q - e m, fp16 d and e for 256 columns             K-quants with least values
    Q3_K Q6_K          d c q                                                 K-quants without

What lies in a block is *planes*: several low or high bits of codes from equally long runs share a byte, the first run
in the lowest bits. One function and its inverse say that for every type, so the layouts below are shapes of runs.
A group of more than 32 columns is spelled out by repeating its scale, and narrower integers are carried by the next
wider type: both leave every value what it was. All of this works on the meta device.

Shape letters: N blocks, R rows, C columns, B bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..numerics import kquant
from ..numerics.grid import Grid
from ..numerics.qtensor import QTensor
from ..numerics.scales import scale_codes, scale_values
from ..numerics.spec import E2M1, SUPER, Int, Spec, mx, per_group
from ..numerics.spec import kquant as k_spec

BLOCK = 32
"""Columns of a block of the plain types."""


@dataclass(frozen=True)
class Kind:
    """A block type: its columns, its bytes, and the format that its codes are."""

    columns: int
    bytes: int
    spec: Spec


def _plain(bits: int, bytes: int, minima: bool = False) -> Kind:
    number = Int(bits, "asymmetric" if minima else "symmetric")
    return Kind(BLOCK, bytes, per_group(number, BLOCK, scale="float16-min" if minima else "float16"))


KINDS = {
    "Q4_0": _plain(4, 18),
    "Q4_1": _plain(4, 20, True),
    "Q5_0": _plain(5, 22),
    "Q5_1": _plain(5, 24, True),
    "Q8_0": _plain(8, 34),
    "MXFP4": Kind(BLOCK, 17, mx(E2M1)),
    "Q2_K": Kind(SUPER, 84, k_spec(2)),
    "Q3_K": Kind(SUPER, 110, k_spec(3)),
    "Q4_K": Kind(SUPER, 144, k_spec(4)),
    "Q5_K": Kind(SUPER, 176, k_spec(5)),
    "Q6_K": Kind(SUPER, 210, k_spec(6)),
}


def kind_of(spec: Spec) -> str | None:
    """The type that carries a format, whatever its groups; None where there is none."""
    number = spec.number
    if spec.scale == "kquant":
        return f"Q{spec.bits}_K"
    if number == E2M1 and spec.block == (1, BLOCK) and spec.scale.startswith("e8m0"):
        return "MXFP4"
    if not isinstance(number, Int) or spec.scale not in ("half", "float16", "float16-min"):
        return None
    if number.symmetric:
        return "Q4_0" if spec.bits <= 4 else "Q5_0" if spec.bits == 5 else "Q8_0"
    return {4: "Q4_1", 5: "Q5_1"}.get(max(spec.bits, 4))


def bytes_of(shape: tuple[int, int], kind: str) -> int:
    """Bytes of a weight [R, C]."""
    return shape[0] * shape[1] // KINDS[kind].columns * KINDS[kind].bytes


# --- from codes to blocks ---------------------------------------------------------------------------------------------


def pack(part: QTensor) -> tuple[str, Tensor]:
    """(type, bytes [R, B]) of codes [R, C]. Raises ValueError where no type holds exactly their values."""
    spec = part.grid.spec
    kind = kind_of(spec)
    if kind is None or part.order is not None:
        raise ValueError(f"no GGUF type carries {spec}: use int4, int5 or int8 in groups of 32, or a K-quant")
    form = KINDS[kind]
    if part.shape[1] % form.columns:
        raise ValueError(
            f"{kind} has blocks of {form.columns} columns, which do not divide {part.shape[1]}: use another format here"
        )
    fields = _fields(part, form)
    return kind, assemble(kind, fields).reshape(len(part.codes), -1)


def _fields(part: QTensor, form: Kind) -> dict[str, Tensor]:
    """What a block is assembled from, one row per block: unsigned codes u and numbers."""
    grid, spec, number = part.grid, part.grid.spec, part.grid.spec.number
    if spec.scale == "kquant":
        return _super_fields(part)
    if not isinstance(number, Int):
        scale = scale_codes(grid.scale, spec.scale, None)
        return {"u": part.codes.reshape(-1, BLOCK), "e": scale.reshape(-1, 1)}
    scale = _spread(grid.scale, part)
    codes = part.codes.to(torch.int16)
    assert isinstance(form.spec.number, Int)
    if number.symmetric:
        shift = (0 if number.signed else 1 << (number.bits - 1)) + form.spec.number.low
        return {"u": (codes - shift).to(torch.uint8).reshape(-1, BLOCK), "d": _half(scale).reshape(-1, 1)}
    offset = grid.offset
    if offset is None:
        assert grid.zero is not None
        offset = grid.zero * grid.scale
    least = _half(-_spread(offset, part)).reshape(-1, 1)
    return {"u": codes.to(torch.uint8).reshape(-1, BLOCK), "d": _half(scale).reshape(-1, 1), "m": least}


def _super_fields(part: QTensor) -> dict[str, Tensor]:
    grid, spec = part.grid, part.grid.spec
    assert grid.outer is not None and isinstance(spec.number, Int)
    units = kquant.layout(spec).units
    fields = {
        "u": (part.codes.to(torch.int16) - spec.number.low).to(torch.uint8).reshape(-1, SUPER),
        "d": grid.outer[..., 0].half().reshape(-1, 1),
        "c": kquant.to_scale_codes(grid.scale, grid.outer, spec).view(torch.uint8).reshape(-1, units),
    }
    if grid.offset is not None:
        fields["e"] = grid.outer[..., 1].half().reshape(-1, 1)
        fields["m"] = kquant.to_offset_codes(grid.offset, grid.outer, spec).reshape(-1, units)
    return fields


def _spread(x: Tensor, part: QTensor) -> Tensor:
    """What units have [R/r, C/c] for every 32 columns of every row [R, C/32]. Raises ValueError where units are not
    made of those.
    """
    rows, columns = part.shape
    height = rows if part.grid.spec.block[0] == -1 else part.grid.spec.block[0]
    width = min(columns, columns if part.grid.spec.group == -1 else part.grid.spec.group)
    if width % BLOCK:
        raise ValueError(f"GGUF has a scale per {BLOCK} columns, which groups of {width} are no multiple of: use 32")
    return x.repeat_interleave(height, 0)[:rows].repeat_interleave(width // BLOCK, 1)[:, : columns // BLOCK]


def _half(x: Tensor) -> Tensor:
    half = x.half()
    if not x.is_meta and not torch.equal(half.float(), x):
        raise ValueError(
            "GGUF stores scales and least values in fp16, which not all of these are: quantize again with --target gguf"
        )
    return half


# --- bytes ------------------------------------------------------------------------------------------------------------


def _planes(x: Tensor, runs: int, of: int, width: int) -> Tensor:
    """x uint8 [N, n] of `width` bits as bytes [N, n·width/8]: n is `runs` times 8/width runs of `of`, in each `of`
    bytes the first run lies lowest.
    """
    grouped = x.reshape(len(x), runs, 8 // width, of)
    packed = torch.zeros_like(grouped[:, :, 0])
    for place, run in enumerate(grouped.unbind(2)):
        packed = packed | (run << (place * width))
    return packed.reshape(len(x), -1)


def _unplanes(packed: Tensor, runs: int, of: int, width: int) -> Tensor:
    """The inverse of `_planes`."""
    grouped = packed.reshape(len(packed), runs, 1, of)
    mask = (1 << width) - 1
    return torch.cat([(grouped >> (place * width)) & mask for place in range(8 // width)], 2).reshape(len(packed), -1)


def _raw(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.uint8)


def assemble(kind: str, f: Mapping[str, Tensor]) -> Tensor:
    """Bytes [N, B] of blocks with these fields."""
    u, d = f["u"], _raw(f["d"]) if "d" in f else None
    if kind == "MXFP4":
        return torch.cat([f["e"], _planes(u, 1, 16, 4)], 1)
    assert d is not None
    if kind == "Q8_0":
        return torch.cat([d, u ^ 128], 1)
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        head = [d, _raw(f["m"])] if "m" in f else [d]
        if kind[1] == "5":
            head.append(_planes(u >> 4, 4, 1, 1))
        return torch.cat([*head, _planes(u & 15, 1, 16, 4)], 1)
    if kind == "Q2_K":
        return torch.cat([f["c"] | (f["m"] << 4), _planes(u, 2, 32, 2), d, _raw(f["e"])], 1)
    if kind == "Q3_K":
        c = (f["c"] + 32) & 63
        scales = [_planes(c & 15, 1, 8, 4), _planes(c >> 4, 1, 4, 2)]
        return torch.cat([_planes(u >> 2, 1, 32, 1), _planes(u & 3, 2, 32, 2), *scales, d], 1)
    if kind == "Q6_K":
        return torch.cat([_planes(u & 15, 2, 64, 4), _planes(u >> 4, 2, 32, 2), f["c"], d], 1)
    head = [d, _raw(f["e"]), *_scales_and_minima(f["c"], f["m"])]
    if kind == "Q5_K":
        head.append(_planes(u >> 4, 1, 32, 1))
    return torch.cat([*head, _planes(u & 15, 4, 32, 4)], 1)


def _scales_and_minima(c: Tensor, m: Tensor) -> list[Tensor]:
    """Eight scales and eight least values of 6 bits in 12 bytes: the upper four's high bits above the lower four."""
    low = [x[:, :4] | ((x[:, 4:] >> 4) << 6) for x in (c, m)]
    return [*low, (c[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)]


def take_apart(kind: str, data: Tensor) -> dict[str, Tensor]:
    """The inverse of `assemble`: the fields of blocks [N, B]."""
    if kind == "MXFP4":
        return {"e": data[:, :1], "u": _unplanes(data[:, 1:], 1, 16, 4)}
    if kind == "Q8_0":
        return {"d": _number(data, 0), "u": data[:, 2:] ^ 128}
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1"):
        fields = {"d": _number(data, 0)} | ({"m": _number(data, 2)} if kind[3] == "1" else {})
        u = _unplanes(data[:, -16:], 1, 16, 4)
        return fields | {"u": u if kind[1] == "4" else u | (_unplanes(data[:, -20:-16], 4, 1, 1) << 4)}
    if kind == "Q2_K":
        fields = {"c": data[:, :16] & 15, "m": data[:, :16] >> 4, "d": _number(data, 80), "e": _number(data, 82)}
        return fields | {"u": _unplanes(data[:, 16:80], 2, 32, 2)}
    if kind == "Q3_K":
        u = _unplanes(data[:, 32:96], 2, 32, 2) | (_unplanes(data[:, :32], 1, 32, 1) << 2)
        c = _unplanes(data[:, 96:104], 1, 8, 4) | (_unplanes(data[:, 104:108], 1, 4, 2) << 4)
        return {"u": u, "c": c - 32, "d": _number(data, 108)}
    if kind == "Q6_K":
        u = _unplanes(data[:, :128], 2, 64, 4) | (_unplanes(data[:, 128:192], 2, 32, 2) << 4)
        return {"u": u, "c": data[:, 192:208], "d": _number(data, 208)}
    low, high, both = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    c = torch.cat([low & 63, (both & 15) | ((low >> 6) << 4)], 1)
    m = torch.cat([high & 63, (both >> 4) | ((high >> 6) << 4)], 1)
    u = _unplanes(data[:, -128:], 4, 32, 4)
    if kind == "Q5_K":
        u = u | (_unplanes(data[:, 16:48], 1, 32, 1) << 4)
    return {"u": u, "c": c, "m": m, "d": _number(data, 0), "e": _number(data, 2)}


def _number(data: Tensor, at: int) -> Tensor:
    return data[:, at : at + 2].contiguous().view(torch.float16)


# --- from blocks to codes ---------------------------------------------------------------------------------------------


def unpack(kind: str, data: Tensor, columns: int) -> QTensor:
    """Codes [R, C] of a weight's bytes [R, B]: the inverse of `pack` for what files hold."""
    form = KINDS[kind]
    rows, number = len(data), form.spec.number
    f = take_apart(kind, data.reshape(-1, form.bytes))
    if not isinstance(number, Int):
        scale = scale_values(f["e"].reshape(rows, -1), form.spec.scale, None)
        return QTensor(f["u"].reshape(rows, columns), Grid(form.spec, scale))
    codes = f["u"].reshape(rows, columns)
    codes = (codes.to(torch.int16) + number.low).to(torch.int8) if number.signed else codes
    if form.spec.scale != "kquant":
        offset = -f["m"].float().reshape(rows, -1) if "m" in f else None
        return QTensor(codes, Grid(form.spec, f["d"].float().reshape(rows, -1), None, None, offset))
    outer = torch.stack([f[key].float().reshape(rows, -1) for key in ("d", "e") if key in f], -1)
    c = f["c"].reshape(rows, -1)
    scale = kquant.effective(c if "m" in f else c.view(torch.int8), outer[..., 0])
    offset = kquant.effective(f["m"].reshape(rows, -1), outer[..., 1]) if "m" in f else None
    return QTensor(codes, Grid(form.spec, scale, None, outer, offset))
