"""A model that another tool quantized, rewritten as a finished run directory: its codes under lowbit's own names.

From then on it is a model like any other here: evaluated, compared and exported to any format that can carry its codes.
It is read and written block by block, and a killed import goes on at the first missing block like a run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .runtime.adopt import Adopted
    from .stream.run import RunDirectory

BESIDE = ("quantization_config", "quantization", "compression_config", "hf_quant_config")
"""What configurations say of how weights are stored."""


def import_into(
    source: str | Path, output: Path, *, trust_remote_code: bool, notice: Callable[[str], None]
) -> RunDirectory:
    """Write the foreign model `source` to the run directory `output`. Raises ValueError for what cannot be read."""
    from .formats.foreign import is_foreign
    from .formats.native import VERSION
    from .graph.structure import find_layers
    from .runtime.load import adopt, find_model, is_native
    from .stream.memory import peak_memory
    from .stream.run import RunDirectory

    began = time.perf_counter()
    path = find_model(source, trust_remote_code=trust_remote_code)
    if is_native(path):
        raise ValueError(f"{path} is a directory of lowbit's own: it needs no import")
    if not is_foreign(path):
        raise ValueError(f"{path} is in no quantized format that lowbit reads: quantize it with `lowbit quantize`")
    adopted, model = adopt(path, trust_remote_code=trust_remote_code)
    layers = find_layers(model, model.config)
    run = RunDirectory(output, model.config.num_hidden_layers)
    with run.opened({"imported": _fingerprint(path), "format": adopted.format, "numerics": VERSION}, restart=False):
        if not run.complete:
            for name in adopted.unexpected[:1]:
                count = len(adopted.unexpected)
                notice(f"{count} tensors of {path} have no place in the model and are left out, the first: {name}")
            _write_companions(path, run.path, notice)
            _write_model(run, adopted, f"{layers}.")
            run.log({"total": True, "seconds": time.perf_counter() - began, "peak_memory_bytes": peak_memory()})
    return run


def _write_companions(source: Path, target: Path, notice: Callable[[str], None]) -> None:
    """The tokenizer and what else stands beside weights; of a single file, the tokenizer inside it."""
    from .formats.base import copy_companions
    from .runtime.load import load_tokenizer

    if source.is_dir():
        copy_companions(source, target)
        return
    try:
        load_tokenizer(source).save_pretrained(target)
    except ValueError as error:
        notice(str(error))


def _write_model(run: RunDirectory, adopted: Adopted, layers: str) -> None:
    """Everything that a finished run directory holds, its index last."""
    from .formats import native
    from .formats.files import write_json, write_shard
    from .stream.run import NAMES, checkpoint_names

    native.write_config(run.path, {key: value for key, value in adopted.config.items() if key not in BESIDE})
    if not run.shard(0).exists():
        outside, rest = adopted.read(name for name in adopted.names() if not name.startswith(layers))
        for name, layer in outside.items():
            rest.update(native.pack(name, layer))
        write_shard(run.shard(0), rest, native.describe(outside))
    write_json(run.path / NAMES, checkpoint_names(adopted))
    for block in range(run.finished(), run.blocks):
        prefix = f"{layers}{block}"
        found, tensors = adopted.read(adopted.names(f"{prefix}."))
        cut = len(prefix) + 1
        inside = {name[cut:]: layer for name, layer in found.items()}
        run.write_block(block, prefix, inside, {n[cut:]: t for n, t in tensors.items()}, {"name": prefix})
        run.log({"block": prefix, "seconds": 0.0})
    run.finish()


def _fingerprint(path: Path) -> dict[str, str]:
    """File name -> checksum of the foreign model, so that another one is not mixed into a half-finished import."""
    from .formats.source import checksum, scan

    if path.is_file():
        return {path.name: checksum(path, whole=True)}
    return {file.name: checksum(file, whole=False) for file in scan(path)[0]}
