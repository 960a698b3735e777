"""bitsandbytes NF4: what transformers loads with `load_in_4bit`, spelled from stored codes; nothing is rounded here.

bitsandbytes sees a weight as one flat run of values cut into blocks of one scale (absmax) each. Where the columns that
share a scale are a multiple of a block, the run of blocks is our units row by row, so codes and scales carry over as
they are. Two codes make a byte, the first in the high half. Beside the weight lie its scales, the table of levels and
a JSON text, as tensors.

Its double quantization looks 8-bit codes up in a table that is stored with the weight, multiplies them by a scale per
256 blocks and adds an offset. lowbit's is mean + q·step, so a table that says q for every q gives the same product and
sum, bit for bit. Scales that are stored relative to others in any other way are written out in fp32.

Shape letters: O output rows, I input columns, B blocks of the whole weight.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics import bits
from ..numerics.grid import Grid, unit_shape
from ..numerics.kv import KV
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.scales import DOUBLE_BLOCK, narrowest, scale_codes, scale_values
from ..numerics.spec import NF4, Codebook, Spec, per_group
from .base import CACHED, Names, copy_companions, new_directory, read, read_config, shards, unchanged
from .files import shard_header, write_index, write_json, write_shard

CLIENTS = ("bitsandbytes",)

BLOCKS = (4096, 2048, 1024, 512, 256, 128, 64, 32)
"""Values that may share a scale, the most first."""
SUMMED = "bitsandbytes cannot carry a weight that is a sum of parts: use native, or a recipe without corrections"

_STATE = "quant_state.bitsandbytes__"
_ZERO = 128
"""The place of q = 0 in the table of double quantization."""


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

    `transposed` modules (GPT-2's Conv1D) are no exception: transformers keeps them as [O, I] once they are quantized.
    `ordered`: groups follow another order of the columns. `mapped`: inputs pass an online map.
    """
    if mapped:
        return (
            "bitsandbytes has no online maps of a linear's inputs: use native, or merge all rotations "
            "(spinquant.merged=true)"
        )
    assert weights is not None, "layers of 16 bits are no matter of the format unless their inputs are mapped"
    if weights.number != NF4:
        return f"bitsandbytes export carries nf4 weights, not {weights.number}: use rtn-nf4, or another format"
    if activation is not None:
        return f"bitsandbytes multiplies by 16-bit inputs, not by {activation}: use a recipe without them, as rtn-nf4"
    if ordered:
        return "bitsandbytes blocks follow the natural order of columns: use gptq.groups=static, or no act_order"
    if weights.square or weights.block[0] not in (1, -1):
        return f"bitsandbytes has one scale per block of a row, not {weights}: use nf4, or nf4 with -g64"
    columns = weights.group if shape is None else unit_shape(torch.Size(shape), weights.block)[1]
    if columns == -1 or any(columns % block == 0 for block in BLOCKS):
        return None
    wide = "" if shape is None else f" of {shape[1]} columns"
    return f"no block of bitsandbytes (32, 64, … 4096) divides the {columns}{wide} that share a scale: --ignore those"


def refuse_whole(*, kv: KV | None, corrected: bool) -> str | None:
    """Why the format cannot carry a model with such a cache, or with corrections of weights, or None if it can."""
    if kv is not None:
        return CACHED
    return SUMMED if corrected else None


def stored_bytes(weights: Spec, shape: tuple[int, int]) -> int:
    """Bytes of a weight [O, I] but for its JSON text: every block has a scale, in fp32 unless doubly quantized."""
    height, width = unit_shape(torch.Size(shape), weights.block)
    block, table = _block(width), 4 * len(NF4.levels)
    blocks = shape[0] * shape[1] // block
    if weights.scale == "double" and (height, width) == (1, block):
        return shape[0] * shape[1] // 2 + table + blocks + 4 * (-(-blocks // DOUBLE_BLOCK) + 256)
    return shape[0] * shape[1] // 2 + table + 4 * blocks


def notices(weights: Spec, activation: Spec | None) -> tuple[str, ...]:
    """What a user should know of how bitsandbytes stores and reads such a layer."""
    found = []
    if weights.group != -1 and _block(weights.group) == 32:
        found.append("blocks of 32 are read by recent bitsandbytes only (0.50 does): use -g64 for older ones")
    if weights.group != -1 and _block(weights.group) != weights.group:
        found.append(f"bitsandbytes has no blocks of {weights.group}: smaller ones repeat a scale, which takes space")
    if weights.relative and weights.scale != "double":
        found.append(f"bitsandbytes stores {weights.scale} scales as the fp32 numbers they mean, which takes space")
    return tuple(found)


