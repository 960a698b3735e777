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
from typing import Protocol, cast

from torch import Tensor, nn

from ..numerics.qtensor import QAttention, QLayer, QWeight
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
    """A format that other software reads."""

    def refuse(
        self,
        weights: Spec | None,
        activation: Spec | None,
        *,
        transposed: bool = False,
        ordered: bool = False,
        mapped: bool = False,
    ) -> str | None:
        """Why the format cannot carry a layer of these formats, with advice, or None if it can."""

    def refuse_whole(self, *, cached: bool, corrected: bool) -> str | None:
        """Why the format cannot carry a model with a quantized cache, or with corrections of weights, or None."""

    def notices(self, weights: Spec, activation: Spec | None) -> tuple[str, ...]:
        """What a user should know of clients that read such a layer differently, or not at all."""

    def export_directory(self, source: Path, target: Path, skeleton: nn.Module, names: Names = ...) -> tuple[str, ...]:
        """Write the finished run `source` to the new directory `target`; gives notices. See the format's own."""


_MODULES = {"compressed-tensors": "compressed_tensors"}


def find(name: str) -> Format:
    """The format of this name. Raises ValueError, with the nearest name, where there is none."""
    if name not in _MODULES:
        near = get_close_matches(name, _MODULES, 1, 0.4)
        hint = f"did you mean {near[0]}?" if near else f"lowbit exports {', '.join(_MODULES)}"
        raise ValueError(f"unknown format {name!r}: {hint}")
    return cast(Format, import_module(f".{_MODULES[name]}", __package__))


def unchanged(name: str) -> Sequence[tuple[str, slice]]:
    """The naming of a model whose clients use the model's own names."""
    return ((name, slice(None)),)


def rows(layer: QLayer, part: slice) -> QLayer:
    """The linear that computes the output rows `part` of a layer [O, I]."""
    start, stop, _ = part.indices(layer.weight.shape[0])
    if (start, stop) == (0, layer.weight.shape[0]):
        return layer
    return replace(layer, weight=QWeight(tuple(piece.rows(start, stop) for piece in layer.weight.parts)))


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
    stored, rest = native.unpack(shard_header(shard).metadata, read_shard(shard))
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
