"""lowbit's own files: safetensors whose header describes the quantized tensors in them.

A quantized weight called `name` is stored as `name.codes` (rows packed without gaps), `name.scale` (in storage dtype),
where scales are relative to something `name.outer`, where the rule has zero-points `name.zero` (packed as one stream),
where least values are stored `name.offset`,
and where groups follow another column order `name.order`; a low-rank correction lies under `name.low_rank`, a 16-bit
part is `name.dense`, an online map of the inputs lies under `name.input_map`. The header's "lowbit" entry lists the
formats in use once and says for every weight which one it has, so a shard can be read back alone. `pack` and `unpack`
are pure and inverse to each other, on the meta device too.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..numerics import bits, kquant
from ..numerics.grid import Grid
from ..numerics.kv import KV, Affine
from ..numerics.maps import Map, map_from
from ..numerics.qtensor import LowRank, QAttention, QLayer, QTensor, QWeight
from ..numerics.scales import scale_codes, scale_values
from ..numerics.spec import Codebook, Float, Int, Number, Spec
from .files import shard_header, write_json

VERSION = 1
"""Version of the layout and of the numerics behind it: a file of another version is refused, never misread."""

METHOD = "lowbit"
"""What config.json calls the way in which weights are stored."""

_SIDES = ("left", "right")
"""The factors of a low-rank correction."""
_CACHED = ("key", "value")
"""What an attention caches."""


_INSIDE = re.compile(r"(\.part\d+|\.low_rank|\.low_rank\.(left|right)|\.input_map)?\.[a-z_]+$")
"""What follows a linear's name in the names of its tensors."""


def spec_to_json(spec: Spec | None) -> dict[str, Any] | None:
    """A format as plain data."""
    if spec is None:
        return None
    kind = type(spec.number).__name__.lower()
    return {"kind": kind, **dataclasses.asdict(spec), "block": list(spec.block)}


def spec_from_json(data: Mapping[str, Any] | None) -> Spec | None:
    """The inverse of `spec_to_json`."""
    if data is None:
        return None
    fields, kind = data["number"], data["kind"]
    number: Number
    if kind == "codebook":
        number = Codebook(fields["name"], tuple(fields["levels"]))
    else:
        number = Int(**fields) if kind == "int" else Float(**fields)
    return Spec(number, (data["block"][0], data["block"][1]), data["scale"], data["dynamic"])


def pack(name: str, layer: QLayer | QAttention) -> dict[str, Tensor]:
    """The named tensors of one quantized linear or attention."""
    return _pack_attention(name, layer) if isinstance(layer, QAttention) else _pack_layer(name, layer)


def _pack_attention(name: str, attention: QAttention) -> dict[str, Tensor]:
    tensors = _pack_map(f"{name}.key_map", attention.key_map)
    if attention.clips is not None:
        tensors[f"{name}.kv_clips"] = attention.clips
    for side, affine in zip(_CACHED, attention.affine, strict=True):
        if affine is not None:
            tensors[f"{name}.{side}_scale"] = affine.scale
            if affine.offset is not None:
                tensors[f"{name}.{side}_offset"] = affine.offset
    return tensors


def _pack_map(prefix: str, map: Map | None) -> dict[str, Tensor]:
    return {} if map is None else {f"{prefix}.{key}": value for key, value in map.tensors().items()}


def _pack_layer(name: str, layer: QLayer) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for index, part in enumerate(layer.weight.parts):
        tensors.update(_pack_part(_prefix(name, index), part))
    if layer.weight.low_rank is not None:
        for side in _SIDES:
            factor, prefix = getattr(layer.weight.low_rank, side), f"{name}.low_rank.{side}"
            tensors.update(_pack_part(prefix, factor) if isinstance(factor, QTensor) else {prefix: factor})
    if layer.weight.dense is not None:
        tensors[f"{name}.dense"] = layer.weight.dense
    if layer.input_grid is not None:
        tensors[f"{name}.input_scale"] = layer.input_grid.scale
        if layer.input_grid.zero is not None:
            tensors[f"{name}.input_zero"] = layer.input_grid.zero
    tensors.update(_pack_map(f"{name}.input_map", layer.input_map))
    if layer.input_clip is not None:
        tensors[f"{name}.input_clip"] = layer.input_clip
    return tensors


def _pack_part(prefix: str, part: QTensor) -> dict[str, Tensor]:
    spec = part.grid.spec
    tensors = {
        f"{prefix}.codes": bits.pack(part.codes, spec.bits),
        **{f"{prefix}.{key}": tensor for key, tensor in _pack_scales(part.grid).items()},
    }
    if part.grid.zero is not None:
        tensors[f"{prefix}.zero"] = _pack_zero(part.grid.zero, spec)
    if part.order is not None:
        tensors[f"{prefix}.order"] = part.order.to(torch.int32)
    return tensors


