"""The two refusals that every reader of recipes shares: a word that nobody knows, and a value of the wrong type.

pydantic judges single values only: validating whole dataclasses with it would hide the path of a mistake inside its own
report, and its strict mode does not take a mapping for a dataclass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any, get_origin

from pydantic import TypeAdapter, ValidationError

_ALIKE = 0.61
"""Likeness from which a word is taken for a slip: above that of two methods that only share "quant" in their names."""

_adapter = cache(TypeAdapter)


def unknown(what: str, word: object, known: Iterable[str], path: str = "") -> ValueError:
    """The error for a `word` below `path` that is not among `known`: names the nearest one, and all of them."""
    names = list(known)
    near = get_close_matches(str(word).lower(), names, 1, _ALIKE)
    hint = f", did you mean '{near[0]}'?" if near else ""
    return ValueError(f"unknown {what} '{below(path, word)}'{hint} (known: {', '.join(names)})")


def below(path: str, word: object) -> str:
    """The dotted path of `word` inside `path`."""
    return f"{path}.{word}" if path else str(word)


def section(value: object, path: str, known: Iterable[str], what: str = "key") -> Mapping[str, Any]:
    """`value`, which must be a mapping with no other keys than `known`."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{path or 'a recipe'}: expected a mapping of {what}s to values, not {value!r}")
    names = list(known)
    for key in value:
        if key not in names:
            raise unknown(what, key, names, path)
    return value


def checked(value: object, kind: Any, path: str) -> Any:
    """`value` as the annotation `kind` wants it; all that is converted is integers to floats and lists to tuples."""
    if get_origin(kind) is tuple and isinstance(value, list):
        value = tuple(value)
    try:
        result = _adapter(kind).validate_python(value, strict=True)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise ValueError(f"{path}: {reason[0].lower()}{reason[1:]}, not {value!r}") from None
    numbers = result if isinstance(result, tuple) else (result,)
    if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
        raise ValueError(f"{path}: a setting is a finite number, not {value!r}")
    return result
