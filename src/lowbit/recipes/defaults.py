"""What a recipe means where it says nothing: the one place for the conventions that names and YAML share."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods.awq import AWQ, AWQClip
from ..methods.base import Clip, Round, Transform
from ..methods.rtn import RTN, MinMaxClip
from ..numerics.spec import Float, Number, ScaleDtype


def default_clip(transforms: Sequence[Transform], round: Round) -> Clip:
    """AWQ is its paper's scale search and clip search, unless its codes are then chosen by another method than RTN."""
    alone = isinstance(round, RTN) and any(isinstance(transform, AWQ) for transform in transforms)
    return AWQClip() if alone else MinMaxClip()


def default_scale(number: Number, quantized_inputs: bool) -> ScaleDtype:
    """Weight scales are stored in 16 bits, except for FP8 and for 8-bit weights behind quantized activations."""
    return "float32" if number.bits == 8 and (quantized_inputs or isinstance(number, Float)) else "half"
