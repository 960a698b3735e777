"""Which entries of a weight a term covers, and entries that keep 16 bits: masks that are stored and counted.

Methods below two bits and methods for outliers treat parts of one matrix differently. A `Regions` says which part an
entry belongs to, and every term then stores codes for its own entries alone; `Sparse` holds 16-bit values that take the
place of whatever else the weight has there. Both are kept as whole masks [O, I] while they are worked on, one byte an
entry; the layouts below are what files hold, chosen by what the mask looks like.

Shape letters: O output rows, I input columns, n entries in a mask, in row-major order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .bits import pack, packed_length, unpack

Layout = Literal["bitmap", "columns", "index"]
"""How a file holds a mask: one bit an entry; the numbers of whole columns; or every row's entries by their column."""

_MIXED = 255
"""Stands for a column whose entries are in several regions."""


@dataclass(frozen=True)
class Regions:
    """A partition of the entries of a weight: `map` uint8 [O, I] holds numbers below `count` (at most 255)."""

    map: Tensor
    count: int

    def mask(self, region: int) -> Tensor:
        """The entries of a region, bool [O, I]."""
        return self.map == region

    def to(self, device: torch.device | str) -> Regions:
        """The same on another device."""
        return Regions(self.map.to(device), self.count)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds: the region of every column that lies in one, and of the others a map in a few bits, or, if
        they lie in two regions, one of them rare, the columns of that one's entries row by row.
        """
        first = self.map[0]
        whole = (self.map == first).all(0)
        columns = torch.where(whole, first, torch.full_like(first, _MIXED))
        mixed = self.map[:, ~whole]
        present = torch.unique(mixed)
        if len(present) == 2:
            second = mixed == present[1]
            few = 2 * int(second.sum()) <= second.numel()
            rare = second if few else ~second
            if _index_bytes((rare.shape[0], rare.shape[1]), int(rare.sum())) < packed_length(rare.numel(), 1):
                return {"columns": columns, "mixed": present if few else present.flip(0), **_to_index(rare)}
        tensors = {"columns": columns, "mixed": present}
        if len(present):
            codes = torch.searchsorted(present, mixed.flatten()).to(torch.uint8)
            tensors["map"] = pack(codes, _width(len(present)))
        return tensors

    @staticmethod
    def of(tensors: Mapping[str, Tensor], shape: torch.Size, count: int) -> Regions:
        """The inverse of `tensors` for a weight of `shape`."""
        columns, present = tensors["columns"], tensors["mixed"]
        map = columns.expand(shape).clone()
        if len(present):
            places = columns == _MIXED
            mixed = torch.Size((shape[0], int(places.sum())))
            if "index" in tensors:
                codes = _from_index(tensors, mixed).long()
            else:
                codes = unpack(tensors["map"], _width(len(present)), mixed.numel(), signed=False).long()
            map[:, places] = present[codes].view(mixed)
        return Regions(map, count)


def _width(count: int) -> int:
    return max(1, (count - 1).bit_length())


@dataclass(frozen=True)
class Sparse:
    """16-bit values [n] of the entries in `mask`, bool [O, I]; they replace what other terms have there."""

    mask: Tensor
    values: Tensor
    layout: Layout

    @staticmethod
    def of(weight: Tensor, mask: Tensor, layout: Layout, dtype: torch.dtype = torch.float16) -> Sparse:
        """The entries of W [O, I] in `mask` as `dtype` holds them."""
        return Sparse(mask, weight[mask].to(dtype), layout)

    def over(self, weight: Tensor) -> Tensor:
        """W [O, I] in fp32 with these entries in place of its own."""
        return weight.masked_scatter(self.mask, self.values.float())

    def to(self, device: torch.device | str) -> Sparse:
        """The same on another device."""
        return Sparse(self.mask.to(device), self.values.to(device), self.layout)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds."""
        if self.layout == "bitmap":
            return {"mask": pack(self.mask.to(torch.uint8).flatten(), 1), "values": self.values}
        if self.layout == "columns":
            return {"columns": self.mask[0].nonzero().flatten().int(), "values": self.values}
        return {**_to_index(self.mask), "values": self.values}

    @staticmethod
    def from_tensors(tensors: Mapping[str, Tensor], shape: torch.Size, layout: Layout) -> Sparse:
        """The inverse of `tensors` for a weight of `shape`."""
        values = tensors["values"]
        mask = torch.zeros(shape, dtype=torch.bool, device=values.device)
        if layout == "bitmap":
            mask = unpack(tensors["mask"], 1, mask.numel(), signed=False).view(shape).bool()
        elif layout == "columns":
            mask[:, tensors["columns"].long()] = True
        else:
            mask = _from_index(tensors, shape)
        return Sparse(mask, values, layout)

    def describe(self) -> dict[str, Any]:
        """The layout and shape, for a file's header."""
        return {"layout": self.layout, "shape": list(self.mask.shape)}


def _index_dtype(columns: int) -> torch.dtype:
    return torch.int16 if columns <= 1 << 15 else torch.int32


def _to_index(mask: Tensor) -> dict[str, Tensor]:
    """A mask [O, I] as the number of its entries in every row, and their columns."""
    columns = mask.nonzero()[:, 1].to(_index_dtype(mask.shape[1]))
    return {"counts": mask.sum(1, dtype=torch.int32), "index": columns}


def _from_index(tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor:
    """The inverse of `_to_index` for a weight of `shape`."""
    index = tensors["index"].long()
    mask = torch.zeros(shape, dtype=torch.bool, device=index.device)
    mask[torch.arange(shape[0], device=index.device).repeat_interleave(tensors["counts"].long()), index] = True
    return mask


def _index_bytes(shape: tuple[int, int], entries: int) -> int:
    return entries * _index_dtype(shape[1]).itemsize + 4 * shape[0]


def sparse_bytes(shape: tuple[int, int], entries: int, layout: Layout) -> int:
    """Bytes of `entries` 16-bit values of a weight [O, I] and of their places."""
    rows, columns = shape
    if layout == "bitmap":
        return 2 * entries + -(-rows * columns // 8)
    if layout == "columns":
        return 2 * entries + 4 * (entries // max(1, rows))
    return 2 * entries + _index_bytes(shape, entries)


def regions_bytes(shape: tuple[int, int], rare: int) -> int:
    """Bytes of a partition of a weight [O, I] in two, of which one has `rare` entries, no column lying in one alone."""
    rows, columns = shape
    return columns + (2 + min(packed_length(rows * columns, 1), _index_bytes(shape, rare)) if rare else 0)
