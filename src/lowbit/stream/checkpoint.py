"""A Hugging Face model on disk, read a few tensors at a time.

The pipeline holds one block in memory, so nothing here ever does what `from_pretrained` does. Tensors are read by byte
range into memory of their own, straight to the place where a merged parameter wants them; files are never mapped,
because mapped pages count as resident memory and stay until somebody closes the file. `Checkpoint` knows files and
bytes; how the names in them become the names of a model is `provenance.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import cached_property, partial
from io import FileIO
from math import prod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch
from torch import Tensor, nn

from ..formats.files import INDEX, Entry, Streamed, raw_bytes, read_at
from ..formats.source import checksum, first_line, listed, locate, scan
from ..modules.linear import QLinear
from .provenance import Piece, Provenance, as_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

_ELEMENTS = 2**24
"""Elements looked at in one go where a temporary copy is made."""
_HASHED_WHOLE = 2**30
"""Bytes of a model up to which checksums read all of it."""


class Checkpoint:
    """A model directory whose tensors are read by name. Make one with `open`, then `bind` it to a model."""

    def __init__(self, path: Path, trust_remote_code: bool = False) -> None:
        self.path = path
        self._trust = trust_remote_code
        self.files, self._entries = scan(path)
        self._provenance: Provenance | None = None
        self._names: tuple[str, ...] = ()
        self.tied: dict[str, str] = {}
        """After `bind`: name -> the name whose tensor it shares."""

    @classmethod
    def open(cls, source: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> Self:
        """Open a local directory, a Hugging Face hub id, or `demo`, the model that comes with lowbit.

        Reads headers only. Raises ValueError, one sentence with advice, where this is no model, a shard is missing,
        truncated or corrupt, or the index names tensors that no shard holds.
        """
        return cls(locate(source, revision, trust_remote_code), trust_remote_code)

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The model's transformers config. Raises ValueError where transformers does not understand it."""
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self._trust)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(
                f"transformers cannot use {self.path / 'config.json'} ({first_line(error)}): "
                "repair it, upgrade transformers, or pass --trust-remote-code if the model brings its own code"
            ) from error

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer. Raises ValueError where there is none that transformers can use."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.path, trust_remote_code=self._trust)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise ValueError(
                f"{self.path} has no tokenizer that transformers can use ({first_line(error)}): "
                "copy the tokenizer's files beside the model"
            ) from error

    @property
    def size_bytes(self) -> int:
        """Bytes of all safetensors files."""
        return sum(file.stat().st_size for file in self.files)

    def fingerprint(self) -> dict[str, str]:
        """File name -> checksum, to tell whether a resumed run still has the model it began with.

        config.json, the index, and all files of a model up to 1 GiB are hashed whole. Of a larger model's files only
        the size, the header (names, dtypes, shapes) and 4 KiB at the beginning, middle and end of every tensor are
        hashed: any training changes those, and a model of 140 GB is not read twice.
        """
        small = [file for file in (self.path / "config.json", self.path / INDEX) if file.exists()]
        whole = self.size_bytes <= _HASHED_WHOLE
        return {file.name: checksum(file, whole or file in small) for file in (*small, *self.files)}

    def bind(self, model: nn.Module) -> None:
        """Find every entry of a transformers model's state dict among the files' tensors.

        The model may lie on the meta device and may keep its experts as ordinary linears, `….experts.3.down_proj`.
        Raises ValueError naming tensors that are missing or have another shape, and for weights already quantized.
        """
        if getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(f"{self.path} is already quantized: start from the original 16-bit model")
        wanted = model.state_dict()
        provenance = Provenance(model, {name: entry.shape for name, (_, entry) in self._entries.items()})
        missing = [name for name in wanted if name not in provenance and not provenance.optional(name)]
        if missing:
            raise ValueError(
                f"{self.path} lacks {listed(missing)}, which {type(model).__name__} needs: "
                "check config.json, or download the model again"
            )
        self._names = tuple(name for name in wanted if name in provenance)
        for name in self._names:
            if provenance.shape(name) != tuple(wanted[name].shape):
                raise ValueError(
                    f"{self.path} holds {name} of shape {list(provenance.shape(name))} where config.json asks for "
                    f"{list(wanted[name].shape)}: take config.json and weights from the same model"
                )
        self._provenance = provenance
        self.tied = provenance.tied | {
            name: source for name, source in provenance.both.items() if self._equal(name, source)
        }

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Checkpoint tensors that the bound model has no use for, less those that transformers ignores as well."""
        return self._bound.unexpected

    def names(self, prefix: str = "") -> tuple[str, ...]:
        """The bound model's parameters and buffers under a prefix that the files hold, in the model's order."""
        return tuple(name for name in self._names if name.startswith(prefix))

    def read(self, names: Iterable[str], pinned: bool = False) -> dict[str, Tensor]:
        """Parameters of the bound model as they are stored: own memory, on the CPU, dtype of the files.

        From `pinned` memory a GPU may copy by itself, in a tenth of the time.
        """
        with ExitStack() as stack:
            opened: dict[Path, FileIO] = {}
            return {name: self._read(name, opened, stack, pinned) for name in names}

    def rows(self, name: str, index: Tensor) -> Tensor:
        """Rows of a parameter [R, …] at `index` [N]: for embeddings that are larger than a block.

        Raises ValueError where a row is asked for that the parameter does not have.
        """
        count = self._bound.shape(name)[0]
        index = index.flatten().cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < count:
            raise ValueError(f"{name} has {count} rows and row {int(index.max())} was asked for: check the tokenizer")
        piece, *others = self.pieces(name)
        if others or piece.transposed or len(piece.rows) != count:
            return self.read([name])[name][index]
        wanted, back = index.unique(return_inverse=True)
        path, entry = self._entries[piece.name]
        with path.open("rb", buffering=0) as file:
            rows = _read_rows(file, entry, [piece.rows[i] for i in wanted.tolist()])
        return rows[:, piece.columns[0] : piece.columns[-1] + 1][back].view(len(index), *self._bound.shape(name)[1:])

    def streamed(self, name: str) -> Streamed:
        """A parameter to be copied into a shard a few rows at a time, checked for NaN on the way."""
        shape = self._bound.shape(name)

        def parts() -> Iterator[Tensor]:
            for rows in torch.arange(shape[0]).split(max(1, _ELEMENTS // max(1, prod(shape[1:])))):
                part = self.rows(name, rows)
                check_finite(name, part)
                yield part

        return Streamed(self._dtype(name), shape, parts)

    def pieces(self, name: str) -> tuple[Piece, ...]:
        """Where a parameter lies in the files, one rectangle below the other; export splits by the same pieces."""
        return self._bound.pieces(name)

    def nbytes(self, names: Iterable[str]) -> int:
        """Bytes that `read` of these names takes."""
        return sum(
            self._entries[self._bound.source(name)][1].dtype.itemsize * prod(self._bound.shape(name)) for name in names
        )

    @property
    def _bound(self) -> Provenance:
        assert self._provenance is not None, "bind the checkpoint to a model first"
        return self._provenance

    def _dtype(self, name: str) -> torch.dtype:
        dtypes = {self._entries[piece.name][1].dtype for piece in self.pieces(name)}
        if len(dtypes) > 1:
            raise ValueError(f"{name} is made of tensors of several dtypes: convert the model to one dtype first")
        return dtypes.pop()

    def _read(self, name: str, opened: dict[Path, FileIO], stack: ExitStack, pinned: bool) -> Tensor:
        out = torch.empty(self._bound.shape(name), dtype=self._dtype(name), pin_memory=pinned)
        lines = out.view(as_matrix(out.shape))
        for piece in self.pieces(name):
            path, entry = self._entries[piece.name]
            if path not in opened:
                opened[path] = stack.enter_context(path.open("rb", buffering=0))
            height = len(piece.columns if piece.transposed else piece.rows)
            _read_piece(opened[path], entry, piece, lines[:height])
            lines = lines[height:]
        return out

    def _equal(self, name: str, other: str) -> bool:
        """Whether two parameters of one shape hold the same bits, comparing a few rows at a time."""
        rows, columns = as_matrix(self._bound.shape(name))
        for part in torch.arange(rows).split(max(_ELEMENTS // columns, 1)):
            left, right = self.rows(name, part), self.rows(other, part)
            if left.dtype != right.dtype or raw_bytes(left) != raw_bytes(right):
                return False
        return True


class Prefetch:
    """Reads the next block's tensors in a thread while the caller works on this block; never more than one ahead.

    with Prefetch(checkpoint, device) as ahead:
        ahead.start(names_0)
        for …: tensors = ahead.result(); ahead.start(next_names); work(tensors)

    They are on the CPU, for a GPU in pinned memory.
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device) -> None:
        self._checkpoint, self._pinned = checkpoint, device.type == "cuda"
        begin = None
        if self._pinned:  # a thread begins on the first GPU, of which it would take memory
            begin = partial(torch.cuda.set_device, torch.cuda.current_device() if device.index is None else device)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="lowbit-read", initializer=begin)
        self._pending: Future[dict[str, Tensor]] | None = None

    def start(self, names: Iterable[str]) -> None:
        """Begin to read."""
        assert self._pending is None, "take the last result first: only one block is read ahead"
        self._pending = self._pool.submit(self._checkpoint.read, tuple(names), self._pinned)

    def result(self) -> dict[str, Tensor]:
        """Wait for what `start` asked for; raises what reading raised."""
        assert self._pending is not None, "nothing was started"
        pending, self._pending = self._pending, None
        return pending.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pending = None
        self._pool.shutdown(cancel_futures=True)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise ValueError naming the tensor where a value is NaN or infinite."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    nan = infinite = 0
    for part in tensor.reshape(-1).split(_ELEMENTS):
        values = part.float() if part.dtype.itemsize == 1 else part
        if not bool(torch.stack(values.aminmax()).isfinite().all()):
            nan, infinite = nan + int(values.isnan().sum()), infinite + int(values.isinf().sum())
    if nan or infinite:
        held = " and ".join(f"{n} {kind}" for n, kind in ((nan, "NaN"), (infinite, "infinite")) if n)
        raise ValueError(f"{name} holds {held} values: the model is damaged, download it again or take another one")


