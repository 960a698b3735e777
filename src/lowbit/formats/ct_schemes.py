"""How compressed-tensors' config.json describes a layer, and lowbit's formats of the same: data both ways.

A scheme is a plain dictionary, as it stands in `config_groups` without its targets. What is written has the fields that
compressed-tensors 0.20 writes. What is read may come from any release and from people: fields that are missing take the
package's defaults, and a scheme's own format is not needed, since its tensors say it (`ct_tensors`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..numerics.kv import KV
from ..numerics.maps import Hadamard
from ..numerics.spec import (
    E2M1,
    E2M3,
    E4M3,
    Int,
    Number,
    ScaleDtype,
    Spec,
    mx,
    nvfp4,
    per_channel,
    per_group,
    per_tensor,
    per_token,
)

VERSION = "0.20.0"
"""The compressed-tensors release whose layouts and configuration fields are written."""

Scheme = dict[str, Any]
"""One entry of `config_groups` without its targets."""

_SMALL: dict[int, Number] = {4: E2M1, 6: E2M3, 8: E4M3}
"""Floats by their bits: there is one of every width."""
_SHARED = {E2M1: "mxfp4-pack-quantized", E2M3: "mxfp6-pack-quantized", E4M3: "mxfp8-quantized"}
"""Formats of one exponent for 32 columns."""
NVFP4 = "nvfp4-pack-quantized"
PACKED = "pack-quantized"


def has_exponents(spec: Spec) -> bool:
    """Whether scales are powers of two, stored as exponents."""
    return spec.scale.startswith("e8m0")


def is_local(spec: Spec) -> bool:
    """Whether inputs have a calibrated scale of the tensor and find one for every group when they come (NVFP4)."""
    return spec.scale == "e4m3" and not spec.dynamic


def is_symmetric(number: Number) -> bool:
    return not isinstance(number, Int) or number.symmetric


def format_name(weights: Spec, activation: Spec | None) -> str:
    """How the tensors of a layer of these formats lie in a file."""
    number = weights.number
    if weights.scale == "e4m3":
        return NVFP4
    if has_exponents(weights):
        return _SHARED[number]  # type: ignore[index]
    if not isinstance(number, Int):
        return "naive-quantized" if activation is None else "float-quantized"
    return PACKED if activation is None or number.bits < 8 else "int-quantized"


# --- writing ----------------------------------------------------------------------------------------------------------


def scheme_of_formats(weights: Spec, activation: Spec | None, shape: tuple[int, int]) -> Scheme:
    """What config.json says of a layer [O, I] of these formats, which `ct_limits.refuse` has nothing against."""
    return {
        "format": format_name(weights, activation),
        "weights": _of_weights(weights, shape[1]),
        "input_activations": None if activation is None else _of_inputs(activation),
        "output_activations": None,
    }


def _of_weights(spec: Spec, columns: int) -> dict[str, Any]:
    if spec.square:
        return _arguments(spec, "block") | {"block_structure": list(spec.block)}
    if spec.block == (-1, -1):
        return _arguments(spec, "tensor")
    if spec.scale == "e4m3":
        return _arguments(spec, "tensor_group", spec.group)
    if spec.group == -1 or spec.group > columns:
        return _arguments(spec, "channel")
    return _arguments(spec, "group", spec.group)


def _of_inputs(spec: Spec) -> dict[str, Any]:
    if is_local(spec):
        return _arguments(spec, "tensor_group", spec.group) | {"dynamic": "local"}
    if spec.block[1] != -1:
        return _arguments(spec, "group", spec.group)
    return _arguments(spec, "token" if spec.block[0] == 1 else "tensor")


def _arguments(spec: Spec, strategy: str, group: int | None = None) -> dict[str, Any]:
    """The fields of a `QuantizationArgs`; those left out have the defaults that every release agrees on."""
    fields: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int" if isinstance(spec.number, Int) else "float",
        "symmetric": is_symmetric(spec.number),
        "strategy": strategy,
        "group_size": group,
        "dynamic": spec.dynamic,
    }
    if has_exponents(spec):
        fields["scale_dtype"] = "torch.uint8"
    elif spec.scale == "e4m3":
        fields["scale_dtype"] = "torch.float8_e4m3fn"
    return fields


def cache_scheme(kv: KV) -> dict[str, Any]:
    """What `kv_cache_scheme` says of a cache that `ct_limits.refuse_cache` has nothing against."""
    assert kv.keys is not None
    return {
        "num_bits": kv.keys,
        "type": "float" if kv.rule == "e4m3" else "int",
        "symmetric": True,
        "strategy": "tensor" if kv.layout == "tensor" else "attn_head",
        "group_size": None,
        "dynamic": False,
    }


def transform_config(mapped: Mapping[str, Hadamard]) -> dict[str, Any]:
    """The entry for online Hadamard maps of inputs, by the clients' names of the modules in front of which they stand.

    Weights are those for mapped inputs already, so that only the half at the input is described.
    """
    if not mapped:
        return {}
    entry = {"targets": sorted(mapped), "location": "input", "inverse": False, "ignore": []}
    scheme = {
        "type": "hadamard",
        "apply": [entry],
        "randomize": False,
        "requires_grad": False,
        "head_dim": None,
        "precision": "torch.float32",
    }
    return {"config_groups": {"R4": scheme}}


def quantization_config(
    schemes: Mapping[str, Scheme],
    ignore: Collection[str],
    *,
    cache: Mapping[str, Any] | None = None,
    transforms: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The `quantization_config` of config.json for layers of these schemes, by checkpoint name of the module.

    `ignore` names every other module that a client may take for a linear. One scheme targets the class Linear; of
    several, each targets its modules by name, a mixture's experts first, which is where transformers looks for them.
    """
    groups: list[tuple[Scheme, list[str]]] = []
    for name, scheme in sorted(schemes.items(), key=lambda item: not in_experts(item[0])):
        for other, members in groups:
            if other == scheme:
                members.append(name)
                break
        else:
            groups.append((scheme, [name]))
    formats = {scheme["format"] for scheme, _ in groups}
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "config_groups": {
            f"group_{index}": {"targets": ["Linear"] if len(groups) == 1 else members, **scheme}
            for index, (scheme, members) in enumerate(groups)
        },
        "ignore": sorted(ignore),
        "kv_cache_scheme": cache,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": dict(transforms or {}),
    }


