"""Finds out which rotations a model allows, by doing them to its double: unchanged logits are the only criterion.

What a family's norms subtract, where its gains stand and what its attention does to V need not be known: a rotation of
the residual stream either leaves the logits of the double as they were, or does so only where it keeps the mean, or
does not. The anatomy is consulted for the reason, which people are told. The double is not put back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor, nn

from ..numerics.maps import mean_preserving, random_orthogonal
from .anatomy import Anatomy, Rotations
from .prove import UNCHANGED
from .rotate import fold_model, rotate_heads, rotate_model
from .survey import measure_norm
from .trace import Call, Trace, as_rows, proportional


def find_rotations(probe: nn.Module, anatomy: Anatomy, outer: Mapping[str, Call], tokens: Tensor) -> Rotations:
    """What may be merged into the model of which `probe` is the double, and `anatomy` the double's anatomy.

    Args:
        outer: the calls of the modules outside the blocks.
        tokens: ids [B, T] to compute logits from.
    """
    search = _Search(probe, anatomy, tokens)
    heads = search.heads()
    tables, refused = search.embeddings(outer)
    refused = refused or _refused(anatomy)
    if refused:
        return Rotations("", refused, tables, heads)
    residual = search.residual(tables)
    refused = "" if residual else "a rotation of its residual stream changes the logits"
    return Rotations(residual, refused, tables, heads)


def _refused(anatomy: Anatomy) -> str:
    """What in the blocks stands in the way of the residual stream's rotation; "" where nothing is known to."""
    for block in anatomy.blocks:
        sites = {site.name for site in block.sites}
        folded = [edge.source for edge in block.edges]
        for path in block.writes:
            if path not in sites:
                return f"{path} writes into the residual stream, and no linear behind it could take its gain"
        for norm in block.reads:
            if norm not in folded:
                return f"{norm.name} reads the residual stream, and its gain cannot be folded into what reads it"
    return ""


class _Search:
    """Rotations done to one double, one after the other."""

    def __init__(self, probe: nn.Module, anatomy: Anatomy, tokens: Tensor) -> None:
        self.probe, self.anatomy, self.tokens = probe, anatomy, tokens
        self.blocks = cast(nn.ModuleList, probe.get_submodule(anatomy.layers))
        self.logits, self.entry = self._forward()

    @torch.no_grad()
    def _forward(self) -> tuple[Tensor, Tensor]:
        """The logits, and the residual stream in front of the first block as rows [N, D]."""
        trace = Trace(self.blocks[0])
        handle = self.blocks[0].register_forward_pre_hook(trace.enter, with_kwargs=True)
        try:
            return self.probe(input_ids=self.tokens, use_cache=False).logits, as_rows(trace.hidden)
        finally:
            handle.remove()

    def _unchanged(self) -> bool:
        return float((self._forward()[0] - self.logits).abs().max() / self.logits.abs().max()) <= UNCHANGED

    def heads(self) -> bool:
        """Whether V may be rotated within heads: more than a scale, which a gate behind the attention lets through."""
        widths = {
            edge.readers[0].shape[1] // self.anatomy.heads.query
            for block in self.anatomy.blocks
            for edge in block.edges
            if edge.kind == "value"
        }
        if len(widths) != 1:
            return False
        turn = random_orthogonal(widths.pop(), seed=0)
        self._turn_heads(turn)
        unchanged = self._unchanged()
        if not unchanged:
            self._turn_heads(turn.T)
        return unchanged

    def _turn_heads(self, turn: Tensor) -> None:
        for block, part in zip(self.blocks, self.anatomy.blocks, strict=True):
            rotate_heads(block, part, turn)

    def embeddings(self, outer: Mapping[str, Call]) -> tuple[tuple[str, ...], str]:
        """The tables whose rows are added to the residual stream before the blocks, and what else writes there."""
        direction = torch.randn(self.entry.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        tables: list[str] = []
        for path, call in outer.items():
            if call.rows is None or call.rows.shape[1] != len(direction) or not self._enters(call, direction):
                continue
            if measure_norm(call) is not None:
                return tuple(tables), f"{path} normalises the embedding, and no linear behind it could take its gain"
            if not isinstance(call.module, nn.Embedding):
                return tuple(tables), f"{path} writes into the residual stream before the blocks and is no embedding"
            tables.append(path)
        return tuple(tables), ""

    def _enters(self, call: Call, direction: Tensor) -> bool:
        """Whether a shift of the module's output reappears in front of the first block."""
        handle = call.module.register_forward_hook(lambda _module, _args, output: output + direction)
        try:
            return proportional(self._forward()[1] - self.entry, direction)
        finally:
            handle.remove()

    def residual(self, tables: tuple[str, ...]) -> str:
        """The kind of rotation that the residual stream allows. The double's norms stay folded."""
        anatomy = replace(self.anatomy, rotations=Rotations(embeddings=tables))
        width = self.entry.shape[1]
        fold_model(self.probe, anatomy)
        if not self._unchanged():
            return ""
        for kind, q in (("orthogonal", random_orthogonal(width, 0)), ("mean-preserving", mean_preserving(width, 0))):
            rotate_model(self.probe, anatomy, q)
            if self._unchanged():
                return kind
            rotate_model(self.probe, anatomy, q.T)
        return ""
