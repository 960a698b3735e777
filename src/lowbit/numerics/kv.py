"""Keys and values in few bits: a frozen description, and the two maps between tensors and what a cache stores.

One affine quantizer serves every layout, x̂ = s q + m with codes q in [0, 2^b - 1], or E4M3 numbers q, which is what
GPUs cache, and no m; a layout only says which values share s and m. Unlike a weight's grid, m is by default the unit's
own minimum as a float, not a whole number of steps. Keys have channels far from zero, where a range with zero in it
wastes codes, and in small units rounding the zero-point costs much: for Gaussians in groups of 8 a third more squared
error at any width, a few per cent in groups of 64. Scale and minimum take their 16 bits before anything is rounded with
them. What training differentiates and what a cache packs is the same arithmetic, to the last bit.

Shape letters: B batch, H key-value heads as they are stored, T tokens, h head width, G group. Tensors are [B, H, T, h],
their units views [B, H, T or T/G, …, …] of five axes, and every dynamic scale keeps batch and tokens on axes 0 and 2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .bits import pack, packed_length, unpack
from .grid import cast_float, to_codes, to_values
from .spec import E4M3
from .ste import straight_through

Layout = Literal["token", "group", "head", "tensor", "channel"]
Rule = Literal["minimum", "zero-point", "symmetric", "e4m3"]

_HALF_LARGEST = 65504.0


@dataclass(frozen=True)
class Quantizer:
    """How one of both tensors is stored: codes of `bits`, and which of them share a scale.

    =========  =================================================================
    layout     one scale for
    =========  =================================================================
    token      a token's h channels, or with `together` those of all its heads
    group      `group` consecutive channels of one token and head
    channel    `group` consecutive tokens of one channel
    head       everything in a head (static)
    tensor     everything (static)
    =========  =================================================================

    ==========  ========================================================  ==============================
    rule        range, scale                                              offset m
    ==========  ========================================================  ==============================
    minimum     [min, max], (max - min)/(2^b - 1)                         min, as a 16-bit float
    zero-point  the same with 0 in the range (QuaRot, FlatQuant)          -s z, z a whole number, 8 bits
    symmetric   [-amax, amax], 2 amax/(2^b - 1)                           -s 2^(b-1), not stored
    e4m3        [-amax, amax], amax/448; codes are E4M3 numbers           none
    ==========  ========================================================  ==============================
    """

    bits: int
    layout: Layout = "token"
    group: int = 0
    together: bool = False
    rule: Rule = "minimum"

    @property
    def static(self) -> bool:
        return self.layout in ("head", "tensor")

    @property
    def tokens(self) -> int:
        """Tokens that must be encoded at once."""
        return self.group if self.layout == "channel" else 1

    @property
    def _shared(self) -> tuple[int, ...]:
        """Axes of the units view that share a scale."""
        if self.layout == "token":
            return (1, 4) if self.together else (4,)
        return {"group": (4,), "channel": (3,), "head": (0, 2, 3, 4), "tensor": (0, 1, 2, 3, 4)}[self.layout]

    def units(self, x: Tensor) -> Tensor:
        """View [B, H, T, h] with five axes. Raises ValueError where a group does not divide the width."""
        if self.layout == "channel":
            return x.reshape(*x.shape[:2], -1, self.group, x.shape[3])
        if self.layout != "group":
            return x.unsqueeze(3)
        width = min(self.group, x.shape[-1])
        if x.shape[-1] % width:
            raise ValueError(f"a key-value group of {self.group} does not divide the head width {x.shape[-1]}")
        return x.reshape(*x.shape[:3], -1, width)

    def range(self, x: Tensor, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Smallest and largest value of every unit of x [B, H, T, h], fp32, all five axes kept.

        `clip` [2] takes these parts of the ends of the range with 0 in it (FlatQuant's learned clipping thresholds).
        """
        units = self.units(x.float())
        low, high = units.amin(self._shared, keepdim=True), units.amax(self._shared, keepdim=True)
        return (low, high) if clip is None else (low.clamp_max(0) * clip[0], high.clamp_min(0) * clip[1])

    def bits_per_element(self, width: int, heads: int = 1) -> float:
        """Stored bits of one key or value: its code, the row's padding to whole bytes, its part of scale and offset."""
        unit = {
            "token": width * (heads if self.together else 1),
            "group": min(self.group, width) or 1,
            "channel": self.group or 1,
        }
        offset = {"minimum": 16, "zero-point": 8, "symmetric": 0, "e4m3": 0}[self.rule]
        shared = 0.0 if self.static else (16 + offset) / unit[self.layout]
        row = packed_length(width, self.bits)
        return 8 * row / width + shared


