"""The bytes of safetensors files: reading a header, reading one tensor's range, writing a finished shard.

The format is eight bytes of header length, a JSON header, and the tensors' bytes; that is little enough to speak it
here instead of going through the safetensors library, whose reader maps files (mapped pages count as resident memory)
and whose writer wants every tensor of a shard at once on the CPU. A file appears under its name only when it is
complete: it is written aside, flushed to the disk, then renamed, so a killed run leaves no half of a shard.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_LONGEST_HEADER = 100_000_000
"""The limit of the safetensors library: a longer header means that these are not a header's bytes."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WriteError(OSError):
    """A file could not be written; the message is one sentence that says what to do."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its bytes are [start, stop) of the whole file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file holds, in the order of its bytes."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]


def shard_header(path: Path | str) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises ValueError where the file is no safetensors file, is truncated, or contradicts itself.
    """
    path = Path(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise ValueError(f"{path} is truncated or no safetensors file ({size} bytes): download or copy it again")
        raw = file.read(length)
    try:
        content = json.loads(raw)
        metadata = content.pop("__metadata__", {})
        entries = {name: _entry(name, fields, 8 + length, path) for name, fields in content.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is corrupt, its header cannot be read: download or copy it again") from error
    return Header(_in_byte_order(entries, 8 + length, size, path), metadata)


def _entry(name: str, fields: dict[str, Any], base: int, path: Path) -> Entry:
    code, shape, (start, stop) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
    if code not in _DTYPES:
        raise ValueError(f"{path}: {name} is stored as {code}, which lowbit cannot read: convert the model to BF16")
    if stop - start != prod(shape) * _DTYPES[code].itemsize:
        raise ValueError(f"{path} is corrupt, {name} has too few or too many bytes: download or copy it again")
    return Entry(_DTYPES[code], shape, base + start, base + stop)


def _in_byte_order(entries: dict[str, Entry], base: int, size: int, path: Path) -> dict[str, Entry]:
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)))
    for name, entry in ordered.items():
        if entry.start != base:
            raise ValueError(f"{path} is corrupt, the bytes of {name} overlap another tensor's: download it again")
        base = entry.stop
    if base != size:
        state = "truncated" if size < base else "corrupt"
        raise ValueError(f"{path} is {state}, it should have {base} bytes and has {size}: download or copy it again")
    return ordered


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, shared, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def read_at(file: FileIO, start: int, into: Tensor) -> Tensor:
    """Fill the contiguous CPU tensor `into` from byte `start` of an unbuffered file, and give it back."""
    if into.numel() == 0:
        return into
    assert into.is_contiguous()
    view = raw_bytes(into)
    file.seek(start)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])
        if not count:
            raise ValueError(f"{file.name!s} became shorter while it was read: do not change the model during a run")
        done += count
    return into


@dataclass(frozen=True)
class Streamed:
    """A tensor that is written part by part, first rows first, and is never whole in memory."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterable[Tensor]]

    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


def read_shard(path: Path | str) -> dict[str, Tensor]:
    """Every tensor of a file, each in memory of its own."""
    header = shard_header(path)
    with open(path, "rb", buffering=0) as file:
        return {
            name: read_at(file, entry.start, torch.empty(entry.shape, dtype=entry.dtype))
            for name, entry in header.tensors.items()
        }


def write_shard(
    path: Path | str,
    tensors: Mapping[str, Tensor | Streamed],
    metadata: Mapping[str, str] | None = None,
    *,
    sync: bool = True,
) -> None:
    """Write a safetensors file whose bytes depend on nothing but names, values and metadata.

    Tensors may lie on any device; one at a time is copied to the CPU, so memory is not doubled. Wider dtypes come
    first, then names in order, which keeps every tensor aligned to its own dtype. `sync=False`, for scratch files that
    nobody reads after a crash, does not wait for the disk. Raises WriteError, and leaves nothing behind, where the disk
    is full or refuses.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    end = 0
    for name in order:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.dtype.itemsize
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    head = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    head += b" " * (-len(head) % 8)
    with _replacing(Path(path), 8 + len(head) + end, sync) as file:
        _write_all(file, memoryview(len(head).to_bytes(8, "little") + head))
        for name in order:
            tensor = tensors[name]
            for part in tensor.parts() if isinstance(tensor, Streamed) else (tensor,):
                if part.numel():
                    _write_all(file, raw_bytes(part.detach().cpu().contiguous()))


def write_json(path: Path | str, obj: Any) -> None:
    """Write JSON (sorted keys, two spaces) as atomically as a shard. Raises WriteError."""
    text = (json.dumps(obj, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    with _replacing(Path(path), len(text)) as file:
        _write_all(file, memoryview(text))


def write_index(directory: Path | str, files: Iterable[str]) -> None:
    """Write model.safetensors.index.json over the named shards of `directory`, from their headers.

    Raises ValueError where two shards hold the same tensor.
    """
    weight_map: dict[str, str] = {}
    total = 0
    for name in sorted(files):
        for tensor, entry in shard_header(Path(directory) / name).tensors.items():
            if tensor in weight_map:
                raise ValueError(f"{tensor} is in {weight_map[tensor]} and in {name}: start again with --restart")
            weight_map[tensor] = name
            total += entry.stop - entry.start
    write_json(Path(directory) / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_all(file: FileIO, view: memoryview) -> None:
    done = 0
    while done < len(view):
        done += file.write(view[done:]) or 0


@contextmanager
def _replacing(path: Path, size: int, sync: bool = True) -> Iterator[FileIO]:
    """An unbuffered file that takes the name `path` only once all of it is on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb", buffering=0) as file:
            yield file
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if sync:
            _sync_directory(path.parent)
    except OSError as error:
        raise WriteError(_advice(path, size, error)) from error
    finally:
        partial.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    with suppress(OSError):  # some systems cannot synchronise a directory; the file's own bytes are safe already
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _advice(path: Path, size: int, error: OSError) -> str:
    if error.errno in _DISK_FULL:
        return (
            f"disk full: needs {size / 1e6:.1f} MB at {path}; finished blocks are kept, "
            "free some space and run the same command again"
        )
    return f"cannot write {path} ({error.strerror}): make the directory writable and run the same command again"
