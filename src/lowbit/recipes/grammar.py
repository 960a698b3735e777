"""Recipe names: a small grammar, so that any composition can be typed.

    name        = [ method { "+" method } ] "-" scheme      (without methods the dash may go too)
                | method [ "-" NUMBER ]                     (of those that choose the format: billm, pbllm-1.7, wanda50)
    scheme      = weights [ activations ] [ "kv" BITS | "k" BITS "v" BITS ] { option }
    weights     = "w" BITS | "wfp8" | "wfp6" | "wfp4" | "fp8" (which is wfp8afp8) | "nf4"
                | "q2k" to "q6k" (llama.cpp's K-quants) | BLOCKS (which is BLOCKS "a" BLOCKS)
    activations = "a" BITS | "afp8" | "afp6" | "afp4" | "a" BLOCKS
    BLOCKS      = "nvfp4" | "mxfp4" | "mxfp6" | "mxfp8" | "mxint8"
    option      = "-g" GROUP [ "-row" ] | "-kvg" GROUP | "-kivi" | "-asym" | "-pow2" | "-m2" | "-double" | "-static"

Without weights, as in gptq-g128, awq+gptq-a8-g64 and gptq-qk (K-quants), a name leaves their bits to --bits or --size.
16 bits are left alone, and keys and values are ranged per token and head. `papers/NAME` is no part of the grammar: it
is looked up (`papers`). A name is read into an ordinary `Recipe` and forgotten: nothing further down knows the grammar.
It is read by hand, since two regular expressions are easier to be sure of than a parser's grammar file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..methods import CLIPS, CORRECTS, ENCODES, RECONSTRUCTS, ROUNDS, TRANSFORMS
from ..methods.recipe import Recipe
from ..methods.rtn import RTN
from ..methods.scheme import Override, Scheme
from ..numerics.kv import KV, kivi
from ..numerics.spec import (
    E2M1,
    E3M2,
    E4M3,
    NF4,
    Int,
    Number,
    ScaleDtype,
    Spec,
    kquant,
    mx,
    nvfp4,
    per_group,
    per_tensor,
    per_token,
)
from .checks import unknown
from .defaults import default_clip, default_scale, formats_for, weights_for

EXAMPLE = "gptq-w4a16-g128"

_FLOATS = {"fp8": E4M3, "fp6": E3M2, "fp4": E2M1}
_BLOCKS = {"nvfp4": nvfp4(), "mxfp4": mx(E2M1), "mxfp6": mx(E3M2), "mxfp8": mx(E4M3), "mxint8": mx(Int(8))}
"""Formats that say themselves which values share a scale, and how it is stored."""
_SUPER = {f"q{bits}k": kquant(bits) for bits in range(2, 7)}
_NAMED: dict[str, Number | Spec] = {**_FLOATS, **_BLOCKS, **_SUPER, "nf4": NF4}
_SCALES: dict[str, ScaleDtype] = {"pow2": "e8m0-rceil", "m2": "m2", "double": "double"}

_FIRST = ("w1 to w8", "w16", *(f"w{name}" for name in _FLOATS), "fp8", "nf4", *_SUPER, *_BLOCKS)
_SECOND = ("a2 to a8", "a16", *(f"a{name}" for name in (*_FLOATS, *_BLOCKS)))
_FORMATS = re.compile(
    rf"(?P<weights>w[0-9]+|wfp[468]|fp8|nf4|{'|'.join((*_SUPER, *_BLOCKS))})"
    rf"(?P<activations>a(?:[0-9]+|{'|'.join((*_FLOATS, *_BLOCKS))}))?"
    r"(?:kv(?P<kv>[0-9]+)|k(?P<keys>[0-9]+)v(?P<values>[0-9]+))?"
)
_WORD = re.compile(r"(?P<name>[a-z]+)(?P<argument>[0-9][0-9.:]*)")
"""A method with what its class reads as settings, for instance lorc32 and sparsegpt2:4 (`named`)."""
_NUMBER = re.compile(r"[0-9.]+")
_KV_GROUP = re.compile(r"kvg[0-9]+")
_GROUP = re.compile(r"g[0-9]+")
_BEHIND = re.compile(r"a(?:[0-9]|fp|nv|mx)|kv?[0-9]")
"""How what stands behind the format of weights in a word begins."""


def parse(name: str) -> Recipe:
    """The recipe of a name. Raises ValueError with one sentence where it means nothing in this version."""
    head, _, tail = name.partition("-")
    bare = _FORMATS.match(head) is not None
    methods = [] if bare or not head else head.split("+")
    try:
        _steps(methods, None)  # what is wrong with them is said first
        if not (bare or tail or _own(methods)):
            raise ValueError(f"it does not say what to quantize to, write for instance {EXAMPLE}")
        own = _own(methods)
        if own is not None and (not tail or _NUMBER.fullmatch(tail)):
            methods = [word + tail if _kind(word) in ENCODES else word for word in methods]
            scheme = Scheme(own)
        else:
            scheme = parse_scheme(name if bare else tail)
            scheme = replace(scheme, weights=scheme.weights or own)
        steps = _steps(methods, scheme.weights)
        if scheme.weights is None and scheme.activations is None and scheme.kv is None:
            raise ValueError("16-bit weights and 16-bit activations leave nothing to quantize")
    except ValueError as error:
        raise ValueError(f"recipe '{name}': {error}") from None
    scheme = replace(scheme, weights=weights_for(steps.clip, scheme.weights))
    scheme = formats_for(steps.encode, scheme)
    return replace(steps, scheme=scheme, name=name)


def parse_override(text: str) -> Override:
    """`PATTERN=SCHEME`, for instance `*.down_proj=w8a16-g128`; w16a16 keeps the sites as they are."""
    pattern, equals, words = text.rpartition("=")
    if not (pattern and equals and words):
        raise ValueError(f"override '{text}': write PATTERN=SCHEME, as in '*.down_proj=w8a16-g128'")
    try:
        scheme = parse_scheme(words)
    except ValueError as error:
        raise ValueError(f"override '{text}': {error}") from None
    if scheme.kv is not None:
        raise ValueError(f"override '{text}': keys and values have one format for all layers: leave them to the recipe")
    return Override(pattern, scheme.weights, scheme.activations)


# --- methods ----------------------------------------------------------------------------------------------------------


def _steps(words: Sequence[str], weights: Spec | None) -> Recipe:
    """A recipe without a scheme whose slots are what the words name; RTN and the default clip fill what is left."""
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"{word} is named twice: once is enough")
    before = {name: kind for name, kind in RECONSTRUCTS.items() if not kind.after}
    after = {name: kind for name, kind in RECONSTRUCTS.items() if kind.after}
    slots: tuple[Mapping[str, type], ...] = (TRANSFORMS, CLIPS, before, ENCODES, ROUNDS, after, CORRECTS)
    filled = [[word for word in words if _kind(word) in slot] for slot in slots]
    for word in words:
        if not any(word in names for names in filled):
            raise unknown("method", word, [name for slot in slots for name in slot])
    transforms, clips, trained, encodes, rounds, retrained, corrections = filled
    if len(clips) > 1:
        raise ValueError(f"{' and '.join(clips)} both choose the range of the codes: keep one of them")
    if len(encodes) > 1:
        raise ValueError(f"{' and '.join(encodes)} both choose what a weight is made of: keep one of them")
    if len(rounds) > 1:
        raise ValueError(f"{' and '.join(rounds)} both choose the codes: keep one of them")
    ordered = [word for names in filled for word in names]
    if list(words) != ordered:
        raise ValueError(
            "transforms come first, then the clip, what is trained before rounding, what weights are made of, "
            f"rounding, what is trained after it, corrections: {'+'.join(ordered)}"
        )
    maps = tuple(_made(TRANSFORMS, word) for word in transforms)
    encode = _made(ENCODES, encodes[0]) if encodes else None
    round = _made(ROUNDS, rounds[0]) if rounds else RTN()
    clip = _made(CLIPS, clips[0]) if clips else default_clip(maps, round, weights, encode)
    reconstruct = tuple(_made(RECONSTRUCTS, word) for word in (*trained, *retrained))
    correct = tuple(_made(CORRECTS, word) for word in corrections)
    return Recipe(Scheme(None), round, clip, maps, reconstruct=reconstruct, correct=correct, encode=encode)


def _kind(word: str) -> str:
    """The method a word names: `lorc32` is lorc."""
    match = _WORD.fullmatch(word)
    slots: tuple[Mapping[str, type], ...] = (TRANSFORMS, CLIPS, RECONSTRUCTS, ENCODES, ROUNDS, CORRECTS)
    reads = match is not None and any(hasattr(slot.get(match["name"]), "named") for slot in slots)
    return match["name"] if match is not None and reads else word


def _made(slot: Mapping[str, Any], word: str) -> Any:
    """The method of a word, with the settings that the word gives."""
    kind = _kind(word)
    return slot[kind]() if kind == word else slot[kind].named(word.removeprefix(kind))


def _own(words: Sequence[str]) -> Spec | None:
    """The weight format of the method that weights are made by, if the words name one and it has one."""
    made = [ENCODES[_kind(word)] for word in words if _kind(word) in ENCODES]
    return made[0].own if made else None


# --- schemes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    group: int | None = None
    flags: tuple[str, ...] = ()

    @property
    def scale(self) -> ScaleDtype | None:
        """How weight scales are stored, where an option says so."""
        chosen = [_SCALES[flag] for flag in self.flags if flag in _SCALES]
        return chosen[0] if chosen else None

    @property
    def of_weights(self) -> list[str]:
        """The options that describe weights, as they were written."""
        written = [f"-{flag}" for flag in self.flags if flag != "static"]
        return [f"-g{self.group}", *written] if self.group else written


def parse_scheme(words: str) -> Scheme:
    """The formats that the words of a scheme mean, for instance `w4a16-g128`."""
    formats, *rest = words.split("-")
    match = _FORMATS.match(formats)
    if match is None and _open(formats):
        raise ValueError("it leaves the bits of weights open: add --bits or --size, or write for instance w4 in front")
    if match is None:
        raise ValueError(f"cannot read '{formats}': a scheme begins with {_either(_FIRST)} in this version")
    if match.end() < len(formats):
        left = formats[match.end() :]
        raise ValueError(f"cannot read '{left}' in '{formats}': this version knows {_either(_SECOND)} there")
    weights, inputs = _formats(match["weights"], match["activations"] or "")
    cached = [word for word in rest if word == "kivi" or _KV_GROUP.fullmatch(word)]
    options = _options([word for word in rest if word not in cached])
    kv = _kv(match["keys"] or match["kv"], match["values"] or match["kv"], cached)
    return Scheme(_weight_spec(weights, inputs is not None, options), _activation_spec(inputs, options), kv=kv)


def with_width(name: str, bits: int) -> str:
    """A name that leaves the bits of weights open, with these: gptq-g128 is gptq-w3-g128, gptq-qk is gptq-q3k.

    Raises ValueError where the name has a format of weights already.
    """
    head, _, tail = name.partition("-")
    first, *rest = tail.split("-")
    whole = _own(head.split("+")) is not None and (not tail or _NUMBER.fullmatch(tail))
    if whole or _FORMATS.match(head) or _FORMATS.match(first):
        raise ValueError(f"recipe '{name}' names its format, so no bits are left to choose: take a name like gptq-g128")
    if first == "qk":
        return "-".join([head, f"q{bits}k", *rest])
    behind = f"w{bits}{first}" if _BEHIND.match(first) else f"w{bits}-{first}".rstrip("-")
    return "-".join([head, behind, *rest])


def widths(name: str) -> tuple[int, ...]:
    """The bits that `with_width` may give a name: those of K-quants, or of integers."""
    return (2, 3, 4, 5, 6) if "qk" in name.split("-") else (2, 3, 4, 5, 6, 8)


def _open(word: str) -> bool:
    """Whether a scheme that begins so leaves the format of weights open."""
    options = ("asym", "row", "static", "kivi", "qk", *_SCALES)
    return word in options or _GROUP.fullmatch(word) is not None or _BEHIND.match(word) is not None


def _kv(keys: str | None, values: str | None, words: Sequence[str]) -> KV | None:
    """The cache's format: per token and head, with -kvgG per group of channels, with -kivi as KIVI stores it."""
    if keys is None or values is None:
        if words:
            raise ValueError(f"-{words[0]} describes quantized keys and values: add for instance kv4 in front")
        return None
    if len(words) > 1:
        raise ValueError(f"-{' and -'.join(words)} both say which keys and values share a scale: keep one of them")
    k, v = (_int(bits, "keys and values", 1) for bits in (keys, values))
    plain = KV(None if k is None else k.bits, None if v is None else v.bits)
    if plain == KV() or not words:
        return None if plain == KV() else plain
    if words[0] == "kivi":
        return replace(kivi(), keys=plain.keys, values=plain.values)
    return replace(plain, layout="group", group=int(words[0].removeprefix("kvg")))


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _formats(weights: str, activations: str) -> tuple[Number | Spec | None, Number | Spec | None]:
    """What both halves are: numbers, whose units are for the options to say, or whole formats; None is 16 bits."""
    if weights == "fp8":
        if activations not in ("", "a16"):
            raise ValueError(f"fp8 means FP8 activations, or none as fp8a16: for others write wfp8{activations}")
        weights, activations = "wfp8", activations or "afp8"
    if weights in _BLOCKS:
        activations = activations or f"a{weights}"
    kind, inputs = weights.removeprefix("w"), activations.removeprefix("a") or "16"
    return (
        _NAMED[kind] if kind in _NAMED else _int(kind, "weights", 1),
        _NAMED[inputs] if inputs in _NAMED else _int(inputs, "activations", 2),
    )


