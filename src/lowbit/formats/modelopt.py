"""ModelOpt's unified checkpoint, which TensorRT-LLM, vLLM and SGLang serve on NVIDIA's GPUs, from stored codes.

What a linear is called (`quant_algo`) says what its tensors mean:

    FP8                        weight E4M3 [O, I], weight_scale and input_scale (static), one number each
    FP8_PER_CHANNEL_PER_TOKEN  weight E4M3 [O, I], weight_scale [O]; inputs are dynamic
    W4A16_AWQ                  weight bytes [O/2, I] of two int4 codes, even rows in low halves; weight_scale [O, G]
    W4A8_AWQ                   the same with input_scale (E4M3); clients divide weight_scale by weight_scale_2
    NVFP4, W4A16_NVFP4         weight bytes [O, I/2] of two E2M1 codes; weight_scale E4M3 [O, I/16]; weight_scale_2, one
                               number; NVFP4 has input_scale, one number, and finds the rest as inputs come

All but E4M3 is fp32. AWQ's own scale of inputs, pre_quant_scale, is folded away here: TensorRT-LLM insists on the
tensor, so it is all ones. weight_scale_2 of W4A8 only has to bring weights into the range of E4M3; as a power of two it
leaves weight_scale exact, and linears that TensorRT-LLM joins share it. What is said of the model stands in
hf_quant_config.json, and once more, in other words, in config.json. Layouts follow nvidia-modelopt 0.47.

Shape letters: O output rows, I input columns, G groups of columns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import bits
from ..numerics.grid import Grid
from ..numerics.kv import KV
from ..numerics.qtensor import QAttention, QLayer, QTensor, QWeight
from ..numerics.scales import narrowest, scale_codes, scale_values
from ..numerics.spec import E4M3, PLAIN, Int, Spec, nvfp4, per_channel, per_group, per_tensor, per_token
from . import native
from .base import Names, copy_companions, module_names, new_directory, read_config, rows, shards, unchanged
from .compressed_tensors import ignored
from .files import read_shard, shard_header, write_index, write_json, write_shard
from .grouped import FUSED
from .modelopt_config import AWQ, algorithm_in, mirrored, of_experts, quantization, settings_in

CLIENTS = ("vllm",)

SUMMED = (
    "ModelOpt checkpoints cannot carry a weight that is a sum of parts: use native, or a recipe without corrections"
)
MAPPED = (
    "ModelOpt checkpoints carry no online maps of a linear's inputs: use native, or merge all rotations "
    "(spinquant.merged=true)"
)
CACHE = (
    "ModelOpt checkpoints carry caches of E4M3 with a scale per tensor: set layout tensor and rule e4m3 for the cache"
)

KINDS = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
"""The tensors of a quantized linear."""
_GROUPS = (64, 128)
"""Groups of columns that TensorRT-LLM's kernels for int4 weights know."""


# --- what the format can carry ----------------------------------------------------------------------------------------


def algorithm(weights: Spec, activation: Spec | None) -> str | None:
    """ModelOpt's name of these formats, None where it has none."""
    number, eight = weights.number, None if activation is None else _eight_bits(activation)
    if number == E4M3 and weights.scale in PLAIN:
        if weights.block == (-1, -1) and eight == "static":
            return "FP8"
        return "FP8_PER_CHANNEL_PER_TOKEN" if weights.block == (1, -1) and eight == "dynamic" else None
    if weights == nvfp4():
        static = activation is not None and replace(activation, dynamic=True) == nvfp4(dynamic=True)
        if activation is None:
            return "W4A16_NVFP4"
        return "NVFP4" if static and not activation.dynamic else None
    whole = isinstance(number, Int) and number.bits == 4 and number.symmetric
    if whole and weights.block[0] == 1 and weights.group > 0 and weights.scale in PLAIN:
        if activation is None:
            return "W4A16_AWQ"
        return "W4A8_AWQ" if eight == "static" else None
    return None


def _eight_bits(spec: Spec) -> str | None:
    """What kind of E4M3 inputs these are, None for others."""
    if spec.number != E4M3 or spec.scale not in PLAIN:
        return None
    if spec.dynamic:
        return "dynamic" if spec.block == (1, -1) and spec.scale == "float32" else None
    return "static" if spec.block == (-1, -1) else None


