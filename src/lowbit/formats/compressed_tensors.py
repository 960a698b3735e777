"""compressed-tensors: what vLLM, SGLang and transformers read. Stored codes are spelled anew, nothing is rounded.

This file has the format's contract (`base.Format`) and the way of a whole model; what config.json says of a layer is
`ct_schemes`, its tensors are `ct_tensors`, what is refused and what clients do otherwise `ct_limits`, what other tools
wrote `ct_read`. Layouts and fields follow compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..numerics.kv import KV
from ..numerics.maps import Hadamard
from ..numerics.qtensor import QAttention, QLayer
from . import native
from .base import Names, copy_companions, module_names, new_directory, read_config, rows, shards, unchanged
from .ct_limits import (
    CLIPPED,
    FILLED,
    FUSED,
    MAPPED,
    NOT_LINEAR,
    ONLINE,
    SPARSE,
    SUMMED,
    UNEVEN,
    caches,
    notices,
    refuse,
    refuse_cache,
    refuse_whole,
    remarks,
    transform_of,
)
from .ct_read import layers, recognizes
from .ct_schemes import (
    VERSION,
    Scheme,
    cache_scheme,
    in_experts,
    quantization_config,
    scheme_of_formats,
    transform_config,
)
from .ct_tensors import filled, pack_layer, unpack_layer
from .files import read_shard, shard_header, write_index, write_json, write_shard

__all__ = [
    "CLIENTS",
    "ENCODED",
    "VERSION",
    "Scheme",
    "export_directory",
    "ignored",
    "layers",
    "notices",
    "pack",
    "pack_attention",
    "quantization_config",
    "recognizes",
    "refuse",
    "refuse_whole",
    "scheme_of",
    "unpack",
]

CLIENTS = ("transformers", "vllm")
ENCODED = ("magnitude", "wanda", "sparsegpt")
"""Pruned weights with codes, their zeros written out; those in 16 bits are refused."""

_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))
"""Linears that vLLM makes one of."""


# --- one linear -------------------------------------------------------------------------------------------------------


def scheme_of(layer: QLayer) -> Scheme:
    """What config.json says of a layer. Raises ValueError where the format cannot carry it."""
    if not layer.plain:
        raise ValueError(SPARSE if not layer.weight.parts and layer.weight.sparse is not None else SUMMED)
    if layer.input_clip is not None:
        raise ValueError(CLIPPED)
    part = layer.weight.parts[0]
    shape = (part.shape[0], part.shape[1])
    mapped = False if layer.input_map is None else layer.input_map
    reason = refuse(part.grid.spec, layer.activation, shape=shape, ordered=part.order is not None, mapped=mapped)
    if reason is not None:
        raise ValueError(reason)
    return scheme_of_formats(part.grid.spec, layer.activation, shape)


def pack(name: str, layer: QLayer, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one linear, `name` being its module; scales that suit any dtype take the model's `dtype`.

    Raises ValueError where the format cannot carry the layer.
    """
    return pack_layer(name, layer, scheme_of(layer), dtype)


def unpack(name: str, tensors: Mapping[str, Tensor], scheme: Mapping[str, Any]) -> QLayer:
    """The inverse of `pack`: codes, scales and zero-points bit for bit, described in the scheme's own terms."""
    return unpack_layer(name, tensors, scheme)


def pack_attention(name: str, attention: QAttention) -> dict[str, Tensor]:
    """The scales of what an attention caches: [1], or [H, 1, 1] where every head has its own; fp32.

    Raises ValueError where the format cannot carry the cache.
    """
    reason = refuse_cache(attention.kv)
    if reason is not None:
        raise ValueError(reason)
    if attention.key_map is not None or attention.clips is not None:
        raise ValueError(
            "compressed-tensors clients neither turn keys nor clip them before they quantize: set quarot.keys=false"
        )
    tensors = {}
    for side, affine in zip("kv", attention.affine, strict=True):
        assert affine is not None, "a static cache has calibrated scales"
        scale = affine.scale.float()
        tensors[f"{name}.{side}_scale"] = (
            scale.reshape(1) if attention.kv.layout == "tensor" else scale.reshape(-1, 1, 1)
        )
    return tensors


# --- a whole model ----------------------------------------------------------------------------------------------------


