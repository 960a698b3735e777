"""Reading compressed-tensors checkpoints that other tools wrote: which scheme a module has, and its codes.

The package matches targets against a running model: names, "re:" patterns, and classes of modules. A file has no
classes, and needs none: a module that has scales is quantized, so where no name and no pattern says how, the one group
that targets a class does. Codes themselves are read by `ct_tensors`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..numerics.maps import Hadamard, Kronecker, Map
from ..numerics.qtensor import QLayer
from .ct_tensors import PARTS, unpack_layer

METHOD = "compressed-tensors"
_CLASS = re.compile(r"[A-Za-z_]\w*")
"""A target that is no path of modules: the name of a class."""
_OLD = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask", "dense", "fakequant")
"""Formats that the package reads no more, or that hold no codes."""


def recognizes(config: Mapping[str, Any]) -> bool:
    """Whether a directory with this config.json holds compressed-tensors weights."""
    found = section(config)
    return found is not None and found.get("quant_method", METHOD) == METHOD and "config_groups" in found


def section(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What config.json says of quantization, where it does; old releases call it compression_config."""
    text = config.get("text_config") or {}
    for owner in (config, text):
        found = owner.get("quantization_config") or owner.get("compression_config")
        if found:
            return found.get("quantization_config", found)  # type: ignore[no-any-return]
    return None


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(quantized linears by module name, every other tensor) of whole modules' tensors, by their checkpoint names.

    Raises ValueError, in one sentence, for what lowbit does not compute as the package does.
    """
    quantization = section(config)
    assert quantization is not None, "ask recognizes first"
    check(quantization)
    version = released(quantization)
    rest, found = dict(tensors), {}
    for name in sorted({tensor.rpartition(".")[0] for tensor in tensors if tensor.endswith(".weight_scale")}):
        scheme = scheme_for(name, quantization)
        layer = unpack_layer(name, tensors, scheme, version)
        found[name] = replace(layer, input_map=input_map(name, layer.weight.shape[1], quantization))
        for part in (*PARTS, "weight"):
            rest.pop(f"{name}.{part}", None)
    return found, {name: tensor for name, tensor in rest.items() if not _is_transform(name, quantization)}


def check(quantization: Mapping[str, Any]) -> None:
    """Raise ValueError where the whole model is stored in a way that lowbit does not read."""
    form = quantization.get("format")
    sparse = (quantization.get("sparsity_config") or {}).get("format") or "dense"
    if form in _OLD or sparse != "dense":
        raise ValueError(
            f"lowbit does not read compressed-tensors of format {form if form in _OLD else sparse}, nor do current "
            "releases of the package: take the unquantized model"
        )
    if quantization.get("quantization_status", "compressed") != "compressed":
        raise ValueError(
            "the model's weights were saved before they were compressed: save it with save_compressed=True"
        )
    if quantization.get("kv_cache_scheme"):
        raise ValueError(
            "lowbit does not read a foreign model's quantized keys and values: remove kv_cache_scheme from config.json "
            "to read its weights alone"
        )
    for scheme in quantization["config_groups"].values():
        if not isinstance(scheme, Mapping):
            raise ValueError("config_groups names preset schemes, which their tool spells out: save the model again")
        if scheme.get("output_activations"):
            raise ValueError("lowbit has no quantized outputs of linears, which this model asks for: convert it again")


def released(quantization: Mapping[str, Any]) -> tuple[int, ...]:
    """The package's release that wrote the model; one that does not say is taken for an early one."""
    return tuple(int(part) for part in re.findall(r"\d+", str(quantization.get("version") or "0"))[:2])


# --- targets ----------------------------------------------------------------------------------------------------------


def scheme_for(name: str, quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """The scheme of a module that has scales: by its name, then by patterns, then by class, as the package ranks them.

    Raises ValueError where none applies, or nothing tells which.
    """
    groups: list[Mapping[str, Any]] = list(quantization["config_groups"].values())
    targets = {target: group for group in groups for target in group.get("targets", ())}
    for target in sorted(targets, key=lambda target: ("re:" in target, target)):
        if _matches(name, target):
            return targets[target]
    by_class = [group for group in groups if any(_CLASS.fullmatch(target) for target in group.get("targets", ()))]
    for choice in (by_class, groups):
        if choice and all(_same(choice[0], group) for group in choice):
            return choice[0]
    of_linears = [group for group in by_class if "Linear" in group["targets"]]
    if of_linears:
        return of_linears[0]
    raise ValueError(f"{name} has scales, and no target of config_groups says what they mean: check its config.json")


def _matches(name: str, target: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return name == target


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == other.get(key) for key in ("weights", "input_activations"))


# --- transforms -------------------------------------------------------------------------------------------------------


def _transforms(quantization: Mapping[str, Any]) -> Iterable[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """(name, scheme, place) of every transform that stays in the model; those of weights are in them already."""
    groups = (quantization.get("transform_config") or {}).get("config_groups") or {}
    for name, scheme in groups.items():
        for place in scheme.get("apply", ()):
            if place["location"] not in ("weight_input", "weight_output"):
                yield name, scheme, place


def input_map(name: str, columns: int, quantization: Mapping[str, Any]) -> Map | None:
    """The map that a linear's inputs pass. Raises ValueError for one that lowbit does not know, wherever it is."""
    found: Map | None = None
    for _, scheme, place in _transforms(quantization):
        if place["location"] != "input" or scheme["type"] != "hadamard" or scheme.get("randomize") or found:
            raise ValueError(
                f"lowbit does not read {scheme['type']} transforms at {place['location']}: convert the model without"
            )
        targets = place["targets"] if isinstance(place["targets"], list) else [place["targets"]]
        here = any(_matches(name, target) or target == "Linear" for target in targets)
        if here and not any(_matches(name, target) for target in place.get("ignore", ())):
            size = scheme.get("head_dim") or columns
            whole = Hadamard(size)  # Sylvester's matrix is its own transpose, so that inverse or not is the same
            found = whole if size == columns else Kronecker(None, whole.matrix().float(), (columns // size, size))
    return found


def _is_transform(name: str, quantization: Mapping[str, Any]) -> bool:
    """Whether a tensor is the matrix of a transform, which is known without it."""
    places = {f"{group}_{place['location']}" for group, _, place in _transforms(quantization)}
    return bool(places) and any(part in places for part in name.split("."))
