"""`--set`: one value of a recipe's document by its path, `gptq.damp=0.05` or `scheme.weights.group=64`.

Values are set in the document and read back through it, so that a setting given on the command line is checked by the
same code as one in a file, and no second description of the settings exists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from .checks import below, unknown
from .document import KEYS, LoadedRecipe, from_dict, read_yaml, to_dict


def assign(loaded: LoadedRecipe, assignment: str) -> LoadedRecipe:
    """The recipe with one `path=value` applied; the value is YAML. Raises ValueError with one sentence."""
    path, equals, text = assignment.partition("=")
    if not (path and equals):
        raise ValueError(f"--set {assignment}: write SETTING=VALUE, as in gptq.damp=0.05")
    data = to_dict(loaded.recipe, loaded.calibration)
    if path.startswith("calibration."):
        data.setdefault("calibration", {})
    try:
        _assign(data, path.split("."), read_yaml(text))
        return from_dict(data)
    except ValueError as error:
        raise ValueError(f"--set {assignment}: {error}") from None


def _assign(data: dict[str, Any], path: Sequence[str], value: object) -> None:
    head, *rest = path
    methods = dict(_methods(data))
    if head in methods:
        if len(rest) != 1 or rest[0] not in methods[head]:
            raise unknown("setting", ".".join(path), _leaves(methods) or ["none"])
        methods[head][rest[0]] = value
        return
    if head not in KEYS:
        raise unknown("setting", ".".join(path), [*_leaves(methods), *KEYS])
    owner: Any = data
    for depth, key in enumerate(path[:-1]):
        above = ".".join(path[:depth])
        if key not in owner:
            raise unknown("key", key, owner, above)
        owner = owner[key]
        if not isinstance(owner, dict):
            raise ValueError(f"{below(above, key)} has no parts to set here, give it whole or in a recipe file")
    owner[path[-1]] = value


def _methods(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, settings) of every method in a document."""
    single = [data[slot] for slot in ("clip", "encode", "round") if slot in data]
    for entry in (*data["transforms"], *single, *data["reconstruct"], *data["correct"]):
        yield from entry.items()


def _leaves(methods: dict[str, dict[str, Any]]) -> list[str]:
    return [f"{name}.{setting}" for name, settings in methods.items() for setting in settings]
