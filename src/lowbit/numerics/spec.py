"""Frozen descriptions of number formats: what a code means, which values share a scale, how the scale is stored.

A description is data: two of them compare equal, hash, print and travel through JSON. All arithmetic is in `grid.py`.
One mechanism covers every granularity: a *unit* is a rectangle of `block` = (rows, columns) of the last two axes, -1
meaning the whole axis, and everything in a unit shares one scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Rule = Literal[
    "symmetric",
    "symmetric-restricted",
    "symmetric-full",
    "symmetric-unsigned",
    "asymmetric",
    "asymmetric-raw",
    "asymmetric-deepspeed",
]
ScaleDtype = Literal[
    "half",
    "float32",
    "bfloat16",
    "float16",
    "e8m0",
    "e8m0-rceil",
    "e8m0-ceil",
    "e8m0-even",
    "e4m3",
    "m2",
    "m2-ceil",
    "double",
    "float16-min",
    "kquant",
    "integer",
    "bilevel",
]
"""How a scale S = amax/(largest level) is rounded and stored, before anything is rounded with it.

===========  ==================================================================================  =======================
half         a number that bf16 and fp16 both hold exactly: every file format can carry it       the default
e8m0         2^(⌊log2 amax⌋ - ⌊log2 (largest level)⌋) in one byte; may saturate                  OCP MX
e8m0-rceil   2^⌈log2 S⌉: never saturates                                                         MX; ZeroQuant-FP's M1
e8m0-ceil    2^(⌈log2 amax⌉ - ⌊log2 (largest level)⌋)                                            MX
e8m0-even    as e8m0, amax rounded to the format's mantissa first                                MX
e4m3         an E4M3 number times one fp32 scale of the tensor (of each token, where dynamic)    NVFP4
m2           S_max 2^-n, S_max the row's largest scale in fp32, n = ⌊log2(S_max/S)⌋ from 0 to 8  ZeroQuant-FP's M2
m2-ceil      the same with ⌈⌉; may saturate                                                      ZeroQuant-FP's M2
double       8 bits: the mean scale plus q steps, one fp32 step per 256 units                    QLoRA
float16-min  fp16, and beside it minus the least value in fp16 instead of a zero-point             GGUF Q4_1, Q5_1
kquant       4 to 8 bits times one fp16 scale per 256 columns; least values likewise              GGUF Q2_K to Q6_K
integer      n from 1 to 127 times one scale of the row; levels end where n times them fits int8  DGQ
bilevel      3 bits, on a grid of two fp16 numbers per 16 rows; zeros, which are no codes, likewise     SpQR
===========  ==================================================================================  =======================

M2 with ⌊⌋ or ⌈⌉ by least error needs no name: ⌈⌉ is what ⌊⌋ gives for half the range, so any search of ranges finds it.
"""

PLAIN: tuple[ScaleDtype, ...] = ("half", "float32", "bfloat16", "float16")
"""Scales that are one floating-point number each."""
RELATIVE: tuple[ScaleDtype, ...] = ("e4m3", "m2", "m2-ceil", "double", "kquant", "integer", "bilevel")
"""Scales stored relative to something of the whole tensor or row (see `scales.py`, `kquant.py`, `bilevel.py`)."""
MINIMA: tuple[ScaleDtype, ...] = ("float16-min", "kquant", "bilevel")
"""Scales of asymmetric integers beside which a unit's least value is stored, instead of a zero-point."""
SUPER = 256
"""Columns of a K-quant's super-block."""
_K_UNITS: dict[int, tuple[Rule, int]] = {
    2: ("asymmetric", 16),
    3: ("symmetric", 16),
    4: ("asymmetric", 32),
    5: ("asymmetric", 32),
    6: ("symmetric", 16),
}


