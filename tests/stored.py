"""What every run directory has to keep: a loaded model holds the very weights that its files say."""

from __future__ import annotations

from pathlib import Path

import torch

import lowbit
from lowbit.formats import native
from lowbit.formats.files import read_shard, shard_header
from lowbit.numerics.qtensor import QLayer


def loaded_as_stored(run: Path) -> list[QLayer]:
    """The layers in a directory's files, each of which `lowbit.load` has dequantized to the last bit."""
    loaded, found = lowbit.load(run, dtype=torch.float32), []
    for file in run.glob("*.safetensors"):
        layers, _ = native.unpack(shard_header(file).metadata, read_shard(file))
        for name, layer in layers.items():
            assert torch.equal(loaded.get_submodule(name).weight, layer.weight.dequantize())
            found.append(layer)
    assert found
    return found
