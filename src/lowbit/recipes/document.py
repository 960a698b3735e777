"""Recipes written down: the same object as plain data and as YAML, exactly, in both directions.

What is written lists every setting, so that a document pins a result whatever the defaults become. What is read may be
short, and is refused at the first key, method, format or type that is not known. The layout is made by hand because it
is a contract: a generic serializer would spell class names and rectangles where people write `gptq` and `group: 128`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast, get_type_hints

import yaml

from ..methods import CLIPS, CORRECTS, ENCODES, RECONSTRUCTS, ROUNDS, TRANSFORMS
from ..methods.base import Clip, Correct, Encode, Reconstruct, Round, Transform
from ..methods.recipe import Recipe
from ..methods.rtn import RTN
from ..methods.scheme import Override, Scheme
from ..numerics.kv import KV
from .checks import below, checked, section, unknown
from .defaults import default_clip
from .specs import activations_from_dict, activations_to_dict, weights_from_dict, weights_to_dict

KEYS = ("name", "scheme", "transforms", "clip", "encode", "round", "reconstruct", "correct", "calibration")
_SLOTS: dict[str, Mapping[str, type]] = {
    "transform": TRANSFORMS,
    "clip": CLIPS,
    "encode": ENCODES,
    "round": ROUNDS,
    "reconstruct": RECONSTRUCTS,
    "correct": CORRECTS,
}


@dataclass(frozen=True)
class Calibration:
    """The text a recipe pins: a named set or a text file, samples of `length` tokens; None is left to the run."""

    source: str | None = None
    samples: int | None = None
    length: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.source == "":
            raise ValueError("the source is empty: name a set or a text file")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"at least one sample is needed, not {self.samples}")
        if self.length is not None and self.length < 2:
            raise ValueError(f"a sample has at least two tokens, not {self.length}")
        if self.seed is not None and self.seed < 0:
            raise ValueError(f"seeds are not negative, as {self.seed} is")


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe, and the calibration that its document pins, if it does."""

    recipe: Recipe
    calibration: Calibration | None = None


def to_dict(recipe: Recipe, calibration: Calibration | None = None) -> dict[str, Any]:
    """The recipe as JSON-able data with every setting spelled out."""
    data: dict[str, Any] = {
        "name": recipe.name,
        "scheme": {
            **_formats(recipe.scheme),
            "kv": None if recipe.scheme.kv is None else recipe.scheme.kv.to_json(),
            "overrides": [{"pattern": each.pattern, **_formats(each)} for each in recipe.scheme.overrides],
        },
        "transforms": [_settings(transform) for transform in recipe.transforms],
        "clip": _settings(recipe.clip),
        "round": _settings(recipe.round),
        "reconstruct": [_settings(method) for method in recipe.reconstruct],
        "correct": [_settings(method) for method in recipe.correct],
    }
    if recipe.encode is not None:
        data["encode"] = _settings(recipe.encode)
    if calibration is not None:
        data["calibration"] = {key: value for key, value in asdict(calibration).items() if value is not None}
    return data


def from_dict(data: object) -> LoadedRecipe:
    """The inverse of `to_dict`. Raises ValueError with one sentence naming the path of the first mistake."""
    document = section(data, "", KEYS)
    name = checked(document.get("name", ""), str, "name")
    if "scheme" not in document:
        raise ValueError("the scheme is missing: add for instance scheme: {weights: {format: int4, group: 128}}")
    scheme = _scheme(document["scheme"])
    maps = cast(tuple[Transform, ...], _listed(document, "transform", "transforms"))
    trained = cast(tuple[Reconstruct, ...], _listed(document, "reconstruct", "reconstruct"))
    corrections = cast(tuple[Correct, ...], _listed(document, "correct", "correct"))
    round = cast(Round, _method(document["round"], "round", "round")) if "round" in document else RTN()
    given = "clip" in document
    encode = cast(Encode, _method(document["encode"], "encode", "encode")) if "encode" in document else None
    usual = default_clip(maps, round, scheme.weights, encode)
    clip = cast(Clip, _method(document["clip"], "clip", "clip")) if given else usual
    pinned = document.get("calibration")
    calibration = None if pinned is None else cast(Calibration, _build(Calibration, pinned, "calibration"))
    return LoadedRecipe(Recipe(scheme, round, clip, maps, name, trained, corrections, encode), calibration)


def to_yaml(recipe: Recipe, calibration: Calibration | None = None) -> str:
    """The recipe as YAML, complete."""
    data = to_dict(recipe, calibration)
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)