def refuse(
    weights: Spec | None,
    activation: Spec | None,
    *,
    shape: tuple[int, int] | None = None,
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
        return "ModelOpt checkpoints hold Linear modules only: use native"
    if ordered:
        return "ModelOpt groups the columns in their natural order: use gptq.groups=static, or no act_order"
    algo = algorithm(weights, activation)
    if algo is None:
        return _advice(weights, activation)
    if algo in AWQ and shape is not None and shape[0] % 2:
        return f"ModelOpt packs int4 weights two rows to a byte, and there are {shape[0]}: --ignore such layers"
    if algo in AWQ and shape is not None and weights.group >= shape[1]:
        return (
            f"ModelOpt has one group size for a model, and {shape[1]} columns are less than {weights.group}: use -g64"
        )
    return None


def _advice(weights: Spec, activation: Spec | None) -> str:
    """What to use instead of formats that ModelOpt has no name for."""
    inputs = "16-bit" if activation is None else str(activation)
    said = f"ModelOpt has no checkpoint of {weights} weights with {inputs} inputs"
    if weights.scale == "e4m3":
        return f"{said}: clients need a calibrated tensor scale of NVFP4 inputs, use nvfp4-static, or nvfp4a16"
    if weights.number == E4M3:
        return f"{said}: use fp8 (rows and tokens have scales), or a scale per tensor for both and static inputs"
    if isinstance(weights.number, Int) and weights.bits == 4:
        return f"{said}: use symmetric weights in groups, as w4a16-g128, or w4afp8-g128-static"
    return f"{said}: use fp8, nvfp4-static, nvfp4a16, w4a16-g128 or w4afp8-g128-static"


def refuse_whole(*, kv: KV | None, corrected: bool) -> str | None:
    """Why the format cannot carry a model with such a cache, or with corrections of weights, or None if it can."""
    if kv is not None and (kv.rule != "e4m3" or kv.layout != "tensor" or not kv.keys == kv.values == 8):
        return CACHE
    return SUMMED if corrected else None


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of clients that read such a layer differently, or not at all."""
    algo = algorithm(weights, activation)
    found = ["transformers 5.24 reads ModelOpt checkpoints without their scales and gives wrong logits: serve them"]
    if algo == "FP8":
        found.append(
            "vLLM and TensorRT-LLM round q, k, v (and gate, up) again to the largest of their scales: "
            "use a scale per row (fp8)"
        )
    elif algo in AWQ:
        found.append(f"TensorRT-LLM reads {algo}; vLLM does not, for which compressed-tensors is the format")
        if weights.group not in _GROUPS:
            found.append(f"TensorRT-LLM's int4 kernels know groups of 64 and 128, not {weights.group}")
        if weights.scale not in ("half", "float16"):
            found.append(f"TensorRT-LLM rounds {weights.scale} scales to 16 bits: use half")
        if algo == "W4A8_AWQ":
            found.append("TensorRT-LLM rounds 4-bit weights times their scales to E4M3 before it multiplies")
    elif algo is not None and "NVFP4" in algo:
        found.append("vLLM runs NVFP4 weights on GPUs only")
    return tuple(found)


# --- tensors ----------------------------------------------------------------------------------------------------------


def algorithm_of(layer: QLayer) -> str:
    """ModelOpt's name of a layer. Raises ValueError where the format cannot carry it."""
    if layer.input_map is not None:
        raise ValueError(MAPPED)
    if not layer.plain:
        raise ValueError(SUMMED)
    if layer.input_clip is not None:
        raise ValueError("ModelOpt has no clips of inputs: use native, or a recipe that does not learn them")
    part = layer.weight.parts[0]
    shape = (part.shape[0], part.shape[1])
    reason = refuse(part.grid.spec, layer.activation, shape=shape, ordered=part.order is not None)
    if reason is not None:
        raise ValueError(reason)
    algo = algorithm(part.grid.spec, layer.activation)
    assert algo is not None
    return algo


def pack(name: str, layer: QLayer, dtype: torch.dtype, divisor: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of one linear, `name` being its module; `dtype` is the model's, which TensorRT-LLM computes in.

    `divisor` is the weight_scale_2 of W4A8 that joined linears share, by default the layer's own. Raises ValueError
    where the format cannot carry the layer.
    """
    algo, part = algorithm_of(layer), layer.weight.parts[0]
    grid = part.grid
    if algo in AWQ:
        tensors = {"weight": _in_pairs(part.codes, grid.spec.number), "weight_scale": grid.scale}
        tensors["pre_quant_scale"] = torch.ones(part.shape[1], dtype=dtype, device=part.codes.device)
        if algo == "W4A8_AWQ":
            tensors["weight_scale_2"] = divisor_of(layer) if divisor is None else divisor
    elif "NVFP4" in algo:
        assert grid.outer is not None
        if grid.outer.numel() != 1:
            raise ValueError(f"the rows of {name} have different tensor scales, ModelOpt has one: use fp8, or native")
        tensors = {"weight": bits.pack(part.codes, 4), "weight_scale": scale_codes(grid.scale, "e4m3", grid.outer)}
        tensors["weight_scale_2"] = grid.outer.reshape(())
    else:
        shape = () if algo == "FP8" else (-1,)
        tensors = {"weight": part.codes.view(torch.float8_e4m3fn), "weight_scale": grid.scale.reshape(shape)}
    if layer.input_grid is not None:
        tensors["input_scale"] = layer.input_grid.scale.reshape(())
    return {f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}


def divisor_of(layer: QLayer) -> Tensor:
    """The least power of two, fp32 [], that brings the weight's largest value below E4M3's."""
    largest = 8 * layer.weight.parts[0].grid.scale.max() / E4M3.largest
    return torch.exp2(torch.frexp(largest).exponent.float())


def _in_pairs(codes: Tensor, number: object) -> Tensor:
    """int4 codes [O, I] as bytes [O/2, I]: two's complement, an even row in the low half, the next in the high one."""
    assert isinstance(number, Int)
    signed = codes.view(torch.uint8) if number.signed else codes - 8
    return signed[0::2] & 15 | signed[1::2] << 4


def _from_pairs(packed: Tensor) -> Tensor:
    """The inverse of `_in_pairs`: int8 [O, I]."""
    halves = torch.stack([packed << 4, packed & 240], 1).reshape(-1, packed.shape[-1])
    return halves.view(torch.int8) >> 4


def unpack(name: str, tensors: Mapping[str, Tensor], algo: str) -> QLayer:
    """The inverse of `pack`: codes and scales bit for bit. Raises ValueError for what lowbit does not read."""
    given = {key.removeprefix(f"{name}."): value for key, value in tensors.items()}
    ones = given.get("pre_quant_scale")
    if ones is not None and not ones.is_meta and not bool((ones == 1).all()):
        raise ValueError(f"{name} has a pre_quant_scale, which codes cannot take in: quantize it from the original")
    scale, static = given["weight_scale"], given.get("input_scale")
    activation: Spec | None = None if static is None else per_tensor(E4M3, scale="float32")
    if algo in AWQ:
        codes, scale = _from_pairs(given["weight"]), scale.float()
        spec = per_group(Int(4), codes.shape[1] // scale.shape[1], scale=narrowest(scale))
        grid = Grid(spec, scale)
    elif algo in ("NVFP4", "W4A16_NVFP4"):
        outer = given["weight_scale_2"].float().reshape(1, 1)
        codes = bits.unpack(given["weight"], 4, 2 * given["weight"].shape[-1], signed=False)
        grid = Grid(nvfp4(), scale_values(scale, "e4m3", outer), None, outer)
        activation = nvfp4() if algo == "NVFP4" else None
    elif algo in ("FP8", "FP8_PER_CHANNEL_PER_TOKEN"):
        tensor, scale = algo == "FP8", scale.float().reshape(-1, 1)
        codes = given["weight"].view(torch.uint8)
        grid = Grid((per_tensor if tensor else per_channel)(E4M3, scale="float32"), scale)
        activation = activation if tensor else per_token(E4M3)
    else:
        raise ValueError(f"lowbit does not read ModelOpt's {algo}: give a checkpoint of FP8, NVFP4 or AWQ")
    weight = QWeight((QTensor(codes, grid),))
    if activation is None or activation.dynamic:
        return QLayer(weight, activation)
    if static is None:
        raise ValueError(f"{name} has no input_scale, which {algo} needs: export the checkpoint again")
    return QLayer(weight, activation, Grid(activation, static.float().reshape(1, 1)))


# --- a whole model ----------------------------------------------------------------------------------------------------


@dataclass
class _Written:
    """What the files that are written so far hold."""

    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By the names in the files."""
    paths: set[str] = field(default_factory=set)
    cached: bool = False
    told: dict[str, None] = field(default_factory=dict)


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as a ModelOpt checkpoint into the new directory `target`.

    `skeleton` is the model without weights: it tells which modules are linears. `names` gives the clients' names of a
    parameter. Returns what a user should know of clients. Raises ValueError where a layer cannot be carried.
    """
    dtype = next(parameter.dtype for parameter in skeleton.parameters() if parameter.is_floating_point())
    written = _Written()
    with new_directory(target) as directory:
        files = shards(source)
        for index, file in enumerate(files):
            tensors = _export_shard(file, skeleton, names, dtype, written)
            write_shard(directory / f"model-{index + 1:05d}-of-{len(files):05d}.safetensors", tensors)
        if not written.settings:
            raise ValueError(f"no linear of {source} is quantized: export needs a run with quantized weights")
        write_index(directory, (file.name for file in directory.glob("*.safetensors")))
        copy_companions(source, directory)
        whole = quantization(written.settings, ignored(skeleton, written.paths, names), written.cached)
        write_json(directory / "hf_quant_config.json", whole)
        write_json(directory / "config.json", {**read_config(source), "quantization_config": mirrored(whole)})
    return (*written.told, *of_experts(written.settings))


def _export_shard(
    file: Path, skeleton: nn.Module, names: Names, dtype: torch.dtype, written: _Written
) -> dict[str, Tensor]:
    """The tensors that one file of a run directory becomes, and a note of them in `written`."""
    stored, rest = native.unpack(shard_header(file).metadata, read_shard(file))
    tensors = {name: tensor[part] for path, tensor in rest.items() for name, part in names(path)}
    layers: dict[str, QLayer] = {}
    for path, layer in stored.items():
        if isinstance(layer, QAttention):
            tensors.update(pack_attention(path, layer))
            written.cached = True
            continue
        if not isinstance(skeleton.get_submodule(path), nn.Linear):
            raise ValueError(f"{path} is no Linear, and ModelOpt checkpoints hold nothing else: --ignore '{path}'")
        written.paths.add(path)
        layers.update({name: rows(layer, part) for name, part in module_names(path, names)})
    divisors = _shared_divisors(layers)
    for name, layer in layers.items():
        tensors.update(pack(name, layer, dtype, divisors.get(name)))
        spec = layer.weight.parts[0].grid.spec
        written.settings[name] = settings_in(algorithm_of(layer), spec.group)
        written.told.update(dict.fromkeys(notices(spec, layer.activation)))
    written.told.update(dict.fromkeys(_torn(layers)))
    return tensors


def pack_attention(name: str, attention: QAttention) -> dict[str, Tensor]:
    """The scales of what an attention caches, fp32 []. Raises ValueError where the format cannot carry the cache."""
    reason = refuse_whole(kv=attention.kv, corrected=False)
    if reason is not None:
        raise ValueError(reason)
    if attention.key_map is not None or attention.clips is not None:
        raise ValueError("ModelOpt clients neither turn keys before they quantize them nor clip: set quarot.keys=false")
    tensors = {}
    for side, affine in zip("kv", attention.affine, strict=True):
        assert affine is not None, "a static cache has calibrated scales"
        tensors[f"{name}.{side}_proj.{side}_scale"] = affine.scale.float().reshape(())
    return tensors


def _joined(layers: Mapping[str, QLayer]) -> list[list[str]]:
    """The linears of which clients make one, wherever there are several."""
    sets: dict[tuple[str, str], list[str]] = {}
    for name in layers:
        parent, _, leaf = name.rpartition(".")
        for whole, parts in FUSED.items():
            if leaf in parts:
                sets.setdefault((parent, whole), []).append(name)
    return [members for members in sets.values() if len(members) > 1]


def _shared_divisors(layers: Mapping[str, QLayer]) -> dict[str, Tensor]:
    """The largest weight_scale_2 of linears that are joined, of W4A8."""
    found: dict[str, Tensor] = {}
    for members in _joined(layers):
        if all(algorithm_of(layers[name]) == "W4A8_AWQ" for name in members):
            largest = torch.stack([divisor_of(layers[name]) for name in members]).max()
            found.update(dict.fromkeys(members, largest))
    return found


def _torn(layers: Mapping[str, QLayer]) -> Sequence[str]:
    """What is to be told where linears that clients join differ in what they would have to share."""
    for members in _joined(layers):
        outers = [layers[name].weight.parts[0].grid.outer for name in members]
        if any(outer is not None and outers[0] is not None and not torch.equal(outer, outers[0]) for outer in outers):
            return (
                "NVFP4 weights of q, k, v (and gate, up) have a tensor scale each, where TensorRT-LLM wants one and "
                "vLLM takes the largest for all, which changes the others: use fp8 or w4a16-g128 for these clients",
            )
    return ()


# --- reading back -----------------------------------------------------------------------------------------------------


def recognizes(config: Mapping[str, Any]) -> bool:
    """Whether a directory with this config.json (and hf_quant_config.json under its name) is a ModelOpt checkpoint."""
    stated = config.get("quantization_config") or {}
    return str(stated.get("quant_method", "")).startswith("modelopt") or "hf_quant_config" in config


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(linears by name, all other tensors) of a ModelOpt checkpoint's tensors.

    Raises ValueError for algorithms that lowbit does not read.
    """
    found: dict[str, QLayer] = {}
    rest = dict(tensors)
    for module in sorted(name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        algo = algorithm_in(config, module)
        if algo is None:
            raise ValueError(f"hf_quant_config.json does not say how {module} is stored: add it to quantized_layers")
        inside = {name: rest.pop(name) for kind in KINDS if (name := f"{module}.{kind}") in rest}
        found[module] = unpack(module, inside, algo)
    return found, rest
