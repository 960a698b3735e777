"""Weights as the kernels read them: every 16 bytes of a lane are what it multiplies next.

Files keep a row's codes one behind the other. The tensor cores want them spread over the 32 lanes of a warp, so the
order is changed once, when a model is loaded, and nothing is shuffled while text is generated. The codes stay the
stored ones: `prepare` has an inverse, and what it refuses is multiplied by torch.

A *tile* is 16 rows of Ŵ, a *unit* 128 of their columns; both are padded with zero codes. Lane 4g + t of a warp holds
rows g and g + 8 (its *halves*) and, of every *block* of 32 columns, columns 8t to 8t + 7 as four *pairs*. A word is
pairs of one row: even columns in its lower 16 bits, odd ones in its upper, the earlier pairs at the lower bits of each;
words of the two halves alternate. Three bits do not divide a word: they are a plane of their lower two bits and one of
the third.

Shape letters: N outputs, K inputs, T tiles, U units, G scales of a row, V vectors of a lane in a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics.qtensor import QTensor
from ..numerics.spec import Int

ROWS, COLUMNS = 16, 128
"""Rows of a tile, columns of a unit."""
WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Prepared:
    """A weight [N, K] = s (q - z), ready for the kernels. Codes count from 0; what is symmetric has z = 2^(bits-1)."""

    low: Tensor
    """The codes, of 3 bits the lower two: int32 [T, U, V, 32, 4]."""
    high: Tensor | None
    """The third of 3 bits: int32 [T, U, 32, 2]."""
    scale: Tensor
    """fp16 where that is exact, else fp32: [T, G, 8, 2], row g of a tile beside row g + 8."""
    zero: Tensor | None
    """uint8, shaped like `scale`; None where codes are symmetric."""
    order: Tensor | None
    """Which input goes with column i, where columns are sorted by their group."""
    shape: tuple[int, int]
    bits: int
    group: int
    """Columns that share a scale: 32, 64, 128 · 2^n, or -1 for all."""


def refusal(weight: QTensor) -> str | None:
    """Why the kernels cannot take a weight, or None."""
    spec, grid = weight.grid.spec, weight.grid
    if not isinstance(spec.number, Int) or spec.bits not in WIDTHS:
        return f"codes are {spec.number}, not integers of 2, 3, 4 or 8 bits"
    if grid.offset is not None:
        return "units store their least value instead of a zero-point"
    if grid.scale.shape[-2] not in (1, weight.shape[-2]):
        return "a scale spans several rows"
    group = _group(weight)
    if group not in (-1, 32, 64) and (group % COLUMNS or (group & (group - 1))):
        return f"groups have {group} columns, not 32, 64, 128 times a power of two, or the whole row"
    if grid.zero is not None and not bool(((grid.zero >= 0) & (grid.zero <= 255)).all()):
        return "zero-points lie outside of 0 to 255"
    return None


def prepare(weight: QTensor) -> Prepared:
    """Put a weight's codes and scales in the kernels' order, on the device where they are.

    Raises ValueError for formats that the kernels do not know.
    """
    reason = refusal(weight)
    if reason is not None:
        raise ValueError(f"no kernel for this weight, since {reason}: use its dense copy")
    grid, bits, group = weight.grid, weight.grid.spec.bits, _group(weight)
    codes = weight.codes if weight.order is None else weight.codes[:, weight.order]
    if codes.dtype == torch.int8:
        codes = codes ^ -(1 << (bits - 1)) if bits == 8 else codes + (1 << (bits - 1))
    codes = codes.view(torch.uint8)
    codes = F.pad(codes, (0, -codes.shape[1] % COLUMNS, 0, -codes.shape[0] % ROWS))
    scale, zero = (None if part is None else _by_tile(part, weight.shape, group) for part in (grid.scale, grid.zero))
    assert scale is not None
    half = scale.half()
    prepared = Prepared(
        _pack(codes & 3 if bits == 3 else codes, 2 if bits == 3 else bits),
        _pack(codes >> 2, 1).squeeze(2) if bits == 3 else None,
        half if torch.equal(half.float(), scale) else scale,
        None if zero is None or _implied(weight) else zero.to(torch.uint8),
        weight.order,
        (weight.shape[0], weight.shape[1]),
        bits,
        group,
    )
    if codes.is_cuda:
        torch.cuda.synchronize(codes.device)  # kernels begin to read a weight before the work ahead of them has ended
    return prepared


def restore(weight: Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `prepare`: codes uint8 [N, K], scales and zero-points fp32 [N, G]."""
    rows, columns = weight.shape
    codes = _unpack(weight.low, 2 if weight.bits == 3 else weight.bits)
    if weight.high is not None:
        codes |= _unpack(weight.high.unsqueeze(2), 1) << 2
    groups = 1 if weight.group == -1 else columns // weight.group
    zero = torch.full_like(weight.scale, 1 << (weight.bits - 1)) if weight.zero is None else weight.zero
    scale, zero = (part.float().permute(0, 3, 2, 1).flatten(0, 2)[:rows, :groups] for part in (weight.scale, zero))
    return codes[:rows, :columns], scale, zero


