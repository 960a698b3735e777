"""A block under FlatQuant: its trainable parts, the forward they are trained in, and what becomes of them.

The forward is that of the finished block: c stands in gains and rows, P_v in the rows of V, and weights pass threshold,
transform and rounding in the order in which they will be stored. So training sees what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..graph.anatomy import Edge, Norm, Rows, Site
from ..numerics.clipping import clamped, clipped_range, quantize_clipped
from ..numerics.grid import fit_range, unit_range
from ..numerics.maps import Kronecker, Map
from ..numerics.qtensor import QAttention
from ..numerics.replay import index
from ..numerics.spec import Spec
from .flat_maps import Group, InputMap, KeyMap, Matrices, factors_of, find_groups, inverse_weight, sizes_of, turn_values
from .views import Batch, BlockView, Fold, Quantizer, to_readers, to_source

if TYPE_CHECKING:
    from .flatquant import FlatQuant

Live = dict[tuple[str, str], Tensor]
"""What a forward is computed with, by (kind, name): weights, other parameters, matrices, clipping parts."""


class FlatBlock:
    """What is trained of one block, its quantized forward, and how both are merged into it."""

    def __init__(self, view: BlockView, settings: FlatQuant) -> None:
        self.view, self.settings = view, settings
        self.dtype = view.inputs(0, "float").dtype
        self.lengths = [len(view.inputs(batch, "float")) for batch in range(view.batches)]
        self.kv = view.kv if view.kv is not None and not view.kv.static and view.kv.layout != "channel" else None
        values = self.kv is not None and self.kv.values is not None
        keys = self.kv is not None and self.kv.keys is not None
        quantized = {name for name, formats in view.formats.items() if any(formats)}
        self.groups = find_groups(view.anatomy, quantized, transforms=settings.lt, values=values, mapped=view.maps)
        sizes = sizes_of(self.groups)
        self.key: int | None = None
        if settings.lt and keys and (width := view.key_width()):
            self.key = len(sizes)
            sizes.append(width)
        self.matrices = Matrices(sizes, settings.form, view.generator, view.device)
        self.sites = {site.name: group for group in self.groups for tap in group.taps for site in tap.sites}
        self.turns = {g.value.source.site.name: g for g in self.groups if g.value and isinstance(g.value.source, Rows)}
        edges = [edge for edge in view.anatomy.edges if edge.kind in ("norm", "up")]
        edges = [edge for edge in edges if not any(reader.name in view.maps for reader in edge.readers)]
        self.edges = {e.name: e for e in edges if settings.ps and any(r.name in quantized for r in e.readers)}
        sources = {e.source.site.name for e in self.edges.values() if isinstance(e.source, Rows)}
        changed = {*self.sites, *self.turns, *sources, *(r.name for e in self.edges.values() for r in e.readers)}
        self.weights = {site.name: view.weight(site) for site in view.anatomy.sites if site.name in changed}
        self.parameters = {name: view.parameter(name) for name in self._names()}
        self.scales = {name: self._start(edge) for name, edge in self.edges.items()}
        self.thresholds = self._thresholds() if settings.lct else {}

    def _names(self) -> Iterator[str]:
        """Parameters beside weights that follow c and P_v."""
        for edge in self.edges.values():
            source = edge.source
            yield from (f"{path}.weight" for path in edge.others)
            if isinstance(source, Norm):
                yield f"{source.name}.weight"
            if source.bias if isinstance(source, Norm) else source.site.bias:
                yield f"{source.name if isinstance(source, Norm) else source.site.name}.bias"
        biased = {site.name for site in self.view.anatomy.sites if site.bias}
        yield from (f"{name}.bias" for name in self.turns if name in biased)

    def _start(self, edge: Edge) -> Tensor:
        """log c over the edge's source channels; 0 where no input was seen."""
        inputs = [view for site in edge.readers if (view := self.view.stats[site.name].minmax) and view.low is not None]
        width = edge.readers[0].shape[1]
        x = torch.stack([seen.amax for seen in inputs]).amax(0) if inputs else torch.zeros(width)
        w = torch.stack([self.weights[site.name].abs().amax(0) for site in edge.readers]).amax(0)
        x, w = to_source(edge, x.to(w.device)).clamp_min(1e-5), to_source(edge, w).clamp_min(1e-5)
        c = (w.pow(1 - self.settings.alpha) / x.pow(self.settings.alpha)).clamp_min(1e-5)
        return (c.log() if inputs else torch.zeros_like(w)).requires_grad_()

    def _thresholds(self) -> Live:
        """The logits γ₋, γ₊: of every unit of a weight, of every group's inputs, of keys and values."""
        shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        for name in self.sites:
            weights, inputs = self.view.formats[name]
            if weights is not None:
                shapes["weight", name] = (2, *unit_range(self.weights[name], weights.block)[0].shape)
            if inputs is not None and inputs.dynamic and not self.settings.before:
                shapes["input", self._group_name(name)] = (2,)
        if self.kv is not None:
            shapes["cache", ""] = (2, 2)
        device = self.view.device
        return {key: torch.full(shape, 4.0, device=device, requires_grad=True) for key, shape in shapes.items()}

    def _group_name(self, site: str) -> str:
        return self.sites[site].taps[0].name

    @property
    def trained(self) -> tuple[list[Tensor], list[Tensor]]:
        """P and c; thresholds."""
        return [*self.matrices.parameters, *self.scales.values()], list(self.thresholds.values())

    # --- the forward --------------------------------------------------------------------------------------------------

    def live(self, dtype: torch.dtype, pairs: list[tuple[Tensor, Tensor]]) -> Live:
        """All that a forward is computed with, with gradients to matrices (P, P⁻ᵀ), scales and thresholds."""
        inverses = [inverse for _, inverse in pairs]
        made: Live = {("matrix", str(i)): p for i, (p, _) in enumerate(pairs)}
        if self.key is not None:
            made["inverse", str(self.key)] = inverses[self.key]
        weights, parameters = self._scaled()
        for name, weight in weights.items():
            made["weight", name] = self._quantized(name, weight, pairs, dtype)
        for name, value in parameters.items():
            site = name.removesuffix(".bias")
            group = self.turns.get(site) if name.endswith(".bias") else None
            made["parameter", name] = value if group is None else _turned(group, value, pairs)
        for (kind, name), logits in self.thresholds.items():
            if kind != "weight":
                made[kind, name] = logits.sigmoid()
        return made

    def _scaled(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and other parameters with c merged."""
        weights, parameters = dict(self.weights), dict(self.parameters)
        for name, edge in self.edges.items():
            c = self.scales[name].exp()
            columns = 1 / to_readers(edge, c)
            for site in edge.readers:
                weights[site.name] = weights[site.name] * columns
            for path in edge.others:
                parameters[f"{path}.weight"] = parameters[f"{path}.weight"] * columns
            source = edge.source
            if isinstance(source, Norm):
                gain = f"{source.name}.weight"
                parameters[gain] = (parameters[gain] + source.offset) * c - source.offset
                bias = f"{source.name}.bias"
            else:
                weights[source.site.name] = _times(source, weights[source.site.name], c)
                bias = f"{source.site.name}.bias"
            if bias in parameters:
                shift = parameters[bias]
                parameters[bias] = shift * c if isinstance(source, Norm) else _times(source, shift, c)
        return weights, parameters

    def _quantized(self, name: str, w: Tensor, pairs: list[tuple[Tensor, Tensor]], dtype: torch.dtype) -> Tensor:
        """Ŵ [O, I] for inputs behind P, of W with c merged."""
        spec = self.view.formats[name][0]
        logits, turn = self.thresholds.get(("weight", name)), self.turns.get(name)
        parts = None if logits is None else logits.sigmoid()
        if parts is not None and spec is not None and self.settings.before:
            w, parts = clamped(w, spec, *clipped_range(w, spec, parts[0], parts[1])), None
        if name in self.sites:
            w = inverse_weight(w, self.sites[name], [inverse for _, inverse in pairs])
        if turn is not None:
            if parts is not None and spec is not None:
                w, parts = clamped(w, spec, *clipped_range(w, spec, parts[0], parts[1])), None
            w = _turned(turn, w, pairs)
        if spec is None:
            return w.to(dtype)
        one = torch.ones((), device=w.device)
        low, high = (one, one) if parts is None else (parts[0], parts[1])
        return quantize_clipped(w, spec, low, high, clamp=parts is not None, dtype=dtype)

    def forward(self, batch: Batch, hidden: Tensor, live: Live) -> Tensor:
        """The quantized block's output for these hidden states, called as for that micro-batch."""
        weights = {name: value for (kind, name), value in live.items() if kind == "weight"}
        parameters = {name: value for (kind, name), value in live.items() if kind == "parameter"}
        quantizers = {name: made for group in self.groups for name, made in self._quantizers(group, live).items()}
        if self.kv is None:
            return self.view.run(batch, hidden, weights, parameters, quantizers)
        key_map = None
        if self.key is not None:
            p = live["matrix", str(self.key)]
            key_map = KeyMap(None, p, (1, len(p)), live["inverse", str(self.key)])
        attention = QAttention(self.kv, key_map, live.get(("cache", "")))
        return self.view.run(batch, hidden, weights, parameters, quantizers, attention)

    def _quantizers(self, group: Group, live: Live) -> dict[str, Quantizer]:
        """What happens to the inputs of a group's sites; linears that read one tensor share one result."""
        made = {int(name): value for (kind, name), value in live.items() if kind == "matrix"}
        transform = self.view.maps.get(group.taps[0].sites[0].name)
        if any(number is not None for number in group.online):
            factors = factors_of(group.online, group.sizes, [made[i] for i in sorted(made)])
            transform = InputMap(factors.left, factors.right, factors.sizes)
        clip = live.get(("input", group.taps[0].name))
        shared: dict[Spec | None, Quantizer] = {}
        quantizers = {}
        for site in (site for tap in group.taps for site in tap.sites):
            spec = self.view.formats[site.name][1]
            if spec is not None or transform is not None:
                quantizers[site.name] = shared.setdefault(spec, _shared(spec, transform, clip))
        return quantizers

    # --- results ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def finish(self) -> None:
        """Set what was learned: c folded, P in fp64, thresholds carried out in the weights."""
        view = self.view
        for name, edge in self.edges.items():
            view.fold(edge, Fold((-self.scales[name]).exp()))
        exact = self.matrices.pairs(torch.float64)
        sites = {site.name: site for site in view.anatomy.sites}
        if self.settings.before:
            for name in self.sites:
                view.set_weight(sites[name], self._clamped(name, view.weight(sites[name])))
        for group in self.groups:
            if any(number is not None for number in group.online):
                online = factors_of(group.online, group.sizes, [p.float() for p, _ in exact])
                for tap in group.taps:
                    view.set_map(tap, online)
        for name in {*self.sites, *self.turns}:
            self._set_weight(sites[name], exact)
        for name, group in self.sites.items():
            clip, inputs = self.thresholds.get(("input", group.taps[0].name)), view.formats[name][1]
            if clip is not None and inputs is not None and inputs.dynamic:
                view.set_input_clip(sites[name], clip.sigmoid())
        if self.key is not None:
            p = exact[self.key][0].float()
            view.set_key_map(Kronecker(None, p, (1, len(p))))
        if ("cache", "") in self.thresholds:
            view.set_kv_clips(self.thresholds["cache", ""].sigmoid())

    def _set_weight(self, site: Site, exact: list[tuple[Tensor, Tensor]]) -> None:
        """The weight behind online maps, with P_v merged and thresholds carried out."""
        view, name = self.view, site.name
        spec, group, turn = view.formats[name][0], self.sites.get(name), self.turns.get(name)
        w = view.weight(site)
        if group is not None and group.value is not None:
            w = factors_of((None, group.right), group.sizes, [p for p, _ in exact]).inverse_weight(w)
        w = w if self.settings.before else self._clamped(name, w)
        if turn is not None:
            w = _turned(turn, w.double(), exact).float()
            if site.bias:
                bias = view.parameter(f"{name}.bias").double()
                view.set_parameter(f"{name}.bias", _turned(turn, bias, exact).float())
        view.set_weight(site, w)
        if spec is not None and self.settings.lct:
            view.set_grid(site, fit_range(w, spec))

    def _clamped(self, name: str, w: Tensor) -> Tensor:
        spec, logits = self.view.formats[name][0], self.thresholds.get(("weight", name))
        if spec is None or logits is None:
            return w
        low, high = logits.sigmoid()
        return clamped(w, spec, *clipped_range(w, spec, low, high))


def _times(rows: Rows, tensor: Tensor, c: Tensor) -> Tensor:
    """A weight [O, I] or bias [O] whose rows of an edge's source are multiplied by c [S]."""
    factor = c if tensor.dim() == 1 else c[:, None]
    if rows.index is None:
        return tensor * factor
    places = index(rows.index, tensor.device)
    return tensor.index_copy(0, places, tensor[places] * factor)


def _turned(group: Group, tensor: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A weight or bias that makes V, with P_v merged."""
    assert group.value is not None and isinstance(group.value.source, Rows) and group.right is not None
    return turn_values(group.value.source, tensor, pairs[group.right][0])


def _shared(spec: Spec | None, transform: Map | None, clip: Tensor | None) -> Quantizer:
    """Transform and quantize inputs, once for all linears that are handed the very same tensor."""
    last: list[Tensor] = []

    def quantize(x: Tensor) -> Tensor:
        if last and last[0] is x:
            return last[1]
        y = x if transform is None else transform.apply(x)
        if spec is not None:
            low, high = (torch.ones((), device=x.device),) * 2 if clip is None else (clip[0], clip[1])
            y = quantize_clipped(y.reshape(-1, y.shape[-1]), spec, low, high, dtype=x.dtype).reshape(x.shape)
        last[:] = [x, y]
        return y

    return quantize
