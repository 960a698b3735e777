"""Which bytes of a checkpoint make each parameter of a model, whatever transformers renames and merges on load.

transformers 5 fuses, splits, transposes and permutes tensors on load, by a table that grows with every release.
Copying that table would be a second truth, and running it on the weights would need a layer's experts twice in memory.
So transformers runs its own conversion, once, on tensors of the meta device, which have shapes and strides and no
values. `_Recorder` watches the few operations that copy (cat, stack, clone); all others are views. An element of a
parameter can then be followed back to its place in the checkpoint, and the border of a matrix tells all of it.
The result reads both ways: where to read a parameter from, and under which names to write it back.

This is the only file that touches transformers' loading internals (tested with 5.15 and 5.23).
Shape letters: R rows and C columns of a parameter seen as a matrix, N elements.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

Places = npt.NDArray[np.int64]
"""Numbers of elements; numpy, because torch starts threads for a few thousand numbers."""
_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d+)\.(?P<projection>[^.]+)\.(?P<kind>weight|bias)")
_CONVERT = "save the model anew with transformers' save_pretrained"
_OLD_BUFFERS = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$")
"""Buffers that checkpoints used to hold and every model now computes."""


@dataclass(frozen=True)
class Piece:
    """A rectangle of one checkpoint tensor, seen as a matrix [all leading dimensions, last dimension].

    A vector is a matrix of one column. Where `transposed`, the parameter holds the rectangle's transpose; a parameter
    is its pieces, one below the other.
    """

    name: str
    rows: Sequence[int]
    columns: Sequence[int]
    transposed: bool = False


def as_matrix(shape: Sequence[int]) -> tuple[int, int]:
    """The rows and columns by which a `Piece` counts in a tensor of this shape."""
    return (prod(shape), 1) if len(shape) < 2 else (prod(shape[:-1]), shape[-1])


class Provenance:
    """Where every entry of a model's state dict lies in a checkpoint whose tensors have these shapes.

    Mixtures whose experts the model at hand keeps as ordinary linears (`….experts.3.down_proj.weight`) are understood
    beside transformers' fused parameters (`….experts.down_proj`). Raises ValueError naming the tensors where
    transformers cannot put the checkpoint together.
    """

    def __init__(self, model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> None:
        self._reference = _reference(model)
        self._names = list(shapes)
        self._shapes = {name: tuple(shape) for name, shape in shapes.items()}
        # One byte stands for one element: only places are followed, never values.
        self._leaves = {n: torch.empty(s, dtype=torch.uint8, device="meta") for n, s in self._shapes.items()}
        self._sources = {_storage(leaf): number for number, leaf in enumerate(self._leaves.values())}
        self._copies: dict[int, _Copy] = {}
        groups, unexpected = _group(self._reference, self._leaves)
        self._values: dict[str, Tensor] = {}
        for target, group in groups.items():
            self._values.update({target: self._leaves[group]} if isinstance(group, str) else self._make(target, group))
        self.tied, self.both = _tied(self._reference, self._values)
        self.unexpected = _unknown(self._reference, unexpected)
        self._pieces: dict[str, tuple[Piece, ...]] = {}

    def __contains__(self, name: str) -> bool:
        target, expert = self._target(name)
        return target in self._values and (expert is None or expert < self._values[target].shape[0])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape that the checkpoint's tensors make for this entry."""
        return tuple(self._view(name).shape)

    def optional(self, name: str) -> bool:
        """Whether transformers lets a checkpoint lack this entry and keeps what the model was built with."""
        return _matches(name, getattr(self._reference, "_keys_to_ignore_on_load_missing", None) or ())

    def source(self, name: str) -> str:
        """The checkpoint tensor that holds this entry's first element, without looking for the others."""
        view = self._view(name)
        return self._names[self._follow(_storage(view), np.array([view.storage_offset()]))[0][0]]

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """The rectangles of the checkpoint that make this entry, one below the other; found on first use and kept."""
        if name not in self._pieces:
            self._pieces[name] = self._find(name)
        return self._pieces[name]

    def _target(self, name: str) -> tuple[str, int | None]:
        """transformers' name for a name of the model, and the expert, if this is one of a fused parameter."""
        name = self.tied.get(name, name)
        match = None if name in self._values else _EXPERT.fullmatch(name)
        if match is None:
            return name, None
        suffix = "_bias" if match["kind"] == "bias" else ""
        return f"{match['module']}.{match['projection']}{suffix}", int(match["expert"])

    def _view(self, name: str) -> Tensor:
        target, expert = self._target(name)
        value = self._values[target]
        if expert is None:
            return value
        experts = self._reference.get_submodule(target.rpartition(".")[0])
        flipped = value.dim() == 3 and getattr(experts, "is_transposed", False)
        return value[expert].T if flipped else value[expert]

    def _make(self, target: str, group: Any) -> dict[str, Tensor]:
        """Let transformers convert one group of meta tensors, and remember what it copied."""
        recorder = _Recorder()
        sources = ", ".join(sorted(set().union(*group.layer_targets.values()))[:2])
        try:
            with recorder:
                made = group.convert(target, model=self._reference, config=self._reference.config)
        except _Computes as error:
            raise ValueError(
                f"{target} is not stored but computed by transformers from {sources} …: {_CONVERT}"
            ) from error
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(
                f"the checkpoint's {sources} … do not make up {target}, some are missing or have a wrong shape: "
                "download the model again"
            ) from error
        self._copies.update(recorder.copies)
        return {name: part[0] if isinstance(part, list) else part for name, part in made.items()}

    def _find(self, name: str) -> tuple[Piece, ...]:
        view = self._view(name)
        source = self._sources.get(_storage(view))
        if source is not None and view.shape == self._shapes[self._names[source]] and view.is_contiguous():
            rows, columns = as_matrix(view.shape)
            return (Piece(self._names[source], range(rows), range(columns)),)
        return self._walk(name, view)

    def _walk(self, name: str, view: Tensor) -> tuple[Piece, ...]:
        """Follow the four edges of the matrix; whatever lies between them is evenly spaced, or not a rectangle."""
        down, right = _offsets(view)
        storage, width = _storage(view), len(right)
        source, first = self._follow(storage, down)
        same, last = self._follow(storage, down + right[-1])
        step = int(last[0] - first[0]) // max(width - 1, 1)
        even = np.array_equal(source, same) and np.array_equal(last - first, np.full_like(first, step * (width - 1)))
        for row in (0, -1):
            along, places = self._follow(storage, down[row] + right)
            even = even and bool((along == source[row]).all())
            even = even and np.array_equal(places - places[0], step * np.arange(width))
        pieces = [
            self._piece(self._names[source[start]], first[start:stop], step, width) for start, stop in _runs(source)
        ]
        if not even or None in pieces:
            raise ValueError(f"{name} is scattered over the checkpoint in a way that lowbit cannot read: {_CONVERT}")
        return tuple(piece for piece in pieces if piece is not None)

    def _piece(self, name: str, places: Places, step: int, columns: int) -> Piece | None:
        """The rectangle whose rows begin at `places` of a tensor and whose columns are `step` elements apart."""
        width = as_matrix(self._shapes[name])[1]
        row, column = places // width, places % width
        top, left = int(row[0]), int(column[0])
        if (step == 1 or columns == 1) and (column == left).all() and left + columns <= width:
            return Piece(name, _index(row), range(left, left + columns))
        if (step == width or columns == 1) and (row == top).all():
            return Piece(name, range(top, top + columns), _index(column), transposed=True)
        return None

    def _follow(self, storage: int, places: Places) -> tuple[Places, Places]:
        """Elements of a storage -> number of the checkpoint tensor and element of it, both [N]."""
        if storage in self._sources:
            return np.full_like(places, self._sources[storage]), places
        made = self._copies[storage]
        index = [places // stride % size for size, stride in zip(made.shape, made.stride, strict=True)]
        which = np.searchsorted(made.starts, index[made.dim], side="right") - 1
        index[made.dim] = index[made.dim] - made.starts[which]
        found = []
        for start, stop in _runs(which):
            part = made.parts[which[start]]
            inner = np.full(stop - start, part.storage_offset())
            for along, stride in zip(index, part.stride(), strict=True):
                inner += along[start:stop] * stride
            found.append(self._follow(_storage(part), inner))
        return np.concatenate([source for source, _ in found]), np.concatenate([place for _, place in found])


@dataclass(frozen=True)
class _Copy:
    """How one freshly made tensor was filled: parts[i] begins at starts[i] of dimension `dim`."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dim: int
    parts: tuple[Tensor, ...]
    starts: Places


class _Computes(Exception):
    """A conversion does more than move elements."""


class _Recorder(TorchDispatchMode):
    """Remembers, per storage, from which tensors it was filled while transformers converts meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[int, _Copy] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("cat", "stack"):
            dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % out.dim()
            parts = tuple(part.unsqueeze(dim) for part in args[0]) if name == "stack" else tuple(args[0])
            self._note(out, dim, parts)
        elif name == "clone":
            self._note(out, 0, (args[0],))
        else:
            results = out if isinstance(out, list | tuple) else [out]
            if any(_storage(result) != _storage(args[0]) for result in results):
                raise _Computes(name)
        return out

    def _note(self, out: Tensor, dim: int, parts: tuple[Tensor, ...]) -> None:
        starts = np.cumsum([0, *(part.shape[dim] for part in parts[:-1])])
        self.copies[_storage(out)] = _Copy(tuple(out.shape), out.stride(), dim, parts, starts)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _offsets(view: Tensor) -> tuple[Places, Places]:
    """Elements of the storage where the rows of a tensor begin [R], and how far its columns lie from there [C]."""
    shape, stride = list(view.shape), list(view.stride())
    if len(shape) < 2:
        shape, stride = [*shape, 1], [*stride, 1]
    rows = np.array([view.storage_offset()])
    for size, step in zip(shape[:-1], stride[:-1], strict=True):
        rows = (rows[:, None] + np.arange(size) * step).ravel()
    return rows, np.arange(shape[-1]) * stride[-1]


def _runs(values: Places) -> list[tuple[int, int]]:
    """Where equal neighbours begin and end."""
    cuts = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return list(pairwise(cuts))


def _index(values: Places) -> Sequence[int]:
    """Whole numbers as a range where they are evenly spaced."""
    steps = np.diff(values)
    if len(values) == 1 or (steps[0] != 0 and (steps == steps[0]).all()):
        step = int(steps[0]) if len(steps) else 1
        return range(int(values[0]), int(values[-1]) + (1 if step > 0 else -1), step)
    return tuple(values.tolist())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _reference(model: nn.Module) -> nn.Module:
    """The model as transformers itself builds it, with its own names and fused experts, on the meta device."""
    with torch.device("meta"):
        return type(model)(copy.deepcopy(model.config))


def _group(model: Any, leaves: Mapping[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """Sort checkpoint tensors by the model's names, as transformers does on load.

    Gives, per name, the one checkpoint name it is read from or a loaded `WeightConverter`, and the names of tensors
    that belong nowhere.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    wanted = model.state_dict()
    transforms = get_model_conversion_mapping(model)
    renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Any] = {}
    unexpected: list[str] = []
    for name in sorted(leaves, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, wanted)
        if target not in wanted:
            unexpected.append(name)
        elif pattern is None:
            groups[target] = name
        else:
            if target not in groups:
                groups[target] = copy.deepcopy(by_pattern[pattern])
            groups[target].add_tensor(target, name, pattern, leaves[name])
    return groups, unexpected


def _tied(model: Any, values: Mapping[str, Tensor]) -> tuple[dict[str, str], dict[str, str]]:
    """Parameters that the config ties -> the name of the group that the checkpoint holds.

    First those that the checkpoint lacks, then those that it holds as well, which may differ.
    """
    members: dict[str, list[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        members.setdefault(source, [source]).append(target)
    lacking, both = {}, {}
    for names in members.values():
        held = [name for name in names if name in values]
        lacking.update({name: held[0] for name in names if held and name not in values})
        both.update({name: held[0] for name in held[1:]})
    return lacking, both


def _unknown(model: Any, names: Iterable[str]) -> tuple[str, ...]:
    """The checkpoint names that neither the model wants nor transformers expects to find left over."""
    patterns = (*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_OLD_BUFFERS)
    return tuple(name for name in names if not _matches(name, patterns))
