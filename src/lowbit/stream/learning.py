"""The whole model in memory, for what is not learned block by block: rotations, by the loss of the quantized network.

The model's own forward runs with other parameters in its modules' places. Tables and head are never multiplied by the
rotation of the residual stream: what they look up is turned on the way in, and back in front of the head, which costs
tokens instead of a vocabulary. Everything is in fp32; the matrices are merged in fp64 once they are known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from ..graph.anatomy import Anatomy, BlockAnatomy, Norm, Rows, Site
from ..graph.fold import source_rows
from ..graph.rotate import absorb, fold_model
from ..methods.recipe import Recipe
from ..modules.attention import attach, detach
from ..modules.linear import install, quantize_activation
from ..numerics.maps import Kronecker, Map
from ..numerics.ste import quantize_on, quantize_range
from .checkpoint import Checkpoint, free
from .work import Formats


class WholeModel:
    """A `ModelView`: the model with folded norms and absorbed online maps; `release` frees it."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        recipe: Recipe,
        formats: Sequence[Formats],
        checkpoint: Checkpoint,
        windows: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        rotation = recipe.rotation
        assert rotation is not None
        self.anatomy, self.device = anatomy, device
        self.windows = [len(window) for window in windows]
        quantized_inputs = any(inputs is not None for block in formats for _, inputs in block.values())
        self.data_aware = bool(recipe.round.needs) and (quantized_inputs or recipe.scheme.kv is not None)
        self._model, self._recipe, self._formats, self._windows = model, recipe, formats, windows
        install(model, {}, checkpoint.read(checkpoint.names()), torch.float32, device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        fold_model(model, anatomy)
        self._maps: dict[str, Map] = {}
        for index, (block, part) in enumerate(self._blocks()):
            for tap, map in rotation.online(anatomy, index).items():
                for site in next(each for each in part.taps if each.name == tap).sites:
                    absorb(block, site, map)
                    self._maps[anatomy.full_name(index, site.name)] = map.to(device)
        self._base = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def release(self) -> None:
        """Free the model's memory."""
        self._base = {}
        free(self._model)

    def _blocks(self) -> Iterator[tuple[nn.Module, BlockAnatomy]]:
        blocks = cast(nn.ModuleList, self._model.get_submodule(self.anatomy.layers))
        yield from zip(blocks, self.anatomy.blocks, strict=True)

    # --- weights ------------------------------------------------------------------------------------------------------

    def merged(self, matrices: Mapping[str, Tensor], *, quantized: bool) -> dict[str, Tensor]:
        """Every parameter that the matrices change, and every weight that is to be rounded, by full name."""
        found: dict[str, Tensor] = {}
        residual = matrices.get("residual")
        for index, part in enumerate(self.anatomy.blocks):
            merge = _Merge(self._base, self.anatomy.full_name(index, ""))
            if residual is not None:
                merge.residual(part, residual)
            if f"heads.{index}" in matrices:
                merge.heads(part, matrices[f"heads.{index}"])
            if quantized:
                merge.quantize(part, self._fake_quantized(index))
            found |= merge.values
        norm = self.anatomy.final_norm
        if residual is not None and norm is not None and norm.bias:
            found[f"{norm.name}.bias"] = self._base[f"{norm.name}.bias"] @ residual
        return found

    def _fake_quantized(self, index: int) -> Callable[[Site, Tensor], Tensor]:
        """Rounding to nearest on the clip's grid, if that needs no statistics, else on the full range."""
        clip, scores = self._recipe.clip, self.anatomy.blocks[index].scores

        def quantize(site: Site, weight: Tensor) -> Tensor:
            spec = self._formats[index][site.name][0]
            if spec is None:
                return weight
            if clip.needs:
                return quantize_range(weight, spec)
            return quantize_on(weight, clip.fit(weight.detach(), spec, None, scores=site.name in scores))

        return quantize

    # --- running ------------------------------------------------------------------------------------------------------

    def loss(self, window: int, merged: Mapping[str, Tensor], residual: Tensor | None) -> Tensor:
        """Mean cross-entropy of the next token over one window, inputs fake-quantized as the scheme says."""
        ids = self._windows[window][None].to(self.device)
        with ExitStack() as stack:
            self._quantize_inputs(stack)
            if residual is not None:
                self._turn_outside(stack, residual)
            logits = functional_call(
                self._model, dict(merged), (), {"input_ids": ids, "use_cache": False}, tie_weights=False
            ).logits
        return F.cross_entropy(logits[0, :-1].float(), ids[0, 1:])

    def _quantize_inputs(self, stack: ExitStack) -> None:
        """Map and fake-quantize the inputs of all linears, and what attention caches, while the stack is open."""
        rotation, kv = self._recipe.rotation, self._recipe.scheme.kv
        for index, (block, part) in enumerate(self._blocks()):
            for site in part.sites:
                map, spec = self._maps.get(self.anatomy.full_name(index, site.name)), self._formats[index][site.name][1]

                def quantize(_module: nn.Module, args: tuple[Any, ...], map: Map | None = map, spec: Any = spec) -> Any:
                    x = args[0] if map is None else map.apply(args[0])
                    return (x if spec is None else quantize_activation(x, spec, None), *args[1:])

                if map is not None or spec is not None:
                    handle = block.get_submodule(site.name).register_forward_pre_hook(quantize)
                    stack.callback(handle.remove)
            if kv is not None and not kv.static and rotation is not None:
                attention = block.get_submodule(part.attention)
                attach(attention, kv, rotation.key_map(self.anatomy, index))
                stack.callback(detach, attention)

    def _turn_outside(self, stack: ExitStack, residual: Tensor) -> None:
        def out(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            return output @ residual

        def back(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (args[0] @ residual.T, *args[1:])

        for path in self.anatomy.rotations.embeddings:
            stack.callback(self._model.get_submodule(path).register_forward_hook(out).remove)
        stack.callback(self._model.get_submodule(self.anatomy.head).register_forward_pre_hook(back).remove)


class _Merge:
    """One block's parameters as functions of orthogonal matrices; `graph.rotate` does the same in place."""

    def __init__(self, base: Mapping[str, Tensor], prefix: str) -> None:
        self._base, self._prefix = base, prefix
        self.values: dict[str, Tensor] = {}

    def _get(self, path: str) -> Tensor:
        name = f"{self._prefix}.{path}"
        return self.values.get(name, self._base[name])

    def _set(self, path: str, value: Tensor) -> None:
        self.values[f"{self._prefix}.{path}"] = value

    def _weight(self, site: Site) -> Tensor:
        weight = self._get(f"{site.name}.weight")
        return weight.T if site.transposed else weight

    def _set_weight(self, site: Site, weight: Tensor) -> None:
        self._set(f"{site.name}.weight", weight.T if site.transposed else weight)

    def residual(self, part: BlockAnatomy, q: Tensor) -> None:
        """Readers W Q, writers Qᵀ W, their biases and those of the norms b Q."""
        for edge in part.edges:
            if not isinstance(edge.source, Norm) or edge.source not in part.reads:
                continue
            for site in edge.readers:
                self._set_weight(site, self._weight(site) @ q)
            for path in edge.others:
                self._set(f"{path}.weight", self._get(f"{path}.weight") @ q)
            if edge.source.bias:
                self._set(f"{edge.source.name}.bias", self._get(f"{edge.source.name}.bias") @ q)
        for site in part.sites:
            if site.name in part.writes:
                self._set_weight(site, q.T @ self._weight(site))
                if site.bias:
                    self._set(f"{site.name}.bias", self._get(f"{site.name}.bias") @ q)

    def heads(self, part: BlockAnatomy, matrix: Tensor) -> None:
        """V of every head times the matrix, and the output projection's inputs too, since it is orthogonal."""
        width = matrix.shape[0]

        def turned(x: Tensor) -> Tensor:
            return Kronecker(None, matrix, (x.shape[-1] // width, width)).apply(x)

        for edge in part.edges:
            if edge.kind != "value":
                continue
            assert isinstance(edge.source, Rows)
            for site in edge.readers:
                self._set_weight(site, turned(self._weight(site)))
            source, weight = edge.source.site, self._weight(edge.source.site)
            rows = torch.arange(weight.shape[0], device=weight.device)[source_rows(edge, weight)]
            self._set_weight(source, weight.index_copy(0, rows, turned(weight[rows].T).T))
            if source.bias:
                bias = self._get(f"{source.name}.bias")
                self._set(f"{source.name}.bias", bias.index_copy(0, rows, turned(bias[rows])))

    def quantize(self, part: BlockAnatomy, quantize: Callable[[Site, Tensor], Tensor]) -> None:
        """Fake-quantize every weight that has a format."""
        for site in part.sites:
            self._set_weight(site, quantize(site, self._weight(site)))
