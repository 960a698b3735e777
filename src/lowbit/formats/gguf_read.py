"""A GGUF file as a foreign model: configuration, and tensors under the names of the checkpoint that it stands for.

Blocks become codes on the grids of `gguf_blocks`, whoever quantized them. The file is mapped by the `gguf` package and
read tensor by tensor, so memory is what is asked for. Shape letters: O output rows, B bytes of a row, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..numerics.qtensor import QLayer, QWeight
from . import gguf_blocks as blocks
from . import gguf_config, gguf_names

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}

_BIASED = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias"}
"""What a configuration says of tensors that a file has or has not."""


class File:
    """An open file; see `formats.foreign.Opened`. `config` is the model's configuration, as `config.json` has it."""

    name = "gguf"

    def __init__(self, path: Path) -> None:
        reader = _reader(path)
        fields = {key: field.contents() for key, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        for tensor in reader.tensors:
            if tensor.tensor_type.name not in (*_FLOATS, *blocks.KINDS):
                known = ", ".join((*_FLOATS, *blocks.KINDS))
                raise ValueError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, and lowbit reads {known}")
        rope = {
            name: self._float(name)
            for name in (gguf_config.ROPE_FREQS, gguf_config.ROPE_LONG, gguf_config.ROPE_SHORT)
            if name in self._tensors
        }
        self.config = gguf_config.configuration(fields, rope, "output.weight" not in self._tensors)
        self.config |= {key: name in self._tensors for key, name in _BIASED.items()}
        self._family = gguf_names.FAMILIES[self.config["model_type"]]
        self._heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        self._places = self._find(path, set(rope))

    def _find(self, path: Path, known: set[str]) -> dict[str, tuple[str, int | None]]:
        """Checkpoint's name of a tensor -> (name in the file, number of the expert)."""
        places: dict[str, tuple[str, int | None]] = {}
        for ours, tensor in self._tensors.items():
            theirs = gguf_names.from_gguf(ours, self._family)
            if theirs is None:
                if ours not in known:
                    raise ValueError(
                        f"{path} holds {ours}, which lowbit knows no place for in {self._family.arch} models"
                    )
            elif "{}" in theirs:
                places |= {theirs.format(i): (ours, i) for i in range(int(tensor.shape[-1]))}
            else:
                places[theirs] = ours, None
        return places

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor of the 16-bit checkpoint -> its shape."""
        found = {}
        for name, (ours, expert) in self._places.items():
            shape = tuple(int(size) for size in reversed(self._tensors[ours].shape.tolist()))
            found[name] = shape if expert is None else shape[1:]
        return found

    def quantized(self) -> frozenset[str]:
        """The modules whose weight is codes."""
        return frozenset(
            name.removesuffix(".weight") for name, (ours, _) in self._places.items() if self._kind(ours) not in _FLOATS
        )

    def read(self, names: Iterable[str]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
        """(quantized linears by module name, other tensors by name) of these tensors of the checkpoint."""
        layers: dict[str, QLayer] = {}
        tensors: dict[str, Tensor] = {}
        for name in names:
            ours, expert = self._places[name]
            if self._kind(ours) in _FLOATS:
                tensor = self._float(ours, expert)
                tensors[name] = tensor - 1 if gguf_names.is_shifted(name, self._family) else tensor
            else:
                rows = self._rows(ours, self._bytes(ours, expert))
                part = blocks.unpack(self._kind(ours), rows, int(self._tensors[ours].shape[0]))
                layers[name.removesuffix(".weight")] = QLayer(QWeight((part,)))
        return layers, tensors

    def _kind(self, ours: str) -> str:
        return str(self._tensors[ours].tensor_type.name)

    def _bytes(self, ours: str, expert: int | None = None) -> Tensor:
        """A tensor's bytes [O, B], in memory of their own."""
        tensor = self._tensors[ours]
        data = tensor.data if expert is None else tensor.data[expert]
        raw = torch.from_numpy(data.copy())
        return raw.reshape(-1, raw.shape[-1]).view(torch.uint8)

    def _float(self, ours: str, expert: int | None = None) -> Tensor:
        shape = [int(size) for size in reversed(self._tensors[ours].shape.tolist())][0 if expert is None else 1 :]
        tensor = self._bytes(ours, expert).view(_FLOATS[self._kind(ours)]).reshape(shape)
        return self._rows(ours, tensor) if hasattr(self, "_family") else tensor

    def _rows(self, ours: str, rows: Tensor) -> Tensor:
        count = gguf_names.heads_of(ours, self._family, self._heads)
        return rows if count is None else gguf_names.unpermuted(rows, count)


def _reader(path: Path) -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError("GGUF files are read by the gguf package: pip install 'lowbit[gguf]'") from error
    try:
        return gguf.GGUFReader(path)
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(f"{path} is no GGUF file that can be read ({error}): download or copy it again") from error


def open_file(path: Path) -> File:
    """Open a .gguf file. Raises ValueError, in one sentence, where lowbit cannot read it."""
    return File(path)
