"""compressed-tensors: what vLLM and transformers read. All of it is spelled from stored codes; nothing is rounded here.

A scheme (a plain dictionary, as it stands in config.json) says what a layer's tensors mean, so that `pack` and `unpack`
need nothing else and work on the meta device. Layouts and fields follow compressed-tensors 0.20:

    pack-quantized   integer codes + 2^(b-1), as one little-endian bit stream per row in int32 words; zero-points
                     likewise, but packed down the rows
    int-quantized    8-bit integer codes as int8, where inputs are int8 as well
    float-quantized  E4M3 codes as float8; naive-quantized is the same without quantized inputs

The package itself is not imported: it would only be asked to round weights that are codes already. Tests hold this file
to its reader. Shape letters: O output rows, I input columns, G groups of columns, W 32-bit words.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ..numerics import bits
from ..numerics.grid import Grid
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.spec import E4M3, PLAIN, Int, Number, ScaleDtype, Spec, per_channel, per_group, per_tensor, per_token
from .base import CACHED, Names, copy_companions, module_names, new_directory, read, read_config, shards, unchanged
from .files import write_index, write_json, write_shard

VERSION = "0.20.0"
"""The compressed-tensors release whose layouts and configuration fields are written."""

_SCALES: dict[torch.dtype, ScaleDtype] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_DTYPES = {name: dtype for dtype, name in _SCALES.items()}

MAPPED = (
    "compressed-tensors export carries no online maps of a linear's inputs: use native, or merge all rotations "
    "(quarot.across=false and quarot.down=false, or spinquant.merged=true)"
)
SUMMED = "compressed-tensors cannot carry a weight that is a sum of parts: use native, or a recipe without corrections"
NOT_LINEAR = "compressed-tensors knows Linear modules only: use native"

Scheme = dict[str, Any]
"""One entry of `config_groups` without its targets."""


# --- what the format can carry ----------------------------------------------------------------------------------------


def refuse(
    weights: Spec | None,
    activation: Spec | None,
    *,
    transposed: bool = False,
    ordered: bool = False,
    mapped: bool = False,
) -> str | None:
    """Why the format cannot carry a layer of these formats (None: 16 bits), with advice, or None if it can.

    `transposed`: the module stores [I, O] (GPT-2's Conv1D). `ordered`: groups follow another order of the columns.
    `mapped`: inputs pass an online map.
    """
    if mapped:
        return MAPPED
    assert weights is not None, "layers of 16 bits are no matter of the format unless their inputs are mapped"
    if transposed:
        return NOT_LINEAR
    if ordered:
        return "compressed-tensors has dropped group indices (g_idx): use gptq.groups=static, or no act_order"
    return _refuse_weights(weights, activation) or _refuse_activation(weights, activation)


def refuse_whole(*, cached: bool, corrected: bool) -> str | None:
    """Why the format cannot carry a model with a quantized cache, or with corrections of weights, or None if it can."""
    if cached:
        return CACHED
    return SUMMED if corrected else None


def _refuse_weights(spec: Spec, activation: Spec | None) -> str | None:
    number = spec.number
    if not isinstance(number, Int) and number != E4M3:
        return f"compressed-tensors export carries E4M3 float weights, not {number}: use fp8"
    if spec.scale not in PLAIN:
        return f"compressed-tensors export carries plain floating-point scales, not {spec.scale}: use native, or half"
    if isinstance(number, Int) and number.rule == "asymmetric-deepspeed":
        return "compressed-tensors cannot hold the unbounded zero-points of asymmetric-deepspeed: use asymmetric"
    if spec.block[0] != 1 and spec.block != (-1, -1):
        return (
            f"compressed-tensors export has one scale per tensor, row or group of a row, not {spec}: use one of these"
        )
    if spec.block == (-1, -1) and _format_name(spec, activation) == "pack-quantized":
        return "compressed-tensors clients read packed integers with a scale per row or group only: use one of these"
    return None


def _refuse_activation(weights: Spec, spec: Spec | None) -> str | None:
    if spec is None:
        return None
    number = spec.number
    if isinstance(number, Int) != isinstance(weights.number, Int):
        return f"no compressed-tensors client multiplies {weights.number} by {number}: use one kind for both"
    if spec.bits != 8 or (not isinstance(number, Int) and number != E4M3):
        return f"compressed-tensors clients read int8 and E4M3 activations, not {number}: use 8 or 16 bits"
    if spec.block != ((1, -1) if spec.dynamic else (-1, -1)):
        return (
            f"compressed-tensors activations are dynamic per token or static per tensor, not {spec}: use one of these"
        )
    if spec.scale not in PLAIN:
        return f"compressed-tensors activations have plain floating-point scales, not {spec.scale}: use float32"
    if isinstance(number, Int) and not number.signed:
        return "compressed-tensors clients add an activation's zero-point before rounding, lowbit after: use symmetric"
    if isinstance(number, Int) and spec.dynamic and number.rule != "symmetric":
        return f"compressed-tensors clients find ranges by the symmetric rule, not {number.rule}: use symmetric"
    if spec.dynamic and spec.scale != "float32":
        return f"compressed-tensors clients do not round dynamic scales to {spec.scale}: use float32"
    return None


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of clients that read such a layer differently, or not at all (vLLM 0.32)."""
    number, found = weights.number, []
    if _format_name(weights, activation) == "pack-quantized":
        if not _symmetric(number):
            found.append("transformers 5.23 cannot read asymmetric packed weights; 5.22 and vLLM can")
        if 32 % weights.bits:
            found.append(
                f"compressed-tensors packs {weights.bits}-bit weights this way since 0.18: older ones cannot read"
            )
        if weights.bits == 1:
            found.append("vLLM reads packed weights of 2 to 8 bits, not 1; transformers reads them")
        elif activation is not None and not activation.dynamic:
            found.append(f"vLLM has no kernel for {weights.bits}-bit weights with static inputs, transformers does")
        elif activation is not None or weights.bits != 4:
            kind = "" if activation is None else " with 8-bit inputs"
            found.append(f"vLLM runs packed {weights.bits}-bit weights{kind} on GPUs only; transformers reads them")
        if weights.scale != "half":
            found.append(f"clients round the {weights.scale} scales of packed weights to their own dtype: use half")
    elif weights.group != -1 or not _symmetric(number):
        found.append("vLLM has no kernel for 8-bit weights like these, grouped or asymmetric; transformers reads them")
    if isinstance(number, Int) and activation is not None and activation.dynamic:
        found.append("vLLM's int8 kernel divides a token's range by 127, lowbit and compressed-tensors by 127.5")
    return tuple(found)


def _symmetric(number: Number) -> bool:
    return not isinstance(number, Int) or number.symmetric


# --- schemes ----------------------------------------------------------------------------------------------------------


def scheme_of(layer: QLayer) -> Scheme:
    """What config.json says of a layer. Raises ValueError where the format cannot carry it."""
    if layer.input_map is not None:
        raise ValueError(MAPPED)
    if len(layer.weight.parts) != 1 or layer.weight.low_rank is not None or layer.weight.dense is not None:
        raise ValueError(SUMMED)
    if layer.input_clip is not None:
        raise ValueError("compressed-tensors has no clips of inputs: use native, or a recipe that does not learn them")
    part = layer.weight.parts[0]
    spec = part.grid.spec
    reason = refuse(spec, layer.activation, ordered=part.order is not None)
    if reason is not None:
        raise ValueError(reason)
    inputs = None
    if layer.activation is not None:
        inputs = _arguments(layer.activation, "token" if layer.activation.dynamic else "tensor")
    return {
        "format": _format_name(spec, layer.activation),
        "weights": _arguments(spec, *_strategy(spec, part.shape[-1])),
        "input_activations": inputs,
        "output_activations": None,
    }


def _strategy(spec: Spec, columns: int) -> tuple[str, int | None]:
    """(strategy, group size) of a weight with that many columns."""
    if spec.block == (-1, -1):
        return "tensor", None
    return ("channel", None) if spec.group == -1 or spec.group > columns else ("group", spec.group)


def _format_name(weights: Spec, activation: Spec | None) -> str:
    if not isinstance(weights.number, Int):
        return "naive-quantized" if activation is None else "float-quantized"
    return "pack-quantized" if activation is None or weights.bits < 8 else "int-quantized"


def _arguments(spec: Spec, strategy: str, group: int | None = None) -> dict[str, Any]:
    """The fields of a `QuantizationArgs`; those left out have the defaults that every release agrees on."""
    return {
        "num_bits": spec.bits,
        "type": "int" if isinstance(spec.number, Int) else "float",
        "symmetric": _symmetric(spec.number),
        "strategy": strategy,
        "group_size": group,
        "dynamic": spec.dynamic,
    }


def _spec(arguments: Mapping[str, Any], scale: ScaleDtype) -> Spec:
    """The number format that a scheme's arguments describe."""
    number: Number = E4M3
    if arguments["type"] == "int":
        number = Int(arguments["num_bits"], "symmetric" if arguments["symmetric"] else "asymmetric")
    strategy = arguments["strategy"]
    if strategy == "token":
        return per_token(number, dynamic=True)
    if strategy == "tensor":
        return per_tensor(number, scale=scale, dynamic=arguments["dynamic"])
    if strategy == "channel":
        return per_channel(number, scale=scale)
    if strategy == "group":
        return per_group(number, arguments["group_size"], scale=scale)
    raise ValueError(f"lowbit does not read compressed-tensors weights of strategy {strategy!r}")


def quantization_config(schemes: Mapping[str, Scheme], ignore: Collection[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json for layers of these schemes, by checkpoint name of the module.

    `ignore` names every other module that a client may take for a linear. One scheme targets the class Linear; of
    several, each targets its modules by name, a mixture's experts first, which is where transformers looks for them.
    """
    groups: list[tuple[Scheme, list[str]]] = []
    for name, scheme in sorted(schemes.items(), key=lambda item: not _in_experts(item[0])):
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
        "kv_cache_scheme": None,
        "moe_sparsity_config": None,
        "sparsity_config": {},
        "transform_config": {},
    }


# --- tensors ----------------------------------------------------------------------------------------------------------


def pack(name: str, layer: QLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear, `name` being its module; scales that suit any dtype take the model's `dtype`.

    Raises ValueError where the format cannot carry the layer.
    """
    scheme, part = scheme_of(layer), layer.weight.parts[0]
    grid, number = part.grid, part.grid.spec.number
    packed, strategy = scheme["format"] == "pack-quantized", scheme["weights"]["strategy"]
    tensors = {"weight_scale": _store(grid, strategy, dtype)}
    if not isinstance(number, Int):
        tensors["weight"] = part.codes.view(torch.float8_e4m3fn)
    elif packed:
        tensors["weight_packed"] = _to_words(
            _shift(part.codes, number.bits) if number.signed else part.codes, number.bits
        )
        tensors["weight_shape"] = torch.tensor(part.shape)
    else:
        tensors["weight"] = part.codes if number.signed else _shift(part.codes, number.bits)
    if not scheme["weights"]["symmetric"]:
        assert grid.zero is not None
        zero = grid.zero.to(torch.uint8)
        tensors["weight_zero_point"] = _to_words(zero.T, number.bits).T if packed else _shift(zero, number.bits)
        if strategy == "tensor":
            tensors["weight_zero_point"] = tensors["weight_zero_point"].reshape(1)
    if layer.input_grid is not None:
        tensors["input_scale"] = _store(layer.input_grid, "tensor", dtype)
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> QLayer:
    """The inverse of `pack`: codes, scales and zero-points bit for bit, described in the scheme's own terms."""
    scale, zero = tensors[f"{name}.weight_scale"], tensors.get(f"{name}.weight_zero_point")
    spec = _spec(scheme["weights"], _SCALES[scale.dtype])
    if scheme["format"] == "pack-quantized":
        rows, columns = tensors[f"{name}.weight_shape"].tolist()
        codes = _from_words(tensors[f"{name}.weight_packed"], spec.bits, columns)
        codes = _shift(codes, spec.bits) if scheme["weights"]["symmetric"] else codes
        zero = None if zero is None else _from_words(zero.T, spec.bits, rows).T
    elif not isinstance(spec.number, Int):
        codes = tensors[f"{name}.weight"].view(torch.uint8)
    else:
        codes = tensors[f"{name}.weight"]
        codes = codes if scheme["weights"]["symmetric"] else _shift(codes, spec.bits)
        zero = None if zero is None else _shift(zero, spec.bits).reshape(-1, scale.shape[-1])
    grid = Grid(spec, scale.float().reshape(-1, scale.shape[-1]), None if zero is None else zero.float())
    weight = QWeight((QTensor(codes, grid),))
    if scheme["input_activations"] is None:
        return QLayer(weight)
    given = tensors.get(f"{name}.input_scale")
    activation = _spec(scheme["input_activations"], "float32" if given is None else _SCALES[given.dtype])
    return QLayer(weight, activation, None if given is None else Grid(activation, given.float().reshape(1, 1)))


def _store(grid: Grid, strategy: str, dtype: torch.dtype) -> Tensor:
    """A grid's scales in the dtype that holds them exactly, [1] where there is one for the whole tensor."""
    scale = grid.scale.to(_DTYPES.get(grid.spec.scale, dtype))
    return scale.reshape(1) if strategy == "tensor" else scale


def _shift(codes: Tensor, width: int) -> Tensor:
    """Signed codes q (int8) as unsigned q + 2^(b-1) (uint8), and unsigned ones as signed."""
    half = 1 << (width - 1)
    return codes.view(torch.uint8) + half if codes.dtype == torch.int8 else (codes - half).view(torch.int8)


def _to_words(codes: Tensor, width: int) -> Tensor:
    """Unsigned codes [..., n] as int32 [..., W] of one bit stream per row, W = ceil(n b/32)."""
    words = -(-codes.shape[-1] * width // 32)
    packed = bits.pack(codes.contiguous(), width)
    return pad(packed, (0, 4 * words - packed.shape[-1])).contiguous().view(torch.int32)


def _from_words(words: Tensor, width: int, length: int) -> Tensor:
    """The inverse of `_to_words`: uint8 [..., length]."""
    packed = words.contiguous().view(torch.uint8)
    size = bits.packed_length(length, width)
    return bits.unpack(pad(packed, (0, size - packed.shape[-1])), width, length, signed=False)


# --- a whole model ----------------------------------------------------------------------------------------------------


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as a compressed-tensors model into the new directory `target`.

    `skeleton` is the model without weights (parameters on meta, experts unfused): it tells which modules are linears.
    `names` gives the clients' names of a parameter, by which a mixture's fused gate and up projections are split.
    Returns what a user should know of clients. Raises ValueError where the format cannot carry some layer.
    """
    dtype = next(parameter.dtype for parameter in skeleton.parameters() if parameter.is_floating_point())
    schemes: dict[str, Scheme] = {}
    quantized: set[str] = set()
    told: dict[str, None] = {}
    with new_directory(target) as directory:
        files = shards(source)
        for index, file in enumerate(files):
            layers, tensors = read(file, names)
            for name, (path, layer) in layers.items():
                _check_linear(path, skeleton)
                tensors.update(pack(name, layer, dtype))
                quantized.add(path)
                schemes.update(dict.fromkeys(_labels(name, path), scheme_of(layer)))
                told.update(dict.fromkeys(_remarks(name, layer)))
            write_shard(directory / f"model-{index + 1:05d}-of-{len(files):05d}.safetensors", tensors)
        if not schemes:
            raise ValueError(f"no linear of {source} is quantized: export needs a run with quantized weights")
        write_index(directory, (file.name for file in directory.glob("*.safetensors")))
        copy_companions(source, directory)
        config = quantization_config(schemes, ignored(skeleton, quantized, names))
        write_json(directory / "config.json", {**read_config(source), "quantization_config": config})
    return tuple(told)


def ignored(skeleton: nn.Module, quantized: Collection[str], names: Names = unchanged) -> list[str]:
    """Every module with a matrix for a weight that is neither an embedding nor quantized: linears, heads, routers.

    Routers are no Linear in transformers, but they are in vLLM.
    """
    found: set[str] = set()
    for path, module in skeleton.named_modules():
        weight = module._parameters.get("weight")
        if weight is None or weight.dim() != 2 or path in quantized or isinstance(module, nn.Embedding):
            continue
        for name, _ in module_names(path, names):
            found.update(_labels(name, path) if isinstance(module, nn.Linear) else (name,))
    return sorted(found)


def _labels(name: str, path: str) -> tuple[str, ...]:
    """The names by which clients look a linear up: as in the checkpoint, and as in transformers' own tree."""
    return (name,) if name == path or _in_experts(path) else (name, path)


def _in_experts(path: str) -> bool:
    return ".experts." in path


def _check_linear(path: str, skeleton: nn.Module) -> None:
    module = skeleton.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{path} is a {type(module).__name__}, and {NOT_LINEAR}")


def _remarks(name: str, layer: QLayer) -> tuple[str, ...]:
    """The notices of a layer, with those that depend on its shape and place."""
    spec, found = layer.weight.parts[0].grid.spec, []
    form = _format_name(spec, layer.activation)
    if form == "int-quantized" and _in_experts(name):
        found.append("transformers 5.23 cannot read a mixture's int8 experts; vLLM can")
    if form == "pack-quantized" and any(size % 32 for size in layer.weight.shape):
        found.append("vLLM's CPU kernel for packed weights needs rows and columns in multiples of 32, unlike some here")
    return (*notices(spec, layer.activation), *found)
