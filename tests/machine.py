"""A GPU that is told when to work, to test on a CPU who waits for whom.

Its streams run as late, or as early, as what they wait for allows, over memory that holds nan until something is
written there in that order: a wait that is missing shows in what is read.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

GPU = torch.device("cuda")


@dataclass(eq=False)
class Stream:
    """Operations in their order, of which the first `done` have been carried out; an `eager` one does them at once."""

    machine: Machine
    eager: bool = False
    queue: list[Callable[[], Any]] = field(default_factory=list)
    done: int = 0

    def add(self, operation: Callable[[], Any]) -> None:
        self.queue.append(operation)
        if self.eager:
            self.run()

    def run(self, until: int | None = None) -> None:
        """Carry out operations, and what they wait for on other streams."""
        while self.done < (len(self.queue) if until is None else until):
            operation, self.queue[self.done] = self.queue[self.done], bool  # it holds tensors no longer
            self.done += 1
            operation()

    def wait_stream(self, other: Stream) -> None:
        until = len(other.queue)
        self.add(lambda: other.run(until))

    def record_event(self) -> Event:
        return Event(self, len(self.queue))


@dataclass
class Event:
    """A place in a stream."""

    stream: Stream
    until: int

    def synchronize(self) -> None:
        self.stream.machine.waits += 1
        self.stream.run(self.until)


class Machine(TorchFunctionMode):
    """Runs what is said to torch meanwhile. Its tensors are a CPU's with a `place`, "gpu" or "pinned".

    The work's own stream is late, others are if they are not `early`.
    """

    def __init__(self, early: bool) -> None:
        super().__init__()
        self._early = early
        self.work = self.current = Stream(self)
        self.waits = 0
        """How often the host has waited for an event."""
        self.loads = 0
        """Copies on other streams than the work's."""
        self.live: weakref.WeakSet[Any] = weakref.WeakSet()
        """The GPU's memory that is taken: a token for each tensor."""

    def side(self, _device: torch.device) -> Stream:
        """Stands for `torch.cuda.Stream`."""
        return Stream(self, self._early)

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        """Stands for `torch.cuda.stream`."""
        before, self.current = self.current, stream
        yield
        self.current = before

    def computed(self, shape: Sequence[int], compute: Callable[[], Tensor]) -> Tensor:
        """A tensor of the GPU that is computed when its turn comes."""
        result = self._new(shape, "gpu")
        self.current.add(lambda: result.copy_(compute()))
        return result

    def _new(self, shape: Sequence[int], place: str) -> Tensor:
        tensor = torch.full(tuple(shape), torch.nan)
        tensor.place = place
        if place == "gpu":
            tensor.token = _Token()
            self.live.add(tensor.token)
            self.current.add(lambda: tensor.fill_(torch.nan))  # whoever had the memory before may still write there
        return tensor

    def _copied(self, to: Tensor, source: Tensor) -> Tensor:
        self.loads += self.current is not self.work
        self.current.add(lambda: to.copy_(source))
        return to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        place = getattr(args[0], "place", "") if args and isinstance(args[0], Tensor) else ""
        if func == Tensor.is_cuda.__get__:
            return place == "gpu"
        if name == "is_pinned":
            return place == "pinned"
        if name == "empty" and kwargs.get("pin_memory"):
            return self._new(args[0], "pinned")
        if name == "empty_like" and kwargs.get("device") == GPU:
            return self._new(args[0].shape, "gpu")
        if name == "copy_" and kwargs.get("non_blocking"):
            return self._copied(args[0], args[1])
        if name == "to" and args[1] == GPU:
            if place == "gpu":
                return args[0]
            assert place == "pinned" and kwargs.get("non_blocking"), "this would keep the host waiting"
            return self._copied(self._new(args[0].shape, "gpu"), args[0])
        if name == "to" and place == "gpu":
            self.work.run()
            return args[0].clone()
        return func(*args, **kwargs)


class _Token:
    pass
