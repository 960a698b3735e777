"""Scales and zero-points in storage dtype, and the two maps they define: values to codes, codes to values.

The scale takes its storage dtype *here*, before anything is rounded with it, so that what is evaluated, saved and
served is the same number. Arithmetic is fp32, division is by the stored scale, rounding is half to even. A *level* is
a value divided by its scale after rounding: the integer code minus the zero-point, or the minifloat's value; it is
what methods compute with, and a code is only its spelling.

Shape letters: R rows, C columns of the last two axes, r x c the unit, so a units view is [..., R/r, r, C/c, c].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from . import bilevel, kquant
from .scales import INT8_LARGEST, divided, largest_exponent, scale_codes, store_scale, stored_scale, symmetric_scale
from .spec import Codebook, Float, Int, Number, Spec


def unit_shape(shape: torch.Size, block: tuple[int, int]) -> tuple[int, int]:
    """The unit r x c for a tensor of `shape`: -1, and a group wider than the row, become the whole axis.

    Raises ValueError where a group does not divide its axis (square blocks pad instead).
    """
    rows, columns = shape[-2:]
    r = rows if block[0] == -1 else block[0]
    c = columns if block[1] == -1 else block[1]
    if r > 1 and c > 1 and block[0] > 1:
        return r, c
    c = min(c, columns)
    if columns % c:
        raise ValueError(f"a group of {c} does not divide {columns} columns: choose a divisor of {columns}, or -1")
    return r, c


def to_units(x: Tensor, block: tuple[int, int]) -> Tensor:
    """View [..., R, C] as units [..., R/r, r, C/c, c]; square blocks are padded with zeros."""
    r, c = unit_shape(x.shape, block)
    rows, columns = x.shape[-2:]
    if rows % r or columns % c:
        x = torch.nn.functional.pad(x, (0, -columns % c, 0, -rows % r))
    return x.reshape(*x.shape[:-2], x.shape[-2] // r, r, x.shape[-1] // c, c)


def from_units(units: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `to_units` for a tensor of `shape`; padding is dropped."""
    *lead, a, r, b, c = units.shape
    return units.reshape(*lead, a * r, b * c)[..., : shape[-2], : shape[-1]]


