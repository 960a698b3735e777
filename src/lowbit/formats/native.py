"""lowbit's own files: safetensors whose header describes the quantized tensors in them.

A quantized weight called `name` is stored as `name.codes` (rows packed without gaps), `name.scale` (in storage dtype),
where scales are relative to something `name.outer`, where the rule has zero-points `name.zero` (packed as one stream),
where least values are stored `name.offset`,
and where groups follow another column order `name.order`; a low-rank correction lies under `name.low_rank`, a 16-bit
part is `name.dense`, online maps lie under `name.input_map` and `name.output_map`, a partition of the entries under
`name.regions` (codes are then stored for a part's own entries, as one stream), 16-bit entries under `name.sparse`,
codes of vectors under `name.lattice` (and `name.lattice1`), and input channels that are not quantized under
`name.outliers`. The header's "lowbit" entry lists the formats in use once and says for every weight which one it has,
so a shard can be read back alone. `pack` and `unpack`
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

from ..numerics import bits
from ..numerics.grid import Grid
from ..numerics.kv import KV, Affine
from ..numerics.lattice import Lattice
from ..numerics.maps import Map, map_from
from ..numerics.places import Regions, Sparse
from ..numerics.qtensor import LowRank, Outliers, QAttention, QLayer, QTensor, QWeight
from ..numerics.spec import Codebook, Float, Int, Number, Spec
from .files import shard_header, write_json
from .native_scales import pack_scales, unpack_scales

VERSION = 1
"""Version of the layout and of the numerics behind it: a file of another version is refused, never misread."""

METHOD = "lowbit"
"""What config.json calls the way in which weights are stored."""

_SIDES = ("left", "right")
"""The factors of a low-rank correction."""
_MAPS = ("input_map", "output_map")
"""The online maps in front of a linear and behind it."""
_CACHED = ("key", "value")
"""What an attention caches."""


_INSIDE = re.compile(
    r"(\.(part|lattice)\d+|\.low_rank\.(left|right)|\.(low_rank|(input|output)_map|regions|sparse|lattice|outliers))?"
    r"\.[a-z_]+$"
)
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
    regions = layer.weight.regions
    for index, part in enumerate(layer.weight.parts):
        mask = None if regions is None or part.region is None else regions.mask(part.region)
        tensors.update(_pack_part(_prefix(name, index), part, mask))
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
    tensors.update(_pack_map(f"{name}.output_map", layer.output_map))
    if layer.input_clip is not None:
        tensors[f"{name}.input_clip"] = layer.input_clip
    lattices = ((_lattice(index), term) for index, term in enumerate(layer.weight.lattices))
    for kind, term in (("regions", regions), ("sparse", layer.weight.sparse), *lattices):
        if term is not None:
            tensors.update({f"{name}.{kind}.{key}": value for key, value in term.tensors().items()})
    if layer.outliers is not None:
        held = {"columns": layer.outliers.columns, "weight": layer.outliers.weight}
        tensors.update({f"{name}.outliers.{key}": value for key, value in held.items() if value is not None})
    return tensors


def _pack_part(prefix: str, part: QTensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """A part's tensors; of one that covers a region, codes of the entries in `mask` alone."""
    spec = part.grid.spec
    tensors = {
        f"{prefix}.codes": bits.pack(part.codes if mask is None else part.codes[mask], spec.bits),
        **{f"{prefix}.{key}": tensor for key, tensor in pack_scales(part.grid).items()},
    }
    if part.grid.zero is not None:
        tensors[f"{prefix}.zero"] = _pack_zero(part.grid.zero, spec)
    if part.order is not None:
        tensors[f"{prefix}.order"] = part.order.to(torch.int32)
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
        for side in _MAPS:
            if getattr(layer, side) is not None:
                entry[side] = getattr(layer, side).describe()
        if layer.weight.regions is not None:
            covered = [part.region for part in layer.weight.parts]
            entry["regions"] = {"count": layer.weight.regions.count, "parts": covered}
        if layer.weight.sparse is not None:
            entry["sparse"] = layer.weight.sparse.describe()
        if layer.weight.lattices:
            entry["lattices"] = [lattice.book for lattice in layer.weight.lattices]
        if layer.outliers is not None:
            entry["outliers"] = {"threshold": layer.outliers.threshold}
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
    return map_from(entry, _inside(name, rest))


