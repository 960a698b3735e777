"""What every export format shares: its contract, and the way from a run directory to another directory.

A format is a module of this package with the functions of `Format`; there is nothing to subclass. Directories are
converted shard by shard, so memory is one block's, and a new directory takes its name only when all of it is there.

A run directory is read through `model.safetensors.index.json`, the shards it names, and `config.json`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from ..numerics.grid import Grid
from ..numerics.kv import KV
from ..numerics.maps import Map
from ..numerics.qtensor import QAttention, QLayer, QTensor, QWeight
from ..numerics.spec import Spec
from . import native
from .files import INDEX, read_shard, shard_header

COMPANIONS = (
    "generation_config.json",
    "chat_template*",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "*.py",
)
"""Files beside the weights that a model needs as they are."""

CACHED = "no export carries quantized keys and values: use native, or a recipe that keeps the cache in 16 bits"

Names = Callable[[str], Sequence[tuple[str, slice]]]
"""A parameter of the model -> the tensors that clients know it by, with the output rows that each one holds."""


class Format(Protocol):
    """A format that other software reads.

    It may also have `stored_bytes(weights, shape)`, where codes and scales take another room than in lowbit's files,
    and `ENCODED`, the names of the Encodes whose weights it carries.
    """

    CLIENTS: Sequence[str]
    """Who reads it, by the names of `runtime.clients`; the first is the one that `--verify` takes by itself."""

    def refuse(
        self,
        weights: Spec | None,
        activation: Spec | None,
        *,
        shape: tuple[int, int] | None = None,
        transposed: bool = False,
        ordered: bool = False,
        mapped: Map | bool = False,
    ) -> str | None:
        """Why the format cannot carry a layer of these formats, with advice, or None if it can.

        `mapped` is the online map that inputs pass, or True for one that is not known yet.

        `shape` [O, I] is None where the question is about the formats alone, as in the table of docs/formats.md.
        """

    def refuse_whole(self, *, kv: KV | None, corrected: bool) -> str | None:
        """Why the format cannot carry a model with such a cache, or with corrections of weights, or None."""

    def notices(self, weights: Spec, activation: Spec | None) -> tuple[str, ...]:
        """What a user should know of clients that read such a layer differently, or not at all."""

    def export_directory(self, source: Path, target: Path, skeleton: nn.Module, names: Names = ...) -> tuple[str, ...]:
        """Write the finished run `source` to the new directory `target`; gives notices. See the format's own."""


_MODULES = {
    "compressed-tensors": "compressed_tensors",
    "gptq": "gptq",
    "awq": "awq",
    "gguf": "gguf",
    "modelopt": "modelopt",
    "mlx": "mlx",
    "bitsandbytes": "bitsandbytes",
}


INSTEAD = {
    "onnx": "ONNX has no operator for most of what lowbit stores, and its runtimes quantize again on import: use gguf "
    "for llama.cpp on any CPU, compressed-tensors for servers, or mlx for Apple's chips",
}
"""What is not written and will not be: why, and what to use instead."""


