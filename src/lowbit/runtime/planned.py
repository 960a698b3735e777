"""What an export may weigh: the codes and scales of the run it was made from, counted from the headers of its files.

Formats spell the same codes in somewhat different room: words of 32 bits, fp32 scales where lowbit has 16 bits, offsets
beside scales, the group of every column. All that is bounded by a few bytes for each scale, column and row. A weight
that stayed 16 bits, a head written twice or a buffer left behind is not.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

from ..formats.base import Format
from ..formats.files import Header, shard_header
from ..formats.foreign import GGUF
from ..formats.native import owner_of, spec_from_json
from ..numerics.spec import PLAIN, Spec

_PER_SCALE = 2
"""Bytes that a format may need more for a plain scale: fp32 instead of 16 bits, an offset instead of a zero-point."""
_PER_LINE = 4
"""Bytes for a row or column: padding of its codes to whole words, and the group that a column belongs to."""
_PER_SITE = 1024
"""Bytes for a linear: its shape, its inputs' range, a scale of the whole tensor, a table of levels."""


@dataclass(frozen=True)
class Planned:
    """Bytes of tensors: as lowbit stores them, and the least and most that another format may take."""

    total: int
    least: int
    most: int
    beside: int
    """Bytes of the tokenizer, which some formats keep in the same file."""

    def measure(self, export: Path) -> int:
        """Bytes of an export's tensors; of a .gguf file, which holds the tokenizer too, less that of it at most."""
        shards = [shard_header(file) for file in export.glob("*.safetensors")]
        tensors = sum(entry.stop - entry.start for header in shards for entry in header.tensors.values())
        whole = sum(file.stat().st_size for file in export.glob(f"*{GGUF}"))
        return tensors + max(0, whole - self.beside) if whole else tensors


def planned(source: Path, form: Format) -> Planned:
    """The bounds of an export of the finished run directory `source` in a format."""
    bounds = [
        _of_shard(shard_header(file), getattr(form, "stored_bytes", None)) for file in source.glob("*.safetensors")
    ]
    total, least, most = (sum(bound) for bound in zip(*bounds, strict=True))
    return Planned(total, least, most, sum(file.stat().st_size for file in source.glob("tokenizer*")))


def _of_shard(header: Header, sized: Callable[[Spec, tuple[int, int]], int] | None) -> tuple[int, int, int]:
    """(total, least, most) of one file; `sized` is the format's own word on a linear's bytes, where it has one."""
    described = json.loads(header.metadata.get("lowbit", '{"sites": {}, "formats": []}'))
    sites = {name: site for name, site in described["sites"].items() if site["parts"]}
    stored, units = dict.fromkeys(sites, 0), dict.fromkeys(sites, 0)
    total = least = most = 0
    for name, entry in header.tensors.items():
        owner, size = owner_of(name), entry.stop - entry.start
        if owner not in sites or name.endswith(".bias"):
            total, least = total + size, least + size // 2
            most += size if len(entry.shape) > 1 else 2 * size  # some keep vectors in fp32
            continue
        stored[owner] += size
        units[owner] += prod(entry.shape) if name.endswith(".scale") else 0
    for name, site in sites.items():
        spec, (rows, columns) = spec_from_json(described["formats"][site["parts"][0]]), site["shape"]
        assert spec is not None
        room = _PER_LINE * (rows + columns) + _PER_SITE
        size = stored[name] if sized is None else sized(spec, (rows, columns))
        total, most = total + size, most + size + room
        least += rows * columns * spec.bits // 8 if sized is None else size
        most += _PER_SCALE * units[name] if sized is None and spec.scale in PLAIN else 0
        most += rows * columns * spec.bits // 8 if "regions" in site else 0  # formats write zeros out
    return total, least, most
