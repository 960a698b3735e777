"""MLX, which mlx-lm and LM Studio run on Apple's chips, spelled from stored codes; nothing is rounded here.

A linear of MLX computes a value as scale·q + bias, q an unsigned code, for groups of 32, 64 or 128 columns; its mxfp4
and mxfp8 modes are OCP's. Codes are one little-endian bit stream per row in 32-bit words. Biases must be exact. For
symmetric weights they are -2^(b-1)·s, which whatever dtype holds s holds too, hence the model's own. An asymmetric
weight's -z·s needs more bits than 16-bit floats have and is stored in float32, which is then what MLX computes in; with
`--target mlx` such weights have their least value instead of a zero-point, in fp16 from the start (`narrow`). Units
wider than 128 columns repeat their scale.

MLX's own models have biases that are no multiple of their scale. Where fp16 holds both they are least values too, else
the weight becomes a sum, s·q and the bias of each group (as codes that are all 1): what MLX computes, bit for bit.

Shape letters: O output rows, I input columns, G groups of columns, W 32-bit words.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import bits
from ..numerics.grid import Grid, unit_shape
from ..numerics.kv import KV
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.scales import narrowest, scale_codes, scale_values
from ..numerics.spec import E2M1, E4M3, PLAIN, Float, Int, ScaleDtype, Spec, mx, per_group
from .base import CACHED, Names, copy_companions, new_directory, read, read_config, shards, unchanged
from .files import write_index, write_json, write_shard
from .mlx_config import configuration, remarks
from .mlx_config import refuse_model as refuse_model

CLIENTS = ("mlx",)

GROUPS = (128, 64, 32)
"""Columns that may share a scale, the widest first."""
WIDTHS = (2, 3, 4, 5, 6, 8)
"""Bits of a code."""
_MX: dict[Float, str] = {E2M1: "mxfp4", E4M3: "mxfp8"}
_DTYPES: dict[ScaleDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_SCALES = {dtype: name for name, dtype in _DTYPES.items()}

SUMMED = "MLX cannot carry a weight that is a sum of parts: use native, or a recipe without corrections"

KINDS = ("weight", "scales", "biases")
"""The tensors of a quantized module."""

_EXPERT = re.compile(r"(?P<mixture>.*)\.experts\.(?P<index>\d+)\.(?P<projection>\w+)\.(?P<kind>\w+)")
_PROJECTIONS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
"""MLX's names of Mixtral's projections; other families call them so themselves."""


# --- what the format can carry ----------------------------------------------------------------------------------------


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
        return "MLX has no online maps of a linear's inputs: use native, or merge all rotations (spinquant.merged=true)"
    assert weights is not None, "layers of 16 bits are no matter of the format unless their inputs are mapped"
    if transposed:
        return "mlx-lm transposes Conv1D weights when it loads them, which packed ones do not survive: use native"
    if ordered:
        return "MLX groups the columns in their natural order: use gptq.groups=static, or no act_order"
    if activation is not None:
        return f"MLX multiplies by 16-bit inputs, not by {activation}: use a weight-only recipe such as rtn-w4a16-g64"
    return _refuse_number(weights) or _refuse_block(weights, shape)


def refuse_whole(*, kv: KV | None, corrected: bool) -> str | None:
    """Why the format cannot carry a model with such a cache, or with corrections of weights, or None if it can."""
    if kv is not None:
        return CACHED
    return SUMMED if corrected else None


def _refuse_number(spec: Spec) -> str | None:
    number = spec.number
    if isinstance(number, Float) and number in _MX:
        if spec.scale.startswith("e8m0") and spec.block == (1, 32):
            return None
        return f"MLX reads {number} weights as {_MX[number]} only, not {spec}: use {_MX[number]}a16"
    if not isinstance(number, Int):
        return f"MLX reads integers, mxfp4 and mxfp8, not {number}: use w4a16-g64 or mxfp4a16"
    if number.bits not in WIDTHS:
        return f"MLX reads weights of 2, 3, 4, 5, 6 or 8 bits, not {number.bits}: use one of these"
    if number.rule == "asymmetric-deepspeed":
        return "the unbounded zero-points of asymmetric-deepspeed are exact in no dtype of MLX: use asymmetric"
    if spec.scale not in (*PLAIN, "float16-min"):
        return f"MLX scales integers by plain floating-point numbers, not {spec.scale}: use half"
    if not number.symmetric and spec.scale == "float32":
        return "MLX's bias -z·s is not exact in float32 where s takes all of float32 itself: use half scales"
    return None


def _refuse_block(spec: Spec, shape: tuple[int, int] | None) -> str | None:
    if spec.square or spec.block[0] not in (1, -1):
        return f"MLX has one scale per group of a row, not {spec}: use -g32, -g64 or -g128"
    columns = spec.group if shape is None else unit_shape(torch.Size(shape), spec.block)[1]
    if columns == -1 or any(columns % group == 0 for group in GROUPS):
        return None
    wide = "" if shape is None else f" of {shape[1]} columns"
    return f"MLX scales 32, 64 or 128 columns at a time, which do not divide the {columns}{wide}: use -g32 or --ignore"


def narrow(weights: Spec) -> Spec:
    """The format as MLX stores it, decided before anything is rounded: a least value in fp16, not a zero-point."""
    number = weights.number
    if not isinstance(number, Int) or number.symmetric or weights.square or weights.scale != "half":
        return weights
    return Spec(Int(number.bits, "asymmetric"), weights.block, "float16-min")


def stored_bytes(weights: Spec, shape: tuple[int, int]) -> int:
    """Bytes of a weight [O, I] of a model in bf16: integers have a scale and a bias for every group."""
    rows, columns = shape
    width = unit_shape(torch.Size(shape), weights.block)[1]
    group = next(group for group in GROUPS if width % group == 0)
    each = 2 * _storage(weights, torch.bfloat16).itemsize if isinstance(weights.number, Int) else 1
    return rows * (columns * weights.bits // 8 + columns // group * each)


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of how MLX stores and runs such a layer."""
    number, found = weights.number, []
    if isinstance(number, Int):
        if weights.minima:
            found.append("MLX computes layers with fp16 scales in float32 unless the model is fp16 itself")
        elif not number.symmetric:
            found.append(
                "-z·s of asymmetric weights is exact in float32 only, which makes files larger and MLX slower: "
                "quantize with --target mlx, or symmetric"
            )
        elif weights.scale == "float32":
            found.append("float32 scales make MLX compute in float32: use half")
        if weights.group not in GROUPS:
            found.append("MLX has a scale for every 128 columns at most: wider units repeat theirs, which takes space")
    return tuple(found)


