"""A training step as one graph of the GPU's work, recorded once and replayed.

The steps of block training are thousands of small operations that differ in nothing but their inputs; started one by
one from Python they keep a GPU waiting. A step is recorded when it has run `EAGER` times, which fills every cache that
it looks into. What cannot be recorded (a copy from the CPU in the middle of a step, say) runs as it always did, and so
does everything on a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

EAGER = 2
"""Calls of a kind that run operation by operation before one is recorded."""

Step = Callable[..., Sequence[Tensor]]
"""(kind of step, tensors) -> tensors. It may read other tensors, if those are only ever written in place."""


class Replayed:
    """A step that a GPU replays, recorded once for every kind of step.

    What a call returns is overwritten by the next one of its kind.
    """

    def __init__(self, step: Step, device: torch.device) -> None:
        self._step = step
        self._records = device.type == "cuda"
        self._calls: Counter[Hashable] = Counter()
        self._graphs: dict[Hashable, tuple[Any, list[Tensor], Sequence[Tensor]]] = {}

    def __call__(self, kind: Hashable, *tensors: Tensor) -> Sequence[Tensor]:
        """The step's results. Tensors of one kind have the same shapes in every call."""
        self._calls[kind] += 1
        if not self._records or self._calls[kind] <= EAGER:
            return self._step(kind, *tensors)
        if kind not in self._graphs and not self._record(kind, tensors):
            return self._step(kind, *tensors)
        graph, inputs, outputs = self._graphs[kind]
        torch._foreach_copy_(inputs, list(tensors))
        graph.replay()
        return outputs

    def _record(self, kind: Hashable, tensors: Sequence[Tensor]) -> bool:
        inputs = [tensor.detach().clone() for tensor in tensors]
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        state = generator.clone_state()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads read the next block
                outputs = self._step(kind, *inputs)
        except RuntimeError:  # a recording that fails leaves its stream and its random numbers in place of ours
            torch.cuda.set_stream(stream)
            generator.graphsafe_set_state(state)
            self._records = False
            return False
        self._graphs[kind] = graph, inputs, outputs
        return True


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], by: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The gradients of outputs by inputs, as a step returns them: an empty tensor where there is none."""
    found = torch.autograd.grad(list(outputs), list(inputs), by, allow_unused=True)
    return [given.new_zeros(0) if gradient is None else gradient for gradient, given in zip(found, inputs, strict=True)]


def assign(parameters: Sequence[Tensor], found: Sequence[Tensor]) -> None:
    """Let the parameters have these gradients, for an optimizer."""
    for parameter, gradient in zip(parameters, found, strict=True):
        parameter.grad = gradient if gradient.shape == parameter.shape else None


@lru_cache(maxsize=256)
def index(places: tuple[int, ...], device: torch.device) -> Tensor:
    """An index tensor, made once: copies from the CPU cannot be recorded."""
    return torch.tensor(places, device=device)
