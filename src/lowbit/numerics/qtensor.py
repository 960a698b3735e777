"""What leaves a method: integer codes with their grid. `dequantize()` is the definition of every quantized number.

Fake quantization, evaluation and every exporter read the same codes, so nothing is ever rounded twice. Codes are held
one to a byte while they are worked on and packed (`bits.py`) only in files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .grid import Grid
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
        zero = self.grid.zero
        grid = replace(self.grid, scale=self.grid.scale[units], zero=None if zero is None else zero[units])
        return QTensor(self.codes[start:stop], grid, self.order)

    def to(self, device: torch.device | str) -> QTensor:
        """The same on another device."""
        return QTensor(
            self.codes.to(device), self.grid.to(device), None if self.order is None else self.order.to(device)
        )


@dataclass(frozen=True)
class QWeight:
    """A weight [O, I] as a sum of QTensors: one part for uniform methods, several for residual ones."""

    parts: tuple[QTensor, ...]

    @property
    def shape(self) -> torch.Size:
        return self.parts[0].shape

    def to(self, device: torch.device | str) -> QWeight:
        """The same on another device."""
        return QWeight(tuple(part.to(device) for part in self.parts))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values [O, I]: the sum in fp32, rounded to `dtype` last."""
        total = self.parts[0].dequantize()
        for part in self.parts[1:]:
            total = total + part.dequantize()
        return total.to(dtype)


@dataclass(frozen=True)
class QLayer:
    """All that is stored of one quantized linear: its weight [O, I], and the format of its inputs.

    `activation` is None where inputs stay as they are; `input_grid` is the calibrated range of a static input format.
    """

    weight: QWeight
    activation: Spec | None = None
    input_grid: Grid | None = None
