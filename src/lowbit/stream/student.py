"""What a block-trained method is given: the block as a function of its weights, its inputs, and the original's outputs.

The block itself is never changed while training runs: every forward substitutes the weights it is given, so candidates
cost nothing to undo and gradients flow into whatever they were computed from. Results are handed to `BlockWork`, which
carries them out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..graph.anatomy import Edge, Norm, Site, Tap
from ..methods.views import Batch, Fold, Quantizer, Stats
from ..modules.attention import attach, detach
from ..modules.linear import quantize_activation
from ..numerics.grid import Grid
from ..numerics.kv import KV
from ..numerics.maps import Map
from ..numerics.qtensor import QAttention, QLayer, QTensor, QWeight
from .hidden import HiddenStates
from .work import BlockWork

if TYPE_CHECKING:
    from .text import Text


class Student:
    """A `BlockView` of the work on one block."""

    def __init__(
        self, work: BlockWork, text: Text, stats: Mapping[str, Stats], layers: dict[str, QLayer], seed: int
    ) -> None:
        self.anatomy, self.place, self.formats, self.stats = work.anatomy, work.place, work.formats, stats
        self.batches, self.device = text.batches, work.device
        self.generator = torch.Generator().manual_seed(seed)
        self.kv = work.recipe.scheme.kv if work.anatomy.attention else None
        self.layers = layers
        """The quantized layers, for methods that come after Round."""
        self.moved = False
        """Whether maps, folds or other weights changed what the linears see."""
        self.maps: Mapping[str, Map] = work.maps
        self.joins = work.device.type != "cpu"
        """Whether micro-batches are joined: a CPU is busy with one, and memory is what is short there."""
        self._work, self._text = work, text
        self._kinds: dict[int, int] = {}
        self._quantizers = {site.name: self._scheme_quantizer(site) for site in work.anatomy.sites}
        work.widen()
        named = work.block.named_parameters()
        self.others: Sequence[str] = [name for name, parameter in named if parameter.dim() == 1]

    # --- what it is ---------------------------------------------------------------------------------------------------

    def weight(self, site: Site) -> Tensor:
        """W [O, I] in fp32 as rounding would take it."""
        return self._work.weight(site).detach().clone()

    def parameter(self, name: str) -> Tensor:
        """Any other parameter of the block in fp32."""
        return self._work.source[name].detach().to(self.device).float().clone()

    def stored(self, name: str, value: Tensor) -> Tensor:
        """What a file would hold of this value of a parameter, in fp32."""
        return value.to(self._work.tensors[name].dtype).float()

    def joined(self, batches: Sequence[int]) -> list[Batch]:
        """The micro-batches in as few calls of the block as may be: a GPU is fed with all that are called alike."""
        groups: list[tuple[int, ...]] = []
        for batch in batches:
            if self.joins and groups and self._text.alike(groups[-1][0], batch):
                groups[-1] = (*groups[-1], batch)
            else:
                groups.append((batch,))
        return [group[0] if len(group) == 1 else group for group in groups]

    def kind(self, batch: Batch) -> tuple[int, int]:
        """(the first micro-batch that is called like this one, how many are run at once)."""
        first, count = (batch, 1) if isinstance(batch, int) else (batch[0], len(batch))
        if first not in self._kinds:
            alike = (known for known in self._kinds.values() if self._text.alike(known, first))
            self._kinds[first] = next(alike, first)
        return self._kinds[first], count

    def inputs(self, batch: Batch, stream: Literal["float", "quantized"]) -> Tensor:
        """The block's input hidden states [b, T, D] for one micro-batch, or some, in the working dtype."""
        states = self._text.inputs if stream == "quantized" else self._text.clean
        assert states is not None, "the float stream exists wherever a trained method does"
        return self._stacked(states, batch)

    def target(self, batch: Batch, stream: Literal["float", "quantized"] = "float") -> Tensor:
        """The original block's output for the micro-batch, or some, of a stream, [b, T, D]."""
        if stream == "quantized":
            plain = {site.name: _mapping(self._work.maps.get(site.name)) for site in self.anatomy.sites}
            return self.run(batch, self.inputs(batch, stream), {}, quantizers=plain)
        assert self._text.targets is not None, "targets exist wherever a trained method does"
        return self._stacked(self._text.targets, batch)

    def _stacked(self, states: HiddenStates, batch: Batch) -> Tensor:
        if isinstance(batch, int):
            return states[batch].to(self.device)
        return torch.cat([states[each].to(self.device) for each in batch])

    def start(self, site: Site) -> QTensor:
        """The codes that Round chose."""
        return self.layers[site.name].weight.parts[0].to(self.device)

    def rounded(self, site: Site) -> Tensor:
        """What the site holds by now."""
        return self.layers[site.name].weight.to(self.device).dequantize()

    # --- running ------------------------------------------------------------------------------------------------------

    def run(
        self,
        batch: Batch,
        hidden: Tensor,
        weights: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        quantizers: Mapping[str, Quantizer] | None = None,
        attention: QAttention | None = None,
    ) -> Tensor:
        """The block's output if its sites held `weights` [O, I] and its other parameters `parameters`."""
        sites = {site.name: site for site in self.anatomy.sites}
        values = {name: value.to(self._work.dtype) for name, value in (parameters or {}).items()}
        for name, weight in weights.items():
            cast = weight.to(self._work.dtype)
            values[f"{name}.weight"] = cast.T if sites[name].transposed else cast
        for name, tensor in self._work.block.named_parameters():
            if name not in values:
                values[name] = tensor.detach().to(self._work.dtype)
        with ExitStack() as stack:
            for name in sites:
                quantizer = (quantizers or {}).get(name, self._quantizers[name])
                if quantizer is not None:
                    module = self._work.block.get_submodule(name)
                    stack.callback(module.register_forward_pre_hook(_on_input(quantizer)).remove)
            if attention is not None:
                module = self._work.block.get_submodule(self.anatomy.attention)
                attach(module, attention.kv, attention.key_map, attention.clips, attention.affine)
                stack.callback(detach, module)
            one = batch if isinstance(batch, int) else batch[0]  # those that are joined are called alike
            return self._text.call(_Substituted(self._work.block, values), one, hidden)

    @torch.no_grad()
    def key_width(self) -> int:
        """Width of the keys that the attention hands to its cache; 0 where there is none."""
        if not self.anatomy.attention:
            return 0
        module = self._work.block.get_submodule(self.anatomy.attention)
        seen = attach(module, KV())
        self.run(0, self.inputs(0, "float"), {})
        detach(module)
        return seen.key_width

    @torch.no_grad()
    def site_inputs(self, batch: int, hidden: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Inputs [T, I] of every linear that runs, behind its map: before and after the scheme's quantization."""
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def recording(site: Site) -> Quantizer:
            map, quantize = self._work.maps.get(site.name), self._quantizers[site.name]

            def record(x: Tensor) -> Tensor:
                mapped = x if map is None else map.apply(x)
                quantized = mapped if self.formats[site.name][1] is None or quantize is None else quantize(x)
                flat = mapped.reshape(-1, mapped.shape[-1])
                seen[site.name] = (flat, flat if quantized is mapped else quantized.reshape(flat.shape))
                return mapped

            return record

        self.run(batch, hidden, {}, quantizers={site.name: recording(site) for site in self.anatomy.sites})
        return seen

    def _scheme_quantizer(self, site: Site) -> Quantizer | None:
        """The scheme's fake quantization of a site's inputs, behind the maps and clips decided so far."""
        spec = self.formats[site.name][1]
        map, clip = self._work.maps.get(site.name), self._work.clips.get(site.name)
        if spec is None and map is None:
            return None
        grid = self._work.input_grid(site, self.stats)

        def quantize(x: Tensor) -> Tensor:
            x = x if map is None else map.apply(x)
            return x if spec is None else quantize_activation(x, spec, grid, clip)

        return quantize

    # --- results ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def fold(self, edge: Edge, fold: Fold) -> None:
        """Fold a map into the edge."""
        self._work.fold(edge, fold)
        self._changed(*edge.readers, *([] if isinstance(edge.source, Norm) else [edge.source.site]))

    @torch.no_grad()
    def set_weight(self, site: Site, weight: Tensor) -> None:
        """Round this weight [O, I] instead."""
        self._work.store_weight(site, weight.detach())
        self._changed(site)

    @torch.no_grad()
    def set_parameter(self, name: str, value: Tensor) -> None:
        """Store this value of a parameter that is not quantized."""
        self._work.store(name, value.detach())

    @torch.no_grad()
    def set_map(self, tap: Tap, map: Map) -> None:
        """Apply an online map to the inputs of all linears of the tap, which then hold W P⁻ᵀ."""
        self._work.set_map(tap, map)
        self._changed(*tap.sites)

    def _changed(self, *sites: Site) -> None:
        """Other weights have other ranges, whatever was learned of those before."""
        self.moved = True
        for site in sites:
            self._work.grids.pop(site.name, None)

    def set_grid(self, site: Site, grid: Grid) -> None:
        """Round onto this grid, whatever the clip would choose."""
        self._work.grids[site.name] = grid

    def set_key_map(self, map: Map) -> None:
        """Apply a map of head width to the keys before they are quantized."""
        self._work.key_map = map

    def set_kv_clips(self, clips: Tensor) -> None:
        """Ranges of keys and values cover these parts [2, 2] of their smallest and largest value."""
        self._work.kv_clips = clips.detach().float().cpu()

    def set_input_clip(self, site: Site, clip: Tensor) -> None:
        """Dynamic ranges of the inputs cover these parts [2] of their smallest and largest value."""
        self._work.clips[site.name] = clip.detach().float().cpu()

    def set_codes(self, site: Site, codes: QTensor) -> None:
        """These are the site's codes."""
        layer = self.layers[site.name]
        weight = QWeight((codes.to("cpu"), *layer.weight.parts[1:]))
        self.layers = {**self.layers, site.name: replace(layer, weight=weight)}


class _Substituted(nn.Module):
    """A block that computes with other parameters than its own."""

    def __init__(self, block: nn.Module, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["block"], self.values = block, dict(values)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.__dict__["block"], self.values, args, kwargs)


def _mapping(map: Map | None) -> Quantizer:
    return (lambda x: x) if map is None else map.apply


def _on_input(quantizer: Quantizer) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (quantizer(args[0]), *args[1:])

    return hook
