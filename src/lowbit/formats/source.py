"""Finding a model's files: a directory, a hub id or the packaged demo; what is wrong with them, said before a run.

Only safetensors are taken. PyTorch's pickles can run code when opened and cannot be read by byte range.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from importlib.resources import files as package_files
from pathlib import Path

from .files import INDEX, SINGLE, Entry, shard_header

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SMALL_FILES = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
_SAMPLE = 4096


def locate(source: str | Path, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """The directory of a model given as a directory, a hub id (downloaded to the cache), or `demo`."""
    if source == "demo":
        return Path(str(package_files("lowbit") / "assets" / "demo"))
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not _HUB_ID.fullmatch(str(source)):
        raise ValueError(f"{source} is no directory: give a model's directory, a hub id such as org/name, or demo")
    return _download(str(source), revision, trust_remote_code)


def scan(path: Path) -> tuple[tuple[Path, ...], dict[str, tuple[Path, Entry]]]:
    """The safetensors files of a directory, and every tensor's file and place."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no model, it has no config.json: give the directory of a Hugging Face model")
    weight_map = {} if (path / SINGLE).is_file() else _weight_map(path)
    files = tuple(path / name for name in sorted(set(weight_map.values()))) or (path / SINGLE,)
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise ValueError(f"{path} lacks {listed(absent)}, which its index names: download the missing shards")
    headers = {file: shard_header(file).tensors for file in files}
    entries = {name: (file, entry) for file, tensors in headers.items() for name, entry in tensors.items()}
    for name, file in weight_map.items():
        if name not in headers[path / file]:
            raise ValueError(f"{path / file} does not hold {name}, though the index says so: download the model again")
        entries[name] = (path / file, headers[path / file][name])
    return files, entries


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file, from the index of a sharded model."""
    index = path / INDEX
    if not index.is_file():
        if any(path.glob("*.bin")) or any(path.glob("*.pt*")):
            raise ValueError(
                f"{path} holds PyTorch pickles and no safetensors: convert it with "
                "AutoModelForCausalLM.from_pretrained(…).save_pretrained(…)"
            )
        raise ValueError(f"{path} has neither {SINGLE} nor {INDEX}: download the model again")
    try:
        weight_map = json.loads(index.read_bytes())["weight_map"]
        return {str(name): str(file) for name, file in weight_map.items()}
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is corrupt: download it again") from error


def _download(source: str, revision: str | None, trust_remote_code: bool) -> Path:
    """The local snapshot of a hub model: config, tokenizer and safetensors, nothing else."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    except ImportError as error:
        raise ValueError(f"{source} is no directory, and hub ids need pip install huggingface_hub") from error
    patterns = _SMALL_FILES if trust_remote_code else _SMALL_FILES[:-1]
    try:
        path = Path(snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"]))
        weights = sorted(set(_weight_map(path).values())) if (path / INDEX).is_file() else [SINGLE]
        return Path(snapshot_download(source, revision=revision, allow_patterns=[*patterns, *weights]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{source} is no directory, and the Hugging Face hub did not give it ({first_line(error)}): "
            "check the name, the network and your access, or download it and give its directory"
        ) from error


def checksum(path: Path, whole: bool) -> str:
    """SHA-256 of a file, or of a sample: size, header, and 4 KiB at begin, middle and end of every tensor."""
    with path.open("rb", buffering=0) as file:
        if whole:
            return hashlib.file_digest(file, "sha256").hexdigest()
        entries = shard_header(path).tensors.values()
        digest = hashlib.sha256(path.stat().st_size.to_bytes(8, "little"))
        digest.update(file.read(min((entry.start for entry in entries), default=-1)))
        for entry in entries:
            last = max(entry.stop - _SAMPLE, entry.start)
            for start in sorted({entry.start, (entry.start + last) // 2, last}):
                file.seek(start)
                digest.update(file.read(min(_SAMPLE, entry.stop - start)))
    return digest.hexdigest()


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
