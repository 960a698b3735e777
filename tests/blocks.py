"""One block of a tiny model between reading and writing, for tests of what methods do to real blocks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from families import build, tokens
from torch import Tensor, nn
from transformers import PreTrainedModel

from lowbit.graph.anatomy import Anatomy
from lowbit.graph.discover import discover
from lowbit.graph.skeleton import unfuse_experts
from lowbit.methods.recipe import Recipe
from lowbit.methods.views import Stats
from lowbit.stream.block import _observe, quantize_block
from lowbit.stream.hidden import HiddenStates
from lowbit.stream.observe import Observed
from lowbit.stream.student import Student
from lowbit.stream.text import Text
from lowbit.stream.work import BlockWork


@cache
def anatomy_of(family: str) -> Anatomy:
    return discover(build(family).config)


@dataclass
class Workbench:
    """The first block of a model in fp32, with text in front of it; the rest of the model stays as it is."""

    family: str
    recipe: Recipe
    batches: int = 3
    outliers: bool = False
    """Whether norms in front of linears have a few large gains and offsets."""

    def __post_init__(self) -> None:
        self.model: PreTrainedModel = build(self.family)
        unfuse_experts(self.model)
        self.anatomy = anatomy_of(self.family)
        self.block: nn.Module = self.model.get_submodule(self.anatomy.full_name(0, ""))
        part = self.anatomy.blocks[0]
        if self.outliers:
            for norm in part.reads:
                module = self.block.get_submodule(norm.name)
                module.weight.data[::17] *= 10
                if norm.bias:
                    module.bias.data[::13] += 5
        self.ids = [tokens(seed=seed) for seed in range(self.batches)]
        self.logits = [self.forward(ids) for ids in self.ids]
        formats = {s.name: self.recipe.scheme.formats(self.anatomy.full_name(0, s.name)) for s in part.sites}
        tensors = {name: tensor.detach().clone() for name, tensor in self.block.named_parameters()}
        self.work = BlockWork(self.block, part, self.recipe, formats, tensors, torch.float32, torch.device("cpu"))

    @torch.no_grad()
    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits

    def text(self, drift: float = 0.0) -> Text:
        """The text in front of the block; the quantized stream is the float one with noise."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        hook = self.block.register_forward_pre_hook(lambda _, a, k: calls.append((a, k)), with_kwargs=True)
        for ids in self.ids:
            self.forward(ids)
        hook.remove()
        streams = [HiddenStates(1 << 30, Path("unused")) for _ in range(3)]
        for args, kwargs in calls:
            hidden = args[0] if args else kwargs["hidden_states"]
            for stream, noise in zip(streams, (drift, 0.0, 0.0), strict=True):
                stream.append(hidden + noise * torch.randn_like(hidden))

        def call(block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
            args, kwargs = calls[batch]
            given = (hidden, *args[1:]) if args else ()
            named = kwargs if args else kwargs | {"hidden_states": hidden}
            output = block(*given, **named)
            return output[0] if isinstance(output, tuple) else output

        return Text(call, *streams)

    def observed(self, text: Text) -> Observed:
        self.work.install_dense()
        return _observe(self.work, text, self.recipe.folds, outputs=(0,))

    @torch.no_grad()
    def student(self, drift: float = 0.0, seed: int = 0) -> Student:
        """A `BlockView` of the block, its targets filled in."""
        text = self.text(drift)
        stats: dict[str, Stats] = self.observed(text).stats
        text.fill_targets(self.block)
        return Student(self.work, text, stats, {}, seed)

    def change(self) -> float:
        """Largest change of the model's logits, relative to the largest, with the block as it is before rounding."""
        self.work.install_dense()
        pairs = [(self.forward(ids), logits) for ids, logits in zip(self.ids, self.logits, strict=True)]
        return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)

    def quantize(self, drift: float = 0.0) -> tuple[float, float]:
        """(error of plain rounding, error of the recipe)."""
        outcome = quantize_block(self.work, self.text(drift))
        return outcome.error_before, outcome.error_after
