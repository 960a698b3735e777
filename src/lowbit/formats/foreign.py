"""Models that other tools quantized, read into codes by the formats' own readers; no foreign package is needed.

A format that can be read has `recognizes` and `layers` (see `Reader`). Here are the files around them: which tensors
belong to one linear, and what a 16-bit checkpoint of the same model would have looked like, so that everything behind
(transformers' renaming, fused experts) can treat a foreign model as an ordinary one. Tensors are read linear by linear,
wherever the shards put them, so memory is what the caller asks for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..numerics.qtensor import QLayer
from .base import modules
from .files import read_at
from .source import scan

GGUF = ".gguf"
READ_ONLY = "fp8"
"""The format that is read and not written."""
_TENSOR = re.compile(r"(.*?)\.(weight\..+|[^.]+)")
"""A module and what it holds; bitsandbytes keeps a weight's state below the weight's name."""
_TINY = 256
"""Elements up to which a tensor is read even where only shapes are asked for: it may say what shape another one has."""


class Reader(Protocol):
    """A format module that reads what other tools wrote."""

    def recognizes(self, config: Mapping[str, Any]) -> bool:
        """Whether a directory with this config.json is of this format."""

    def layers(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
        """(quantized linears by module name, every other tensor) of whole modules' tensors, by their file names."""


class Opened(Protocol):
    """A foreign model whose tensors are read module by module, under the names of its 16-bit checkpoint."""

    name: str
    """The format's name."""
    config: Mapping[str, Any]
    """The model's configuration, as config.json has it."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor of the 16-bit checkpoint -> its shape."""

    def quantized(self) -> frozenset[str]:
        """The modules whose weight is codes."""

    def read(self, names: Iterable[str]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
        """(quantized linears by module name, other tensors by name) that these tensors of the checkpoint come from."""


def foreign_config(path: Path) -> dict[str, Any]:
    """config.json, with ModelOpt's own file beside it under its name."""
    config = dict(json.loads((path / "config.json").read_text("utf8")))
    beside = path / "hf_quant_config.json"
    if beside.is_file():
        config["hf_quant_config"] = json.loads(beside.read_text("utf8"))
    return config


def is_foreign(path: Path) -> bool:
    """Whether lowbit reads this model by a format's reader: another tool's directory, or a .gguf file."""
    if path.suffix == GGUF:
        return path.is_file()
    return (path / "config.json").is_file() and _reader(foreign_config(path)) is not None


def _reader(config: Mapping[str, Any]) -> tuple[str, Reader] | None:
    for name, module in (*modules(), (READ_ONLY, import_module(f".{READ_ONLY}", __package__))):
        if hasattr(module, "recognizes") and module.recognizes(config):
            return name, cast(Reader, module)
    return None


def open_foreign(path: Path) -> Opened:
    """Open a directory that `is_foreign`, or a .gguf file."""
    if path.suffix == GGUF:
        return cast(Opened, import_module(".gguf", __package__).open_file(path))
    config = foreign_config(path)
    found = _reader(config)
    assert found is not None, "ask is_foreign first"
    return Directory(path, *found, config)


class Directory:
    """Another tool's directory of safetensors."""

    def __init__(self, path: Path, name: str, reader: Reader, config: Mapping[str, Any]) -> None:
        self.name, self.config = name, config
        self._reader = reader
        self._files, self._entries = scan(path)
        self._modules: dict[str, list[str]] = {}
        for tensor in self._entries:
            self._modules.setdefault(module_of(tensor), []).append(tensor)
        self._shapes: dict[str, tuple[int, ...]] | None = None
        self._quantized: frozenset[str] = frozenset()
        self._homes: dict[str, str] = {}
        """Module of the 16-bit checkpoint -> module of the file: MLX keeps all experts of a projection in one."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """See `Opened`. Found on first use, from shapes alone where the reader can tell."""
        if self._shapes is None:
            self._shapes = {}
            quantized: set[str] = set()
            for module in self._modules:
                layers, rest = self._describe(module)
                self._homes.update(dict.fromkeys((*layers, *map(module_of, rest)), module))
                self._shapes |= {f"{name}.weight": tuple(layer.weight.shape) for name, layer in layers.items()}
                self._shapes |= {name: tuple(tensor.shape) for name, tensor in rest.items()}
                quantized |= layers.keys()
            self._quantized = frozenset(quantized)
        return self._shapes

    def quantized(self) -> frozenset[str]:
        """See `Opened`."""
        self.shapes()
        return self._quantized

    def read(self, names: Iterable[str]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
        """See `Opened`."""
        self.shapes()
        chosen = dict.fromkeys(self._homes[module_of(name)] for name in names)
        return self._reader.layers(self._tensors(chosen), self.config)

    def _describe(self, module: str) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
        """A module's layers without their values: most readers can tell from shapes, the others get everything."""
        shaped = {}
        for name in self._modules[module]:
            entry = self._entries[name][1]
            tiny = torch.Size(entry.shape).numel() <= _TINY
            shaped[name] = self._tensor(name) if tiny else torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        try:
            return self._reader.layers(shaped, self.config)
        except RuntimeError:  # torch's, of values that a meta tensor does not have
            return self._reader.layers(self._tensors([module]), self.config)

    def _tensors(self, modules: Iterable[str]) -> dict[str, Tensor]:
        return {name: self._tensor(name) for module in modules for name in self._modules[module]}

    def _tensor(self, name: str) -> Tensor:
        path, entry = self._entries[name]
        with path.open("rb", buffering=0) as file:
            return read_at(file, entry.start, torch.empty(entry.shape, dtype=entry.dtype))


def module_of(tensor: str) -> str:
    """The module that a tensor of a checkpoint belongs to."""
    match = _TENSOR.fullmatch(tensor)
    return tensor if match is None else match[1]
