"""How hidden states travel between the host's pinned memory and a GPU that works on them one after the other.

A copy that the host waits for leaves the GPU idle while it lasts and until the next work is queued, and a pass that
replaces the states would have two of them for every micro-batch. Two rules do without, and without a thread or buffers
of our own.

On the way there, a state is loaded on a side stream while the one before it is worked on. Its memory belongs to the
current stream: the side stream begins when that has come to this work, and behind it the current stream waits for what
was loaded, used or not. So torch may give the memory to anybody afterwards, also when the work fails, and no more than
one state is on the GPU before its time.

On the way back, a state is written to fresh pages of the host as part of the work, and whoever reads it there waits
first. torch gives freed pages away again when the copies that touch them are over. Until then they are memory beyond
the budget, so the host runs no more than a few copies ahead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

UNDER_WAY = 2
"""States that may be on their way back: the GPU is busy with the next one while the host queues work on another."""


class Ferry:
    """What travels of one list of states. On the host each is a tensor of its own, whose contents never change."""

    def __init__(self) -> None:
        self._side: torch.cuda.Stream | None = None
        self._loaded: tuple[Tensor, Tensor] | None = None
        """A state on the host, and its copy on the GPU."""
        self._returning: deque[torch.cuda.Event] = deque()

    @contextmanager
    def over(self, state: Tensor, following: Tensor | None, device: torch.device) -> Iterator[Tensor]:
        """A pinned state on the GPU, to be worked on; meanwhile another one is loaded, if it is pinned as well.

        All work is on the stream that is current here, the one that states come back on.
        """
        there = self._taken(state)
        if there is None:
            there = state.to(device, non_blocking=True)
        if following is None or not following.is_pinned():
            yield there
            return
        self._side = self._side or torch.cuda.Stream(device)
        current, loaded = torch.cuda.current_stream(device), torch.empty_like(following, device=device)
        self._side.wait_stream(current)
        with torch.cuda.stream(self._side):
            loaded.copy_(following, non_blocking=True)
        try:
            yield there
        finally:
            current.wait_stream(self._side)
            self._loaded = (following, loaded)

    def _taken(self, state: Tensor) -> Tensor | None:
        """The copy of the state, if it is the one that was loaded; another has been replaced, and is dropped."""
        loaded, self._loaded = self._loaded, None
        return loaded[1] if loaded is not None and loaded[0] is state else None

    def back(self, state: Tensor) -> Tensor:
        """Pinned memory that will hold a state of the GPU; complete as soon as `settle` has returned."""
        while len(self._returning) >= UNDER_WAY:
            self._returning.popleft().synchronize()
        pages = torch.empty(state.shape, dtype=state.dtype, pin_memory=True).copy_(state, non_blocking=True)
        self._returning.append(torch.cuda.current_stream(state.device).record_event())
        return pages

    def settle(self) -> None:
        """Wait until all that was brought back is complete."""
        while self._returning:
            self._returning.popleft().synchronize()