def unit_range(x: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of every unit, fp32 [..., R/r, C/c]."""
    units = to_units(x, block)
    return units.amin((-3, -1)).float(), units.amax((-3, -1)).float()


# --- levels and codes -------------------------------------------------------------------------------------------------


@lru_cache
def magnitudes(number: Float) -> Tensor:
    """Every finite non-negative value of a minifloat, in the order of its codes."""
    codes = torch.arange(1 << (number.bits - 1))
    exponent, fraction = codes >> number.mantissa, (codes & ((1 << number.mantissa) - 1)) / (1 << number.mantissa)
    values = torch.exp2(exponent.clamp_min(1).float() - number.bias) * (fraction + (exponent > 0))
    return values[values <= number.largest]


def cast_float(x: Tensor, number: Float) -> Tensor:
    """Round fp32 values to the nearest value of a minifloat, ties to even, saturating at its largest.

    Without mantissa bits a tie goes to the larger power of two.
    """
    step = float_spacing(x, number)
    return (x / step).round_().mul_(step).clamp_(-number.largest, number.largest)


def float_spacing(x: Tensor, number: Float) -> Tensor:
    """Distance of a minifloat's values around fp32 values x.

    It is read from their exponent bits: floor(log2) errs at powers of two, and frexp takes several times as long.
    """
    power = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_(2.0 ** (1 - number.bias), number.largest).mul_(2.0**-number.mantissa)


@lru_cache
def entries(number: Codebook) -> Tensor:
    """The levels of a codebook, fp32."""
    return torch.tensor(number.levels)


def to_levels(y: Tensor, number: Number, zero: Tensor | None = None) -> Tensor:
    """Round y = x/s to the format's levels. `zero` broadcasts against y. Integers round before z is added."""
    if isinstance(number, Float):
        return cast_float(y, number)
    if isinstance(number, Codebook):
        table = entries(number).to(y.device)
        return _look_up(table, torch.bucketize(y.contiguous(), (table[1:] + table[:-1]) / 2, out_int32=True))
    if zero is None:
        return y.round().clamp_(number.low, number.high)
    return torch.clamp(y.round(), number.low - zero, number.high - zero)


def to_codes(levels: Tensor, number: Number, zero: Tensor | None = None) -> Tensor:
    """Spell levels as codes: int8 for signed integers, uint8 for all else (bit patterns, indices of codebooks)."""
    if isinstance(number, Int):
        codes = levels if zero is None else levels + zero
        return codes.to(torch.int8 if number.signed else torch.uint8)
    if isinstance(number, Codebook):
        return torch.searchsorted(entries(number).to(levels.device), levels.contiguous()).to(torch.uint8)
    sign = torch.signbit(levels).to(torch.int32) << (number.bits - 1)
    size = levels.abs()
    # a normal number's bits are the leading ones of fp32 with the exponent counted from another bias
    normal = (size.view(torch.int32) >> (23 - number.mantissa)) - ((127 - number.bias) << number.mantissa)
    subnormal = (size * 2.0 ** (number.bias - 1 + number.mantissa)).to(torch.int32)
    return (torch.where(size < 2.0 ** (1 - number.bias), subnormal, normal) | sign).to(torch.uint8)


def to_values(codes: Tensor, number: Number, zero: Tensor | None = None) -> Tensor:
    """The inverse of `to_codes`: levels in fp32."""
    if isinstance(number, Int):
        return codes.float() if zero is None else codes.float() - zero
    if isinstance(number, Codebook):
        return _look_up(entries(number).to(codes.device), codes.int())
    table = magnitudes(number).to(codes.device)
    half = 1 << (number.bits - 1)
    table = torch.nn.functional.pad(table, (0, half - len(table)), value=float("nan"))
    return _look_up(torch.cat([table, -table]), codes.int())


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index], in a fraction of the time."""
    return table.index_select(0, index.flatten()).view(index.shape)


# --- grids ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Grid:
    """The representable values of every unit of a tensor.

    `scale` and `zero` are [..., R/r, C/c] in fp32, the scale exact in its storage dtype; `zero` is None where the rule
    has no zero-point, and counts codes otherwise. `outer` is what the scales are stored relative to, where they are
    (see `scales.py`); `scale` already contains it. `offset`, shaped like the scale, is subtracted from s q in formats
    that store a unit's least value beside its scale: minus that value.
    """

    spec: Spec
    scale: Tensor
    zero: Tensor | None = None
    outer: Tensor | None = None
    offset: Tensor | None = None

    def _shifted(self, x: Tensor) -> Tensor:
        """Values in fp32 as units [..., R/r, r, C/c, c], counted from the least one where that is stored."""
        units = to_units(x.float(), self.spec.block)
        return units if self.offset is None else units + self.offset[..., :, None, :, None]

    def _unshifted(self, units: Tensor) -> Tensor:
        """Undo the shift of `_shifted` in place."""
        return units if self.offset is None else units.sub_(self.offset[..., :, None, :, None])

    def _spread(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[..., :, None, :, None]

    @property
    def reach(self) -> Tensor | None:
        """How large levels of every unit may be, shaped like the scale: None where their codes alone set the limit."""
        if self.spec.scale != "integer":
            return None
        return (INT8_LARGEST / scale_codes(self.scale, self.spec.scale, self.outer).float()).floor()

    def _nearest(self, units: Tensor) -> Tensor:
        """Levels of shifted values, both as units."""
        levels = to_levels(units / self.scale[..., :, None, :, None], self.spec.number, self._spread(self.zero))
        reach = self._spread(self.reach)
        return levels if reach is None else levels.clamp(-reach, reach)

    def to(self, device: torch.device | str) -> Grid:
        """The same on another device."""
        zero, outer, offset = (None if x is None else x.to(device) for x in (self.zero, self.outer, self.offset))
        return Grid(self.spec, self.scale.to(device), zero, outer, offset)

    def rows(self, units: slice) -> Grid:
        """The grid of these rows of units of a matrix."""
        whole = units.indices(len(self.scale)) == (0, len(self.scale), 1)
        assert whole or self.spec.scale not in ("double", "bilevel"), "rows share what their scales are stored by"
        outer = self.outer if self.outer is None or len(self.outer) == 1 else self.outer[units]
        zero, offset = (None if x is None else x[units] for x in (self.zero, self.offset))
        return Grid(self.spec, self.scale[units], zero, outer, offset)

    def levels(self, x: Tensor) -> Tensor:
        """Round values [..., R, C] to levels of the same shape."""
        return from_units(self._nearest(self._shifted(x)), x.shape)

    def spell(self, levels: Tensor) -> Tensor:
        """Codes of levels [..., R, C] of this grid: int8 or uint8, same shape."""
        units = to_units(levels, self.spec.block)
        return from_units(to_codes(units, self.spec.number, self._spread(self.zero)), levels.shape)

    def encode(self, x: Tensor) -> Tensor:
        """Codes of values [..., R, C]: int8 or uint8, same shape."""
        levels = self._nearest(self._shifted(x))
        return from_units(to_codes(levels, self.spec.number, self._spread(self.zero)), x.shape)

    def decode(self, codes: Tensor) -> Tensor:
        """Values of codes [..., R, C] in fp32: s (q - z), or s q - offset: the definition of what was quantized."""
        units = to_values(to_units(codes, self.spec.block), self.spec.number, self._spread(self.zero))
        return from_units(self._unshifted(units * self.scale[..., :, None, :, None]), codes.shape)

    def quantize(self, x: Tensor) -> Tensor:
        """Fake quantization in fp32: `decode(encode(x))` without the detour through codes."""
        levels = self._nearest(self._shifted(x))
        return from_units(self._unshifted(levels * self.scale[..., :, None, :, None]), x.shape)


def grid_from_range(low: Tensor, high: Tensor, spec: Spec, outer: Tensor | None = None) -> Grid:
    """The grid whose codes cover [low, high] of every unit under the spec's scale rule.

    Scales stored relative to an outer one take `outer`; None fixes it here, which is right for the full range of a
    whole tensor only. A unit without range, or with one too small for an fp32 scale, still gets one (1 for plain
    scales): zeros come back as zeros, never NaN.
    """
    number = spec.number
    if spec.minima or spec.scale == "kquant":
        return _grid_with_minima(low, high, spec, outer)
    if not isinstance(number, Int) or number.symmetric:
        amax = torch.maximum(high.abs(), low.abs())
        scale, outer = symmetric_scale(amax, amax_levels(number), spec, outer)
        unsigned = isinstance(number, Int) and not number.signed
        zero = torch.full_like(scale, float(1 << (number.bits - 1))) if unsigned else None
        return Grid(spec, scale, zero, outer)
    if number.rule != "asymmetric-raw":
        low, high = low.clamp_max(0), high.clamp_min(0)
    steps = 2**number.bits if number.rule == "asymmetric-deepspeed" else 2**number.bits - 1
    scale, outer = stored_scale(divided(high - low, steps), spec, outer)
    zero = -(low / scale).round()
    if number.rule != "asymmetric-deepspeed":
        zero = zero.clamp(number.low, number.high)
    return Grid(spec, scale, zero, outer)


def _grid_with_minima(low: Tensor, high: Tensor, spec: Spec, outer: Tensor | None) -> Grid:
    """Least values are at most 0, as they are in the files, and stored before the scale that starts there."""
    number = spec.number
    assert isinstance(number, Int)
    if number.symmetric:
        amax = torch.maximum(high.abs(), low.abs())
        scale, _, outer = kquant.stored(divided(amax, amax_levels(number)), None, spec, outer)
        return Grid(spec, scale, None, outer)
    offset = -low.clamp_max(0)
    if spec.scale == "kquant":
        scale, stored, outer = kquant.stored(divided(high + offset, number.high), offset, spec, outer)
        return Grid(spec, scale, None, outer, stored)
    if spec.scale == "bilevel":
        scale = divided(high.clamp_min(0) + offset, number.high)
        scale, stored, outer = bilevel.stored(scale, torch.where(scale > 0, offset / scale, 0.0), outer)
        return Grid(spec, scale, None, outer, stored)
    offset = store_scale(offset, spec.scale).where(offset > 0, 0.0)
    scale = divided(high + offset, number.high)
    return Grid(spec, store_scale(torch.where(scale > 0, scale, 1.0), spec.scale), None, None, offset)


def grid_range(grid: Grid) -> tuple[Tensor, Tensor]:
    """Ends [..., R/r, C/c] of a range whose grid this is: the inverse of `grid_from_range`."""
    number = grid.spec.number
    if grid.offset is not None:
        assert isinstance(number, Int)
        return -grid.offset, number.high * grid.scale - grid.offset
    if not isinstance(number, Int) or number.symmetric:
        shared = grid.spec.scale.startswith("e8m0")  # rules round amax to a power of two
        amax = grid.scale * (2.0 ** largest_exponent(number) if shared else amax_levels(number))
        return -amax, amax
    assert grid.zero is not None, "asymmetric grids have a zero-point"
    steps = 2**number.bits if number.rule == "asymmetric-deepspeed" else 2**number.bits - 1
    low = -grid.zero * grid.scale
    return low, low + steps * grid.scale


def amax_levels(number: Number) -> float:
    """How many scales make up amax under a symmetric rule."""
    if not isinstance(number, Int):
        return number.largest
    if number.rule == "symmetric-restricted":
        return float((1 << (number.bits - 1)) - 1)
    if number.rule == "symmetric-full":
        return float(1 << (number.bits - 1))
    return ((1 << number.bits) - 1) / 2


def fit_range(x: Tensor, spec: Spec) -> Grid:
    """The plain min-max grid of values [..., R, C]."""
    return grid_from_range(*unit_range(x, spec.block), spec)


UnitError = Callable[[Tensor, slice], Tensor]
"""(difference in units view [R/r, r, C/c, c], the rows of x it belongs to) -> error of every unit [R/r, C/c]."""

_CHUNK = {"cpu": 1 << 19, "cuda": 1 << 23}
"""Elements searched at once: a candidate's temporaries stay in a CPU's cache, a GPU's kernels are worth their start."""


