"""The calibration text in front of one block: what goes in, how the block is called, and what should come out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from .hidden import HiddenStates

REPLAYED_TOKENS = 16384
"""Transforms that try candidates by running the inspected modules do so on about this many tokens, evenly spread."""


@dataclass(frozen=True)
class Text:
    """The calibration text as a block sees it: how to run a micro-batch, and the streams it comes from.

    `inputs` are what the quantized blocks before this one give. Where the recipe asks for the original model's stream,
    `clean` are its states in front of this block, and `targets` take those behind it.
    """

    call: Callable[[nn.Module, int, Tensor], Tensor]
    """(block, micro-batch, hidden states) -> the block's output hidden states [b, T, D]."""
    inputs: HiddenStates
    clean: HiddenStates | None = None
    targets: HiddenStates | None = None
    onward: bool = True
    """Whether another block follows, which wants this one's outputs for inputs."""
    alike: Callable[[int, int], bool] = lambda _a, _b: False
    """Whether two micro-batches may be stacked and sent through the block in one call."""
    budget: int = 0
    """Bytes that may be kept in memory between the passes of a sequential Round."""

    @property
    def batches(self) -> int:
        return len(self.inputs)

    def forward(self, block: nn.Module, batch: int) -> Tensor:
        """The block's output for one micro-batch of the quantized stream."""
        return self.call(block, batch, self.inputs[batch])

    def forward_clean(self, block: nn.Module, batch: int) -> Tensor:
        """The block's output for one micro-batch of the original model's stream."""
        assert self.clean is not None, "the recipe did not ask for the original model's stream"
        return self.call(block, batch, self.clean[batch])

    def fill_targets(self, block: nn.Module) -> None:
        """Run the original block on the float stream, if it is wanted."""
        if self.targets is not None:
            for batch in range(self.batches):
                self.targets[batch] = self.forward_clean(block, batch)

    def replayed(self) -> tuple[int, ...]:
        """Evenly spread micro-batches that hold about REPLAYED_TOKENS tokens."""
        first = self.inputs[0]
        count = min(self.batches, max(1, REPLAYED_TOKENS // (first.shape[0] * first.shape[1])))
        return tuple(index * self.batches // count for index in range(count))