def _int(bits: str, what: str, least: int) -> Int | None:
    if bits == "16":
        return None
    if not least <= int(bits) <= 8:
        raise ValueError(f"{what} have {least} to 8 bits, or 16 to stay as they are, not {bits}")
    return Int(int(bits))


def _options(words: Sequence[str]) -> _Options:
    groups = [word for word in words if _GROUP.fullmatch(word)]
    flags = [word for word in words if word not in groups]
    known = ("asym", *_SCALES, "row", "static")
    for flag in flags:
        if flag not in known:
            raise unknown("option", f"-{flag}", ("-gGROUP", "-kvgGROUP", "-kivi", *(f"-{each}" for each in known)))
        if flags.count(flag) > 1:
            raise ValueError(f"-{flag} is given twice: once is enough")
    if len(groups) > 1:
        raise ValueError(f"-{' and -'.join(groups)} give two group sizes: keep one of them")
    stored = [flag for flag in flags if flag in _SCALES]
    if len(stored) > 1:
        raise ValueError(f"-{' and -'.join(stored)} both say how scales are stored: keep one of them")
    group = int(groups[0][1:]) if groups else None
    if group == 0:
        raise ValueError("a group has at least one column: -g128 is usual, and no -g means whole rows")
    return _Options(group, tuple(flags))