def _group(weight: QTensor) -> int:
    """Columns that share a scale, -1 for all."""
    groups = weight.grid.scale.shape[-1]
    return -1 if groups == 1 else weight.shape[-1] // groups


def _implied(weight: QTensor) -> bool:
    """Whether the zero-points are those of a symmetric rule."""
    number = weight.grid.spec.number
    return isinstance(number, Int) and number.symmetric


def _by_tile(parts: Tensor, shape: torch.Size, group: int) -> Tensor:
    """What there is one of per group [N or 1, G] as [T, G, 8, 2]; groups are padded to whole units, rows to tiles."""
    per_unit = 1 if group == -1 else max(1, COLUMNS // group)
    parts = parts.expand(shape[0], -1)
    parts = F.pad(parts, (0, -parts.shape[1] % per_unit, 0, -shape[0] % ROWS))
    return parts.reshape(-1, 2, 8, parts.shape[1]).permute(0, 3, 2, 1).contiguous()


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where the codes of a word lie: int32 [pair, even or odd]."""
    pair = torch.arange(16 // bits, dtype=torch.int32, device=device) * bits
    return pair[:, None] + torch.tensor([0, 16], dtype=torch.int32, device=device)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [16 T, 128 U] below 2^bits as int32 [T, U, V, 32, vector]."""
    units = codes.shape[1] // COLUMNS
    parts = codes.view(-1, 2, 8, units, 4, 4, 4, 2)  # tile, half, g, unit, block, t, pair, even or odd
    parts = parts.permute(0, 3, 2, 5, 1, 4, 6, 7).reshape(-1, units, 32, 2, bits, 16 // bits, 2)
    words = (parts.int() << _shifts(bits, codes.device)).sum((-1, -2), dtype=torch.int32)  # wraps: no bit meets another
    vector = min(4, 2 * bits)
    words = words.transpose(-1, -2).reshape(-1, units, 32, 2 * bits // vector, vector)
    return words.transpose(2, 3).contiguous()


def _unpack(words: Tensor, bits: int) -> Tensor:
    """The inverse of `_pack`."""
    tiles, units = words.shape[:2]
    words = words.transpose(2, 3).reshape(tiles, units, 32, bits, 2).transpose(-1, -2)
    parts = (words[..., None, None] >> _shifts(bits, words.device)) & ((1 << bits) - 1)
    parts = parts.to(torch.uint8).reshape(tiles, units, 8, 4, 2, 4, 4, 2)  # g, t, half, block, pair, even or odd
    return parts.permute(0, 4, 2, 1, 5, 3, 6, 7).reshape(tiles * ROWS, units * COLUMNS)
