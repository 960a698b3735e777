"""Runs of tiny random models to export, and the real clients that read what was exported."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tokenizer
from torch import Tensor, nn

from lowbit.formats import native
from lowbit.formats.base import read
from lowbit.formats.files import read_shard, write_index, write_json, write_shard
from lowbit.graph.skeleton import build_skeleton, model_from_config, unfuse_experts
from lowbit.modules.linear import install
from lowbit.numerics.grid import fit_range
from lowbit.numerics.qtensor import QAttention, QLayer, QTensor, QWeight
from lowbit.numerics.spec import Spec
from lowbit.runtime import clients

LLAMA: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "dtype": "bfloat16",
}
LINEARS = "*.layers.*_proj"


def llama(**changes: object):  # type: ignore[no-untyped-def]
    from transformers import LlamaConfig

    return LlamaConfig(**{**LLAMA, **changes})


def quantize(weight: Tensor, spec: Spec, *, ordered: bool = False) -> QLayer:
    """Rounded to nearest on the min-max grid; `ordered` fits the groups along a random order of the columns."""
    order = torch.randperm(weight.shape[1]) if ordered else None
    values = weight.float() if order is None else weight.float()[:, order]
    grid = fit_range(values, spec)
    codes = grid.encode(values)
    if order is not None:
        codes = codes[:, torch.argsort(order)]
    return QLayer(QWeight((QTensor(codes, grid, order),)))


@dataclass
class Run:
    """A finished run directory, the model that lowbit loads from it in fp32, its skeleton and its layers."""

    path: Path
    reference: nn.Module
    skeleton: nn.Module
    layers: Mapping[str, QLayer]


def make_run(path: Path, config: Any, formats: Mapping[str, Spec | None], *, ordered: str = "") -> Run:
    """Quantize a random model; the last pattern that matches a linear's name gives its format."""
    model = model_from_config(config).to(torch.bfloat16)
    unfuse_experts(model)
    layers, rest = {}, dict(model.state_dict())
    if config.tie_word_embeddings:
        del rest["lm_head.weight"]
    for name, module in model.named_modules():
        chosen = [spec for pattern, spec in formats.items() if fnmatchcase(name, pattern)]
        if chosen and chosen[-1] is not None and module._parameters.get("weight") is not None:
            layers[name] = quantize(rest.pop(f"{name}.weight"), chosen[-1], ordered=fnmatchcase(name, ordered))
    reference = write_run(path, model, layers, rest)
    tokenizer(config.vocab_size).save_pretrained(path)
    return Run(path, reference, build_skeleton(config), layers)


def write_run(
    path: Path, model: Any, layers: Mapping[str, QLayer | QAttention], rest: Mapping[str, Tensor]
) -> nn.Module:
    """Write the layers and other tensors of a model as a run directory of two shards; gives what lowbit loads of it."""
    path.mkdir()
    for index, inside in enumerate((False, True)):
        mine = {name: layer for name, layer in layers.items() if (".layers." in name) == inside}
        tensors = {name: tensor for name, tensor in rest.items() if (".layers." in name) == inside}
        for name, layer in mine.items():
            tensors.update(native.pack(name, layer))
        write_shard(path / f"model-{index + 1:05d}-of-00002.safetensors", tensors, native.describe(mine))
    write_index(path, [file.name for file in path.glob("*.safetensors")])
    written = {**model.config.to_dict(), "dtype": "bfloat16", "architectures": [type(model).__name__]}
    write_json(path / "config.json", {**written, "quantization_config": {"quant_method": "lowbit"}})
    reference = build_skeleton(model.config)
    install(reference, layers, rest, torch.float32)
    reference.tie_weights()
    return reference.eval()


def same(one: QLayer, other: QLayer) -> bool:
    """Equal codes, scales, zero-points and groups."""
    (a,), (b,) = one.weight.parts, other.weight.parts
    zeros = (a.grid.zero is None) == (b.grid.zero is None)
    zeros = zeros and (a.grid.zero is None or torch.equal(a.grid.zero, b.grid.zero))
    groups = [None if part.order is None else part.group_index for part in (a, b)]
    indexed = groups[0] is groups[1] if None in groups else torch.equal(*groups)
    scales = torch.equal(a.grid.scale, b.grid.scale)
    return bool(a.codes.dtype == b.codes.dtype and torch.equal(a.codes, b.codes) and scales and zeros and indexed)


def tensors_of(directory: Path) -> dict[str, Tensor]:
    """Every tensor of an exported directory."""
    return {name: t for file in sorted(directory.glob("*.safetensors")) for name, t in read_shard(file).items()}


def layers_of(run: Path) -> dict[str, QLayer]:
    """The layers of a run directory by name."""
    found = {}
    for file in sorted(run.glob("*.safetensors")):
        found.update({name: layer for name, (_, layer) in read(file, lambda n: ((n, slice(None)),))[0].items()})
    return found


def windows(vocabulary: int = 96, count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(3, vocabulary, (count, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model: nn.Module, batch: Tensor) -> Tensor:
    """fp32 logits [N, T, V]."""
    return torch.cat([model(input_ids=window[None], use_cache=False).logits.float() for window in batch])


def client_python(name: str) -> str:
    """The interpreter of a client; skips the test where the developer has named none."""
    variable = f"LOWBIT_{name.upper()}_PYTHON"
    if variable not in os.environ:
        pytest.skip(f"{variable} is unset: set it to the python of an environment that has {name}")
    return os.environ[variable]


Answer = Callable[[str], tuple[Tensor, dict[str, str]]]
"""Case -> (logits [N, T, V] or scores [N, T - 1], found.json)."""


def client_answers(name: str, exports: Mapping[str, tuple[Path, Tensor]], place: Path) -> Answer:
    """What a client computes from many (exported directory, batch), in one process: starting it takes longest.

    Where it ends early, those cases fail that it left without an answer.
    """
    python = client_python(name)
    place.mkdir()
    jobs = {case: place / str(index) for index, case in enumerate(exports)}
    for case, (export, batch) in exports.items():
        jobs[case].mkdir()
        write_json(jobs[case] / "job.json", {"export": str(export), "windows": batch.tolist(), "threads": 1})
    command = [python, str(clients.find_client(name).script), *map(str, jobs.values())]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=place)

    def answer(case: str) -> tuple[Tensor, dict[str, str]]:
        job = jobs[case]
        assert (job / "found.json").is_file(), f"{ended.stdout[-1000:]}\n{ended.stderr[-4000:]}"
        kind = "logits" if (job / "logits.npy").is_file() else "scores"
        return torch.from_numpy(np.load(job / f"{kind}.npy")), json.loads((job / "found.json").read_text("utf8"))

    return answer


def client_logits(name: str, export: Path, batch: Tensor, place: Path) -> tuple[Tensor, dict[str, str]]:
    """What a client computes of `batch` from an exported directory: (logits [N, T, V], found.json)."""
    return client_answers(name, {"": (export, batch)}, place)("")


def call(command: list[str]) -> None:
    """Run a program to its end, and show what it said where it failed."""
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{ended.stdout[-1000:]}\n{ended.stderr[-4000:]}"
