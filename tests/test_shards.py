"""Shards: the same bytes as the safetensors library understands, and nothing half written under a final name."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.formats import files as shards
from lowbit.formats.files import WriteError, read_shard, shard_header, write_index, write_json, write_shard

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def every_dtype() -> dict[str, Tensor]:
    """One tensor of each dtype, of odd sizes, with a scalar, an empty tensor and a transposed view among them."""
    raw = {dtype: torch.randint(0, 2, (3, 5 * dtype.itemsize), dtype=torch.uint8) for dtype in DTYPES}
    tensors = {f"{dtype}": raw[dtype].view(dtype) for dtype in DTYPES}
    tensors |= {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 4), "view": torch.randn(4, 6).T}
    return tensors


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name].reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name in left
    )


def test_written_shard_is_what_safetensors_reads(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_shard(tmp_path / "a.safetensors", tensors, {"block": "3"})
    assert same(load_file(tmp_path / "a.safetensors"), tensors)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"block": "3", "format": "pt"}


def test_read_shard_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {name: tensor.contiguous() for name, tensor in every_dtype().items()}
    save_file(tensors, tmp_path / "a.safetensors", {"key": "value"})
    assert same(read_shard(tmp_path / "a.safetensors"), tensors)
    assert shard_header(tmp_path / "a.safetensors").metadata == {"key": "value"}


def test_bytes_depend_on_content_alone(tmp_path: Path) -> None:
    tensors = every_dtype()
    write_shard(tmp_path / "a", tensors, {"x": "1", "y": "2"})
    write_shard(tmp_path / "b", dict(reversed(tensors.items())), {"y": "2", "x": "1"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    for entry in shard_header(tmp_path / "a").tensors.values():
        assert entry.start % entry.dtype.itemsize == 0


def test_index_is_the_one_transformers_writes(tmp_path: Path) -> None:
    write_shard(tmp_path / "model-2.safetensors", {"b": torch.zeros(3), "c": torch.zeros(2, dtype=torch.int8)})
    write_shard(tmp_path / "model-1.safetensors", {"a": torch.zeros(5, dtype=torch.bfloat16)})
    write_index(tmp_path, ["model-2.safetensors", "model-1.safetensors"])
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text()) == {
        "metadata": {"total_size": 3 * 4 + 2 + 5 * 2},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-2.safetensors"},
    }
    write_shard(tmp_path / "model-3.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a is in model-1\.safetensors and in model-3\.safetensors"):
        write_index(tmp_path, ["model-1.safetensors", "model-3.safetensors"])


def _header(content: object, data: bytes = b"") -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "truncated or no safetensors"),
        (b"abc", "truncated or no safetensors"),
        (b"\xff" * 64, "truncated or no safetensors"),
        (_header(b"{not json}"), "corrupt, its header"),
        (_header(b"\xff\xfe{}"), "corrupt, its header"),
        (_header([1, 2]), "corrupt, its header"),
        (_header({"a": {"dtype": "F32", "shape": [1]}}, b"1234"), "corrupt, its header"),
        (_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"), "corrupt, a has too few"),
        (_header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}}, b"1"), "stored as F4"),
        (_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"1234"), "truncated, it should have"),
        (_header({"a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]}}, b"1234"), "corrupt, it should have"),
        (_header({n: {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]} for n in "ab"}, b"12"), "b overlap"),
    ],
)
def test_broken_files_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        shard_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    write_shard(tmp_path / "a", {"x": torch.arange(4, dtype=torch.int16)})
    whole = (tmp_path / "a").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "cut").write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            shard_header(tmp_path / "cut")


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from lowbit.formats.files import WriteError, write_json, write_shard

directory = Path(sys.argv[1])
write_shard(directory / "block-0.safetensors", {"x": torch.ones(1000)})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
for write in (
    lambda: write_shard(directory / "block-1.safetensors", {"x": torch.ones(10), "y": torch.ones(50_000)}),
    lambda: write_json(directory / "report.json", "z" * 200_000),
):
    try:
        write()
    except WriteError as error:
        print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit on file sizes is POSIX")
def test_disk_full_in_the_middle_of_a_shard(tmp_path: Path) -> None:
    """The operating system itself refuses to let the file grow, after having taken a part of it."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True, timeout=120
    )
    shard, report = done.stdout.splitlines()
    assert shard == (
        f"disk full: needs 0.2 MB at {tmp_path}/block-1.safetensors; finished blocks are kept, "
        "free some space and run the same command again"
    )
    assert report.startswith(f"disk full: needs 0.2 MB at {tmp_path}/report.json")
    assert os.listdir(tmp_path) == ["block-0.safetensors"]
    assert torch.equal(load_file(tmp_path / "block-0.safetensors")["x"], torch.ones(1000))


@pytest.mark.parametrize(("code", "message"), [(errno.ENOSPC, "disk full: needs"), (errno.EIO, "cannot write")])
def test_errors_that_come_with_the_flush(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    """File systems that allocate late report a full disk only when the file is flushed."""

    def fail(handle: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(shards.os, "fsync", fail)
    with pytest.raises(WriteError, match=message):
        write_shard(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert os.listdir(tmp_path) == []


def test_interrupt_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    write_shard(path, {"x": torch.ones(3)})
    before = path.read_bytes()

    def interrupt(*_: object) -> None:
        assert path.read_bytes() == before
        assert list(tmp_path.glob("*.safetensors")) == [path], "a shard in the making must not look like a shard"
        raise KeyboardInterrupt

    monkeypatch.setattr(shards.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_shard(path, {"x": torch.zeros(3)})
    assert os.listdir(tmp_path) == [path.name]
    assert path.read_bytes() == before


def test_leftover_of_a_killed_run_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".a.safetensors.partial").write_bytes(b"x" * 10_000)
    write_shard(tmp_path / "a.safetensors", {"x": torch.ones(3)})
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.ones(3))


def test_missing_directory_is_told(tmp_path: Path) -> None:
    with pytest.raises(WriteError, match=r"cannot write .*a\.json \(No such file or directory\)"):
        write_json(tmp_path / "nowhere" / "a.json", {})


def test_json_is_deterministic(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"b": 1, "a": ["é", None]})
    assert (tmp_path / "a.json").read_text("utf8") == '{\n  "a": [\n    "é",\n    null\n  ],\n  "b": 1\n}\n'