@dataclass(frozen=True)
class KV:
    """What the cache of a model holds: bits of keys and of values (None keeps 16), and who shares a scale.

    `group` belongs to the layouts "group" and "channel". "channel" is KIVI (Liu et al. 2024): keys per channel in
    groups of `group` tokens, values per token in groups of `group` channels, the newest up to `residual` tokens exact.
    `together` gives all heads of a token one scale.
    """

    keys: int | None = None
    values: int | None = None
    layout: Layout = "token"
    group: int = 0
    residual: int = 0
    together: bool = False
    rule: Rule = "minimum"

    def __post_init__(self) -> None:
        for bits in (self.keys, self.values):
            if bits is not None and not 1 <= bits <= 8:
                raise ValueError(f"keys and values have 1 to 8 bits, or None for 16, not {bits}")
        if (self.layout in ("group", "channel")) != (self.group > 0):
            raise ValueError(f"a group size belongs to the layouts group and channel: {self.layout} has {self.group}")
        if (self.layout == "channel") != (self.residual > 0) or self.residual % (self.group or 1):
            raise ValueError("the channel layout, and no other, has a residual window that is a multiple of its group")
        if self.rule == "e4m3" and not {self.keys, self.values} <= {8, None}:
            raise ValueError("E4M3 keys and values have 8 bits: set keys and values to 8, or another rule")
        if self.together and self.layout != "token":
            raise ValueError("only the token layout can let all heads of a token share a scale")

    @property
    def key_quantizer(self) -> Quantizer | None:
        return None if self.keys is None else self._quantizer(self.keys, self.layout)

    @property
    def value_quantizer(self) -> Quantizer | None:
        layout: Layout = "group" if self.layout == "channel" else self.layout
        return None if self.values is None else self._quantizer(self.values, layout)

    @property
    def static(self) -> bool:
        """Whether ranges have to be calibrated."""
        return self.layout in ("head", "tensor") and not (self.keys is None and self.values is None)

    def _quantizer(self, bits: int, layout: Layout) -> Quantizer:
        return Quantizer(bits, layout, self.group, self.together, self.rule)

    def bits_per_element(self, width: int, heads: int = 1) -> float:
        """Stored bits per element over keys and values of one width; KIVI's residual window is not in it."""
        parts = (self.key_quantizer, self.value_quantizer)
        return sum(16.0 if part is None else part.bits_per_element(width, heads) for part in parts) / 2

    def to_json(self) -> dict[str, Any]:
        """Plain data, read back by `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> KV:
        """The inverse of `to_json`."""
        return cls(**data)


def kivi(keys: int = 2, values: int = 2, *, group: int = 32, residual: int = 128) -> KV:
    """KIVI with the paper's settings."""
    return KV(keys, values, "channel", group, residual)


# --- scales -----------------------------------------------------------------------------------------------------------


class Affine(NamedTuple):
    """Scale and offset of every unit as they are stored: fp16, and fp16, uint8 or nothing (see `Quantizer`)."""

    scale: Tensor
    offset: Tensor | None


def fit(low: Tensor, high: Tensor, quantizer: Quantizer) -> Affine:
    """What is stored for units with these ranges. A unit without range gets scale 1 and comes back as its minimum."""
    scale, offset = _fit(low.detach(), high.detach(), quantizer)
    if quantizer.rule in ("symmetric", "e4m3"):
        return Affine(scale.half(), None)
    if quantizer.rule == "minimum":
        return Affine(scale.half(), offset.half())
    return Affine(scale.half(), (-offset / scale).round().to(torch.uint8))