def search_range(
    x: Tensor, spec: Spec, ratios: Iterable[float], error: UnitError, *, at_once: int | None = None
) -> Grid:
    """For every unit of x [R, C] the grid of least error among those covering [p min, p max], p in `ratios`.

    The first ratio wins ties, so put 1 first. The running best is kept apart from the original range: shrinkage must
    not compound. What scales are stored relative to belongs to the full range. `at_once`: rows searched at once, where
    the caller knows better.
    """
    ratios = tuple(ratios)
    rows, columns = x.shape
    step = at_once or max(1, _CHUNK["cuda" if x.is_cuda else "cpu"] // columns) if spec.by_row else rows
    full = fit_range(x, spec) if spec.relative else None
    parts = []
    for start in range(0, rows, step):
        chunk = slice(start, start + step)
        outer = None if full is None else full.rows(chunk).outer
        parts.append(_search_rows(x[chunk].float(), spec, ratios, error, chunk, outer))
    zero, offset = (
        None if each[0] is None else torch.cat([x for x in each if x is not None])
        for each in ([part.zero for part in parts], [part.offset for part in parts])
    )
    scale = torch.cat([part.scale for part in parts])
    return Grid(spec, scale, zero, None if full is None else full.outer, offset)


def _search_rows(
    x: Tensor, spec: Spec, ratios: tuple[float, ...], error: UnitError, rows: slice, outer: Tensor | None
) -> Grid:
    low, high = unit_range(x, spec.block)
    units = to_units(x, spec.block)
    best, least = None, torch.full_like(low, torch.inf)
    for ratio in ratios:
        grid = grid_from_range(low * ratio, high * ratio, spec, outer)
        shifted = units if grid.offset is None else units + grid.offset[..., :, None, :, None]
        levels = grid._nearest(shifted)
        loss = error(levels.mul_(grid.scale[..., :, None, :, None]).sub_(shifted), rows)
        better = loss < least
        least = torch.where(better, loss, least)
        best = grid if best is None else _choose(better, grid, best)
    assert best is not None
    return best


def _choose(take: Tensor, new: Grid, old: Grid) -> Grid:
    zero = None if new.zero is None or old.zero is None else torch.where(take, new.zero, old.zero)
    offset = None if new.offset is None or old.offset is None else torch.where(take, new.offset, old.offset)
    return Grid(new.spec, torch.where(take, new.scale, old.scale), zero, new.outer, offset)


def search_mse(
    x: Tensor, spec: Spec, *, grid: int = 100, maxshrink: float = 0.8, norm: float = 2.4, weight: Tensor | None = None
) -> Grid:
    """The MSE range search: least sum of |x̂ - x|^norm per unit over the ranges 1, 1 - 1/grid, … > 1 - maxshrink.

    `weight` [C] optionally weighs the error of each column, for instance by the diagonal of the inputs' Gram matrix.
    """
    per_column = None if weight is None else to_units(weight.float().expand(1, -1), (1, spec.block[1]))[0, 0]

    def error(difference: Tensor, rows: slice) -> Tensor:
        # |d|^norm; pow_ takes three times as long, log 0 is -inf
        power = difference.square_() if norm == 2 else difference.abs_().log_().mul_(norm).exp_()
        return (power if per_column is None else power.mul_(per_column)).sum(-1).sum(-2)  # one sum over both is slow

    return search_range(x, spec, (1 - i / grid for i in range(int(maxshrink * grid))), error)