def in_experts(path: str) -> bool:
    """Whether a module belongs to one expert of a mixture."""
    return ".experts." in path


# --- reading ----------------------------------------------------------------------------------------------------------


def completed(arguments: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A `QuantizationArgs` with the package's defaults in the places of missing fields; None where there is none."""
    if arguments is None:
        return None
    found: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "dynamic": False}
    found.update((key, value) for key, value in arguments.items() if value is not None)
    found["type"] = str(found["type"]).lower()
    if found.get("strategy") is None:
        group = found["group_size"]
        found["strategy"] = "tensor" if group is None else "channel" if group == -1 else "group"
    found["strategy"] = str(found["strategy"]).lower()
    structure = found.get("block_structure")
    if isinstance(structure, str):
        found["block_structure"] = [int(size) for size in structure.split("x")]
    return found


def number_of(arguments: Mapping[str, Any]) -> Number:
    """The numbers that complete arguments describe. Raises ValueError for those that lowbit does not know."""
    bits = arguments["num_bits"]
    if arguments["type"] == "int" and 1 <= bits <= 8:
        return Int(bits, "symmetric" if arguments["symmetric"] else "asymmetric")
    if arguments["type"] != "float" or bits not in _SMALL or not arguments["symmetric"]:
        kind = f"{'' if arguments['symmetric'] else 'asymmetric '}{arguments['type']}{bits}"
        raise ValueError(f"lowbit does not read compressed-tensors numbers of type {kind}: convert the model again")
    return _SMALL[bits]


def weight_spec(arguments: Mapping[str, Any], scale: ScaleDtype) -> Spec:
    """The format of a weight whose scales are stored as `scale`. Raises ValueError for a strategy of no weight."""
    number, strategy = number_of(arguments), arguments["strategy"]
    if strategy == "tensor":
        return per_tensor(number, scale=scale)
    if strategy == "channel":
        return per_channel(number, scale=scale)
    if strategy in ("group", "tensor_group"):
        return per_group(number, arguments["group_size"], scale=scale)
    if strategy == "block":
        rows, columns = arguments["block_structure"]
        return Spec(number, (rows, columns), scale)
    raise ValueError(f"lowbit does not read compressed-tensors weights of strategy {strategy!r}")


def input_spec(arguments: Mapping[str, Any], scale: ScaleDtype) -> Spec:
    """The format of inputs; `scale` is how a static range is stored. Raises ValueError for what lowbit lacks."""
    number, strategy, dynamic = number_of(arguments), arguments["strategy"], arguments["dynamic"]
    if strategy == "tensor_group" and dynamic == "local" and (number, arguments["group_size"]) == (E2M1, 16):
        return nvfp4()
    if strategy == "token" and dynamic is True:
        return per_token(number)
    if strategy == "tensor":
        return per_tensor(number, scale="float32" if dynamic else scale, dynamic=bool(dynamic))
    if strategy == "group" and dynamic is True:
        if "uint8" in str(arguments.get("scale_dtype")) and arguments["group_size"] == 32:
            return _shared_inputs(number)
        return Spec(number, (1, arguments["group_size"]), "float32", dynamic=True)
    kind = "dynamic" if dynamic else "static"
    raise ValueError(f"lowbit does not read {kind} compressed-tensors inputs of strategy {strategy!r}")


def _shared_inputs(number: Number) -> Spec:
    """Inputs with one exponent for 32 columns, whose largest value clients round to two significant bits first."""
    if number == E4M3:
        raise ValueError(
            "lowbit has no inputs of MXFP8 as compressed-tensors rounds their scales (to E2M1's two significant "
            "bits): remove input_activations from config.json to read the weights alone"
        )
    return mx(number, scale="e8m0-even", dynamic=True)