def _fit(low: Tensor, high: Tensor, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Scale and offset in fp32 with the values of 16-bit storage, differentiable in the range."""
    steps = float((1 << quantizer.bits) - 1)
    if quantizer.rule == "e4m3":
        steps = 2 * E4M3.largest
    if quantizer.rule in ("symmetric", "e4m3"):
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    elif quantizer.rule == "zero-point":
        low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _half((high - low) / torch.full_like(low, steps))
    scale = torch.where(scale > 0, scale, 1.0)
    if quantizer.rule == "minimum":
        return scale, _half(low)
    if quantizer.rule in ("symmetric", "e4m3"):
        return scale, _without_offset(scale, quantizer)
    zero = -low / scale
    return scale, -straight_through(zero.round().clamp(0, steps), zero) * scale


def _half(x: Tensor) -> Tensor:
    return straight_through(x.clamp(-_HALF_LARGEST, _HALF_LARGEST).half().float(), x)


def _without_offset(scale: Tensor, quantizer: Quantizer) -> Tensor:
    """The offset of a rule that stores none."""
    return torch.zeros_like(scale) if quantizer.rule == "e4m3" else -float(1 << (quantizer.bits - 1)) * scale


def _loaded(affine: Affine, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    """Scale and offset in fp32 of what is stored."""
    scale = affine.scale.float()
    if affine.offset is None:
        return scale, _without_offset(scale, quantizer)
    offset = affine.offset.float()
    return scale, offset if quantizer.rule == "minimum" else -offset * scale


def _levels(units: Tensor, scale: Tensor, low: Tensor, quantizer: Quantizer) -> Tensor:
    """Codes as floats; rounding passes the gradient, saturation does not."""
    steps = (1 << quantizer.bits) - 1
    y = (units - low) / scale
    if quantizer.rule == "e4m3":
        return straight_through(cast_float(y, E4M3), y.clamp(-E4M3.largest, E4M3.largest))
    return straight_through(y.round().clamp(0, steps), y.clamp(0, steps))


def fake_quantize(
    x: Tensor, quantizer: Quantizer, *, affine: Affine | None = None, clip: Tensor | None = None
) -> Tensor:
    """What a cache gives back for x [B, H, T, h], in fp32: `decode(encode(x))`, with straight-through gradients.

    `affine` is the calibrated range of a static layout; a dynamic one reads its range from x, clipped by `clip` [2].
    """
    scale, low = _fit(*quantizer.range(x, clip), quantizer) if affine is None else _loaded(affine, quantizer)
    return (_levels(quantizer.units(x.float()), scale, low, quantizer) * scale + low).reshape(x.shape)


# --- codes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """T tokens as they are stored: packed codes [B, H, T, bytes] and the scales of dynamic units, batch and tokens on
    axes 0 and 2 of all of them.
    """

    codes: Tensor
    affine: Affine | None

    def _each(self, change: Callable[[Tensor], Tensor], scales: Callable[[Tensor], Tensor]) -> Encoded:
        affine = self.affine
        if affine is not None:
            affine = Affine(scales(affine.scale), None if affine.offset is None else scales(affine.offset))
        return Encoded(change(self.codes), affine)

    def batch(self, index: Tensor) -> Encoded:
        """The sequences `index`, in this order."""
        return self._each(lambda x: x[index.to(x.device)], lambda x: x[index.to(x.device)])

    def span(self, start: int, stop: int, group: int = 1) -> Encoded:
        """The tokens [start, stop), copied so that the others can be freed; both are multiples of `group`."""
        assert start % group == 0 and stop % group == 0, "a group of tokens shares a scale"
        codes, scales = slice(start, stop), slice(start // group, stop // group)
        return self._each(lambda x: x[:, :, codes].clone(), lambda x: x[:, :, scales].clone())

    def append(self, other: Encoded) -> Encoded:
        """These tokens and then those of `other`."""
        affine = None
        if self.affine is not None and other.affine is not None:
            old, new = self.affine, other.affine
            offset = None
            if old.offset is not None and new.offset is not None:
                offset = torch.cat([old.offset, new.offset], 2)
            affine = Affine(torch.cat([old.scale, new.scale], 2), offset)
        return Encoded(torch.cat([self.codes, other.codes], 2), affine)

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def bytes(self) -> int:
        """Stored bytes; what is static belongs to the model."""
        parts = [self.codes, *(part for part in self.affine or () if part is not None)]
        return sum(part.numel() * part.element_size() for part in parts)


def encode(x: Tensor, quantizer: Quantizer, *, affine: Affine | None = None, clip: Tensor | None = None) -> Encoded:
    """Codes of x [B, H, T, h]; see `fake_quantize`. T is a multiple of `quantizer.tokens`."""
    with torch.no_grad():
        found = fit(*quantizer.range(x, clip), quantizer) if affine is None else affine
        levels = _levels(quantizer.units(x.float()), *_loaded(found, quantizer), quantizer)
        spelled = to_codes(levels, E4M3) if quantizer.rule == "e4m3" else levels.to(torch.uint8)
        codes = pack(spelled.reshape(x.shape), quantizer.bits)
    return Encoded(codes, found if affine is None else None)


def decode(encoded: Encoded, quantizer: Quantizer, width: int, *, affine: Affine | None = None) -> Tensor:
    """Values [B, H, T, h] in fp32 of what `encode` made from tensors of this width."""
    found = encoded.affine or affine
    assert found is not None, "a static layout is decoded with its calibrated range"
    scale, low = _loaded(found, quantizer)
    codes = unpack(encoded.codes, quantizer.bits, width, signed=False)
    levels = to_values(codes, E4M3) if quantizer.rule == "e4m3" else codes.float()
    return (quantizer.units(levels) * scale + low).reshape(codes.shape)