def _block(columns: int) -> int:
    """The largest block that divides the columns of a unit."""
    return next(block for block in BLOCKS if columns % block == 0)


# --- tensors ----------------------------------------------------------------------------------------------------------


def pack(name: str, layer: QLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear, `name` being its module; `dtype` is what clients dequantize to.

    weight [O I/2, 1], absmax [B] (bytes where scales are doubly quantized), quant_map [16], and a JSON text of bytes,
    which on meta says that the mean scale is 0. Raises ValueError where the format cannot carry the layer.
    """
    if not layer.plain:
        raise ValueError(SUMMED)
    part = layer.weight.parts[0]
    grid, (rows, columns) = part.grid, part.shape
    ordered, mapped = part.order is not None, layer.input_map is not None
    reason = refuse(grid.spec, layer.activation, shape=(rows, columns), ordered=ordered, mapped=mapped)
    if reason is not None:
        raise ValueError(reason)
    height, width = unit_shape(part.shape, grid.spec.block)
    block = _block(width)
    state: dict[str, Any] = {"quant_type": "nf4", "blocksize": block, "dtype": _name(dtype), "shape": [rows, columns]}
    tensors = {"quant_map": torch.tensor(NF4.levels)}
    if grid.spec.scale == "double" and (height, width) == (1, block):
        tensors.update(_nested(grid, state))
    else:
        scale = grid.scale[:, :, None].expand(-1, -1, width // block).reshape(len(grid.scale), columns // block)
        tensors["absmax"] = scale.expand(rows, -1).reshape(-1)
    tensors[f"{_STATE}nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors = {f"{name}.weight.{key}": tensor.contiguous() for key, tensor in tensors.items()}
    return {f"{name}.weight": _swapped(bits.pack(part.codes.reshape(-1), 4))[:, None], **tensors}


def _nested(grid: Grid, state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of double quantization; what else it needs is added to `state`."""
    assert grid.outer is not None, "double quantization has constants"
    mean, steps = grid.outer[0, 0], grid.outer[0, 1:]
    state |= {"nested_blocksize": DOUBLE_BLOCK, "nested_dtype": "float32"}
    state["nested_offset"] = 0.0 if mean.is_meta else float(mean)
    codes = scale_codes(grid.scale, "double", grid.outer).reshape(-1)
    return {
        "absmax": (codes.to(torch.int16) + _ZERO).to(torch.uint8),
        "nested_absmax": steps,
        "nested_quant_map": _every_code(),
    }


def _every_code() -> Tensor:
    """The table that says q, fp32 [256]."""
    return torch.arange(256, dtype=torch.float32) - _ZERO


def _swapped(packed: Tensor) -> Tensor:
    """Bytes with their halves exchanged."""
    return packed >> 4 | packed << 4


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unpack(name: str, tensors: Mapping[str, Tensor]) -> QLayer:
    """The inverse of `pack`: the same numbers bit for bit, with plain scales unless they are lowbit's double ones.

    Reads what bitsandbytes itself makes as well: its FP4, its own double quantization, blocks that go on in the next
    row (whose parts become units of their own).
    """
    inside = {key.removeprefix(f"{name}.weight."): value for key, value in tensors.items() if key.startswith(name)}
    (text,) = (key for key in inside if key.startswith(_STATE))
    state = json.loads(bytes(inside[text].tolist()))
    rows, columns = state["shape"]
    block = state["blocksize"]
    packed = inside[f"{name}.weight"].contiguous().view(torch.uint8).reshape(-1)
    codes = bits.unpack(_swapped(packed), 4, rows * columns, signed=False).reshape(rows, columns)
    number, codes = _in_ascending_order(inside["quant_map"].float(), codes)
    width = gcd(block, columns)
    if "nested_absmax" not in inside:
        scale = inside["absmax"].float()
    elif width == block and torch.equal(inside["nested_quant_map"], _every_code()):
        outer = torch.cat([torch.tensor([state["nested_offset"]]), inside["nested_absmax"]])[None]
        steps = (inside["absmax"].to(torch.int16) - _ZERO).to(torch.int8).reshape(rows, columns // block)
        grid = Grid(per_group(number, block, scale="double"), scale_values(steps, "double", outer), None, outer)
        return QLayer(QWeight((QTensor(codes, grid),)))
    else:
        steps = inside["nested_absmax"].repeat_interleave(state["nested_blocksize"])[: len(inside["absmax"])]
        scale = inside["nested_quant_map"][inside["absmax"].int()] * steps + torch.tensor(state["nested_offset"])
    units = torch.arange(0, rows * columns, width) // block
    grid = Grid(per_group(number, width, scale=narrowest(scale)), scale[units].reshape(rows, columns // width))
    return QLayer(QWeight((QTensor(codes, grid),)))


def _in_ascending_order(levels: Tensor, codes: Tensor) -> tuple[Codebook, Tensor]:
    """The codebook of a table of levels, and codes for it: FP4's table is in the order of its bits."""
    order = levels.argsort(stable=True)
    number = Codebook("bitsandbytes-fp4", tuple(levels[order].tolist()))
    if torch.equal(levels, torch.tensor(NF4.levels)):
        return NF4, codes
    return number, order.argsort()[codes.int()].to(torch.uint8)


# --- a whole model ----------------------------------------------------------------------------------------------------


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as a bitsandbytes model into the new directory `target`.

    `skeleton` is the model without weights: it tells which linears are not quantized. `names` gives the clients' names
    of a parameter. Returns what a user should know. Raises ValueError where a layer cannot be carried.
    """
    dtype = next(parameter.dtype for parameter in skeleton.parameters() if parameter.is_floating_point())
    quantized: dict[str, bool] = {}
    told: dict[str, None] = {}
    with new_directory(target) as directory:
        files = shards(source)
        for index, file in enumerate(files):
            _check_sites(file, skeleton)
            layers, tensors = read(file, names)
            for name, (path, layer) in layers.items():
                packed = pack(name, layer, dtype)
                tensors.update(packed)
                quantized[path] = f"{name}.weight.nested_absmax" in packed
                told.update(dict.fromkeys(notices(layer.weight.parts[0].grid.spec, layer.activation)))
            write_shard(directory / f"model-{index + 1:05d}-of-{len(files):05d}.safetensors", tensors)
        if not quantized:
            raise ValueError(f"no linear of {source} is quantized: export needs a run with quantized weights")
        write_index(directory, (file.name for file in directory.glob("*.safetensors")))
        copy_companions(source, directory)
        config = quantization_config(quantized, skeleton, dtype)
        write_json(directory / "config.json", {**read_config(source), "quantization_config": config})
    return tuple(told)


def _check_sites(file: Path, skeleton: nn.Module) -> None:
    """Refuse what transformers does not hand to bitsandbytes, before anything of the file is read."""
    for path in json.loads(shard_header(file).metadata.get("lowbit", '{"sites": {}}'))["sites"]:
        if ".experts." in path:
            raise ValueError(
                "transformers 5 keeps a mixture's experts as one parameter, which bitsandbytes does not quantize: "
                "use compressed-tensors, or quantize with --ignore '*.experts.*'"
            )
        if isinstance(skeleton.get_submodule(path), nn.Embedding):
            raise ValueError(f"bitsandbytes does not quantize the embedding {path}: quantize with --ignore '{path}'")


def quantization_config(quantized: Mapping[str, bool], skeleton: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
    """The `quantization_config` of config.json; `quantized` says of every quantized module whether doubly."""
    linear = [path for path, module in skeleton.named_modules() if isinstance(module, nn.Linear)]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": all(quantized.values()),
        "bnb_4bit_compute_dtype": _name(dtype),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(path for path in linear if path not in quantized and ".experts." not in path),
    }


# --- reading back -----------------------------------------------------------------------------------------------------


def recognizes(config: Mapping[str, Any]) -> bool:
    """Whether a directory with this config.json holds weights that bitsandbytes quantized."""
    found = config.get("quantization_config")
    return isinstance(found, Mapping) and found.get("quant_method") == "bitsandbytes"


def layers(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(linears by name, all other tensors) of a bitsandbytes model's tensors.

    Raises ValueError where weights have 8 bits.
    """
    if config["quantization_config"].get("load_in_8bit"):
        raise ValueError("lowbit reads 4-bit bitsandbytes models, not LLM.int8: give the original model instead")
    found: dict[str, QLayer] = {}
    rest = dict(tensors)
    for key in [name for name in tensors if f".weight.{_STATE}" in name]:
        name = key.partition(f".weight.{_STATE}")[0]
        inside = {key: rest.pop(key) for key in list(rest) if key.startswith(f"{name}.weight")}
        found[name] = unpack(name, inside)
    return found, rest
