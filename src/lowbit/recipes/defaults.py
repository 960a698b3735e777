"""What a recipe means where it says nothing: the one place for the conventions that names and YAML share."""

from __future__ import annotations

from collections.abc import Sequence

from ..methods.awq import AWQ, AWQClip
from ..methods.base import Clip, Rotation, Round, Transform
from ..methods.imatrix import Imatrix
from ..methods.rtn import RTN, MinMaxClip
from ..numerics.spec import Float, Number, ScaleDtype, Spec


def default_clip(transforms: Sequence[Rotation | Transform], round: Round, weights: Spec | None) -> Clip:
    """Ranges are searched for least output error wherever statistics of the inputs are at hand, and full otherwise.

    AWQ is its paper's scale search and clip search. GPTQ's paper takes the full range (`minmax+gptq`), and its code
    offers an MSE search (`mse+gptq`); the search by output error is better than both, so it is what `gptq` means.
    K-quants are fitted with an importance matrix whoever rounds: their least values need more than a range.
    """
    if weights is not None and weights.scale == "kquant":
        return Imatrix()
    searched = not isinstance(round, RTN) or any(isinstance(transform, AWQ) for transform in transforms)
    return AWQClip() if searched else MinMaxClip()


def default_scale(number: Number, quantized_inputs: bool) -> ScaleDtype:
    """Weight scales are stored in 16 bits, except for FP8 and for 8-bit weights behind quantized activations."""
    return "float32" if number.bits == 8 and (quantized_inputs or isinstance(number, Float)) else "half"
