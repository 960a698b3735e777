"""The calibration text in front of one block: what goes in, how the block is called, and what should come out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .hidden import HiddenStates
from .lanes import ALONE, Lanes
from .prologue import Calls

REPLAYED_TOKENS = 16384
"""Transforms that try candidates by running the inspected modules do so on about this many tokens, evenly spread."""
CPU = torch.device("cpu")


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
    device: torch.device = CPU
    """Where blocks compute."""

    @property
    def batches(self) -> int:
        return len(self.inputs)

    def forward(self, block: nn.Module, batch: int) -> Tensor:
        """The block's output for one micro-batch of the quantized stream; the next one is expected to follow."""
        with self.inputs.at(batch, self.device) as hidden:
            return self.call(block, batch, hidden)

    def forward_clean(self, block: nn.Module, batch: int) -> Tensor:
        """The block's output for one micro-batch of the original model's stream; the next one is expected to follow."""
        assert self.clean is not None, "the recipe did not ask for the original model's stream"
        with self.clean.at(batch, self.device) as hidden:
            return self.call(block, batch, hidden)

    def fill_targets(self, block: nn.Module) -> None:
        """Run the original block on the float stream, if it is wanted."""
        if self.targets is not None:
            for batch in range(self.batches):
                self.targets[batch] = self.forward_clean(block, batch)

    def replayed(self, lanes: Lanes = ALONE) -> tuple[int, ...]:
        """Those micro-batches here that are among some, evenly spread over all, of about REPLAYED_TOKENS tokens."""
        sizes = lanes.sizes or [self.inputs[0].shape[:2].numel()] * self.batches
        count = min(len(sizes), max(1, REPLAYED_TOKENS // sizes[0]))
        chosen = {index * len(sizes) // count for index in range(count)}
        here = lanes.here if lanes.sizes else range(self.batches)
        return tuple(place for place, index in enumerate(here) if index in chosen)


class Streams:
    """The hidden states in front of the block being worked on, and how every block is called with them.

    `inputs` come through the quantized blocks. `clean` come through the original ones and exist for recipes that train;
    `targets` are the next block's `clean` in the making, since training still reads the old ones.
    """

    def __init__(self, calls: Calls, inputs: HiddenStates, device: torch.device, spare: Callable[[int], int]) -> None:
        self._calls, self._inputs, self._device, self._spare = calls, inputs, device, spare
        self._clean: HiddenStates | None = None
        self._targets: HiddenStates | None = None

    def split(self, budget: int, directory: Path, home: torch.device) -> None:
        """Keep the original model's states from here on; both streams are the same so far."""
        self._clean = HiddenStates(budget, directory / "float", home)
        self._targets = HiddenStates(budget, directory / "target", home)
        for state in self._inputs:
            self._clean.append(state)
            self._targets.append(state)

    def text(self, index: int) -> Text:
        """The text as the block of this index sees it."""

        def call(block: nn.Module, batch: int, hidden: Tensor) -> Tensor:
            return self._calls.run(block, index, batch, hidden.to(self._device))

        def alike(a: int, b: int) -> bool:
            return self._inputs[a].shape == self._inputs[b].shape and self._calls.alike(index, a, b)

        onward = index + 1 < len(self._calls.by_block)
        streams = (self._inputs, self._clean, self._targets)
        return Text(call, *streams, onward, alike, self._spare(self._taken()), self._device)

    def _taken(self) -> int:
        """Bytes of all states in memory."""
        streams = (self._inputs, self._clean, self._targets)
        return sum(states.nbytes for states in streams if states is not None)

    def advance(self, text: Text, block: nn.Module | None) -> None:
        """Go on to the next block: send the quantized stream through the finished one, if that is still to be done.

        The float stream has its outputs already.
        """
        if block is not None:
            for batch in range(text.batches):
                self._inputs[batch] = text.forward(block, batch)
        self._clean, self._targets = self._targets, self._clean

    def _named(self) -> dict[str, HiddenStates]:
        return {"": self._inputs} if self._clean is None else {"": self._inputs, "float.": self._clean}

    def snapshot(self) -> dict[str, Tensor]:
        """Every state by name, for a file that `restore` reads."""
        return {f"{name}{k}": state for name, states in self._named().items() for k, state in states.snapshot().items()}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the states by those of a snapshot."""
        for name, states in self._named().items():
            states.restore({key: tensors[f"{name}{key}"] for key in states.names()})

    def clear(self) -> None:
        """Drop every state and its scratch files."""
        for states in (self._inputs, self._clean, self._targets):
            if states is not None:
                states.clear()
