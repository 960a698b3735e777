"""hf_quant_config.json as ModelOpt writes it, and the same in the words of config.json; both are read by somebody.

TensorRT-LLM reads the file, vLLM and SGLang the `quantization_config` of config.json, which spells lists and caches
otherwise and adds groups in the manner of compressed-tensors for some algorithms. Fields follow nvidia-modelopt 0.47,
whose converter from the one to the other the tests hold this file to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

VERSION = "0.47.0"
"""The ModelOpt release whose layouts and fields are written; clients look for its name, not for lowbit's."""
AWQ = ("W4A16_AWQ", "W4A8_AWQ")
"""Algorithms of int4 codes in groups, which need not have been found by AWQ."""
MIXED = "MIXED_PRECISION"

_FP8 = {"dynamic": False, "num_bits": 8, "type": "float"}


def settings_in(algo: str, group: int) -> dict[str, Any]:
    """What is said of a linear, `group` being its columns with one scale."""
    if algo in AWQ:
        return {"quant_algo": algo, "group_size": group, "has_zero_point": False, "pre_quant_scale": True}
    return {"quant_algo": algo, "group_size": 16} if "NVFP4" in algo else {"quant_algo": algo}


def of_experts(settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """What to say of a mixture's experts among linears of these settings by name."""
    if any(".experts." in name and "PER_CHANNEL" in given["quant_algo"] for name, given in settings.items()):
        return ("vLLM reads a scale per row into no expert of a ModelOpt checkpoint: for it use compressed-tensors",)
    return ()


def quantization(settings: Mapping[str, Mapping[str, Any]], exclude: Sequence[str], cached: bool) -> dict[str, Any]:
    """hf_quant_config.json for linears of these settings by name; `exclude` names those that are not quantized."""
    every = list(settings.values())
    whole: dict[str, Any] = {"kv_cache_quant_algo": "FP8" if cached else None, "exclude_modules": list(exclude)}
    if all(given == every[0] for given in every):
        whole |= every[0]
    else:
        whole |= {"quant_algo": MIXED, "quantized_layers": {name: dict(settings[name]) for name in sorted(settings)}}
    return {"producer": {"name": "modelopt", "version": VERSION}, "quantization": whole}


def mirrored(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The `quantization_config` of config.json that says what `quantization` has said."""
    given = whole["quantization"]
    found = {
        "quant_method": "modelopt",
        "quant_algo": given["quant_algo"],
        "ignore": given["exclude_modules"],
        "producer": whole["producer"],
    }
    if given["kv_cache_quant_algo"] is not None:
        found["kv_cache_scheme"] = dict(_FP8)
    if "group_size" in given:
        found["group_size"] = given["group_size"]
    if given["quant_algo"] == MIXED:
        layers: Mapping[str, Mapping[str, Any]] = given["quantized_layers"]
        every = list(layers.values())
        kinds = [kind for index, kind in enumerate(every) if kind not in every[:index]]
        found["quantized_layers"] = layers
        found["config_groups"] = {
            f"group_{index}": {**_group(kind), "targets": sorted(name for name in layers if layers[name] == kind)}
            for index, kind in enumerate(kinds)
        }
    elif given["quant_algo"] in ("FP8", "NVFP4", "W4A16_NVFP4"):
        found["config_groups"] = {"group_0": {**_group(given), "targets": ["Linear"]}}
    return found


def _group(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Formats of weights and inputs as compressed-tensors names them."""
    algo = settings["quant_algo"]
    if algo == "FP8":
        return {"input_activations": dict(_FP8), "weights": dict(_FP8)}
    if algo == "FP8_PER_CHANNEL_PER_TOKEN":
        return {"input_activations": dict(_FP8), "weights": {**_FP8, "strategy": "channel"}}
    size = settings["group_size"]
    if algo == "W4A16_AWQ":
        return {"weights": {"dynamic": False, "num_bits": 4, "type": "int", "group_size": size}}
    four = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": size}
    if algo == "W4A16_NVFP4":
        return {"weights": four}
    return {"input_activations": {**four, "num_bits": 8 if algo == "W4A8_AWQ" else 4}, "weights": dict(four)}


def algorithm_in(config: Mapping[str, Any], module: str) -> str | None:
    """What a checkpoint's configuration says of a linear by its name; None where it says nothing."""
    stated = config.get("hf_quant_config") or config["quantization_config"]
    stated = stated.get("quantization", stated)
    if stated["quant_algo"] != MIXED:
        return str(stated["quant_algo"]).upper()
    found = stated["quantized_layers"].get(module)
    return None if found is None else str(found["quant_algo"]).upper()
