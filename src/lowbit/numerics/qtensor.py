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
from .lattice import Lattice
from .maps import Map
from .places import Regions, Sparse
from .spec import Spec


@dataclass(frozen=True)
class QTensor:
    """Codes [R, C] (int8 or uint8) on a grid.

    `order` [C] is the permutation under which the columns of a group lie side by side (GPTQ's act-order with groups
    fitted on the way); None is the natural order. Codes themselves are always in natural order. `region` is the part of
    a weight's `Regions` that the codes cover; elsewhere they are zero, stand for nothing, and are not stored.
    """

    codes: Tensor
    grid: Grid
    order: Tensor | None = None
    region: int | None = None

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
        return QTensor(self.codes[start:stop], self.grid.rows(units), self.order, self.region)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""
        order = None if self.order is None else self.order.to(device)
        return QTensor(self.codes.to(device), self.grid.to(device), order, self.region)


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
    """A weight [O, I] as a sum: of QTensors (one for uniform methods, several for residual ones and for those that
    treat `regions` of a weight differently), and of what is added to them, a low-rank correction and a 16-bit part (the
    whole weight where a site keeps 16 bits). The entries of `sparse` replace what the sum has there. Codes of vectors
    are `lattices`, the second of what the first has left.
    """

    parts: tuple[QTensor, ...]
    low_rank: LowRank | None = None
    dense: Tensor | None = None
    regions: Regions | None = None
    sparse: Sparse | None = None
    lattices: tuple[Lattice, ...] = ()

    @property
    def shape(self) -> torch.Size:
        if self.parts:
            return self.parts[0].shape
        if self.lattices:
            return self.lattices[0].shape
        if self.sparse is not None:
            return self.sparse.mask.shape
        assert self.dense is not None, "a weight has at least one part"
        return self.dense.shape

    @property
    def plain(self) -> bool:
        """Whether it is one QTensor and nothing else, which is what other software's formats hold."""
        extra = (self.low_rank, self.dense, self.regions, self.sparse)
        return len(self.parts) == 1 and not self.lattices and all(term is None for term in extra)

    def to(self, device: torch.device | str) -> QWeight:
        """The same on another device."""
        terms = (self.low_rank, self.dense, self.regions, self.sparse)
        low_rank, dense, regions, sparse = (None if term is None else term.to(device) for term in terms)
        parts, lattices = (tuple(term.to(device) for term in each) for each in (self.parts, self.lattices))
        return QWeight(parts, low_rank, dense, regions, sparse, lattices)  # type: ignore[arg-type]

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [O, I]: the sum in fp32, rounded to `dtype` last."""
        terms = [*(self._values(part) for part in self.parts), *(lattice.dequantize() for lattice in self.lattices)]
        if self.low_rank is not None:
            terms.append(self.low_rank.dequantize())
        if self.dense is not None:
            terms.append(self.dense.float())
        if not terms:
            assert self.sparse is not None, "a weight has at least one part"
            terms = [torch.zeros(self.shape, device=self.sparse.values.device)]
        total = terms[0]
        for term in terms[1:]:
            total = total + term
        return (total if self.sparse is None else self.sparse.over(total)).to(dtype)

    def _values(self, part: QTensor) -> Tensor:
        if part.region is None:
            return part.dequantize()
        assert self.regions is not None, "a part of a region belongs to a weight that has regions"
        return part.dequantize().where(self.regions.mask(part.region), 0.0)


@dataclass(frozen=True)
class Outliers:
    """Input channels that stay out of quantization: those numbered in `columns` int32 [k], or, of every call, those in
    which some input reaches `threshold`. What is left out multiplies `weight` 16-bit [O, I] instead of the quantized
    one, if that is there.
    """

    columns: Tensor | None = None
    threshold: float | None = None
    weight: Tensor | None = None

    def to(self, device: torch.device | str) -> Outliers:
        """The same on another device."""
        columns, weight = (None if x is None else x.to(device) for x in (self.columns, self.weight))
        return Outliers(columns, self.threshold, weight)

    def of(self, x: Tensor) -> Tensor:
        """Which channels of inputs [..., I] are kept, bool [I]."""
        if self.columns is not None:
            kept = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
            return kept.index_fill(0, self.columns.long(), True)
        assert self.threshold is not None, "outliers are known, or told by a threshold"
        return x.abs().reshape(-1, x.shape[-1]).amax(0) >= self.threshold


@dataclass(frozen=True)
class QLayer:
    """All that is stored of one linear: its weight [O, I], and what happens to its inputs before the product.

    Inputs pass `input_map` first (an online transform; the weight is that for mapped inputs) and are then quantized to
    `activation`, None where they stay as they are, but for the channels that `outliers` leave out. `input_grid` is the
    calibrated range of a static format; `input_clip` [2] are the parts of every token's smallest and largest value that
    a dynamic format covers. The product passes `output_map`, and then the bias is added.
    """

    weight: QWeight
    activation: Spec | None = None
    input_grid: Grid | None = None
    input_map: Map | None = None
    input_clip: Tensor | None = None
    output_map: Map | None = None
    outliers: Outliers | None = None

    @property
    def plain(self) -> bool:
        """Whether it is one QTensor behind its inputs, maps and formats of which other software may know."""
        return self.weight.plain and self.output_map is None and self.outliers is None


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
