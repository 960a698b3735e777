"""A foreign model's codes under the names of transformers' own model, so that it loads and is stored as lowbit's are.

What transformers renames, splits and merges on load is known from its own conversion (`stream/provenance.py`), which is
told that every quantized linear is an ordinary weight. Where a parameter is made of whole rows of such weights, the
codes follow; nothing is rounded again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.base import rows, stack
from ..formats.foreign import Opened, module_of
from ..formats.source import listed
from ..numerics.qtensor import QLayer, QTensor, QWeight
from ..stream.provenance import Piece, Provenance, as_matrix


class Adopted:
    """A foreign model bound to a skeleton. Raises ValueError, in one sentence, where the two do not fit."""

    def __init__(self, foreign: Opened, skeleton: nn.Module) -> None:
        self._foreign = foreign
        wanted = skeleton.state_dict()
        self._flipped = {
            f"{path}.weight" for path, module in skeleton.named_modules() if type(module).__name__ == "Conv1D"
        }
        self._provenance = Provenance(skeleton, foreign.shapes())
        missing = [n for n in wanted if n not in self._provenance and not self._provenance.optional(n)]
        if missing:
            raise ValueError(
                f"the {foreign.name} model lacks {listed(missing)}: check its config.json, or download it again"
            )
        tied = set(self._provenance.tied)
        self._names = [name for name in wanted if name in self._provenance and name not in tied]
        self._dense = {
            f"{path}.weight"
            for path, module in skeleton.named_modules()
            if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D"
        }
        """Weights that the model wants as tensors, quantized or not: of embeddings and routers."""
        for name in self._names:
            self._check_shape(name, tuple(wanted[name].shape))
        self._check_biases({path for path, _ in skeleton.named_modules()})

    @property
    def format(self) -> str:
        """The name of the format that the model came in."""
        return self._foreign.name

    @property
    def config(self) -> Mapping[str, Any]:
        """The foreign model's configuration, as config.json has it."""
        return self._foreign.config

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Tensors of the file that the model has no use for."""
        return self._provenance.unexpected

    def names(self, prefix: str = "") -> tuple[str, ...]:
        """The model's parameters and buffers under a prefix; a tied head only where it has a tensor of its own."""
        return tuple(name for name in self._names if name.startswith(prefix))

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Where a parameter lies in the 16-bit checkpoint that the foreign model stands for."""
        return self._provenance.pieces(name)

    def read(self, names: Iterable[str]) -> tuple[dict[str, QLayer], dict[str, Tensor]]:
        """(quantized linears by the model's module name, other tensors by the model's name)."""
        names = list(names)
        pieces = {name: self.pieces(name) for name in names}
        layers, tensors = self._foreign.read(piece.name for parts in pieces.values() for piece in parts)
        found: dict[str, QLayer] = {}
        rest: dict[str, Tensor] = {}
        for name, parts in pieces.items():
            held = [module_of(piece.name) in layers and piece.name.endswith(".weight") for piece in parts]
            if not any(held):
                rest[name] = _dense(parts, tensors).reshape(self._provenance.shape(name))
            elif name in self._dense:
                rest[name] = torch.cat([_taken(layers, piece).weight.dequantize() for piece in parts])
            elif all(held):
                found[name.removesuffix(".weight")] = self._joined(name, [_taken(layers, piece) for piece in parts])
            else:
                raise ValueError(f"only a part of {name} is quantized, which no linear can hold: quantize it whole")
        return found, rest

    def _joined(self, name: str, parts: Sequence[QLayer]) -> QLayer:
        try:
            return stack(parts)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def _check_biases(self, modules: set[str]) -> None:
        """A bias that the model has no use for must be zero, as some tools write it: it would be left out silently."""
        left = [name for name in self.unexpected if name.endswith(".bias") and module_of(name) in modules]
        for name in left:
            if bool(self._foreign.read([name])[1][name].any()):
                raise ValueError(
                    f"the model has no place for {name} of the {self.format} model: repair its config.json"
                )

    def _check_shape(self, name: str, wanted: tuple[int, ...]) -> None:
        shape = self._provenance.shape(name)
        if shape != wanted and not (name in self._flipped and shape == wanted[::-1]):
            raise ValueError(
                f"the {self._foreign.name} model holds {name} of shape {list(shape)} where its configuration asks for "
                f"{list(wanted)}: take configuration and weights from the same model"
            )


def _taken(layers: Mapping[str, QLayer], piece: Piece) -> QLayer:
    """The rows of a quantized weight that a piece asks for."""
    layer = layers[module_of(piece.name)]
    width = layer.weight.shape[1]
    if piece.transposed or list(piece.columns) != list(range(width)):
        raise ValueError(f"{piece.name} is quantized and used by parts of its columns, which codes cannot follow")
    index = piece.rows
    if isinstance(index, range) and index.step == 1:
        try:
            return rows(layer, slice(index.start, index.stop))
        except AssertionError:
            raise ValueError(
                f"{piece.name} is split between rows that share a scale, which codes cannot follow"
            ) from None
    if not all(part.grid.spec.by_row for part in layer.weight.parts):
        raise ValueError(f"{piece.name} has its rows permuted and scales across rows, which codes cannot follow")
    chosen = torch.tensor(list(index))
    return replace(layer, weight=QWeight(tuple(_chosen(part, chosen) for part in layer.weight.parts)))


def _chosen(part: QTensor, index: Tensor) -> QTensor:
    """A QTensor with a scale for every row, its rows in another order."""
    grid = part.grid
    fields = {name: getattr(grid, name) for name in ("scale", "zero", "outer", "offset")}
    fields = {name: x if x is None or len(x) == 1 < len(part.codes) else x[index] for name, x in fields.items()}
    return replace(part, codes=part.codes[index], grid=replace(grid, **fields))


def _dense(pieces: Sequence[Piece], tensors: Mapping[str, Tensor]) -> Tensor:
    """A parameter that nobody quantized, as a matrix."""
    parts = []
    for piece in pieces:
        tensor = tensors[piece.name]
        matrix = tensor.reshape(as_matrix(tensor.shape))
        if (piece.rows, piece.columns) != (range(matrix.shape[0]), range(matrix.shape[1])):
            matrix = matrix[list(piece.rows)][:, list(piece.columns)]
        parts.append(matrix.T if piece.transposed else matrix)
    return torch.cat(parts) if len(parts) > 1 else parts[0]