def _weight_spec(number: Number | Spec | None, quantized_inputs: bool, options: _Options) -> Spec | None:
    """One scale per group where a group is given, per output channel otherwise; symmetric unless the name says so."""
    if number is None or isinstance(number, Spec):
        if options.of_weights and number is None:
            raise ValueError("-g and -asym describe quantized weights, and w16 has none: drop them")
        if options.of_weights:
            raise ValueError(f"{number} is a whole format: drop {' and '.join(options.of_weights)}")
        return number
    if "asym" in options.flags:
        if not isinstance(number, Int):
            raise ValueError(f"-asym needs integers, and {number} has no zero-point: drop it")
        number = Int(number.bits, "asymmetric")
    group = options.group or (64 if number == NF4 else -1)
    scale = options.scale or default_scale(number, quantized_inputs)
    if scale == "m2" and (group == -1 or "row" in options.flags):
        raise ValueError("-m2 relates the groups of a row, and there is one: write for instance -g256-m2")
    if "row" in options.flags:
        if options.group is None:
            raise ValueError("-row lets whole rows share a scale, -g saying how many: write for instance -g16-row")
        return Spec(number, (group, -1), scale)
    return per_group(number, group, scale=scale)


def _activation_spec(number: Number | Spec | None, options: _Options) -> Spec | None:
    """Per token and dynamic, or with -static per tensor from calibrated ranges; blocks are dynamic, and with -static
    NVFP4 has a calibrated tensor scale.
    """
    static = "static" in options.flags
    if number is None:
        if static:
            raise ValueError("-static describes quantized activations, and there are none: drop it, or add a8 or afp8")
        return None
    if isinstance(number, Spec):
        if static and number == nvfp4():
            return number
        if static:
            raise ValueError(f"the ranges of {number} come with the values: drop -static")
        return replace(number, dynamic=True)
    return per_tensor(number, scale="float32") if static else per_token(number)