@dataclass(frozen=True)
class Int:
    """Integers of 1 to 8 bits under a named scale rule; amax, min and max are those of the unit, b the bits.

    ====================  ==========================  =================  ==============================================
    rule                  codes                       scale s            zero-point z
    ====================  ==========================  =================  ==============================================
    symmetric             [-2^(b-1), 2^(b-1) - 1]     2 amax/(2^b - 1)   none (GPTQ, compressed-tensors; the default)
    symmetric-restricted  same                        amax/(2^(b-1)-1)   none (LLM-QAT and most papers)
    symmetric-full        same                        amax/2^(b-1)       none (DeepSpeed); +amax saturates by one step
    symmetric-unsigned    [0, 2^b - 1]                2 amax/(2^b - 1)   2^(b-1): the default's twin
    asymmetric            [0, 2^b - 1]                (max-min)/(2^b-1)  round(-min/s), the range made to include 0
    asymmetric-raw        same                        same               same on the raw range, clamped to the codes
    asymmetric-deepspeed  same                        (max-min)/2^b      -round(min/s) of the range with 0, not clamped
    ====================  ==========================  =================  ==============================================
    """

    bits: int
    rule: Rule = "symmetric"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"integers have 1 to 8 bits, not {self.bits}")
        if self.rule == "symmetric-restricted" and self.bits == 1:
            raise ValueError("the symmetric-restricted rule needs 2 bits or more: at 1 bit its only code is zero")

    @property
    def symmetric(self) -> bool:
        return self.rule.startswith("symmetric")

    @property
    def signed(self) -> bool:
        return self.symmetric and self.rule != "symmetric-unsigned"

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return self.low + (1 << self.bits) - 1

    def __str__(self) -> str:
        return f"int{self.bits}" + ("" if self.rule == "symmetric" else f" {self.rule}")


@dataclass(frozen=True)
class Float:
    """A minifloat with E exponent and M mantissa bits, value ±2^(max(e,1)-bias) (m/2^M + [e>0]), bias 2^(E-1)-1.

    `largest` is the greatest finite value: codes above it are reserved (E4M3's NaN, E5M2's infinities) and never made.
    """

    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return int(2 ** (self.exponent - 1)) - 1

    def __str__(self) -> str:
        return f"fp{self.bits} e{self.exponent}m{self.mantissa}"


@dataclass(frozen=True)
class Codebook:
    """A table of 2^bits levels in ascending order whose largest magnitude is 1; a code is an index."""

    name: str
    levels: tuple[float, ...]

    @property
    def bits(self) -> int:
        return (len(self.levels) - 1).bit_length()

    @property
    def largest(self) -> float:
        return 1.0

    def __str__(self) -> str:
        return self.name


E4M3 = Float(4, 3, 448.0)
E5M2 = Float(5, 2, 57344.0)
E3M2 = Float(3, 2, 28.0)
E2M3 = Float(2, 3, 7.5)
E2M1 = Float(2, 1, 6.0)
E3M0 = Float(3, 0, 16.0)
BF16 = Float(8, 7, 3.3895313892515355e38)
"""16-bit floats as they are. No code is made of them: it is the format of weights of which some are left out."""

