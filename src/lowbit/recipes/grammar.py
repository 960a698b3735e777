"""Recipe names: a small grammar, so that any composition can be typed.

    name        = [ method { "+" method } ] "-" scheme      (without methods the dash may go too)
    scheme      = weights [ activations ] { option }
    weights     = "w" BITS | "wfp8" | "wfp4" | "fp8" (which is wfp8afp8)
    activations = "a" BITS | "afp8"
    option      = "-g" GROUP | "-asym" | "-static"

16 bits are left alone. A name is read into an ordinary `Recipe` and forgotten: nothing further down knows the grammar.
It is read by hand, since two regular expressions are easier to be sure of than a parser's grammar file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..methods import CLIPS, ROUNDS, TRANSFORMS
from ..methods.base import Clip, Override, Recipe, Round, Scheme, Transform
from ..methods.rtn import RTN
from ..numerics.spec import E2M1, E4M3, Int, Number, Spec, per_channel, per_group, per_tensor, per_token
from .checks import unknown
from .defaults import default_clip, default_scale

EXAMPLE = "gptq-w4a16-g128"

_FORMATS = re.compile(r"(?P<weights>w[0-9]+|wfp8|wfp4|fp8)(?P<activations>a[0-9]+|afp8)?")
_GROUP = re.compile(r"g[0-9]+")


def parse(name: str) -> Recipe:
    """The recipe of a name. Raises ValueError with one sentence where it means nothing in this version."""
    head, _, tail = name.partition("-")
    bare = _FORMATS.match(head) is not None
    methods = [] if bare or not head else head.split("+")
    try:
        transforms, clip, round = _steps(methods)
        if not (bare or tail):
            raise ValueError(f"it does not say what to quantize to, write for instance {EXAMPLE}")
        scheme = parse_scheme(name if bare else tail)
        if scheme.weights is None and scheme.activations is None:
            raise ValueError("16-bit weights and 16-bit activations leave nothing to quantize")
    except ValueError as error:
        raise ValueError(f"recipe '{name}': {error}") from None
    return Recipe(scheme, round, clip, transforms, name)


def parse_override(text: str) -> Override:
    """`PATTERN=SCHEME`, for instance `*.down_proj=w8a16-g128`; w16a16 keeps the sites as they are."""
    pattern, equals, words = text.rpartition("=")
    if not (pattern and equals and words):
        raise ValueError(f"override '{text}': write PATTERN=SCHEME, as in '*.down_proj=w8a16-g128'")
    try:
        scheme = parse_scheme(words)
    except ValueError as error:
        raise ValueError(f"override '{text}': {error}") from None
    return Override(pattern, scheme.weights, scheme.activations)


# --- methods ----------------------------------------------------------------------------------------------------------


def _steps(words: Sequence[str]) -> tuple[tuple[Transform, ...], Clip, Round]:
    """The slots that the methods of a name fill; RTN and the default clip fill what is left."""
    known = [*TRANSFORMS, *CLIPS, *ROUNDS]
    for word in words:
        if word not in known:
            raise unknown("method", word, known)
        if words.count(word) > 1:
            raise ValueError(f"{word} is named twice: once is enough")
    transforms = [word for word in words if word in TRANSFORMS]
    clips = [word for word in words if word in CLIPS]
    rounds = [word for word in words if word in ROUNDS]
    if len(clips) > 1:
        raise ValueError(f"{' and '.join(clips)} both choose the range of the codes: keep one of them")
    if len(rounds) > 1:
        raise ValueError(f"{' and '.join(rounds)} both choose the codes: keep one of them")
    ordered = transforms + clips + rounds
    if list(words) != ordered:
        raise ValueError(f"transforms come first, then the clip, then rounding: {'+'.join(ordered)}")
    maps = tuple(TRANSFORMS[word]() for word in transforms)
    round = ROUNDS[rounds[0]]() if rounds else RTN()
    return maps, CLIPS[clips[0]]() if clips else default_clip(maps, round), round


# --- schemes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    group: int | None = None
    asym: bool = False
    static: bool = False


def parse_scheme(words: str) -> Scheme:
    """The formats that the words of a scheme mean, for instance `w4a16-g128`."""
    formats, *rest = words.split("-")
    match = _FORMATS.match(formats)
    if match is None:
        raise ValueError(
            f"cannot read '{formats}': a scheme begins with w1 to w8, w16, wfp8, wfp4 or fp8 in this version"
        )
    if match.end() < len(formats):
        left = formats[match.end() :]
        raise ValueError(f"cannot read '{left}' in '{formats}': this version knows a2 to a8, a16 and afp8 there")
    weights, inputs = _numbers(match["weights"], match["activations"] or "")
    options = _options(rest)
    return Scheme(_weight_spec(weights, inputs is not None, options), _activation_spec(inputs, options))


def _numbers(weights: str, activations: str) -> tuple[Number | None, Number | None]:
    """The number formats of both halves; None is 16 bits."""
    if weights == "fp8":
        if activations not in ("", "a16"):
            raise ValueError(f"fp8 means FP8 activations, or none as fp8a16: for others write wfp8{activations}")
        return E4M3, None if activations else E4M3
    inputs = E4M3 if activations == "afp8" else _int(activations[1:] or "16", "activations", 2)
    if weights in ("wfp8", "wfp4"):
        return (E4M3 if weights == "wfp8" else E2M1), inputs
    return _int(weights[1:], "weights", 1), inputs


def _int(bits: str, what: str, least: int) -> Int | None:
    if bits == "16":
        return None
    if not least <= int(bits) <= 8:
        raise ValueError(f"{what} have {least} to 8 bits, or 16 to stay as they are, not {bits}")
    return Int(int(bits))


def _options(words: Sequence[str]) -> _Options:
    groups = [word for word in words if _GROUP.fullmatch(word)]
    flags = [word for word in words if word not in groups]
    for flag in flags:
        if flag not in ("asym", "static"):
            raise unknown("option", f"-{flag}", ("-gGROUP", "-asym", "-static"))
        if flags.count(flag) > 1:
            raise ValueError(f"-{flag} is given twice: once is enough")
    if len(groups) > 1:
        raise ValueError(f"-{' and -'.join(groups)} give two group sizes: keep one of them")
    group = int(groups[0][1:]) if groups else None
    if group == 0:
        raise ValueError("a group has at least one column: -g128 is usual, and no -g means whole rows")
    return _Options(group, "asym" in flags, "static" in flags)


def _weight_spec(number: Number | None, quantized_inputs: bool, options: _Options) -> Spec | None:
    """One scale per group where a group is given, per output channel otherwise; symmetric unless the name says so."""
    if number is None:
        if options.asym or options.group:
            raise ValueError("-g and -asym describe quantized weights, and w16 has none: drop them")
        return None
    if options.asym:
        if not isinstance(number, Int):
            raise ValueError(f"-asym needs integers, and {number} has no zero-point: drop it")
        number = Int(number.bits, "asymmetric")
    scale = default_scale(number, quantized_inputs)
    return per_group(number, options.group, scale=scale) if options.group else per_channel(number, scale=scale)


def _activation_spec(number: Number | None, options: _Options) -> Spec | None:
    """Per token and dynamic, or with -static per tensor from calibrated ranges."""
    if number is None:
        if options.static:
            raise ValueError("-static describes quantized activations, and there are none: drop it, or add a8 or afp8")
        return None
    return per_tensor(number, scale="float32") if options.static else per_token(number)
