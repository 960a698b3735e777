"""What a recipe means where it says nothing: the one place for the conventions that names and YAML share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from ..methods.awq import AWQ, AWQClip
from ..methods.base import Clip, Encode, Rotation, Round, Transform
from ..methods.dgq import DGQ
from ..methods.hqq import HQQ
from ..methods.imatrix import Imatrix
from ..methods.llmint8 import LLMInt8
from ..methods.mse import MSEClip
from ..methods.owq import OWQ
from ..methods.quik import QUIK
from ..methods.quip import QuIP
from ..methods.quipsharp import QuIPSharp
from ..methods.rtn import RTN, MinMaxClip
from ..methods.scheme import Override, Scheme
from ..methods.spqr import SpQR
from ..numerics.spec import PLAIN, Float, Int, Number, Rule, ScaleDtype, Spec

Formats = TypeVar("Formats", Scheme, Override)

_SCALES: dict[type[Clip], ScaleDtype] = {HQQ: "float16-min", DGQ: "integer"}
"""Clips that are for asymmetric integers whose scales are stored in one way."""


def default_clip(
    transforms: Sequence[Rotation | Transform], round: Round, weights: Spec | None, encode: Encode | None = None
) -> Clip:
    """Ranges are searched for least output error wherever statistics of the inputs are at hand, and full otherwise.

    AWQ is its paper's scale search and clip search. GPTQ's paper takes the full range (`minmax+gptq`), and its code
    offers an MSE search (`mse+gptq`); the search by output error is better than both, so it is what `gptq` means.
    K-quants are fitted with an importance matrix whoever rounds: their least values need more than a range. QUIK is its
    paper's MSE search, OWQ rounds by GPTQ, and QuIP has a range of its own unless a clip is named.
    """
    if weights is not None and weights.scale == "kquant":
        return Imatrix()
    if isinstance(encode, QUIK):
        return MSEClip()
    if isinstance(encode, (QuIP, QuIPSharp)):
        return MinMaxClip()
    rounded = not isinstance(round, RTN) or isinstance(encode, OWQ)
    searched = rounded or any(isinstance(transform, AWQ) for transform in transforms)
    return AWQClip() if searched else MinMaxClip()


def default_scale(number: Number, quantized_inputs: bool) -> ScaleDtype:
    """Weight scales are stored in 16 bits, except for FP8 and for 8-bit weights behind quantized activations."""
    return "float32" if number.bits == 8 and (quantized_inputs or isinstance(number, Float)) else "half"


def weights_for(clip: Clip, weights: Spec | None) -> Spec | None:
    """The weight format that a recipe's name means: integers are those that the clip is for, if it is for some."""
    scale = _SCALES.get(type(clip))
    if scale is None or weights is None or not isinstance(weights.number, Int) or weights.scale not in PLAIN:
        return weights
    return Spec(Int(weights.bits, "asymmetric"), weights.block, scale)


def formats_for(encode: Encode | None, formats: Formats) -> Formats:
    """The formats that a recipe's name means: integers are those of the method that weights are made by."""
    weights, inputs = formats.weights, formats.activations
    if isinstance(encode, SpQR):
        weights = _integers(weights, "asymmetric", "bilevel")
    if isinstance(encode, QUIK):
        inputs = _integers(inputs, "asymmetric")
    if isinstance(encode, LLMInt8):
        weights, inputs = (_integers(each, "symmetric-restricted") for each in (weights, inputs))
    return replace(formats, weights=weights, activations=inputs)


def _integers(spec: Spec | None, rule: Rule, scale: ScaleDtype | None = None) -> Spec | None:
    if spec is None or not isinstance(spec.number, Int) or spec.scale not in PLAIN:
        return spec
    return replace(spec, number=Int(spec.bits, rule), scale=scale or spec.scale)
