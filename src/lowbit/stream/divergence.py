"""What rounding one linear to one format does to the model's predictions, by doing it: `sensitivity` without theory.

Every linear is rounded alone, and the text sent from its block through the rest of the model: the mean divergence
KL(p ‖ p̂) of the next token's distribution from the original's. Nothing is approximated but that harms add up. It costs
half a forward for every linear and format with the whole model in memory, so it is for small models, or large GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ..modules.linear import install
from .checkpoint import free
from .hidden import HiddenStates, micro_batches
from .prologue import Calls, run_prologue
from .sensitivity import MICRO_BATCH, Choices, Inputs, Sensitivity, changed, head, spread

DIVERGENCE_TOKENS = 4096
"""Text that predictions are compared on: about this many tokens, evenly spread."""


@dataclass
class Divergence(Sensitivity):
    """The measurement of a bound checkpoint on windows of token ids; the text's hidden states spill to `scratch`."""

    @torch.no_grad()
    def losses(self, choices: Choices) -> dict[str, tuple[float, ...]]:
        """The mean divergence, nats per token, that every format of every linear in `choices` causes alone."""
        batches = micro_batches(list(self.windows), MICRO_BATCH)
        drawn = spread(batches, DIVERGENCE_TOKENS)
        text = HiddenStates(self.budget, self.scratch / "text")
        calls = run_prologue(self.model, self.anatomy, self.checkpoint, batches, text, self.dtype, self.device)
        blocks = self._installed()
        inputs, tuples = self._inputs(calls, blocks, [(batch, text[batch]) for batch in drawn])
        found: dict[str, tuple[float, ...]] = {}
        with head(self.model, self.anatomy, self.checkpoint, self.dtype, self.device, tuples) as logits_of:

            def predict(index: int) -> list[Tensor]:
                """Log-probabilities [b, T, V] of the drawn micro-batches, sent from this block on."""
                logits = []
                for place, batch in enumerate(drawn):
                    states = inputs[index][place]
                    for later in range(index, len(blocks)):
                        states = calls.run(blocks[later], later, batch, states)
                    logits.append(logits_of(batches[batch], states).log_softmax(-1))
                return logits

            wanted = predict(0)
            for index, block in enumerate(blocks):
                part = self.anatomy.blocks[index]
                with Inputs(block, part, self.recipe) as seen:
                    self._advance(calls, index, block, text)
                for site in part.sites:
                    name = self.anatomy.full_name(index, site.name)
                    if name in choices:
                        costs = []
                        for change in seen.changes(site, choices[name]):
                            with changed(site.weight(block), change):
                                costs.append(_divergence(wanted, predict(index)))
                        found[name] = tuple(costs) or (0.0,) * len(choices[name])
        text.clear()
        for block in blocks:
            free(block)
        return found

    def _inputs(
        self, calls: Calls, blocks: Sequence[nn.Module], drawn: Sequence[tuple[int, Tensor]]
    ) -> tuple[list[list[Tensor]], bool]:
        """The drawn micro-batches in front of every block, and whether blocks return tuples."""
        kept, tuples = [[states.to(self.device) for _, states in drawn]], False
        for index, block in enumerate(blocks):
            kept.append([])
            for (batch, _), states in zip(drawn, kept[index], strict=True):
                args, kwargs = calls.by_block[index][batch]
                output = block(states, *args, **kwargs)
                tuples = isinstance(output, tuple)
                kept[-1].append(output[0] if tuples else output)
        return kept, tuples

    def _installed(self) -> list[nn.Module]:
        """All blocks with their weights."""
        blocks = list(cast(nn.ModuleList, self.model.get_submodule(self.anatomy.layers)))
        for index, block in enumerate(blocks):
            prefix = self.anatomy.full_name(index, "") + "."
            tensors = self.checkpoint.read(self._names(index))
            held = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
            install(block, {}, held, self.dtype, self.device)
        return blocks


def _divergence(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """The mean of KL(p ‖ p̂) over tokens, from log-probabilities [b, T, V]."""
    sums = [float((p.exp() * (p - q)).sum(-1).double().sum()) for p, q in zip(wanted, found, strict=True)]
    return max(0.0, sum(sums) / sum(p.shape[0] * p.shape[1] for p in wanted))
