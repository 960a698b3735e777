"""lowbit's own model, made for a while into what a client computes that leaves something out or narrows it.

A difference that is known, and that the user is told of, must not hide one that is not. So where transformers has no
use for a part of an export, the reference does without it too for as long as the two are compared; with inputs in 16
bits, both are compared where rounding cannot turn a difference of the last bit into one of a code; and how far
rounding alone carries a model from itself is measured on it, not assumed. Every change is undone on the way out.

Shape letters: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.attention import attach, attached, detach
from ..modules.linear import QLinear
from ..numerics.spec import Float, Int, Spec

NUDGE = 1e-6
"""How far `nudged` moves inputs, as a part of them: what summing in another order does to fp32 numbers."""

EXPERTS = "transformers does not quantize the inputs of a mixture's experts, which were compared without"
UNCACHED = "transformers ignores the scales of keys and values, which were compared without quantizing any"
EXPERTS_NARROW = "transformers dequantizes a mixture's experts in 16 bits, which was compared with the same"
NARROW = "transformers dequantizes floats below 8 bits to bfloat16, which was compared with the same"


def in_experts(name: str) -> bool:
    """Whether a linear is one of a mixture's experts."""
    return ".experts." in name


def linears(model: nn.Module) -> dict[str, QLinear]:
    """Every quantized linear by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QLinear)}


@torch.no_grad()
def logits_of(model: nn.Module, windows: Tensor) -> Tensor:
    """fp32 logits [N, T, V] of windows [N, T], one at a time."""
    return torch.cat([model(input_ids=window[None], use_cache=False).logits.float().cpu() for window in windows])


@contextmanager
def as_transformers(model: nn.Module, export: Path, found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Let the model compute as transformers loads the directory `export`; gives what a user should know of it.

    `found` is what the client said: where it has no use for the scales of keys and values, these stay 16 bits.
    """
    remarks, narrowed = [], _narrowed(model, export)
    caches = attached(model) if found.get("uncached") else {}
    if caches:
        remarks.append(UNCACHED)
    mixed = {name: module for name, module in linears(model).items() if in_experts(name)}
    if any(module.layer.activation is not None for module in mixed.values()):
        remarks.append(EXPERTS)
    narrow = [name for name, dtype in narrowed.items() if dtype != torch.float32]
    if any(_is_small(linears(model)[name]) for name in narrow):
        remarks.append(NARROW)
    if any(not _is_small(linears(model)[name]) for name in narrow):
        remarks.append(EXPERTS_NARROW)
    for path in caches:
        detach(model.get_submodule(path))
    try:
        with _dequantized_alike(model, narrowed), without_inputs(mixed):
            yield tuple(remarks)
    finally:
        for path, cache in caches.items():
            attach(model.get_submodule(path), cache.kv, cache.key_map, cache.clips, cache.affine)


def _narrowed(model: nn.Module, export: Path) -> dict[str, torch.dtype]:
    """The dtype in which transformers dequantizes some linears: a mixture's experts, which it has fused, in that of the
    stored scales; floats below 8 bits anywhere in bfloat16."""
    found = {}
    for name, module in linears(model).items():
        if _is_small(module):
            found[name] = torch.bfloat16
        elif in_experts(name) and module.layer.weight.parts:
            spec = module.layer.weight.parts[0].grid.spec
            stored = isinstance(spec.number, Int) and spec.scale == "half"
            found[name] = _dtype_of(export) if stored else torch.float32
    return found


@contextmanager
def _dequantized_alike(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Let these linears multiply by weights that were dequantized in other dtypes."""
    modules = {name: linears(model)[name] for name in dtypes}
    before = {name: module.weight for name, module in modules.items()}
    for name, module in modules.items():
        module.weight = module.layer.weight.dequantize(dtypes[name]).to(module.weight)
    try:
        yield
    finally:
        for name, module in modules.items():
            module.weight = before[name]


@contextmanager
def without_inputs(modules: Mapping[str, QLinear]) -> Iterator[None]:
    """Let these linears multiply their inputs as they come, not quantized."""
    before = [(module, module.layer) for module in modules.values()]
    for module in modules.values():
        module.layer = replace(module.layer, activation=None)
    try:
        yield
    finally:
        for module, layer in before:
            module.layer = layer


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Let every quantized linear get inputs that are off by a part NUDGE, in random directions of a fixed seed.

    Embeddings alone would not do: so few of their codes flip that it is chance whether any does.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        return (x * (1 + NUDGE * torch.randn(x.shape, generator=generator).to(x)),)

    handles = [module.register_forward_pre_hook(nudge) for module in linears(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_small(module: QLinear) -> bool:
    """Whether a weight is made of floats of fewer than 8 bits."""
    specs: list[Spec] = [part.grid.spec for part in module.layer.weight.parts]
    return bool(specs) and isinstance(specs[0].number, Float) and specs[0].bits < 8


def _dtype_of(export: Path) -> torch.dtype:
    """The dtype that the export's configuration gives the model."""
    config = json.loads((export / "config.json").read_text("utf8"))
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")  # type: ignore[no-any-return]
