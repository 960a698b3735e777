"""lowbit's own model, made for a while into what a client computes that leaves something out or narrows it.

A difference that is known, and that the user is told of, must not hide one that is not. So where transformers has no
use for a part of an export, the reference does without it too for as long as the two are compared, and what llama.cpp
and vLLM's CPU kernels round of their own accord, it rounds as they do; with inputs in 16 bits, both are compared where
rounding cannot turn a difference of the last bit into one of a code; and how far rounding alone carries a model from
itself is measured on it, not assumed. Every change is undone on the way out.

Shape letters: N windows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..formats.gguf_blocks import BLOCK
from ..modules.attention import LayerKV, attach, attached, detach
from ..modules.linear import QLinear
from ..numerics.grid import float_spacing
from ..numerics.spec import E4M3, SUPER, Float, Spec

NUDGE = 1e-6
"""How far `nudged` moves inputs, as a part of them: what summing in another order does to fp32 numbers."""

EXPERTS = "transformers does not quantize the inputs of a mixture's experts, which were compared without"
UNCACHED = "transformers ignores the scales of keys and values, which were compared without quantizing any"
EXPERTS_NARROW = "transformers dequantizes a mixture's experts in 16 bits, which was compared with the same"
NARROW = "transformers dequantizes floats below 8 bits to bfloat16, which was compared with the same"
ROUNDED = "llama.cpp rounds the inputs of quantized linears to 8 bits, which was compared with the same"
CUT = "vLLM's CPU kernel cuts bits off keys and values, not rounding them, which was compared with the same"


Imitation = AbstractContextManager[tuple[str, ...]]
"""While it lasts, a model computes as a client does; it gives what a user should know of that."""


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


def imitated(client: str, model: nn.Module, found: Mapping[str, Any]) -> Imitation:
    """Let the model compute as `client` computes its export, as far as that is known.

    Gives what a user should know of it: nothing where the model computes as ever. `found` is what the client said.
    """
    known: dict[str, Callable[[nn.Module, Mapping[str, Any]], Imitation]] = {
        "transformers": as_transformers,
        "llamacpp": as_llamacpp,
        "vllm": as_vllm,
    }
    return known[client](model, found) if client in known else nullcontext(())


# --- transformers -----------------------------------------------------------------------------------------------------


@contextmanager
def as_transformers(model: nn.Module, found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Let the model compute as transformers loads the export; gives what a user should know of it.

    `found` is what the client said: where it has no use for the scales of keys and values, these stay 16 bits, and the
    weights of experts are in the dtype in which it dequantized them, which differs between releases.
    """
    remarks, narrowed = [], _narrowed(model, getattr(torch, found.get("experts") or "float32"))
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


def _narrowed(model: nn.Module, experts: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype in which transformers dequantizes some linears: a mixture's experts, and floats below 8 bits anywhere,
    which become bfloat16."""
    found = {}
    for name, module in linears(model).items():
        if _is_small(module):
            found[name] = torch.bfloat16
        elif in_experts(name) and module.layer.weight.parts:
            found[name] = experts
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


# --- llama.cpp and vLLM ----------------------------------------------------------------------------------------------


@contextmanager
def as_llamacpp(model: nn.Module, _: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Let quantized linears round their inputs to 8 bits, as ggml's matrix products do. What makes this more than a
    detail is a mixture's router: rounding tips its choice over for some tokens, which moves logits by whole units.
    """
    handles = []
    for module in linears(model).values():
        by_super = bool(module.layer.weight.parts) and module.layer.weight.parts[0].grid.spec.scale == "kquant"
        rounded = super_rounded if by_super else block_rounded
        handles.append(module.register_forward_pre_hook(lambda _, inputs, rounded=rounded: (rounded(inputs[0]),)))
    try:
        yield (ROUNDED,)
    finally:
        for handle in handles:
            handle.remove()


def block_rounded(x: Tensor) -> Tensor:
    """x [..., I] as ggml's Q8_0 and Q8_1 hold it: per 32 columns integers of up to ±127, and a step in fp16."""
    units = x.unflatten(-1, (-1, BLOCK))
    step = units.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, units / step, 0.0).round()
    return (codes * step.half()).flatten(-2).to(x.dtype)


def super_rounded(x: Tensor) -> Tensor:
    """x [..., I] as ggml's Q8_K holds it: per 256 columns integers, of which the largest in magnitude is -127."""
    units = x.unflatten(-1, (-1, SUPER))
    extreme = units.gather(-1, units.abs().argmax(-1, keepdim=True))
    step = torch.where(extreme == 0, 1.0, extreme / -127)
    return ((units / step).round().clamp_max(127) * step).flatten(-2)


@contextmanager
def as_vllm(model: nn.Module, found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Let E4M3 caches hold what the kernel of vLLM 0.32 for CPUs stores, which casts without rounding."""
    caches = [cache for cache in attached(model).values() if cache.kv.rule == "e4m3" and found.get("device") == "cpu"]
    for cache in caches:
        cache.stored = partial(_cut, cache)  # type: ignore[method-assign]
    try:
        yield (CUT,) if caches else ()
    finally:
        for cache in caches:
            del cache.stored


def _cut(cache: LayerKV, x: Tensor, side: int) -> Tensor:
    """Keys (side 0) or values (side 1) in units of their calibrated scale, bits behind those of E4M3 cut off."""
    affine, part = cache.affine[side], cache.parts[side]
    assert affine is not None and part is not None, "a cache of this rule is calibrated"
    scale = affine.scale.float()
    units = part.units(x.float()) / scale
    step = float_spacing(units, E4M3)
    cut = ((units / step).trunc() * step).clamp(-E4M3.largest, E4M3.largest)
    return (cut * scale).reshape(x.shape).to(x.dtype)


# --- any client -------------------------------------------------------------------------------------------------------


@contextmanager
def nudged(model: nn.Module) -> Iterator[None]:
    """Let every quantized linear get inputs that are off by a part NUDGE, in random directions of a fixed seed, before
    anything rounds them.

    Embeddings alone would not do: so few of their codes flip that it is chance whether any does.
    """
    generator = torch.Generator().manual_seed(0)

    def nudge(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
        (x,) = inputs
        return (x * (1 + NUDGE * torch.randn(x.shape, generator=generator).to(x)),)

    handles = [module.register_forward_pre_hook(nudge, prepend=True) for module in linears(model).values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_small(module: QLinear) -> bool:
    """Whether a weight is made of floats of fewer than 8 bits."""
    specs: list[Spec] = [part.grid.spec for part in module.layer.weight.parts]
    return bool(specs) and isinstance(specs[0].number, Float) and specs[0].bits < 8
