"""Number formats as a document writes them: `{format: int4, rule: symmetric, group: 128, scale: half}`.

Weights say how many columns share a scale, activations whether a token or the whole tensor does, since that is how
people speak of them; both are the rectangle of `Spec.block`. A field left out takes its default, so that short
documents can be typed; what is written is always complete, except that ranges are dynamic per token and static per
tensor and only the opposite is worth a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_args

from ..numerics.spec import BF16, E2M1, E2M3, E3M0, E3M2, E4M3, E5M2, NF4, Int, Number, Rule, ScaleDtype, Spec
from .checks import checked, section, unknown
from .defaults import default_scale

FORMATS: dict[str, Number] = {
    **{f"int{bits}": Int(bits) for bits in range(1, 9)},
    **{str(number).replace(" ", "-"): number for number in (E4M3, E5M2, E3M2, E2M3, E2M1, E3M0, NF4)},
}
_OF_WEIGHTS: dict[str, Number] = {**FORMATS, "bf16": BF16}
"""Pruned weights may keep their 16 bits."""
_NAMES = {number: name for name, number in _OF_WEIGHTS.items()}
_GROUPS = {"channel": (1, -1), "tensor": (-1, -1)}
_ROWS = {"token": 1, "tensor": -1}


def weights_to_dict(spec: Spec | None) -> dict[str, Any] | None:
    """A weight format as plain data; None is 16 bits."""
    if spec is None:
        return None
    assert not spec.dynamic, "weights have no dynamic range"
    return {**_number_to_dict(spec.number), **_block_to_dict(spec.block), "scale": spec.scale}


def weights_from_dict(data: object, path: str, quantized_inputs: bool) -> Spec | None:
    """The inverse of `weights_to_dict`; missing fields take the defaults of recipe names."""
    if data is None:
        return None
    fields = section(data, path, ("format", "rule", "group", "block", "scale"))
    number = _number(fields, path, _OF_WEIGHTS)
    scale = _scale(fields, path, default_scale(number, quantized_inputs))
    return _spec(number, _block(fields, path), scale, False, path)


def activations_to_dict(spec: Spec | None) -> dict[str, Any] | None:
    """An activation format as plain data; None is 16 bits."""
    if spec is None:
        return None
    rows, columns = spec.block
    assert rows in _ROWS.values(), "activations are ranged by token or by tensor"
    per = "token" if rows == 1 else "tensor"
    data: dict[str, Any] = {**_number_to_dict(spec.number), "per": per, "scale": spec.scale}
    if columns != -1:
        data["group"] = columns
    if spec.dynamic != (per == "token"):
        data["dynamic"] = spec.dynamic
    return data


def activations_from_dict(data: object, path: str) -> Spec | None:
    """The inverse of `activations_to_dict`."""
    if data is None:
        return None
    fields = section(data, path, ("format", "rule", "per", "group", "scale", "dynamic"))
    per = _choice(fields.get("per", "token"), "unit", _ROWS, f"{path}.per")
    dynamic = checked(fields.get("dynamic", per == "token"), bool, f"{path}.dynamic")
    if per == "token" and not dynamic and fields.get("scale") != "e4m3":  # whose tensor scale may be calibrated
        raise ValueError(f"{path}: tokens to come have no ranges yet, so per token is dynamic; static is per: tensor")
    columns = checked(fields.get("group", -1), int, f"{path}.group")
    return _spec(_number(fields, path, FORMATS), (_ROWS[per], columns), _scale(fields, path, "float32"), dynamic, path)


def _number_to_dict(number: Number) -> dict[str, str]:
    if isinstance(number, Int):
        return {"format": _NAMES[Int(number.bits)], "rule": number.rule}
    return {"format": _NAMES[number]}


def _number(fields: Any, path: str, known: Mapping[str, Number]) -> Number:
    if "format" not in fields:
        raise ValueError(f"{path}: the format is missing (known: {', '.join(known)})")
    name = fields["format"]
    number = known[_choice(name, "format", known, f"{path}.format")]
    if "rule" not in fields:
        return number
    if not isinstance(number, Int):
        raise ValueError(f"{path}.rule: scale rules are for integers and {name} is none, leave it out")
    rule: Rule = _choice(fields["rule"], "rule", get_args(Rule), f"{path}.rule")
    try:
        return Int(number.bits, rule)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _scale(fields: Any, path: str, default: ScaleDtype) -> ScaleDtype:
    scale: ScaleDtype = _choice(fields.get("scale", default), "scale type", get_args(ScaleDtype), f"{path}.scale")
    return scale


def _choice(value: object, what: str, known: Any, path: str) -> Any:
    """`value`, which must be one of the words `known`."""
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{path}: {unknown(what, value, known)}")
    return value


def _block_to_dict(block: tuple[int, int]) -> dict[str, Any]:
    for name, known in _GROUPS.items():
        if block == known:
            return {"group": name}
    return {"group": block[1]} if block[0] == 1 else {"block": [*block]}


def _block(fields: Any, path: str) -> tuple[int, int]:
    """The rectangle that `group: channel | tensor | N` or `block: [rows, columns]` stands for."""
    if "block" not in fields:
        group = fields.get("group", "channel")
        if isinstance(group, str) and group in _GROUPS:
            return _GROUPS[group]
        if isinstance(group, int) and not isinstance(group, bool) and group > 0:
            return 1, group
        raise ValueError(f"{path}.group: expected channel, tensor or a positive number of columns, not {group!r}")
    if "group" in fields:
        raise ValueError(f"{path}: group and block both say which weights share a scale, keep one of them")
    block = checked(fields["block"], list[int], f"{path}.block")
    if len(block) != 2:
        raise ValueError(f"{path}.block: expected [rows, columns], -1 for all of them, not {block!r}")
    return block[0], block[1]


def _spec(number: Number, block: tuple[int, int], scale: ScaleDtype, dynamic: bool, path: str) -> Spec:
    try:
        return Spec(number, block, scale, dynamic)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