def _inside(name: str, rest: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take the tensors below `name` out of `rest`."""
    return {key.removeprefix(f"{name}."): rest.pop(key) for key in list(rest) if key.startswith(f"{name}.")}


def _unpack_layer(name: str, site: Mapping[str, Any], formats: list[Spec | None], rest: dict[str, Tensor]) -> QLayer:
    shape = torch.Size(site["shape"])
    specs = [formats[i] for i in site["parts"]]
    regions, covered = None, [None] * len(specs)
    if "regions" in site:
        regions = Regions.of(_inside(f"{name}.regions", rest), shape, site["regions"]["count"])
        covered = site["regions"]["parts"]
    parts = tuple(
        _unpack_part(_prefix(name, i), spec, shape, rest, regions, covered[i])
        for i, spec in enumerate(specs)
        if spec is not None
    )
    low_rank = None
    if "low_rank" in site:
        factors = {f"{name}.low_rank.{side}": site["low_rank"][side] for side in _SIDES}
        low_rank = LowRank(*(_unpack_factor(prefix, entry, formats, rest) for prefix, entry in factors.items()))
    sparse = None
    if "sparse" in site:
        sparse = Sparse.from_tensors(_inside(f"{name}.sparse", rest), shape, site["sparse"]["layout"])
    lattices = tuple(
        Lattice.from_tensors(_inside(f"{name}.{_lattice(index)}", rest), book)
        for index, book in enumerate(site.get("lattices", ()))
    )
    weight = QWeight(parts, low_rank, rest.pop(f"{name}.dense", None), regions, sparse, lattices)
    activation = None if site["activation"] is None else formats[site["activation"]]
    scale, zero = rest.pop(f"{name}.input_scale", None), rest.pop(f"{name}.input_zero", None)
    grid = None if scale is None or activation is None else Grid(activation, scale, zero)
    before, behind = (_unpack_map(f"{name}.{side}", site.get(side), rest) for side in _MAPS)
    outliers = None
    if "outliers" in site:
        held = _inside(f"{name}.outliers", rest)
        outliers = Outliers(held.get("columns"), site["outliers"]["threshold"], held.get("weight"))
    return QLayer(weight, activation, grid, before, rest.pop(f"{name}.input_clip", None), behind, outliers)


def _unpack_factor(
    name: str, entry: Mapping[str, Any], formats: list[Spec | None], rest: dict[str, Tensor]
) -> Tensor | QTensor:
    spec = None if entry["format"] is None else formats[entry["format"]]
    return rest.pop(name) if spec is None else _unpack_part(name, spec, torch.Size(entry["shape"]), rest)


def _prefix(name: str, part: int) -> str:
    return name if part == 0 else f"{name}.part{part}"


def _lattice(index: int) -> str:
    return "lattice" if index == 0 else f"lattice{index}"


def _unbounded(spec: Spec) -> bool:
    return isinstance(spec.number, Int) and spec.number.rule == "asymmetric-deepspeed"


def _pack_zero(zero: Tensor, spec: Spec) -> Tensor:
    """Zero-points are codes, packed as one stream (rows of a few would be mostly padding) unless unbounded."""
    return zero.to(torch.int32) if _unbounded(spec) else bits.pack(zero.to(torch.uint8).flatten(), spec.bits)


def _unpack_part(
    prefix: str,
    spec: Spec,
    shape: torch.Size,
    rest: dict[str, Tensor],
    regions: Regions | None = None,
    region: int | None = None,
) -> QTensor:
    signed = isinstance(spec.number, Int) and spec.number.signed
    packed = rest.pop(f"{prefix}.codes")
    if regions is None or region is None:
        codes = bits.unpack(packed, spec.bits, shape[-1], signed=signed)
    else:
        mask = regions.mask(region)
        inside = bits.unpack(packed, spec.bits, int(mask.sum()), signed=signed)
        codes = torch.zeros(shape, dtype=inside.dtype, device=inside.device).masked_scatter(mask, inside)
    held = {key: rest.pop(f"{prefix}.{key}") for key in ("scale", "offset", "outer") if f"{prefix}.{key}" in rest}
    scale, offset, outer = unpack_scales(spec, shape, held)
    zero = rest.pop(f"{prefix}.zero", None)
    if zero is not None:
        flat = zero if _unbounded(spec) else bits.unpack(zero, spec.bits, scale.numel(), signed=False)
        zero = flat.float().reshape(scale.shape)
    order = rest.pop(f"{prefix}.order", None)
    grid = Grid(spec, scale, zero, outer, offset)
    return QTensor(codes, grid, None if order is None else order.long(), region)


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json of a directory of lowbit's: the model's configuration and the mark that its weights are codes."""
    write_json(
        directory / "config.json", {**config, "quantization_config": {"quant_method": METHOD, "version": VERSION}}
    )


_HELD = {"sparse", "lattices"}
"""What a quantized weight may be made of beside codes on grids."""
_TERMS = {
    "regions": "parts of its own for some entries",
    "sparse": "16-bit entries",
    "lattices": "codes of vectors",
    "output_map": "a map of its outputs",
    "outliers": "inputs that are not quantized",
}


def terms(header: Mapping[str, str]) -> dict[str, list[str]]:
    """What the quantized sites of a file hold beside what other formats know, in words, by the site's name."""
    sites = json.loads(header.get("lowbit", '{"sites": {}}'))["sites"]
    return {name: [words for key, words in _TERMS.items() if key in site] for name, site in sites.items()}


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
        sites = {name: site for name, site in every.items() if _HELD.intersection(site) or site["parts"]}
        weights += sum(prod(site["shape"]) for site in sites.values())
        for name, entry in header.tensors.items():
            if owner_of(name) in sites and not name.endswith(".bias"):
                stored += entry.stop - entry.start
            else:
                others += prod(entry.shape)
    return Sizes(weights, stored, weights + others, total)