def _pack_scales(grid: Grid) -> dict[str, Tensor]:
    """Scales, what they are relative to, and least values, as the spec stores them."""
    spec, outer = grid.spec, grid.outer
    if spec.scale == "kquant":
        assert outer is not None
        width = kquant.layout(spec).bits
        tensors = {
            "scale": bits.pack(kquant.to_scale_codes(grid.scale, outer, spec), width),
            "outer": outer.half(),
        }
        if grid.offset is not None:
            tensors["offset"] = bits.pack(kquant.to_offset_codes(grid.offset, outer, spec), width)
        return tensors
    tensors = {"scale": scale_codes(grid.scale, spec.scale, outer)}
    if outer is not None:
        tensors["outer"] = outer
    if grid.offset is not None:
        tensors["offset"] = grid.offset.half()
    return tensors


def describe(layers: Mapping[str, QLayer | QAttention]) -> dict[str, str]:
    """The header entry for the quantized linears and attentions of one file."""
    formats: list[dict[str, Any]] = []

    def index(spec: Spec | None) -> int | None:
        data = spec_to_json(spec)
        if data is None:
            return None
        if data not in formats:
            formats.append(data)
        return formats.index(data)

    def site(layer: QLayer) -> dict[str, Any]:
        entry: dict[str, Any] = {
            "shape": list(layer.weight.shape),
            "parts": [index(part.grid.spec) for part in layer.weight.parts],
            "activation": index(layer.activation),
        }
        if layer.weight.low_rank is not None:
            factors = {side: getattr(layer.weight.low_rank, side) for side in _SIDES}
            entry["low_rank"] = {
                side: {"shape": list(f.shape), "format": index(f.grid.spec) if isinstance(f, QTensor) else None}
                for side, f in factors.items()
            }
        if layer.input_map is not None:
            entry["input_map"] = layer.input_map.describe()
        return entry

    def attention(layer: QAttention) -> dict[str, Any]:
        entry: dict[str, Any] = {"kv": layer.kv.to_json()}
        return entry if layer.key_map is None else entry | {"key_map": layer.key_map.describe()}

    sites = {name: site(layer) for name, layer in sorted(layers.items()) if isinstance(layer, QLayer)}
    content: dict[str, Any] = {"version": VERSION, "formats": formats, "sites": sites}
    attentions = {name: attention(layer) for name, layer in sorted(layers.items()) if isinstance(layer, QAttention)}
    if attentions:
        content["attentions"] = attentions
    return {"lowbit": json.dumps(content, sort_keys=True)}


def unpack(
    header: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, QLayer | QAttention], dict[str, Tensor]]:
    """(quantized layers by name, every other tensor of the file). Raises ValueError on a file of another version."""
    meta = json.loads(header.get("lowbit", f'{{"version": {VERSION}, "formats": [], "sites": {{}}}}'))
    if meta["version"] != VERSION:
        raise ValueError(
            f"the file has layout version {meta['version']}, this lowbit reads version {VERSION}: requantize the model"
        )
    formats = [spec_from_json(data) for data in meta["formats"]]
    rest = dict(tensors)
    layers: dict[str, QLayer | QAttention] = {}
    for name, site in meta["sites"].items():
        layers[name] = _unpack_layer(name, site, formats, rest)
    for name, entry in meta.get("attentions", {}).items():
        layers[name] = _unpack_attention(name, entry, rest)
    return layers, rest


def _unpack_attention(name: str, entry: Mapping[str, Any], rest: dict[str, Tensor]) -> QAttention:
    affine: list[Affine | None] = []
    for side in _CACHED:
        scale = rest.pop(f"{name}.{side}_scale", None)
        affine.append(None if scale is None else Affine(scale, rest.pop(f"{name}.{side}_offset", None)))
    key_map = _unpack_map(f"{name}.key_map", entry.get("key_map"), rest)
    kv = KV.from_json(entry["kv"])
    return QAttention(kv, key_map, rest.pop(f"{name}.kv_clips", None), (affine[0], affine[1]))


def _unpack_map(name: str, entry: Mapping[str, Any] | None, rest: dict[str, Tensor]) -> Map | None:
    if entry is None:
        return None
    inside = {key.removeprefix(f"{name}."): rest.pop(key) for key in list(rest) if key.startswith(f"{name}.")}
    return map_from(entry, inside)


