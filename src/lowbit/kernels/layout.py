"""Weights as the kernels read them: every 16 bytes of a lane are what it multiplies next.

Files keep a row's codes one behind the other. The tensor cores want them spread over the 32 lanes of a warp, so the
order is changed once, when a model is loaded, and nothing is shuffled while text is generated. The codes stay the
stored ones: `prepare` has an inverse, and what it refuses is multiplied by torch.

A *tile* is 16 rows of Ŵ, a *unit* 128 of their columns; both are padded with zero codes. Lane 4g + t of a warp holds
rows g and g + 8 (its *halves*) and, of every *block* of 32 columns, columns 8t to 8t + 7 as four *pairs*. The four
words of a vector are the four pairs: each has fields for several blocks and both halves (row g first), even columns in
its lower 16 bits and odd ones in its upper. So a product unpacks all of a block by one shift at most, and where columns
are wanted in another order, lanes of a row trade whole words (`wide_product.cu`). Three bits do not divide a word's
half, which has five codes and a bit. So four words have five of eight places each, and what is left of a pair are two
bytes, one for even columns and one for odd ones, of which two more words have two each; but for the third bits of the
last place, which are a word's own last ones. E2M1 has its bits where one shift brings them to those
of bf16.

E2M1 with a scale for 16 or 32 columns (NVFP4, MXFP4) keeps a byte per group, and one fp32 factor per row for what is
left of the scales: NVFP4's tensor scale, the order of magnitude of MX's powers of two.

Shape letters: N outputs, K inputs, T tiles, U units, G scales of a row, V vectors of a lane in a unit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ..numerics.qtensor import QTensor
from ..numerics.scales import power_of_two
from ..numerics.spec import E2M1, Int, Number

ROWS, COLUMNS = 16, 128
"""Rows of a tile, columns of a unit."""
WIDTHS = (2, 3, 4, 8)
_PLACES = ((6, 7, 8, 15), (3, 4, 5, 12), (0, 1, 2, 9), (13, 10, 11, 14))
"""Bits of a word's half in which E2M1's mantissa, exponent and sign lie, by field."""
_KEPT = torch.tensor([7, 7, 3], dtype=torch.int32)[:, None, None]
"""Bits of a code of 3 in its pair's two bytes, by place: the last place's third bit is in the word."""
_TOP = 8
"""Exponent of a row's largest scale over its factor: E4M3's largest."""
_SPREAD = 24
"""Exponents that scales of a row may span: beyond it fp16 cannot hold their products with codes."""


@dataclass(frozen=True)
class Prepared:
    """A weight [N, K] = s (q - z), ready for the kernels. Codes count from 0; what is symmetric has z = 2^(bits-1).

    E2M1 has no zero-points, and its scales are `scale` times `factor`.
    """

    low: Tensor
    """The codes: int32 [T, U, V, 32, 4]."""
    high: Tensor | None
    """Those of 3 bits that four words have no room for: int32 [T, U, 32, 2]."""
    scale: Tensor
    """fp16 where that is exact, else fp32: [T, G, 8, 2], row g of a tile beside row g + 8. Where codes are asymmetric
    [T, G, 8, 4], so that one load brings both: the bytes behind the two scales are their zero-points. Of E2M1 uint8
    [T, U, 8, groups in a block, 4 blocks, 2]: bits 7 to 14 of 2^7 times the scale as fp16."""
    factor: Tensor | None
    """What scales of a row are multiplied by: fp32 [N], of E2M1 only."""
    order: Tensor | None
    """Which input goes with column i, where columns are sorted by their group."""
    shape: tuple[int, int]
    bits: int
    group: int
    """Columns that share a scale: 32, 64, 128 · 2^n, or -1 for all; of E2M1 16 or 32."""

    @property
    def number(self) -> Number:
        """What a code is."""
        return Int(self.bits, "asymmetric") if self.factor is None else E2M1

    @property
    def zero(self) -> Tensor | None:
        """Zero-points uint8 [T, G, 8, 2], a view; None where codes are symmetric."""
        if self.factor is not None or self.scale.shape[-1] == 2:
            return None
        return self.scale[..., 2:].view(torch.uint8)[..., :2]

    @property
    def groups(self) -> int:
        """Scales of a row in a unit of columns, one where a scale is for more."""
        return 1 if self.group == -1 else max(1, COLUMNS // self.group)

    def constants(self, dtype: torch.dtype) -> tuple[tuple[str, int], ...]:
        """What kernels are compiled for, with inputs or outputs of a dtype."""
        return (
            ("BYTES", 0),
            ("BITS", self.bits),
            ("E2M1", int(self.factor is not None)),
            ("BFLOAT", int(dtype == torch.bfloat16)),
            ("ZERO", int(self.zero is not None)),
            ("WIDE", int(self.scale.dtype == torch.float32)),
            ("GROUPS", self.groups),
        )

    def pointers(self) -> list[Tensor]:
        """Codes, more of 3 bits, scales, factors; codes stand for what is not there and not looked at."""
        return [self.low, *(self.low if part is None else part for part in (self.high, self.scale, self.factor))]

    def counts(self) -> list[int]:
        """Units and scales of a tile, log2 of the units that share a scale (all of them: more than there are)."""
        shift = 30 if self.group == -1 else max(0, (self.group // COLUMNS).bit_length() - 1)
        return [self.low.shape[1], self.scale.shape[1], shift]

    def rows(self, start: int, stop: int) -> Prepared:
        """Rows [start, stop) of it, a view; both are multiples of a tile's rows, or the last."""
        tiles = slice(start // ROWS, -(-stop // ROWS))
        low, scale = self.low[tiles], self.scale[tiles]
        high = None if self.high is None else self.high[tiles]
        factor = None if self.factor is None else self.factor[start:stop]
        return replace(self, low=low, high=high, scale=scale, factor=factor, shape=(stop - start, self.shape[1]))


def joined(parts: Sequence[Prepared]) -> Prepared:
    """Weights of one format, of whole tiles, one below the other."""

    def cat(each: list[Tensor | None]) -> Tensor | None:
        there = [part for part in each if part is not None]
        return torch.cat(there) if there else None

    low, scale = torch.cat([part.low for part in parts]), torch.cat([part.scale for part in parts])
    high, factor = (cat([getattr(part, name) for part in parts]) for name in ("high", "factor"))
    shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
    whole = replace(parts[0], low=low, high=high, scale=scale, factor=factor, shape=shape)
    settle(low)
    return whole


def settle(weight: Tensor) -> None:
    """Wait until a weight is there: kernels begin to read it before the work ahead of them has ended."""
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


def refusal(weight: QTensor) -> str | None:
    """Why the kernels cannot take a weight, or None."""
    grid, number = weight.grid, weight.grid.spec.number
    if number != E2M1 and (not isinstance(number, Int) or number.bits not in WIDTHS):
        return f"codes are {number}, neither integers of 2, 3, 4 or 8 bits nor E2M1"
    if grid.offset is not None:
        return "units store their least value instead of a zero-point"
    if grid.scale.shape[-2] not in (1, weight.shape[-2]):
        return "a scale spans several rows"
    group = _group(weight)
    if number == E2M1:
        if group not in (16, 32):
            return f"groups of E2M1 have {group} columns, not 16 or 32"
        return "its scales are neither E4M3 nor powers of two of about one size" if _folded(weight) is None else None
    if group not in (-1, 32, 64) and (group % COLUMNS or (group & (group - 1))):
        return f"groups have {group} columns, not 32, 64, 128 times a power of two, or the whole row"
    most = min(1 << number.bits, 255)
    if grid.zero is not None and not bool(((grid.zero >= 0) & (grid.zero <= most)).all()):
        return f"zero-points lie outside of 0 to {most}"
    return None


def prepare(weight: QTensor) -> Prepared:
    """Put a weight's codes and scales in the kernels' order, on the device where they are.

    Raises ValueError for formats that the kernels do not know.
    """
    reason = refusal(weight)
    if reason is not None:
        raise ValueError(f"no kernel for this weight, since {reason}: use its dense copy")
    grid, bits = weight.grid, weight.grid.spec.bits
    codes = weight.codes if weight.order is None else weight.codes[:, weight.order]
    if codes.dtype == torch.int8:
        codes = codes ^ -(1 << (bits - 1)) if bits == 8 else codes + (1 << (bits - 1))
    codes = codes.view(torch.uint8)
    shape, group = (weight.shape[0], weight.shape[1]), _group(weight)
    if grid.spec.number == E2M1:
        prepared = _prepared_floats(weight, codes, shape, group)
    else:
        scale, zero = (None if part is None else _by_tile(part, shape, group) for part in (grid.scale, grid.zero))
        assert scale is not None
        half, codes = scale.half(), _whole_tiles(codes)
        scale = half if torch.equal(half.float(), scale) else scale
        if zero is not None and not _implied(weight):
            scale = _beside(scale, zero.to(torch.uint8))
        low, high = _pack_threes(codes) if bits == 3 else (_pack(codes, _shifts(bits, codes.device)), None)
        prepared = Prepared(low, high, scale, None, weight.order, shape, bits, group)
    settle(codes)
    return prepared


def restore(weight: Prepared) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of `prepare`: codes uint8 [N, K], scales and zero-points fp32 [N, G]."""
    rows, columns = weight.shape
    groups = 1 if weight.group == -1 else columns // weight.group
    if weight.factor is not None:
        codes = _unpack(weight.low, _places(weight.low.device))
        scale = (weight.scale.to(torch.int16) << 7).view(torch.float16).float() * 2.0**-7
        scale = scale.permute(0, 5, 2, 1, 4, 3).flatten(3).flatten(0, 2)[:rows, :groups] * weight.factor[:, None]
        return codes[:rows, :columns], scale, torch.zeros_like(scale)
    if weight.high is not None:
        codes = _unpack_threes(weight.low, weight.high)
    else:
        codes = _unpack(weight.low, _shifts(weight.bits, weight.low.device))
    scale, zero = weight.scale[..., :2], weight.zero
    zero = torch.full_like(scale, 1 << (weight.bits - 1)) if zero is None else zero
    scale, zero = (part.float().permute(0, 3, 2, 1).flatten(0, 2)[:rows, :groups] for part in (scale, zero))
    return codes[:rows, :columns], scale, zero


def _group(weight: QTensor) -> int:
    """Columns that share a scale, -1 for all."""
    groups = weight.grid.scale.shape[-1]
    return -1 if groups == 1 else weight.shape[-1] // groups


def _implied(weight: QTensor) -> bool:
    """Whether the zero-points are those of a symmetric rule."""
    number = weight.grid.spec.number
    return isinstance(number, Int) and number.symmetric


def _by_tile(parts: Tensor, shape: tuple[int, int], group: int) -> Tensor:
    """What there is one of per group [N or 1, G] as [T, G, 8, 2]; groups are padded to whole units, rows to tiles."""
    per_unit = 1 if group == -1 else max(1, COLUMNS // group)
    parts = parts.expand(shape[0], -1)
    parts = F.pad(parts, (0, -parts.shape[1] % per_unit, 0, -shape[0] % ROWS))
    return parts.reshape(-1, 2, 8, parts.shape[1]).permute(0, 3, 2, 1).contiguous()


def _beside(scale: Tensor, zero: Tensor) -> Tensor:
    """Scales [T, G, 8, 2] and as many bytes of zero-points, [T, G, 8, 4]."""
    room = torch.zeros_like(scale)
    room.view(torch.uint8)[..., :2] = zero
    return torch.cat([scale, room], -1)


def _prepared_floats(weight: QTensor, codes: Tensor, shape: tuple[int, int], group: int) -> Prepared:
    """E2M1 codes and their scales, a byte each."""
    folded = _folded(weight)
    assert folded is not None
    parts, factor = folded
    codes = codes.where(parts.repeat_interleave(group, 1) > 0, 0)  # no byte is a bf16 number of zero
    parts = F.pad(parts, (0, -parts.shape[1] % (COLUMNS // group), 0, -shape[0] % ROWS))
    parts = parts.reshape(-1, 2, 8, parts.shape[1] * group // COLUMNS, 4, 32 // group)  # tile, half, g, unit, block
    scale = parts.permute(0, 3, 2, 5, 4, 1).contiguous()
    low = _pack(_whole_tiles(codes), _places(codes.device))
    return Prepared(low, None, scale, factor, weight.order, shape, 4, group)


def _folded(weight: QTensor) -> tuple[Tensor, Tensor] | None:
    """Scales of E2M1 as bytes [N, G], and the factors of rows [N]; None where they are no such numbers."""
    grid, rows = weight.grid, weight.shape[0]
    scale = grid.scale.expand(rows, -1)
    outer = None if grid.outer is None else grid.outer.float().expand(rows, -1)
    found = _as_bytes(scale, outer)
    if found is not None:
        return found
    codes = weight.codes if weight.order is None else weight.codes[:, weight.order]
    used = (codes & 7 != 0).unflatten(1, (scale.shape[1], -1)).any(-1)
    return _as_bytes(scale.where(used, 0.0), outer)  # what a format stores for groups of zeros may be of any size


def _as_bytes(scale: Tensor, outer: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """The same of scales [N, G], relative to an outer one [N, 1] where there is one."""
    if outer is None:
        exponent = (scale.amax(1, keepdim=True).view(torch.int32) >> 23) - 127
        outer = power_of_two((exponent - _TOP).clamp_min(-126))
    elif outer.shape[1] > 1:
        return None
    relative = scale / outer
    half = (relative * 2.0**7).half()
    bits = half.view(torch.int16)
    inside = (relative == 0) | ((relative >= 2.0 ** (_TOP - _SPREAD)) & (relative < 2.0 ** (_TOP + 1)))
    if not inside.all() or (bits & 127).any() or not torch.equal(half.float() * 2.0**-7 * outer, scale):
        return None
    return (bits >> 7).to(torch.uint8), outer[:, 0].contiguous()


def _whole_tiles(codes: Tensor) -> Tensor:
    """Codes padded with zeros to tiles and units."""
    return F.pad(codes, (0, -codes.shape[1] % COLUMNS, 0, -codes.shape[0] % ROWS))


def _shifts(bits: int, device: torch.device) -> Tensor:
    """Where the codes of a word lie: int32 [field, even or odd, 1]."""
    field = torch.arange(16 // bits, dtype=torch.int32, device=device) * bits
    return (field[:, None] + torch.tensor([0, 16], dtype=torch.int32, device=device))[..., None]


def _places(device: torch.device) -> Tensor:
    """Where the bits of a word's E2M1 codes lie, the lowest first: int32 [field, even or odd, 4]."""
    places = torch.tensor(_PLACES, dtype=torch.int32, device=device)
    return torch.stack([places, places + 16], 1)


def _pack(codes: Tensor, places: Tensor) -> Tensor:
    """Codes uint8 [16 T, 128 U] as int32 [T, U, V, 32, 4]; equal parts of a code go to `places`."""
    fields, width = len(places), 16 // places[:, 0].numel()
    parts = (
        _by_lane(codes).flatten(4, 5).unflatten(4, (-1, fields))
    )  # tile, unit, g, t, vector, field, pair, even or odd
    words = torch.zeros((), dtype=torch.int32, device=codes.device)
    for i, place in enumerate(places.unbind(-1)):
        part = (parts >> i * width & (1 << width) - 1).int()
        words = words + (part << place[:, None]).sum((-3, -1), dtype=torch.int32)  # wraps: no bit meets another
    return words.flatten(2, 3).transpose(2, 3).contiguous()


def _unpack(words: Tensor, places: Tensor) -> Tensor:
    """The inverse of `_pack`."""
    width = 16 // places[:, 0].numel()
    lanes = words.transpose(2, 3).unflatten(2, (8, 4))[:, :, :, :, :, None, :, None]
    parts = torch.zeros((), dtype=torch.uint8, device=words.device)
    for i, place in enumerate(places.unbind(-1)):
        parts = parts | (lanes >> place[:, None] & (1 << width) - 1).to(torch.uint8) << i * width
    return _by_row(parts.flatten(4, 5).unflatten(4, (4, 2)))


def _pack_threes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of 3 bits uint8 [16 T, 128 U] as int32 [T, U, 1, 32, 4] and [T, U, 32, 2]."""
    parts = _by_lane(codes).int().flatten(4, 5)  # tile, unit, g, t, place, pair, even or odd
    first, last = _split(codes.device)
    words = (parts[:, :, :, :, :5] << first[:5]).sum((4, 6), dtype=torch.int32)  # wraps, as the next one does
    words = words + ((parts[:, :, :, :, 7] >> 2) << last).sum(-1, dtype=torch.int32)
    rest = ((parts[:, :, :, :, 5:] & _KEPT.to(codes.device)) << first[5:]).sum((4, 6), dtype=torch.int32)
    high = rest[..., ::2] + (rest[..., 1::2] << 16)
    return words.flatten(2, 3)[:, :, None].contiguous(), high.flatten(2, 3).contiguous()


def _unpack_threes(low: Tensor, high: Tensor) -> Tensor:
    """The inverse of `_pack_threes`."""
    first, last = _split(low.device)
    words, two = low[:, :, 0].unflatten(2, (8, 4)), high.unflatten(2, (8, 4))
    rest = torch.stack([two & 0xFFFF, two >> 16 & 0xFFFF], -1).flatten(-2)  # of four pairs
    front = words[:, :, :, :, None, :, None] >> first[:5] & 7
    behind = rest[:, :, :, :, None, :, None] >> first[5:] & _KEPT.to(low.device)
    behind[:, :, :, :, 2] += (words[..., None] >> last & 1) << 2
    return _by_row(torch.cat([front, behind], 4).to(torch.uint8).unflatten(4, (4, 2)))


def _split(device: torch.device) -> tuple[Tensor, Tensor]:
    """Where codes of 3 bits lie: of each place [8, 1, even or odd], five in a word and three in two bytes; and where a
    word has the third bit of the last one [even or odd]."""
    in_word = [[3 * place, 3 * place + 16] for place in range(5)]
    places = torch.tensor([*in_word, [0, 8], [3, 11], [6, 14]], dtype=torch.int32, device=device)
    return places[:, None], torch.tensor([15, 31], dtype=torch.int32, device=device)


def _by_lane(codes: Tensor) -> Tensor:
    """Codes [16 T, 128 U] as [tile, unit, g, t, block, half, pair, even or odd]."""
    return codes.view(-1, 2, 8, codes.shape[1] // COLUMNS, 4, 4, 4, 2).permute(0, 3, 2, 5, 4, 1, 6, 7)


def _by_row(parts: Tensor) -> Tensor:
    """The inverse of `_by_lane`."""
    tiles, units = parts.shape[:2]
    return parts.permute(0, 5, 2, 1, 4, 3, 6, 7).reshape(tiles * ROWS, units * COLUMNS)