def find(name: str) -> Format:
    """The format of this name. Raises ValueError, with the nearest name, where there is none."""
    if name in INSTEAD:
        raise ValueError(f"lowbit does not write {name}: {INSTEAD[name]}")
    if name not in _MODULES:
        near = get_close_matches(name, _MODULES, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else f"lowbit exports {', '.join(_MODULES)}"
        raise ValueError(f"unknown format {name!r}: {hint}")
    return cast(Format, import_module(f".{_MODULES[name]}", __package__))


def refusal(form: Format, config: Mapping[str, object]) -> str | None:
    """Why a format cannot carry a model of this configuration (all fields present), where it says so, or None."""
    refuse_model = getattr(form, "refuse_model", None)
    return None if refuse_model is None else refuse_model(config)


def refuse_encoded(name: str, form: Format, encode: str) -> str | None:
    """Why the format `name` cannot carry what an Encode makes, or None."""
    if encode in getattr(form, "ENCODED", ()):
        return None
    return f"{name} has no place for what {encode} makes of a weight: use native, or a recipe without {encode}"


def narrowed(form: Format, weights: Spec | None) -> Spec | None:
    """The weight format as a target stores it, where it has a way of its own (`narrow`): decided before rounding."""
    narrow = getattr(form, "narrow", None)
    return weights if narrow is None or weights is None else narrow(weights)


def modules() -> Iterator[tuple[str, Format]]:
    """Every format with its name."""
    return ((name, find(name)) for name in _MODULES)


def unchanged(name: str) -> Sequence[tuple[str, slice]]:
    """The naming of a model whose clients use the model's own names."""
    return ((name, slice(None)),)


def by_modules(names: Names) -> Names:
    """The naming of clients that know the modules of transformers' tree, and an expert's gate and up apart, as
    GPTQModel does; `names` are the checkpoint's, and tell the two apart.
    """

    def named(name: str) -> Sequence[tuple[str, slice]]:
        parts = [part for _, part in names(name)]
        if len(parts) != 2 or ".gate_up_proj." not in name:
            return unchanged(name)
        return [
            (name.replace(".gate_up_proj.", leaf), part)
            for leaf, part in zip((".gate_proj.", ".up_proj."), parts, strict=True)
        ]

    return named


def rows(layer: QLayer, part: slice) -> QLayer:
    """The linear that computes the output rows `part` of a layer [O, I]."""
    start, stop, _ = part.indices(layer.weight.shape[0])
    if (start, stop) == (0, layer.weight.shape[0]):
        return layer
    return replace(layer, weight=QWeight(tuple(_shared(piece.rows(start, stop)) for piece in layer.weight.parts)))


def _shared(part: QTensor) -> QTensor:
    """The same tensor with one outer scale where all its rows have the same one: undoes what `stack` spread."""
    outer = part.grid.outer
    if part.grid.spec.scale != "e4m3" or outer is None or not torch.equal(outer, outer[:1].expand_as(outer)):
        return part
    return replace(part, grid=replace(part.grid, outer=outer[:1]))


def stack(layers: Sequence[QLayer]) -> QLayer:
    """The linear whose output rows are those of `layers`, one below the other: what parts of a fused weight make.

    Codes stay as they are. One scale for a whole tensor becomes the same scale for each of its rows. Raises ValueError
    where the parts have no common format.
    """
    first = layers[0]
    if len(layers) == 1:
        return first
    if any(layer.weight.dense is not None or layer.weight.low_rank for layer in layers):
        raise ValueError("the parts of a fused weight are sums, which cannot be joined: quantize from the original")
    if len({(len(layer.weight.parts), layer.activation) for layer in layers}) > 1:
        raise ValueError("the parts of a fused weight have different formats: quantize them alike")
    optional = [
        _same("input ranges", [None if layer.input_grid is None else layer.input_grid.scale for layer in layers]),
        _same("input zero-points", [None if layer.input_grid is None else layer.input_grid.zero for layer in layers]),
    ]
    grid = None if optional[0] is None or first.activation is None else Grid(first.activation, optional[0], optional[1])
    terms = zip(*(layer.weight.parts for layer in layers), strict=True)
    joined = tuple(_stack_parts([_by_row(part) for part in parts]) for parts in terms)
    return QLayer(QWeight(joined), first.activation, grid)


def _stack_parts(parts: Sequence[QTensor]) -> QTensor:
    """What `stack` does, of one of the tensors that a weight is the sum of."""
    if len({part.grid.spec for part in parts}) > 1:
        raise ValueError("the parts of a fused weight have different formats: quantize them alike")
    fields = ("scale", "zero", "outer", "offset")
    joined = Grid(parts[0].grid.spec, *(_joined([getattr(part.grid, field) for part in parts]) for field in fields))
    order = _same("column orders", [part.order for part in parts])
    return _shared(QTensor(torch.cat([part.codes for part in parts]), joined, order))


def _joined(tensors: Sequence[Tensor | None]) -> Any:
    return None if tensors[0] is None else torch.cat(cast("list[Tensor]", list(tensors)))


def _by_row(part: QTensor) -> QTensor:
    """The same tensor with a scale, and where scales are relative an outer one, for every row of units."""
    grid, spec = part.grid, part.grid.spec
    rows = part.shape[0]
    if spec.block[0] not in (-1, 1) and rows % spec.block[0]:
        raise ValueError(f"a part of a fused weight has {rows} rows, which blocks of {spec.block[0]} do not divide")
    if spec.block[0] == -1:
        scale, zero = (None if x is None else x.expand(rows, -1) for x in (grid.scale, grid.zero))
        assert scale is not None
        grid = Grid(replace(spec, block=(1, spec.block[1])), scale, zero, grid.outer)
    if spec.scale == "e4m3" and grid.outer is not None:
        grid = replace(grid, outer=grid.outer.expand(len(grid.scale), -1))
    if spec.scale == "double":
        raise ValueError("the parts of a fused weight have doubly quantized scales, which cannot be joined")
    return replace(part, grid=grid)


def _same(what: str, tensors: Sequence[Tensor | None]) -> Tensor | None:
    first = tensors[0]
    for other in tensors[1:]:
        if (first is None) != (other is None) or (first is not None and not torch.equal(first, cast(Tensor, other))):
            raise ValueError(f"the parts of a fused weight have different {what}: quantize them behind one observer")
    return first


def check_terms(name: str, form: Format, source: Path) -> None:
    """Raise ValueError where a finished run holds weights that the format `name` has no place for; headers tell."""
    for shard in shards(source):
        for site, terms in native.terms(shard_header(shard).metadata).items():
            if terms and not getattr(form, "ENCODED", ()):
                raise ValueError(f"{site} is stored with {' and '.join(terms)}, which {name} cannot hold: use native")


def check_names(names: str, form: Format) -> None:
    """Raise ValueError where `names` is no naming, or one that no client of the format looks tensors up by."""
    if names not in ("checkpoint", "transformers"):
        raise ValueError(f"--names {names}: tensors are named as in the checkpoint or as in transformers")
    if names == "transformers" and "gptqmodel" not in form.CLIENTS:
        raise ValueError("only GPTQModel looks tensors up by transformers' names: use --format gptq or awq")


def module_names(path: str, names: Names) -> list[tuple[str, slice]]:
    """The modules that clients know the model's linear `path` by. Raises ValueError where it is no module to them."""
    found = [(name, part) for name, part in names(f"{path}.weight")]
    for name, _ in found:
        if not name.endswith(".weight"):
            raise ValueError(f"the checkpoint keeps {path} inside {name}, which only native can write back: use native")
    return [(name.removesuffix(".weight"), part) for name, part in found]


def shards(source: Path) -> list[Path]:
    """The files of a finished run directory, in order. Raises ValueError where it is none."""
    if not (source / INDEX).is_file() or not (source / "config.json").is_file():
        raise ValueError(f"{source} is not a finished lowbit directory: give one that `lowbit quantize` has completed")
    return [
        source / name for name in sorted(set(json.loads((source / INDEX).read_text("utf8"))["weight_map"].values()))
    ]


def read(shard: Path, names: Names) -> tuple[dict[str, tuple[str, QLayer]], dict[str, Tensor]]:
    """(client's name of a linear -> (model's name, layer), client's name -> tensor) of one file of a run directory."""
    return parse(shard, read_shard(shard), names)


def parse(
    shard: Path, tensors: Mapping[str, Tensor], names: Names
) -> tuple[dict[str, tuple[str, QLayer]], dict[str, Tensor]]:
    """`read` of a file whose tensors are at hand, or on the meta device where nobody asks for their values."""
    stored, rest = native.unpack(shard_header(shard).metadata, tensors)
    if any(isinstance(layer, QAttention) for layer in stored.values()):
        raise ValueError(CACHED)
    layers = {
        name: (path, rows(layer, part))
        for path, layer in stored.items()
        if isinstance(layer, QLayer)
        for name, part in module_names(path, names)
    }
    return layers, {name: tensor[part] for path, tensor in rest.items() for name, part in names(path)}


def copy_companions(source: Path, target: Path) -> None:
    """Copy the tokenizer's, generation and code files."""
    for pattern in COMPANIONS:
        for file in source.glob(pattern):
            shutil.copyfile(file, target / file.name)


def read_config(source: Path) -> Mapping[str, object]:
    """The model's configuration without any mark of how its weights are stored."""
    config = json.loads((source / "config.json").read_text("utf8"))
    return {key: value for key, value in config.items() if key != "quantization_config"}


@contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the name `target` once the block ends well and vanishes if it does not.

    Raises ValueError where `target` holds something already.
    """
    target = target.resolve()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise ValueError(f"{target} holds something already: choose an empty or new directory for --output")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
