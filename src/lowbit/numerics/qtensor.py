"""What leaves a method: integer codes with their grid. `dequantize()` is the definition of every quantized number.

Fake quantization, evaluation and every exporter read the same codes, so nothing is ever rounded twice. Codes are held
one to a byte while they are worked on and packed (`bits.py`) only in files.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .grid import Grid
from .kv import KV, Affine
from .maps import Map
from .spec import Spec


@dataclass(frozen=True)
class QTensor:
    """Codes [R, C] (int8 or uint8) on a grid.

    `order` [C] is the permutation under which the columns of a group lie side by side (GPTQ's act-order with groups
    fitted on the way); None is the natural order. Codes themselves are always in natural order.
    """

    codes: Tensor
    grid: Grid
    order: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def group_index(self) -> Tensor | None:
        """The group of every column, int32 [C], where `order` is set (the g_idx of file formats)."""
        if self.order is None:
            return None
        width = self.codes.shape[-1] // self.grid.scale.shape[-1]
        index = torch.empty_like(self.order, dtype=torch.int32)
        index[self.order] = torch.arange(len(self.order), device=self.order.device, dtype=torch.int32) // width
        return index

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [R, C]: computed in fp32, rounded to `dtype` last."""
        if self.order is None:
            return self.grid.decode(self.codes).to(dtype)
        values = self.grid.decode(self.codes[..., self.order])
        natural = torch.empty_like(values)
        natural[..., self.order] = values
        return natural.to(dtype)

    def rows(self, start: int, stop: int) -> QTensor:
        """The QTensor of output rows [start, stop): what a fused weight splits into. No unit may straddle the cut."""
        height = self.codes.shape[-2] if self.grid.spec.block[0] == -1 else self.grid.spec.block[0]
        assert start % height == 0 or height == self.codes.shape[-2], "a unit straddles the cut"
        units = slice(start // height, -(-stop // height))
        return QTensor(self.codes[start:stop], self.grid.rows(units), self.order)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""
        return QTensor(
            self.codes.to(device), self.grid.to(device), None if self.order is None else self.order.to(device)
        )


@dataclass(frozen=True)
class LowRank:
    """A correction A B of rank r: A [O, r] and B [r, I], 16-bit floats or codes on a grid of their own."""

    left: Tensor | QTensor
    right: Tensor | QTensor

    def to(self, device: torch.device | str) -> LowRank:
        """The same on another device."""
        return LowRank(self.left.to(device), self.right.to(device))

    def dequantize(self) -> Tensor:
        """A B [O, I] in fp32."""
        left, right = (x.dequantize() if isinstance(x, QTensor) else x.float() for x in (self.left, self.right))
        return left @ right


@dataclass(frozen=True)
class QWeight:
    """A weight [O, I] as a sum: of QTensors (one for uniform methods, several for residual ones), and of what is added
    to them, a low-rank correction and a 16-bit part (the whole weight where a site keeps 16 bits).
    """

    parts: tuple[QTensor, ...]
    low_rank: LowRank | None = None
    dense: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        if self.parts:
            return self.parts[0].shape
        assert self.dense is not None, "a weight has at least one part"
        return self.dense.shape

    def to(self, device: torch.device | str) -> QWeight:
        """The same on another device."""
        low_rank = None if self.low_rank is None else self.low_rank.to(device)
        dense = None if self.dense is None else self.dense.to(device)
        return QWeight(tuple(part.to(device) for part in self.parts), low_rank, dense)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [O, I]: the sum in fp32, rounded to `dtype` last."""
        terms = [part.dequantize() for part in self.parts]
        if self.low_rank is not None:
            terms.append(self.low_rank.dequantize())
        if self.dense is not None:
            terms.append(self.dense.float())
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return total.to(dtype)


@dataclass(frozen=True)
class QLayer:
    """All that is stored of one linear: its weight [O, I], and what happens to its inputs before the product.

    Inputs pass `input_map` first (an online transform; the weight is that for mapped inputs) and are then quantized to
    `activation`, None where they stay as they are. `input_grid` is the calibrated range of a static format;
    `input_clip` [2] are the parts of every token's smallest and largest value that a dynamic format covers.
    """

    weight: QWeight
    activation: Spec | None = None
    input_grid: Grid | None = None
    input_map: Map | None = None
    input_clip: Tensor | None = None


@dataclass(frozen=True)
class QAttention:
    """All that is stored of one attention module's quantized keys and values.

    `key_map` is applied to keys before they are quantized and undone afterwards; `clips` [2, 2] are the parts of both
    ends of a dynamic range that keys and values keep; `affine` are the calibrated scales of a static layout.
    """

    kv: KV
    key_map: Map | None = None
    clips: Tensor | None = None
    affine: tuple[Affine | None, Affine | None] = (None, None)

    def to(self, device: torch.device | str) -> QAttention:
        """The same on another device."""

        def moved(part: Affine | None) -> Affine | None:
            if part is None:
                return None
            return Affine(part.scale.to(device), None if part.offset is None else part.offset.to(device))

        key_map = None if self.key_map is None else self.key_map.to(device)
        clips = None if self.clips is None else self.clips.to(device)
        return QAttention(self.kv, key_map, clips, (moved(self.affine[0]), moved(self.affine[1])))