# --- tensors ----------------------------------------------------------------------------------------------------------


def settings_of(layer: QLayer) -> dict[str, Any]:
    """What config.json says of a layer: bits, group size and mode. Raises ValueError where it cannot be carried."""
    if not layer.plain:
        raise ValueError(SUMMED)
    part = layer.weight.parts[0]
    spec, (rows, columns) = part.grid.spec, part.shape
    ordered, mapped = part.order is not None, layer.input_map is not None
    reason = refuse(spec, layer.activation, shape=(rows, columns), ordered=ordered, mapped=mapped)
    if reason is not None:
        raise ValueError(reason)
    if isinstance(spec.number, Float):
        return {"bits": spec.bits, "group_size": 32, "mode": _MX[spec.number]}
    width = unit_shape(part.shape, spec.block)[1]
    return {"bits": spec.bits, "group_size": next(group for group in GROUPS if width % group == 0), "mode": "affine"}


def pack(name: str, layer: QLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear, `name` being its module; scales that suit any dtype take the model's `dtype`.

    weight [O, W] uint32, scales [O, G], and biases [O, G] for integers. Raises ValueError where the format cannot carry
    the layer, or a value of it leaves the dtype's range.
    """
    settings, part = settings_of(layer), layer.weight.parts[0]
    spec, number = part.grid.spec, part.grid.spec.number
    codes = _unsigned(part.codes, number) if isinstance(number, Int) else part.codes
    tensors = {f"{name}.weight": _to_words(codes, spec.bits)}
    scale = _spread(part, settings["group_size"], part.grid.scale)
    if not isinstance(number, Int):
        return {**tensors, f"{name}.scales": scale_codes(scale, spec.scale, None)}
    kind = _storage(spec, dtype)
    for key, value in (("scales", scale), ("biases", _bias(part, settings["group_size"], scale))):
        stored = value.to(kind).contiguous()
        if not stored.is_meta and not torch.equal(stored.float(), value):
            raise ValueError(f"the {key} of {name} are not exact in {kind}: load and quantize the model in bfloat16")
        tensors[f"{name}.{key}"] = stored
    return tensors


def _bias(part: QTensor, group: int, scale: Tensor) -> Tensor:
    """The value of code 0 in every group [O, G], fp32."""
    grid, number = part.grid, part.grid.spec.number
    assert isinstance(number, Int)
    if grid.offset is not None:
        return -_spread(part, group, grid.offset)
    return -scale * (2.0 ** (number.bits - 1) if grid.zero is None else _spread(part, group, grid.zero))


def _storage(spec: Spec, dtype: torch.dtype) -> torch.dtype:
    """The dtype that holds a layer's scales and biases exactly."""
    assert isinstance(spec.number, Int)
    if spec.minima:
        return torch.float16
    if not spec.number.symmetric:
        return torch.float32
    return dtype if _DTYPES.get(spec.scale, dtype) == dtype else torch.float32


def _spread(part: QTensor, group: int, per_unit: Tensor) -> Tensor:
    """Something of every unit [R/r, C/c] as something of every group [O, G]."""
    rows, columns = part.shape
    r, c = unit_shape(part.shape, part.grid.spec.block)
    spread = per_unit[:, :, None].expand(-1, -1, c // group).reshape(len(per_unit), columns // group)
    return spread.expand(rows, -1) if r > 1 else spread


def _unsigned(codes: Tensor, number: Int) -> Tensor:
    """Codes as q + 2^(b-1) where they are signed, uint8."""
    return codes.view(torch.uint8) + (1 << (number.bits - 1)) if number.signed else codes


def _to_words(codes: Tensor, width: int) -> Tensor:
    """Unsigned codes [O, I], I a multiple of 32, as uint32 [O, W] of one bit stream per row."""
    return bits.pack(codes, width).view(torch.int32).view(torch.uint32)


def _from_words(words: Tensor, width: int) -> Tensor:
    """The inverse of `_to_words`: uint8 [O, I]."""
    packed = words.contiguous().view(torch.uint8)
    return bits.unpack(packed, width, packed.shape[-1] * 8 // width, signed=False)


def unpack(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> QLayer:
    """The inverse of `pack`: the same numbers bit for bit, in lowbit's terms as far as they have an integer zero-point.

    Raises ValueError for a mode that lowbit does not know.
    """
    width, group, mode = settings["bits"], settings["group_size"], settings.get("mode", "affine")
    codes, scales = _from_words(tensors[f"{name}.weight"], width), tensors[f"{name}.scales"]
    for number, known in _MX.items():
        if mode == known:
            return QLayer(QWeight((QTensor(codes, Grid(mx(number), scale_values(scales, "e8m0", None))),)))
    if mode != "affine":
        raise ValueError(f"lowbit reads MLX's affine, mxfp4 and mxfp8 modes, not {mode}: use an affine model")
    return QLayer(_affine(codes, scales, tensors[f"{name}.biases"], width, group))


def _affine(codes: Tensor, scales: Tensor, biases: Tensor, width: int, group: int) -> QWeight:
    """The weight s·q + b of unsigned codes [O, I], scales and biases [O, G]."""
    asymmetric = Int(width, "asymmetric")
    scale, bias = scales.float(), biases.float()
    if scale.is_meta:
        return QWeight((QTensor(codes, Grid(per_group(asymmetric, group), scale, bias)),))
    zero = -(bias / torch.where(scale == 0, 1.0, scale)).round()
    whole = torch.equal(-zero * scale, bias) and bool(((zero >= 0) & (zero < 1 << width)).all())
    if whole and bool((scale > 0).all()):
        kind, half = narrowest(scale), 1 << (width - 1)
        if bool((zero == half).all()):
            grid = Grid(per_group(Int(width), group, scale=kind), scale)
            return QWeight((QTensor((codes - half).view(torch.int8), grid),))
        return QWeight((QTensor(codes, Grid(per_group(asymmetric, group, scale=kind), scale, zero)),))
    if torch.equal(scale.half().float(), scale) and torch.equal(bias.half().float(), bias):
        return QWeight((QTensor(codes, Grid(per_group(asymmetric, group, scale="float16-min"), scale, offset=-bias)),))
    raw = [per_group(Int(b, "asymmetric-raw"), group, scale=_SCALES[scales.dtype]) for b in (width, 1)]
    slope = QTensor(codes, Grid(raw[0], scale, torch.zeros_like(scale)))
    return QWeight((slope, QTensor(torch.ones_like(codes), Grid(raw[1], bias, torch.zeros_like(bias)))))


# --- a whole model ----------------------------------------------------------------------------------------------------


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as an MLX model into the new directory `target`.

    `skeleton` is the model without weights: it tells the dtype and whether the head is tied. `names` gives the
    clients' names of a parameter. Returns what a user should know. Raises ValueError where a layer cannot be carried.
    """
    dtype = next(parameter.dtype for parameter in skeleton.parameters() if parameter.is_floating_point())
    settings: dict[str, dict[str, Any]] = {}
    told: dict[str, None] = {}
    with new_directory(target) as directory:
        files = shards(source)
        for index, file in enumerate(files):
            layers, tensors = read(file, names)
            for name, (path, layer) in layers.items():
                _check_module(path, skeleton)
                tensors.update(pack(name, layer, dtype))
                stacked = _stacked(f"{name}.weight")
                _agree(settings, stacked[0].removesuffix(".weight") if stacked else name, settings_of(layer))
                told.update(dict.fromkeys(notices(layer.weight.parts[0].grid.spec, layer.activation)))
            write_shard(directory / f"model-{index + 1:05d}-of-{len(files):05d}.safetensors", stack_experts(tensors))
        if not settings:
            raise ValueError(f"no linear of {source} is quantized: export needs a run with quantized weights")
        write_index(directory, (file.name for file in directory.glob("*.safetensors")))
        copy_companions(source, directory)
        write_json(directory / "config.json", configuration(read_config(source), settings, skeleton))
    return (*told, *remarks(read_config(source)))


def _check_module(path: str, skeleton: nn.Module) -> None:
    if not isinstance(skeleton.get_submodule(path), (nn.Linear, nn.Embedding)):
        raise ValueError(f"{path} is no Linear, and MLX quantizes nothing else: use native, or --ignore '{path}'")
    if path.endswith(".kv_b_proj"):
        raise ValueError(f"mlx-lm splits {path} on loading and rounds it again: quantize with --ignore '*kv_b_proj'")


def _agree(settings: dict[str, dict[str, Any]], module: str, given: dict[str, Any]) -> None:
    if settings.setdefault(module, given) != given:
        raise ValueError(f"MLX stacks the experts of {module}, which differ in format here: give them all the same one")


def stack_experts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of one shard with the experts of every projection as one tensor [E, ...] under MLX's name."""
    found, piles = {}, dict[str, dict[int, Tensor]]()
    for name, tensor in tensors.items():
        stacked = _stacked(name)
        if stacked is None:
            found[name] = tensor
        else:
            piles.setdefault(stacked[0], {})[stacked[1]] = tensor
    for name, pile in piles.items():
        found[name] = torch.stack([pile[index] for index in range(len(pile))])
    return found


def _stacked(name: str) -> tuple[str, int] | None:
    """(MLX's name of the stack that an expert's tensor goes to, its place there), None for any other tensor."""
    match = _EXPERT.fullmatch(name)
    if match is None:
        return None
    projection = _PROJECTIONS.get(match["projection"], match["projection"])
    return f"{match['mixture']}.switch_mlp.{projection}.{match['kind']}", int(match["index"])


# --- reading back -----------------------------------------------------------------------------------------------------


def recognizes(config: Mapping[str, Any]) -> bool:
    """Whether a directory with this config.json holds an MLX model of quantized weights."""
    found = config.get("quantization")
    return isinstance(found, Mapping) and "bits" in found and "group_size" in found


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(linears by name, all other tensors) of an MLX model's tensors; stacked experts come apart, under HF's names.

    Raises ValueError where a mode or a combination of bits and groups is none that lowbit reads.
    """
    packed = [name.removesuffix(".scales") for name in tensors if name.endswith(".scales")]
    found: dict[str, QLayer] = {}
    read: set[str] = set()
    for module in packed:
        inside = {name: tensors[name] for kind in KINDS if (name := f"{module}.{kind}") in tensors}
        settings = _settings(module, inside, config["quantization"])
        apart = {key: value for name, tensor in inside.items() for key, value in _unstacked(name, tensor)}
        for name in [key.removesuffix(".weight") for key in apart if key.endswith(".weight")]:
            found[name] = unpack(name, apart, settings)
        read.update(inside)
    rest = [_unstacked(name, tensor) for name, tensor in tensors.items() if name not in read]
    return found, {key: value for group in rest for key, value in group}


def _settings(module: str, tensors: Mapping[str, Tensor], quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    """Bits, group size and mode of a module: its own or the usual ones. Raises ValueError where they do not fit it."""
    own = quantization.get(module)
    found = {"mode": "affine", **(own if isinstance(own, Mapping) else quantization)}
    words, groups = tensors[f"{module}.weight"].shape[-1], tensors[f"{module}.scales"].shape[-1]
    if found["bits"] * groups * found["group_size"] != 32 * words:
        raise ValueError(
            f'config.json does not say how {module} is stored: add its bits and group_size to "quantization"'
        )
    return found


def _unstacked(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """A stack of experts as the tensors of each, under the names that checkpoints have; others as they are."""
    mixture, found, rest = name.partition(".switch_mlp.")
    if not found or tensor.dim() != 3:
        return [(name, tensor)]
    theirs = {mlx: name for name, mlx in _PROJECTIONS.items()} if mixture.endswith("block_sparse_moe") else {}
    projection, _, kind = rest.partition(".")
    return [
        (f"{mixture}.experts.{index}.{theirs.get(projection, projection)}.{kind}", part)
        for index, part in enumerate(tensor)
    ]