def free(module: nn.Module) -> None:
    """Put a block back as it was born: parameters and stored buffers on meta, plain linears for quantized ones.

    Buffers outside the state dict are computed, not stored, and stay real.
    """
    for owner in list(module.modules()):
        for name, child in list(owner.named_children()):
            if isinstance(child, QLinear):
                bias = child.bias is not None
                setattr(owner, name, nn.Linear(child.in_features, child.out_features, bias, device="meta"))
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                setattr(owner, name, nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False))
        for name, buffer in owner._buffers.items():
            if buffer is not None and name not in owner._non_persistent_buffers_set:
                owner._buffers[name] = torch.empty_like(buffer, device="meta")


def _read_piece(file: FileIO, entry: Entry, piece: Piece, out: Tensor) -> None:
    """Read one rectangle into its rows of the parameter; whole rows go straight to their place."""
    rows, columns = piece.rows, piece.columns
    whole = isinstance(rows, range) and rows.step == 1 and len(columns) == as_matrix(entry.shape)[1]
    if whole and not piece.transposed and isinstance(rows, range):
        read_at(file, entry.start + rows.start * out.shape[1] * out.dtype.itemsize, out)
        return
    block = _read_rows(file, entry, rows)[:, torch.tensor(columns)]
    out.copy_(block.T if piece.transposed else block)


def _read_rows(file: FileIO, entry: Entry, rows: Sequence[int]) -> Tensor:
    """Rows of a stored matrix, neighbours in one go -> [N, columns of the file]."""
    columns = as_matrix(entry.shape)[1]
    out = torch.empty(len(rows), columns, dtype=entry.dtype)
    first = 0
    for last in range(1, len(rows) + 1):
        if last == len(rows) or rows[last] != rows[last - 1] + 1:
            start = entry.start + rows[first] * columns * entry.dtype.itemsize
            read_at(file, start, out[first:last])
            first = last
    return out
