"""lowbit's own files: safetensors whose header describes the quantized tensors in them.

A quantized weight called `name` is stored as `name.codes` (rows packed without gaps), `name.scale` (in storage dtype),
where the rule has zero-points `name.zero` (packed as one stream), and where groups follow another column order
`name.order`. The header's "lowbit" entry lists the formats in use once and says for every weight which one it has, so
a shard can be read back alone. `pack` and `unpack` are pure and inverse to each other, on the meta device too.
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
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..numerics.spec import Float, Int, Number, Spec
from .files import shard_header

VERSION = 1
"""Version of the layout and of the numerics behind it: a file of another version is refused, never misread."""

_STORED = {"half": torch.float16, "float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def spec_to_json(spec: Spec | None) -> dict[str, Any] | None:
    """A format as plain data."""
    if spec is None:
        return None
    kind = "int" if isinstance(spec.number, Int) else "float"
    return {"kind": kind, **dataclasses.asdict(spec), "block": list(spec.block)}


def spec_from_json(data: Mapping[str, Any] | None) -> Spec | None:
    """The inverse of `spec_to_json`."""
    if data is None:
        return None
    number: Number = Int(**data["number"]) if data["kind"] == "int" else Float(**data["number"])
    return Spec(number, (data["block"][0], data["block"][1]), data["scale"], data["dynamic"])


def pack(name: str, layer: QLayer) -> dict[str, Tensor]:
    """The named tensors of one quantized linear."""
    tensors: dict[str, Tensor] = {}
    for index, part in enumerate(layer.weight.parts):
        prefix = _prefix(name, index)
        spec = part.grid.spec
        tensors[f"{prefix}.codes"] = bits.pack(part.codes, spec.bits)
        tensors[f"{prefix}.scale"] = part.grid.scale.to(_STORED[spec.scale])
        if part.grid.zero is not None:
            tensors[f"{prefix}.zero"] = _pack_zero(part.grid.zero, spec)
        if part.order is not None:
            tensors[f"{prefix}.order"] = part.order.to(torch.int32)
    if layer.input_grid is not None:
        tensors[f"{name}.input_scale"] = layer.input_grid.scale
        if layer.input_grid.zero is not None:
            tensors[f"{name}.input_zero"] = layer.input_grid.zero
    return tensors


def describe(layers: Mapping[str, QLayer]) -> dict[str, str]:
    """The header entry for the quantized linears of one file."""
    formats: list[dict[str, Any]] = []

    def index(spec: Spec | None) -> int | None:
        data = spec_to_json(spec)
        if data is None:
            return None
        if data not in formats:
            formats.append(data)
        return formats.index(data)

    sites = {
        name: {
            "shape": list(layer.weight.shape),
            "parts": [index(part.grid.spec) for part in layer.weight.parts],
            "activation": index(layer.activation),
        }
        for name, layer in sorted(layers.items())
    }
    return {"lowbit": json.dumps({"version": VERSION, "formats": formats, "sites": sites}, sort_keys=True)}


def unpack(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
    """(quantized linears by name, every other tensor of the file). Raises ValueError on a file of another version."""
    meta = json.loads(header.get("lowbit", f'{{"version": {VERSION}, "formats": [], "sites": {{}}}}'))
    if meta["version"] != VERSION:
        raise ValueError(
            f"the file has layout version {meta['version']}, this lowbit reads version {VERSION}: requantize the model"
        )
    formats = [spec_from_json(data) for data in meta["formats"]]
    rest = dict(tensors)
    layers = {}
    for name, site in meta["sites"].items():
        shape = torch.Size(site["shape"])
        specs = [formats[i] for i in site["parts"]]
        parts = tuple(
            _unpack_part(_prefix(name, i), spec, shape, rest) for i, spec in enumerate(specs) if spec is not None
        )
        activation = None if site["activation"] is None else formats[site["activation"]]
        scale = rest.pop(f"{name}.input_scale", None)
        grid = (
            None
            if scale is None or activation is None
            else Grid(activation, scale, rest.pop(f"{name}.input_zero", None))
        )
        layers[name] = QLayer(QWeight(parts), activation, grid)
    return layers, rest


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
    scale = rest.pop(f"{prefix}.scale").float()
    zero = rest.pop(f"{prefix}.zero", None)
    if zero is not None:
        flat = zero if _unbounded(spec) else bits.unpack(zero, spec.bits, scale.numel(), signed=False)
        zero = flat.float().reshape(scale.shape)
    order = rest.pop(f"{prefix}.order", None)
    grid = Grid(spec, scale, zero)
    return QTensor(codes, grid, None if order is None else order.long())


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
        sites = json.loads(header.metadata.get("lowbit", '{"sites": {}}'))["sites"]
        weights += sum(prod(site["shape"]) for site in sites.values())
        for name, entry in header.tensors.items():
            base, _, leaf = name.rpartition(".")
            if re.sub(r"\.part\d+$", "", base) in sites and leaf != "bias":
                stored += entry.stop - entry.start
            else:
                others += prod(entry.shape)
    return Sizes(weights, stored, weights + others, total)
