"""Hidden states between two blocks: one tensor per micro-batch, on the GPU where there is ample room, else in memory up
to a budget and on disk beyond it.

Where a state lies never changes what it holds, so a run under any budget gives the same bytes. States on disk are raw
files in a scratch folder of the run directory; they are rewritten in place as the sweep advances.

Where a GPU works on states that live in memory, a pass over the text takes them by `at`, one behind the other: then the
next one travels while this one is worked on (`ferry`). Whoever reads a state by its index, in whatever order, sends
nothing ahead and gets it complete.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor

from ..formats.files import read_shard, write_shard
from .ferry import Ferry


class HiddenStates:
    """A list of micro-batches [b, T, D] on `home` that spills to `directory` when it outgrows `budget` bytes."""

    def __init__(self, budget: int, directory: Path, home: torch.device | str = "cpu") -> None:
        self._budget, self._home = budget, torch.device(home)
        self._directory = directory
        self._kept: list[Tensor | None] = []
        self._bytes = 0
        self._ferry = Ferry()

    def append(self, state: Tensor) -> None:
        """Add a micro-batch at the end."""
        self._kept.append(None)
        self[len(self._kept) - 1] = state

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: int) -> Tensor:
        kept = self._kept[index]
        if kept is None:
            return read_shard(self._file(index))["state"]
        self._ferry.settle()
        return kept

    def at(self, index: int, device: torch.device) -> AbstractContextManager[Tensor]:
        """A state to be worked on by `device`; if it lives in pinned memory, the next one is sent there meanwhile."""
        kept = self._kept[index]
        if device.type != "cuda" or kept is None or not kept.is_pinned():
            return nullcontext(self[index])
        return self._ferry.over(kept, self._kept[index + 1] if index + 1 < len(self) else None, device)

    def __setitem__(self, index: int, state: Tensor) -> None:
        old = self._kept[index]
        self._bytes -= 0 if old is None else old.nbytes
        if self._bytes + state.nbytes <= self._budget:
            self._kept[index] = self._at_home(state)
            self._bytes += state.nbytes
        else:
            self._kept[index] = None
            self._directory.mkdir(parents=True, exist_ok=True)
            write_shard(self._file(index), {"state": state.to("cpu")}, sync=False)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self._bytes

    def clear(self) -> None:
        """Drop every state and the scratch files."""
        self._kept, self._bytes, self._ferry = [], 0, Ferry()
        if self._directory.exists():
            for file in self._directory.glob("*.safetensors"):
                file.unlink()
            self._directory.rmdir()

    def names(self) -> list[str]:
        """The states' names in a snapshot."""
        return [f"state.{index:05d}" for index in range(len(self))]

    def snapshot(self) -> dict[str, Tensor]:
        """Every state by name, for a file that `restore` reads."""
        return {name: state.to("cpu") for name, state in zip(self.names(), self, strict=True)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Replace the states by those of a snapshot."""
        for index, name in enumerate(self.names()):
            self[index] = tensors[name]

    def _at_home(self, state: Tensor) -> Tensor:
        """The state where states live: pages that a GPU may copy from by itself take a tenth of the time."""
        return self._ferry.back(state) if self._home.type == "cpu" and state.is_cuda else state.to(self._home)

    def _file(self, index: int) -> Path:
        return self._directory / f"{index:05d}.safetensors"


def micro_batches(windows: list[Tensor], tokens: int) -> list[Tensor]:
    """Group token windows of equal length, in order, into batches [b, T] of at most `tokens` tokens (at least one)."""
    batches: list[list[Tensor]] = []
    for window in windows:
        last = batches[-1] if batches else None
        if last is not None and len(last[0]) == len(window) and (len(last) + 1) * len(window) <= tokens:
            last.append(window)
        else:
            batches.append([window])
    return [torch.stack(batch) for batch in batches]
