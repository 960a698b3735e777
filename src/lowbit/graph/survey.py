"""Reads one block's trace: its linears, its norms, who feeds whom, and what meets the residual stream.

Nothing here knows a family. A linear is a module whose output is its input times its weight; a norm is a module whose
output is proportional to its weight plus a constant; an edge is a place where scaling one output scales one input.
What is found is local to the block and still has to stand `prove.py`'s test on the logits of the whole model.

Shape letters: N rows (tokens), O output features, I input features, S source channels, D model width.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn

from .anatomy import Norm
from .layouts import Layout, elementwise_layouts, value_layouts
from .structure import common_module, expert_lists, split_expert
from .trace import Call, Trace, as_rows, gathers, proportional, same

TOLERANCE = 1e-9
POST_NORM = "post-norm: its output goes to the residual stream, not to a linear"
QUERY_KEY_NORM = "query-key norm: its output goes into the attention product, and no scale before it passes through"
INNER_NORM = "inner norm: its output goes to no linear directly"


@dataclass(frozen=True)
class Link:
    """An edge as found on the probe, by names only, so that it can be written down for any dimensions.

    Of a mixture's experts only the first one that was hit is linked; the others are its likes.
    """

    kind: str
    source: Norm | str
    readers: tuple[str, ...]
    others: tuple[str, ...] = ()
    layouts: frozenset[str] = frozenset()
    inspect: str = ""
    shift: bool = False

    @property
    def name(self) -> str:
        source = self.source.name if isinstance(self.source, Norm) else self.source
        return f"{source} -> {self.readers[0]}"


@dataclass
class Survey:
    """What one kind of block consists of. Names are those of the probe."""

    experts: dict[str, int]
    transposed: dict[str, bool]
    """Every site in order of execution, and whether it stores [I, O]."""
    taps: list[list[str]] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    reads: list[Norm] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)

    def note(self, place: str, reason: str) -> None:
        """Adds a refusal, once."""
        if (place, reason) not in self.refused:
            self.refused.append((place, reason))

    def refuse(self, link: Link, reason: str) -> None:
        """Moves a link to what is refused."""
        if link in self.links:
            self.links.remove(link)
        self.note(link.readers[0], reason)


def _close(left: Tensor, right: Tensor) -> bool:
    return bool((left - right).abs().max() <= TOLERANCE * right.abs().max())


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def measure_norm(call: Call) -> Norm | None:
    """The norm that a module is: output = (weight + offset) · n(x) + bias, where n(x) knows nothing of the weight."""
    weight, output = getattr(call.module, "weight", None), call.output
    if not isinstance(weight, Tensor) or not isinstance(output, Tensor) or output.numel() != call.input.numel():
        return None
    if output.shape[-weight.ndim :] != weight.shape or linear_storage(call) is not None:
        return None
    bias, kept = getattr(call.module, "bias", None), weight.detach().clone()
    with torch.no_grad():
        weight.copy_(kept + 1.0)
        normal = cast(Tensor, call.again()) - output
        weight.copy_(kept)
        rest = output - (0 if bias is None else bias) - kept * normal
    live = normal != 0
    offset = round(float((rest / normal)[live].median()), 6) + 0.0
    same_everywhere = _close(rest + normal, (offset + 1) * normal) and not rest[~live].any()
    return Norm(call.path, offset, bias is not None) if same_everywhere else None


def linear_storage(call: Call) -> bool | None:
    """False for a linear that stores [O, I], True for [I, O], None for a module that is no linear."""
    weight, rows = getattr(call.module, "weight", None), call.rows
    if not isinstance(weight, Tensor) or weight.ndim != 2 or rows is None:
        return None
    bias = getattr(call.module, "bias", None)
    for transposed in (False, True):
        matrix = weight if transposed else weight.T
        if call.input.shape[-1] == matrix.shape[0] and rows.shape[-1] == matrix.shape[1]:
            product = call.input @ matrix
            if _close(product if bias is None else product + bias, rows):
                return transposed
    return None


class Surveyor:
    """Asks a trace the questions whose answers make a `Survey`."""

    def __init__(self, trace: Trace, heads: tuple[int, int]) -> None:
        self.trace, self.heads = trace, heads
        self.calls = trace.calls
        self.generator = torch.Generator().manual_seed(0)
        self.experts = expert_lists(trace.block)
        self.norms = {path: norm for path, call in self.calls.items() if (norm := measure_norm(call))}
        self.width = trace.output.shape[-1]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    @cached_property
    def sites(self) -> dict[str, bool]:
        """Every linear that may be quantized -> whether it stores [I, O]. Routers are left out."""
        found = {path: storage for path, call in self.calls.items() if (storage := linear_storage(call)) is not None}
        return {path: storage for path, storage in found.items() if not self._routes(path)}

    def _routes(self, path: str) -> bool:
        """A linear beside a list of experts with one output per expert, or a single one, weighs experts."""
        outputs = cast(Tensor, self.calls[path].rows).shape[-1]
        beside = [count for found, count in self.experts.items() if _parent(found) == _parent(path)]
        return any(outputs in (1, count) for count in beside)

    @cached_property
    def chosen(self) -> dict[str, int]:
        """The expert that stands for all of its list: the first one that was hit."""
        hit: dict[str, int] = {}
        for path in self.sites:
            if expert := split_expert(path, self.experts):
                hit[expert[0]] = min(expert[1], hit.get(expert[0], expert[1]))
        return hit

    def stands_for_all(self, path: str) -> bool:
        expert = split_expert(path, self.experts)
        return expert is None or self.chosen[expert[0]] == expert[1]

    def taps(self) -> list[list[str]]:
        """Sites grouped by the tensor that they read, in order of execution."""
        groups: list[list[str]] = []
        for path in filter(self.stands_for_all, self.sites):
            for group in groups:
                if same(self.calls[path].input, self.calls[group[0]].input):
                    group.append(path)
                    break
            else:
                groups.append([path])
        return groups

    def place(self, path: str) -> str:
        """A module's path, or that of the list it is in: one norm per head is one place."""
        parent = _parent(path)
        return parent if isinstance(self.trace.block.get_submodule(parent), nn.ModuleList) else path

    def norm_link(self, norm: Norm) -> tuple[list[str], Link | str]:
        """The sites that read a norm, and the edge to them or the reason why there is none."""
        rows = cast(Tensor, self.calls[norm.name].rows)
        fed = [path for path, call in self.calls.items() if path != norm.name and gathers(call.input, rows)]
        readers = [path for path in fed if path in self.sites and self.stands_for_all(path)]
        others = [path for path in fed if path not in self.sites and self._scalable(path)]
        received, output = self.trace.replay(change={norm.name: rows + self.random(*rows.shape)})
        leaks = [path for path, x in received.items() if path not in fed and not same(x, self.calls[path].input)]
        in_stream = not same(output, as_rows(self.trace.output)) or any(path in self.norms for path in leaks)
        blocked = [path for path in fed if path not in self.sites and path not in others] + leaks
        if not readers:
            return readers, POST_NORM if in_stream else INNER_NORM
        if in_stream:
            return readers, "its output also goes to the residual stream"
        if blocked:
            return readers, f"its output also goes to {blocked[0]}, which cannot be scaled along"
        return readers, Link("norm", norm, tuple(readers), tuple(others), inspect=self._inspect(readers + others))

    def _scalable(self, path: str) -> bool:
        weight = getattr(self.calls[path].module, "weight", None)
        return isinstance(weight, Tensor) and weight.ndim == 2 and weight.shape[1] == self.calls[path].input.shape[1]

    def _inspect(self, names: list[str]) -> str:
        """The smallest module that shows the effect; a linear alone is seen through its parent, but not the block."""
        path = common_module(names)
        return _parent(path) if path in self.sites and _parent(path) else path

    def linear_link(self, tap: list[str]) -> Link | str:
        """The edge from an earlier linear to a tap, or the reason why there is none."""
        reader = tap[0]
        order = list(self.calls)
        earlier = [p for p in self.sites if order.index(p) < order.index(reader) and self._same_expert(p, reader)]
        obstacle = "no norm with a gain and no linear feeds it directly"
        for source in reversed(earlier):
            touched = self._touched(source, reader)
            if touched is None:
                continue
            kind, layouts = self._candidates(source, reader, mixes=touched)
            fitting = frozenset(name for name, layout in layouts.items() if self._fits(source, reader, layout))
            if fitting:
                return Link(kind, source, tuple(tap), layouts=fitting, inspect=common_module(tap))
            expert = split_expert(source, self.experts)
            obstacle = f"what lies between {expert[2] if expert else source} and it does not commute with a scale"
        return obstacle

    def _same_expert(self, left: str, right: str) -> bool:
        one, other = split_expert(left, self.experts), split_expert(right, self.experts)
        return (one and one[:2]) == (other and other[:2])

    def _touched(self, source: str, reader: str) -> bool | None:
        """Whether one row of the source's output reaches other rows of the reader; None if it reaches none."""
        rows = cast(Tensor, self.calls[source].rows).clone()
        row = min(4, len(rows) - 1)
        rows[row] += self.random(rows.shape[-1])
        changed = self._received(source, rows, reader) != self.calls[reader].input
        hit = changed.any(1)
        if not hit.any():
            return None
        hit[row] = False
        return bool(hit.any())

    def _received(self, source: str, rows: Tensor, reader: str) -> Tensor:
        return self.trace.replay(change={source: rows})[0][reader]

    def _candidates(self, source: str, reader: str, *, mixes: bool) -> tuple[str, dict[str, Layout]]:
        outputs, inputs = cast(Tensor, self.calls[source].rows).shape[-1], self.calls[reader].input.shape[-1]
        if mixes:
            return "value", value_layouts(outputs, inputs, *self.heads)
        return "up", elementwise_layouts(outputs, inputs)

    def _fits(self, source: str, reader: str, layout: Layout) -> bool:
        """Whether dividing the layout's rows by random scales divides the reader's input by the same."""
        index, channels = layout
        rows = cast(Tensor, self.calls[source].rows).clone()
        chosen = torch.arange(rows.shape[-1]) if index is None else torch.tensor(index)
        scale = torch.exp(0.5 * self.random(len(chosen)))
        rows[:, chosen] /= scale
        expected = self.calls[reader].input / (scale if channels is None else scale[torch.tensor(channels)])
        return _close(self._received(source, rows, reader), expected)

    def steering(self, value: Link) -> tuple[list[str], list[str]]:
        """What steers an attention: its query-key norms, and the sites that reach its scores, straight or by a norm."""
        order = list(self.calls)
        earlier = order[: order.index(value.readers[0])]
        norms = [path for path in earlier if path in self.norms and self._makes_scores(path, value)]
        sites = [path for path in earlier if path in self.sites and self.stands_for_all(path)]
        return norms, [path for path in sites if self._feeds(path, norms) or self._makes_scores(path, value)]

    def _feeds(self, path: str, norms: list[str]) -> bool:
        rows = cast(Tensor, self.calls[path].rows)
        received, _ = self.trace.replay(change={path: rows + self.random(*rows.shape)})
        return any(not same(received[norm], self.calls[norm].input) for norm in norms)

    def _makes_scores(self, path: str, value: Link) -> bool:
        """Whether an output, other than V's rows in it, moves the attention output by its weights alone.

        The first token attends to nothing but itself (and perhaps to a sink), so its weights can only stretch each
        head's V; anything else that moves the attention output, like a gate, also changes the direction.
        """
        reader, rows = value.readers[0], cast(Tensor, self.calls[path].rows)
        noise = self.random(*rows.shape)
        if path == value.source:
            index = self._candidates(path, reader, mixes=True)[1][min(value.layouts)][0]
            if index is None:
                return False
            noise[:, torch.tensor(index)] = 0
        received, before = self._received(path, rows + noise, reader), self.calls[reader].input
        stretched = zip(received[0].chunk(self.heads[0]), before[0].chunk(self.heads[0]), strict=True)
        return not same(received, before) and all(proportional(new[None], old) for new, old in stretched)

    def stream_readers(self) -> set[str]:
        """Modules that read the residual stream: moved by a shift of the block's input, all else being frozen."""
        direction = self.random(self.width)
        received, _ = self.trace.replay(hidden=self.trace.hidden + direction)
        wide = {path: x - self.calls[path].input for path, x in received.items() if x.shape[-1] == self.width}
        return {path for path, change in wide.items() if proportional(change, direction)}

    def writes(self, path: str) -> bool:
        """Whether a module's output is added to the residual stream: a shift of it reappears in the block's output."""
        rows = self.calls[path].rows
        if rows is None or rows.shape[-1] != self.width or not (path in self.sites or path in self.norms):
            return False
        direction = self.random(self.width)
        _, output = self.trace.replay(change={path: rows + direction})
        return proportional(output - as_rows(self.trace.output), direction)