def _unpack_layer(name: str, site: Mapping[str, Any], formats: list[Spec | None], rest: dict[str, Tensor]) -> QLayer:
    shape = torch.Size(site["shape"])
    specs = [formats[i] for i in site["parts"]]
    parts = tuple(_unpack_part(_prefix(name, i), spec, shape, rest) for i, spec in enumerate(specs) if spec is not None)
    low_rank = None
    if "low_rank" in site:
        factors = {f"{name}.low_rank.{side}": site["low_rank"][side] for side in _SIDES}
        low_rank = LowRank(*(_unpack_factor(prefix, entry, formats, rest) for prefix, entry in factors.items()))
    weight = QWeight(parts, low_rank, rest.pop(f"{name}.dense", None))
    activation = None if site["activation"] is None else formats[site["activation"]]
    scale, zero = rest.pop(f"{name}.input_scale", None), rest.pop(f"{name}.input_zero", None)
    grid = None if scale is None or activation is None else Grid(activation, scale, zero)
    map = _unpack_map(f"{name}.input_map", site.get("input_map"), rest)
    return QLayer(weight, activation, grid, map, rest.pop(f"{name}.input_clip", None))


def _unpack_factor(
    name: str, entry: Mapping[str, Any], formats: list[Spec | None], rest: dict[str, Tensor]
) -> Tensor | QTensor:
    spec = None if entry["format"] is None else formats[entry["format"]]
    return rest.pop(name) if spec is None else _unpack_part(name, spec, torch.Size(entry["shape"]), rest)


def _prefix(name: str, part: int) -> str:
    return name if part == 0 else f"{name}.part{part}"


def _unbounded(spec: Spec) -> bool:
    return isinstance(spec.number, Int) and spec.number.rule == "asymmetric-deepspeed"


def _pack_zero(zero: Tensor, spec: Spec) -> Tensor:
    """Zero-points are codes, packed as one stream (rows of a few would be mostly padding) unless unbounded."""
    return zero.to(torch.int32) if _unbounded(spec) else bits.pack(zero.to(torch.uint8).flatten(), spec.bits)


def _unpack_part(prefix: str, spec: Spec, shape: torch.Size, rest: dict[str, Tensor]) -> QTensor:
    signed = isinstance(spec.number, Int) and spec.number.signed
    codes = bits.unpack(rest.pop(f"{prefix}.codes"), spec.bits, shape[-1], signed=signed)
    scale, offset, outer = _unpack_scales(prefix, spec, shape, rest)
    zero = rest.pop(f"{prefix}.zero", None)
    if zero is not None:
        flat = zero if _unbounded(spec) else bits.unpack(zero, spec.bits, scale.numel(), signed=False)
        zero = flat.float().reshape(scale.shape)
    order = rest.pop(f"{prefix}.order", None)
    grid = Grid(spec, scale, zero, outer, offset)
    return QTensor(codes, grid, None if order is None else order.long())


def _unpack_scales(
    prefix: str, spec: Spec, shape: torch.Size, rest: dict[str, Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The inverse of `_pack_scales`: (scale, offset, outer)."""
    scale, outer, offset = (rest.pop(f"{prefix}.{key}", None) for key in ("scale", "outer", "offset"))
    assert scale is not None
    if spec.scale != "kquant":
        return scale_values(scale, spec.scale, outer), None if offset is None else offset.float(), outer
    assert outer is not None
    form, outer = kquant.layout(spec), outer.float()
    units = shape[-1] // form.width
    scale = bits.unpack(scale, form.bits, units, signed=not form.minima)
    if offset is not None:
        offset = kquant.effective(bits.unpack(offset, form.bits, units, signed=False), outer[..., 1])
    return kquant.effective(scale, outer[..., 0]), offset, outer


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json of a directory of lowbit's: the model's configuration and the mark that its weights are codes."""
    write_json(
        directory / "config.json", {**config, "quantization_config": {"quant_method": METHOD, "version": VERSION}}
    )


def owner_of(tensor: str) -> str:
    """The linear that a tensor of a file belongs to, if it belongs to one."""
    return _INSIDE.sub("", tensor)


@dataclass(frozen=True)
class Sizes:
    """What a directory of lowbit's files weighs."""

    quantized_weights: int
    """Number of weights of the quantized sites."""
    stored_bytes: int
    """Bytes of everything stored for them: codes, scales, zero-points, column orders, input ranges."""
    parameters: int
    """Number of the model's parameters, quantized or not."""
    file_bytes: int


def sizes(directory: Path) -> Sizes:
    """Count a directory's shards from their headers alone."""
    weights = stored = others = total = 0
    for file in sorted(directory.glob("*.safetensors")):
        header = shard_header(file)
        total += file.stat().st_size
        every = json.loads(header.metadata.get("lowbit", '{"sites": {}}'))["sites"]
        sites = {name: site for name, site in every.items() if site["parts"]}
        weights += sum(prod(site["shape"]) for site in sites.values())
        for name, entry in header.tensors.items():
            if owner_of(name) in sites and not name.endswith(".bias"):
                stored += entry.stop - entry.start
            else:
                others += prod(entry.shape)
    return Sizes(weights, stored, weights + others, total)