@dataclass
class _Written:
    """What the files that are written so far hold."""

    schemes: dict[str, Scheme] = field(default_factory=dict)
    """By every name that clients look a linear up by."""
    stored: dict[str, Scheme] = field(default_factory=dict)
    """By the names in the files."""
    outer: dict[str, float] = field(default_factory=dict)
    """NVFP4's tensor scales, likewise."""
    paths: set[str] = field(default_factory=set)
    """The model's own names of quantized linears."""
    mapped: dict[str, Hadamard] = field(default_factory=dict)
    cache: KV | None = None
    told: dict[str, None] = field(default_factory=dict)


def export_directory(source: Path, target: Path, skeleton: nn.Module, names: Names = unchanged) -> tuple[str, ...]:
    """Write the finished run directory `source` as a compressed-tensors model into the new directory `target`.

    `skeleton` is the model without weights (parameters on meta, experts unfused): it tells which modules are linears.
    `names` gives the clients' names of a parameter, by which a mixture's fused gate and up projections are split.
    Returns what a user should know of clients. Raises ValueError where the format cannot carry some layer.
    """
    dtype = next(parameter.dtype for parameter in skeleton.parameters() if parameter.is_floating_point())
    written = _Written()
    with new_directory(target) as directory:
        files = shards(source)
        for index, file in enumerate(files):
            tensors = _export_shard(file, skeleton, names, dtype, written)
            write_shard(directory / f"model-{index + 1:05d}-of-{len(files):05d}.safetensors", tensors)
        if not written.schemes:
            raise ValueError(f"no linear of {source} is quantized: export needs a run with quantized weights")
        write_index(directory, (file.name for file in directory.glob("*.safetensors")))
        copy_companions(source, directory)
        config = quantization_config(
            written.schemes,
            ignored(skeleton, written.paths, names),
            cache=None if written.cache is None else cache_scheme(written.cache),
            transforms=transform_config(written.mapped),
        )
        write_json(directory / "config.json", {**read_config(source), "quantization_config": config})
    return (*written.told, *_of_whole(written))


def _export_shard(
    file: Path, skeleton: nn.Module, names: Names, dtype: torch.dtype, written: _Written
) -> dict[str, Tensor]:
    """The tensors that one file of a run directory becomes, and a note of them in `written`."""
    stored, rest = native.unpack(shard_header(file).metadata, read_shard(file))
    tensors = {name: tensor[part] for path, tensor in rest.items() for name, part in names(path)}
    for path, layer in stored.items():
        if isinstance(layer, QAttention):
            tensors.update(pack_attention(path, layer))
            written.cache = layer.kv
            continue
        _check_linear(path, skeleton)
        whole = filled(layer)
        written.told.update({} if whole is layer else {FILLED: None})
        for name, part in module_names(path, names):
            tensors.update(_export_linear(name, path, rows(whole, part), dtype, written))
    return tensors


def _export_linear(name: str, path: str, layer: QLayer, dtype: torch.dtype, written: _Written) -> dict[str, Tensor]:
    labels = _labels(name, path)
    if layer.input_map is not None:
        known = transform_of(layer.input_map)
        if known is None:
            raise ValueError(f"{path}: {MAPPED}")
        written.mapped.update(dict.fromkeys(labels, known))
    if not layer.weight.parts and layer.activation is None and layer.weight.dense is not None:
        return {f"{name}.weight": layer.weight.dense}
    scheme, part = scheme_of(layer), layer.weight.parts[0]
    written.paths.add(path)
    written.stored[name] = scheme
    if part.grid.outer is not None:
        written.outer[name] = part.grid.outer.item()
    written.schemes.update(dict.fromkeys(labels, scheme))
    written.told.update(dict.fromkeys(remarks(name, part.grid.spec, layer.activation, (part.shape[0], part.shape[1]))))
    return pack_layer(name, layer, scheme, dtype)


def _of_whole(written: _Written) -> tuple[str, ...]:
    """What is to be told of a model as a whole."""
    found = [ONLINE] if written.mapped else []
    if any(_differ(written.stored, name) for name in written.stored):
        found.append(FUSED)
    if any(_differ(written.outer, name) for name in written.outer):
        found.append(UNEVEN)
    return (*found, *(() if written.cache is None else caches(written.cache)))


def _differ(values: Mapping[str, object], name: str) -> bool:
    """Whether vLLM joins a linear with others that have another value."""
    parent, _, leaf = name.rpartition(".")
    beside = next((joined for joined in _JOINED if leaf in joined), ())
    return any(values.get(f"{parent}.{other}") != values[name] for other in beside)


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
    return (name,) if name == path or in_experts(path) else (name, path)


def _check_linear(path: str, skeleton: nn.Module) -> None:
    module = skeleton.get_submodule(path)
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{path} is a {type(module).__name__}, and {NOT_LINEAR}")