def survey(trace: Trace, heads: tuple[int, int]) -> Survey:
    """Surveys one block. `heads`: query and key-value heads of the probe's configuration."""
    ask = Surveyor(trace, heads)
    found = Survey(ask.experts, ask.sites, ask.taps())
    stream = ask.stream_readers()
    settled: set[str] = set()
    for norm in ask.norms.values():
        readers, outcome = ask.norm_link(norm)
        settled.update(readers)
        if isinstance(outcome, Link):
            found.links.append(outcome)
            continue
        found.note(ask.place(norm.name), outcome)
        for tap in found.taps:
            if tap[0] in readers:
                found.note(tap[0], f"{norm.name} feeds it, but {outcome}")
    for tap in found.taps:
        if settled.intersection(tap):
            continue
        link = "it reads the residual stream itself: no norm feeds it" if tap[0] in stream else ask.linear_link(tap)
        if isinstance(link, Link):
            found.links.append(link)
        else:
            found.note(tap[0], link)
    found.reads = [norm for path, norm in ask.norms.items() if path in stream]
    found.writes = [path for path in trace.calls if ask.stands_for_all(path) and ask.writes(path)]
    for link in [link for link in found.links if link.kind == "value"]:
        norms, sites = ask.steering(link)
        found.scores += [path for path in sites if path not in found.scores]
        places = {ask.place(path) for path in norms}
        found.refused = [(p, QUERY_KEY_NORM if p in places and r == INNER_NORM else r) for p, r in found.refused]
    return found