def load_yaml(path: str | Path) -> LoadedRecipe:
    """Read a recipe file. One without a name takes the file's. Every mistake is a ValueError naming file and place."""
    path = Path(path)
    try:
        data = read_yaml(path.read_text("utf-8"))
        named = {"name": path.stem, **data} if isinstance(data, Mapping) else data
        return from_dict(named)
    except OSError as error:
        raise ValueError(f"cannot read the recipe file {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"the recipe file {path} is not UTF-8 text: is it a recipe?") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def read_yaml(text: str) -> Any:
    """Plain data from YAML text, or a ValueError naming the line."""
    try:
        return yaml.load(text, _Loader)  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1} is" if error.problem_mark else "this is"
        raise ValueError(f"{where} not YAML ({error.problem})") from None
    except yaml.YAMLError as error:
        raise ValueError(f"this is not YAML ({str(error).splitlines()[0]})") from None


# --- parts ------------------------------------------------------------------------------------------------------------


def _formats(owner: Scheme | Override) -> dict[str, Any]:
    return {"weights": weights_to_dict(owner.weights), "activations": activations_to_dict(owner.activations)}


def _scheme(data: object) -> Scheme:
    parts = section(data, "scheme", ("weights", "activations", "kv", "overrides"))
    activations = activations_from_dict(parts.get("activations"), "scheme.activations")
    weights = weights_from_dict(parts.get("weights"), "scheme.weights", activations is not None)
    listed = checked(parts.get("overrides", []), list[Any], "scheme.overrides")
    overrides = tuple(_override(each, f"scheme.overrides[{i}]") for i, each in enumerate(listed))
    kv = None if parts.get("kv") is None else cast(KV, _build(KV, parts["kv"], "scheme.kv"))
    if not (weights or activations or kv or any(each.weights or each.activations for each in overrides)):
        raise ValueError("scheme: nothing is quantized, give weights, activations or kv a format")
    return Scheme(weights, activations, overrides, kv)


def _override(data: object, path: str) -> Override:
    parts = section(data, path, ("pattern", "weights", "activations"))
    pattern = checked(parts.get("pattern"), str, below(path, "pattern"))
    activations = activations_from_dict(parts.get("activations"), below(path, "activations"))
    weights = weights_from_dict(parts.get("weights"), below(path, "weights"), activations is not None)
    return Override(pattern, weights, activations)


def _listed(document: Mapping[str, Any], slot: str, key: str) -> tuple[Any, ...]:
    """The methods that a document lists under `key`, each at most once."""
    entries = checked(document.get(key, []), list[Any], key)
    methods: tuple[Any, ...] = tuple(_method(each, slot, f"{key}[{i}]") for i, each in enumerate(entries))
    for i, method in enumerate(methods):
        if method.name in [earlier.name for earlier in methods[:i]]:
            raise ValueError(f"{key}[{i}]: {method.name} is listed twice, once is enough")
    return methods


def _settings(method: Any) -> dict[str, dict[str, Any]]:
    return {method.name: {setting.name: getattr(method, setting.name) for setting in fields(method)}}


def _method(data: object, slot: str, path: str) -> object:
    """A method of `slot` from `{gptq: {damp: 0.01}}`, or from its name alone."""
    entry = {data: None} if isinstance(data, str) else data
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"{path}: expected one method with its settings, as in {{gptq: {{damp: 0.01}}}}, not {data!r}")
    ((name, settings),) = entry.items()
    if name not in _SLOTS[slot]:
        for other, methods in _SLOTS.items():
            if name in methods:
                raise ValueError(f"{path}: {name} is a {other} method, not a {slot} method")
        raise ValueError(f"{path}: {unknown(f'{slot} method', name, _SLOTS[slot])}")
    return _build(_SLOTS[slot][name], {} if settings is None else settings, below(path, name))


def _build(kind: Any, data: object, path: str) -> object:
    """A frozen dataclass from a mapping of its fields; what is left out takes the default of the class."""
    hints = get_type_hints(kind, include_extras=True)
    values = section(data, path, [each.name for each in fields(kind)], "setting")
    values = {key: checked(value, hints[key], below(path, key)) for key, value in values.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# --- YAML -------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML that reads 1e-3 as a number, as YAML 1.2 does, and refuses a repeated key instead of dropping the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for i, key in enumerate(keys):
            if key.value in [earlier.value for earlier in keys[:i]]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key.value}' comes twice", key.start_mark
                )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would take for numbers, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )
