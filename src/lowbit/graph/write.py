"""Writes a survey of the small probe down for blocks of any dimensions: names, shapes, rows, every expert.

The probe's own anatomy is written by the same function before it is proved, so the formulas are proved with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from torch import Tensor, nn

from ..modules.attention import attention_modules
from .anatomy import BlockAnatomy, Edge, Heads, Norm, Rows, Site, Tap
from .layouts import Layout, elementwise_layouts, value_layouts
from .structure import expert_lists, split_expert
from .survey import Link, Survey


class Writer:
    """Knows one real block and how the survey's names map to its own."""

    def __init__(self, survey: Survey, block: nn.Module, heads: tuple[int, int]) -> None:
        self.survey, self.block, self.heads = survey, block, heads
        counts = expert_lists(block)
        self.counts = {path: counts[path] for path in survey.experts}

    def names(self, name: str) -> tuple[str, ...]:
        """The real modules that a probe module stands for: itself, or its like in every expert."""
        expert = split_expert(name, self.survey.experts)
        if expert is None:
            return (name,)
        path, _, rest = expert
        return tuple(f"{path}.{index}.{rest}" for index in range(self.counts[path]))

    def site(self, name: str) -> Site:
        module = self.block.get_submodule(name)
        rows, columns = cast(Tensor, module.weight).shape
        expert = split_expert(name, self.survey.experts)
        transposed = self.survey.transposed[self._surveyed(name)]
        shape = (columns, rows) if transposed else (rows, columns)
        bias = getattr(module, "bias", None) is not None
        return Site(name, shape, transposed, bias, None if expert is None else expert[1])

    def _surveyed(self, name: str) -> str:
        """The surveyed name that stands for a real one."""
        expert = split_expert(name, self.survey.experts)
        if expert is None:
            return name
        path, _, rest = expert
        return next(
            known for known in self.survey.transposed if split_expert(known, {path: 0}) and known.endswith(rest)
        )

    def taps(self) -> Iterator[Tap]:
        """Taps in order of execution; a list of experts comes expert by expert where its first tap stood."""
        done: set[str] = set()
        for tap in self.survey.taps:
            expert = split_expert(tap[0], self.survey.experts)
            if expert is None:
                yield Tap(tuple(self.site(name) for name in tap))
            elif expert[0] not in done:
                done.add(expert[0])
                mine = [t for t in self.survey.taps if (e := split_expert(t[0], {expert[0]: 0})) and e[0] == expert[0]]
                for index in range(self.counts[expert[0]]):
                    for group in mine:
                        yield Tap(tuple(self.site(self.names(name)[index]) for name in group))

    def edges(self) -> Iterator[tuple[Link, Edge]]:
        """Every edge and the link that it comes from.

        Raises ValueError where layouts that fit the probe alike differ in the real dimensions.
        """
        for link in self.survey.links:
            if isinstance(link.source, Norm):
                readers = tuple(self.site(real) for name in link.readers for real in self.names(name))
                name = f"{link.source.name} -> {readers[0].name}"
                yield link, Edge(name, link.source, readers, link.others, None, link.inspect, link.shift, link.kind)
                continue
            for index, real in enumerate(self.names(link.source)):
                source = self.site(real)
                readers = tuple(self.site(self.names(name)[index]) for name in link.readers)
                rows, channels = self._layout(link, source, readers[0])
                name, inspect = f"{real} -> {readers[0].name}", self.names(link.inspect)
                inside = inspect[index] if len(inspect) > 1 else link.inspect
                yield link, Edge(name, Rows(source, rows), readers, (), channels, inside, link.shift, link.kind)

    def _layout(self, link: Link, source: Site, reader: Site) -> Layout:
        outputs, inputs = source.shape[0], reader.shape[1]
        known = (
            value_layouts(outputs, inputs, *self.heads)
            if link.kind == "value"
            else elementwise_layouts(outputs, inputs)
        )
        fitting = {known[name] for name in link.layouts if name in known}
        if len(fitting) != 1:
            raise ValueError(f"The layout of {link.source} is ambiguous: {' or '.join(sorted(link.layouts))}.")
        return fitting.pop()


def write(survey: Survey, block: nn.Module, heads: tuple[int, int]) -> BlockAnatomy:
    """The anatomy of one block. `heads`: its model's (query, key-value) heads."""
    writer = Writer(survey, block, heads)
    real = [name for path in survey.writes for name in writer.names(path)]
    attentions = [path for path, _ in attention_modules(block)]
    edges = tuple(edge for _, edge in writer.edges())
    return BlockAnatomy(
        taps=tuple(writer.taps()),
        edges=edges,
        refused=tuple((name, reason) for place, reason in survey.refused for name in writer.names(place)),
        reads=tuple(survey.reads),
        writes=tuple(real),
        scores=tuple(survey.scores),
        attention=attentions[0] if len(attentions) == 1 else "",
        heads=_heads(edges, heads[0]),
    )


def _heads(edges: tuple[Edge, ...], query: int) -> Heads | None:
    """Head geometry from V's rows and the `query` heads that read them."""
    for edge in edges:
        if edge.kind == "value":
            width = edge.readers[0].shape[1] // query
            return Heads(query, query if edge.channels is None else (max(edge.channels) + 1) // width, width)
    return None