NF4 = Codebook(
    "nf4",
    (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
)
"""Quantiles of a Gaussian as QLoRA's files hold them (Dettmers et al. 2023), fp32."""

Number = Int | Float | Codebook


@dataclass(frozen=True)
class Spec:
    """A quantizer: numbers of one format, one scale per unit of `block` rows by columns, scales stored in `scale`.

    `dynamic` says that the range is recomputed at every call (activations only). A group wider than the axis means
    the whole axis; any other width must divide it, except in square blocks, which pad with zeros.
    """

    number: Number
    block: tuple[int, int] = (1, -1)
    scale: ScaleDtype = "half"
    dynamic: bool = False

    def __post_init__(self) -> None:
        if any(size == 0 or size < -1 for size in self.block):
            raise ValueError(f"a unit is at least 1 x 1, or -1 for a whole axis, not {self.block[0]} x {self.block[1]}")

        if isinstance(self.number, Int) and not self.number.symmetric:
            if self.square:
                raise ValueError("square blocks are padded with zeros and must be symmetric: drop the asymmetric rule")
            if self.scale not in (*PLAIN, *MINIMA, "integer"):
                raise ValueError(f"{self.scale} scales have no zero-points: drop the asymmetric rule, or use half")
        if self.scale == "float16-min" and (not isinstance(self.number, Int) or self.number.symmetric):
            raise ValueError(f"{self.number} has no least value to store: use half scales, or the asymmetric rule")
        if self.scale == "integer" and not isinstance(self.number, Int):
            raise ValueError(f"integer scales make smaller integers int8, and {self.number} is none: use half scales")
        zeros = isinstance(self.number, Int) and not self.number.symmetric
        if self.scale == "bilevel" and not (zeros and self.block[0] == 1):
            raise ValueError("bilevel scales come with zeros, by group of a row: use asymmetric, or half scales")
        if self.scale == "kquant" and self.bits not in _K_UNITS:
            raise ValueError(f"K-quants have 2 to 6 bits, not {self.bits}: write q2k to q6k")
        if self.scale == "kquant" and (self.number, self.block) != _k_layout(self.bits):
            raise ValueError(f"the {self.bits}-bit K-quant is {kquant(self.bits)}, nothing else: write q{self.bits}k")
        if self.dynamic and self.scale in RELATIVE and self.scale != "e4m3":
            raise ValueError(f"{self.scale} scales relate the groups of a weight: inputs take e8m0 or e4m3 instead")

    @property
    def bits(self) -> int:
        return self.number.bits

    @property
    def square(self) -> bool:
        return self.block[0] > 1 and self.block[1] > 1

    @property
    def relative(self) -> bool:
        """Whether scales are stored relative to an outer one."""
        return self.scale in RELATIVE

    @property
    def minima(self) -> bool:
        """Whether units have their least value stored beside the scale: a value is s q - m."""
        return self.scale in MINIMA and isinstance(self.number, Int) and not self.number.symmetric

    @property
    def by_row(self) -> bool:
        """Whether a weight of this format can be cut between any two rows."""
        return self.block[0] == 1 and self.scale not in ("double", "bilevel")

    @property
    def group(self) -> int:
        """Columns that share a scale, -1 for all of them."""
        return self.block[1]

    def __str__(self) -> str:
        named = {(1, self.group): f"group {self.group}", (1, -1): "per row", (-1, -1): "per tensor"}
        where = named.get(self.block, f"block {self.block[0]}x{self.block[1]}")
        scales = "" if self.scale in PLAIN else f", {self.scale} scales"
        return f"{self.number}, {where}{scales}{', dynamic' if self.dynamic else ''}"


def per_tensor(number: Number, *, scale: ScaleDtype = "half", dynamic: bool = False) -> Spec:
    """One scale for everything."""
    return Spec(number, (-1, -1), scale, dynamic)


def per_channel(number: Number, *, scale: ScaleDtype = "half") -> Spec:
    """One scale per output row of a weight [O, I]."""
    return Spec(number, (1, -1), scale)


def per_group(number: Number, size: int, *, scale: ScaleDtype = "half") -> Spec:
    """One scale per `size` consecutive input columns of each row; -1 is the whole row."""
    return Spec(number, (1, size), scale)


def per_token(number: Number, *, scale: ScaleDtype = "float32", dynamic: bool = True) -> Spec:
    """One scale per token of an activation [..., T, D]."""
    return Spec(number, (1, -1), scale, dynamic)


def per_head(number: Number, width: int, *, scale: ScaleDtype = "half", dynamic: bool = True) -> Spec:
    """One scale per head of `width` channels: for each token when dynamic, over all tokens when static."""
    return Spec(number, (1 if dynamic else -1, width), scale, dynamic)


def per_block(number: Number, size: int, *, scale: ScaleDtype = "float32") -> Spec:
    """One scale per `size` x `size` square, symmetric (FP8 128 x 128)."""
    return Spec(number, (size, size), scale)


def mx(number: Number, *, scale: ScaleDtype = "e8m0", dynamic: bool = False) -> Spec:
    """OCP MX: one power of two per 32 columns. MXFP4 is E2M1, MXFP6 E3M2 or E2M3, MXFP8 E4M3 or E5M2, MXINT8 Int(8).

    Integers count steps, OCP's MXINT8 counts 2^-6: its stored exponents are these plus 6.
    """
    return Spec(number, (1, 32), scale, dynamic)


def nvfp4(*, dynamic: bool = False) -> Spec:
    """NVFP4: E2M1 with one E4M3 scale per 16 columns, times one fp32 scale."""
    return Spec(E2M1, (1, 16), "e4m3", dynamic)


def _k_layout(bits: int) -> tuple[Number, tuple[int, int]]:
    rule, width = _K_UNITS[bits]
    return Int(bits, rule), (1, width)


def kquant(bits: int) -> Spec:
    """llama.cpp's K-quant of 2 to 6 bits: super-blocks of 256 columns with 8 or 16 units (see `kquant.py`)."""
    return Spec(*_k_layout(bits), "kquant")
